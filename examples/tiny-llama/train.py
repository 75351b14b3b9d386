"""Train tiny-llama: a 4M-parameter Llama that writes Python and prose about Python.

The text is what every Python brings along: the standard library's source, its tests, the language
reference behind `help()`, and questions and answers made of docstrings. From it come a byte-level
BPE tokenizer and a model in Hugging Face layout, which `transformers` loads as it is.

    python train.py --device cuda --out .     # makes the files beside this script
    python train.py --quick --out quick       # ten steps on a CPU: does everything run?

Needs torch (2.9 or later), tokenizers and safetensors. Training is seeded, but it stops by the
clock and GPUs add in any order, so a second run gives a sibling, not the same bytes.
"""

import argparse
import ast
import codecs
import datetime
import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

HERE = Path(__file__).parent
STDLIB = Path(sysconfig.get_path("stdlib"))  # some systems strip theirs of the tests
CONFIG = json.loads((HERE / "config.json").read_text())
# The first ids, in this order: config.json and the chat template in tokenizer_config.json agree.
SPECIALS = ["<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]

# How often each kind of document stands in the training stream: tests are twice the size of the
# library and duller, prose is scarce.
REPEATS = {"library": 2, "tests": 1, "prose": 2, "chat": 2}

TOKENS_PER_STEP = 64 * 1024
# (share of the time until which it holds, window length): the long windows at the end make every
# position up to max_position_embeddings a trained one.
WINDOWS = [(0.7, 1024), (1.0, 2048)]
# Nearly twenty passes over little text: with no dropout and a decay of 0.4 the held-out loss rose
# from the fifth pass on. Dropout 0.2 with decay 0.7 ended at 1.399 nats a token, these at 1.381.
DROPOUT = 0.1
MATRIX_LR, MATRIX_DECAY = 3e-3, 1.5
EMBED_LR, EMBED_DECAY, BETAS = 3e-3, 0.3, (0.9, 0.95)

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_held_out(name):
    """Decide by the hash of a file's name, so that the split is the same everywhere: about 5 %."""
    return hashlib.sha256(name.encode()).digest()[-1] < 13


def read_corpus(stdlib):
    """Return documents `(kind, name, text)` of a standard library's folder, in a fixed order."""
    documents = []
    for path in sorted(stdlib.rglob("*")):
        name = path.relative_to(stdlib).as_posix()
        # Left out: other people's packages, and files that are tables rather than text.
        if name.startswith(("site-packages/", "dist-packages/", "encodings/", "pydoc_data/")):
            continue
        if path.suffix not in (".py", ".txt", ".rst") or not path.is_file():
            continue
        raw, is_test = path.read_bytes(), "/test" in "/" + name
        if sum(byte > 127 for byte in raw) > len(raw) / 50 or (is_test and path.suffix != ".py"):
            continue
        text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
        kind = "prose" if path.suffix != ".py" else "tests" if is_test else "library"
        if kind != "library" or text.strip():
            documents.append((kind, name, text))
        if kind == "library":
            documents += [("chat", name, chat) for chat in docstring_chats(name, text)]
    documents += language_reference(stdlib)
    return documents


def chat_text(question, answer):
    """Spell an exchange as the chat template does, less what `encode` puts around a document."""
    return f"<|user|>{question}<|end|><|assistant|>{answer}"


def docstring_chats(name, source):
    """Make a question and its answer of every docstring in a module's source."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a library newer than the Python that reads it
        return
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    pending = [(module, tree)]
    while pending:
        path, node = pending.pop()
        named = [child for child in node.body if isinstance(child, (*FUNCTIONS, ast.ClassDef))]
        pending += [(f"{path}.{child.name}", child) for child in named]
        answer = ast.get_docstring(node) or ""
        if len(answer) >= 40:
            is_function = isinstance(node, FUNCTIONS)
            question = f"What does {path} do?" if is_function else f"What is {path}?"
            yield chat_text(question, answer[:2000])


def language_reference(stdlib):
    """The topics of `help()` as prose, the opening of each as an answer, and the Zen of Python."""
    for topic, text in first_value(stdlib / "pydoc_data" / "topics.py").items():
        name = f"pydoc_data/topics/{topic}"
        yield "prose", name, text
        opening = text[:1200].rpartition("\n\n")[0] or text[:1200]
        yield "chat", name, chat_text(f"Tell me about {topic}.", opening)
    yield "prose", "this", codecs.decode(first_value(stdlib / "this.py"), "rot13")


def first_value(path):
    """Return the literal that a module's first assignment assigns."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return ast.literal_eval(next(node for node in body if isinstance(node, ast.Assign)).value)


def train_tokenizer(texts):
    """Train a byte-level BPE: its alphabet is the 256 bytes, so that any text round trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = dict(vocab_size=CONFIG["vocab_size"], special_tokens=SPECIALS, show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", CONFIG["bos_token_id"])]
    )
    return tokenizer


def size(texts):
    """Return the bytes of `texts` together."""
    return sum(len(text.encode()) for text in texts)


def encode(tokenizer, texts):
    """Return all documents as one line of tokens, each between `<|begin|>` and `<|end|>`."""
    encodings = tokenizer.encode_batch_fast(texts)
    return torch.cat([torch.tensor(e.ids + [CONFIG["eos_token_id"]]) for e in encodings])


class Layer(nn.Module):
    """One Llama block. Submodules carry Hugging Face's names: the state dict is the checkpoint."""

    def __init__(self, hidden_size, intermediate_size, q_size, kv_size, eps):
        super().__init__()

        def linears(**sizes):
            return nn.ModuleDict({k: nn.Linear(*size, bias=False) for k, size in sizes.items()})

        q, kv = (hidden_size, q_size), (hidden_size, kv_size)
        wide = (hidden_size, intermediate_size)
        self.input_layernorm = nn.RMSNorm(hidden_size, eps)
        self.self_attn = linears(q_proj=q, k_proj=kv, v_proj=kv, o_proj=q[::-1])
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps)
        self.mlp = linears(gate_proj=wide, up_proj=wide, down_proj=wide[::-1])
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x, cos, sin):
        attn, mlp = self.self_attn, self.mlp
        y = self.input_layernorm(x)
        q, k, v = (attn[name](y) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (z.unflatten(-1, (-1, CONFIG["head_dim"])).transpose(1, 2) for z in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.dropout(attn["o_proj"](y.transpose(1, 2).flatten(2)))
        y = self.post_attention_layernorm(x)
        return x + self.dropout(mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y)))


def rotate(x, cos, sin):
    """Rotary embedding in Llama's layout: dimension i is paired with i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Llama(nn.Module):
    """The layers between embedding and final norm; the embedding, tied, is the output as well."""

    def __init__(self, config):
        super().__init__()
        hidden, eps, dim = config["hidden_size"], config["rms_norm_eps"], config["head_dim"]
        q_size, kv_size = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        sizes = hidden, config["intermediate_size"], q_size, kv_size, eps
        layers = nn.ModuleList(Layer(*sizes) for _ in range(config["num_hidden_layers"]))
        self.model = nn.ModuleDict(dict(layers=layers, norm=nn.RMSNorm(hidden, eps)))
        self.model["embed_tokens"] = nn.Embedding(config["vocab_size"], hidden)
        frequencies = config["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
        angles = torch.outer(torch.arange(config["max_position_embeddings"]), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(layers) if is_residual else 1))

    def forward(self, ids):
        """Return the final hidden states of `ids`, int [batch, length]."""
        x = F.dropout(self.model["embed_tokens"](ids), DROPOUT, self.training)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        return self.model["norm"](x)


def sum_loss(hidden, embedding, targets):
    """Sum of the next-token losses in nats; a target of -1 does not count."""
    logits = F.linear(hidden, embedding).float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")


class Muon:
    """Muon (Jordan et al., 2024), its step scaled as in Liu et al. (arXiv 2502.16982).

    Momentum of a matrix is replaced by the nearest orthogonal one, through five steps of a
    Newton-Schulz iteration, done for all matrices of one shape at once.
    """

    def __init__(self, matrices, momentum=0.95):
        self.momentum, self.groups = momentum, {}
        for matrix in matrices:
            self.groups.setdefault(matrix.shape, []).append(matrix)
        self.buffers = {s: torch.zeros_like(torch.stack(g)) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self, lr, decay):
        for shape, group in self.groups.items():
            gradient = torch.stack([matrix.grad for matrix in group])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp_(buffer, self.momentum))
            torch._foreach_mul_(group, 1 - lr * decay)
            torch._foreach_add_(group, list(update), alpha=-lr * 0.2 * math.sqrt(max(shape)))


def orthogonal(x):
    """Push the singular values of each matrix in a batch towards one."""
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).float()


@torch.no_grad()
def evaluate(model, loss, tokens, length=1024, batch=64):
    """Return the mean loss in nats per token over consecutive windows of `tokens`."""
    padding = -(len(tokens) - 1) % length
    inputs = F.pad(tokens[:-1], (0, padding)).view(-1, length)
    targets = F.pad(tokens[1:], (0, padding), value=-1).view(-1, length)
    embedding = model.model["embed_tokens"].weight
    total, bf16 = 0.0, torch.autocast(tokens.device.type, torch.bfloat16)
    model.eval()
    # Layers are compiled for training's shapes; a few eager batches cost less than another one.
    with torch.compiler.set_stance("force_eager"), bf16:
        for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
            total += loss(model(x), embedding, y).item()
    model.train()
    return total / (len(tokens) - 1)


def train(model, stream, held_out, minutes, max_steps, tokens_per_step):
    """Train until the minutes or the steps are over; returns the number of steps.

    The learning rate rises over 2 % of the time, holds until 30 % and falls to zero in a line.
    """
    device = stream.device
    weights = dict(model.named_parameters())
    embedding = weights["model.embed_tokens.weight"]
    muon = Muon([w for w in weights.values() if w.ndim == 2 and w is not embedding])
    norms = dict(params=[w for w in weights.values() if w.ndim == 1], weight_decay=0.0)
    adam = torch.optim.AdamW(
        [dict(params=[embedding]), norms], betas=BETAS, weight_decay=EMBED_DECAY
    )
    loss = sum_loss
    if device.type == "cuda":  # one layer is compiled once per length and serves all layers
        for layer in model.model["layers"]:
            layer.compile(dynamic=False)
        loss = torch.compile(sum_loss, dynamic=False)

    def gradient(length):
        starts = torch.randint(len(stream) - length, (tokens_per_step // length, 1), device=device)
        window = stream[starts + torch.arange(length + 1, device=device)].long()
        with torch.autocast(device.type, torch.bfloat16):
            mean = loss(model(window[:, :-1]), embedding, window[:, 1:]) / tokens_per_step
        model.zero_grad()
        mean.backward()
        return mean.detach()

    for _, length in WINDOWS:  # compile before the clock runs
        gradient(length)
    step, begin = 0, time.monotonic()
    while True:
        seconds = time.monotonic() - begin
        progress = max(seconds / (60 * minutes), step / max_steps)
        if progress >= 1:
            return step
        length = next(length for until, length in WINDOWS if progress < until)
        mean = gradient(length)
        rate = min(1.0, progress / 0.02, (1 - progress) / 0.7)
        muon.step(MATRIX_LR * rate, MATRIX_DECAY)
        for group in adam.param_groups:
            group["lr"] = EMBED_LR * rate
        adam.step()
        if step % 10 == 0:
            mean = mean.item()  # waits: the clock must not run ahead of the GPU
        if step % 500 == 0:
            held = evaluate(model, loss, held_out)
            print(f"{step:6} {seconds:5.0f} s  train {mean:.3f}  held out {held:.3f}", flush=True)
        step += 1


def save(model, tokenizer, report, out):
    """Write the folder that `from_pretrained` reads, and training.json."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (out / name).write_text((HERE / name).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="model folder to write")
    add("--stdlib", type=Path, default=STDLIB, help="library folder (default: this Python's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--minutes", type=float, default=2.0, help="time to train (default: 2)")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="little text and ten steps: a smoke test")
    args = parser.parse_args()
    begin, device = time.monotonic(), torch.device(args.device)
    torch.manual_seed(args.seed)

    documents = read_corpus(args.stdlib)[:: 16 if args.quick else 1]
    texts, held_texts = {k: [] for k in REPEATS}, {k: [] for k in REPEATS}
    for kind, name, text in documents:
        (held_texts if is_held_out(name) else texts)[kind].append(text)
    held_texts["all"] = [t for k in held_texts for t in held_texts[k]]
    tokenizer = train_tokenizer(t for k in texts if k != "tests" for t in texts[k])
    stream = [t for k in texts for t in texts[k] * REPEATS[k]]
    random.Random(args.seed).shuffle(stream)  # so that a window is not all of one kind
    stream = encode(tokenizer, stream).to(device, torch.int16)
    held_out = {k: encode(tokenizer, held_texts[k]).to(device) for k in held_texts if held_texts[k]}
    print(f"{len(stream)} tokens from {args.stdlib}, {time.monotonic() - begin:.0f} s", flush=True)

    model = Llama(CONFIG).to(device)
    limits = (60, 10, 4096) if args.quick else (args.minutes, 10**9, TOKENS_PER_STEP)
    steps = train(model, stream, held_out["all"], *limits)
    seconds = time.monotonic() - begin

    with torch.no_grad():  # report what is saved: the weights as bf16 holds them
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())

    losses = {}
    for kind, tokens in held_out.items():
        nats, n_bytes = evaluate(model, sum_loss, tokens), size(held_texts[kind])
        bits = round(nats * len(tokens) / n_bytes / math.log(2), 4)
        losses[kind] = dict(nats_per_token=round(nats, 4), bits_per_byte=bits)
        losses[kind].update(tokens=len(tokens), bytes=n_bytes)
    report = dict(
        parameters=sum(weight.numel() for weight in model.parameters()),
        held_out=losses,
        train_bytes_by_kind={k: size(texts[k]) for k in texts},
        corpus_bytes=size(text for _, _, text in documents),
        corpus_sha256=hashlib.sha256("".join(t for _, _, t in documents).encode()).hexdigest(),
        stream_tokens=len(stream),
        steps=steps,
        tokens=steps * limits[2],
        seconds=round(seconds, 1),
        seed=args.seed,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    save(model, tokenizer, report, args.out)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

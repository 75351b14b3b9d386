"""Train tiny-llama: a 4M-parameter Llama that writes Python and prose about Python.

The text is what every Python brings along: the standard library's source, its tests, the language
reference behind `help()`, and questions and answers made of docstrings. From it come a byte-level
BPE tokenizer and a model in Hugging Face layout, which `transformers` loads as it is.

    python train.py --device cuda --minutes 4.5      # what made the files beside this script
    python train.py --quick --out /tmp/tiny          # ten steps on a CPU: does everything run?

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

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIALS = [BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=1536,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=2048,
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    bos_token_id=SPECIALS.index(BOS),
    eos_token_id=SPECIALS.index(EOS),
    pad_token_id=SPECIALS.index(PAD),
    torch_dtype="bfloat16",
)

# How often each kind of document stands in the training stream: tests are twice the size of the
# library and duller, prose is scarce.
REPEATS = {"library": 2, "tests": 1, "prose": 3, "chat": 2}

TOKENS_PER_STEP = 64 * 1024
# (share of the time until which it holds, window length): short windows are cheap and teach most;
# the long ones at the end make every position up to max_position_embeddings a trained one.
WINDOWS = [(0.5, 512), (0.8, 1024), (1.0, 2048)]
MATRIX_LR, MATRIX_DECAY = 3e-3, 0.4  # many passes over little text want a strong decay
EMBED_LR, EMBED_DECAY = 3e-3, 0.1


# ---- Text ----------------------------------------------------------------------------------------


def is_held_out(name):
    """Decide by the hash of a file's name, so that the split is the same everywhere: about 5 %."""
    return hashlib.sha256(name.encode()).digest()[0] < 13


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
        raw = path.read_bytes()
        is_test = "/test" in "/" + name
        if sum(byte > 127 for byte in raw) > len(raw) / 50 or (is_test and path.suffix != ".py"):
            continue
        text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
        if path.suffix != ".py":
            documents.append(("prose", name, text))
        elif is_test:
            documents.append(("tests", name, text))
        elif text.strip():
            documents.append(("library", name, text))
            documents += [("chat", name, chat) for chat in docstring_chats(name, text)]
    documents += language_reference(stdlib)
    return documents


def chat_text(question, answer):
    """Spell one exchange the way CHAT_TEMPLATE does, less what `encode` puts around a document."""
    return f"<|user|>{question}{EOS}<|assistant|>{answer}"


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
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                pending.append((f"{path}.{child.name}", child))
        answer = ast.get_docstring(node) or ""
        if len(answer) >= 40:
            verb = "is" if isinstance(node, (ast.Module, ast.ClassDef)) else "does"
            yield chat_text(f"What {verb} {path}{' do' if verb == 'does' else ''}?", answer[:2000])


def language_reference(stdlib):
    """The topics of `help()` as prose, the opening of each as an answer, and the Zen of Python."""
    module = ast.parse((stdlib / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    topics = next(node for node in module.body if isinstance(node, ast.Assign)).value
    for topic, text in ast.literal_eval(topics).items():
        name = f"pydoc_data/topics/{topic}"
        yield "prose", name, text
        opening = text[:1200].rpartition("\n\n")[0] or text[:1200]
        yield "chat", name, chat_text(f"Tell me about {topic}.", opening)
    module = ast.parse((stdlib / "this.py").read_text(encoding="utf-8"))
    zen = next(node for node in module.body if isinstance(node, ast.Assign)).value
    yield "prose", "this", codecs.decode(ast.literal_eval(zen), "rot13")


def train_tokenizer(texts):
    """Train a byte-level BPE: its alphabet is the 256 bytes, so that any text round trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, CONFIG["bos_token_id"])]
    )
    return tokenizer


def encode(tokenizer, texts):
    """Return all documents as one line of tokens, each between `<|begin|>` and `<|end|>`."""
    encodings = tokenizer.encode_batch_fast(texts)
    return torch.cat([torch.tensor(e.ids + [CONFIG["eos_token_id"]]) for e in encodings])


# ---- Model ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One Llama block. Submodules carry Hugging Face's names: the state dict is the checkpoint."""

    def __init__(self, hidden_size, intermediate_size, q_size, kv_size, eps):
        super().__init__()

        def linear(rows, columns):
            return nn.Linear(rows, columns, bias=False)

        self.input_layernorm = nn.RMSNorm(hidden_size, eps)
        self.self_attn = nn.ModuleDict(
            dict(
                q_proj=linear(hidden_size, q_size),
                k_proj=linear(hidden_size, kv_size),
                v_proj=linear(hidden_size, kv_size),
                o_proj=linear(q_size, hidden_size),
            )
        )
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps)
        self.mlp = nn.ModuleDict(
            dict(
                gate_proj=linear(hidden_size, intermediate_size),
                up_proj=linear(hidden_size, intermediate_size),
                down_proj=linear(intermediate_size, hidden_size),
            )
        )

    def forward(self, x, cos, sin):
        attn, mlp = self.self_attn, self.mlp
        y = self.input_layernorm(x)
        q, k, v = (
            attn[name](y).unflatten(-1, (-1, CONFIG["head_dim"])).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attn["o_proj"](y.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))


def rotate(x, cos, sin):
    """Rotary embedding in Llama's layout: dimension i is paired with i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, eps, dim = config["hidden_size"], config["rms_norm_eps"], config["head_dim"]
        q_size = config["num_attention_heads"] * dim
        kv_size = config["num_key_value_heads"] * dim
        sizes = hidden, config["intermediate_size"], q_size, kv_size, eps
        layers = nn.ModuleList(Layer(*sizes) for _ in range(config["num_hidden_layers"]))
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config["vocab_size"], hidden),
                layers=layers,
                norm=nn.RMSNorm(hidden, eps),
            )
        )
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
        x = self.model["embed_tokens"](ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        return self.model["norm"](x)


def sum_loss(hidden, embedding, targets):
    """Sum of the next-token losses in nats; targets below zero do not count."""
    logits = F.linear(hidden, embedding).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


# ---- Training ------------------------------------------------------------------------------------


class Muon:
    """Muon (Jordan et al., 2024), its step scaled as in Liu et al. (arXiv 2502.16982).

    Momentum of a matrix is replaced by the nearest orthogonal one, through five steps of a
    Newton-Schulz iteration, done for all matrices of one shape at once.
    """

    def __init__(self, matrices, momentum=0.95):
        self.momentum = momentum
        self.groups = {}
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
    total = 0.0
    # The layers are compiled for training's shapes; a few eager batches are cheaper than one more.
    with torch.compiler.set_stance("force_eager"), autocast(tokens.device):
        for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
            total += loss(model(x), embedding, y).item()
    return total / (len(tokens) - 1)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def train(model, stream, held_out, minutes, max_steps, tokens_per_step):
    """Train until the minutes or the steps are over; returns the number of steps.

    The learning rate rises over 2 % of the time, holds until 30 % and falls to zero in a line.
    """
    device = stream.device
    weights = dict(model.named_parameters())
    embedding = weights["model.embed_tokens.weight"]
    muon = Muon([w for w in weights.values() if w.ndim == 2 and w is not embedding])
    norms = [w for w in weights.values() if w.ndim == 1]
    adam = torch.optim.AdamW(
        [dict(params=[embedding], weight_decay=EMBED_DECAY), dict(params=norms, weight_decay=0.0)],
        betas=(0.9, 0.95),
    )
    loss = sum_loss
    if device.type == "cuda":  # one layer is compiled once per length and serves all layers
        for layer in model.model["layers"]:
            layer.compile(dynamic=False)
        loss = torch.compile(sum_loss, dynamic=False)

    def gradient(length):
        starts = torch.randint(len(stream) - length, (tokens_per_step // length, 1), device=device)
        window = stream[starts + torch.arange(length + 1, device=device)].long()
        with autocast(device):
            mean = loss(model(window[:, :-1]), embedding, window[:, 1:]) / tokens_per_step
        mean.backward()
        return mean.detach()

    begin = time.monotonic()
    for _, length in WINDOWS:  # compile before the clock runs
        gradient(length)
        model.zero_grad()
    print(f"warm after {time.monotonic() - begin:.0f} s", flush=True)

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
        model.zero_grad()
        if step % 10 == 0:
            mean = mean.item()  # waits: the clock must not run ahead of the GPU
        if step % 500 == 0:
            held = evaluate(model, loss, held_out)
            print(f"{step:6} {seconds:5.0f} s  window {length:4}  train {mean:.3f}  "
                  f"held out {held:.3f}", flush=True)
        step += 1


# ---- Command line --------------------------------------------------------------------------------


def save(model, tokenizer, out):
    """Write the folder that `from_pretrained` reads."""

    def write(name, content):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")

    tensors = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    write("config.json", CONFIG)
    write("generation_config.json", {k: v for k, v in CONFIG.items() if k.endswith("token_id")})
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    write("tokenizer_config.json", tokenizer_config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="model folder to write")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")),
                        help="a Python's Lib folder (default: this one's; some systems strip theirs)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4.5, help="time to train (default: 4.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little text and ten steps: a smoke test")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    begin = time.monotonic()

    documents = read_corpus(args.stdlib)
    random.Random(args.seed).shuffle(documents)  # neighbours in the stream share a window
    if args.quick:
        documents = documents[:600]
    split = {False: {}, True: {}}  # is it held out? -> kind -> texts
    for kind, name, text in documents:
        split[is_held_out(name)].setdefault(kind, []).append(text)
    size = {k: sum(len(text.encode()) for text in split[False][k]) for k in split[False]}
    print(f"corpus in {args.stdlib}, bytes to train on: {size}", flush=True)

    tokenizer = train_tokenizer(t for k in split[False] if k != "tests" for t in split[False][k])
    stream = [t for k, texts in split[False].items() for t in texts for _ in range(REPEATS[k])]
    random.Random(args.seed).shuffle(stream)
    stream = encode(tokenizer, stream).to(device, torch.int16)
    held_out = {k: encode(tokenizer, texts).to(device) for k, texts in split[True].items()}
    everything = torch.cat(list(held_out.values()))
    print(f"tokens: {len(stream)} in the stream, {len(everything)} held out; "
          f"{time.monotonic() - begin:.0f} s", flush=True)

    model = Llama(CONFIG).to(device)
    limits = (60.0, 10, 4096) if args.quick else (args.minutes, 10**9, TOKENS_PER_STEP)
    steps = train(model, stream, everything, *limits)
    seconds = time.monotonic() - begin

    with torch.no_grad():  # report what is saved: the weights as bf16 holds them
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    held_out_bytes = {k: sum(len(t.encode()) for t in split[True][k]) for k in split[True]}

    def held_out_loss(tokens, size):
        nats = evaluate(model, sum_loss, tokens)
        bits = nats * len(tokens) / size / math.log(2)
        return dict(nats_per_token=round(nats, 4), bits_per_byte=round(bits, 4),
                    tokens=len(tokens), bytes=size)

    text = "".join(text for _, _, text in documents)
    report = dict(
        parameters=sum(w.numel() for w in model.parameters()),
        held_out=held_out_loss(everything, sum(held_out_bytes.values())),
        held_out_by_kind={k: held_out_loss(held_out[k], held_out_bytes[k]) for k in sorted(held_out)},
        corpus_bytes=len(text.encode()),
        corpus_sha256=hashlib.sha256(text.encode()).hexdigest(),
        train_bytes_by_kind=dict(sorted(size.items())),
        stream_tokens=len(stream),
        steps=steps,
        tokens=steps * limits[2],
        seconds=round(seconds, 1),
        seed=args.seed,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, args.out)
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

"""Llama-shaped models in float64 NumPy, and small ones written to disk, for the engine's tests.

`logits` is a whole forward pass without cache, pages, batch or fused weights. `write_model` makes a
folder as Hugging Face lays it out: random float32 weights, a byte-level tokenizer.
"""

import json
import math

import numpy as np

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "bos_token_id": 0,
}
KINDS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 1,
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 20},
}


def config_of(kind, **changes):
    """The content of config.json of a small model."""
    config = {**SMALL, **KINDS[kind], **changes}
    if kind in ("llama", "llama3"):
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def weights_of(config, seed=0):
    """{name: float32 array} of all that the architecture has; norms and biases are not trivial."""
    rng = np.random.default_rng(seed)
    kind = config["architectures"][0]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = head_dim(config)
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    has_bias = config.get("attention_bias", False)
    weights = {}

    def matrix(name, rows, cols, bias=False):
        weights[name + ".weight"] = rng.normal(0, 1.5 / math.sqrt(cols), (rows, cols))
        if bias:
            weights[name + ".bias"] = rng.normal(0, 0.2, rows)

    def norm(name, size=hidden):
        weights[name + ".weight"] = rng.normal(1, 0.2, size)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attn, mlp = layer + "self_attn.", layer + "mlp."
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            matrix(attn + name, rows, hidden, has_bias or kind == "Qwen2ForCausalLM")
        matrix(attn + "o_proj", hidden, q, has_bias)
        for name in ("gate_proj", "up_proj"):
            matrix(mlp + name, inner, hidden, config.get("mlp_bias", False))
        matrix(mlp + "down_proj", hidden, inner, config.get("mlp_bias", False))
        norm(layer + "input_layernorm")
        norm(layer + "post_attention_layernorm")
        if kind == "Qwen3ForCausalLM":
            norm(attn + "q_norm", dim)
            norm(attn + "k_norm", dim)
    norm("model.norm")
    if not config.get("tie_word_embeddings", False):
        matrix("lm_head", config["vocab_size"], hidden)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def head_dim(config):
    default = 128 if config["architectures"] == ["Qwen3ForCausalLM"] else None
    return (
        config.get("head_dim")
        or default
        or (config["hidden_size"] // config["num_attention_heads"])
    )


# ---- the forward pass


def logits(config, weights, ids):
    """float64 [len(ids), vocab]."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    eps, dim = config["rms_norm_eps"], head_dim(config)
    n = len(ids)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name + ".weight"]

    def heads(x, name=None):
        x = x.reshape(n, -1, dim)
        return x if name is None or name + ".weight" not in w else norm(x, name)

    angles = np.outer(np.arange(n), inverse_frequencies(config, dim))
    turn = np.exp(1j * angles)[:, None, :]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attn, mlp = layer + "self_attn.", layer + "mlp."
        y = norm(x, layer + "input_layernorm")
        q = rotate(heads(linear(y, attn + "q_proj"), attn + "q_norm"), turn)
        k = rotate(heads(linear(y, attn + "k_proj"), attn + "k_norm"), turn)
        v = heads(linear(y, attn + "v_proj"))
        y = attention(q, k, v, window_of(config, i))
        x = x + linear(y.reshape(n, -1), attn + "o_proj")
        y = norm(x, layer + "post_attention_layernorm")
        gate = activation(config["hidden_act"], linear(y, mlp + "gate_proj"))
        x = x + linear(gate * linear(y, mlp + "up_proj"), mlp + "down_proj")
    x = norm(x, "model.norm")
    head = "model.embed_tokens" if "lm_head.weight" not in w else "lm_head"
    return x @ w[head + ".weight"].T


def rotate(x, turn):
    """Dimension i and i + half are a complex number; a position turns it."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def inverse_frequencies(config, dim):
    frequencies = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return frequencies
    assert scaling["rope_type"] == "llama3"
    result = []
    for f in frequencies:
        wavelength = 2 * math.pi / f
        turns = scaling["original_max_position_embeddings"] / wavelength
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if turns < low:
            f /= scaling["factor"]
        elif turns <= high:
            smooth = (turns - low) / (high - low)
            f = (1 - smooth) * f / scaling["factor"] + smooth * f
        result.append(f)
    return np.array(result)


def window_of(config, layer):
    """Keys that a query sees, its own among them; None for all."""
    if config["architectures"] == ["MistralForCausalLM"]:
        return config["sliding_window"]
    is_windowed = config.get("use_sliding_window") and layer >= config["max_window_layers"]
    return config["sliding_window"] if is_windowed else None


def attention(q, k, v, window):
    n, group = len(q), q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    distance = np.arange(n)[:, None] - np.arange(n)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)


def activation(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    assert name == "gelu_pytorch_tanh"
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ---- on disk


def write_model(folder, config, weights=None, num_files=1, dtype="F32"):
    """A model folder; returns the weights as they are after storing (dtype F32, F16 or BF16)."""
    weights = weights_of(config) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    if num_files == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
    else:
        where = {}
        for i in range(num_files):
            file_name = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
            mine = names[i::num_files]
            write_safetensors(folder / file_name, {name: weights[name] for name in mine}, dtype)
            where.update(dict.fromkeys(mine, file_name))
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, config["vocab_size"])
    return {name: stored(value, dtype) for name, value in weights.items()}


def stored(array, dtype):
    """float32 after a round trip through a dtype; BF16 cuts bits off."""
    if dtype == "BF16":
        return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return array.astype({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def write_safetensors(path, tensors, dtype="F32"):
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        if dtype == "BF16":
            data = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            data = array.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        blobs.append(data)
        offset += len(data)
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(blobs))


def write_tokenizer(folder, vocab_size):
    """Three special tokens, then bytes, then pairs of letters: any text, several tokens a
    character where it is not ASCII. Needs nothing but json."""
    alphabet = byte_alphabet()
    tokens = ["<|begin|>", "<|end|>", "<|pad|>", *alphabet]
    merges = []
    for first in "aeiouthsrn":
        for second in "thsrnaeiou":
            if len(tokens) < vocab_size:
                tokens.append(first + second)
                merges.append(f"{first} {second}")
    special = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i in range(3)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    template = (
        "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant: {% endif %}"
    )
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"},
              "chat_template": template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_alphabet():
    """The character that stands for each byte in byte-level vocabularies."""
    characters, moved = [], 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + moved))
            moved += 1
    return characters

"""The shape of a model, read from a Hugging Face folder's config.json and generation_config.json.

`ModelConfig.from_dict` takes both generations of the format: `rope_theta` and `rope_scaling` beside
each other, or `rope_parameters` holding both; `torch_dtype` or `dtype`. What the engine cannot do
is refused here by name, before any weight is read.
"""

import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ArgumentError, RaddleIOError, UnsupportedError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
DTYPES = ("float32", "float16", "bfloat16")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
_ROPE_HAS_NO_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_REQUIRED = object()


@dataclass(frozen=True)
class ModelConfig:
    """What the engine needs to know of a model. Widths in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str = "silu"  # a value of ACTIVATIONS
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # as in config.json, with "rope_type"; None: none
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple = ()  # per layer: keys before the query's own that it sees, or -1 for all
    dtype: str = "float32"
    eos_token_ids: tuple = ()
    bos_token_id: int | None = None
    initializer_range: float = 0.02
    sampling_defaults: dict = field(default_factory=dict)  # temperature, top_k, top_p, min_p

    @classmethod
    def from_folder(cls, folder):
        """Read config.json, and generation_config.json where there is one.

        RaddleIOError when a file is missing or not a JSON object, ArgumentError when a value in it
        cannot be, UnsupportedError for a model of another kind.
        """
        folder = Path(folder)
        generation_path = folder / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        return cls.from_dict(read_json(folder / "config.json"), generation)

    @classmethod
    def from_dict(cls, config, generation=None):
        """Take the content of config.json (and of generation_config.json) as dictionaries."""
        generation = generation or {}
        architecture = _architecture(config)
        _refuse_other_kinds(config)
        read = _Reader(config)
        is_qwen = architecture.startswith("Qwen")
        num_qo_heads = read.size("num_attention_heads")
        hidden_size = read.size("hidden_size")
        num_kv_heads = read.size("num_key_value_heads", num_qo_heads)
        if num_qo_heads % num_kv_heads:
            raise ArgumentError(
                f"config.json: num_attention_heads {num_qo_heads} is not a multiple of "
                f"num_key_value_heads {num_kv_heads}"
            )
        head_dim = read.size("head_dim", 128 if architecture == "Qwen3ForCausalLM" else None)
        if head_dim is None:
            if hidden_size % num_qo_heads:
                raise ArgumentError(
                    f"config.json: hidden_size {hidden_size} is not a multiple of "
                    f"num_attention_heads {num_qo_heads}, and there is no head_dim"
                )
            head_dim = hidden_size // num_qo_heads
        num_layers = read.size("num_hidden_layers")
        attention_bias = read.flag("attention_bias", False)
        if architecture == "MistralForCausalLM":
            attention_bias = False
        theta, scaling = _rope(config)
        return cls(
            architecture=architecture,
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.size("intermediate_size"),
            num_layers=num_layers,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            activation=_activation(config),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            max_position_embeddings=read.size(
                "max_position_embeddings", 32768 if is_qwen else 2048
            ),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
            o_bias=attention_bias and architecture != "Qwen2ForCausalLM",
            mlp_bias=architecture == "LlamaForCausalLM" and read.flag("mlp_bias", False),
            qk_norm=architecture == "Qwen3ForCausalLM",
            windows=_windows(config, architecture, num_layers, read),
            dtype=_dtype(config),
            eos_token_ids=_token_ids(generation, config, "eos_token_id"),
            bos_token_id=next(iter(_token_ids(generation, config, "bos_token_id")), None),
            initializer_range=read.number("initializer_range", 0.02),
            sampling_defaults=_sampling_defaults(generation),
        )


def read_json(path):
    """The JSON object in a file; RaddleIOError with the file's name."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RaddleIOError(f"{path}: {error.strerror}; a model folder holds this file") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are kinds of it
        raise RaddleIOError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RaddleIOError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


class _Reader:
    """Checked values of config.json."""

    def __init__(self, config):
        self.config = config

    def _get(self, name, default):
        value = self.config.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ArgumentError(f"config.json: {name} is missing")
            return default
        return value

    def size(self, name, default=_REQUIRED):
        value = self._get(name, default)
        if value is default:
            return value
        if type(value) is not int or value < 1:
            raise ArgumentError(
                f"config.json: {name} is {value!r}, expected an integer of 1 or more"
            )
        return value

    def number(self, name, default):
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ArgumentError(f"config.json: {name} is {value!r}, expected a number above 0")
        return float(value)

    def flag(self, name, default):
        value = self._get(name, default)
        if type(value) is not bool:
            raise ArgumentError(f"config.json: {name} is {value!r}, expected true or false")
        return value


def _architecture(config):
    names = config.get("architectures") or []
    if not names and config.get("model_type") in ("llama", "mistral", "qwen2", "qwen3"):
        names = [config["model_type"].capitalize() + "ForCausalLM"]
    for name in names:
        if name in ARCHITECTURES:
            return name
    what = ", ".join(map(str, names)) or f"model_type {config.get('model_type')!r}"
    raise UnsupportedError(
        f"config.json: architectures is {what}; this engine runs {', '.join(ARCHITECTURES)}"
    )


def _refuse_other_kinds(config):
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedError(
            f"config.json: quantization_config ({method or quantization!r}): quantised weights are "
            "not read; name a float32, float16 or bfloat16 checkpoint"
        )
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedError(
            f"config.json: partial_rotary_factor {config['partial_rotary_factor']!r}: "
            "only whole heads are rotated"
        )


def _activation(config):
    name = config.get("hidden_act") or "silu"
    if name not in ACTIVATIONS:
        raise UnsupportedError(
            f"config.json: hidden_act {name!r}; this engine has {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _dtype(config):
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedError(f"config.json: dtype {name!r}; this engine has {', '.join(DTYPES)}")
    return name


def _rope(config):
    """(theta, scaling or None) from either generation of the format."""
    block = {}
    for name in ("rope_parameters", "rope_scaling"):
        part = config.get(name) or {}
        if not isinstance(part, dict):
            raise ArgumentError(f"config.json: {name} is {part!r}, expected an object")
        block.update(part)
    if any(isinstance(value, dict) for value in block.values()):
        raise UnsupportedError("config.json: rope_parameters that differ from layer to layer")
    theta = block.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise ArgumentError(f"config.json: rope_theta is {theta!r}, expected a number above 0")
    rope_type = block.get("rope_type", block.get("type")) or "default"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedError(
            f"config.json: rope_type {rope_type!r}; this engine has {', '.join(ROPE_TYPES)}"
        )
    if block.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedError("config.json: partial_rotary_factor: only whole heads are rotated")
    if rope_type == "default":
        return float(theta), None
    scaling = {k: v for k, v in block.items() if k not in _ROPE_HAS_NO_SCALING}
    return float(theta), {"rope_type": rope_type, **scaling}


def _windows(config, architecture, num_layers, read):
    """Per layer: how many keys before its own a query sees, -1 for all of them.

    The files count the query's own key among the window, so a window of W is W - 1 here.
    """
    everything = (-1,) * num_layers
    if architecture == "LlamaForCausalLM":
        return everything
    if architecture == "MistralForCausalLM":
        if "sliding_window" in config and config["sliding_window"] is None:
            return everything
        return (read.size("sliding_window", 4096) - 1,) * num_layers
    if not read.flag("use_sliding_window", False) or config.get("sliding_window", 1) is None:
        return everything
    window = read.size("sliding_window", 4096) - 1
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.get("max_window_layers", 28)
        if type(first) is not int:
            raise ArgumentError(f"config.json: max_window_layers is {first!r}, expected an integer")
        return tuple(window if i >= first else -1 for i in range(num_layers))
    if len(layer_types) != num_layers:
        raise ArgumentError(
            f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers"
        )
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedError(f"config.json: layer_types holds {', '.join(sorted(unknown))}")
    return tuple(window if kind == "sliding_attention" else -1 for kind in layer_types)


def _token_ids(generation, config, name):
    """A token id or a list of them; generation_config.json has the last word."""
    value = generation.get(name)
    value = config.get(name) if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ArgumentError(f"{name} is {value!r}, expected a token id or a list of them")
    return tuple(ids)


# Settings that change what is drawn, which raddle does not have, and their neutral values.
_NOT_APPLIED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0}


def _sampling_defaults(generation):
    """What generation_config.json recommends; {} where it recommends greedy decoding.

    Warns (RuntimeWarning) of a recommendation that answers will not follow.
    """
    for name, neutral in _NOT_APPLIED.items():
        if generation.get(name) not in (None, neutral):
            warnings.warn(
                f"generation_config.json: {name} {generation[name]!r} is not applied; answers may "
                "differ from those of libraries that have it",
                RuntimeWarning,
                stacklevel=2,
            )
    if not generation.get("do_sample", False):
        return {}
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: generation[name] for name in names if generation.get(name) is not None}

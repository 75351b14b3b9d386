"""What a step costs: a model on a machine, in a dozen numbers."""

import json
import os
from dataclasses import MISSING, dataclass, field, fields

from .. import _core
from ..errors import ArgumentError, DTypeError, RaddleIOError

# What is reached, by the model of BlendServe's notes: rates that its Table 1 implies for an A100
# (arXiv 2411.16102), and assumed ones for an H100. Neither was measured here.
HARDWARE = {
    "a100": {"gemm_rate": 225e12, "read_rate": 1.73e12, "alpha": 0.45},
    "h100": {"gemm_rate": 600e12, "read_rate": 2.9e12, "alpha": 0.3},
}
_OPTIONAL = ("rate_tokens", "attention_flops_rate", "overhead")  # of hardware
FORMAT, VERSION = "raddle cost model", 1  # of the files that save() writes

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step follow from the tokens through its GEMMs, the query-key pairs of its
    prefill attention (scores) and the tokens of K and V that its decode attention reads:

        compute = tokens x flops_per_token / gemm_rate + scores x flops_per_score
                  / attention_flops_rate
        read    = (weight_bytes + tokens of K and V x kv_bytes_per_token) / read_rate
        seconds = max(compute, read) + alpha x min(compute, read) + overhead

    Rates are per second. gemm_rate: a number, or up to 16 for the numbers of tokens in rate_tokens
    (ascending; between them the time is linear). alpha: the share of the shorter that does not hide
    behind the longer, 0 (perfect overlap) to 1 (none). After BlendServe (arXiv 2411.16102), which
    has neither weights nor imperfect overlap. ArgumentError and DTypeError name a bad field.

    weights_in_gemms: gemm_rate was timed, so that it has the weights' read in it, w seconds (no
    more than the least tokens take). A step then takes w + max(compute - w, K and V) + alpha x
    min(compute - w, K and V) + overhead: with alpha 1 all of its parts, one after the other.

    measured: what measure() timed and checked, or None; no part of the model, and not compared.
    """

    flops_per_token: float
    flops_per_score: float
    kv_bytes_per_token: float  # of all layers
    weight_bytes: float  # that a step reads
    attention_flops_rate: float
    read_rate: float  # bytes per second
    gemm_rate: tuple  # FLOP per second
    alpha: float
    rate_tokens: tuple = (1.0,)
    overhead: float = 0.0  # seconds
    weights_in_gemms: bool = False
    measured: dict | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        for name in ("gemm_rate", "rate_tokens"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, (int, float)) else value
            if not isinstance(value, (list, tuple)):
                kind = type(value).__name__
                raise DTypeError(f"cost model: {name}: expected a number or a list, got {kind}")
            object.__setattr__(self, name, tuple(value))
        _core.blend_check_cost(self.to_dict())

    @classmethod
    def from_config(cls, config, hardware):
        """A model by its transformers config.json, on a machine.

        config: the file's content, its path or its folder: Llama, Mistral, Qwen 2 and 3, and with
        experts Mixtral, Qwen2Moe and Qwen3Moe. Parameters are counted exactly. A token costs 2
        FLOPs for each that it uses (as the paper counts, the embedding table is one of them), a
        score 4 x heads x head_dim x layers; a step reads all weights, with experts all of them. K
        and V are in the model's dtype.

        hardware: "a100" (225 TFLOP/s, 1.73 TB/s, alpha 0.45) or "h100" (600 TFLOP/s, 2.9 TB/s,
        alpha 0.3), figures of the notes' model, not measured here; or a dict, or the path of a JSON
        object, of gemm_rate, read_rate and alpha, and where they differ from what stands here
        rate_tokens ([1]), attention_flops_rate (the largest gemm_rate) and overhead (0); or the
        path of a saved CostModel of the same model, which is then what is returned.

        Raises UnsupportedError for a model that is not known, ArgumentError, RaddleIOError.
        """
        from .shape import Shape

        return cls.from_shape(Shape.from_dict(read_config(config)), hardware)

    @classmethod
    def from_shape(cls, shape, hardware):
        """As from_config, of a raddle.blend.shape.Shape."""
        counts = {
            "flops_per_token": 2.0 * shape.active_parameters,
            "flops_per_score": 4.0 * shape.num_qo_heads * shape.head_dim * shape.num_layers,
            "kv_bytes_per_token": float(shape.kv_bytes),
            "weight_bytes": float(shape.parameters * shape.dtype_bytes),
        }
        if is_saved(hardware):
            saved = cls.load(hardware)
            _refuse_other_model(hardware, saved, counts)
            return saved
        return cls(**counts, **_hardware(hardware))

    @classmethod
    def measure(cls, config, device="cuda:0", dtype=None, *, quick=False, progress=None):
        """Time a model's shape on a device; returns a CostModel.

        config: as in from_config(), of a model that raddle.engine runs; its weights are not needed:
        layers with random ones, a few of them, are timed as the engine runs them. device: a GPU,
        or "cpu". dtype: of weights, activations, K and V; default: the config's. quick: fewer
        points, shorter. progress: called with a line of text before each part.

        Timed are GEMMs and what goes with them over numbers of tokens, prefill attention, decode
        attention, whole steps, and decode attention beside GEMMs on two streams with several
        bounds on the CTAs of one and the multiprocessors of the other, of which the best pair's
        loss becomes alpha. That is the alpha of an engine that overlaps them so; raddle.engine runs
        them one after the other, which is dataclasses.replace(cost, alpha=1.0). On the CPU work on
        two streams is done one after the other. `measured` of the result has all times, and under
        step_checks and beside_checks what the model says of steps that it was not fitted to; how it
        is fitted is said in raddle.blend.fit.

        The device should have nothing else to do. Takes minutes, and some GB of its memory. Raises
        UnsupportedError for a model that the engine does not run, ArgumentError, DeviceError,
        CapacityError where memory is short.
        """
        from .measure import measure

        return measure(config, device, dtype, quick=quick, progress=progress)

    @classmethod
    def load(cls, path):
        """Read what save() wrote. RaddleIOError for a file that cannot be read or is no JSON,
        ArgumentError and DTypeError for one that is something else or damaged, by field."""
        content = _read_object(path)
        cure = "save() and `python -m raddle calibrate` write such files"
        for name, expected in (("format", FORMAT), ("version", VERSION)):
            if content.get(name) != expected:
                got = repr(content[name]) if name in content else "nothing"
                raise ArgumentError(f"{path}: {name}: expected {expected!r}, got {got}; {cure}")
        _checked(path, content, ("format", "version", "cost_model", "measured"), ())
        for name, kinds in (("cost_model", dict), ("measured", (dict, type(None)))):
            if not isinstance(content[name], kinds):
                got = type(content[name]).__name__
                raise DTypeError(f"{path}: {name}: expected a JSON object, got {got}; {cure}")
        numbers = [item for item in fields(cls) if item.name != "measured"]
        required = [item.name for item in numbers if item.default is MISSING]
        optional = [item.name for item in numbers if item.default is not MISSING]
        found = _checked(path, content["cost_model"], required, optional)
        try:
            return cls(**found, measured=content["measured"])
        except (ArgumentError, DTypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    def save(self, path):
        """Write a JSON object: format and version, the fields under "cost_model", and "measured".
        RaddleIOError."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "cost_model": self.to_dict(),
            "measured": self.measured,
        }
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.write("\n")
        except OSError as error:
            raise RaddleIOError(f"{path}: cannot be written: {error.strerror}") from None

    def to_dict(self):
        """The fields by name, without what was measured."""
        return {item.name: getattr(self, item.name) for item in fields(self)[:-1]}

    def step_seconds(self, tokens, scores=0, reads=0):
        """Seconds of a step of so many tokens, scores and tokens of K and V that are read."""
        return _core.blend_step_seconds(self.to_dict(), tokens, scores, reads)[0]

    def compute_seconds(self, tokens, scores=0):
        """Seconds of a step's computing alone; with weights_in_gemms, of its GEMMs as timed."""
        return _core.blend_step_seconds(self.to_dict(), tokens, scores, 0)[1]

    def read_seconds(self, reads):
        """Seconds that a step reads its weights and so many tokens of K and V, alone."""
        return _core.blend_step_seconds(self.to_dict(), 1, 0, reads)[2]

    def memory_tokens(self, memory_bytes):
        """Tokens of K and V that fit into memory_bytes beside the weights: a pool_tokens.

        ArgumentError when there is no room for one.
        """
        tokens = int((memory_bytes - self.weight_bytes) // self.kv_bytes_per_token)
        if tokens < 1:
            raise ArgumentError(
                f"memory_bytes: expected more than the weights, {self.weight_bytes:.4g} bytes, and "
                f"a token of K and V, {self.kv_bytes_per_token:.4g}; got {memory_bytes:.4g}"
            )
        return tokens


def _read_object(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise RaddleIOError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are kinds of it
        raise RaddleIOError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RaddleIOError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _checked(name, content, required, optional):
    unknown = sorted(content.keys() - {*required, *optional})
    if unknown:
        known = ", ".join((*required, *optional))
        raise ArgumentError(f"{name}: {unknown[0]}: unknown; expected {known}")
    for wanted in required:
        if wanted not in content:
            raise ArgumentError(f"{name}: {wanted}: is missing")
    return content


def read_config(config):
    """The content of a config.json: a dict as it is, or that of its path or folder."""
    if isinstance(config, dict):
        return config
    if os.path.isdir(config):
        config = os.path.join(config, "config.json")
    return _read_object(config)


def is_saved(hardware):
    """Whether hardware is the path of a file that save() wrote, of whatever version."""
    if isinstance(hardware, dict) or hardware in HARDWARE or not os.path.exists(hardware):
        return False
    return "format" in _read_object(hardware)


def _refuse_other_model(path, saved, counts):
    for name, expected in counts.items():
        got = getattr(saved, name)
        if abs(got - expected) > 1e-9 * expected:
            raise ArgumentError(
                f"{path}: {name}: expected {expected:.6g}, that of config.json, got {got:.6g}: it "
                "was measured for another model; run `python -m raddle calibrate` for this one"
            )


def _hardware(hardware):
    name = hardware if isinstance(hardware, (str, os.PathLike)) else "hardware"
    if isinstance(hardware, dict):
        content = hardware
    elif hardware in HARDWARE:
        content = HARDWARE[hardware]
    elif isinstance(hardware, str) and not os.path.exists(hardware):
        raise ArgumentError(
            f"hardware: {hardware!r} is neither one of {', '.join(HARDWARE)} nor a file"
        )
    else:
        content = _read_object(hardware)
    found = dict(_checked(name, content, ("gemm_rate", "read_rate", "alpha"), _OPTIONAL))
    rates = found["gemm_rate"]
    if "attention_flops_rate" not in found:
        found["attention_flops_rate"] = max(rates) if isinstance(rates, (list, tuple)) else rates
    return found

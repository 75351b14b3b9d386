"""What a transformer needs around its attention: norms, rotary embedding, activations, embedding,
linear layers, softmax and sampling.

Tensors are anything with a DLPack door (torch, NumPy, raddle.Tensor, ...): float32, float16 or
bfloat16 where nothing else is said, the tensors of one call on one device, innermost stride 1, rows
with any stride. Arithmetic is float32 and results are rounded once. A result comes back in `out`,
else in a new tensor of the first tensor's kind. NumPy has no bfloat16: pass uint16 arrays with
`dtype="bfloat16"`; results are then uint16 too.

On CUDA, work is queued on `stream`, else on the stream that the tensors' framework says is current,
else on the legacy default stream; calls with `out` may be captured in a CUDA graph after one call
outside has compiled the kernel. On the CPU a call returns when the result is there.

Errors: ShapeError, DTypeError, DeviceError, ArgumentError for values, UnsupportedError.
"""

from . import _core
from .ops_rope import RopeTurns, apply_rope, rope_cos_sin_cache, rope_fp8, rope_turns
from .ops_sample import (
    mask_logits,
    renorm_probs,
    sample,
    sample_probs,
    softmax,
    token_logprobs,
    verify_draft,
)

__all__ = [
    "Linear",
    "RopeTurns",
    "apply_rope",
    "embedding",
    "fused_add_rmsnorm",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "layernorm",
    "mask_logits",
    "renorm_probs",
    "rmsnorm",
    "rope_cos_sin_cache",
    "rope_fp8",
    "rope_turns",
    "sample",
    "sample_probs",
    "silu_and_mul",
    "softmax",
    "token_logprobs",
    "verify_draft",
]

_SILU, _GELU, _GELU_TANH = range(3)


def rmsnorm(
    x, weight, eps=1e-6, *, weight_offset=0.0, out=None, scale=None, dtype=None, stream=None
):
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over the last dimension (arXiv
    1910.07467; Gemma's weight_offset is 1).

    x [.., d], for example [n, d], or [n, heads, head_dim] for a norm of every head; leading
    dimensions may be strided. weight [d], of x's dtype or float32. out: like x, may be x itself;
    or float8_e4m3fn or float8_e5m2, which gets the result divided by scale: a number, or a tensor
    of one float32 on the host or on x's device, where a captured graph sees new values. What is
    past the largest 8-bit number becomes that number.
    """
    return _core.ops_norm(x, None, weight, None, eps, weight_offset, scale, out, dtype, stream)


def fused_add_rmsnorm(
    x,
    residual,
    weight,
    eps=1e-6,
    *,
    weight_offset=0.0,
    out=None,
    scale=None,
    dtype=None,
    stream=None,
):
    """out = rmsnorm(x + residual, weight, eps) and residual += x; without out, x takes the result.

    x and residual [.., d] of one dtype, in different memory. The norm is of the float32 sum;
    residual gets that sum rounded to its dtype. weight_offset, out and scale as in rmsnorm.
    """
    out = x if out is None else out
    _core.ops_norm(x, residual, weight, None, eps, weight_offset, scale, out, dtype, stream)


def layernorm(x, weight, bias, eps=1e-6, *, out=None, scale=None, dtype=None, stream=None):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (arXiv
    1607.06450; var is the mean square of the differences).

    weight and bias [d] of one dtype, x's or float32; the rest as in rmsnorm.
    """
    if bias is None:
        from .errors import DTypeError

        raise DTypeError("bias: expected a tensor, got None; zeros add nothing")
    return _core.ops_norm(x, None, weight, bias, eps, 0.0, scale, out, dtype, stream)


def silu_and_mul(x, *, out=None, dtype=None, stream=None):
    """silu(x[.., :d]) * x[.., d:] with silu(g) = g / (1 + exp(-g)); x [.., 2d] -> [.., d]."""
    return _core.ops_act_and_mul(_SILU, x, out, dtype, stream)


def gelu_and_mul(x, *, out=None, dtype=None, stream=None):
    """gelu(x[.., :d]) * x[.., d:] with gelu(g) = g * (1 + erf(g / sqrt(2))) / 2."""
    return _core.ops_act_and_mul(_GELU, x, out, dtype, stream)


def gelu_tanh_and_mul(x, *, out=None, dtype=None, stream=None):
    """gelu(x[.., :d]) * x[.., d:], gelu by tanh(sqrt(2 / pi) * (g + 0.044715 g^3))."""
    return _core.ops_act_and_mul(_GELU_TANH, x, out, dtype, stream)


def embedding(ids, table, *, out=None, dtype=None, stream=None):
    """Rows of a table: ids [n] int32 or int64, table [vocab, d] -> [n, d] of table's dtype.

    An id outside [0, vocab) is an ArgumentError on the CPU; on CUDA, where only the kernel sees it,
    its row becomes zero. Nothing outside the table is read.
    """
    return _core.ops_embedding(ids, table, out, dtype, stream)


# ------------------------------------------------------------------ linear


class Linear:
    """A linear layer: x [.., in_features] -> x @ weight.T + bias, [.., out_features].

    weight [out_features, in_features], bias [out_features] (of weight's dtype or float32) or None;
    device: where the layer runs, default weight's. Host tensors are copied, on the CPU into the
    packed form that its kernels read, and may be freed afterwards; a weight that already is on the
    CUDA device is used where it lies (rows contiguous) and kept alive. Safe to call from several
    threads.

    CUDA needs cublasLt, which torch's wheels bring. Up to 8 rows of 16-bit numbers go to a kernel
    of our own, which begins to read the weight before earlier launches of the stream have ended: a
    weight that is changed in place wants a synchronize before the next run.

    On the CPU a row's result does not depend on the rows that come with it.
    """

    def __init__(self, weight, bias=None, *, device=None, dtype=None, stream=None):
        self._linear = _core.Linear(weight, bias, device, dtype, stream)

    def __call__(self, x, *, out=None, stream=None, max_sms=0):
        """x of the weight's dtype; the result has that of out (x's, or float32), else x's.

        max_sms (CUDA): multiprocessors that the kernel is chosen and cut for, where work on another
        stream keeps the rest; 0: all. Any other number on the CPU is an UnsupportedError.
        """
        return self._linear.run(x, out, stream, max_sms)

    @property
    def in_features(self):
        return self._linear.in_features

    @property
    def out_features(self):
        return self._linear.out_features

    @property
    def dtype(self):
        """Name of the weight's dtype."""
        return self._linear.dtype

    @property
    def device(self):
        """Where the layer runs, like "cuda:0"."""
        return self._linear.device

    def __repr__(self):
        return (
            f"Linear(in_features={self.in_features}, out_features={self.out_features}, "
            f"dtype={self.dtype}, device={self.device})"
        )

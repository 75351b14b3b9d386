"""flashinfer.norm: norms of rows, with FlashInfer's names, over raddle.ops.

Tensors are torch's, on CUDA or on the CPU. weight is of input's dtype or float32. enable_pdl only
tunes and is accepted: raddle launches that way wherever the GPU can.
"""

from .. import ops
from ._refuse import refuser
from .jit import gen_norm_module

__all__ = [
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "gen_norm_module",
    "layernorm",
    "layernorm_quant",
    "rmsnorm",
    "rmsnorm_quant",
]


def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    """input / sqrt(mean(input^2) + eps) * weight over the last dimension, [n, d] or [n, heads, d].

    out: like input, may be input itself; else a new tensor is returned.
    """
    return ops.rmsnorm(input, weight, eps, out=out)


def rmsnorm_quant(out, input, weight, scale, eps=1e-6, enable_pdl=None):
    """rmsnorm divided by scale, into out of float8_e4m3fn or float8_e5m2.

    scale: a number, or a float32 tensor with one. What is past the largest number becomes it.
    """
    ops.rmsnorm(input, weight, eps, out=out, scale=scale)


def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
    """input = rmsnorm(input + residual) and residual += input; both in place.

    The norm is of the float32 sum; residual gets that sum rounded to its dtype.
    """
    ops.fused_add_rmsnorm(input, residual, weight, eps)


def fused_add_rmsnorm_quant(out, input, residual, weight, scale, eps=1e-6, enable_pdl=None):
    """out = rmsnorm(input + residual) / scale and residual += input in place.

    The sum is as in fused_add_rmsnorm; out and scale are as in rmsnorm_quant.
    """
    ops.fused_add_rmsnorm(input, residual, weight, eps, out=out, scale=scale)


def gemma_rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    """rmsnorm with weight + 1."""
    return ops.rmsnorm(input, weight, eps, weight_offset=1.0, out=out)


def gemma_fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
    """fused_add_rmsnorm with weight + 1."""
    ops.fused_add_rmsnorm(input, residual, weight, eps, weight_offset=1.0)


def layernorm(input, gemma, beta, eps=1e-6):
    """(input - mean) / sqrt(var + eps) * gemma + beta over the last dimension, a new tensor.

    gemma and beta of one dtype, float32 or input's.
    """
    return ops.layernorm(input, gemma, beta, eps)


def layernorm_quant(out, input, gemma, beta, scale, eps=1e-6):
    """layernorm divided by scale, into out of a float8 type; see rmsnorm_quant."""
    ops.layernorm(input, gemma, beta, eps, out=out, scale=scale)


__getattr__ = refuser(
    "norm",
    "add_rmsnorm_fp4quant",
    "fused_add_rmsnorm_fp8_block_quant",
    "fused_dit_gate_residual_layernorm_gamma_beta",
    "fused_dit_gate_residual_layernorm_scale_shift",
    "fused_dit_residual_layernorm_scale_shift",
    "fused_qk_rmsnorm_rope",
    "fused_rmsnorm_silu",
    "gated_residual_next_rmsnorm",
    "gated_residual_rmsnorm",
    "get_norm_module",
    "rmsnorm_fp4quant",
    "rmsnorm_sigmoid_gate",
)


def _supports_nothing(*args, **kwargs):
    """False: raddle has no such kernel."""
    return False


supports_gated_residual_next_rmsnorm = _supports_nothing
supports_gated_residual_rmsnorm = _supports_nothing
supports_rmsnorm_sigmoid_gate = _supports_nothing

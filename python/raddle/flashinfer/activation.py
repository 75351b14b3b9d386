"""flashinfer.activation: gated activations with FlashInfer's names, over raddle.ops.

input [.., 2d] -> [.., d]: activation(input[.., :d]) * input[.., d:], float32 inside, rounded once.
FlashInfer wants rows of whole 16 bytes; here any d does. enable_pdl only tunes and is accepted.
"""

from .. import ops
from ._refuse import refuser
from .jit import gen_act_and_mul_module

__all__ = ["gelu_and_mul", "gelu_tanh_and_mul", "gen_act_and_mul_module", "silu_and_mul"]


def silu_and_mul(input, out=None, enable_pdl=None):
    """x / (1 + exp(-x)) of the first half times the second."""
    return ops.silu_and_mul(input, out=out)


def gelu_tanh_and_mul(input, out=None, enable_pdl=None):
    """gelu by tanh of the first half times the second."""
    return ops.gelu_tanh_and_mul(input, out=out)


def gelu_and_mul(input, out=None, enable_pdl=None):
    """gelu by erf of the first half times the second."""
    return ops.gelu_and_mul(input, out=out)


__getattr__ = refuser(
    "activation",
    "get_act_and_mul_module",
    "silu_and_mul_scaled_nvfp4_experts_quantize",
)

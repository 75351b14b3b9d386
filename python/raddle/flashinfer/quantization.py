"""flashinfer.quantization: packing masks into bits. Of the rest, names that raise when used."""

from ._refuse import refuser
from .jit import gen_quantization_module

__path__ = []  # flashinfer.quantization is a package, with modules that raddle does not have
__all__ = ["gen_quantization_module", "packbits", "segment_packbits"]


def packbits(x, bitorder="big"):
    """Eight elements of a 1-D tensor in a byte, as numpy.packbits does: uint8 [ceil(n / 8)].

    An element counts as 1 when it is not 0. bitorder: "big" (the first is the highest bit) or
    "little", which attention masks use."""
    import torch

    if x.ndim != 1:
        raise ValueError(f"x: expected one dimension, got {x.ndim}")
    bits = torch.zeros(-(-x.shape[0] // 8) * 8, dtype=torch.uint8, device=x.device)
    bits[: x.shape[0]] = x != 0
    return _pack(bits, bitorder)


def segment_packbits(x, indptr, bitorder="big"):
    """packbits of each segment x[indptr[i] : indptr[i + 1]], each from a new byte on.

    Returns (uint8 [new_indptr[-1]], new_indptr int32 [batch + 1]). Waits for the device, whose
    result has a size that only it knows."""
    import torch

    indptr = indptr.to(x.device, torch.int64)
    lengths = indptr.diff()
    new_indptr = torch.zeros_like(indptr)
    torch.cumsum((lengths + 7) // 8, 0, out=new_indptr[1:])
    shift = new_indptr[:-1] * 8 - indptr[:-1]  # of a segment's bits
    first, last, num_bytes = torch.stack((indptr[0], indptr[-1], new_indptr[-1])).tolist()
    at = torch.arange(first, last, device=x.device) + torch.repeat_interleave(shift, lengths)
    bits = torch.zeros(num_bytes * 8, dtype=torch.uint8, device=x.device)
    bits[at] = (x[first:last] != 0).to(torch.uint8)
    return _pack(bits, bitorder), new_indptr.to(torch.int32)


def _pack(bits, bitorder):
    import torch

    if bitorder not in ("big", "little"):
        raise ValueError(f"bitorder: expected 'big' or 'little', got {bitorder!r}")
    powers = range(7, -1, -1) if bitorder == "big" else range(8)
    weights = torch.tensor([1 << p for p in powers], dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


__getattr__ = refuser(
    "quantization",
    "SfLayout",
    "block_scale_interleave",
    "e2m1_and_ufp8sf_scale_to_float",
    "fp4_quantize",
    "get_fp4_quantization_module",
    "get_quantization_module",
    "int4_dequantize",
    "int4_quantize",
    "make_nvfp4_global_scale",
    "mxfp4_dequantize",
    "mxfp4_dequantize_host",
    "mxfp4_quantize",
    "mxfp8_dequantize_host",
    "mxfp8_grouped_quantize",
    "mxfp8_quantize",
    "nvfp4_batched_quantize",
    "nvfp4_block_scale_interleave",
    "nvfp4_kv_dequantize",
    "nvfp4_kv_dequantize_paged",
    "nvfp4_kv_quantize",
    "nvfp4_quantize",
    "nvfp4_quantize_paged_kv_cache",
    "per_token_group_quant_8bit",
    "scaled_fp4_grouped_quantize",
    "shuffle_matrix_a",
    "shuffle_matrix_sf_a",
    "silu_and_mul_nvfp4_quantize",
)

"""What flashinfer.rope has that rounds to 8-bit floats, with or without a paged cache."""

from .. import ops
from ..errors import UnsupportedError
from .utils import TensorLayout


def check_table(cos_sin_cache):
    import torch

    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(f"cos_sin_cache should be float32, got {cos_sin_cache.dtype}")


def _float8(quantize_dtype, *outs):
    """The asked dtype, else that of an output, else float8_e4m3fn."""
    import torch

    given = [quantize_dtype, *(out.dtype for out in outs if out is not None)]
    return next((dtype for dtype in given if dtype is not None), torch.float8_e4m3fn)


def _with_heads(x):
    """[n, d] of one head, or [n, heads, d], as [n, heads, d]."""
    return x.unsqueeze(1) if x is not None and x.ndim == 2 else x


def _or_none(x):
    return x if x is not None and x.shape[-1] > 0 else None


def _empty_parts(like):
    """What stands for a part that is None: width 0."""
    return like.new_empty((*like.shape[:-1], 0))


def rope_quantize_fp8(
    q_rope,
    k_rope,
    q_nope,
    k_nope,
    cos_sin_cache,
    pos_ids,
    is_neox=True,
    quantize_dtype=None,
    quant_scale_q=1.0,
    quant_scale_kv=1.0,
    q_rope_out=None,
    k_rope_out=None,
    q_nope_out=None,
    k_nope_out=None,
    enable_pdl=False,
    backend="cuda",
):
    """(q_rope_out, k_rope_out, q_nope_out, k_nope_out) in float8: the rope parts rotated, all
    multiplied by their scale, what is past the largest number made that number.

    q parts [n, num_qo_heads, d], k parts [n, num_kv_heads, d] or [n, d]; nope parts may be None.
    backend "cuda" means raddle's own kernel, on any device.
    """
    import torch

    if backend != "cuda":
        if backend == "cutile":
            raise UnsupportedError('backend: raddle has no "cutile" kernels; use "cuda"')
        raise ValueError(f"backend: expected 'cuda', got {backend!r}")
    check_table(cos_sin_cache)
    dtype = _float8(quantize_dtype, q_rope_out, k_rope_out, q_nope_out, k_nope_out)
    q_nope = _empty_parts(q_rope) if q_nope is None else q_nope
    k_nope = _empty_parts(k_rope) if k_nope is None else k_nope
    parts = (q_rope, k_rope, q_nope, k_nope)
    outs = [
        torch.empty_like(part, dtype=dtype) if out is None else out
        for part, out in zip(parts, (q_rope_out, k_rope_out, q_nope_out, k_nope_out), strict=True)
    ]
    ops.rope_fp8(
        q_rope,
        _with_heads(k_rope),
        cos_sin_cache,
        pos_ids,
        q_nope=_or_none(q_nope),
        k_nope=_or_none(_with_heads(k_nope)),
        q_rope_out=outs[0],
        k_rope_out=_with_heads(outs[1]),
        q_nope_out=_or_none(outs[2]),
        k_nope_out=_or_none(_with_heads(outs[3])),
        q_scale=quant_scale_q,
        kv_scale=quant_scale_kv,
        interleave=not is_neox,
    )
    return tuple(outs)


def mla_rope_quantize_fp8(
    q_rope,
    k_rope,
    q_nope,
    k_nope,
    cos_sin_cache,
    pos_ids,
    is_neox=True,
    quantize_dtype=None,
    quant_scale_q=1.0,
    quant_scale_kv=1.0,
    q_rope_out=None,
    k_rope_out=None,
    q_nope_out=None,
    k_nope_out=None,
    enable_pdl=False,
):
    """rope_quantize_fp8 by another name."""
    return rope_quantize_fp8(
        q_rope,
        k_rope,
        q_nope,
        k_nope,
        cos_sin_cache,
        pos_ids,
        is_neox,
        quantize_dtype,
        quant_scale_q,
        quant_scale_kv,
        q_rope_out,
        k_rope_out,
        q_nope_out,
        k_nope_out,
        enable_pdl,
    )


def _check_cache(caches, is_mla, dtype, page_size, slot_dimension):
    kind, dimensions = ("MLA", 3) if is_mla else ("GQA/MHA", 4)
    for cache in caches:
        if cache.dtype != dtype:
            raise ValueError(f"{kind} cache dtype mismatch: expected {dtype}, got {cache.dtype}")
        if cache.ndim != dimensions:
            raise ValueError(f"{kind} cache must be {dimensions}D, got {cache.ndim}D")
        if cache.shape[slot_dimension] != page_size:
            raise ValueError(
                f"page_size: the cache has pages of {cache.shape[slot_dimension]} tokens, "
                f"got {page_size}"
            )


def rope_quantize_fp8_append_paged_kv_cache(
    q_rope,
    k_rope,
    q_nope,
    k_nope,
    v,
    cos_sin_cache,
    pos_ids,
    paged_kv_cache,
    kv_indices,
    kv_indptr,
    batch_indices,
    positions,
    is_neox=True,
    quantize_dtype=None,
    quant_scale_q=1.0,
    quant_scale_kv=1.0,
    page_size=16,
    kv_layout="NHD",
    q_rope_out=None,
    q_nope_out=None,
    enable_pdl=False,
):
    """(q_rope_out, q_nope_out) in float8, and k and v, rotated and rounded, into a paged cache.

    k parts [n, num_kv_heads, d] with v [n, num_kv_heads, head_dim] and a cache (k, v) of
    [pages, page_size, heads, head_dim] (NHD) or [pages, heads, page_size, head_dim] (HND); or for
    MLA [n, d] with v None and a cache (ckv [pages, page_size, no_rope_dim], kpe [.., rope_dim]).
    Row i goes to place positions[i] of request batch_indices[i]; below 0: nowhere.
    """
    import torch

    check_table(cos_sin_cache)
    is_mla = k_rope.ndim == 2
    if is_mla and v is not None:
        raise ValueError("v: MLA has none, its k_nope is what is kept; expected None")
    if not is_mla and v is None:
        raise ValueError("v: GQA and MHA expect a tensor, got None")
    if len(paged_kv_cache) != 2:
        raise ValueError(f"paged_kv_cache: expected 2 tensors, got {len(paged_kv_cache)}")
    if kv_layout not in TensorLayout.__members__:
        raise KeyError(f"Invalid kv_layout {kv_layout!r}: expected 'NHD' or 'HND'")
    dtype = _float8(quantize_dtype, q_rope_out, q_nope_out)
    is_hnd = kv_layout == "HND" and not is_mla
    _check_cache(paged_kv_cache, is_mla, dtype, page_size, 2 if is_hnd else 1)
    first, second = paged_kv_cache
    rope_dim = k_rope.shape[-1]
    if is_mla:
        k_rope_out, k_nope_out, v_out = second.unsqueeze(2), first.unsqueeze(2), None
    else:
        if is_hnd:
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        k_rope_out, k_nope_out, v_out = first[..., :rope_dim], first[..., rope_dim:], second
    q_nope = _empty_parts(q_rope) if q_nope is None else q_nope
    if q_rope_out is None:
        q_rope_out = torch.empty_like(q_rope, dtype=dtype)
    if q_nope_out is None:
        q_nope_out = torch.empty_like(q_nope, dtype=dtype)
    ops.rope_fp8(
        q_rope,
        _with_heads(k_rope),
        cos_sin_cache,
        pos_ids,
        q_nope=_or_none(q_nope),
        k_nope=_or_none(_with_heads(k_nope)),
        v=v,
        q_rope_out=q_rope_out,
        k_rope_out=k_rope_out,
        q_nope_out=_or_none(q_nope_out),
        k_nope_out=_or_none(k_nope_out),
        v_out=v_out,
        q_scale=quant_scale_q,
        kv_scale=quant_scale_kv,
        interleave=not is_neox,
        batch_indices=batch_indices,
        token_positions=positions,
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
    )
    return q_rope_out, q_nope_out

"""flashinfer.rope: rotary embedding with FlashInfer's names, over raddle.ops.

q [n, num_qo_heads, head_dim] and k [n, num_kv_heads, head_dim]; the first rotary_dim (default: all)
of a head is rotated, in split halves, or in neighbouring pairs if interleave. Functions named
_inplace write into q and k, the others return new ones. Angles come of rope_theta and rope_scale (a
divisor of frequencies), of Llama 3.1's scaling, or of a table of cosines and sines in float32.

A position outside the table is an ArgumentError on the CPU; on a GPU its row is not rotated.
enable_pdl only tunes and is accepted.
"""

import functools

from .. import ops
from ._refuse import refuser
from ._rope_fp8 import (
    check_table,
    mla_rope_quantize_fp8,
    rope_quantize_fp8,
    rope_quantize_fp8_append_paged_kv_cache,
)
from .jit import gen_rope_module

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "gen_rope_module",
    "mla_rope_quantize_fp8",
    "rope_quantize_fp8",
    "rope_quantize_fp8_append_paged_kv_cache",
]

# -- angles of frequencies ----------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _turns(rotary_dim, rope_scale, rope_theta):
    scaling = {"rope_type": "linear", "factor": rope_scale} if rope_scale != 1 else None
    return ops.rope_turns(rotary_dim, theta=rope_theta, scaling=scaling)


@functools.lru_cache(maxsize=64)
def _llama31_turns(
    rotary_dim, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len
):
    scaling = {
        "rope_type": "llama3",
        "factor": rope_scale,
        "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
        "original_max_position_embeddings": old_context_len,
    }
    return ops.rope_turns(rotary_dim, theta=rope_theta, scaling=scaling)


def _rotary_dim(q, rotary_dim):
    return int(q.shape[-1] if rotary_dim is None else rotary_dim)


def _beside(q, k, interleave, turns, positions=None, indptr=None, offsets=None):
    """The rotated q and k in new tensors."""
    import torch

    q_rope, k_rope = torch.empty_like(q), torch.empty_like(k)
    ops.apply_rope(
        q,
        k,
        positions,
        turns,
        indptr=indptr,
        offsets=offsets,
        interleave=interleave,
        q_out=q_rope,
        k_out=k_rope,
    )
    return q_rope, k_rope


def apply_rope(
    q,
    k,
    indptr,
    offsets,
    rotary_dim=None,
    interleave=False,
    rope_scale=1,
    rope_theta=1e4,
):
    """(q_rope, k_rope). Rows indptr[b] to indptr[b + 1] stand at positions offsets[b] and on;
    indptr [batch + 1] and offsets [batch], int32 or int64. Rows of no request are copied."""
    turns = _turns(_rotary_dim(q, rotary_dim), rope_scale, rope_theta)
    return _beside(q, k, interleave, turns, indptr=indptr, offsets=offsets)


def apply_rope_inplace(
    q,
    k,
    indptr,
    offsets,
    rotary_dim=None,
    interleave=False,
    rope_scale=1,
    rope_theta=1e4,
):
    """apply_rope into q and k."""
    turns = _turns(_rotary_dim(q, rotary_dim), rope_scale, rope_theta)
    ops.apply_rope(q, k, None, turns, indptr=indptr, offsets=offsets, interleave=interleave)


def apply_rope_pos_ids(
    q, k, pos_ids, rotary_dim=None, interleave=False, rope_scale=1, rope_theta=1e4
):
    """(q_rope, k_rope) at positions pos_ids [n], int32 or int64."""
    turns = _turns(_rotary_dim(q, rotary_dim), rope_scale, rope_theta)
    return _beside(q, k, interleave, turns, pos_ids)


def apply_rope_pos_ids_inplace(
    q, k, pos_ids, rotary_dim=None, interleave=False, rope_scale=1, rope_theta=1e4
):
    """apply_rope_pos_ids into q and k."""
    turns = _turns(_rotary_dim(q, rotary_dim), rope_scale, rope_theta)
    ops.apply_rope(q, k, pos_ids, turns, interleave=interleave)


def apply_llama31_rope(
    q,
    k,
    indptr,
    offsets,
    rotary_dim=None,
    interleave=False,
    rope_scale=8,
    rope_theta=5e5,
    low_freq_factor=1,
    high_freq_factor=4,
    old_context_len=8192,
):
    """apply_rope with Llama 3.1's frequencies: long wavelengths divided by rope_scale, short ones
    kept, those between blended."""
    turns = _llama31_turns(
        _rotary_dim(q, rotary_dim),
        rope_scale,
        rope_theta,
        low_freq_factor,
        high_freq_factor,
        old_context_len,
    )
    return _beside(q, k, interleave, turns, indptr=indptr, offsets=offsets)


def apply_llama31_rope_inplace(
    q,
    k,
    indptr,
    offsets,
    rotary_dim=None,
    interleave=False,
    rope_scale=8,
    rope_theta=5e5,
    low_freq_factor=1,
    high_freq_factor=4,
    old_context_len=8192,
):
    """apply_llama31_rope into q and k."""
    turns = _llama31_turns(
        _rotary_dim(q, rotary_dim),
        rope_scale,
        rope_theta,
        low_freq_factor,
        high_freq_factor,
        old_context_len,
    )
    ops.apply_rope(q, k, None, turns, indptr=indptr, offsets=offsets, interleave=interleave)


def apply_llama31_rope_pos_ids(
    q,
    k,
    pos_ids,
    rotary_dim=None,
    interleave=False,
    rope_scale=8,
    rope_theta=5e5,
    low_freq_factor=1,
    high_freq_factor=4,
    old_context_len=8192,
):
    """apply_llama31_rope at positions pos_ids [n]."""
    turns = _llama31_turns(
        _rotary_dim(q, rotary_dim),
        rope_scale,
        rope_theta,
        low_freq_factor,
        high_freq_factor,
        old_context_len,
    )
    return _beside(q, k, interleave, turns, pos_ids)


def apply_llama31_rope_pos_ids_inplace(
    q,
    k,
    pos_ids,
    rotary_dim=None,
    interleave=False,
    rope_scale=8,
    rope_theta=5e5,
    low_freq_factor=1,
    high_freq_factor=4,
    old_context_len=8192,
):
    """apply_llama31_rope_pos_ids into q and k."""
    turns = _llama31_turns(
        _rotary_dim(q, rotary_dim),
        rope_scale,
        rope_theta,
        low_freq_factor,
        high_freq_factor,
        old_context_len,
    )
    ops.apply_rope(q, k, pos_ids, turns, interleave=interleave)


# -- a table ------------------------------------------------------------------------------------


def _heads(x, head_size):
    return x.view(x.shape[0], -1, head_size)


def apply_rope_with_cos_sin_cache(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    """(query, key) rotated, new tensors [n, heads * head_size].

    cos_sin_cache float32 [max_position, rotary_dim], cosines first; is_neox: split halves.
    """
    import torch

    check_table(cos_sin_cache)
    query_out, key_out = torch.empty_like(query), torch.empty_like(key)
    ops.apply_rope(
        _heads(query, head_size),
        _heads(key, head_size),
        positions,
        cos_sin_cache,
        interleave=not is_neox,
        q_out=_heads(query_out, head_size),
        k_out=_heads(key_out, head_size),
    )
    return query_out, key_out


def apply_rope_with_cos_sin_cache_inplace(
    positions, query, key, head_size, cos_sin_cache, is_neox=True
):
    """apply_rope_with_cos_sin_cache into query and key."""
    check_table(cos_sin_cache)
    ops.apply_rope(
        _heads(query, head_size),
        _heads(key, head_size),
        positions,
        cos_sin_cache,
        interleave=not is_neox,
    )


__getattr__ = refuser("rope", "get_rope_module", "qk_rmsnorm_rope_append_paged_kv_cache_hy3")

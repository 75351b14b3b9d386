"""Rotary embedding (RoPE, arXiv 2104.09864): the part of raddle.ops that turns q and k.

Tensors, streams and errors as in raddle.ops, which has all of these names.
"""

import math
import struct

from . import _core

__all__ = ["RopeTurns", "apply_rope", "rope_cos_sin_cache", "rope_fp8", "rope_turns"]

# -- tables and frequencies ---------------------------------------------------------------------


def rope_cos_sin_cache(
    max_position,
    rotary_dim,
    *,
    theta=10000.0,
    scaling=None,
    device="cpu",
    max_position_embeddings=None,
):
    """The table that apply_rope reads: float32 raddle.Tensor [max_position, rotary_dim].

    Row p holds cos(p * f_i) for i < rotary_dim / 2, then the sines, with f_i = theta^(-2i /
    rotary_dim) (RoPE, arXiv 2104.09864), computed in float64.

    scaling: a Hugging Face rope_scaling or rope_parameters dict; its rope_type (or type) is
    "default", "linear", "llama3" or "yarn" (arXiv 2309.00071, which also scales cos and sin by its
    attention factor); others are an UnsupportedError. A rope_theta in it wins over theta.
    max_position_embeddings stands in for an original_max_position_embeddings or a yarn factor that
    the dict lacks.
    """
    from .errors import ArgumentError

    if max_position < 0:
        raise ArgumentError(f"max_position: expected at least 0, got {max_position}")
    inv_freq, factor = _frequencies(rotary_dim, theta, scaling, max_position_embeddings)
    return _core.ops_cos_sin(inv_freq, factor, max_position, device)


def _frequencies(rotary_dim, theta, scaling, max_position_embeddings):
    """([angle per position of each pair], factor of cos and sin)."""
    from .errors import ArgumentError

    if rotary_dim < 2 or rotary_dim % 2:
        raise ArgumentError(f"rotary_dim: expected an even number of at least 2, got {rotary_dim}")
    scaling = dict(scaling or {})
    theta = float(scaling.get("rope_theta") or theta)
    if not (theta > 0 and math.isfinite(theta)):
        raise ArgumentError(f"theta: expected a finite number above 0, got {theta}")
    inv_freq = [theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    return _scale_frequencies(inv_freq, rotary_dim, theta, scaling, max_position_embeddings)


def _scale_frequencies(inv_freq, rotary_dim, theta, scaling, max_position_embeddings):
    """(frequencies, factor of cos and sin) after a Hugging Face scaling dict."""
    from .errors import UnsupportedError

    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return inv_freq, 1.0
    if kind == "linear":
        factor = _scaling_number(scaling, "factor")
        return [f / factor for f in inv_freq], 1.0
    if kind == "llama3":
        return _llama3_frequencies(inv_freq, scaling, max_position_embeddings), 1.0
    if kind == "yarn":
        return _yarn_frequencies(inv_freq, rotary_dim, theta, scaling, max_position_embeddings)
    raise UnsupportedError(
        f'scaling: rope_type "{kind}" is not supported; known: default, linear, llama3, yarn'
    )


def _scaling_number(scaling, key, default=None):
    """A positive number of the dict."""
    from .errors import ArgumentError

    value = scaling.get(key)
    value = default if value is None else value
    if value is None:
        raise ArgumentError(f'scaling: "{key}" is missing')
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ArgumentError(f'scaling: "{key}": expected a number above 0, got {value!r}')
    return float(value)


def _llama3_frequencies(inv_freq, scaling, max_position_embeddings):
    """Long wavelengths are stretched by factor, short ones kept, those between blended."""
    from .errors import ArgumentError

    factor = _scaling_number(scaling, "factor")
    low = _scaling_number(scaling, "low_freq_factor")
    high = _scaling_number(scaling, "high_freq_factor")
    original = _scaling_number(scaling, "original_max_position_embeddings", max_position_embeddings)
    if high <= low:
        raise ArgumentError(
            f'scaling: "high_freq_factor" {high} must be above "low_freq_factor" {low}'
        )

    def scale(f):
        turns = original * f / (2 * math.pi)  # of this frequency in the original context
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return f * (keep + (1 - keep) / factor)

    return [scale(f) for f in inv_freq]


def _yarn_frequencies(inv_freq, rotary_dim, theta, scaling, max_position_embeddings):
    """NTK by parts: pairs that turn often are kept, those that turn seldom are interpolated."""
    original = _scaling_number(scaling, "original_max_position_embeddings", max_position_embeddings)
    default = max_position_embeddings / original if max_position_embeddings else None
    factor = _scaling_number(scaling, "factor", default)

    def pair_that_turns(times):
        """Index of the pair that turns so many times within the original context."""
        wavelength = original / (times * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    low = pair_that_turns(_scaling_number(scaling, "beta_fast", 32))
    high = pair_that_turns(_scaling_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = (high - low) or 0.001

    def scale(i, f):
        interpolated = min(max((i - low) / width, 0.0), 1.0)
        return f * (1 - interpolated + interpolated / factor)

    def magnitude(scale):
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = magnitude(1)
        if mscale and mscale_all:
            attention_factor = magnitude(mscale) / magnitude(mscale_all)
    return [scale(i, f) for i, f in enumerate(inv_freq)], float(attention_factor)


# -- turning ------------------------------------------------------------------------------------


class RopeTurns:
    """Rotations of any position, without a table: what rope_turns makes, for apply_rope."""

    __slots__ = ("_data", "attention_factor", "rotary_dim")

    def __init__(self, inv_freq, attention_factor):
        # Turns per position as 64-bit fractions: a position times one of them, modulo 2^64, is the
        # angle with whole turns dropped.
        turns = [math.floor(f / (2 * math.pi) % 1.0 * 2.0**64) % 2**64 for f in inv_freq]
        self._data = struct.pack(f"={len(turns)}Q", *turns)
        self.attention_factor = attention_factor
        self.rotary_dim = 2 * len(turns)

    def __repr__(self):
        return f"RopeTurns(rotary_dim={self.rotary_dim}, attention_factor={self.attention_factor})"


def rope_turns(rotary_dim, *, theta=10000.0, scaling=None, max_position_embeddings=None):
    """What apply_rope takes in place of a table: positions have no limit, no memory is read.

    Arguments as in rope_cos_sin_cache; rotary_dim is at most 512. Angles are exact to 2^-24 of half
    a turn at any position; a table is the faster of the two where rows are many.
    """
    return RopeTurns(*_frequencies(rotary_dim, theta, scaling, max_position_embeddings))


def apply_rope(
    q,
    k,
    positions,
    cos_sin_cache,
    *,
    indptr=None,
    offsets=None,
    interleave=False,
    q_out=None,
    k_out=None,
    dtype=None,
    stream=None,
):
    """Rotates q and k, in place or into q_out and k_out.

    q [n, num_qo_heads, head_dim], k [n, num_kv_heads, head_dim] or None: strided views of a fused
    row are fine. positions [n] int32 or int64; or None, with indptr [batch + 1] and offsets
    [batch]: rows indptr[b] to indptr[b + 1] stand at offsets[b] and on, other rows are not rotated.
    cos_sin_cache as rope_cos_sin_cache or rope_turns make it; the first rotary_dim (its width) of
    every head is rotated: element i with i + rotary_dim / 2 (as in transformers' Llama), or
    neighbours 2i with 2i + 1 if interleave (GPT-J). q_out and k_out (None where k is) are like q
    and k, in other memory, and get the whole heads. A position outside the table is an
    ArgumentError on the CPU; on CUDA its row is not rotated.
    """
    turns, factor = None, 1.0
    if isinstance(cos_sin_cache, RopeTurns):
        turns, factor, cos_sin_cache = cos_sin_cache._data, cos_sin_cache.attention_factor, None
    elif cos_sin_cache is None:
        from .errors import DTypeError

        raise DTypeError("cos_sin_cache: expected a table or rope_turns(..), got None")
    _core.ops_rope(
        q,
        k,
        positions,
        indptr,
        offsets,
        cos_sin_cache,
        q_out,
        k_out,
        turns,
        factor,
        interleave,
        dtype,
        stream,
    )


def rope_fp8(
    q_rope,
    k_rope,
    cos_sin_cache,
    positions,
    *,
    q_rope_out,
    k_rope_out,
    q_nope=None,
    k_nope=None,
    v=None,
    q_nope_out=None,
    k_nope_out=None,
    v_out=None,
    q_scale=1.0,
    kv_scale=1.0,
    interleave=False,
    batch_indices=None,
    token_positions=None,
    kv_indptr=None,
    kv_indices=None,
    dtype=None,
    stream=None,
):
    """Rotates q_rope and k_rope, and rounds all parts of q, k and v to 8-bit floats.

    q_rope [n, num_qo_heads, rotary_dim], k_rope [n, num_kv_heads, rotary_dim]: their whole width is
    rotated, as apply_rope does with cos_sin_cache [max_position, rotary_dim] and positions [n].
    q_nope, k_nope, v [n, heads, width] or None: not rotated. Each has an out of one float8 type, of
    its shape: the parts of a head may be views of one tensor. q's are multiplied by q_scale and k's
    and v's by kv_scale; what is past the largest 8-bit number becomes that number.

    With batch_indices [n], token_positions [n], kv_indptr [batch + 1] and kv_indices, row i of k
    and v goes into a paged cache: page kv_indices[kv_indptr[batch_indices[i]] + token_positions[i]
    // page_size]; their outs are then [num_pages, page_size, heads, width] views of it. A row with
    a batch index below 0 goes nowhere. On the CPU other indices out of range are an ArgumentError;
    on CUDA such a row is not written, and one with a position outside the table is not rotated.
    """
    _core.ops_rope_fp8(
        q_rope,
        k_rope,
        q_nope,
        k_nope,
        v,
        q_rope_out,
        k_rope_out,
        q_nope_out,
        k_nope_out,
        v_out,
        cos_sin_cache,
        positions,
        batch_indices,
        token_positions,
        kv_indptr,
        kv_indices,
        q_scale,
        kv_scale,
        interleave,
        dtype,
        stream,
    )

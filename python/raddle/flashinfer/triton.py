"""flashinfer.triton, of which raddle has the cascade functions; its kernels are raddle's own."""

import sys

from .cascade import merge_state, merge_state_in_place, merge_states

__all__ = ["merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states"]

_MOST_ELEMENTS = 1 << 27  # of v that are gathered at once


def variable_length_merge_states(v, s, indptr):
    """Join the states v[indptr[i] : indptr[i + 1]] of each row i.

    v: [states, heads, dim]; s: [states, heads]; indptr: [rows + 1]. Returns v [rows, heads, dim]
    and s float32 [rows, heads]; a row without states is 0 and -inf. Waits for the device: the rows
    are padded to the longest, some at a time."""
    import torch

    rows, (_, heads, dim) = len(indptr) - 1, v.shape
    out = torch.zeros(rows, heads, dim, dtype=v.dtype, device=v.device)
    lse = torch.full((rows, heads), -torch.inf, dtype=torch.float32, device=v.device)
    offsets = indptr.to(v.device, torch.int64)
    lengths = offsets.diff()
    longest = int(lengths.max()) if rows > 0 else 0
    if longest == 0:
        return out, lse
    step = max(1, _MOST_ELEMENTS // (longest * heads * dim))
    places = torch.arange(longest, device=v.device)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        used = places < lengths[part, None]
        at = torch.where(used, offsets[:-1][part, None] + places, 0)
        padded = torch.where(used[..., None, None], v[at], 0)
        sums = torch.where(used[..., None], s[at].float(), -torch.inf)
        out[part], lse[part] = merge_states(padded, sums)
    return out, lse


cascade = sys.modules[__name__]  # flashinfer.triton.cascade is this module too

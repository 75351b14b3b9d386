"""flashinfer.triton.kernels.cascade: objects that are launched as Triton kernels are,
kernel[grid](arguments), and run raddle's merges.

The grid and the block sizes (bdx, bdy) tell nothing that the tensors do not.
"""

import sys

from . import triton

__all__ = [
    "merge_state_in_place_kernel",
    "merge_state_kernel",
    "merge_states_kernel",
    "variable_length_merge_states_kernel",
]


class _Kernel:
    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return self.run


@_Kernel
def merge_state_kernel(v_a, s_a, v_b, s_b, v_merged, s_merged, num_heads, head_dim, bdx, bdy):
    _store(triton.merge_state(v_a, s_a, v_b, s_b), v_merged, s_merged)


@_Kernel
def merge_state_in_place_kernel(v, s, v_other, s_other, num_heads, head_dim, mask, bdx, bdy):
    triton.merge_state_in_place(v, s, v_other, s_other, mask)


@_Kernel
def merge_states_kernel(v, s, v_merged, s_merged, num_index_sets, num_heads, head_dim, bdx, bdy):
    _store(triton.merge_states(v, s), v_merged, s_merged)


@_Kernel
def variable_length_merge_states_kernel(
    v, s, indptr, v_merged, s_merged, num_heads, head_dim, bdx, bdy
):
    _store(triton.variable_length_merge_states(v, s, indptr), v_merged, s_merged)


def _store(result, v_merged, s_merged):
    v_merged.copy_(result[0])
    s_merged.copy_(result[1])


cascade = sys.modules[__name__]
triton.kernels = cascade

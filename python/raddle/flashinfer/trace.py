"""flashinfer.trace.templates.cascade: templates whose `reference` computes what a function does.

FlashInfer's are written out in torch; raddle's are the functions themselves, whose CPU back end is
the reference for its GPU kernels.
"""

import sys
from types import SimpleNamespace

from .cascade import merge_state, merge_state_in_place, merge_states

__all__ = ["merge_state_in_place_trace", "merge_state_trace", "merge_states_trace"]


def _merge_state_in_place(v, s, v_other, s_other, mask=None):
    merge_state_in_place(v, s, v_other, s_other, mask)
    return v, s


merge_state_trace = SimpleNamespace(reference=merge_state)
merge_state_in_place_trace = SimpleNamespace(reference=_merge_state_in_place)
merge_states_trace = SimpleNamespace(reference=merge_states)

templates = cascade = sys.modules[__name__]

"""Joining attentions of the same queries over disjoint keys, by their log-sum-exp."""

from . import _core


def merge_state(v_a, s_a, v_b, s_b, *, v_out=None, s_out=None, lse_base="2", stream=None):
    """Join two attentions of the same queries over disjoint keys; returns (v, s).

    v: [n, heads, dim]; s: float32 log-sum-exp [n, heads] in lse_base. Two empty states give 0 and
    -inf.
    """
    return _core.attention_merge_state(v_a, s_a, v_b, s_b, None, v_out, s_out, lse_base, stream)


def merge_state_in_place(v, s, v_other, s_other, *, mask=None, lse_base="2", stream=None):
    """Join (v_other, s_other) into (v, s).

    mask: bool or uint8 [n]; rows where it is 0 stay as they are.
    """
    _core.attention_merge_state(v, s, v_other, s_other, mask, v, s, lse_base, stream)


def merge_states(v, s, *, v_out=None, s_out=None, lse_base="2", stream=None):
    """Join many attentions of the same queries; returns (v, s).

    v: [n, states, heads, dim], s: float32 [n, states, heads] -> [n, heads, dim], [n, heads].
    """
    return _core.attention_merge_states(v, s, v_out, s_out, lse_base, stream)

"""The mask function of the attention implementation "raddle" in transformers.

Kernels take lengths, not masks: a mask is causal or not, has a window or not, and each request has
one run of tokens with padding before and behind it. The result is None (causal, no padding, no
window, all of K) or a bool tensor [batch, kv_len], True for tokens, which carries the Step that
describes it as its attribute `raddle_step`. What cannot be said so is refused when attention is
asked for, since packed batches never look at their masks.
"""

import numpy as np
import torch
from transformers import masking_utils

from ..errors import ArgumentError, UnsupportedError

HINT = "; use another attn_implementation for this model"

_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__


class Step:
    """What the mask of one forward pass says.

    causal; window: keys that a query sees, its own among them, or None; kv_len: the first so many
    of K count; ranges: NumPy int64 [batch, 2], begin and end of each request's tokens among them,
    or None where there is no padding.
    """

    __slots__ = ("causal", "window", "kv_len", "ranges")

    def __init__(self, causal, window, kv_len, ranges):
        self.causal = causal
        self.window = window
        self.kv_len = kv_len
        self.ranges = ranges


@torch.compiler.disable
def build_mask(
    batch_size,
    kv_length,
    mask_function=masking_utils.causal_mask_function,
    attention_mask=None,
    kv_offset=0,
    q_length=None,
    q_offset=0,
    cache_position=None,
    device=None,
    **_hints,
):
    """transformers' mask interface, 4.55 to 5: where it hands out cache_position [q_length], that
    says where the queries are; else q_offset and q_length do."""
    try:
        return _build(
            batch_size,
            kv_length,
            mask_function,
            attention_mask,
            kv_offset,
            q_length,
            q_offset,
            cache_position,
            device,
        )
    except UnsupportedError as error:
        refused = torch.ones((), dtype=torch.bool).expand(batch_size, 1, 1, 1)
        refused.raddle_step = error  # four dimensions: refused also where the attribute is lost
        return refused


def _build(
    batch_size,
    kv_length,
    mask_function,
    attention_mask,
    kv_offset,
    q_length,
    q_offset,
    cache_position,
    device,
):
    causal, window = describe(mask_function)
    if cache_position is not None:
        q_end = int(cache_position[-1]) + 1
        device = cache_position.device
    else:
        q_end = int(q_offset) + int(q_length)
    kv_len = q_end - int(kv_offset) if causal else int(kv_length)
    if kv_len > kv_length:
        raise UnsupportedError(
            f"attention_mask: queries end at position {q_end}, but K holds {int(kv_length)} tokens "
            f"from {int(kv_offset)} on{HINT}"
        )
    padding = None
    if attention_mask is not None:
        padding = cut_mask(attention_mask, int(kv_offset), kv_len)
    ranges = None if padding is None else token_ranges(padding)
    if causal and window is None and ranges is None and kv_len == kv_length:
        return None
    if padding is None:
        padding = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, kv_len)
    padding.raddle_step = Step(causal, window, kv_len, ranges)
    return padding


def describe(mask_function):
    """(causal, window or None) of a mask function of transformers."""
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    if mask_function is getattr(masking_utils, "bidirectional_mask_function", None):
        return False, None
    parts = _closure(mask_function, _AND, "mask_functions") or ()
    windows = [_closure(part, _WINDOW, "sliding_window") for part in parts]
    others = [part for part, window in zip(parts, windows) if window is None]
    windows = [window for window in windows if window is not None]
    if parts and len(windows) <= 1 and others == [masking_utils.causal_mask_function]:
        return True, windows[0] if windows else None
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    raise UnsupportedError(
        f"attention_mask: the model asks for the mask pattern {name}; raddle knows causal, "
        f"bidirectional and causal sliding-window masks with padding{HINT}. Packed sequences: pass "
        "cu_seq_lens_q and cu_seq_lens_k"
    )


def _closure(function, code, name):
    """What a function made by a factory was given as name, or None if another factory made it."""
    if getattr(function, "__code__", None) is not code:
        return None
    return dict(zip(code.co_freevars, function.__closure__))[name].cell_contents


def cut_mask(attention_mask, begin, length):
    """Columns [begin, begin + length) of a mask [batch, tokens], as bool."""
    if attention_mask.ndim != 2:
        raise UnsupportedError(
            f"attention_mask: expected [batch, tokens], got {list(attention_mask.shape)}: raddle "
            f"takes no masks of its callers' own making{HINT}"
        )
    if attention_mask.shape[1] == length:
        begin = 0  # cut already: models ask twice where generate() makes masks ahead
    if attention_mask.shape[1] < begin + length:
        raise ArgumentError(
            f"attention_mask: has {attention_mask.shape[1]} columns, expected at least "
            f"{begin + length}: one for each token, those in the cache among them"
        )
    return attention_mask[:, begin : begin + length].to(torch.bool)


def token_ranges(padding):
    """[batch, 2] begin and end of each row's run of True in a bool tensor [batch, n]; None when
    all is True. One wait for the device. Raises UnsupportedError for a row with two runs."""
    n = padding.shape[1]
    if n == 0:
        return None
    marks = padding.int()
    counts, begins, tails = (
        torch.stack([marks.sum(1), marks.argmax(1), marks.flip(1).argmax(1)]).cpu().numpy()
    )
    if (counts == n).all():
        return None
    ends = n - tails
    begins[counts == 0] = ends[counts == 0] = 0
    broken = (ends - begins != counts).nonzero()[0]
    if broken.size:
        raise UnsupportedError(
            f"attention_mask: request {broken[0]} has padding between its tokens; raddle takes it "
            "before and behind them. Pad prompts on the left"
        )
    return np.stack([begins, ends], axis=1)

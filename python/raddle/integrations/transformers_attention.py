"""The attention function of "raddle" in transformers, for K and V as ordinary caches hold them, and
for packed batches.

K and V [batch, kv_heads, tokens, dim] are read where they lie, as the ragged kernel's rows: row
b * pitch + t is token t of request b, and what lies between two requests is a request of its own
without queries. Padding is skipped in the same way, so that nothing is copied and no key is masked.
"""

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ArgumentError, ShapeError, UnsupportedError
from . import transformers_paged
from .transformers_mask import HINT, Step, cut_mask, token_ranges
from .transformers_plans import Shape, get_lengths, get_plan

# Arguments of attention functions that change what is computed, and that raddle does not know.
UNKNOWN = ("position_bias", "head_mask", "attention_bias", "alibi", "block_mask", "indexer_mask")

_sinks = WeakTensorKeyDictionary()  # a model's sinks -> (version, float32 copy)


@torch.compiler.disable
def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    softcap=None,
    sliding_window=None,
    s_aux=None,
    is_causal=None,
    **kwargs,
):
    """transformers' attention interface: query [batch, heads, tokens, dim], key and value with
    fewer heads as they are; returns ([batch, tokens, heads, dim], None).

    attention_mask: what build_mask made. Raises UnsupportedError for dropout, gradients, attention
    weights, biases, and masks of another making.
    """
    refuse_unsupported(query, key, value, s_aux, dropout, kwargs)
    if sliding_window is not None and sliding_window < 1:
        raise ArgumentError(f"sliding_window: expected 1 or more, got {sliding_window}")
    common = dict(scaling=scaling, softcap=softcap, sinks=get_sinks(s_aux))
    key, value = transformers_paged.update_cache(module, key, value, kwargs)
    packed = transformers_paged.find_batch(module, kwargs)
    if packed is not None:
        common.update(causal=is_causal is not False, window=sliding_window)
        out = transformers_paged.run(packed, query, **common)
    elif kwargs.get("cu_seq_lens_q") is not None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        common.update(causal=causal, window=sliding_window)
        out = run_packed(module, query, key, value, kwargs, **common)
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        step = get_step(attention_mask, key, is_causal, sliding_window)
        out = run_dense(query, key, value, step, **common)
    return out, None


def refuse_unsupported(query, key, value, s_aux, dropout, kwargs):
    if dropout:
        raise UnsupportedError(f"dropout: raddle has none, got {dropout}; call model.eval(){HINT}")
    if kwargs.get("output_attentions"):
        raise UnsupportedError(f"output_attentions: raddle never makes the attention weights{HINT}")
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{name}: raddle does not know how to apply it{HINT}")
    tensors = (query, key, value, s_aux)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise UnsupportedError(
            "raddle's attention has no gradient: call the model under torch.no_grad() or "
            f"torch.inference_mode(){HINT}"
        )


def get_sinks(s_aux):
    """float32 [heads] of a model's sink logits, converted once."""
    if s_aux is None:
        return None
    if s_aux.dtype == torch.float32 and s_aux.is_contiguous():
        return s_aux.detach()
    version = None if s_aux.is_inference() else s_aux._version
    found = _sinks.get(s_aux)
    if version is None or found is None or found[0] != version:
        found = (version, s_aux.detach().float().contiguous())
        _sinks[s_aux] = found
    return found[1]


def get_step(mask, key, is_causal, sliding_window):
    """The Step of a mask as the attention function gets it."""
    tokens = key.shape[2]
    step = getattr(mask, "raddle_step", None)
    if isinstance(step, UnsupportedError):
        raise step
    if step is None and mask is None:
        return Step(is_causal, sliding_window, tokens, None)
    if step is None:  # of a model that makes its masks without asking, or lost on the way
        width = min(mask.shape[-1], tokens)
        padding = cut_mask(mask, mask.shape[-1] - width, width)
        return Step(is_causal, sliding_window, width, token_ranges(padding))
    if step.kv_len > tokens:
        raise ShapeError(f"attention_mask: speaks of {step.kv_len} tokens, K has {tokens}")
    if sliding_window == step.window:
        return step
    if step.window is None and step.kv_len > sliding_window and step.causal:
        raise UnsupportedError(
            f"sliding_window: the attention says {sliding_window}, its mask says none{HINT}"
        )
    if step.window is not None and sliding_window is not None:
        raise UnsupportedError(
            f"sliding_window: the attention says {sliding_window}, its mask {step.window}{HINT}"
        )
    window = sliding_window if step.window is None else step.window
    return Step(step.causal, window, step.kv_len, step.ranges)


# ------------------------------------------------------------------ padded batches


def run_dense(query, key, value, step, *, scaling, softcap, sinks):
    """[batch, tokens, heads, dim_vo] of query over the K and V of a cache."""
    batch, heads, qo_len, _ = query.shape
    if not step.causal and step.window is not None:
        raise UnsupportedError(
            f"sliding_window: raddle's looks back only, this one both ways{HINT}"
        )
    if step.causal and qo_len > step.kv_len:
        raise ShapeError(f"query: has {qo_len} tokens, more than the {step.kv_len} of K")
    pitch = _get_pitch(key, value)
    if pitch is None:
        key, value = key.contiguous(), value.contiguous()
        pitch = key.shape[1] * key.shape[2]
    shape = Shape(
        query,
        key,
        value,
        causal=step.causal and qo_len > 1,
        window=step.window,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks is not None,
    )
    planned = get_plan(shape, 4 * batch, qo_len, batch * qo_len)
    ranges = None if step.ranges is None else step.ranges.tobytes()
    signature = (batch, qo_len, step.kv_len, pitch, ranges)
    if planned.signature != signature:
        planned.signature = None
        planned.plan.plan(*_offsets(batch, qo_len, step.kv_len, pitch, step.ranges))
        planned.signature = signature
    q = query.transpose(1, 2).reshape(batch * qo_len, heads, query.shape[3])
    out = q.new_empty(q.shape[0], heads, value.shape[3])
    planned.plan.run(q, _rows(key, pitch), _rows(value, pitch), out=out, sinks=sinks)
    return out.view(batch, qo_len, heads, value.shape[3])


def _get_pitch(key, value):
    """Rows from one request to the next, the same in K and V; None if there is no such number."""
    if key.stride(3) != 1 or value.stride(3) != 1:
        return None
    if key.shape[0] == 1:
        return key.shape[2]
    pitches = []
    for x in (key, value):
        step = x.stride(2)
        if step == 0 or x.stride(0) % step or x.stride(0) // step < x.shape[2]:
            return None
        pitches.append(x.stride(0) // step)
    return pitches[0] if pitches[0] == pitches[1] else None


def _rows(x, pitch):
    """[batch, heads, tokens, dim] as rows [.., heads, dim], those between requests among them."""
    batch, heads, tokens, dim = x.shape
    count = (batch - 1) * pitch + tokens
    return x.as_strided((count, heads, dim), (x.stride(2), x.stride(1), 1))


def _offsets(batch, qo_len, kv_len, pitch, ranges):
    """(qo_indptr, kv_indptr): int32 offsets of four requests for each of the batch: padded queries,
    which see nothing; the gap in K and V before it; its tokens; padded queries behind."""
    begins = np.zeros(batch, np.int64) if ranges is None else ranges[:, 0]
    ends = np.full(batch, kv_len, np.int64) if ranges is None else ranges[:, 1]
    first_query = kv_len - qo_len  # its place among the keys
    q_begins = np.clip(begins - first_query, 0, qo_len)
    q_ends = np.maximum(np.clip(ends - first_query, 0, qo_len), q_begins)
    q_row, kv_row = (np.arange(batch) * n for n in (qo_len, pitch))
    qo_ends = np.stack([q_row + q_begins, q_row + q_begins, q_row + q_ends, q_row + qo_len], 1)
    kv_gap = kv_row + begins
    last_end = np.concatenate([[0], kv_row[:-1] + ends[:-1]])
    kv_ends = np.stack([last_end, kv_gap, kv_row + ends, kv_row + ends], 1)
    return tuple(
        np.concatenate([[0], x.ravel()]).astype(np.int32 if x.max() < 2**31 else np.int64)
        for x in (qo_ends, kv_ends)
    )


# ------------------------------------------------------------------ packed batches


def run_packed(module, query, key, value, kwargs, *, scaling, softcap, sinks, causal, window):
    """[1, tokens, heads, dim_vo] of requests that lie one behind the other, as cu_seq_lens_q and
    cu_seq_lens_k say."""
    if query.shape[0] != 1:
        raise ShapeError(
            f"cu_seq_lens_q: goes with a batch of 1 that holds all requests, got {query.shape[0]}"
        )
    kv_indptr = kwargs.get("cu_seq_lens_k")
    if not isinstance(kv_indptr, torch.Tensor):
        raise ArgumentError("cu_seq_lens_k: expected a tensor [requests + 1] beside cu_seq_lens_q")
    lengths = get_lengths(kwargs["cu_seq_lens_q"], kv_indptr, getattr(module, "layer_idx", None))
    shape = Shape(
        query,
        key,
        value,
        causal=causal,
        window=window,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks is not None,
    )
    batch, tokens = len(lengths.qo_indptr) - 1, int(lengths.qo_indptr[-1])
    longest = int(np.diff(lengths.qo_indptr).max(initial=1))
    planned = get_plan(shape, batch, longest, max(tokens, 1))
    if planned.signature != lengths.token:
        planned.signature = None
        planned.plan.plan(lengths.qo_indptr, lengths.kv_indptr)
        planned.signature = lengths.token
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = transformers_paged.empty_rows(q, tokens, value.shape[3])
    planned.plan.run(q[:tokens], k, v, out=out[:tokens], sinks=sinks)
    return out[None]

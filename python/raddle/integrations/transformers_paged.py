"""Continuous batching (generate_batch) in transformers: K and V stay in its paged cache.

For layers of full attention the cache of transformers, seen as pages of one token, is read through
its own index of tokens (read_index), so that nothing is gathered; new tokens are written first
(write_index). Layers with a sliding window keep a ring that new tokens overwrite: there, and where
nothing was cached yet, transformers hands out K and V in rows, which the packed form reads.

Three contracts are met. transformers 4.5x calls any implementation with the keyword `cache`;
5.0 and its followers do so for names that begin with "paged|"; later ones update the cache before
they call, and then a hook on that update leaves out the gathering.
"""

import functools
import inspect

import numpy as np
import torch

from ..attention import append_slots
from ..errors import ShapeError, UnsupportedError
from .transformers_plans import Shape, get_lengths, get_plan

NAMES = ("raddle", "paged|raddle")
PAGES = "raddle_pages"  # the hook's word to the attention function
UPDATE = [("layer_idx", False), ("kwargs", False)]  # how update() ends where models call it


class PagedBatch:
    """k, v: [slots, kv_heads, dim] of one layer's cache; read_index: slots of all requests' tokens,
    one request behind the other; lengths: where each begins."""

    __slots__ = ("k", "v", "read_index", "lengths")

    def __init__(self, k, v, read_index, lengths):
        self.k, self.v, self.read_index, self.lengths = k, v, read_index, lengths


def find_batch(module, kwargs):
    """The PagedBatch of a call by continuous batching, or None where K and V come in rows."""
    layer = getattr(module, "layer_idx", None)
    found = kwargs.get(PAGES)
    if found is None:
        return None
    lengths = get_lengths(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], layer)
    return PagedBatch(*found, lengths)


def update_cache(module, key, value, kwargs):
    """Where a call brings the paged cache as the keyword `cache`: writes the new tokens into it and
    returns K and V of this layer, in rows unless they stay in the cache; kwargs then say which."""
    cache = kwargs.get("cache")
    if cache is None:
        return key, value
    if not hasattr(cache, "layer_index_to_group_indices"):
        raise UnsupportedError(
            f"cache: raddle does not know how {type(cache).__name__} of this transformers keeps K "
            "and V; continuous batching is known from 4.57 on"
        )
    layer = module.layer_idx
    group, index = cache.layer_index_to_group_indices[layer]
    read_index, write_index = kwargs["read_index"][group], kwargs["write_index"][group]
    is_full = cache.sliding_windows[layer] == 1
    kv_indptr = kwargs["cu_seq_lens_k"]
    if isinstance(kv_indptr, dict):
        kind = "full_attention" if is_full else "sliding_attention"
        kwargs["cu_seq_lens_k"] = kv_indptr[kind]
    if is_full and read_index.numel() > 0:
        k, v = cache.key_cache[index], cache.value_cache[index]
        write_rows(key, value, write_index, k, v)
        kwargs[PAGES] = (k, v, read_index)
        return key, value
    key, value = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=layer,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    return tuple(x.transpose(0, 1)[None] for x in (key, value))


def write_rows(key, value, slots, k, v):
    """Tokens of key and value [1, heads, tokens, dim] into slots of k and v [slots, heads, dim]."""
    rows = (x[0].transpose(0, 1) for x in (key, value))
    append_slots(*rows, slots, (k[:, None], v[:, None]))


def run(packed, query, *, scaling, softcap, sinks, causal, window):
    """[1, tokens, heads, dim_vo] of the requests of a PagedBatch."""
    if query.shape[0] != 1:
        raise ShapeError(f"query: expected all requests in a batch of 1, got {query.shape[0]}")
    lengths, k, v = packed.lengths, packed.k, packed.v
    shape = Shape(
        query,
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        causal=causal,
        window=window,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks is not None,
    )
    kv_indptr = lengths.kv_indptr
    batch, tokens = len(lengths.qo_indptr) - 1, int(lengths.qo_indptr[-1])
    longest = int(np.diff(lengths.qo_indptr).max(initial=1))
    planned = get_plan(shape, batch, longest, max(tokens, 1), pages=max(int(kv_indptr[-1]), 1))
    if planned.signature != lengths.token:
        planned.signature = None
        last_page_len = np.minimum(np.diff(kv_indptr), 1)
        planned.plan.plan(lengths.qo_indptr, kv_indptr, _int32(packed, lengths), last_page_len)
        planned.signature = lengths.token
    q = query[0].transpose(0, 1)
    out = empty_rows(q, tokens, v.shape[2])
    planned.plan.run(q[:tokens], (k[:, None], v[:, None]), out=out[:tokens], sinks=sinks)
    return out[None]


def _int32(packed, lengths):
    """read_index as a plan takes it without a copy to the host, converted once per step."""
    index = packed.read_index
    if index.device.type == "cpu":
        return index
    found = lengths.extra.get("read_index")
    if found is None:
        found = lengths.extra["read_index"] = index.to(torch.int32).contiguous()
    return found


def empty_rows(q, tokens, dim):
    """[rows, heads, dim] like q; rows from tokens on, which pad a batch, are 0."""
    out = q.new_empty(q.shape[0], q.shape[1], dim)
    if tokens < q.shape[0]:
        out[tokens:] = 0
    return out


# ------------------------------------------------------------------ hooks


def install_hooks():
    """Lets the manager of continuous batching take "raddle" as it is (it would look for flash
    attention, or refuse) and use no CUDA graphs unless asked, and its cache leave K and V where
    they are. Once per process."""
    try:
        from transformers.generation.continuous_batching import cache, continuous_api
    except ImportError:
        return
    manager = getattr(continuous_api, "ContinuousBatchingManager", None)
    names = list(inspect.signature(cache.PagedAttentionCache.update).parameters.values())
    is_late = [(x.name, x.kind is x.VAR_KEYWORD) for x in names[3:]] == UPDATE
    if hasattr(manager, "switch_to_cb_friendly_attn"):
        _wrap(manager, "switch_to_cb_friendly_attn", _make_switch(is_late))
    if hasattr(manager, "_decide_use_cuda_graphs"):
        _wrap(manager, "_decide_use_cuda_graphs", _make_decision())
    if is_late:
        _wrap(cache.PagedAttentionCache, "update", _make_update())


def _wrap(owner, name, make):
    original = getattr(owner, name)
    if not getattr(original, "raddle", False):
        wrapped = functools.wraps(original)(make(original))
        wrapped.raddle = True
        setattr(owner, name, wrapped)


def _make_switch(is_late):
    def make(original):
        def switch_to_cb_friendly_attn(self, model, *args, **kwargs):
            given = model.config._attn_implementation
            if given not in NAMES:
                return original(self, model, *args, **kwargs)
            if not is_late and given == "raddle":
                model.set_attn_implementation("paged|raddle")
                self._original_attn_impl = given
            return None

        return switch_to_cb_friendly_attn

    return make


def _make_decision():
    def make(original):
        def _decide_use_cuda_graphs(self, *args, **kwargs):
            if self.model.config._attn_implementation in NAMES and not args:
                kwargs["use_cuda_graph"] = kwargs.get("use_cuda_graph") or False
            return original(self, *args, **kwargs)

        return _decide_use_cuda_graphs

    return make


def _make_update():
    def make(original):
        def update(self, key_states, value_states, layer_idx, kwargs):
            if self.config._attn_implementation not in NAMES or not _can_stay(
                self, layer_idx, kwargs
            ):
                return original(self, key_states, value_states, layer_idx, kwargs)
            allocator = self.layer_to_allocator[layer_idx]
            pages = allocator.get_cache_for_block_table(layer_idx)
            k, v = (x.view(-1, *x.shape[2:]) for x in pages)
            index = allocator.index
            write_rows(key_states, value_states, kwargs["write_index"][index], k, v)
            kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"][allocator.layer_type]
            kwargs["max_length_k"] = kwargs["max_length_k"][allocator.layer_type]
            kwargs[PAGES] = (k, v, kwargs["read_index"][index])
            return key_states, value_states

        return torch.compiler.disable(update)

    return make


def _can_stay(cache, layer_idx, kwargs):
    """Whether a layer's tokens can be read where the cache has them."""
    allocator = cache.layer_to_allocator[layer_idx]
    return (
        kwargs.get("block_table") is None
        and getattr(allocator, "supports_block_table", False)
        and kwargs["read_index"][allocator.index].numel() > 0
    )

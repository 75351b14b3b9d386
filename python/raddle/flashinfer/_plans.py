"""Native plans behind FlashInfer's wrappers and single-request functions.

A native plan has declared maxima; FlashInfer's wrappers have none, unless they were given the
buffers of a CUDA graph. So a wrapper keeps one native plan per configuration and makes a larger one
(powers of two) when a batch outgrows it. Outgrown ones live as long as the wrapper: a graph that
was captured with one would read memory that is gone.
"""

import threading
from typing import Any, NamedTuple

from ..attention import BatchDecode, BatchPrefill, BatchRaggedPrefill
from ..errors import ArgumentError, CapacityError, StateError, UnsupportedError

_ENCODINGS = {"NONE": "NONE", "ROPE_LLAMA": "ROPE", "ALIBI": "ALIBI"}
_LEAST_BATCH, _LEAST_PAGES, _LEAST_ROWS = 8, 1024, 64
_MAX_CONFIGS = 16  # of one wrapper, and of the single-request functions in one thread
ANY_LENGTH = 2**31 - 1
NO_SPLIT = 2**30  # a fixed chunk that no request fills


class Config(NamedTuple):
    """What a native plan is made for, its maxima apart."""

    kind: str  # "decode", "prefill" or "ragged"
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int  # ragged: 0
    q_dtype: Any  # torch.dtype
    kv_dtype: Any
    o_dtype: Any
    kv_layout: str
    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float = 0.0
    pos_encoding_mode: str = "NONE"
    sm_scale: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None
    max_qo_len: int = 0  # 0: any
    fixed_chunk: int = 0
    sinks: bool = False


class Sizes(NamedTuple):
    """A batch, or the maxima of a plan."""

    batch: int
    pages: int  # ragged: K/V rows
    rows: int

    def fits(self, maxima):
        return self[0] <= maxima[0] and self[1] <= maxima[1] and self[2] <= maxima[2]

    def grown(self, before):
        """Maxima for this batch and for what fitted before."""
        least = (_LEAST_BATCH, _LEAST_PAGES, _LEAST_ROWS)
        return Sizes(*(power_of_two(max(own)) for own in zip(self, before, least, strict=True)))


def power_of_two(n):
    return min(1 << (n - 1).bit_length(), ANY_LENGTH) if n > 1 else 1


def make_native(config, maxima, device):
    """The plan of raddle.attention for config. torch dtypes go through as they are."""
    options = dict(
        num_qo_heads=config.num_qo_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim_qk,
        head_dim_vo=config.head_dim_vo,
        dtype=config.q_dtype,
        kv_dtype=config.kv_dtype,
        o_dtype=config.o_dtype,
        kv_layout=config.kv_layout,
        window_left=max(config.window_left, -1),
        logits_soft_cap=max(config.logits_soft_cap, 0.0),
        pos_encoding=_ENCODINGS[config.pos_encoding_mode],
        sm_scale=config.sm_scale,
        rope_scale=config.rope_scale,
        rope_theta=config.rope_theta,
        sinks=config.sinks,
        fixed_chunk=config.fixed_chunk,
        max_batch=max(maxima.batch, 1),
        device=device,
    )
    if config.kind == "decode":
        return BatchDecode(page_size=config.page_size, max_pages=maxima.pages, **options)
    rows = dict(
        causal=config.causal, max_qo_tokens=max(maxima.rows, 1), max_qo_len=config.max_qo_len
    )
    if config.kind == "prefill":
        return BatchPrefill(page_size=config.page_size, max_pages=maxima.pages, **rows, **options)
    return BatchRaggedPrefill(max_kv_tokens=maxima.pages, **rows, **options)


def current_stream(device):
    """torch's stream for that device, to plan on; None on the CPU."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.current_stream(device)


# -- a wrapper's plans --------------------------------------------------------------------------


class _Slot:
    """A native plan, its maxima, and whether it ran since a batch was planned in it."""

    __slots__ = ("maxima", "native", "was_run")

    def __init__(self, native, maxima):
        self.native = native
        self.maxima = maxima
        self.was_run = False


class WrapperPlans:
    """The native plans of one wrapper, by configuration.

    maxima: of every plan, when the wrapper has the buffers of a CUDA graph; None: plans grow.
    """

    def __init__(self, device, workspace, maxima=None):
        self.device = device
        self.workspace = workspace
        self.maxima = maxima
        self._slots = {}
        self._outgrown = []
        self._batch = None  # (config, sizes, tables) of the last plan()
        self._ready = {}  # has_sinks -> the slot that holds that batch

    def reset_workspace(self, workspace):
        self.workspace = workspace
        for slot in self._slots.values():
            self._bind(slot.native)

    def workspace_size(self, config, sizes, maxima=None):
        """Bytes that plan(config, sizes) will want; maxima: those of a graph, not yet set."""
        slot = self._slots.get(config)
        maxima = maxima or self.maxima or sizes.grown(slot.maxima if slot else (0, 0, 0))
        return make_native(config, maxima, self.device).workspace_size

    def plan(self, config, sizes, *tables):
        """Plan a batch; tables: the positional arguments of the native plan().

        Sinks are an argument of run(), so a plan with them is made at the first run that brings
        some. From then on both kinds are planned here, as far as they are in use. After an error
        the batch before is still there."""
        if self._ready and config is self._batch[0]:
            slots = self._ready
        else:
            slots = {has: self._slots.get(config._replace(sinks=has)) for has in (False, True)}
        wanted = [has for has, slot in slots.items() if slot is not None and slot.was_run]
        ready = {}
        try:
            for has_sinks in wanted or [False]:
                slot = slots.get(has_sinks)
                if slot is None or not sizes.fits(slot.maxima):
                    slot = self._slot(config._replace(sinks=has_sinks), sizes)
                self._plan_slot(slot, tables)
                ready[has_sinks] = slot
        except Exception:
            taken = list(ready.values())
            self._ready = {has: one for has, one in self._ready.items() if one not in taken}
            raise
        self._batch, self._ready = (config, sizes, tables), ready

    def plan_again(self, config):
        """Plan the same batch for another configuration."""
        _, sizes, tables = self._batch
        self.plan(config, sizes, *tables)

    @property
    def planned_sizes(self):
        return self._batch[1]

    def native(self, has_sinks):
        """The plan that holds the wrapper's batch."""
        slot = self._ready.get(has_sinks)
        if slot is None:
            if self._batch is None:
                raise StateError("run: nothing is planned; call plan() first")
            config, sizes, tables = self._batch
            slot = self._slot(config._replace(sinks=has_sinks), sizes)
            self._plan_slot(slot, tables)
            self._ready[has_sinks] = slot
        slot.was_run = True
        return slot.native

    def _plan_slot(self, slot, tables):
        stream = current_stream(self.device)
        try:
            slot.native.plan(*tables, stream=stream)
        except ArgumentError as error:
            if not str(error).startswith("last_page_len"):
                raise
            slot.native.plan(*_without_empty_tails(tables), stream=stream)
        if self.maxima is None:
            slot.was_run = False

    def _slot(self, config, sizes):
        slot = self._slots.pop(config, None)
        if slot is None or (self.maxima is None and not sizes.fits(slot.maxima)):
            if slot is not None:
                self._outgrown.append(slot.native)
            maxima = self.maxima or sizes.grown(slot.maxima if slot else (0, 0, 0))
            slot = _Slot(make_native(config, maxima, self.device), maxima)
            self._bind(slot.native)
        if self.maxima is None and len(self._slots) >= _MAX_CONFIGS:
            del self._slots[next(iter(self._slots))]  # the one that was planned longest ago
        self._slots[config] = slot
        return slot

    def _bind(self, native):
        """Scratch is the caller's buffer when that is large enough, else the plan's own."""
        try:
            native.bind_workspace(self.workspace)
        except CapacityError:
            pass


def _without_empty_tails(tables):
    """The tables with last_page_len 0 for requests without pages, where FlashInfer does not look at
    it."""
    import torch

    *front, indptr, indices, last_page_len = tables
    indptr, last_page_len = indptr.cpu(), last_page_len.cpu()
    empty = indptr.diff() == 0
    return (*front, indptr, indices, torch.where(empty, 0, last_page_len).to(last_page_len.dtype))


# -- single requests ----------------------------------------------------------------------------


class _Single:
    __slots__ = ("lengths", "native", "rows")

    def __init__(self, native, rows):
        self.native = native
        self.rows = rows
        self.lengths = None


class _ThreadCache(threading.local):
    def __init__(self):
        self.plans = {}  # (config, device, stream) -> _Single, the latest used last


_cache = _ThreadCache()
_captured = {}  # (config, device, lengths) -> _Single that a graph reads: never planned again


def clear_single_plans():
    """Drop what this thread's single-request functions keep, and what was captured of them."""
    _cache.plans.clear()
    _captured.clear()


def run_single(config, q, k, v, kv_len, **options):
    """Attention of one request; q [rows, heads, dim], k and v ragged. The native run()'s result.

    A plan is kept per configuration, thread and stream, and planned anew only when lengths change.
    """
    import torch

    device, rows = q.device, q.shape[0]
    stream = current_stream(device)
    key = (config, device, None if stream is None else stream.cuda_stream)
    lengths = (rows, kv_len)
    if stream is not None and torch.cuda.is_current_stream_capturing():
        single = _take_for_capture(config, device, lengths)
    else:
        single = _cache.plans.pop(key, None)
        if single is None or rows > single.rows:
            most = 1 if config.max_qo_len == 1 else power_of_two(max(rows, _LEAST_ROWS))
            single = _Single(make_native(config, Sizes(1, ANY_LENGTH, most), device), most)
        if len(_cache.plans) >= _MAX_CONFIGS:
            del _cache.plans[next(iter(_cache.plans))]
        _cache.plans[key] = single
        if single.lengths != lengths:
            single.lengths = None
            kv_indptr = torch.tensor([0, kv_len], dtype=torch.int32)
            qo_indptr = None
            if config.max_qo_len != 1:
                qo_indptr = torch.tensor([0, rows], dtype=torch.int32)
            single.native.plan(qo_indptr, kv_indptr, stream=stream)
            single.lengths = lengths
    return single.native.run(q, k, v, **options)


def _take_for_capture(config, device, lengths):
    """A plan that already holds these lengths, set aside: planning it again would change what the
    graph does."""
    wanted = (config, device, lengths)
    if wanted in _captured:
        return _captured[wanted]
    for key, single in _cache.plans.items():
        if key[:2] == (config, device) and single.lengths == lengths:
            _captured[wanted] = _cache.plans.pop(key)
            return single
    raise StateError(
        "the stream is being captured, and a single-request call plans on the host; call it once "
        "with the same shapes and arguments before the capture"
    )


# -- scales -------------------------------------------------------------------------------------


def product_of_scales(a, b, num_kv_heads):
    """a * b for the native k_scale: None, a number, or float32 [num_kv_heads]; None counts as 1."""
    if a is None or b is None:
        return scale_argument(b if a is None else a, num_kv_heads)
    return scale_argument(a * b, num_kv_heads)


def scale_argument(scale, num_kv_heads):
    """A scale as the native run() takes it: a number, or float32 [num_kv_heads] on its device."""
    if scale is None or isinstance(scale, (int, float)):
        return scale
    import torch

    if not torch.is_tensor(scale):
        return float(scale)
    if scale.numel() == 1:
        return scale.reshape(1).to(torch.float32).expand(num_kv_heads).contiguous()
    if tuple(scale.shape) != (num_kv_heads,):
        raise UnsupportedError(
            f"scale: expected a number, a tensor of one, or one per KV head ({num_kv_heads}); got "
            f"shape {tuple(scale.shape)}"
        )
    return scale.to(torch.float32)

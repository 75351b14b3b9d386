"""Plans for the attention functions of transformers: made when a shape class is first met, planned
once per step, run once per layer.

What a plan was last planned for is kept beside it as a signature; layers of one step bring the same
and only run. Plans and scratch belong to a thread and a stream, so that a background thread of
generate_batch() and the main thread never share one.
"""

import threading
import weakref
from collections import OrderedDict

import numpy as np
import torch

from ..attention import BatchPrefill, BatchRaggedPrefill
from ..errors import StateError

MAX_PLANS = 32  # of a thread; the least recently used goes first
MAX_STEPS = 8
MAX_INT32 = 2**31 - 1


class _Local(threading.local):
    def __init__(self):
        self.plans = OrderedDict()
        self.scratch = {}  # (device, stream) -> uint8 tensor that its plans share
        self.steps = OrderedDict()
        self.next_token = 0


_local = _Local()


class Shape:
    """What a plan is compiled for, apart from capacities."""

    __slots__ = ("key", "spec", "place")

    def __init__(self, query, key, value, *, causal, window, scaling, softcap, sinks):
        device = query.device
        stream = 0
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device).cuda_stream
        self.place = (str(device), stream)
        self.spec = dict(
            num_qo_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            head_dim_vo=value.shape[3],
            dtype=query.dtype,
            kv_dtype=key.dtype,
            causal=causal,
            window_left=-1 if window is None else window - 1,
            sm_scale=scaling,
            logits_soft_cap=softcap,
            sinks=sinks,
        )
        self.key = (self.place, *self.spec.values())


class _Planned:
    __slots__ = ("plan", "signature")

    def __init__(self, plan):
        self.plan = plan
        self.signature = None


def get_plan(shape, max_batch, max_qo_len, max_qo_tokens, pages=None):
    """A _Planned for at least these sizes. pages: None for K and V without pages, else the most
    pages of one token."""
    batch, qo_len = _round_up(max_batch), max(_round_up(max_qo_len), 2)
    tokens = _round_up(max_qo_tokens)
    pages = None if pages is None else _round_up(pages)
    key = (shape.key, batch, qo_len, tokens, pages)
    plans = _local.plans
    found = plans.get(key)
    if found is not None:
        plans.move_to_end(key)
        return found
    sizes = dict(max_batch=batch, max_qo_len=qo_len, max_qo_tokens=tokens, device=shape.place[0])
    if pages is None:
        plan = BatchRaggedPrefill(max_kv_tokens=MAX_INT32, **sizes, **shape.spec)
    else:
        plan = BatchPrefill(page_size=1, max_pages=pages, **sizes, **shape.spec)
    plan.bind_workspace(_get_scratch(shape.place, plan.workspace_size))
    found = plans[key] = _Planned(plan)
    while len(plans) > MAX_PLANS:
        plans.popitem(last=False)
    return found


def clear():
    """Frees this thread's plans and scratch."""
    _local.plans.clear()
    _local.scratch.clear()
    _local.steps.clear()


def _get_scratch(place, size):
    scratch = _local.scratch.get(place)
    if scratch is None or scratch.numel() < size:
        scratch = torch.empty(_round_up(max(size, 4096)), dtype=torch.uint8, device=place[0])
        _local.scratch[place] = scratch
    return scratch


def _round_up(n):
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


class Lengths:
    """Offsets of a packed batch, read from the device once per step.

    qo_indptr, kv_indptr: NumPy int32 [batch + 1]; token: a number that no other step has; extra: a
    place for what else is made once per step.
    """

    __slots__ = ("tensors", "versions", "layer", "qo_indptr", "kv_indptr", "token", "extra")


def get_lengths(qo_indptr, kv_indptr, layer):
    """The Lengths of two offset tensors [batch + 1].

    Read anew when a tensor is another object, was written to, or when layer (the caller's
    layer_idx, or None) does not follow the one that asked before: then a new forward pass has
    begun, and its tensors may be the old ones with new contents.
    """
    steps = _local.steps
    key = (id(qo_indptr), id(kv_indptr))
    found = steps.get(key)
    versions = (_version(qo_indptr), _version(kv_indptr))
    if (
        found is not None
        and found.tensors[0]() is qo_indptr
        and found.tensors[1]() is kv_indptr
        and found.versions == versions
        and layer is not None
        and layer > found.layer
    ):
        found.layer = layer
        return found
    if qo_indptr.is_cuda and torch.cuda.is_current_stream_capturing():
        raise StateError(
            "cu_seq_lens_q: raddle plans on the host, which cannot read lengths inside a CUDA "
            "graph; turn graphs off (use_cuda_graph=False)"
        )
    found = Lengths()
    found.tensors = (weakref.ref(qo_indptr), weakref.ref(kv_indptr))
    found.versions = versions
    found.layer = -1 if layer is None else layer
    found.qo_indptr = _read(qo_indptr)
    found.kv_indptr = _read(kv_indptr)
    found.extra = {}
    found.token = _local.next_token
    _local.next_token += 1
    steps[key] = found
    while len(steps) > MAX_STEPS:
        steps.popitem(last=False)
    return found


def _version(tensor):
    """Counts writes; None where torch does not count (inference mode)."""
    return None if tensor.is_inference() else tensor._version


def _read(tensor):
    """A copy on the host: the tensor may be a buffer that its owner fills again."""
    return tensor.cpu().numpy().astype(np.int32, copy=True)

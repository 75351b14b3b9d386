"""Whether a call works: asked of the call itself, on one token."""

import inspect
from importlib import import_module

from ..errors import RaddleError
from ._refuse import is_placeholder


class Support:
    """The answer: true when the call works; `reason` says why not."""

    def __init__(self, reason=""):
        self.reason = reason

    def __bool__(self):
        return not self.reason

    def __repr__(self):
        return "Support(yes)" if self else f"Support(no: {self.reason})"


def supports(call, **config):
    """Whether raddle.flashinfer does a call with these arguments.

    call: a name as in flashinfer, "single_decode_with_kv_cache", "norm.rmsnorm",
    "BatchDecodeWithPagedKVCacheWrapper", or the function or class. config: arguments by name; for a
    wrapper those of its constructor, plan() and run() together, and in place of tensors their
    properties: num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type, kv_data_type (or dtype
    for both), device. True stands for a tensor of the kind that an argument takes (sinks=True).

    Attention is tried on one token (a GPU kernel is compiled, as the first plan() would); of the
    other functions the names of the arguments are looked at. The answer is false, with a `reason`,
    for what raises."""
    path = call if isinstance(call, str) else f"{call.__module__}.{call.__qualname__}"
    for root in ("raddle.flashinfer.", "flashinfer."):
        path = path.removeprefix(root)
    found = import_module("raddle.flashinfer")
    try:
        for part in path.split("."):
            found = getattr(found, part)
    except AttributeError:
        return Support(f"{path}: flashinfer has no such name, or raddle knows nothing of it")
    if is_placeholder(found):
        return Support(f"{path}: raddle does not have this")
    if not callable(found):
        return Support(f"{path}: a module, not a call")
    attempt = _ATTEMPTS.get(path.rpartition(".")[2], _check_names)
    try:
        return attempt(found, dict(config))
    except (RaddleError, ValueError, TypeError, KeyError) as error:
        return Support(str(error).strip("'\""))


def _check_names(function, config):
    known = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return Support()
    unknown = sorted(config.keys() - known.keys())
    return Support(f"{unknown[0]}: {function.__name__} has no such argument" if unknown else "")


# -- attention ----------------------------------------------------------------------------------


class _Shape:
    """Takes the properties of tensors out of config, and makes tensors of one token."""

    def __init__(self, config):
        import torch

        self.torch = torch
        from .utils import canonicalize_torch_dtype

        self.device = torch.device(
            config.pop("device", "cuda" if torch.cuda.is_available() else "cpu")
        )
        dtype = config.pop("dtype", "float16")
        self.q_dtype = canonicalize_torch_dtype(config.pop("q_data_type", dtype))
        kv_dtype = config.pop("kv_data_type", config.pop("data_type", None))
        self.kv_dtype = canonicalize_torch_dtype(kv_dtype or self.q_dtype)
        self.num_qo_heads = config.pop("num_qo_heads", 8)
        self.num_kv_heads = config.pop("num_kv_heads", self.num_qo_heads)
        self.head_dim = config.pop("head_dim", config.pop("head_dim_qk", 128))
        self.head_dim_vo = config.pop("head_dim_vo", None) or self.head_dim
        self.page_size = config.pop("page_size", 16)
        self.layout = config.get("kv_layout", "NHD")

    def zeros(self, *shape, dtype=None):
        return self.torch.zeros(shape, dtype=dtype or self.q_dtype, device=self.device)

    def q(self, rows):
        return self.zeros(rows, self.num_qo_heads, self.head_dim)

    def kv(self, rows, head_dim):
        heads = self.num_kv_heads
        shape = (rows, heads) if self.layout == "NHD" else (heads, rows)
        return self.zeros(*shape, head_dim, dtype=self.kv_dtype)

    def cache(self):
        return self.kv(self.page_size, self.head_dim)[None], self.kv(
            self.page_size, self.head_dim_vo
        )[None]

    def offsets(self, *values):
        return self.torch.tensor(values, dtype=self.torch.int32)

    def workspace(self):
        return self.zeros(1 << 20, dtype=self.torch.uint8)


def _split(config, *functions):
    """config's entries by the function that has an argument of that name, in order."""
    parts = [{} for _ in functions]
    for name, value in config.items():
        for part, function in zip(parts, functions, strict=True):
            if name in inspect.signature(function).parameters:
                part[name] = value
                break
        else:
            raise TypeError(f"{name}: no such argument")
    return parts


def _try_single_decode(function, config):
    shape = _Shape(config)
    q, k, v = shape.q(1)[0], shape.kv(1, shape.head_dim), shape.kv(1, shape.head_dim_vo)
    function(q, k, v, **config)
    return Support()


def _try_single_prefill(function, config):
    shape = _Shape(config)
    function(shape.q(2), shape.kv(2, shape.head_dim), shape.kv(2, shape.head_dim_vo), **config)
    return Support()


def _run_options(run, shape):
    if run.get("sinks") is True:
        run["sinks"] = shape.zeros(shape.num_qo_heads, dtype=shape.torch.float32)
    return run


def _try_decode(wrapper, config):
    shape = _Shape(config)
    make, plan, run = _split(config, wrapper.__init__, wrapper._plan_impl, wrapper.run)
    buffers = {}
    if make.get("use_cuda_graph"):
        for name, length in (("indptr", 2), ("indices", 1), ("last_page_len", 1)):
            buffers[f"paged_kv_{name}_buffer"] = shape.zeros(length, dtype=shape.torch.int32)
    made = wrapper(shape.workspace(), **{**buffers, **make})
    made.plan(
        shape.offsets(0, 1),
        shape.offsets(0),
        shape.offsets(shape.page_size),
        shape.num_qo_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.page_size,
        q_data_type=shape.q_dtype,
        kv_data_type=shape.kv_dtype,
        **plan,
    )
    made.run(shape.q(plan.get("q_len_per_req", 1)), shape.cache(), **_run_options(run, shape))
    return Support()


def _try_graph_decode(wrapper, config):
    make = {"use_cuda_graph": True, **config}
    return _try_decode(wrapper.__mro__[1], make)


def _try_paged_prefill(wrapper, config):
    shape = _Shape(config)
    make, plan, run = _split(config, wrapper.__init__, wrapper.plan, wrapper.run)
    made = wrapper(shape.workspace(), **make)
    made.plan(
        shape.offsets(0, 2),
        shape.offsets(0, 1),
        shape.offsets(0),
        shape.offsets(shape.page_size),
        shape.num_qo_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.page_size,
        head_dim_vo=shape.head_dim_vo,
        q_data_type=shape.q_dtype,
        kv_data_type=shape.kv_dtype,
        **plan,
    )
    made.run(shape.q(2), shape.cache(), **_run_options(run, shape))
    return Support()


def _try_ragged_prefill(wrapper, config):
    shape = _Shape(config)
    make, plan, run = _split(config, wrapper.__init__, wrapper.plan, wrapper.run)
    made = wrapper(shape.workspace(), **make)
    made.plan(
        shape.offsets(0, 2),
        shape.offsets(0, 3),
        shape.num_qo_heads,
        shape.num_kv_heads,
        shape.head_dim,
        head_dim_vo=shape.head_dim_vo,
        q_data_type=shape.q_dtype,
        kv_data_type=shape.kv_dtype,
        **plan,
    )
    made.run(shape.q(2), shape.kv(3, shape.head_dim), shape.kv(3, shape.head_dim_vo), **run)
    return Support()


_ATTEMPTS = {
    "single_decode_with_kv_cache": _try_single_decode,
    "single_prefill_with_kv_cache": _try_single_prefill,
    "single_prefill_with_kv_cache_return_lse": _try_single_prefill,
    "BatchDecodeWithPagedKVCacheWrapper": _try_decode,
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": _try_graph_decode,
    "BatchPrefillWithPagedKVCacheWrapper": _try_paged_prefill,
    "BatchPrefillWithRaggedKVCacheWrapper": _try_ragged_prefill,
}

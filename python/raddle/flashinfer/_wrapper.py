"""What the decode and prefill wrappers share: the buffers FlashInfer's callers pass, the checks of
run(), and the attributes that callers reach for."""

from ..errors import StateError, UnsupportedError
from . import utils
from ._plans import NO_SPLIT, Config, WrapperPlans, product_of_scales, scale_argument

KNOWN_BACKENDS = ("auto", "fa2", "fa3")
_OTHER_BACKENDS = ("trtllm-gen", "cute-dsl", "cudnn", "cutlass", "cutile", "prims-ts", "cake")


def check_backend(backend):
    """Names of kernels that compute the same are accepted; raddle has one set for all."""
    if backend in KNOWN_BACKENDS:
        return
    if backend in _OTHER_BACKENDS:
        raise UnsupportedError(
            f"backend: {backend!r} is another library's; raddle has its own kernels under 'auto', "
            "'fa2' and 'fa3'"
        )
    raise ValueError(f"backend: expected one of {KNOWN_BACKENDS}, got {backend!r}")


def refuse_given(**arguments):
    """UnsupportedError for the first argument that is given: neither None nor False nor 0."""
    for name, value in arguments.items():
        if value is not None and (not isinstance(value, (bool, int, float)) or value):
            raise UnsupportedError(f"{name}: raddle.flashinfer does not support it")


def keep_tables(pairs, non_blocking):
    """Copy tables into the buffers of a graph: run() does not read them, callers may."""
    for buffer, table in pairs:
        if buffer.data_ptr() != table.data_ptr():
            buffer.copy_(table, non_blocking=non_blocking and table.device == buffer.device)


def chunk_of(fixed_split_size, disable_split_kv, page_size):
    """The native fixed_chunk: tokens, a multiple of 64; 0 lets the planner balance."""
    if disable_split_kv:
        return NO_SPLIT
    if fixed_split_size is None or fixed_split_size <= 0:
        return 0
    return min(utils.round_up(fixed_split_size * max(page_size, 1), 64), NO_SPLIT)


class Wrapper:
    """Base of the batch wrappers."""

    _name = ""

    def __init__(self, float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args):
        utils._check_workspace_buffer_alignment(float_workspace_buffer, "float_workspace_buffer")
        utils._check_kv_layout(kv_layout)
        check_backend(backend)
        if jit_args is not None:
            raise UnsupportedError(
                "jit_args: variants written as FlashInfer's C++ structs are not supported; write a "
                "raddle.Variant and use raddle.attention"
            )
        self._kv_layout = kv_layout
        self._backend = "fa2" if backend == "auto" else backend
        self._use_cuda_graph = use_cuda_graph
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = None
        self.device = float_workspace_buffer.device
        self._plans = WrapperPlans(self.device, float_workspace_buffer)
        self._plan_info = None
        self._config = None
        self._asked = None  # what the last plan() was told, when _config was made of it
        self._batch_size = 0
        self._fixed_batch_size = 0

    def _fix_batch(self, from_buffer, **buffers):
        """The batch that a graph's buffers, by argument name, are for.

        from_buffer: the name of one, and how many entries it has beyond the batch."""
        import torch

        for name, buffer in buffers.items():
            if not torch.is_tensor(buffer):
                raise ValueError(f"{name}: expected a torch.Tensor, as use_cuda_graph is set")
        self._fixed_batch_size = len(buffers[from_buffer[0]]) - from_buffer[1]
        for name, buffer in buffers.items():
            expected = self._fixed_batch_size + (1 if "indptr" in name else 0)
            if "indices" not in name and len(buffer) != expected:
                raise ValueError(
                    f"{name}: expected {expected} entries for the batch of {from_buffer[0]}, got "
                    f"{len(buffer)}"
                )

    @property
    def is_cuda_graph_enabled(self):
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        """Use another float workspace. The int workspace is kept, and not needed: schedules lie in
        memory of the plan."""
        utils._check_workspace_buffer_alignment(float_workspace_buffer, "float_workspace_buffer")
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer
        self._plans.reset_workspace(float_workspace_buffer)

    def prewarm_paged_kv_stride_variant(self, variant="independent"):
        """Nothing to do: the kernels take K and V of different strides as they are."""
        if variant != "independent":
            raise ValueError(f"variant: expected 'independent', got {variant!r}")
        if self._plan_info is None:
            raise RuntimeError("plan() must come before prewarm_paged_kv_stride_variant()")

    def end_forward(self):
        """Nothing to do, as in FlashInfer 0.6; 0.7 has no such method."""

    # -- plan -----------------------------------------------------------------------------------

    def _remember(self, config):
        """What run() compares with, and the attributes that callers read."""
        self._config = config
        self._cached_q_data_type = config.q_dtype
        self._cached_kv_data_type = config.kv_dtype
        self._cached_o_data_type = config.o_dtype
        self._num_qo_heads = config.num_qo_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim_vo = config.head_dim_vo
        self._batch_size = self._plans.planned_sizes.batch
        self._pos_encoding_mode = config.pos_encoding_mode
        self._window_left = config.window_left
        self._logits_soft_cap = config.logits_soft_cap
        self._sm_scale = config.sm_scale
        self._rope_scale = config.rope_scale
        self._rope_theta = config.rope_theta
        self._plan_info = list(self._plans.planned_sizes)

    def _config_of(self, kind, shape, dtypes, causal, logits, max_qo_len, fixed_chunk):
        """A Config. logits: window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale,
        rope_theta."""
        window_left, logits_soft_cap, pos_encoding_mode, *rest = logits
        utils._check_pos_encoding_mode(pos_encoding_mode)
        dtypes = [utils.canonicalize_torch_dtype(one) for one in dtypes]
        if str(dtypes[1]) == "torch.uint8":
            raise UnsupportedError("kv_data_type: raddle has no NVFP4 cache (uint8)")
        return Config(
            kind,
            *shape,
            *dtypes,
            self._kv_layout,
            causal,
            window_left,
            logits_soft_cap or 0.0,
            pos_encoding_mode,
            *rest,
            max_qo_len,
            fixed_chunk,
        )

    def _replan(self, logits, causal=None):
        """The deprecated forward(): its arguments, as in _config_of, replace those of plan()."""
        before = self._require_plan()
        config = self._config_of(
            before.kind,
            before[1:6],
            before[6:9],
            before.causal if causal is None else causal,
            logits,
            before.max_qo_len,
            before.fixed_chunk,
        )
        if config != before:
            self._plans.plan_again(config)
            self._remember(config)
            self._asked = None

    def _require_plan(self):
        if self._config is None:
            raise StateError("run: nothing is planned; call plan() first")
        return self._config

    def _check_window(self, window_left):
        if window_left is not None and window_left != self._window_left:
            raise ValueError(
                f"window_left: plan() was told {self._window_left}, run() {window_left}"
            )

    # -- run ------------------------------------------------------------------------------------

    def _run_native(self, q, k, v, out, lse, return_lse, q_scale, k_scale, v_scale, sinks=None):
        """k, v: two tensors, or a cache of five dimensions and None. lse in base 2."""
        if q.dtype != self._cached_q_data_type or k.dtype != self._cached_kv_data_type:
            utils._check_cached_qkv_data_type(
                q, k, self._cached_q_data_type, self._cached_kv_data_type
            )
        options = {}
        if q_scale is not None or k_scale is not None:
            options["k_scale"] = product_of_scales(q_scale, k_scale, self._num_kv_heads)
        if v_scale is not None:
            options["v_scale"] = scale_argument(v_scale, self._num_kv_heads)
        if sinks is not None:
            options["sinks"] = sinks.float()
        if out is not None:
            self._check_result(out, "out", (*q.shape[:-1], self._head_dim_vo), q.device)
        if lse is not None:
            self._check_result(lse, "lse", q.shape[:-1], q.device)
        native = self._plans.native(sinks is not None)
        if self._config.kind == "ragged":
            return native.run(q, k, v, out=out, lse=lse, return_lse=return_lse, **options)
        cache = k if v is None else (k, v)
        return native.run(q, cache, out=out, lse=lse, return_lse=return_lse, **options)

    def _check_result(self, x, name, shape, device):
        import torch

        dtype = torch.float32 if name == "lse" else self._cached_o_data_type
        utils.check_shape_dtype_device(x, shape, dtype, device, name)

    def _open_cache(self, paged_kv_cache, kv_cache_sf):
        """(k, v) or (five-dimensional cache, None)."""
        if getattr(paged_kv_cache, "ndim", 0) != 5:
            k, v = utils._unpack_paged_kv_cache(paged_kv_cache, self._kv_layout)
        else:
            k, v = paged_kv_cache, None
        if kv_cache_sf is not None:
            raise UnsupportedError("kv_cache_sf: raddle has no NVFP4 cache")
        if k.dtype.itemsize == 1 and not k.dtype.is_floating_point:
            raise ValueError(f"kv_cache_sf: a cache of {k.dtype} (NVFP4) needs its block scales")
        return k, v

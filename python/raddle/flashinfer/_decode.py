"""The batch decode wrapper. What is said in decode.py holds here."""

import functools
import warnings

from ..errors import UnsupportedError
from ._plans import Sizes
from ._wrapper import Wrapper, chunk_of, keep_tables, refuse_given
from .page import get_seq_lens

# The order in which plan() takes by position what follows page_size.
_LEGACY_ORDER = (
    "pos_encoding_mode window_left logits_soft_cap q_data_type kv_data_type o_data_type data_type "
    "sm_scale rope_scale rope_theta non_blocking block_tables seq_lens fixed_split_size "
    "disable_split_kv q_len_per_req"
).split()


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    """Decode attention over a paged cache: plan() once per step, run() once per layer.

    float_workspace_buffer: scratch on the device that everything runs on, used when it is large
    enough for the plan (else the plan makes its own). use_cuda_graph: the three buffers fix the
    batch (len of last_page_len) and the most page ids; plan() copies into them, and a captured
    run() follows later plans.
    """

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
        jit_args=None,
    ):
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args)
        self._requested_backend = backend
        self._use_tensor_cores = use_tensor_cores
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        self._q_len_per_req = None
        if use_cuda_graph:
            self._fix_batch(
                ("paged_kv_last_page_len_buffer", 0),
                paged_kv_indptr_buffer=paged_kv_indptr_buffer,
                paged_kv_indices_buffer=paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            )

    @property
    def use_tensor_cores(self):
        return self._use_tensor_cores

    @property
    def resolved_backend(self):
        """ "fa2" for "auto": the name under which raddle's kernels go."""
        return self._backend

    @property
    def _max_kv_len(self):
        """Tokens of the longest planned request; callers read it. Waits for the device."""
        lengths = get_seq_lens(
            self._paged_kv_indptr_buf, self._paged_kv_last_page_len_buf, self._config.page_size
        )
        return int(lengths.max())

    # -- plan -----------------------------------------------------------------------------------

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *deprecated_positional_args,
        **kwargs,
    ):
        """Plan a batch.

        indptr [batch + 1], indices [indptr[-1] or more], last_page_len [batch]: the page table, on
        the host or the device (lengths on the device cost a synchronisation). By keyword:
        pos_encoding_mode="NONE", window_left=-1, window_right=0, logits_soft_cap=None,
        q_data_type="float16", kv_data_type=None (as q; data_type sets it too), o_data_type=None (as
        q), data_type=None, sm_scale=None (1/sqrt(head_dim)), rope_scale=None (1), rope_theta=None
        (1e4), non_blocking=True, block_tables=None, seq_lens=None, fixed_split_size=None (pages;
        results then do not depend on the rest of the batch), disable_split_kv=False (the same),
        q_len_per_req=1 (query tokens of each request, causal), is_causal=None. By position, as
        FlashInfer 0.6 took them, with a DeprecationWarning.

        Raises ValueError for a batch that differs from the graph's, more indices than its buffer, a
        changed q_len_per_req under a graph; StateError during capture."""
        if deprecated_positional_args:
            if len(deprecated_positional_args) > len(_LEGACY_ORDER):
                raise TypeError(
                    f"plan() takes at most {7 + len(_LEGACY_ORDER)} positional arguments, got "
                    f"{7 + len(deprecated_positional_args)}"
                )
            given = dict(zip(_LEGACY_ORDER, deprecated_positional_args, strict=False))
            twice = sorted(given.keys() & kwargs.keys())
            if twice:
                raise TypeError(f"plan() got multiple values for argument {twice[0]!r}")
            warnings.warn(
                "plan(): arguments behind page_size by position are deprecated; name them",
                DeprecationWarning,
                stacklevel=2,
            )
            kwargs = {**given, **kwargs}
        self._plan_impl(
            indptr,
            indices,
            last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            **kwargs,
        )

    begin_forward = plan

    def _plan_impl(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        pos_encoding_mode="NONE",
        window_left=-1,
        window_right=0,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        data_type=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        non_blocking=True,
        block_tables=None,
        seq_lens=None,
        fixed_split_size=None,
        disable_split_kv=False,
        q_len_per_req=1,
        is_causal=None,
        host_indptr=None,
        copies_buffers=True,
    ):
        if window_right != 0:
            raise UnsupportedError("window_right: only 0 is supported, no key behind the query's")
        if is_causal is not None and bool(is_causal) != (q_len_per_req > 1):
            raise UnsupportedError(
                "is_causal: follows from q_len_per_req > 1; another value is not supported"
            )
        asked = (
            (num_qo_heads, num_kv_heads, head_dim, page_size),
            (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta),
            (q_data_type, kv_data_type, o_data_type, data_type),
            (fixed_split_size, disable_split_kv),
            q_len_per_req,
        )
        config = self._config if asked == self._asked else self._make_config(*asked)
        sizes = Sizes(len(last_page_len), len(indices), len(last_page_len) * q_len_per_req)
        if self._use_cuda_graph:
            self._plans.maxima = self._graph_maxima(sizes, q_len_per_req)
        self._q_len_per_req = q_len_per_req
        self._plan_tables(
            config, sizes, indptr if host_indptr is None else host_indptr, indices, last_page_len
        )
        if copies_buffers:
            self._keep_tables(indptr, indices, last_page_len, non_blocking)
        if config is not self._config:
            self._remember(config)
        self._batch_size = sizes.batch
        self._asked = asked

    def _make_config(self, shape, logits, dtypes, split, q_len_per_req):
        """The Config of plan()'s arguments, or what is wrong with them."""
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req: expected at least 1, got {q_len_per_req}")
        if q_len_per_req > 1 and not self._use_tensor_cores:
            raise ValueError(
                f"q_len_per_req: {q_len_per_req} needs use_tensor_cores=True in the constructor"
            )
        if split[0] is not None and not self._use_tensor_cores:
            raise ValueError("fixed_split_size: needs use_tensor_cores=True in the constructor")
        num_qo_heads, num_kv_heads, head_dim, page_size = shape
        q_dtype, kv_dtype, o_dtype, both = dtypes
        q_dtype = q_dtype or both or "float16"
        return self._config_of(
            "decode" if q_len_per_req == 1 else "prefill",
            (num_qo_heads, num_kv_heads, head_dim, head_dim, page_size),
            (q_dtype, kv_dtype or both or q_dtype, o_dtype or q_dtype),
            q_len_per_req > 1,
            logits,
            q_len_per_req,
            chunk_of(*split, page_size),
        )

    def _graph_maxima(self, sizes, q_len_per_req):
        """The maxima that the graph's buffers give, or what is wrong with a batch."""
        if self._q_len_per_req not in (None, q_len_per_req):
            raise ValueError(
                f"q_len_per_req: the graph's wrapper was planned with {self._q_len_per_req}, got "
                f"{q_len_per_req}; use a wrapper for each"
            )
        if sizes.batch != self._fixed_batch_size:
            raise ValueError(
                f"last_page_len: the batch is {sizes.batch}, the graph's buffers are for "
                f"{self._fixed_batch_size}"
            )
        if sizes.pages > len(self._paged_kv_indices_buf):
            raise ValueError(
                f"indices: {sizes.pages} page ids, the graph's buffer holds "
                f"{len(self._paged_kv_indices_buf)}"
            )
        return Sizes(sizes.batch, len(self._paged_kv_indices_buf), sizes.batch * q_len_per_req)

    def _plan_tables(self, config, sizes, indptr, indices, last_page_len):
        if config.kind == "decode":
            self._plans.plan(config, sizes, indptr, indices, last_page_len)
            return
        import torch

        self._check_query_lengths(config, indptr, last_page_len)
        qo_indptr = torch.arange(sizes.batch + 1, dtype=torch.int32) * config.max_qo_len
        self._plans.plan(config, sizes, qo_indptr, indptr, indices, last_page_len)

    def _check_query_lengths(self, config, indptr, last_page_len):
        lengths = get_seq_lens(indptr.cpu(), last_page_len.cpu(), config.page_size)
        if len(lengths) > 0 and int(lengths.min()) < config.max_qo_len:
            raise ValueError(
                f"q_len_per_req: {config.max_qo_len} query tokens of each request must be in the "
                f"cache already, but a request has {int(lengths.min())} tokens there"
            )

    def _keep_tables(self, indptr, indices, last_page_len, non_blocking):
        """The page table as callers may read it: in the graph's buffers, else as it came.

        run() does not look at it."""
        if not self._use_cuda_graph:
            self._paged_kv_indptr_buf = indptr
            self._paged_kv_indices_buf = indices
            self._paged_kv_last_page_len_buf = last_page_len
            return
        keep_tables(
            (
                (self._paged_kv_indptr_buf, indptr),
                (self._paged_kv_indices_buf[: len(indices)], indices),
                (self._paged_kv_last_page_len_buf, last_page_len),
            ),
            non_blocking,
        )

    def workspace_size(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        data_type=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        block_tables=None,
        seq_lens=None,
        fixed_split_size=None,
        disable_split_kv=False,
        q_len_per_req=1,
    ):
        """(bytes of float workspace, bytes of int workspace) that plan() with these arguments uses.
        The second is 0."""
        config = self._make_config(
            (num_qo_heads, num_kv_heads, head_dim, page_size),
            (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta),
            (q_data_type, kv_data_type, o_data_type, data_type),
            (fixed_split_size, disable_split_kv),
            q_len_per_req,
        )
        batch = len(last_page_len)
        sizes = Sizes(batch, len(indices), batch * q_len_per_req)
        maxima = self._graph_maxima(sizes, q_len_per_req) if self._use_cuda_graph else None
        return self._plans.workspace_size(config, sizes, maxima), 0

    # -- run ------------------------------------------------------------------------------------

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        enable_pdl=None,
        window_left=None,
        sinks=None,
        q_len_per_req=None,
        skip_softmax_threshold_scale_factor=None,
        kv_cache_sf=None,
    ):
        """Attention of the planned batch.

        q: [batch * q_len_per_req, num_qo_heads, head_dim]. paged_kv_cache: one tensor [pages, 2,
        page_size, num_kv_heads, head_dim] (HND: heads before page_size) or a tuple (k, v) without
        the 2; page_size 1 may be left out. q_scale, k_scale multiply the logits, v_scale the
        result. sinks: [num_qo_heads], one more logit per head in the denominator. window_left: as
        planned. Returns out, or (out, lse) with return_lse; lse float32 [rows, num_qo_heads], base
        2. Capture-safe once plan() and one eager run() with the same arguments were made.
        """
        if args:
            raise UnsupportedError(
                "args: only plans with jit_args take more tensors; use a Variant"
            )
        config = self._require_plan()
        if skip_softmax_threshold_scale_factor is not None:
            refuse_given(skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        self._check_window(window_left)
        rows = self._batch_size * config.max_qo_len
        if q_len_per_req is not None:
            warnings.warn(
                "run(): q_len_per_req is deprecated; give it to plan()",
                DeprecationWarning,
                stacklevel=2,
            )
            if q.shape[0] != self._batch_size * q_len_per_req:
                raise ValueError(
                    f"q: {q.shape[0]} rows, expected batch * q_len_per_req = "
                    f"{self._batch_size} * {q_len_per_req}"
                )
        if q.shape[0] != rows:
            raise ValueError(
                f"q: {q.shape[0]} rows, plan() was told {self._batch_size} requests of "
                f"q_len_per_req {config.max_qo_len}"
            )
        k, v = self._open_cache(paged_kv_cache, kv_cache_sf)
        return self._run_native(
            q, k, v, out, lse if return_lse else None, return_lse, q_scale, k_scale, v_scale, sinks
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q,
        paged_kv_cache,
        pos_encoding_mode="NONE",
        q_scale=None,
        k_scale=None,
        v_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        *,
        return_lse=False,
    ):
        """run() of the old API: what follows the cache replaces what plan() was told, and when it
        differs the batch is planned again (not possible under capture)."""
        self._replan(
            (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
        )
        return self.run(
            q,
            paged_kv_cache,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=return_lse,
        )

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

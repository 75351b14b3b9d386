"""The batch prefill wrappers: what they share, and the paged one; prefill.py says more."""

import functools

from ..errors import UnsupportedError
from . import utils
from ._plans import Sizes, power_of_two
from ._wrapper import Wrapper, chunk_of, keep_tables, refuse_given


class BatchPrefill(Wrapper):
    """What the two batch wrappers share."""

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout,
        use_cuda_graph,
        qo_indptr_buf,
        custom_mask_buf,
        mask_indptr_buf,
        backend,
        jit_args,
        jit_kwargs,
        variant_owns_mask,
    ):
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args)
        refuse_given(
            custom_mask_buf=custom_mask_buf,
            mask_indptr_buf=mask_indptr_buf,
            jit_kwargs=jit_kwargs,
            variant_owns_mask=variant_owns_mask,
        )
        self._qo_indptr_buf = qo_indptr_buf
        self._qo_indptr_last = 0

    def _longest_query(self, qo_indptr, uniform_q_len):
        """The bound of the queries' lengths that a plan is made for.

        Under a graph it must not follow the batch, so that only uniform_q_len bounds it."""
        lengths = qo_indptr.diff()
        if uniform_q_len is not None:
            if len(lengths) > 0 and bool((lengths != uniform_q_len).any()):
                raise ValueError(f"uniform_q_len: {uniform_q_len}, but qo_indptr has others")
            return uniform_q_len
        if self._use_cuda_graph or len(lengths) == 0:
            return 0
        longest, shortest = int(lengths.max()), int(lengths.min())
        return 1 if longest == shortest == 1 else power_of_two(max(longest, 2))

    def _graph_maxima(self, sizes, most_pages):
        """The maxima of the graph's plans: the buffers', and the query rows of the first batch. Or
        what is wrong with a batch."""
        if sizes.batch != self._fixed_batch_size:
            raise ValueError(
                f"qo_indptr: the batch is {sizes.batch}, the graph's buffers are for "
                f"{self._fixed_batch_size}"
            )
        maxima = self._plans.maxima or Sizes(sizes.batch, most_pages, sizes.rows)
        if sizes.rows > maxima.rows:
            raise ValueError(
                f"qo_indptr: {sizes.rows} query rows, the graph's first plan() had {maxima.rows}, "
                "which later ones may not pass"
            )
        return maxima

    def _check_query(self, q):
        if q.shape[0] != self._qo_indptr_last:
            raise ValueError(f"q: {q.shape[0]} rows, plan() was told {self._qo_indptr_last}")

    def _run_with_lse(self, lse, return_lse, lse_base, lse_layout, q, k, v, *rest):
        """_run_native with the LSE in the wanted base and layout."""
        utils.check_lse_base(lse_base)
        utils.check_lse_layout(lse_layout)
        if not return_lse:
            return self._run_native(q, k, v, rest[0], None, False, *rest[1:])
        turned = lse_layout == "HN"
        if turned and lse is not None:
            self._check_result(lse, "lse", (q.shape[1], q.shape[0]), q.device)
        out, result = self._run_native(q, k, v, rest[0], None if turned else lse, True, *rest[1:])
        if lse_base == "ln":
            result.mul_(utils.ln2)
        if turned:
            result = result.t().contiguous() if lse is None else lse.copy_(result.t())
        return out, result


class BatchPrefillWithPagedKVCacheWrapper(BatchPrefill):
    """Prefill (and chunked prefill, and multi-token decode) over a paged cache.

    As BatchDecodeWithPagedKVCacheWrapper. With use_cuda_graph the first plan() fixes the most query
    rows.
    """

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        backend="auto",
        jit_args=None,
        jit_kwargs=None,
        variant_owns_mask=False,
    ):
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            qo_indptr_buf,
            custom_mask_buf,
            mask_indptr_buf,
            backend,
            jit_args,
            jit_kwargs,
            variant_owns_mask,
        )
        self._paged_kv_indptr_buf = paged_kv_indptr_buf
        self._paged_kv_indices_buf = paged_kv_indices_buf
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buf
        if use_cuda_graph:
            self._fix_batch(
                ("qo_indptr_buf", 1),
                qo_indptr_buf=qo_indptr_buf,
                paged_kv_indptr_buf=paged_kv_indptr_buf,
                paged_kv_indices_buf=paged_kv_indices_buf,
                paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
            )

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        non_blocking=True,
        prefix_len_ptr=None,
        token_pos_in_items_ptr=None,
        token_pos_in_items_len=0,
        max_item_len_ptr=None,
        seq_lens=None,
        seq_lens_q=None,
        block_tables=None,
        max_token_per_sequence=None,
        max_sequence_kv=None,
        fixed_split_size=None,
        disable_split_kv=False,
        uniform_q_len=None,
    ):
        """Plan a batch: qo_indptr [batch + 1], the offsets of each request's rows in q, and the
        page table, on the host or the device (what lies there costs a synchronisation).

        Raises ValueError for a batch, page ids or query rows beyond a graph's."""
        refuse_given(
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len,
            max_item_len_ptr=max_item_len_ptr,
        )
        config, sizes, self._plans.maxima, host_qo_indptr = self._prepare(
            qo_indptr,
            paged_kv_indices,
            (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, page_size),
            (q_data_type, kv_data_type or q_data_type, o_data_type or q_data_type),
            causal,
            (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta),
            chunk_of(fixed_split_size, disable_split_kv, page_size),
            uniform_q_len,
        )
        tables = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        if config.kind == "decode":
            self._plans.plan(config, sizes, *tables)
        else:
            self._plans.plan(config, sizes, host_qo_indptr, *tables)
        if self._use_cuda_graph:
            keep_tables(
                (
                    (self._qo_indptr_buf, qo_indptr),
                    (self._paged_kv_indptr_buf, paged_kv_indptr),
                    (self._paged_kv_indices_buf[: len(paged_kv_indices)], paged_kv_indices),
                    (self._paged_kv_last_page_len_buf, paged_kv_last_page_len),
                ),
                non_blocking,
            )
        self._qo_indptr_last = sizes.rows
        self._remember(config)

    begin_forward = plan

    def _prepare(
        self, qo_indptr, indices, shape, dtypes, causal, logits, fixed_chunk, uniform_q_len
    ):
        host_qo_indptr = qo_indptr.cpu()
        longest = self._longest_query(host_qo_indptr, uniform_q_len)
        kind = "decode" if longest == 1 else "prefill"
        config = self._config_of(kind, shape, dtypes, causal, logits, longest, fixed_chunk)
        sizes = Sizes(len(qo_indptr) - 1, len(indices), int(host_qo_indptr[-1]))
        maxima = None
        if self._use_cuda_graph:
            if sizes.pages > len(self._paged_kv_indices_buf):
                raise ValueError(
                    f"paged_kv_indices: {sizes.pages} page ids, the graph's buffer holds "
                    f"{len(self._paged_kv_indices_buf)}"
                )
            maxima = self._graph_maxima(sizes, len(self._paged_kv_indices_buf))
        return config, sizes, maxima, host_qo_indptr

    def workspace_size(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        prefix_len_ptr=None,
        token_pos_in_items_ptr=None,
        token_pos_in_items_len=0,
        max_item_len_ptr=None,
        seq_lens=None,
        seq_lens_q=None,
        block_tables=None,
        max_token_per_sequence=None,
        max_sequence_kv=None,
        fixed_split_size=None,
        disable_split_kv=False,
        uniform_q_len=None,
    ):
        """(bytes of float workspace, bytes of int workspace) that plan() with these arguments uses.
        The second is 0."""
        refuse_given(
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len,
            max_item_len_ptr=max_item_len_ptr,
        )
        config, sizes, maxima, _ = self._prepare(
            qo_indptr,
            paged_kv_indices,
            (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, page_size),
            (q_data_type, kv_data_type or q_data_type, o_data_type or q_data_type),
            causal,
            (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta),
            chunk_of(fixed_split_size, disable_split_kv, page_size),
            uniform_q_len,
        )
        return self._plans.workspace_size(config, sizes, maxima), 0

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
        lse_base="log2",
        lse_layout="NH",
        enable_pdl=None,
        window_left=None,
        sinks=None,
        kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None,
        use_fp16_softmax=None,
        uses_spcompress=None,
    ):
        """Attention of the planned batch: q [qo_indptr[-1], num_qo_heads, head_dim_qk] ->
        [.., head_dim_vo], with return_lse also float32 [rows, num_qo_heads] (lse_layout "HN":
        turned) in base 2 (lse_base "ln": e). The rest as in the decode wrapper."""
        if args:
            raise UnsupportedError("args: fp8 queries and jit_args variants are not supported")
        self._require_plan()
        refuse_given(
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )
        self._check_window(window_left)
        self._check_query(q)
        k, v = self._open_cache(paged_kv_cache, kv_cache_sf)
        return self._run_with_lse(
            lse, return_lse, lse_base, lse_layout, q, k, v, out, q_scale, k_scale, v_scale, sinks
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q,
        paged_kv_cache,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
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
        """run() of the old API: what follows the cache replaces what plan() was told."""
        self._replan(
            (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta),
            causal,
        )
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

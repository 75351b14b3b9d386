"""The batch prefill wrapper over ragged K and V."""

import functools

from ..errors import UnsupportedError
from ._plans import ANY_LENGTH, Sizes
from ._prefill import BatchPrefill
from ._wrapper import chunk_of, keep_tables, refuse_given


class BatchPrefillWithRaggedKVCacheWrapper(BatchPrefill):
    """Prefill over K and V that lie one request behind the other.

    plan() takes window_left and logits_soft_cap before sm_scale, unlike the paged wrapper.
    """

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        kv_indptr_buf=None,
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
        self._kv_indptr_buf = kv_indptr_buf
        if use_cuda_graph:
            self._fix_batch(
                ("qo_indptr_buf", 1), qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf
            )

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        window_left=-1,
        logits_soft_cap=None,
        sm_scale=None,
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
        fixed_split_size=None,
        disable_split_kv=False,
        seq_lens=None,
        seq_lens_q=None,
        max_token_per_sequence=None,
        max_sequence_kv=None,
        v_indptr=None,
        o_indptr=None,
        uniform_q_len=None,
    ):
        """Plan a batch: [batch + 1] offsets of each request's rows in q, and in k and v.
        fixed_split_size counts tokens."""
        refuse_given(
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len,
            max_item_len_ptr=max_item_len_ptr,
            v_indptr=v_indptr,
            o_indptr=o_indptr,
        )
        host_qo_indptr, host_kv_indptr = qo_indptr.cpu(), kv_indptr.cpu()
        config = self._config_of(
            "ragged",
            (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, 0),
            (q_data_type, kv_data_type or q_data_type, o_data_type or q_data_type),
            causal,
            (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta),
            self._longest_query(host_qo_indptr, uniform_q_len),
            chunk_of(fixed_split_size, disable_split_kv, 1),
        )
        sizes = Sizes(len(qo_indptr) - 1, int(host_kv_indptr[-1]), int(host_qo_indptr[-1]))
        if self._use_cuda_graph:
            self._plans.maxima = self._graph_maxima(sizes, ANY_LENGTH)
            keep_tables(
                ((self._qo_indptr_buf, qo_indptr), (self._kv_indptr_buf, kv_indptr)), non_blocking
            )
        queries = None if config.max_qo_len == 1 else host_qo_indptr
        self._plans.plan(config, sizes, queries, host_kv_indptr)
        self._qo_indptr_last = sizes.rows
        self._remember(config)

    begin_forward = plan

    def run(
        self,
        q,
        k,
        v,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        o_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        lse_base="log2",
        lse_layout="NH",
        enable_pdl=None,
        kv_cache_sf=None,
    ):
        """Attention of the planned batch; k, v: [kv_indptr[-1], num_kv_heads, head_dim], "HND":
        heads first. The rest as in the paged wrapper."""
        if args:
            raise UnsupportedError("args: fp8 queries and jit_args variants are not supported")
        self._require_plan()
        refuse_given(kv_cache_sf=kv_cache_sf, o_scale=None if o_scale == 1 else o_scale)
        self._check_query(q)
        return self._run_with_lse(
            lse, return_lse, lse_base, lse_layout, q, k, v, out, q_scale, k_scale, v_scale
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q,
        k,
        v,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        window_left=-1,
        logits_soft_cap=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        *,
        return_lse=False,
    ):
        """run() of the old API: what follows v replaces what plan() was told."""
        self._replan(
            (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta),
            causal,
        )
        return self.run(q, k, v, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

"""flashinfer.cascade: joining attentions of the same queries over disjoint keys, and the wrappers
that do it for shared prefixes. LSE in base 2.

The wrappers run one attention per level and merge: the results of FlashInfer, with as many
launches.
"""

from .. import attention as _native
from ._refuse import refuser
from .decode import BatchDecodeWithPagedKVCacheWrapper
from .jit import gen_cascade_module
from .prefill import BatchPrefillWithPagedKVCacheWrapper, single_prefill_with_kv_cache_return_lse

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "gen_cascade_module",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]


def merge_state(v_a, s_a, v_b, s_b):
    """Join two states: v [n, heads, dim], s [n, heads] (float32, or converted). Returns (v, s).

    Two empty states (s -inf) give 0 and -inf."""
    return _native.merge_state(v_a, s_a.float(), v_b, s_b.float())


def merge_state_in_place(v, s, v_other, s_other, mask=None):
    """Join (v_other, s_other) into (v, s); mask [n], bool or uint8: rows where it is 0 stay.

    An s that is not float32 is rounded back to its dtype (FlashInfer leaves it as it was)."""
    sums = s.float()
    _native.merge_state_in_place(v, sums, v_other, s_other.float(), mask=mask)
    if sums is not s:
        s.copy_(sums)


def merge_states(v, s):
    """Join many states: v [n, states, heads, dim], s [n, states, heads]. Returns (v, s)."""
    return _native.merge_states(v, s.float())


class MultiLevelCascadeAttentionWrapper:
    """Prefill or decode over a cache whose page tables share prefixes, level by level.

    Level 0 is the prefix that most requests share; its queries are those of all requests in it. All
    levels read one paged cache. With use_cuda_graph, the four lists hold a buffer per level.
    """

    def __init__(
        self,
        num_levels,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf_arr=None,
        paged_kv_indptr_buf_arr=None,
        paged_kv_indices_buf_arr=None,
        paged_kv_last_page_len_buf_arr=None,
    ):
        buffers = {
            "qo_indptr_buf": qo_indptr_buf_arr,
            "paged_kv_indptr_buf": paged_kv_indptr_buf_arr,
            "paged_kv_indices_buf": paged_kv_indices_buf_arr,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf_arr,
        }
        if use_cuda_graph:
            for name, one in buffers.items():
                if one is None or len(one) != num_levels:
                    raise ValueError(f"{name}_arr: expected {num_levels} buffers, one per level")
        self._use_cuda_graph = use_cuda_graph
        self._num_levels = num_levels
        self._kv_layout = kv_layout
        self._batch_prefill_wrappers = [
            BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer,
                kv_layout,
                use_cuda_graph,
                **{name: one[i] for name, one in buffers.items() if use_cuda_graph},
            )
            for i in range(num_levels)
        ]

    @property
    def is_cuda_graph_enabled(self):
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffers):
        """Use another float workspace in all levels; int workspaces are not needed."""
        for wrapper, own in zip(self._batch_prefill_wrappers, int_workspace_buffers, strict=True):
            wrapper.reset_workspace_buffer(float_workspace_buffer, own)

    def plan(
        self,
        qo_indptr_arr,
        paged_kv_indptr_arr,
        paged_kv_indices_arr,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
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
    ):
        """Plan a batch: lists with a page table and the offsets of its query rows per level. causal
        counts in the last level; the others are seen whole."""
        last = self._num_levels - 1
        tables = zip(
            qo_indptr_arr,
            paged_kv_indptr_arr,
            paged_kv_indices_arr,
            paged_kv_last_page_len,
            strict=True,
        )
        for level, (wrapper, table) in enumerate(
            zip(self._batch_prefill_wrappers, tables, strict=True)
        ):
            wrapper.plan(
                *table,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=causal and level == last,
                pos_encoding_mode=pos_encoding_mode,
                use_fp16_qk_reduction=use_fp16_qk_reduction,
                sm_scale=sm_scale,
                window_left=window_left,
                logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale,
                rope_theta=rope_theta,
                q_data_type=q_data_type,
                kv_data_type=kv_data_type,
            )

    begin_forward = plan

    def prewarm_paged_kv_stride_variant(self, variant="independent"):
        """Nothing to do, as in the prefill wrapper."""
        for wrapper in self._batch_prefill_wrappers:
            wrapper.prewarm_paged_kv_stride_variant(variant)

    def run(self, q, paged_kv_cache):
        """[rows, num_qo_heads, head_dim]: attention of q over all levels."""
        *above, last = self._batch_prefill_wrappers
        out, lse = last.run(q, paged_kv_cache, return_lse=True)
        for wrapper in above:
            merge_state_in_place(out, lse, *wrapper.run(q, paged_kv_cache, return_lse=True))
        return out

    forward = run

    def end_forward(self):
        """Nothing to do, as in FlashInfer 0.6."""


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decode over a prefix that all requests share (contiguous K and V) and their own pages."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        self._kv_layout = kv_layout
        self._batch_decode_wrapper = BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout
        )

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        """As in the decode wrapper."""
        self._batch_decode_wrapper.reset_workspace_buffer(
            float_workspace_buffer, int_workspace_buffer
        )

    def begin_forward(
        self,
        unique_kv_indptr,
        unique_kv_indices,
        unique_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        data_type="float16",
    ):
        """Plan the requests' own pages; data_type is that of q and of the cache."""
        self._batch_decode_wrapper.plan(
            unique_kv_indptr,
            unique_kv_indices,
            unique_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            q_data_type=data_type,
        )

    def forward(self, q, k_shared, v_shared, unique_kv_cache):
        """q [batch, num_qo_heads, head_dim]; k_shared, v_shared [shared_len, num_kv_heads,
        head_dim], "HND": heads first."""
        out, lse = single_prefill_with_kv_cache_return_lse(
            q, k_shared, v_shared, causal=False, kv_layout=self._kv_layout
        )
        merge_state_in_place(
            out, lse, *self._batch_decode_wrapper.run_return_lse(q, unique_kv_cache)
        )
        return out

    def end_forward(self):
        """Nothing to do, as in FlashInfer 0.6."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper:
    """Prefill over a prefix that all requests share (contiguous K and V) and their own pages."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        self._kv_layout = kv_layout
        self._batch_prefill_wrapper = BatchPrefillWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout
        )

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        """As in the prefill wrapper."""
        self._batch_prefill_wrapper.reset_workspace_buffer(
            float_workspace_buffer, int_workspace_buffer
        )

    def begin_forward(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
    ):
        """Plan the requests' own pages, which are float16, as q is."""
        self._batch_prefill_wrapper.plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
        )

    def prewarm_paged_kv_stride_variant(self, variant="independent"):
        """Nothing to do, as in the prefill wrapper."""
        self._batch_prefill_wrapper.prewarm_paged_kv_stride_variant(variant)

    def forward(
        self,
        q,
        k_shared,
        v_shared,
        unique_kv_cache,
        causal=False,
        use_fp16_qk_reduction=False,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
    ):
        """q [rows, num_qo_heads, head_dim]; causal counts within the requests' own keys."""
        out, lse = single_prefill_with_kv_cache_return_lse(
            q,
            k_shared,
            v_shared,
            causal=False,
            kv_layout=self._kv_layout,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        own = self._batch_prefill_wrapper.forward_return_lse(
            q,
            unique_kv_cache,
            causal=causal,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        merge_state_in_place(out, lse, *own)
        return out

    def end_forward(self):
        """Nothing to do, as in FlashInfer 0.6."""


__getattr__ = refuser("cascade", "get_cascade_module")

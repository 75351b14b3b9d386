"""flashinfer.prefill: attention of any number of query tokens per request, over pages, over ragged
K and V, or of one request.

As in decode.py, what only tunes is accepted (backend names, use_fp16_qk_reduction, enable_pdl,
non_blocking, and what other back ends want to know about lengths), and what would change results
and is not there is refused: custom masks, multi-item scoring, fp8 queries, NVFP4 caches.
"""

import functools

from ..errors import UnsupportedError
from . import utils
from ._plans import (
    ANY_LENGTH,
    Config,
    Sizes,
    power_of_two,
    product_of_scales,
    run_single,
    scale_argument,
)
from ._refuse import refuser
from ._wrapper import Wrapper, check_backend, chunk_of, keep_tables, refuse_given
from .jit import gen_batch_prefill_module, gen_single_prefill_module
from .page import get_seq_lens
from .quantization import packbits, segment_packbits

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "gen_batch_prefill_module",
    "gen_single_prefill_module",
    "get_seq_lens",
    "packbits",
    "segment_packbits",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]


def single_prefill_with_kv_cache(
    q,
    k,
    v,
    scale_q=None,
    scale_k=None,
    scale_v=None,
    o_dtype=None,
    custom_mask=None,
    packed_custom_mask=None,
    causal=False,
    kv_layout="NHD",
    pos_encoding_mode="NONE",
    use_fp16_qk_reduction=False,
    sm_scale=None,
    window_left=-1,
    logits_soft_cap=None,
    rope_scale=None,
    rope_theta=None,
    backend="auto",
    return_lse=False,
    kv_cache_sf=None,
    k_scale=None,
    v_scale=None,
):
    """Attention of one request's query tokens.

    q: [qo_len, num_qo_heads, head_dim]; k, v: [kv_len, num_kv_heads, head_dim (V: head_dim_vo)],
    "HND": heads first. causal is aligned to the bottom right. Returns [qo_len, num_qo_heads,
    head_dim_vo], with return_lse also float32 [qo_len, num_qo_heads] in base 2. Under CUDA graph
    capture it works when the same call ran before."""
    utils._check_pos_encoding_mode(pos_encoding_mode)
    utils._check_kv_layout(kv_layout)
    check_backend(backend)
    refuse_given(
        scale_q=scale_q,
        scale_k=scale_k,
        scale_v=scale_v,
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
        kv_cache_sf=kv_cache_sf,
    )
    if q.ndim != 3 or k.ndim != 3:
        raise ValueError(
            f"q, k: expected three dimensions, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    tokens, heads = (0, 1) if kv_layout == "NHD" else (1, 0)
    num_kv_heads = k.shape[heads]
    config = Config(
        "ragged",
        q.shape[1],
        num_kv_heads,
        q.shape[2],
        v.shape[-1],
        0,
        q.dtype,
        k.dtype,
        q.dtype if o_dtype is None else utils.canonicalize_torch_dtype(o_dtype),
        kv_layout,
        causal,
        window_left,
        logits_soft_cap or 0.0,
        pos_encoding_mode,
        sm_scale,
        rope_scale,
        rope_theta,
        1 if q.shape[0] == 1 else 0,
    )
    options = {}
    if k_scale is not None:
        options["k_scale"] = product_of_scales(None, k_scale, num_kv_heads)
    if v_scale is not None:
        options["v_scale"] = scale_argument(v_scale, num_kv_heads)
    return run_single(config, q, k, v, k.shape[tokens], return_lse=return_lse, **options)


single_prefill_with_kv_cache_return_lse = functools.partial(
    single_prefill_with_kv_cache, return_lse=True
)


class _BatchPrefill(Wrapper):
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
        self._fixed_batch_size = 0
        self._qo_indptr_last = 0

    def _fix_sizes(self, **buffers):
        """buffers: by argument name, those of batch + 1 entries last but the page table's."""
        import torch

        for name, buffer in buffers.items():
            if not torch.is_tensor(buffer):
                raise ValueError(f"{name}: expected a torch.Tensor, as use_cuda_graph is set")
        self._fixed_batch_size = len(self._qo_indptr_buf) - 1
        for name, buffer in buffers.items():
            expected = self._fixed_batch_size + (0 if "last_page_len" in name else 1)
            if "indices" not in name and len(buffer) != expected:
                raise ValueError(f"{name}: expected {expected} entries, got {len(buffer)}")

    def _make_config(
        self,
        kind,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo,
        page_size,
        causal,
        pos_encoding_mode,
        sm_scale,
        window_left,
        logits_soft_cap,
        rope_scale,
        rope_theta,
        q_data_type,
        kv_data_type,
        o_data_type,
        max_qo_len,
        fixed_chunk,
    ):
        utils._check_pos_encoding_mode(pos_encoding_mode)
        q_dtype = utils.canonicalize_torch_dtype(q_data_type)
        kv_dtype = q_dtype if kv_data_type is None else kv_data_type
        o_dtype = q_dtype if o_data_type is None else o_data_type
        return Config(
            "decode" if kind == "prefill" and max_qo_len == 1 else kind,
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_qk if head_dim_vo is None else head_dim_vo,
            page_size,
            q_dtype,
            utils.canonicalize_torch_dtype(kv_dtype),
            utils.canonicalize_torch_dtype(o_dtype),
            self._kv_layout,
            causal,
            window_left,
            logits_soft_cap or 0.0,
            pos_encoding_mode,
            sm_scale,
            rope_scale,
            rope_theta,
            max_qo_len,
            fixed_chunk,
        )

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


class BatchPrefillWithPagedKVCacheWrapper(_BatchPrefill):
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
            self._fix_sizes(
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
        """Plan a batch: qo_indptr [batch + 1], the offsets of each request's rows in q, and the page
        table, on the host or the device (what lies on the device costs a synchronisation).

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
            (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, causal),
            (pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta),
            (q_data_type, kv_data_type, o_data_type),
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

    def _prepare(self, qo_indptr, indices, shape, logits, dtypes, fixed_chunk, uniform_q_len):
        host_qo_indptr = qo_indptr.cpu()
        config = self._make_config(
            "prefill",
            *shape,
            *logits,
            *dtypes,
            self._longest_query(host_qo_indptr, uniform_q_len),
            fixed_chunk,
        )
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
            (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, causal),
            (pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta),
            (q_data_type, kv_data_type, o_data_type),
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
        [.., head_dim_vo], with return_lse also float32 [rows, num_qo_heads] (lse_layout "HN": turned)
        in base 2 (lse_base "ln": e). The rest as in the decode wrapper."""
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
    ):
        """run() of the old API: what follows the cache replaces what plan() was told."""
        self._replan(
            pos_encoding_mode,
            logits_soft_cap,
            causal=causal,
            window_left=window_left,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
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
    ):
        """forward() with the LSE."""
        self._replan(
            pos_encoding_mode,
            logits_soft_cap,
            causal=causal,
            window_left=window_left,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=True)


class BatchPrefillWithRaggedKVCacheWrapper(_BatchPrefill):
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
            self._fix_sizes(qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf)

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
        config = self._make_config(
            "ragged",
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_vo,
            0,
            causal,
            pos_encoding_mode,
            sm_scale,
            window_left,
            logits_soft_cap,
            rope_scale,
            rope_theta,
            q_data_type,
            kv_data_type,
            o_data_type,
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
    ):
        """run() of the old API: what follows v replaces what plan() was told."""
        self._replan(
            pos_encoding_mode,
            logits_soft_cap,
            causal=causal,
            window_left=window_left,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, k, v)

    def forward_return_lse(
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
    ):
        """forward() with the LSE."""
        self._replan(
            pos_encoding_mode,
            logits_soft_cap,
            causal=causal,
            window_left=window_left,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, k, v, return_lse=True)


__getattr__ = refuser(
    "prefill",
    "fmha_v2_prefill_deepseek",
    "fmha_varlen",
    "fmha_varlen_plan",
    "get_batch_prefill_jit_module",
    "get_batch_prefill_module",
    "get_customize_batch_prefill_module",
    "get_fmha_module",
    "get_single_prefill_module",
    "get_trtllm_gen_fmha_module",
    "get_trtllm_gen_prefill_module",
    "minimax_h3_varlen_attention",
    "minimax_h3_varlen_nvfp4_attention",
    "prepare_nvfp4_attention",
    "single_prefill_with_kv_cache_with_jit_module",
    "trtllm_batch_context_with_kv_cache",
    "trtllm_fmha_v2_prefill",
    "trtllm_ragged_attention_deepseek",
    "trtllm_sage_attention_quantize",
)

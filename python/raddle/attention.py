"""Paged and ragged attention: plan once per step, run once per layer.

Words follow the field. A page table is `indptr` [batch + 1], `indices` [indptr[-1]] (page ids) and
`last_page_len` [batch] (tokens in each request's last page, 1 to page_size; 0 for a request without
pages), or a padded `block_table` [batch, max_blocks] with `seq_lens` [batch]. Index tensors are
int32 or int64, on the host or on the plan's device; host tensors are checked when planned, page ids
that lie on the device never lead outside the cache. Planning from device lengths costs a
synchronisation, or with on_device=True none: a kernel plans (BatchDecode.plan).

A KV cache is one tensor [num_pages, 2, page_size, num_kv_heads, head_dim] ("NHD") or [num_pages, 2,
num_kv_heads, page_size, head_dim] ("HND"), or a pair (k, v) without the 2, whose strides may
differ.

Masks: causal is aligned to the bottom right (query i of qo_len sees key j iff j <= kv_len - qo_len
+ i), `window_left` keys before its own are seen by each query (negative: all). A row that sees
nothing is exactly 0, its lse -inf.

An asynchronous CudaError tells of GPU work that failed after its call had returned, the driver does
not say whose. The plan whose call raises it is dead (StateError from then on), and so is everything
in the CUDA context: restart the process. Plans on the CPU and on other GPUs go on. After any other
error a plan can be used on; where the driver failed while plan() was sending a batch, plan again.

The log-sum-exp belongs to the scaled logits, in base 2 unless lse_base="e".
Planning and sharing after FlashInfer (arXiv 2501.01005), split K/V after Flash-Decoding.
"""

from . import _core
from .errors import ArgumentError
from .kv_cache import (
    append_paged_kv_cache,
    append_slots,
    get_batch_indices_positions,
    get_seq_lens,
    split_cache,
)
from .merge import merge_state, merge_state_in_place, merge_states
from .schedule import Schedule
from .variant import Variant

__all__ = [
    "BatchDecode",
    "BatchPrefill",
    "BatchRaggedPrefill",
    "Schedule",
    "Variant",
    "append_paged_kv_cache",
    "append_slots",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]


class _BatchAttention:
    """What the three classes share: a C plan, and how its arguments are spelled."""

    def __init__(
        self,
        *,
        workspace,
        head_dim_vo,
        sm_scale,
        logits_soft_cap=None,
        pos_encoding="NONE",
        rope_scale=None,
        rope_theta=None,
        weights="softmax",
        sinks=False,
        variant=None,
        pdl=True,
        **spec,
    ):
        if sm_scale == 0:
            raise ArgumentError("sm_scale: expected a positive number, None for 1/sqrt(head_dim)")
        self.variant = variant
        self._plan = _core.AttentionPlan(
            head_dim_vo=head_dim_vo or 0,
            sm_scale=sm_scale or 0.0,
            logits_soft_cap=logits_soft_cap or 0.0,
            pos_encoding=pos_encoding,
            rope_scale=rope_scale or 0.0,
            rope_theta=rope_theta or 0.0,
            weights=weights,
            sinks=sinks,
            variant=None if variant is None else variant.core,
            pdl=pdl,
            **spec,
        )
        if workspace is not None:
            self._plan.bind(workspace)

    @property
    def workspace_size(self):
        """Bytes of scratch that the plan needs for its maxima; made when none was bound."""
        return self._plan.workspace_size

    def bind_workspace(self, workspace):
        """Use a contiguous tensor on the plan's device as scratch. Plans whose runs are ordered on
        one stream may share it. Raises CapacityError with both sizes when too small."""
        self._plan.bind(workspace)

    def schedule(self):
        """The Schedule of the last plan(). Raises StateError before the first."""
        return Schedule(*self._plan.schedule())


class _PagedAttention(_BatchAttention):
    def run(
        self,
        q,
        kv_cache,
        *,
        out=None,
        lse=None,
        return_lse=False,
        stream=None,
        sinks=None,
        k_scale=None,
        v_scale=None,
        variant_args=None,
    ):
        """Attention of the planned batch.

        q: [qo tokens, num_qo_heads, head_dim]. kv_cache: see the module. out: [qo tokens,
        num_qo_heads, head_dim_vo]; made like q when not given. lse: float32 [qo tokens,
        num_qo_heads], written when given or return_lse. Returns out, or (out, lse) with return_lse.
        Capture-safe on CUDA when out (and lse) are given or come from a capture-aware allocator.
        sinks: float32 [num_qo_heads] of a plan made with sinks. k_scale, v_scale: what stored K and
        V are to be multiplied with, numbers or float32 [num_kv_heads]. variant_args: what the
        plan's variant declares, by name.

        Raises StateError before plan(), ShapeError, DTypeError and DeviceError for tensors that
        differ from the plan, ArgumentError for a planned page id beyond the cache."""
        k, v = split_cache(kv_cache)
        return self._plan.run(
            q, k, v, out, lse, return_lse, stream, sinks, k_scale, v_scale, variant_args
        )


class BatchDecode(_PagedAttention):
    """Paged attention with one query token per request.

    num_qo_heads is a multiple of num_kv_heads; head_dim (and head_dim_vo, V's, when it differs) a
    multiple of 8 up to 256; dtype of q (float16, bfloat16; float32 on the CPU), kv_dtype of the
    cache and o_dtype of the result default to it. max_batch requests and max_pages page ids (or
    block_table entries) are the most that any plan() will bring. sm_scale defaults to
    1/sqrt(head_dim). fixed_chunk > 0 (a multiple of 64 tokens) makes each request's result
    independent, bit for bit, of what else is in the batches of a plan with these arguments.
    max_ctas bounds the CTAs (CPU: threads) that run() uses.

    Variants, all three classes alike. kv_dtype may be float8_e4m3fn or float8_e5m2 (NumPy: uint8
    arrays). logits_soft_cap c > 0: logits become c * tanh(logit / c). pos_encoding: "ROPE" rotates
    q and the un-rotated keys of the cache in the kernel, halves of a row as pairs, the query at
    kv_len - qo_len + i, by rope_theta^(-2t / head_dim) / rope_scale (defaults 10000 and 1); "ALIBI"
    adds slope[head] * (key - own position), slopes as arXiv 2108.12409 has them. sinks=True: each
    run brings one more logit per query head, which enters the sum (and the lse) alone.
    weights="sigmoid": a weight is sigmoid(logit), nothing is divided and there is no lse. variant:
    a raddle.Variant. They act in this order: cap, ALiBi, the variant's logit hook, masks.
    pdl=False (CUDA): a launch does not start before its predecessor has ended.
    """

    def __init__(
        self,
        *,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        max_batch,
        max_pages,
        head_dim_vo=None,
        dtype="bfloat16",
        kv_dtype=None,
        o_dtype=None,
        kv_layout="NHD",
        sm_scale=None,
        window_left=-1,
        lse_base="2",
        fixed_chunk=0,
        max_ctas=0,
        device="cpu",
        workspace=None,
        **variant,
    ):
        super().__init__(
            workspace=workspace,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_vo=head_dim_vo,
            page_size=_positive_page_size(page_size),
            dtype=dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            kv_layout=kv_layout,
            causal=False,
            window_left=window_left,
            sm_scale=sm_scale,
            lse_base=lse_base,
            max_batch=max_batch,
            max_pages=max_pages,
            max_qo_tokens=max_batch,
            max_qo_len=1,
            fixed_chunk=fixed_chunk,
            max_ctas=max_ctas,
            device=device,
            **variant,
        )

    def plan(
        self,
        indptr=None,
        indices=None,
        last_page_len=None,
        *,
        block_table=None,
        seq_lens=None,
        stream=None,
        on_device=False,
    ):
        """Schedule a batch: indptr, indices, last_page_len, or block_table and seq_lens.

        A failure leaves the previous batch planned. Refused while the stream is captured; a
        captured graph that reads this plan stays valid. Raises CapacityError past the declared
        maxima, ArgumentError for a bad table.

        on_device=True (int32, contiguous, on the plan's GPU): a kernel plans, nothing is waited for
        or copied back, and the call may be captured, after one outside the capture. A replay plans
        from what the same memory holds by then, the batch's size stays; a run outside the graph
        needs a plan() outside (StateError). Lengths and offsets are clamped to the table and to
        max_pages. The CPU plans as ever."""
        self._plan.update(
            None, indptr, indices, last_page_len, block_table, seq_lens, stream, on_device
        )


class BatchPrefill(_PagedAttention):
    """Paged attention with any number of query tokens per request: prefill, speculative decode.

    As BatchDecode, and: causal (bottom-right aligned); max_qo_tokens query rows per batch;
    max_qo_len bounds those of one request (0: no bound), which lets a plan for few rows use less
    memory."""

    def __init__(
        self,
        *,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        max_batch,
        max_pages,
        max_qo_tokens,
        max_qo_len=0,
        head_dim_vo=None,
        dtype="bfloat16",
        kv_dtype=None,
        o_dtype=None,
        kv_layout="NHD",
        causal=False,
        sm_scale=None,
        window_left=-1,
        lse_base="2",
        fixed_chunk=0,
        max_ctas=0,
        device="cpu",
        workspace=None,
        **variant,
    ):
        super().__init__(
            workspace=workspace,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_vo=head_dim_vo,
            page_size=_positive_page_size(page_size),
            dtype=dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            kv_layout=kv_layout,
            causal=causal,
            window_left=window_left,
            sm_scale=sm_scale,
            lse_base=lse_base,
            max_batch=max_batch,
            max_pages=max_pages,
            max_qo_tokens=max_qo_tokens,
            max_qo_len=max_qo_len,
            fixed_chunk=fixed_chunk,
            max_ctas=max_ctas,
            device=device,
            **variant,
        )

    def plan(
        self,
        qo_indptr,
        indptr=None,
        indices=None,
        last_page_len=None,
        *,
        block_table=None,
        seq_lens=None,
        stream=None,
        on_device=False,
    ):
        """Schedule a batch. qo_indptr: [batch + 1] offsets of each request's rows in q, with
        on_device on the host and in equal steps; the rest as BatchDecode.plan."""
        self._plan.update(
            qo_indptr, indptr, indices, last_page_len, block_table, seq_lens, stream, on_device
        )


class BatchRaggedPrefill(_BatchAttention):
    """Attention over K and V that lie one request behind the other, without pages: as BatchPrefill,
    with max_kv_tokens in place of pages."""

    def __init__(
        self,
        *,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        max_batch,
        max_qo_tokens,
        max_kv_tokens,
        max_qo_len=0,
        head_dim_vo=None,
        dtype="bfloat16",
        kv_dtype=None,
        o_dtype=None,
        kv_layout="NHD",
        causal=False,
        sm_scale=None,
        window_left=-1,
        lse_base="2",
        fixed_chunk=0,
        max_ctas=0,
        device="cpu",
        workspace=None,
        **variant,
    ):
        super().__init__(
            workspace=workspace,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_vo=head_dim_vo,
            page_size=0,
            dtype=dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            kv_layout=kv_layout,
            causal=causal,
            window_left=window_left,
            sm_scale=sm_scale,
            lse_base=lse_base,
            max_batch=max_batch,
            max_pages=max_kv_tokens,
            max_qo_tokens=max_qo_tokens,
            max_qo_len=max_qo_len,
            fixed_chunk=fixed_chunk,
            max_ctas=max_ctas,
            device=device,
            **variant,
        )

    def plan(self, qo_indptr, kv_indptr, *, stream=None):
        """Schedule a batch: [batch + 1] offsets of each request's rows in q, and in k and v."""
        self._plan.update(qo_indptr, kv_indptr, None, None, None, None, stream, False)

    def run(
        self,
        q,
        k,
        v,
        *,
        out=None,
        lse=None,
        return_lse=False,
        stream=None,
        sinks=None,
        k_scale=None,
        v_scale=None,
        variant_args=None,
    ):
        """Attention of the planned batch; k and v: [kv tokens, num_kv_heads, head_dim], "HND":
        heads first. The rest as in BatchDecode.run."""
        return self._plan.run(
            q, k, v, out, lse, return_lse, stream, sinks, k_scale, v_scale, variant_args
        )


def _positive_page_size(page_size):
    if page_size < 1:
        raise ArgumentError(f"page_size: expected at least 1 token, got {page_size}")
    return page_size

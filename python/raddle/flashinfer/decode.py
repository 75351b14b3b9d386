"""flashinfer.decode: attention of one query token per request, or a few.

Arguments and results are FlashInfer's (both 0.6.18 and 0.7.2), the kernels raddle's. Differences
that callers can see:

* What only tunes is accepted: use_tensor_cores (one kernel serves every group size; it still
  decides, as in FlashInfer, whether q_len_per_req and fixed_split_size are legal), backend "auto",
  "fa2", "fa3", enable_pdl, non_blocking. The int workspace is not needed. block_tables and seq_lens
  of plan() repeat what the page table says, which is what counts.
* `sinks` of run() works on every path. k_scale and v_scale may also be float32 [num_kv_heads].
* A plan holds a copy of the page table: a step that changes page ids or last_page_len must plan.
* A head_dim that is a multiple of 8 (up to 256) works, and any group size; int64 index tensors too.
* ALiBi distances count from the query's own position, so that only the LSE differs by a constant
  per head; a soft cap acts before ALiBi.
"""

from . import jit, utils
from ._decode import BatchDecodeWithPagedKVCacheWrapper
from ._plans import Config, product_of_scales, run_single, scale_argument
from ._refuse import refuser
from .jit import gen_batch_decode_module, gen_single_decode_module
from .page import get_seq_lens

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "gen_batch_decode_module",
    "gen_single_decode_module",
    "get_seq_lens",
    "jit",
    "single_decode_with_kv_cache",
]


def single_decode_with_kv_cache(
    q,
    k,
    v,
    kv_layout="NHD",
    pos_encoding_mode="NONE",
    use_tensor_cores=False,
    q_scale=None,
    k_scale=None,
    v_scale=None,
    window_left=-1,
    logits_soft_cap=None,
    sm_scale=None,
    rope_scale=None,
    rope_theta=None,
    return_lse=False,
):
    """Attention of one query token over one request's K and V.

    q: [num_qo_heads, head_dim]; k, v: [kv_len, num_kv_heads, head_dim], "HND": heads first; k and v
    may be fp8 beside a 16-bit q. Returns [num_qo_heads, head_dim], with return_lse also float32
    [num_qo_heads] in base 2. Under CUDA graph capture it works when the same call ran before.
    """
    utils._check_pos_encoding_mode(pos_encoding_mode)
    utils._check_kv_layout(kv_layout)
    if q.ndim != 2 or k.ndim != 3:
        raise ValueError(
            f"q, k: expected [num_qo_heads, head_dim] and three dimensions, got {tuple(q.shape)} "
            f"and {tuple(k.shape)}"
        )
    tokens, heads = (0, 1) if kv_layout == "NHD" else (1, 0)
    num_kv_heads = k.shape[heads]
    config = Config(
        "ragged",
        q.shape[0],
        num_kv_heads,
        q.shape[1],
        v.shape[-1],
        0,
        q.dtype,
        k.dtype,
        q.dtype,
        kv_layout,
        False,
        window_left,
        logits_soft_cap or 0.0,
        pos_encoding_mode,
        sm_scale,
        rope_scale,
        rope_theta,
        1,
    )
    options = {}
    if q_scale is not None or k_scale is not None:
        options["k_scale"] = product_of_scales(q_scale, k_scale, num_kv_heads)
    if v_scale is not None:
        options["v_scale"] = scale_argument(v_scale, num_kv_heads)
    result = run_single(
        config, q.unsqueeze(0), k, v, k.shape[tokens], return_lse=return_lse, **options
    )
    return (result[0][0], result[1][0]) if return_lse else result[0]


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """BatchDecodeWithPagedKVCacheWrapper with use_cuda_graph on and the buffers by position."""

    def __init__(
        self,
        workspace_buffer,
        indptr_buffer,
        indices_buffer,
        last_page_len_buffer,
        kv_layout="NHD",
        use_tensor_cores=False,
    ):
        super().__init__(
            workspace_buffer,
            kv_layout,
            use_cuda_graph=True,
            use_tensor_cores=use_tensor_cores,
            paged_kv_indptr_buffer=indptr_buffer,
            paged_kv_indices_buffer=indices_buffer,
            paged_kv_last_page_len_buffer=last_page_len_buffer,
        )


def fast_decode_plan(
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
    q_data_type=None,
    kv_data_type=None,
    data_type=None,
    sm_scale=None,
    rope_scale=None,
    rope_theta=None,
    non_blocking=True,
    fixed_split_size=None,
    disable_split_kv=False,
    q_len_per_req=1,
    global_override_indptr_cpu=None,
):
    """plan() for callers that bind it to a wrapper with functools.partial.

    global_override_indptr_cpu: indptr on the host; with it (and page_size 1, when every last page
    holds one token) nothing is copied back from the device. Graph buffers are not written: the
    caller has filled them."""
    if q_data_type is None:
        q_data_type = data_type
    if kv_data_type is None:
        kv_data_type = data_type if data_type is not None else q_data_type
    tails = last_page_len
    if page_size == 1 and global_override_indptr_cpu is not None:
        tails = (global_override_indptr_cpu.diff() > 0).to(global_override_indptr_cpu.dtype)
    self._plan_impl(
        indptr,
        indices,
        tails,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        q_data_type=q_data_type,
        kv_data_type=kv_data_type,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        non_blocking=non_blocking,
        fixed_split_size=fixed_split_size,
        disable_split_kv=disable_split_kv,
        q_len_per_req=q_len_per_req,
        host_indptr=global_override_indptr_cpu,
        copies_buffers=not self._use_cuda_graph,
    )


__getattr__ = refuser(
    "decode",
    "BatchDecodeMlaWithPagedKVCacheWrapper",
    "TrtllmGenDecodeModule",
    "cudnn_batch_decode_with_kv_cache",
    "get_batch_decode_jit_module",
    "get_batch_decode_module",
    "get_single_decode_module",
    "get_trtllm_gen_decode_module",
    "get_trtllm_gen_fmha_module",
    "launch_sm110_gqa_decode_prepared",
    "prepare_balanced_batch_decode_with_kv_cache",
    "prepare_sm110_gqa_decode",
    "single_decode_with_kv_cache_with_jit_module",
    "sm110_gqa_decode",
    "trtllm_batch_decode_with_kv_cache",
    "trtllm_batch_decode_with_kv_cache_mla",
    "xqa",
    "xqa_batch_decode_with_kv_cache",
    "xqa_batch_decode_with_kv_cache_mla",
    "xqa_mla",
)

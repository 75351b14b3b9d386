"""flashinfer.prefill: attention of any number of query tokens per request, over pages, over ragged
K and V, or of one request.

As in decode.py, what only tunes is accepted (backend names, use_fp16_qk_reduction, enable_pdl,
non_blocking, and what other back ends want to know about lengths), and what would change results
and is not there is refused: custom masks, multi-item scoring, fp8 queries, NVFP4 caches.
"""

import functools

from . import utils
from ._plans import Config, product_of_scales, run_single, scale_argument
from ._prefill import BatchPrefillWithPagedKVCacheWrapper
from ._prefill_ragged import BatchPrefillWithRaggedKVCacheWrapper
from ._refuse import refuser
from ._wrapper import check_backend, refuse_given
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

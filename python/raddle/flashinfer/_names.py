"""FlashInfer's public names: where each lives, and which modules raddle has nothing of.

Names that a module of ours lacks become placeholders (_refuse.py), so that a program which imports
more than it uses still starts.
"""

# Modules of raddle.flashinfer, and the names under which flashinfer has them.
OWN_MODULES = {
    "activation": ("activation",),
    "cascade": ("cascade",),
    "cutile": ("cutile", "cutile.cutile_common"),
    "decode": ("decode",),
    "jit": ("jit", "jit.attention", "jit.core"),
    "norm": ("norm",),
    "page": ("page",),
    "prefill": ("prefill",),
    "quantization": ("quantization", "quantization.packbits"),
    "rope": ("rope",),
    "sampling": ("sampling",),
    "trace": ("trace", "trace.templates", "trace.templates.cascade"),
    "triton": ("triton", "triton.cascade"),
    "triton_kernels": ("triton.kernels", "triton.kernels.cascade"),
    "utils": ("utils",),
    "version": ("version",),
}

# Top-level names of flashinfer, by the module that they come from.
TOP_LEVEL = {
    "activation": (
        "gelu_and_mul gelu_tanh_and_mul silu_and_mul silu_and_mul_scaled_nvfp4_experts_quantize"
    ),
    "cascade": (
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper "
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper MultiLevelCascadeAttentionWrapper "
        "merge_state merge_state_in_place merge_states"
    ),
    "decode": (
        "BatchDecodeMlaWithPagedKVCacheWrapper BatchDecodeWithPagedKVCacheWrapper "
        "CUDAGraphBatchDecodeWithPagedKVCacheWrapper cudnn_batch_decode_with_kv_cache "
        "fast_decode_plan prepare_balanced_batch_decode_with_kv_cache single_decode_with_kv_cache"
    ),
    "norm": (
        "add_rmsnorm_fp4quant fused_add_rmsnorm fused_add_rmsnorm_fp8_block_quant "
        "fused_add_rmsnorm_quant fused_qk_rmsnorm_rope fused_rmsnorm_silu gated_residual_rmsnorm "
        "gemma_fused_add_rmsnorm gemma_rmsnorm layernorm layernorm_quant rmsnorm rmsnorm_fp4quant "
        "rmsnorm_quant rmsnorm_sigmoid_gate"
    ),
    "page": (
        "append_paged_kv_cache append_paged_mla_kv_cache get_batch_indices_positions get_seq_lens "
        "nvfp4_quantize_append_paged_kv_cache "
        "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping "
        "nvfp4_quantize_append_paged_mla_kv_cache"
    ),
    "prefill": (
        "BatchPrefillWithPagedKVCacheWrapper BatchPrefillWithRaggedKVCacheWrapper "
        "single_prefill_with_kv_cache single_prefill_with_kv_cache_return_lse "
        "trtllm_fmha_v2_prefill trtllm_sage_attention_quantize"
    ),
    "quantization": (
        "INT4Tensor block_scale_interleave e2m1_and_ufp8sf_scale_to_float fp4_quantize "
        "get_fp4_quantization_module int4_dequantize int4_quantize make_nvfp4_global_scale "
        "mxfp4_dequantize mxfp4_dequantize_host mxfp4_quantize mxfp8_dequantize_host "
        "mxfp8_grouped_quantize mxfp8_quantize nvfp4_batched_quantize nvfp4_block_scale_interleave "
        "nvfp4_kv_dequantize nvfp4_kv_dequantize_paged nvfp4_kv_quantize nvfp4_quantize "
        "nvfp4_quantize_paged_kv_cache packbits scaled_fp4_grouped_quantize segment_packbits "
        "shuffle_matrix_a shuffle_matrix_sf_a silu_and_mul_nvfp4_quantize"
    ),
    "rope": (
        "apply_llama31_rope apply_llama31_rope_inplace apply_llama31_rope_pos_ids "
        "apply_llama31_rope_pos_ids_inplace apply_rope apply_rope_inplace apply_rope_pos_ids "
        "apply_rope_pos_ids_inplace apply_rope_with_cos_sin_cache "
        "apply_rope_with_cos_sin_cache_inplace"
    ),
    "sampling": (
        "chain_speculative_sampling min_p_sampling_from_probs sampling_from_logits "
        "sampling_from_probs softmax top_k_mask_logits top_k_renorm_probs "
        "top_k_sampling_from_probs top_k_top_p_sampling_from_logits "
        "top_k_top_p_sampling_from_probs top_p_renorm_probs top_p_sampling_from_probs"
    ),
    "utils": "next_positive_power_of_2",
}

# Modules of which raddle has nothing, and the names that programs import from them.
MISSING_MODULES = {
    "attention": (
        "BatchAttention BatchAttentionWithAttentionSinkWrapper "
        "BatchPrefillWithCausalBidirectionalRangesWrapper"
    ),
    "autotuner": "AutoTuner autotune",
    "comm": "",
    "cudnn": "cudnn_batch_decode_with_kv_cache cudnn_batch_prefill_with_kv_cache",
    "fp4_quantization": "fp4_quantize nvfp4_quantize",
    "fp8_quantization": "mxfp8_dequantize_host mxfp8_quantize",
    "fused_moe": (
        "cute_dsl_fused_moe cutlass_fused_moe reorder_rows_for_gated_act_gemm trtllm_bf16_moe "
        "trtllm_fp4_block_scale_moe trtllm_fp4_block_scale_routed_moe trtllm_fp8_block_scale_moe "
        "trtllm_fp8_per_tensor_scale_moe"
    ),
    "gdn_decode": "gated_delta_rule_decode",
    "gdn_prefill": "chunk_gated_delta_rule",
    "gemm": (
        "SegmentGEMMWrapper bmm_bf16 bmm_fp8 bmm_mxfp8 gemm_fp8_nt_blockscaled "
        "gemm_fp8_nt_groupwise group_gemm_fp8_nt_groupwise group_gemm_mxfp4_nt_groupwise mm_bf16 "
        "mm_fp4 mm_fp8 mm_mxfp8 tgv_gemm_sm100"
    ),
    "green_ctx": "split_device_green_ctx split_device_green_ctx_by_sm_count",
    "grouped_mm": "grouped_mm_bf16 grouped_mm_fp4 grouped_mm_fp8 grouped_mm_mxfp8",
    "logits_processor": "LogitsPipe LogitsProcessor MinP Sample Softmax Temperature TopK TopP",
    "mamba": "",
    "mla": "BatchMLAPagedAttentionWrapper trtllm_batch_decode_with_kv_cache_mla",
    "pod": "BatchPODWithPagedKVCacheWrapper PODWithPagedKVCacheWrapper",
    "profiler": "",
    "quantization.fp4_quantization": (
        "block_scale_interleave e2m1_and_ufp8sf_scale_to_float fp4_quantize mxfp4_dequantize "
        "mxfp4_quantize nvfp4_batched_quantize nvfp4_block_scale_interleave nvfp4_kv_dequantize "
        "nvfp4_kv_quantize nvfp4_quantize nvfp4_quantize_paged_kv_cache scaled_fp4_grouped_quantize"
    ),
    "quantization.fp8_quantization": (
        "mxfp8_dequantize_host mxfp8_grouped_quantize mxfp8_quantize per_token_group_quant_8bit"
    ),
    "sparse": "BlockSparseAttentionWrapper VariableBlockSparseAttentionWrapper",
    "testing": (
        "attention_flops attention_tb_per_sec attention_tflops_per_sec bench_gpu_time "
        "bench_gpu_time_with_cuda_event bench_gpu_time_with_cudagraph bench_gpu_time_with_cupti"
    ),
    "testing.utils": "bench_gpu_time bench_gpu_time_with_cuda_event bench_gpu_time_with_cudagraph",
    "tllm_enums": "ActivationType RoutingMethodType SfLayout is_gated_activation",
    "topk": "TopKTieBreak top_k top_k_page_table_transform top_k_ragged_transform topk",
    "trtllm_low_latency_gemm": "prepare_low_latency_gemm_weights",
    "xqa": "xqa xqa_mla",
}


def homes():
    """Top-level name -> the module that it comes from."""
    found = {name: module for module, names in TOP_LEVEL.items() for name in names.split()}
    for module, names in MISSING_MODULES.items():
        if "." not in module:
            for name in names.split():
                found.setdefault(name, module)
    return found

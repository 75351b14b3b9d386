/* attention_params.h - the argument of every attention kernel, on both back ends. C11 and NVRTC.
 *
 * Strides are in elements; the innermost stride of every tensor is 1. On CUDA, rows are 16-byte
 * aligned.
 */
#ifndef RADDLE_ATTENTION_PARAMS_H
#define RADDLE_ATTENTION_PARAMS_H

#include "attention/attention_schedule.h"
#include "common/divide.h"

typedef struct raddle_attention_params {
    const void *q; /* [qo tokens, num_qo_heads, head_dim_qk] */
    const void *k; /* paged [num_pages, page_size, num_kv_heads, head_dim_qk], ragged [tokens,
                      num_kv_heads, ..] */
    const void *v; /* the same with head_dim_vo */
    void *out;     /* [qo tokens, num_qo_heads, head_dim_vo] */
    float *lse;    /* [qo tokens, num_qo_heads], or NULL */

    /* The schedule, in memory of the plan. */
    const raddle_attention_header *header;
    const raddle_attention_request *requests; /* [batch] */
    const raddle_attention_segment *segments; /* [num_segments] */
    const int32_t *worker_indptr; /* [workers + 1], for all workers that may be launched */
    const raddle_attention_segment
        *first_segments;                  /* [workers] of each, anything when it has none */
    const raddle_attention_merge *merges; /* [num_merges] */
    const int32_t *page_indices;          /* the page table; NULL when ragged */
    int32_t *arrivals;                    /* [merges], zero between launches */

    /* Scratch: partial s of row r of head h in the item is at (s * heads_per_item + h) * tile_rows
     * + r. */
    float *partial_out; /* [slots, heads_per_item, tile_rows, head_dim_vo], not yet divided by the
                           sum */
    float *
        partial_state; /* [slots, heads_per_item, tile_rows, 2]: running max (base 2 logits), sum */

    /* Variants: what is not asked for is NULL. attention_variant.h */
    const float *sinks;      /* [num_qo_heads] */
    const float *k_scales;   /* [num_kv_heads] */
    const float *v_scales;   /* [num_kv_heads] */
    const float *rope_turns; /* [head_dim_qk / 2, 2]: turns per token, high and low part */
    const void *variant; /* the user's raddle_variant, on the CPU; on CUDA it lies behind this */

    int64_t q_stride_token, q_stride_head;
    int64_t k_stride_page, k_stride_token, k_stride_head;
    int64_t v_stride_page, v_stride_token, v_stride_head;
    int64_t out_stride_token, out_stride_head;
    int64_t lse_stride_token, lse_stride_head;
    int64_t num_pages; /* paged: ids at or past it are skipped, never dereferenced; ragged: rows of
                          K and V */

    int32_t num_qo_heads, num_kv_heads, group_size;
    int32_t page_size;   /* 0: ragged */
    int32_t window_left; /* negative: none */
    int32_t causal;
    float sm_scale;        /* times k_scale */
    float sm_scale_log2;   /* the same * log2(e): logits are in base 2 inside the kernels */
    float logits_soft_cap; /* 0: none */
    float out_scale;       /* v_scale */
    float lse_scale;       /* 1: lse in base 2; ln 2: base e */
    int32_t check;         /* RADDLE_CHECK: report out-of-range pages through error */
    int32_t tile_rows;     /* of the config: rows between the heads of a partial */
    int32_t fixed_chunk;   /* 0: balanced */
    int32_t num_qo_tokens; /* rows of q, out and lse: with a larger batch planned, a launch does
                              nothing */
    int32_t reserved;
    raddle_divisor page_divisor;  /* of page_size, when there are pages */
    raddle_divisor group_divisor; /* of group_size */
    int32_t *error;               /* first offending page id and its place, when check is set */
} raddle_attention_params;
RADDLE_ASSERT_SIZE(raddle_attention_params, 21 * 8 + 15 * 8 + 16 * 4);

#endif

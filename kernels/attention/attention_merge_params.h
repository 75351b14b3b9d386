/* attention_merge_params.h - the argument of attention_merge.cu. C11 and NVRTC.
 *
 * Merges attention states over disjoint sets of keys: v_out = sum of 2^(s_i - s) v_i, 2^s = sum of
 * 2^s_i. Two forms: one tensor with a states axis (merge_states), or a pair of tensors
 * (merge_state: state 0 is v, s and state 1 is v_other, s_other, num_states 2). Strides in
 * elements; the innermost stride of v, v_other and v_out is 1.
 */
#ifndef RADDLE_ATTENTION_MERGE_PARAMS_H
#define RADDLE_ATTENTION_MERGE_PARAMS_H

#include "common/abi.h"

typedef struct raddle_attention_merge_params {
    const void *v;        /* [n, states, heads, dim] */
    const float *s;       /* [n, states, heads] */
    const void *v_other;  /* [n, heads, dim], or NULL: every state is in v */
    const float *s_other; /* [n, heads] */
    const uint8_t *mask;  /* [n]: 0 leaves state 0 as it is; NULL: merge all */
    void *v_out;          /* [n, heads, dim]; may be v or v_other themselves */
    float *s_out;         /* [n, heads] */

    int64_t v_stride_row, v_stride_state, v_stride_head;
    int64_t s_stride_row, s_stride_state, s_stride_head;
    int64_t v_other_stride_row, v_other_stride_head;
    int64_t s_other_stride_row, s_other_stride_head;
    int64_t v_out_stride_row, v_out_stride_head;
    int64_t s_out_stride_row, s_out_stride_head;
    int64_t mask_stride;
    int64_t rows;

    int32_t num_states;
    int32_t num_heads;
    int32_t head_dim;
    float to_log2;   /* a difference of two s times this is base 2: 1 or log2(e) */
    float from_log2; /* its inverse */
    int32_t reserved;
} raddle_attention_merge_params;
RADDLE_ASSERT_SIZE(raddle_attention_merge_params, 7 * 8 + 16 * 8 + 6 * 4);

#endif

/* ops_params.h - the arguments of the ops kernels, on both back ends. C11 and NVRTC.
 *
 * Strides are in elements; the innermost stride of every tensor is 1. Rows come in two levels,
 * (row, head), so that a strided view of a fused [n, heads, head_dim] block needs no copy; a plain
 * matrix has one head. A dtype field holds a raddle_dtype: the CPU reads it, a kernel is compiled
 * for it.
 */
#ifndef RADDLE_OPS_PARAMS_H
#define RADDLE_OPS_PARAMS_H

#include "common/abi.h"

/* out = x * rsqrt(mean(x^2) + eps) * (weight + weight_offset); with a residual: residual += x first,
 * and the norm is of that. Centred (a layer norm): of x - mean(x), and + bias. An 8-bit float out is
 * of the result divided by the scale. */
typedef struct raddle_ops_norm_params {
    void *x;            /* [rows, heads, width] */
    void *residual;     /* [rows, heads, width], or NULL */
    const void *weight; /* [width] */
    const void *bias;   /* [width], of weight's dtype; NULL unless centred */
    void *out;          /* [rows, heads, width]; may be x */
    const float *scale; /* [1], or NULL: scale_value */
    int64_t x_stride_row, x_stride_head;
    int64_t residual_stride_row, residual_stride_head;
    int64_t out_stride_row, out_stride_head;
    int64_t rows;
    int32_t heads, width;
    int32_t dtype, weight_dtype;
    int32_t is_centered, out_is_fp8, out_is_e5m2; /* an out that is not fp8 has x's dtype */
    float eps, weight_offset, scale_value;
} raddle_ops_norm_params;
RADDLE_ASSERT_SIZE(raddle_ops_norm_params, 6 * 8 + 7 * 8 + 10 * 4);

/* Rotates the first rotary_dim of every head. Split halves: (i, i + rotary_dim / 2); interleaved:
 * (2i, 2i + 1). */
typedef struct raddle_ops_rope_params {
    void *q;               /* [rows, num_qo_heads, head_dim], in place */
    void *k;               /* [rows, num_kv_heads, head_dim], in place, or NULL */
    const void *positions; /* [rows], int32 or int64 */
    const float *
        cos_sin; /* [max_position, rotary_dim]: cos in the first half of a row, sin in the second */
    int64_t q_stride_row, q_stride_head;
    int64_t k_stride_row, k_stride_head;
    int64_t positions_stride;
    int64_t cos_sin_stride_row;
    int64_t rows;
    int64_t max_position; /* a row with a position outside [0, max_position) is left as it is */
    int32_t num_qo_heads, num_kv_heads;
    int32_t head_dim, rotary_dim;
    int32_t dtype;
    int32_t positions_are_i64;
    int32_t interleave;
    int32_t reserved;
} raddle_ops_rope_params;
RADDLE_ASSERT_SIZE(raddle_ops_rope_params, 4 * 8 + 8 * 8 + 8 * 4);

enum {
    RADDLE_OPS_SILU = 0,
    RADDLE_OPS_GELU = 1,
    RADDLE_OPS_GELU_TANH = 2,
    RADDLE_OPS_NUM_ACTIVATIONS = 3
};

/* out = activation(x[:width]) * x[width:]. */
typedef struct raddle_ops_act_params {
    const void *x; /* [rows, heads, 2 * width] */
    void *out;     /* [rows, heads, width] */
    int64_t x_stride_row, x_stride_head;
    int64_t out_stride_row, out_stride_head;
    int64_t rows;
    int32_t heads, width;
    int32_t dtype;
    int32_t activation; /* RADDLE_OPS_SILU, .. */
} raddle_ops_act_params;
RADDLE_ASSERT_SIZE(raddle_ops_act_params, 2 * 8 + 5 * 8 + 4 * 4);

/* out[i] = table[ids[i]]; a row whose id is outside [0, vocab) becomes zero. */
typedef struct raddle_ops_embedding_params {
    const void *ids;   /* [rows], int32 or int64 */
    const void *table; /* [vocab, width] */
    void *out;         /* [rows, width] */
    int64_t ids_stride;
    int64_t table_stride_row;
    int64_t out_stride_row;
    int64_t rows;
    int64_t vocab;
    int32_t width;
    int32_t dtype;
    int32_t ids_are_i64;
    int32_t reserved;
} raddle_ops_embedding_params;
RADDLE_ASSERT_SIZE(raddle_ops_embedding_params, 3 * 8 + 5 * 8 + 4 * 4);

/* out = softmax(logits * inv_temperature) in float32. */
typedef struct raddle_ops_softmax_params {
    const void *logits; /* [rows, vocab] */
    float *out;         /* [rows, vocab] */
    int64_t logits_stride_row;
    int64_t out_stride_row;
    int64_t rows;
    int64_t vocab;
    float inv_temperature;
    int32_t dtype;
} raddle_ops_softmax_params;
RADDLE_ASSERT_SIZE(raddle_ops_softmax_params, 2 * 8 + 4 * 8 + 2 * 4);

/* The most alternatives that one row may ask for on CUDA: they are sorted in shared memory. */
enum { RADDLE_OPS_MAX_TOP = 128 };

/* logprobs = logits[id] - logsumexp(logits), natural logarithm; the top ones largest first, ties by
 * lower id. */
typedef struct raddle_ops_logprobs_params {
    const void *logits;  /* [rows, vocab] */
    const void *ids;     /* [rows], int32 or int64; an id outside [0, vocab) gives NaN */
    float *logprobs;     /* [rows] */
    int32_t *top_ids;    /* [rows, top] */
    float *top_logprobs; /* [rows, top] */
    int64_t logits_stride_row;
    int64_t ids_stride;
    int64_t rows;
    int64_t vocab;
    int32_t top;
    int32_t dtype;
    int32_t ids_are_i64;
    int32_t reserved;
} raddle_ops_logprobs_params;
RADDLE_ASSERT_SIZE(raddle_ops_logprobs_params, 5 * 8 + 4 * 8 + 4 * 4);

#endif

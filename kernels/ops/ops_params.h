/* ops_params.h - the arguments of the ops kernels, on both back ends. C11 and NVRTC.
 *
 * Strides are in elements; the innermost stride of every tensor is 1. Rows come in two levels,
 * (row, head), so that a strided view of a fused [n, heads, head_dim] block needs no copy; a plain
 * matrix has one head. A dtype field holds a raddle_dtype: the CPU reads it, a kernel is compiled
 * for it.
 */
#ifndef RADDLE_OPS_PARAMS_H
#define RADDLE_OPS_PARAMS_H

#include "ops/ops_bits.h"

/* out = x * rsqrt(mean(x^2) + eps) * (weight + weight_offset); with a residual: of x + residual in
 * float32, which residual gets, rounded. Centred (a layer norm): of x - mean(x), and + bias. An 8-bit float out is
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

/* out = x w^T + bias, of few rows on CUDA. */
typedef struct raddle_ops_linear_params {
    const void *x;     /* [rows, in_features] */
    const void *w;     /* [out_features, in_features] */
    const float *bias; /* [out_features], or NULL */
    void *out;         /* [rows, out_features] */
    int64_t x_stride, w_stride, out_stride;
    int32_t in_features, out_features;
    int64_t rows;
} raddle_ops_linear_params;
RADDLE_ASSERT_SIZE(raddle_ops_linear_params, 4 * 8 + 3 * 8 + 4 * 4);

/* ops_linear.cu: rows at most, outputs of a tile, warps and CTAs that share them out. */
enum {
    RADDLE_OPS_LINEAR_ROWS = 8,
    RADDLE_OPS_LINEAR_OUTPUTS = 16,
    RADDLE_OPS_LINEAR_WARPS = 8,
    RADDLE_OPS_LINEAR_CTAS_PER_SM = 2
};

/* Rotates the first rotary_dim of every head. Split halves: (i, i + rotary_dim / 2); interleaved:
 * (2i, 2i + 1). Results go to q_out and k_out: q and k themselves (in_place), or other memory, which
 * then gets whole heads. */
typedef struct raddle_ops_rope_params {
    const void *q; /* [rows, num_qo_heads, head_dim] */
    const void *k; /* [rows, num_kv_heads, head_dim], or NULL */
    void *q_out, *k_out;
    const void *positions; /* [rows], int32 or int64; or NULL, and the next two: */
    const void *indptr;    /* [batch + 1]: rows of request b */
    const void *offsets;   /* [batch]: position of its first row */
    /* [max_position, rotary_dim]: cos in the first half of a row, sin in the second; or NULL */
    const float *cos_sin;
    /* On the host, [rotary_dim / 2]: turns per position in units of 2^-64, whole turns dropped. */
    const uint64_t *turns;
    int64_t q_stride_row, q_stride_head;
    int64_t k_stride_row, k_stride_head;
    int64_t q_out_stride_row, q_out_stride_head;
    int64_t k_out_stride_row, k_out_stride_head;
    int64_t positions_stride, indptr_stride, offsets_stride;
    int64_t cos_sin_stride_row;
    int64_t rows, batch;
    /* Of cos_sin. A row with a position outside [0, max_position), or in no request, is not
     * rotated. */
    int64_t max_position;
    int32_t num_qo_heads, num_kv_heads;
    int32_t head_dim, rotary_dim;
    int32_t dtype;
    int32_t positions_are_i64, indptr_is_i64, offsets_are_i64;
    int32_t interleave, in_place;
    int32_t heads_per_cta;  /* CUDA: how many heads a CTA does */
    float attention_factor; /* of cosines and sines that are made of turns */
} raddle_ops_rope_params;
RADDLE_ASSERT_SIZE(raddle_ops_rope_params, 9 * 8 + 15 * 8 + 12 * 4);

/* The same with the turns in the argument of the launch, which has room for 4 KB. */
enum { RADDLE_OPS_MAX_TURNS = 256 };
typedef struct raddle_ops_rope_turns_params {
    raddle_ops_rope_params rope;
    uint64_t turns[RADDLE_OPS_MAX_TURNS];
} raddle_ops_rope_turns_params;
RADDLE_ASSERT_SIZE(raddle_ops_rope_turns_params, 9 * 8 + 15 * 8 + 12 * 4 + 256 * 8);

/* Element i of int32 or int64 indices. */
RADDLE_OPS_SHARED int64_t raddle_ops_index(const void *indices, int64_t i, int32_t are_i64) {
    return are_i64 ? ((const int64_t *)indices)[i] : ((const int32_t *)indices)[i];
}

/* Where a row stands in its request; 0 when it is in none. */
RADDLE_OPS_SHARED int32_t raddle_ops_rope_position(const raddle_ops_rope_params *p, int64_t row,
                                                   int64_t *out_position) {
    if (p->positions) {
        *out_position =
            raddle_ops_index(p->positions, row * p->positions_stride, p->positions_are_i64);
        return 1;
    }
    int64_t low = 0,
            high = p->batch + 1; /* the first of indptr that is past row is in (low, high] */
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (raddle_ops_index(p->indptr, middle * p->indptr_stride, p->indptr_is_i64) <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const int64_t begin = raddle_ops_index(p->indptr, low * p->indptr_stride, p->indptr_is_i64);
    if (low >= p->batch || begin > row) {
        return 0;
    }
    *out_position =
        row - begin + raddle_ops_index(p->offsets, low * p->offsets_stride, p->offsets_are_i64);
    return 1;
}

/* One tensor of rows that becomes 8-bit floats: [rows, heads, width] times scale. Its rows go where
 * they stand in to, or into the pages of a cache. */
typedef struct raddle_ops_fp8_part {
    const void *from;
    uint8_t *to;
    int64_t from_stride_row, from_stride_head;
    int64_t to_stride_row, to_stride_head; /* of a row, or of a slot of a page */
    int64_t to_stride_page;
    int32_t heads, width; /* a part of width 0 is skipped */
    int32_t is_rotated, is_paged;
    float scale;
    int32_t reserved;
} raddle_ops_fp8_part;
RADDLE_ASSERT_SIZE(raddle_ops_fp8_part, 7 * 8 + 6 * 4);

enum { RADDLE_OPS_FP8_PARTS = 5 }; /* q and k, each what is rotated and what is not; v */

/* Rotation of whole widths of parts (their width is rotary_dim), then 8 bits; and into a cache. */
typedef struct raddle_ops_rope_fp8_params {
    raddle_ops_fp8_part parts[RADDLE_OPS_FP8_PARTS];
    const void *positions;  /* [rows], of the rotation, int32 or int64 */
    const float *cos_sin;   /* as in rope */
    const void *requests;   /* [rows]: which one; below 0: the row goes into no page. Or NULL */
    const void *slots;      /* [rows]: where in its request */
    const void *kv_indptr;  /* [batch + 1] */
    const void *kv_indices; /* [num_indices]: pages */
    int64_t positions_stride, requests_stride, slots_stride, kv_indptr_stride, kv_indices_stride;
    int64_t cos_sin_stride_row;
    int64_t rows, max_position;
    int64_t batch, num_indices, num_pages,
        page_size; /* what is out of their range is not written */
    int32_t rotary_dim;
    int32_t dtype;
    int32_t is_e5m2, interleave;
    int32_t positions_are_i64, requests_are_i64, slots_are_i64, kv_indptr_is_i64,
        kv_indices_are_i64;
    int32_t reserved;
} raddle_ops_rope_fp8_params;
RADDLE_ASSERT_SIZE(raddle_ops_rope_fp8_params, 5 * 80 + 6 * 8 + 12 * 8 + 10 * 4);

/* The page and the slot in it of a row; 0 when it goes into none. */
RADDLE_OPS_SHARED int32_t raddle_ops_page_of_row(const raddle_ops_rope_fp8_params *p, int64_t row,
                                                 int64_t *out_page, int64_t *out_slot) {
    const int64_t request =
        raddle_ops_index(p->requests, row * p->requests_stride, p->requests_are_i64);
    const int64_t position = raddle_ops_index(p->slots, row * p->slots_stride, p->slots_are_i64);
    if (request < 0 || request >= p->batch || position < 0) {
        return 0;
    }
    const int64_t first =
        raddle_ops_index(p->kv_indptr, request * p->kv_indptr_stride, p->kv_indptr_is_i64);
    const int64_t end =
        raddle_ops_index(p->kv_indptr, (request + 1) * p->kv_indptr_stride, p->kv_indptr_is_i64);
    const int64_t at = first + position / p->page_size;
    if (first < 0 || at >= end || at >= p->num_indices) {
        return 0;
    }
    *out_page = raddle_ops_index(p->kv_indices, at * p->kv_indices_stride, p->kv_indices_are_i64);
    *out_slot = position % p->page_size;
    return *out_page >= 0 && *out_page < p->num_pages;
}

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

/* out = softmax(logits / temperature) in float32. */
typedef struct raddle_ops_softmax_params {
    const void *logits;       /* [rows, vocab] */
    float *out;               /* [rows, vocab] */
    const float *temperature; /* [rows], or NULL: one over inv_temperature */
    int64_t logits_stride_row;
    int64_t out_stride_row;
    int64_t temperature_stride;
    int64_t rows;
    int64_t vocab;
    float inv_temperature;
    int32_t dtype;
} raddle_ops_softmax_params;
RADDLE_ASSERT_SIZE(raddle_ops_softmax_params, 3 * 8 + 5 * 8 + 2 * 4);

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

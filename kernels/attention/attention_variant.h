/* attention_variant.h - what an attention variant is made of: the places that its hooks are told,
 * and the built-in ones as plain functions that a user's variant may call too. C11 and NVRTC.
 *
 * Hooks, each optional, in the order in which they act on one query row:
 *   raddle_pair raddle_variant_query(const raddle_variant *v, const raddle_row *row, int32_t dim,
 *                                    raddle_pair x)
 *   raddle_pair raddle_variant_key(const raddle_variant *v, const raddle_key *key, int32_t dim,
 *                                  raddle_pair x)
 *       two elements of a row of q or K: dim < head_dim / 2, and the one head_dim / 2 behind it
 *   float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
 *                              float logit)
 *       logit = sm_scale * q . k, capped and biased by the built-ins; without softmax the result
 *       is the weight
 *   bool raddle_variant_mask(const raddle_variant *v, const raddle_row *row, int32_t kv_index)
 *       true: the row sees the key; causality and the window have been asked before
 *   void raddle_variant_state(const raddle_variant *v, const raddle_row *row, float *max,
 *                             float *sum)
 *       once per row when all keys are in: sum = sum of e^(logit - max)
 *   float raddle_variant_output(const raddle_variant *v, const raddle_row *row, int32_t dim,
 *                               float x)
 * raddle_variant holds what the variant declares: v->name for a scalar, v->name.data,
 * v->name.stride[i] and v->name.shape[i] for a tensor. The text must be both C11 and C++.
 */
#ifndef RADDLE_ATTENTION_VARIANT_H
#define RADDLE_ATTENTION_VARIANT_H

#include "common/abi.h"

#ifdef __CUDACC_RTC__
#define RADDLE_HOOK static __device__ __forceinline__
#define RADDLE_NEGATIVE_INFINITY __int_as_float(0xff800000)
#else
#include <math.h>
#include <stdbool.h>
#define RADDLE_HOOK static inline
#define RADDLE_NEGATIVE_INFINITY (-INFINITY)
#endif

/* A query row. */
typedef struct raddle_row {
    int64_t token;    /* row of q */
    int32_t request;  /* number in the batch */
    int32_t qo_index; /* of the request's qo_len query tokens */
    int32_t qo_len, kv_len;
    int32_t qo_head, kv_head;
} raddle_row;

/* A key: token kv_index of its request. */
typedef struct raddle_key {
    int32_t request;
    int32_t kv_index;
    int32_t kv_len;
    int32_t kv_head;
} raddle_key;

/* Elements dim and dim + head_dim / 2 of a row. */
typedef struct raddle_pair {
    float low, high;
} raddle_pair;

/* The place of a query token among its request's keys. */
RADDLE_HOOK int32_t raddle_row_position(const raddle_row *row) {
    return row->kv_len - row->qo_len + row->qo_index;
}

/* cap * tanh(logit / cap): bounds logits without a corner (Gemma 2). */
RADDLE_HOOK float raddle_soft_cap(float cap, float logit) {
    return cap * tanhf(logit / cap);
}

/* Attention with linear biases (arXiv 2108.12409): head h of n adds -slope * distance. Past the
 * largest power of two in n, slopes of twice as many heads fill the gaps. */
RADDLE_HOOK float raddle_alibi_slope(int32_t head, int32_t num_heads) {
    int32_t power = 1;
    while (2 * power <= num_heads) {
        power *= 2;
    }
    return head < power ? exp2f(-8.0f * (float)(head + 1) / (float)power)
                        : exp2f(-4.0f * (float)(2 * (head - power) + 1) / (float)power);
}

RADDLE_HOOK float raddle_alibi(float slope, const raddle_row *row, int32_t kv_index, float logit) {
    return logit + slope * (float)(kv_index - raddle_row_position(row));
}

/* An extra logit that nothing is read for: it enters the sum alone. */
RADDLE_HOOK void raddle_sink(float sink, float *max, float *sum) {
    const float most = *max > sink ? *max : sink;
    if (most > RADDLE_NEGATIVE_INFINITY) {
        *sum = *sum * expf(*max - most) + expf(sink - most);
        *max = most;
    }
}

RADDLE_HOOK float raddle_sigmoid(float logit) {
    return 1.0f / (1.0f + expf(-logit));
}

/* Rotary embedding (arXiv 2104.09864), the halves of a row as pairs. A frequency is given in turns
 * per token as the sum of two floats, so that the angle at token 10^6 still has the precision of
 * one turn's. */
RADDLE_HOOK raddle_pair raddle_rotate(float turns_high, float turns_low, int32_t position,
                                      raddle_pair x) {
    const float at = (float)position;
    const float whole = at * turns_high;
    const float turn = (whole - rintf(whole)) + (fmaf(at, turns_high, -whole) + at * turns_low);
#ifdef __CUDACC_RTC__
    float sine, cosine;
    sincospif(2.0f * turn, &sine, &cosine);
#else
    const float angle = 6.28318530717958647692f * turn;
    const float sine = sinf(angle), cosine = cosf(angle);
#endif
#ifdef __cplusplus
    return raddle_pair{x.low * cosine - x.high * sine, x.high * cosine + x.low * sine};
#else
    return (raddle_pair){x.low * cosine - x.high * sine, x.high * cosine + x.low * sine};
#endif
}

#endif

/* attention_variant.h - what an attention variant is made of: the places that its hooks are told,
 * and the built-in ones as plain functions that a user's variant may call too. C11 and NVRTC.
 *
 * Hooks, each optional, in the order in which they act on one query row:
 *   raddle_pair raddle_variant_query(const raddle_variant *v, const raddle_row *row, int32_t dim,
 *                                    raddle_pair x)
 *   raddle_pair raddle_variant_key(const raddle_variant *v, const raddle_key *key, int32_t dim,
 *                                  raddle_pair x)
 *       two elements of a row of q or K: dim < head_dim / 2, and the one head_dim / 2 behind it; of
 *       a plan that rotates, rotated
 *   float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
 *                              float logit)
 *       logit = sm_scale * q . k, capped and biased by the built-ins; without softmax the result
 *       is the weight
 *   bool raddle_variant_mask(const raddle_variant *v, const raddle_row *row, int32_t kv_index)
 *       true: the row sees the key; causality and the window have been asked before
 *   void raddle_variant_state(const raddle_variant *v, const raddle_row *row, float *max,
 *                             float *sum)
 *       once per row when all keys and the plan's sink are in: sum = sum of e^(logit - max); of a
 *       row that sees nothing, -inf and 0
 *   float raddle_variant_output(const raddle_variant *v, const raddle_row *row, int32_t dim,
 *                               float x)
 *       element dim of the row's result, before it is rounded
 * raddle_variant holds what the variant declares: v->name for a scalar, v->name.data,
 * v->name.stride[i] and v->name.shape[i] for a tensor. The text must be both C11 and C++.
 */
#ifndef RADDLE_ATTENTION_VARIANT_H
#define RADDLE_ATTENTION_VARIANT_H

#include "common/abi.h"

#ifdef __CUDACC_RTC__
#define RADDLE_HOOK static __device__ __forceinline__
#ifndef INFINITY /* as <math.h> has them */
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#endif
#else
#include <math.h>
#include <stdbool.h>
#include <string.h>
#define RADDLE_HOOK static inline
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

/* ---------------------------------------------------------------- functions
 *
 * Without branches on the host, where compilers then make vectors of the loops that call them. */

#ifndef __CUDACC_RTC__
RADDLE_HOOK float raddle_float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

RADDLE_HOOK uint32_t raddle_float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* is_first ? first : second, without a way around the computation of either. */
RADDLE_HOOK float raddle_choose(bool is_first, float first, float second) {
    const uint32_t mask = (uint32_t)0 - (uint32_t)is_first;
    return raddle_float_from_bits((raddle_float_to_bits(first) & mask) |
                                  (raddle_float_to_bits(second) & ~mask));
}
#endif

/* e^x to 2 units in the last place, subnormal results too; NaN stays NaN. Host: x, within 104 either
 * way, times log2(e) is split into a whole number (by adding 1.5 * 2^23) and f in [-1/2, 1/2], 2^f is
 * a polynomial (minimax, relative error 2e-9), the power of two is applied as two factors. Compared
 * are bits: comparing floats may trap, which keeps compilers from making vectors. */
RADDLE_HOOK float raddle_exp(float x) {
#ifdef __CUDACC_RTC__
    return expf(x);
#else
    const float magic = 12582912.0f;
    const uint32_t bits = raddle_float_to_bits(x), size = bits & 0x7fffffff, most = 0x42d00000;
    const float y = raddle_float_from_bits((size < most ? size : most) | (bits & 0x80000000));
    const float shifted = y * 1.44269504f + magic;
    const float whole = shifted - magic;
    /* ln 2 in two parts: the first has few enough bits that whole * part is exact. */
    const float f = ((y - whole * 0.693359375f) - whole * -2.12194440e-4f) * 1.44269504f;
    float p = 0x1.41d334p-13f;
    p = p * f + 0x1.5f456ap-10f;
    p = p * f + 0x1.3b2dbcp-7f;
    p = p * f + 0x1.c6aed4p-5f;
    p = p * f + 0x1.ebfbdap-3f;
    p = p * f + 0x1.62e43p-1f;
    p = p * f + 1.0f;
    const int32_t power = (int32_t)(raddle_float_to_bits(shifted) - raddle_float_to_bits(magic));
    const int32_t half = power >> 1;
    const float result = p * raddle_float_from_bits((uint32_t)(half + 127) << 23) *
                         raddle_float_from_bits((uint32_t)(power - half + 127) << 23);
    return raddle_choose(size > 0x7f800000, x, result);
#endif
}

/* Host: (1 - e^-2|x|) / (1 + e^-2|x|), and below 0.625, where that loses digits, x + x^3 p(x^2)
 * (minimax, relative error 5e-9). */
RADDLE_HOOK float raddle_tanh(float x) {
#ifdef __CUDACC_RTC__
    return tanhf(x);
#else
    const float size = fabsf(x), square = x * x;
    const float e = raddle_exp(-2.0f * size);
    const float large = copysignf((1.0f - e) / (1.0f + e), x);
    float p = -0x1.75e1cep-8f;
    p = p * square + 0x1.52269cp-6f;
    p = p * square + -0x1.b83c5ap-5f;
    p = p * square + 0x1.110726p-3f;
    p = p * square + -0x1.555532p-2f;
    const float small = x + x * square * p;
    return raddle_choose(raddle_float_to_bits(size) < 0x3f200000, small, large);
#endif
}

/* Sine and cosine of a part of a turn, |turn| <= 1. Host: polynomials (minimax, 4e-9) on an eighth
 * of a turn to either side of the nearest quarter. */
RADDLE_HOOK void raddle_sine_cosine(float turn, float *sine, float *cosine) {
#ifdef __CUDACC_RTC__
    sincospif(2.0f * turn, sine, cosine);
#else
    const float magic = 12582912.0f;
    const float shifted = turn * 4.0f + magic;
    const uint32_t quarter = raddle_float_to_bits(shifted);
    const float x = turn - (shifted - magic) * 0.25f, square = x * x;
    float s = -0x1.2d9302p+6f, c = 0x1.d99f54p+5f;
    s = s * square + 0x1.465e92p+6f;
    s = s * square + -0x1.4abbbap+5f;
    s = (s * square + 0x1.921fb6p+2f) * x;
    c = c * square + -0x1.55c4eap+6f;
    c = c * square + 0x1.03c1dap+6f;
    c = c * square + -0x1.3bd3ccp+4f;
    c = c * square + 1.0f;
    const bool is_odd = (quarter & 1) != 0;
    const uint32_t sine_bits = raddle_float_to_bits(raddle_choose(is_odd, c, s));
    const uint32_t cosine_bits = raddle_float_to_bits(raddle_choose(is_odd, s, c));
    *sine = raddle_float_from_bits(sine_bits ^ (quarter & 2) << 30);
    *cosine = raddle_float_from_bits(cosine_bits ^ ((quarter + 1) & 2) << 30);
#endif
}

/* ---------------------------------------------------------------- built-in variants */

/* The place of a query token among its request's keys. */
RADDLE_HOOK int32_t raddle_row_position(const raddle_row *row) {
    return row->kv_len - row->qo_len + row->qo_index;
}

/* cap * tanh(logit / cap): bounds logits without a corner (Gemma 2). */
RADDLE_HOOK float raddle_soft_cap(float cap, float logit) {
#ifdef __CUDACC_RTC__ /* to 1e-7 of the cap, without a branch */
    return cap - __fdividef(2.0f * cap, 1.0f + __expf(2.0f * logit / cap));
#else
    return cap * raddle_tanh(logit / cap);
#endif
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
    if (most > -INFINITY) {
        *sum = *sum * raddle_exp(*max - most) + raddle_exp(sink - most);
        *max = most;
    }
}

RADDLE_HOOK float raddle_sigmoid(float logit) {
    return 1.0f / (1.0f + raddle_exp(-logit));
}

/* Rotary embedding (arXiv 2104.09864), the halves of a row as pairs. A frequency is given in turns
 * per token as the sum of two floats, so that the angle at token 10^6 still has the precision of
 * one turn's. This is the part of a turn that token position stands at. */
RADDLE_HOOK float raddle_turn(float turns_high, float turns_low, int32_t position) {
    const float at = (float)position;
    const float whole = at * turns_high;
    return (whole - rintf(whole)) + (fmaf(at, turns_high, -whole) + at * turns_low);
}

RADDLE_HOOK raddle_pair raddle_rotate(float turns_high, float turns_low, int32_t position,
                                      raddle_pair x) {
    float sine, cosine;
    raddle_sine_cosine(raddle_turn(turns_high, turns_low, position), &sine, &cosine);
#ifdef __cplusplus
    return raddle_pair{x.low * cosine - x.high * sine, x.high * cosine + x.low * sine};
#else
    return (raddle_pair){x.low * cosine - x.high * sine, x.high * cosine + x.low * sine};
#endif
}

#endif

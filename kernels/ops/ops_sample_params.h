/* ops_sample_params.h - the arguments of sampling, and the arithmetic that both back ends must do
 * alike. C11 and NVRTC.
 *
 * A probability is held as a weight, an integer in units of 2^-40 of the largest one: sums of
 * integers do not depend on their order, so a row gives the same token on any number of threads, in
 * any batch and on either back end. The weight of a logit is made of single IEEE operations (no
 * contraction, explicit fma), so it too is the same everywhere. A token less likely than 2^-40 of
 * the likeliest has weight 0 and is never drawn.
 */
#ifndef RADDLE_OPS_SAMPLE_PARAMS_H
#define RADDLE_OPS_SAMPLE_PARAMS_H

#include "ops/ops_bits.h"

/* How one row is sampled. */
typedef struct raddle_ops_sample_row {
    float temperature; /* 0: the first maximum */
    float top_p;       /* (0, 1] */
    float min_p;       /* [0, 1] */
    int32_t top_k;     /* below 1: all */
    uint64_t seed;     /* key of the generator */
    uint64_t offset;   /* its counter */
} raddle_ops_sample_row;
RADDLE_ASSERT_SIZE(raddle_ops_sample_row, 32);

/* Rows of logits or of probabilities: one token of each is drawn, or what top_k and top_p leave of
 * each is written. Where a pointer to an array of settings is NULL, the value is that of a
 * raddle_ops_sample_row. */
typedef struct raddle_ops_sample_call {
    const void *x;       /* [num_inputs, vocab] */
    const void *indices; /* [rows]: the row of x to draw from; or NULL: each its own */
    void *out;           /* [rows]; or [rows, vocab] like x. A row that cannot be drawn from: -1 */
    uint8_t *valid;      /* [rows] or NULL: whether it could; then such a row's token is 0 */
    const float *temperature, *top_p, *min_p;
    const int32_t *top_k;
    const int64_t *seed, *offset;
    int64_t x_stride_row, indices_stride, out_stride, valid_stride;
    int64_t temperature_stride, top_p_stride, min_p_stride, top_k_stride, seed_stride,
        offset_stride;
    int64_t vocab, num_inputs;
    int64_t rows;      /* of this launch */
    int64_t first_row; /* its place in the whole call */
    int32_t dtype;
    int32_t is_probs;
    int32_t indices_are_i64, out_is_i64;
    int32_t is_joint;      /* top_p of all tokens, not only of those that min_p and top_k leave */
    int32_t is_row_stream; /* a row's number is part of the generator's counter */
    int32_t settings_step; /* 0: all rows have the first settings; 1: each its own */
    int32_t reserved;
} raddle_ops_sample_call;
RADDLE_ASSERT_SIZE(raddle_ops_sample_call, 10 * 8 + 14 * 8 + 8 * 4);

/* Rows whose settings travel in the argument of one launch (2 KB of the 4 KB that every driver
 * takes). */
enum { RADDLE_OPS_SAMPLE_ROWS = 64 };

typedef struct raddle_ops_sample_params {
    raddle_ops_sample_call call; /* rows <= RADDLE_OPS_SAMPLE_ROWS when settings_step is 1 */
    raddle_ops_sample_row settings[RADDLE_OPS_SAMPLE_ROWS];
} raddle_ops_sample_params;
RADDLE_ASSERT_SIZE(raddle_ops_sample_params, 224 + 64 * 32);

/* Speculative decoding: a chain of drafted tokens is kept as far as a target distribution allows,
 * then one token of the target follows. */
typedef struct raddle_ops_verify_params {
    const void
        *draft; /* [rows, steps, vocab] probabilities that the drafted tokens were drawn from */
    const void *target; /* [rows, steps + 1, vocab] */
    const void *ids;    /* [rows, steps]: the drafted tokens */
    int32_t *out;       /* [rows, steps + 1]: kept ones, the one that follows, -1 */
    int32_t *accepted;  /* [rows] or NULL: += tokens that would be kept if each stood alone */
    int32_t *emitted;   /* [rows] or NULL: += tokens that are kept */
    const int64_t *seed, *offset; /* [rows] or NULL: the next two */
    uint64_t seed_value, offset_value;
    int64_t draft_stride_row, draft_stride_step, target_stride_row, target_stride_step;
    int64_t ids_stride_row, ids_stride_step, out_stride_row;
    int64_t accepted_stride, emitted_stride, seed_stride, offset_stride;
    int64_t rows, vocab;
    int32_t steps;
    int32_t dtype;
    int32_t ids_are_i64;
    int32_t is_row_stream;
} raddle_ops_verify_params;
RADDLE_ASSERT_SIZE(raddle_ops_verify_params, 8 * 8 + 2 * 8 + 13 * 8 + 4 * 4);

/* ---------------------------------------------------------------- order */

/* Unsigned order of the keys is the order of the floats; -0 and +0 are equal. x is not NaN. */
RADDLE_OPS_SHARED uint32_t raddle_ops_key(float x) {
    const uint32_t bits = raddle_ops_float_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* ---------------------------------------------------------------- weights */

#define RADDLE_OPS_WEIGHT_ONE ((int64_t)1 << 40)

/* 2^f - 1 on [-0.5, 0.5] is f times this polynomial; relative error 2e-9 before rounding. */
#define RADDLE_OPS_EXP2_C1 0x1.62e430p-1f
#define RADDLE_OPS_EXP2_C2 0x1.ebfbdcp-3f
#define RADDLE_OPS_EXP2_C3 0x1.c6aee8p-5f
#define RADDLE_OPS_EXP2_C4 0x1.3b2d4cp-7f
#define RADDLE_OPS_EXP2_C5 0x1.5f3e54p-10f
#define RADDLE_OPS_EXP2_C6 0x1.41fbbcp-13f

/* log2(e) / temperature, in the precision that weights are made in. temperature > 0. */
RADDLE_OPS_SHARED float raddle_ops_weight_factor(float temperature) {
    return (float)(1.4426950408889634 / (double)temperature);
}

/* 2^40 * e^((x - max) / temperature), rounded down; exactly 2^40 for the maximum, also an infinite
 * one. */
RADDLE_OPS_SHARED int64_t raddle_ops_weight(float x, float max, float factor) {
    if (x == max) {
        return RADDLE_OPS_WEIGHT_ONE;
    }
#ifdef __CUDACC_RTC__
    const float y = __fmul_rn(__fsub_rn(x, max), factor);
#else
    const float difference = x - max;
    const float y = difference * factor;
#endif
    if (!(y > -41.0f)) {
        return 0;
    }
    const float n = rintf(y);
    const float f = y - n;
    float p = RADDLE_OPS_EXP2_C6;
    p = fmaf(p, f, RADDLE_OPS_EXP2_C5);
    p = fmaf(p, f, RADDLE_OPS_EXP2_C4);
    p = fmaf(p, f, RADDLE_OPS_EXP2_C3);
    p = fmaf(p, f, RADDLE_OPS_EXP2_C2);
    p = fmaf(p, f, RADDLE_OPS_EXP2_C1);
    p = fmaf(p, f, 1.0f);
    /* Times 2^(n + 40), n from -41 to 0: exact. */
    return (int64_t)(p * raddle_ops_bits_float((uint32_t)((int32_t)n + 40 + 127) << 23));
}

/* What a probability is multiplied by to be a weight; max > 0. 2^100 stands in for more. */
RADDLE_OPS_SHARED float raddle_ops_prob_factor(float max) {
    const float one = (float)RADDLE_OPS_WEIGHT_ONE;
#ifdef __CUDACC_RTC__
    const float factor = __fdiv_rn(one, max);
#else
    const float factor = one / max;
#endif
    return factor < 0x1p100f ? factor : 0x1p100f;
}

/* The weight of a probability, rounded down. */
RADDLE_OPS_SHARED int64_t raddle_ops_prob_weight(float x, float factor) {
    return x > 0 ? (int64_t)(x * factor) : 0;
}

/* The least weight that min_p lets pass. */
RADDLE_OPS_SHARED int64_t raddle_ops_min_weight(float min_p) {
    return (int64_t)ceil((double)min_p * (double)RADDLE_OPS_WEIGHT_ONE);
}

/* The mass that the tokens kept by top_p must reach, of total > 0: from 1 to total. */
RADDLE_OPS_SHARED int64_t raddle_ops_top_p_mass(float top_p, int64_t total) {
    const int64_t need = (int64_t)ceil((double)top_p * (double)total);
    return need < 1 ? 1 : need > total ? total : need;
}

/* ---------------------------------------------------------------- random numbers */

/* Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), key seed,
 * counter (offset, stream, draw): its first 64 bits. */
RADDLE_OPS_SHARED uint64_t raddle_ops_random(uint64_t seed, uint64_t offset, uint32_t stream,
                                             uint32_t draw) {
    uint32_t c0 = (uint32_t)offset, c1 = (uint32_t)(offset >> 32), c2 = stream, c3 = draw;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0;
        const uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (uint64_t)c1 << 32 | c0;
}

/* floor(bits * total / 2^64): uniform on [0, total). total < 2^63. */
RADDLE_OPS_SHARED int64_t raddle_ops_random_below(uint64_t bits, int64_t total) {
    const uint64_t t_low = (uint32_t)total, t_high = (uint64_t)total >> 32;
    const uint64_t b_low = (uint32_t)bits, b_high = bits >> 32;
    const uint64_t carry =
        (t_low * b_low >> 32) + (uint32_t)(t_high * b_low) + (uint32_t)(t_low * b_high);
    return (int64_t)(t_high * b_high + (t_high * b_low >> 32) + (t_low * b_high >> 32) +
                     (carry >> 32));
}

/* Whether a draft drawn with probability q is kept where the target has p: u q < p, u in [0, 1). */
RADDLE_OPS_SHARED int32_t raddle_ops_accepts(uint64_t bits, float q, float p) {
    const float u = (float)(uint32_t)(bits >> 40) * 0x1p-24f;
    return u * q < p;
}

#endif

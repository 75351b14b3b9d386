/* ops_cpu_loops.h - loops over float32 rows, written so that compilers turn them into vectors.
 *
 * Included by one file per instruction set (ops_cpu_math*.c), which defines LOOP_TARGET, the target
 * attribute of every function, and gets them as a table called LOOP_TABLE. No branches inside loops; sums
 * are kept in LANES columns, so that no order has to be given up for vectors.
 */
#ifndef RADDLE_OPS_OPS_CPU_LOOPS_H
#define RADDLE_OPS_OPS_CPU_LOOPS_H

#include "ops/ops_cpu.h"

#include <math.h>
#include <string.h>

#ifndef LOOP_TABLE /* as in ops_cpu_math.c */
#define LOOP_TARGET
#define LOOP_TABLE raddle_ops_cpu_loops_generic
#endif

enum {
    LANES = 16,
    SUM_BLOCK = 1024 /* floats that are summed in float32 before a sum goes on in float64 */
};

LOOP_TARGET static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

LOOP_TARGET static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

/* e^x to 2 units in the last place, 0 and infinity where it leaves the range, NaN for NaN. e^x = 2^n * 2^f with f in
 * [-0.5, 0.5]; n is rounded by adding 1.5 * 2^23, and applied in two steps, so that subnormals come out right. */
LOOP_TARGET static inline float exponential(float x) {
    const float magic = 12582912.0f;
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    /* ln 2 in two parts: the first has few enough bits that n * part is exact. */
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    const float f = r * 1.44269504f;
    float p = RADDLE_OPS_EXP2_C6;
    p = p * f + RADDLE_OPS_EXP2_C5;
    p = p * f + RADDLE_OPS_EXP2_C4;
    p = p * f + RADDLE_OPS_EXP2_C3;
    p = p * f + RADDLE_OPS_EXP2_C2;
    p = p * f + RADDLE_OPS_EXP2_C1;
    p = p * f + 1.0f;
    const int32_t power = (int32_t)(bits_of(shifted) - bits_of(magic));
    const int32_t half = power >> 1;
    return p * float_of((uint32_t)(half + 127) << 23) *
           float_of((uint32_t)(power - half + 127) << 23);
}

/* x / (1 + e^-x); the exponential is infinite for very negative x, and the quotient -0. */
LOOP_TARGET static void silu_and_mul(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++) {
        gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    }
}

LOOP_TARGET static void gelu_and_mul(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++) {
        gate[i] = 0.5f * gate[i] * (1.0f + erff(gate[i] * 0.70710678f)) * up[i];
    }
}

/* (1 + tanh(u)) / 2 is 1 / (1 + e^(-2u)); u = sqrt(2 / pi) * (x + 0.044715 x^3). */
LOOP_TARGET static void gelu_tanh_and_mul(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++) {
        const float x = gate[i];
        const float u2 = 1.59576912f * (x + 0.044715f * x * x * x);
        gate[i] = x / (1.0f + exponential(-u2)) * up[i];
    }
}

LOOP_TARGET static inline float exponential_below(float x, float max, float factor) {
    const float e = exponential((x - max) * factor);
    return x == max ? 1.0f : e; /* also when both are infinite */
}

LOOP_TARGET static double exp_sum(float *out, const float *x, int64_t count, float max,
                                  float factor) {
    double sum = 0;
    for (int64_t begin = 0; begin < count; begin += SUM_BLOCK) {
        const int64_t end = begin + SUM_BLOCK < count ? begin + SUM_BLOCK : count;
        float lanes[LANES] = {0};
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) {
            for (int lane = 0; lane < LANES; lane++) {
                const float e = exponential_below(x[i + lane], max, factor);
                out[i + lane] = e;
                lanes[lane] += e;
            }
        }
        for (; i < end; i++) {
            out[i] = exponential_below(x[i], max, factor);
            sum += (double)out[i];
        }
        for (int lane = 0; lane < LANES; lane++) {
            sum += (double)lanes[lane];
        }
    }
    return sum;
}

/* As raddle_ops_weight, operation for operation, without its branches. */
LOOP_TARGET static void weights(int64_t *out, const float *x, int64_t count, float max,
                                float factor) {
    for (int64_t i = 0; i < count; i++) {
        const float difference = x[i] - max;
        float y = difference * factor;
        const bool is_max = x[i] == max;
        const bool is_zero = !(y > -41.0f) && !is_max;
        y = is_max || is_zero ? 0.0f : y;
        const float n = rintf(y);
        const float f = y - n;
        float p = RADDLE_OPS_EXP2_C6;
        p = fmaf(p, f, RADDLE_OPS_EXP2_C5);
        p = fmaf(p, f, RADDLE_OPS_EXP2_C4);
        p = fmaf(p, f, RADDLE_OPS_EXP2_C3);
        p = fmaf(p, f, RADDLE_OPS_EXP2_C2);
        p = fmaf(p, f, RADDLE_OPS_EXP2_C1);
        p = fmaf(p, f, 1.0f);
        const float scaled = p * float_of((uint32_t)((int32_t)n + 40 + 127) << 23);
        out[i] = is_zero ? 0 : (int64_t)scaled;
    }
}

LOOP_TARGET static void prob_weights(int64_t *out, const float *x, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i++) {
        out[i] = x[i] > 0 ? (int64_t)(x[i] * factor) : 0;
    }
}

LOOP_TARGET static int64_t sum_weights(const int64_t *weight, const float *x, int64_t count,
                                       float least) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += x[i] >= least ? weight[i] : 0;
    }
    return sum;
}

const raddle_ops_cpu_loops LOOP_TABLE = {
    .act_and_mul = {[RADDLE_OPS_SILU] = silu_and_mul,
                    [RADDLE_OPS_GELU] = gelu_and_mul,
                    [RADDLE_OPS_GELU_TANH] = gelu_tanh_and_mul},
    .exp_sum = exp_sum,
    .weights = weights,
    .prob_weights = prob_weights,
    .sum_weights = sum_weights,
};

#endif

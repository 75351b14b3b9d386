/* ops_cpu_math.c - the loops over float32 rows that need transcendental functions. */
#include "ops/ops_cpu.h"

#include <math.h>

/* x / (1 + e^-x); e^-x overflows to infinity for very negative x, and the quotient is -0. */
static void silu_and_mul(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++) {
        gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

static void gelu_and_mul(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++) {
        gate[i] = 0.5f * gate[i] * (1.0f + erff(gate[i] * 0.70710678f)) * up[i];
    }
}

static void gelu_tanh_and_mul(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++) {
        const float x = gate[i];
        const float inner = 0.79788456f * (x + 0.044715f * x * x * x); /* sqrt(2 / pi) */
        gate[i] = 0.5f * x * (1.0f + tanhf(inner)) * up[i];
    }
}

void raddle_ops_cpu_act_and_mul_block(float *gate, const float *up, int count, int32_t activation) {
    switch (activation) {
    case RADDLE_OPS_SILU:
        silu_and_mul(gate, up, count);
        break;
    case RADDLE_OPS_GELU:
        gelu_and_mul(gate, up, count);
        break;
    default:
        gelu_tanh_and_mul(gate, up, count);
        break;
    }
}

double raddle_ops_cpu_exp_sum(float *x, int64_t count, float max, float factor) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        x[i] = x[i] == max ? 1.0f : expf((x[i] - max) * factor);
        sum += (double)x[i];
    }
    return sum;
}

float raddle_ops_cpu_row_max(const float *x, int64_t count, bool *out_has_nan) {
    float max = -INFINITY;
    bool has_nan = false;
    for (int64_t i = 0; i < count; i++) {
        max = x[i] > max ? x[i] : max;
        has_nan |= x[i] != x[i];
    }
    *out_has_nan = has_nan;
    return max;
}

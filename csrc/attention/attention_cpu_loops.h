/* attention_cpu_loops.h - the built-in variants over rows, written so that compilers turn them into
 * vectors of the functions of attention_variant.h.
 *
 * Included by one file per instruction set (attention_cpu_loops*.c), which defines LOOP_TARGET, the
 * target attribute of every function, and gets them as a table called LOOP_TABLE.
 */
#ifndef RADDLE_ATTENTION_ATTENTION_CPU_LOOPS_H
#define RADDLE_ATTENTION_ATTENTION_CPU_LOOPS_H

#include "attention/attention_cpu.h"

#ifndef LOOP_TABLE /* as in attention_cpu_loops.c */
#define LOOP_TARGET
#define LOOP_TABLE raddle_attention_cpu_loops_generic
#endif

LOOP_TARGET static void soft_cap(float *x, int64_t count, float scale, float cap) {
    for (int64_t i = 0; i < count; i++) {
        x[i] = raddle_soft_cap(cap, x[i] * scale);
    }
}

LOOP_TARGET static void alibi(float *x, const int32_t *positions, int64_t count, float slope,
                              const raddle_row *row) {
    const raddle_row own = *row;
    for (int64_t i = 0; i < count; i++) {
        x[i] = raddle_alibi(slope, &own, positions[i], x[i]);
    }
}

LOOP_TARGET static void sigmoid(float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        x[i] = raddle_sigmoid(x[i]);
    }
}

LOOP_TARGET static void make_turns(float *to, const float *turns_per_token, int32_t pairs,
                                   int32_t position) {
    float *restrict cosines = to, *restrict sines = to + pairs;
    for (int64_t i = 0; i < pairs; i++) {
        const float turn =
            raddle_turn(turns_per_token[2 * i], turns_per_token[2 * i + 1], position);
        raddle_sine_cosine(turn, &sines[i], &cosines[i]);
    }
}

LOOP_TARGET static void rotate(float *x, const float *turns, int32_t pairs) {
    float *restrict lows = x, *restrict highs = x + pairs;
    const float *restrict cosines = turns, *restrict sines = turns + pairs;
    for (int64_t i = 0; i < pairs; i++) {
        const float low = lows[i], high = highs[i];
        lows[i] = low * cosines[i] - high * sines[i];
        highs[i] = high * cosines[i] + low * sines[i];
    }
}

const attention_cpu_loops LOOP_TABLE = {
    .soft_cap = soft_cap,
    .alibi = alibi,
    .sigmoid = sigmoid,
    .make_turns = make_turns,
    .rotate = rotate,
};

#endif

/* vec_avx512bf16.h - what the blocks share that multiply bfloat16 pairs by vdpbf16ps: those of
 * bfloat16 rows (vec_avx512bf16.c, which says how panels lie) and of float8 rows (vec_avx512fp8.c).
 */
#ifndef RADDLE_CPU_VEC_AVX512BF16_H
#define RADDLE_CPU_VEC_AVX512BF16_H

#include "cpu/vec_avx512.h"

#if defined(__x86_64__)

#define BF16_TARGET                                                                                \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define ALL_LANES 0xffffffffu
#define BF16_INLINE static inline __attribute__((always_inline)) BF16_TARGET

enum {
    STEP = RADDLE_VEC_PANEL_STEP,
    ROWS = 4,        /* left rows of a micro-tile */
    VECS = 4,        /* vectors of sums beside each other */
    PAIR_LANES = 16, /* pairs in a vector */
    LANES = 32,      /* bfloat16 in a vector */
};

BF16_INLINE __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* The first count of 32 lanes, or of 16; count may be anything. */
BF16_INLINE __mmask32 lanes_mask(int count) {
    return count >= LANES ? ALL_LANES : count > 0 ? (1u << count) - 1 : 0;
}

BF16_INLINE __mmask16 pair_mask(int count) {
    return (__mmask16)lanes_mask(count);
}

/* Two 16-bit neighbours in every lane. */
BF16_INLINE __m512i broadcast_pair(const uint16_t *at) {
    int32_t pair;
    __builtin_memcpy(&pair, at, sizeof(pair));
    return _mm512_set1_epi32(pair);
}

BF16_INLINE int padded_width(int width) {
    return (width + STEP - 1) / STEP * STEP;
}

/* vec_avx512bf16.c */
void raddle_vec_bf16_dot_panel(float *c, int64_t ldc, const void *a, int64_t lda,
                               const raddle_vec_panel *panel, int rows, int first, int last);
void raddle_vec_bf16_add_panel(float *c, int64_t ldc, const void *p, int64_t ldp,
                               const raddle_vec_panel *panel, int rows, int first, int last);
void raddle_vec_bf16_weigh_rows(void *to, int64_t ldto, const float *x, int64_t ldx, int rows,
                                int count, float scale, float *state, float *factors);

#endif
#endif

/* gemm_avx2.c - the micro kernels for AVX2 with FMA and F16C.
 *
 * Sixteen registers hold the sums of six rows by sixteen columns: a panel is passed over twice,
 * once for each half, while it lies in the L1 cache.
 */
#include "cpu/gemm_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 6")
#endif

enum { COLUMNS = RADDLE_GEMM_COLUMNS, HALF = COLUMNS / 2, ROWS = 6 };

/* rows as a constant, and both halves of the panel; element (k, half) of b is at k * COLUMNS +
 * half. */
#define CASE(n, body)                                                                              \
    case n:                                                                                        \
        body(c + half, a, b, half, n, depth, add);                                                 \
        break
#define SWITCH_ROWS(body)                                                                          \
    for (int half = 0; half < COLUMNS; half += HALF) {                                             \
        switch (rows) {                                                                            \
            CASE(1, body);                                                                         \
            CASE(2, body);                                                                         \
            CASE(3, body);                                                                         \
            CASE(4, body);                                                                         \
            CASE(5, body);                                                                         \
            CASE(6, body);                                                                         \
        }                                                                                          \
    }                                                                                              \
    (void)0

AVX2 INLINE void clear(__m256 sum[ROWS][2], int rows) {
    UNROLL for (int r = 0; r < rows; r++) {
        sum[r][0] = _mm256_setzero_ps();
        sum[r][1] = _mm256_setzero_ps();
    }
}

AVX2 INLINE void finish(float *c, __m256 sum[ROWS][2], int rows, bool add) {
    UNROLL for (int r = 0; r < rows; r++) {
        float *row = c + r * COLUMNS;
        if (add) {
            sum[r][0] = _mm256_add_ps(_mm256_loadu_ps(row), sum[r][0]);
            sum[r][1] = _mm256_add_ps(_mm256_loadu_ps(row + 8), sum[r][1]);
        }
        _mm256_storeu_ps(row, sum[r][0]);
        _mm256_storeu_ps(row + 8, sum[r][1]);
    }
}

AVX2 INLINE void multiply(__m256 sum[ROWS][2], const float *a, __m256 b0, __m256 b1, int rows) {
    UNROLL for (int r = 0; r < rows; r++) {
        const __m256 x = _mm256_broadcast_ss(a + r);
        sum[r][0] = _mm256_fmadd_ps(x, b0, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(x, b1, sum[r][1]);
    }
}

AVX2 INLINE void rows_f32(float *c, const float *a, const float *b, int half, int rows, int depth,
                          bool add) {
    __m256 sum[ROWS][2];
    clear(sum, rows);
    b += half;
    for (int k = 0; k < depth; k++, a += rows, b += COLUMNS) {
        multiply(sum, a, _mm256_loadu_ps(b), _mm256_loadu_ps(b + 8), rows);
    }
    finish(c, sum, rows, add);
}

AVX2 static void tile_f32(float *c, const void *a, const void *b, int rows, int depth, bool add) {
    SWITCH_ROWS(rows_f32);
}

AVX2 INLINE __m256 widen_f16(const uint16_t *b) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)b));
}

AVX2 INLINE void rows_f16(float *c, const float *a, const uint16_t *b, int half, int rows,
                          int depth, bool add) {
    __m256 sum[ROWS][2];
    clear(sum, rows);
    b += half;
    for (int k = 0; k < depth; k++, a += rows, b += COLUMNS) {
        multiply(sum, a, widen_f16(b), widen_f16(b + 8), rows);
    }
    finish(c, sum, rows, add);
}

AVX2 static void tile_f16(float *c, const void *a, const void *b, int rows, int depth, bool add) {
    SWITCH_ROWS(rows_f16);
}

/* The lower half of a pair, as the upper half of a float32, is the value at even depth. */
AVX2 INLINE void rows_bf16(float *c, const float *a, const uint16_t *b, int half, int rows,
                           int depth, bool add) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    __m256 sum[ROWS][2];
    clear(sum, rows);
    b += 2 * half;
    for (int k = 0; k < depth; k += 2, a += 2 * rows, b += 2 * COLUMNS) {
        const __m256i p0 = _mm256_loadu_si256((const __m256i *)(const void *)b);
        const __m256i p1 = _mm256_loadu_si256((const __m256i *)(const void *)(b + 16));
        multiply(sum, a, _mm256_castsi256_ps(_mm256_slli_epi32(p0, 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(p1, 16)), rows);
        multiply(sum, a + rows, _mm256_castsi256_ps(_mm256_and_si256(p0, high)),
                 _mm256_castsi256_ps(_mm256_and_si256(p1, high)), rows);
    }
    finish(c, sum, rows, add);
}

AVX2 static void tile_bf16(float *c, const void *a, const void *b, int rows, int depth, bool add) {
    SWITCH_ROWS(rows_bf16);
}

const raddle_gemm_kernels raddle_gemm_kernels_avx2 = {
    .name = "avx2",
    .max_rows = ROWS,
    .tile = {[RADDLE_F32] = tile_f32, [RADDLE_F16] = tile_f16, [RADDLE_BF16] = tile_bf16},
};

#else
typedef int raddle_gemm_no_avx2; /* ISO C wants a declaration in every file */
#endif

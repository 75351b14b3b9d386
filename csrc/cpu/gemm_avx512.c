/* gemm_avx512.c - the micro kernels for AVX-512, and for bfloat16 also with its dot product.
 *
 * A tile of up to 12 rows holds its sums in 24 registers; each depth loads the panel's two vectors
 * and multiplies them by one broadcast element of x per row, straight from memory.
 */
#include "cpu/gemm_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")))
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 12")
#endif

enum { COLUMNS = RADDLE_GEMM_COLUMNS, ROWS = RADDLE_GEMM_MAX_ROWS };

/* rows as a constant: the body is compiled once for each count, with its sums in registers. */
#define CASE(n, body)                                                                              \
    case n:                                                                                        \
        body(c, a, b, n, depth, add);                                                              \
        break
#define SWITCH_ROWS(body)                                                                          \
    switch (rows) {                                                                                \
        CASE(1, body);                                                                             \
        CASE(2, body);                                                                             \
        CASE(3, body);                                                                             \
        CASE(4, body);                                                                             \
        CASE(5, body);                                                                             \
        CASE(6, body);                                                                             \
        CASE(7, body);                                                                             \
        CASE(8, body);                                                                             \
        CASE(9, body);                                                                             \
        CASE(10, body);                                                                            \
        CASE(11, body);                                                                            \
        CASE(12, body);                                                                            \
    }                                                                                              \
    (void)0

AVX512 INLINE void clear(__m512 sum[ROWS][2], int rows) {
    UNROLL for (int r = 0; r < rows; r++) {
        sum[r][0] = _mm512_setzero_ps();
        sum[r][1] = _mm512_setzero_ps();
    }
}

AVX512 INLINE void finish(float *c, __m512 sum[ROWS][2], int rows, bool add) {
    UNROLL for (int r = 0; r < rows; r++) {
        float *row = c + r * COLUMNS;
        if (add) {
            sum[r][0] = _mm512_add_ps(_mm512_loadu_ps(row), sum[r][0]);
            sum[r][1] = _mm512_add_ps(_mm512_loadu_ps(row + 16), sum[r][1]);
        }
        _mm512_storeu_ps(row, sum[r][0]);
        _mm512_storeu_ps(row + 16, sum[r][1]);
    }
}

/* ---------------------------------------------------------------- float32 and float16 */

AVX512 INLINE void rows_f32(float *c, const float *a, const float *b, int rows, int depth,
                            bool add) {
    __m512 sum[ROWS][2];
    clear(sum, rows);
    for (int k = 0; k < depth; k++, a += rows, b += COLUMNS) {
        const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
        UNROLL for (int r = 0; r < rows; r++) {
            const __m512 x = _mm512_set1_ps(a[r]);
            sum[r][0] = _mm512_fmadd_ps(x, b0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(x, b1, sum[r][1]);
        }
    }
    finish(c, sum, rows, add);
}

AVX512 static void tile_f32(float *c, const void *a, const void *b, int rows, int depth, bool add) {
    SWITCH_ROWS(rows_f32);
}

AVX512 INLINE void rows_f16(float *c, const float *a, const uint16_t *b, int rows, int depth,
                            bool add) {
    __m512 sum[ROWS][2];
    clear(sum, rows);
    for (int k = 0; k < depth; k++, a += rows, b += COLUMNS) {
        const __m512 b0 = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)b));
        const __m512 b1 =
            _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(b + 16)));
        UNROLL for (int r = 0; r < rows; r++) {
            const __m512 x = _mm512_set1_ps(a[r]);
            sum[r][0] = _mm512_fmadd_ps(x, b0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(x, b1, sum[r][1]);
        }
    }
    finish(c, sum, rows, add);
}

AVX512 static void tile_f16(float *c, const void *a, const void *b, int rows, int depth, bool add) {
    SWITCH_ROWS(rows_f16);
}

/* ---------------------------------------------------------------- bfloat16 */

/* The lower half of a pair, as the upper half of a float32, is the value at even depth. */
AVX512 INLINE void rows_bf16(float *c, const float *a, const uint16_t *b, int rows, int depth,
                             bool add) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    __m512 sum[ROWS][2];
    clear(sum, rows);
    for (int k = 0; k < depth; k += 2, a += 2 * rows, b += 2 * COLUMNS) {
        const __m512i p0 = _mm512_loadu_si512(b), p1 = _mm512_loadu_si512(b + 32);
        const __m512 even0 = _mm512_castsi512_ps(_mm512_slli_epi32(p0, 16));
        const __m512 even1 = _mm512_castsi512_ps(_mm512_slli_epi32(p1, 16));
        const __m512 odd0 = _mm512_castsi512_ps(_mm512_and_si512(p0, high));
        const __m512 odd1 = _mm512_castsi512_ps(_mm512_and_si512(p1, high));
        UNROLL for (int r = 0; r < rows; r++) {
            const __m512 x = _mm512_set1_ps(a[r]), y = _mm512_set1_ps(a[rows + r]);
            sum[r][0] = _mm512_fmadd_ps(x, even0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(x, even1, sum[r][1]);
            sum[r][0] = _mm512_fmadd_ps(y, odd0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(y, odd1, sum[r][1]);
        }
    }
    finish(c, sum, rows, add);
}

AVX512 static void tile_bf16(float *c, const void *a, const void *b, int rows, int depth,
                             bool add) {
    SWITCH_ROWS(rows_bf16);
}

/* vdpbf16ps reads denormals as zero and adds the two products of a pair to a sum in float32. */
AVX512BF16 INLINE void rows_bf16_dot(float *c, const uint16_t *a, const uint16_t *b, int rows,
                                     int depth, bool add) {
    __m512 sum[ROWS][2];
    clear(sum, rows);
    for (int k = 0; k < depth; k += 2, a += 2 * rows, b += 2 * COLUMNS) {
        const __m512i p0 = _mm512_loadu_si512(b), p1 = _mm512_loadu_si512(b + 32);
        UNROLL for (int r = 0; r < rows; r++) {
            int pair;
            memcpy(&pair, a + 2 * r, sizeof(pair));
            const __m512i x = _mm512_set1_epi32(pair);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], (__m512bh)p0, (__m512bh)x);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], (__m512bh)p1, (__m512bh)x);
        }
    }
    finish(c, sum, rows, add);
}

AVX512BF16 static void tile_bf16_dot(float *c, const void *a, const void *b, int rows, int depth,
                                     bool add) {
    SWITCH_ROWS(rows_bf16_dot);
}

const raddle_gemm_kernels raddle_gemm_kernels_avx512 = {
    .name = "avx512",
    .max_rows = ROWS,
    .tile = {[RADDLE_F32] = tile_f32, [RADDLE_F16] = tile_f16, [RADDLE_BF16] = tile_bf16},
};

const raddle_gemm_kernels raddle_gemm_kernels_avx512bf16 = {
    .name = "avx512bf16",
    .max_rows = ROWS,
    .a_is_bf16 = true,
    .tile = {[RADDLE_F32] = tile_f32, [RADDLE_F16] = tile_f16, [RADDLE_BF16] = tile_bf16_dot},
};

#else
typedef int raddle_gemm_no_avx512; /* ISO C wants a declaration in every file */
#endif

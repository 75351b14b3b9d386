/* vec.h - the CPU back end's inner loops: one table of functions per instruction set, chosen once.
 *
 * generic is plain C and always there; the others are compiled by target attribute and chosen from
 * cpuid, capped by RADDLE_ISA (generic, avx2, avx512, avx512bf16, neon). All accumulate in float32.
 * The table knows no family: rows, columns and strides only. Strides are in elements of the stored
 * type.
 */
#ifndef RADDLE_CPU_VEC_H
#define RADDLE_CPU_VEC_H

#include "base/status.h"

/* Rows that lie anywhere: element k of row n is rows[n][offset + k] of the stored type. */
typedef struct raddle_vec_rows {
    const void *const *rows;
    const void *const
        *next; /* NULL, or as many rows that will be asked for soon (same offset): prefetched */
    int64_t offset;
    int count;
} raddle_vec_rows;

/* c[m * ldc + n] = scale * sum_k a[m * lda + k] * b(n, k), m < rows, n < b->count, k < depth. a is
 * float32. */
typedef void (*raddle_vec_dot_rows)(float *c, int64_t ldc, const float *a, int64_t lda,
                                    const raddle_vec_rows *b, int rows, int depth, float scale);
/* c[m * ldc + d] += sum_n p[m * ldp + n] * b(n, d), m < rows, d < width. p and c are float32. */
typedef void (*raddle_vec_add_rows)(float *c, int64_t ldc, const float *p, int64_t ldp,
                                    const raddle_vec_rows *b, int rows, int width);

typedef struct raddle_vec {
    const char *name;
    /* By raddle_dtype (of b, src, dst); entries exist for RADDLE_F32, RADDLE_F16 and RADDLE_BF16.
     */
    raddle_vec_dot_rows dot_rows[RADDLE_DTYPE_COUNT];
    raddle_vec_add_rows add_rows[RADDLE_DTYPE_COUNT];
    void (*load[RADDLE_DTYPE_COUNT])(float *dst, const void *src,
                                     int64_t count); /* widen to float32 */
    void (*store[RADDLE_DTYPE_COUNT])(void *dst, const float *src,
                                      int64_t count); /* round to nearest even */
    /* x[i] = 2^(x[i] - max) in place, returns the sum; -inf gives exactly 0. max is finite. */
    float (*exp2_sum)(float *x, int64_t count, float max);
    float (*max)(const float *x, int64_t count); /* NaN is passed over; -inf when count is 0 */
    void (*scale)(float *x, int64_t count, float factor); /* x *= factor */
    float (*sum_squares)(const float *x, int64_t count);
} raddle_vec;

/* The table of this process; never NULL. */
const raddle_vec *raddle_vec_get(void);
/* The table called name if this CPU runs it, else NULL: for tests and doctor. */
const raddle_vec *raddle_vec_by_name(const char *name);

/* One per file; what raddle_vec_get chooses from. */
extern const raddle_vec raddle_vec_generic;

#endif

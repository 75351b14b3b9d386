/* vec.h - the CPU back end's inner loops: one table of functions per instruction set, chosen once.
 *
 * generic is plain C and always there; the others are compiled by target attribute and chosen from
 * cpuid, capped by RADDLE_ISA (generic, avx2, avx512, avx512bf16, neon). All accumulate in float32.
 * The table knows no family: rows, columns and strides only. Strides are in elements of the stored
 * type. Memory may have any alignment that its element type may have.
 */
#ifndef RADDLE_CPU_VEC_H
#define RADDLE_CPU_VEC_H

#include "base/status.h"

#include <math.h>

/* Rows that lie anywhere: element k of row n is rows[n][offset + k] of the stored type. */
typedef struct raddle_vec_rows {
    const void *const *rows;
    const void *const *next; /* NULL, or as many rows that will be asked for soon, to prefetch */
    int64_t offset;          /* of both */
    int count;
} raddle_vec_rows;

enum { RADDLE_VEC_PANEL_STEP = 16 };

/* Rows packed by pack_dot or pack_add in the order that the multiply wants. */
typedef struct raddle_vec_panel {
    void *data; /* raddle_vec_panel_bytes(rows, length), 64-byte aligned */
    int length; /* elements of a row */
} raddle_vec_panel;

static inline size_t raddle_vec_panel_bytes(int count, int length) {
    const size_t step = RADDLE_VEC_PANEL_STEP;
    return ((size_t)count + step - 1) / step * step * (((size_t)length + step - 1) / step * step) *
           sizeof(float);
}

/* Products of left rows with rows b of a stored type. The left rows (a, p) are of type operand:
 * float32 or, where an instruction multiplies pairs of them, bfloat16. Sums are float32.
 * Few left rows: dot_rows and add_rows read b where it lies. From about 16: pack b once, then
 * dot_panel and add_panel. */
typedef struct raddle_vec_block {
    raddle_dtype operand;
    /* c[m * ldc + n] = sum_k a[m * lda + k] * b(n, k), m < rows, n < b->count, k < depth. */
    void (*dot_rows)(float *c, int64_t ldc, const void *a, int64_t lda, const raddle_vec_rows *b,
                     int rows, int depth);
    /* c[m * ldc + d] += sum_n p[m * ldp + n] * b(n, d), m < rows, d < width. */
    void (*add_rows)(float *c, int64_t ldc, const void *p, int64_t ldp, const raddle_vec_rows *b,
                     int rows, int width);
    /* Rows of panel->length elements into panel->data; what the last block lacks is 0. */
    void (*pack_dot)(const raddle_vec_panel *panel, const raddle_vec_rows *b);
    void (*pack_add)(const raddle_vec_panel *panel, const raddle_vec_rows *b);
    /* As dot_rows, n in [first, last); first is a multiple of RADDLE_VEC_PANEL_STEP. Columns up to
     * the next multiple of it past last are written too, with nothing of use. */
    void (*dot_panel)(float *c, int64_t ldc, const void *a, int64_t lda,
                      const raddle_vec_panel *panel, int rows, int first, int last);
    /* As add_rows, n in [first, last); first is a multiple of RADDLE_VEC_PANEL_STEP. p is read up
     * to the next even column past last, which must be 0 there. */
    void (*add_panel)(float *c, int64_t ldc, const void *p, int64_t ldp,
                      const raddle_vec_panel *panel, int rows, int first, int last);
    /* A step of online softmax for each of rows: to[m * ldto + i] = 2^(x[m * ldx + i] * scale - max)
     * as operand, where max is the largest x * scale so far. It stands in state[2 * m] and is
     * raised; state[2 * m + 1], the sum of weights before they are rounded, is rescaled and added
     * to. factors[m]: what else was summed before has to be multiplied with, 1 where max stayed.
     * -inf gives exactly 0; NaN is no maximum. scale > 0. to may be x when operand is float32. */
    void (*weigh_rows)(void *to, int64_t ldto, const float *x, int64_t ldx, int rows, int count,
                       float scale, float *state, float *factors);
} raddle_vec_block;

/* Raises the max of a state of weigh_rows; returns the factor. */
static inline float raddle_vec_raise(float *state, float max) {
    if (!(max > state[0])) {
        return 1.0f;
    }
    const float factor = exp2f(state[0] - max);
    state[0] = max;
    state[1] *= factor;
    return factor;
}

/* What to subtract from logits whose maximum is max: anything finite will do when all of them are -inf
 * (or NaN). */
static inline float raddle_vec_base(float max) {
    return max == -INFINITY ? 0.0f : max;
}

typedef struct raddle_vec {
    const char *name;
    /* By raddle_dtype of b; entries exist for RADDLE_F32, RADDLE_F16, RADDLE_BF16, RADDLE_F8_E4M3
     * and RADDLE_F8_E5M2. operand is float32. */
    const raddle_vec_block *blocks[RADDLE_DTYPE_COUNT];
    /* The same with operand bfloat16, whose subnormals count as 0; b is bfloat16 or float8. NULL
     * where there is no such instruction. */
    const raddle_vec_block *blocks_bf16[RADDLE_DTYPE_COUNT];
    /* By dtype, all of the above: widen to float32, exactly. */
    void (*load[RADDLE_DTYPE_COUNT])(float *dst, const void *src, int64_t count);
    /* The same of a row whose halves are pairs, rotated: low * cosine - high * sine, high * cosine +
     * low * sine. turns: half cosines, then half sines. */
    void (*load_rotated[RADDLE_DTYPE_COUNT])(float *dst, const void *src, const float *turns,
                                             int64_t half);
    /* float32, float16 and bfloat16: round to nearest even. */
    void (*store[RADDLE_DTYPE_COUNT])(void *dst, const float *src, int64_t count);
    /* x[i] = 2^(x[i] - max) in place, returns the sum; -inf gives exactly 0. max is finite. */
    float (*exp2_sum)(float *x, int64_t count, float max);
    float (*max)(const float *x, int64_t count); /* NaN is passed over; -inf when count is 0 */
    void (*scale)(float *x, int64_t count, float factor); /* x *= factor */
    float (*sum_squares)(const float *x, int64_t count);
    /* Copies, and returns the largest as an unsigned number: of a negative one, more than
     * INT32_MAX. 0 when count is 0. */
    uint32_t (*copy_ids)(int32_t *dst, const int32_t *src, int64_t count);
} raddle_vec;

/* The table of this process; never NULL. */
const raddle_vec *raddle_vec_get(void);
/* The table called name if this CPU runs it, else NULL: for tests and doctor. */
const raddle_vec *raddle_vec_by_name(const char *name);

/* What raddle_vec_get chooses from; call nothing of a table that this CPU does not run. */
extern const raddle_vec raddle_vec_generic;
#if defined(__x86_64__)
extern const raddle_vec raddle_vec_avx2;
extern const raddle_vec raddle_vec_avx512;
extern const raddle_vec raddle_vec_avx512bf16;
extern const raddle_vec_block raddle_vec_block_avx512bf16;
extern const raddle_vec_block raddle_vec_block_avx512fp8_e4m3;
extern const raddle_vec_block raddle_vec_block_avx512fp8_e5m2;
#elif defined(__aarch64__)
extern const raddle_vec raddle_vec_neon;
#endif

#endif

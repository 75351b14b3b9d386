/* vec_generic.c - the inner loops in plain C: the reference for the others, and what runs on any
 * machine.
 *
 * Conversions follow IEEE 754: float16 with subnormals, bfloat16 and float16 rounded to nearest
 * even, NaN kept NaN (quiet). Sums are float32 in index order, several partial sums side by side
 * where that lets the compiler vectorise.
 */
#include "cpu/vec.h"

#include <math.h>
#include <string.h>

#include "cpu/convert.h"

enum { LANES = 8 }; /* partial sums of a dot product */

#define PREFETCH_ROW(b, n, bytes)                                                                  \
    do {                                                                                           \
        if ((b)->next) {                                                                           \
            const char *at_ = (const char *)(b)->next[n] + (b)->offset * (int64_t)sizeof(*row);    \
            for (int64_t i_ = 0; i_ < (bytes); i_ += 64) {                                         \
                __builtin_prefetch(at_ + i_);                                                      \
            }                                                                                      \
        }                                                                                          \
    } while (0)

/* One dot and one add loop per stored type; WIDEN turns an element into float. */
#define DEFINE_ROWS(suffix, type, WIDEN)                                                           \
    static void dot_rows_##suffix(float *c, int64_t ldc, const float *a, int64_t lda,              \
                                  const raddle_vec_rows *b, int rows, int depth, float scale) {    \
        for (int n = 0; n < b->count; n++) {                                                       \
            const type *row = (const type *)b->rows[n] + b->offset;                                \
            PREFETCH_ROW(b, n, (int64_t)depth *(int64_t)sizeof(type));                             \
            for (int m = 0; m < rows; m++) {                                                       \
                const float *am = a + m * lda;                                                     \
                float sums[LANES] = {0};                                                           \
                int k = 0;                                                                         \
                for (; k + LANES <= depth; k += LANES) {                                           \
                    for (int i = 0; i < LANES; i++) {                                              \
                        sums[i] += am[k + i] * WIDEN(row[k + i]);                                  \
                    }                                                                              \
                }                                                                                  \
                for (; k < depth; k++) {                                                           \
                    sums[0] += am[k] * WIDEN(row[k]);                                              \
                }                                                                                  \
                float sum = 0;                                                                     \
                for (int i = 0; i < LANES; i++) {                                                  \
                    sum += sums[i];                                                                \
                }                                                                                  \
                c[m * ldc + n] = sum * scale;                                                      \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    static void add_rows_##suffix(float *c, int64_t ldc, const float *p, int64_t ldp,              \
                                  const raddle_vec_rows *b, int rows, int width) {                 \
        for (int n = 0; n < b->count; n++) {                                                       \
            const type *row = (const type *)b->rows[n] + b->offset;                                \
            PREFETCH_ROW(b, n, (int64_t)width *(int64_t)sizeof(type));                             \
            for (int m = 0; m < rows; m++) {                                                       \
                const float weight = p[m * ldp + n];                                               \
                float *cm = c + m * ldc;                                                           \
                for (int d = 0; d < width; d++) {                                                  \
                    cm[d] += weight * WIDEN(row[d]);                                               \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }

#define WIDEN_NOTHING(x) (x)
DEFINE_ROWS(f32, float, WIDEN_NOTHING)
DEFINE_ROWS(f16, uint16_t, raddle_f16_to_f32)
DEFINE_ROWS(bf16, uint16_t, raddle_bf16_to_f32)

static void load_f32(float *dst, const void *src, int64_t count) {
    memcpy(dst, src, (size_t)count * sizeof(float));
}

static void load_f16(float *dst, const void *src, int64_t count) {
    const uint16_t *from = src;
    for (int64_t i = 0; i < count; i++) {
        dst[i] = raddle_f16_to_f32(from[i]);
    }
}

static void load_bf16(float *dst, const void *src, int64_t count) {
    const uint16_t *from = src;
    for (int64_t i = 0; i < count; i++) {
        dst[i] = raddle_bf16_to_f32(from[i]);
    }
}

static void store_f32(void *dst, const float *src, int64_t count) {
    memcpy(dst, src, (size_t)count * sizeof(float));
}

static void store_f16(void *dst, const float *src, int64_t count) {
    uint16_t *to = dst;
    for (int64_t i = 0; i < count; i++) {
        to[i] = raddle_f32_to_f16(src[i]);
    }
}

static void store_bf16(void *dst, const float *src, int64_t count) {
    uint16_t *to = dst;
    for (int64_t i = 0; i < count; i++) {
        to[i] = raddle_f32_to_bf16(src[i]);
    }
}

static float exp2_sum(float *x, int64_t count, float max) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) {
        x[i] = exp2f(x[i] - max);
        sum += x[i];
    }
    return sum;
}

static float max_of(const float *x, int64_t count) {
    float max = -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        max = x[i] > max ? x[i] : max;
    }
    return max;
}

static void scale_by(float *x, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i++) {
        x[i] *= factor;
    }
}

static float sum_squares(const float *x, int64_t count) {
    float sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            sums[j] += x[i + j] * x[i + j];
        }
    }
    for (; i < count; i++) {
        sums[0] += x[i] * x[i];
    }
    float sum = 0;
    for (int j = 0; j < LANES; j++) {
        sum += sums[j];
    }
    return sum;
}

const raddle_vec raddle_vec_generic = {
    .name = "generic",
    .dot_rows =
        {[RADDLE_F32] = dot_rows_f32, [RADDLE_F16] = dot_rows_f16, [RADDLE_BF16] = dot_rows_bf16},
    .add_rows =
        {[RADDLE_F32] = add_rows_f32, [RADDLE_F16] = add_rows_f16, [RADDLE_BF16] = add_rows_bf16},
    .load = {[RADDLE_F32] = load_f32, [RADDLE_F16] = load_f16, [RADDLE_BF16] = load_bf16},
    .store = {[RADDLE_F32] = store_f32, [RADDLE_F16] = store_f16, [RADDLE_BF16] = store_bf16},
    .exp2_sum = exp2_sum,
    .max = max_of,
    .scale = scale_by,
    .sum_squares = sum_squares,
};

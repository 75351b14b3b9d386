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

enum { LANES = 8, STEP = RADDLE_VEC_PANEL_STEP }; /* LANES: partial sums of a dot product */

static float nothing(float x) {
    return x;
}

/* What differs by stored type; WIDEN turns an element into float. Panels hold float32: pack_dot
 * [columns / 16][length][16], pack_add [rows][length]. */
#define DEFINE_TYPE(suffix, type, WIDEN)                                                           \
    static const type *row_##suffix(const raddle_vec_rows *b, int n) {                             \
        return (const type *)b->rows[n] + b->offset;                                               \
    }                                                                                              \
    static void dot_rows_##suffix(float *c, int64_t ldc, const void *a, int64_t lda,               \
                                  const raddle_vec_rows *b, int rows, int depth) {                 \
        for (int n = 0; n < b->count; n++) {                                                       \
            const type *row = row_##suffix(b, n);                                                  \
            for (int m = 0; m < rows; m++) {                                                       \
                const float *am = (const float *)a + m * lda;                                      \
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
                c[m * ldc + n] = sum;                                                              \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    static void add_rows_##suffix(float *c, int64_t ldc, const void *p, int64_t ldp,               \
                                  const raddle_vec_rows *b, int rows, int width) {                 \
        for (int n = 0; n < b->count; n++) {                                                       \
            const type *row = row_##suffix(b, n);                                                  \
            for (int m = 0; m < rows; m++) {                                                       \
                const float weight = ((const float *)p)[m * ldp + n];                              \
                float *cm = c + m * ldc;                                                           \
                for (int d = 0; d < width; d++) {                                                  \
                    cm[d] += weight * WIDEN(row[d]);                                               \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    static void pack_dot_##suffix(const raddle_vec_panel *panel, const raddle_vec_rows *b) {       \
        float *to = panel->data;                                                                   \
        for (int n = 0; n < b->count; n += STEP) {                                                 \
            for (int i = 0; i < STEP; i++) {                                                       \
                for (int k = 0; k < panel->length; k++) {                                          \
                    to[k * STEP + i] = n + i < b->count ? WIDEN(row_##suffix(b, n + i)[k]) : 0.0f; \
                }                                                                                  \
            }                                                                                      \
            to += panel->length * STEP;                                                            \
        }                                                                                          \
    }                                                                                              \
    static void pack_add_##suffix(const raddle_vec_panel *panel, const raddle_vec_rows *b) {       \
        float *to = panel->data;                                                                   \
        for (int n = 0; n < b->count; n++) {                                                       \
            for (int d = 0; d < panel->length; d++) {                                              \
                *to++ = WIDEN(row_##suffix(b, n)[d]);                                              \
            }                                                                                      \
        }                                                                                          \
    }

DEFINE_TYPE(f32, float, nothing)
DEFINE_TYPE(f16, uint16_t, raddle_f16_to_f32)
DEFINE_TYPE(bf16, uint16_t, raddle_bf16_to_f32)
DEFINE_TYPE(e4m3, uint8_t, raddle_e4m3_to_f32)
DEFINE_TYPE(e5m2, uint8_t, raddle_e5m2_to_f32)

static void dot_panel(float *c, int64_t ldc, const void *a, int64_t lda,
                      const raddle_vec_panel *panel, int rows, int first, int last) {
    for (int n = first; n < last; n += STEP) {
        const float *right = (const float *)panel->data + (int64_t)n * panel->length;
        for (int m = 0; m < rows; m++) {
            const float *am = (const float *)a + m * lda;
            float sums[STEP] = {0};
            for (int k = 0; k < panel->length; k++) {
                for (int i = 0; i < STEP; i++) {
                    sums[i] += am[k] * right[k * STEP + i];
                }
            }
            memcpy(c + m * ldc + n, sums, sizeof(sums));
        }
    }
}

static void add_panel(float *c, int64_t ldc, const void *p, int64_t ldp,
                      const raddle_vec_panel *panel, int rows, int first, int last) {
    for (int m = 0; m < rows; m++) {
        float *cm = c + m * ldc;
        for (int n = first; n < last; n++) {
            const float weight = ((const float *)p)[m * ldp + n];
            const float *row = (const float *)panel->data + (int64_t)n * panel->length;
            for (int d = 0; d < panel->length; d++) {
                cm[d] += weight * row[d];
            }
        }
    }
}

static float exp2_row(float *to, const float *x, int64_t count, float scale, float max) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) {
        to[i] = exp2f(x[i] * scale - max);
        sum += to[i];
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

static void weigh_rows(void *to, int64_t ldto, const float *x, int64_t ldx, int rows, int count,
                       float scale, float *state, float *factors) {
    for (int m = 0; m < rows; m++) {
        factors[m] = raddle_vec_raise(state + 2 * m, max_of(x + m * ldx, count) * scale);
        state[2 * m + 1] += exp2_row((float *)to + m * ldto, x + m * ldx, count, scale,
                                     raddle_vec_base(state[2 * m]));
    }
}

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

static void load_e4m3(float *dst, const void *src, int64_t count) {
    const uint8_t *from = src;
    for (int64_t i = 0; i < count; i++) {
        dst[i] = raddle_e4m3_to_f32(from[i]);
    }
}

static void load_e5m2(float *dst, const void *src, int64_t count) {
    const uint8_t *from = src;
    for (int64_t i = 0; i < count; i++) {
        dst[i] = raddle_e5m2_to_f32(from[i]);
    }
}

static void rotate(float *x, const float *turns, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[half + i];
        x[i] = low * turns[i] - high * turns[half + i];
        x[half + i] = high * turns[i] + low * turns[half + i];
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
    return exp2_row(x, x, count, 1.0f, max);
}

static void scale_by(float *x, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i++) {
        x[i] *= factor;
    }
}

static uint32_t copy_ids(int32_t *dst, const int32_t *src, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) { /* compilers make vectors of it */
        const uint32_t id = (uint32_t)src[i];
        most = id > most ? id : most;
        dst[i] = src[i];
    }
    return most;
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

#define DEFINE_BLOCK(suffix)                                                                       \
    static void load_rotated_##suffix(float *dst, const void *src, const float *turns,             \
                                      int64_t half) {                                              \
        load_##suffix(dst, src, 2 * half);                                                         \
        rotate(dst, turns, half);                                                                  \
    }                                                                                              \
    static const raddle_vec_block block_##suffix = {                                               \
        RADDLE_F32,        dot_rows_##suffix, add_rows_##suffix, pack_dot_##suffix,                \
        pack_add_##suffix, dot_panel,         add_panel,         weigh_rows,                       \
    };
DEFINE_BLOCK(f32)
DEFINE_BLOCK(f16)
DEFINE_BLOCK(bf16)
DEFINE_BLOCK(e4m3)
DEFINE_BLOCK(e5m2)

const raddle_vec raddle_vec_generic = {
    .name = "generic",
    .blocks = {[RADDLE_F32] = &block_f32,
               [RADDLE_F16] = &block_f16,
               [RADDLE_BF16] = &block_bf16,
               [RADDLE_F8_E4M3] = &block_e4m3,
               [RADDLE_F8_E5M2] = &block_e5m2},
    .load = {[RADDLE_F32] = load_f32,
             [RADDLE_F16] = load_f16,
             [RADDLE_BF16] = load_bf16,
             [RADDLE_F8_E4M3] = load_e4m3,
             [RADDLE_F8_E5M2] = load_e5m2},
    .load_rotated = {[RADDLE_F32] = load_rotated_f32,
                     [RADDLE_F16] = load_rotated_f16,
                     [RADDLE_BF16] = load_rotated_bf16,
                     [RADDLE_F8_E4M3] = load_rotated_e4m3,
                     [RADDLE_F8_E5M2] = load_rotated_e5m2},
    .store = {[RADDLE_F32] = store_f32, [RADDLE_F16] = store_f16, [RADDLE_BF16] = store_bf16},
    .exp2_sum = exp2_sum,
    .max = max_of,
    .scale = scale_by,
    .sum_squares = sum_squares,
    .copy_ids = copy_ids,
};

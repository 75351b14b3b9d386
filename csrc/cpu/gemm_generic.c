/* gemm_generic.c - the micro kernels in plain C, and the choice among all of them. */
#include "cpu/gemm_kernels.h"

#include "cpu/convert.h"
#include "cpu/isa.h"

enum { COLUMNS = RADDLE_GEMM_COLUMNS };

static void multiply(float *sum, float x, const float *b) {
    for (int n = 0; n < COLUMNS; n++) {
        sum[n] += x * b[n];
    }
}

static void finish(float *c, const float *sum, bool add) {
    for (int n = 0; n < COLUMNS; n++) {
        c[n] = add ? c[n] + sum[n] : sum[n];
    }
}

static void tile_f32(float *c, const void *a, const void *b, int rows, int depth, bool add) {
    for (int r = 0; r < rows; r++) {
        float sum[RADDLE_GEMM_COLUMNS] = {0};
        for (int k = 0; k < depth; k++) {
            multiply(sum, ((const float *)a)[k * rows + r], (const float *)b + k * COLUMNS);
        }
        finish(c + r * COLUMNS, sum, add);
    }
}

/* The 16-bit kernels widen one depth of the panel at a time, for all rows. */
static void tile_f16(float *c, const void *a, const void *b, int rows, int depth, bool add) {
    float sum[RADDLE_GEMM_MAX_ROWS][RADDLE_GEMM_COLUMNS] = {{0}};
    for (int k = 0; k < depth; k++) {
        float wide[RADDLE_GEMM_COLUMNS];
        for (int n = 0; n < COLUMNS; n++) {
            wide[n] = raddle_f16_to_f32(((const uint16_t *)b)[k * COLUMNS + n]);
        }
        for (int r = 0; r < rows; r++) {
            multiply(sum[r], ((const float *)a)[k * rows + r], wide);
        }
    }
    for (int r = 0; r < rows; r++) {
        finish(c + r * COLUMNS, sum[r], add);
    }
}

static void tile_bf16(float *c, const void *a, const void *b, int rows, int depth, bool add) {
    float sum[RADDLE_GEMM_MAX_ROWS][RADDLE_GEMM_COLUMNS] = {{0}};
    for (int k = 0; k < depth; k++) {
        const uint16_t *pairs = (const uint16_t *)b + k / 2 * 2 * COLUMNS + k % 2;
        float wide[RADDLE_GEMM_COLUMNS];
        for (int n = 0; n < COLUMNS; n++) {
            wide[n] = raddle_bf16_to_f32(pairs[2 * n]);
        }
        for (int r = 0; r < rows; r++) {
            multiply(sum[r], ((const float *)a)[k * rows + r], wide);
        }
    }
    for (int r = 0; r < rows; r++) {
        finish(c + r * COLUMNS, sum[r], add);
    }
}

const raddle_gemm_kernels raddle_gemm_kernels_generic = {
    .name = "generic",
    .max_rows = 8,
    .tile = {[RADDLE_F32] = tile_f32, [RADDLE_F16] = tile_f16, [RADDLE_BF16] = tile_bf16},
};

const raddle_gemm_kernels *raddle_gemm_kernels_get(void) {
    switch (raddle_isa_get()) {
#if defined(__x86_64__)
    case RADDLE_ISA_AVX512BF16:
        return &raddle_gemm_kernels_avx512bf16;
    case RADDLE_ISA_AVX512:
        return &raddle_gemm_kernels_avx512;
    case RADDLE_ISA_AVX2:
        return &raddle_gemm_kernels_avx2;
#endif
    default:
        return &raddle_gemm_kernels_generic;
    }
}

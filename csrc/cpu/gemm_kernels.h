/* gemm_kernels.h - the micro kernels behind gemm.h: one table per instruction set.
 *
 * b, a panel of the weight: RADDLE_GEMM_COLUMNS columns, depth after depth. float32 and float16:
 * [depth][columns]. bfloat16: pairs of depth side by side, [depth / 2][columns][2], which is what
 * the dot product instructions read, and what shifts and masks widen elsewhere. a, a tile of x:
 * [depth][rows] of float32, or [depth / 2][rows][2] of bfloat16 for kernels that say so. Depth is
 * even for bfloat16; x and weight are padded with zeros. c: [rows][columns] float32.
 */
#ifndef RADDLE_CPU_GEMM_KERNELS_H
#define RADDLE_CPU_GEMM_KERNELS_H

#include "base/status.h"

enum {
    RADDLE_GEMM_COLUMNS = 32,
    RADDLE_GEMM_MAX_ROWS = 12 /* the most that any kernel takes */
};

/* c = a * b, or c += a * b when add; 1 <= rows <= max_rows, depth >= 1. */
typedef void (*raddle_gemm_tile)(float *c, const void *a, const void *b, int rows, int depth,
                                 bool add);

typedef struct raddle_gemm_kernels {
    const char *name;
    int max_rows;
    bool a_is_bf16;                            /* for RADDLE_BF16 */
    raddle_gemm_tile tile[RADDLE_DTYPE_COUNT]; /* float32, float16, bfloat16 */
} raddle_gemm_kernels;

extern const raddle_gemm_kernels raddle_gemm_kernels_generic;
#if defined(__x86_64__)
extern const raddle_gemm_kernels raddle_gemm_kernels_avx2;
extern const raddle_gemm_kernels raddle_gemm_kernels_avx512;
extern const raddle_gemm_kernels raddle_gemm_kernels_avx512bf16;
#endif

/* The table for isa.h's choice; never NULL. */
const raddle_gemm_kernels *raddle_gemm_kernels_get(void);

#endif

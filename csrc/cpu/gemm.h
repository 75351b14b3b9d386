/* gemm.h - out = x * weight^T + bias on the CPU, with the weight packed once.
 *
 * Made for linear layers: one weight, few or many rows of x. A weight of float32, float16 or
 * bfloat16 keeps its type; sums are float32, in blocks of depth. The result of a row does not
 * depend on how many rows come with it or on the number of threads.
 */
#ifndef RADDLE_CPU_GEMM_H
#define RADDLE_CPU_GEMM_H

#include "base/tensor.h"

typedef struct raddle_gemm_weight raddle_gemm_weight;

typedef struct raddle_gemm_args {
    const void *x;     /* [rows, depth], of the weight's dtype, innermost stride 1 */
    const float *bias; /* [columns], or NULL */
    void *out;         /* [rows, columns], innermost stride 1; does not overlap x */
    int64_t x_stride_row, out_stride_row;
    int64_t rows;
    raddle_dtype out_dtype; /* float32, float16 or bfloat16 */
} raddle_gemm_args;

/* weight [columns, depth] on the host, any strides, checked; it is copied. */
raddle_status raddle_gemm_weight_create(const raddle_tensor *weight,
                                        raddle_gemm_weight **out_weight);
void raddle_gemm_weight_destroy(raddle_gemm_weight *weight);
/* Fails only when memory for a packed x is short. */
raddle_status raddle_gemm_run(const raddle_gemm_weight *weight, const raddle_gemm_args *args);

#endif

/* blas.h - dense matrix products by cublasLt, opened when the first linear layer comes to a GPU.
 *
 * Found by library.h's search (torch's CUDA wheels bring it). Missing: RADDLE_ERR_UNSUPPORTED with
 * the pip line. Accumulates in float32, float32 inputs without TF32. What cublasLt chose for a
 * shape is kept, so that a repeated product looks up and launches; the first one may also happen
 * during a capture.
 */
#ifndef RADDLE_CUDA_BLAS_H
#define RADDLE_CUDA_BLAS_H

#include "cuda/device.h"

/* y[m, n] = x[m, k] @ w[n, k]^T + bias[n]. Row-major; strides between rows, in elements. */
typedef struct raddle_blas_gemm_args {
    int64_t m, n, k; /* k at least 1 */
    const void *x, *w;
    const void *bias; /* of y_dtype, or NULL */
    void *y;          /* none of the inputs */
    int64_t x_stride, w_stride, y_stride;
    raddle_dtype dtype;   /* of x and w: float32, float16, bfloat16 */
    raddle_dtype y_dtype; /* dtype, or float32 */
    int32_t max_sms;      /* that cublasLt is to choose a kernel for; 0: all */
} raddle_blas_gemm_args;

typedef struct raddle_blas_info {
    const char *path;
    int version; /* 130100 for 13.1 */
} raddle_blas_info;

/* Opens the library and readies it for device: what can fail for want of something fails here. */
raddle_status raddle_blas_prepare(const raddle_cuda_device *device);
/* Thread-safe; capture-safe. Nothing is launched when m or n is 0. */
raddle_status raddle_blas_gemm(const raddle_cuda_device *device, const raddle_blas_gemm_args *args,
                               raddle_stream stream);
raddle_status raddle_blas_get_info(raddle_blas_info *out_info);

#endif

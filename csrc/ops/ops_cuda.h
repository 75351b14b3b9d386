/* ops_cuda.h - what the files of the CUDA back end of ops give to each other. */
#ifndef RADDLE_OPS_OPS_CUDA_H
#define RADDLE_OPS_OPS_CUDA_H

#include "ops/ops_backend.h"
#include "ops/ops_config.h"

/* Compiles the kernel of a config, so that its first launch may be captured. */
raddle_status raddle_ops_cuda_prepare(int32_t device, const raddle_ops_config *config);
/* Launches it, compiled at its first use; params: its one argument. */
raddle_status raddle_ops_cuda_launch(int32_t device, const raddle_ops_config *config,
                                     int64_t grid_x, int64_t grid_y, unsigned threads,
                                     const void *params, raddle_stream stream);

/* ops_cuda_linear.c */
raddle_status raddle_ops_cuda_linear_pack(raddle_ops_linear *linear, const raddle_tensor *weight,
                                          const raddle_tensor *bias, raddle_stream stream);
raddle_status raddle_ops_cuda_linear_run(const raddle_ops_linear *linear,
                                         const raddle_ops_linear_args *args, raddle_stream stream);
void raddle_ops_cuda_linear_release(raddle_ops_linear *linear);

#endif

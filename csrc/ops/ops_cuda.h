/* ops_cuda.h - what the files of the CUDA back end of ops give to each other. */
#ifndef RADDLE_OPS_OPS_CUDA_H
#define RADDLE_OPS_OPS_CUDA_H

#include "ops/ops_backend.h"

/* ops_cuda_linear.c */
raddle_status raddle_ops_cuda_linear_pack(raddle_ops_linear *linear, const raddle_tensor *weight,
                                          const raddle_tensor *bias, raddle_stream stream);
raddle_status raddle_ops_cuda_linear_run(const raddle_ops_linear *linear,
                                         const raddle_ops_linear_args *args, raddle_stream stream);
void raddle_ops_cuda_linear_release(raddle_ops_linear *linear);

#endif

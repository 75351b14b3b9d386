/* ops_cuda_linear.c - the CUDA back end of linear layers: a row-major weight and cublasLt. */
#include "ops/ops_cuda.h"

raddle_status raddle_ops_cuda_linear_pack(raddle_ops_linear *linear, const raddle_tensor *weight,
                                          const raddle_tensor *bias, raddle_stream stream) {
    (void)linear, (void)weight, (void)bias, (void)stream;
    return raddle_fail(RADDLE_ERR_UNSUPPORTED, "Linear: not on CUDA");
}

raddle_status raddle_ops_cuda_linear_run(const raddle_ops_linear *linear,
                                         const raddle_ops_linear_args *args, raddle_stream stream) {
    (void)linear, (void)args, (void)stream;
    return raddle_fail(RADDLE_ERR_UNSUPPORTED, "Linear: not on CUDA");
}

void raddle_ops_cuda_linear_release(raddle_ops_linear *linear) {
    (void)linear;
}

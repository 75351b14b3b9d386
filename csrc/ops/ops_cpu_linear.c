/* ops_cpu_linear.c - the CPU back end of linear layers: the weight as panels of cpu/gemm.h. */
#include "ops/ops_cpu.h"

#include "base/alloc.h"
#include "cpu/gemm.h"
#include "cpu/vec.h"

raddle_status raddle_ops_cpu_linear_pack(raddle_ops_linear *linear, const raddle_tensor *weight,
                                         const raddle_tensor *bias, raddle_stream stream) {
    (void)stream;
    raddle_gemm_weight *packed;
    if (bias) {
        const size_t bytes = (size_t)linear->out_features * sizeof(float);
        float *copy = raddle_alloc(bytes);
        if (!copy) {
            return raddle_fail_memory(bytes);
        }
        linear->bias = copy;
        const size_t step = raddle_dtype_bytes(bias->dtype);
        for (int64_t i = 0; i < linear->out_features; i++) {
            const char *value = (const char *)bias->data + i * bias->stride[0] * (int64_t)step;
            raddle_vec_get()->load[bias->dtype](&copy[i], value, 1);
        }
    }
    RADDLE_TRY(raddle_gemm_weight_create(weight, &packed));
    linear->weight = packed;
    return RADDLE_OK;
}

raddle_status raddle_ops_cpu_linear_run(const raddle_ops_linear *linear,
                                        const raddle_ops_linear_args *args, raddle_stream stream) {
    (void)stream;
    const raddle_gemm_args gemm = {
        .x = args->x,
        .bias = linear->bias,
        .out = args->out,
        .x_stride_row = args->x_stride_row,
        .out_stride_row = args->out_stride_row,
        .rows = args->rows,
        .out_dtype = args->out_dtype,
    };
    return raddle_gemm_run(linear->weight, &gemm);
}

void raddle_ops_cpu_linear_release(raddle_ops_linear *linear) {
    raddle_gemm_weight_destroy(linear->weight);
    raddle_free(linear->bias);
}

/* ops_backend.h - the table that a back end of the ops family fills, and what its files share.
 *
 * Everything that reaches a back end was checked. Both tables are complete.
 */
#ifndef RADDLE_OPS_OPS_BACKEND_H
#define RADDLE_OPS_OPS_BACKEND_H

#include "ops/ops.h"

/* rows of one run: x [rows, in_features] -> out [rows, out_features]. */
typedef struct raddle_ops_linear_args {
    const void *x;
    void *out;
    int64_t x_stride_row, out_stride_row;
    int64_t rows;
    raddle_dtype x_dtype, out_dtype;
    int32_t max_sms; /* CUDA; 0: all */
} raddle_ops_linear_args;

struct raddle_ops_linear {
    const struct raddle_ops_backend *backend;
    raddle_device device;
    int64_t in_features, out_features;
    raddle_dtype dtype; /* of the weight as given */
    bool has_bias;
    void *weight;              /* CPU: a raddle_gemm_weight; CUDA: row-major device memory */
    void *bias;                /* CPU: float32; CUDA: device memory, see ops_cuda_linear.c */
    int64_t weight_stride_row; /* CUDA */
    bool weight_owned;         /* CUDA: else it is the caller's, who keeps it alive */
};

/* One call of sample or filter, and the settings of its rows, or of all (call.settings_step 0). */
typedef struct raddle_ops_sample_job {
    raddle_ops_sample_call call;
    const raddle_ops_sample_row *settings;
} raddle_ops_sample_job;

typedef struct raddle_ops_backend {
    const char *name;
    raddle_status (*norm)(int32_t device, const raddle_ops_norm_params *params,
                          raddle_stream stream);
    raddle_status (*act_and_mul)(int32_t device, const raddle_ops_act_params *params,
                                 raddle_stream stream);
    raddle_status (*embedding)(int32_t device, const raddle_ops_embedding_params *params,
                               raddle_stream stream);
    raddle_status (*rope)(int32_t device, const raddle_ops_rope_params *params,
                          raddle_stream stream);
    raddle_status (*rope_fp8)(int32_t device, const raddle_ops_rope_fp8_params *params,
                              raddle_stream stream);
    raddle_status (*softmax)(int32_t device, const raddle_ops_softmax_params *params,
                             raddle_stream stream);
    raddle_status (*sample)(int32_t device, const raddle_ops_sample_job *job, raddle_stream stream);
    raddle_status (*filter)(int32_t device, const raddle_ops_sample_job *job, raddle_stream stream);
    raddle_status (*verify)(int32_t device, const raddle_ops_verify_params *params,
                            raddle_stream stream);
    raddle_status (*logprobs)(int32_t device, const raddle_ops_logprobs_params *params,
                              raddle_stream stream);
    /* Fills linear->weight and linear->bias; the tensors are on the host or on linear->device. What
     * it made before it failed is left to linear_release. */
    raddle_status (*linear_pack)(raddle_ops_linear *linear, const raddle_tensor *weight,
                                 const raddle_tensor *bias, raddle_stream stream);
    raddle_status (*linear_run)(const raddle_ops_linear *linear, const raddle_ops_linear_args *args,
                                raddle_stream stream);
    void (*linear_release)(raddle_ops_linear *linear);
} raddle_ops_backend;

extern const raddle_ops_backend raddle_ops_backend_cpu;
extern const raddle_ops_backend raddle_ops_backend_cuda;

const raddle_ops_backend *raddle_ops_backend_for(raddle_device device);

/* ---------------------------------------------------------------- checks, ops_check.c */

/* The leading dimensions of up to three tensors of equal leading extents, joined to two levels. */
typedef struct raddle_ops_rows {
    int64_t rows, heads;
    int64_t stride_row[3], stride_head[3];
} raddle_ops_rows;

raddle_status raddle_ops_join_rows(const raddle_tensor *const *tensors, int num_tensors,
                                   raddle_ops_rows *out_rows);
/* float32, float16 or bfloat16. */
raddle_status raddle_ops_check_float(const raddle_tensor *tensor);
/* An input on like's device (NULL: its own), innermost stride 1. */
raddle_status raddle_ops_check_input(const raddle_tensor *tensor, const raddle_tensor *like);
/* The same for what is written: also writable and without overlap. */
raddle_status raddle_ops_check_output(const raddle_tensor *tensor, const raddle_tensor *like);
/* [n, vocab], float, vocab at least 1: logits, or probabilities. */
raddle_status raddle_ops_check_logits(const raddle_tensor *logits);
raddle_status raddle_ops_check_result(const raddle_tensor *tensor, const raddle_tensor *like,
                                      int ndim, const int64_t *shape, raddle_dtype dtype);
/* [n] int32 or int64 on like's device. */
raddle_status raddle_ops_check_indices(const raddle_tensor *tensor, const raddle_tensor *like,
                                       int64_t n);
/* Extents that a kernel holds in 32 bits. */
raddle_status raddle_ops_check_extent(const raddle_tensor *tensor, const char *what,
                                      int64_t extent);

#endif

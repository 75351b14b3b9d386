/* ops_cuda_linear.c - the CUDA back end of linear layers: a row-major weight, multiplied by
 * ops_linear.cu where few rows leave nothing to do but to read it, else by cublasLt.
 *
 * A weight that is on the device already is used where it lies. The bias is kept twice where the
 * weight is not float32: cublasLt wants it in the type of the result, which may be either.
 */
#include "ops/ops_cuda.h"

#include <limits.h>

#include "base/alloc.h"
#include "cpu/vec.h"
#include "cuda/blas.h"
#include "runtime/backend.h"

/* linear->bias: dtype values, then float32 ones at float_offset. */
static size_t bias_float_offset(const raddle_ops_linear *linear) {
    const size_t bytes = (size_t)linear->out_features * raddle_dtype_bytes(linear->dtype);
    return (bytes + 255) / 256 * 256;
}

/* A dense copy of a host tensor of 1 or 2 dimensions; raddle_free it. */
static raddle_status copy_dense(const raddle_tensor *tensor, void **out_copy) {
    const size_t element = raddle_dtype_bytes(tensor->dtype);
    const size_t bytes = (size_t)raddle_tensor_count(tensor) * element;
    const int64_t rows = tensor->ndim == 2 ? tensor->shape[0] : 1;
    const int last = tensor->ndim - 1;
    char *copy = raddle_alloc(bytes);
    if (!copy) {
        return raddle_fail_memory(bytes);
    }
    char *to = copy;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = 0; i < tensor->shape[last]; i++, to += element) {
            const int64_t at = row * (last ? tensor->stride[0] : 0) + i * tensor->stride[last];
            const char *from = (const char *)tensor->data + at * (int64_t)element;
            for (size_t byte = 0; byte < element; byte++) {
                to[byte] = from[byte];
            }
        }
    }
    *out_copy = copy;
    return RADDLE_OK;
}

/* New device memory with bytes of the host; the host's may go when this returns. */
static raddle_status upload(const raddle_backend *backend, int32_t device, const void *host,
                            size_t bytes, raddle_stream stream, void **out_data) {
    void *data;
    RADDLE_TRY(backend->alloc(device, bytes, &data));
    raddle_status status = backend->copy(device, data, host, bytes, RADDLE_COPY_TO_DEVICE, stream);
    if (status == RADDLE_OK) {
        status = backend->synchronize(device, stream);
    }
    if (status != RADDLE_OK) {
        backend->free(device, data);
        return status;
    }
    *out_data = data;
    return RADDLE_OK;
}

static raddle_status pack_weight(raddle_ops_linear *linear, const raddle_backend *backend,
                                 const raddle_tensor *weight, raddle_stream stream) {
    if (weight->device.type == RADDLE_CUDA) {
        RADDLE_TRY(raddle_tensor_check_inner_contiguous(weight));
        linear->weight = weight->data;
        linear->weight_stride_row = weight->stride[0];
        return RADDLE_OK;
    }
    const size_t bytes = (size_t)raddle_tensor_count(weight) * raddle_dtype_bytes(weight->dtype);
    void *dense = NULL;
    if (!raddle_tensor_is_contiguous(weight)) {
        RADDLE_TRY(copy_dense(weight, &dense));
    }
    const raddle_status status = upload(backend, linear->device.index, dense ? dense : weight->data,
                                        bytes, stream, &linear->weight);
    raddle_free(dense);
    linear->weight_owned = status == RADDLE_OK;
    linear->weight_stride_row = linear->in_features;
    return status;
}

/* A dense host copy of bias, wherever it lies. */
static raddle_status fetch_bias(const raddle_backend *backend, const raddle_tensor *bias,
                                raddle_stream stream, void **out_copy) {
    if (bias->device.type == RADDLE_CPU) {
        return copy_dense(bias, out_copy);
    }
    RADDLE_TRY(raddle_tensor_check_inner_contiguous(bias));
    const size_t bytes = (size_t)bias->shape[0] * raddle_dtype_bytes(bias->dtype);
    void *copy = raddle_alloc(bytes);
    if (!copy) {
        return raddle_fail_memory(bytes);
    }
    const int32_t device = bias->device.index;
    raddle_status status =
        backend->copy(device, copy, bias->data, bytes, RADDLE_COPY_TO_HOST, stream);
    if (status == RADDLE_OK) {
        status = backend->synchronize(device, stream);
    }
    if (status != RADDLE_OK) {
        raddle_free(copy);
        return status;
    }
    *out_copy = copy;
    return RADDLE_OK;
}

static raddle_status pack_bias(raddle_ops_linear *linear, const raddle_backend *backend,
                               const raddle_tensor *bias, raddle_stream stream) {
    const raddle_vec *vec = raddle_vec_get();
    const size_t offset = bias_float_offset(linear);
    const size_t bytes = offset + (size_t)linear->out_features * sizeof(float);
    void *given;
    RADDLE_TRY(fetch_bias(backend, bias, stream, &given));
    char *both = raddle_alloc_zero(bytes);
    if (!both) {
        raddle_free(given);
        return raddle_fail_memory(bytes);
    }
    float *wide = (float *)(void *)(both + offset);
    vec->load[bias->dtype](wide, given, linear->out_features);
    vec->store[linear->dtype](both, wide, linear->out_features);
    const raddle_status status =
        upload(backend, linear->device.index, both, bytes, stream, &linear->bias);
    raddle_free(both);
    raddle_free(given);
    return status;
}

/* ---------------------------------------------------------------- few rows */

static raddle_ops_config direct_config(const raddle_ops_linear *linear, raddle_dtype out_dtype) {
    return (raddle_ops_config){
        .kernel = RADDLE_OPS_LINEAR,
        .dtype = linear->dtype,
        .is_vector = true,
        .variant = out_dtype == RADDLE_F32 ? RADDLE_OPS_LINEAR_F32_OUT : 0,
    };
}

/* Whether rows of this layer can be read 16 bytes at a time, and its outputs counted in 31 bits. */
static bool has_direct(const raddle_ops_linear *linear) {
    const int64_t elements = linear->weight_stride_row | linear->in_features;
    return linear->dtype != RADDLE_F32 && (uintptr_t)linear->weight % 16 == 0 &&
           elements % 8 == 0 && linear->out_features <= INT_MAX - RADDLE_OPS_LINEAR_OUTPUTS;
}

static bool is_direct(const raddle_ops_linear *linear, const raddle_ops_linear_args *args) {
    return args->rows <= RADDLE_OPS_LINEAR_ROWS && has_direct(linear) &&
           (uintptr_t)args->x % 16 == 0 && args->x_stride_row % 8 == 0;
}

static raddle_status run_direct(const raddle_cuda_device *device, const raddle_ops_linear *linear,
                                const raddle_ops_linear_args *args, raddle_stream stream) {
    const raddle_ops_linear_params params = {
        .x = args->x,
        .w = linear->weight,
        .bias = linear->bias
                    ? (const void *)((const char *)linear->bias + bias_float_offset(linear))
                    : NULL,
        .out = args->out,
        .x_stride = args->x_stride_row,
        .w_stride = linear->weight_stride_row,
        .out_stride = args->out_stride_row,
        .rows = args->rows,
        .in_features = (int32_t)linear->in_features,
        .out_features = (int32_t)linear->out_features,
    };
    const raddle_ops_config config = direct_config(linear, args->out_dtype);
    const int64_t tiles =
        (linear->out_features + RADDLE_OPS_LINEAR_OUTPUTS - 1) / RADDLE_OPS_LINEAR_OUTPUTS;
    const bool is_bounded = args->max_sms > 0 && args->max_sms < device->num_sms;
    const int64_t sms = is_bounded ? args->max_sms : device->num_sms;
    const int64_t ctas = RADDLE_OPS_LINEAR_CTAS_PER_SM * sms;
    return raddle_ops_cuda_launch(device->index, &config, tiles < ctas ? tiles : ctas, 1,
                                  32 * RADDLE_OPS_LINEAR_WARPS, &params, stream);
}

/* ---------------------------------------------------------------- the layer */

raddle_status raddle_ops_cuda_linear_pack(raddle_ops_linear *linear, const raddle_tensor *weight,
                                          const raddle_tensor *bias, raddle_stream stream) {
    const raddle_backend *backend;
    const raddle_cuda_device *device;
    RADDLE_REQUIRE(linear->in_features >= 1, RADDLE_ERR_UNSUPPORTED, "%s: in_features of 0 on CUDA",
                   weight->name);
    RADDLE_TRY(raddle_backend_for(linear->device, &backend));
    RADDLE_TRY(raddle_cuda_device_get(linear->device.index, &device));
    RADDLE_TRY(raddle_blas_prepare(device));
    if (linear->out_features == 0) {
        return RADDLE_OK;
    }
    RADDLE_TRY(pack_weight(linear, backend, weight, stream));
    if (has_direct(linear)) {
        const raddle_ops_config same = direct_config(linear, linear->dtype);
        const raddle_ops_config wide = direct_config(linear, RADDLE_F32);
        RADDLE_TRY(raddle_ops_cuda_prepare(device->index, &same));
        RADDLE_TRY(raddle_ops_cuda_prepare(device->index, &wide));
        /* The kernel does not wait for what was launched before it to read the weight. */
        RADDLE_TRY(backend->synchronize(device->index, stream));
    }
    return bias ? pack_bias(linear, backend, bias, stream) : RADDLE_OK;
}

raddle_status raddle_ops_cuda_linear_run(const raddle_ops_linear *linear,
                                         const raddle_ops_linear_args *args, raddle_stream stream) {
    const raddle_cuda_device *device;
    const bool is_wide = args->out_dtype == RADDLE_F32;
    RADDLE_TRY(raddle_cuda_device_get(linear->device.index, &device));
    if (is_direct(linear, args)) {
        return run_direct(device, linear, args, stream);
    }
    const raddle_blas_gemm_args gemm = {
        .m = args->rows,
        .n = linear->out_features,
        .k = linear->in_features,
        .x = args->x,
        .w = linear->weight,
        .bias = linear->bias
                    ? (const char *)linear->bias + (is_wide ? bias_float_offset(linear) : 0)
                    : NULL,
        .y = args->out,
        .x_stride = args->x_stride_row,
        .w_stride = linear->weight_stride_row,
        .y_stride = args->out_stride_row,
        .dtype = linear->dtype,
        .y_dtype = args->out_dtype,
        .max_sms = args->max_sms < device->num_sms ? args->max_sms : 0,
    };
    return raddle_blas_gemm(device, &gemm, stream);
}

void raddle_ops_cuda_linear_release(raddle_ops_linear *linear) {
    const raddle_backend *backend;
    if ((!linear->weight_owned && !linear->bias) ||
        raddle_backend_for(linear->device, &backend) != RADDLE_OK) {
        return; /* nothing was allocated there */
    }
    if (linear->weight_owned) {
        backend->free(linear->device.index, linear->weight);
    }
    backend->free(linear->device.index, linear->bias);
}

/* ops_linear.c - the life of a linear layer: checks, creation, runs, release. */
#include "ops/ops_backend.h"

#include "base/alloc.h"

static bool is_host_or(const raddle_tensor *tensor, raddle_device device) {
    return tensor->device.type == RADDLE_CPU || raddle_device_equal(tensor->device, device);
}

static raddle_status check_weight(const raddle_tensor *weight, const raddle_tensor *bias,
                                  raddle_device device) {
    char text[2][16];
    RADDLE_TRY(raddle_tensor_check_shape(weight, 2, (const int64_t[]){-1, -1}));
    RADDLE_TRY(raddle_ops_check_float(weight));
    RADDLE_TRY(raddle_ops_check_extent(weight, "an extent", weight->shape[0]));
    RADDLE_TRY(raddle_ops_check_extent(weight, "an extent", weight->shape[1]));
    RADDLE_REQUIRE(is_host_or(weight, device), RADDLE_ERR_DEVICE,
                   "%s: expected it on the CPU or on %s, where the layer will run, got %s",
                   weight->name, raddle_device_text(device, text[0]),
                   raddle_device_text(weight->device, text[1]));
    if (!bias) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_shape(bias, 1, weight->shape));
    RADDLE_REQUIRE(bias->dtype == weight->dtype || bias->dtype == RADDLE_F32, RADDLE_ERR_DTYPE,
                   "%s: expected %s as %s, or float32, got %s", bias->name,
                   raddle_dtype_name(weight->dtype), weight->name, raddle_dtype_name(bias->dtype));
    RADDLE_REQUIRE(is_host_or(bias, device), RADDLE_ERR_DEVICE,
                   "%s: expected it on the CPU or on %s, where the layer will run, got %s",
                   bias->name, raddle_device_text(device, text[0]),
                   raddle_device_text(bias->device, text[1]));
    return RADDLE_OK;
}

raddle_status raddle_ops_linear_create(const raddle_tensor *weight, const raddle_tensor *bias,
                                       raddle_device device, raddle_stream stream,
                                       raddle_ops_linear **out_linear) {
    RADDLE_TRY(check_weight(weight, bias, device));
    raddle_ops_linear *linear = raddle_alloc_zero(sizeof(*linear));
    if (!linear) {
        return raddle_fail_memory(sizeof(*linear));
    }
    linear->backend = raddle_ops_backend_for(device);
    linear->device = device;
    linear->out_features = weight->shape[0];
    linear->in_features = weight->shape[1];
    linear->dtype = weight->dtype;
    linear->has_bias = bias != NULL;
    const raddle_status status = linear->backend->linear_pack(linear, weight, bias, stream);
    if (status != RADDLE_OK) {
        raddle_ops_linear_destroy(linear);
        return status;
    }
    *out_linear = linear;
    return RADDLE_OK;
}

void raddle_ops_linear_destroy(raddle_ops_linear *linear) {
    if (!linear) {
        return;
    }
    linear->backend->linear_release(linear);
    raddle_free(linear);
}

raddle_status raddle_ops_linear_run(const raddle_ops_linear *linear, const raddle_tensor *x,
                                    const raddle_tensor *out, int32_t max_sms,
                                    raddle_stream stream) {
    RADDLE_TRY(raddle_ops_check_input(x, NULL));
    RADDLE_REQUIRE(max_sms >= 0, RADDLE_ERR_VALUE,
                   "max_sms: expected 0 (all) or more multiprocessors, got %d", (int)max_sms);
    RADDLE_REQUIRE(max_sms == 0 || linear->device.type == RADDLE_CUDA, RADDLE_ERR_UNSUPPORTED,
                   "max_sms: expected 0 on the CPU, which has no multiprocessors, got %d",
                   (int)max_sms);
    RADDLE_TRY(raddle_tensor_check_device(x, linear->device));
    RADDLE_TRY(raddle_tensor_check_dtype(x, linear->dtype));
    const int last = x->ndim - 1;
    RADDLE_REQUIRE(x->shape[last] == linear->in_features, RADDLE_ERR_SHAPE,
                   "%s: expected a last dimension of in_features = %lld, got %lld", x->name,
                   (long long)linear->in_features, (long long)x->shape[last]);
    int64_t shape[RADDLE_MAX_DIM];
    for (int d = 0; d < last; d++) {
        shape[d] = x->shape[d];
    }
    shape[last] = linear->out_features;
    RADDLE_TRY(raddle_tensor_check_shape(out, x->ndim, shape));
    RADDLE_REQUIRE(out->dtype == x->dtype || out->dtype == RADDLE_F32, RADDLE_ERR_DTYPE,
                   "%s: expected %s as %s, or float32, got %s", out->name,
                   raddle_dtype_name(x->dtype), x->name, raddle_dtype_name(out->dtype));
    RADDLE_TRY(raddle_ops_check_output(out, x));
    const raddle_tensor *tensors[2] = {x, out};
    raddle_ops_rows rows;
    RADDLE_TRY(raddle_ops_join_rows(tensors, 2, &rows));
    RADDLE_REQUIRE(rows.heads <= 1, RADDLE_ERR_SHAPE,
                   "%s: expected leading dimensions with one common stride; make it contiguous",
                   x->name);
    if (rows.rows == 0 || rows.heads == 0 || linear->out_features == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_linear_args args = {
        .x = x->data,
        .out = out->data,
        .x_stride_row = rows.stride_row[0],
        .out_stride_row = rows.stride_row[1],
        .rows = rows.rows,
        .x_dtype = x->dtype,
        .out_dtype = out->dtype,
        .max_sms = max_sms,
    };
    return linear->backend->linear_run(linear, &args, stream);
}

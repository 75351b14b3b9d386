/* ops_norm.c - norms: checks for both back ends. */
#include "ops/ops_backend.h"

#include <math.h>

/* [width], of x's dtype or float32. */
static raddle_status check_affine(const raddle_tensor *tensor, const raddle_tensor *x) {
    const int64_t width = x->shape[x->ndim - 1];
    RADDLE_TRY(raddle_tensor_check_shape(tensor, 1, &width));
    RADDLE_TRY(raddle_ops_check_float(tensor));
    RADDLE_REQUIRE(tensor->dtype == x->dtype || tensor->dtype == RADDLE_F32, RADDLE_ERR_DTYPE,
                   "%s: expected %s as %s, or float32, got %s", tensor->name,
                   raddle_dtype_name(x->dtype), x->name, raddle_dtype_name(tensor->dtype));
    return raddle_ops_check_input(tensor, x);
}

/* The number that an 8-bit result is divided by, or where a kernel finds it. */
static raddle_status fill_scale(const raddle_ops_norm_args *args, raddle_ops_norm_params *params) {
    const raddle_tensor *scale = args->scale_tensor;
    params->scale_value = args->scale;
    if (scale) {
        RADDLE_REQUIRE(scale->ndim <= 1 && raddle_tensor_count(scale) == 1, RADDLE_ERR_SHAPE,
                       "%s: expected a number or a tensor with one, got %d dimensions", scale->name,
                       (int)scale->ndim);
        RADDLE_TRY(raddle_tensor_check_dtype(scale, RADDLE_F32));
        if (scale->device.type == RADDLE_CUDA) {
            RADDLE_TRY(raddle_tensor_check_device(scale, args->x->device));
            params->scale = scale->data;
            return RADDLE_OK;
        }
        params->scale_value = *(const float *)scale->data;
    }
    RADDLE_REQUIRE(params->scale_value > 0 && isfinite(params->scale_value), RADDLE_ERR_VALUE,
                   "scale: expected a finite number above 0, got %g", (double)params->scale_value);
    return RADDLE_OK;
}

static raddle_status check_out(const raddle_ops_norm_args *args) {
    const raddle_tensor *x = args->x, *out = args->out;
    const bool is_fp8 = out->dtype == RADDLE_F8_E4M3 || out->dtype == RADDLE_F8_E5M2;
    RADDLE_TRY(raddle_tensor_check_shape(out, x->ndim, x->shape));
    RADDLE_REQUIRE(is_fp8 || out->dtype == x->dtype, RADDLE_ERR_DTYPE,
                   "%s: expected %s as %s, float8_e4m3fn or float8_e5m2, got %s", out->name,
                   raddle_dtype_name(x->dtype), x->name, raddle_dtype_name(out->dtype));
    RADDLE_REQUIRE(is_fp8 || (!args->scale_tensor && args->scale == 1.0f), RADDLE_ERR_UNSUPPORTED,
                   "scale: only a float8 %s is scaled, this one is %s", out->name,
                   raddle_dtype_name(out->dtype));
    return raddle_ops_check_output(out, x);
}

static raddle_status check_residual(const raddle_ops_norm_args *args) {
    const raddle_tensor *x = args->x, *residual = args->residual;
    RADDLE_TRY(raddle_tensor_check_shape(residual, x->ndim, x->shape));
    RADDLE_TRY(raddle_tensor_check_dtype(residual, x->dtype));
    RADDLE_TRY(raddle_ops_check_output(residual, x));
    RADDLE_REQUIRE(residual->data != x->data || raddle_tensor_count(x) == 0, RADDLE_ERR_VALUE,
                   "%s: is the same memory as %s", residual->name, x->name);
    RADDLE_REQUIRE(residual->data != args->out->data || raddle_tensor_count(x) == 0,
                   RADDLE_ERR_VALUE, "%s: is the same memory as %s; both are written",
                   residual->name, args->out->name);
    return RADDLE_OK;
}

raddle_status raddle_ops_norm(const raddle_ops_norm_args *args, raddle_stream stream) {
    const raddle_tensor *x = args->x, *out = args->out;
    raddle_ops_rows rows;
    RADDLE_TRY(raddle_ops_check_float(x));
    RADDLE_TRY(raddle_ops_check_input(x, NULL));
    RADDLE_REQUIRE(args->eps >= 0 && isfinite(args->eps), RADDLE_ERR_VALUE,
                   "eps: expected a finite number of at least 0, got %g", (double)args->eps);
    RADDLE_REQUIRE(isfinite(args->weight_offset), RADDLE_ERR_VALUE,
                   "weight_offset: expected a finite number, got %g", (double)args->weight_offset);
    RADDLE_TRY(check_affine(args->weight, x));
    if (args->bias) {
        RADDLE_TRY(check_affine(args->bias, x));
        RADDLE_TRY(raddle_tensor_check_dtype(args->bias, args->weight->dtype));
    }
    RADDLE_TRY(check_out(args));
    if (args->residual) {
        RADDLE_TRY(check_residual(args));
    }
    const raddle_tensor *tensors[3] = {x, out, args->residual};
    RADDLE_TRY(raddle_ops_join_rows(tensors, args->residual ? 3 : 2, &rows));
    const int64_t width = x->shape[x->ndim - 1];
    RADDLE_TRY(raddle_ops_check_extent(x, "a last dimension", width));
    RADDLE_TRY(raddle_ops_check_extent(x, "a head count", rows.heads));
    raddle_ops_norm_params params = {
        .x = x->data,
        .residual = args->residual ? args->residual->data : NULL,
        .weight = args->weight->data,
        .bias = args->bias ? args->bias->data : NULL,
        .out = out->data,
        .x_stride_row = rows.stride_row[0],
        .x_stride_head = rows.stride_head[0],
        .residual_stride_row = rows.stride_row[2],
        .residual_stride_head = rows.stride_head[2],
        .out_stride_row = rows.stride_row[1],
        .out_stride_head = rows.stride_head[1],
        .rows = rows.rows,
        .heads = (int32_t)rows.heads,
        .width = (int32_t)width,
        .dtype = (int32_t)x->dtype,
        .weight_dtype = (int32_t)args->weight->dtype,
        .is_centered = args->bias != NULL,
        .out_is_fp8 = out->dtype != x->dtype,
        .out_is_e5m2 = out->dtype == RADDLE_F8_E5M2,
        .eps = args->eps,
        .weight_offset = args->weight_offset,
    };
    RADDLE_TRY(fill_scale(args, &params));
    if (rows.rows == 0 || rows.heads == 0 || width == 0) {
        return RADDLE_OK;
    }
    return raddle_ops_backend_for(x->device)->norm(x->device.index, &params, stream);
}

/* ops_softmax.c - softmax and log-probabilities: checks for both back ends. */
#include "ops/ops_backend.h"

#include <math.h>

static raddle_status check_temperature(float temperature, int64_t row) {
    RADDLE_REQUIRE(temperature > 0 && isfinite(temperature), RADDLE_ERR_VALUE,
                   "temperature: expected a finite number above 0, got %g for row %lld",
                   (double)temperature, (long long)row);
    return RADDLE_OK;
}

/* A host array is read here, one on a device is not. */
static raddle_status check_temperatures(const raddle_tensor *temperature,
                                        const raddle_tensor *logits) {
    RADDLE_TRY(raddle_tensor_check_shape(temperature, 1, logits->shape));
    RADDLE_TRY(raddle_tensor_check_dtype(temperature, RADDLE_F32));
    RADDLE_TRY(raddle_tensor_check_device(temperature, logits->device));
    for (int64_t i = 0; logits->device.type == RADDLE_CPU && i < logits->shape[0]; i++) {
        RADDLE_TRY(
            check_temperature(((const float *)temperature->data)[i * temperature->stride[0]], i));
    }
    return RADDLE_OK;
}

raddle_status raddle_ops_softmax(const raddle_tensor *logits, float temperature,
                                 const raddle_tensor *temperatures, const raddle_tensor *out,
                                 raddle_stream stream) {
    RADDLE_TRY(raddle_ops_check_logits(logits));
    RADDLE_TRY(temperatures ? check_temperatures(temperatures, logits)
                            : check_temperature(temperature, 0));
    RADDLE_TRY(raddle_ops_check_result(out, logits, 2, logits->shape, RADDLE_F32));
    if (logits->shape[0] == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_softmax_params params = {
        .logits = logits->data,
        .out = out->data,
        .temperature = temperatures ? temperatures->data : NULL,
        .logits_stride_row = logits->stride[0],
        .out_stride_row = out->stride[0],
        .temperature_stride = temperatures ? temperatures->stride[0] : 0,
        .rows = logits->shape[0],
        .vocab = logits->shape[1],
        .inv_temperature = (float)(1.0 / (double)temperature),
        .dtype = (int32_t)logits->dtype,
    };
    return raddle_ops_backend_for(logits->device)->softmax(logits->device.index, &params, stream);
}

/* ---------------------------------------------------------------- log-probabilities */

raddle_status raddle_ops_token_logprobs(const raddle_tensor *logits, const raddle_tensor *ids,
                                        const raddle_tensor *logprobs, const raddle_tensor *top_ids,
                                        const raddle_tensor *top_logprobs, raddle_stream stream) {
    RADDLE_TRY(raddle_ops_check_logits(logits));
    const int64_t n = logits->shape[0];
    RADDLE_TRY(raddle_ops_check_indices(ids, logits, n));
    RADDLE_TRY(raddle_ops_check_result(logprobs, logits, 1, &n, RADDLE_F32));
    int64_t top = 0;
    if (top_ids) {
        RADDLE_TRY(
            raddle_ops_check_result(top_ids, logits, 2, (const int64_t[]){n, -1}, RADDLE_I32));
        top = top_ids->shape[1];
        RADDLE_REQUIRE(top <= logits->shape[1], RADDLE_ERR_VALUE,
                       "top: expected at most the vocabulary of %s, %lld, got %lld", logits->name,
                       (long long)logits->shape[1], (long long)top);
        RADDLE_TRY(raddle_ops_check_result(top_logprobs, logits, 2, (const int64_t[]){n, top},
                                           RADDLE_F32));
        RADDLE_REQUIRE(raddle_tensor_is_contiguous(top_ids) &&
                           raddle_tensor_is_contiguous(top_logprobs),
                       RADDLE_ERR_SHAPE, "%s, %s: expected contiguous tensors", top_ids->name,
                       top_logprobs->name);
    }
    RADDLE_REQUIRE(raddle_tensor_is_contiguous(logprobs), RADDLE_ERR_SHAPE,
                   "%s: expected a contiguous tensor", logprobs->name);
    if (n == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_logprobs_params params = {
        .logits = logits->data,
        .ids = ids->data,
        .logprobs = logprobs->data,
        .top_ids = top_ids ? top_ids->data : NULL,
        .top_logprobs = top_ids ? top_logprobs->data : NULL,
        .logits_stride_row = logits->stride[0],
        .ids_stride = ids->stride[0],
        .rows = n,
        .vocab = logits->shape[1],
        .top = (int32_t)top,
        .dtype = (int32_t)logits->dtype,
        .ids_are_i64 = ids->dtype == RADDLE_I64,
    };
    return raddle_ops_backend_for(logits->device)->logprobs(logits->device.index, &params, stream);
}

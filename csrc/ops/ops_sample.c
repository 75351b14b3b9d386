/* ops_sample.c - softmax, sampling and log-probabilities: checks for both back ends, and the
 * settings of every row brought into one form. */
#include "ops/ops_backend.h"

#include <math.h>

#include "base/alloc.h"

/* [n, vocab], float, vocab at least 1. */
static raddle_status check_logits(const raddle_tensor *logits) {
    RADDLE_TRY(raddle_tensor_check_shape(logits, 2, (const int64_t[]){-1, -1}));
    RADDLE_TRY(raddle_ops_check_float(logits));
    RADDLE_TRY(raddle_ops_check_input(logits, NULL));
    RADDLE_TRY(raddle_ops_check_extent(logits, "a vocabulary", logits->shape[1]));
    RADDLE_REQUIRE(logits->shape[1] >= 1, RADDLE_ERR_SHAPE,
                   "%s: expected a vocabulary of at least 1, got 0", logits->name);
    return RADDLE_OK;
}

static raddle_status check_result(const raddle_tensor *tensor, const raddle_tensor *logits,
                                  int ndim, const int64_t *shape, raddle_dtype dtype) {
    RADDLE_TRY(raddle_tensor_check_shape(tensor, ndim, shape));
    RADDLE_TRY(raddle_tensor_check_dtype(tensor, dtype));
    return raddle_ops_check_output(tensor, logits);
}

raddle_status raddle_ops_softmax(const raddle_tensor *logits, float temperature,
                                 const raddle_tensor *out, raddle_stream stream) {
    RADDLE_TRY(check_logits(logits));
    RADDLE_REQUIRE(temperature > 0 && isfinite(temperature), RADDLE_ERR_VALUE,
                   "temperature: expected a finite number above 0, got %g", (double)temperature);
    RADDLE_TRY(check_result(out, logits, 2, logits->shape, RADDLE_F32));
    if (logits->shape[0] == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_softmax_params params = {
        .logits = logits->data,
        .out = out->data,
        .logits_stride_row = logits->stride[0],
        .out_stride_row = out->stride[0],
        .rows = logits->shape[0],
        .vocab = logits->shape[1],
        .inv_temperature = (float)(1.0 / (double)temperature),
        .dtype = (int32_t)logits->dtype,
    };
    return raddle_ops_backend_for(logits->device)->softmax(logits->device.index, &params, stream);
}

/* ---------------------------------------------------------------- sample */

/* One field of the settings that may come as a tensor. */
typedef struct setting {
    const raddle_tensor *tensor;
    size_t offset; /* in raddle_ops_sample_row */
    bool is_float;
    raddle_dtype device_dtype; /* what a kernel reads */
} setting;

enum { NUM_SETTINGS = 6 };

static void list_settings(const raddle_ops_sample_args *args, setting settings[NUM_SETTINGS]) {
#define SETTING(field, is_float, dtype)                                                            \
    (setting){args->field, offsetof(raddle_ops_sample_row, field), is_float, dtype}
    settings[0] = SETTING(temperature, true, RADDLE_F32);
    settings[1] = SETTING(top_p, true, RADDLE_F32);
    settings[2] = SETTING(min_p, true, RADDLE_F32);
    settings[3] = SETTING(top_k, false, RADDLE_I32);
    settings[4] = SETTING(seed, false, RADDLE_I64);
    settings[5] = SETTING(offset, false, RADDLE_I64);
#undef SETTING
}

static raddle_status check_setting(const setting *s, const raddle_tensor *logits) {
    const raddle_tensor *t = s->tensor;
    RADDLE_TRY(raddle_tensor_check_shape(t, 1, logits->shape));
    if (t->device.type == RADDLE_CUDA) {
        RADDLE_TRY(raddle_tensor_check_device(t, logits->device));
        RADDLE_TRY(raddle_tensor_check_dtype(t, s->device_dtype));
        return raddle_tensor_check_inner_contiguous(t);
    }
    if (s->is_float) {
        RADDLE_REQUIRE(t->dtype == RADDLE_F32 || t->dtype == RADDLE_F64, RADDLE_ERR_DTYPE,
                       "%s: expected float32 or float64, got %s", t->name,
                       raddle_dtype_name(t->dtype));
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(t->dtype == RADDLE_I32 || t->dtype == RADDLE_I64 ||
                       (t->dtype == RADDLE_U64 && s->device_dtype == RADDLE_I64),
                   RADDLE_ERR_DTYPE, "%s: expected int32 or int64, got %s", t->name,
                   raddle_dtype_name(t->dtype));
    return RADDLE_OK;
}

/* A value that int32 cannot hold is put where the check of the row refuses it. */
static int32_t clamp_to_i32(int64_t value) {
    return value > INT32_MAX ? INT32_MAX : value < INT32_MIN ? INT32_MIN : (int32_t)value;
}

static void read_setting(const setting *s, raddle_ops_sample_row *rows, int64_t n) {
    const raddle_tensor *t = s->tensor;
    for (int64_t i = 0; i < n; i++) {
        char *field = (char *)&rows[i] + s->offset;
        const int64_t at = i * t->stride[0];
        if (s->is_float) {
            *(float *)(void *)field = t->dtype == RADDLE_F64 ? (float)((const double *)t->data)[at]
                                                             : ((const float *)t->data)[at];
        } else if (s->device_dtype == RADDLE_I32) {
            *(int32_t *)(void *)field = clamp_to_i32(raddle_tensor_index_at(t, i));
        } else {
            *(uint64_t *)(void *)field = t->dtype == RADDLE_U64
                                             ? ((const uint64_t *)t->data)[at]
                                             : (uint64_t)raddle_tensor_index_at(t, i);
        }
    }
}

/* Refuses what cannot be; a value that a device array replaces is a default and passes. */
static raddle_status check_row(const raddle_ops_sample_row *row, int64_t i) {
    RADDLE_REQUIRE(row->temperature >= 0 && isfinite(row->temperature), RADDLE_ERR_VALUE,
                   "temperature: expected a finite number of at least 0 (0 is greedy), got %g for "
                   "row %lld",
                   (double)row->temperature, (long long)i);
    RADDLE_REQUIRE(
        row->top_p > 0 && row->top_p <= 1, RADDLE_ERR_VALUE,
        "top_p: expected a number above 0 and at most 1 (1 keeps all), got %g for row %lld",
        (double)row->top_p, (long long)i);
    RADDLE_REQUIRE(row->min_p >= 0 && row->min_p <= 1, RADDLE_ERR_VALUE,
                   "min_p: expected a number from 0 (keeps all) to 1, got %g for row %lld",
                   (double)row->min_p, (long long)i);
    RADDLE_REQUIRE(row->top_k >= -1, RADDLE_ERR_VALUE,
                   "top_k: expected at least 1, or 0 or -1 for all, got %d for row %lld",
                   row->top_k, (long long)i);
    return RADDLE_OK;
}

static raddle_status check_sample(const raddle_ops_sample_args *args, const setting *settings,
                                  bool *out_from_tensors) {
    const raddle_tensor *logits = args->logits;
    const int64_t n = logits->shape[0];
    RADDLE_TRY(check_result(args->out, logits, 1, &n, RADDLE_I32));
    RADDLE_REQUIRE(args->num_rows == 1 || args->num_rows == n, RADDLE_ERR_SHAPE,
                   "settings: expected one value, or one for each of the %lld rows of %s, got %lld",
                   (long long)n, logits->name, (long long)args->num_rows);
    for (int i = 0; i < NUM_SETTINGS; i++) {
        if (settings[i].tensor) {
            RADDLE_TRY(check_setting(&settings[i], logits));
            *out_from_tensors |= settings[i].tensor->device.type == RADDLE_CPU;
        }
    }
    return RADDLE_OK;
}

static const void *device_array(const raddle_tensor *tensor) {
    return tensor && tensor->device.type == RADDLE_CUDA ? tensor->data : NULL;
}

static raddle_status run_sample(const raddle_ops_sample_args *args,
                                const raddle_ops_sample_row *rows, bool per_row,
                                raddle_stream stream) {
    const raddle_tensor *logits = args->logits;
    for (int64_t i = 0; i < (per_row ? logits->shape[0] : 1); i++) {
        RADDLE_TRY(check_row(&rows[i], i));
    }
    const raddle_ops_sample_job job = {
        .logits = logits->data,
        .out = args->out->data,
        .logits_stride_row = logits->stride[0],
        .out_stride = args->out->stride[0],
        .rows = logits->shape[0],
        .vocab = logits->shape[1],
        .dtype = logits->dtype,
        .settings = rows,
        .settings_step = per_row,
        .temperature = device_array(args->temperature),
        .top_p = device_array(args->top_p),
        .min_p = device_array(args->min_p),
        .top_k = device_array(args->top_k),
        .seed = device_array(args->seed),
        .offset = device_array(args->offset),
    };
    return raddle_ops_backend_for(logits->device)->sample(logits->device.index, &job, stream);
}

raddle_status raddle_ops_sample(const raddle_ops_sample_args *args, raddle_stream stream) {
    const raddle_tensor *logits = args->logits;
    setting settings[NUM_SETTINGS];
    bool from_tensors = false; /* of the host: read into rows of our own */
    list_settings(args, settings);
    RADDLE_TRY(check_logits(logits));
    RADDLE_TRY(check_sample(args, settings, &from_tensors));
    const int64_t n = logits->shape[0];
    if (n == 0) {
        return RADDLE_OK;
    }
    if (!from_tensors) {
        return run_sample(args, args->rows, args->num_rows != 1, stream);
    }
    const size_t bytes = (size_t)n * sizeof(raddle_ops_sample_row);
    raddle_ops_sample_row *rows = raddle_alloc(bytes);
    if (!rows) {
        return raddle_fail_memory(bytes);
    }
    for (int64_t i = 0; i < n; i++) {
        rows[i] = args->rows[args->num_rows == 1 ? 0 : i];
    }
    for (int i = 0; i < NUM_SETTINGS; i++) {
        if (settings[i].tensor && settings[i].tensor->device.type == RADDLE_CPU) {
            read_setting(&settings[i], rows, n);
        }
    }
    const raddle_status status = run_sample(args, rows, true, stream);
    raddle_free(rows);
    return status;
}

/* ---------------------------------------------------------------- log-probabilities */

raddle_status raddle_ops_token_logprobs(const raddle_tensor *logits, const raddle_tensor *ids,
                                        const raddle_tensor *logprobs, const raddle_tensor *top_ids,
                                        const raddle_tensor *top_logprobs, raddle_stream stream) {
    RADDLE_TRY(check_logits(logits));
    const int64_t n = logits->shape[0];
    RADDLE_TRY(raddle_ops_check_indices(ids, logits, n));
    RADDLE_TRY(check_result(logprobs, logits, 1, &n, RADDLE_F32));
    int64_t top = 0;
    if (top_ids) {
        RADDLE_TRY(check_result(top_ids, logits, 2, (const int64_t[]){n, -1}, RADDLE_I32));
        top = top_ids->shape[1];
        RADDLE_REQUIRE(top <= logits->shape[1], RADDLE_ERR_VALUE,
                       "top: expected at most the vocabulary of %s, %lld, got %lld", logits->name,
                       (long long)logits->shape[1], (long long)top);
        RADDLE_TRY(check_result(top_logprobs, logits, 2, (const int64_t[]){n, top}, RADDLE_F32));
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

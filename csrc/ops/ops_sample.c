/* ops_sample.c - sampling, and what it leaves of rows: checks for both back ends, and the settings of
 * every row brought into one form. */
#include "ops/ops_backend.h"

#include <math.h>

#include "base/alloc.h"

/* ---------------------------------------------------------------- settings */

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

/* Of the n rows of a call; 64-bit ones count modulo 2^64. */
static raddle_status check_setting(const setting *s, const raddle_tensor *x, int64_t n) {
    const raddle_tensor *t = s->tensor;
    const bool is_u64 = t->dtype == RADDLE_U64 && s->device_dtype == RADDLE_I64;
    RADDLE_TRY(raddle_tensor_check_shape(t, 1, &n));
    if (t->device.type == RADDLE_CUDA) {
        RADDLE_TRY(raddle_tensor_check_device(t, x->device));
        return is_u64 ? RADDLE_OK : raddle_tensor_check_dtype(t, s->device_dtype);
    }
    if (s->is_float) {
        RADDLE_REQUIRE(t->dtype == RADDLE_F32 || t->dtype == RADDLE_F64, RADDLE_ERR_DTYPE,
                       "%s: expected float32 or float64, got %s", t->name,
                       raddle_dtype_name(t->dtype));
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(t->dtype == RADDLE_I32 || t->dtype == RADDLE_I64 || is_u64, RADDLE_ERR_DTYPE,
                   "%s: expected int32 or int64, got %s", t->name, raddle_dtype_name(t->dtype));
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

static const void *device_array(const raddle_tensor *tensor) {
    return tensor && tensor->device.type == RADDLE_CUDA ? tensor->data : NULL;
}

static int64_t stride_of(const raddle_tensor *tensor) {
    return tensor ? tensor->stride[0] : 0;
}

/* ---------------------------------------------------------------- the call */

/* What both ends share: everything but where results go. */
static raddle_ops_sample_call make_call(const raddle_ops_sample_args *args, int64_t n) {
    return (raddle_ops_sample_call){
        .x = args->x->data,
        .indices = args->indices ? args->indices->data : NULL,
        .temperature = device_array(args->temperature),
        .top_p = device_array(args->top_p),
        .min_p = device_array(args->min_p),
        .top_k = device_array(args->top_k),
        .seed = device_array(args->seed),
        .offset = device_array(args->offset),
        .x_stride_row = args->x->stride[0],
        .indices_stride = stride_of(args->indices),
        .temperature_stride = stride_of(args->temperature),
        .top_p_stride = stride_of(args->top_p),
        .min_p_stride = stride_of(args->min_p),
        .top_k_stride = stride_of(args->top_k),
        .seed_stride = stride_of(args->seed),
        .offset_stride = stride_of(args->offset),
        .vocab = args->x->shape[1],
        .num_inputs = args->x->shape[0],
        .rows = n,
        .dtype = (int32_t)args->x->dtype,
        .is_probs = args->is_probs,
        .indices_are_i64 = args->indices && args->indices->dtype == RADDLE_I64,
        .is_joint = args->is_joint,
        .is_row_stream = args->is_row_stream,
    };
}

typedef raddle_status (*run_call)(int32_t device, const raddle_ops_sample_job *job,
                                  raddle_stream stream);

static raddle_status run_rows(const raddle_ops_sample_args *args, raddle_ops_sample_call *call,
                              const raddle_ops_sample_row *rows, bool per_row, run_call run,
                              raddle_stream stream) {
    for (int64_t i = 0; i < (per_row ? call->rows : 1); i++) {
        RADDLE_TRY(check_row(&rows[i], i));
    }
    call->settings_step = per_row;
    const raddle_ops_sample_job job = {.call = *call, .settings = rows};
    return run(args->x->device.index, &job, stream);
}

/* Reads the settings of the host into rows of our own, where there are any. */
static raddle_status run_with_settings(const raddle_ops_sample_args *args,
                                       raddle_ops_sample_call *call, run_call run,
                                       raddle_stream stream) {
    const int64_t n = call->rows;
    setting settings[NUM_SETTINGS];
    bool from_tensors = false;
    list_settings(args, settings);
    RADDLE_REQUIRE(args->num_rows == 1 || args->num_rows == n, RADDLE_ERR_SHAPE,
                   "settings: expected one value, or one for each of the %lld rows of %s, got %lld",
                   (long long)n, args->x->name, (long long)args->num_rows);
    for (int i = 0; i < NUM_SETTINGS; i++) {
        if (settings[i].tensor) {
            RADDLE_TRY(check_setting(&settings[i], args->x, n));
            from_tensors |= settings[i].tensor->device.type == RADDLE_CPU;
        }
    }
    if (n == 0) {
        return RADDLE_OK;
    }
    if (!from_tensors) {
        return run_rows(args, call, args->rows, args->num_rows != 1, run, stream);
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
    const raddle_status status = run_rows(args, call, rows, true, run, stream);
    raddle_free(rows);
    return status;
}

raddle_status raddle_ops_sample(const raddle_ops_sample_args *args, raddle_stream stream) {
    const raddle_tensor *x = args->x, *out = args->out;
    RADDLE_TRY(raddle_ops_check_logits(x));
    const int64_t n = args->indices ? args->indices->shape[0] : x->shape[0];
    if (args->indices) {
        RADDLE_TRY(raddle_ops_check_indices(args->indices, x, -1));
    }
    RADDLE_REQUIRE(out->dtype == RADDLE_I32 || out->dtype == RADDLE_I64, RADDLE_ERR_DTYPE,
                   "%s: expected int32 or int64, got %s", out->name, raddle_dtype_name(out->dtype));
    RADDLE_TRY(raddle_ops_check_result(out, x, 1, &n, out->dtype));
    raddle_ops_sample_call call = make_call(args, n);
    call.out = out->data;
    call.out_stride = out->stride[0];
    call.out_is_i64 = out->dtype == RADDLE_I64;
    if (args->valid) {
        RADDLE_REQUIRE(args->valid->dtype == RADDLE_BOOL || args->valid->dtype == RADDLE_U8,
                       RADDLE_ERR_DTYPE, "%s: expected bool or uint8, got %s", args->valid->name,
                       raddle_dtype_name(args->valid->dtype));
        RADDLE_TRY(raddle_ops_check_result(args->valid, x, 1, &n, args->valid->dtype));
        call.valid = args->valid->data;
        call.valid_stride = args->valid->stride[0];
    }
    return run_with_settings(args, &call, raddle_ops_backend_for(x->device)->sample, stream);
}

raddle_status raddle_ops_filter(const raddle_ops_sample_args *args, raddle_stream stream) {
    const raddle_tensor *x = args->x;
    RADDLE_TRY(raddle_ops_check_logits(x));
    RADDLE_TRY(raddle_ops_check_result(args->out, x, 2, x->shape, x->dtype));
    raddle_ops_sample_call call = make_call(args, x->shape[0]);
    call.out = args->out->data;
    call.out_stride = args->out->stride[0];
    return run_with_settings(args, &call, raddle_ops_backend_for(x->device)->filter, stream);
}

/* ops_rope.c - rotary embedding: the table of cosines and sines, and checks for both back ends. */
#include "ops/ops_backend.h"

#include <math.h>

#include "base/threads.h"

typedef struct fill_job {
    const double *inv_freq;
    int32_t half;
    double factor;
    const raddle_tensor *out;
} fill_job;

static void fill_rows(void *context, int64_t begin, int64_t end, int worker) {
    const fill_job *job = context;
    (void)worker;
    for (int64_t p = begin; p < end; p++) {
        float *row = (float *)job->out->data + p * job->out->stride[0];
        for (int32_t i = 0; i < job->half; i++) {
            const double angle = (double)p * job->inv_freq[i];
            row[i] = (float)(cos(angle) * job->factor);
            row[job->half + i] = (float)(sin(angle) * job->factor);
        }
    }
}

raddle_status raddle_ops_fill_cos_sin(const double *inv_freq, int32_t half, double factor,
                                      const raddle_tensor *out) {
    RADDLE_REQUIRE(half >= 1, RADDLE_ERR_VALUE, "rotary_dim: expected at least 2, got %d",
                   2 * half);
    RADDLE_REQUIRE(isfinite(factor), RADDLE_ERR_VALUE,
                   "attention_factor: expected a finite number, got %g", factor);
    for (int32_t i = 0; i < half; i++) {
        RADDLE_REQUIRE(isfinite(inv_freq[i]), RADDLE_ERR_VALUE,
                       "scaling: frequency %d is not finite (%g)", i, inv_freq[i]);
    }
    RADDLE_TRY(raddle_tensor_check_shape(out, 2, (const int64_t[]){-1, 2 * (int64_t)half}));
    RADDLE_TRY(raddle_tensor_check_dtype(out, RADDLE_F32));
    RADDLE_TRY(raddle_tensor_check_device(out, (raddle_device){RADDLE_CPU, 0}));
    RADDLE_TRY(raddle_ops_check_output(out, NULL));
    fill_job job = {inv_freq, half, factor, out};
    raddle_threads_for(fill_rows, &job, out->shape[0], 64);
    return RADDLE_OK;
}

/* [rows, heads, head_dim], written in place. */
static raddle_status check_heads(const raddle_tensor *x, const raddle_tensor *q) {
    RADDLE_TRY(raddle_tensor_check_shape(
        x, 3, (const int64_t[]){q ? q->shape[0] : -1, -1, q ? q->shape[2] : -1}));
    RADDLE_TRY(raddle_ops_check_float(x));
    if (q) {
        RADDLE_TRY(raddle_tensor_check_dtype(x, q->dtype));
    }
    RADDLE_TRY(raddle_ops_check_output(x, q));
    RADDLE_TRY(raddle_ops_check_extent(x, "a head count", x->shape[1]));
    return raddle_ops_check_extent(x, "a head_dim", x->shape[2]);
}

raddle_status raddle_ops_apply_rope(const raddle_tensor *q, const raddle_tensor *k,
                                    const raddle_tensor *positions, const raddle_tensor *cos_sin,
                                    bool interleave, raddle_stream stream) {
    RADDLE_TRY(check_heads(q, NULL));
    if (k) {
        RADDLE_TRY(check_heads(k, q));
    }
    RADDLE_TRY(raddle_ops_check_indices(positions, q, q->shape[0]));
    RADDLE_TRY(raddle_tensor_check_shape(cos_sin, 2, (const int64_t[]){-1, -1}));
    RADDLE_TRY(raddle_tensor_check_dtype(cos_sin, RADDLE_F32));
    RADDLE_TRY(raddle_ops_check_input(cos_sin, q));
    const int64_t rotary_dim = cos_sin->shape[1];
    RADDLE_REQUIRE(rotary_dim % 2 == 0 && rotary_dim <= q->shape[2], RADDLE_ERR_SHAPE,
                   "%s: expected an even width of at most the head_dim of %s, %lld, got %lld",
                   cos_sin->name, q->name, (long long)q->shape[2], (long long)rotary_dim);
    if (q->shape[0] == 0 || rotary_dim == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_rope_params params = {
        .q = q->data,
        .k = k ? k->data : NULL,
        .positions = positions->data,
        .cos_sin = cos_sin->data,
        .q_stride_row = q->stride[0],
        .q_stride_head = q->stride[1],
        .k_stride_row = k ? k->stride[0] : 0,
        .k_stride_head = k ? k->stride[1] : 0,
        .positions_stride = positions->stride[0],
        .cos_sin_stride_row = cos_sin->stride[0],
        .rows = q->shape[0],
        .max_position = cos_sin->shape[0],
        .num_qo_heads = (int32_t)q->shape[1],
        .num_kv_heads = k ? (int32_t)k->shape[1] : 0,
        .head_dim = (int32_t)q->shape[2],
        .rotary_dim = (int32_t)rotary_dim,
        .dtype = (int32_t)q->dtype,
        .positions_are_i64 = positions->dtype == RADDLE_I64,
        .interleave = interleave,
    };
    return raddle_ops_backend_for(q->device)->rope(q->device.index, &params, stream);
}

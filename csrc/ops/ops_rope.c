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

/* ---------------------------------------------------------------- rope */

/* [rows, heads, head_dim] and where it goes, itself or a tensor like it. */
static raddle_status check_heads(const raddle_tensor *x, const raddle_tensor *out,
                                 const raddle_tensor *q) {
    const int64_t shape[3] = {x == q ? -1 : q->shape[0], -1, x == q ? -1 : q->shape[2]};
    RADDLE_TRY(raddle_tensor_check_shape(x, 3, shape));
    RADDLE_TRY(raddle_ops_check_float(x));
    RADDLE_TRY(raddle_tensor_check_dtype(x, q->dtype));
    RADDLE_TRY(raddle_ops_check_input(x, q));
    RADDLE_TRY(raddle_tensor_check_shape(out, 3, x->shape));
    RADDLE_TRY(raddle_tensor_check_dtype(out, x->dtype));
    RADDLE_TRY(raddle_ops_check_output(out, q));
    RADDLE_TRY(raddle_ops_check_extent(x, "a head count", x->shape[1]));
    return raddle_ops_check_extent(x, "a head_dim", x->shape[2]);
}

static raddle_status check_where(const raddle_ops_rope_args *args) {
    const raddle_tensor *q = args->q;
    if (args->positions) {
        return raddle_ops_check_indices(args->positions, q, q->shape[0]);
    }
    RADDLE_REQUIRE(args->indptr && args->offsets, RADDLE_ERR_VALUE,
                   "positions: expected a tensor, or indptr and offsets in its place");
    RADDLE_TRY(raddle_ops_check_indices(args->indptr, q, -1));
    RADDLE_REQUIRE(args->indptr->shape[0] >= 1, RADDLE_ERR_SHAPE,
                   "%s: expected batch + 1 numbers, got none", args->indptr->name);
    return raddle_ops_check_indices(args->offsets, q, args->indptr->shape[0] - 1);
}

static raddle_status check_cos_sin(const raddle_tensor *cos_sin, const raddle_tensor *q) {
    RADDLE_TRY(raddle_tensor_check_shape(cos_sin, 2, (const int64_t[]){-1, -1}));
    RADDLE_TRY(raddle_tensor_check_dtype(cos_sin, RADDLE_F32));
    return raddle_ops_check_input(cos_sin, q);
}

static raddle_status check_rotary_dim(const raddle_ops_rope_args *args, int64_t *out_rotary_dim) {
    const raddle_tensor *q = args->q;
    if (!args->cos_sin) {
        *out_rotary_dim = 2 * args->num_turns;
        RADDLE_REQUIRE(args->num_turns >= 1 && args->num_turns <= RADDLE_OPS_MAX_TURNS &&
                           *out_rotary_dim <= q->shape[2],
                       RADDLE_ERR_SHAPE,
                       "rotary_dim: expected at most the head_dim of %s, %lld, and %d, got %lld",
                       q->name, (long long)q->shape[2], 2 * RADDLE_OPS_MAX_TURNS,
                       (long long)*out_rotary_dim);
        RADDLE_REQUIRE(isfinite(args->attention_factor), RADDLE_ERR_VALUE,
                       "attention_factor: expected a finite number, got %g",
                       (double)args->attention_factor);
        return RADDLE_OK;
    }
    RADDLE_TRY(check_cos_sin(args->cos_sin, q));
    *out_rotary_dim = args->cos_sin->shape[1];
    RADDLE_REQUIRE(
        *out_rotary_dim >= 2 && *out_rotary_dim % 2 == 0 && *out_rotary_dim <= q->shape[2],
        RADDLE_ERR_SHAPE,
        "%s: expected an even width of at least 2 and at most the head_dim of %s, %lld, "
        "got %lld",
        args->cos_sin->name, q->name, (long long)q->shape[2], (long long)*out_rotary_dim);
    return RADDLE_OK;
}

static int64_t stride_of(const raddle_tensor *tensor, int d) {
    return tensor ? tensor->stride[d] : 0;
}

static void *data_of(const raddle_tensor *tensor) {
    return tensor ? tensor->data : NULL;
}

static bool is_i64(const raddle_tensor *tensor) {
    return tensor && tensor->dtype == RADDLE_I64;
}

raddle_status raddle_ops_rope(const raddle_ops_rope_args *args, raddle_stream stream) {
    const raddle_tensor *q = args->q, *k = args->k;
    const raddle_tensor *q_out = args->q_out ? args->q_out : q;
    const raddle_tensor *k_out = args->q_out ? args->k_out : k;
    int64_t rotary_dim = 0;
    RADDLE_REQUIRE(!k == !k_out, RADDLE_ERR_VALUE, "k, k_out: expected both or none with q_out");
    RADDLE_TRY(check_heads(q, q_out, q));
    if (k) {
        RADDLE_TRY(check_heads(k, k_out, q));
    }
    RADDLE_TRY(check_where(args));
    RADDLE_TRY(check_rotary_dim(args, &rotary_dim));
    if (q->shape[0] == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_rope_params params = {
        .q = q->data,
        .k = data_of(k),
        .q_out = q_out->data,
        .k_out = data_of(k_out),
        .positions = data_of(args->positions),
        .indptr = data_of(args->indptr),
        .offsets = data_of(args->offsets),
        .cos_sin = data_of(args->cos_sin),
        .turns = args->turns,
        .q_stride_row = q->stride[0],
        .q_stride_head = q->stride[1],
        .k_stride_row = stride_of(k, 0),
        .k_stride_head = stride_of(k, 1),
        .q_out_stride_row = q_out->stride[0],
        .q_out_stride_head = q_out->stride[1],
        .k_out_stride_row = stride_of(k_out, 0),
        .k_out_stride_head = stride_of(k_out, 1),
        .positions_stride = stride_of(args->positions, 0),
        .indptr_stride = stride_of(args->indptr, 0),
        .offsets_stride = stride_of(args->offsets, 0),
        .cos_sin_stride_row = stride_of(args->cos_sin, 0),
        .rows = q->shape[0],
        .batch = args->indptr ? args->indptr->shape[0] - 1 : 0,
        .max_position = args->cos_sin ? args->cos_sin->shape[0] : 0,
        .num_qo_heads = (int32_t)q->shape[1],
        .num_kv_heads = k ? (int32_t)k->shape[1] : 0,
        .head_dim = (int32_t)q->shape[2],
        .rotary_dim = (int32_t)rotary_dim,
        .dtype = (int32_t)q->dtype,
        .positions_are_i64 = is_i64(args->positions),
        .indptr_is_i64 = is_i64(args->indptr),
        .offsets_are_i64 = is_i64(args->offsets),
        .interleave = args->interleave,
        .in_place = !args->q_out,
        .attention_factor = args->attention_factor,
    };
    return raddle_ops_backend_for(q->device)->rope(q->device.index, &params, stream);
}

/* ---------------------------------------------------------------- rope to 8 bits */

/* Checks a source and its target, and makes them part number of params. */
static raddle_status add_part(const raddle_ops_rope_fp8_args *args, const raddle_tensor *from,
                              const raddle_tensor *to, bool is_rotated, bool is_paged, float scale,
                              raddle_ops_fp8_part *part) {
    const raddle_tensor *q = args->q_rope;
    if (!from || !to) {
        const raddle_tensor *one = from ? from : to;
        RADDLE_REQUIRE(!one, RADDLE_ERR_VALUE, "%s: expected both its source and its target",
                       one->name);
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_shape(
        from, 3, (const int64_t[]){q->shape[0], -1, is_rotated ? q->shape[2] : -1}));
    RADDLE_TRY(raddle_tensor_check_dtype(from, q->dtype));
    RADDLE_TRY(raddle_ops_check_input(from, q));
    RADDLE_TRY(raddle_ops_check_extent(from, "a head count", from->shape[1]));
    RADDLE_TRY(raddle_ops_check_extent(from, "a width", from->shape[2]));
    RADDLE_TRY(raddle_tensor_check_dtype(to, args->q_rope_out->dtype));
    if (is_paged) {
        const raddle_tensor *first = args->k_rope_out;
        RADDLE_TRY(raddle_tensor_check_shape(to, 4,
                                             (const int64_t[]){first == to ? -1 : first->shape[0],
                                                               first == to ? -1 : first->shape[1],
                                                               from->shape[1], from->shape[2]}));
    } else {
        RADDLE_TRY(raddle_tensor_check_shape(to, 3, from->shape));
    }
    RADDLE_TRY(raddle_ops_check_output(to, q));
    *part = (raddle_ops_fp8_part){
        .from = from->data,
        .to = to->data,
        .from_stride_row = from->stride[0],
        .from_stride_head = from->stride[1],
        .to_stride_row = to->stride[is_paged ? 1 : 0],
        .to_stride_head = to->stride[is_paged ? 2 : 1],
        .to_stride_page = is_paged ? to->stride[0] : 0,
        .heads = (int32_t)from->shape[1],
        .width = (int32_t)from->shape[2],
        .is_rotated = is_rotated,
        .is_paged = is_paged,
        .scale = scale,
    };
    return RADDLE_OK;
}

static raddle_status check_pages(const raddle_ops_rope_fp8_args *args,
                                 raddle_ops_rope_fp8_params *params) {
    const raddle_tensor *q = args->q_rope;
    RADDLE_TRY(raddle_ops_check_indices(args->batch_indices, q, q->shape[0]));
    RADDLE_TRY(raddle_ops_check_indices(args->token_positions, q, q->shape[0]));
    RADDLE_TRY(raddle_ops_check_indices(args->kv_indptr, q, -1));
    RADDLE_TRY(raddle_ops_check_indices(args->kv_indices, q, -1));
    RADDLE_REQUIRE(args->kv_indptr->shape[0] >= 1, RADDLE_ERR_SHAPE,
                   "%s: expected batch + 1 numbers, got none", args->kv_indptr->name);
    RADDLE_REQUIRE(args->k_rope_out->shape[1] >= 1, RADDLE_ERR_SHAPE,
                   "%s: expected pages of at least 1 token, got 0", args->k_rope_out->name);
    params->requests = args->batch_indices->data;
    params->slots = args->token_positions->data;
    params->kv_indptr = args->kv_indptr->data;
    params->kv_indices = args->kv_indices->data;
    params->requests_stride = args->batch_indices->stride[0];
    params->slots_stride = args->token_positions->stride[0];
    params->kv_indptr_stride = args->kv_indptr->stride[0];
    params->kv_indices_stride = args->kv_indices->stride[0];
    params->requests_are_i64 = is_i64(args->batch_indices);
    params->slots_are_i64 = is_i64(args->token_positions);
    params->kv_indptr_is_i64 = is_i64(args->kv_indptr);
    params->kv_indices_are_i64 = is_i64(args->kv_indices);
    params->batch = args->kv_indptr->shape[0] - 1;
    params->num_indices = args->kv_indices->shape[0];
    params->num_pages = args->k_rope_out->shape[0];
    params->page_size = args->k_rope_out->shape[1];
    return RADDLE_OK;
}

raddle_status raddle_ops_rope_fp8(const raddle_ops_rope_fp8_args *args, raddle_stream stream) {
    const raddle_tensor *q = args->q_rope;
    const bool is_paged = args->batch_indices != NULL;
    raddle_ops_rope_fp8_params params = {0};
    RADDLE_TRY(raddle_tensor_check_shape(q, 3, (const int64_t[]){-1, -1, -1}));
    RADDLE_TRY(raddle_ops_check_float(q));
    RADDLE_REQUIRE(q->shape[2] >= 2 && q->shape[2] % 2 == 0, RADDLE_ERR_SHAPE,
                   "%s: expected an even width of at least 2, got %lld", q->name,
                   (long long)q->shape[2]);
    RADDLE_REQUIRE(args->q_rope_out->dtype == RADDLE_F8_E4M3 ||
                       args->q_rope_out->dtype == RADDLE_F8_E5M2,
                   RADDLE_ERR_DTYPE, "%s: expected float8_e4m3fn or float8_e5m2, got %s",
                   args->q_rope_out->name, raddle_dtype_name(args->q_rope_out->dtype));
    RADDLE_REQUIRE(isfinite(args->q_scale) && isfinite(args->kv_scale), RADDLE_ERR_VALUE,
                   "q_scale, kv_scale: expected finite numbers, got %g and %g",
                   (double)args->q_scale, (double)args->kv_scale);
    raddle_ops_fp8_part *parts = params.parts;
    RADDLE_TRY(add_part(args, q, args->q_rope_out, true, false, args->q_scale, &parts[0]));
    RADDLE_TRY(
        add_part(args, args->q_nope, args->q_nope_out, false, false, args->q_scale, &parts[1]));
    RADDLE_TRY(
        add_part(args, args->k_rope, args->k_rope_out, true, is_paged, args->kv_scale, &parts[2]));
    RADDLE_TRY(
        add_part(args, args->k_nope, args->k_nope_out, false, is_paged, args->kv_scale, &parts[3]));
    RADDLE_TRY(add_part(args, args->v, args->v_out, false, is_paged, args->kv_scale, &parts[4]));
    RADDLE_TRY(check_cos_sin(args->cos_sin, q));
    RADDLE_REQUIRE(args->cos_sin->shape[1] == q->shape[2], RADDLE_ERR_SHAPE,
                   "%s: expected the width of %s, %lld, got %lld", args->cos_sin->name, q->name,
                   (long long)q->shape[2], (long long)args->cos_sin->shape[1]);
    RADDLE_TRY(raddle_ops_check_indices(args->positions, q, q->shape[0]));
    if (is_paged) {
        RADDLE_TRY(check_pages(args, &params));
    }
    if (q->shape[0] == 0) {
        return RADDLE_OK;
    }
    params.positions = args->positions->data;
    params.cos_sin = args->cos_sin->data;
    params.positions_stride = args->positions->stride[0];
    params.cos_sin_stride_row = args->cos_sin->stride[0];
    params.rows = q->shape[0];
    params.max_position = args->cos_sin->shape[0];
    params.rotary_dim = (int32_t)q->shape[2];
    params.dtype = (int32_t)q->dtype;
    params.is_e5m2 = args->q_rope_out->dtype == RADDLE_F8_E5M2;
    params.interleave = args->interleave;
    params.positions_are_i64 = is_i64(args->positions);
    return raddle_ops_backend_for(q->device)->rope_fp8(q->device.index, &params, stream);
}

/* ops_elementwise.c - activations and the embedding: checks for both back ends. */
#include "ops/ops_backend.h"

raddle_status raddle_ops_act_and_mul(int32_t activation, const raddle_tensor *x,
                                     const raddle_tensor *out, raddle_stream stream) {
    RADDLE_REQUIRE(activation >= 0 && activation < RADDLE_OPS_NUM_ACTIVATIONS, RADDLE_ERR_VALUE,
                   "activation: no such number: %d", activation);
    RADDLE_TRY(raddle_ops_check_float(x));
    RADDLE_TRY(raddle_ops_check_input(x, NULL));
    const int last = x->ndim - 1;
    RADDLE_REQUIRE(x->shape[last] % 2 == 0, RADDLE_ERR_SHAPE,
                   "%s: expected an even last dimension (gate and up halves), got %lld", x->name,
                   (long long)x->shape[last]);
    int64_t shape[RADDLE_MAX_DIM];
    for (int d = 0; d < last; d++) {
        shape[d] = x->shape[d];
    }
    shape[last] = x->shape[last] / 2;
    RADDLE_TRY(raddle_tensor_check_shape(out, x->ndim, shape));
    RADDLE_TRY(raddle_tensor_check_dtype(out, x->dtype));
    RADDLE_TRY(raddle_ops_check_output(out, x));
    const raddle_tensor *tensors[2] = {x, out};
    raddle_ops_rows rows;
    RADDLE_TRY(raddle_ops_join_rows(tensors, 2, &rows));
    RADDLE_TRY(raddle_ops_check_extent(x, "a last dimension", x->shape[last]));
    RADDLE_TRY(raddle_ops_check_extent(x, "a second-last dimension", rows.heads));
    if (rows.rows == 0 || rows.heads == 0 || shape[last] == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_act_params params = {
        .x = x->data,
        .out = out->data,
        .x_stride_row = rows.stride_row[0],
        .x_stride_head = rows.stride_head[0],
        .out_stride_row = rows.stride_row[1],
        .out_stride_head = rows.stride_head[1],
        .rows = rows.rows,
        .heads = (int32_t)rows.heads,
        .width = (int32_t)shape[last],
        .dtype = (int32_t)x->dtype,
        .activation = activation,
    };
    return raddle_ops_backend_for(x->device)->act_and_mul(x->device.index, &params, stream);
}

raddle_status raddle_ops_embedding(const raddle_tensor *ids, const raddle_tensor *table,
                                   const raddle_tensor *out, raddle_stream stream) {
    RADDLE_TRY(raddle_tensor_check_shape(table, 2, (const int64_t[]){-1, -1}));
    RADDLE_TRY(raddle_ops_check_float(table));
    RADDLE_TRY(raddle_ops_check_input(table, NULL));
    RADDLE_TRY(raddle_ops_check_indices(ids, table, -1));
    const int64_t n = ids->shape[0];
    const int64_t width = table->shape[1];
    RADDLE_TRY(raddle_tensor_check_shape(out, 2, (const int64_t[]){n, width}));
    RADDLE_TRY(raddle_tensor_check_dtype(out, table->dtype));
    RADDLE_TRY(raddle_ops_check_output(out, table));
    RADDLE_TRY(raddle_ops_check_extent(table, "a last dimension", width));
    if (n == 0 || width == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_embedding_params params = {
        .ids = ids->data,
        .table = table->data,
        .out = out->data,
        .ids_stride = ids->stride[0],
        .table_stride_row = table->stride[0],
        .out_stride_row = out->stride[0],
        .rows = n,
        .vocab = table->shape[0],
        .width = (int32_t)width,
        .dtype = (int32_t)table->dtype,
        .ids_are_i64 = ids->dtype == RADDLE_I64,
    };
    return raddle_ops_backend_for(table->device)->embedding(table->device.index, &params, stream);
}

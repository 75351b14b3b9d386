/* ops_verify.c - speculative decoding of a chain: checks for both back ends. */
#include "ops/ops_backend.h"

/* [n] int32 or NULL. */
static raddle_status check_counter(const raddle_tensor *counter, const raddle_tensor *draft) {
    return counter ? raddle_ops_check_result(counter, draft, 1, draft->shape, RADDLE_I32)
                   : RADDLE_OK;
}

/* [n] int64 or uint64 on draft's device, or NULL. */
static raddle_status check_numbers(const raddle_tensor *numbers, const raddle_tensor *draft) {
    if (!numbers) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_shape(numbers, 1, draft->shape));
    RADDLE_REQUIRE(numbers->dtype == RADDLE_I64 || numbers->dtype == RADDLE_U64, RADDLE_ERR_DTYPE,
                   "%s: expected int64 or uint64, got %s", numbers->name,
                   raddle_dtype_name(numbers->dtype));
    return raddle_tensor_check_device(numbers, draft->device);
}

static void *data_of(const raddle_tensor *tensor) {
    return tensor ? tensor->data : NULL;
}

static int64_t stride_of(const raddle_tensor *tensor) {
    return tensor ? tensor->stride[0] : 0;
}

raddle_status raddle_ops_verify(const raddle_ops_verify_args *args, raddle_stream stream) {
    const raddle_tensor *draft = args->draft, *target = args->target, *ids = args->ids;
    RADDLE_TRY(raddle_tensor_check_shape(draft, 3, (const int64_t[]){-1, -1, -1}));
    RADDLE_TRY(raddle_ops_check_float(draft));
    RADDLE_TRY(raddle_ops_check_input(draft, NULL));
    const int64_t n = draft->shape[0], steps = draft->shape[1], vocab = draft->shape[2];
    RADDLE_TRY(raddle_tensor_check_shape(target, 3, (const int64_t[]){n, steps + 1, vocab}));
    RADDLE_TRY(raddle_tensor_check_dtype(target, draft->dtype));
    RADDLE_TRY(raddle_ops_check_input(target, draft));
    RADDLE_TRY(raddle_ops_check_extent(draft, "a vocabulary", vocab));
    RADDLE_TRY(raddle_ops_check_extent(draft, "a number of tokens", steps));
    RADDLE_REQUIRE(vocab >= 1, RADDLE_ERR_SHAPE, "%s: expected a vocabulary of at least 1, got 0",
                   draft->name);
    RADDLE_TRY(raddle_tensor_check_index_dtype(ids));
    RADDLE_TRY(raddle_tensor_check_shape(ids, 2, draft->shape));
    RADDLE_TRY(raddle_tensor_check_device(ids, draft->device));
    RADDLE_TRY(
        raddle_ops_check_result(args->out, draft, 2, (const int64_t[]){n, steps + 1}, RADDLE_I32));
    RADDLE_TRY(check_counter(args->accepted, draft));
    RADDLE_TRY(check_counter(args->emitted, draft));
    RADDLE_TRY(check_numbers(args->seed, draft));
    RADDLE_TRY(check_numbers(args->offset, draft));
    if (n == 0) {
        return RADDLE_OK;
    }
    const raddle_ops_verify_params params = {
        .draft = draft->data,
        .target = target->data,
        .ids = ids->data,
        .out = args->out->data,
        .accepted = data_of(args->accepted),
        .emitted = data_of(args->emitted),
        .seed = data_of(args->seed),
        .offset = data_of(args->offset),
        .seed_value = args->seed_value,
        .offset_value = args->offset_value,
        .draft_stride_row = draft->stride[0],
        .draft_stride_step = draft->stride[1],
        .target_stride_row = target->stride[0],
        .target_stride_step = target->stride[1],
        .ids_stride_row = ids->stride[0],
        .ids_stride_step = ids->stride[1],
        .out_stride_row = args->out->stride[0],
        .accepted_stride = stride_of(args->accepted),
        .emitted_stride = stride_of(args->emitted),
        .seed_stride = stride_of(args->seed),
        .offset_stride = stride_of(args->offset),
        .rows = n,
        .vocab = vocab,
        .steps = (int32_t)steps,
        .dtype = (int32_t)draft->dtype,
        .ids_are_i64 = ids->dtype == RADDLE_I64,
        .is_row_stream = args->is_row_stream,
    };
    return raddle_ops_backend_for(draft->device)->verify(draft->device.index, &params, stream);
}

/* ops_check.c - the checks that every function of the ops family makes, and which back end it gets.
 */
#include "ops/ops_backend.h"

#include <limits.h>

const raddle_ops_backend *raddle_ops_backend_for(raddle_device device) {
    return device.type == RADDLE_CUDA ? &raddle_ops_backend_cuda : &raddle_ops_backend_cpu;
}

raddle_status raddle_ops_check_float(const raddle_tensor *tensor) {
    if (tensor->dtype == RADDLE_F32 || tensor->dtype == RADDLE_F16 ||
        tensor->dtype == RADDLE_BF16) {
        return RADDLE_OK;
    }
    return raddle_fail(RADDLE_ERR_DTYPE,
                       "%s: expected float32, float16 or bfloat16, got %s; bfloat16 bits in a "
                       "uint16 array are read with dtype=\"bfloat16\"",
                       tensor->name, raddle_dtype_name(tensor->dtype));
}

raddle_status raddle_ops_check_input(const raddle_tensor *tensor, const raddle_tensor *like) {
    RADDLE_REQUIRE(tensor->ndim >= 1, RADDLE_ERR_SHAPE, "%s: expected a row at least, got a scalar",
                   tensor->name);
    RADDLE_TRY(raddle_tensor_check_device(tensor, like ? like->device : tensor->device));
    return raddle_tensor_check_inner_contiguous(tensor);
}

raddle_status raddle_ops_check_output(const raddle_tensor *tensor, const raddle_tensor *like) {
    RADDLE_TRY(raddle_ops_check_input(tensor, like));
    RADDLE_TRY(raddle_tensor_check_writable(tensor));
    return raddle_tensor_check_no_overlap(tensor);
}

raddle_status raddle_ops_check_indices(const raddle_tensor *tensor, const raddle_tensor *like,
                                       int64_t n) {
    RADDLE_TRY(raddle_tensor_check_index_dtype(tensor));
    RADDLE_TRY(raddle_tensor_check_shape(tensor, 1, &n));
    return raddle_tensor_check_device(tensor, like->device);
}

raddle_status raddle_ops_check_extent(const raddle_tensor *tensor, const char *what,
                                      int64_t extent) {
    RADDLE_REQUIRE(extent <= INT_MAX, RADDLE_ERR_UNSUPPORTED,
                   "%s: %s of %lld is more than the %d that a kernel counts", tensor->name, what,
                   (long long)extent, INT_MAX);
    return RADDLE_OK;
}

raddle_status raddle_ops_check_logits(const raddle_tensor *logits) {
    RADDLE_TRY(raddle_tensor_check_shape(logits, 2, (const int64_t[]){-1, -1}));
    RADDLE_TRY(raddle_ops_check_float(logits));
    RADDLE_TRY(raddle_ops_check_input(logits, NULL));
    RADDLE_TRY(raddle_ops_check_extent(logits, "a vocabulary", logits->shape[1]));
    RADDLE_REQUIRE(logits->shape[1] >= 1, RADDLE_ERR_SHAPE,
                   "%s: expected a vocabulary of at least 1, got 0", logits->name);
    return RADDLE_OK;
}

raddle_status raddle_ops_check_result(const raddle_tensor *tensor, const raddle_tensor *like,
                                      int ndim, const int64_t *shape, raddle_dtype dtype) {
    RADDLE_TRY(raddle_tensor_check_shape(tensor, ndim, shape));
    RADDLE_TRY(raddle_tensor_check_dtype(tensor, dtype));
    return raddle_ops_check_output(tensor, like);
}

/* Whether dimension d can be walked together with the group that ends in (extent, stride): d's step
 * is the group's whole length, for every tensor. */
static bool can_join(const raddle_tensor *const *tensors, int num_tensors, int d, int64_t extent,
                     const int64_t *stride) {
    for (int t = 0; t < num_tensors; t++) {
        if (tensors[t]->stride[d] != extent * stride[t]) {
            return false;
        }
    }
    return true;
}

raddle_status raddle_ops_join_rows(const raddle_tensor *const *tensors, int num_tensors,
                                   raddle_ops_rows *out_rows) {
    const raddle_tensor *first = tensors[0];
    int64_t extents[2] = {1, 1};
    int64_t strides[2][3] = {{0}};
    int groups = 0; /* innermost first */
    for (int d = first->ndim - 2; d >= 0; d--) {
        const int64_t extent = first->shape[d];
        if (extent == 1) {
            continue;
        }
        if (groups > 0 &&
            can_join(tensors, num_tensors, d, extents[groups - 1], strides[groups - 1])) {
            extents[groups - 1] *= extent;
            continue;
        }
        RADDLE_REQUIRE(groups < 2, RADDLE_ERR_SHAPE,
                       "%s: its leading dimensions have more than two different strides; make it "
                       "contiguous or pass it as [rows, heads, width]",
                       first->name);
        extents[groups] = extent;
        for (int t = 0; t < num_tensors; t++) {
            strides[groups][t] = tensors[t]->stride[d];
        }
        groups++;
    }
    /* One group alone is the rows: a back end gives a row of heads to one worker. */
    const int rows = groups == 2 ? 1 : 0;
    out_rows->rows = extents[rows];
    out_rows->heads = groups == 2 ? extents[0] : 1;
    for (int t = 0; t < 3; t++) {
        out_rows->stride_row[t] = t < num_tensors ? strides[rows][t] : 0;
        out_rows->stride_head[t] = t < num_tensors && groups == 2 ? strides[0][t] : 0;
    }
    return RADDLE_OK;
}

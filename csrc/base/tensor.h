/* tensor.h - checked views: what a function demands of an argument, said once, with messages that
 * name it. */
#ifndef RADDLE_BASE_TENSOR_H
#define RADDLE_BASE_TENSOR_H

#include "base/status.h"

enum { RADDLE_MAX_DIM = 8 };

/* A view of memory that somebody else keeps alive for the duration of the call. */
struct raddle_tensor {
    void *data; /* byte offset applied; may be NULL only when an extent is 0 */
    int64_t shape[RADDLE_MAX_DIM];
    int64_t stride[RADDLE_MAX_DIM]; /* elements, any sign */
    int32_t ndim;
    raddle_dtype dtype;
    raddle_device device;
    bool read_only;
    const char *name; /* as the user typed it, for messages; never NULL */
};

size_t raddle_dtype_bytes(raddle_dtype dtype);
/* "bfloat16", "float8_e4m3fn", ... as torch spells them. */
const char *raddle_dtype_name(raddle_dtype dtype);
/* RADDLE_DTYPE_NONE when no dtype has that name; "torch.bfloat16" is understood too. */
raddle_dtype raddle_dtype_from_name(const char *name);
bool raddle_dtype_is_index(raddle_dtype dtype); /* int32 or int64 */
bool raddle_device_equal(raddle_device a, raddle_device b);
/* Text like "cuda:0"; returns buffer. */
const char *raddle_device_text(raddle_device device, char buffer[16]);

/* Elements; overflow was refused at the door. */
int64_t raddle_tensor_count(const raddle_tensor *tensor);
bool raddle_tensor_is_contiguous(const raddle_tensor *tensor);

/* Each returns RADDLE_OK or fails with the argument's name, what was expected and what came. In a
 * shape, -1 takes any extent. */
raddle_status raddle_tensor_check_shape(const raddle_tensor *tensor, int ndim,
                                        const int64_t *shape);
raddle_status raddle_tensor_check_dtype(const raddle_tensor *tensor, raddle_dtype dtype);
raddle_status raddle_tensor_check_index_dtype(const raddle_tensor *tensor);
raddle_status raddle_tensor_check_device(const raddle_tensor *tensor, raddle_device device);
raddle_status raddle_tensor_check_writable(const raddle_tensor *tensor);
/* Innermost stride 1 (extent 1 counts as such). */
raddle_status raddle_tensor_check_inner_contiguous(const raddle_tensor *tensor);
/* Data and every stride but the innermost are multiples of bytes: what vector loads on CUDA need.
 */
raddle_status raddle_tensor_check_aligned(const raddle_tensor *tensor, size_t bytes);
/* No two elements share an address, as far as strides can tell: demanded of outputs. */
raddle_status raddle_tensor_check_no_overlap(const raddle_tensor *tensor);

/* Element i of a 1-D host tensor of int32 or int64. */
static inline int64_t raddle_tensor_index_at(const raddle_tensor *tensor, int64_t i) {
    const int64_t at = i * tensor->stride[0];
    return tensor->dtype == RADDLE_I64 ? ((const int64_t *)tensor->data)[at]
                                       : ((const int32_t *)tensor->data)[at];
}

#endif

/* tensor.c - the checks behind tensor.h. Every refusal reads "name: expected ..., got ...; cure".
 */
#include "base/tensor.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Room for the text of a shape: 8 extents of up to 20 characters, separators and brackets. */
enum { SHAPE_TEXT_BYTES = RADDLE_MAX_DIM * 22 + 4 };

typedef struct dtype_facts {
    const char *name;
    size_t bytes;
} dtype_facts;

static const dtype_facts dtypes[RADDLE_DTYPE_COUNT] = {
    [RADDLE_DTYPE_NONE] = {"none", 0},
    [RADDLE_F32] = {"float32", 4},
    [RADDLE_F16] = {"float16", 2},
    [RADDLE_BF16] = {"bfloat16", 2},
    [RADDLE_F8_E4M3] = {"float8_e4m3fn", 1},
    [RADDLE_F8_E5M2] = {"float8_e5m2", 1},
    [RADDLE_I8] = {"int8", 1},
    [RADDLE_U8] = {"uint8", 1},
    [RADDLE_BOOL] = {"bool", 1},
    [RADDLE_I16] = {"int16", 2},
    [RADDLE_U16] = {"uint16", 2},
    [RADDLE_I32] = {"int32", 4},
    [RADDLE_U32] = {"uint32", 4},
    [RADDLE_I64] = {"int64", 8},
    [RADDLE_U64] = {"uint64", 8},
    [RADDLE_F64] = {"float64", 8},
};

static const dtype_facts *facts_of(raddle_dtype dtype) {
    const unsigned index = (unsigned)dtype;
    return &dtypes[index < RADDLE_DTYPE_COUNT ? index : RADDLE_DTYPE_NONE];
}

/* "[2, any, 128]": an extent of -1 prints as any. */
static const char *shape_text(const int64_t *shape, int ndim, char text[SHAPE_TEXT_BYTES]) {
    char *next = text;
    *next++ = '[';
    for (int i = 0; i < ndim && i < RADDLE_MAX_DIM; i++) {
        const size_t room = (size_t)(text + SHAPE_TEXT_BYTES - next);
        const char *separator = i == 0 ? "" : ", ";
        if (shape[i] == -1) {
            next += snprintf(next, room, "%sany", separator);
        } else {
            next += snprintf(next, room, "%s%" PRId64, separator, shape[i]);
        }
    }
    *next++ = ']';
    *next = '\0';
    return text;
}

static bool is_empty(const raddle_tensor *tensor) {
    for (int i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] == 0) {
            return true;
        }
    }
    return false;
}

static uint64_t magnitude(int64_t x) {
    return x < 0 ? 0 - (uint64_t)x : (uint64_t)x;
}

/* An integer array may hold the bits of a floating type that its library lacks. */
static bool may_hold_bits(raddle_dtype got, raddle_dtype expected) {
    const bool is_carrier =
        got == RADDLE_U16 || got == RADDLE_I16 || got == RADDLE_U8 || got == RADDLE_I8;
    const bool is_small_float = expected == RADDLE_F16 || expected == RADDLE_BF16 ||
                                expected == RADDLE_F8_E4M3 || expected == RADDLE_F8_E5M2;
    return is_carrier && is_small_float && raddle_dtype_bytes(got) == raddle_dtype_bytes(expected);
}

size_t raddle_dtype_bytes(raddle_dtype dtype) {
    return facts_of(dtype)->bytes;
}

const char *raddle_dtype_name(raddle_dtype dtype) {
    return facts_of(dtype)->name;
}

raddle_dtype raddle_dtype_from_name(const char *name) {
    static const char prefix[] = "torch.";
    if (strncmp(name, prefix, sizeof prefix - 1) == 0) {
        name += sizeof prefix - 1;
    }
    for (int dtype = RADDLE_DTYPE_NONE + 1; dtype < RADDLE_DTYPE_COUNT; dtype++) {
        if (strcmp(name, dtypes[dtype].name) == 0) {
            return (raddle_dtype)dtype;
        }
    }
    return RADDLE_DTYPE_NONE;
}

bool raddle_dtype_is_index(raddle_dtype dtype) {
    return dtype == RADDLE_I32 || dtype == RADDLE_I64;
}

/* There is one CPU, whatever number a producer gives it. */
bool raddle_device_equal(raddle_device a, raddle_device b) {
    return a.type == b.type && (a.type == RADDLE_CPU || a.index == b.index);
}

const char *raddle_device_text(raddle_device device, char buffer[16]) {
    if (device.type == RADDLE_CPU) {
        snprintf(buffer, 16, "cpu");
    } else if (device.type == RADDLE_CUDA) {
        snprintf(buffer, 16, "cuda:%d", (int)device.index % 100000000);
    } else {
        snprintf(buffer, 16, "device %d", (int)device.type % 10000000);
    }
    return buffer;
}

int64_t raddle_tensor_count(const raddle_tensor *tensor) {
    if (is_empty(tensor)) {
        return 0;
    }
    int64_t count = 1;
    for (int i = 0; i < tensor->ndim; i++) {
        if (__builtin_mul_overflow(count, tensor->shape[i], &count)) {
            return INT64_MAX;
        }
    }
    return count;
}

bool raddle_tensor_is_contiguous(const raddle_tensor *tensor) {
    if (is_empty(tensor)) {
        return true;
    }
    int64_t expected = 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->stride[i] != expected) {
            return false;
        }
        if (__builtin_mul_overflow(expected, tensor->shape[i], &expected)) {
            return false;
        }
    }
    return true;
}

raddle_status raddle_tensor_check_shape(const raddle_tensor *tensor, int ndim,
                                        const int64_t *shape) {
    char expected[SHAPE_TEXT_BYTES], got[SHAPE_TEXT_BYTES];
    RADDLE_REQUIRE(tensor->ndim == ndim, RADDLE_ERR_SHAPE,
                   "%s: expected %d dimensions, shape %s, got %d, shape %s; reshape it",
                   tensor->name, ndim, shape_text(shape, ndim, expected), (int)tensor->ndim,
                   shape_text(tensor->shape, tensor->ndim, got));
    for (int i = 0; i < ndim; i++) {
        RADDLE_REQUIRE(shape[i] == -1 || tensor->shape[i] == shape[i], RADDLE_ERR_SHAPE,
                       "%s: expected shape %s, got %s; dimension %d must be %" PRId64, tensor->name,
                       shape_text(shape, ndim, expected), shape_text(tensor->shape, ndim, got), i,
                       shape[i]);
    }
    return RADDLE_OK;
}

raddle_status raddle_tensor_check_dtype(const raddle_tensor *tensor, raddle_dtype dtype) {
    const char *expected = raddle_dtype_name(dtype);
    const char *got = raddle_dtype_name(tensor->dtype);
    RADDLE_REQUIRE(
        tensor->dtype == dtype || !may_hold_bits(tensor->dtype, dtype), RADDLE_ERR_DTYPE,
        "%s: expected dtype %s, got %s; convert it, or say dtype=\"%s\" if it holds such bits",
        tensor->name, expected, got, expected);
    RADDLE_REQUIRE(tensor->dtype == dtype, RADDLE_ERR_DTYPE,
                   "%s: expected dtype %s, got %s; convert it to %s", tensor->name, expected, got,
                   expected);
    return RADDLE_OK;
}

raddle_status raddle_tensor_check_index_dtype(const raddle_tensor *tensor) {
    RADDLE_REQUIRE(raddle_dtype_is_index(tensor->dtype), RADDLE_ERR_DTYPE,
                   "%s: expected dtype int32 or int64, got %s; convert it to int32", tensor->name,
                   raddle_dtype_name(tensor->dtype));
    return RADDLE_OK;
}

raddle_status raddle_tensor_check_device(const raddle_tensor *tensor, raddle_device device) {
    if (raddle_device_equal(tensor->device, device)) {
        return RADDLE_OK; /* in every run(): no text is made for it */
    }
    char expected[16], got[16];
    raddle_device_text(device, expected);
    return raddle_fail(RADDLE_ERR_DEVICE, "%s: expected device %s, got %s; move it to %s",
                       tensor->name, expected, raddle_device_text(tensor->device, got), expected);
}

raddle_status raddle_tensor_check_writable(const raddle_tensor *tensor) {
    RADDLE_REQUIRE(
        !tensor->read_only, RADDLE_ERR_VALUE,
        "%s: expected a tensor that may be written, got a read-only one; pass a copy of it",
        tensor->name);
    return RADDLE_OK;
}

raddle_status raddle_tensor_check_inner_contiguous(const raddle_tensor *tensor) {
    const int last = tensor->ndim - 1;
    if (last < 0 || tensor->shape[last] <= 1 || is_empty(tensor)) {
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(tensor->stride[last] == 1, RADDLE_ERR_UNSUPPORTED,
                   "%s: expected stride 1 in its last dimension, got %" PRId64
                   "; make it contiguous first",
                   tensor->name, tensor->stride[last]);
    return RADDLE_OK;
}

raddle_status raddle_tensor_check_aligned(const raddle_tensor *tensor, size_t bytes) {
    if (is_empty(tensor)) {
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(
        (uintptr_t)tensor->data % bytes == 0, RADDLE_ERR_UNSUPPORTED,
        "%s: expected data aligned to %zu bytes, got an address %zu bytes past that; copy it to "
        "memory of its own",
        tensor->name, bytes, (size_t)((uintptr_t)tensor->data % bytes));
    const uint64_t item_bytes = raddle_dtype_bytes(tensor->dtype);
    for (int i = 0; i < tensor->ndim - 1; i++) {
        /* The product may wrap: bytes is a power of two, so the remainder holds all the same. */
        const uint64_t stride_bytes = magnitude(tensor->stride[i]) * item_bytes;
        RADDLE_REQUIRE(
            tensor->shape[i] <= 1 || stride_bytes % bytes == 0, RADDLE_ERR_UNSUPPORTED,
            "%s: expected every stride but the last to be a multiple of %zu bytes, got %" PRId64
            " elements of %s in dimension %d; make it contiguous or pad its rows",
            tensor->name, bytes, tensor->stride[i], raddle_dtype_name(tensor->dtype), i);
    }
    return RADDLE_OK;
}

/* Sorted by stride, every dimension must step over all that the smaller ones span. Sufficient, and
 * exact for anything that slicing and transposing make. */
raddle_status raddle_tensor_check_no_overlap(const raddle_tensor *tensor) {
    if (is_empty(tensor)) {
        return RADDLE_OK;
    }
    int order[RADDLE_MAX_DIM];
    int count = 0;
    for (int i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] <= 1) {
            continue;
        }
        int at = count++;
        for (; at > 0 && magnitude(tensor->stride[order[at - 1]]) > magnitude(tensor->stride[i]);
             at--) {
            order[at] = order[at - 1];
        }
        order[at] = i;
    }
    uint64_t span = 0; /* distance from the first element to the last, in elements */
    for (int i = 0; i < count; i++) {
        const uint64_t stride = magnitude(tensor->stride[order[i]]);
        RADDLE_REQUIRE(stride > span, RADDLE_ERR_SHAPE,
                       "%s: expected elements that do not overlap, got stride %" PRId64
                       " in dimension %d; pass a tensor that is not expanded or overlapping",
                       tensor->name, tensor->stride[order[i]], order[i]);
        uint64_t reach;
        if (__builtin_mul_overflow(stride, (uint64_t)tensor->shape[order[i]] - 1, &reach) ||
            __builtin_add_overflow(span, reach, &span)) {
            span = UINT64_MAX;
        }
    }
    return RADDLE_OK;
}

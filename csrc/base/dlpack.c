/* dlpack.c - translation between DLTensor and raddle_tensor, with every check that indexing relies
 * on. */
#include "base/dlpack.h"

#include <stdio.h>

static const struct {
    uint8_t code, bits;
} dlpack_types[RADDLE_DTYPE_COUNT] = {
    [RADDLE_F32] = {kDLFloat, 32},
    [RADDLE_F16] = {kDLFloat, 16},
    [RADDLE_BF16] = {kDLBfloat, 16},
    [RADDLE_F8_E4M3] = {kDLFloat8_e4m3fn, 8},
    [RADDLE_F8_E5M2] = {kDLFloat8_e5m2, 8},
    [RADDLE_I8] = {kDLInt, 8},
    [RADDLE_U8] = {kDLUInt, 8},
    [RADDLE_BOOL] = {kDLBool, 8},
    [RADDLE_I16] = {kDLInt, 16},
    [RADDLE_U16] = {kDLUInt, 16},
    [RADDLE_I32] = {kDLInt, 32},
    [RADDLE_U32] = {kDLUInt, 32},
    [RADDLE_I64] = {kDLInt, 64},
    [RADDLE_U64] = {kDLUInt, 64},
    [RADDLE_F64] = {kDLFloat, 64},
};

raddle_dtype raddle_dtype_from_dlpack(DLDataType dtype) {
    /* By code and by width of 8, 16, 32, 64 bits: on the way of every argument. */
    static const uint8_t by_code[][4] = {
        [kDLInt] = {RADDLE_I8, RADDLE_I16, RADDLE_I32, RADDLE_I64},
        [kDLUInt] = {RADDLE_U8, RADDLE_U16, RADDLE_U32, RADDLE_U64},
        [kDLFloat] = {0, RADDLE_F16, RADDLE_F32, RADDLE_F64},
        [kDLBfloat] = {0, RADDLE_BF16, 0, 0},
        [kDLBool] = {RADDLE_BOOL, 0, 0, 0},
        [kDLFloat8_e4m3fn] = {RADDLE_F8_E4M3, 0, 0, 0},
        [kDLFloat8_e5m2] = {RADDLE_F8_E5M2, 0, 0, 0},
    };
    const unsigned width = dtype.bits == 32 ? 2 : dtype.bits == 16 ? 1 : dtype.bits == 64 ? 3 : 0;
    if (dtype.code >= sizeof by_code / sizeof *by_code || dtype.bits != 8u << width) {
        return RADDLE_DTYPE_NONE;
    }
    return (raddle_dtype)by_code[dtype.code][width];
}

DLDataType raddle_dtype_to_dlpack(raddle_dtype dtype) {
    const DLDataType result = {dlpack_types[dtype].code, dlpack_types[dtype].bits, 1};
    return result;
}

const char *raddle_dlpack_dtype_text(DLDataType dtype, char buffer[48]) {
    static const char *const families[] = {"int",    "uint",    "float", "opaque handle",
                                           "bfloat", "complex", "bool"};
    if (dtype.code < sizeof families / sizeof *families) {
        snprintf(buffer, 48, "%s%d", families[dtype.code], dtype.bits);
    } else {
        snprintf(buffer, 48, "DLPack type code %d with %d bits", dtype.code, dtype.bits);
    }
    return buffer;
}

static bool is_raw_for(raddle_dtype stored, raddle_dtype wanted) {
    switch (wanted) {
    case RADDLE_F16:
    case RADDLE_BF16:
        return stored == RADDLE_U16 || stored == RADDLE_I16;
    case RADDLE_F8_E4M3:
    case RADDLE_F8_E5M2:
        return stored == RADDLE_U8 || stored == RADDLE_I8;
    default:
        return false;
    }
}

raddle_status raddle_dtype_resolve(const char *name, raddle_dtype stored, raddle_dtype wanted,
                                   raddle_dtype *out_dtype) {
    if (wanted == RADDLE_DTYPE_NONE || wanted == stored) {
        *out_dtype = stored;
        return RADDLE_OK;
    }
    const char *hint = "";
    if (wanted == RADDLE_F16 || wanted == RADDLE_BF16) {
        hint = " (or uint16 that holds its bits)";
    } else if (wanted == RADDLE_F8_E4M3 || wanted == RADDLE_F8_E5M2) {
        hint = " (or uint8 that holds its bits)";
    }
    RADDLE_REQUIRE(is_raw_for(stored, wanted), RADDLE_ERR_DTYPE, "%s: expected dtype %s%s, got %s",
                   name, raddle_dtype_name(wanted), hint, raddle_dtype_name(stored));
    *out_dtype = wanted;
    return RADDLE_OK;
}

/* A dimension of extent 0 or 1, or any of an empty tensor, is never stepped: producers leave
 * anything in its stride. Give it the one that a dense tensor would have, so that nobody multiplies
 * or aligns a random number. */
static int64_t idle_stride(const raddle_tensor *tensor, int dim) {
    int64_t stride = 1;
    if (dim + 1 < tensor->ndim) {
        const int64_t inner = tensor->shape[dim + 1] > 0 ? tensor->shape[dim + 1] : 1;
        if (__builtin_mul_overflow(inner, tensor->stride[dim + 1], &stride)) {
            stride = 0;
        }
    }
    return stride;
}

raddle_status raddle_tensor_check_layout(raddle_tensor *tensor) {
    const int64_t item = (int64_t)raddle_dtype_bytes(tensor->dtype);
    /* Extents of 0 count as 1 here: products of the others must be safe to form as well. */
    int64_t dense_bytes = item, low = 0, high = item;
    bool empty = false, overflow = false;

    for (int i = 0; i < tensor->ndim; i++) {
        const int64_t extent = tensor->shape[i];
        RADDLE_REQUIRE(extent >= 0, RADDLE_ERR_SHAPE, "%s: negative extent %lld in dimension %d",
                       tensor->name, (long long)extent, i);
        empty = empty || extent == 0;
        overflow |= __builtin_mul_overflow(dense_bytes, extent > 0 ? extent : 1, &dense_bytes);
    }
    RADDLE_REQUIRE(!overflow, RADDLE_ERR_SHAPE, "%s: its extents multiply to more than 2^63 bytes",
                   tensor->name);

    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (empty || tensor->shape[i] == 1) {
            tensor->stride[i] = idle_stride(tensor, i);
            continue;
        }
        int64_t step, reach;
        overflow |= __builtin_mul_overflow(tensor->stride[i], item, &step);
        overflow |= __builtin_mul_overflow(step, tensor->shape[i] - 1, &reach);
        overflow |= reach < 0 ? __builtin_add_overflow(low, reach, &low)
                              : __builtin_add_overflow(high, reach, &high);
        RADDLE_REQUIRE(!overflow, RADDLE_ERR_SHAPE,
                       "%s: extent %lld with stride %lld in dimension %d is out of range",
                       tensor->name, (long long)tensor->shape[i], (long long)tensor->stride[i], i);
    }
    if (empty) {
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(tensor->data != NULL, RADDLE_ERR_VALUE,
                   "%s: its data pointer is NULL although it has elements", tensor->name);
    const uint64_t address = (uint64_t)(uintptr_t)tensor->data;
    const uint64_t below = (uint64_t)0 - (uint64_t)low;
    RADDLE_REQUIRE(below <= address && (uint64_t)high <= UINT64_MAX - address, RADDLE_ERR_SHAPE,
                   "%s: its elements reach past the address space", tensor->name);
    RADDLE_REQUIRE((address & (uint64_t)(item - 1)) == 0, RADDLE_ERR_SHAPE,
                   "%s: its data is not aligned to its element size of %d bytes; pass a copy",
                   tensor->name, (int)item);
    return RADDLE_OK;
}

static raddle_status device_from_dlpack(const char *name, DLDevice device,
                                        raddle_device *out_device) {
    if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost) {
        *out_device = (raddle_device){RADDLE_CPU, 0};
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(device.device_type == kDLCUDA, RADDLE_ERR_DEVICE,
                   "%s: expected a tensor on cpu or cuda, got DLPack device type %d", name,
                   (int)device.device_type);
    RADDLE_REQUIRE(device.device_id >= 0, RADDLE_ERR_DEVICE, "%s: negative CUDA device index %d",
                   name, (int)device.device_id);
    *out_device = (raddle_device){RADDLE_CUDA, device.device_id};
    return RADDLE_OK;
}

raddle_status raddle_tensor_from_dlpack(const DLTensor *dl, uint64_t flags, const char *name,
                                        raddle_dtype wanted, raddle_tensor *out_tensor) {
    char text[48];
    raddle_tensor *tensor = out_tensor;
    tensor->name = name;
    tensor->read_only = (flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
    RADDLE_TRY(device_from_dlpack(name, dl->device, &tensor->device));
    RADDLE_REQUIRE(dl->dtype.lanes == 1, RADDLE_ERR_DTYPE,
                   "%s: expected scalar elements, got vectors of %d lanes", name,
                   (int)dl->dtype.lanes);
    const raddle_dtype stored = raddle_dtype_from_dlpack(dl->dtype);
    RADDLE_REQUIRE(stored != RADDLE_DTYPE_NONE, RADDLE_ERR_DTYPE, "%s: dtype %s is not supported",
                   name, raddle_dlpack_dtype_text(dl->dtype, text));
    RADDLE_TRY(raddle_dtype_resolve(name, stored, wanted, &tensor->dtype));

    RADDLE_REQUIRE(dl->ndim >= 0 && dl->ndim <= RADDLE_MAX_DIM, RADDLE_ERR_SHAPE,
                   "%s: expected 0 to %d dimensions, got %d", name, (int)RADDLE_MAX_DIM,
                   (int)dl->ndim);
    RADDLE_REQUIRE(dl->shape != NULL || dl->ndim == 0, RADDLE_ERR_VALUE,
                   "%s: its producer gave no shape", name);
    tensor->ndim = dl->ndim;
    for (int i = 0; i < dl->ndim; i++) {
        tensor->shape[i] = dl->shape[i];
    }
    if (dl->strides != NULL) {
        for (int i = 0; i < dl->ndim; i++) {
            tensor->stride[i] = dl->strides[i];
        }
    } else {
        for (int i = dl->ndim - 1; i >= 0; i--) {
            tensor->stride[i] = idle_stride(tensor, i);
        }
    }
    RADDLE_REQUIRE(dl->byte_offset <= UINTPTR_MAX - (uintptr_t)dl->data, RADDLE_ERR_SHAPE,
                   "%s: byte_offset %llu reaches past the address space", name,
                   (unsigned long long)dl->byte_offset);
    tensor->data = dl->data != NULL ? (char *)dl->data + dl->byte_offset : NULL;
    return raddle_tensor_check_layout(tensor);
}

void raddle_tensor_to_dlpack(const raddle_tensor *tensor, DLTensor *out_dl) {
    const DLTensor dl = {
        .data = tensor->data,
        .device = {(DLDeviceType)tensor->device.type, tensor->device.index},
        .ndim = tensor->ndim,
        .dtype = raddle_dtype_to_dlpack(tensor->dtype),
        .shape = (int64_t *)(uintptr_t)tensor->shape,
        .strides = (int64_t *)(uintptr_t)tensor->stride,
    };
    *out_dl = dl;
}

/* transfer.c - a copy is bytes in one piece when both sides have one dense layout, else rows over a
 * host loop. */
#include "runtime/transfer.h"

#include <string.h>

#include "base/alloc.h"
#include "runtime/backend.h"

/* Loop nest over two tensors of one shape, strides in bytes; dimensions of extent 1 dropped,
 * neighbours that step as one joined. */
typedef struct copy_loops {
    int ndim;
    int64_t extent[RADDLE_MAX_DIM];
    int64_t dst_step[RADDLE_MAX_DIM];
    int64_t src_step[RADDLE_MAX_DIM];
} copy_loops;

static copy_loops make_loops(const raddle_tensor *dst, const raddle_tensor *src) {
    const int64_t item = (int64_t)raddle_dtype_bytes(dst->dtype);
    copy_loops loops = {0};
    for (int i = 0; i < dst->ndim; i++) {
        const int64_t extent = dst->shape[i], d = dst->stride[i] * item, s = src->stride[i] * item;
        const int last = loops.ndim - 1;
        if (extent == 1) {
            continue;
        }
        if (last >= 0 && loops.dst_step[last] == d * extent && loops.src_step[last] == s * extent) {
            loops.extent[last] *= extent;
            loops.dst_step[last] = d;
            loops.src_step[last] = s;
            continue;
        }
        loops.extent[loops.ndim] = extent;
        loops.dst_step[loops.ndim] = d;
        loops.src_step[loops.ndim] = s;
        loops.ndim++;
    }
    return loops;
}

static void copy_row(char *dst, const char *src, int64_t count, int64_t dst_step, int64_t src_step,
                     size_t item) {
    if (dst_step == (int64_t)item && src_step == (int64_t)item) {
        memcpy(dst, src, (size_t)count * item);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        memcpy(dst + i * dst_step, src + i * src_step, item);
    }
}

static void copy_strided(const raddle_tensor *dst, const raddle_tensor *src) {
    const size_t item = raddle_dtype_bytes(dst->dtype);
    const copy_loops loops = make_loops(dst, src);
    if (loops.ndim == 0) {
        memcpy(dst->data, src->data, item);
        return;
    }
    const int inner = loops.ndim - 1;
    int64_t at[RADDLE_MAX_DIM] = {0};
    char *d = dst->data;
    const char *s = src->data;
    for (;;) {
        copy_row(d, s, loops.extent[inner], loops.dst_step[inner], loops.src_step[inner], item);
        int i = inner - 1;
        for (; i >= 0; i--) { /* odometer over the outer dimensions */
            d += loops.dst_step[i];
            s += loops.src_step[i];
            if (++at[i] < loops.extent[i]) {
                break;
            }
            d -= loops.dst_step[i] * loops.extent[i];
            s -= loops.src_step[i] * loops.extent[i];
            at[i] = 0;
        }
        if (i < 0) {
            return;
        }
    }
}

/* Bytes from *out_begin to *out_end hold every element of a tensor that is not empty. */
static void byte_range(const raddle_tensor *tensor, uintptr_t *out_begin, uintptr_t *out_end) {
    const int64_t item = (int64_t)raddle_dtype_bytes(tensor->dtype);
    *out_begin = (uintptr_t)tensor->data;
    *out_end = *out_begin + (uintptr_t)item;
    for (int i = 0; i < tensor->ndim; i++) {
        const int64_t reach = tensor->stride[i] * item * (tensor->shape[i] - 1);
        if (reach < 0) {
            *out_begin -= (uintptr_t)-reach;
        } else {
            *out_end += (uintptr_t)reach;
        }
    }
}

static bool overlap(const raddle_tensor *a, const raddle_tensor *b) {
    uintptr_t a_begin, a_end, b_begin, b_end;
    byte_range(a, &a_begin, &a_end);
    byte_range(b, &b_begin, &b_end);
    return a_begin < b_end && b_begin < a_end;
}

/* The same strides wherever they matter, and no gaps: the elements fill [data, data + bytes). */
static bool share_dense_layout(const raddle_tensor *a, const raddle_tensor *b, int64_t count) {
    int64_t reach = 1;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] == 1) {
            continue;
        }
        if (a->stride[i] != b->stride[i] || a->stride[i] <= 0) {
            return false;
        }
        reach += a->stride[i] * (a->shape[i] - 1);
    }
    return reach == count && raddle_tensor_check_no_overlap(a) == RADDLE_OK;
}

static void make_dense(const raddle_tensor *like, void *data, raddle_tensor *out_tensor) {
    int64_t stride = 1;
    *out_tensor = *like;
    out_tensor->data = data;
    for (int i = like->ndim - 1; i >= 0; i--) {
        out_tensor->stride[i] = stride;
        stride *= like->shape[i];
    }
}

static raddle_status copy_on_host(const raddle_tensor *dst, const raddle_tensor *src,
                                  size_t bytes) {
    if (!overlap(dst, src)) {
        copy_strided(dst, src);
        return RADDLE_OK;
    }
    raddle_tensor dense;
    void *data = raddle_alloc(bytes);
    if (data == NULL) {
        return raddle_fail_memory(bytes);
    }
    make_dense(src, data, &dense);
    copy_strided(&dense, src);
    copy_strided(dst, &dense);
    raddle_free(data);
    return RADDLE_OK;
}

static raddle_status copy_with_device(const raddle_tensor *dst, const raddle_tensor *src,
                                      size_t bytes, raddle_stream stream) {
    char dst_text[16], src_text[16];
    const bool from_host = src->device.type == RADDLE_CPU, to_host = dst->device.type == RADDLE_CPU;
    const raddle_device device = to_host ? src->device : dst->device;
    const raddle_backend *backend = NULL;
    RADDLE_REQUIRE(
        from_host || to_host || src->device.index == dst->device.index, RADDLE_ERR_UNSUPPORTED,
        "%s: a copy from %s to %s is not supported; go through the host", src->name,
        raddle_device_text(src->device, src_text), raddle_device_text(dst->device, dst_text));
    RADDLE_TRY(raddle_backend_for(device, &backend));
    if (!from_host && !to_host) {
        return backend->copy(device.index, dst->data, src->data, bytes, RADDLE_COPY_ON_DEVICE,
                             stream);
    }
    RADDLE_TRY(backend->copy(device.index, dst->data, src->data, bytes,
                             to_host ? RADDLE_COPY_TO_HOST : RADDLE_COPY_TO_DEVICE, stream));
    return backend->synchronize(device.index, stream);
}

raddle_status raddle_tensor_copy(const raddle_tensor *dst, const raddle_tensor *src,
                                 raddle_stream stream) {
    RADDLE_TRY(raddle_tensor_check_writable(dst));
    RADDLE_TRY(raddle_tensor_check_shape(src, dst->ndim, dst->shape));
    RADDLE_TRY(raddle_tensor_check_dtype(src, dst->dtype));
    const int64_t count = raddle_tensor_count(dst);
    if (count == 0) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_no_overlap(dst));
    const size_t bytes = (size_t)count * raddle_dtype_bytes(dst->dtype);
    const bool on_host = dst->device.type == RADDLE_CPU && src->device.type == RADDLE_CPU;
    const bool one_piece = share_dense_layout(dst, src, count);
    if (on_host && one_piece) {
        memmove(dst->data, src->data, bytes);
        return RADDLE_OK;
    }
    if (on_host) {
        return copy_on_host(dst, src, bytes);
    }
    RADDLE_REQUIRE(one_piece, RADDLE_ERR_UNSUPPORTED,
                   "%s: copies with a GPU need contiguous tensors, or the same dense strides on "
                   "both sides; make "
                   "contiguous copies first",
                   src->name);
    return copy_with_device(dst, src, bytes, stream);
}

raddle_status raddle_tensor_zero(const raddle_tensor *dst, raddle_stream stream) {
    static const uint64_t zero = 0;
    RADDLE_TRY(raddle_tensor_check_writable(dst));
    const int64_t count = raddle_tensor_count(dst);
    if (count == 0) {
        return RADDLE_OK;
    }
    const size_t bytes = (size_t)count * raddle_dtype_bytes(dst->dtype);
    if (share_dense_layout(dst, dst, count)) {
        const raddle_backend *backend = NULL;
        RADDLE_TRY(raddle_backend_for(dst->device, &backend));
        return backend->fill(dst->device.index, dst->data, 0, bytes, stream);
    }
    RADDLE_REQUIRE(
        dst->device.type == RADDLE_CPU, RADDLE_ERR_UNSUPPORTED,
        "%s: clearing a view with gaps on a GPU is not supported; clear the whole tensor",
        dst->name);
    raddle_tensor zeros = *dst;
    zeros.data = (void *)(uintptr_t)&zero;
    memset(zeros.stride, 0, sizeof zeros.stride);
    copy_strided(dst, &zeros);
    return RADDLE_OK;
}

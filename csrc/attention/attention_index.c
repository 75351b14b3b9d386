/* attention_index.c - lengths and positions from index tensors, where those lie.
 *
 * On the CPU every entry is checked; on CUDA the kernels take what they find and append skips what
 * does not lead to a page.
 */
#include "attention/attention.h"

#include "base/tensor.h"
#include "cuda/kernel.h"
#include "kernels/attention/attention_index_params.h"

enum { INDEX_BLOCK = 256 };

static raddle_status check_index(const raddle_tensor *tensor, raddle_device device, int64_t count) {
    RADDLE_TRY(raddle_tensor_check_index_dtype(tensor));
    RADDLE_TRY(raddle_tensor_check_device(tensor, device));
    return raddle_tensor_check_shape(tensor, 1, &count);
}

static raddle_status check_out(const raddle_tensor *tensor, raddle_device device, int64_t count) {
    RADDLE_TRY(check_index(tensor, device, count));
    RADDLE_TRY(raddle_tensor_check_writable(tensor));
    return raddle_tensor_check_no_overlap(tensor);
}

static raddle_status check_indptr(const raddle_tensor *indptr, int64_t *out_batch) {
    RADDLE_TRY(check_index(indptr, indptr->device, -1));
    RADDLE_REQUIRE(indptr->shape[0] >= 1, RADDLE_ERR_SHAPE,
                   "%s: expected batch + 1 entries, got none", indptr->name);
    *out_batch = indptr->shape[0] - 1;
    return RADDLE_OK;
}

static void store_index(const raddle_tensor *tensor, int64_t i, int64_t value) {
    const int64_t at = i * tensor->stride[0];
    if (tensor->dtype == RADDLE_I64) {
        ((int64_t *)tensor->data)[at] = value;
    } else {
        ((int32_t *)tensor->data)[at] = (int32_t)value;
    }
}

static raddle_status read_step(const raddle_tensor *indptr, int64_t i, int64_t *out_begin,
                               int64_t *out_end) {
    *out_begin = raddle_tensor_index_at(indptr, i);
    *out_end = raddle_tensor_index_at(indptr, i + 1);
    RADDLE_REQUIRE((i > 0 || *out_begin == 0) && *out_end >= *out_begin, RADDLE_ERR_VALUE,
                   "%s: expected a non-decreasing sequence from 0, got %lld, %lld at position %lld",
                   indptr->name, (long long)*out_begin, (long long)*out_end, (long long)i);
    return RADDLE_OK;
}

static raddle_status seq_lens_cpu(const raddle_tensor *indptr, const raddle_tensor *last,
                                  int32_t page_size, const raddle_tensor *out, int64_t batch,
                                  bool write) {
    for (int64_t i = 0; i < batch; i++) {
        int64_t begin, end;
        RADDLE_TRY(read_step(indptr, i, &begin, &end));
        const int64_t pages = end - begin, tail = raddle_tensor_index_at(last, i);
        RADDLE_REQUIRE(pages == 0 || (tail >= 1 && tail <= page_size), RADDLE_ERR_VALUE,
                       "%s: expected 1 to page_size (%d) at position %lld, got %lld", last->name,
                       (int)page_size, (long long)i, (long long)tail);
        if (write) {
            store_index(out, i, pages > 0 ? (pages - 1) * page_size + tail : 0);
        }
    }
    return RADDLE_OK;
}

static raddle_status positions_cpu(const raddle_tensor *indptr, const raddle_tensor *seq_lens,
                                   const raddle_tensor *batch_indices,
                                   const raddle_tensor *positions, int64_t batch, bool write) {
    const int64_t rows = batch_indices->shape[0];
    int64_t row = 0;
    for (int64_t i = 0; i < batch; i++) {
        int64_t begin, end;
        RADDLE_TRY(read_step(indptr, i, &begin, &end));
        const int64_t length = raddle_tensor_index_at(seq_lens, i);
        RADDLE_REQUIRE(length >= end - begin && end <= rows, RADDLE_ERR_VALUE,
                       "%s: request %lld has %lld tokens of which %lld are appended, up to row "
                       "%lld of %lld",
                       seq_lens->name, (long long)i, (long long)length, (long long)(end - begin),
                       (long long)end, (long long)rows);
        for (; write && row < end; row++) {
            store_index(batch_indices, row, i);
            store_index(positions, row, length - (end - row));
        }
    }
    for (; write && row < rows; row++) {
        store_index(batch_indices, row, -1);
        store_index(positions, row, 0);
    }
    return RADDLE_OK;
}

static raddle_status launch_index(const char *name, const raddle_attention_index_params *params,
                                  int64_t threads, raddle_device where, raddle_stream stream) {
    const raddle_cuda_device *device = NULL;
    RADDLE_TRY(raddle_cuda_device_get(where.index, &device));
    bool pushed = false;
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    const raddle_launch launch = {
        .grid = {(unsigned)((threads + INDEX_BLOCK - 1) / INDEX_BLOCK), 1, 1},
        .block = {INDEX_BLOCK, 1, 1},
    };
    const raddle_kernel *kernel = NULL;
    raddle_status status = raddle_kernel_get(device, name, "", 0, &kernel);
    if (status == RADDLE_OK) {
        status = raddle_kernel_launch(device, kernel, &launch, params, stream);
    }
    raddle_cuda_pop(device, pushed);
    return status;
}

/* positions may be NULL. */
static raddle_attention_index_params make_params(const raddle_tensor *indptr,
                                                 const raddle_tensor *lengths,
                                                 const raddle_tensor *out,
                                                 const raddle_tensor *positions) {
    return (raddle_attention_index_params){
        .indptr = indptr->data,
        .lengths = lengths->data,
        .out = out->data,
        .positions = positions == NULL ? NULL : positions->data,
        .indptr_stride = indptr->stride[0],
        .lengths_stride = lengths->stride[0],
        .out_stride = out->stride[0],
        .positions_stride = positions == NULL ? 0 : positions->stride[0],
        .batch = indptr->shape[0] - 1,
        .rows = out->shape[0],
        .wide = (indptr->dtype == RADDLE_I64 ? 1 : 0) | (lengths->dtype == RADDLE_I64 ? 2 : 0) |
                (out->dtype == RADDLE_I64 ? 4 : 0) |
                (positions != NULL && positions->dtype == RADDLE_I64 ? 8 : 0),
    };
}

raddle_status raddle_attention_seq_lens(const raddle_tensor *indptr,
                                        const raddle_tensor *last_page_len, int32_t page_size,
                                        const raddle_tensor *out, raddle_stream stream) {
    int64_t batch = 0;
    RADDLE_TRY(check_indptr(indptr, &batch));
    RADDLE_TRY(check_index(last_page_len, indptr->device, batch));
    RADDLE_TRY(check_out(out, indptr->device, batch));
    RADDLE_REQUIRE(page_size >= 1, RADDLE_ERR_VALUE, "page_size: expected at least 1 token, got %d",
                   (int)page_size);
    if (batch == 0) {
        return RADDLE_OK;
    }
    if (indptr->device.type == RADDLE_CPU) {
        RADDLE_TRY(seq_lens_cpu(indptr, last_page_len, page_size, out, batch, false));
        return seq_lens_cpu(indptr, last_page_len, page_size, out, batch, true);
    }
    raddle_attention_index_params params = make_params(indptr, last_page_len, out, NULL);
    params.page_size = page_size;
    return launch_index("attention/attention_seq_lens", &params, batch, indptr->device, stream);
}

raddle_status raddle_attention_positions(const raddle_tensor *append_indptr,
                                         const raddle_tensor *seq_lens,
                                         const raddle_tensor *batch_indices,
                                         const raddle_tensor *positions, raddle_stream stream) {
    int64_t batch = 0;
    RADDLE_TRY(check_indptr(append_indptr, &batch));
    RADDLE_TRY(check_index(seq_lens, append_indptr->device, batch));
    RADDLE_TRY(check_out(batch_indices, append_indptr->device, -1));
    RADDLE_TRY(check_out(positions, append_indptr->device, batch_indices->shape[0]));
    if (append_indptr->device.type == RADDLE_CPU) {
        RADDLE_TRY(positions_cpu(append_indptr, seq_lens, batch_indices, positions, batch, false));
        return positions_cpu(append_indptr, seq_lens, batch_indices, positions, batch, true);
    }
    if (batch_indices->shape[0] == 0) {
        return RADDLE_OK;
    }
    const raddle_attention_index_params params =
        make_params(append_indptr, seq_lens, batch_indices, positions);
    return launch_index("attention/attention_positions", &params, params.rows,
                        append_indptr->device, stream);
}

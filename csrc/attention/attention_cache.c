/* attention_cache.c - writes new K and V rows into a paged cache, by page table or by slot number.
 *
 * Both doors end in one job: row i of k and v goes to a slot, page * page_size + offset, or is
 * skipped. On the CPU all places are checked before the first byte is written. On CUDA the indices
 * are only seen by the kernel, which skips what lies outside the pool; with RADDLE_CHECK the next
 * call reports it (attention_check.c). Two rows that name the same slot: which one stays is not
 * defined.
 */
#include "attention/attention.h"

#include <string.h>

#include "base/tensor.h"
#include "base/threads.h"
#include "cuda/kernel.h"

enum {
    APPEND_GRAIN_BYTES = 128 * 1024, /* less than this is not worth a second thread */
    APPEND_BLOCK = 128,              /* threads of a CTA, which moves one row */
    SLOT_SKIP = -1,
};

typedef struct append_job {
    const raddle_tensor *k, *v;
    const raddle_kv_cache *kv;
    const raddle_tensor *slots; /* or NULL and the four below */
    const raddle_tensor *batch_indices, *positions;
    const raddle_tensor *kv_indptr, *kv_indices;
    int64_t rows;
} append_job;

/* ---------------------------------------------------------------- validation */

static raddle_status check_rows(const raddle_tensor *rows, const raddle_kv_cache *kv, int64_t count,
                                int32_t head_dim, raddle_dtype dtype) {
    const int64_t shape[3] = {count, kv->num_kv_heads, head_dim};
    RADDLE_TRY(raddle_tensor_check_device(rows, kv->device));
    RADDLE_TRY(raddle_tensor_check_shape(rows, 3, shape));
    RADDLE_TRY(raddle_tensor_check_dtype(rows, dtype));
    return raddle_tensor_check_inner_contiguous(rows);
}

static raddle_status check_indices(const raddle_tensor *indices, const raddle_kv_cache *kv,
                                   int64_t count) {
    RADDLE_TRY(raddle_tensor_check_device(indices, kv->device));
    RADDLE_TRY(raddle_tensor_check_shape(indices, 1, &count));
    return raddle_tensor_check_index_dtype(indices);
}

static raddle_status check_job(const append_job *job) {
    const raddle_kv_cache *kv = job->kv;
    RADDLE_REQUIRE(kv->page_size >= 1, RADDLE_ERR_VALUE,
                   "kv cache: append needs a paged cache, got ragged K and V (page_size 0)");
    RADDLE_REQUIRE(!kv->read_only, RADDLE_ERR_VALUE,
                   "kv cache: append writes into it, but it is read-only");
    RADDLE_TRY(check_rows(job->k, kv, -1, kv->head_dim_qk, kv->k_dtype));
    RADDLE_TRY(check_rows(job->v, kv, job->rows, kv->head_dim_vo, kv->v_dtype));
    if (job->slots) {
        return check_indices(job->slots, kv, job->rows);
    }
    RADDLE_TRY(check_indices(job->batch_indices, kv, job->rows));
    RADDLE_TRY(check_indices(job->positions, kv, job->rows));
    RADDLE_TRY(check_indices(job->kv_indptr, kv, -1));
    RADDLE_TRY(check_indices(job->kv_indices, kv, -1));
    RADDLE_REQUIRE(job->kv_indptr->shape[0] >= 1, RADDLE_ERR_SHAPE,
                   "%s: expected batch + 1 entries, got none", job->kv_indptr->name);
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- CPU */

/* Slot of row i by the page table, or SLOT_SKIP. */
static raddle_status slot_by_table(const append_job *job, int64_t i, int64_t *out_slot) {
    const raddle_kv_cache *kv = job->kv;
    const int64_t batch = job->kv_indptr->shape[0] - 1;
    const int64_t request = raddle_tensor_index_at(job->batch_indices, i);
    if (request < 0) {
        *out_slot = SLOT_SKIP;
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(request < batch, RADDLE_ERR_VALUE,
                   "%s: request %lld at row %lld is out of range for %lld requests",
                   job->batch_indices->name, (long long)request, (long long)i, (long long)batch);
    const int64_t position = raddle_tensor_index_at(job->positions, i);
    RADDLE_REQUIRE(position >= 0, RADDLE_ERR_VALUE, "%s: position %lld at row %lld is negative",
                   job->positions->name, (long long)position, (long long)i);
    const int64_t begin = raddle_tensor_index_at(job->kv_indptr, request);
    const int64_t end = raddle_tensor_index_at(job->kv_indptr, request + 1);
    RADDLE_REQUIRE(begin >= 0 && begin <= end && end <= job->kv_indices->shape[0], RADDLE_ERR_VALUE,
                   "%s: request %lld has page table entries %lld..%lld, expected a rising range "
                   "within the %lld of %s",
                   job->kv_indptr->name, (long long)request, (long long)begin, (long long)end,
                   (long long)job->kv_indices->shape[0], job->kv_indices->name);
    const int64_t entry = position / kv->page_size;
    RADDLE_REQUIRE(entry < end - begin, RADDLE_ERR_VALUE,
                   "%s: position %lld at row %lld needs %lld pages of %d tokens, but request %lld "
                   "has %lld in %s",
                   job->positions->name, (long long)position, (long long)i, (long long)entry + 1,
                   (int)kv->page_size, (long long)request, (long long)(end - begin),
                   job->kv_indptr->name);
    const int64_t page = raddle_tensor_index_at(job->kv_indices, begin + entry);
    RADDLE_REQUIRE(page >= 0 && page < kv->num_pages, RADDLE_ERR_VALUE,
                   "%s: page id %lld at position %lld is out of range for a cache of %lld pages",
                   job->kv_indices->name, (long long)page, (long long)(begin + entry),
                   (long long)kv->num_pages);
    *out_slot = page * kv->page_size + position % kv->page_size;
    return RADDLE_OK;
}

static raddle_status slot_by_mapping(const append_job *job, int64_t i, int64_t *out_slot) {
    const int64_t slot = raddle_tensor_index_at(job->slots, i);
    const int64_t limit = job->kv->num_pages * job->kv->page_size;
    RADDLE_REQUIRE(slot >= SLOT_SKIP && slot < limit, RADDLE_ERR_VALUE,
                   "%s: slot %lld at row %lld is out of range for a cache of %lld slots (%lld "
                   "pages of %d tokens; "
                   "-1 skips a row)",
                   job->slots->name, (long long)slot, (long long)i, (long long)limit,
                   (long long)job->kv->num_pages, (int)job->kv->page_size);
    *out_slot = slot;
    return RADDLE_OK;
}

static raddle_status row_slot(const append_job *job, int64_t i, int64_t *out_slot) {
    return job->slots ? slot_by_mapping(job, i, out_slot) : slot_by_table(job, i, out_slot);
}

/* Copies the heads of one row of rows to one token of a cache. */
static void copy_row(char *cache, int64_t cache_stride_head, const raddle_tensor *rows, int64_t i,
                     size_t element) {
    const size_t bytes = (size_t)rows->shape[2] * element;
    const char *src = (const char *)rows->data + i * rows->stride[0] * (int64_t)element;
    for (int64_t h = 0; h < rows->shape[1]; h++) {
        memcpy(cache + h * cache_stride_head * (int64_t)element,
               src + h * rows->stride[1] * (int64_t)element, bytes);
    }
}

static void append_rows(void *context, int64_t begin, int64_t end, int worker) {
    const append_job *job = context;
    const raddle_kv_cache *kv = job->kv;
    const size_t k_element = raddle_dtype_bytes(kv->k_dtype);
    const size_t v_element = raddle_dtype_bytes(kv->v_dtype);
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        int64_t slot = SLOT_SKIP;
        if (row_slot(job, i, &slot) != RADDLE_OK || slot < 0) {
            continue; /* all slots were checked before: only a skip comes here */
        }
        const int64_t page = slot / kv->page_size;
        const int64_t token = slot % kv->page_size;
        const int64_t k_at = page * kv->k_stride_page + token * kv->k_stride_token;
        const int64_t v_at = page * kv->v_stride_page + token * kv->v_stride_token;
        copy_row((char *)kv->k + k_at * (int64_t)k_element, kv->k_stride_head, job->k, i,
                 k_element);
        copy_row((char *)kv->v + v_at * (int64_t)v_element, kv->v_stride_head, job->v, i,
                 v_element);
    }
}

static raddle_status append_cpu(const append_job *job, raddle_stream stream) {
    (void)stream;
    for (int64_t i = 0; i < job->rows; i++) {
        int64_t slot;
        RADDLE_TRY(row_slot(job, i, &slot));
    }
    const int64_t row_bytes = job->kv->num_kv_heads *
                              ((int64_t)job->kv->head_dim_qk + job->kv->head_dim_vo) *
                              (int64_t)raddle_dtype_bytes(job->kv->k_dtype);
    const int64_t grain = row_bytes > 0 ? 1 + APPEND_GRAIN_BYTES / row_bytes : job->rows;
    raddle_threads_for(append_rows, (void *)job, job->rows, grain);
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- CUDA */

static raddle_status check_cache_aligned(const char *what, const void *data,
                                         const int64_t strides[3], size_t element,
                                         int32_t head_dim) {
    bool aligned = (uintptr_t)data % 16 == 0 && ((size_t)head_dim * element) % 16 == 0;
    for (int i = 0; i < 3; i++) {
        aligned = aligned && (strides[i] * (int64_t)element) % 16 == 0;
    }
    RADDLE_REQUIRE(aligned, RADDLE_ERR_UNSUPPORTED,
                   "kv cache: on CUDA the rows of %s must start at multiples of 16 bytes and be "
                   "that long; got head_dim "
                   "%d and strides of %lld, %lld, %lld elements of %zu bytes at address %p",
                   what, (int)head_dim, (long long)strides[0], (long long)strides[1],
                   (long long)strides[2], element, data);
    return RADDLE_OK;
}

static void bind_index(const raddle_tensor *tensor, const void **out_data, int64_t *out_stride,
                       int bit, int32_t *wide) {
    *out_data = tensor->data;
    *out_stride = tensor->stride[0];
    *wide |= tensor->dtype == RADDLE_I64 ? 1 << bit : 0;
}

static void fill_params(const append_job *job, raddle_attention_append_params *p) {
    const raddle_kv_cache *kv = job->kv;
    const int64_t k_element = (int64_t)raddle_dtype_bytes(kv->k_dtype);
    const int64_t v_element = (int64_t)raddle_dtype_bytes(kv->v_dtype);
    *p = (raddle_attention_append_params){
        .k = job->k->data,
        .v = job->v->data,
        .k_cache = kv->k,
        .v_cache = kv->v,
        .k_row_bytes = job->k->stride[0] * k_element,
        .k_head_bytes = job->k->stride[1] * k_element,
        .v_row_bytes = job->v->stride[0] * v_element,
        .v_head_bytes = job->v->stride[1] * v_element,
        .k_cache_page_bytes = kv->k_stride_page * k_element,
        .k_cache_token_bytes = kv->k_stride_token * k_element,
        .k_cache_head_bytes = kv->k_stride_head * k_element,
        .v_cache_page_bytes = kv->v_stride_page * v_element,
        .v_cache_token_bytes = kv->v_stride_token * v_element,
        .v_cache_head_bytes = kv->v_stride_head * v_element,
        .rows = job->rows,
        .num_pages = kv->num_pages,
        .page_size = kv->page_size,
        .num_kv_heads = kv->num_kv_heads,
        .k_chunks = (int32_t)(kv->head_dim_qk * k_element / 16),
        .v_chunks = (int32_t)(kv->head_dim_vo * v_element / 16),
    };
    if (job->slots) {
        bind_index(job->slots, &p->slots, &p->slots_stride, 0, &p->wide);
        return;
    }
    bind_index(job->batch_indices, &p->batch_indices, &p->batch_indices_stride, 1, &p->wide);
    bind_index(job->positions, &p->positions, &p->positions_stride, 2, &p->wide);
    bind_index(job->kv_indptr, &p->kv_indptr, &p->kv_indptr_stride, 3, &p->wide);
    bind_index(job->kv_indices, &p->kv_indices, &p->kv_indices_stride, 4, &p->wide);
    p->num_indices = job->kv_indices->shape[0];
    p->batch = job->kv_indptr->shape[0] - 1;
}

static raddle_status append_cuda(const append_job *job, raddle_stream stream) {
    const raddle_kv_cache *kv = job->kv;
    const int64_t k_strides[3] = {kv->k_stride_page, kv->k_stride_token, kv->k_stride_head};
    const int64_t v_strides[3] = {kv->v_stride_page, kv->v_stride_token, kv->v_stride_head};
    RADDLE_TRY(check_cache_aligned("K", kv->k, k_strides, raddle_dtype_bytes(kv->k_dtype),
                                   kv->head_dim_qk));
    RADDLE_TRY(check_cache_aligned("V", kv->v, v_strides, raddle_dtype_bytes(kv->v_dtype),
                                   kv->head_dim_vo));
    RADDLE_TRY(raddle_tensor_check_aligned(job->k, 16));
    RADDLE_TRY(raddle_tensor_check_aligned(job->v, 16));
    RADDLE_REQUIRE(job->rows <= INT32_MAX, RADDLE_ERR_UNSUPPORTED,
                   "%s: at most %d rows in one call, got %lld", job->k->name, INT32_MAX,
                   (long long)job->rows);
    raddle_attention_append_params params;
    fill_params(job, &params);

    const raddle_cuda_device *device;
    RADDLE_TRY(raddle_cuda_device_get(kv->device.index, &device));
    RADDLE_TRY(raddle_attention_check_append(kv->device.index, stream, &params.error));
    bool pushed;
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    const raddle_launch launch = {
        .grid = {(unsigned)job->rows, 1, 1},
        .block = {APPEND_BLOCK, 1, 1},
        .programmatic_launch = device->arch >= 90,
    };
    const raddle_kernel *kernel;
    raddle_status status = raddle_kernel_get(device, "attention/attention_append", "", 0, &kernel);
    if (status == RADDLE_OK) {
        status = raddle_kernel_launch(device, kernel, &launch, &params, stream);
    }
    raddle_cuda_pop(device, pushed);
    return status;
}

static raddle_status append(append_job *job, raddle_stream stream) {
    job->rows = job->k->ndim > 0 ? job->k->shape[0] : 0; /* a wrong rank is refused by check_job */
    RADDLE_TRY(check_job(job));
    if (job->rows == 0) {
        return RADDLE_OK;
    }
    return job->kv->device.type == RADDLE_CUDA ? append_cuda(job, stream) : append_cpu(job, stream);
}

/* ---------------------------------------------------------------- public */

raddle_status raddle_attention_append(const raddle_tensor *k, const raddle_tensor *v,
                                      const raddle_tensor *batch_indices,
                                      const raddle_tensor *positions,
                                      const raddle_tensor *kv_indptr,
                                      const raddle_tensor *kv_indices, const raddle_kv_cache *kv,
                                      raddle_stream stream) {
    append_job job = {.k = k,
                      .v = v,
                      .kv = kv,
                      .batch_indices = batch_indices,
                      .positions = positions,
                      .kv_indptr = kv_indptr,
                      .kv_indices = kv_indices};
    return append(&job, stream);
}

raddle_status raddle_attention_append_slots(const raddle_tensor *k, const raddle_tensor *v,
                                            const raddle_tensor *slot_mapping,
                                            const raddle_kv_cache *kv, raddle_stream stream) {
    append_job job = {.k = k, .v = v, .kv = kv, .slots = slot_mapping};
    return append(&job, stream);
}

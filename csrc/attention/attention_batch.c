/* attention_batch.c - reads the index tensors of one update: requests and page table, checked, in
 * the plan's own form.
 *
 * Host tensors are read in place and checked entry by entry. Lengths that lie on the device are
 * copied and waited for, since the schedule is made on the host; an int32 page table there is left
 * to be copied on the device.
 */
#include "attention/attention.h"

#include "base/alloc.h"
#include "base/tensor.h"
#include "cpu/vec.h"

/* Index tensors of one update, opened for the host. */
enum { QO_INDPTR, KV_LENGTHS, KV_TAILS, PAGES, NUM_INDEX };

/* ------------------------------------------------------------------ index tensors to the host */

/* A 1-D index tensor readable on the host: the caller's own memory, or a copy of device memory. */
typedef struct index_view {
    raddle_tensor tensor;
    void *copy;
} index_view;

static raddle_status check_index(const raddle_tensor *tensor, int64_t least) {
    RADDLE_TRY(raddle_tensor_check_index_dtype(tensor));
    RADDLE_REQUIRE(tensor->ndim == 1 && tensor->shape[0] >= least, RADDLE_ERR_SHAPE,
                   "%s: expected 1 dimension of at least %lld entries, got %d dimensions%s",
                   tensor->name, (long long)least, (int)tensor->ndim,
                   tensor->ndim == 1 ? " and too few entries" : "");
    return RADDLE_OK;
}

/* Device memory is copied and waited for: a plan from device index tensors costs a synchronisation.
 */
static raddle_status open_index(const raddle_attention_plan *plan, const raddle_tensor *tensor,
                                raddle_stream stream, index_view *view) {
    *view = (index_view){.tensor = *tensor};
    if (tensor->device.type == RADDLE_CPU) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_device(tensor, plan->base.device));
    RADDLE_REQUIRE(
        raddle_tensor_is_contiguous(tensor), RADDLE_ERR_SHAPE,
        "%s: expected a contiguous tensor on the device; make it so, or pass it from the "
        "host",
        tensor->name);
    const raddle_backend *backend = plan->base.backend;
    const size_t bytes = (size_t)raddle_tensor_count(tensor) * raddle_dtype_bytes(tensor->dtype);
    view->copy = raddle_alloc(bytes);
    if (view->copy == NULL) {
        return raddle_fail_memory(bytes);
    }
    raddle_status status = backend->copy(plan->base.device.index, view->copy, tensor->data, bytes,
                                         RADDLE_COPY_TO_HOST, stream);
    if (status == RADDLE_OK) {
        status = backend->synchronize(plan->base.device.index, stream);
    }
    if (status != RADDLE_OK) {
        raddle_free(view->copy);
        view->copy = NULL;
        return status;
    }
    view->tensor.data = view->copy;
    return RADDLE_OK;
}

static void close_index(index_view *view) {
    raddle_free(view->copy);
    view->copy = NULL;
}

/* ------------------------------------------------------------------ requests */

static raddle_status check_indptr_step(const raddle_tensor *indptr, int64_t i, int64_t begin,
                                       int64_t end) {
    RADDLE_REQUIRE(i > 0 || begin == 0, RADDLE_ERR_VALUE, "%s: expected 0 at position 0, got %lld",
                   indptr->name, (long long)begin);
    RADDLE_REQUIRE(end >= begin, RADDLE_ERR_VALUE,
                   "%s: expected a non-decreasing sequence, got %lld after %lld at position %lld",
                   indptr->name, (long long)end, (long long)begin, (long long)(i + 1));
    RADDLE_REQUIRE(end <= INT32_MAX, RADDLE_ERR_VALUE, "%s: %lld at position %lld passes 31 bits",
                   indptr->name, (long long)end, (long long)(i + 1));
    return RADDLE_OK;
}

static raddle_status fill_queries(const raddle_attention_plan *plan, const raddle_tensor *qo_indptr,
                                  int32_t batch, raddle_attention_request *requests) {
    for (int32_t i = 0; i < batch; i++) {
        int64_t begin = i, end = (int64_t)i + 1;
        if (qo_indptr != NULL) {
            begin = raddle_tensor_index_at(qo_indptr, i);
            end = raddle_tensor_index_at(qo_indptr, (int64_t)i + 1);
            RADDLE_TRY(check_indptr_step(qo_indptr, i, begin, end));
        }
        RADDLE_REQUIRE(plan->spec.max_qo_len == 0 || end - begin <= plan->spec.max_qo_len,
                       RADDLE_ERR_CAPACITY,
                       "%s: request %d has %lld query rows, the plan was made for %d (max_qo_len)",
                       qo_indptr == NULL ? "indptr" : qo_indptr->name, (int)i,
                       (long long)(end - begin), (int)plan->spec.max_qo_len);
        RADDLE_REQUIRE(end <= plan->limits.max_qo_tokens, RADDLE_ERR_CAPACITY,
                       "%s: the batch has %lld query rows or more, the plan was made for %lld "
                       "(max_qo_tokens)",
                       qo_indptr == NULL ? "indptr" : qo_indptr->name, (long long)end,
                       (long long)plan->limits.max_qo_tokens);
        requests[i].qo_begin = (int32_t)begin;
        requests[i].qo_len = (int32_t)(end - begin);
    }
    return RADDLE_OK;
}

static raddle_status fill_csr_lengths(const raddle_attention_plan *plan,
                                      const raddle_tensor *indptr, const raddle_tensor *last,
                                      int32_t batch, raddle_attention_request *requests) {
    const int64_t page_size = plan->spec.page_size;
    int64_t begin = raddle_tensor_index_at(indptr, 0);
    for (int32_t i = 0; i < batch; i++) {
        const int64_t end = raddle_tensor_index_at(indptr, (int64_t)i + 1);
        RADDLE_TRY(check_indptr_step(indptr, i, begin, end));
        int64_t kv_len = end - begin;
        if (last != NULL) {
            const int64_t tail = raddle_tensor_index_at(last, i);
            RADDLE_REQUIRE(
                kv_len == 0 ? tail == 0 : tail >= 1 && tail <= page_size, RADDLE_ERR_VALUE,
                "%s: expected %s at position %d, got %lld (request of %lld pages of %lld)",
                last->name, kv_len == 0 ? "0" : "1 to page_size", (int)i, (long long)tail,
                (long long)kv_len, (long long)page_size);
            kv_len = kv_len == 0 ? 0 : (kv_len - 1) * page_size + tail;
            RADDLE_REQUIRE(kv_len <= INT32_MAX, RADDLE_ERR_VALUE,
                           "%s: request %d has %lld tokens, more than 31 bits count", indptr->name,
                           (int)i, (long long)kv_len);
        }
        requests[i].kv_begin = (int32_t)begin;
        requests[i].kv_len = (int32_t)kv_len;
        begin = end;
    }
    RADDLE_REQUIRE(begin <= plan->limits.max_pages, RADDLE_ERR_CAPACITY,
                   "%s: the batch has %lld %s, the plan was made for %lld (%s)", indptr->name,
                   (long long)begin, page_size > 0 ? "pages" : "K/V rows",
                   (long long)plan->limits.max_pages,
                   page_size > 0 ? "max_pages" : "max_kv_tokens");
    return RADDLE_OK;
}

static raddle_status fill_table_lengths(const raddle_attention_plan *plan,
                                        const raddle_tensor *table, const raddle_tensor *seq_lens,
                                        int32_t batch, raddle_attention_request *requests) {
    const int64_t width = table->shape[1], page_size = plan->spec.page_size;
    for (int32_t i = 0; i < batch; i++) {
        const int64_t kv_len = raddle_tensor_index_at(seq_lens, i);
        RADDLE_REQUIRE(kv_len >= 0 && kv_len <= width * page_size && kv_len <= INT32_MAX,
                       RADDLE_ERR_VALUE,
                       "%s: expected 0 to %lld tokens (%lld pages of %lld in block_table) at "
                       "position %d, got %lld",
                       seq_lens->name, (long long)(width * page_size), (long long)width,
                       (long long)page_size, (int)i, (long long)kv_len);
        requests[i].kv_begin = (int32_t)(i * width);
        requests[i].kv_len = (int32_t)kv_len;
    }
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ page table */

static raddle_status copy_pages(const raddle_tensor *table, int64_t first, int64_t count,
                                int64_t stride, int32_t *out, raddle_attention_reading *reading) {
    if (table->dtype == RADDLE_I32 && stride == 1 && count > 0) {
        const int32_t *ids = (const int32_t *)table->data + first;
        const int64_t most = raddle_vec_get()->copy_ids(out, ids, count);
        if (most <= INT32_MAX) {
            reading->max_page_id = most > reading->max_page_id ? most : reading->max_page_id;
            return RADDLE_OK;
        } /* else the loop finds the first bad one */
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = first + i * stride;
        const int64_t id = table->dtype == RADDLE_I64 ? ((const int64_t *)table->data)[at]
                                                      : ((const int32_t *)table->data)[at];
        RADDLE_REQUIRE(id >= 0 && id <= INT32_MAX, RADDLE_ERR_VALUE,
                       "%s: page id %lld at position %lld is out of range", table->name,
                       (long long)id, (long long)i);
        reading->max_page_id = id > reading->max_page_id ? id : reading->max_page_id;
        out[i] = (int32_t)id;
    }
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ the batch as a whole */

raddle_status raddle_attention_batch_check(const raddle_attention_plan *plan,
                                           const raddle_attention_batch *batch,
                                           int32_t *out_batch) {
    const bool paged = plan->spec.page_size > 0, table = batch->block_table != NULL;
    RADDLE_REQUIRE((batch->qo_indptr == NULL) == (plan->spec.max_qo_len == 1), RADDLE_ERR_VALUE,
                   "qo_indptr: a decode plan (max_qo_len 1) takes none, every other plan needs it");
    int64_t count = 0;
    if (table) {
        const raddle_tensor *blocks = batch->block_table;
        RADDLE_REQUIRE(paged && batch->seq_lens != NULL && batch->kv_indptr == NULL &&
                           batch->kv_indices == NULL && batch->last_page_len == NULL,
                       RADDLE_ERR_VALUE,
                       "block_table: goes with seq_lens, in place of indptr, indices and "
                       "last_page_len, on a paged plan");
        RADDLE_TRY(raddle_tensor_check_index_dtype(blocks));
        RADDLE_REQUIRE(blocks->ndim == 2, RADDLE_ERR_SHAPE,
                       "%s: expected [batch, max_blocks], got %d dimensions", blocks->name,
                       (int)blocks->ndim);
        count = blocks->shape[0];
        RADDLE_TRY(check_index(batch->seq_lens, count));
        RADDLE_REQUIRE(batch->seq_lens->shape[0] == count, RADDLE_ERR_SHAPE,
                       "%s: expected [%lld] as block_table has rows, got [%lld]",
                       batch->seq_lens->name, (long long)count,
                       (long long)batch->seq_lens->shape[0]);
        RADDLE_REQUIRE(count * blocks->shape[1] <= plan->limits.max_pages, RADDLE_ERR_CAPACITY,
                       "%s: has %lld entries, the plan was made for %lld (max_pages)", blocks->name,
                       (long long)(count * blocks->shape[1]), (long long)plan->limits.max_pages);
    } else {
        RADDLE_REQUIRE(
            batch->kv_indptr != NULL && batch->seq_lens == NULL, RADDLE_ERR_VALUE,
            "indptr: expected [batch + 1] offsets (seq_lens goes with block_table only)");
        RADDLE_REQUIRE(paged == (batch->kv_indices != NULL) &&
                           paged == (batch->last_page_len != NULL),
                       RADDLE_ERR_VALUE, "indices, last_page_len: %s",
                       paged ? "a paged plan needs both" : "a ragged plan takes neither");
        RADDLE_TRY(check_index(batch->kv_indptr, 1));
        count = batch->kv_indptr->shape[0] - 1;
    }
    RADDLE_REQUIRE(count <= plan->limits.max_batch, RADDLE_ERR_CAPACITY,
                   "indptr: the batch has %lld requests, the plan was made for %d (max_batch)",
                   (long long)count, (int)plan->limits.max_batch);
    if (batch->qo_indptr != NULL) {
        RADDLE_TRY(check_index(batch->qo_indptr, 1));
        RADDLE_REQUIRE(batch->qo_indptr->shape[0] == count + 1, RADDLE_ERR_SHAPE,
                       "%s: expected [%lld], one more than the batch; got [%lld]",
                       batch->qo_indptr->name, (long long)(count + 1),
                       (long long)batch->qo_indptr->shape[0]);
    }
    if (batch->last_page_len != NULL) {
        RADDLE_TRY(check_index(batch->last_page_len, 0));
        RADDLE_REQUIRE(batch->last_page_len->shape[0] == count, RADDLE_ERR_SHAPE,
                       "%s: expected [%lld], the batch; got [%lld]", batch->last_page_len->name,
                       (long long)count, (long long)batch->last_page_len->shape[0]);
    }
    *out_batch = (int32_t)count;
    return RADDLE_OK;
}

static raddle_status read_views(const raddle_attention_plan *plan,
                                const raddle_attention_batch *batch, const index_view *views,
                                raddle_attention_request *requests, int32_t *pages,
                                raddle_attention_reading *reading) {
    const raddle_tensor *qo_indptr = batch->qo_indptr == NULL ? NULL : &views[QO_INDPTR].tensor;
    const raddle_tensor *lengths = &views[KV_LENGTHS].tensor;
    const int32_t count = reading->batch;
    const int64_t page_size = plan->spec.page_size;
    RADDLE_TRY(fill_queries(plan, qo_indptr, count, requests));
    if (batch->block_table != NULL) {
        RADDLE_TRY(fill_table_lengths(plan, batch->block_table, lengths, count, requests));
        reading->num_pages = count * batch->block_table->shape[1];
    } else {
        const raddle_tensor *tails = batch->last_page_len == NULL ? NULL : &views[KV_TAILS].tensor;
        RADDLE_TRY(fill_csr_lengths(plan, lengths, tails, count, requests));
        reading->num_pages = page_size == 0 ? 0 : raddle_tensor_index_at(lengths, count);
        RADDLE_REQUIRE(
            batch->kv_indices == NULL || batch->kv_indices->shape[0] >= reading->num_pages,
            RADDLE_ERR_SHAPE, "%s: expected at least %lld entries (%s ends there), got %lld",
            batch->kv_indices->name, (long long)reading->num_pages, batch->kv_indptr->name,
            (long long)batch->kv_indices->shape[0]);
    }
    if (reading->device_pages != NULL || reading->num_pages == 0) {
        return RADDLE_OK;
    }
    const raddle_tensor *table = &views[PAGES].tensor;
    if (batch->block_table == NULL) {
        return copy_pages(table, 0, reading->num_pages, table->stride[0], pages, reading);
    }
    /* Rows end in padding that may be anything: only what a request uses is looked at. */
    for (int32_t i = 0; i < count; i++) {
        const int64_t used = (requests[i].kv_len + page_size - 1) / page_size;
        RADDLE_TRY(copy_pages(table, i * table->stride[0], used, table->stride[1],
                              pages + requests[i].kv_begin, reading));
    }
    return RADDLE_OK;
}

static raddle_status open_views(const raddle_attention_plan *plan,
                                const raddle_attention_batch *batch, raddle_stream stream,
                                index_view *views, raddle_attention_reading *reading) {
    const raddle_tensor *pages = batch->block_table ? batch->block_table : batch->kv_indices;
    if (pages != NULL && pages->device.type != RADDLE_CPU && pages->dtype == RADDLE_I32) {
        RADDLE_TRY(raddle_tensor_check_device(pages, plan->base.device));
        RADDLE_REQUIRE(
            raddle_tensor_is_contiguous(pages), RADDLE_ERR_SHAPE,
            "%s: expected a contiguous tensor on the device; make it so, or pass it from "
            "the host",
            pages->name);
        reading->device_pages = pages->data;
        pages = NULL;
    }
    const raddle_tensor *tensors[NUM_INDEX] = {
        batch->qo_indptr,
        batch->block_table ? batch->seq_lens : batch->kv_indptr,
        batch->last_page_len,
        pages,
    };
    for (int i = 0; i < NUM_INDEX; i++) {
        if (tensors[i] != NULL) {
            RADDLE_TRY(open_index(plan, tensors[i], stream, &views[i]));
        }
    }
    return RADDLE_OK;
}

raddle_status raddle_attention_batch_read(const raddle_attention_plan *plan,
                                          const raddle_attention_batch *batch, raddle_stream stream,
                                          raddle_attention_request *requests, int32_t *pages,
                                          raddle_attention_reading *out_reading) {
    raddle_attention_reading reading = {.max_page_id = -1};
    RADDLE_TRY(raddle_attention_batch_check(plan, batch, &reading.batch));
    index_view views[NUM_INDEX] = {0};
    raddle_status status = open_views(plan, batch, stream, views, &reading);
    if (status == RADDLE_OK) {
        status = read_views(plan, batch, views, requests, pages, &reading);
    }
    for (int i = 0; i < NUM_INDEX; i++) {
        close_index(&views[i]);
    }
    if (status == RADDLE_OK) {
        *out_reading = reading;
    }
    return status;
}

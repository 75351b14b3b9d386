/* attention_plan.c - the life of an attention plan: create, update with a batch, run.
 *
 * One block of device memory, at an address that never changes, holds what update() sends:
 *   header | requests | worker_indptr | merges | segments | page table
 * It is written in a pinned slot and copied in at most two pieces (the page table starts behind room for the most
 * segments). A captured graph therefore stays valid across updates.
 */
#include "attention/attention.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/tensor.h"

/* ------------------------------------------------------------------ layouts */

/* Places of the schedule's arrays in the block; data is the device's or a slot's. */
typedef struct block_view {
    raddle_attention_schedule schedule;
    int32_t *pages;
    size_t bytes;
} block_view;

static block_view view_block(const raddle_attention_plan *plan, void *data) {
    const raddle_attention_limits *limits = &plan->limits;
    block_view view = {0};
    raddle_arena arena;
    if (data == NULL) {
        raddle_arena_measure(&arena);
    } else {
        raddle_arena_carve(&arena, data, plan->staging.bytes, false);
    }
    view.schedule.header = raddle_arena_take(&arena, sizeof(raddle_attention_header));
    view.schedule.requests =
        raddle_arena_take(&arena, (size_t)limits->max_batch * sizeof(raddle_attention_request));
    view.schedule.worker_indptr =
        raddle_arena_take(&arena, ((size_t)plan->config.num_workers + 1) * sizeof(int32_t));
    view.schedule.merges =
        raddle_arena_take(&arena, (size_t)limits->max_merges * sizeof(raddle_attention_merge));
    view.schedule.segments =
        raddle_arena_take(&arena, (size_t)limits->max_segments * sizeof(raddle_attention_segment));
    view.pages = plan->spec.page_size > 0
                     ? raddle_arena_take(&arena, (size_t)limits->max_pages * sizeof(int32_t))
                     : NULL;
    view.bytes = raddle_arena_bytes(&arena);
    return view;
}

static void layout_scratch(raddle_plan *base, raddle_arena *arena) {
    raddle_attention_plan *plan = (raddle_attention_plan *)base;
    const raddle_attention_config *config = &plan->config;
    const size_t rows =
        (size_t)plan->limits.max_slots * (size_t)config->heads_per_item * (size_t)config->tile_rows;
    float *out = raddle_arena_take(arena, rows * (size_t)config->head_dim_vo * sizeof(float));
    float *state = raddle_arena_take(arena, rows * 2 * sizeof(float));
    if (out != NULL && state != NULL) {
        plan->params.partial_out = out;
        plan->params.partial_state = state;
    }
}

/* ------------------------------------------------------------------ create and destroy */

static void fini_plan(raddle_plan *base) {
    raddle_attention_plan *plan = (raddle_attention_plan *)base;
    if (plan->ops != NULL) {
        plan->ops->release(plan);
    }
    raddle_staging_fini(&plan->staging);
    base->backend->free(base->device.index, plan->arrivals);
}

static const raddle_plan_ops plan_ops = {
    .family = "attention", .layout = layout_scratch, .fini = fini_plan};

/* What every run passes, and does not change between updates. */
static void fill_constant_params(raddle_attention_plan *plan) {
    const raddle_attention_spec *spec = &plan->spec;
    const raddle_attention_config *config = &plan->config;
    const block_view view = view_block(plan, plan->staging.data);
    const float log2_e = 1.44269504088896340736f, ln_2 = 0.69314718055994530942f;
    plan->pages_offset =
        view.pages == NULL ? 0 : (size_t)((char *)view.pages - (char *)plan->staging.data);
    plan->params.header = view.schedule.header;
    plan->params.requests = view.schedule.requests;
    plan->params.segments = view.schedule.segments;
    plan->params.worker_indptr = view.schedule.worker_indptr;
    plan->params.merges = view.schedule.merges;
    plan->params.page_indices = view.pages;
    plan->params.arrivals = plan->arrivals;
    plan->params.num_qo_heads = config->num_qo_heads;
    plan->params.num_kv_heads = config->num_kv_heads;
    plan->params.group_size = config->group_size;
    plan->params.page_size = config->page_size;
    plan->params.window_left = spec->window_left;
    plan->params.causal = config->causal;
    plan->params.sm_scale_log2 = spec->sm_scale * log2_e;
    plan->params.lse_scale = spec->lse_base == RADDLE_LSE_BASE_E ? ln_2 : 1.0f;
}

static raddle_status build_plan(raddle_attention_plan *plan) {
    raddle_attention_config_from_spec(&plan->spec, &plan->config);
    plan->ops = plan->base.device.type == RADDLE_CPU ? &raddle_attention_ops_cpu
                                                     : &raddle_attention_ops_cuda;
    RADDLE_TRY(plan->ops->prepare(plan));
    RADDLE_TRY(raddle_attention_limits_derive(&plan->spec, &plan->config, &plan->limits));
    const raddle_backend *backend = plan->base.backend;
    const int32_t device = plan->base.device.index;
    const size_t arrivals_bytes = ((size_t)plan->limits.max_merges + 1) * sizeof(int32_t);
    RADDLE_TRY(raddle_staging_init(&plan->staging, plan->base.device, view_block(plan, NULL).bytes));
    RADDLE_TRY(backend->alloc(device, arrivals_bytes, (void **)&plan->arrivals));
    RADDLE_TRY(backend->fill(device, plan->arrivals, 0, arrivals_bytes, NULL));
    RADDLE_TRY(backend->synchronize(device, NULL));
    fill_constant_params(plan);
    plan->base.state = RADDLE_PLAN_READY;
    return RADDLE_OK;
}

raddle_status raddle_attention_plan_create(const raddle_attention_spec *spec,
                                           raddle_plan **out_plan) {
    raddle_attention_spec checked;
    RADDLE_TRY(raddle_attention_spec_check(spec, &checked));
    raddle_plan *base = NULL;
    RADDLE_TRY(raddle_plan_alloc(sizeof(raddle_attention_plan), &plan_ops, checked.device, &base));
    raddle_attention_plan *plan = (raddle_attention_plan *)base;
    plan->spec = checked;
    raddle_status status = build_plan(plan);
    if (status != RADDLE_OK) {
        raddle_plan_destroy(base);
        return status;
    }
    *out_plan = base;
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ update: index tensors to the host */

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

/* Device memory is copied and waited for: a plan from device index tensors costs a synchronisation. */
static raddle_status open_index(const raddle_attention_plan *plan, const raddle_tensor *tensor,
                                raddle_stream stream, index_view *view) {
    *view = (index_view){.tensor = *tensor};
    if (tensor->device.type == RADDLE_CPU) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_device(tensor, plan->base.device));
    RADDLE_REQUIRE(raddle_tensor_is_contiguous(tensor), RADDLE_ERR_SHAPE,
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

/* ------------------------------------------------------------------ update: requests */

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
            RADDLE_REQUIRE(kv_len == 0 ? tail == 0 : tail >= 1 && tail <= page_size,
                           RADDLE_ERR_VALUE,
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
                   (long long)plan->limits.max_pages, page_size > 0 ? "max_pages" : "max_kv_tokens");
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

/* ------------------------------------------------------------------ update: page table */

/* The largest page id that run() will check against the pool, and where it stands. */
typedef struct page_bound {
    int64_t id, position;
} page_bound;

static raddle_status copy_pages(const raddle_tensor *indices, int64_t first, int64_t count,
                                int64_t stride, int32_t *out, page_bound *bound) {
    const int64_t step = stride;
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = first + i * step;
        const int64_t id = indices->dtype == RADDLE_I64 ? ((const int64_t *)indices->data)[at]
                                                        : ((const int32_t *)indices->data)[at];
        if (id < 0 || id > bound->id) {
            RADDLE_REQUIRE(id >= 0 && id <= INT32_MAX, RADDLE_ERR_VALUE,
                           "%s: page id %lld at position %lld is out of range", indices->name,
                           (long long)id, (long long)i);
            *bound = (page_bound){.id = id, .position = i};
        }
        out[i] = (int32_t)id;
    }
    return RADDLE_OK;
}

static raddle_status fill_pages(const raddle_attention_plan *plan,
                                const raddle_attention_batch *batch,
                                const raddle_attention_request *requests, int32_t num_requests,
                                const raddle_tensor *indices, int32_t *out, page_bound *bound) {
    if (batch->block_table == NULL) {
        const raddle_attention_request *last = &requests[num_requests - 1];
        const int64_t page_size = plan->spec.page_size;
        const int64_t count = num_requests == 0
                                  ? 0
                                  : last->kv_begin + (last->kv_len + page_size - 1) / page_size;
        return copy_pages(indices, 0, count, indices->stride[0], out, bound);
    }
    /* Rows end in padding that may be anything: only what a request uses is looked at. */
    const int64_t width = indices->shape[1], page_size = plan->spec.page_size;
    for (int32_t i = 0; i < num_requests; i++) {
        const int64_t used = (requests[i].kv_len + page_size - 1) / page_size;
        RADDLE_TRY(copy_pages(indices, i * indices->stride[0], used, indices->stride[1],
                              out + i * width, bound));
    }
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ update */

static raddle_status check_batch(const raddle_attention_plan *plan,
                                 const raddle_attention_batch *batch, int32_t *out_batch) {
    const bool paged = plan->spec.page_size > 0, table = batch->block_table != NULL;
    RADDLE_REQUIRE(batch->struct_size == sizeof *batch, RADDLE_ERR_VALUE,
                   "batch: struct_size is %u, this library knows %zu", (unsigned)batch->struct_size,
                   sizeof *batch);
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
        RADDLE_REQUIRE(batch->kv_indptr != NULL && batch->seq_lens == NULL, RADDLE_ERR_VALUE,
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

/* Index tensors of one update, opened for the host. */
enum { QO_INDPTR, KV_LENGTHS, KV_TAILS, PAGES, NUM_INDEX };

/* int32 page tables that lie on the device go to the plan's memory without passing the host. */
static bool pages_stay_on_device(const raddle_tensor *pages) {
    return pages != NULL && pages->device.type != RADDLE_CPU && pages->dtype == RADDLE_I32;
}

static raddle_status fill_slot(raddle_attention_plan *plan, const raddle_attention_batch *batch,
                               int32_t count, const index_view *views, block_view *slot,
                               page_bound *bound) {
    raddle_attention_request *requests = slot->schedule.requests;
    RADDLE_TRY(fill_queries(plan, batch->qo_indptr == NULL ? NULL : &views[QO_INDPTR].tensor, count,
                            requests));
    if (batch->block_table != NULL) {
        RADDLE_TRY(fill_table_lengths(plan, batch->block_table, &views[KV_LENGTHS].tensor, count,
                                      requests));
    } else {
        RADDLE_TRY(fill_csr_lengths(
            plan, &views[KV_LENGTHS].tensor,
            batch->last_page_len == NULL ? NULL : &views[KV_TAILS].tensor, count, requests));
        const int64_t pages = count == 0 ? 0 : raddle_tensor_index_at(&views[KV_LENGTHS].tensor, count);
        RADDLE_REQUIRE(batch->kv_indices == NULL || batch->kv_indices->shape[0] >= pages,
                       RADDLE_ERR_SHAPE, "%s: expected at least %lld entries (%s ends there), got %lld",
                       batch->kv_indices->name, (long long)pages, batch->kv_indptr->name,
                       (long long)batch->kv_indices->shape[0]);
    }
    if (views[PAGES].tensor.data != NULL && count > 0) {
        RADDLE_TRY(fill_pages(plan, batch, requests, count, &views[PAGES].tensor, slot->pages, bound));
    }
    return raddle_attention_schedule_build(&plan->spec, &plan->config, &plan->limits, count,
                                           &slot->schedule);
}

static size_t used_pages(const raddle_attention_plan *plan, const raddle_attention_batch *batch,
                         const raddle_attention_schedule *schedule, int32_t count) {
    if (plan->spec.page_size == 0 || count == 0) {
        return 0;
    }
    if (batch->block_table != NULL) {
        return (size_t)(count * batch->block_table->shape[1]);
    }
    const raddle_attention_request *last = &schedule->requests[count - 1];
    return (size_t)(last->kv_begin + (last->kv_len + plan->spec.page_size - 1) / plan->spec.page_size);
}

static raddle_status send_slot(raddle_attention_plan *plan, const raddle_attention_batch *batch,
                               const block_view *slot, void *slot_data, int32_t count,
                               raddle_stream stream) {
    const raddle_tensor *pages = batch->block_table ? batch->block_table : batch->kv_indices;
    const bool on_device = pages_stay_on_device(pages);
    const size_t page_bytes =
        used_pages(plan, batch, &slot->schedule, count) * sizeof(int32_t);
    const char *segments_end =
        (const char *)(slot->schedule.segments + slot->schedule.header->num_segments);
    const raddle_range ranges[2] = {
        {0, (size_t)(segments_end - (const char *)slot_data)},
        {plan->pages_offset, on_device ? 0 : page_bytes},
    };
    RADDLE_TRY(raddle_staging_commit(&plan->staging, ranges, 2, stream));
    if (on_device && page_bytes > 0) {
        RADDLE_TRY(plan->base.backend->copy(plan->base.device.index,
                                            (char *)plan->staging.data + plan->pages_offset,
                                            pages->data, page_bytes, RADDLE_COPY_ON_DEVICE, stream));
        RADDLE_TRY(plan->base.backend->event_record(plan->base.device.index, plan->staging.ready,
                                                    stream));
    }
    return RADDLE_OK;
}

static raddle_status open_views(const raddle_attention_plan *plan,
                                const raddle_attention_batch *batch, raddle_stream stream,
                                index_view *views) {
    const raddle_tensor *pages = batch->block_table ? batch->block_table : batch->kv_indices;
    const raddle_tensor *tensors[NUM_INDEX] = {
        batch->qo_indptr,
        batch->block_table ? batch->seq_lens : batch->kv_indptr,
        batch->last_page_len,
        pages,
    };
    if (pages_stay_on_device(pages)) {
        RADDLE_TRY(raddle_tensor_check_device(pages, plan->base.device));
        RADDLE_REQUIRE(raddle_tensor_is_contiguous(pages), RADDLE_ERR_SHAPE,
                       "%s: expected a contiguous tensor on the device", pages->name);
        tensors[PAGES] = NULL;
    }
    for (int i = 0; i < NUM_INDEX; i++) {
        if (tensors[i] != NULL) {
            RADDLE_TRY(open_index(plan, tensors[i], stream, &views[i]));
        }
    }
    return RADDLE_OK;
}

static raddle_status update_plan(raddle_attention_plan *plan, const raddle_attention_batch *batch,
                                 raddle_stream stream) {
    bool capturing = false;
    RADDLE_TRY(plan->base.backend->is_capturing(plan->base.device.index, stream, &capturing));
    RADDLE_REQUIRE(!capturing, RADDLE_ERR_STATE,
                   "plan: the stream is being captured; plan before capture, and again between "
                   "replays");
    int32_t count = 0;
    RADDLE_TRY(check_batch(plan, batch, &count));
    RADDLE_TRY(raddle_plan_ensure_workspace(&plan->base));
    index_view views[NUM_INDEX] = {0};
    void *slot_data = NULL;
    block_view slot;
    page_bound bound = {.id = -1};
    raddle_status status = open_views(plan, batch, stream, views);
    if (status != RADDLE_OK) {
        goto out;
    }
    if ((status = raddle_staging_acquire(&plan->staging, &slot_data)) != RADDLE_OK) {
        goto out;
    }
    slot = view_block(plan, slot_data);
    if ((status = fill_slot(plan, batch, count, views, &slot, &bound)) != RADDLE_OK) {
        goto out;
    }
    if ((status = send_slot(plan, batch, &slot, slot_data, count, stream)) != RADDLE_OK) {
        goto out;
    }
    plan->host = slot.schedule;
    plan->max_page_id = bound.id;
    plan->max_page_position = bound.position;
    plan->base.state = RADDLE_PLAN_PLANNED;
    plan->base.generation++;
out:
    for (int i = 0; i < NUM_INDEX; i++) {
        close_index(&views[i]);
    }
    return status;
}

raddle_status raddle_attention_plan_update(raddle_plan *base, const raddle_attention_batch *batch,
                                           raddle_stream stream) {
    RADDLE_TRY(raddle_plan_enter(base, RADDLE_PLAN_READY));
    raddle_status status = update_plan((raddle_attention_plan *)base, batch, stream);
    if (status == RADDLE_ERR_CAPACITY) {
        base->failed_capacity++;
    }
    raddle_plan_leave(base);
    return status;
}

/* ------------------------------------------------------------------ run */

static raddle_status check_rows(const raddle_attention_plan *plan, const raddle_tensor *tensor,
                                raddle_dtype dtype, int32_t head_dim) {
    const int64_t shape[3] = {plan->host.header->num_qo_tokens, plan->config.num_qo_heads, head_dim};
    RADDLE_TRY(raddle_tensor_check_dtype(tensor, dtype));
    RADDLE_TRY(raddle_tensor_check_device(tensor, plan->base.device));
    RADDLE_TRY(raddle_tensor_check_shape(tensor, 3, shape));
    RADDLE_TRY(raddle_tensor_check_inner_contiguous(tensor));
    return plan->base.device.type == RADDLE_CUDA ? raddle_tensor_check_aligned(tensor, 16) : RADDLE_OK;
}

static raddle_status check_cache(const raddle_attention_plan *plan, const raddle_kv_cache *kv) {
    const raddle_attention_config *config = &plan->config;
    char want[16], got[16];
    RADDLE_REQUIRE(kv->k_dtype == config->kv_dtype && kv->v_dtype == config->kv_dtype,
                   RADDLE_ERR_DTYPE, "kv_cache: expected dtype %s as planned, got %s and %s",
                   raddle_dtype_name(config->kv_dtype), raddle_dtype_name(kv->k_dtype),
                   raddle_dtype_name(kv->v_dtype));
    RADDLE_REQUIRE(raddle_device_equal(kv->device, plan->base.device), RADDLE_ERR_DEVICE,
                   "kv_cache: expected %s, the plan's device; got %s",
                   raddle_device_text(plan->base.device, want), raddle_device_text(kv->device, got));
    RADDLE_REQUIRE(kv->page_size == config->page_size, RADDLE_ERR_SHAPE,
                   "kv_cache: expected pages of %d tokens as planned, got %d",
                   (int)config->page_size, (int)kv->page_size);
    RADDLE_REQUIRE(kv->num_kv_heads == config->num_kv_heads &&
                       kv->head_dim_qk == config->head_dim_qk &&
                       kv->head_dim_vo == config->head_dim_vo,
                   RADDLE_ERR_SHAPE,
                   "kv_cache: expected %d heads of %d (K) and %d (V) as planned, got %d of %d and %d",
                   (int)config->num_kv_heads, (int)config->head_dim_qk, (int)config->head_dim_vo,
                   (int)kv->num_kv_heads, (int)kv->head_dim_qk, (int)kv->head_dim_vo);
    if (config->page_size > 0) {
        RADDLE_REQUIRE(plan->max_page_id < kv->num_pages, RADDLE_ERR_VALUE,
                       "indices: page id %lld at position %lld is out of range for a cache of %lld "
                       "pages",
                       (long long)plan->max_page_id, (long long)plan->max_page_position,
                       (long long)kv->num_pages);
    } else if (plan->host.header->batch > 0) {
        const raddle_attention_request *last =
            &plan->host.requests[plan->host.header->batch - 1];
        const int64_t rows = (int64_t)last->kv_begin + last->kv_len;
        RADDLE_REQUIRE(rows <= kv->num_tokens, RADDLE_ERR_SHAPE,
                       "k: expected at least %lld rows as planned (kv_indptr), got %lld",
                       (long long)rows, (long long)kv->num_tokens);
    }
    if (plan->base.device.type == RADDLE_CUDA) {
        const int64_t unit = 16 / (int64_t)raddle_dtype_bytes(config->kv_dtype);
        const bool aligned = (uintptr_t)kv->k % 16 == 0 && (uintptr_t)kv->v % 16 == 0 &&
                             (kv->k_stride_page | kv->k_stride_token | kv->k_stride_head |
                              kv->v_stride_page | kv->v_stride_token | kv->v_stride_head) %
                                     unit ==
                                 0;
        RADDLE_REQUIRE(aligned, RADDLE_ERR_UNSUPPORTED,
                       "kv_cache: the CUDA kernels read rows of 16-byte aligned memory; make base "
                       "and strides multiples of 16 bytes");
    }
    return RADDLE_OK;
}

static raddle_status check_args(const raddle_attention_plan *plan,
                                const raddle_attention_args *args) {
    RADDLE_REQUIRE(args->struct_size == sizeof *args, RADDLE_ERR_VALUE,
                   "args: struct_size is %u, this library knows %zu", (unsigned)args->struct_size,
                   sizeof *args);
    RADDLE_TRY(check_rows(plan, args->q, plan->config.q_dtype, plan->config.head_dim_qk));
    RADDLE_TRY(check_cache(plan, args->kv));
    RADDLE_TRY(check_rows(plan, args->out, plan->config.o_dtype, plan->config.head_dim_vo));
    RADDLE_TRY(raddle_tensor_check_writable(args->out));
    RADDLE_TRY(raddle_tensor_check_no_overlap(args->out));
    if (args->lse != NULL) {
        const int64_t shape[2] = {plan->host.header->num_qo_tokens, plan->config.num_qo_heads};
        RADDLE_TRY(raddle_tensor_check_dtype(args->lse, RADDLE_F32));
        RADDLE_TRY(raddle_tensor_check_device(args->lse, plan->base.device));
        RADDLE_TRY(raddle_tensor_check_shape(args->lse, 2, shape));
        RADDLE_TRY(raddle_tensor_check_writable(args->lse));
        RADDLE_TRY(raddle_tensor_check_no_overlap(args->lse));
    }
    return RADDLE_OK;
}

static raddle_status run_plan(raddle_attention_plan *plan, const raddle_attention_args *args,
                              raddle_stream stream) {
    RADDLE_TRY(check_args(plan, args));
    if (plan->host.header->num_qo_tokens == 0) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_staging_wait(&plan->staging, stream));
    const raddle_kv_cache *kv = args->kv;
    raddle_attention_params params = plan->params;
    params.q = args->q->data;
    params.k = kv->k;
    params.v = kv->v;
    params.out = args->out->data;
    params.lse = args->lse == NULL ? NULL : args->lse->data;
    params.q_stride_token = args->q->stride[0];
    params.q_stride_head = args->q->stride[1];
    params.k_stride_page = kv->k_stride_page;
    params.k_stride_token = kv->k_stride_token;
    params.k_stride_head = kv->k_stride_head;
    params.v_stride_page = kv->v_stride_page;
    params.v_stride_token = kv->v_stride_token;
    params.v_stride_head = kv->v_stride_head;
    params.out_stride_token = args->out->stride[0];
    params.out_stride_head = args->out->stride[1];
    params.lse_stride_token = args->lse == NULL ? 0 : args->lse->stride[0];
    params.lse_stride_head = args->lse == NULL ? 0 : args->lse->stride[1];
    params.num_pages = plan->config.page_size > 0 ? kv->num_pages : kv->num_tokens;
    return plan->ops->run(plan, &params, stream);
}

raddle_status raddle_attention_plan_run(raddle_plan *base, const raddle_attention_args *args,
                                        raddle_stream stream) {
    RADDLE_TRY(raddle_plan_enter(base, RADDLE_PLAN_PLANNED));
    raddle_status status = run_plan((raddle_attention_plan *)base, args, stream);
    raddle_plan_leave(base);
    return status;
}

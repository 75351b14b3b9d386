/* attention_device_plan.c - plans on the GPU, from lengths that only the GPU has: what the host does
 * about it.
 *
 * A launch of attention_plan takes the place of reading, scheduling and sending. Nothing is waited
 * for, so that it may be captured; a replay then plans from what the same tensors hold by then. The
 * host knows the batch's size and its query rows, which follow from shapes.
 *
 * An attention kernel that was launched programmatically reads its schedule before it waits for its
 * predecessors, so that the first run behind such an update is launched plainly: eager and captured
 * work are different sequences of launches, and each has its first.
 */
#include "attention/attention.h"

#include <string.h>

#include "base/alloc.h"
#include "cuda/kernel.h"
#include "kernels/attention/attention_plan_items.h"
#include "runtime/graph.h"

enum {
    COPY_CTAS = 64, /* of the page table, at most */
    COPY_ENTRIES_PER_CTA = 4 * RADDLE_PLAN_THREADS,
};

void raddle_attention_device_plan_fini(raddle_attention_plan *plan) {
    plan->base.backend->free(plan->base.device.index, plan->device_plan.prefix);
    plan->device_plan.prefix = NULL;
}

/* ---------------------------------------------------------------- what the host can check */

static raddle_status check_on_device(const raddle_attention_plan *plan,
                                     const raddle_tensor *tensor) {
    if (tensor == NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_device(tensor, plan->base.device));
    RADDLE_REQUIRE(tensor->dtype == RADDLE_I32, RADDLE_ERR_DTYPE,
                   "%s: on_device reads int32, got %s; convert it, or plan on the host",
                   tensor->name, raddle_dtype_name(tensor->dtype));
    RADDLE_REQUIRE(raddle_tensor_is_contiguous(tensor), RADDLE_ERR_SHAPE,
                   "%s: on_device reads a contiguous tensor; make it so, or plan on the host",
                   tensor->name);
    return RADDLE_OK;
}

/* Query rows of each request. */
static raddle_status read_qo_len(const raddle_attention_plan *plan, const raddle_tensor *qo_indptr,
                                 int32_t batch, int32_t *out_qo_len) {
    *out_qo_len = 1;
    if (qo_indptr == NULL || batch == 0) {
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(qo_indptr->device.type == RADDLE_CPU, RADDLE_ERR_UNSUPPORTED,
                   "%s: on_device needs it on the host, where shapes come from; the lengths of K "
                   "and V may be on the GPU",
                   qo_indptr->name);
    const int64_t qo_len = raddle_tensor_index_at(qo_indptr, 1);
    for (int32_t i = 0; i <= batch; i++) {
        const int64_t begin = raddle_tensor_index_at(qo_indptr, i);
        RADDLE_REQUIRE(
            begin == i * qo_len && qo_len >= 0, RADDLE_ERR_UNSUPPORTED,
            "%s: on_device wants as many query rows in every request, got offset %lld at "
            "position %d; plan on the host",
            qo_indptr->name, (long long)begin, (int)i);
    }
    RADDLE_REQUIRE(plan->spec.max_qo_len == 0 || qo_len <= plan->spec.max_qo_len,
                   RADDLE_ERR_CAPACITY,
                   "%s: requests have %lld query rows, the plan was made for %d (max_qo_len)",
                   qo_indptr->name, (long long)qo_len, (int)plan->spec.max_qo_len);
    RADDLE_REQUIRE(batch * qo_len <= plan->limits.max_qo_tokens, RADDLE_ERR_CAPACITY,
                   "%s: the batch has %lld query rows, the plan was made for %lld (max_qo_tokens)",
                   qo_indptr->name, (long long)(batch * qo_len),
                   (long long)plan->limits.max_qo_tokens);
    *out_qo_len = (int32_t)qo_len;
    return RADDLE_OK;
}

static raddle_status check_update(const raddle_attention_plan *plan,
                                  const raddle_attention_batch *batch, int32_t *out_batch,
                                  int32_t *out_qo_len) {
    RADDLE_REQUIRE(plan->spec.page_size > 0, RADDLE_ERR_UNSUPPORTED,
                   "on_device: K and V without pages are planned on the host");
    RADDLE_TRY(raddle_attention_batch_check(plan, batch, out_batch));
    RADDLE_TRY(check_on_device(plan, batch->kv_indptr));
    RADDLE_TRY(check_on_device(plan, batch->kv_indices));
    RADDLE_TRY(check_on_device(plan, batch->last_page_len));
    RADDLE_TRY(check_on_device(plan, batch->block_table));
    RADDLE_TRY(check_on_device(plan, batch->seq_lens));
    return read_qo_len(plan, batch->qo_indptr, *out_batch, out_qo_len);
}

/* ---------------------------------------------------------------- the launch */

static int64_t row_tiles(const raddle_attention_config *config, int64_t qo_len) {
    return (qo_len * config->group_size + config->tile_rows - 1) / config->tile_rows;
}

/* Scratch for the prefix sums of the largest batch that there may be, where shared memory is too
 * small for them. */
static raddle_status make_prefix(raddle_attention_plan *plan) {
    const raddle_attention_spec *spec = &plan->spec;
    int64_t kinds = row_tiles(&plan->config, spec->max_qo_tokens) + spec->max_batch;
    if (spec->max_qo_len > 0) {
        const int64_t bounded = spec->max_batch * row_tiles(&plan->config, spec->max_qo_len);
        kinds = bounded < kinds ? bounded : kinds;
    }
    if (kinds <= RADDLE_PLAN_SHARED_KINDS || plan->device_plan.prefix != NULL) {
        return RADDLE_OK;
    }
    const size_t sums = 2 * ((size_t)kinds + 1);
    return plan->base.backend->alloc(plan->base.device.index, sums * sizeof(int64_t),
                                     (void **)&plan->device_plan.prefix);
}

static unsigned shared_bytes(const raddle_attention_plan *plan) {
    return (unsigned)raddle_plan_space_bytes(plan->config.num_workers, RADDLE_PLAN_THREADS);
}

/* What the first update of a plan makes. */
static raddle_status prepare(raddle_attention_plan *plan, const raddle_cuda_device *device,
                             bool capturing) {
    if (plan->device_plan.kernel != NULL && plan->base.workspace != NULL) {
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(
        !capturing, RADDLE_ERR_STATE,
        "plan: the first on_device plan compiles and allocates, which a capture does not "
        "allow; call it once before the capture");
    RADDLE_TRY(raddle_plan_ensure_workspace(&plan->base));
    RADDLE_TRY(make_prefix(plan));
    return raddle_kernel_get(device, "attention/attention_plan", "", shared_bytes(plan),
                             &plan->device_plan.kernel);
}

/* The place in block, which is laid out as the plan's own, of what run() reads in that. */
static void *place_in(const raddle_attention_plan *plan, void *block, const void *place) {
    return (char *)block + ((const char *)place - (const char *)plan->staging.data);
}

static raddle_attention_plan_params make_params(const raddle_attention_plan *plan,
                                                const raddle_attention_batch *batch, int32_t count,
                                                int32_t qo_len) {
    const raddle_attention_config *config = &plan->config;
    const raddle_tensor *lengths = batch->block_table ? batch->seq_lens : batch->last_page_len;
    const raddle_tensor *table = batch->block_table ? batch->block_table : batch->kv_indices;
    const int64_t entries = raddle_tensor_count(table);
    const raddle_attention_params *run = &plan->params;
    void *block = plan->staging.data;
    return (raddle_attention_plan_params){
        .indptr = batch->block_table ? NULL : batch->kv_indptr->data,
        .lengths = lengths->data,
        .table = table->data,
        .header = place_in(plan, block, run->header),
        .requests = place_in(plan, block, run->requests),
        .worker_indptr = place_in(plan, block, run->worker_indptr),
        .first_segments = place_in(plan, block, run->first_segments),
        .segments = place_in(plan, block, run->segments),
        .merges = place_in(plan, block, run->merges),
        .pages = place_in(plan, block, run->page_indices),
        .prefix = count * row_tiles(config, qo_len) > RADDLE_PLAN_SHARED_KINDS
                      ? plan->device_plan.prefix
                      : NULL,
        .table_entries = entries < plan->limits.max_pages ? entries : plan->limits.max_pages,
        .table_width = batch->block_table ? (int32_t)batch->block_table->shape[1] : 0,
        .batch = count,
        .qo_len = qo_len,
        .page_size = config->page_size,
        .group_size = config->group_size,
        .num_kv_heads = config->num_kv_heads,
        .heads_per_item = config->heads_per_item,
        .min_heads_per_item = config->min_heads_per_item,
        .tile_rows = config->tile_rows,
        .tile_kv = config->tile_kv,
        .num_workers = config->num_workers,
        .segment_cost = config->segment_cost,
        .cut_cost = config->cut_cost,
        .merge_cost = config->merge_cost,
        .causal = config->causal,
        .window_left = plan->spec.window_left,
        .fixed_chunk = plan->spec.fixed_chunk,
        .max_slots = (int32_t)plan->limits.max_slots,
    };
}

static raddle_status launch(raddle_attention_plan *plan, const raddle_cuda_device *device,
                            const raddle_attention_plan_params *params, bool capturing,
                            raddle_stream stream) {
    int64_t copy_ctas = (params->table_entries + COPY_ENTRIES_PER_CTA - 1) / COPY_ENTRIES_PER_CTA;
    copy_ctas = copy_ctas < 1 ? 1 : copy_ctas < COPY_CTAS ? copy_ctas : COPY_CTAS;
    const raddle_launch how = {
        .grid = {1 + (unsigned)copy_ctas, 1, 1},
        .block = {RADDLE_PLAN_THREADS, 1, 1},
        .shared_bytes = shared_bytes(plan),
    };
    RADDLE_TRY(raddle_staging_wait(&plan->staging, stream));
    RADDLE_TRY(raddle_kernel_launch(device, plan->device_plan.kernel, &how, params, stream));
    return capturing ? RADDLE_OK : raddle_staging_note(&plan->staging, stream);
}

static raddle_status plan_with(raddle_attention_plan *plan, const raddle_cuda_device *device,
                               const raddle_attention_plan_params *params, raddle_stream stream) {
    bool capturing = false;
    RADDLE_TRY(plan->base.backend->is_capturing(device->index, stream, &capturing));
    RADDLE_TRY(prepare(plan, device, capturing));
    RADDLE_TRY(raddle_attention_check_report(plan, stream));
    if (capturing) {
        RADDLE_TRY(raddle_graph_note_plan(&plan->base));
    }
    raddle_attention_device_plan *state = &plan->device_plan;
    const raddle_status launched = launch(plan, device, params, capturing, stream);
    state->is_fresh[capturing] = true; /* even so: it may have been queued */
    if (launched != RADDLE_OK) {
        plan->base.state = RADDLE_PLAN_READY;
        return launched;
    }
    state->header = (raddle_attention_header){
        .batch = params->batch,
        .num_qo_tokens = params->batch * params->qo_len,
    };
    state->is_last = true;
    state->was_captured = capturing;
    plan->host = (raddle_attention_schedule){.header = &state->header};
    plan->host_pages = NULL;
    plan->max_page_id = -1;
    plan->base.state = RADDLE_PLAN_PLANNED;
    plan->base.generation++;
    return RADDLE_OK;
}

raddle_status raddle_attention_device_plan_update(raddle_attention_plan *plan,
                                                  const raddle_attention_batch *batch,
                                                  raddle_stream stream) {
    int32_t count = 0, qo_len = 0;
    RADDLE_TRY(check_update(plan, batch, &count, &qo_len));
    const raddle_attention_plan_params params = make_params(plan, batch, count, qo_len);
    const raddle_cuda_device *device = NULL;
    RADDLE_TRY(raddle_cuda_device_get(plan->base.device.index, &device));
    bool pushed;
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    const raddle_status status = plan_with(plan, device, &params, stream);
    raddle_cuda_pop(device, pushed);
    return status;
}

/* ---------------------------------------------------------------- afterwards */

raddle_status raddle_attention_device_plan_before_run(raddle_attention_plan *plan,
                                                      raddle_stream stream, bool **out_fresh) {
    raddle_attention_device_plan *state = &plan->device_plan;
    *out_fresh = NULL;
    if (!state->is_last && !state->is_fresh[false] && !state->is_fresh[true]) {
        return RADDLE_OK;
    }
    bool capturing = false;
    RADDLE_TRY(plan->base.backend->is_capturing(plan->base.device.index, stream, &capturing));
    /* What the device has outside the graph may be a batch of another size. */
    RADDLE_REQUIRE(capturing || !state->is_last || !state->was_captured, RADDLE_ERR_STATE,
                   "run: the last plan(on_device=True) was captured, and its graph plans when it "
                   "is replayed; to run outside of it, plan outside of it");
    *out_fresh = &state->is_fresh[capturing];
    return RADDLE_OK;
}

raddle_status raddle_attention_device_plan_read(const raddle_attention_plan *plan,
                                                raddle_attention_schedule *out_schedule,
                                                void **out_memory) {
    const raddle_backend *backend = plan->base.backend;
    const int32_t device = plan->base.device.index;
    const raddle_staging *staging = &plan->staging;
    const raddle_attention_params *run = &plan->params;
    bool capturing = false;
    RADDLE_TRY(backend->is_capturing(device, NULL, &capturing));
    RADDLE_TRY(backend->event_wait_host(device, staging->events[staging->last]));
    char *memory = raddle_alloc(staging->bytes);
    if (memory == NULL) {
        return raddle_fail_memory(staging->bytes);
    }
    raddle_status status =
        backend->copy(device, memory, staging->data, staging->bytes, RADDLE_COPY_TO_HOST, NULL);
    if (status == RADDLE_OK) {
        status = backend->synchronize(device, NULL);
    }
    if (status != RADDLE_OK) {
        raddle_free(memory);
        return status;
    }
    *out_schedule = (raddle_attention_schedule){
        .header = place_in(plan, memory, run->header),
        .requests = place_in(plan, memory, run->requests),
        .worker_indptr = place_in(plan, memory, run->worker_indptr),
        .first_segments = place_in(plan, memory, run->first_segments),
        .segments = place_in(plan, memory, run->segments),
        .merges = place_in(plan, memory, run->merges),
    };
    *out_memory = memory;
    return RADDLE_OK;
}

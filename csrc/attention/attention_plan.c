/* attention_plan.c - the life of an attention plan: create, update with a batch, run.
 *
 * One block of device memory, at an address that never changes, holds what update() sends:
 *   header | requests | worker_indptr | first_segments | merges | segments | page table
 * It is written in a pinned slot and copied in at most two pieces (the page table starts behind
 * room for the most segments). A captured graph therefore stays valid across updates.
 */
#include "attention/attention.h"

#include <math.h>
#include <string.h>

#include "base/struct.h"
#include "base/tensor.h"
#include "runtime/graph.h"

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
    view.schedule.first_segments = raddle_arena_take(&arena, (size_t)plan->config.num_workers *
                                                                 sizeof(raddle_attention_segment));
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
    raddle_attention_device_plan_fini(plan);
    raddle_attention_check_fini(plan);
    base->backend->free(base->device.index, plan->arrivals);
    base->backend->free(base->device.index, plan->rope_turns);
    raddle_attention_variant_destroy(plan->variant);
}

static const raddle_plan_ops plan_ops = {
    .family = "attention", .layout = layout_scratch, .fini = fini_plan};

/* Turns per token of each pair of dimensions, as the sum of two floats. */
static raddle_status make_rope_turns(raddle_attention_plan *plan) {
    const raddle_attention_spec *spec = &plan->spec;
    const raddle_backend *backend = plan->base.backend;
    const int32_t device = plan->base.device.index, pairs = spec->head_dim_qk / 2;
    const double two_pi = 6.283185307179586476925;
    float turns[RADDLE_ATTENTION_MAX_HEAD_DIM]; /* [pairs, 2] */
    for (int32_t i = 0; i < pairs; i++) {
        const double frequency =
            pow((double)spec->rope_theta, -(double)i / pairs) / (double)spec->rope_scale;
        turns[2 * i] = (float)(frequency / two_pi);
        turns[2 * i + 1] = (float)(frequency / two_pi - (double)turns[2 * i]);
    }
    const size_t bytes = (size_t)pairs * 2 * sizeof(float);
    RADDLE_TRY(backend->alloc(device, bytes, (void **)&plan->rope_turns));
    RADDLE_TRY(backend->copy(device, plan->rope_turns, turns, bytes, RADDLE_COPY_TO_DEVICE, NULL));
    return backend->synchronize(device, NULL); /* turns leaves */
}

/* What every run passes, and does not change between updates. */
static void fill_constant_params(raddle_attention_plan *plan) {
    const raddle_attention_spec *spec = &plan->spec;
    const raddle_attention_config *config = &plan->config;
    const block_view view = view_block(plan, plan->staging.data);
    const float ln_2 = 0.69314718055994530942f;
    plan->pages_offset =
        view.pages == NULL ? 0 : (size_t)((char *)view.pages - (char *)plan->staging.data);
    plan->params.header = view.schedule.header;
    plan->params.requests = view.schedule.requests;
    plan->params.segments = view.schedule.segments;
    plan->params.worker_indptr = view.schedule.worker_indptr;
    plan->params.first_segments = view.schedule.first_segments;
    plan->params.merges = view.schedule.merges;
    plan->params.page_indices = view.pages;
    plan->params.arrivals = plan->arrivals;
    plan->params.num_qo_heads = config->num_qo_heads;
    plan->params.num_kv_heads = config->num_kv_heads;
    plan->params.group_size = config->group_size;
    plan->params.page_size = config->page_size;
    plan->params.page_divisor = raddle_make_divisor(config->page_size > 0 ? config->page_size : 1);
    plan->params.group_divisor = raddle_make_divisor(config->group_size);
    plan->params.window_left = spec->window_left;
    plan->params.causal = config->causal;
    plan->params.fixed_chunk = spec->fixed_chunk;
    plan->params.rope_turns = plan->rope_turns;
    plan->params.logits_soft_cap = spec->logits_soft_cap;
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
    RADDLE_TRY(
        raddle_staging_init(&plan->staging, plan->base.device, view_block(plan, NULL).bytes));
    RADDLE_TRY(backend->alloc(device, arrivals_bytes, (void **)&plan->arrivals));
    RADDLE_TRY(backend->fill(device, plan->arrivals, 0, arrivals_bytes, NULL));
    if (plan->base.device.type == RADDLE_CUDA) {
        /* No segments, should a run come before what a captured update plans. */
        RADDLE_TRY(backend->fill(device, plan->staging.data, 0, plan->staging.bytes, NULL));
    }
    RADDLE_TRY(backend->synchronize(device, NULL));
    if (plan->config.has_rope) {
        RADDLE_TRY(make_rope_turns(plan));
    }
    fill_constant_params(plan);
    RADDLE_TRY(raddle_attention_check_init(plan));
    plan->base.staging = &plan->staging;
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
    plan->variant = raddle_attention_variant_retain(checked.variant);
    plan->spec.variant = plan->variant;
    raddle_status status = build_plan(plan);
    if (status != RADDLE_OK) {
        raddle_plan_destroy(base);
        return status;
    }
    *out_plan = base;
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ update */

static raddle_status send_slot(raddle_attention_plan *plan, const raddle_attention_reading *reading,
                               const block_view *slot, const char *slot_data,
                               raddle_stream stream) {
    const char *segments_end =
        (const char *)(slot->schedule.segments + slot->schedule.header->num_segments);
    const raddle_range ranges[2] = {
        {.offset = 0, .bytes = (size_t)(segments_end - slot_data)},
        {.offset = plan->pages_offset,
         .bytes = (size_t)reading->num_pages * sizeof(int32_t),
         .device_source = reading->device_pages},
    };
    return raddle_staging_commit(&plan->staging, ranges, 2, stream);
}

static raddle_status update_plan(raddle_attention_plan *plan, const raddle_attention_batch *batch,
                                 raddle_stream stream) {
    bool capturing = false;
    if (batch->on_device && plan->base.device.type == RADDLE_CUDA) {
        return raddle_attention_device_plan_update(plan, batch, stream);
    }
    RADDLE_TRY(plan->base.backend->is_capturing(plan->base.device.index, stream, &capturing));
    RADDLE_REQUIRE(!capturing, RADDLE_ERR_STATE,
                   "plan: the stream is being captured; plan before capture, and again between "
                   "replays, or from lengths on the GPU with on_device=True");
    RADDLE_TRY(raddle_attention_check_report(plan, stream));
    RADDLE_TRY(raddle_plan_ensure_workspace(&plan->base));
    void *slot_data = NULL;
    RADDLE_TRY(raddle_staging_acquire(&plan->staging, &slot_data));
    block_view slot = view_block(plan, slot_data);
    raddle_attention_reading reading;
    RADDLE_TRY(raddle_attention_batch_read(plan, batch, stream, slot.schedule.requests, slot.pages,
                                           &reading));
    RADDLE_TRY(raddle_attention_schedule_build(&plan->spec, &plan->config, &plan->limits,
                                               reading.batch, &slot.schedule));
    const raddle_status sent = send_slot(plan, &reading, &slot, slot_data, stream);
    if (sent != RADDLE_OK) {
        plan->base.state = RADDLE_PLAN_READY; /* the device may have a part of the new batch */
        return sent;
    }
    plan->host = slot.schedule;
    plan->device_plan.is_last = false;
    plan->max_page_id = reading.max_page_id;
    plan->host_pages = slot.pages;
    plan->base.state = RADDLE_PLAN_PLANNED;
    plan->base.generation++;
    return RADDLE_OK;
}

raddle_status raddle_attention_plan_update(raddle_plan *base, const raddle_attention_batch *given,
                                           raddle_stream stream) {
    raddle_attention_batch batch;
    RADDLE_TRY(raddle_struct_read("batch", given, sizeof batch, &batch));
    RADDLE_TRY(raddle_plan_enter(base, RADDLE_PLAN_READY));
    raddle_status status = update_plan((raddle_attention_plan *)base, &batch, stream);
    if (status == RADDLE_ERR_CAPACITY) {
        base->failed_capacity++;
    }
    return raddle_plan_leave(base, status);
}

/* ------------------------------------------------------------------ run */

static raddle_status check_rows(const raddle_attention_plan *plan, const raddle_tensor *tensor,
                                raddle_dtype dtype, int32_t head_dim) {
    const int64_t shape[3] = {plan->host.header->num_qo_tokens, plan->config.num_qo_heads,
                              head_dim};
    RADDLE_TRY(raddle_tensor_check_dtype(tensor, dtype));
    RADDLE_TRY(raddle_tensor_check_device(tensor, plan->base.device));
    RADDLE_TRY(raddle_tensor_check_shape(tensor, 3, shape));
    RADDLE_TRY(raddle_tensor_check_inner_contiguous(tensor));
    return plan->base.device.type == RADDLE_CUDA ? raddle_tensor_check_aligned(tensor, 16)
                                                 : RADDLE_OK;
}

/* Names the first page id of the planned batch that the cache does not have. */
static raddle_status fail_page(const raddle_attention_plan *plan, int64_t num_pages) {
    const int64_t page_size = plan->config.page_size;
    for (int32_t r = 0; r < plan->host.header->batch; r++) {
        const raddle_attention_request *request = &plan->host.requests[r];
        const int64_t used = (request->kv_len + page_size - 1) / page_size;
        for (int64_t i = request->kv_begin; i < request->kv_begin + used; i++) {
            if (plan->host_pages[i] >= num_pages) {
                return raddle_fail(RADDLE_ERR_VALUE,
                                   "indices: page id %d at position %lld (request %d) is out of "
                                   "range for a cache of %lld pages",
                                   (int)plan->host_pages[i], (long long)i, (int)r,
                                   (long long)num_pages);
            }
        }
    }
    return raddle_fail(RADDLE_ERR_VALUE,
                       "indices: page id %lld is out of range for a cache of "
                       "%lld pages",
                       (long long)plan->max_page_id, (long long)num_pages);
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
                   raddle_device_text(plan->base.device, want),
                   raddle_device_text(kv->device, got));
    RADDLE_REQUIRE(kv->page_size == config->page_size, RADDLE_ERR_SHAPE,
                   "kv_cache: expected pages of %d tokens as planned, got %d",
                   (int)config->page_size, (int)kv->page_size);
    RADDLE_REQUIRE(
        kv->num_kv_heads == config->num_kv_heads && kv->head_dim_qk == config->head_dim_qk &&
            kv->head_dim_vo == config->head_dim_vo,
        RADDLE_ERR_SHAPE,
        "kv_cache: expected %d heads of %d (K) and %d (V) as planned, got %d of %d and %d",
        (int)config->num_kv_heads, (int)config->head_dim_qk, (int)config->head_dim_vo,
        (int)kv->num_kv_heads, (int)kv->head_dim_qk, (int)kv->head_dim_vo);
    if (config->page_size > 0) {
        if (plan->max_page_id >= kv->num_pages) {
            return fail_page(plan, kv->num_pages);
        }
    } else if (plan->host.header->batch > 0) {
        const raddle_attention_request *last = &plan->host.requests[plan->host.header->batch - 1];
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

/* A float32 vector with one number per head, or nothing. */
static raddle_status check_heads(const raddle_attention_plan *plan, const raddle_tensor *tensor,
                                 int64_t heads) {
    if (tensor == NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_dtype(tensor, RADDLE_F32));
    RADDLE_TRY(raddle_tensor_check_device(tensor, plan->base.device));
    RADDLE_TRY(raddle_tensor_check_shape(tensor, 1, &heads));
    return raddle_tensor_check_inner_contiguous(tensor);
}

static raddle_status check_variant_args(const raddle_attention_plan *plan,
                                        const raddle_attention_args *args) {
    RADDLE_REQUIRE((args->sinks != NULL) == (plan->config.has_sinks != 0), RADDLE_ERR_VALUE,
                   "sinks: %s",
                   args->sinks == NULL ? "the plan was made with sinks, and needs them at each run"
                                       : "the plan was made without; make it with sinks=True");
    RADDLE_TRY(check_heads(plan, args->sinks, plan->config.num_qo_heads));
    RADDLE_TRY(check_heads(plan, args->k_scales, plan->config.num_kv_heads));
    RADDLE_TRY(check_heads(plan, args->v_scales, plan->config.num_kv_heads));
    RADDLE_REQUIRE(isfinite(args->k_scale) && args->k_scale >= 0.0f, RADDLE_ERR_VALUE,
                   "k_scale: expected a positive number, got %g", (double)args->k_scale);
    RADDLE_REQUIRE(isfinite(args->v_scale), RADDLE_ERR_VALUE,
                   "v_scale: expected a finite number, got %g", (double)args->v_scale);
    RADDLE_REQUIRE(args->lse == NULL || !plan->config.no_softmax, RADDLE_ERR_UNSUPPORTED,
                   "lse: there is none without a softmax");
    RADDLE_REQUIRE(plan->variant != NULL ||
                       (args->variant_tensors == NULL && args->variant_scalars == NULL),
                   RADDLE_ERR_VALUE, "variant_args: the plan was made without a variant");
    return RADDLE_OK;
}

static raddle_status check_args(const raddle_attention_plan *plan,
                                const raddle_attention_args *args) {
    RADDLE_REQUIRE(args->q != NULL && args->kv != NULL && args->out != NULL, RADDLE_ERR_VALUE,
                   "args: expected q, kv and out, got NULL for %s",
                   args->q == NULL    ? "q"
                   : args->kv == NULL ? "kv"
                                      : "out");
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
    return check_variant_args(plan, args);
}

static raddle_status run_plan(raddle_attention_plan *plan, const raddle_attention_args *args,
                              raddle_stream stream) {
    RADDLE_TRY(check_args(plan, args));
    RADDLE_TRY(raddle_attention_check_report(plan, stream));
    if (plan->host.header->num_qo_tokens == 0) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_staging_wait(&plan->staging, stream));
    const raddle_kv_cache *kv = args->kv;
    const float log2_e = 1.44269504088896340736f;
    raddle_attention_run_params run;
    raddle_attention_params *params = &run.params;
    *params = plan->params;
    if (plan->variant != NULL) {
        RADDLE_TRY(raddle_attention_variant_bind(plan->variant, args->variant_tensors,
                                                 args->variant_scalars, plan->base.device,
                                                 &run.variant));
        params->variant = run.variant.bytes;
    }
    params->sinks = args->sinks == NULL ? NULL : args->sinks->data;
    params->k_scales = args->k_scales == NULL ? NULL : args->k_scales->data;
    params->v_scales = args->v_scales == NULL ? NULL : args->v_scales->data;
    params->sm_scale = plan->spec.sm_scale * (args->k_scale == 0.0f ? 1.0f : args->k_scale);
    params->sm_scale_log2 = params->sm_scale * log2_e;
    params->out_scale = args->v_scale == 0.0f ? 1.0f : args->v_scale;
    params->num_qo_tokens = (int32_t)args->q->shape[0];
    params->q = args->q->data;
    params->k = kv->k;
    params->v = kv->v;
    params->out = args->out->data;
    params->lse = args->lse == NULL ? NULL : args->lse->data;
    params->q_stride_token = args->q->stride[0];
    params->q_stride_head = args->q->stride[1];
    params->k_stride_page = kv->k_stride_page;
    params->k_stride_token = kv->k_stride_token;
    params->k_stride_head = kv->k_stride_head;
    params->v_stride_page = kv->v_stride_page;
    params->v_stride_token = kv->v_stride_token;
    params->v_stride_head = kv->v_stride_head;
    params->out_stride_token = args->out->stride[0];
    params->out_stride_head = args->out->stride[1];
    params->lse_stride_token = args->lse == NULL ? 0 : args->lse->stride[0];
    params->lse_stride_head = args->lse == NULL ? 0 : args->lse->stride[1];
    params->num_pages = plan->config.page_size > 0 ? kv->num_pages : kv->num_tokens;
    return plan->ops->run(plan, &run, stream);
}

raddle_status raddle_attention_plan_run(raddle_plan *base, const raddle_attention_args *given,
                                        raddle_stream stream) {
    raddle_attention_args args;
    RADDLE_TRY(raddle_struct_read("args", given, sizeof args, &args));
    RADDLE_TRY(raddle_plan_enter(base, RADDLE_PLAN_PLANNED));
    raddle_status status = raddle_graph_note_plan(base);
    if (status == RADDLE_OK) {
        status = run_plan((raddle_attention_plan *)base, &args, stream);
    }
    return raddle_plan_leave(base, status);
}

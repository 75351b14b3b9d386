/* attention_cpu.c - the CPU back end of attention: cuts for threads, hands out segments, merges
 * what was cut.
 *
 * Phase 1: every worker takes the segments that the schedule gave it, then what others have not
 * begun yet; who computes a segment does not change its result. Phase 2, when items were cut:
 * merges, each in slot order.
 */
#include "attention/attention_cpu.h"

#include <stdatomic.h>

#include "base/alloc.h"
#include "base/tensor.h"
#include "base/threads.h"

enum {
    CACHE_LINE = 64,
    MAX_ROWS = 256,       /* packed rows that share one conversion of a K/V tile */
    MIN_ROWS = 64,        /* enough to pay for the conversion */
    FIXED_ROWS = 64,      /* fixed chunks: every chunk of a cut item is a partial */
    MIN_BLOCK_ROWS = 256, /* heads of few rows are computed together up to this many rows */
    /* Tokens of a tile that is read where it lies. The next tile is prefetched meanwhile: 32 tokens
     * ahead is slower by a tenth, 64 by a half (bf16, 8 heads of 128, page 16). Of bytes twice as
     * many, which cost as much memory. */
    FEW_TILE_KV = 16,
    SEGMENT_COST = 16, /* tokens: 5 us of first page, partials, merge at 10 GB/s, 4 KB a token */
    PARTIAL_BYTES = 1024 * 1024, /* at most, unless MIN_ROWS asks for more */
};

/* How far a worker's list has been handed out; one cache line each. */
typedef struct work_cursor {
    _Alignas(CACHE_LINE) atomic_int next;
} work_cursor;

typedef struct run_context {
    attention_cpu_job job;
    work_cursor *cursors; /* [num_workers] */
    atomic_int next_merge;
} run_context;

/* What the plan keeps in backend_state. */
typedef struct cpu_plan_state {
    attention_cpu_state shared;
    work_cursor *cursors;
} cpu_plan_state;

/* ---------------------------------------------------------------- prepare */

static int32_t min_i32(int64_t a, int64_t b) {
    return (int32_t)(a < b ? a : b);
}

/* A worker takes all heads of a token together: a page is then read from end to end, which streams
 * 2.5 times as fast as one head's rows of it (decode, 8 heads of 128, page 16). The rows of an item
 * are as many as pay for packing K and V, while a partial stays small. */
static void choose_cuts(const raddle_attention_spec *spec, raddle_attention_config *config) {
    const int64_t max_len = spec->max_qo_len > 0 ? spec->max_qo_len : spec->max_qo_tokens;
    const int64_t rows = max_len * config->group_size;
    const int64_t row_bytes =
        (int64_t)config->num_kv_heads * config->head_dim_vo * (int64_t)sizeof(float);
    int32_t fit = min_i32(PARTIAL_BYTES / row_bytes, MAX_ROWS);
    fit = fit > MIN_ROWS ? fit : MIN_ROWS;
    config->heads_per_item = config->num_kv_heads;
    if (spec->fixed_chunk > 0 && rows > fit) {
        config->heads_per_item = 1;
        fit = FIXED_ROWS;
    }
    config->tile_rows = min_i32(rows, fit);
    config->tile_kv = ATTENTION_CPU_TILE_KV;
    const int32_t threads = raddle_threads_count();
    config->num_workers = spec->max_ctas > 0 ? min_i32(spec->max_ctas, threads) : threads;
    config->min_heads_per_item = config->heads_per_item;
    config->segment_cost = SEGMENT_COST * config->heads_per_item;
}

/* One worker's buffers out of arena, which starts each on a boundary of RADDLE_ARENA_ALIGN. */
static void layout_scratch(const raddle_attention_config *config, const attention_cpu_state *state,
                           raddle_arena *arena, attention_cpu_scratch *scratch) {
    const size_t rows = (size_t)state->block_rows;
    const size_t tile_kv = (size_t)config->tile_kv;
    const size_t width = (size_t)config->head_dim_vo;
    const size_t num_logits = (size_t)config->tile_rows * tile_kv;
    scratch->q =
        raddle_arena_take(arena, rows * (size_t)config->head_dim_qk * (size_t)state->q_bytes);
    scratch->logits = raddle_arena_take(arena, num_logits * sizeof(float));
    scratch->weights = scratch->logits;
    if (state->add->operand != RADDLE_F32) {
        scratch->weights = raddle_arena_take(arena, num_logits * (size_t)state->weight_bytes);
    }
    scratch->chunk.state = raddle_arena_take(arena, rows * 2 * sizeof(float));
    scratch->chunk.acc = raddle_arena_take(arena, rows * width * sizeof(float));
    scratch->folded.state = raddle_arena_take(arena, rows * 2 * sizeof(float));
    scratch->folded.acc = raddle_arena_take(arena, rows * width * sizeof(float));
    scratch->k_panel.length = config->head_dim_qk;
    scratch->k_panel.data =
        raddle_arena_take(arena, raddle_vec_panel_bytes(config->tile_kv, config->head_dim_qk));
    scratch->v_panel.length = config->head_dim_vo;
    scratch->v_panel.data =
        raddle_arena_take(arena, raddle_vec_panel_bytes(config->tile_kv, config->head_dim_vo));
    for (int i = 0; i < 2; i++) {
        scratch->tokens[i].k_rows = raddle_arena_take(arena, tile_kv * sizeof(void *));
        scratch->tokens[i].v_rows = raddle_arena_take(arena, tile_kv * sizeof(void *));
        scratch->tokens[i].positions = raddle_arena_take(arena, tile_kv * sizeof(int32_t));
    }
    const size_t keys_bytes = tile_kv * (size_t)config->head_dim_qk * sizeof(float);
    if (config->has_rope) {
        scratch->turns = raddle_arena_take(arena, keys_bytes);
    }
    if ((config->hooks & RADDLE_HOOK_MASK) != 0) {
        scratch->seen = raddle_arena_take(arena, tile_kv);
    }
    if (state->changes_keys) {
        scratch->keys = raddle_arena_take(arena, keys_bytes);
        scratch->key_rows = raddle_arena_take(arena, tile_kv * sizeof(void *));
    }
}

static void layout_state(const raddle_attention_config *config, raddle_arena *arena,
                         cpu_plan_state *state, attention_cpu_scratch *scratch) {
    state->cursors = raddle_arena_take(arena, (size_t)config->num_workers * sizeof(work_cursor));
    raddle_attention_cpu_layout_variant(config, arena, &state->shared);
    for (int32_t w = 0; w < config->num_workers; w++) {
        layout_scratch(config, &state->shared, arena, &scratch[w]);
    }
}

static void cpu_release(raddle_attention_plan *plan) {
    cpu_plan_state *state = plan->backend_state;
    if (state) {
        raddle_free(state->shared.memory);
        raddle_free(state->shared.scratch);
        raddle_free(state);
        plan->backend_state = NULL;
    }
}

/* Which steps run() takes, and by which loops. Rows that a variant changes are float32. */
static void choose_loops(const raddle_attention_config *config, attention_cpu_state *state) {
    state->vec = raddle_vec_get();
    state->loops = raddle_attention_cpu_loops_get();
    state->changes_queries = config->has_rope || (config->hooks & RADDLE_HOOK_QUERY) != 0;
    state->changes_keys = config->has_rope || (config->hooks & RADDLE_HOOK_KEY) != 0;
    state->changes_logits = config->has_soft_cap || config->has_alibi || config->no_softmax ||
                            (config->hooks & (RADDLE_HOOK_LOGIT | RADDLE_HOOK_MASK)) != 0;
    state->changes_states = config->has_sinks || (config->hooks & RADDLE_HOOK_STATE) != 0;
    const raddle_vec_block *wide = state->vec->blocks[config->kv_dtype];
    const raddle_vec_block *bf16 = state->vec->blocks_bf16[config->kv_dtype];
    state->add = config->q_dtype == RADDLE_BF16 && bf16 ? bf16 : wide;
    state->dot = state->changes_keys      ? state->vec->blocks[RADDLE_F32]
                 : state->changes_queries ? wide
                                          : state->add;
    state->q_bytes = (int32_t)raddle_dtype_bytes(state->dot->operand);
    state->weight_bytes = (int32_t)raddle_dtype_bytes(state->add->operand);
    state->few_tile_kv = raddle_dtype_bytes(config->kv_dtype) == 1 ? 2 * FEW_TILE_KV : FEW_TILE_KV;
    state->block_rows = config->tile_rows > MIN_BLOCK_ROWS ? config->tile_rows : MIN_BLOCK_ROWS;
}

static raddle_status make_memory(const raddle_attention_config *config, cpu_plan_state *state) {
    attention_cpu_state *shared = &state->shared;
    const size_t scratch_bytes = (size_t)config->num_workers * sizeof(attention_cpu_scratch);
    shared->scratch = raddle_alloc_zero(scratch_bytes);
    if (!shared->scratch) {
        return raddle_fail_memory(scratch_bytes);
    }
    raddle_arena arena;
    raddle_arena_measure(&arena);
    layout_state(config, &arena, state, shared->scratch);
    const size_t bytes = raddle_arena_bytes(&arena);
    shared->memory = raddle_alloc_zero(bytes);
    if (!shared->memory) {
        return raddle_fail_memory(bytes);
    }
    raddle_arena_carve(&arena, shared->memory, bytes, true);
    layout_state(config, &arena, state, shared->scratch);
    for (int32_t w = 0; shared->changes_keys && w < config->num_workers; w++) {
        attention_cpu_scratch *scratch = &shared->scratch[w];
        for (int32_t n = 0; n < config->tile_kv; n++) {
            scratch->key_rows[n] = scratch->keys + (int64_t)n * config->head_dim_qk;
        }
    }
    return RADDLE_OK;
}

static raddle_status cpu_prepare(raddle_attention_plan *plan) {
    raddle_attention_config *config = &plan->config;
    const raddle_variant_rows *hooks = NULL;
    if (plan->variant != NULL) {
        RADDLE_TRY(raddle_attention_cpu_hooks_get(plan->variant, &hooks));
    }
    cpu_plan_state *state = raddle_alloc_zero(sizeof(*state));
    if (!state) {
        return raddle_fail_memory(sizeof(*state));
    }
    plan->backend_state = state;
    choose_cuts(&plan->spec, config);
    state->shared.hooks = hooks;
    choose_loops(config, &state->shared);
    const raddle_status status = make_memory(config, state);
    if (status != RADDLE_OK) {
        cpu_release(plan);
    }
    return status;
}

/* ---------------------------------------------------------------- run */

static void work_task(void *context, int worker, int num_workers) {
    run_context *run = context;
    const raddle_attention_params *params = run->job.params;
    for (int i = 0; i < num_workers; i++) {
        const int list = (worker + i) % num_workers;
        const int32_t end = params->worker_indptr[list + 1];
        for (;;) {
            const int32_t at =
                atomic_fetch_add_explicit(&run->cursors[list].next, 1, memory_order_relaxed);
            if (at >= end) {
                break;
            }
            const raddle_attention_segment *segment = &params->segments[at];
            raddle_attention_cpu_segment(&run->job, &run->job.state->scratch[worker], segment,
                                         at + 1 < end ? segment + 1 : NULL);
        }
    }
}

static void merge_item(const attention_cpu_job *job, const attention_cpu_scratch *scratch,
                       const raddle_attention_merge *merge) {
    const raddle_attention_config *config = job->config;
    const raddle_attention_params *params = job->params;
    const int32_t rows = merge->row_end - merge->row_begin;
    for (int32_t h = 0; h < config->heads_per_item && merge->head + h < config->num_kv_heads; h++) {
        raddle_attention_cpu_clear(&scratch->folded, rows, config->head_dim_vo);
        for (int32_t slot = merge->slot_begin; slot < merge->slot_begin + merge->slot_count;
             slot++) {
            const int64_t at = ((int64_t)slot * config->heads_per_item + h) * config->tile_rows;
            const attention_cpu_states partial = {params->partial_state + 2 * at,
                                                  params->partial_out + at * config->head_dim_vo};
            raddle_attention_cpu_fold(&scratch->folded, &partial, rows, config->head_dim_vo);
        }
        raddle_attention_cpu_write(job, &params->requests[merge->request], merge->head + h,
                                   merge->row_begin, merge->row_end, &scratch->folded);
    }
}

static void merge_task(void *context, int worker, int num_workers) {
    run_context *run = context;
    (void)num_workers;
    for (;;) {
        const int at = atomic_fetch_add_explicit(&run->next_merge, 1, memory_order_relaxed);
        if (at >= run->job.params->header->num_merges) {
            break;
        }
        merge_item(&run->job, &run->job.state->scratch[worker], &run->job.params->merges[at]);
    }
}

static raddle_status cpu_run(raddle_attention_plan *plan, const raddle_attention_run_params *given,
                             raddle_stream stream) {
    (void)stream;
    const raddle_attention_params *params = &given->params;
    cpu_plan_state *state = plan->backend_state;
    const raddle_attention_header *header = params->header;
    if (!state->shared.is_filled) {
        raddle_attention_cpu_fill_variant(&plan->config, params, &state->shared);
        state->shared.is_filled = true;
    }
    run_context run = {.job = {&plan->config, params, &state->shared}, .cursors = state->cursors};
    for (int32_t w = 0; w < header->num_workers; w++) {
        atomic_store_explicit(&state->cursors[w].next, params->worker_indptr[w],
                              memory_order_relaxed);
    }
    atomic_init(&run.next_merge, 0);
    if (header->num_workers > 0) {
        raddle_threads_run(work_task, &run, header->num_workers);
    }
    if (header->num_merges > 0) {
        raddle_threads_run(merge_task, &run, min_i32(header->num_merges, plan->config.num_workers));
    }
    return RADDLE_OK;
}

const raddle_attention_ops raddle_attention_ops_cpu = {
    .prepare = cpu_prepare,
    .run = cpu_run,
    .release = cpu_release,
};

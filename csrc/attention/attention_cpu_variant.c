/* attention_cpu_variant.c - what variants add on the CPU: rows of q and K on their way in, products
 * on their way to logits, states of finished rows.
 *
 * Rotary: the turns of a tile's first token are computed, those of the others follow from them by
 * adding the turns of 1, 2, .. tokens, which a plan keeps; all heads share them. Rotated keys are
 * float32.
 */
#include "attention/attention_cpu.h"

#include <math.h>
#include <string.h>

#include "base/tensor.h"

enum { LINE_BYTES = 64 };

#define LOG2_E 1.44269504088896340736f
#define LN_2 0.69314718055994530942f

/* ---------------------------------------------------------------- of a plan */

void raddle_attention_cpu_layout_variant(const raddle_attention_config *config, raddle_arena *arena,
                                         attention_cpu_state *state) {
    if (config->has_alibi) {
        state->slopes =
            raddle_arena_take(arena, (size_t)config->num_qo_heads * sizeof *state->slopes);
    }
    if (config->has_rope) {
        const size_t count = (size_t)config->tile_kv * (size_t)config->head_dim_qk;
        state->rope_steps = raddle_arena_take(arena, count * sizeof *state->rope_steps);
    }
}

void raddle_attention_cpu_fill_variant(const raddle_attention_config *config,
                                       const raddle_attention_params *params,
                                       attention_cpu_state *state) {
    for (int32_t h = 0; state->slopes && h < config->num_qo_heads; h++) {
        state->slopes[h] = raddle_alibi_slope(h, config->num_qo_heads);
    }
    const int64_t depth = config->head_dim_qk;
    for (int32_t i = 0; state->rope_steps && i < config->tile_kv; i++) {
        state->loops->make_turns(state->rope_steps + i * depth, params->rope_turns,
                                 config->head_dim_qk / 2, i);
    }
}

/* ---------------------------------------------------------------- q */

void raddle_attention_cpu_query(const attention_cpu_job *job, const raddle_row *row, float *turns,
                                float *q) {
    const attention_cpu_state *state = job->state;
    const int32_t pairs = job->config->head_dim_qk / 2;
    if (job->config->has_rope) {
        state->loops->make_turns(turns, job->params->rope_turns, pairs, raddle_row_position(row));
        state->loops->rotate(q, turns, pairs);
    }
    if (job->config->hooks & RADDLE_HOOK_QUERY) {
        state->hooks->query(job->params->variant, row, q, job->config->head_dim_qk);
    }
}

/* ---------------------------------------------------------------- K */

void raddle_attention_cpu_begin_keys(const attention_cpu_view *view,
                                     const attention_cpu_tile *tile) {
    const attention_cpu_state *state = view->job->state;
    const int32_t depth = view->job->config->head_dim_qk;
    float *turns = view->scratch->turns;
    if (!view->job->config->has_rope || tile->count == 0) {
        return;
    }
    /* The last row serves for the first token's turns: it is written last. */
    float *base = turns + (int64_t)(tile->count - 1) * depth;
    state->loops->make_turns(base, view->job->params->rope_turns, depth / 2, tile->begin);
    for (int32_t n = 0; n < tile->count; n++) {
        const int64_t step = tile->tokens->positions[n] - tile->begin;
        float *row = turns + (int64_t)n * depth;
        if (row != base) {
            memcpy(row, base, (size_t)depth * sizeof *row);
        }
        state->loops->rotate(row, state->rope_steps + step * depth, depth / 2);
    }
}

static void prefetch_key(const void *row, int64_t offset_bytes, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE_BYTES) {
        __builtin_prefetch((const char *)row + offset_bytes + i, 0, 2);
    }
}

void raddle_attention_cpu_keys(const attention_cpu_view *view, const attention_cpu_tile *tile,
                               const attention_cpu_tile *next, int32_t head) {
    const attention_cpu_job *job = view->job;
    const attention_cpu_scratch *scratch = view->scratch;
    const raddle_dtype dtype = job->config->kv_dtype;
    const int32_t depth = job->config->head_dim_qk;
    const int64_t kv_bytes = (int64_t)raddle_dtype_bytes(dtype);
    const int64_t offset_bytes = head * job->params->k_stride_head * kv_bytes;
    for (int32_t n = 0; n < tile->count; n++) {
        float *key = scratch->keys + (int64_t)n * depth;
        if (next->count > 0) {
            prefetch_key(next->tokens->k_rows[n], offset_bytes, depth * kv_bytes);
        }
        const char *row = (const char *)tile->tokens->k_rows[n] + offset_bytes;
        if (job->config->has_rope) {
            job->state->vec->load_rotated[dtype](key, row, scratch->turns + (int64_t)n * depth,
                                                 depth / 2);
        } else {
            job->state->vec->load[dtype](key, row, depth);
        }
        if (job->config->hooks & RADDLE_HOOK_KEY) {
            const raddle_key place = {
                .request = (int32_t)(view->request - job->params->requests),
                .kv_index = tile->tokens->positions[n],
                .kv_len = view->request->kv_len,
                .kv_head = head,
            };
            job->state->hooks->key(job->params->variant, &place, key, depth);
        }
    }
}

/* ---------------------------------------------------------------- logits */

int32_t raddle_attention_cpu_logits(const attention_cpu_view *view, const attention_cpu_tile *tile,
                                    int32_t head, int32_t packed_row, int32_t first, int32_t count,
                                    float *x) {
    const attention_cpu_job *job = view->job;
    const raddle_attention_config *config = job->config;
    const attention_cpu_loops *loops = job->state->loops;
    const raddle_row row = raddle_attention_cpu_row(job, view->request, head, packed_row);
    const int32_t *positions = tile->tokens->positions + first;
    const float scale = raddle_attention_cpu_scale(job->params, head);
    if (config->has_soft_cap) {
        loops->soft_cap(x, count, scale, job->params->logits_soft_cap);
    } else {
        job->state->vec->scale(x, count, scale);
    }
    if (config->has_alibi) {
        loops->alibi(x, positions, count, job->state->slopes[row.qo_head], &row);
    }
    if (config->hooks & RADDLE_HOOK_LOGIT) {
        job->state->hooks->logit(job->params->variant, &row, positions, count, x);
    }
    if (config->has_sigmoid) {
        loops->sigmoid(x, count);
    }
    if (config->hooks & RADDLE_HOOK_MASK) {
        uint8_t *seen = view->scratch->seen;
        const float unseen = config->no_softmax ? 0.0f : -INFINITY;
        const int32_t num_seen =
            job->state->hooks->mask(job->params->variant, &row, positions, count, seen);
        for (int32_t i = 0; i < count; i++) {
            x[i] = seen[i] ? x[i] : unseen;
        }
        return num_seen;
    }
    return count;
}

/* ---------------------------------------------------------------- states */

float raddle_attention_cpu_state(const attention_cpu_job *job, const raddle_row *row,
                                 float *state) {
    const float before = state[0] * LN_2;
    float max = before;
    if (job->config->has_sinks) {
        raddle_sink(job->params->sinks[row->qo_head], &max, &state[1]);
    }
    if (job->config->hooks & RADDLE_HOOK_STATE) {
        job->state->hooks->state(job->params->variant, row, &max, &state[1]);
    }
    if (max == before) {
        return 1.0f;
    }
    state[0] = max * LOG2_E;
    return raddle_exp(before - max);
}

void raddle_attention_cpu_output(const attention_cpu_job *job, const raddle_row *row, float *acc) {
    job->state->hooks->output(job->params->variant, row, acc, job->config->head_dim_vo);
}

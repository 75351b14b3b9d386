/* attention_cpu_segment.c - one segment: rows of packed query heads against a K/V range, by online
 * softmax in base 2.
 *
 * segment -> blocks of heads (as many as fit block_rows) -> chunks (the whole range, or fixed_chunk
 * tokens) -> tiles of tokens, each for all heads of the block (attention_cpu_tile.c). A tile is a list
 * of addresses, so that pages of any size and shuffled tables cost the same, and a token on a page
 * outside the pool is simply not in the list.
 */
#include "attention/attention_cpu.h"

#include <math.h>
#include <string.h>

#include "base/tensor.h"

enum { LINE_BYTES = 64 };

/* ---------------------------------------------------------------- running states */

void raddle_attention_cpu_clear(const attention_cpu_states *states, int64_t rows,
                                int32_t head_dim_vo) {
    for (int64_t r = 0; r < rows; r++) {
        states->state[2 * r] = -INFINITY;
        states->state[2 * r + 1] = 0;
    }
    memset(states->acc, 0, (size_t)(rows * head_dim_vo) * sizeof(float));
}

void raddle_attention_cpu_fold(const attention_cpu_states *into, const attention_cpu_states *from,
                               int64_t rows, int32_t head_dim_vo) {
    for (int64_t r = 0; r < rows; r++) {
        float *a = into->state + 2 * r;
        const float *b = from->state + 2 * r;
        float *acc_a = into->acc + r * head_dim_vo;
        const float *acc_b = from->acc + r * head_dim_vo;
        const float max = a[0] > b[0] ? a[0] : b[0];
        const float factor_a = exp2f(a[0] - raddle_vec_base(max));
        const float factor_b = exp2f(b[0] - raddle_vec_base(max));
        a[0] = max;
        a[1] = a[1] * factor_a + b[1] * factor_b;
        for (int32_t d = 0; d < head_dim_vo; d++) {
            acc_a[d] = acc_a[d] * factor_a + acc_b[d] * factor_b;
        }
    }
}

/* What the sums of a row become its output by. Finishes its state, by which the lse is told. */
static float finish_state(const attention_cpu_job *job, const raddle_row *row, float *state) {
    const raddle_attention_params *params = job->params;
    const bool is_empty = state[1] == 0; /* nothing visible */
    float factor = params->out_scale;
    if (params->v_scales) {
        factor *= params->v_scales[row->kv_head];
    }
    if (job->state->changes_states) {
        factor *= raddle_attention_cpu_state(job, row, state);
    }
    if (is_empty) {
        return 0.0f;
    }
    return job->config->no_softmax ? factor : factor / state[1];
}

void raddle_attention_cpu_write(const attention_cpu_job *job,
                                const raddle_attention_request *request, int32_t head,
                                int32_t row_begin, int32_t row_end,
                                const attention_cpu_states *states) {
    const raddle_attention_params *params = job->params;
    const raddle_vec *vec = job->state->vec;
    const raddle_dtype dtype = job->config->o_dtype;
    const int64_t element_bytes = (int64_t)raddle_dtype_bytes(dtype);
    const int32_t width = job->config->head_dim_vo;
    for (int32_t r = row_begin; r < row_end; r++) {
        const raddle_row row = raddle_attention_cpu_row(job, request, head, r);
        float *state = states->state + 2 * (int64_t)(r - row_begin);
        float *acc = states->acc + (int64_t)(r - row_begin) * width;
        const float factor = finish_state(job, &row, state);
        if (factor == 0.0f) { /* exactly 0, whatever was multiplied with weights of 0 */
            memset(acc, 0, (size_t)width * sizeof *acc);
        } else if (factor != 1.0f) {
            vec->scale(acc, width, factor);
        }
        if ((job->config->hooks & RADDLE_HOOK_OUTPUT) != 0) {
            raddle_attention_cpu_output(job, &row, acc);
        }
        char *out = (char *)params->out;
        out += (row.token * params->out_stride_token + row.qo_head * params->out_stride_head) *
               element_bytes;
        vec->store[dtype](out, acc, width);
        if (params->lse) {
            params->lse[row.token * params->lse_stride_token +
                        row.qo_head * params->lse_stride_head] =
                state[1] == 0 ? -INFINITY : (state[0] + log2f(state[1])) * params->lse_scale;
        }
    }
}

/* ---------------------------------------------------------------- addresses */

/* Keeps the first offending entry: its place + 1 in error[1], then its id in error[0]. */
static void report_page(const raddle_attention_params *params, int64_t page, int64_t place) {
    if (params->check && params->error) {
        int32_t none = 0;
        if (__atomic_compare_exchange_n(&params->error[1], &none, (int32_t)place + 1, false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            __atomic_store_n(&params->error[0], (int32_t)page, __ATOMIC_RELAXED);
        }
    }
}

/* Where one run of neighbouring tokens lies: those of a page, or all when ragged. */
typedef struct token_run {
    int64_t page, offset; /* page 0 and row when ragged */
    int32_t count;
    bool is_valid; /* inside the pool */
} token_run;

static token_run find_run(const attention_cpu_view *view, int32_t token, int32_t end) {
    const raddle_attention_params *params = view->job->params;
    token_run run = {0, (int64_t)view->request->kv_begin + token, end - token, true};
    if (params->page_size == 0) {
        const int64_t left = params->num_pages - run.offset;
        run.is_valid = left > 0;
        run.count = run.is_valid && left < run.count ? (int32_t)left : run.count;
        return run;
    }
    const int32_t number = token / params->page_size;
    const int64_t place = (int64_t)view->request->kv_begin + number;
    run.page = params->page_indices[place];
    run.offset = token - number * params->page_size;
    const int32_t left = params->page_size - (int32_t)run.offset;
    run.count = left < run.count ? left : run.count;
    run.is_valid = run.page >= 0 && run.page < params->num_pages;
    if (!run.is_valid) {
        report_page(params, run.page, place);
    }
    return run;
}

/* Lists the tokens [begin, end) of the request whose page lies in the pool. */
static attention_cpu_tile list_tokens(const attention_cpu_view *view,
                                      const attention_cpu_tokens *tokens, int32_t begin,
                                      int32_t end) {
    const raddle_attention_params *params = view->job->params;
    const int64_t kv_bytes = (int64_t)raddle_dtype_bytes(view->job->config->kv_dtype);
    const int64_t k_step = params->k_stride_token * kv_bytes;
    const int64_t v_step = params->v_stride_token * kv_bytes;
    attention_cpu_tile tile = {tokens, begin, end, 0};
    for (int32_t token = begin; token < end;) {
        const token_run run = find_run(view, token, end);
        if (run.is_valid) {
            const char *k = params->k;
            const char *v = params->v;
            k += run.page * params->k_stride_page * kv_bytes + run.offset * k_step;
            v += run.page * params->v_stride_page * kv_bytes + run.offset * v_step;
            for (int32_t i = 0; i < run.count; i++) {
                tokens->k_rows[tile.count] = k + i * k_step;
                tokens->v_rows[tile.count] = v + i * v_step;
                tokens->positions[tile.count] = token + i;
                tile.count++;
            }
        }
        token += run.count;
    }
    return tile;
}

/* ---------------------------------------------------------------- a block of heads */

static int32_t end_of_heads(const raddle_attention_config *config,
                            const raddle_attention_segment *segment) {
    const int32_t end = segment->head + config->heads_per_item;
    return end < config->num_kv_heads ? end : config->num_kv_heads;
}

/* Copies the query rows of the block's heads, as dot's operand. */
static void load_q(const attention_cpu_view *view) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_config *config = view->job->config;
    const attention_cpu_state *state = view->job->state;
    const int64_t q_bytes = (int64_t)raddle_dtype_bytes(config->q_dtype);
    const int64_t row_bytes = (int64_t)state->q_bytes * config->head_dim_qk;
    char *to = view->scratch->q;
    for (int32_t head = view->head_begin; head < view->head_end; head++) {
        for (int32_t r = view->segment->row_begin; r < view->segment->row_end; r++) {
            const raddle_row row = raddle_attention_cpu_row(view->job, view->request, head, r);
            const char *q = params->q;
            q += (row.token * params->q_stride_token + row.qo_head * params->q_stride_head) *
                 q_bytes;
            if (config->q_dtype == state->dot->operand) {
                memcpy(to, q, (size_t)row_bytes);
            } else {
                state->vec->load[config->q_dtype]((float *)to, q, config->head_dim_qk);
            }
            if (state->changes_queries) {
                raddle_attention_cpu_query(view->job, &row, view->scratch->turns, (float *)to);
            }
            to += row_bytes;
        }
    }
}

static int32_t tile_step(const attention_cpu_view *view) {
    return view->num_rows < ATTENTION_CPU_MANY_ROWS ? view->job->state->few_tile_kv
                                                    : view->job->config->tile_kv;
}

/* A tile of the tokens from begin on; empty at end. Its lists are filled up to count entries, so
 * that the tile before can prefetch as many as it has. */
static attention_cpu_tile next_tile(const attention_cpu_view *view, int which, int32_t begin,
                                    int32_t end, int32_t count) {
    const attention_cpu_tokens *tokens = &view->scratch->tokens[which];
    const int32_t step = tile_step(view);
    const attention_cpu_tile tile =
        list_tokens(view, tokens, begin, end - begin > step ? begin + step : end);
    for (int32_t n = tile.count; tile.count > 0 && n < count; n++) {
        tokens->k_rows[n] = tokens->k_rows[tile.count - 1];
        tokens->v_rows[n] = tokens->v_rows[tile.count - 1];
    }
    return tile;
}

/* Rows [first, tile->count) of the block's heads, into the second cache. */
static void prefetch_rows(const attention_cpu_view *view, const attention_cpu_tile *tile,
                          int32_t first) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_config *config = view->job->config;
    const int64_t kv_bytes = (int64_t)raddle_dtype_bytes(config->kv_dtype);
    for (int32_t n = first; n < tile->count; n++) {
        for (int32_t head = view->head_begin; head < view->head_end; head++) {
            const char *k = tile->tokens->k_rows[n], *v = tile->tokens->v_rows[n];
            k += head * params->k_stride_head * kv_bytes;
            v += head * params->v_stride_head * kv_bytes;
            for (int64_t i = 0; i < config->head_dim_qk * kv_bytes; i += LINE_BYTES) {
                __builtin_prefetch(k + i, 0, 2);
            }
            for (int64_t i = 0; i < config->head_dim_vo * kv_bytes; i += LINE_BYTES) {
                __builtin_prefetch(v + i, 0, 2);
            }
        }
    }
}

/* The first tile of the segment that this worker takes next, to prefetch behind the last tile of
 * this one: of short requests the first tile is a good part. Empty where nothing is gained. */
static attention_cpu_tile following_tile(const attention_cpu_view *view, int which, int32_t end,
                                         int32_t count) {
    const raddle_attention_segment *following = view->following;
    const bool is_alike = following && end == view->segment->kv_end &&
                          following->head == view->segment->head &&
                          following->row_end - following->row_begin == view->num_rows;
    if (!is_alike || view->num_rows >= ATTENTION_CPU_MANY_ROWS ||
        view->head_end < end_of_heads(view->job->config, view->segment)) {
        return (attention_cpu_tile){&view->scratch->tokens[which], end, end, 0};
    }
    attention_cpu_view there = *view;
    there.segment = following;
    there.request = &view->job->params->requests[following->request];
    const attention_cpu_tile tile =
        next_tile(&there, which, following->kv_begin, following->kv_end, count);
    prefetch_rows(view, &tile, count); /* the others along with the last tile's own rows */
    return tile;
}

static void attend_range(const attention_cpu_view *view, int32_t begin, int32_t end) {
    attention_cpu_tile tile = next_tile(view, 0, begin, end, 0);
    for (int which = 1;; which = !which) {
        const bool is_last = tile.end >= end;
        const attention_cpu_tile next = is_last ? following_tile(view, which, end, tile.count)
                                                : next_tile(view, which, tile.end, end, tile.count);
        if (tile.count > 0) {
            raddle_attention_cpu_attend(view, &tile, &next);
        }
        if (is_last) {
            return;
        }
        tile = next;
    }
}

/* The states of the block's rows over the segment's range; fixed chunks are folded one by one as a
 * merge would. */
static const attention_cpu_states *attend_block(const attention_cpu_view *view) {
    const attention_cpu_scratch *scratch = view->scratch;
    const raddle_attention_segment *segment = view->segment;
    const int32_t width = view->job->config->head_dim_vo;
    const int32_t fixed_chunk = view->job->params->fixed_chunk;
    const int64_t rows = (int64_t)(view->head_end - view->head_begin) * view->num_rows;
    load_q(view);
    if (fixed_chunk <= 0 || segment->slot >= 0) {
        raddle_attention_cpu_clear(&scratch->chunk, rows, width);
        attend_range(view, segment->kv_begin, segment->kv_end);
        return &scratch->chunk;
    }
    raddle_attention_cpu_clear(&scratch->folded, rows, width);
    for (int64_t begin = segment->kv_begin; begin < segment->kv_end;) {
        const int64_t next = (begin / fixed_chunk + 1) * fixed_chunk;
        const int64_t end = next < segment->kv_end ? next : segment->kv_end;
        raddle_attention_cpu_clear(&scratch->chunk, rows, width);
        attend_range(view, (int32_t)begin, (int32_t)end);
        raddle_attention_cpu_fold(&scratch->folded, &scratch->chunk, rows, width);
        begin = end;
    }
    return &scratch->folded;
}

static void write_partial(const attention_cpu_view *view, int32_t head,
                          const attention_cpu_states *states) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_config *config = view->job->config;
    const int64_t item_head = head - view->segment->head;
    const int64_t at =
        ((int64_t)view->segment->slot * config->heads_per_item + item_head) * config->tile_rows;
    memcpy(params->partial_state + 2 * at, states->state,
           (size_t)view->num_rows * 2 * sizeof(float));
    memcpy(params->partial_out + at * config->head_dim_vo, states->acc,
           (size_t)view->num_rows * (size_t)config->head_dim_vo * sizeof(float));
}

void raddle_attention_cpu_segment(const attention_cpu_job *job,
                                  const attention_cpu_scratch *scratch,
                                  const raddle_attention_segment *segment,
                                  const raddle_attention_segment *following) {
    const raddle_attention_config *config = job->config;
    const int32_t num_rows = segment->row_end - segment->row_begin;
    if (num_rows <= 0) {
        return;
    }
    const int32_t head_end = end_of_heads(config, segment);
    const int32_t fit = job->state->block_rows / num_rows;
    const int32_t heads = fit > 1 ? fit : 1;
    attention_cpu_view view = {.job = job,
                               .scratch = scratch,
                               .segment = segment,
                               .following = following,
                               .request = &job->params->requests[segment->request],
                               .num_rows = num_rows};
    for (int32_t head = segment->head; head < head_end; head = view.head_end) {
        view.head_begin = head;
        view.head_end = head_end - head > heads ? head + heads : head_end;
        const attention_cpu_states *block = attend_block(&view);
        for (int32_t h = view.head_begin; h < view.head_end; h++) {
            const int64_t row = (int64_t)(h - view.head_begin) * num_rows;
            const attention_cpu_states states = {block->state + 2 * row,
                                                 block->acc + row * config->head_dim_vo};
            if (segment->slot >= 0) {
                write_partial(&view, h, &states);
            } else {
                raddle_attention_cpu_write(job, view.request, h, segment->row_begin,
                                           segment->row_end, &states);
            }
        }
    }
}

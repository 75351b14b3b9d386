/* attention_cpu_segment.c - one segment: rows of packed query heads against a K/V range, by online
 * softmax in base 2.
 *
 * segment -> blocks of heads (as many as fit block_rows) -> chunks (the whole range, or fixed_chunk
 * tokens) -> tiles of tile_kv tokens -> heads of the block. A tile is a list of addresses, so that
 * pages of any size and shuffled tables cost the same, and a token on a page outside the pool is
 * simply not in the list. A row multiplies only V rows that it sees: what lies in the others (NaN,
 * say) cannot reach it.
 */
#include "attention/attention_cpu.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/tensor.h"

/* The segment at hand, resolved. */
typedef struct segment_view {
    const attention_cpu_job *job;
    const attention_cpu_scratch *scratch;
    const raddle_attention_segment *segment;
    const raddle_attention_request *request;
    int32_t num_rows;
    int32_t head_begin, head_end; /* K/V heads of the block */
} segment_view;

/* Tokens of a tile: entry n is token positions[n]. */
typedef struct kv_tile {
    int32_t begin, end; /* token range that was asked for */
    int32_t count;      /* entries; fewer than end - begin when pages were skipped */
} kv_tile;

/* ---------------------------------------------------------------- running states */

void raddle_attention_cpu_clear(const attention_cpu_states *states, int64_t rows,
                                int32_t head_dim_vo) {
    for (int64_t r = 0; r < rows; r++) {
        states->state[2 * r] = -INFINITY;
        states->state[2 * r + 1] = 0;
    }
    memset(states->acc, 0, (size_t)(rows * head_dim_vo) * sizeof(float));
}

/* What to subtract from logits whose maximum is max: anything finite will do when all of them are
 * -inf (or NaN). */
static float exponent_base(float max) {
    return max == -INFINITY ? 0.0f : max;
}

void raddle_attention_cpu_fold(const attention_cpu_states *into, const attention_cpu_states *from,
                               int64_t rows, int32_t head_dim_vo) {
    for (int64_t r = 0; r < rows; r++) {
        float *a = into->state + 2 * r;
        const float *b = from->state + 2 * r;
        float *acc_a = into->acc + r * head_dim_vo;
        const float *acc_b = from->acc + r * head_dim_vo;
        const float max = a[0] > b[0] ? a[0] : b[0];
        const float factor_a = exp2f(a[0] - exponent_base(max));
        const float factor_b = exp2f(b[0] - exponent_base(max));
        a[0] = max;
        a[1] = a[1] * factor_a + b[1] * factor_b;
        for (int32_t d = 0; d < head_dim_vo; d++) {
            acc_a[d] = acc_a[d] * factor_a + acc_b[d] * factor_b;
        }
    }
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
    for (int32_t row = row_begin; row < row_end; row++) {
        const int64_t token = (int64_t)request->qo_begin + row / params->group_size;
        const int64_t qo_head = (int64_t)head * params->group_size + row % params->group_size;
        const float *state = states->state + 2 * (int64_t)(row - row_begin);
        float *acc = states->acc + (int64_t)(row - row_begin) * width;
        const bool empty = state[1] == 0; /* nothing visible: exactly 0, and acc is 0 already */
        if (!empty) {
            vec->scale(acc, width, 1.0f / state[1]);
        }
        char *out = (char *)params->out;
        out +=
            (token * params->out_stride_token + qo_head * params->out_stride_head) * element_bytes;
        vec->store[dtype](out, acc, width);
        if (params->lse) {
            params->lse[token * params->lse_stride_token + qo_head * params->lse_stride_head] =
                empty ? -INFINITY : (state[0] + log2f(state[1])) * params->lse_scale;
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

/* Lists the tokens [begin, end) of the request whose page lies in the pool. */
static kv_tile list_tokens(const segment_view *view, int32_t begin, int32_t end) {
    const raddle_attention_params *params = view->job->params;
    const attention_cpu_scratch *scratch = view->scratch;
    const int64_t kv_bytes = (int64_t)raddle_dtype_bytes(view->job->config->kv_dtype);
    const char *k = params->k;
    const char *v = params->v;
    kv_tile tile = {begin, end, 0};
    for (int32_t token = begin; token < end;) {
        /* A run: the tokens of one page, or all of them when ragged. */
        int64_t page = 0;
        int64_t offset = (int64_t)view->request->kv_begin + token;
        int32_t run_end = end;
        bool valid = true;
        if (params->page_size > 0) {
            const int32_t number = token / params->page_size;
            const int64_t place = (int64_t)view->request->kv_begin + number;
            page = params->page_indices[place];
            offset = token - number * params->page_size;
            run_end = end - token > params->page_size - (int32_t)offset
                          ? token + params->page_size - (int32_t)offset
                          : end;
            valid = page >= 0 && page < params->num_pages;
            if (!valid) {
                report_page(params, page, place);
            }
        } else if (offset + (end - token) > params->num_pages) {
            run_end =
                params->num_pages > offset ? token + (int32_t)(params->num_pages - offset) : token;
            valid = run_end > token;
            run_end = valid ? run_end : end;
        }
        if (valid) {
            const char *k_row =
                k + (page * params->k_stride_page + offset * params->k_stride_token) * kv_bytes;
            const char *v_row =
                v + (page * params->v_stride_page + offset * params->v_stride_token) * kv_bytes;
            for (int32_t i = 0; i < run_end - token; i++) {
                scratch->k_rows[tile.count] = k_row + i * params->k_stride_token * kv_bytes;
                scratch->v_rows[tile.count] = v_row + i * params->v_stride_token * kv_bytes;
                scratch->positions[tile.count] = token + i;
                tile.count++;
            }
        }
        token = run_end;
    }
    return tile;
}

/* Entries of the tile that lie before token. */
static int32_t entries_before(const kv_tile *tile, const int32_t *positions, int64_t token) {
    if (token <= tile->begin) {
        return 0;
    }
    if (token >= tile->end) {
        return tile->count;
    }
    if (tile->count == tile->end - tile->begin) {
        return (int32_t)(token - tile->begin);
    }
    int32_t n = 0;
    while (n < tile->count && positions[n] < token) {
        n++;
    }
    return n;
}

/* Entries [*first, *last) that packed row sees. */
static void row_range(const segment_view *view, const kv_tile *tile, int32_t row, int32_t *first,
                      int32_t *last) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_request *request = view->request;
    const int64_t own = (int64_t)request->kv_len - request->qo_len + row / params->group_size;
    *last = params->causal ? entries_before(tile, view->scratch->positions, own + 1) : tile->count;
    *first = params->window_left >= 0
                 ? entries_before(tile, view->scratch->positions, own - params->window_left)
                 : 0;
    *first = *first < *last ? *first : *last;
}

/* ---------------------------------------------------------------- one tile of one head */

static void load_q(const segment_view *view) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_config *config = view->job->config;
    const int64_t q_bytes = (int64_t)raddle_dtype_bytes(config->q_dtype);
    float *to = view->scratch->q;
    for (int32_t head = view->head_begin; head < view->head_end; head++) {
        for (int32_t row = view->segment->row_begin; row < view->segment->row_end; row++) {
            const int64_t token = (int64_t)view->request->qo_begin + row / params->group_size;
            const int64_t qo_head = (int64_t)head * params->group_size + row % params->group_size;
            const char *q = (const char *)params->q;
            q += (token * params->q_stride_token + qo_head * params->q_stride_head) * q_bytes;
            view->job->state->vec->load[config->q_dtype](to, q, config->head_dim_qk);
            to += config->head_dim_qk;
        }
    }
}

/* Turns a row's logits [first, last) into weights relative to its new maximum and rescales what was
 * summed before. */
static void softmax_row(const raddle_vec *vec, float *logits, int32_t first, int32_t last,
                        float *state, float *acc, int32_t width) {
    const float tile_max = vec->max(logits + first, last - first);
    const float max = tile_max > state[0] ? tile_max : state[0];
    const float factor = exp2f(state[0] - exponent_base(max));
    if (factor != 1.0f) {
        vec->scale(acc, width, factor);
    }
    state[0] = max;
    state[1] = state[1] * factor + vec->exp2_sum(logits + first, last - first, exponent_base(max));
}

static void attend_tile(const segment_view *view, const kv_tile *tile, int32_t head) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_config *config = view->job->config;
    const attention_cpu_scratch *scratch = view->scratch;
    const raddle_vec *vec = view->job->state->vec;
    const int32_t width = config->head_dim_vo;
    const int64_t ld = config->tile_kv;
    const int64_t block_row = (int64_t)(head - view->head_begin) * view->num_rows;
    float *state = scratch->chunk.state + 2 * block_row;
    float *acc = scratch->chunk.acc + block_row * width;
    const raddle_vec_rows k = {scratch->k_rows, NULL, head * params->k_stride_head, tile->count};
    const raddle_vec_rows v = {scratch->v_rows, NULL, head * params->v_stride_head, tile->count};

    vec->dot_rows[config->kv_dtype](
        scratch->logits, ld, scratch->q + block_row * config->head_dim_qk, config->head_dim_qk, &k,
        view->num_rows, config->head_dim_qk, params->sm_scale_log2);
    bool whole = true;
    for (int32_t r = 0; r < view->num_rows; r++) {
        int32_t first, last;
        row_range(view, tile, view->segment->row_begin + r, &first, &last);
        whole = whole && first == 0 && last == tile->count;
        if (first < last) {
            softmax_row(vec, scratch->logits + r * ld, first, last, state + 2 * r, acc + r * width,
                        width);
        }
    }
    if (whole) {
        vec->add_rows[config->kv_dtype](acc, width, scratch->logits, ld, &v, view->num_rows, width);
        return;
    }
    for (int32_t r = 0; r < view->num_rows; r++) {
        int32_t first, last;
        row_range(view, tile, view->segment->row_begin + r, &first, &last);
        const raddle_vec_rows seen = {scratch->v_rows + first, NULL, v.offset, last - first};
        vec->add_rows[config->kv_dtype](acc + r * width, width, scratch->logits + r * ld + first,
                                        ld, &seen, 1, width);
    }
}

/* ---------------------------------------------------------------- a block of heads */

static void attend_range(const segment_view *view, int32_t begin, int32_t end) {
    const int32_t tile_kv = view->job->config->tile_kv;
    for (int32_t token = begin; token < end; token += tile_kv) {
        const kv_tile tile =
            list_tokens(view, token, end - token > tile_kv ? token + tile_kv : end);
        if (tile.count == 0) {
            continue;
        }
        for (int32_t head = view->head_begin; head < view->head_end; head++) {
            attend_tile(view, &tile, head);
        }
    }
}

/* The states of the block's rows over the segment's range; fixed chunks are folded one by one as a
 * merge would. */
static const attention_cpu_states *attend_block(const segment_view *view) {
    const attention_cpu_scratch *scratch = view->scratch;
    const raddle_attention_segment *segment = view->segment;
    const int32_t width = view->job->config->head_dim_vo;
    const int32_t fixed_chunk = view->job->params->header->fixed_chunk;
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

static void write_partial(const segment_view *view, int32_t head,
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
                                  const raddle_attention_segment *segment) {
    const raddle_attention_config *config = job->config;
    const int32_t num_rows = segment->row_end - segment->row_begin;
    if (num_rows <= 0) {
        return;
    }
    const int32_t past = segment->head + config->heads_per_item;
    const int32_t head_end = past < config->num_kv_heads ? past : config->num_kv_heads;
    const int32_t fit = job->state->block_rows / num_rows;
    const int32_t heads = fit > 1 ? fit : 1;
    segment_view view = {job,      scratch, segment, &job->params->requests[segment->request],
                         num_rows, 0,       0};
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

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
#include <string.h>

#include "base/tensor.h"

enum {
    FEW_TILE_KV = 16, /* tokens of a tile that is read where it lies */
    MANY_ROWS = 16,   /* from here on a tile is packed for its rows */
    PANEL_ROWS = 32,  /* their logits (8 KB) stay in the first cache until they are weights */
};

/* The segment at hand, resolved. */
typedef struct segment_view {
    const attention_cpu_job *job;
    const attention_cpu_scratch *scratch;
    const raddle_attention_segment *segment;
    const raddle_attention_request *request;
    int32_t num_rows;
    int32_t head_begin, head_end; /* K/V heads of the block */
} segment_view;

/* Tokens of a tile. */
typedef struct kv_tile {
    const attention_cpu_tokens *tokens;
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

/* Where one run of neighbouring tokens lies: those of a page, or all when ragged. */
typedef struct token_run {
    int64_t page, offset; /* page 0 and row when ragged */
    int32_t count;
    bool is_valid; /* inside the pool */
} token_run;

static token_run find_run(const segment_view *view, int32_t token, int32_t end) {
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
static kv_tile list_tokens(const segment_view *view, const attention_cpu_tokens *tokens,
                           int32_t begin, int32_t end) {
    const raddle_attention_params *params = view->job->params;
    const int64_t kv_bytes = (int64_t)raddle_dtype_bytes(view->job->config->kv_dtype);
    const int64_t k_step = params->k_stride_token * kv_bytes;
    const int64_t v_step = params->v_stride_token * kv_bytes;
    kv_tile tile = {tokens, begin, end, 0};
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

/* Entries of the tile that lie before token. */
static int32_t entries_before(const kv_tile *tile, int64_t token) {
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
    while (n < tile->count && tile->tokens->positions[n] < token) {
        n++;
    }
    return n;
}

typedef struct entry_range {
    int32_t first, last; /* [first, last) of a tile */
} entry_range;

/* What packed row sees of the tile. */
static entry_range visible_entries(const segment_view *view, const kv_tile *tile, int32_t row) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_request *request = view->request;
    const int64_t own = (int64_t)request->kv_len - request->qo_len + row / params->group_size;
    entry_range range = {0, tile->count};
    if (params->causal) {
        range.last = entries_before(tile, own + 1);
    }
    if (params->window_left >= 0) {
        range.first = entries_before(tile, own - params->window_left);
    }
    range.first = range.first < range.last ? range.first : range.last;
    return range;
}

/* Whether all rows of the segment see all of the tile: what causality hides lies past the first
 * row, what the window hides before the last. */
static bool is_whole(const segment_view *view, const kv_tile *tile) {
    const entry_range first = visible_entries(view, tile, view->segment->row_begin);
    const entry_range last = visible_entries(view, tile, view->segment->row_end - 1);
    return first.last == tile->count && last.first == 0;
}

/* ---------------------------------------------------------------- one tile of one head */

/* Copies the query rows of the block's heads, as the operand's type. */
static void load_q(const segment_view *view) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_config *config = view->job->config;
    const attention_cpu_state *state = view->job->state;
    const int64_t q_bytes = (int64_t)raddle_dtype_bytes(config->q_dtype);
    const int64_t row_bytes = (int64_t)state->operand_bytes * config->head_dim_qk;
    char *to = view->scratch->q;
    for (int32_t head = view->head_begin; head < view->head_end; head++) {
        for (int32_t row = view->segment->row_begin; row < view->segment->row_end; row++) {
            const int64_t token = (int64_t)view->request->qo_begin + row / params->group_size;
            const int64_t qo_head = (int64_t)head * params->group_size + row % params->group_size;
            const char *q = params->q;
            q += (token * params->q_stride_token + qo_head * params->q_stride_head) * q_bytes;
            if (config->q_dtype == state->block->operand) {
                memcpy(to, q, (size_t)row_bytes);
            } else {
                state->vec->load[config->q_dtype]((float *)to, q, config->head_dim_qk);
            }
            to += row_bytes;
        }
    }
}

/* One head of the block against one tile. */
typedef struct tile_view {
    const segment_view *view;
    const kv_tile *tile;
    raddle_vec_rows k, v;
    const char *q; /* [num_rows, head_dim_qk] */
    float *state;  /* [num_rows, 2] */
    float *acc;    /* [num_rows, head_dim_vo] */
    bool is_whole;
} tile_view;

/* Turns logits [first, last) of row r into weights relative to the row's new maximum, and rescales
 * what was summed before. The logits still lack sm_scale. */
static void weigh_row(const tile_view *t, int32_t r, entry_range range, const float *logits,
                      char *weights) {
    const attention_cpu_state *shared = t->view->job->state;
    const float scale = t->view->job->params->sm_scale_log2;
    const int32_t width = t->view->job->config->head_dim_vo;
    float *state = t->state + 2 * (int64_t)r;
    const int32_t count = range.last - range.first;
    const float tile_max = shared->vec->max(logits + range.first, count) * scale;
    const float max = tile_max > state[0] ? tile_max : state[0];
    if (max != state[0]) {
        const float factor = exp2f(state[0] - max);
        shared->vec->scale(t->acc + (int64_t)r * width, width, factor);
        state[1] *= factor;
        state[0] = max;
    }
    state[1] += shared->block->exp2_to(weights + range.first * shared->operand_bytes,
                                       logits + range.first, count, scale, exponent_base(max));
}

/* Few rows: K and V are read where they lie. */
static void attend_few(const tile_view *t) {
    const segment_view *view = t->view;
    const attention_cpu_state *shared = view->job->state;
    const raddle_attention_config *config = view->job->config;
    const int32_t width = config->head_dim_vo;
    const int64_t ld = config->tile_kv;
    float *logits = view->scratch->logits;
    char *weights = view->scratch->weights;
    shared->block->dot_rows(logits, ld, t->q, config->head_dim_qk, &t->k, view->num_rows,
                            config->head_dim_qk);
    for (int32_t r = 0; r < view->num_rows; r++) {
        const entry_range range = visible_entries(view, t->tile, view->segment->row_begin + r);
        if (range.first < range.last) {
            weigh_row(t, r, range, logits + r * ld, weights + r * ld * shared->operand_bytes);
        }
    }
    if (t->is_whole) {
        shared->block->add_rows(t->acc, width, weights, ld, &t->v, view->num_rows, width);
        return;
    }
    for (int32_t r = 0; r < view->num_rows; r++) {
        const entry_range range = visible_entries(view, t->tile, view->segment->row_begin + r);
        const raddle_vec_rows seen = {t->v.rows + range.first, NULL, t->v.offset,
                                      range.last - range.first};
        shared->block->add_rows(t->acc + (int64_t)r * width, width,
                                weights + (r * ld + range.first) * shared->operand_bytes, ld, &seen,
                                1, width);
    }
}

/* A weight of 0 times infinity or NaN is NaN, so a panel that some row must not see all of may only
 * be multiplied when it has neither. */
static bool is_finite(const raddle_vec_rows *v, int32_t width, raddle_dtype dtype) {
    const uint32_t exponent = dtype == RADDLE_F16 ? 0x7c00 : dtype == RADDLE_BF16 ? 0x7f80 : 0;
    for (int n = 0; n < v->count; n++) {
        uint32_t special = 0;
        if (dtype == RADDLE_F32) {
            const uint32_t *bits = (const uint32_t *)v->rows[n] + v->offset;
            for (int32_t d = 0; d < width; d++) {
                special |= (bits[d] & 0x7f800000u) == 0x7f800000u;
            }
        } else {
            const uint16_t *bits = (const uint16_t *)v->rows[n] + v->offset;
            for (int32_t d = 0; d < width; d++) {
                special |= (bits[d] & exponent) == exponent;
            }
        }
        if (special) {
            return false;
        }
    }
    return true;
}

/* Rows [begin, end) against the packed tile: logits, weights (0 where a row does not see), sums. */
static void attend_panel_rows(const tile_view *t, int32_t begin, int32_t end) {
    const segment_view *view = t->view;
    const attention_cpu_state *shared = view->job->state;
    const raddle_attention_config *config = view->job->config;
    const int64_t ld = config->tile_kv;
    const int64_t bytes = shared->operand_bytes;
    float *logits = view->scratch->logits;
    char *weights = view->scratch->weights;
    entry_range all = {0, t->tile->count};
    if (!t->is_whole) {
        all.first = visible_entries(view, t->tile, view->segment->row_begin + begin).first;
        all.first -= all.first % RADDLE_VEC_PANEL_STEP;
        all.last = visible_entries(view, t->tile, view->segment->row_begin + end - 1).last;
        if (all.first >= all.last) {
            return;
        }
    }
    shared->block->dot_panel(logits, ld, t->q + begin * config->head_dim_qk * bytes,
                             config->head_dim_qk, &view->scratch->k_panel, end - begin, all.first,
                             all.last);
    for (int32_t r = begin; r < end; r++) {
        const float *row_logits = logits + (r - begin) * ld;
        char *row_weights = weights + (r - begin) * ld * bytes;
        entry_range range = all;
        if (!t->is_whole) {
            range = visible_entries(view, t->tile, view->segment->row_begin + r);
            memset(row_weights + all.first * bytes, 0, (size_t)((range.first - all.first) * bytes));
        }
        if (range.first < range.last) {
            weigh_row(t, r, range, row_logits, row_weights);
        }
        /* Past its last entry too, up to what add_panel reads. */
        memset(row_weights + range.last * bytes, 0,
               (size_t)((all.last + all.last % 2 - range.last) * bytes));
    }
    shared->block->add_panel(t->acc + (int64_t)begin * config->head_dim_vo, config->head_dim_vo,
                             weights, ld, &view->scratch->v_panel, end - begin, all.first,
                             all.last);
}

/* Many rows: the tile is packed once for all of them. */
static void attend_many(const tile_view *t) {
    const segment_view *view = t->view;
    const raddle_vec_block *block = view->job->state->block;
    const int32_t width = view->job->config->head_dim_vo;
    if (!t->is_whole && !is_finite(&t->v, width, view->job->config->kv_dtype)) {
        attend_few(t);
        return;
    }
    block->pack_dot(&view->scratch->k_panel, &t->k);
    block->pack_add(&view->scratch->v_panel, &t->v);
    for (int32_t r = 0; r < view->num_rows; r += PANEL_ROWS) {
        const int32_t left = view->num_rows - r;
        attend_panel_rows(t, r, left < PANEL_ROWS ? view->num_rows : r + PANEL_ROWS);
    }
}

/* ---------------------------------------------------------------- a block of heads */

/* next: the tile that follows, to prefetch; count 0 for none. */
static void attend_tile(const segment_view *view, const kv_tile *tile, const kv_tile *next) {
    const raddle_attention_params *params = view->job->params;
    const raddle_attention_config *config = view->job->config;
    const bool has_next = next->count > 0;
    tile_view t = {.view = view, .tile = tile, .is_whole = is_whole(view, tile)};
    for (int32_t head = view->head_begin; head < view->head_end; head++) {
        const int64_t row = (int64_t)(head - view->head_begin) * view->num_rows;
        t.k = (raddle_vec_rows){tile->tokens->k_rows, has_next ? next->tokens->k_rows : NULL,
                                head * params->k_stride_head, tile->count};
        t.v = (raddle_vec_rows){tile->tokens->v_rows, has_next ? next->tokens->v_rows : NULL,
                                head * params->v_stride_head, tile->count};
        t.q = (const char *)view->scratch->q +
              row * config->head_dim_qk * view->job->state->operand_bytes;
        t.state = view->scratch->chunk.state + 2 * row;
        t.acc = view->scratch->chunk.acc + row * config->head_dim_vo;
        if (view->num_rows < MANY_ROWS) {
            attend_few(&t);
        } else {
            attend_many(&t);
        }
    }
}

static int32_t tile_step(const segment_view *view) {
    const int32_t tile_kv = view->job->config->tile_kv;
    return view->num_rows < MANY_ROWS && tile_kv > FEW_TILE_KV ? FEW_TILE_KV : tile_kv;
}

/* A tile of the tokens from begin on; empty at end. Its lists are filled up to count entries, so
 * that the tile before can prefetch as many as it has. */
static kv_tile next_tile(const segment_view *view, int which, int32_t begin, int32_t end,
                         int32_t count) {
    const attention_cpu_tokens *tokens = &view->scratch->tokens[which];
    const int32_t step = tile_step(view);
    const kv_tile tile = list_tokens(view, tokens, begin, end - begin > step ? begin + step : end);
    for (int32_t n = tile.count; tile.count > 0 && n < count; n++) {
        tokens->k_rows[n] = tokens->k_rows[tile.count - 1];
        tokens->v_rows[n] = tokens->v_rows[tile.count - 1];
    }
    return tile;
}

static void attend_range(const segment_view *view, int32_t begin, int32_t end) {
    kv_tile tile = next_tile(view, 0, begin, end, 0);
    for (int which = 1; tile.begin < end; which = !which) {
        const kv_tile next = next_tile(view, which, tile.end, end, tile.count);
        if (tile.count > 0) {
            attend_tile(view, &tile, &next);
        }
        tile = next;
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

/* attention_cpu_tile.c - a tile of K and V tokens against the rows of a block of heads.
 *
 * Few rows per head: K and V are read where they lie. Many: they are packed once for all of them.
 * A row multiplies only V rows that it sees: what lies in the others (NaN, say) cannot reach it.
 */
#include "attention/attention_cpu.h"

#include <math.h>
#include <string.h>

enum {
    PANEL_ROWS = 32, /* their logits (16 KB) stay in the first caches until they are weights */
};

#define LOG2_E 1.44269504088896340736f

/* ---------------------------------------------------------------- what a row sees */

/* Entries of the tile that lie before token. */
static int32_t entries_before(const attention_cpu_tile *tile, int64_t token) {
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
static entry_range visible_entries(const attention_cpu_view *view, const attention_cpu_tile *tile,
                                   int32_t row) {
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
static bool is_whole(const attention_cpu_view *view, const attention_cpu_tile *tile) {
    const entry_range first = visible_entries(view, tile, view->segment->row_begin);
    const entry_range last = visible_entries(view, tile, view->segment->row_end - 1);
    return first.last == tile->count && last.first == 0;
}

/* A weight of 0 times infinity or NaN is NaN, so a tile that some row must not see all of may only
 * be multiplied as a whole when it has neither. */
static bool is_finite_16(const raddle_vec_rows *v, int32_t width, uint16_t exponent) {
    for (int n = 0; n < v->count; n++) {
        const uint16_t *bits = (const uint16_t *)v->rows[n] + v->offset;
        uint32_t special = 0;
        for (int32_t d = 0; d < width; d++) {
            special |= (bits[d] & exponent) == exponent;
        }
        if (special) {
            return false;
        }
    }
    return true;
}

static bool is_finite_8(const raddle_vec_rows *v, int32_t width, uint8_t special_bits) {
    for (int n = 0; n < v->count; n++) {
        const uint8_t *bits = (const uint8_t *)v->rows[n] + v->offset;
        uint32_t special = 0;
        for (int32_t d = 0; d < width; d++) {
            special |= (bits[d] & special_bits) == special_bits;
        }
        if (special) {
            return false;
        }
    }
    return true;
}

static bool is_finite_32(const raddle_vec_rows *v, int32_t width) {
    for (int n = 0; n < v->count; n++) {
        const uint32_t *bits = (const uint32_t *)v->rows[n] + v->offset;
        uint32_t special = 0;
        for (int32_t d = 0; d < width; d++) {
            special |= (bits[d] & 0x7f800000u) == 0x7f800000u;
        }
        if (special) {
            return false;
        }
    }
    return true;
}

static bool is_finite(const raddle_vec_rows *v, int32_t width, raddle_dtype dtype) {
    switch (dtype) {
    case RADDLE_F16:
        return is_finite_16(v, width, 0x7c00);
    case RADDLE_BF16:
        return is_finite_16(v, width, 0x7f80);
    case RADDLE_F8_E4M3: /* no infinity; 0x7f is NaN */
        return is_finite_8(v, width, 0x7f);
    case RADDLE_F8_E5M2:
        return is_finite_8(v, width, 0x7c);
    default:
        return is_finite_32(v, width);
    }
}

/* ---------------------------------------------------------------- one head */

/* One head of the block against one tile. */
typedef struct tile_view {
    const attention_cpu_view *view;
    const attention_cpu_tile *tile;
    int32_t head;
    bool is_whole;    /* every row sees every token, but for the variant's mask */
    bool has_mask;    /* the variant's */
    bool is_plain;    /* logits are products times scale_log2 */
    float scale_log2; /* in base 2 */
    raddle_vec_rows k, v;
    const char *q; /* [num_rows, head_dim_qk] */
    float *state;  /* [num_rows, 2] */
    float *acc;    /* [num_rows, head_dim_vo] */
    float *logits; /* [num_rows, ld]; of PANEL_ROWS rows at a time when there are many */
    char *weights; /* the same */
    int64_t ld;
} tile_view;

/* The end of the rows from r on, at most limit, that see the same entries: all of them, or those of a
 * query token. */
static int32_t end_of_alike(const tile_view *t, int32_t r, int32_t limit) {
    const int32_t group_size = t->view->job->params->group_size;
    const int32_t end = r + group_size - (t->view->segment->row_begin + r) % group_size;
    return t->is_whole || end > limit ? limit : end;
}

/* Turns products of row r into logits in natural units, or into weights where there is no softmax. */
static void change_logits(const tile_view *t, int32_t r, entry_range range, float *x, void *to) {
    const attention_cpu_state *shared = t->view->job->state;
    const int32_t count = range.last - range.first;
    const int32_t num_seen = raddle_attention_cpu_logits(
        t->view, t->tile, t->head, t->view->segment->row_begin + r, range.first, count, x);
    if (t->view->job->config->no_softmax) {
        if (shared->add->operand != RADDLE_F32) {
            shared->vec->store[shared->add->operand](to, x, count);
        }
        t->state[2 * r] = 0.0f;
        t->state[2 * r + 1] += (float)num_seen;
    }
}

/* Turns products of rows [begin, end), at most PANEL_ROWS, with the entries of range into weights
 * relative to each row's new maximum, and rescales what was summed before. logits and weights are
 * those of row begin. */
static void weigh_rows(const tile_view *t, int32_t begin, int32_t end, entry_range range,
                       float *logits, char *weights) {
    const attention_cpu_state *shared = t->view->job->state;
    const int32_t width = t->view->job->config->head_dim_vo;
    float *x = logits + range.first;
    char *to = weights + range.first * shared->weight_bytes;
    float factors[PANEL_ROWS];
    for (int32_t r = begin; !t->is_plain && r < end; r++) {
        const int64_t at = (r - begin) * t->ld;
        change_logits(t, r, range, x + at, to + at * shared->weight_bytes);
    }
    if (t->view->job->config->no_softmax) {
        return;
    }
    shared->add->weigh_rows(to, t->ld, x, t->ld, end - begin, range.last - range.first,
                            t->is_plain ? t->scale_log2 : LOG2_E, t->state + 2 * (int64_t)begin,
                            factors);
    for (int32_t r = begin; r < end; r++) {
        if (factors[r - begin] != 1.0f) {
            shared->vec->scale(t->acc + (int64_t)r * width, width, factors[r - begin]);
        }
    }
}

/* ---------------------------------------------------------------- few rows */

static void few_logits(const tile_view *t) {
    const int32_t depth = t->view->job->config->head_dim_qk;
    t->view->job->state->dot->dot_rows(t->logits, t->ld, t->q, depth, &t->k, t->view->num_rows,
                                       depth);
}

static void few_weights(const tile_view *t) {
    const int64_t row_bytes = t->ld * t->view->job->state->weight_bytes;
    const int32_t num_rows = t->view->num_rows;
    for (int32_t r = 0, end; r < num_rows; r = end) {
        end = end_of_alike(t, r, num_rows - r < PANEL_ROWS ? num_rows : r + PANEL_ROWS);
        const entry_range range =
            visible_entries(t->view, t->tile, t->view->segment->row_begin + r);
        if (range.first < range.last) {
            weigh_rows(t, r, end, range, t->logits + r * t->ld, t->weights + r * row_bytes);
        }
    }
}

/* Row r's sums over the entries of range whose weight is not 0. Their weights move together. */
static void add_seen_rows(const tile_view *t, int32_t r, entry_range range) {
    const attention_cpu_state *shared = t->view->job->state;
    const int32_t width = t->view->job->config->head_dim_vo;
    const size_t bytes = (size_t)shared->weight_bytes;
    const void *rows[ATTENTION_CPU_TILE_KV];
    char *weights = t->weights + r * t->ld * shared->weight_bytes;
    int count = 0;
    for (int32_t n = range.first; n < range.last; n++) {
        uint32_t bits = 0;
        memcpy(&bits, weights + (size_t)n * bytes, bytes);
        if ((bits << (32 - 8 * bytes) << 1) != 0) { /* neither 0 nor -0 */
            memcpy(weights + (size_t)count * bytes, &bits, bytes);
            rows[count++] = t->v.rows[n];
        }
    }
    const raddle_vec_rows seen = {rows, NULL, t->v.offset, count};
    shared->add->add_rows(t->acc + (int64_t)r * width, width, weights, t->ld, &seen, 1, width);
}

static void few_sums(const tile_view *t) {
    const attention_cpu_state *shared = t->view->job->state;
    const raddle_attention_config *config = t->view->job->config;
    const int32_t width = config->head_dim_vo;
    const bool is_apart = t->has_mask && !is_finite(&t->v, width, config->kv_dtype);
    if (t->is_whole && !is_apart) {
        shared->add->add_rows(t->acc, width, t->weights, t->ld, &t->v, t->view->num_rows, width);
        return;
    }
    for (int32_t r = 0; r < t->view->num_rows; r++) {
        const entry_range range =
            visible_entries(t->view, t->tile, t->view->segment->row_begin + r);
        if (is_apart) {
            add_seen_rows(t, r, range);
            continue;
        }
        const raddle_vec_rows seen = {t->v.rows + range.first, NULL, t->v.offset,
                                      range.last - range.first};
        shared->add->add_rows(t->acc + (int64_t)r * width, width,
                              t->weights + (r * t->ld + range.first) * shared->weight_bytes, t->ld,
                              &seen, 1, width);
    }
}

static void attend_few(const tile_view *t) {
    few_logits(t);
    few_weights(t);
    few_sums(t);
}

/* ---------------------------------------------------------------- many rows */

/* Rows [begin, end) against the packed tile: logits, weights (0 where a row does not see), sums. */
static void attend_panel_rows(const tile_view *t, int32_t begin, int32_t end) {
    const attention_cpu_view *view = t->view;
    const attention_cpu_state *shared = view->job->state;
    const raddle_attention_config *config = view->job->config;
    const int64_t ld = t->ld;
    const int64_t bytes = shared->weight_bytes;
    float *logits = t->logits;
    char *weights = t->weights;
    entry_range all = {0, t->tile->count};
    if (!t->is_whole) {
        all.first = visible_entries(view, t->tile, view->segment->row_begin + begin).first;
        all.first -= all.first % RADDLE_VEC_PANEL_STEP;
        all.last = visible_entries(view, t->tile, view->segment->row_begin + end - 1).last;
        if (all.first >= all.last) {
            return;
        }
    }
    shared->dot->dot_panel(logits, ld, t->q + begin * config->head_dim_qk * shared->q_bytes,
                           config->head_dim_qk, &view->scratch->k_panel, end - begin, all.first,
                           all.last);
    for (int32_t r = begin, next; r < end; r = next) {
        next = end_of_alike(t, r, end);
        const entry_range range =
            t->is_whole ? all : visible_entries(view, t->tile, view->segment->row_begin + r);
        char *row_weights = weights + (r - begin) * ld * bytes;
        if (range.first < range.last) {
            weigh_rows(t, r, next, range, logits + (r - begin) * ld, row_weights);
        }
        /* What they do not see, and past the last entry up to what add_panel reads. */
        for (; row_weights < weights + (next - begin) * ld * bytes; row_weights += ld * bytes) {
            memset(row_weights + all.first * bytes, 0, (size_t)((range.first - all.first) * bytes));
            memset(row_weights + range.last * bytes, 0,
                   (size_t)((all.last + all.last % 2 - range.last) * bytes));
        }
    }
    shared->add->add_panel(t->acc + (int64_t)begin * config->head_dim_vo, config->head_dim_vo,
                           weights, ld, &view->scratch->v_panel, end - begin, all.first, all.last);
}

/* The tile is packed once for all rows. */
static void attend_many(const tile_view *t) {
    const attention_cpu_view *view = t->view;
    const attention_cpu_state *shared = view->job->state;
    const int32_t width = view->job->config->head_dim_vo;
    if ((!t->is_whole || t->has_mask) && !is_finite(&t->v, width, view->job->config->kv_dtype)) {
        attend_few(t);
        return;
    }
    shared->dot->pack_dot(&view->scratch->k_panel, &t->k);
    shared->add->pack_add(&view->scratch->v_panel, &t->v);
    for (int32_t r = 0; r < view->num_rows; r += PANEL_ROWS) {
        const int32_t left = view->num_rows - r;
        attend_panel_rows(t, r, left < PANEL_ROWS ? view->num_rows : r + PANEL_ROWS);
    }
}

/* ---------------------------------------------------------------- all heads of the block */

static void point_at_head(tile_view *t, const attention_cpu_tile *next, int32_t head) {
    const raddle_attention_params *params = t->view->job->params;
    const raddle_attention_config *config = t->view->job->config;
    const attention_cpu_scratch *scratch = t->view->scratch;
    const int64_t row = (int64_t)(head - t->view->head_begin) * t->view->num_rows;
    const bool has_next = next->count > 0;
    const float scale = raddle_attention_cpu_scale(params, head);
    t->head = head;
    /* The largest logit is that of the largest product only if the scale is positive. */
    t->is_plain = !t->view->job->state->changes_logits && scale > 0.0f;
    t->scale_log2 = scale * LOG2_E;
    t->k = (raddle_vec_rows){t->tile->tokens->k_rows, has_next ? next->tokens->k_rows : NULL,
                             head * params->k_stride_head, t->tile->count};
    if (t->view->job->state->changes_keys) {
        raddle_attention_cpu_keys(t->view, t->tile, next, head);
        t->k = (raddle_vec_rows){scratch->key_rows, NULL, 0, t->tile->count};
    }
    t->v = (raddle_vec_rows){t->tile->tokens->v_rows, has_next ? next->tokens->v_rows : NULL,
                             head * params->v_stride_head, t->tile->count};
    t->q = (const char *)scratch->q + row * config->head_dim_qk * t->view->job->state->q_bytes;
    t->state = scratch->chunk.state + 2 * row;
    t->acc = scratch->chunk.acc + row * config->head_dim_vo;
}

void raddle_attention_cpu_attend(const attention_cpu_view *view, const attention_cpu_tile *tile,
                                 const attention_cpu_tile *next) {
    tile_view t = {
        .view = view,
        .tile = tile,
        .is_whole = is_whole(view, tile),
        .has_mask = (view->job->config->hooks & RADDLE_HOOK_MASK) != 0,
        .logits = view->scratch->logits,
        .weights = view->scratch->weights,
        .ld = view->job->config->tile_kv,
    };
    if (view->job->state->changes_keys) {
        raddle_attention_cpu_begin_keys(view, tile);
    }
    for (int32_t head = view->head_begin; head < view->head_end; head++) {
        point_at_head(&t, next, head);
        if (view->num_rows < ATTENTION_CPU_MANY_ROWS) {
            attend_few(&t);
        } else {
            attend_many(&t);
        }
    }
}

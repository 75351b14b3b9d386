/* attention_schedule.c - the planner: cuts a batch into equal contiguous shares of work, one per
 * worker.
 *
 * Items (request, head group, row tile) are laid end to end; an item costs the K/V tokens it sees
 * plus the price of a segment, and more when it is cut. How many heads a group has is chosen first
 * (attention_heads.h). With load as the share of one worker, fill_workers() walks the items
 * once, gives each worker whole items while they fit, and cuts the one that does not, at a multiple
 * of the K/V tile, when the piece is worth its price. The smallest feasible load lies in a narrow
 * bracket that follows from the totals; a few tries decide. Uneven boundaries that exist
 * already (128 items on 132 workers) thus win over cuts when they are cheaper.
 *
 * Cf. FlashInfer (arXiv 2501.01005), algorithm 1, which cuts to a bound and assigns
 * by a heap; contiguous shares need no heap, keep a worker's K/V neighbouring, and bound the
 * partials by the workers instead of the batch.
 */
#include "attention/attention.h"

#include <assert.h>

#include "kernels/attention/attention_heads.h"

enum {
    LOAD_PROBES = 4,
    CLOSE_LOADS = 64, /* loads that differ by less than one part of so many are as good */
};

void raddle_attention_visible(const raddle_attention_request *request, int32_t group_size,
                              bool causal, int32_t window_left, int32_t row_begin, int32_t row_end,
                              int32_t *out_begin, int32_t *out_end) {
    if (!causal && window_left < 0) {
        *out_begin = 0;
        *out_end = request->kv_len;
        return;
    }
    /* Query token i sees key j iff j <= kv_len - qo_len + i (causal) and no further back than the
     * window. */
    const int64_t diagonal = (int64_t)request->kv_len - request->qo_len;
    const int64_t first = diagonal + row_begin / group_size;
    const int64_t last = diagonal + (row_end - 1) / group_size;
    int64_t begin = window_left >= 0 && first > window_left ? first - window_left : 0;
    int64_t end = causal && last + 1 < request->kv_len ? last + 1 : request->kv_len;
    if (end <= begin) {
        begin = end = 0;
    }
    *out_begin = (int32_t)begin;
    *out_end = (int32_t)end;
}

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int32_t head_groups(const raddle_attention_config *config, int32_t heads) {
    return (int32_t)ceil_div(config->num_kv_heads, heads);
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* Items are cut at multiples of it. */
static int64_t cut_grain(const raddle_attention_spec *spec, const raddle_attention_config *config) {
    return spec->fixed_chunk > 0 ? spec->fixed_chunk : config->tile_kv;
}

raddle_status raddle_attention_limits_derive(const raddle_attention_spec *spec,
                                             const raddle_attention_config *config,
                                             raddle_attention_limits *out_limits) {
    const int64_t groups = head_groups(config, config->min_heads_per_item);
    const int64_t workers = config->num_workers;
    /* A request's last tile may be partial; with a bounded qo_len each request has at most so many
     * tiles. */
    int64_t tiles = spec->max_qo_tokens * config->group_size / config->tile_rows + spec->max_batch;
    if (spec->max_qo_len > 0) {
        const int64_t rows = (int64_t)spec->max_qo_len * config->group_size;
        tiles = min64(tiles, spec->max_batch * ceil_div(rows, config->tile_rows));
    }
    const int64_t items = groups * tiles;
    raddle_attention_limits limits = {
        .max_batch = spec->max_batch,
        .max_pages = spec->max_pages,
        .max_qo_tokens = spec->max_qo_tokens,
        .max_merges = min64(items, workers - 1),
    };
    if (spec->fixed_chunk == 0) {
        /* Every boundary between workers adds one segment, and two partials at most. */
        limits.max_segments = items + workers - 1;
        limits.max_slots = 2 * (workers - 1);
    } else {
        /* Every chunk of a cut item is a segment with a partial. */
        const int64_t tokens = spec->max_pages * (spec->page_size > 0 ? spec->page_size : 1);
        const int64_t longest = tokens / spec->fixed_chunk + 2;
        int64_t chunks = limits.max_merges * longest;
        if (spec->max_qo_len > 0) {
            const int64_t rows = (int64_t)spec->max_qo_len * config->group_size;
            chunks = min64(chunks, groups * ceil_div(rows, config->tile_rows) *
                                       (tokens / spec->fixed_chunk + 2 * (int64_t)spec->max_batch));
        }
        limits.max_segments = items + chunks;
        limits.max_slots = chunks;
    }
    RADDLE_REQUIRE(
        limits.max_segments <= INT32_MAX / 2 && limits.max_slots <= INT32_MAX / 2,
        RADDLE_ERR_CAPACITY,
        "max_batch, max_qo_tokens, max_pages: the schedule could have %lld segments; lower "
        "the maxima or raise fixed_chunk",
        (long long)limits.max_segments);
    *out_limits = limits;
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ items in order */

typedef struct item {
    int32_t request, head, row_begin, row_end;
    int32_t kv_begin, kv_end;
    int32_t num_alike; /* this item and those behind it that differ from it in the head alone */
} item;

typedef struct item_cursor {
    const raddle_attention_spec *spec;
    const raddle_attention_config *config;
    const raddle_attention_request *requests;
    int32_t batch;
    int32_t heads, num_groups; /* of an item; of such groups */
    int32_t request, group, row;
} item_cursor;

static item_cursor first_item(const raddle_attention_spec *spec,
                              const raddle_attention_config *config,
                              const raddle_attention_request *requests, int32_t batch,
                              int32_t heads) {
    return (item_cursor){.spec = spec,
                         .config = config,
                         .requests = requests,
                         .batch = batch,
                         .heads = heads,
                         .num_groups = head_groups(config, heads)};
}

static bool next_item(item_cursor *cursor, item *out) {
    const raddle_attention_config *config = cursor->config;
    while (cursor->request < cursor->batch) {
        const raddle_attention_request *request = &cursor->requests[cursor->request];
        const int32_t rows = request->qo_len * config->group_size;
        if (cursor->row < rows && cursor->group < cursor->num_groups) {
            const int32_t left = rows - cursor->row;
            out->request = cursor->request;
            out->head = cursor->group * cursor->heads;
            out->row_begin = cursor->row;
            out->row_end = cursor->row + (left < config->tile_rows ? left : config->tile_rows);
            raddle_attention_visible(request, config->group_size, config->causal != 0,
                                     cursor->spec->window_left, out->row_begin, out->row_end,
                                     &out->kv_begin, &out->kv_end);
            out->num_alike = rows <= config->tile_rows ? cursor->num_groups - cursor->group : 1;
            cursor->row = out->row_end;
            if (cursor->row == rows) {
                cursor->row = 0;
                cursor->group++;
            }
            return true;
        }
        cursor->request++;
        cursor->group = 0;
        cursor->row = 0;
    }
    return false;
}

/* Passes over items that are like the one that next_item() gave. */
static void skip_alike(item_cursor *cursor, int32_t count) {
    cursor->group += count;
}

/* ------------------------------------------------------------------ one walk at a given load */

typedef struct walk {
    const raddle_attention_spec *spec;
    const raddle_attention_config *config;
    const raddle_attention_limits *limits;
    raddle_attention_schedule *out;
    int32_t heads;                  /* of an item */
    int64_t segment_cost, cut_cost; /* in tokens of an item */
    int64_t load;
    int64_t max_workers; /* that are worth starting */
    int32_t worker;      /* being filled */
    int64_t used;        /* load it has */
    int64_t left;        /* cost of what no worker has yet, if nothing more is cut */
    int32_t num_segments, num_merges, num_slots;
} walk;

static void close_worker(walk *w) {
    w->worker++;
    w->used = 0;
    w->out->worker_indptr[w->worker] = w->num_segments;
}

static void emit_segment(walk *w, const item *it, int32_t kv_begin, int32_t kv_end, bool is_cut) {
    assert(w->num_segments < w->limits->max_segments);
    const raddle_attention_request *request = &w->out->requests[it->request];
    w->out->segments[w->num_segments] = (raddle_attention_segment){
        .request = it->request,
        .head = it->head,
        .row_begin = it->row_begin,
        .row_end = it->row_end,
        .kv_begin = kv_begin,
        .kv_end = kv_end,
        .slot = is_cut ? w->num_slots : -1,
        .merge = is_cut ? w->num_merges : -1,
        .qo_begin = request->qo_begin,
        .qo_len = request->qo_len,
        .kv_origin = request->kv_begin,
        .kv_len = request->kv_len,
    };
    w->num_segments++;
    w->num_slots += is_cut;
}

/* The item and the next count - 1 that are like it, all for the current worker. */
static void emit_whole_items(walk *w, const item *it, int32_t count) {
    const int64_t cost = (int64_t)(it->kv_end - it->kv_begin) + w->segment_cost;
    w->used += count * cost;
    w->left -= count * cost;
    item one = *it;
    for (int32_t i = 0; i < count; i++) {
        emit_segment(w, &one, it->kv_begin, it->kv_end, false);
        one.head += w->heads;
    }
}

/* A piece of a cut item for the current worker; in fixed-chunk mode it is one segment per chunk. */
static void emit_piece(walk *w, const item *it, int32_t kv_begin, int32_t kv_end) {
    const int32_t chunk = w->spec->fixed_chunk;
    w->used += (int64_t)(kv_end - kv_begin) + w->segment_cost + w->cut_cost;
    w->left -= kv_end - kv_begin;
    if (chunk == 0) {
        emit_segment(w, it, kv_begin, kv_end, true);
        return;
    }
    while (kv_begin < kv_end) {
        int64_t end = ((int64_t)kv_begin / chunk + 1) * chunk;
        end = min64(end, kv_end);
        emit_segment(w, it, kv_begin, (int32_t)end, true);
        kv_begin = (int32_t)end;
    }
}

static void finish_cut_item(walk *w, const item *it, int32_t first_slot) {
    assert(w->num_merges < w->limits->max_merges && w->num_slots <= w->limits->max_slots);
    const raddle_attention_request *request = &w->out->requests[it->request];
    w->out->merges[w->num_merges] = (raddle_attention_merge){
        .request = it->request,
        .head = it->head,
        .row_begin = it->row_begin,
        .row_end = it->row_end,
        .slot_begin = first_slot,
        .slot_count = w->num_slots - first_slot,
        .num_arrivals = w->num_slots - first_slot,
        .qo_begin = request->qo_begin,
        .qo_len = request->qo_len,
        .kv_len = request->kv_len,
    };
    w->num_merges++;
}

/* Where to cut so that the piece fits what room the worker has: a multiple of the grain, or
 * kv_begin when none does. An empty worker takes one grain at least, or the walk would stand still.
 */
static int32_t cut_position(const walk *w, int32_t kv_begin, int32_t kv_end) {
    const int64_t grain = cut_grain(w->spec, w->config);
    const int64_t tokens = w->load - w->used - w->segment_cost - w->cut_cost;
    int64_t at = tokens < grain ? kv_begin : (kv_begin + tokens) / grain * grain;
    if (at <= kv_begin) {
        at = w->used > 0 ? kv_begin : (kv_begin / grain + 1) * grain;
    }
    return (int32_t)min64(at, kv_end);
}

/* How many of the item and those like it fit whole in what room the worker has. */
static int32_t count_fitting(const walk *w, const item *it) {
    const int64_t cost = (int64_t)(it->kv_end - it->kv_begin) + w->segment_cost;
    const int64_t room = w->load - w->used;
    return cost > room ? 0 : cost * it->num_alike <= room ? it->num_alike : (int32_t)(room / cost);
}

/* Gives the item to as many workers as it takes, beginning with the current one. False when more
 * than max_workers would be needed. */
static bool cut_item(walk *w, const item *it) {
    const int32_t first_slot = w->num_slots;
    int32_t kv_begin = it->kv_begin;
    bool is_cut = false;
    for (;;) {
        const int64_t cost =
            (int64_t)(it->kv_end - kv_begin) + w->segment_cost + (is_cut ? w->cut_cost : 0);
        const bool fits = cost <= w->load - w->used;
        const int32_t end = fits ? it->kv_end : cut_position(w, kv_begin, it->kv_end);
        if (end == it->kv_end && (fits || end > kv_begin)) {
            if (!is_cut) {
                emit_whole_items(w, it, 1);
                return true;
            }
            emit_piece(w, it, kv_begin, end);
            w->left -= w->segment_cost;
            finish_cut_item(w, it, first_slot);
            return true;
        }
        if (end > kv_begin) {
            is_cut = true;
            emit_piece(w, it, kv_begin, end);
            kv_begin = end;
        }
        close_worker(w);
        if (w->left > w->load * (w->max_workers - w->worker)) {
            return false;
        }
    }
}

/* ------------------------------------------------------------------ the load to aim at */

typedef struct totals {
    int64_t items, tokens;
    int64_t longest; /* tokens of one item */
    int64_t max_workers;
} totals;

/* Chooses how many heads an item takes, and prices in its tokens. Adds all items up. */
static totals sum_items(walk *w, int32_t batch) {
    const raddle_attention_config *config = w->config;
    raddle_heads_question question = {
        .num_kv_heads = config->num_kv_heads,
        .least = config->min_heads_per_item,
        .most = config->heads_per_item,
        .workers = config->num_workers,
        .segment_cost = config->segment_cost,
        .cut_cost = config->cut_cost,
        .merge_cost = config->merge_cost,
    };
    item_cursor cursor = first_item(w->spec, config, w->out->requests, batch, config->num_kv_heads);
    item it;
    while (next_item(&cursor, &it)) {
        const int32_t tokens = it.kv_end - it.kv_begin;
        question.kinds++;
        question.tokens += tokens;
        question.longest = tokens > question.longest ? tokens : question.longest;
    }
    w->heads = question.least < question.most ? raddle_choose_heads(&question) : question.most;
    w->segment_cost = ceil_div(config->segment_cost, w->heads);
    w->cut_cost = ceil_div(config->cut_cost, w->heads);
    const int64_t groups = head_groups(config, w->heads);
    totals sum = {
        .items = groups * question.kinds,
        .tokens = groups * question.tokens,
        .longest = question.longest,
    };
    /* A worker that would idle is worth starting for a quarter of a segment's price (on an H100, 1 x
     * 2048 takes 9.5 us on 128 workers, 10.3 on 96; on an H200, 1 x 1024 takes 7.1 us on 94, 8.8 on
     * 74). */
    const int64_t least = max64(w->segment_cost / 4, cut_grain(w->spec, config));
    const int64_t useful = max64(1, max64(sum.items, sum.tokens / least));
    sum.max_workers = min64(config->num_workers, useful);
    return sum;
}

/* Lays all items out at a load. False when more than max_workers would be needed. */
static bool fill_workers(walk *w, totals sum, int32_t batch, int64_t load) {
    *w = (walk){
        .spec = w->spec,
        .config = w->config,
        .limits = w->limits,
        .out = w->out,
        .heads = w->heads,
        .segment_cost = w->segment_cost,
        .cut_cost = w->cut_cost,
        .load = load,
        .max_workers = sum.max_workers,
        .left = sum.tokens + sum.items * w->segment_cost,
    };
    item_cursor cursor = first_item(w->spec, w->config, w->out->requests, batch, w->heads);
    item it;
    while (next_item(&cursor, &it)) {
        const int32_t count = count_fitting(w, &it);
        if (count > 0) {
            emit_whole_items(w, &it, count);
            skip_alike(&cursor, count - 1);
        } else if (!cut_item(w, &it)) {
            return false;
        }
    }
    return true;
}

/* Lays all items out at the least of a few loads at which they fit. */
static void fill_evenly(walk *w, int32_t batch) {
    const totals sum = sum_items(w, batch);
    const int64_t price = w->segment_cost, cut = price + 2 * w->cut_cost;
    const int64_t grain = cut_grain(w->spec, w->config);
    const int64_t workers = sum.max_workers;
    const int64_t low = ceil_div(sum.tokens + price * sum.items, workers);
    /* Enough with a cut at every boundary, each leaving less than its price and a grain unused; and
     * enough with as many whole items each. */
    const int64_t with_cuts = low + ceil_div(cut * (workers - 1), workers) + cut + grain + 1;
    int64_t fits = min64(with_cuts, ceil_div(sum.items, workers) * (sum.longest + price));
    if (fill_workers(w, sum, batch, low)) {
        return;
    }
    int64_t misses = low;
    bool is_laid_out = false; /* at fits */
    const int64_t close = max64(grain, low / CLOSE_LOADS);
    for (int probe = 0; probe < LOAD_PROBES && fits - misses > close; probe++) {
        const int64_t load = misses + (fits - misses) / 2;
        is_laid_out = fill_workers(w, sum, batch, load);
        *(is_laid_out ? &fits : &misses) = load;
    }
    /* Indivisible pieces (whole chunks, mostly) can break the bracket: widen until it holds. */
    while (!is_laid_out) {
        is_laid_out = fill_workers(w, sum, batch, fits);
        fits += fits / 8 + 1;
    }
}

raddle_status raddle_attention_schedule_build(const raddle_attention_spec *spec,
                                              const raddle_attention_config *config,
                                              const raddle_attention_limits *limits, int32_t batch,
                                              raddle_attention_schedule *schedule) {
    walk w = {.spec = spec, .config = config, .limits = limits, .out = schedule};
    schedule->worker_indptr[0] = 0;
    fill_evenly(&w, batch);
    close_worker(&w);
    /* Every worker that a launch may start finds a range, an empty one past the last that has work.
     */
    for (int32_t i = w.worker; i < config->num_workers; i++) {
        schedule->worker_indptr[i + 1] = w.num_segments;
    }
    for (int32_t i = 0; i < w.worker; i++) {
        if (schedule->worker_indptr[i] < w.num_segments) {
            schedule->first_segments[i] = schedule->segments[schedule->worker_indptr[i]];
        }
    }
    int32_t qo_tokens = 0;
    for (int32_t i = 0; i < batch; i++) {
        qo_tokens += schedule->requests[i].qo_len;
    }
    *schedule->header = (raddle_attention_header){
        .batch = batch,
        .num_workers = w.num_segments > 0 ? w.worker : 0,
        .num_segments = w.num_segments,
        .num_merges = w.num_merges,
        .num_slots = w.num_slots,
        .num_qo_tokens = qo_tokens,
        .heads_per_item = w.heads,
    };
    return RADDLE_OK;
}

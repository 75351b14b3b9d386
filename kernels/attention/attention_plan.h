/* attention_plan.h - the planner in parallel: the threads of one CTA cut a batch into shares of
 * equal cost. C11 and NVRTC; threads of the host run it in its tests.
 *
 * Kinds are (request, row tile); the heads of a request have the same kinds. With the prefix sums of
 * their costs, any boundary between two workers is found by a search, alone. A candidate is a
 * rule that places boundary k; all boundaries of all candidates are found side by side, the cost
 * of every share follows from its two boundaries, and the candidate whose largest share is
 * smallest wins:
 *   WHOLE_EQUAL  as many items for each worker
 *   WHOLE        items stay whole; boundaries where they are nearest to even cost
 *   OWN          fewer items than workers: each item has workers of its own, an equal piece each
 *   EVEN_*       boundaries evenly spaced in cost; one that falls near an item's end moves there
 * From the winner's boundaries each segment, partial and merge knows its place by counting cuts.
 * attention_schedule.c walks the items in order instead, which takes one thread, and comes to
 * shares as large within a few per cent. What a schedule is: attention_schedule.h.
 *
 * Lengths and offsets may be anything: they are clamped so that nothing outside the plan's arrays
 * and the page table's is touched.
 */
#ifndef RADDLE_ATTENTION_PLAN_H
#define RADDLE_ATTENTION_PLAN_H

#include "attention/attention_plan_items.h"

/* ------------------------------------------------------------------ pieces of an item's own */

/* The shortest piece such that the workers suffice when every item has its own. */
RADDLE_PLAN_FUNCTION void raddle_plan_fit_own(const raddle_attention_plan_params *p,
                                              raddle_plan_shape *shape,
                                              const raddle_plan_space *space, int32_t thread,
                                              int32_t threads) {
    shape->own_workers = 0;
    if (shape->items >= shape->max_workers) {
        return;
    }
    /* With pieces of `most` the items' last ones take one worker each and the rest suffices. */
    const int64_t least = raddle_plan_ceil_div(shape->tokens, shape->max_workers);
    const int64_t most = raddle_plan_ceil_div(shape->tokens, shape->max_workers - shape->items) +
                         raddle_plan_grain(p);
    if (thread == 0) {
        *space->probe = RADDLE_PLAN_PROBES;
    }
    RADDLE_PLAN_SYNC(); /* the start is written -> it may be lowered */
    for (int32_t i = thread; i <= RADDLE_PLAN_PROBES; i += threads) {
        const int64_t tokens = least + (most - least) * i / RADDLE_PLAN_PROBES;
        int64_t workers = 0;
        for (int32_t kind = 0; kind < shape->kinds; kind++) {
            const int64_t of_kind =
                space->whole[kind + 1] - space->whole[kind] - shape->segment_cost;
            workers += of_kind > 0 && tokens > 0
                           ? ((uint32_t)of_kind + (uint32_t)tokens - 1) / (uint32_t)tokens
                           : 1;
        }
        if (workers * shape->groups <= shape->max_workers) {
            RADDLE_PLAN_MIN(space->probe, i);
        }
    }
    RADDLE_PLAN_SYNC(); /* every probe has voted -> the least is read */
    const int64_t tokens = least + (most - least) * *space->probe / RADDLE_PLAN_PROBES;
    if (tokens <= 0 || tokens > 0x7fffffff) {
        return;
    }
    shape->own_tokens = (int32_t)tokens;
    const int64_t workers = raddle_plan_sum_kinds(p, shape, RADDLE_PLAN_OWNERS, space->partial,
                                                  space->shares, thread, threads) *
                            shape->groups;
    shape->own_workers = workers <= shape->max_workers ? (int32_t)workers : 0;
}

/* ------------------------------------------------------------------ boundaries */

/* Cuts an item at the multiple of the tile next to its token `used`, or at an end of it. */
RADDLE_PLAN_FUNCTION raddle_plan_boundary raddle_plan_cut(const raddle_attention_plan_params *p,
                                                          int32_t index,
                                                          const raddle_plan_item *item,
                                                          int64_t used) {
    const int64_t at = item->kv_begin + used;
    const int32_t grain = raddle_plan_grain(p);
    used = (at + grain / 2) / grain * grain - item->kv_begin;
    const bool ends = used >= item->kv_end - item->kv_begin;
    raddle_plan_boundary boundary;
    boundary.item = index + ends;
    boundary.used = ends || used <= 0 ? 0 : (int32_t)used;
    return boundary;
}

/* x: spread cost before the boundary. Closer to an item's end than tolerance it moves there; a
 * negative tolerance moves all to the closer end. */
RADDLE_PLAN_FUNCTION raddle_plan_boundary
raddle_plan_cut_cost(const raddle_attention_plan_params *p, const raddle_plan_shape *shape,
                     const int64_t *spread, int64_t x, int64_t tolerance) {
    int64_t offset = 0;
    const raddle_plan_place at =
        raddle_plan_find(shape, spread, raddle_plan_clamp(x, 0, shape->spread_cost - 1), &offset);
    const int32_t index = (at.request * shape->groups + at.group) * shape->tiles + at.tile;
    const raddle_plan_item item = raddle_plan_item_of(p, shape, at.request, at.group, at.tile);
    const int32_t kind = at.request * shape->tiles + at.tile;
    const int64_t weight = spread[kind + 1] - spread[kind], left = weight - offset;
    const int64_t price = shape->segment_cost, tokens = item.kv_end - item.kv_begin;
    if (tolerance < 0 || offset <= tolerance || left <= tolerance || tokens == 0) {
        raddle_plan_boundary boundary;
        boundary.item = index + (left < offset);
        boundary.used = 0;
        return boundary;
    }
    return raddle_plan_cut(p, index, &item, (offset - price) * tokens / (weight - price));
}

RADDLE_PLAN_FUNCTION raddle_plan_boundary raddle_plan_cut_own(const raddle_attention_plan_params *p,
                                                              const raddle_plan_shape *shape,
                                                              const int64_t *shares, int32_t k) {
    int64_t piece = 0;
    const raddle_plan_place at = raddle_plan_find(shape, shares, k, &piece);
    const int32_t index = (at.request * shape->groups + at.group) * shape->tiles + at.tile;
    const raddle_plan_item item = raddle_plan_item_of(p, shape, at.request, at.group, at.tile);
    const int32_t kind = at.request * shape->tiles + at.tile;
    const int64_t pieces = shares[kind + 1] - shares[kind];
    if (piece == 0) {
        raddle_plan_boundary boundary;
        boundary.item = index;
        boundary.used = 0;
        return boundary;
    }
    return raddle_plan_cut(p, index, &item, (item.kv_end - item.kv_begin) * piece / pieces);
}

/* Workers that a candidate uses; 0: it is not to be had. */
RADDLE_PLAN_FUNCTION int32_t raddle_plan_candidate_workers(const raddle_plan_shape *shape,
                                                           int32_t candidate) {
    const int32_t items = shape->items, workers = shape->max_workers;
    if (candidate == RADDLE_PLAN_WHOLE_EQUAL) {
        const int32_t each = (items + workers - 1) / workers;
        return (items + each - 1) / each;
    }
    return candidate == RADDLE_PLAN_OWN ? shape->own_workers : workers;
}

/* Where worker k of a candidate begins. */
RADDLE_PLAN_FUNCTION raddle_plan_boundary
raddle_plan_begin_of(const raddle_attention_plan_params *p, const raddle_plan_shape *shape,
                     const raddle_plan_space *space, int32_t candidate, int32_t k) {
    const int32_t workers = raddle_plan_candidate_workers(shape, candidate);
    raddle_plan_boundary boundary;
    boundary.item = k >= workers && workers > 0 ? shape->items : 0;
    boundary.used = 0;
    if (k == 0 || k >= workers) {
        return boundary;
    }
    if (candidate == RADDLE_PLAN_WHOLE_EQUAL) {
        const int64_t item = (int64_t)k * ((shape->items + workers - 1) / workers);
        boundary.item = item < shape->items ? (int32_t)item : shape->items;
        return boundary;
    }
    if (candidate == RADDLE_PLAN_OWN) {
        return raddle_plan_cut_own(p, shape, space->shares, k);
    }
    /* Every worker but the first pays for the rest of an item that was cut. */
    const bool is_whole = candidate == RADDLE_PLAN_WHOLE;
    const int64_t price = is_whole ? 0 : shape->segment_cost, spread = shape->spread_cost - price;
    const int64_t x = price + spread / workers * k + spread % workers * k / workers;
    const int64_t cut = price + shape->cut_cost;
    const int64_t tolerance = is_whole                             ? -1
                              : candidate == RADDLE_PLAN_EVEN_FAR  ? cut
                              : candidate == RADDLE_PLAN_EVEN_NEAR ? cut / 2
                                                                   : 0;
    return raddle_plan_cut_cost(p, shape, space->spread, x, tolerance);
}

/* Cost of the share between two boundaries: a piece costs its tokens, a segment's price and a cut's.
 */
RADDLE_PLAN_FUNCTION int64_t raddle_plan_share(const raddle_plan_shape *shape,
                                               const int64_t *prefix, raddle_plan_boundary begin,
                                               raddle_plan_boundary end) {
    if (begin.item == end.item && begin.used == end.used) {
        return 0;
    }
    const int64_t items = begin.item == end.item
                              ? 0
                              : raddle_plan_before(shape, prefix, end.item) -
                                    raddle_plan_before(shape, prefix, begin.item);
    const int32_t cuts = begin.item == end.item && begin.used > 0 && end.used > 0
                             ? 1
                             : (begin.used > 0) + (end.used > 0);
    return items - begin.used + end.used + (end.used > 0 ? shape->segment_cost : 0) +
           cuts * shape->cut_cost;
}

/* Finds the boundaries of all candidates; returns those [num_workers + 1] of the best. */
RADDLE_PLAN_FUNCTION const raddle_plan_boundary *
raddle_plan_choose(const raddle_attention_plan_params *p, const raddle_plan_shape *shape,
                   const raddle_plan_space *space, int32_t thread, int32_t threads) {
    const int32_t stride = p->num_workers + 1;
    for (int32_t i = thread; i < RADDLE_PLAN_CANDIDATES * stride; i += threads) {
        space->bounds[i] = raddle_plan_begin_of(p, shape, space, i / stride, i % stride);
        if (i < RADDLE_PLAN_CANDIDATES) {
            space->worst[i] = 0;
        }
    }
    RADDLE_PLAN_SYNC(); /* boundaries are written -> the shares between them are measured */
    for (int32_t i = thread; i < RADDLE_PLAN_CANDIDATES * stride; i += threads) {
        if (i % stride < p->num_workers) {
            RADDLE_PLAN_MAX(&space->worst[i / stride],
                            (long long)raddle_plan_share(shape, space->whole, space->bounds[i],
                                                         space->bounds[i + 1]));
        }
    }
    RADDLE_PLAN_SYNC(); /* the largest shares are known -> everybody chooses alike */
    int32_t best = RADDLE_PLAN_WHOLE;
    for (int32_t i = 0; i < RADDLE_PLAN_CANDIDATES; i++) {
        if (raddle_plan_candidate_workers(shape, i) > 0 && space->worst[i] < space->worst[best]) {
            best = i;
        }
    }
    return space->bounds + best * stride;
}

/* ------------------------------------------------------------------ what is written */

RADDLE_PLAN_FUNCTION bool raddle_plan_is_cut(const raddle_plan_boundary *bounds, int32_t k) {
    return bounds[k].used > 0 &&
           (bounds[k].item != bounds[k - 1].item || bounds[k].used != bounds[k - 1].used);
}

/* Chunks that the first `used` visible tokens of an item lie in. */
RADDLE_PLAN_FUNCTION int32_t raddle_plan_chunks(const raddle_attention_plan_params *p,
                                                const raddle_plan_item *item, int32_t used) {
    const uint32_t chunk = (uint32_t)p->fixed_chunk, begin = (uint32_t)item->kv_begin;
    return (int32_t)((begin + (uint32_t)used + chunk - 1) / chunk - begin / chunk);
}

/* Cuts and cut items up to each boundary. In fixed-chunk mode an item that is cut at all is cut at
 * every chunk, all of which count at its first boundary. */
enum { RADDLE_PLAN_CUT_BITS = 44 };

RADDLE_PLAN_FUNCTION int64_t raddle_plan_num_cuts(int64_t count) {
    return count & (((int64_t)1 << RADDLE_PLAN_CUT_BITS) - 1);
}

RADDLE_PLAN_FUNCTION int32_t raddle_plan_num_merges(int64_t count) {
    return (int32_t)(count >> RADDLE_PLAN_CUT_BITS);
}

/* What boundary k, a cut, adds. */
RADDLE_PLAN_FUNCTION int64_t raddle_plan_cuts_at(const raddle_attention_plan_params *p,
                                                 const raddle_plan_shape *shape,
                                                 const raddle_plan_boundary *bounds, int32_t k) {
    const bool is_first = bounds[k - 1].item != bounds[k].item || bounds[k - 1].used == 0;
    int64_t cuts = 1;
    if (p->fixed_chunk > 0) {
        const raddle_plan_place at = raddle_plan_place_of(shape, bounds[k].item);
        const raddle_plan_item item = raddle_plan_item_of(p, shape, at.request, at.group, at.tile);
        cuts = is_first ? raddle_plan_chunks(p, &item, item.kv_end - item.kv_begin) - 1 : 0;
    }
    return cuts + ((int64_t)is_first << RADDLE_PLAN_CUT_BITS);
}

/* Fills counts; returns them at the end. Boundaries that are equal hold an empty share. */
RADDLE_PLAN_FUNCTION int64_t raddle_plan_count_cuts(const raddle_attention_plan_params *p,
                                                    const raddle_plan_shape *shape,
                                                    const raddle_plan_boundary *bounds,
                                                    const raddle_plan_space *space, int32_t thread,
                                                    int32_t threads) {
    const int32_t boundaries = p->num_workers + 1;
    const int32_t per_thread = (boundaries + threads - 1) / threads;
    const int64_t first = (int64_t)per_thread * thread;
    const int64_t end = raddle_plan_clamp(first + per_thread, 0, boundaries);
    int64_t sum = 0, total = 0;
    for (int64_t k = first; k < end; k++) {
        if (raddle_plan_is_cut(bounds, (int32_t)k)) { /* boundary 0 never is */
            sum += raddle_plan_cuts_at(p, shape, bounds, (int32_t)k);
        }
        space->counts[k] = sum;
    }
    const int64_t before = raddle_plan_scan(space->partial, sum, thread, threads, &total);
    for (int64_t k = first; k < end; k++) {
        space->counts[k] += before;
    }
    RADDLE_PLAN_SYNC(); /* the counts are written -> everybody reads them */
    return total;
}

/* The last boundary that lies before or at the beginning of an item. */
RADDLE_PLAN_FUNCTION int32_t raddle_plan_last_bound(const raddle_plan_boundary *bounds,
                                                    int32_t num_workers, int32_t item) {
    int32_t low = 0, high = num_workers + 1;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        const bool is_before =
            bounds[middle].item < item || (bounds[middle].item == item && bounds[middle].used == 0);
        if (is_before) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Tokens [begin, end) of the item's visible range, as segment number `index`. */
RADDLE_PLAN_FUNCTION void raddle_plan_write_segment(const raddle_attention_plan_params *p,
                                                    const raddle_plan_item *item, int32_t begin,
                                                    int32_t end, int32_t index, int32_t slot,
                                                    int32_t merge) {
    const raddle_attention_request request = p->requests[item->request];
    raddle_attention_segment segment;
    segment.request = item->request;
    segment.head = item->head;
    segment.row_begin = item->row_begin;
    segment.row_end = item->row_end;
    segment.kv_begin = item->kv_begin + begin;
    segment.kv_end = item->kv_begin + end;
    segment.slot = slot;
    segment.merge = merge;
    segment.qo_begin = request.qo_begin;
    segment.qo_len = request.qo_len;
    segment.kv_origin = request.kv_begin;
    segment.kv_len = request.kv_len;
    p->segments[index] = segment;
}

RADDLE_PLAN_FUNCTION void raddle_plan_write_merge(const raddle_attention_plan_params *p,
                                                  const raddle_plan_item *item, int32_t index,
                                                  int32_t slot_begin, int32_t slot_count) {
    const raddle_attention_request request = p->requests[item->request];
    raddle_attention_merge merge;
    merge.request = item->request;
    merge.head = item->head;
    merge.row_begin = item->row_begin;
    merge.row_end = item->row_end;
    merge.slot_begin = slot_begin;
    merge.slot_count = slot_count;
    merge.num_arrivals = slot_count;
    merge.qo_begin = request.qo_begin;
    merge.qo_len = request.qo_len;
    merge.kv_len = request.kv_len;
    merge.reserved[0] = merge.reserved[1] = 0;
    p->merges[index] = merge;
}

/* The first segment behind boundary k. Before it lie one per item before its own, and the cuts. */
RADDLE_PLAN_FUNCTION int32_t raddle_plan_segment_at(const raddle_attention_plan_params *p,
                                                    const raddle_plan_shape *shape,
                                                    const raddle_plan_boundary *bounds,
                                                    const int64_t *counts, int32_t k) {
    int32_t index = bounds[k].item + (int32_t)raddle_plan_num_cuts(counts[k]);
    if (p->fixed_chunk > 0 && bounds[k].used > 0) { /* less the chunks behind the boundary */
        const raddle_plan_place at = raddle_plan_place_of(shape, bounds[k].item);
        const raddle_plan_item item = raddle_plan_item_of(p, shape, at.request, at.group, at.tile);
        index -= raddle_plan_chunks(p, &item, item.kv_end - item.kv_begin) - 1;
        index += raddle_plan_chunks(p, &item, bounds[k].used);
    }
    return index;
}

/* The piece that ends at boundary k, a cut. Partials before it: one per cut, and one per cut item
 * before its own. */
RADDLE_PLAN_FUNCTION void raddle_plan_write_piece(const raddle_attention_plan_params *p,
                                                  const raddle_plan_shape *shape,
                                                  const raddle_plan_boundary *bounds,
                                                  const int64_t *counts, int32_t k) {
    const raddle_plan_boundary end = bounds[k], before = bounds[k - 1];
    const raddle_plan_place at = raddle_plan_place_of(shape, end.item);
    const raddle_plan_item item = raddle_plan_item_of(p, shape, at.request, at.group, at.tile);
    const int32_t cuts = (int32_t)raddle_plan_num_cuts(counts[k]) - 1;
    const int32_t merge = raddle_plan_num_merges(counts[k]) - 1;
    raddle_plan_write_segment(p, &item, before.item == end.item ? before.used : 0, end.used,
                              end.item + cuts, cuts + merge, merge);
}

/* All chunks of a cut item. */
RADDLE_PLAN_FUNCTION void raddle_plan_write_chunks(const raddle_attention_plan_params *p,
                                                   const raddle_plan_item *item, int32_t index,
                                                   int32_t slot, int32_t merge) {
    const int32_t tokens = item->kv_end - item->kv_begin;
    int32_t begin = 0;
    while (begin < tokens) {
        const int32_t left_of_chunk =
            p->fixed_chunk -
            (int32_t)((uint32_t)(item->kv_begin + begin) % (uint32_t)p->fixed_chunk);
        const int32_t end = left_of_chunk < tokens - begin ? begin + left_of_chunk : tokens;
        raddle_plan_write_segment(p, item, begin, end, index++, slot++, merge);
        begin = end;
    }
}

/* All of an item that is not cut; else its last piece (or all its chunks), and its merge. */
RADDLE_PLAN_FUNCTION void raddle_plan_write_item(const raddle_attention_plan_params *p,
                                                 const raddle_plan_shape *shape,
                                                 const raddle_plan_boundary *bounds,
                                                 const int64_t *counts, int32_t index) {
    const raddle_plan_place at = raddle_plan_place_of(shape, index);
    const raddle_plan_item item = raddle_plan_item_of(p, shape, at.request, at.group, at.tile);
    const int32_t tokens = item.kv_end - item.kv_begin;
    const int64_t before = counts[raddle_plan_last_bound(bounds, p->num_workers, index)];
    int32_t last = raddle_plan_last_bound(bounds, p->num_workers, index + 1);
    const int32_t first_cuts = (int32_t)raddle_plan_num_cuts(before);
    const int32_t cuts = (int32_t)raddle_plan_num_cuts(counts[last]);
    const int32_t merge = raddle_plan_num_merges(before);
    if (merge == raddle_plan_num_merges(counts[last])) {
        raddle_plan_write_segment(p, &item, 0, tokens, index + cuts, -1, -1);
        return;
    }
    if (p->fixed_chunk > 0) {
        raddle_plan_write_chunks(p, &item, index + first_cuts, first_cuts + merge, merge);
    } else {
        while (bounds[last].item > index) { /* boundaries at the item's end */
            last--;
        }
        raddle_plan_write_segment(p, &item, bounds[last].used, tokens, index + cuts, cuts + merge,
                                  merge);
    }
    raddle_plan_write_merge(p, &item, merge, first_cuts + merge, cuts - first_cuts + 1);
}

RADDLE_PLAN_FUNCTION void raddle_plan_write_header(const raddle_attention_plan_params *p,
                                                   const raddle_plan_shape *shape, int32_t workers,
                                                   int32_t segments, int32_t merges,
                                                   int32_t slots) {
    raddle_attention_header header;
    header.batch = p->batch;
    header.num_workers = workers;
    header.num_segments = segments;
    header.num_merges = merges;
    header.num_slots = slots;
    header.num_qo_tokens = p->batch * p->qo_len;
    header.heads_per_item = shape->heads;
    header.reserved = 0;
    *p->header = header;
}

RADDLE_PLAN_FUNCTION void raddle_plan_write(const raddle_attention_plan_params *p,
                                            const raddle_plan_shape *shape,
                                            const raddle_plan_boundary *bounds,
                                            const raddle_plan_space *space, int32_t thread,
                                            int32_t threads) {
    int64_t total = raddle_plan_count_cuts(p, shape, bounds, space, thread, threads);
    if (raddle_plan_num_cuts(total) + raddle_plan_num_merges(total) > p->max_slots) {
        /* Requests that share pages, which lengths that lie can do, may have more chunks than there
         * is memory for: nothing is cut then. */
        bounds = space->bounds + RADDLE_PLAN_WHOLE * (p->num_workers + 1);
        total = raddle_plan_count_cuts(p, shape, bounds, space, thread, threads);
    }
    const int32_t cuts = (int32_t)raddle_plan_num_cuts(total);
    const int32_t merges = raddle_plan_num_merges(total);
    for (int32_t k = thread; k <= p->num_workers; k += threads) {
        p->worker_indptr[k] = raddle_plan_segment_at(p, shape, bounds, space->counts, k);
        if (k > 0 && p->fixed_chunk == 0 && raddle_plan_is_cut(bounds, k)) {
            raddle_plan_write_piece(p, shape, bounds, space->counts, k);
        }
        /* The worker before the first boundary at the end is the last that has something. */
        if (k > 0 && bounds[k].item == shape->items && bounds[k - 1].item < shape->items) {
            raddle_plan_write_header(p, shape, k, shape->items + cuts, merges, cuts + merges);
        }
    }
    for (int32_t i = thread; i < shape->items; i += threads) {
        raddle_plan_write_item(p, shape, bounds, space->counts, i);
    }
    RADDLE_PLAN_SYNC(); /* the segments are written -> the first of each worker is copied */
    for (int32_t k = thread; k < p->num_workers; k += threads) {
        if (p->worker_indptr[k] < p->worker_indptr[k + 1]) {
            p->first_segments[k] = p->segments[p->worker_indptr[k]];
        }
    }
}

/* ------------------------------------------------------------------ the whole */

/* How many heads an item takes, and with it how many items there are and prices in their tokens. */
RADDLE_PLAN_FUNCTION void raddle_plan_choose_heads(const raddle_attention_plan_params *p,
                                                   raddle_plan_shape *shape,
                                                   const raddle_plan_space *space, int32_t thread,
                                                   int32_t threads) {
    raddle_heads_question question;
    question.kinds = shape->kinds;
    question.num_kv_heads = p->num_kv_heads;
    question.least = p->min_heads_per_item;
    question.most = p->heads_per_item;
    question.workers = p->num_workers;
    question.segment_cost = p->segment_cost;
    question.cut_cost = p->cut_cost;
    question.merge_cost = p->merge_cost;
    shape->heads = question.most;
    if (question.least < question.most) {
        int64_t sum = 0;
        int32_t longest = 0;
        for (int32_t kind = thread; kind < shape->kinds; kind += threads) {
            const int32_t tokens = raddle_plan_tokens(p, shape, kind);
            sum += tokens;
            longest = tokens > longest ? tokens : longest;
        }
        if (thread == 0) {
            space->worst[0] = 0;
        }
        (void)raddle_plan_scan(space->partial, sum, thread, threads, &question.tokens);
        RADDLE_PLAN_MAX(&space->worst[0], (long long)longest);
        RADDLE_PLAN_SYNC(); /* the longest of all is known -> everybody chooses alike */
        question.longest = (int32_t)space->worst[0];
        shape->heads = raddle_choose_heads(&question);
    }
    shape->segment_cost = (p->segment_cost + shape->heads - 1) / shape->heads;
    shape->cut_cost = (p->cut_cost + shape->heads - 1) / shape->heads;
    shape->groups = (p->num_kv_heads + shape->heads - 1) / shape->heads;
    shape->items = shape->kinds * shape->groups;
}

/* Everything but the copy of the page table. */
RADDLE_PLAN_FUNCTION void raddle_plan_batch(const raddle_attention_plan_params *p,
                                            const raddle_plan_space *shared, int32_t thread,
                                            int32_t threads) {
    const int32_t rows = p->qo_len * p->group_size;
    raddle_plan_shape shape;
    shape.tiles = (rows + p->tile_rows - 1) / p->tile_rows;
    shape.kinds = p->batch * shape.tiles;
    raddle_plan_space space = *shared;
    if (p->prefix != 0) {
        space.whole = p->prefix;
        space.spread = p->prefix + shape.kinds + 1;
    }
    const int64_t num_pages = raddle_plan_num_pages(p);
    for (int32_t r = thread; r < p->batch; r += threads) {
        raddle_plan_read_request(p, num_pages, r);
    }
    if (shape.kinds == 0) {
        shape.heads = p->heads_per_item;
        for (int32_t k = thread; k <= p->num_workers; k += threads) {
            p->worker_indptr[k] = 0;
        }
        if (thread == 0) {
            raddle_plan_write_header(p, &shape, 0, 0, 0, 0);
        }
        return;
    }
    RADDLE_PLAN_SYNC(); /* requests are written -> everybody reads them */
    raddle_plan_choose_heads(p, &shape, &space, thread, threads);
    shape.cost = shape.groups * raddle_plan_sum_kinds(p, &shape, RADDLE_PLAN_WHOLE_COST,
                                                      space.partial, space.whole, thread, threads);
    shape.tokens = shape.cost - (int64_t)shape.items * shape.segment_cost;
    /* As the planner on the host: an idle worker is worth starting for a quarter of a segment. */
    const int32_t grain = raddle_plan_grain(p), price = shape.segment_cost;
    const int64_t least = price / 4 > grain ? price / 4 : grain;
    const int64_t useful = shape.tokens / least > shape.items ? shape.tokens / least : shape.items;
    shape.max_workers = (int32_t)raddle_plan_clamp(useful, 1, p->num_workers);
    shape.load = (int32_t)raddle_plan_clamp(raddle_plan_ceil_div(shape.cost, shape.max_workers), 1,
                                            0x7fffffff);
    shape.spread_cost =
        shape.groups * raddle_plan_sum_kinds(p, &shape, RADDLE_PLAN_SPREAD_COST, space.partial,
                                             space.spread, thread, threads);
    raddle_plan_fit_own(p, &shape, &space, thread, threads);
    const raddle_plan_boundary *bounds = raddle_plan_choose(p, &shape, &space, thread, threads);
    raddle_plan_write(p, &shape, bounds, &space, thread, threads);
}

#endif

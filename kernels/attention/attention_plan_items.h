/* attention_plan_items.h - the lower half of attention_plan.h: what its threads share, requests from
 * the page table, the cost of items, and where in a sum of costs an item lies. C11 and NVRTC.
 *
 * Kinds are (request, row tile); the heads of a request have the same kinds, so that prefix sums
 * count each kind once. Items lie in the order (request, head group, row tile).
 */
#ifndef RADDLE_ATTENTION_PLAN_ITEMS_H
#define RADDLE_ATTENTION_PLAN_ITEMS_H

#include "attention/attention_heads.h"
#include "attention/attention_plan_params.h"

#ifndef __cplusplus
#include <stdbool.h>
#endif

/* On the host a test says what a barrier is, should it run several threads. */
#ifdef __CUDACC_RTC__
#define RADDLE_PLAN_FUNCTION __device__ __forceinline__
#define RADDLE_PLAN_SYNC() __syncthreads()
#define RADDLE_PLAN_MAX(to, value) (void)atomicMax((to), (value))
#define RADDLE_PLAN_MIN(to, value) (void)atomicMin((to), (value))
#else
#define RADDLE_PLAN_FUNCTION static inline
#ifndef RADDLE_PLAN_SYNC
#define RADDLE_PLAN_SYNC() ((void)0)
#define RADDLE_PLAN_MAX(to, value) (void)(*(to) = *(to) > (value) ? *(to) : (value))
#define RADDLE_PLAN_MIN(to, value) (void)(*(to) = *(to) < (value) ? *(to) : (value))
#endif
#endif

enum {
    RADDLE_PLAN_THREADS = 768,       /* leaves 80 registers each */
    RADDLE_PLAN_SHARED_KINDS = 2048, /* whose prefix sums fit in shared memory */
    RADDLE_PLAN_PROBES = 128,        /* sizes of an item's pieces that are tried side by side */

    /* Candidates; of equal ones the first wins. */
    RADDLE_PLAN_WHOLE_EQUAL = 0,
    RADDLE_PLAN_WHOLE,
    RADDLE_PLAN_OWN,
    RADDLE_PLAN_EVEN_FAR,  /* an item's end attracts from a segment's price away */
    RADDLE_PLAN_EVEN_NEAR, /* from half of it */
    RADDLE_PLAN_EVEN_EXACT,
    RADDLE_PLAN_CANDIDATES,
};

/* Between two workers: before the token `used` of an item's visible range; 0: before the item. */
typedef struct raddle_plan_boundary {
    int32_t item, used;
} raddle_plan_boundary;

/* What the threads share. */
typedef struct raddle_plan_space {
    /* [kinds + 1] sums over the kinds before, each counted once: of what they cost whole, and of
     * what they cost when even shares cut them. */
    int64_t *whole, *spread;
    int64_t *shares;              /* [num_workers + 1] workers of the kinds before, for OWN */
    int64_t *partial;             /* [2 * threads] */
    int64_t *counts;              /* [num_workers + 1] up to boundary k: raddle_plan_count_cuts */
    long long *worst;             /* [CANDIDATES] cost of the largest share */
    raddle_plan_boundary *bounds; /* [CANDIDATES, num_workers + 1] */
    int32_t *probe;               /* [1] */
} raddle_plan_space;

/* The work as a whole; the same in every thread. */
typedef struct raddle_plan_shape {
    int32_t heads;                  /* of an item */
    int32_t segment_cost, cut_cost; /* in tokens of an item */
    int32_t groups, tiles;          /* of heads and of rows: items of a request */
    int32_t kinds, items;
    int64_t cost, spread_cost, tokens;
    int32_t load;        /* cost of an even share */
    int32_t max_workers; /* that are worth starting */
    int32_t own_workers; /* that OWN takes; 0: it is not to be had */
    int32_t own_tokens;  /* the most of a piece there */
} raddle_plan_shape;

/* ------------------------------------------------------------------ memory */

RADDLE_INLINE int64_t raddle_plan_round_up(int64_t bytes) {
    return (bytes + 15) / 16 * 16;
}

/* Bytes of the space; every part is a multiple of 16. */
RADDLE_INLINE int64_t raddle_plan_space_bytes(int32_t num_workers, int32_t threads) {
    const int64_t boundaries = (int64_t)num_workers + 1;
    return 2 * raddle_plan_round_up((RADDLE_PLAN_SHARED_KINDS + 1) * 8) +
           2 * raddle_plan_round_up(boundaries * 8) + (int64_t)threads * 16 +
           RADDLE_PLAN_CANDIDATES * 8 +
           raddle_plan_round_up(RADDLE_PLAN_CANDIDATES * boundaries * 8) + 16;
}

RADDLE_PLAN_FUNCTION void raddle_plan_carve(char *memory, int32_t num_workers, int32_t threads,
                                            raddle_plan_space *space) {
    const int64_t boundaries = (int64_t)num_workers + 1;
    space->whole = (int64_t *)memory;
    memory += raddle_plan_round_up((RADDLE_PLAN_SHARED_KINDS + 1) * 8);
    space->spread = (int64_t *)memory;
    memory += raddle_plan_round_up((RADDLE_PLAN_SHARED_KINDS + 1) * 8);
    space->shares = (int64_t *)memory;
    memory += raddle_plan_round_up(boundaries * 8);
    space->counts = (int64_t *)memory;
    memory += raddle_plan_round_up(boundaries * 8);
    space->partial = (int64_t *)memory;
    memory += (int64_t)threads * 16;
    space->worst = (long long *)memory;
    memory += RADDLE_PLAN_CANDIDATES * 8;
    space->bounds = (raddle_plan_boundary *)memory;
    memory += raddle_plan_round_up(RADDLE_PLAN_CANDIDATES * boundaries * 8);
    space->probe = (int32_t *)memory;
}

/* ------------------------------------------------------------------ requests */

RADDLE_INLINE int64_t raddle_plan_clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
}

RADDLE_INLINE int64_t raddle_plan_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* Entries of the page table that are in use. */
RADDLE_PLAN_FUNCTION int64_t raddle_plan_num_pages(const raddle_attention_plan_params *p) {
    return p->indptr == 0 ? p->table_entries
                          : raddle_plan_clamp(p->indptr[p->batch], 0, p->table_entries);
}

RADDLE_PLAN_FUNCTION void raddle_plan_read_request(const raddle_attention_plan_params *p,
                                                   int64_t num_pages, int32_t r) {
    const int64_t page_size = p->page_size;
    int64_t begin, entries, kv_len;
    if (p->indptr == 0) {
        begin = (int64_t)r * p->table_width;
        entries = p->table_width;
        kv_len = p->lengths[r];
    } else {
        begin = raddle_plan_clamp(p->indptr[r], 0, num_pages);
        entries = raddle_plan_clamp(p->indptr[r + 1], begin, num_pages) - begin;
        kv_len = entries == 0 ? 0 : (entries - 1) * page_size + p->lengths[r];
    }
    raddle_attention_request request;
    request.qo_begin = r * p->qo_len;
    request.qo_len = p->qo_len;
    request.kv_begin = (int32_t)begin;
    request.kv_len = (int32_t)raddle_plan_clamp(
        kv_len, 0, raddle_plan_clamp(entries * page_size, 0, 0x7fffffff));
    p->requests[r] = request;
}

/* ------------------------------------------------------------------ kinds and items */

/* Items are cut at multiples of it. */
RADDLE_PLAN_FUNCTION int32_t raddle_plan_grain(const raddle_attention_plan_params *p) {
    return p->fixed_chunk > 0 ? p->fixed_chunk : p->tile_kv;
}

typedef struct raddle_plan_item {
    int32_t request, head;
    int32_t row_begin, row_end;
    int32_t kv_begin, kv_end;
} raddle_plan_item;

RADDLE_PLAN_FUNCTION raddle_plan_item raddle_plan_item_of(const raddle_attention_plan_params *p,
                                                          const raddle_plan_shape *shape,
                                                          int32_t request, int32_t group,
                                                          int32_t tile) {
    const int32_t rows = p->qo_len * p->group_size;
    raddle_plan_item item;
    item.request = request;
    item.head = group * shape->heads;
    item.row_begin = tile * p->tile_rows;
    item.row_end = rows - item.row_begin < p->tile_rows ? rows : item.row_begin + p->tile_rows;
    item.kv_begin = 0;
    item.kv_end = p->requests[request].kv_len;
    if (p->causal || p->window_left >= 0) { /* as raddle_attention_visible */
        const int64_t kv_len = item.kv_end, diagonal = kv_len - p->qo_len;
        const int64_t first = diagonal + item.row_begin / p->group_size;
        const int64_t last = diagonal + (item.row_end - 1) / p->group_size;
        const int64_t begin =
            p->window_left >= 0 && first > p->window_left ? first - p->window_left : 0;
        const int64_t end = p->causal && last + 1 < kv_len ? last + 1 : kv_len;
        item.kv_begin = end > begin ? (int32_t)begin : 0;
        item.kv_end = end > begin ? (int32_t)end : 0;
    }
    return item;
}

RADDLE_PLAN_FUNCTION int32_t raddle_plan_tokens(const raddle_attention_plan_params *p,
                                                const raddle_plan_shape *shape, int32_t kind) {
    const int32_t request = shape->tiles == 1 ? kind : kind / shape->tiles;
    const raddle_plan_item item =
        raddle_plan_item_of(p, shape, request, 0, kind - request * shape->tiles);
    return item.kv_end - item.kv_begin;
}

/* Items lie in the order (request, head group, row tile). */
typedef struct raddle_plan_place {
    int32_t request, group, tile;
} raddle_plan_place;

RADDLE_PLAN_FUNCTION raddle_plan_place raddle_plan_place_of(const raddle_plan_shape *shape,
                                                            int32_t item) {
    const uint32_t tiles = (uint32_t)shape->tiles, groups = (uint32_t)shape->groups;
    const uint32_t at = tiles == 1 ? (uint32_t)item : (uint32_t)item / tiles;
    raddle_plan_place place;
    place.request = (int32_t)(groups == 1 ? at : at / groups);
    place.group = (int32_t)(at - (uint32_t)place.request * groups);
    place.tile = (int32_t)((uint32_t)item - at * tiles);
    return place;
}

/* Sum of a prefix over the items before one; prefix counts each kind once. */
RADDLE_PLAN_FUNCTION int64_t raddle_plan_before(const raddle_plan_shape *shape,
                                                const int64_t *prefix, int32_t item) {
    const raddle_plan_place at = raddle_plan_place_of(shape, item);
    const int64_t *of_request = prefix + (int64_t)at.request * shape->tiles;
    int64_t sum = shape->groups * of_request[0];
    if (at.group > 0) {
        sum += at.group * (of_request[shape->tiles] - of_request[0]);
    }
    if (at.tile > 0) {
        sum += of_request[at.tile] - of_request[0];
    }
    return sum;
}

/* The item in which the sum passes x, 0 <= x < all of it; out_offset: x less what lies before. */
RADDLE_PLAN_FUNCTION raddle_plan_place raddle_plan_find(const raddle_plan_shape *shape,
                                                        const int64_t *prefix, int64_t x,
                                                        int64_t *out_offset) {
    const int32_t tiles = shape->tiles;
    int32_t low = 0,
            high = shape->kinds / tiles; /* request low begins at x or before, high behind */
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        if (shape->groups * prefix[(int64_t)middle * tiles] <= x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    raddle_plan_place place;
    const int64_t *of_request = prefix + (int64_t)low * tiles;
    const int64_t each = of_request[tiles] - of_request[0];
    int64_t offset = x - shape->groups * of_request[0];
    place.request = low;
    place.group = (int32_t)(each > 0 ? offset / each : 0);
    offset -= place.group * each;
    low = 0;
    high = tiles;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        if (of_request[middle] - of_request[0] <= offset) {
            low = middle;
        } else {
            high = middle;
        }
    }
    place.tile = low;
    *out_offset = offset - (of_request[low] - of_request[0]);
    return place;
}

/* ------------------------------------------------------------------ sums over the threads */

/* Returns the sum of what the threads before this one brought; everybody calls it. */
RADDLE_PLAN_FUNCTION int64_t raddle_plan_scan(int64_t *partial, int64_t mine, int32_t thread,
                                              int32_t threads, int64_t *out_total) {
    int64_t *from = partial, *to = partial + threads;
    from[thread] = mine;
    RADDLE_PLAN_SYNC();
    for (int32_t reach = 1; reach < threads; reach *= 2) {
        to[thread] = from[thread] + (thread >= reach ? from[thread - reach] : 0);
        RADDLE_PLAN_SYNC(); /* the sums of twice the reach are written -> they are read */
        int64_t *other = from;
        from = to;
        to = other;
    }
    *out_total = from[threads - 1];
    const int64_t before = from[thread] - mine;
    RADDLE_PLAN_SYNC(); /* everybody has read -> the next scan may write */
    return before;
}

/* What sum_kinds adds up. */
enum {
    RADDLE_PLAN_WHOLE_COST,
    RADDLE_PLAN_SPREAD_COST, /* with what the cuts of a long item cost */
    RADDLE_PLAN_OWNERS,      /* the workers that it gets in OWN */
};

RADDLE_PLAN_FUNCTION int64_t raddle_plan_weight(const raddle_attention_plan_params *p,
                                                const raddle_plan_shape *shape, int32_t kind,
                                                int32_t weight) {
    const int32_t tokens = raddle_plan_tokens(p, shape, kind);
    if (weight == RADDLE_PLAN_OWNERS) {
        const uint32_t most = (uint32_t)shape->own_tokens;
        return tokens > 0 ? ((uint32_t)tokens + most - 1) / most : 1;
    }
    const int64_t cost = (int64_t)tokens + shape->segment_cost;
    const bool is_spread = weight == RADDLE_PLAN_SPREAD_COST;
    const int32_t cuts = is_spread ? (int32_t)((uint32_t)tokens / (uint32_t)shape->load) : 0;
    return cost + (int64_t)cuts * (shape->segment_cost + shape->cut_cost);
}

/* Fills prefix [kinds + 1]; returns the sum over all kinds. */
RADDLE_PLAN_FUNCTION int64_t raddle_plan_sum_kinds(const raddle_attention_plan_params *p,
                                                   const raddle_plan_shape *shape, int32_t weight,
                                                   int64_t *partial, int64_t *prefix,
                                                   int32_t thread, int32_t threads) {
    const int32_t per_thread = (shape->kinds + threads - 1) / threads;
    const int64_t first = (int64_t)per_thread * thread;
    const int64_t end = raddle_plan_clamp(first + per_thread, 0, shape->kinds);
    int64_t sum = 0, total = 0;
    for (int64_t kind = first; kind < end; kind++) {
        sum += raddle_plan_weight(p, shape, (int32_t)kind, weight);
    }
    int64_t before = raddle_plan_scan(partial, sum, thread, threads, &total);
    for (int64_t kind = first; kind < end; kind++) {
        prefix[kind] = before;
        before += raddle_plan_weight(p, shape, (int32_t)kind, weight);
    }
    if (thread == 0) {
        prefix[shape->kinds] = total;
    }
    RADDLE_PLAN_SYNC(); /* the prefix sums are written -> everybody reads them */
    return total;
}

#endif

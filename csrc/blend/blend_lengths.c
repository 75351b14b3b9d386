/* blend_lengths.c - what is thought of outputs that are not known, from those that were seen.
 *
 * A request is like others of its group, and more like those with which it shares a prefix: from the
 * group down the tree each node draws the moments of its parent towards those of its own requests, by
 * as much as it has seen (credibility, Buhlmann 1967). Requests of several groups may share a prefix;
 * such a node says nothing.
 */
#include "blend/blend.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"

enum { DIGIT_BITS = 8, NUM_PLACES = 1 << DIGIT_BITS, NUM_DIGITS = 4 };

/* Requests that a prior is worth. */
static const double PRIOR = 8;
/* A running request is given room for as many tokens as this share of its group's take. */
static const double ROOM_QUANTILE = 0.8;

typedef struct moments {
    double count, sum, squares;
} moments;

typedef struct belief {
    double mean, square;
} belief;

/* A length seen, or what a request has given that has not ended; and of the group's lengths beyond
 * it, by Kaplan and Meier (1958): the share that is longer, and the integrals of that share and of it
 * times twice the length. */
typedef struct point {
    int32_t length, group;
    bool has_ended;
    double longer, beyond, square_beyond;
} point;

typedef struct view {
    const raddle_blend_store *store;
    const raddle_blend_trie *trie;
    const int32_t *seen, *so_far;
    point *points, *other_points; /* group after group; and room to sort */
    int64_t *begin;               /* [num_groups + 1] in points */
    moments *before;              /* [num_requests + 1] sums over the tree's order */
    int32_t *changes;             /* [num_requests] of group, up to here in that order */
    belief *groups, *nodes;
    double *room; /* [num_groups] quantile over mean */
} view;

static void add(moments *to, double length) {
    to->count += 1;
    to->sum += length;
    to->squares += length * length;
}

/* Tokens that a request which has not ended has given. */
static int32_t given(const view *v, int64_t request) {
    return v->so_far != NULL && v->seen[request] < 0 ? v->so_far[request] : 0;
}

static belief update(belief prior, moments own) {
    return (belief){
        .mean = (own.sum + PRIOR * prior.mean) / (own.count + PRIOR),
        .square = (own.squares + PRIOR * prior.square) / (own.count + PRIOR),
    };
}

/* ------------------------------------------------------------------ groups */

/* Where a point comes by `digit` of its key: by length, those that ended first; last by group. */
static int64_t place_of(const point *p, int digit) {
    const int64_t key = 2 * (int64_t)p->length + !p->has_ended;
    return digit < NUM_DIGITS ? key >> (digit * DIGIT_BITS) & (NUM_PLACES - 1) : p->group;
}

/* One stable pass of a radix sort; begin [num_places + 1] gets where each place begins. */
static void distribute(const point *from, point *to, int64_t count, int digit, int64_t num_places,
                       int64_t *begin) {
    memset(begin, 0, (size_t)(num_places + 1) * sizeof(int64_t));
    for (int64_t k = 0; k < count; k++) {
        begin[place_of(&from[k], digit) + 1]++;
    }
    for (int64_t place = 0; place < num_places; place++) {
        begin[place + 1] += begin[place];
    }
    for (int64_t k = 0; k < count; k++) {
        to[begin[place_of(&from[k], digit)]++] = from[k];
    }
    memmove(begin + 1, begin, (size_t)num_places * sizeof(int64_t));
    begin[0] = 0;
}

/* What was seen, group after group, ascending. */
static void sort_by_group(view *v) {
    int64_t count = 0, places[NUM_PLACES + 1];
    point *points = v->points, *others = v->other_points;
    for (int64_t i = 0; i < v->store->num_requests; i++) {
        const bool has_ended = v->seen[i] >= 0;
        if (has_ended || given(v, i) > 0) {
            points[count++] = (point){.length = has_ended ? v->seen[i] : given(v, i),
                                      .group = v->store->requests[i].group,
                                      .has_ended = has_ended};
        }
    }
    for (int digit = 0; digit <= NUM_DIGITS; digit++) {
        const bool is_group = digit == NUM_DIGITS;
        distribute(points, others, count, digit, is_group ? v->store->num_groups : NUM_PLACES,
                   is_group ? v->begin : places);
        point *swapped = points;
        points = others;
        others = swapped;
    }
    v->points = points;
    v->other_points = others;
}

/* The survival curve of a group; the longest that was seen ends it. */
static belief survive(point *points, int64_t count) {
    double longer = 1;
    for (int64_t k = 0; k < count; k++) {
        longer *= points[k].has_ended ? 1 - 1 / (double)(count - k) : 1;
        points[k].longer = k + 1 < count ? longer : 0;
    }
    double beyond = 0, square = 0;
    for (int64_t k = count - 1; k >= 0; k--) {
        points[k].beyond = beyond;
        points[k].square_beyond = square;
        const double to = points[k].length, from = k > 0 ? points[k - 1].length : 0;
        const double share = k > 0 ? points[k - 1].longer : 1;
        beyond += share * (to - from);
        square += share * (to * to - from * from);
    }
    return (belief){.mean = beyond, .square = square};
}

/* A group of which nothing was seen is like all others together; when nothing was seen at all, a
 * request takes what it may. */
static void believe_of_groups(view *v) {
    const int64_t groups = v->store->num_groups;
    moments all = {0};
    for (int64_t i = 0; i < v->store->num_requests; i++) {
        if (v->seen[i] >= 0) {
            add(&all, v->seen[i]);
        }
    }
    for (int64_t g = 0; g < groups; g++) {
        point *points = v->points + v->begin[g];
        const int64_t seen = v->begin[g + 1] - v->begin[g];
        v->groups[g] = seen > 0        ? survive(points, seen)
                       : all.count > 0 ? (belief){all.sum / all.count, all.squares / all.count}
                                       : (belief){INFINITY, INFINITY};
        int64_t high = 0;
        while (high + 1 < seen && points[high].longer > 1 - ROOM_QUANTILE + 1e-9) {
            high++;
        }
        v->room[g] = seen > 0 ? fmax(points[high].length / v->groups[g].mean, 1) : 1;
    }
}

/* What is thought of a request of a group that has given some tokens, by the group's curve; and the
 * share of the group's lengths that it outlived. */
static belief outlived(const view *v, int32_t group, int32_t so_far, double *out_share) {
    const point *points = v->points + v->begin[group];
    int64_t low = 0, high = v->begin[group + 1] - v->begin[group] - 1;
    while (low < high) { /* the last point up to so_far */
        const int64_t middle = (low + high + 1) / 2;
        if (points[middle].length <= so_far) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const point *at = &points[low];
    const double g = so_far, longer = at->longer;
    *out_share = 1 - longer;
    return longer > 0 ? (belief){g + at->beyond / longer, g * g + at->square_beyond / longer}
                      : (belief){g, g * g};
}

/* ------------------------------------------------------------------ down the tree */

static bool is_of_one_group(const view *v, const raddle_blend_node *node) {
    return node->request_end == node->request_begin ||
           v->changes[node->request_end - 1] == v->changes[node->request_begin];
}

static void believe_of_nodes(view *v) {
    const raddle_blend_trie *trie = v->trie;
    for (int32_t k = 0; k < trie->num_requests; k++) {
        const int32_t request = trie->order[k];
        v->before[k + 1] = v->before[k];
        if (v->seen[request] >= 0) {
            add(&v->before[k + 1], v->seen[request]);
        } else if (given(v, request) > 0) {
            double worth = 0;
            const belief b =
                outlived(v, v->store->requests[request].group, given(v, request), &worth);
            v->before[k + 1].count += worth;
            v->before[k + 1].sum += worth * b.mean;
            v->before[k + 1].squares += worth * b.square;
        }
        v->changes[k] = k == 0 ? 0
                               : v->changes[k - 1] + (v->store->requests[request].group !=
                                                      v->store->requests[trie->order[k - 1]].group);
    }
    for (int32_t i = 0; i < trie->num_nodes; i++) {
        const raddle_blend_node *node = &trie->nodes[i];
        if (!is_of_one_group(v, node) || node->request_end == node->request_begin) {
            continue;
        }
        const int32_t group = v->store->requests[trie->order[node->request_begin]].group;
        const bool has_prior = node->parent > 0 && is_of_one_group(v, &trie->nodes[node->parent]);
        const moments *end = &v->before[node->request_end],
                      *begin = &v->before[node->request_begin];
        const moments own = {end->count - begin->count, end->sum - begin->sum,
                             end->squares - begin->squares};
        const belief prior = has_prior ? v->nodes[node->parent] : v->groups[group];
        v->nodes[i] = own.count > 0 ? update(prior, own) : prior;
    }
}

/* ------------------------------------------------------------------ what others call */

raddle_blend_length raddle_blend_length_known(int32_t output) {
    const double d = output;
    return (raddle_blend_length){
        .mean = (float)d, .square = (float)(d * d), .room = output, .is_seen = true};
}

raddle_blend_length raddle_blend_length_of(const raddle_blend_store *store,
                                           const raddle_blend_length *lengths, int32_t request) {
    return lengths != NULL ? lengths[request]
                           : raddle_blend_length_known(store->requests[request].output_tokens);
}

raddle_blend_work raddle_blend_expected_work(const raddle_blend_store *store,
                                             const raddle_blend_length *lengths, int32_t request,
                                             int64_t cached) {
    const int64_t prompt = store->requests[request].prompt_tokens;
    const raddle_blend_length length = raddle_blend_length_of(store, lengths, request);
    const double mean = fmax(length.mean, 1), square = fmax(length.square, mean * mean);
    raddle_blend_work work =
        raddle_blend_request_work(prompt, cached < prompt ? cached : prompt - 1, 1);
    work.tokens += mean - 1;
    work.reads = (mean - 1) * (double)prompt + (square - mean) / 2;
    return work;
}

double raddle_blend_survey(const raddle_blend_store *store, const raddle_blend_trie *trie,
                           const raddle_blend_length *lengths, const raddle_blend_limits *limits,
                           raddle_blend_work *out_work) {
    raddle_blend_work total = {0};
    double longest = 1, held = 0; /* tokens that no two requests share, times steps */
    int32_t last_bare = 0;        /* node of the last prompt that is full blocks and no more */
    for (int32_t k = 0; k < trie->num_requests; k++) {
        const int32_t i = trie->order[k];
        const raddle_blend_request *request = &store->requests[i];
        const raddle_blend_length length = raddle_blend_length_of(store, lengths, i);
        const int64_t cached =
            (int64_t)raddle_blend_trie_shared_before(trie, k) * store->block_size;
        raddle_blend_work work = raddle_blend_expected_work(store, lengths, i, cached);
        /* A prompt that is found whole has its last token computed again; but the first of its node
         * that has no more than full blocks might have come before those that do. */
        if ((int64_t)request->num_blocks * store->block_size == request->prompt_tokens) {
            if (trie->node_of[k] != last_bare && cached == request->prompt_tokens) {
                work.tokens -= 1;
                work.scores = 0;
            }
            last_bare = trie->node_of[k];
        }
        const double alone =
            request->prompt_tokens - (double)raddle_blend_trie_shared(trie, k) * store->block_size;
        total.tokens += work.tokens;
        total.scores += work.scores;
        total.reads += work.reads;
        held += work.reads - (request->prompt_tokens - alone) * (length.mean - 1);
        longest = fmax(longest, length.mean);
    }
    *out_work = total;
    return fmax(fmax(held / (double)limits->pool_tokens, total.tokens / limits->step_tokens),
                longest);
}

static raddle_blend_length believed_length(const view *v, int32_t k) {
    const int32_t i = v->trie->order[k], node = v->trie->node_of[k];
    if (v->seen[i] >= 0) {
        return raddle_blend_length_known(v->seen[i]);
    }
    const raddle_blend_request *request = &v->store->requests[i];
    const double most = request->max_tokens;
    const bool has_node = node > 0 && is_of_one_group(v, &v->trie->nodes[node]);
    belief b = has_node ? v->nodes[node] : v->groups[request->group];
    if (given(v, i) > 0) {
        double share = 0;
        b = outlived(v, request->group, given(v, i), &share);
    }
    const double mean = fmin(fmax(b.mean, 1), most);
    return (raddle_blend_length){
        .mean = (float)mean,
        .square = (float)fmax(fmin(b.square, mean * most), mean * mean),
        .room = (int32_t)fmin(ceil(mean * v->room[request->group]), most),
    };
}

static void guess(view *v, raddle_blend_length *out) {
    sort_by_group(v);
    believe_of_groups(v);
    believe_of_nodes(v);
    for (int32_t k = 0; k < v->trie->num_requests; k++) {
        out[v->trie->order[k]] = believed_length(v, k);
    }
}

raddle_status raddle_blend_lengths_guess(const raddle_blend_store *store,
                                         const raddle_blend_trie *trie, const int32_t *seen,
                                         const int32_t *so_far, raddle_blend_length *out_lengths) {
    const size_t requests = (size_t)store->num_requests, groups = (size_t)store->num_groups;
    view v = {.store = store, .trie = trie, .seen = seen, .so_far = so_far};
    v.before = raddle_alloc_zero((requests + 1) * sizeof(moments));
    v.changes = raddle_alloc_zero((requests + 1) * sizeof(int32_t));
    v.groups = raddle_alloc_zero((groups + 1) * sizeof(belief));
    v.nodes = raddle_alloc_zero((size_t)trie->num_nodes * sizeof(belief));
    v.room = raddle_alloc_zero((groups + 1) * sizeof(double));
    v.points = raddle_alloc((requests + 1) * sizeof(point));
    v.other_points = raddle_alloc((requests + 1) * sizeof(point));
    v.begin = raddle_alloc((groups + 1) * sizeof(int64_t));
    const bool has_all = v.before != NULL && v.changes != NULL && v.groups != NULL &&
                         v.nodes != NULL && v.room != NULL && v.points != NULL &&
                         v.other_points != NULL && v.begin != NULL;
    if (has_all) {
        guess(&v, out_lengths);
    }
    raddle_free(v.before);
    raddle_free(v.changes);
    raddle_free(v.groups);
    raddle_free(v.nodes);
    raddle_free(v.room);
    raddle_free(v.points);
    raddle_free(v.other_points);
    raddle_free(v.begin);
    return has_all ? RADDLE_OK : raddle_fail_memory((requests + 1) * sizeof(moments));
}

raddle_status raddle_blend_lengths_sample(const raddle_blend_store *store, double rate,
                                          int32_t quota, uint64_t seed, int32_t *out_requests,
                                          int64_t *out_count) {
    RADDLE_REQUIRE(rate >= 0 && rate <= 1, RADDLE_ERR_VALUE, "sample_rate: expected 0 to 1, got %g",
                   rate);
    RADDLE_REQUIRE(quota >= 0, RADDLE_ERR_VALUE, "quota: expected at least 0, got %d", (int)quota);
    const size_t bytes = ((size_t)store->num_groups + 1) * sizeof(int64_t);
    int64_t *left = raddle_alloc_zero(bytes), *wanted = raddle_alloc_zero(bytes);
    int64_t count = 0;
    if (left != NULL && wanted != NULL) {
        for (int64_t i = 0; i < store->num_requests; i++) {
            left[store->requests[i].group]++;
        }
        for (int32_t g = 0; g < store->num_groups; g++) {
            const double most = fmax(ceil(rate * (double)left[g]), quota);
            wanted[g] = (int64_t)fmin(most, (double)left[g]);
        }
        /* Each in turn is taken with the odds that keep all choices alike (Knuth's algorithm S). */
        for (int64_t i = 0; i < store->num_requests; i++) {
            const int32_t g = store->requests[i].group;
            if (raddle_blend_random(&seed) % (uint64_t)left[g] < (uint64_t)wanted[g]) {
                out_requests[count++] = (int32_t)i;
                wanted[g]--;
            }
            left[g]--;
        }
        *out_count = count;
    }
    const bool has_all = left != NULL && wanted != NULL;
    raddle_free(left);
    raddle_free(wanted);
    return has_all ? RADDLE_OK : raddle_fail_memory(bytes);
}

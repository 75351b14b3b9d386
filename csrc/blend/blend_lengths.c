/* blend_lengths.c - what is thought of outputs that are not known, from those that were seen.
 *
 * A request is like others of its group, and more like those with which it shares a prefix: from the
 * group down the tree each node draws the moments of its parent towards those of its own requests, by
 * as much as it has seen (credibility, Buhlmann 1967). Requests of several groups may share a prefix;
 * such a node says nothing.
 */
#include "blend/blend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"

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

typedef struct view {
    const raddle_blend_store *store;
    const raddle_blend_trie *trie;
    const int32_t *seen;
    moments *before;  /* [num_requests + 1] sums over the tree's order */
    int32_t *changes; /* [num_requests] of group, up to here in that order */
    belief *groups, *nodes;
    double *room; /* [num_groups] quantile over mean */
} view;

static void add(moments *to, double length) {
    to->count += 1;
    to->sum += length;
    to->squares += length * length;
}

static belief update(belief prior, moments own) {
    return (belief){
        .mean = (own.sum + PRIOR * prior.mean) / (own.count + PRIOR),
        .square = (own.squares + PRIOR * prior.square) / (own.count + PRIOR),
    };
}

static int by_value(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* ------------------------------------------------------------------ groups */

/* Lengths seen, group after group; begin [num_groups + 1]. */
static void sort_by_group(const view *v, int32_t *lengths, int64_t *begin) {
    const int64_t groups = v->store->num_groups;
    memset(begin, 0, (size_t)(groups + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < v->store->num_requests; i++) {
        begin[v->store->requests[i].group + 1] += v->seen[i] >= 0;
    }
    for (int64_t g = 0; g < groups; g++) {
        begin[g + 1] += begin[g];
    }
    for (int64_t i = 0; i < v->store->num_requests; i++) {
        if (v->seen[i] >= 0) {
            lengths[begin[v->store->requests[i].group]++] = v->seen[i];
        }
    }
    for (int64_t g = groups; g > 0; g--) {
        begin[g] = begin[g - 1];
    }
    begin[0] = 0;
    for (int64_t g = 0; g < groups; g++) {
        qsort(lengths + begin[g], (size_t)(begin[g + 1] - begin[g]), sizeof(int32_t), by_value);
    }
}

/* A group of which nothing was seen is like all others together; when nothing was seen at all, a
 * request takes what it may. */
static void believe_of_groups(view *v, const int32_t *lengths, const int64_t *begin) {
    const int64_t groups = v->store->num_groups;
    moments all = {0};
    for (int64_t k = 0; k < begin[groups]; k++) {
        add(&all, lengths[k]);
    }
    for (int64_t g = 0; g < groups; g++) {
        moments own = {0};
        for (int64_t k = begin[g]; k < begin[g + 1]; k++) {
            add(&own, lengths[k]);
        }
        const int64_t seen = begin[g + 1] - begin[g];
        const moments *from = seen > 0 ? &own : &all;
        v->groups[g] = from->count > 0
                           ? (belief){from->sum / from->count, from->squares / from->count}
                           : (belief){INFINITY, INFINITY};
        const double high =
            seen > 0 ? lengths[begin[g] + (int64_t)(ROOM_QUANTILE * (double)(seen - 1) + 0.5)] : 0;
        v->room[g] = high > v->groups[g].mean ? high / v->groups[g].mean : 1;
    }
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
    return (raddle_blend_length){.mean = (float)d, .square = (float)(d * d), .room = output};
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

static raddle_blend_length believed_length(const view *v, int32_t k) {
    const int32_t i = v->trie->order[k], node = v->trie->node_of[k];
    if (v->seen[i] >= 0) {
        return raddle_blend_length_known(v->seen[i]);
    }
    const raddle_blend_request *request = &v->store->requests[i];
    const double most = request->max_tokens;
    const bool has_node = node > 0 && is_of_one_group(v, &v->trie->nodes[node]);
    const belief b = has_node ? v->nodes[node] : v->groups[request->group];
    const double mean = fmin(fmax(b.mean, 1), most);
    return (raddle_blend_length){
        .mean = (float)mean,
        .square = (float)fmax(fmin(b.square, mean * most), mean * mean),
        .room = (int32_t)fmin(ceil(mean * v->room[request->group]), most),
    };
}

static void guess(view *v, int32_t *lengths, int64_t *begin, raddle_blend_length *out) {
    sort_by_group(v, lengths, begin);
    believe_of_groups(v, lengths, begin);
    believe_of_nodes(v);
    for (int32_t k = 0; k < v->trie->num_requests; k++) {
        out[v->trie->order[k]] = believed_length(v, k);
    }
}

raddle_status raddle_blend_lengths_guess(const raddle_blend_store *store,
                                         const raddle_blend_trie *trie, const int32_t *seen,
                                         raddle_blend_length *out_lengths) {
    const size_t requests = (size_t)store->num_requests, groups = (size_t)store->num_groups;
    view v = {.store = store, .trie = trie, .seen = seen};
    v.before = raddle_alloc_zero((requests + 1) * sizeof(moments));
    v.changes = raddle_alloc_zero((requests + 1) * sizeof(int32_t));
    v.groups = raddle_alloc_zero((groups + 1) * sizeof(belief));
    v.nodes = raddle_alloc_zero((size_t)trie->num_nodes * sizeof(belief));
    v.room = raddle_alloc_zero((groups + 1) * sizeof(double));
    int32_t *lengths = raddle_alloc((requests + 1) * sizeof(int32_t));
    int64_t *begin = raddle_alloc((groups + 1) * sizeof(int64_t));
    const bool has_all = v.before != NULL && v.changes != NULL && v.groups != NULL &&
                         v.nodes != NULL && v.room != NULL && lengths != NULL && begin != NULL;
    if (has_all) {
        guess(&v, lengths, begin, out_lengths);
    }
    raddle_free(v.before);
    raddle_free(v.changes);
    raddle_free(v.groups);
    raddle_free(v.nodes);
    raddle_free(v.room);
    raddle_free(lengths);
    raddle_free(begin);
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

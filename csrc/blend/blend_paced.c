/* blend_paced.c - strata of like density.
 *
 * The tree is opened from the root until each unit, a subtree or a node's own requests, is a small
 * part of the work. Units are sorted by density, computing over reading, and dealt out in that order
 * to strata of equal work. Within a stratum units lie in the order of the tree, so that it walks
 * depth first and one path stays hot. Side by side the strata keep the mix of the whole from the
 * first step to the last, which two ends of one list do not. benchmarks/LOG.md has what their number
 * does.
 */
#include "blend/blend.h"

#include <math.h>
#include <stdlib.h>

#include "base/alloc.h"

enum {
    LEAST_BY_SHARE = 8,
    POOL_PATHS = 20,        /* that the pool holds, for each stratum */
    UNITS_PER_STRATUM = 8,  /* at least: so that strata come out even */
    STRATA_TIMES_SHARE = 4, /* of prompts, the share that others have too */
};

typedef struct unit {
    double compute, read; /* seconds */
    int32_t begin, end;   /* in the tree's order */
    int32_t stratum;
} unit;

typedef struct dealing {
    const raddle_blend_store *store;
    const raddle_blend_trie *trie;
    const raddle_blend_length *lengths;
    double *compute, *read; /* [num_requests + 1] sums over the tree's order */
    unit *units;
    int32_t num_units, num_strata;
    double most; /* seconds of a unit that is left closed */
} dealing;

static double seconds_between(const dealing *d, int32_t begin, int32_t end) {
    return d->compute[end] - d->compute[begin] + d->read[end] - d->read[begin];
}

/* What each request adds when all come depth first: the prefix that it shares with the one before it
 * is computed already. */
static void add_up(dealing *d, const raddle_blend_cost *cost) {
    d->compute[0] = d->read[0] = 0;
    for (int32_t k = 0; k < d->trie->num_requests; k++) {
        const int32_t request = d->trie->order[k];
        const int64_t cached =
            (int64_t)raddle_blend_trie_shared_before(d->trie, k) * d->store->block_size;
        const raddle_blend_work work =
            raddle_blend_expected_work(d->store, d->lengths, request, cached);
        double read = 0;
        const double all = raddle_blend_plain_seconds(cost, &work, &read);
        d->compute[k + 1] = d->compute[k] + all - read;
        d->read[k + 1] = d->read[k] + read;
    }
}

/* More strata mix more evenly, and each reads shared prefixes that others read too, and keeps one in
 * memory: as many as what there is to share allows, and the pool. A request's path is as long as what
 * it shares with others. */
static int32_t count_strata(const dealing *d, const raddle_blend_limits *limits) {
    double tokens = 0, blocks = 0;
    for (int32_t k = 0; k < d->trie->num_requests; k++) {
        tokens += d->store->requests[d->trie->order[k]].prompt_tokens;
        blocks += raddle_blend_trie_shared(d->trie, k);
    }
    const double path = blocks * d->store->block_size / d->trie->num_requests;
    const double shared =
        (double)(d->store->num_blocks - d->trie->distinct_blocks) * d->store->block_size;
    const double by_share = fmax(STRATA_TIMES_SHARE * tokens / (shared + 1), LEAST_BY_SHARE);
    const double by_pool = (double)limits->pool_tokens / (POOL_PATHS * (path + 1));
    return (int32_t)fmax(fmin(fmin(by_share, by_pool), RADDLE_BLEND_MAX_STREAMS), 1);
}

static void add_unit(dealing *d, int32_t begin, int32_t end) {
    if (begin < end) {
        d->units[d->num_units++] = (unit){
            .compute = d->compute[end] - d->compute[begin],
            .read = d->read[end] - d->read[begin],
            .begin = begin,
            .end = end,
        };
    }
}

/* In preorder: a subtree that is small enough is passed over whole, else its node's own requests are a
 * unit each and its children come next. */
static void open_units(dealing *d) {
    const raddle_blend_node *nodes = d->trie->nodes;
    for (int32_t i = 0; i < d->trie->num_nodes;) {
        const raddle_blend_node *node = &nodes[i];
        if (seconds_between(d, node->request_begin, node->request_end) <= d->most) {
            add_unit(d, node->request_begin, node->request_end);
            i = node->end;
            continue;
        }
        const int32_t own_end = i + 1 < node->end ? nodes[i + 1].request_begin : node->request_end;
        for (int32_t k = node->request_begin; k < own_end; k++) {
            add_unit(d, k, k + 1);
        }
        i++;
    }
}

/* Densest first; of equal ones the earlier. compute / read, without dividing by 0. */
static int by_density(const void *a, const void *b) {
    const unit *x = a, *y = b;
    const double left = x->compute * y->read, right = y->compute * x->read;
    return left > right ? -1 : left < right ? 1 : (x->begin > y->begin) - (x->begin < y->begin);
}

static int by_stratum(const void *a, const void *b) {
    const unit *x = a, *y = b;
    return x->stratum != y->stratum ? (x->stratum > y->stratum) - (x->stratum < y->stratum)
                                    : (x->begin > y->begin) - (x->begin < y->begin);
}

static void deal(dealing *d, raddle_blend_plan *plan) {
    const double all = seconds_between(d, 0, d->trie->num_requests);
    double before = 0;
    qsort(d->units, (size_t)d->num_units, sizeof(unit), by_density);
    for (int32_t i = 0; i < d->num_units; i++) {
        const double own = d->units[i].compute + d->units[i].read;
        const int32_t stratum = (int32_t)((before + own / 2) / all * d->num_strata);
        d->units[i].stratum = stratum < d->num_strata ? stratum : d->num_strata - 1;
        before += own;
    }
    qsort(d->units, (size_t)d->num_units, sizeof(unit), by_stratum);
    int32_t at = 0, last = -1;
    plan->num_streams = 0;
    for (int32_t i = 0; i < d->num_units; i++) {
        const unit *u = &d->units[i];
        if (u->stratum != last) {
            last = u->stratum;
            plan->stream_output[plan->num_streams] = 0;
            plan->stream_seconds[plan->num_streams++] = 0;
        }
        for (int32_t k = u->begin; k < u->end; k++) {
            plan->order[at++] = d->trie->order[k];
            plan->stream_output[plan->num_streams - 1] +=
                raddle_blend_length_of(d->store, d->lengths, d->trie->order[k]).mean;
        }
        plan->stream_end[plan->num_streams - 1] = at;
        plan->stream_seconds[plan->num_streams - 1] += u->compute + u->read;
    }
    for (int32_t i = 0, begin = 0; i < plan->num_streams; begin = plan->stream_end[i++]) {
        plan->stream_output[i] /= plan->stream_end[i] - begin;
    }
    plan->is_paced = true;
}

raddle_status raddle_blend_plan_strata(const raddle_blend_store *store,
                                       const raddle_blend_trie *trie, const raddle_blend_cost *cost,
                                       const raddle_blend_limits *limits,
                                       const raddle_blend_length *lengths,
                                       raddle_blend_plan *plan) {
    const size_t count = (size_t)trie->num_requests;
    dealing d = {.store = store, .trie = trie, .lengths = lengths};
    raddle_status status = RADDLE_OK;
    d.compute = raddle_alloc((count + 1) * sizeof(double));
    d.read = raddle_alloc((count + 1) * sizeof(double));
    d.units = raddle_alloc(count * sizeof(unit));
    if (d.compute == NULL || d.read == NULL || d.units == NULL) {
        status = raddle_fail_memory(count * sizeof(unit));
    } else if (count > 0) {
        add_up(&d, cost);
        d.num_strata = count_strata(&d, limits);
        d.most = seconds_between(&d, 0, trie->num_requests) / (d.num_strata * UNITS_PER_STRATUM);
        open_units(&d);
        deal(&d, plan);
    }
    raddle_free(d.compute);
    raddle_free(d.read);
    raddle_free(d.units);
    return status;
}

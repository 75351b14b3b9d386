/* blend_paced.c - strata of like density.
 *
 * The tree is opened from the root until each unit, a subtree or a node's own requests, is a small
 * part of the work. Units are sorted by density, computing over reading, and dealt out in that order
 * to strata of equal work. Within a stratum units lie in the order of the tree, so that it walks
 * depth first and one path stays hot. Side by side the strata keep the mix of the whole from the
 * first step to the last, which two ends of one list do not.
 *
 * Many strata mix more evenly, and what is cut from its neighbours in the tree computes shared
 * prefixes once more: there are as many as lose next to nothing. benchmarks/LOG.md has what their
 * number does.
 */
#include "blend/blend.h"

#include <math.h>
#include <stdlib.h>

#include "base/alloc.h"

enum {
    POOL_PATHS = 30,      /* that the pool holds, for each stratum */
    UNITS_PER_STRATUM = 8 /* at least: so that strata come out even */
};

/* Of all tokens that are computed, the share that strata may compute more than once. */
static const double MOST_LOST = 0.005;

typedef struct unit {
    double compute, read; /* seconds */
    int32_t begin, end;   /* in the tree's order */
    int32_t stratum;
} unit;

typedef struct dealing {
    const raddle_blend_store *store;
    const raddle_blend_trie *trie;
    const raddle_blend_length *lengths;
    raddle_blend_sums sums;
    unit *units;          /* in the tree's order */
    const unit **densest; /* the same, densest first */
    int32_t num_units, num_strata;
    double most; /* seconds of a unit that is left closed */
} dealing;

static double seconds_between(const dealing *d, int32_t begin, int32_t end) {
    return d->sums.compute[end] - d->sums.compute[begin] + d->sums.read[end] - d->sums.read[begin];
}

/* Each stratum keeps a path in memory, as long as what its requests share with others. */
static int32_t most_by_pool(const dealing *d, const raddle_blend_limits *limits) {
    double blocks = 0;
    for (int32_t k = 0; k < d->trie->num_requests; k++) {
        blocks += raddle_blend_trie_shared(d->trie, k);
    }
    const double path = blocks * d->store->block_size / d->trie->num_requests;
    const double most = (double)limits->pool_tokens / (POOL_PATHS * (path + 1));
    return (int32_t)fmax(fmin(most, RADDLE_BLEND_MAX_STREAMS), 1);
}

static void add_unit(dealing *d, int32_t begin, int32_t end) {
    if (begin < end) {
        d->units[d->num_units++] = (unit){
            .compute = d->sums.compute[end] - d->sums.compute[begin],
            .read = d->sums.read[end] - d->sums.read[begin],
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
    const unit *x = *(const unit *const *)a, *y = *(const unit *const *)b;
    const double left = x->compute * y->read, right = y->compute * x->read;
    return left > right ? -1 : left < right ? 1 : (x->begin > y->begin) - (x->begin < y->begin);
}

static void sort_by_density(dealing *d) {
    for (int32_t i = 0; i < d->num_units; i++) {
        d->densest[i] = &d->units[i];
    }
    qsort(d->densest, (size_t)d->num_units, sizeof *d->densest, by_density);
}

/* Of equal work each. */
static void deal(dealing *d, int32_t num_strata) {
    const double all = seconds_between(d, 0, d->trie->num_requests);
    double before = 0;
    for (int32_t i = 0; i < d->num_units; i++) {
        unit *u = &d->units[d->densest[i] - d->units];
        const double own = u->compute + u->read;
        const int32_t stratum = (int32_t)((before + own / 2) / all * num_strata);
        u->stratum = stratum < num_strata ? stratum : num_strata - 1;
        before += own;
    }
    d->num_strata = num_strata;
}

/* Tokens that the strata compute and one walk through the tree would not. */
static double lost_tokens(const dealing *d) {
    int32_t last[RADDLE_BLEND_MAX_STREAMS]; /* request before, of each stratum */
    int64_t blocks = 0;
    for (int32_t i = 0; i < d->num_strata; i++) {
        last[i] = -1;
    }
    for (int32_t i = 0; i < d->num_units; i++) {
        const unit *u = &d->units[i];
        const int32_t before = last[u->stratum];
        const int32_t shared =
            before < 0 ? 0 : raddle_blend_trie_shared_between(d->trie, before, u->begin);
        blocks += raddle_blend_trie_shared_before(d->trie, u->begin) - shared;
        last[u->stratum] = u->end - 1;
    }
    return (double)blocks * d->store->block_size;
}

/* The strata as the plan's streams, each in the order of the tree. */
static void lay_out(const dealing *d, raddle_blend_plan *plan) {
    int32_t count[RADDLE_BLEND_MAX_STREAMS] = {0}, stream[RADDLE_BLEND_MAX_STREAMS];
    int32_t next[RADDLE_BLEND_MAX_STREAMS], at = 0;
    for (int32_t i = 0; i < d->num_units; i++) {
        count[d->units[i].stratum] += d->units[i].end - d->units[i].begin;
    }
    plan->num_streams = 0;
    for (int32_t i = 0; i < d->num_strata; i++) {
        if (count[i] > 0) { /* one unit may be more than a stratum's share */
            stream[i] = plan->num_streams++;
            next[stream[i]] = at;
            at += count[i];
            plan->stream_end[stream[i]] = at;
            plan->stream_seconds[stream[i]] = plan->stream_output[stream[i]] = 0;
        }
    }
    for (int32_t i = 0; i < d->num_units; i++) {
        const unit *u = &d->units[i];
        const int32_t to = stream[u->stratum];
        plan->stream_seconds[to] += u->compute + u->read;
        for (int32_t k = u->begin; k < u->end; k++) {
            plan->order[next[to]++] = d->trie->order[k];
            plan->stream_output[to] +=
                raddle_blend_length_of(d->store, d->lengths, d->trie->order[k]).mean;
        }
    }
    for (int32_t i = 0, begin = 0; i < plan->num_streams; begin = plan->stream_end[i++]) {
        plan->stream_output[i] /= plan->stream_end[i] - begin;
    }
    plan->is_paced = true;
}

/* The seconds of so much computing and reading beside each other. */
static double beside(const raddle_blend_cost *cost, double compute, double read) {
    return (1 - cost->alpha) * fmax(compute, read) + cost->alpha * (compute + read);
}

static double gain_of(const dealing *d, const raddle_blend_cost *cost) {
    double compute[RADDLE_BLEND_MAX_STREAMS] = {0}, read[RADDLE_BLEND_MAX_STREAMS] = {0};
    double apart = 0;
    for (int32_t i = 0; i < d->num_units; i++) {
        compute[d->units[i].stratum] += d->units[i].compute;
        read[d->units[i].stratum] += d->units[i].read;
    }
    for (int32_t i = 0; i < d->num_strata; i++) {
        apart += beside(cost, compute[i], read[i]);
    }
    const int32_t all = d->trie->num_requests;
    return apart / beside(cost, d->sums.compute[all], d->sums.read[all]);
}

raddle_status raddle_blend_plan_strata(const raddle_blend_store *store,
                                       const raddle_blend_trie *trie, const raddle_blend_cost *cost,
                                       const raddle_blend_limits *limits,
                                       const raddle_blend_length *lengths,
                                       raddle_blend_plan *plan) {
    const size_t count = (size_t)trie->num_requests;
    dealing d = {.store = store, .trie = trie, .lengths = lengths};
    raddle_status status = raddle_blend_sums_init(&d.sums, store, trie, cost, lengths);
    d.units = raddle_alloc(count * sizeof(unit));
    d.densest = raddle_alloc(count * sizeof(const unit *));
    if (status == RADDLE_OK && (d.units == NULL || d.densest == NULL)) {
        status = raddle_fail_memory(count * sizeof(unit));
    } else if (status == RADDLE_OK && count > 0) {
        int32_t strata = most_by_pool(&d, limits);
        d.most = seconds_between(&d, 0, trie->num_requests) / (strata * UNITS_PER_STRATUM);
        open_units(&d);
        sort_by_density(&d);
        deal(&d, strata);
        while (strata > 1 && lost_tokens(&d) > MOST_LOST * d.sums.tokens) {
            strata -= (strata + 3) / 4;
            deal(&d, strata);
        }
        lay_out(&d, plan);
        plan->gain = gain_of(&d, cost);
    }
    raddle_blend_sums_fini(&d.sums);
    raddle_free(d.units);
    raddle_free(d.densest);
    return status;
}

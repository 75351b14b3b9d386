/* blend_partition.c - requests for several replicas, each with its own memory.
 *
 * The tree's order is cut into runs, small parts of a replica's share, where neighbours have least in
 * common. The largest first, each run goes where the busier of computing and reading is least after
 * it, a run's own size and the prefix that the replica would compute again counted in (vector bin
 * packing by largest first). Within a replica runs lie in the order of the tree.
 */
#include "blend/blend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"

enum { NONE = -1, NUM_SIZES = 3 };

/* Runs of a replica: few keep prefixes whole, many come out even. The best of these is taken. */
static const int32_t sizes[NUM_SIZES] = {16, 64, 256};

/* Of the sum beside the busier: a tie goes where both are low. */
static const double SUM_WEIGHT = 0.3;

typedef struct run {
    double compute, read; /* shares of all */
    int32_t begin, end;   /* in the tree's order */
    int32_t replica;
} run;

typedef struct packing {
    const raddle_blend_store *store;
    const raddle_blend_trie *trie;
    raddle_blend_sums sums;
    run *runs;
    const run **largest; /* the same, largest first */
    int32_t num_runs, num_replicas;
    double busiest;
    int32_t **placed;       /* [num_replicas] runs of each, ascending */
    int32_t *num_placed;    /* [num_replicas] */
    double *compute, *read; /* [num_replicas] shares so far */
} packing;

/* ------------------------------------------------------------------ runs */

static double share_between(const packing *p, int32_t begin, int32_t end) {
    const int32_t all = p->trie->num_requests;
    const double compute = p->sums.compute[end] - p->sums.compute[begin];
    const double read = p->sums.read[end] - p->sums.read[begin];
    return compute / p->sums.compute[all] + read / fmax(p->sums.read[all], 1e-300);
}

/* Where a run that begins here ends: in the second half of what it may have, behind the request that
 * shares least with the next. */
static int32_t end_of_run(const packing *p, int32_t begin, double most) {
    const int32_t all = p->trie->num_requests;
    int32_t best = NONE, least = INT32_MAX, end = begin + 1;
    for (; end < all && share_between(p, begin, end + 1) <= most; end++) {
        const int32_t shared = raddle_blend_trie_shared_before(p->trie, end);
        if (share_between(p, begin, end) > most / 2 && shared <= least) {
            best = end;
            least = shared;
        }
    }
    if (end == all) {
        return all;
    }
    return best == NONE || raddle_blend_trie_shared_before(p->trie, end) <= least ? end : best;
}

static void cut_runs(packing *p, int32_t runs_per_replica) {
    const int32_t all = p->trie->num_requests;
    const double most = 2.0 / (runs_per_replica * (double)p->num_replicas);
    p->num_runs = 0;
    for (int32_t begin = 0; begin < all;) {
        const int32_t end = end_of_run(p, begin, most);
        p->runs[p->num_runs++] = (run){
            .compute = (p->sums.compute[end] - p->sums.compute[begin]) / p->sums.compute[all],
            .read = (p->sums.read[end] - p->sums.read[begin]) / fmax(p->sums.read[all], 1e-300),
            .begin = begin,
            .end = end,
        };
        begin = end;
    }
}

/* ------------------------------------------------------------------ packing */

static int by_size(const void *a, const void *b) {
    const run *x = *(const run *const *)a, *y = *(const run *const *)b;
    const double left = x->compute + x->read, right = y->compute + y->read;
    return left > right ? -1 : left < right ? 1 : (x->begin > y->begin) - (x->begin < y->begin);
}

/* Where a run belongs among those of a replica. */
static int32_t place_in(const packing *p, int32_t replica, int32_t index) {
    int32_t low = 0, high = p->num_placed[replica];
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (p->placed[replica][middle] < index) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Tokens of a run's prefix that its replica computes and one walk through the tree would not. */
static double tokens_again(const packing *p, int32_t replica, int32_t index) {
    const run *own = &p->runs[index];
    const int32_t place = place_in(p, replica, index);
    int32_t found = 0;
    if (place > 0) {
        const run *before = &p->runs[p->placed[replica][place - 1]];
        found = raddle_blend_trie_shared_between(p->trie, before->end - 1, own->begin);
    }
    if (place < p->num_placed[replica]) {
        const run *behind = &p->runs[p->placed[replica][place]];
        const int32_t shared =
            raddle_blend_trie_shared_between(p->trie, own->end - 1, behind->begin);
        found = shared > found ? shared : found;
    }
    const int32_t wanted = raddle_blend_trie_shared_before(p->trie, own->begin);
    return wanted > found ? (double)(wanted - found) * p->store->block_size : 0;
}

static void put(packing *p, int32_t replica, int32_t index) {
    const double again = tokens_again(p, replica, index) / p->sums.tokens;
    const int32_t place = place_in(p, replica, index);
    int32_t *placed = p->placed[replica];
    memmove(placed + place + 1, placed + place,
            (size_t)(p->num_placed[replica] - place) * sizeof(int32_t));
    placed[place] = index;
    p->num_placed[replica]++;
    p->runs[index].replica = replica;
    p->compute[replica] += p->runs[index].compute + again;
    p->read[replica] += p->runs[index].read;
}

/* Returns what the busiest replica has. */
static double pack(packing *p) {
    double busiest = 0;
    for (int32_t r = 0; r < p->num_replicas; r++) {
        p->num_placed[r] = 0;
        p->compute[r] = p->read[r] = 0;
    }
    for (int32_t i = 0; i < p->num_runs; i++) {
        p->largest[i] = &p->runs[i];
    }
    qsort(p->largest, (size_t)p->num_runs, sizeof *p->largest, by_size);
    for (int32_t i = 0; i < p->num_runs; i++) {
        const int32_t index = (int32_t)(p->largest[i] - p->runs);
        const run *own = &p->runs[index];
        int32_t best = 0;
        double least = INFINITY;
        for (int32_t r = 0; r < p->num_replicas; r++) {
            const double again = tokens_again(p, r, index) / p->sums.tokens;
            const double compute = p->compute[r] + own->compute + again;
            const double read = p->read[r] + own->read;
            const double cost = fmax(compute, read) + SUM_WEIGHT * (compute + read) + again;
            if (cost < least) {
                best = r;
                least = cost;
            }
        }
        put(p, best, index);
    }
    for (int32_t r = 0; r < p->num_replicas; r++) {
        busiest = fmax(busiest, fmax(p->compute[r], p->read[r]));
    }
    return busiest;
}

static void pack_best(packing *p) {
    int32_t best = 0;
    double least = INFINITY;
    for (int32_t i = 0; i <= NUM_SIZES; i++) { /* the best again, last */
        cut_runs(p, sizes[i < NUM_SIZES ? i : best]);
        const double busiest = pack(p);
        if (busiest < least) {
            best = i;
            least = busiest;
        }
    }
    p->busiest = least;
}

/* The last runs of every replica, those that took least to place, are anyone's. */
static void give_to_all(packing *p, double tail) {
    double left = tail * 2;
    for (int32_t i = p->num_runs - 1; i >= 0 && left > 0; i--) {
        run *own = &p->runs[p->largest[i] - p->runs];
        own->replica = p->num_replicas;
        left -= own->compute + own->read;
    }
}

/* ------------------------------------------------------------------ what others call */

static void report(const packing *p, raddle_blend_shares *out) {
    int64_t blocks = 0;
    for (int32_t r = 0; r <= p->num_replicas; r++) {
        int32_t last = NONE;
        for (int32_t i = 0; i < p->num_runs; i++) {
            const run *own = &p->runs[i];
            if (own->replica == r) {
                blocks +=
                    raddle_blend_trie_shared_before(p->trie, own->begin) -
                    (last == NONE ? 0
                                  : raddle_blend_trie_shared_between(p->trie, last, own->begin));
                last = own->end - 1;
            }
        }
    }
    out->num_runs = p->num_runs;
    out->tokens_again = (double)blocks * p->store->block_size;
    out->tokens = p->sums.tokens;
    out->busiest = p->busiest;
}

static raddle_status open_packing(packing *p, const raddle_blend_cost *cost,
                                  const raddle_blend_length *lengths) {
    const size_t requests = (size_t)p->trie->num_requests, replicas = (size_t)p->num_replicas;
    /* A run has at least half of what it may have, but where one request has more. */
    const size_t by_size = 4 * (size_t)sizes[NUM_SIZES - 1] * replicas + 1;
    const size_t most_runs = by_size < requests ? by_size : requests;
    RADDLE_TRY(raddle_blend_sums_init(&p->sums, p->store, p->trie, cost, lengths));
    p->runs = raddle_alloc(requests * sizeof(run));
    p->largest = raddle_alloc(requests * sizeof(const run *));
    p->placed = raddle_alloc_zero(replicas * sizeof(int32_t *));
    p->num_placed = raddle_alloc_zero(replicas * sizeof(int32_t));
    p->compute = raddle_alloc_zero(replicas * sizeof(double));
    p->read = raddle_alloc_zero(replicas * sizeof(double));
    if (p->runs == NULL || p->largest == NULL || p->placed == NULL || p->num_placed == NULL ||
        p->compute == NULL || p->read == NULL) {
        return raddle_fail_memory(requests * sizeof(run));
    }
    for (int32_t r = 0; r < p->num_replicas; r++) {
        p->placed[r] = raddle_alloc(most_runs * sizeof(int32_t));
        if (p->placed[r] == NULL) {
            return raddle_fail_memory(most_runs * sizeof(int32_t));
        }
    }
    return RADDLE_OK;
}

static void close_packing(packing *p) {
    raddle_blend_sums_fini(&p->sums);
    for (int32_t r = 0; p->placed != NULL && r < p->num_replicas; r++) {
        raddle_free(p->placed[r]);
    }
    raddle_free(p->runs);
    raddle_free(p->largest);
    raddle_free(p->placed);
    raddle_free(p->num_placed);
    raddle_free(p->compute);
    raddle_free(p->read);
}

raddle_status raddle_blend_partition(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                     const raddle_blend_cost *cost,
                                     const raddle_blend_length *lengths, int32_t num_replicas,
                                     double tail, int32_t *out_replicas,
                                     raddle_blend_shares *out_shares) {
    RADDLE_TRY(raddle_blend_cost_check(cost));
    RADDLE_REQUIRE(num_replicas >= 1 && num_replicas <= RADDLE_BLEND_MAX_REPLICAS, RADDLE_ERR_VALUE,
                   "replicas: expected 1 to %d, got %d", (int)RADDLE_BLEND_MAX_REPLICAS,
                   (int)num_replicas);
    RADDLE_REQUIRE(tail >= 0 && tail <= 1, RADDLE_ERR_VALUE, "tail: expected 0 to 1, got %g", tail);
    packing p = {.store = store, .trie = trie, .num_replicas = num_replicas};
    *out_shares = (raddle_blend_shares){0};
    if (trie->num_requests == 0) {
        return RADDLE_OK;
    }
    const raddle_status status = open_packing(&p, cost, lengths);
    if (status == RADDLE_OK) {
        pack_best(&p);
        give_to_all(&p, tail);
        for (int32_t i = 0; i < p.num_runs; i++) {
            for (int32_t k = p.runs[i].begin; k < p.runs[i].end; k++) {
                out_replicas[trie->order[k]] = p.runs[i].replica;
            }
        }
        report(&p, out_shares);
    }
    close_packing(&p);
    return status;
}

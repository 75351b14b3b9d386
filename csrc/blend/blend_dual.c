/* blend_dual.c - the order of BlendServe (arXiv 2411.16102): requests from the densest to the least
 * dense, of which two scanners take from either end.
 *
 * The tree is cut into blocks, from the root down: a node whose prefix, times the children that would
 * compute it again, is more than a threshold stays whole; else its children are looked at with their
 * share of the threshold. Blocks are sorted by density, computing over reading, and within a block the
 * children of every node are. The threshold is the largest with which the blocks compute at most one
 * in a hundred tokens that one walk through the tree would not (the paper keeps 99 % of the sharing).
 */
#include "blend/blend.h"

#include <math.h>
#include <stdlib.h>

#include "base/alloc.h"

enum { NONE = -1, BISECTIONS = 24 };

/* Of all tokens that are computed, the share that blocks may compute more than once. */
static const double MOST_LOST = 0.01;

/* A subtree, or one request of a node's own. */
typedef struct part {
    double compute, read; /* seconds */
    int32_t node;         /* NONE: a request */
    int32_t begin, end;   /* in the tree's order */
} part;

typedef struct cut {
    const raddle_blend_store *store;
    const raddle_blend_trie *trie;
    raddle_blend_sums sums;
    part *blocks, *stack; /* [num_nodes + num_requests] */
    double *thresholds;   /* beside the stack */
    int32_t num_blocks;
} cut;

static part part_of(const cut *c, int32_t node, int32_t begin, int32_t end) {
    return (part){
        .compute = c->sums.compute[end] - c->sums.compute[begin],
        .read = c->sums.read[end] - c->sums.read[begin],
        .node = node,
        .begin = begin,
        .end = end,
    };
}

/* Densest first; of equal ones the earlier. compute / read, without dividing by 0. */
static int by_density(const void *a, const void *b) {
    const part *x = a, *y = b;
    const double left = x->compute * y->read, right = y->compute * x->read;
    return left > right ? -1 : left < right ? 1 : (x->begin > y->begin) - (x->begin < y->begin);
}

/* Puts a node's own requests and children to `to`; returns how many. */
static int32_t open_node(const cut *c, int32_t node, part *to) {
    const raddle_blend_node *nodes = c->trie->nodes, *own = &nodes[node];
    const int32_t own_end = node + 1 < own->end ? nodes[node + 1].request_begin : own->request_end;
    int32_t count = 0;
    for (int32_t k = own->request_begin; k < own_end; k++) {
        to[count++] = part_of(c, NONE, k, k + 1);
    }
    for (int32_t child = node + 1; child < own->end; child = nodes[child].end) {
        to[count++] = part_of(c, child, nodes[child].request_begin, nodes[child].request_end);
    }
    return count;
}

/* Cuts with a threshold; returns the tokens that the blocks compute and one walk would not, at most. */
static double cut_blocks(cut *c, double threshold) {
    int32_t top = 0;
    int64_t lost = 0;
    c->num_blocks = 0;
    c->stack[0] = part_of(c, 0, 0, c->trie->num_requests);
    c->thresholds[0] = threshold;
    for (top = 1; top > 0;) {
        const part p = c->stack[--top];
        const double most = c->thresholds[top];
        const double prefix =
            p.node == NONE ? 0 : (double)c->trie->nodes[p.node].depth * c->store->block_size;
        const int32_t count = p.node == NONE ? 0 : open_node(c, p.node, c->stack + top);
        if (count <= 1 || prefix * count > most) {
            c->blocks[c->num_blocks++] = p;
            lost += raddle_blend_trie_shared_before(c->trie, p.begin);
            continue;
        }
        for (int32_t i = 0; i < count; i++) {
            c->thresholds[top + i] = most / count;
        }
        top += count;
    }
    return (double)lost * c->store->block_size;
}

/* The largest threshold that loses little enough. */
static void search_threshold(cut *c) {
    double low = 0, high = log2(c->sums.tokens + 1);
    for (int32_t i = 0; i < BISECTIONS; i++) {
        const double middle = (low + high) / 2;
        if (cut_blocks(c, exp2(middle)) <= MOST_LOST * c->sums.tokens) {
            low = middle;
        } else {
            high = middle;
        }
    }
    cut_blocks(c, exp2(low));
}

/* Each node's parts by density, depth first. */
static void lay_out(cut *c, raddle_blend_plan *plan) {
    int32_t at = 0;
    qsort(c->blocks, (size_t)c->num_blocks, sizeof(part), by_density);
    for (int32_t b = 0; b < c->num_blocks; b++) {
        int32_t top = 1;
        c->stack[0] = c->blocks[b];
        while (top > 0) {
            const part p = c->stack[--top];
            if (p.node == NONE) {
                plan->order[at++] = c->trie->order[p.begin];
                continue;
            }
            const int32_t count = open_node(c, p.node, c->stack + top);
            qsort(c->stack + top, (size_t)count, sizeof(part), by_density);
            for (int32_t i = 0; i < count / 2; i++) { /* the densest is taken first */
                const part kept = c->stack[top + i];
                c->stack[top + i] = c->stack[top + count - 1 - i];
                c->stack[top + count - 1 - i] = kept;
            }
            top += count;
        }
    }
    plan->is_dual = true;
}

void raddle_blend_share_out(double density, double pool, raddle_blend_end ends[2]) {
    const double apart = ends[0].density - ends[1].density;
    const double share = apart > 0 ? (density - ends[1].density) / apart : 0.5;
    ends[0].memory = fmin(fmax(share, 0), 1) * pool;
    ends[1].memory = pool - ends[0].memory;
    for (int32_t e = 0; e < 2; e++) {
        ends[e].budget = ends[e].memory / ends[e].held * ends[e].prompt / ends[e].output;
    }
}

double raddle_blend_dual_density(const raddle_blend_store *store, const raddle_blend_cost *cost,
                                 const raddle_blend_length *lengths, int32_t request,
                                 int64_t cached) {
    const raddle_blend_length length = raddle_blend_length_of(store, lengths, request);
    const double prompt = store->requests[request].prompt_tokens;
    raddle_blend_work work = raddle_blend_expected_work(store, lengths, request, cached);
    work.reads = prompt * length.mean + length.square / 2;
    double read = 0;
    const double all = raddle_blend_plain_seconds(cost, &work, &read);
    return (all - read) / read;
}

raddle_status raddle_blend_plan_dual(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                     const raddle_blend_cost *cost,
                                     const raddle_blend_length *lengths, raddle_blend_plan *plan) {
    cut c = {.store = store, .trie = trie};
    const size_t parts = (size_t)trie->num_nodes + (size_t)trie->num_requests + 1;
    raddle_status status = raddle_blend_sums_init(&c.sums, store, trie, cost, lengths);
    c.blocks = raddle_alloc(parts * sizeof(part));
    c.stack = raddle_alloc(parts * sizeof(part));
    c.thresholds = raddle_alloc(parts * sizeof(double));
    if (status == RADDLE_OK && (c.blocks == NULL || c.stack == NULL || c.thresholds == NULL)) {
        status = raddle_fail_memory(parts * sizeof(part));
    }
    if (status == RADDLE_OK && trie->num_requests > 0) {
        search_threshold(&c);
        lay_out(&c, plan);
    }
    raddle_blend_sums_fini(&c.sums);
    raddle_free(c.blocks);
    raddle_free(c.stack);
    raddle_free(c.thresholds);
    return status;
}

/* blend_probe.c - what the scheduler's C core says of parts that Python does not see: the tree's nodes,
 * sums over them, guessed lengths, plans. Flat arrays for ctypes (tests/blend_native.py).
 */
#include <stdlib.h>

#include "blend/blend.h"

typedef struct probe {
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_cost cost;
} probe;

void probe_close(probe *p) {
    raddle_blend_trie_fini(&p->trie);
    raddle_blend_store_fini(&p->store);
    free(p);
}

/* numbers [count][5]: prompt, output, max_tokens, group, blocks. cost: fields in the order of
 * CostModel up to alpha, overhead, the rates and their tokens. NULL: refused. */
probe *probe_open(int32_t block_size, int64_t count, const int32_t *numbers, const uint64_t *ids,
                  const double *cost, int32_t num_rates) {
    probe *p = calloc(1, sizeof *p);
    raddle_status status = RADDLE_OK;
    raddle_blend_store_init(&p->store, block_size);
    for (int64_t i = 0; i < count && status == RADDLE_OK; i++) {
        const int32_t *own = numbers + 5 * i;
        const raddle_blend_request request = {
            .prompt_tokens = own[0],
            .output_tokens = own[1],
            .max_tokens = own[2],
            .group = own[3],
            .num_blocks = own[4],
            .weight = 1,
        };
        status = raddle_blend_store_add(&p->store, &request, ids);
        ids += own[4];
    }
    p->cost = (raddle_blend_cost){
        .flops_per_token = cost[0],
        .flops_per_score = cost[1],
        .kv_bytes_per_token = cost[2],
        .weight_bytes = cost[3],
        .attention_flops_rate = cost[4],
        .read_rate = cost[5],
        .alpha = cost[6],
        .overhead = cost[7],
        .num_rates = num_rates,
    };
    for (int32_t i = 0; i < num_rates; i++) {
        p->cost.gemm_rate[i] = cost[8 + i];
        p->cost.rate_tokens[i] = cost[8 + num_rates + i];
    }
    if (status != RADDLE_OK || raddle_blend_trie_build(&p->store, &p->trie) != RADDLE_OK) {
        probe_close(p);
        return NULL;
    }
    return p;
}

int32_t probe_num_nodes(const probe *p) {
    return p->trie.num_nodes;
}

/* nodes [num_nodes][5]: parent, end, depth, request_begin, request_end. */
void probe_tree(const probe *p, int32_t *nodes, int32_t *order, int32_t *shared_before,
                int32_t *shared) {
    for (int32_t i = 0; i < p->trie.num_nodes; i++) {
        const raddle_blend_node *node = &p->trie.nodes[i];
        const int32_t row[5] = {node->parent, node->end, node->depth, node->request_begin,
                                node->request_end};
        for (int32_t k = 0; k < 5; k++) {
            nodes[5 * i + k] = row[k];
        }
    }
    for (int32_t k = 0; k < p->trie.num_requests; k++) {
        order[k] = p->trie.order[k];
        shared_before[k] = raddle_blend_trie_shared_before(&p->trie, k);
        shared[k] = raddle_blend_trie_shared(&p->trie, k);
    }
}

/* so_far may be NULL; lengths [count][3]: mean, square, room. */
int32_t probe_guess(const probe *p, const int32_t *seen, const int32_t *so_far, double *lengths) {
    const size_t count = (size_t)p->store.num_requests;
    raddle_blend_length *found = calloc(count + 1, sizeof *found);
    const raddle_status status =
        raddle_blend_lengths_guess(&p->store, &p->trie, seen, so_far, found);
    for (size_t i = 0; i < count; i++) {
        lengths[3 * i] = found[i].mean;
        lengths[3 * i + 1] = found[i].square;
        lengths[3 * i + 2] = found[i].room;
    }
    free(found);
    return status;
}

/* What is thought of lengths as probe_guess has it; NULL: they are known. The caller frees it. */
static raddle_blend_length *lengths_from(const probe *p, const double *lengths) {
    if (lengths == NULL) {
        return NULL;
    }
    raddle_blend_length *found = calloc((size_t)p->store.num_requests + 1, sizeof *found);
    for (int64_t i = 0; i < p->store.num_requests; i++) {
        found[i] = (raddle_blend_length){.mean = (float)lengths[3 * i],
                                         .square = (float)lengths[3 * i + 1],
                                         .room = (int32_t)lengths[3 * i + 2]};
    }
    return found;
}

/* compute, read [count + 1]. Returns the tokens. */
double probe_sums(const probe *p, const double *lengths, double *compute, double *read) {
    raddle_blend_sums sums;
    raddle_blend_length *own = lengths_from(p, lengths);
    double tokens = -1;
    if (raddle_blend_sums_init(&sums, &p->store, &p->trie, &p->cost, own) == RADDLE_OK) {
        for (int32_t k = 0; k <= p->trie.num_requests; k++) {
            compute[k] = sums.compute[k];
            read[k] = sums.read[k];
        }
        tokens = sums.tokens;
    }
    raddle_blend_sums_fini(&sums);
    free(own);
    return tokens;
}

double probe_density(const probe *p, const double *lengths, int32_t request, int64_t cached) {
    raddle_blend_length *own = lengths_from(p, lengths);
    const double density = raddle_blend_dual_density(&p->store, &p->cost, own, request, cached);
    free(own);
    return density;
}

/* work [3]: tokens, scores, reads. Returns the fewest steps. */
double probe_survey(const probe *p, int64_t pool_tokens, int32_t step_tokens, double *work,
                    double *bound) {
    const raddle_blend_limits limits = {.pool_tokens = pool_tokens, .step_tokens = step_tokens};
    raddle_blend_work found;
    const double least = raddle_blend_survey(&p->store, &p->trie, NULL, &limits, &found);
    work[0] = found.tokens;
    work[1] = found.scores;
    work[2] = found.reads;
    *bound = raddle_blend_bound_seconds(&p->cost, &found, least, NULL);
    return least;
}

/* stream_end [32]; returns how many streams there are, -1: refused. */
int32_t probe_plan(const probe *p, const char *policy, int64_t pool_tokens, int32_t step_tokens,
                   const double *lengths, int32_t *order, int32_t *stream_end) {
    const raddle_blend_limits limits = {.pool_tokens = pool_tokens, .step_tokens = step_tokens};
    raddle_blend_policy number;
    raddle_blend_plan plan;
    raddle_blend_length *own = lengths_from(p, lengths);
    int32_t streams = -1;
    if (raddle_blend_policy_find(policy, &number) == RADDLE_OK &&
        raddle_blend_plan_make(&p->store, &p->trie, &p->cost, &limits, number, own, 0, &plan) ==
            RADDLE_OK) {
        for (int32_t k = 0; k < p->trie.num_requests; k++) {
            order[k] = plan.order[k];
        }
        for (int32_t i = 0; i < plan.num_streams; i++) {
            stream_end[i] = plan.stream_end[i];
        }
        streams = plan.num_streams;
        raddle_blend_plan_fini(&plan);
    }
    free(own);
    return streams;
}

/* ends [2][4]: density, prompt, output, held; shares [2][2]: memory, budget. */
void probe_share_out(double density, double pool, const double *ends, double *shares) {
    raddle_blend_end own[2];
    for (int32_t e = 0; e < 2; e++) {
        own[e] = (raddle_blend_end){.density = ends[4 * e],
                                    .prompt = ends[4 * e + 1],
                                    .output = ends[4 * e + 2],
                                    .held = ends[4 * e + 3]};
    }
    raddle_blend_share_out(density, pool, own);
    for (int32_t e = 0; e < 2; e++) {
        shares[2 * e] = own[e].memory;
        shares[2 * e + 1] = own[e].budget;
    }
}

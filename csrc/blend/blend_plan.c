/* blend_plan.c - the policies that need no more than an order, and the door to those that do. */
#include "blend/blend.h"

#include <stdio.h>
#include <string.h>

#include "base/alloc.h"

static const char *const policy_names[RADDLE_BLEND_NUM_POLICIES] = {
    [RADDLE_BLEND_FCFS] = "fcfs", [RADDLE_BLEND_RANDOM] = "random", [RADDLE_BLEND_LPM] = "lpm",
    [RADDLE_BLEND_DFS] = "dfs",   [RADDLE_BLEND_PACED] = "paced",
};

const char *raddle_blend_policy_name(raddle_blend_policy policy) {
    return policy_names[policy];
}

raddle_status raddle_blend_policy_find(const char *name, raddle_blend_policy *out_policy) {
    char list[128] = "";
    for (int i = 0; i < RADDLE_BLEND_NUM_POLICIES; i++) {
        if (strcmp(policy_names[i], name) == 0) {
            *out_policy = (raddle_blend_policy)i;
            return RADDLE_OK;
        }
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "",
                 policy_names[i]);
    }
    return raddle_fail(RADDLE_ERR_VALUE, "policy: expected one of %s, got %s", list, name);
}

uint64_t raddle_blend_random(uint64_t *state) { /* splitmix64 (Steele, Lea and Flood 2014) */
    *state += 0x9E3779B97F4A7C15u;
    uint64_t x = *state;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static void shuffle(int32_t *order, int32_t count, uint64_t seed) {
    for (int32_t i = count - 1; i > 0; i--) {
        const int32_t other = (int32_t)(raddle_blend_random(&seed) % (uint64_t)(i + 1));
        const int32_t kept = order[i];
        order[i] = order[other];
        order[other] = kept;
    }
}

double raddle_blend_plain_seconds(const raddle_blend_cost *cost, const raddle_blend_work *work,
                                  double *out_read) {
    const double read = work->reads * cost->kv_bytes_per_token / cost->read_rate;
    if (out_read != NULL) {
        *out_read = read;
    }
    return work->tokens * cost->flops_per_token / cost->gemm_rate[cost->num_rates - 1] +
           work->scores * cost->flops_per_score / cost->attention_flops_rate + read;
}

raddle_status raddle_blend_plan_make(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                     const raddle_blend_cost *cost,
                                     const raddle_blend_limits *limits, raddle_blend_policy policy,
                                     const raddle_blend_length *lengths, uint64_t seed,
                                     raddle_blend_plan *out_plan) {
    RADDLE_TRY(raddle_blend_cost_check(cost));
    const int32_t count = trie->num_requests;
    raddle_blend_plan plan = {.num_streams = 1,
                              .window = policy == RADDLE_BLEND_LPM ? RADDLE_BLEND_LPM_WINDOW : 1,
                              .stream_end = {count},
                              .stream_seconds = {1}};
    const size_t bytes = (size_t)count * sizeof(int32_t);
    plan.order = raddle_alloc(bytes);
    if (plan.order == NULL) {
        return raddle_fail_memory(bytes);
    }
    raddle_status status = RADDLE_OK;
    for (int32_t i = 0; i < count; i++) {
        plan.order[i] = policy == RADDLE_BLEND_DFS ? trie->order[i] : i;
    }
    if (policy == RADDLE_BLEND_RANDOM) {
        shuffle(plan.order, count, seed);
    } else if (policy == RADDLE_BLEND_PACED) {
        status = raddle_blend_plan_strata(store, trie, cost, limits, lengths, &plan);
    }
    if (status != RADDLE_OK) {
        raddle_blend_plan_fini(&plan);
        return status;
    }
    *out_plan = plan;
    return RADDLE_OK;
}

void raddle_blend_plan_fini(raddle_blend_plan *plan) {
    raddle_free(plan->order);
    memset(plan, 0, sizeof *plan);
}

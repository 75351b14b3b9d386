/* blend_plan.c - the policies that need no more than an order, and the door to those that do. */
#include "blend/blend.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"

/* Of 1,000 random mixes the 34 in which strata take over 1.01 times as long as one walk promise at most
 * 1.13, but for one; a run of so many requests is simulated in 0.01 s. */
enum { ASKED_ALWAYS = 10000 };
static const double PROMISES_ENOUGH = 1.15;
/* With outputs that are guessed, strata have to be better by so much. */
static const double LESS_SURE = 1.03;

static const char *const policy_names[RADDLE_BLEND_NUM_POLICIES] = {
    [RADDLE_BLEND_FCFS] = "fcfs",       [RADDLE_BLEND_RANDOM] = "random",
    [RADDLE_BLEND_LPM] = "lpm",         [RADDLE_BLEND_DFS] = "dfs",
    [RADDLE_BLEND_BALANCE] = "balance", [RADDLE_BLEND_BLEND] = "blend",
    [RADDLE_BLEND_PACED] = "paced",
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

raddle_status raddle_blend_sums_init(raddle_blend_sums *sums, const raddle_blend_store *store,
                                     const raddle_blend_trie *trie, const raddle_blend_cost *cost,
                                     const raddle_blend_length *lengths) {
    const size_t bytes = ((size_t)trie->num_requests + 1) * sizeof(double);
    *sums = (raddle_blend_sums){.compute = raddle_alloc(bytes), .read = raddle_alloc(bytes)};
    if (sums->compute == NULL || sums->read == NULL) {
        return raddle_fail_memory(2 * bytes);
    }
    sums->compute[0] = sums->read[0] = 0;
    for (int32_t k = 0; k < trie->num_requests; k++) {
        const int64_t cached =
            (int64_t)raddle_blend_trie_shared_before(trie, k) * store->block_size;
        const raddle_blend_work work =
            raddle_blend_expected_work(store, lengths, trie->order[k], cached);
        double read = 0;
        const double all = raddle_blend_plain_seconds(cost, &work, &read);
        sums->compute[k + 1] = sums->compute[k] + all - read;
        sums->read[k + 1] = sums->read[k] + read;
        sums->tokens += work.tokens;
    }
    return RADDLE_OK;
}

void raddle_blend_sums_fini(raddle_blend_sums *sums) {
    raddle_free(sums->compute);
    raddle_free(sums->read);
    memset(sums, 0, sizeof *sums);
}

static raddle_status make_order(const raddle_blend_trie *trie, raddle_blend_policy policy,
                                uint64_t seed, raddle_blend_plan *out_plan) {
    const int32_t count = trie->num_requests;
    const size_t bytes = (size_t)count * sizeof(int32_t);
    *out_plan =
        (raddle_blend_plan){.num_streams = 1,
                            .window = policy == RADDLE_BLEND_LPM ? RADDLE_BLEND_LPM_WINDOW : 1,
                            .stream_end = {count},
                            .stream_seconds = {1}};
    out_plan->order = raddle_alloc(bytes);
    if (out_plan->order == NULL) {
        return raddle_fail_memory(bytes);
    }
    for (int32_t i = 0; i < count; i++) {
        out_plan->order[i] = policy == RADDLE_BLEND_DFS ? trie->order[i] : i;
    }
    if (policy == RADDLE_BLEND_RANDOM) {
        shuffle(out_plan->order, count, seed);
    }
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ the better of two */

/* What a plan is thought to take: outputs are one standard deviation longer and shorter than thought,
 * by turns, which keeps both moments; as far as the pool holds them, as the true ones must. */
static raddle_status simulate_belief(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                     const raddle_blend_cost *cost,
                                     const raddle_blend_limits *limits,
                                     const raddle_blend_plan *plan,
                                     const raddle_blend_length *lengths, double *out_seconds) {
    raddle_blend_store believed = *store;
    raddle_blend_result result;
    const size_t bytes = (size_t)store->num_requests * sizeof(raddle_blend_request);
    believed.requests = raddle_alloc(bytes);
    if (believed.requests == NULL) {
        return raddle_fail_memory(bytes);
    }
    memcpy(believed.requests, store->requests, bytes);
    for (int64_t i = 0; lengths != NULL && i < store->num_requests; i++) {
        const double mean = lengths[i].mean;
        const double spread = sqrt(fmax(lengths[i].square - mean * mean, 0));
        const double output = i % 2 == 0 ? mean - spread : mean + spread;
        const double room = (double)(limits->pool_tokens - store->requests[i].prompt_tokens);
        const double most = fmin(store->requests[i].max_tokens, room);
        believed.requests[i].output_tokens = (int32_t)fmax(fmin(output + 0.5, most), 1);
    }
    const raddle_status status =
        raddle_blend_simulate(&believed, trie, cost, limits, plan, NULL, &result, NULL);
    raddle_free(believed.requests);
    *out_seconds = status == RADDLE_OK ? result.seconds : 0;
    return status;
}

/* Where strata promise little, or the question costs little, both are asked what they would take. */
static raddle_status
prefer_depth_first(const raddle_blend_store *store, const raddle_blend_trie *trie,
                   const raddle_blend_cost *cost, const raddle_blend_limits *limits,
                   const raddle_blend_length *lengths, raddle_blend_plan *plan) {
    double seconds = 0, depth_first = 0;
    raddle_blend_plan other;
    if (trie->num_requests > ASKED_ALWAYS && plan->gain > PROMISES_ENOUGH) {
        return RADDLE_OK;
    }
    RADDLE_TRY(make_order(trie, RADDLE_BLEND_DFS, 0, &other));
    raddle_status status = simulate_belief(store, trie, cost, limits, plan, lengths, &seconds);
    if (status == RADDLE_OK) {
        status = simulate_belief(store, trie, cost, limits, &other, lengths, &depth_first);
    }
    if (status == RADDLE_OK && depth_first < seconds * (lengths == NULL ? 1 : LESS_SURE)) {
        raddle_blend_plan_fini(plan);
        *plan = other;
        return RADDLE_OK;
    }
    raddle_blend_plan_fini(&other);
    return status;
}

raddle_status raddle_blend_plan_make(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                     const raddle_blend_cost *cost,
                                     const raddle_blend_limits *limits, raddle_blend_policy policy,
                                     const raddle_blend_length *lengths, uint64_t seed,
                                     raddle_blend_plan *out_plan) {
    raddle_blend_plan plan;
    RADDLE_TRY(raddle_blend_cost_check(cost));
    RADDLE_TRY(make_order(trie, policy, seed, &plan));
    raddle_status status = RADDLE_OK;
    if (policy == RADDLE_BLEND_BALANCE) {
        status = raddle_blend_plan_balance(store, cost, lengths, &plan);
    } else if (policy == RADDLE_BLEND_BLEND) {
        status = raddle_blend_plan_dual(store, trie, cost, lengths, &plan);
    } else if (policy == RADDLE_BLEND_PACED) {
        status = raddle_blend_plan_strata(store, trie, cost, limits, lengths, &plan);
        if (status == RADDLE_OK && trie->num_requests > 0) {
            status = prefer_depth_first(store, trie, cost, limits, lengths, &plan);
        }
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

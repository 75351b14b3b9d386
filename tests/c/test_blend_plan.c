// needs: base/status.c base/alloc.c base/hash.c blend/*.c
/* test_blend_plan.c - strata lose next to nothing of what one walk shares, by a tree of the test's own;
 * `paced` is the better of strata and one walk; policies are found by name. */
#include <math.h>

#include "check.h"
#include "random.h"

#include "base/alloc.h"
#include "blend_memory.h"

enum { BLOCK = 8 };

/* A mix of families: each has a prefix that it shares, of branches that share more, and prompts and
 * outputs of like length, so that densities differ by family, branch or request. */
static void fill(raddle_blend_store *store, int32_t requests) {
    const int32_t families = 1 + random_below(6), branches = 1 + random_below(12);
    const int32_t spread = random_below(3);
    int32_t prefix[6], own[6], output[6];
    raddle_blend_store_init(store, BLOCK);
    for (int32_t f = 0; f < families; f++) {
        prefix[f] = random_below(random_below(2) ? 24 : 4);
        own[f] = 1 + random_below(random_below(2) ? 400 : 20);
        output[f] = 1 + random_below(random_below(2) ? 300 : 12);
    }
    for (int32_t i = 0; i < requests; i++) {
        const int32_t f = random_below(families), branch = random_below(branches);
        const int32_t shared = prefix[f] + random_below(4), count = shared + random_below(6);
        uint64_t blocks[40];
        for (int32_t k = 0; k < count; k++) {
            blocks[k] = (uint64_t)(k < prefix[f] / 2 ? f
                                   : k < shared      ? 100 + f * 100 + branch
                                                     : 10000 + i * 40 + k);
        }
        const int32_t tokens = spread == 0   ? output[f]
                               : spread == 1 ? 1 + output[(f + branch) % families]
                                             : 1 + random_below(2 * output[f]);
        const raddle_blend_request request = {
            .num_blocks = count,
            .prompt_tokens = count * BLOCK + 1 + random_below(own[f]),
            .output_tokens = tokens,
            .max_tokens = tokens,
            .weight = 1.0f,
        };
        CHECK_OK(raddle_blend_store_add(store, &request, blocks));
    }
}

/* Each stream, or all as one, in a memory that forgets nothing of it: tokens that are computed. */
static int64_t count_computed(const raddle_blend_store *store, const raddle_blend_plan *plan) {
    int64_t computed = 0;
    for (int32_t i = 0; i < plan->num_streams; i++) {
        memory m;
        const int32_t begin = i == 0 ? 0 : plan->stream_end[i - 1];
        memory_open(&m, store, plan->order, begin, plan->stream_end[i], 0);
        computed += (int64_t)(m.num_blocks - 1) * BLOCK;
        memory_close(&m);
    }
    for (int64_t i = 0; i < store->num_requests; i++) {
        const raddle_blend_request *request = &store->requests[i];
        computed += request->prompt_tokens - request->num_blocks * BLOCK;
        computed += request->output_tokens - 1;
    }
    return computed;
}

/* Blocks that a request does not find where the one before it in its stream was: as many as are new
 * to the stream, if that walks depth first. */
static int64_t count_computed_in_order(const raddle_blend_store *store,
                                       const raddle_blend_plan *plan) {
    int64_t blocks = 0;
    for (int32_t i = 0, k = 0; i < plan->num_streams; i++) {
        for (const int32_t begin = k; k < plan->stream_end[i]; k++) {
            const raddle_blend_request *own = &store->requests[plan->order[k]];
            const raddle_blend_request *before =
                k == begin ? NULL : &store->requests[plan->order[k - 1]];
            int32_t equal = 0;
            while (before != NULL && equal < own->num_blocks && equal < before->num_blocks &&
                   store->blocks[own->first_block + equal] ==
                       store->blocks[before->first_block + equal]) {
                equal++;
            }
            blocks += own->num_blocks - equal;
        }
    }
    return blocks * BLOCK;
}

typedef struct mix {
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_cost cost;
    raddle_blend_limits limits;
    raddle_blend_plan walk, strata;
} mix;

static void open_mix(mix *m, int32_t requests) {
    fill(&m->store, requests);
    CHECK_OK(raddle_blend_trie_build(&m->store, &m->trie));
    m->cost = memory_cost(0.01 * random_below(101));
    m->limits = (raddle_blend_limits){
        .pool_tokens = 4000 << random_below(6),
        .step_tokens = 64 << random_below(4),
    };
    CHECK_OK(raddle_blend_plan_make(&m->store, &m->trie, &m->cost, &m->limits, RADDLE_BLEND_DFS,
                                    NULL, 0, &m->walk));
    CHECK_OK(raddle_blend_plan_make(&m->store, &m->trie, &m->cost, &m->limits, RADDLE_BLEND_DFS,
                                    NULL, 0, &m->strata));
    CHECK_OK(raddle_blend_plan_strata(&m->store, &m->trie, &m->cost, &m->limits, NULL, &m->strata));
}

static void close_mix(mix *m) {
    raddle_blend_plan_fini(&m->walk);
    raddle_blend_plan_fini(&m->strata);
    raddle_blend_trie_fini(&m->trie);
    raddle_blend_store_fini(&m->store);
}

static void test_strata_lose_little(void) {
    int32_t times_many = 0, times_lossy = 0;
    for (int round = 0; round < 120; round++) {
        mix m;
        open_mix(&m, 50 + random_below(600));
        const int64_t one = count_computed(&m.store, &m.walk);
        const int64_t many = count_computed(&m.store, &m.strata);
        CHECK(many >= one && (double)(many - one) <= 0.005 * (double)one);
        const int64_t own = one - m.trie.distinct_blocks * BLOCK; /* that nothing shares */
        CHECK_INT(count_computed_in_order(&m.store, &m.walk), one - own);
        CHECK_INT(count_computed_in_order(&m.store, &m.strata), many - own);
        CHECK(m.strata.is_paced && m.strata.num_streams <= RADDLE_BLEND_MAX_STREAMS);
        times_many += m.strata.num_streams > 1;
        times_lossy += many > one;
        close_mix(&m);
    }
    CHECK(times_many > 20 && times_lossy > 8); /* not for want of strata */
}

static double simulate(const mix *m, const raddle_blend_plan *plan) {
    raddle_blend_result result = {0};
    CHECK_OK(raddle_blend_simulate(&m->store, &m->trie, &m->cost, &m->limits, plan, NULL, &result,
                                   NULL));
    return result.seconds;
}

static bool is_same_plan(const raddle_blend_plan *a, const raddle_blend_plan *b, int64_t count) {
    return a->num_streams == b->num_streams && a->is_paced == b->is_paced &&
           memcmp(a->stream_end, b->stream_end, (size_t)a->num_streams * sizeof *a->stream_end) ==
               0 &&
           memcmp(a->order, b->order, (size_t)count * sizeof *a->order) == 0;
}

/* With outputs that are known, and with ones that are guessed, and guessed right: strata then have to
 * be better by a few percent. */
static void test_paced_is_the_better_of_two(void) {
    int32_t walks = 0, strata = 0, doubts = 0;
    for (int round = 0; round < 120; round++) {
        mix m;
        raddle_blend_plan plan = {0}, guessed = {0};
        static raddle_blend_length lengths[300];
        open_mix(&m, 40 + random_below(250));
        for (int64_t i = 0; i < m.store.num_requests; i++) {
            lengths[i] = raddle_blend_length_known(m.store.requests[i].output_tokens);
        }
        CHECK_OK(raddle_blend_plan_make(&m.store, &m.trie, &m.cost, &m.limits, RADDLE_BLEND_PACED,
                                        NULL, 0, &plan));
        CHECK_OK(raddle_blend_plan_make(&m.store, &m.trie, &m.cost, &m.limits, RADDLE_BLEND_PACED,
                                        lengths, 0, &guessed));
        const double one = simulate(&m, &m.walk), many = simulate(&m, &m.strata);
        const bool is_walk = one < many, is_doubtful = one < 1.02 * many;
        CHECK(is_same_plan(&plan, is_walk ? &m.walk : &m.strata, m.store.num_requests));
        CHECK(simulate(&m, &plan) == (is_walk ? one : many));
        if (is_walk) {
            CHECK_INT(plan.num_streams, 1);
        }
        if (is_doubtful || one > 1.04 * many) {
            CHECK(is_same_plan(&guessed, is_doubtful ? &m.walk : &m.strata, m.store.num_requests));
        }
        walks += is_walk && m.strata.num_streams > 1;
        strata += !is_walk && m.strata.num_streams > 1;
        doubts += is_doubtful && !is_walk && m.strata.num_streams > 1;
        raddle_blend_plan_fini(&plan);
        raddle_blend_plan_fini(&guessed);
        close_mix(&m);
    }
    CHECK(walks > 3 && strata > 10 && doubts > 3);
}

static void test_policies_by_name(void) {
    char message[256] = "policy: expected one of ";
    for (int i = 0; i < RADDLE_BLEND_NUM_POLICIES; i++) {
        const char *name = raddle_blend_policy_name((raddle_blend_policy)i);
        raddle_blend_policy policy = RADDLE_BLEND_NUM_POLICIES;
        CHECK_OK(raddle_blend_policy_find(name, &policy));
        CHECK_INT(policy, i);
        strcat(message, i > 0 ? ", " : "");
        strcat(message, name);
    }
    static const char *const unknown[] = {"fastest", "", "DFS", "dfs ", "df", "pacedd"};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        char whole[300];
        raddle_blend_policy policy = RADDLE_BLEND_LPM;
        snprintf(whole, sizeof whole, "%s, got %s", message, unknown[i]);
        CHECK_FAILS(raddle_blend_policy_find(unknown[i], &policy), RADDLE_ERR_VALUE, whole);
        CHECK_INT(policy, RADDLE_BLEND_LPM); /* untouched */
    }
    static const char *const names[] = {"fcfs",    "random", "lpm",  "dfs",
                                        "balance", "blend",  "paced"};
    CHECK_INT(sizeof names / sizeof *names, RADDLE_BLEND_NUM_POLICIES);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        CHECK_TEXT(raddle_blend_policy_name((raddle_blend_policy)i), names[i]);
    }
}

int main(void) {
    random_state = 9;
    test_strata_lose_little();
    test_paced_is_the_better_of_two();
    test_policies_by_name();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

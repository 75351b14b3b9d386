// needs: base/status.c base/alloc.c base/hash.c blend/*.c
/* test_blend_dual.c - the paper's worked example of the memory partition, and the orders of `blend`
 * and `balance` on trees whose right answer can be seen. */
#include "check.h"
#include "random.h"

#include <math.h>

#include "base/alloc.h"
#include "blend/blend.h"

enum { BLOCK = 4 };

static const raddle_blend_cost unit_cost = {
    .flops_per_token = 1,
    .flops_per_score = 1,
    .kv_bytes_per_token = 1,
    .weight_bytes = 1,
    .attention_flops_rate = 1e9, /* scores cost nothing here */
    .read_rate = 1,
    .alpha = 0.5,
    .num_rates = 1,
    .rate_tokens = {1},
    .gemm_rate = {1},
};

/* BlendServe, figure 6: 60 GB at root density 1.27, ends of 3.73 and 0.096: 19.3 and 40.7. */
static void test_partition_of_the_paper(void) {
    raddle_blend_end ends[2] = {
        {.density = 3.73, .prompt = 100, .output = 10, .held = 105},
        {.density = 0.096, .prompt = 50, .output = 1000, .held = 550},
    };
    raddle_blend_share_out(1.27, 60, ends);
    CHECK(fabs(ends[0].memory - 19.3) < 0.1 && fabs(ends[1].memory - 40.7) < 0.1);
    CHECK(fabs(ends[0].memory * 3.73 + ends[1].memory * 0.096 - 60 * 1.27) < 1e-9);
    CHECK(fabs(ends[0].budget - ends[0].memory / 105 * 10) < 1e-9);
    CHECK(fabs(ends[1].budget - ends[1].memory / 550 * 0.05) < 1e-9);
    raddle_blend_share_out(5, 60, ends); /* denser than both: all to the dense one */
    CHECK(ends[0].memory == 60 && ends[1].memory == 0 && ends[1].budget == 0);
    raddle_blend_share_out(0.01, 60, ends);
    CHECK(ends[0].memory == 0 && ends[1].memory == 60);
    ends[1].density = 3.73; /* the ends have met: half each */
    raddle_blend_share_out(1, 60, ends);
    CHECK(ends[0].memory == 30 && ends[1].memory == 30);
}

/* Of a request, by hand: p + d - 1 tokens computed, p d + d^2 / 2 read. */
static void test_density(void) {
    raddle_blend_store store;
    raddle_blend_store_init(&store, BLOCK);
    const raddle_blend_request request = {
        .prompt_tokens = 100, .output_tokens = 10, .max_tokens = 10, .weight = 1.0f};
    CHECK_OK(raddle_blend_store_add(&store, &request, NULL));
    const double whole = raddle_blend_dual_density(&store, &unit_cost, NULL, 0, 0);
    const double rest = raddle_blend_dual_density(&store, &unit_cost, NULL, 0, 60);
    CHECK(fabs(whole - 109.0 / 1050) < 1e-4 && fabs(rest - 49.0 / 1050) < 1e-4);
    raddle_blend_store_fini(&store);
}

static void add(raddle_blend_store *store, uint64_t family, int32_t own, int32_t output) {
    uint64_t blocks[8];
    for (int32_t k = 0; k < 8; k++) {
        blocks[k] = k < 6 ? family * 100 + (uint64_t)k : 1000000 + (uint64_t)store->num_requests;
    }
    const raddle_blend_request request = {.num_blocks = 7,
                                          .prompt_tokens = 7 * BLOCK + own,
                                          .output_tokens = output,
                                          .max_tokens = output,
                                          .weight = 1.0f};
    CHECK_OK(raddle_blend_store_add(store, &request, blocks));
}

/* Tokens over reads of a request whose prefix is there. */
static double density(const raddle_blend_store *store, int32_t request) {
    const raddle_blend_work work = raddle_blend_expected_work(store, NULL, request, 6 * BLOCK);
    return work.tokens / work.reads;
}

/* Three families that share a long prefix; the dense ones lie between others in the file. */
static void test_order_of_two_ends(void) {
    enum { EACH = 60 };
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_plan plan;
    const raddle_blend_limits limits = {.pool_tokens = 20000, .step_tokens = 256};
    const int32_t outputs[3] = {20, 2, 200};
    raddle_blend_store_init(&store, BLOCK);
    for (int32_t i = 0; i < 3 * EACH; i++) {
        add(&store, (uint64_t)(i % 3), i % 5, outputs[i % 3] + i / 3 % 4);
    }
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    CHECK_OK(raddle_blend_plan_make(&store, &trie, &unit_cost, &limits, RADDLE_BLEND_BLEND, NULL, 0,
                                    &plan));
    CHECK(plan.is_dual && !plan.is_paced && plan.num_streams == 1);
    for (int32_t i = 0; i < 3 * EACH; i++) { /* family 1, then 0, then 2, each in one piece */
        CHECK_INT(plan.order[i] % 3, i < EACH ? 1 : i < 2 * EACH ? 0 : 2);
        /* And within one, the denser first; the first that came computes the prefix besides. */
        if (i % EACH > 0 && plan.order[i - 1] >= 3 && plan.order[i] >= 3) {
            CHECK(density(&store, plan.order[i - 1]) >= density(&store, plan.order[i]) - 1e-12);
        }
    }
    raddle_blend_plan_fini(&plan);
    CHECK_OK(raddle_blend_plan_make(&store, &trie, &unit_cost, &limits, RADDLE_BLEND_BALANCE, NULL,
                                    0, &plan));
    CHECK(!plan.is_paced && plan.num_streams > 8 &&
          plan.stream_end[plan.num_streams - 1] == 3 * EACH);
    double least = INFINITY;
    for (int32_t i = 0, at = 0; i < plan.num_streams; i++) { /* each as dense as the one before */
        double most = 0, next = INFINITY;
        for (int32_t begin = at; at < plan.stream_end[i]; at++) {
            const raddle_blend_work work =
                raddle_blend_expected_work(&store, NULL, plan.order[at], 0);
            most = fmax(most, work.tokens / work.reads);
            next = fmin(next, work.tokens / work.reads);
            CHECK(at == begin || plan.order[at - 1] < plan.order[at]); /* as they came */
        }
        CHECK(most <= least * (1 + 1e-6));
        least = next;
    }
    raddle_blend_plan_fini(&plan);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

/* Blocks compute at most one token in a hundred that a walk through the tree would not. */
static void test_cuts_keep_what_is_shared(void) {
    for (uint64_t seed = 1; seed <= 20; seed++) {
        raddle_blend_store store;
        raddle_blend_trie trie;
        raddle_blend_plan plan;
        raddle_blend_sums sums;
        const raddle_blend_limits limits = {.pool_tokens = 100000, .step_tokens = 256};
        random_state = seed;
        raddle_blend_store_init(&store, BLOCK);
        for (int32_t i = 0; i < 300; i++) {
            add(&store, (uint64_t)random_below(1 + (int32_t)seed * 3), random_below(9),
                1 + random_below(random_below(2) ? 5 : 300));
        }
        CHECK_OK(raddle_blend_trie_build(&store, &trie));
        CHECK_OK(raddle_blend_sums_init(&sums, &store, &trie, &unit_cost, NULL));
        CHECK_OK(raddle_blend_plan_make(&store, &trie, &unit_cost, &limits, RADDLE_BLEND_BLEND,
                                        NULL, 0, &plan));
        int64_t again =
            -trie.distinct_blocks; /* blocks that neighbours in the order do not share */
        for (int32_t i = 0; i < 300; i++) {
            const raddle_blend_request *r = &store.requests[plan.order[i]];
            const raddle_blend_request *before = &store.requests[plan.order[i > 0 ? i - 1 : 0]];
            int32_t shared = 0;
            while (i > 0 && shared < 7 &&
                   store.blocks[r->first_block + shared] ==
                       store.blocks[before->first_block + shared]) {
                shared++;
            }
            again += 7 - shared;
        }
        CHECK(again >= 0 && (double)again * BLOCK <= 0.01 * sums.tokens);
        raddle_blend_sums_fini(&sums);
        raddle_blend_plan_fini(&plan);
        raddle_blend_trie_fini(&trie);
        raddle_blend_store_fini(&store);
    }
}

int main(void) {
    test_partition_of_the_paper();
    test_density();
    test_order_of_two_ends();
    test_cuts_keep_what_is_shared();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

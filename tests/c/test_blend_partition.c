// needs: base/status.c base/alloc.c base/hash.c blend/*.c
/* test_blend_partition.c - requests for several replicas: each once, the work even, prefixes whole. */
#include "check.h"
#include "random.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "blend/blend.h"

enum { BLOCK = 4, MOST = 5000 };

static const raddle_blend_cost unit_cost = {
    .flops_per_token = 1,
    .kv_bytes_per_token = 1,
    .weight_bytes = 1,
    .attention_flops_rate = 1,
    .read_rate = 100,
    .alpha = 0.5,
    .num_rates = 1,
    .rate_tokens = {1},
    .gemm_rate = {1},
};

/* Families of ten share 20 blocks, all of a trunk the first 3; some requests share nothing. */
static void fill(raddle_blend_store *store, int32_t count) {
    raddle_blend_store_init(store, BLOCK);
    for (int32_t i = 0; i < count; i++) {
        uint64_t blocks[24];
        const uint64_t family = (uint64_t)random_below(count / 10 + 1);
        const int32_t num_blocks = random_below(8) == 0 ? random_below(3) : 24;
        for (int32_t k = 0; k < num_blocks; k++) {
            blocks[k] = num_blocks < 24 ? 1 + (uint64_t)i * 64 + (uint64_t)k
                        : k < 3         ? (uint64_t)1 << 40 | (family % 3)
                        : k < 20        ? (uint64_t)1 << 41 | family
                                        : (uint64_t)1 << 42 | (uint64_t)i;
        }
        const int32_t output = 1 + random_below(random_below(2) ? 4 : 200);
        const raddle_blend_request request = {.num_blocks = num_blocks,
                                              .prompt_tokens = num_blocks * BLOCK + 1,
                                              .output_tokens = output,
                                              .max_tokens = output,
                                              .weight = 1.0f};
        CHECK_OK(raddle_blend_store_add(store, &request, blocks));
    }
}

/* Tokens that replicas compute when each walks through its own tree, and their work. */
static double walk(const raddle_blend_store *store, const raddle_blend_trie *trie,
                   const int32_t *replicas, int32_t replica, double *out_busy) {
    double tokens = 0, reads = 0;
    int32_t last = -1;
    for (int32_t k = 0; k < trie->num_requests; k++) {
        const int32_t i = trie->order[k];
        if (replicas[i] != replica) {
            continue;
        }
        const raddle_blend_request *own = &store->requests[i];
        int32_t shared = 0;
        while (last >= 0 && shared < own->num_blocks && shared < store->requests[last].num_blocks &&
               store->blocks[own->first_block + shared] ==
                   store->blocks[store->requests[last].first_block + shared]) {
            shared++;
        }
        const raddle_blend_work work = raddle_blend_request_work(
            own->prompt_tokens, (int64_t)shared * BLOCK, own->output_tokens);
        tokens += work.tokens;
        reads += work.reads;
        last = i;
    }
    *out_busy = fmax(tokens, reads / 100);
    return tokens;
}

static void test_even_and_whole(void) {
    static int32_t replicas[MOST], again[MOST];
    for (int32_t round = 0; round < 12; round++) {
        raddle_blend_store store;
        raddle_blend_trie trie;
        raddle_blend_shares shares;
        const int32_t count = 1000 + random_below(MOST - 1000), num_replicas = 1 + round % 6 * 3;
        fill(&store, count);
        CHECK_OK(raddle_blend_trie_build(&store, &trie));
        CHECK_OK(raddle_blend_partition(&store, &trie, &unit_cost, NULL, num_replicas, 0, replicas,
                                        &shares));
        CHECK_OK(raddle_blend_partition(&store, &trie, &unit_cost, NULL, num_replicas, 0, again,
                                        &shares));
        CHECK_INT(memcmp(replicas, again, (size_t)count * sizeof(int32_t)), 0);
        double tokens = 0, busiest = 0, all = 0;
        for (int32_t r = 0; r < num_replicas; r++) {
            double busy = 0;
            tokens += walk(&store, &trie, replicas, r, &busy);
            busiest = fmax(busiest, busy);
        }
        for (int32_t i = 0; i < count; i++) {
            CHECK(replicas[i] >= 0 && replicas[i] < num_replicas);
            again[i] = 0;
        }
        const double once = walk(&store, &trie, again, 0, &all);
        CHECK(fabs(shares.tokens - once) <= 1e-9 * once);
        CHECK(fabs(shares.tokens + shares.tokens_again - tokens) <= 1e-9 * once);
        CHECK(shares.tokens_again <= 0.08 * once && busiest <= 1.05 * all / num_replicas);
        CHECK(num_replicas > 1 || shares.tokens_again == 0);
        raddle_blend_trie_fini(&trie);
        raddle_blend_store_fini(&store);
    }
}

static void test_tail_belongs_to_all(void) {
    static int32_t replicas[MOST];
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_shares shares;
    fill(&store, MOST);
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    CHECK_OK(raddle_blend_partition(&store, &trie, &unit_cost, NULL, 4, 0.2, replicas, &shares));
    double tail = 0, all = 0;
    for (int32_t k = 0; k < MOST; k++) {
        const int32_t i = trie.order[k];
        CHECK(replicas[i] >= 0 && replicas[i] <= 4);
        const raddle_blend_work work = raddle_blend_expected_work(&store, NULL, i, 0);
        all += work.tokens;
        tail += replicas[i] == 4 ? work.tokens : 0;
    }
    CHECK(tail > 0.1 * all && tail < 0.3 * all);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

static void test_refusals(void) {
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_shares shares;
    raddle_blend_store_init(&store, BLOCK);
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    CHECK_OK(raddle_blend_partition(&store, &trie, &unit_cost, NULL, 3, 0, NULL, &shares));
    CHECK_INT(shares.num_runs, 0);
    CHECK_FAILS(raddle_blend_partition(&store, &trie, &unit_cost, NULL, 0, 0, NULL, &shares),
                RADDLE_ERR_VALUE, "replicas: expected 1 to 1024, got 0");
    CHECK_FAILS(raddle_blend_partition(&store, &trie, &unit_cost, NULL, 2, -0.5, NULL, &shares),
                RADDLE_ERR_VALUE, "tail");
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

int main(void) {
    test_even_and_whole();
    test_tail_belongs_to_all();
    test_refusals();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

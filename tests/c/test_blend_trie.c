// needs: base/status.c base/alloc.c base/hash.c blend/blend_store.c blend/blend_trie.c
/* test_blend_trie.c - requests in, their prefixes out: against comparing every pair of them. */
#include "check.h"
#include "random.h"

#include "base/alloc.h"
#include "blend/blend.h"

enum { BLOCK = 4, MAX_BLOCKS = 12 };

static void add(raddle_blend_store *store, const uint64_t *blocks, int32_t num_blocks) {
    const raddle_blend_request request = {
        .num_blocks = num_blocks,
        .prompt_tokens = num_blocks * BLOCK + 1 + random_below(BLOCK - 1),
        .output_tokens = RADDLE_BLEND_UNKNOWN,
        .max_tokens = 9,
        .weight = 1.0f,
    };
    CHECK_OK(raddle_blend_store_add(store, &request, blocks));
}

/* Blocks that two requests share. */
static int32_t shared(const raddle_blend_store *store, int32_t a, int32_t b) {
    const raddle_blend_request *x = &store->requests[a], *y = &store->requests[b];
    int32_t equal = 0;
    while (equal < x->num_blocks && equal < y->num_blocks &&
           store->blocks[x->first_block + equal] == store->blocks[y->first_block + equal]) {
        equal++;
    }
    return equal;
}

/* Prefixes that no earlier request has. */
static int64_t count_distinct(const raddle_blend_store *store) {
    int64_t distinct = 0;
    for (int32_t i = 0; i < store->num_requests; i++) {
        int32_t known = 0;
        for (int32_t k = 0; k < i; k++) {
            const int32_t equal = shared(store, i, k);
            known = equal > known ? equal : known;
        }
        distinct += store->requests[i].num_blocks - known;
    }
    return distinct;
}

static int32_t first_that_came(const raddle_blend_trie *trie, int32_t node) {
    int32_t first = INT32_MAX;
    for (int32_t k = trie->nodes[node].request_begin; k < trie->nodes[node].request_end; k++) {
        first = trie->order[k] < first ? trie->order[k] : first;
    }
    return first;
}

static void check_nodes(const raddle_blend_store *store, const raddle_blend_trie *trie) {
    CHECK_INT(trie->nodes[0].parent, -1);
    CHECK_INT(trie->nodes[0].end, trie->num_nodes);
    CHECK_INT(trie->nodes[0].request_end, trie->num_requests);
    for (int32_t i = 0; i < trie->num_nodes && trie->num_requests > 0; i++) {
        const raddle_blend_node *node = &trie->nodes[i];
        CHECK(node->end > i && node->end <= trie->num_nodes);
        CHECK(node->request_begin < node->request_end);
        if (i > 0) {
            const raddle_blend_node *parent = &trie->nodes[node->parent];
            CHECK(node->parent < i && node->end <= parent->end && node->depth > parent->depth);
            CHECK(node->request_begin >= parent->request_begin);
            CHECK(node->request_end <= parent->request_end);
        }
        /* All requests of a subtree share its depth, and no compressed chain hides a branch: the
         * node has requests of its own, or two children. */
        const int32_t first = trie->order[node->request_begin];
        for (int32_t k = node->request_begin; k < node->request_end; k++) {
            CHECK(shared(store, first, trie->order[k]) >= node->depth);
        }
        const bool has_own = trie->node_of[node->request_begin] == i;
        CHECK(i == 0 || has_own || trie->nodes[i + 1].end < node->end);
        int32_t earliest = -1;
        for (int32_t child = i + 1; child < node->end; child = trie->nodes[child].end) {
            const int32_t came = first_that_came(trie, child);
            CHECK(came > earliest); /* siblings in the order in which they came */
            earliest = came;
        }
    }
}

static void check_order(const raddle_blend_store *store, const raddle_blend_trie *trie) {
    char *seen = raddle_alloc_zero((size_t)store->num_requests + 1);
    int64_t computed = 0;
    for (int32_t k = 0; k < trie->num_requests; k++) {
        const int32_t request = trie->order[k];
        CHECK(!seen[request]);
        seen[request] = 1;
        CHECK_INT(trie->nodes[trie->node_of[k]].depth, store->requests[request].num_blocks);
        /* With only the last path at hand nothing is computed twice. */
        computed += store->requests[request].num_blocks -
                    (k == 0 ? 0 : shared(store, request, trie->order[k - 1]));
    }
    CHECK_INT(trie->num_requests, store->num_requests);
    CHECK_INT(computed, trie->distinct_blocks);
    raddle_free(seen);
}

static void check_trie(const raddle_blend_store *store) {
    raddle_blend_trie trie, again;
    CHECK_OK(raddle_blend_trie_build(store, &trie));
    check_nodes(store, &trie);
    check_order(store, &trie);
    CHECK_INT(trie.distinct_blocks, count_distinct(store));
    CHECK_OK(raddle_blend_trie_build(store, &again));
    CHECK_INT(memcmp(trie.order, again.order, (size_t)trie.num_requests * sizeof(int32_t)), 0);
    raddle_blend_trie_fini(&again);
    raddle_blend_trie_fini(&trie);
}

/* Few ids, so that everything happens: equal requests, prefixes of others, cuts at each place. */
static void test_random_requests(void) {
    for (int round = 0; round < 300; round++) {
        raddle_blend_store store;
        raddle_blend_store_init(&store, BLOCK);
        const int32_t requests = random_below(60), ids = 1 + random_below(4);
        for (int32_t i = 0; i < requests; i++) {
            uint64_t blocks[MAX_BLOCKS];
            const int32_t count = random_below(MAX_BLOCKS + 1);
            for (int32_t k = 0; k < count; k++) {
                blocks[k] = (uint64_t)random_below(ids);
            }
            add(&store, blocks, count);
        }
        check_trie(&store);
        raddle_blend_store_fini(&store);
    }
}

/* A request for each length: the chain is as deep as requests are many. */
static void test_a_deep_chain(void) {
    enum { DEPTH = 3000 };
    uint64_t *blocks = raddle_alloc(DEPTH * sizeof(uint64_t));
    raddle_blend_store store;
    raddle_blend_store_init(&store, BLOCK);
    for (int32_t i = 0; i < DEPTH; i++) {
        blocks[i] = 7;
    }
    for (int32_t i = DEPTH; i > 0; i--) { /* the longest first: each cuts a label */
        add(&store, blocks, i);
    }
    raddle_blend_trie trie;
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    CHECK_INT(trie.num_nodes, DEPTH + 1);
    CHECK_INT(trie.distinct_blocks, DEPTH);
    check_order(&store, &trie);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
    raddle_free(blocks);
}

/* Not timed: nodes are two per request at most, however many blocks. */
static void test_memory_follows_the_requests(void) {
    raddle_blend_store store;
    raddle_blend_store_init(&store, BLOCK);
    uint64_t blocks[500];
    for (int32_t i = 0; i < 200; i++) {
        for (int32_t k = 0; k < 500; k++) {
            blocks[k] = k < 400 ? (uint64_t)k : (uint64_t)i;
        }
        add(&store, blocks, 500);
    }
    raddle_blend_trie trie;
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    CHECK_INT(trie.num_nodes, 1 + 1 + 200);
    CHECK_INT(trie.distinct_blocks, 400 + 200 * 100);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

static void test_tokens_become_blocks(void) {
    raddle_blend_store store;
    raddle_blend_store_init(&store, BLOCK);
    int32_t tokens[3][11];
    for (int32_t r = 0; r < 3; r++) {
        for (int32_t i = 0; i < 11; i++) {
            tokens[r][i] = r == 2 && i == 5 ? 99 : i;
        }
        const raddle_blend_request request = {
            .prompt_tokens = 11, .output_tokens = 3, .max_tokens = 5, .weight = 1.0f};
        CHECK_OK(raddle_blend_store_add_tokens(&store, &request, tokens[r]));
    }
    CHECK_INT(store.requests[0].num_blocks, 2);
    CHECK_INT(shared(&store, 0, 1), 2);
    CHECK_INT(shared(&store, 0, 2), 1);
    check_trie(&store);
    raddle_blend_store_fini(&store);
}

static void test_bad_requests(void) {
    const raddle_blend_request good = {
        .num_blocks = 2, .prompt_tokens = 9, .output_tokens = 3, .max_tokens = 5, .weight = 1.0f};
    const uint64_t blocks[2] = {1, 2};
    raddle_blend_store store;
    raddle_blend_store_init(&store, BLOCK);
    struct {
        raddle_blend_request request;
        const char *words;
    } cases[] = {
        {good, "input_length"},  {good, "hash_ids"},      {good, "max_tokens"},
        {good, "output_length"}, {good, "output_length"}, {good, "source"},
        {good, "weight"},        {good, "weight"},        {good, "source"},
        {good, "max_tokens"},
    };
    cases[0].request.prompt_tokens = 0;
    cases[1].request.num_blocks = 3;
    cases[2].request.max_tokens = 0;
    cases[3].request.output_tokens = 0;
    cases[4].request.output_tokens = 6;
    cases[5].request.group = -1;
    cases[6].request.weight = 0.0f;
    cases[7].request.weight = (float)(0.0 / 1e-300 * 1e300) - 1.0f;
    cases[8].request.group = INT32_MAX;
    cases[9].request.max_tokens = INT32_MAX;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK_FAILS(raddle_blend_store_add(&store, &cases[i].request, blocks), RADDLE_ERR_VALUE,
                    cases[i].words);
    }
    CHECK_INT(store.num_requests, 0); /* nothing is half in */
    CHECK_OK(raddle_blend_store_add(&store, &good, blocks));
    check_trie(&store);
    raddle_blend_store_fini(&store);
}

int main(void) {
    random_state = 11;
    test_random_requests();
    test_a_deep_chain();
    test_memory_follows_the_requests();
    test_tokens_become_blocks();
    test_bad_requests();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

// needs: base/status.c base/alloc.c base/hash.c blend/blend_store.c blend/blend_trie.c blend/blend_pool.c
/* test_blend_pool.c - what is resident, against sets that are counted anew after every step. */
#include "check.h"
#include "random.h"

#include "base/alloc.h"
#include "blend/blend.h"

enum { BLOCK = 4, REQUESTS = 60, CAPACITY = 300 };

typedef struct world {
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_pool pool;
    int32_t place[REQUESTS]; /* in the trie's order */
    int32_t node[REQUESTS];
    enum { WAITS, RUNS, DONE } state[REQUESTS];
    int64_t own[REQUESTS];
    bool *resident; /* what the pool must have, by node */
} world;

static void open_world(world *w) {
    memset(w, 0, sizeof *w);
    raddle_blend_store_init(&w->store, BLOCK);
    for (int32_t i = 0; i < REQUESTS; i++) {
        uint64_t blocks[10];
        const int32_t count = random_below(11);
        for (int32_t k = 0; k < count; k++) {
            blocks[k] = (uint64_t)random_below(k < 4 ? 2 : 5);
        }
        const raddle_blend_request request = {
            .num_blocks = count,
            .prompt_tokens = count * BLOCK + 1,
            .output_tokens = RADDLE_BLEND_UNKNOWN,
            .max_tokens = 50,
            .weight = 1.0f,
        };
        CHECK_OK(raddle_blend_store_add(&w->store, &request, blocks));
    }
    CHECK_OK(raddle_blend_trie_build(&w->store, &w->trie));
    CHECK_OK(raddle_blend_pool_init(&w->pool, &w->trie, BLOCK, CAPACITY));
    for (int32_t k = 0; k < REQUESTS; k++) {
        w->node[w->trie.order[k]] = w->trie.node_of[k];
    }
    w->resident = raddle_alloc_zero((size_t)w->trie.num_nodes);
    w->resident[0] = true;
}

static void close_world(world *w) {
    raddle_blend_pool_fini(&w->pool);
    raddle_blend_trie_fini(&w->trie);
    raddle_blend_store_fini(&w->store);
    raddle_free(w->resident);
}

static int64_t tokens_of(const world *w, int32_t node) {
    const raddle_blend_node *nodes = w->trie.nodes;
    return node == 0 ? 0 : (int64_t)(nodes[node].depth - nodes[nodes[node].parent].depth) * BLOCK;
}

static bool is_above(const world *w, int32_t node, int32_t of) {
    return node <= of && of < w->trie.nodes[node].end;
}

/* Requests in a state that read a node. */
static int32_t readers(const world *w, int32_t node, int state) {
    int32_t count = 0;
    for (int32_t i = 0; i < REQUESTS; i++) {
        count += (int)w->state[i] == state && is_above(w, node, w->node[i]);
    }
    return count;
}

static int64_t sum_own(const world *w) {
    int64_t sum = 0;
    for (int32_t i = 0; i < REQUESTS; i++) {
        sum += w->state[i] == RUNS ? w->own[i] : 0;
    }
    return sum;
}

/* Tokens that running requests and those of a path read: what cannot be evicted. */
static int64_t sum_needed(const world *w, int32_t path) {
    int64_t sum = 0;
    for (int32_t n = 1; n < w->trie.num_nodes; n++) {
        sum += is_above(w, n, path) || readers(w, n, RUNS) > 0 ? tokens_of(w, n) : 0;
    }
    return sum;
}

/* The pool says of each node whether it is resident through the length of its cached path. */
static bool pool_has(const world *w, int32_t node) {
    return raddle_blend_pool_cached(&w->pool, node) == (int64_t)w->trie.nodes[node].depth * BLOCK;
}

static void check_world(world *w) {
    int64_t shared = 0, evictable = 0;
    for (int32_t n = 1; n < w->trie.num_nodes; n++) {
        const bool has = pool_has(w, n), is_read = readers(w, n, RUNS) > 0;
        CHECK((raddle_blend_pool_held(&w->pool, n) == (int64_t)w->trie.nodes[n].depth * BLOCK) ==
              is_read);
        CHECK(has || !is_read);
        CHECK(!has || is_read || readers(w, n, WAITS) > 0); /* nobody's: gone at once */
        CHECK(!has || pool_has(w, w->trie.nodes[n].parent));
        /* What was not there and is not read now did not come. */
        CHECK(!has || is_read || w->resident[n]);
        shared += has ? tokens_of(w, n) : 0;
        evictable += has && !is_read ? tokens_of(w, n) : 0;
        w->resident[n] = has;
    }
    CHECK_INT(w->pool.shared_tokens, shared);
    CHECK_INT(w->pool.evictable_tokens, evictable);
    CHECK_INT(w->pool.own_tokens, sum_own(w));
    CHECK(w->pool.shared_tokens + w->pool.own_tokens <= CAPACITY);
}

static void start(world *w, int32_t i) {
    const int64_t own = 1 + random_below(30),
                  cached = raddle_blend_pool_cached(&w->pool, w->node[i]);
    const bool fits = sum_needed(w, w->node[i]) + sum_own(w) + own <= CAPACITY;
    int64_t found = -1;
    CHECK(raddle_blend_pool_acquire(&w->pool, w->node[i], own, &found) == fits);
    CHECK_INT(found, fits ? cached : -1);
    if (fits) {
        w->state[i] = RUNS;
        w->own[i] = own;
    }
}

static void grow(world *w, int32_t i) {
    const int64_t more = random_below(20);
    const bool fits = sum_needed(w, 0) + sum_own(w) + more <= CAPACITY;
    CHECK(raddle_blend_pool_grow(&w->pool, more) == fits);
    w->own[i] += fits ? more : 0;
}

static void stop(world *w, int32_t i, bool waits_again) {
    raddle_blend_pool_release(&w->pool, w->node[i], w->own[i], waits_again);
    w->state[i] = waits_again ? WAITS : DONE;
}

static void test_random_lives(void) {
    for (int round = 0; round < 40; round++) {
        world w;
        open_world(&w);
        int32_t left = REQUESTS;
        for (int step = 0; step < 3000 && left > 0; step++) {
            const int32_t i = random_below(REQUESTS), what = random_below(10);
            if (w.state[i] == WAITS) {
                start(&w, i);
            } else if (w.state[i] == RUNS && what < 5) {
                grow(&w, i);
            } else if (w.state[i] == RUNS) {
                stop(&w, i, what == 9);
                left -= what < 9;
            } else {
                continue;
            }
            check_world(&w);
        }
        CHECK_INT(left, 0);
        CHECK_INT(w.pool.shared_tokens, 0);
        CHECK_INT(w.pool.own_tokens, 0);
        close_world(&w);
    }
}

/* One after the other, depth first, in a pool that holds the longest alone: every shared block is
 * found. */
static void test_depth_first_finds_all_there_is(void) {
    world w;
    open_world(&w);
    int64_t computed = 0;
    for (int32_t k = 0; k < REQUESTS; k++) {
        const int32_t request = w.trie.order[k], node = w.trie.node_of[k];
        int64_t cached = 0;
        CHECK(raddle_blend_pool_acquire(&w.pool, node, 1, &cached));
        computed += (int64_t)w.store.requests[request].num_blocks * BLOCK - cached;
        raddle_blend_pool_release(&w.pool, node, 1, false);
    }
    CHECK_INT(computed, w.trie.distinct_blocks * BLOCK);
    CHECK_INT(w.pool.shared_tokens, 0);
    close_world(&w);
}

int main(void) {
    random_state = 3;
    test_random_lives();
    test_depth_first_finds_all_there_is();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

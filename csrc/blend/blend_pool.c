/* blend_pool.c - which prefixes lie in memory.
 *
 * Every node counts the running and the waiting requests of its subtree, so that it knows when the
 * last reader is gone. Resident nodes are closed upwards: a path that is there is there from the root
 * on. A list holds the nodes that may go next, those that nobody runs on and that have no resident
 * children, by the time of their last use.
 */
#include "blend/blend.h"

#include <string.h>

#include "base/alloc.h"

enum { NONE = -1 };

typedef struct raddle_blend_residence {
    int32_t running, waiting; /* requests of the subtree */
    int32_t resident_children;
    int32_t older, newer; /* in the list; NONE at its ends */
    bool is_resident, is_listed;
} residence;

static int64_t tokens_of(const raddle_blend_pool *pool, int32_t node) {
    const raddle_blend_node *nodes = pool->trie->nodes;
    const int32_t parent = nodes[node].parent;
    return (int64_t)(nodes[node].depth - (parent == NONE ? 0 : nodes[parent].depth)) *
           pool->block_size;
}

/* ------------------------------------------------------------------ the list */

static void list_remove(raddle_blend_pool *pool, int32_t node) {
    residence *own = &pool->nodes[node];
    *(own->older == NONE ? &pool->oldest : &pool->nodes[own->older].newer) = own->newer;
    *(own->newer == NONE ? &pool->newest : &pool->nodes[own->newer].older) = own->older;
    own->is_listed = false;
}

static void list_append(raddle_blend_pool *pool, int32_t node) {
    residence *own = &pool->nodes[node];
    own->older = pool->newest;
    own->newer = NONE;
    *(pool->newest == NONE ? &pool->oldest : &pool->nodes[pool->newest].newer) = node;
    pool->newest = node;
    own->is_listed = true;
}

/* ------------------------------------------------------------------ residence */

/* Frees a resident node that nobody runs on and that has no resident children; its parent may be next.
 * The root, which has no blocks, stays. */
static void leave(raddle_blend_pool *pool, int32_t node) {
    while (node > 0) {
        residence *own = &pool->nodes[node];
        const int32_t parent = pool->trie->nodes[node].parent;
        if (own->is_listed) {
            list_remove(pool, node);
        }
        own->is_resident = false;
        pool->shared_tokens -= tokens_of(pool, node);
        pool->evictable_tokens -= tokens_of(pool, node);
        residence *above = &pool->nodes[parent];
        above->resident_children--;
        if (parent == 0 || above->running > 0 || above->resident_children > 0) {
            return;
        }
        if (above->waiting > 0) {
            list_append(pool, parent);
            return;
        }
        node = parent;
    }
}

/* A resident node that nobody runs on any more goes when nobody waits for it either; else it takes its
 * place in the list, once it has no resident children. */
static void settle(raddle_blend_pool *pool, int32_t node) {
    const residence *own = &pool->nodes[node];
    if (own->running > 0 || own->resident_children > 0 || !own->is_resident) {
        return;
    }
    if (own->waiting == 0) {
        leave(pool, node);
    } else if (!own->is_listed) {
        list_append(pool, node);
    }
}

int64_t raddle_blend_pool_room(const raddle_blend_pool *pool) {
    return pool->capacity - pool->own_tokens - pool->shared_tokens + pool->evictable_tokens;
}

/* Evicts until `tokens` more fit; there is room for them. */
static void make_room(raddle_blend_pool *pool, int64_t tokens) {
    while (pool->own_tokens + pool->shared_tokens + tokens > pool->capacity) {
        leave(pool, pool->oldest);
    }
}

/* ------------------------------------------------------------------ what others call */

raddle_status raddle_blend_pool_init(raddle_blend_pool *pool, const raddle_blend_trie *trie,
                                     int32_t block_size, int64_t capacity) {
    *pool = (raddle_blend_pool){
        .trie = trie,
        .block_size = block_size,
        .capacity = capacity,
        .oldest = NONE,
        .newest = NONE,
    };
    const size_t bytes = (size_t)trie->num_nodes * sizeof(residence);
    pool->nodes = raddle_alloc_zero(bytes);
    if (pool->nodes == NULL) {
        return raddle_fail_memory(bytes);
    }
    for (int32_t i = 0; i < trie->num_nodes; i++) {
        pool->nodes[i].waiting = trie->nodes[i].request_end - trie->nodes[i].request_begin;
    }
    pool->nodes[0].is_resident = true;
    return RADDLE_OK;
}

void raddle_blend_pool_fini(raddle_blend_pool *pool) {
    raddle_free(pool->nodes);
    memset(pool, 0, sizeof *pool);
}

static int32_t deepest_resident(const raddle_blend_pool *pool, int32_t node) {
    while (!pool->nodes[node].is_resident) {
        node = pool->trie->nodes[node].parent;
    }
    return node;
}

int64_t raddle_blend_pool_cached(const raddle_blend_pool *pool, int32_t node) {
    return (int64_t)pool->trie->nodes[deepest_resident(pool, node)].depth * pool->block_size;
}

int64_t raddle_blend_pool_held(const raddle_blend_pool *pool, int32_t node) {
    while (node > 0 && pool->nodes[node].running == 0) {
        node = pool->trie->nodes[node].parent;
    }
    return (int64_t)pool->trie->nodes[node].depth * pool->block_size;
}

bool raddle_blend_pool_acquire(raddle_blend_pool *pool, int32_t node, int64_t own,
                               int64_t *out_cached) {
    const raddle_blend_node *nodes = pool->trie->nodes;
    const int32_t found = deepest_resident(pool, node);
    const int64_t missing = (int64_t)(nodes[node].depth - nodes[found].depth) * pool->block_size;
    /* What is found on the path is not to be evicted for the rest of it. */
    int64_t kept = 0;
    for (int32_t at = found; at > 0 && pool->nodes[at].running == 0; at = nodes[at].parent) {
        kept += tokens_of(pool, at);
    }
    if (missing + own > raddle_blend_pool_room(pool) - kept) {
        return false;
    }
    for (int32_t at = node; at != NONE; at = nodes[at].parent) {
        residence *r = &pool->nodes[at];
        r->waiting--;
        if (r->running++ == 0 && r->is_resident && at > 0) {
            pool->evictable_tokens -= tokens_of(pool, at);
            if (r->is_listed) {
                list_remove(pool, at);
            }
        }
    }
    make_room(pool, missing + own);
    for (int32_t at = node; at != found; at = nodes[at].parent) {
        pool->nodes[at].is_resident = true;
        pool->nodes[nodes[at].parent].resident_children++;
    }
    pool->shared_tokens += missing;
    pool->own_tokens += own;
    *out_cached = (int64_t)nodes[found].depth * pool->block_size;
    return true;
}

void raddle_blend_pool_resize(raddle_blend_pool *pool, int64_t capacity) {
    pool->capacity = capacity;
    while (pool->own_tokens + pool->shared_tokens > capacity && pool->oldest != NONE) {
        leave(pool, pool->oldest);
    }
}

bool raddle_blend_pool_grow(raddle_blend_pool *pool, int64_t own) {
    if (own > raddle_blend_pool_room(pool)) {
        return false;
    }
    make_room(pool, own);
    pool->own_tokens += own;
    return true;
}

void raddle_blend_pool_release(raddle_blend_pool *pool, int32_t node, int64_t own,
                               bool waits_again) {
    const raddle_blend_node *nodes = pool->trie->nodes;
    pool->own_tokens -= own;
    for (int32_t at = node; at != NONE; at = nodes[at].parent) {
        residence *r = &pool->nodes[at];
        r->waiting += waits_again;
        if (--r->running == 0 && at > 0) {
            pool->evictable_tokens += tokens_of(pool, at);
        }
    }
    for (int32_t at = node; at > 0 && pool->nodes[at].running == 0; at = nodes[at].parent) {
        settle(pool, at);
    }
}

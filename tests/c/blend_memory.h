/* blend_memory.h - what lies in the pool, by the words of blend.h and slowly: a tree with a node for
 * each block, looked through from end to end after everything that happens. For tests that ask whether
 * blend_trie.c, blend_pool.c and the scheduler agree with it.
 */
#ifndef RADDLE_TESTS_BLEND_MEMORY_H
#define RADDLE_TESTS_BLEND_MEMORY_H

#include <stdbool.h>
#include <stdlib.h>

#include "blend/blend.h"

static inline raddle_blend_cost memory_cost(double alpha) {
    return (raddle_blend_cost){
        .flops_per_token = 16e9,
        .flops_per_score = 500e3,
        .kv_bytes_per_token = 131072,
        .weight_bytes = 1e9,
        .attention_flops_rate = 200e12,
        .read_rate = 1.7e12,
        .alpha = alpha,
        .num_rates = 1,
        .rate_tokens = {1},
        .gemm_rate = {220e12},
    };
}

typedef struct memory_block {
    uint64_t id;
    int32_t parent, num_children, depth;
    int32_t ends;             /* requests whose last full block it is */
    int32_t running, waiting; /* requests whose prompts go through it */
    int32_t resident_children;
    bool is_resident, is_written; /* room is taken; the tokens are computed */
    int64_t idle_since;           /* it may be evicted since then; 0: it may not */
} memory_block;

typedef struct memory {
    int32_t block_size, num_blocks; /* block 0 is the root */
    memory_block *blocks;
    int32_t *last; /* [num_requests] their last full blocks */
    int64_t capacity, own, shared, clock, evictions;
} memory;

/* The child with this id, which is made when there is none. */
static inline int32_t memory_child(memory *m, int32_t parent, uint64_t id) {
    for (int32_t i = 1; i < m->num_blocks; i++) {
        if (m->blocks[i].parent == parent && m->blocks[i].id == id) {
            return i;
        }
    }
    m->blocks[parent].num_children++;
    m->blocks[m->num_blocks] =
        (memory_block){.id = id, .parent = parent, .depth = m->blocks[parent].depth + 1};
    return m->num_blocks++;
}

/* Of requests [begin, end) of `order`, or, when that is NULL, of the store. All wait. */
static inline void memory_open(memory *m, const raddle_blend_store *store, const int32_t *order,
                               int64_t begin, int64_t end, int64_t capacity) {
    *m = (memory){.block_size = store->block_size, .num_blocks = 1, .capacity = capacity};
    m->blocks = calloc((size_t)store->num_blocks + 1, sizeof *m->blocks);
    m->last = calloc((size_t)store->num_requests + 1, sizeof *m->last);
    for (int64_t i = begin; i < end; i++) {
        const int32_t number = order == NULL ? (int32_t)i : order[i];
        const raddle_blend_request *request = &store->requests[number];
        int32_t at = 0;
        for (int32_t k = 0; k < request->num_blocks; k++) {
            at = memory_child(m, at, store->blocks[request->first_block + k]);
            m->blocks[at].waiting++;
        }
        m->blocks[at].ends++;
        m->last[number] = at;
    }
}

static inline void memory_close(memory *m) {
    free(m->blocks);
    free(m->last);
}

/* Blocks come and go in runs that the same requests share; such a run ends here. */
static inline bool memory_is_end(const memory *m, int32_t at) {
    return at == 0 || m->blocks[at].ends > 0 || m->blocks[at].num_children != 1;
}

static inline void memory_drop(memory *m, int32_t end) {
    int32_t at = end;
    do {
        m->blocks[at].is_resident = m->blocks[at].is_written = false;
        m->blocks[at].idle_since = 0;
        m->shared -= m->block_size;
        at = m->blocks[at].parent;
    } while (!memory_is_end(m, at));
}

/* What nobody will read goes; what nobody reads, and has nothing behind it, may go from now on. */
static inline void memory_settle(memory *m) {
    bool has_changed = true;
    while (has_changed) {
        has_changed = false;
        for (int32_t i = 0; i < m->num_blocks; i++) {
            m->blocks[i].resident_children = 0;
        }
        for (int32_t i = 1; i < m->num_blocks; i++) {
            m->blocks[m->blocks[i].parent].resident_children += m->blocks[i].is_resident;
        }
        for (int32_t i = 1; i < m->num_blocks; i++) {
            memory_block *b = &m->blocks[i];
            if (!b->is_resident || b->running > 0 || b->resident_children > 0 ||
                !memory_is_end(m, i)) {
                b->idle_since = 0;
            } else if (b->waiting == 0) {
                memory_drop(m, i);
                has_changed = true;
            } else if (b->idle_since == 0) {
                b->idle_since = ++m->clock;
            }
        }
    }
}

/* Whether so many more tokens fit when all goes that nobody reads. */
static inline bool memory_fits(const memory *m, int64_t tokens) {
    int64_t held = m->own;
    for (int32_t i = 1; i < m->num_blocks; i++) {
        held += m->blocks[i].is_resident && m->blocks[i].running > 0 ? m->block_size : 0;
    }
    return held + tokens <= m->capacity;
}

/* Evicts what is idle for longest until so many more fit; false when that is not enough. */
static inline bool memory_make_room(memory *m, int64_t tokens) {
    while (m->own + m->shared + tokens > m->capacity) {
        int32_t oldest = 0;
        for (int32_t i = 1; i < m->num_blocks; i++) {
            const int64_t since = m->blocks[i].idle_since;
            if (since > 0 && (oldest == 0 || since < m->blocks[oldest].idle_since)) {
                oldest = i;
            }
        }
        if (oldest == 0) {
            return false;
        }
        m->evictions++;
        memory_drop(m, oldest);
        memory_settle(m);
    }
    return true;
}

/* A waiting request runs, with own tokens of its own. Tokens that were found, all of them computed; -1
 * when there is no room, or what lay there was never computed. */
static inline int64_t memory_acquire(memory *m, int32_t request, int64_t own) {
    int32_t at = m->last[request];
    while (at > 0 && !m->blocks[at].is_resident) {
        at = m->blocks[at].parent;
    }
    const int32_t found = m->blocks[at].depth;
    const int32_t missing = m->blocks[m->last[request]].depth - found;
    bool is_written = true;
    for (int32_t i = m->last[request]; i > 0; i = m->blocks[i].parent) {
        m->blocks[i].waiting--;
        m->blocks[i].running++;
        is_written = is_written && (!m->blocks[i].is_resident || m->blocks[i].is_written);
    }
    memory_settle(m);
    if (!memory_make_room(m, own + (int64_t)missing * m->block_size) || !is_written) {
        return -1;
    }
    for (int32_t i = m->last[request]; i > 0; i = m->blocks[i].parent) {
        m->blocks[i].is_resident = true;
    }
    m->shared += (int64_t)missing * m->block_size;
    m->own += own;
    memory_settle(m);
    return (int64_t)found * m->block_size;
}

static inline void memory_release(memory *m, int32_t request, int64_t own, bool waits_again) {
    for (int32_t i = m->last[request]; i > 0; i = m->blocks[i].parent) {
        m->blocks[i].running--;
        m->blocks[i].waiting += waits_again;
    }
    m->own -= own;
    memory_settle(m);
}

/* Tokens of a request's prompt are computed up to here. */
static inline void memory_write(memory *m, int32_t request, int64_t tokens) {
    for (int32_t i = m->last[request]; i > 0; i = m->blocks[i].parent) {
        m->blocks[i].is_written |= (int64_t)m->blocks[i].depth * m->block_size <= tokens;
    }
}

#endif

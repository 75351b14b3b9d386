/* blend_store.c - requests and the ids of their blocks, appended one by one. */
#include "blend/blend.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/hash.h"

enum {
    MAX_REQUESTS = 1 << 28, /* whose tree has numbers of 32 bits */
    MAX_GROUPS = 1 << 20,
};

void raddle_blend_store_init(raddle_blend_store *store, int32_t block_size) {
    *store = (raddle_blend_store){.block_size = block_size};
}

void raddle_blend_store_fini(raddle_blend_store *store) {
    raddle_free(store->requests);
    raddle_free(store->blocks);
    memset(store, 0, sizeof *store);
}

/* Room for `more` elements behind `count`, and some in any case; *items moves. */
static raddle_status grow(void **items, int64_t count, int64_t more, int64_t *capacity,
                          size_t item_bytes) {
    if (*items != NULL && count + more <= *capacity) {
        return RADDLE_OK;
    }
    int64_t wanted = *capacity + *capacity / 2 + 1024;
    wanted = wanted < count + more ? count + more : wanted;
    void *grown = raddle_realloc(*items, (size_t)wanted * item_bytes);
    if (grown == NULL) {
        return raddle_fail_memory((size_t)wanted * item_bytes);
    }
    *items = grown;
    *capacity = wanted;
    return RADDLE_OK;
}

static raddle_status check_request(const raddle_blend_store *store,
                                   const raddle_blend_request *request) {
    RADDLE_REQUIRE(request->prompt_tokens >= 1, RADDLE_ERR_VALUE,
                   "input_length: expected at least 1 token, got %d (request %lld)",
                   (int)request->prompt_tokens, (long long)store->num_requests);
    RADDLE_REQUIRE(request->num_blocks >= 0 &&
                       (int64_t)request->num_blocks * store->block_size <= request->prompt_tokens,
                   RADDLE_ERR_VALUE,
                   "hash_ids: expected at most one for each full block of %d tokens, %lld of "
                   "%d tokens; got %d (request %lld)",
                   (int)store->block_size, (long long)(request->prompt_tokens / store->block_size),
                   (int)request->prompt_tokens, (int)request->num_blocks,
                   (long long)store->num_requests);
    RADDLE_REQUIRE(request->max_tokens >= 1, RADDLE_ERR_VALUE,
                   "max_tokens: expected at least 1, got %d (request %lld)",
                   (int)request->max_tokens, (long long)store->num_requests);
    RADDLE_REQUIRE(request->max_tokens <= INT32_MAX - request->prompt_tokens, RADDLE_ERR_VALUE,
                   "max_tokens: expected at most %d with an input_length of %d, got %d (request "
                   "%lld)",
                   INT32_MAX - (int)request->prompt_tokens, (int)request->prompt_tokens,
                   (int)request->max_tokens, (long long)store->num_requests);
    RADDLE_REQUIRE(
        request->output_tokens == RADDLE_BLEND_UNKNOWN ||
            (request->output_tokens >= 1 && request->output_tokens <= request->max_tokens),
        RADDLE_ERR_VALUE,
        "output_length: expected 1 to max_tokens (%d), or %d when it is not known; got "
        "%d (request %lld)",
        (int)request->max_tokens, RADDLE_BLEND_UNKNOWN, (int)request->output_tokens,
        (long long)store->num_requests);
    RADDLE_REQUIRE(request->group >= 0 && request->group < MAX_GROUPS, RADDLE_ERR_VALUE,
                   "source: expected a number from 0 to %d, got %d (request %lld)", MAX_GROUPS - 1,
                   (int)request->group, (long long)store->num_requests);
    RADDLE_REQUIRE(isfinite(request->weight) && request->weight > 0, RADDLE_ERR_VALUE,
                   "weight: expected a positive number, got %g (request %lld)",
                   (double)request->weight, (long long)store->num_requests);
    RADDLE_REQUIRE(store->num_requests < MAX_REQUESTS, RADDLE_ERR_CAPACITY,
                   "requests: there is room for %d", MAX_REQUESTS);
    return RADDLE_OK;
}

/* Room for one more request and its blocks. */
static raddle_status reserve(raddle_blend_store *store, int32_t num_blocks) {
    void *requests = store->requests, *blocks = store->blocks;
    raddle_status status = grow(&requests, store->num_requests, 1, &store->request_capacity,
                                sizeof(raddle_blend_request));
    store->requests = requests;
    if (status == RADDLE_OK) {
        status =
            grow(&blocks, store->num_blocks, num_blocks, &store->block_capacity, sizeof(uint64_t));
        store->blocks = blocks;
    }
    return status;
}

/* The blocks are in place. */
static void append(raddle_blend_store *store, const raddle_blend_request *request) {
    raddle_blend_request *own = &store->requests[store->num_requests++];
    *own = *request;
    own->first_block = store->num_blocks;
    store->num_blocks += request->num_blocks;
    store->num_groups =
        request->group >= store->num_groups ? request->group + 1 : store->num_groups;
}

raddle_status raddle_blend_store_add(raddle_blend_store *store, const raddle_blend_request *request,
                                     const uint64_t *blocks) {
    RADDLE_TRY(check_request(store, request));
    RADDLE_TRY(reserve(store, request->num_blocks));
    if (request->num_blocks > 0) {
        memcpy(store->blocks + store->num_blocks, blocks,
               (size_t)request->num_blocks * sizeof(uint64_t));
    }
    append(store, request);
    return RADDLE_OK;
}

raddle_status raddle_blend_store_add_tokens(raddle_blend_store *store,
                                            const raddle_blend_request *request,
                                            const int32_t *tokens) {
    raddle_blend_request counted = *request;
    counted.num_blocks = request->prompt_tokens / store->block_size;
    RADDLE_TRY(check_request(store, &counted));
    RADDLE_TRY(reserve(store, counted.num_blocks));
    const size_t block_bytes = (size_t)store->block_size * sizeof(int32_t);
    for (int32_t i = 0; i < counted.num_blocks; i++) {
        const raddle_hash hash =
            raddle_hash_bytes(tokens + (int64_t)i * store->block_size, block_bytes);
        store->blocks[store->num_blocks + i] = hash.low;
    }
    append(store, &counted);
    return RADDLE_OK;
}

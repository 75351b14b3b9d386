/* blend_order.c - the orders that need no plan. */
#include "blend/blend.h"

static uint64_t next_random(uint64_t *state) { /* splitmix64 (Steele, Lea and Flood 2014) */
    *state += 0x9E3779B97F4A7C15u;
    uint64_t x = *state;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

void raddle_blend_order(const raddle_blend_trie *trie, raddle_blend_policy policy, uint64_t seed,
                        int32_t *order) {
    const int32_t count = trie->num_requests;
    for (int32_t i = 0; i < count; i++) {
        order[i] = policy == RADDLE_BLEND_DFS ? trie->order[i] : i;
    }
    for (int32_t i = count - 1; policy == RADDLE_BLEND_RANDOM && i > 0; i--) {
        const int32_t other = (int32_t)(next_random(&seed) % (uint64_t)(i + 1));
        const int32_t kept = order[i];
        order[i] = order[other];
        order[other] = kept;
    }
}

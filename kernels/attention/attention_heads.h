/* attention_heads.h - how many neighbouring K/V heads the items of a batch take together, for both
 * planners. C11 and NVRTC.
 *
 * Wide items read longer rows, which memory serves better, and are fewer; narrow ones can be shared
 * out without cuts, and what is cut merges in parallel. The cost of a width is that of the worker
 * which ends last, as far as a formula knows it: (H200, us, heads 1, 2, 4, 8) 64 x 16384 tokens
 * 972, 967, 964, 954; 64 x 1024: 74.7, 68.9, 65.5, 68.5; 16 x 8192: 125 uncut, then 130, 130, 129;
 * 1 x 32768: 38.6, 40.1, 48.7, 82; one 65536 + 63 x 512: 105, 102, 105, 128.
 */
#ifndef RADDLE_ATTENTION_HEADS_H
#define RADDLE_ATTENTION_HEADS_H

#include "common/abi.h"

/* Costs are in tokens of one K/V head. A kind is a request's row tile. */
typedef struct raddle_heads_question {
    int64_t tokens;  /* that the kinds see, all added up */
    int32_t longest; /* that one kind sees */
    int32_t kinds;
    int32_t num_kv_heads;
    int32_t least, most; /* widths to choose from: least, twice that, .. */
    int32_t workers;
    int32_t segment_cost; /* of starting a segment */
    int32_t cut_cost;     /* of a segment that is a part of an item, besides */
    int32_t merge_cost;   /* of merging one head of one part */
} raddle_heads_question;

RADDLE_INLINE float raddle_cost_of_heads(const raddle_heads_question *q, int32_t heads) {
    /* Rows of one head, half or a quarter of a KB in memory, are read at 0.97 of what whole pages
     * reach (H200: 244, 241, 238 and 236 us with 1, 2, 4 and 8 heads). */
    const float slower = 1.0f + 0.034f / (float)heads;
    const int32_t items = q->kinds * ((q->num_kv_heads + heads - 1) / heads);
    const float load = (float)q->tokens * (float)q->num_kv_heads / (float)q->workers;
    const float parts = (float)q->longest * (float)heads / load + 1.0f;
    /* A worker's share has a cut at either end. */
    const float cut = load + (float)q->segment_cost * ((float)items / (float)q->workers + 1.0f) +
                      2.0f * (float)q->cut_cost + parts * (float)heads * (float)q->merge_cost;
    if ((int64_t)q->longest * q->kinds > q->tokens) {
        return slower * cut;
    }
    const int32_t most_items = (items + q->workers - 1) / q->workers; /* of a worker */
    const float whole = (float)most_items * ((float)q->longest * (float)heads + q->segment_cost);
    return slower * (whole < cut ? whole : cut);
}

RADDLE_INLINE int32_t raddle_choose_heads(const raddle_heads_question *q) {
    int32_t best = q->least;
    if (q->tokens == 0) {
        return q->most;
    }
    float least_cost = raddle_cost_of_heads(q, best);
    for (int32_t heads = 2 * q->least; heads <= q->most; heads *= 2) {
        const float cost = raddle_cost_of_heads(q, heads);
        if (cost < least_cost) {
            best = heads;
            least_cost = cost;
        }
    }
    return best;
}

#endif

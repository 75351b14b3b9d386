/* attention_schedule.h - the schedule that the planner writes and every attention kernel reads. C11
 * and NVRTC.
 *
 * Rows. The query heads that share a K/V head are packed: row r of a request and K/V head is query
 * token r / group_size, head r % group_size of the group. A tile is up to tile_rows such rows for
 * heads_per_item neighbouring K/V heads. Items. (request, head group, row tile), with the K/V range
 * that causality and the window leave visible. Items are laid end to end and cut into contiguous
 * ranges, one per worker (a CTA, or a CPU thread). Segments. What one worker does of one item: K/V
 * tokens [kv_begin, kv_end). An item that one worker does whole writes the output itself (slot <
 * 0); a cut item leaves one float32 partial per segment, in K/V order, and its merge adds them up
 * in that order whoever finishes last: results do not depend on timing. The first segment of each
 * worker lies apart once more, where it is found without looking up which it is. The counts lie in memory
 * with the rest, so that a launch captured for the maxima reads how much there is.
 */
#ifndef RADDLE_ATTENTION_SCHEDULE_H
#define RADDLE_ATTENTION_SCHEDULE_H

#include "common/abi.h"

typedef struct raddle_attention_header {
    int32_t batch;
    int32_t num_workers; /* workers that have segments */
    int32_t num_segments;
    int32_t num_merges;
    int32_t num_slots;
    int32_t num_qo_tokens;
    int32_t heads_per_item; /* of all items of this schedule */
    int32_t reserved;
} raddle_attention_header;
RADDLE_ASSERT_SIZE(raddle_attention_header, 32);

typedef struct raddle_attention_request {
    int32_t qo_begin; /* first row of q, out and lse */
    int32_t qo_len;
    int32_t kv_begin; /* paged: first entry in the page table; ragged: first row of K and V */
    int32_t kv_len;   /* tokens */
} raddle_attention_request;
RADDLE_ASSERT_SIZE(raddle_attention_request, 16);

typedef struct raddle_attention_segment {
    int32_t request;
    int32_t head; /* first K/V head of the item; heads_per_item of them, fewer at the end */
    int32_t row_begin, row_end; /* packed rows of the tile */
    int32_t kv_begin, kv_end;   /* tokens; equal when the item sees nothing: output 0, lse -inf */
    int32_t slot;               /* partial of this segment, or -1: write the output */
    int32_t merge;              /* of a cut item, or -1 */
    /* Of the request, so that a kernel need not look it up: a copy of its record. */
    int32_t qo_begin, qo_len;
    int32_t kv_origin; /* its kv_begin: first entry in the page table, or first row */
    int32_t kv_len;
} raddle_attention_segment;
RADDLE_ASSERT_SIZE(raddle_attention_segment, 48);

typedef struct raddle_attention_merge {
    int32_t request;
    int32_t head;
    int32_t row_begin, row_end;
    int32_t slot_begin, slot_count;   /* consecutive, in K/V order */
    int32_t num_arrivals;             /* segments that must be done before the merge may run */
    int32_t qo_begin, qo_len, kv_len; /* of the request */
    int32_t reserved[2];
} raddle_attention_merge;
RADDLE_ASSERT_SIZE(raddle_attention_merge, 48);

#endif

/* attention_plan_params.h - the argument of attention_plan, the kernel that makes a schedule from
 * lengths that only the GPU has. C11 and NVRTC.
 *
 * The page table is that of requests (indptr, table, lengths: tokens in the last pages) or padded
 * (indptr NULL, table [batch, table_width], lengths: tokens). All int32.
 */
#ifndef RADDLE_ATTENTION_PLAN_PARAMS_H
#define RADDLE_ATTENTION_PLAN_PARAMS_H

#include "attention/attention_schedule.h"

typedef struct raddle_attention_plan_params {
    const int32_t *indptr;  /* [batch + 1] offsets into table, or NULL */
    const int32_t *lengths; /* [batch] */
    const int32_t *table;   /* [table_entries] page ids */

    /* What is written: the plan's own memory, sized by its limits. */
    raddle_attention_header *header;
    raddle_attention_request *requests;       /* [batch] */
    int32_t *worker_indptr;                   /* [num_workers + 1] */
    raddle_attention_segment *first_segments; /* [num_workers] */
    raddle_attention_segment *segments;
    raddle_attention_merge *merges;
    int32_t *pages; /* [table_entries] */
    int64_t
        *prefix; /* scratch: [2, batch * row tiles + 1], or NULL when that fits in shared memory */

    int64_t table_entries; /* of the table, and of pages: no more is read or written */
    int32_t table_width;
    int32_t batch;
    int32_t qo_len; /* query rows of every request */
    int32_t page_size;
    int32_t group_size, num_kv_heads;
    int32_t heads_per_item, min_heads_per_item; /* to choose from */
    int32_t tile_rows, tile_kv;
    int32_t num_workers;
    int32_t segment_cost, cut_cost, merge_cost; /* in tokens of one K/V head */
    int32_t causal, window_left;                /* window_left negative: none */
    int32_t fixed_chunk;                        /* 0: balanced */
    int32_t max_slots;                          /* that there is memory for */
} raddle_attention_plan_params;
RADDLE_ASSERT_SIZE(raddle_attention_plan_params, 12 * 8 + 18 * 4);

#endif

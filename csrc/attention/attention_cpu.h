/* attention_cpu.h - what the files of the CPU back end share: its state in a plan, one worker's
 * scratch, running states.
 *
 * attention_cpu.c launches: workers over segments, then merges. attention_cpu_segment.c computes
 * one segment. A running state of a row is (max, sum, acc[head_dim_vo]): the largest base 2 logit
 * so far, the sum of 2^(logit - max), and the same sum over V rows. An empty one is (-inf, 0,
 * 0...).
 */
#ifndef RADDLE_ATTENTION_ATTENTION_CPU_H
#define RADDLE_ATTENTION_ATTENTION_CPU_H

#include "attention/attention.h"
#include "cpu/vec.h"

#include <math.h>

enum {
    /* Rows of a head: from here on a tile is packed for its rows. */
    ATTENTION_CPU_MANY_ROWS = 16,
    /* Tokens of a tile that is read where it lies. The next tile is prefetched meanwhile: 32 tokens
     * ahead is slower by a tenth, 64 by a half (bf16, 8 heads of 128, page 16). */
    ATTENTION_CPU_FEW_TILE_KV = 16,
};

/* Running states of several rows; state is [rows, 2] and acc [rows, head_dim_vo]. */
typedef struct attention_cpu_states {
    float *state;
    float *acc;
} attention_cpu_states;

/* Where the tokens of a tile lie, in the order of the request. */
typedef struct attention_cpu_tokens {
    const void **k_rows; /* [tile_kv] address of the token's K row of head 0 */
    const void **v_rows;
    int32_t *positions; /* [tile_kv] token numbers, ascending */
} attention_cpu_tokens;

/* One worker's memory. block_rows is the most rows (of one or several heads) computed together. */
typedef struct attention_cpu_scratch {
    void *q;                     /* [block_rows, head_dim_qk] of the operand's type */
    float *logits;               /* [tile_rows, tile_kv] */
    void *weights;               /* the same in the operand's type; logits itself when float32 */
    attention_cpu_states chunk;  /* [block_rows]: of the tiles seen so far */
    attention_cpu_states folded; /* [block_rows]: of the chunks seen so far, in fixed-chunk mode */
    raddle_vec_panel k_panel, v_panel; /* a tile of one head, packed */
    attention_cpu_tokens tokens[2];    /* of this tile and the next */
} attention_cpu_scratch;

typedef struct attention_cpu_state {
    const raddle_vec *vec;
    const raddle_vec_block *block; /* how q meets K, and weights meet V */
    int32_t operand_bytes;         /* of an element of block->operand */
    int32_t block_rows;
    void *memory;
    attention_cpu_scratch *scratch; /* [num_workers] */
} attention_cpu_state;

/* What every worker of a run reads. */
typedef struct attention_cpu_job {
    const raddle_attention_config *config;
    const raddle_attention_params *params;
    const attention_cpu_state *state;
} attention_cpu_job;

/* The segment at hand, resolved. */
typedef struct attention_cpu_view {
    const attention_cpu_job *job;
    const attention_cpu_scratch *scratch;
    const raddle_attention_segment *segment;
    const raddle_attention_segment *following; /* the one that the worker takes next, or NULL */
    const raddle_attention_request *request;
    int32_t num_rows;             /* per K/V head */
    int32_t head_begin, head_end; /* K/V heads of the block */
} attention_cpu_view;

/* Tokens of a tile. */
typedef struct attention_cpu_tile {
    const attention_cpu_tokens *tokens;
    int32_t begin, end; /* token range that was asked for */
    int32_t count;      /* entries; fewer than end - begin when pages were skipped */
} attention_cpu_tile;

/* Computes one segment and writes its output or its partial. following: what comes next, to
 * prefetch; NULL for nothing. */
void raddle_attention_cpu_segment(const attention_cpu_job *job,
                                  const attention_cpu_scratch *scratch,
                                  const raddle_attention_segment *segment,
                                  const raddle_attention_segment *following);
/* Adds the tile to the running states (chunk) of all rows of the block. next: the tile that follows,
 * to prefetch; its lists hold tile->count entries at least, or its count is 0. */
void raddle_attention_cpu_attend(const attention_cpu_view *view, const attention_cpu_tile *tile,
                                 const attention_cpu_tile *next);
/* An empty state for each of rows. */
void raddle_attention_cpu_clear(const attention_cpu_states *states, int64_t rows,
                                int32_t head_dim_vo);
/* into = into + from, row by row: the one way in which states are joined, here and in the merge
 * phase. */
void raddle_attention_cpu_fold(const attention_cpu_states *into, const attention_cpu_states *from,
                               int64_t rows, int32_t head_dim_vo);
/* Divides by the sums and writes out and lse of packed rows [row_begin, row_end) of K/V head head.
 * Spoils states. */
void raddle_attention_cpu_write(const attention_cpu_job *job,
                                const raddle_attention_request *request, int32_t head,
                                int32_t row_begin, int32_t row_end,
                                const attention_cpu_states *states);

/* What to subtract from logits whose maximum is max: anything finite will do when all of them are -inf
 * (or NaN). */
static inline float raddle_attention_cpu_base(float max) {
    return max == -INFINITY ? 0.0f : max;
}

#endif

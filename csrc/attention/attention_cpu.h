/* attention_cpu.h - what the files of the CPU back end share: its state in a plan, one worker's
 * scratch, running states.
 *
 * attention_cpu.c launches: workers over segments, then merges. attention_cpu_segment.c computes
 * one segment, attention_cpu_tile.c one tile of it, attention_cpu_variant.c what variants add,
 * attention_cpu_hooks.c compiles a user's. A
 * running state of a row is (max, sum, acc[head_dim_vo]): the largest base 2 logit so far, the sum
 * of 2^(logit - max), and the same sum over V rows. An empty one is (-inf, 0, 0...). Without
 * softmax max is 0 once a key was seen, and sum counts the keys.
 */
#ifndef RADDLE_ATTENTION_ATTENTION_CPU_H
#define RADDLE_ATTENTION_ATTENTION_CPU_H

#include "attention/attention.h"
#include "cpu/vec.h"
#include "kernels/attention/attention_variant_rows.h"

#include <math.h>

enum {
    ATTENTION_CPU_TILE_KV = 128, /* tokens; prefill gains 5 % over 64, and 2 % more at 256 */
    /* Rows of a head: from here on a tile is packed for its rows. */
    ATTENTION_CPU_MANY_ROWS = 16,
};

/* Of attention_cpu_loops.h: built-in variants over rows, in place. */
typedef struct attention_cpu_loops {
    /* x = cap * tanh(x * scale / cap) */
    void (*soft_cap)(float *x, int64_t count, float scale, float cap);
    void (*alibi)(float *x, const int32_t *positions, int64_t count, float slope,
                  const raddle_row *row);
    void (*sigmoid)(float *x, int64_t count);
    /* Turns of a position: pairs cosines, then pairs sines. turns_per_token: rope_turns. */
    void (*make_turns)(float *to, const float *turns_per_token, int32_t pairs, int32_t position);
    /* Rotates the halves of x by such turns. */
    void (*rotate)(float *x, const float *turns, int32_t pairs);
} attention_cpu_loops;

extern const attention_cpu_loops raddle_attention_cpu_loops_generic;
#if defined(__x86_64__)
extern const attention_cpu_loops raddle_attention_cpu_loops_avx2;
extern const attention_cpu_loops raddle_attention_cpu_loops_avx512;
#endif

/* The table for isa.h's choice; never NULL. */
const attention_cpu_loops *raddle_attention_cpu_loops_get(void);

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
    void *q;                     /* [block_rows, head_dim_qk] of dot's operand */
    float *logits;               /* [tile_rows, tile_kv] */
    void *weights;               /* the same of add's operand; logits itself when float32 */
    attention_cpu_states chunk;  /* [block_rows]: of the tiles seen so far */
    attention_cpu_states folded; /* [block_rows]: of the chunks seen so far, in fixed-chunk mode */
    raddle_vec_panel k_panel, v_panel; /* a tile of one head, packed */
    attention_cpu_tokens tokens[2];    /* of this tile and the next */
    /* Where K is changed on its way (state.changes_keys): a tile of one head. */
    float *keys;           /* [tile_kv, head_dim_qk] */
    const void **key_rows; /* [tile_kv] the rows of keys */
    float *turns;          /* [tile_kv, head_dim_qk] of the tile's tokens; with ROPE */
    uint8_t *seen;         /* [tile_kv] of a row; with a mask hook */
} attention_cpu_scratch;

typedef struct attention_cpu_state {
    const raddle_vec *vec;
    const attention_cpu_loops *loops;
    const raddle_vec_block *dot; /* how q meets K */
    const raddle_vec_block *add; /* how weights meet V */
    int32_t q_bytes;             /* of an element of dot's operand */
    int32_t weight_bytes;        /* of add's */
    int32_t block_rows;
    int32_t few_tile_kv; /* tokens of a tile for fewer rows than ATTENTION_CPU_MANY_ROWS */
    bool changes_queries;
    bool changes_keys;
    bool changes_logits; /* beyond sm_scale: cap, ALiBi, hooks, weights that are no softmax */
    bool changes_states;
    const raddle_variant_rows *hooks; /* of the user's variant, or NULL */
    float *slopes;                    /* [num_qo_heads] with ALiBi, else NULL */
    float *rope_steps; /* [tile_kv, head_dim_qk] turns of 0, 1, .. tokens; with ROPE, else NULL */
    bool is_filled;    /* slopes and rope_steps are, by the first run */
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

/* ---------------------------------------------------------------- attention_cpu_variant.c */

/* Packed row of a request and K/V head, as hooks are told. */
static inline raddle_row raddle_attention_cpu_row(const attention_cpu_job *job,
                                                  const raddle_attention_request *request,
                                                  int32_t head, int32_t packed_row) {
    const int32_t group_size = job->params->group_size;
    const int32_t qo_index = packed_row / group_size;
    return (raddle_row){
        .token = (int64_t)request->qo_begin + qo_index,
        .request = (int32_t)(request - job->params->requests),
        .qo_index = qo_index,
        .qo_len = request->qo_len,
        .kv_len = request->kv_len,
        .qo_head = head * group_size + packed_row % group_size,
        .kv_head = head,
    };
}

/* What the plan keeps for its variant, out of arena; the first run knows the numbers. */
void raddle_attention_cpu_layout_variant(const raddle_attention_config *config, raddle_arena *arena,
                                         attention_cpu_state *state);
void raddle_attention_cpu_fill_variant(const raddle_attention_config *config,
                                       const raddle_attention_params *params,
                                       attention_cpu_state *state);
/* A row of q that changes_queries. turns: head_dim_qk floats to use. */
void raddle_attention_cpu_query(const attention_cpu_job *job, const raddle_row *row, float *turns,
                                float *q);
/* Before the heads of a tile whose keys change. */
void raddle_attention_cpu_begin_keys(const attention_cpu_view *view,
                                     const attention_cpu_tile *tile);
/* The tile's keys of one head, into scratch->keys; prefetches next's. */
void raddle_attention_cpu_keys(const attention_cpu_view *view, const attention_cpu_tile *tile,
                               const attention_cpu_tile *next, int32_t head);
/* Turns the products of a row with entries [first, first + count) of the tile into logits in
 * natural units (-inf where the variant's mask hides the key), or into weights where there is no
 * softmax. Returns how many keys the row sees. */
int32_t raddle_attention_cpu_logits(const attention_cpu_view *view, const attention_cpu_tile *tile,
                                    int32_t head, int32_t packed_row, int32_t first, int32_t count,
                                    float *x);
/* Changes the state of a row that has seen all its keys. Returns what its acc is to be multiplied
 * with for that. */
float raddle_attention_cpu_state(const attention_cpu_job *job, const raddle_row *row, float *state);

/* The result of a row, before it is rounded. */
void raddle_attention_cpu_output(const attention_cpu_job *job, const raddle_row *row, float *acc);

/* attention_cpu_hooks.c: the hooks of a variant, compiled; borrowed, for the life of the process. */
raddle_status raddle_attention_cpu_hooks_get(const raddle_attention_variant *variant,
                                             const raddle_variant_rows **out_rows);

/* ---------------------------------------------------------------- small things */

/* What the products of q with a head's K are to be multiplied with. */
static inline float raddle_attention_cpu_scale(const raddle_attention_params *params,
                                               int32_t head) {
    return params->sm_scale * (params->k_scales ? params->k_scales[head] : 1.0f);
}

#endif

/* blend_scheduler.h - what the files of the scheduler share: blend_scheduler.c takes steps,
 * blend_admit.c says who may begin and how many tokens a step has, blend_look.c opens a scheduler and
 * looks again, while it runs, at what outputs are thought to be.
 */
#ifndef RADDLE_BLEND_BLEND_SCHEDULER_H
#define RADDLE_BLEND_BLEND_SCHEDULER_H

#include "blend/blend.h"

enum { RADDLE_BLEND_NONE = -1 };

typedef enum stage { WAITING, PREFILLING, DECODING, DONE } stage;

/* A request on its way. */
typedef struct life {
    int32_t node;
    stage stage;
    int32_t generated; /* when it was last admitted: recomputed with the prompt; at its end, all */
    int32_t done;      /* tokens of prompt and generated that are computed, or were found */
    int32_t cached;    /* of them, that were found */
    int32_t chunk;     /* tokens of its prompt that a step has room for, at least */
    int64_t begun;     /* the step that gave the first token since then */
    int64_t base;      /* forecast: own tokens less the step */
    int64_t expected_end; /* of the forecast */
    int32_t next;         /* of those to be admitted again */
    int32_t older, newer; /* among the decoding, by when they began */
    int32_t end;          /* dual: from which it came, */
    double half_way;      /* and what it counts for there */
    bool is_ending;       /* at the end of the step at hand */
} life;

/* An end of a dual plan. */
typedef struct dual_end {
    int32_t next;          /* in order; of the back, behind it */
    double memory, budget; /* raddle_blend_share_out */
    double held;           /* of the pool, by its requests when half of their outputs are there */
    double debt;           /* tokens that were admitted ahead of the budget */
} dual_end;

struct raddle_blend_scheduler {
    const raddle_blend_store *store;
    const raddle_blend_trie *trie;
    const raddle_blend_cost *cost;
    const raddle_blend_plan *plan;
    raddle_blend_length *lengths; /* what is thought now; NULL when they are known */
    int32_t *seen, *so_far;       /* [num_requests] for what is thought next */
    int32_t next_look;            /* requests done by then */
    raddle_blend_limits limits;
    raddle_blend_pool pool;
    raddle_blend_forecast forecast;
    raddle_blend_counts counts;
    raddle_blend_work left; /* of what is expected */
    life *lives;
    int64_t step;
    int64_t longest_stay; /* steps from an admission to an expected end; the forecast has no more */
    bool is_open;         /* between begin and end of a step */
    int32_t *order;       /* the plan's, with what a window puts first */
    int32_t next[RADDLE_BLEND_MAX_STREAMS]; /* in order */
    double seconds_done[RADDLE_BLEND_MAX_STREAMS], lead[RADDLE_BLEND_MAX_STREAMS];
    bool is_ramped;      /* the pool was full once */
    dual_end ends[2];    /* dual: from the densest on, and back from the least dense */
    int32_t again;       /* first of those that stepped back */
    int32_t *prefilling; /* [num_requests] a queue: admitted, prompts not computed yet */
    int64_t first_prefilling, end_prefilling;
    int64_t
        first_open; /* of the queue: ends its prompt in the step at hand, as those up to first_prefilling */
    int32_t newest;  /* of the decoding */
    int64_t context; /* tokens that they hold, all together */
    /* Of the step at hand: a request has one chunk at most, and of one token at least. */
    raddle_blend_chunk *chunks; /* [min(num_requests, step_tokens)] */
    int32_t *preempted;         /* [num_requests] */
    int32_t num_chunks, num_preempted;
};

typedef raddle_blend_scheduler scheduler;

/* How often what is thought of outputs is looked at again while requests end. */
enum { RADDLE_BLEND_LOOKS = 50 };

static inline int64_t prompt_and_generated(const scheduler *s, int32_t request) {
    return (int64_t)s->store->requests[request].prompt_tokens + s->lives[request].generated;
}

/* Steps that a request is expected to run on; more than it knows of, when it outlived that. */
static inline int64_t expected_left(const scheduler *s, int32_t request) {
    const int64_t all = raddle_blend_length_of(s->store, s->lengths, request).room;
    const int64_t left = all - s->lives[request].generated;
    return left > 0 ? left : RADDLE_BLEND_BUCKET;
}

/* Tokens that no node holds. */
static inline int64_t own_tokens(const scheduler *s, int32_t request) {
    const int64_t shared = (int64_t)s->store->requests[request].num_blocks * s->store->block_size;
    return prompt_and_generated(s, request) - shared;
}

/* Admits one more request, if there is one that fits; chunk: tokens that a step has for prompts. */
bool raddle_blend_admit_next(scheduler *s, int64_t chunk);
/* Tokens that this step may have, by what its decodes read. */
int64_t raddle_blend_pace(scheduler *s, double reads);
/* Looks again at what outputs are thought to be, and at what is left to do; without memory for it,
 * things stay as they were thought to be. */
void raddle_blend_look_again(scheduler *s);

#endif

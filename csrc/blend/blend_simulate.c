/* blend_simulate.c - a run of all requests behind a virtual clock: the scheduler says what each step
 * does, the cost model how long it takes, and the store's true lengths who ends in it.
 *
 * Who ends when is kept in a ring of lists by step: nothing is done per decoding request and step.
 */
#include "blend/blend.h"

#include <string.h>

#include "base/alloc.h"

enum { NONE = -1 };

typedef struct clock {
    const raddle_blend_store *store;
    const raddle_blend_cost *cost;
    raddle_blend_scheduler *scheduler;
    int64_t step;
    int32_t *ring; /* first request that ends at a step, by step modulo its size */
    int64_t ring_size;
    int64_t *end;   /* [num_requests] the step of the last token, once it decodes */
    int32_t *next;  /* [num_requests] in the ring */
    int32_t *ended; /* [num_requests] in the step at hand */
    int32_t num_ended;
    raddle_blend_result result;
    raddle_blend_timeline *timeline; /* or NULL */
} clock;

/* ------------------------------------------------------------------ the ring */

static void put_in_ring(clock *c, int32_t request, int64_t end) {
    int32_t *first = &c->ring[end % c->ring_size];
    c->end[request] = end;
    c->next[request] = *first;
    *first = request;
}

static void take_from_ring(clock *c, int32_t request) {
    int32_t *link = &c->ring[c->end[request] % c->ring_size];
    while (*link != request) {
        link = &c->next[*link];
    }
    *link = c->next[request];
}

/* ------------------------------------------------------------------ the timeline */

static void add_moment(raddle_blend_moment *to, const raddle_blend_moment *m) {
    to->seconds += m->seconds;
    to->compute += m->compute;
    to->read += m->read;
    to->held += m->held;
    to->steps += m->steps;
    to->prompt_tokens += m->prompt_tokens;
    to->hit_tokens += m->hit_tokens;
}

/* Appends a step; stretches become twice as long when there is no room for one more. */
static void note_moment(raddle_blend_timeline *line, const raddle_blend_moment *m) {
    if (line->count > 0 && line->moments[line->count - 1].steps < line->steps_each) {
        add_moment(&line->moments[line->count - 1], m);
        return;
    }
    if (line->count == RADDLE_BLEND_MAX_MOMENTS) {
        line->count /= 2;
        line->steps_each *= 2;
        for (int32_t i = 0; i < line->count; i++) {
            line->moments[i] = line->moments[2 * i];
            add_moment(&line->moments[i], &line->moments[2 * i + 1]);
        }
    }
    line->moments[line->count++] = *m;
}

/* ------------------------------------------------------------------ a step */

static raddle_status take_step(clock *c) {
    raddle_blend_step step;
    RADDLE_TRY(raddle_blend_scheduler_begin(c->scheduler, &step));
    RADDLE_REQUIRE(step.work.tokens > 0, RADDLE_ERR_STATE, "simulate: nothing runs at step %lld",
                   (long long)c->step);
    for (int32_t i = 0; i < step.num_preempted; i++) {
        take_from_ring(c, step.preempted[i]);
    }
    c->num_ended = 0;
    for (int32_t i = c->ring[c->step % c->ring_size]; i != NONE; i = c->next[i]) {
        c->ended[c->num_ended++] = i;
    }
    c->ring[c->step % c->ring_size] = NONE;
    for (int32_t i = 0; i < step.num_chunks; i++) {
        const int32_t request = step.chunks[i].request;
        if (!step.chunks[i].is_last) {
            continue;
        }
        const int32_t left = c->store->requests[request].output_tokens - 1 -
                             raddle_blend_scheduler_generated(c->scheduler, request);
        if (left == 0) {
            c->ended[c->num_ended++] = request;
        } else {
            put_in_ring(c, request, c->step + left);
        }
    }
    RADDLE_TRY(raddle_blend_scheduler_end(c->scheduler, c->ended, c->num_ended));
    c->step++;
    const double seconds = raddle_blend_step_seconds(c->cost, &step.work);
    c->result.seconds += seconds;
    if (c->timeline != NULL) {
        const raddle_blend_moment moment = {
            .seconds = seconds,
            .compute = raddle_blend_compute_seconds(c->cost, &step.work),
            .read = raddle_blend_read_seconds(c->cost, &step.work),
            .held = (double)raddle_blend_scheduler_counts(c->scheduler)->held_tokens,
            .steps = 1,
            .prompt_tokens = step.prompt_tokens,
            .hit_tokens = step.hit_tokens,
        };
        note_moment(c->timeline, &moment);
    }
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ the whole */

/* Adds up what there is, and finds the longest output. */
static raddle_status survey(clock *c, int64_t *out_longest) {
    int64_t longest = 1;
    for (int64_t i = 0; i < c->store->num_requests; i++) {
        const raddle_blend_request *request = &c->store->requests[i];
        RADDLE_REQUIRE(request->output_tokens != RADDLE_BLEND_UNKNOWN, RADDLE_ERR_VALUE,
                       "output_length: a simulation needs all of them, request %lld has none",
                       (long long)i);
        longest = request->output_tokens > longest ? request->output_tokens : longest;
        c->result.prompt_tokens += request->prompt_tokens;
        c->result.output_tokens += request->output_tokens;
    }
    *out_longest = longest;
    return RADDLE_OK;
}

/* The scheduler first: it refuses outputs that the pool has no room for, before a ring is as long. */
static raddle_status open_clock(clock *c, const raddle_blend_trie *trie,
                                const raddle_blend_limits *limits, const raddle_blend_plan *plan,
                                const raddle_blend_length *lengths) {
    int64_t longest = 1;
    const size_t requests = (size_t)c->store->num_requests + 1;
    RADDLE_TRY(survey(c, &longest));
    RADDLE_TRY(raddle_blend_scheduler_create(c->store, trie, c->cost, limits, plan, lengths,
                                             &c->scheduler));
    c->ring_size = longest + 1;
    const size_t ring_bytes = (size_t)c->ring_size * sizeof(int32_t);
    c->ring = raddle_alloc(ring_bytes);
    c->end = raddle_alloc(requests * sizeof(int64_t));
    c->next = raddle_alloc(requests * sizeof(int32_t));
    c->ended = raddle_alloc(requests * sizeof(int32_t));
    if (c->ring == NULL || c->end == NULL || c->next == NULL || c->ended == NULL) {
        return raddle_fail_memory(ring_bytes + requests * sizeof(int64_t));
    }
    memset(c->ring, 0xff, ring_bytes); /* NONE */
    return RADDLE_OK;
}

static void close_clock(clock *c) {
    raddle_blend_scheduler_destroy(c->scheduler);
    raddle_free(c->ring);
    raddle_free(c->end);
    raddle_free(c->next);
    raddle_free(c->ended);
}

static void fill_result(clock *c, const raddle_blend_trie *trie,
                        const raddle_blend_limits *limits) {
    const raddle_blend_counts *counts = raddle_blend_scheduler_counts(c->scheduler);
    raddle_blend_work work;
    const double least = raddle_blend_survey(c->store, trie, NULL, limits, &work);
    c->result.bound_seconds =
        c->store->num_requests == 0 ? 0 : raddle_blend_bound_seconds(c->cost, &work, least, NULL);
    c->result.steps = counts->steps;
    c->result.preemptions = counts->preemptions;
    c->result.hit_tokens = counts->hit_tokens;
    c->result.computed_tokens = counts->computed_tokens;
    c->result.recomputed_tokens = counts->recomputed_tokens;
    c->result.peak_tokens = counts->peak_tokens;
}

raddle_status
raddle_blend_simulate(const raddle_blend_store *store, const raddle_blend_trie *trie,
                      const raddle_blend_cost *cost, const raddle_blend_limits *limits,
                      const raddle_blend_plan *plan, const raddle_blend_length *lengths,
                      raddle_blend_result *out_result, raddle_blend_timeline *out_timeline) {
    clock c = {.store = store, .cost = cost, .timeline = out_timeline};
    if (out_timeline != NULL) {
        *out_timeline = (raddle_blend_timeline){.steps_each = 1};
    }
    raddle_status status = open_clock(&c, trie, limits, plan, lengths);
    while (status == RADDLE_OK &&
           raddle_blend_scheduler_counts(c.scheduler)->done < store->num_requests) {
        status = take_step(&c);
    }
    if (status == RADDLE_OK) {
        fill_result(&c, trie, limits);
        *out_result = c.result;
    }
    close_clock(&c);
    return status;
}

/* blend_simulate.c - a run of all requests behind a virtual clock.
 *
 * The next request comes from the stream that is least far on, or the one behind that when it does
 * not fit. A paced run gives each step as many tokens as keep what is left to compute and what is
 * left to read in step with each other, by what is read now.
 *
 * A step does one token of every decoding request and fills up with chunks of prompts. Nothing is
 * done per decoding request and step: how many there are and what they hold together is kept as two
 * sums, and who ends when in a ring of lists by step.
 *
 * Tokens. A prompt of p whose computed end gives the first token holds p; the step that gives token
 * j > 1 writes one more and reads p + j - 1 (raddle_blend_request_work).
 */
#include "blend/blend.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"

enum { NONE = -1 };

static const double FULL = 0.95, TOO_EMPTY = 0.8; /* of the pool */
static const double LEAD = 0.5;                   /* of the time that an output takes */

/* A request on its way. */
typedef struct life {
    int32_t node;
    int32_t generated;    /* when it was last admitted: recomputed with the prompt */
    int32_t done;         /* tokens of prompt and generated that are computed, or were found */
    int32_t cached;       /* of them, that were found */
    int32_t chunk;        /* tokens of its prompt that a step has room for, at least */
    int64_t base;         /* forecast: own tokens less the step */
    int64_t expected_end; /* of the forecast */
    int64_t end;          /* the step of the last token, once it decodes */
    int32_t next;         /* in the ring, or in the list of those to be admitted again */
    int32_t older, newer; /* among the decoding, by when they began */
} life;

typedef struct run {
    const raddle_blend_store *store;
    const raddle_blend_cost *cost;
    const raddle_blend_limits *limits;
    const raddle_blend_plan *plan;
    const raddle_blend_length *lengths; /* NULL when lengths are known */
    raddle_blend_pool pool;
    raddle_blend_forecast forecast;
    raddle_blend_result result;
    raddle_blend_work total; /* what cannot be avoided */
    raddle_blend_work left;  /* of what is expected */
    double own_steps;        /* tokens that no two requests share, times steps */
    life *lives;
    int32_t *ring; /* first request that ends at a step, by step modulo its size */
    int64_t ring_size;
    int64_t step;
    int32_t *order;                         /* the plan's, with what a window puts first */
    int32_t next[RADDLE_BLEND_MAX_STREAMS]; /* in order */
    double seconds_done[RADDLE_BLEND_MAX_STREAMS], lead[RADDLE_BLEND_MAX_STREAMS];
    bool is_ramped;      /* the pool was full once */
    int32_t again;       /* first of those that stepped back */
    int32_t *prefilling; /* [num_requests] a queue: admitted, prompts not computed yet */
    int64_t first_prefilling, end_prefilling;
    int32_t newest;                  /* of the decoding */
    int64_t num_decoding, context;   /* tokens that they hold, all together */
    int32_t num_running, num_done;   /* admitted; at their ends */
    raddle_blend_timeline *timeline; /* or NULL */
    raddle_blend_moment moment;      /* of the step at hand */
} run;

static int64_t prompt_and_generated(const run *r, int32_t request) {
    return (int64_t)r->store->requests[request].prompt_tokens + r->lives[request].generated;
}

/* Steps that a request is expected to run on; more than it knows of, when it outlived that. */
static int64_t expected_left(const run *r, int32_t request) {
    const int64_t all = raddle_blend_length_of(r->store, r->lengths, request).room;
    const int64_t left = all - r->lives[request].generated;
    return left > 0 ? left : RADDLE_BLEND_BUCKET;
}

/* Tokens that no node holds. */
static int64_t own_tokens(const run *r, int32_t request) {
    const int64_t shared = (int64_t)r->store->requests[request].num_blocks * r->store->block_size;
    return prompt_and_generated(r, request) - shared;
}

/* ------------------------------------------------------------------ admission */

/* The stream that is least far on, of those that `except` is not; NONE when they are empty. */
static int32_t least_far(const run *r, int32_t except) {
    int32_t least = NONE;
    double least_far_on = 0;
    for (int32_t i = 0; i < r->plan->num_streams; i++) {
        const double far_on = r->seconds_done[i] / r->plan->stream_seconds[i] - r->lead[i];
        if (i != except && r->next[i] < r->plan->stream_end[i] &&
            (least == NONE || far_on < least_far_on)) {
            least = i;
            least_far_on = far_on;
        }
    }
    return least;
}

/* The candidate begins, when its peak fits and steps have room for its tokens; alone it always may.
 * chunk: tokens that a step has for prompts. What the forecast knows of it holds as long as its prompt
 * is computed no slower than that. */
static bool admit(run *r, int32_t request, int64_t chunk) {
    life *l = &r->lives[request];
    const raddle_blend_request *from = &r->store->requests[request];
    const int64_t own = own_tokens(r, request);
    const int64_t missing = (int64_t)from->num_blocks * r->store->block_size -
                            raddle_blend_pool_held(&r->pool, l->node);
    const int64_t prefill_steps = 1 + (own + missing + chunk - 1) / chunk;
    const int64_t end = r->step + prefill_steps + expected_left(r, request);
    const int64_t read = r->pool.shared_tokens - r->pool.evictable_tokens;
    const int64_t peak = raddle_blend_forecast_peak(&r->forecast, own - r->step, end);
    int64_t cached = 0;
    if (r->num_running > 0 && (r->num_running >= r->limits->step_tokens ||
                               peak + read + missing > r->limits->pool_tokens)) {
        return false;
    }
    if (!raddle_blend_pool_acquire(&r->pool, l->node, own, &cached)) {
        return false;
    }
    /* The last token is computed even so: its output is asked for. */
    const int64_t most = prompt_and_generated(r, request) - 1;
    l->cached = (int32_t)(cached < most ? cached : most);
    l->done = l->cached;
    l->chunk = (int32_t)chunk;
    l->base = own - r->step;
    l->expected_end = end;
    raddle_blend_forecast_add(&r->forecast, l->base, l->expected_end, 1);
    if (request == r->again) {
        r->again = l->next;
        r->result.recomputed_tokens += most - l->cached;
    }
    r->num_running++;
    r->prefilling[r->end_prefilling++ % r->store->num_requests] = request;
    return true;
}

/* ------------------------------------------------------------------ decoding */

static void push_decoding(run *r, int32_t request) {
    life *l = &r->lives[request];
    l->older = r->newest;
    l->newer = NONE;
    if (r->newest != NONE) {
        r->lives[r->newest].newer = request;
    }
    r->newest = request;
    r->num_decoding++;
    r->context += prompt_and_generated(r, request);
}

static void remove_decoding(run *r, int32_t request, int64_t held) {
    life *l = &r->lives[request];
    if (l->older != NONE) {
        r->lives[l->older].newer = l->newer;
    }
    if (l->newer != NONE) {
        r->lives[l->newer].older = l->older;
    } else {
        r->newest = l->older;
    }
    r->num_decoding--;
    r->context -= held;
}

static void leave_memory(run *r, int32_t request, int64_t own, bool waits_again) {
    life *l = &r->lives[request];
    raddle_blend_forecast_add(&r->forecast, l->base, l->expected_end, -1);
    raddle_blend_pool_release(&r->pool, l->node, own, waits_again);
    r->num_running--;
}

/* The prompt is computed: the first token is there, at the end of this step. */
static void begin_decoding(run *r, int32_t request) {
    life *l = &r->lives[request];
    const int32_t left = r->store->requests[request].output_tokens - l->generated - 1;
    if (left == 0) {
        leave_memory(r, request, own_tokens(r, request), false);
        r->num_done++;
        return;
    }
    /* The forecast knew no better than that it decodes from its admission on. */
    raddle_blend_forecast_add(&r->forecast, l->base, l->expected_end, -1);
    l->base = own_tokens(r, request) - r->step;
    l->expected_end = r->step + expected_left(r, request);
    raddle_blend_forecast_add(&r->forecast, l->base, l->expected_end, 1);
    l->end = r->step + left;
    int32_t *first = &r->ring[l->end % r->ring_size];
    l->next = *first;
    *first = request;
    push_decoding(r, request);
}

/* Those that gave their last token in this step. One that stepped back meanwhile ends elsewhere. */
static void end_decoding(run *r) {
    int32_t *first = &r->ring[r->step % r->ring_size];
    for (int32_t request = *first; request != NONE;) {
        life *l = &r->lives[request];
        const int32_t next = l->next;
        const int64_t written = r->store->requests[request].output_tokens - l->generated - 1;
        remove_decoding(r, request, prompt_and_generated(r, request) + written);
        leave_memory(r, request, own_tokens(r, request) + written, false);
        r->num_done++;
        request = next;
    }
    *first = NONE;
}

static void unlink_from_ring(run *r, int32_t request) {
    int32_t *link = &r->ring[r->lives[request].end % r->ring_size];
    while (*link != request) {
        link = &r->lives[*link].next;
    }
    *link = r->lives[request].next;
}

/* The newest steps back: what it generated is computed again as part of its prompt. */
static void preempt(run *r) {
    const int32_t request = r->newest;
    life *l = &r->lives[request];
    const int32_t output = r->store->requests[request].output_tokens;
    const int64_t left = l->end - (r->step - 1); /* steps, this one included */
    const int64_t written = output - l->generated - 1 - left;
    unlink_from_ring(r, request);
    remove_decoding(r, request, prompt_and_generated(r, request) + written);
    leave_memory(r, request, own_tokens(r, request) + written, true);
    l->generated += (int32_t)written + 1;
    l->next = r->again;
    r->again = request;
    r->result.preemptions++;
}

/* ------------------------------------------------------------------ a step */

/* Of a stream's window, puts the request first that has most in memory; the others keep their order. */
static void put_longest_first(run *r, int32_t stream) {
    const int32_t begin = r->next[stream], left = r->plan->stream_end[stream] - begin;
    const int32_t window = r->plan->window < left ? r->plan->window : left;
    int32_t best = 0;
    int64_t most = -1;
    for (int32_t i = 0; i < window; i++) {
        const int64_t cached =
            raddle_blend_pool_cached(&r->pool, r->lives[r->order[begin + i]].node);
        if (cached > most) {
            most = cached;
            best = i;
        }
    }
    const int32_t first = r->order[begin + best];
    memmove(&r->order[begin + 1], &r->order[begin], (size_t)best * sizeof(int32_t));
    r->order[begin] = first;
}

/* Admits one more, if there is one that fits. */
static bool admit_next(run *r, int64_t chunk) {
    if (r->again != NONE) {
        return admit(r, r->again, chunk);
    }
    int32_t stream = NONE;
    for (int32_t tries = 0; tries < 2; tries++) {
        stream = least_far(r, stream);
        if (stream == NONE) {
            return false;
        }
        if (r->plan->window > 1) {
            put_longest_first(r, stream);
        }
        const int32_t request = r->order[r->next[stream]];
        if (admit(r, request, chunk)) {
            r->next[stream]++;
            const raddle_blend_work work =
                raddle_blend_expected_work(r->store, r->lengths, request, r->lives[request].cached);
            r->seconds_done[stream] += raddle_blend_plain_seconds(r->cost, &work, NULL);
            return true;
        }
    }
    return false;
}

/* Tokens that this step may have. A pool that is not full, at first or because the pace was too slow,
 * is filled at full speed. */
static int64_t pace(run *r, double reads) {
    const int64_t held = r->pool.own_tokens + r->pool.shared_tokens - r->pool.evictable_tokens;
    const double pool = (double)r->limits->pool_tokens;
    r->is_ramped = r->is_ramped || (double)held > FULL * pool;
    if (!r->plan->is_paced || !r->is_ramped || (double)held < TOO_EMPTY * pool ||
        r->left.reads <= 0) {
        return r->limits->step_tokens;
    }
    const double tokens = r->left.tokens / r->left.reads * fmax(reads, pool);
    return tokens < r->limits->step_tokens ? (int64_t)tokens : r->limits->step_tokens;
}

/* Chunks of prompts until the step is full. */
static void fill_with_prompts(run *r, raddle_blend_work *work) {
    int64_t room = pace(r, work->reads) - r->num_decoding;
    if (r->first_prefilling < r->end_prefilling) { /* what is begun keeps its speed */
        const int32_t request = r->prefilling[r->first_prefilling % r->store->num_requests];
        room = room > r->lives[request].chunk ? room : r->lives[request].chunk;
    }
    for (int64_t left = room; left > 0;) {
        /* Those that end here decode from the next step on. */
        if (r->first_prefilling == r->end_prefilling && !admit_next(r, room)) {
            return;
        }
        const int32_t request = r->prefilling[r->first_prefilling % r->store->num_requests];
        life *l = &r->lives[request];
        const int64_t whole = prompt_and_generated(r, request);
        const int64_t chunk = whole - l->done < left ? whole - l->done : left;
        const raddle_blend_work part = raddle_blend_request_work(l->done + chunk, l->done, 1);
        work->tokens += part.tokens;
        work->scores += part.scores;
        l->done += (int32_t)chunk;
        left -= chunk;
        if (l->done == whole) {
            r->first_prefilling++;
            room = room > 1 ? room - 1 : 1;
            r->moment.prompt_tokens += whole;
            r->moment.hit_tokens += l->cached;
            r->result.hit_tokens += l->generated == 0 ? l->cached : 0;
        }
    }
}

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

static raddle_status take_step(run *r) {
    r->moment = (raddle_blend_moment){.steps = 1};
    raddle_blend_forecast_advance(&r->forecast, r->step);
    while (r->num_decoding > 0 && !raddle_blend_pool_grow(&r->pool, r->num_decoding)) {
        preempt(r);
    }
    const int64_t first = r->first_prefilling;
    raddle_blend_work work = {.tokens = (double)r->num_decoding,
                              .reads = (double)(r->context + r->num_decoding)};
    r->context += r->num_decoding;
    fill_with_prompts(r, &work);
    RADDLE_REQUIRE(work.tokens > 0, RADDLE_ERR_STATE, "simulate: nothing runs at step %lld",
                   (long long)r->step);
    end_decoding(r);
    for (int64_t i = first; i < r->first_prefilling; i++) {
        begin_decoding(r, r->prefilling[i % r->store->num_requests]);
    }
    const int64_t held = r->pool.shared_tokens + r->pool.own_tokens;
    r->result.peak_tokens = held > r->result.peak_tokens ? held : r->result.peak_tokens;
    r->moment.seconds = raddle_blend_step_seconds(r->cost, &work);
    r->result.seconds += r->moment.seconds;
    if (r->timeline != NULL) {
        r->moment.compute = raddle_blend_compute_seconds(r->cost, &work);
        r->moment.read = raddle_blend_read_seconds(r->cost, &work);
        r->moment.held = (double)held;
        note_moment(r->timeline, &r->moment);
    }
    r->result.computed_tokens += (int64_t)work.tokens;
    r->left.tokens -= work.tokens;
    r->left.reads -= work.reads;
    r->result.steps++;
    r->step++;
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ the whole */

static raddle_status check_request(const run *r, int32_t i) {
    const raddle_blend_request *request = &r->store->requests[i];
    RADDLE_REQUIRE(request->output_tokens != RADDLE_BLEND_UNKNOWN, RADDLE_ERR_VALUE,
                   "output_length: a simulation needs all of them, request %d has none", (int)i);
    const int64_t most = (int64_t)request->prompt_tokens + request->output_tokens;
    RADDLE_REQUIRE(most <= r->limits->pool_tokens, RADDLE_ERR_VALUE,
                   "memory: request %d has %lld tokens, the pool %lld; leave it out, or give the "
                   "pool more",
                   (int)i, (long long)most, (long long)r->limits->pool_tokens);
    return RADDLE_OK;
}

/* Adds up what there is to do at the least, and finds the longest output. */
static raddle_status survey(run *r, const raddle_blend_trie *trie, int64_t *out_longest) {
    int64_t longest = 1;
    for (int32_t k = 0; k < trie->num_requests; k++) {
        const int32_t i = trie->order[k];
        const raddle_blend_request *request = &r->store->requests[i];
        RADDLE_TRY(check_request(r, i));
        r->lives[i].node = trie->node_of[k];
        longest = request->output_tokens > longest ? request->output_tokens : longest;
        r->result.prompt_tokens += request->prompt_tokens;
        r->result.output_tokens += request->output_tokens;
        /* A repeated prompt counts as nothing, though its last token has to be computed. */
        const int64_t cached =
            (int64_t)raddle_blend_trie_shared_before(trie, k) * r->store->block_size;
        const raddle_blend_work work =
            raddle_blend_request_work(request->prompt_tokens, cached, request->output_tokens);
        r->total.tokens += work.tokens;
        r->total.scores += work.scores;
        r->total.reads += work.reads;
        const raddle_blend_work left = raddle_blend_expected_work(r->store, r->lengths, i, cached);
        r->left.tokens += left.tokens;
        r->left.reads += left.reads;
        const double alone = request->prompt_tokens -
                             (double)raddle_blend_trie_shared(trie, k) * r->store->block_size;
        const double steps = request->output_tokens - 1;
        r->own_steps += alone * steps + steps * (steps + 1) / 2;
    }
    *out_longest = longest;
    return RADDLE_OK;
}

/* The most steps from an admission to the expected end: a token of the prompt in each, at the worst. */
static int64_t longest_stay(const run *r) {
    int64_t longest = 0;
    for (int64_t i = 0; i < r->store->num_requests; i++) {
        const raddle_blend_request *from = &r->store->requests[i];
        const int32_t room = r->lengths == NULL ? 0 : r->lengths[i].room;
        const int64_t output = from->output_tokens > room ? from->output_tokens : room;
        const int64_t stay = 1 + from->prompt_tokens + output + RADDLE_BLEND_BUCKET;
        longest = stay > longest ? stay : longest;
    }
    return longest;
}

static raddle_status open_run(run *r, const raddle_blend_trie *trie) {
    int64_t longest = 1;
    const size_t requests = (size_t)r->store->num_requests;
    r->lives = raddle_alloc_zero(requests * sizeof(life));
    r->prefilling = raddle_alloc(requests * sizeof(int32_t));
    r->order = raddle_alloc(requests * sizeof(int32_t));
    if (r->lives == NULL || r->prefilling == NULL || r->order == NULL) {
        return raddle_fail_memory(requests * sizeof(life));
    }
    memcpy(r->order, r->plan->order, requests * sizeof(int32_t));
    RADDLE_TRY(survey(r, trie, &longest));
    r->ring_size = longest + 1;
    r->ring = raddle_alloc((size_t)r->ring_size * sizeof(int32_t));
    if (r->ring == NULL) {
        return raddle_fail_memory((size_t)r->ring_size * sizeof(int32_t));
    }
    memset(r->ring, 0xff, (size_t)r->ring_size * sizeof(int32_t)); /* NONE */
    RADDLE_TRY(raddle_blend_forecast_init(&r->forecast, longest_stay(r)));
    RADDLE_TRY(
        raddle_blend_pool_init(&r->pool, trie, r->store->block_size, r->limits->pool_tokens));
    const double for_memory = r->own_steps / (double)r->limits->pool_tokens;
    const double for_tokens = r->total.tokens / (double)r->limits->step_tokens;
    const double least = fmax(fmax(for_memory, for_tokens), (double)longest);
    double steps = 0;
    r->result.bound_seconds = raddle_blend_bound_seconds(r->cost, &r->total, least, &steps);
    for (int32_t i = 0; r->plan->is_paced && i < r->plan->num_streams; i++) {
        r->lead[i] = LEAD * r->plan->stream_output[i] / steps;
    }
    return RADDLE_OK;
}

static void close_run(run *r) {
    raddle_blend_pool_fini(&r->pool);
    raddle_blend_forecast_fini(&r->forecast);
    raddle_free(r->lives);
    raddle_free(r->ring);
    raddle_free(r->prefilling);
    raddle_free(r->order);
}

raddle_status
raddle_blend_simulate(const raddle_blend_store *store, const raddle_blend_trie *trie,
                      const raddle_blend_cost *cost, const raddle_blend_limits *limits,
                      const raddle_blend_plan *plan, const raddle_blend_length *lengths,
                      raddle_blend_result *out_result, raddle_blend_timeline *out_timeline) {
    RADDLE_TRY(raddle_blend_cost_check(cost));
    RADDLE_REQUIRE(limits->step_tokens >= 1 && limits->pool_tokens >= 1, RADDLE_ERR_VALUE,
                   "limits: expected at least one token in a step and in the pool, got %d and %lld",
                   (int)limits->step_tokens, (long long)limits->pool_tokens);
    run r = {
        .store = store,
        .cost = cost,
        .limits = limits,
        .plan = plan,
        .lengths = lengths,
        .again = NONE,
        .newest = NONE,
        .timeline = out_timeline,
    };
    if (out_timeline != NULL) {
        *out_timeline = (raddle_blend_timeline){.steps_each = 1};
    }
    raddle_status status = RADDLE_OK;
    if (store->num_requests > 0) {
        for (int32_t i = 1; i < plan->num_streams; i++) {
            r.next[i] = plan->stream_end[i - 1];
        }
        status = open_run(&r, trie);
        while (status == RADDLE_OK && r.num_done < store->num_requests) {
            status = take_step(&r);
        }
    }
    close_run(&r);
    if (status == RADDLE_OK) {
        *out_result = r.result;
    }
    return status;
}

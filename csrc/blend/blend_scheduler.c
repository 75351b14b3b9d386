/* blend_scheduler.c - who runs, step by step.
 *
 * The next request comes from the stream that is least far on, or the one behind that when it does
 * not fit. A step does one token of every decoding request and fills up with chunks of prompts. A
 * paced run gives each step as many tokens as keep what is left to compute and what is left to read in
 * step with each other, by what is read now.
 *
 * Nothing is done per decoding request and step: how many there are and what they hold together is
 * kept as two sums. Who has given its last token is for the caller to say.
 *
 * Tokens. A prompt of p whose computed end gives the first token holds p; the step that gives token
 * j > 1 writes one more and reads p + j - 1 (raddle_blend_request_work).
 */
#include "blend/blend.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"

enum { NONE = -1 };

/* Of strata, how many are tried before the step goes on without: short requests then use what long
 * ones leave, and none gets far ahead. benchmarks/LOG.md has what each constant does. */
static const double TRIED = 0.375;
static const double FULL = 0.95, TOO_EMPTY = 0.8; /* of the pool */
static const double LEAD = 0.75;                  /* of the time that an output takes */
/* How often what is thought of outputs is looked at again while requests end. */
enum { LOOKS = 50 };

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
    bool is_ending;       /* at the end of the step at hand */
} life;

typedef struct list {
    void *items;
    int32_t count, capacity;
} list;

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
    bool is_open;                           /* between begin and end of a step */
    int32_t *order;                         /* the plan's, with what a window puts first */
    int32_t next[RADDLE_BLEND_MAX_STREAMS]; /* in order */
    double seconds_done[RADDLE_BLEND_MAX_STREAMS], lead[RADDLE_BLEND_MAX_STREAMS];
    bool is_ramped;      /* the pool was full once */
    int32_t again;       /* first of those that stepped back */
    int32_t *prefilling; /* [num_requests] a queue: admitted, prompts not computed yet */
    int64_t first_prefilling, end_prefilling;
    int64_t
        first_open; /* of the queue: ends its prompt in the step at hand, as those up to first_prefilling */
    int32_t newest;         /* of the decoding */
    int64_t context;        /* tokens that they hold, all together */
    list chunks, preempted; /* of the step at hand */
};

typedef raddle_blend_scheduler scheduler;

static int64_t prompt_and_generated(const scheduler *s, int32_t request) {
    return (int64_t)s->store->requests[request].prompt_tokens + s->lives[request].generated;
}

/* Steps that a request is expected to run on; more than it knows of, when it outlived that. */
static int64_t expected_left(const scheduler *s, int32_t request) {
    const int64_t all = raddle_blend_length_of(s->store, s->lengths, request).room;
    const int64_t left = all - s->lives[request].generated;
    return left > 0 ? left : RADDLE_BLEND_BUCKET;
}

/* Tokens that no node holds. */
static int64_t own_tokens(const scheduler *s, int32_t request) {
    const int64_t shared = (int64_t)s->store->requests[request].num_blocks * s->store->block_size;
    return prompt_and_generated(s, request) - shared;
}

/* A place for one more item of so many bytes; NULL without memory. */
static void *append(list *to, size_t bytes) {
    if (to->count == to->capacity) {
        const int32_t capacity = to->capacity == 0 ? 64 : 2 * to->capacity;
        void *items = raddle_realloc(to->items, (size_t)capacity * bytes);
        if (items == NULL) {
            return NULL;
        }
        to->items = items;
        to->capacity = capacity;
    }
    return (char *)to->items + (size_t)to->count++ * bytes;
}

/* ------------------------------------------------------------------ admission */

/* The stream that is least far on, of those that are not tried (bits); NONE when they are empty. */
static int32_t least_far(const scheduler *s, uint32_t tried) {
    int32_t least = NONE;
    double least_far_on = 0;
    for (int32_t i = 0; i < s->plan->num_streams; i++) {
        const double far_on = s->seconds_done[i] / s->plan->stream_seconds[i] - s->lead[i];
        if ((tried >> i & 1) == 0 && s->next[i] < s->plan->stream_end[i] &&
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
static bool admit(scheduler *s, int32_t request, int64_t chunk) {
    life *l = &s->lives[request];
    const raddle_blend_request *from = &s->store->requests[request];
    const int64_t own = own_tokens(s, request);
    const int64_t missing = (int64_t)from->num_blocks * s->store->block_size -
                            raddle_blend_pool_held(&s->pool, l->node);
    const int64_t prefill_steps = 1 + (own + missing + chunk - 1) / chunk;
    const int64_t end = s->step + prefill_steps + expected_left(s, request);
    const int64_t read = s->pool.shared_tokens - s->pool.evictable_tokens;
    const int64_t peak = raddle_blend_forecast_peak(&s->forecast, own - s->step, end);
    int64_t cached = 0;
    if (s->counts.running > 0 && (s->counts.running >= s->limits.step_tokens ||
                                  peak + read + missing > s->limits.pool_tokens)) {
        return false;
    }
    if (!raddle_blend_pool_acquire(&s->pool, l->node, own, &cached)) {
        return false;
    }
    /* The last token is computed even so: its output is asked for. */
    const int64_t most = prompt_and_generated(s, request) - 1;
    l->stage = PREFILLING;
    l->cached = (int32_t)(cached < most ? cached : most);
    l->done = l->cached;
    l->chunk = (int32_t)chunk;
    l->base = own - s->step;
    l->expected_end = end;
    raddle_blend_forecast_add(&s->forecast, l->base, l->expected_end, 1);
    if (request == s->again) {
        s->again = l->next;
        s->counts.recomputed_tokens += most - l->cached;
    }
    s->counts.running++;
    s->prefilling[s->end_prefilling++ % s->store->num_requests] = request;
    return true;
}

/* Of a stream's window, puts the request first that has most in memory; the others keep their order. */
static void put_longest_first(scheduler *s, int32_t stream) {
    const int32_t begin = s->next[stream], left = s->plan->stream_end[stream] - begin;
    const int32_t window = s->plan->window < left ? s->plan->window : left;
    int32_t best = 0;
    int64_t most = -1;
    for (int32_t i = 0; i < window; i++) {
        const int64_t cached =
            raddle_blend_pool_cached(&s->pool, s->lives[s->order[begin + i]].node);
        if (cached > most) {
            most = cached;
            best = i;
        }
    }
    const int32_t first = s->order[begin + best];
    memmove(&s->order[begin + 1], &s->order[begin], (size_t)best * sizeof(int32_t));
    s->order[begin] = first;
}

/* Admits one more, if there is one that fits. */
static bool admit_next(scheduler *s, int64_t chunk) {
    if (s->again != NONE) {
        return admit(s, s->again, chunk);
    }
    uint32_t tried = 0;
    const int32_t most = (int32_t)(TRIED * s->plan->num_streams);
    for (int32_t tries = 0; tries < 2 || tries < most; tries++) {
        const int32_t stream = least_far(s, tried);
        if (stream == NONE) {
            return false;
        }
        tried |= (uint32_t)1 << stream;
        if (s->plan->window > 1) {
            put_longest_first(s, stream);
        }
        const int32_t request = s->order[s->next[stream]];
        if (admit(s, request, chunk)) {
            s->next[stream]++;
            const raddle_blend_work work =
                raddle_blend_expected_work(s->store, s->lengths, request, s->lives[request].cached);
            s->seconds_done[stream] += raddle_blend_plain_seconds(s->cost, &work, NULL);
            return true;
        }
    }
    return false;
}

/* ------------------------------------------------------------------ decoding */

static void push_decoding(scheduler *s, int32_t request) {
    life *l = &s->lives[request];
    l->stage = DECODING;
    l->older = s->newest;
    l->newer = NONE;
    if (s->newest != NONE) {
        s->lives[s->newest].newer = request;
    }
    s->newest = request;
    s->counts.decoding++;
    s->context += prompt_and_generated(s, request);
}

static void remove_decoding(scheduler *s, int32_t request, int64_t held) {
    life *l = &s->lives[request];
    if (l->older != NONE) {
        s->lives[l->older].newer = l->newer;
    }
    if (l->newer != NONE) {
        s->lives[l->newer].older = l->older;
    } else {
        s->newest = l->older;
    }
    s->counts.decoding--;
    s->context -= held;
}

static void leave_memory(scheduler *s, int32_t request, int64_t own, bool waits_again) {
    life *l = &s->lives[request];
    raddle_blend_forecast_add(&s->forecast, l->base, l->expected_end, -1);
    raddle_blend_pool_release(&s->pool, l->node, own, waits_again);
    s->counts.running--;
}

/* The prompt is computed, the first token is there, and it goes on. */
static void begin_decoding(scheduler *s, int32_t request) {
    life *l = &s->lives[request];
    /* The forecast knew no better than that it decodes from its admission on. */
    raddle_blend_forecast_add(&s->forecast, l->base, l->expected_end, -1);
    l->base = own_tokens(s, request) - s->step;
    l->expected_end = s->step + expected_left(s, request);
    raddle_blend_forecast_add(&s->forecast, l->base, l->expected_end, 1);
    l->begun = s->step;
    push_decoding(s, request);
}

/* Tokens written since its prompt was computed, up to the end of step `last`. */
static int64_t written_until(const scheduler *s, int32_t request, int64_t last) {
    const life *l = &s->lives[request];
    return l->stage == DECODING ? last - l->begun : 0;
}

/* Steps back or ends; the last step that it took part in. */
static void leave(scheduler *s, int32_t request, int64_t last, bool waits_again) {
    life *l = &s->lives[request];
    const int64_t written = written_until(s, request, last);
    if (l->stage == DECODING) {
        remove_decoding(s, request, prompt_and_generated(s, request) + written);
    }
    leave_memory(s, request, own_tokens(s, request) + written, waits_again);
    l->generated += (int32_t)written + 1;
    l->stage = waits_again ? WAITING : DONE;
}

/* The newest steps back: what it generated is computed again as part of its prompt. */
static raddle_status preempt(scheduler *s) {
    const int32_t request = s->newest;
    int32_t *place = append(&s->preempted, sizeof(int32_t));
    if (place == NULL) {
        return raddle_fail_memory((size_t)s->preempted.capacity * 2 * sizeof(int32_t));
    }
    *place = request;
    leave(s, request, s->step - 1, true);
    s->lives[request].next = s->again;
    s->again = request;
    s->counts.preemptions++;
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ a step */

/* Tokens that this step may have. A pool that is not full, at first or because the pace was too slow,
 * is filled at full speed. */
static int64_t pace(scheduler *s, double reads) {
    const int64_t held = s->pool.own_tokens + s->pool.shared_tokens - s->pool.evictable_tokens;
    const double pool = (double)s->limits.pool_tokens;
    s->is_ramped = s->is_ramped || (double)held > FULL * pool;
    if (!s->plan->is_paced || !s->is_ramped || (double)held < TOO_EMPTY * pool ||
        s->left.reads <= 0) {
        return s->limits.step_tokens;
    }
    const double tokens = s->left.tokens / s->left.reads * fmax(reads, pool);
    return tokens < s->limits.step_tokens ? (int64_t)tokens : s->limits.step_tokens;
}

/* Chunks of prompts until the step is full. */
static raddle_status fill_with_prompts(scheduler *s, raddle_blend_step *step) {
    int64_t room = pace(s, step->work.reads) - s->counts.decoding;
    if (s->first_prefilling < s->end_prefilling) { /* what is begun keeps its speed */
        const int32_t request = s->prefilling[s->first_prefilling % s->store->num_requests];
        room = room > s->lives[request].chunk ? room : s->lives[request].chunk;
    }
    for (int64_t left = room; left > 0;) {
        /* Those that end here decode from the next step on. */
        if (s->first_prefilling == s->end_prefilling && !admit_next(s, room)) {
            break;
        }
        const int32_t request = s->prefilling[s->first_prefilling % s->store->num_requests];
        life *l = &s->lives[request];
        const int64_t whole = prompt_and_generated(s, request);
        const int64_t count = whole - l->done < left ? whole - l->done : left;
        const raddle_blend_work part = raddle_blend_request_work(l->done + count, l->done, 1);
        raddle_blend_chunk *chunk = append(&s->chunks, sizeof *chunk);
        if (chunk == NULL) {
            return raddle_fail_memory((size_t)s->chunks.capacity * 2 * sizeof *chunk);
        }
        *chunk = (raddle_blend_chunk){
            .request = request,
            .begin = l->done,
            .count = (int32_t)count,
            .is_last = l->done + count == whole,
        };
        step->work.tokens += part.tokens;
        step->work.scores += part.scores;
        l->done += (int32_t)count;
        left -= count;
        if (chunk->is_last) {
            s->first_prefilling++;
            room = room > 1 ? room - 1 : 1;
            step->prompt_tokens += whole;
            step->hit_tokens += l->cached;
            s->counts.hit_tokens += l->generated == 0 ? l->cached : 0;
        }
    }
    return RADDLE_OK;
}

raddle_status raddle_blend_scheduler_begin(raddle_blend_scheduler *s, raddle_blend_step *out_step) {
    RADDLE_REQUIRE(!s->is_open, RADDLE_ERR_STATE,
                   "step: the last one has not ended; say first who gave a last token in it");
    s->chunks.count = s->preempted.count = 0;
    raddle_blend_forecast_advance(&s->forecast, s->step);
    while (s->counts.decoding > 0 && !raddle_blend_pool_grow(&s->pool, s->counts.decoding)) {
        RADDLE_TRY(preempt(s));
    }
    s->first_open = s->first_prefilling;
    raddle_blend_step step = {
        .num_decoding = s->counts.decoding,
        .work = {.tokens = s->counts.decoding, .reads = (double)(s->context + s->counts.decoding)}};
    s->context += s->counts.decoding;
    RADDLE_TRY(fill_with_prompts(s, &step));
    step.preempted = s->preempted.items;
    step.num_preempted = s->preempted.count;
    step.chunks = s->chunks.items;
    step.num_chunks = s->chunks.count;
    const int64_t held = s->pool.shared_tokens + s->pool.own_tokens;
    s->counts.peak_tokens = held > s->counts.peak_tokens ? held : s->counts.peak_tokens;
    s->counts.held_tokens = held;
    s->counts.computed_tokens += (int64_t)step.work.tokens;
    s->left.tokens -= step.work.tokens;
    s->left.reads -= step.work.reads;
    s->is_open = true;
    *out_step = step;
    return RADDLE_OK;
}

/* Whether a request gave a token in the step at hand, and was not named before. */
static bool can_end(const scheduler *s, int32_t request) {
    if (request < 0 || request >= s->store->num_requests) {
        return false;
    }
    const life *l = &s->lives[request];
    return !l->is_ending && (l->stage == DECODING || (l->stage == PREFILLING &&
                                                      l->done == prompt_and_generated(s, request)));
}

/* What a request that has begun is expected to do yet. */
static raddle_blend_work work_left(const scheduler *s, int32_t request) {
    const life *l = &s->lives[request];
    const raddle_blend_length length = raddle_blend_length_of(s->store, s->lengths, request);
    const double prompt = s->store->requests[request].prompt_tokens;
    const double given = raddle_blend_scheduler_generated(s, request);
    const double left = fmax(length.mean - given, 1);
    const double squares = fmax(length.square - given * given, left);
    const double unread = l->stage == PREFILLING ? prompt + given - l->done : 0;
    return (raddle_blend_work){.tokens = unread + left, .reads = left * prompt + squares / 2};
}

/* Looks again at what outputs are thought to be, and at what is left to do. */
static raddle_status look_again(scheduler *s) {
    s->left = (raddle_blend_work){0};
    for (int64_t i = 0; i < s->store->num_requests; i++) {
        const life *l = &s->lives[i];
        s->so_far[i] = raddle_blend_scheduler_generated(s, (int32_t)i);
        s->seen[i] = l->stage == DONE        ? l->generated
                     : s->lengths[i].is_seen ? (int32_t)s->lengths[i].mean
                                             : RADDLE_BLEND_UNKNOWN;
    }
    RADDLE_TRY(raddle_blend_lengths_guess(s->store, s->trie, s->seen, s->so_far, s->lengths));
    for (int32_t k = 0; k < s->trie->num_requests; k++) {
        const int32_t i = s->trie->order[k];
        if (s->lives[i].stage == DONE) {
            continue;
        }
        const int64_t cached =
            (int64_t)raddle_blend_trie_shared_before(s->trie, k) * s->store->block_size;
        const raddle_blend_work work =
            s->lives[i].stage == WAITING && s->lives[i].generated == 0
                ? raddle_blend_expected_work(s->store, s->lengths, i, cached)
                : work_left(s, i);
        s->left.tokens += work.tokens;
        s->left.reads += work.reads;
    }
    return RADDLE_OK;
}

raddle_status raddle_blend_scheduler_end(raddle_blend_scheduler *s, const int32_t *ended,
                                         int32_t num_ended) {
    RADDLE_REQUIRE(s->is_open, RADDLE_ERR_STATE, "retire: no step has begun");
    int32_t marked = 0;
    while (marked < num_ended && can_end(s, ended[marked])) {
        s->lives[ended[marked++]].is_ending = true;
    }
    for (int32_t i = 0; i < marked; i++) {
        s->lives[ended[i]].is_ending = false;
    }
    RADDLE_REQUIRE(marked == num_ended, RADDLE_ERR_VALUE,
                   "ended: expected requests that gave a token in this step, each once, got %d at "
                   "position %d",
                   (int)ended[marked], (int)marked);
    for (int32_t i = 0; i < num_ended; i++) {
        leave(s, ended[i], s->step, false);
        s->counts.done++;
    }
    for (int64_t i = s->first_open; i < s->first_prefilling; i++) {
        const int32_t request = s->prefilling[i % s->store->num_requests];
        if (s->lives[request].stage == PREFILLING) {
            begin_decoding(s, request);
        }
    }
    s->counts.steps++;
    s->step++;
    s->is_open = false;
    if (s->lengths != NULL && s->counts.done >= s->next_look) {
        s->next_look = s->counts.done + (int32_t)(s->store->num_requests / LOOKS) + 1;
        return look_again(s);
    }
    return RADDLE_OK;
}

int32_t raddle_blend_scheduler_generated(const raddle_blend_scheduler *s, int32_t request) {
    const life *l = &s->lives[request];
    return l->generated +
           (l->stage == DECODING ? (int32_t)written_until(s, request, s->step - 1) + 1 : 0);
}

const raddle_blend_counts *raddle_blend_scheduler_counts(const raddle_blend_scheduler *s) {
    return &s->counts;
}

/* ------------------------------------------------------------------ the whole */

static raddle_status check(const scheduler *s) {
    RADDLE_TRY(raddle_blend_cost_check(s->cost));
    RADDLE_REQUIRE(s->limits.step_tokens >= 1 && s->limits.pool_tokens >= 1, RADDLE_ERR_VALUE,
                   "limits: expected at least one token in a step and in the pool, got %d and %lld",
                   (int)s->limits.step_tokens, (long long)s->limits.pool_tokens);
    for (int64_t i = 0; i < s->store->num_requests; i++) {
        const raddle_blend_request *request = &s->store->requests[i];
        const int64_t output = request->output_tokens == RADDLE_BLEND_UNKNOWN
                                   ? request->max_tokens
                                   : request->output_tokens;
        RADDLE_REQUIRE(
            request->prompt_tokens + output <= s->limits.pool_tokens, RADDLE_ERR_VALUE,
            "memory: request %lld may take %lld tokens, the pool has %lld; leave it out, "
            "let it generate less, or give the pool more",
            (long long)i, (long long)(request->prompt_tokens + output),
            (long long)s->limits.pool_tokens);
    }
    return RADDLE_OK;
}

/* The most steps from an admission to the expected end: a token of the prompt in each, at the worst. */
static int64_t longest_stay(const scheduler *s) {
    int64_t longest = 0;
    for (int64_t i = 0; i < s->store->num_requests; i++) {
        const raddle_blend_request *from = &s->store->requests[i];
        const int64_t output =
            from->output_tokens == RADDLE_BLEND_UNKNOWN ? from->max_tokens : from->output_tokens;
        const int64_t room = s->lengths == NULL ? 0 : s->lengths[i].room;
        const int64_t stay =
            1 + from->prompt_tokens + (output > room ? output : room) + RADDLE_BLEND_BUCKET;
        longest = stay > longest ? stay : longest;
    }
    return longest;
}

/* What is expected to be left to do, and how far long outputs are let ahead for it. */
static void look_ahead(scheduler *s) {
    double steps = 0;
    const double least = raddle_blend_survey(s->store, s->trie, s->lengths, &s->limits, &s->left);
    raddle_blend_bound_seconds(s->cost, &s->left, least, &steps);
    for (int32_t i = 0; s->plan->is_paced && i < s->plan->num_streams; i++) {
        s->lead[i] = LEAD * s->plan->stream_output[i] / steps;
    }
}

static raddle_status open_scheduler(scheduler *s, const raddle_blend_length *lengths) {
    const size_t requests = (size_t)s->store->num_requests + 1;
    RADDLE_TRY(check(s));
    if (lengths != NULL) {
        s->lengths = raddle_alloc(requests * sizeof *lengths);
        s->seen = raddle_alloc(requests * sizeof(int32_t));
        s->so_far = raddle_alloc(requests * sizeof(int32_t));
        if (s->lengths == NULL || s->seen == NULL || s->so_far == NULL) {
            return raddle_fail_memory(requests * sizeof *lengths);
        }
        memcpy(s->lengths, lengths, (requests - 1) * sizeof *lengths);
    }
    s->lives = raddle_alloc_zero(requests * sizeof(life));
    s->prefilling = raddle_alloc(requests * sizeof(int32_t));
    s->order = raddle_alloc(requests * sizeof(int32_t));
    if (s->lives == NULL || s->prefilling == NULL || s->order == NULL) {
        return raddle_fail_memory(requests * sizeof(life));
    }
    memcpy(s->order, s->plan->order, (requests - 1) * sizeof(int32_t));
    for (int32_t i = 1; i < s->plan->num_streams; i++) {
        s->next[i] = s->plan->stream_end[i - 1];
    }
    for (int32_t k = 0; k < s->trie->num_requests; k++) {
        s->lives[s->trie->order[k]].node = s->trie->node_of[k];
    }
    look_ahead(s);
    RADDLE_TRY(raddle_blend_forecast_init(&s->forecast, longest_stay(s)));
    return raddle_blend_pool_init(&s->pool, s->trie, s->store->block_size, s->limits.pool_tokens);
}

raddle_status
raddle_blend_scheduler_create(const raddle_blend_store *store, const raddle_blend_trie *trie,
                              const raddle_blend_cost *cost, const raddle_blend_limits *limits,
                              const raddle_blend_plan *plan, const raddle_blend_length *lengths,
                              raddle_blend_scheduler **out_scheduler) {
    scheduler *s = raddle_alloc_zero(sizeof *s);
    if (s == NULL) {
        return raddle_fail_memory(sizeof *s);
    }
    s->store = store;
    s->trie = trie;
    s->cost = cost;
    s->plan = plan;
    s->limits = *limits;
    s->again = s->newest = NONE;
    const raddle_status status = open_scheduler(s, lengths);
    if (status != RADDLE_OK) {
        raddle_blend_scheduler_destroy(s);
        return status;
    }
    *out_scheduler = s;
    return RADDLE_OK;
}

void raddle_blend_scheduler_destroy(raddle_blend_scheduler *s) {
    if (s == NULL) {
        return;
    }
    raddle_blend_pool_fini(&s->pool);
    raddle_blend_forecast_fini(&s->forecast);
    raddle_free(s->lengths);
    raddle_free(s->seen);
    raddle_free(s->so_far);
    raddle_free(s->lives);
    raddle_free(s->prefilling);
    raddle_free(s->order);
    raddle_free(s->chunks.items);
    raddle_free(s->preempted.items);
    raddle_free(s);
}

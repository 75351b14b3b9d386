/* blend_scheduler.c - what each step does.
 *
 * A step does one token of every decoding request and fills up with chunks of prompts. Nothing is done
 * per decoding request and step: how many there are and what they hold together is kept as two sums.
 * Who has given its last token is for the caller to say.
 *
 * Tokens. A prompt of p whose computed end gives the first token holds p; the step that gives token
 * j > 1 writes one more and reads p + j - 1 (raddle_blend_request_work).
 */
#include "blend/blend_scheduler.h"

enum { NONE = RADDLE_BLEND_NONE };

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
    if (!waits_again) {
        s->ends[l->end].held -= l->half_way;
    }
    l->generated += (int32_t)written + 1;
    l->stage = waits_again ? WAITING : DONE;
}

/* The newest steps back: what it generated is computed again as part of its prompt. */
static void preempt(scheduler *s) {
    const int32_t request = s->newest;
    s->preempted[s->num_preempted++] = request;
    leave(s, request, s->step - 1, true);
    s->lives[request].next = s->again;
    s->again = request;
    s->counts.preemptions++;
}

/* ------------------------------------------------------------------ a step */

/* Chunks of prompts until the step is full. */
static void fill_with_prompts(scheduler *s, raddle_blend_step *step) {
    int64_t room = raddle_blend_pace(s, step->work.reads) - s->counts.decoding;
    if (s->first_prefilling < s->end_prefilling) { /* what is begun keeps its speed */
        const int32_t request = s->prefilling[s->first_prefilling % s->store->num_requests];
        room = room > s->lives[request].chunk ? room : s->lives[request].chunk;
    }
    for (int64_t left = room; left > 0;) {
        /* Those that end here decode from the next step on. */
        if (s->first_prefilling == s->end_prefilling && !raddle_blend_admit_next(s, room)) {
            break;
        }
        const int32_t request = s->prefilling[s->first_prefilling % s->store->num_requests];
        life *l = &s->lives[request];
        const int64_t whole = prompt_and_generated(s, request);
        const int64_t count = whole - l->done < left ? whole - l->done : left;
        const raddle_blend_work part = raddle_blend_request_work(l->done + count, l->done, 1);
        raddle_blend_chunk *chunk = &s->chunks[s->num_chunks++];
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
}

void raddle_blend_scheduler_set_free(raddle_blend_scheduler *s, int64_t free_tokens) {
    const raddle_blend_pool *pool = &s->pool;
    const int64_t held = pool->own_tokens + pool->shared_tokens - pool->evictable_tokens;
    const int64_t left = s->limits.pool_tokens - held;
    raddle_blend_pool_resize(&s->pool, held + (free_tokens < left ? free_tokens : left));
}

raddle_status raddle_blend_scheduler_begin(raddle_blend_scheduler *s, raddle_blend_step *out_step) {
    RADDLE_REQUIRE(!s->is_open, RADDLE_ERR_STATE,
                   "step: the last one has not ended; say first who gave a last token in it");
    s->num_chunks = s->num_preempted = 0;
    raddle_blend_forecast_advance(&s->forecast, s->step);
    while (s->counts.decoding > 0 && !raddle_blend_pool_grow(&s->pool, s->counts.decoding)) {
        preempt(s);
    }
    s->first_open = s->first_prefilling;
    raddle_blend_step step = {
        .num_decoding = s->counts.decoding,
        .work = {.tokens = s->counts.decoding, .reads = (double)(s->context + s->counts.decoding)}};
    s->context += s->counts.decoding;
    fill_with_prompts(s, &step);
    step.preempted = s->preempted;
    step.num_preempted = s->num_preempted;
    step.chunks = s->chunks;
    step.num_chunks = s->num_chunks;
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

raddle_status raddle_blend_scheduler_end(raddle_blend_scheduler *s, const int32_t *ended,
                                         int32_t num_ended) {
    RADDLE_REQUIRE(s->is_open, RADDLE_ERR_STATE, "ended: no step has begun");
    RADDLE_REQUIRE(num_ended >= 0, RADDLE_ERR_VALUE, "num_ended: expected at least 0, got %d",
                   (int)num_ended);
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
        s->next_look = s->counts.done + (int32_t)(s->store->num_requests / RADDLE_BLEND_LOOKS) + 1;
        raddle_blend_look_again(s);
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

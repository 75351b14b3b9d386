/* blend_admit.c - who begins next, and how many tokens a step has.
 *
 * The next request comes from the stream that is least far on, or one of those behind it when it does
 * not fit; of two ends, from that which is further below its share of the pool. A paced run gives each
 * step as many tokens as keep what is left to compute and what is left to read in step with each
 * other, by what is read now.
 */
#include "blend/blend_scheduler.h"

#include <math.h>
#include <string.h>

enum { NONE = RADDLE_BLEND_NONE };

/* Of strata, how many are tried before the step goes on without: short requests then use what long
 * ones leave, and none gets far ahead. benchmarks/LOG.md has what each constant does. */
static const double TRIED = 0.375;
static const double FULL = 0.95, TOO_EMPTY = 0.8; /* of the pool */
/* Two ends: a pool emptier than this is filled with whole steps, by an end that has at least so much of
 * it; requests of one that has less come and go too fast for memory to say how many. */
static const double LEAST_SHARE = 0.1, EMPTY = 0.5;

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
    /* An engine may have let it run on past its max_tokens. */
    const int64_t stay = prefill_steps + expected_left(s, request);
    const int64_t end = s->step + (stay < s->longest_stay ? stay : s->longest_stay);
    const int64_t read = s->pool.shared_tokens - s->pool.evictable_tokens;
    const int64_t peak = raddle_blend_forecast_peak(&s->forecast, own - s->step, end);
    int64_t cached = 0;
    if (s->counts.running > 0 &&
        (s->counts.running >= s->limits.step_tokens || peak + read + missing > s->pool.capacity)) {
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

/* ------------------------------------------------------------------ two ends */

static bool has_dual(const scheduler *s) {
    return s->ends[0].next < s->ends[1].next;
}

static int32_t dual_request(const scheduler *s, int32_t end) {
    return s->order[end == 0 ? s->ends[0].next : s->ends[1].next - 1];
}

/* What a request takes of the pool, when half of its output is there. */
static double half_way(const scheduler *s, int32_t request) {
    return s->store->requests[request].prompt_tokens +
           raddle_blend_length_of(s->store, s->lengths, request).mean / 2;
}

static void share_out(scheduler *s) {
    raddle_blend_end ends[2];
    double read = 0;
    const double left = raddle_blend_plain_seconds(s->cost, &s->left, &read);
    for (int32_t e = 0; e < 2; e++) {
        const int32_t request = dual_request(s, e);
        const int64_t cached = raddle_blend_pool_cached(&s->pool, s->lives[request].node);
        const double prompt = (double)(s->store->requests[request].prompt_tokens - cached);
        ends[e] = (raddle_blend_end){
            .density = raddle_blend_dual_density(s->store, s->cost, s->lengths, request, cached),
            .prompt = fmax(prompt, 1),
            .output = fmax(raddle_blend_length_of(s->store, s->lengths, request).mean, 1),
            .held = half_way(s, request),
        };
    }
    raddle_blend_share_out(read > 0 ? (left - read) / read : ends[0].density,
                           (double)s->limits.pool_tokens, ends);
    for (int32_t e = 0; e < 2; e++) {
        s->ends[e].memory = ends[e].memory;
        s->ends[e].budget = ends[e].budget;
    }
}

/* Tokens that a step may have for both. */
static int64_t pace_ends(scheduler *s) {
    const double pool = (double)s->limits.pool_tokens, held = s->ends[0].held + s->ends[1].held;
    double tokens = s->counts.decoding;
    share_out(s);
    for (int32_t e = 0; e < 2; e++) {
        dual_end *end = &s->ends[e];
        const bool is_empty =
            held < EMPTY * pool && end->memory > LEAST_SHARE * pool && end->held < end->memory;
        const double budget = is_empty ? s->limits.step_tokens : end->budget;
        end->debt = fmax(end->debt - budget, 0);
        tokens += budget;
    }
    return s->counts.running == 0 ? s->limits.step_tokens
                                  : (int64_t)fmin(tokens, s->limits.step_tokens);
}

/* From the end that is further below its share, if it is within its budget; else from the other. */
static bool admit_from_ends(scheduler *s, int64_t chunk) {
    if (!has_dual(s)) {
        return false;
    }
    const dual_end *ends = s->ends;
    const int32_t first =
        ends[0].held * fmax(ends[1].memory, 1) > ends[1].held * fmax(ends[0].memory, 1);
    for (int32_t tries = 0; tries < 2 && has_dual(s); tries++) {
        const int32_t e = tries == 0 ? first : !first;
        const int32_t request = dual_request(s, e);
        const bool is_held_back =
            s->counts.running > 0 &&
            (ends[e].debt > 0 || (tries == 1 && ends[e].held > ends[e].memory));
        if (!is_held_back && admit(s, request, chunk)) {
            s->lives[request].end = e;
            s->ends[e].next += e == 0 ? 1 : -1;
            s->lives[request].half_way = half_way(s, request);
            s->ends[e].held += s->lives[request].half_way;
            s->ends[e].debt +=
                (double)(prompt_and_generated(s, request) - s->lives[request].cached);
            return true;
        }
    }
    return false;
}

bool raddle_blend_admit_next(scheduler *s, int64_t chunk) {
    if (s->again != NONE) {
        return admit(s, s->again, chunk);
    }
    if (s->plan->is_dual) {
        return admit_from_ends(s, chunk);
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

/* ------------------------------------------------------------------ pace */

/* A pool that is not full, at first or because the pace was too slow, is filled at full speed. */
int64_t raddle_blend_pace(scheduler *s, double reads) {
    const int64_t held = s->pool.own_tokens + s->pool.shared_tokens - s->pool.evictable_tokens;
    const double pool = (double)s->limits.pool_tokens;
    s->is_ramped = s->is_ramped || (double)held > FULL * pool;
    if (s->plan->is_dual) {
        return has_dual(s) ? pace_ends(s) : s->limits.step_tokens;
    }
    if (!s->plan->is_paced || !s->is_ramped || (double)held < TOO_EMPTY * pool ||
        s->left.reads <= 0) {
        return s->limits.step_tokens;
    }
    const double tokens = s->left.tokens / s->left.reads * fmax(reads, pool);
    return tokens < s->limits.step_tokens ? (int64_t)tokens : s->limits.step_tokens;
}

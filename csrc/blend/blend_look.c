/* blend_look.c - a scheduler is opened, and looks again at what is left while it runs. */
#include "blend/blend_scheduler.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"

static const double LEAD = 0.75; /* of the time that an output takes */

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

void raddle_blend_look_again(scheduler *s) {
    for (int64_t i = 0; i < s->store->num_requests; i++) {
        const life *l = &s->lives[i];
        s->so_far[i] = raddle_blend_scheduler_generated(s, (int32_t)i);
        s->seen[i] = l->stage == DONE        ? l->generated
                     : s->lengths[i].is_seen ? (int32_t)s->lengths[i].mean
                                             : RADDLE_BLEND_UNKNOWN;
    }
    if (raddle_blend_lengths_guess(s->store, s->trie, s->seen, s->so_far, s->lengths) !=
        RADDLE_OK) {
        return;
    }
    s->left = (raddle_blend_work){0};
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
        /* What is thought of an output may grow up to max_tokens. */
        const bool is_known = s->lengths == NULL && from->output_tokens != RADDLE_BLEND_UNKNOWN;
        const int64_t output = is_known ? from->output_tokens : from->max_tokens;
        const int64_t stay = 1 + from->prompt_tokens + output + RADDLE_BLEND_BUCKET;
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
    s->preempted = raddle_alloc(requests * sizeof(int32_t));
    const size_t chunks =
        (size_t)s->limits.step_tokens < requests ? (size_t)s->limits.step_tokens : requests;
    s->chunks = raddle_alloc(chunks * sizeof(raddle_blend_chunk));
    if (s->lives == NULL || s->prefilling == NULL || s->order == NULL || s->preempted == NULL ||
        s->chunks == NULL) {
        return raddle_fail_memory(requests * sizeof(life));
    }
    memcpy(s->order, s->plan->order, (requests - 1) * sizeof(int32_t));
    for (int32_t i = 1; i < s->plan->num_streams; i++) {
        s->next[i] = s->plan->stream_end[i - 1];
    }
    s->ends[1].next = s->trie->num_requests;
    s->ends[0].memory = s->ends[1].memory = 1;
    for (int32_t k = 0; k < s->trie->num_requests; k++) {
        s->lives[s->trie->order[k]].node = s->trie->node_of[k];
    }
    look_ahead(s);
    s->longest_stay = longest_stay(s);
    RADDLE_TRY(raddle_blend_forecast_init(&s->forecast, s->longest_stay));
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
    s->again = s->newest = RADDLE_BLEND_NONE;
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
    raddle_free(s->chunks);
    raddle_free(s->preempted);
    raddle_free(s);
}

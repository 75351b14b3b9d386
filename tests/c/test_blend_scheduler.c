// needs: base/status.c base/alloc.c base/hash.c blend/*.c
/* test_blend_scheduler.c - the scheduler drives an engine that knows nothing of it: what each request
 * has computed and given, and what lies in memory (blend_memory.h). Every step of many random runs is
 * held against that. A second scheduler gets the same inputs and none of the misuse, and has to do the
 * same.
 */
#include "check.h"
#include "random.h"

#include "base/alloc.h"
#include "blend_memory.h"

enum { BLOCK = 4, MOST = 60, MAX_STEPS = 50000 };

typedef enum stage { WAITING, PREFILLING, FIRST, DECODING, DONE } stage;

typedef struct life {
    stage stage;
    int32_t output, given; /* tokens: of the truth, so far */
    int32_t whole, at;     /* of the prompt and what was given: all, computed so far */
    int32_t cached, ends;
    int64_t begun; /* to decode, by order */
} life;

typedef enum misuse {
    BEGIN_TWICE,
    END_WITHOUT_BEGIN,
    BELOW_RANGE,
    ABOVE_RANGE,
    ONE_THAT_WAITS,
    ONE_THAT_STEPPED_BACK,
    ONE_STILL_PREFILLING,
    ONE_TWICE,
    ONE_THAT_IS_DONE,
    NUM_MISUSES
} misuse;

typedef struct engine {
    const raddle_blend_store *store;
    raddle_blend_limits limits;
    raddle_blend_scheduler *scheduler, *other;
    memory memory;
    life lives[MOST];
    raddle_blend_counts counts; /* what they should be */
    int64_t clock;
    int32_t waiting_again;
    bool is_ending_early;
} engine;

static int64_t times_misused[NUM_MISUSES];
static int64_t times_preempted, times_evicted, times_found_again;

/* ------------------------------------------------------------------ what should be */

/* Of K and V, less what it shares; its last token is not there yet. */
static int64_t own_tokens(const engine *e, int32_t request) {
    const raddle_blend_request *from = &e->store->requests[request];
    return (int64_t)from->prompt_tokens - (int64_t)from->num_blocks * BLOCK +
           e->lives[request].given - (e->lives[request].given > 0);
}

static int32_t find_newest(const engine *e) {
    int32_t newest = -1;
    for (int32_t i = 0; i < (int32_t)e->store->num_requests; i++) {
        if (e->lives[i].stage == DECODING &&
            (newest < 0 || e->lives[i].begun > e->lives[newest].begun)) {
            newest = i;
        }
    }
    return newest;
}

static void check_state(const engine *e) {
    const raddle_blend_counts *is = raddle_blend_scheduler_counts(e->scheduler);
    const raddle_blend_counts *other = raddle_blend_scheduler_counts(e->other);
    CHECK_INT(is->steps, e->counts.steps);
    CHECK_INT(is->preemptions, e->counts.preemptions);
    CHECK_INT(is->hit_tokens, e->counts.hit_tokens);
    CHECK_INT(is->computed_tokens, e->counts.computed_tokens);
    CHECK_INT(is->recomputed_tokens, e->counts.recomputed_tokens);
    CHECK_INT(is->held_tokens, e->counts.held_tokens);
    CHECK_INT(is->peak_tokens, e->counts.peak_tokens);
    CHECK_INT(is->running, e->counts.running);
    CHECK_INT(is->decoding, e->counts.decoding);
    CHECK_INT(is->done, e->counts.done);
    CHECK(is->held_tokens <= e->limits.pool_tokens && is->peak_tokens <= e->limits.pool_tokens);
    CHECK_INT(memcmp(is, other, sizeof *is), 0);
    int32_t differing = 0;
    for (int32_t i = 0; i < (int32_t)e->store->num_requests; i++) {
        differing += raddle_blend_scheduler_generated(e->scheduler, i) != e->lives[i].given ||
                     raddle_blend_scheduler_generated(e->other, i) != e->lives[i].given;
    }
    CHECK_INT(differing, 0);
}

static void check_same_step(const raddle_blend_step *a, const raddle_blend_step *b) {
    CHECK_INT(a->num_preempted, b->num_preempted);
    CHECK_INT(a->num_chunks, b->num_chunks);
    CHECK_INT(a->num_decoding, b->num_decoding);
    CHECK_INT(memcmp(&a->work, &b->work, sizeof a->work), 0);
    CHECK(a->prompt_tokens == b->prompt_tokens && a->hit_tokens == b->hit_tokens);
    for (int32_t i = 0; i < a->num_preempted && i < b->num_preempted; i++) {
        CHECK_INT(a->preempted[i], b->preempted[i]);
    }
    for (int32_t i = 0; i < a->num_chunks && i < b->num_chunks; i++) {
        const raddle_blend_chunk *x = &a->chunks[i], *y = &b->chunks[i];
        CHECK(x->request == y->request && x->begin == y->begin && x->count == y->count &&
              x->is_last == y->is_last);
    }
}

/* ------------------------------------------------------------------ a step */

/* The newest of those that decode, as long as there is no room for a token of each. */
static void step_back(engine *e, const raddle_blend_step *step) {
    for (int32_t i = 0; i < step->num_preempted; i++) {
        const int32_t request = step->preempted[i];
        CHECK_INT(request, find_newest(e));
        CHECK(!memory_fits(&e->memory, e->counts.decoding));
        memory_release(&e->memory, request, own_tokens(e, request), true);
        e->lives[request].stage = WAITING;
        e->counts.running--;
        e->counts.decoding--;
        e->counts.preemptions++;
        e->waiting_again++;
    }
    CHECK(memory_make_room(&e->memory, e->counts.decoding));
    e->memory.own += e->counts.decoding;
}

/* Its prompt is all that it has, what it gave before too; it begins behind what lies in memory. */
static void admit(engine *e, int32_t request) {
    life *l = &e->lives[request];
    l->whole = e->store->requests[request].prompt_tokens + l->given;
    const int64_t own = l->whole - (int64_t)e->store->requests[request].num_blocks * BLOCK;
    const int64_t cached = memory_acquire(&e->memory, request, own);
    CHECK(cached >= 0);
    l->cached = l->at = cached < l->whole ? (int32_t)cached : l->whole - 1;
    l->stage = PREFILLING;
    e->counts.running++;
    CHECK(l->given > 0 || e->waiting_again == 0); /* what stepped back comes first */
    if (l->given > 0) {
        e->waiting_again--;
        e->counts.recomputed_tokens += l->whole - 1 - l->cached;
        times_found_again += l->cached > 0;
    }
}

static void compute_chunks(engine *e, const raddle_blend_step *step) {
    int64_t prompts = 0, hits = 0;
    double tokens = e->counts.decoding, scores = 0, reads = 0;
    for (int32_t i = 0; i < (int32_t)e->store->num_requests; i++) {
        const life *l = &e->lives[i];
        reads += l->stage == DECODING ? e->store->requests[i].prompt_tokens + l->given : 0;
    }
    for (int32_t i = 0; i < step->num_chunks; i++) {
        const raddle_blend_chunk *chunk = &step->chunks[i];
        life *l = &e->lives[chunk->request];
        if (l->stage == WAITING) {
            admit(e, chunk->request);
        }
        CHECK_INT(l->stage, PREFILLING);
        CHECK_INT(chunk->begin, l->at);
        CHECK(chunk->count > 0 && chunk->count <= l->whole - l->at);
        for (int32_t k = 0; k < chunk->count; k++) {
            scores += ++l->at; /* each token sees those before it and itself */
        }
        tokens += chunk->count;
        memory_write(&e->memory, chunk->request, l->at);
        CHECK_INT(chunk->is_last, l->at == l->whole);
        if (chunk->is_last) {
            l->stage = FIRST;
            l->begun = ++e->clock;
            prompts += l->whole;
            hits += l->cached;
            e->counts.hit_tokens += l->given == 0 ? l->cached : 0;
        }
    }
    CHECK(step->work.tokens == tokens && step->work.scores == scores && step->work.reads == reads);
    CHECK(tokens <= e->limits.step_tokens);
    CHECK(step->prompt_tokens == prompts && step->hit_tokens == hits);
    e->counts.computed_tokens += (int64_t)tokens;
}

static void note_held(engine *e) {
    e->counts.held_tokens = e->memory.own + e->memory.shared;
    if (e->counts.held_tokens > e->counts.peak_tokens) {
        e->counts.peak_tokens = e->counts.held_tokens;
    }
}

/* Who decodes or has computed its prompt gives a token. Returns how many gave their last, in `ended`,
 * in any order; behind them are the others that gave one. */
static int32_t give_tokens(engine *e, int32_t *ended, int32_t *out_givers) {
    int32_t count = 0, givers = 0;
    for (int32_t i = 0; i < (int32_t)e->store->num_requests; i++) {
        const life *l = &e->lives[i];
        if (l->stage != DECODING && l->stage != FIRST) {
            continue;
        }
        const bool is_cut = e->is_ending_early && random_below(20) == 0;
        const bool is_last = l->given + 1 == l->output || is_cut;
        const int32_t place = is_last ? random_below(count + 1) : givers;
        ended[givers++] = i;
        if (is_last) {
            ended[givers - 1] = ended[count];
            ended[count++] = ended[place];
            ended[place] = i;
        }
    }
    *out_givers = givers;
    return count;
}

static void end_step(engine *e, const int32_t *ended, int32_t num_ended, int32_t num_givers) {
    for (int32_t k = 0; k < num_givers; k++) {
        life *l = &e->lives[ended[k]];
        l->given++;
        e->counts.decoding += l->stage == FIRST;
        l->stage = DECODING;
    }
    for (int32_t k = 0; k < num_ended; k++) {
        life *l = &e->lives[ended[k]];
        memory_release(&e->memory, ended[k], own_tokens(e, ended[k]), false);
        l->stage = DONE;
        l->ends++;
        e->counts.running--;
        e->counts.decoding--;
        e->counts.done++;
    }
    e->counts.steps++;
}

/* ------------------------------------------------------------------ misuse */

/* The request that a misuse names; -1 when there is none, or one that is out of range. */
static int32_t pick(const engine *e, misuse kind, const int32_t *givers, int32_t num_givers) {
    const int32_t count = (int32_t)e->store->num_requests, first = random_below(count);
    for (int32_t k = 0; k < count; k++) {
        const int32_t i = (first + k) % count;
        const life *l = &e->lives[i];
        if ((kind == ONE_THAT_WAITS && l->stage == WAITING && l->given == 0) ||
            (kind == ONE_THAT_STEPPED_BACK && l->stage == WAITING && l->given > 0) ||
            (kind == ONE_STILL_PREFILLING && l->stage == PREFILLING) ||
            (kind == ONE_THAT_IS_DONE && l->stage == DONE)) {
            return i;
        }
    }
    return kind == ABOVE_RANGE                   ? count + random_below(2) * (INT32_MAX - count)
           : kind == ONE_TWICE && num_givers > 0 ? givers[random_below(num_givers)]
                                                 : -1;
}

/* Behind requests that may end: nothing of them is to stay either. */
static void misuse_ended(engine *e, misuse kind, const int32_t *givers, int32_t num_givers) {
    int32_t names[MOST + 1], count = random_below(num_givers + 1);
    char message[64];
    const int32_t bad = pick(e, kind, givers, num_givers);
    if (bad < 0 && kind != BELOW_RANGE) {
        return;
    }
    if (kind == ONE_TWICE) {
        count = num_givers;
    }
    memcpy(names, givers, (size_t)count * sizeof *names);
    names[count] = bad;
    snprintf(message, sizeof message, "ended: expected requests that gave a token in this step");
    CHECK_FAILS(raddle_blend_scheduler_end(e->scheduler, names, count + 1), RADDLE_ERR_VALUE,
                message);
    snprintf(message, sizeof message, "got %d at position %d", (int)bad, (int)count);
    CHECK(strstr(raddle_last_error()->message, message) != NULL);
    times_misused[kind]++;
}

static void misuse_open_step(engine *e, const int32_t *givers, int32_t num_givers) {
    raddle_blend_step step, before;
    memset(&step, 0x55, sizeof step);
    before = step;
    CHECK_FAILS(raddle_blend_scheduler_begin(e->scheduler, &step), RADDLE_ERR_STATE,
                "the last one has not ended");
    CHECK_INT(memcmp(&step, &before, sizeof step), 0);
    times_misused[BEGIN_TWICE]++;
    for (misuse kind = BELOW_RANGE; kind < NUM_MISUSES; kind++) {
        misuse_ended(e, kind, givers, num_givers);
    }
}

static void misuse_closed_step(const engine *e) {
    const int32_t any = random_below((int32_t)e->store->num_requests);
    CHECK_FAILS(raddle_blend_scheduler_end(e->scheduler, &any, random_below(2)), RADDLE_ERR_STATE,
                "no step has begun");
    times_misused[END_WITHOUT_BEGIN]++;
}

/* ------------------------------------------------------------------ runs */

static void take_step(engine *e) {
    raddle_blend_step step, same;
    int32_t ended[MOST + 1], num_givers = 0;
    const bool is_misused = random_below(6) == 0;
    CHECK_OK(raddle_blend_scheduler_begin(e->scheduler, &step));
    CHECK_OK(raddle_blend_scheduler_begin(e->other, &same));
    check_same_step(&step, &same);
    step_back(e, &step);
    CHECK_INT(step.num_decoding, e->counts.decoding);
    compute_chunks(e, &step);
    CHECK(step.work.tokens > 0 || e->counts.done == e->store->num_requests);
    note_held(e);
    check_state(e);
    const int32_t num_ended = give_tokens(e, ended, &num_givers);
    if (is_misused) {
        misuse_open_step(e, ended, num_givers);
        check_state(e);
    }
    CHECK_OK(raddle_blend_scheduler_end(e->scheduler, ended, num_ended));
    CHECK_OK(raddle_blend_scheduler_end(e->other, ended, num_ended));
    end_step(e, ended, num_ended, num_givers);
    if (is_misused) {
        misuse_closed_step(e);
    }
    check_state(e);
}

/* A failure ends a run: all that follows would fail too. */
static void run(engine *e, const raddle_blend_trie *trie, const raddle_blend_cost *cost,
                const raddle_blend_plan *plan, const raddle_blend_length *lengths) {
    const int failures = check_failures;
    const int64_t count = e->store->num_requests;
    memory_open(&e->memory, e->store, NULL, 0, count, e->limits.pool_tokens);
    CHECK_OK(raddle_blend_scheduler_create(e->store, trie, cost, &e->limits, plan, lengths,
                                           &e->scheduler));
    CHECK_OK(
        raddle_blend_scheduler_create(e->store, trie, cost, &e->limits, plan, lengths, &e->other));
    while (check_failures == failures && e->counts.done < count && e->counts.steps < MAX_STEPS) {
        take_step(e);
    }
    CHECK(e->counts.done == count || check_failures > failures);
    for (int64_t i = 0; i < count && check_failures == failures; i++) {
        CHECK_INT(e->lives[i].ends, 1);
        CHECK(e->lives[i].given == e->lives[i].output || e->is_ending_early);
    }
    for (int i = 0; i < 2 && check_failures == failures; i++) { /* without work, empty */
        take_step(e);
        CHECK_INT(e->counts.held_tokens, 0);
    }
    times_preempted += e->counts.preemptions;
    times_evicted += e->memory.evictions;
    raddle_blend_scheduler_destroy(e->scheduler);
    raddle_blend_scheduler_destroy(e->other);
    memory_close(&e->memory);
}

typedef enum knowledge { KNOWN, GUESSED, TOO_SHORT, ENDING_EARLY, NUM_KNOWLEDGES } knowledge;

/* Tokens that the largest request takes. */
static int64_t fill(raddle_blend_store *store, life *lives, knowledge known, bool is_small) {
    const int32_t count = 1 + random_below(MOST), sharing = random_below(11);
    int64_t largest = 0;
    raddle_blend_store_init(store, BLOCK);
    for (int32_t i = 0; i < count; i++) {
        uint64_t blocks[12];
        const int32_t num_blocks = random_below(is_small ? 3 : 13);
        const bool shares = random_below(10) < sharing;
        for (int32_t k = 0; k < num_blocks; k++) {
            blocks[k] = shares && k < 9 ? (uint64_t)random_below(k < 4 ? 2 : 1)
                                        : (uint64_t)(1000 + i * 20 + k);
        }
        const int32_t most = 1 + random_below(random_below(3) == 0 ? 120 : 25);
        const int32_t output = random_below(5) == 0 ? most : 1 + random_below(most);
        const bool is_known = known == KNOWN || known == ENDING_EARLY;
        const raddle_blend_request request = {
            .num_blocks = num_blocks,
            .prompt_tokens = num_blocks * BLOCK + (num_blocks == 0) + random_below(2 * BLOCK),
            .output_tokens = is_known ? output : RADDLE_BLEND_UNKNOWN,
            .max_tokens = most,
            .group = random_below(3),
            .weight = 1.0f,
        };
        CHECK_OK(raddle_blend_store_add(store, &request, blocks));
        lives[i] = (life){.output = output};
        const int64_t all = request.prompt_tokens + (is_known ? output : most);
        largest = all > largest ? all : largest;
    }
    return largest;
}

/* Guesses from a few that were seen, or far too short ones, most of them held for certain. */
static void think(const raddle_blend_store *store, const raddle_blend_trie *trie, const life *lives,
                  knowledge known, raddle_blend_length *out_lengths) {
    int32_t seen[MOST];
    for (int32_t i = 0; i < (int32_t)store->num_requests; i++) {
        const int32_t output = lives[i].output;
        seen[i] = random_below(8) == 0 ? output : RADDLE_BLEND_UNKNOWN;
        out_lengths[i] = raddle_blend_length_known(1 + output * random_below(20) / 100);
        out_lengths[i].is_seen = random_below(4) > 0;
    }
    if (known == GUESSED) {
        CHECK_OK(raddle_blend_lengths_guess(store, trie, seen, NULL, out_lengths));
    }
}

static void test_random_runs(void) {
    for (int round = 0; round < 80; round++) {
        static engine e;
        static const int32_t spare[5] = {4, 30, 90, 300, 5000};
        const int64_t live = raddle_alloc_live();
        const knowledge known = (knowledge)(round % NUM_KNOWLEDGES);
        const bool has_lengths = known == GUESSED || known == TOO_SHORT;
        raddle_blend_store store;
        raddle_blend_trie trie;
        raddle_blend_length lengths[MOST];
        life lives[MOST];
        const int64_t largest = fill(&store, lives, known, round % 3 == 0);
        CHECK_OK(raddle_blend_trie_build(&store, &trie));
        think(&store, &trie, lives, known, lengths);
        const raddle_blend_limits limits = {
            .pool_tokens = largest + random_below(spare[round % 5]),
            .step_tokens = 1 + random_below(round % 7 < 2 ? 6 : 100),
        };
        for (int i = 0; i < RADDLE_BLEND_NUM_POLICIES; i++) {
            const raddle_blend_cost cost = memory_cost(0.01 * random_below(101));
            raddle_blend_plan plan = {0};
            CHECK_OK(raddle_blend_plan_make(&store, &trie, &cost, &limits, (raddle_blend_policy)i,
                                            has_lengths ? lengths : NULL, 7, &plan));
            e = (engine){
                .store = &store, .limits = limits, .is_ending_early = known == ENDING_EARLY};
            memcpy(e.lives, lives, sizeof lives);
            if (plan.order != NULL) {
                run(&e, &trie, &cost, &plan, has_lengths ? lengths : NULL);
            }
            CHECK(has_lengths || e.counts.preemptions == 0);
            raddle_blend_plan_fini(&plan);
        }
        raddle_blend_trie_fini(&trie);
        raddle_blend_store_fini(&store);
        CHECK_INT(raddle_alloc_live(), live);
    }
    CHECK(times_preempted > 100 && times_evicted > 400 && times_found_again > 60);
    for (int kind = 0; kind < NUM_MISUSES; kind++) {
        CHECK(times_misused[kind] > 20);
    }
}

static void test_empty_store(void) {
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_store_init(&store, BLOCK);
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    const raddle_blend_cost cost = memory_cost(0.3);
    const raddle_blend_limits limits = {.pool_tokens = 1, .step_tokens = 1};
    const int32_t none = 0;
    for (int i = 0; i < 2 * RADDLE_BLEND_NUM_POLICIES; i++) {
        const raddle_blend_length *lengths = i % 2 == 0 ? NULL : &(raddle_blend_length){0};
        raddle_blend_plan plan;
        raddle_blend_scheduler *scheduler = NULL;
        raddle_blend_step step = {.num_chunks = 5};
        CHECK_OK(raddle_blend_plan_make(&store, &trie, &cost, &limits, (raddle_blend_policy)(i / 2),
                                        lengths, 7, &plan));
        CHECK_OK(raddle_blend_scheduler_create(&store, &trie, &cost, &limits, &plan, lengths,
                                               &scheduler));
        CHECK_OK(raddle_blend_scheduler_begin(scheduler, &step));
        CHECK(step.num_chunks == 0 && step.num_decoding == 0 && step.num_preempted == 0);
        CHECK(step.work.tokens == 0 && step.work.reads == 0);
        CHECK_FAILS(raddle_blend_scheduler_end(scheduler, &none, 1), RADDLE_ERR_VALUE, "got 0");
        CHECK_OK(raddle_blend_scheduler_end(scheduler, NULL, 0));
        CHECK_INT(raddle_blend_scheduler_counts(scheduler)->steps, 1);
        CHECK_INT(raddle_blend_scheduler_counts(scheduler)->done, 0);
        raddle_blend_scheduler_destroy(scheduler);
        raddle_blend_plan_fini(&plan);
    }
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

/* With what a request is known to take, or may take; the second of three is too large. */
static void test_what_does_not_fit(void) {
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_store_init(&store, BLOCK);
    for (int32_t i = 0; i < 3; i++) {
        const raddle_blend_request request = {.prompt_tokens = i == 1 ? 50 : 10,
                                              .output_tokens = RADDLE_BLEND_UNKNOWN,
                                              .max_tokens = 60,
                                              .weight = 1.0f};
        CHECK_OK(raddle_blend_store_add(&store, &request, NULL));
    }
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    raddle_blend_cost cost = memory_cost(0.3);
    raddle_blend_limits limits = {.pool_tokens = 109, .step_tokens = 16};
    raddle_blend_length lengths[3];
    raddle_blend_plan plan;
    raddle_blend_scheduler *scheduler = NULL;
    CHECK_OK(raddle_blend_lengths_guess(&store, &trie, (int32_t[]){-1, -1, -1}, NULL, lengths));
    CHECK_OK(raddle_blend_plan_make(&store, &trie, &cost, &limits, RADDLE_BLEND_FCFS, lengths, 0,
                                    &plan));
    const int64_t live = raddle_alloc_live();
#define CREATE                                                                                     \
    raddle_blend_scheduler_create(&store, &trie, &cost, &limits, &plan, lengths, &scheduler)
    CHECK_FAILS(CREATE, RADDLE_ERR_VALUE, "request 1 may take 110 tokens, the pool has 109");
    store.requests[1].output_tokens = 40;
    limits.pool_tokens = 89;
    CHECK_FAILS(CREATE, RADDLE_ERR_VALUE, "request 1 may take 90 tokens, the pool has 89");
    limits = (raddle_blend_limits){.pool_tokens = 90, .step_tokens = 0};
    CHECK_FAILS(CREATE, RADDLE_ERR_VALUE, "limits: expected at least one token");
    limits.step_tokens = 16;
    cost.num_rates = 0;
    CHECK_FAILS(CREATE, RADDLE_ERR_VALUE, "gemm_rate");
    cost.num_rates = 1;
    CHECK(scheduler == NULL);
    CHECK_INT(raddle_alloc_live(), live);
    CHECK_OK(CREATE);
#undef CREATE
    raddle_blend_step step;
    CHECK_OK(raddle_blend_scheduler_begin(scheduler, &step));
    raddle_blend_scheduler_destroy(scheduler); /* in the midst of a step */
    raddle_blend_scheduler_destroy(NULL);
    CHECK_INT(raddle_alloc_live(), live);
    raddle_blend_plan_fini(&plan);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

int main(void) {
    random_state = 33;
    test_random_runs();
    test_empty_store();
    test_what_does_not_fit();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

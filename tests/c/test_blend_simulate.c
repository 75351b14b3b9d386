// needs: base/status.c base/alloc.c base/hash.c blend/*.c
/* test_blend_simulate.c - runs behind the virtual clock keep every token, stay in the pool, and take no
 * less than the bound; forecasts against adding up each request. */
#include <math.h>

#include "check.h"
#include "random.h"

#include "base/alloc.h"
#include "blend/blend.h"

enum { BLOCK = 8 };

static raddle_blend_cost model(double alpha, double weight_bytes) {
    return (raddle_blend_cost){
        .flops_per_token = 16e9,
        .flops_per_score = 500e3,
        .kv_bytes_per_token = 131072,
        .weight_bytes = weight_bytes,
        .attention_flops_rate = 200e12,
        .read_rate = 1.7e12,
        .alpha = alpha,
        .num_rates = 1,
        .rate_tokens = {1},
        .gemm_rate = {220e12},
    };
}

/* sharing: of ten prompts, how many begin like others. */
static void fill(raddle_blend_store *store, int32_t requests, int32_t sharing) {
    raddle_blend_store_init(store, BLOCK);
    for (int32_t i = 0; i < requests; i++) {
        uint64_t blocks[30];
        const int32_t count = random_below(31);
        const bool shares = random_below(10) < sharing;
        for (int32_t k = 0; k < count; k++) {
            blocks[k] = shares && k < 20 ? (uint64_t)random_below(k < 10 ? 1 : 3)
                                         : (uint64_t)(i * 100 + k + 10);
        }
        const int32_t output = 1 + random_below(random_below(8) == 0 ? 400 : 40);
        const raddle_blend_request request = {
            .num_blocks = count,
            .prompt_tokens = count * BLOCK + (count == 0) + random_below(BLOCK),
            .output_tokens = output,
            .max_tokens = output,
            .weight = 1.0f,
        };
        CHECK_OK(raddle_blend_store_add(store, &request, blocks));
    }
}

/* Stretches of the run add up to it, and are alike in length but for the last. */
static void check_timeline(const raddle_blend_timeline *line, const raddle_blend_result *result) {
    int64_t steps = 0;
    double seconds = 0, held = 0;
    CHECK(line->count >= 1 && line->count <= RADDLE_BLEND_MAX_MOMENTS);
    for (int32_t i = 0; i < line->count; i++) {
        const raddle_blend_moment *m = &line->moments[i];
        CHECK(m->steps == line->steps_each || (i == line->count - 1 && m->steps > 0));
        CHECK(m->hit_tokens <= m->prompt_tokens && m->seconds >= m->compute);
        steps += m->steps;
        seconds += m->seconds;
        held = m->held / (double)m->steps > held ? m->held / (double)m->steps : held;
    }
    CHECK_INT(steps, result->steps);
    CHECK(line->steps_each < 2 * steps / RADDLE_BLEND_MAX_MOMENTS + 2);
    CHECK(seconds > result->seconds * (1 - 1e-9) && seconds < result->seconds * (1 + 1e-9));
    CHECK(held <= (double)result->peak_tokens);
}

/* Without overlap and weights a run takes the time of its work, however it is cut into steps: that
 * of the requests, less what was found. */
static int64_t check_conservation(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                  const raddle_blend_limits *limits, const raddle_blend_plan *plan,
                                  const raddle_blend_length *lengths) {
    const raddle_blend_cost sum = model(1.0, 0.0);
    static raddle_blend_timeline line;
    raddle_blend_result result;
    CHECK_OK(raddle_blend_simulate(store, trie, &sum, limits, plan, lengths, &result, &line));
    check_timeline(&line, &result);
    int64_t prompts = 0, outputs = 0, reads = 0;
    for (int64_t i = 0; i < store->num_requests; i++) {
        const int64_t p = store->requests[i].prompt_tokens, d = store->requests[i].output_tokens;
        prompts += p;
        outputs += d;
        for (int64_t j = 2; j <= d; j++) {
            reads += p + j - 1;
        }
    }
    CHECK_INT(result.prompt_tokens, prompts);
    CHECK_INT(result.output_tokens, outputs);
    CHECK(result.peak_tokens <= limits->pool_tokens && result.peak_tokens > 0);
    CHECK_INT(result.computed_tokens, prompts - result.hit_tokens + outputs - store->num_requests +
                                          result.recomputed_tokens);
    CHECK((result.preemptions == 0) == (result.recomputed_tokens == 0));
    /* What the time says of reads: all but GEMMs and scores, of which the latter are at most those
     * of whole prompts. */
    const double gemms = (double)result.computed_tokens * sum.flops_per_token / sum.gemm_rate[0];
    const double read = (double)reads * sum.kv_bytes_per_token / sum.read_rate;
    double scores = 0;
    for (int64_t i = 0; i < store->num_requests; i++) {
        const double p = store->requests[i].prompt_tokens;
        scores += p * (p + 1) / 2 * sum.flops_per_score / sum.attention_flops_rate;
    }
    const double rest = result.seconds - gemms - read;
    CHECK(result.preemptions > 0 || rest >= -1e-9 * result.seconds);
    CHECK(result.preemptions > 0 || rest <= scores * (1 + 1e-9));
    CHECK(result.preemptions > 0 || result.hit_tokens > 0 || rest >= scores * (1 - 1e-9));
    return result.preemptions;
}

/* Each request once, in streams that follow each other. */
static void check_plan(const raddle_blend_store *store, const raddle_blend_plan *plan) {
    int64_t sum = 0, squares = 0;
    for (int64_t i = 0; i < store->num_requests; i++) {
        CHECK(plan->order[i] >= 0 && plan->order[i] < store->num_requests);
        sum += plan->order[i] - i;
        squares += (int64_t)plan->order[i] * plan->order[i] - i * i;
    }
    CHECK_INT(sum, 0);
    CHECK_INT(squares, 0);
    CHECK(plan->num_streams >= 1 && plan->num_streams <= RADDLE_BLEND_MAX_STREAMS);
    for (int32_t i = 1; i < plan->num_streams; i++) {
        CHECK(plan->stream_end[i] >= plan->stream_end[i - 1]);
    }
    CHECK_INT(plan->stream_end[plan->num_streams - 1], store->num_requests);
}

static void test_random_workloads(void) {
    int64_t preemptions = 0;
    for (int round = 0; round < 60; round++) {
        raddle_blend_store store;
        raddle_blend_trie trie;
        fill(&store, 1 + random_below(150), random_below(11));
        CHECK_OK(raddle_blend_trie_build(&store, &trie));
        raddle_blend_length *guessed = raddle_alloc((size_t)store.num_requests * sizeof *guessed);
        const raddle_blend_limits limits = {
            .pool_tokens = 700 + random_below(6000),
            .step_tokens = 1 + random_below(round % 4 == 0 ? 8 : 600),
        };
        for (int policy = RADDLE_BLEND_FCFS; policy <= RADDLE_BLEND_PACED; policy++) {
            const raddle_blend_cost cost = model(0.01 * random_below(101), 1e9);
            raddle_blend_plan plan;
            CHECK_OK(raddle_blend_plan_make(&store, &trie, &cost, &limits,
                                            (raddle_blend_policy)policy, NULL, 7, &plan));
            check_plan(&store, &plan);
            raddle_blend_result result, again;
            CHECK_OK(
                raddle_blend_simulate(&store, &trie, &cost, &limits, &plan, NULL, &result, NULL));
            CHECK_OK(
                raddle_blend_simulate(&store, &trie, &cost, &limits, &plan, NULL, &again, NULL));
            CHECK_INT(memcmp(&result, &again, sizeof result), 0);
            CHECK(result.seconds >= result.bound_seconds * (1 - 1e-9));
            /* No order shares more than there is. */
            CHECK(result.prompt_tokens - result.hit_tokens >=
                  result.prompt_tokens - (int64_t)store.num_blocks * BLOCK +
                      trie.distinct_blocks * BLOCK - store.num_requests);
            CHECK_INT(result.preemptions, 0); /* lengths are known */
            CHECK_INT(check_conservation(&store, &trie, &limits, &plan, NULL), 0);
            for (int64_t i = 0; i < store.num_requests; i++) {
                const int32_t truth = store.requests[i].output_tokens;
                guessed[i] = raddle_blend_length_known(
                    1 + (int32_t)((int64_t)truth * random_below(30) / 100));
            }
            preemptions += check_conservation(&store, &trie, &limits, &plan, guessed);
            raddle_blend_plan_fini(&plan);
        }
        raddle_free(guessed);
        raddle_blend_trie_fini(&trie);
        raddle_blend_store_fini(&store);
    }
    CHECK(preemptions > 50); /* of wrong lengths: that path is tested too */
}

static raddle_blend_result run_policy(const raddle_blend_store *store,
                                      const raddle_blend_trie *trie, const raddle_blend_cost *cost,
                                      const raddle_blend_limits *limits,
                                      raddle_blend_policy policy) {
    raddle_blend_plan plan;
    raddle_blend_result result = {0};
    CHECK_OK(raddle_blend_plan_make(store, trie, cost, limits, policy, NULL, 1, &plan));
    CHECK_OK(raddle_blend_simulate(store, trie, cost, limits, &plan, NULL, &result, NULL));
    raddle_blend_plan_fini(&plan);
    return result;
}

/* Depth first nothing is computed twice in a pool that holds a few; at random it is. */
static void test_order_decides_what_is_shared(void) {
    raddle_blend_store store;
    raddle_blend_trie trie;
    fill(&store, 0, 0);
    for (int32_t i = 0; i < 400; i++) {
        uint64_t blocks[20];
        for (int32_t k = 0; k < 20; k++) {
            blocks[k] = (uint64_t)(k < 18 ? i % 40 * 100 + k : 100000 + i * 2 + k);
        }
        const raddle_blend_request request = {.num_blocks = 20,
                                              .prompt_tokens = 165,
                                              .output_tokens = 20,
                                              .max_tokens = 20,
                                              .weight = 1.0f};
        CHECK_OK(raddle_blend_store_add(&store, &request, blocks));
    }
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    const raddle_blend_limits limits = {.pool_tokens = 2000, .step_tokens = 256};
    const raddle_blend_cost cost = model(0.3, 1e9);
    const raddle_blend_result depth_first =
        run_policy(&store, &trie, &cost, &limits, RADDLE_BLEND_DFS);
    const raddle_blend_result random =
        run_policy(&store, &trie, &cost, &limits, RADDLE_BLEND_RANDOM);
    const raddle_blend_result longest_prefix =
        run_policy(&store, &trie, &cost, &limits, RADDLE_BLEND_LPM);
    const raddle_blend_result first_come =
        run_policy(&store, &trie, &cost, &limits, RADDLE_BLEND_FCFS);
    CHECK_INT(depth_first.hit_tokens,
              (int64_t)store.num_blocks * BLOCK - trie.distinct_blocks * BLOCK);
    CHECK(random.hit_tokens < depth_first.hit_tokens / 2);
    CHECK(first_come.hit_tokens < depth_first.hit_tokens / 2);
    /* Its window holds three of each prefix, ten of which there are. */
    CHECK(longest_prefix.hit_tokens > depth_first.hit_tokens / 2);
    CHECK(longest_prefix.hit_tokens < depth_first.hit_tokens);
    CHECK(depth_first.seconds < random.seconds);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

/* Prompts with short answers come first, long answers to long shared contexts last: depth first one
 * waits for the other, paced they hide each other, and share as much. */
static void test_pacing_hides_reads_behind_computing(void) {
    enum { HALF = 3000 };
    raddle_blend_store store;
    raddle_blend_trie trie;
    fill(&store, 0, 0);
    for (int32_t i = 0; i < 2 * HALF; i++) {
        uint64_t blocks[250];
        const int32_t count = i < HALF ? 100 : 250, shared = i < HALF ? 70 : 240;
        for (int32_t k = 0; k < count; k++) {
            blocks[k] = (uint64_t)(k == 0 ? i / HALF : k < shared ? i / 50 : 1000000 + i);
        }
        const int32_t output = i < HALF ? 2 : 150 + random_below(100);
        const raddle_blend_request request = {.num_blocks = count,
                                              .prompt_tokens = count * BLOCK + 1,
                                              .output_tokens = output,
                                              .max_tokens = output,
                                              .weight = 1.0f};
        CHECK_OK(raddle_blend_store_add(&store, &request, blocks));
    }
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    const raddle_blend_limits limits = {.pool_tokens = 150000, .step_tokens = 512};
    const raddle_blend_cost cost = model(0.0, 1e9);
    const raddle_blend_result depth_first =
        run_policy(&store, &trie, &cost, &limits, RADDLE_BLEND_DFS);
    const raddle_blend_result paced = run_policy(&store, &trie, &cost, &limits, RADDLE_BLEND_PACED);
    CHECK(paced.seconds < 0.9 * depth_first.seconds);
    CHECK(paced.seconds < 1.05 * paced.bound_seconds);
    CHECK((double)paced.hit_tokens > 0.98 * (double)depth_first.hit_tokens);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

typedef struct expected {
    int64_t base, end;
} expected;

/* At the end of every bucket: who is there, and what they hold. */
static int64_t peak_of(const expected *live, int count, int64_t now, int64_t base, int64_t end) {
    int64_t peak = 0;
    for (int64_t bucket = now / RADDLE_BLEND_BUCKET; bucket < (now + 6100) / 64; bucket++) {
        const int64_t then = (bucket + 1) * RADDLE_BLEND_BUCKET - 1;
        int64_t sum = (end > now ? end : now) / 64 >= bucket ? base + then : 0;
        for (int i = 0; i < count; i++) {
            const int64_t until = live[i].end > now ? live[i].end : now;
            sum += until / 64 >= bucket ? live[i].base + then : 0;
        }
        peak = sum > peak ? sum : peak;
    }
    return peak;
}

/* What was asked before and what changed since, and by how much, makes no difference. */
static void test_forecast(void) {
    enum { MOST = 60 };
    for (int round = 0; round < 50; round++) {
        expected live[MOST];
        int count = 0;
        raddle_blend_forecast forecast;
        CHECK_OK(raddle_blend_forecast_init(&forecast, 2000));
        int64_t now = 0;
        for (int step = 0; step < 300; step++) {
            const int change = random_below(4), longest = round % 2 == 0 ? 2000 : 300;
            if (change == 0) {
                now += random_below(random_below(8) == 0 ? 3000 : 40);
                raddle_blend_forecast_advance(&forecast, now);
            } else if (count > 0 && (count == MOST || change == 1)) {
                const int i = random_below(count);
                raddle_blend_forecast_add(&forecast, live[i].base, live[i].end, -1);
                live[i] = live[--count];
            } else if (change == 2) { /* in one of five, expected to have ended by now */
                live[count].base = random_below(500) - now;
                live[count].end = now + random_below(5 * longest / 4) - longest / 4;
                live[count].end = live[count].end > 0 ? live[count].end : 0;
                raddle_blend_forecast_add(&forecast, live[count].base, live[count].end, 1);
                count++;
            } /* or nothing changes */
            for (int asked = random_below(4); asked > 0; asked--) {
                const int64_t base = random_below(500) - now;
                const int64_t ends[] = {now + random_below(longest), now - random_below(500),
                                        now + random_below(6000)}; /* of one that is thought long */
                const int64_t end = ends[random_below(3)];
                CHECK_INT(raddle_blend_forecast_peak(&forecast, base, end),
                          peak_of(live, count, now, base, end));
            }
        }
        raddle_blend_forecast_fini(&forecast);
    }
}

static void test_what_cannot_be_simulated(void) {
    raddle_blend_store store;
    raddle_blend_trie trie;
    fill(&store, 0, 0);
    raddle_blend_request request = {
        .prompt_tokens = 50, .output_tokens = 60, .max_tokens = 60, .weight = 1.0f};
    CHECK_OK(raddle_blend_store_add(&store, &request, NULL));
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    const raddle_blend_cost cost = model(0.3, 1e9);
    raddle_blend_limits limits = {.pool_tokens = 100, .step_tokens = 16};
    raddle_blend_plan plan;
    raddle_blend_cost rateless = cost;
    rateless.num_rates = 0;
    CHECK_FAILS(raddle_blend_plan_make(&store, &trie, &rateless, &limits, RADDLE_BLEND_PACED, NULL,
                                       0, &plan),
                RADDLE_ERR_VALUE, "gemm_rate");
    CHECK_OK(
        raddle_blend_plan_make(&store, &trie, &cost, &limits, RADDLE_BLEND_FCFS, NULL, 0, &plan));
    raddle_blend_result result = {.steps = -5};
    CHECK_FAILS(raddle_blend_simulate(&store, &trie, &cost, &limits, &plan, NULL, &result, NULL),
                RADDLE_ERR_VALUE, "request 0 may take 110 tokens, the pool has 100");
    limits.pool_tokens = 110;
    store.requests[0].output_tokens = RADDLE_BLEND_UNKNOWN;
    CHECK_FAILS(raddle_blend_simulate(&store, &trie, &cost, &limits, &plan, NULL, &result, NULL),
                RADDLE_ERR_VALUE, "request 0 has none");
    store.requests[0].output_tokens = 60;
    limits.step_tokens = 0;
    CHECK_FAILS(raddle_blend_simulate(&store, &trie, &cost, &limits, &plan, NULL, &result, NULL),
                RADDLE_ERR_VALUE, "limits");
    CHECK_INT(result.steps, -5); /* untouched by a failure */
    limits.step_tokens = 16;
    CHECK_OK(raddle_blend_simulate(&store, &trie, &cost, &limits, &plan, NULL, &result, NULL));
    CHECK_INT(result.steps, 4 + 59); /* 50 tokens in chunks of 16, the last gives a token */
    raddle_blend_plan_fini(&plan);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

/* Outputs that turn out ten times as long as the first one seen: what is thought of them grows past
 * all that was known when the run began. */
static void test_guesses_that_grow(void) {
    enum { COUNT = 400 };
    static int32_t seen[COUNT];
    static raddle_blend_length lengths[COUNT];
    raddle_blend_store store;
    raddle_blend_trie trie;
    raddle_blend_plan plan;
    raddle_blend_result result = {0};
    const raddle_blend_cost cost = model(0.3, 1e9);
    const raddle_blend_limits limits = {.pool_tokens = 30000, .step_tokens = 64};
    fill(&store, 0, 0);
    for (int32_t i = 0; i < COUNT; i++) {
        const bool is_long = i % 5 == 1 || i % 50 == 7;
        const uint64_t blocks[2] = {is_long, is_long};
        const raddle_blend_request request = {.num_blocks = 2,
                                              .prompt_tokens = 2 * BLOCK + 1,
                                              .output_tokens = is_long ? 1000 : 100,
                                              .max_tokens = 20000,
                                              .weight = 1.0f};
        CHECK_OK(raddle_blend_store_add(&store, &request, blocks));
        seen[i] = i == 0 ? 100 : RADDLE_BLEND_UNKNOWN;
    }
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    CHECK_OK(raddle_blend_lengths_guess(&store, &trie, seen, NULL, lengths));
    CHECK_OK(raddle_blend_plan_make(&store, &trie, &cost, &limits, RADDLE_BLEND_FCFS, lengths, 0,
                                    &plan));
    CHECK_OK(raddle_blend_simulate(&store, &trie, &cost, &limits, &plan, lengths, &result, NULL));
    CHECK(result.steps > 1000 && result.preemptions > 0);
    raddle_blend_plan_fini(&plan);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

int main(void) {
    random_state = 21;
    test_forecast();
    test_guesses_that_grow();
    test_random_workloads();
    test_order_decides_what_is_shared();
    test_pacing_hides_reads_behind_computing();
    test_what_cannot_be_simulated();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

// needs: base/status.c base/alloc.c blend/blend_cost.c
/* test_blend_cost.c - seconds of steps: known answers, convexity, and a bound that no schedule
 * beats. */
#include <math.h>

#include "check.h"

#include "blend/blend.h"

static uint64_t random_state = 5;

static double random_unit(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 40) / (double)(1 << 24);
}

/* Llama-3-8B on an A100 of the paper's peak rates: 8.03e9 parameters, 32 layers, 32/8 heads of 128. */
static raddle_blend_cost a100(double alpha) {
    return (raddle_blend_cost){
        .flops_per_token = 2 * 8.03e9,
        .flops_per_score = 4.0 * 4096 * 32,
        .kv_bytes_per_token = 131072,
        .weight_bytes = 16.06e9,
        .attention_flops_rate = 312e12,
        .read_rate = 2.039e12,
        .overhead = 0,
        .alpha = alpha,
        .num_rates = 1,
        .rate_tokens = {1},
        .gemm_rate = {312e12},
    };
}

static bool is_near(double got, double want) {
    return fabs(got - want) <= 1e-3 * fabs(want);
}

static void test_known_answers(void) {
    const raddle_blend_cost cost = a100(0.45);
    CHECK_OK(raddle_blend_cost_check(&cost));
    /* 51.5 us per token through the GEMMs, 64.3 ns per token read: the notes on BlendServe. */
    CHECK(
        is_near(raddle_blend_compute_seconds(&cost, &(raddle_blend_work){.tokens = 1}), 51.47e-6));
    const raddle_blend_work none = {.tokens = 1}, pool = {.tokens = 1, .reads = 457763};
    const double weights = raddle_blend_read_seconds(&cost, &none);
    CHECK(is_near(raddle_blend_read_seconds(&cost, &pool) - weights, 29.43e-3));
    /* alpha 0: the longer one alone; alpha 1: both. */
    const raddle_blend_work step = {.tokens = 500, .scores = 1e6, .reads = 300000};
    const raddle_blend_cost perfect = a100(0), none_hidden = a100(1);
    const double c = raddle_blend_compute_seconds(&perfect, &step);
    const double m = raddle_blend_read_seconds(&perfect, &step);
    CHECK(is_near(raddle_blend_step_seconds(&perfect, &step), fmax(c, m)));
    CHECK(is_near(raddle_blend_step_seconds(&none_hidden, &step), c + m));
    /* A prompt of 3 of which 1 is cached, and 4 outputs: queries 1 and 2 see 2 and 3 keys; the three
     * steps of decoding read the prompt and 1, 2 and 3 tokens behind it. */
    const raddle_blend_work work = raddle_blend_request_work(3, 1, 4);
    CHECK(is_near(work.tokens, 2 + 3));
    CHECK(is_near(work.scores, 2 + 3));
    CHECK(is_near(work.reads, 4 + 5 + 6));
}

/* A table: flat below, linear between, and convex all along. */
static void test_rates_by_tokens(void) {
    raddle_blend_cost cost = a100(0.3);
    const double tokens[] = {128, 512, 1024, 4096}, rate[] = {100e12, 300e12, 500e12, 600e12};
    cost.num_rates = 4;
    for (int i = 0; i < 4; i++) {
        cost.rate_tokens[i] = tokens[i];
        cost.gemm_rate[i] = rate[i];
    }
    cost.gemm_rate[2] = 330e12;
    cost.gemm_rate[3] = 300e12;
    CHECK_OK(raddle_blend_cost_check(&cost));
    double before = 0, slope = 0;
    for (double n = 64; n <= 8192; n += 64) {
        const double now = raddle_blend_compute_seconds(&cost, &(raddle_blend_work){.tokens = n});
        if (n > 64) {
            CHECK(now >= before);
            CHECK(now - before >= slope - 1e-12);
            slope = now - before;
        }
        before = now;
    }
    for (int i = 0; i < 4; i++) {
        const raddle_blend_work step = {.tokens = tokens[i]};
        CHECK(is_near(raddle_blend_compute_seconds(&cost, &step),
                      tokens[i] * cost.flops_per_token / cost.gemm_rate[i]));
    }
    cost.gemm_rate[2] = 500e12; /* 512 more tokens for less than 384 took */
    CHECK_FAILS(raddle_blend_cost_check(&cost), RADDLE_ERR_VALUE, "convex hull");
}

/* GEMMs that were timed have the weights' read in them. One after the other is then what each takes
 * alone, and a step without K and V what its GEMMs take, whatever is hidden. */
static void test_weights_in_gemms(void) {
    raddle_blend_cost cost = a100(1);
    cost.weights_in_gemms = true;
    cost.overhead = 1e-3;
    CHECK_FAILS(raddle_blend_cost_check(&cost), RADDLE_ERR_VALUE, "weights_in_gemms");
    const double weights = 16.06e9 / 2.039e12, least = 8.5e-3, most = 110e-3;
    cost.num_rates = 2;
    cost.rate_tokens[1] = 2048;
    cost.gemm_rate[0] = cost.flops_per_token / least;
    cost.gemm_rate[1] = 2048 * cost.flops_per_token / most;
    CHECK_OK(raddle_blend_cost_check(&cost));
    const raddle_blend_work one = {.tokens = 1, .reads = 100000}, many = {.tokens = 2048},
                            both = {.tokens = 2048, .scores = 1e6, .reads = 300000};
    const double s_one = 100000.0 * 131072 / 2.039e12, s_both = 3 * s_one;
    const double scores = 1e6 * 4 * 4096 * 32 / 312e12;
    for (int i = 0; i <= 10; i++) {
        cost.alpha = i / 10.0;
        CHECK(is_near(raddle_blend_step_seconds(&cost, &one),
                      weights + s_one + cost.alpha * (least - weights) + 1e-3));
        CHECK(is_near(raddle_blend_step_seconds(&cost, &many), most + 1e-3));
        CHECK(is_near(raddle_blend_step_seconds(&cost, &both),
                      most + scores + cost.alpha * s_both + 1e-3));
    }
    CHECK(is_near(raddle_blend_read_seconds(&cost, &one), weights + s_one));
    cost.weight_bytes *= 2; /* more than the GEMMs of one token take: all of these is reading */
    CHECK(is_near(raddle_blend_read_seconds(&cost, &one), least + s_one));
    CHECK(is_near(raddle_blend_step_seconds(&cost, &one), least + s_one + 1e-3));
    CHECK(raddle_blend_step_seconds(&cost, &(raddle_blend_work){0}) == 1e-3);
    cost.weights_in_gemms = false; /* from rates: they are read beside all computing */
    CHECK(is_near(raddle_blend_step_seconds(&cost, &many), most + 2 * weights + 1e-3));
}

static void test_bad_models(void) {
    raddle_blend_cost cost = a100(1.5);
    CHECK_FAILS(raddle_blend_cost_check(&cost), RADDLE_ERR_VALUE, "alpha");
    cost = a100(0.5);
    cost.read_rate = 0;
    CHECK_FAILS(raddle_blend_cost_check(&cost), RADDLE_ERR_VALUE, "read_rate");
    cost = a100(0.5);
    cost.weight_bytes = NAN;
    CHECK_FAILS(raddle_blend_cost_check(&cost), RADDLE_ERR_VALUE, "weight_bytes");
    cost = a100(0.5);
    cost.num_rates = 0;
    CHECK_FAILS(raddle_blend_cost_check(&cost), RADDLE_ERR_VALUE, "1 to 16 rates");
}

/* Any cut of the work into steps that keep the limits takes at least the bound; equal steps of its
 * number take just that. */
static void test_no_schedule_beats_the_bound(void) {
    for (int round = 0; round < 2000; round++) {
        raddle_blend_cost cost = a100(random_unit());
        cost.overhead = round % 3 == 0 ? 1e-3 * random_unit() : 0;
        if (round % 2 == 0) {
            cost.weights_in_gemms = round % 5 < 2;
            cost.num_rates = 2;
            cost.rate_tokens[0] = 256;
            cost.gemm_rate[0] = 150e12;
            cost.rate_tokens[1] = 2048;
            cost.gemm_rate[1] = 250e12;
        }
        enum { MOST = 40 };
        const int steps = 1 + (int)(random_unit() * (MOST - 1));
        const double pool = 400000, step_tokens = 2048;
        raddle_blend_work sum = {0};
        double seconds = 0;
        for (int i = 0; i < steps; i++) {
            const raddle_blend_work step = {
                .tokens = 1 + random_unit() * (step_tokens - 1),
                .scores = random_unit() * 1e7,
                .reads = random_unit() * pool,
            };
            seconds += raddle_blend_step_seconds(&cost, &step);
            sum.tokens += step.tokens;
            sum.scores += step.scores;
            sum.reads += step.reads;
        }
        double best = 0;
        const double least = fmax(sum.tokens / step_tokens, random_unit() * steps);
        const double bound = raddle_blend_bound_seconds(&cost, &sum, least, &best);
        CHECK(bound <= seconds * (1 + 1e-9));
        CHECK(best >= least * (1 - 1e-9));
        const raddle_blend_work each = {sum.tokens / best, sum.scores / best, sum.reads / best};
        CHECK(is_near(best * raddle_blend_step_seconds(&cost, &each), bound));
    }
}

int main(void) {
    test_known_answers();
    test_rates_by_tokens();
    test_weights_in_gemms();
    test_bad_models();
    test_no_schedule_beats_the_bound();
    return check_report();
}

/* blend_cost.c - seconds of a step, and of the best that steps of the same work can do.
 *
 * A step computes (GEMMs over its tokens, prefill attention over its scores) and reads (the weights,
 * K and V of what decodes). What of the shorter one does not hide behind the longer one is alpha.
 * Rates of GEMMs depend on how many tokens a step has: few tokens leave the GPU idle.
 *
 * Where GEMMs were timed on the machine, their times have the reading of the weights in them: with
 * w for that (no more than the least tokens take), c for computing as timed and s for K and V, a
 * step takes w + max(c - w, s) + alpha min(c - w, s), which is
 * max(c, w + s) + alpha (min(c, w + s) - w). Both forms are convex in a step's work.
 */
#include "blend/blend.h"

#include <math.h>
#include <stdbool.h>

static raddle_status check_positive(double value, const char *name) {
    RADDLE_REQUIRE(isfinite(value) && value > 0, RADDLE_ERR_VALUE,
                   "cost model: %s: expected a positive number, got %g", name, value);
    return RADDLE_OK;
}

static raddle_status check_not_negative(double value, const char *name) {
    RADDLE_REQUIRE(isfinite(value) && value >= 0, RADDLE_ERR_VALUE,
                   "cost model: %s: expected a number of 0 or more, got %g", name, value);
    return RADDLE_OK;
}

static double seconds_at(const raddle_blend_cost *cost, int32_t i) {
    return cost->rate_tokens[i] * cost->flops_per_token / cost->gemm_rate[i];
}

/* Seconds that a token more takes between measured numbers i - 1 and i of them. */
static double slope_before(const raddle_blend_cost *cost, int32_t i) {
    return (seconds_at(cost, i) - seconds_at(cost, i - 1)) /
           (cost->rate_tokens[i] - cost->rate_tokens[i - 1]);
}

raddle_status raddle_blend_cost_check(const raddle_blend_cost *cost) {
    RADDLE_TRY(check_positive(cost->flops_per_token, "flops_per_token"));
    RADDLE_TRY(check_not_negative(cost->flops_per_score, "flops_per_score"));
    RADDLE_TRY(check_positive(cost->kv_bytes_per_token, "kv_bytes_per_token"));
    RADDLE_TRY(check_not_negative(cost->weight_bytes, "weight_bytes"));
    RADDLE_TRY(check_positive(cost->attention_flops_rate, "attention_flops_rate"));
    RADDLE_TRY(check_positive(cost->read_rate, "read_rate"));
    RADDLE_TRY(check_not_negative(cost->overhead, "overhead"));
    RADDLE_REQUIRE(cost->alpha >= 0 && cost->alpha <= 1, RADDLE_ERR_VALUE,
                   "cost model: alpha: expected 0 (perfect overlap) to 1 (none), got %g",
                   cost->alpha);
    RADDLE_REQUIRE(cost->num_rates >= 1 && cost->num_rates <= RADDLE_BLEND_MAX_RATES,
                   RADDLE_ERR_VALUE, "cost model: gemm_rate: expected 1 to %d rates, got %d",
                   RADDLE_BLEND_MAX_RATES, (int)cost->num_rates);
    RADDLE_REQUIRE(!cost->weights_in_gemms || cost->num_rates >= 2, RADDLE_ERR_VALUE,
                   "cost model: weights_in_gemms: expected gemm_rate at 2 numbers of tokens or "
                   "more, got 1; a single rate does not say what the weights' read takes");
    for (int32_t i = 0; i < cost->num_rates; i++) {
        RADDLE_TRY(check_positive(cost->gemm_rate[i], "gemm_rate"));
        RADDLE_TRY(check_positive(cost->rate_tokens[i], "rate_tokens"));
        if (i == 0) {
            continue;
        }
        RADDLE_REQUIRE(cost->rate_tokens[i] > cost->rate_tokens[i - 1], RADDLE_ERR_VALUE,
                       "cost model: rate_tokens: expected ascending numbers, got %g behind %g",
                       cost->rate_tokens[i], cost->rate_tokens[i - 1]);
        /* Equal steps are the best ones because the time is convex. */
        const double slope = i == 1 ? 0 : slope_before(cost, i - 1);
        RADDLE_REQUIRE(slope_before(cost, i) >= slope * (1 - 1e-9), RADDLE_ERR_VALUE,
                       "cost model: gemm_rate: a token more at %g tokens takes less time than one "
                       "before; give the lower convex hull of what was measured",
                       cost->rate_tokens[i]);
    }
    return RADDLE_OK;
}

/* Seconds of the GEMMs: between two measured numbers of tokens, on the line through their times;
 * below the first as long as that; above the last on the line before it or at its rate, whichever
 * is slower. One rate alone is that of any number. */
static double gemm_seconds(const raddle_blend_cost *cost, double tokens) {
    const int32_t last = cost->num_rates - 1;
    if (tokens <= 0) {
        return 0;
    }
    if (last == 0) {
        return tokens * cost->flops_per_token / cost->gemm_rate[0];
    }
    if (tokens <= cost->rate_tokens[0]) {
        return seconds_at(cost, 0);
    }
    int32_t i = 1;
    while (i < last && cost->rate_tokens[i] < tokens) {
        i++;
    }
    double slope = slope_before(cost, i);
    if (tokens > cost->rate_tokens[i]) {
        slope = fmax(slope, cost->flops_per_token / cost->gemm_rate[i]);
    }
    return seconds_at(cost, i) + (tokens - cost->rate_tokens[i]) * slope;
}

static double weight_seconds(const raddle_blend_cost *cost, const raddle_blend_work *step) {
    const double read = cost->weight_bytes / cost->read_rate;
    if (step->tokens <= 0 && step->reads <= 0) {
        return 0;
    }
    return cost->weights_in_gemms ? fmin(read, seconds_at(cost, 0)) : read;
}

double raddle_blend_compute_seconds(const raddle_blend_cost *cost, const raddle_blend_work *step) {
    return gemm_seconds(cost, step->tokens) +
           step->scores * cost->flops_per_score / cost->attention_flops_rate;
}

double raddle_blend_read_seconds(const raddle_blend_cost *cost, const raddle_blend_work *step) {
    return step->reads * cost->kv_bytes_per_token / cost->read_rate + weight_seconds(cost, step);
}

double raddle_blend_step_seconds(const raddle_blend_cost *cost, const raddle_blend_work *step) {
    const double compute = raddle_blend_compute_seconds(cost, step);
    const double read = raddle_blend_read_seconds(cost, step);
    const double in_both = cost->weights_in_gemms ? weight_seconds(cost, step) : 0;
    return fmax(compute, read) + cost->alpha * (fmin(compute, read) - in_both) + cost->overhead;
}

raddle_blend_work raddle_blend_request_work(int64_t prompt, int64_t cached, int64_t output) {
    const double p = (double)prompt, c = (double)cached, d = (double)output;
    /* Query i of the prompt sees i + 1 keys. The step that computes the prompt's end gives the first
     * token; each later one goes through the GEMMs itself and reads all before it. */
    return (raddle_blend_work){
        .tokens = p - c + (d - 1),
        .scores = (p * (p + 1) - c * (c + 1)) / 2,
        .reads = (d - 1) * p + (d - 1) * d / 2,
    };
}

/* ------------------------------------------------------------------ the bound */

static double equal_steps_seconds(const raddle_blend_cost *cost, const raddle_blend_work *work,
                                  double steps) {
    const raddle_blend_work each = {work->tokens / steps, work->scores / steps,
                                    work->reads / steps};
    return steps * raddle_blend_step_seconds(cost, &each);
}

double raddle_blend_bound_seconds(const raddle_blend_cost *cost, const raddle_blend_work *work,
                                  double least_steps, double *out_steps) {
    double low = fmax(least_steps, 1);
    /* Where more steps help (GEMMs of fewer tokens at a better rate) there is one lowest point: the
     * time is convex in the number of steps, as the perspective of a convex function. */
    double high = fmax(2 * low, work->tokens);
    const double ratio = 0.6180339887498949;
    double a = high - ratio * (high - low), b = low + ratio * (high - low);
    double at_a = equal_steps_seconds(cost, work, a), at_b = equal_steps_seconds(cost, work, b);
    for (int i = 0; i < 100 && high - low > 1e-9 * high; i++) {
        if (at_a <= at_b) {
            high = b;
            b = a;
            at_b = at_a;
            a = high - ratio * (high - low);
            at_a = equal_steps_seconds(cost, work, a);
        } else {
            low = a;
            a = b;
            at_a = at_b;
            b = low + ratio * (high - low);
            at_b = equal_steps_seconds(cost, work, b);
        }
    }
    if (out_steps != NULL) {
        *out_steps = low;
    }
    return fmin(equal_steps_seconds(cost, work, low), fmin(at_a, at_b));
}

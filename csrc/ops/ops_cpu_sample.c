/* ops_cpu_sample.c - the CPU back end of sampling, of what it leaves of rows, and of speculative
 * decoding: one row, one worker.
 *
 * After top-k the survivors move together, in order, and the rest works on them alone.
 */
#include "ops/ops_cpu_rows.h"

#include <math.h>
#include <string.h>

static raddle_ops_sampler make_sampler(const raddle_ops_rows_job *job,
                                       const raddle_ops_scratch *buffers, const float *row,
                                       float max, float temperature) {
    return (raddle_ops_sampler){
        .loops = job->loops,
        .buffers = buffers,
        .x = row,
        .count = job->vocab,
        .max = max,
        .factor =
            job->is_probs ? raddle_ops_prob_factor(max) : raddle_ops_weight_factor(temperature),
        .least = -INFINITY,
        .is_probs = job->is_probs,
    };
}

/* ---------------------------------------------------------------- sample */

/* Moves the tokens that may be drawn together. */
static void drop_the_rest(raddle_ops_sampler *s) {
    int64_t count = 0;
    for (int64_t i = 0; i < s->count; i++) {
        if (s->x[i] >= s->least) {
            s->buffers->row[count] = s->x[i];
            s->buffers->ids[count] = (int32_t)i;
            count++;
        }
    }
    s->x = s->buffers->row;
    s->ids = s->buffers->ids;
    s->count = count;
}

/* Weights are made already. */
static void keep_min_p(raddle_ops_sampler *s, float min_p) {
    float least = s->is_probs ? min_p * s->max : INFINITY;
    if (!s->is_probs) {
        const int64_t least_weight = raddle_ops_min_weight(min_p);
        for (int64_t i = 0; i < s->count; i++) {
            const float x = s->x[i];
            least = x < least && s->buffers->weights[i] >= least_weight ? x : least;
        }
    }
    s->least = least > s->least ? least : s->least;
}

/* top_p of all tokens: before anything is dropped. */
static void keep_joint(raddle_ops_sampler *s, const raddle_ops_sample_row *settings,
                       bool has_top_k) {
    raddle_ops_cpu_make_weights(s);
    if (settings->top_p < 1) {
        raddle_ops_cpu_keep_largest(s, true, 0, settings->top_p);
    }
    const float least = s->least;
    s->least = -INFINITY;
    if (has_top_k) {
        raddle_ops_cpu_keep_largest(s, false, settings->top_k, 0);
    }
    s->least = least > s->least ? least : s->least;
    if (settings->min_p > 0) {
        keep_min_p(s, settings->min_p);
    }
}

/* top_k before min_p, the other way round than it is told: both keep the largest values, so the result
 * is the same, and weights are only made for what top_k leaves. */
static void keep_in_turn(raddle_ops_sampler *s, const raddle_ops_sample_row *settings,
                         bool has_top_k) {
    if (has_top_k) {
        raddle_ops_cpu_keep_largest(s, false, settings->top_k, 0);
        drop_the_rest(s);
    }
    raddle_ops_cpu_make_weights(s);
    if (settings->min_p > 0) {
        keep_min_p(s, settings->min_p);
    }
    if (settings->top_p < 1) {
        raddle_ops_cpu_keep_largest(s, true, 0, settings->top_p);
    }
}

static int32_t first_maximum(const float *row, float max) {
    int32_t i = 0;
    while (row[i] != max) {
        i++;
    }
    return i;
}

/* -1 when all weights are 0. */
static int32_t sample_row(const raddle_ops_rows_job *job, const raddle_ops_scratch *buffers,
                          const float *row, float max, const raddle_ops_sample_row *settings,
                          int64_t number) {
    const raddle_ops_sample_job *p = job->params;
    if (settings->temperature == 0) {
        return first_maximum(row, max);
    }
    raddle_ops_sampler s = make_sampler(job, buffers, row, max, settings->temperature);
    const bool has_top_k = settings->top_k > 0 && settings->top_k < job->vocab;
    (p->call.is_joint ? keep_joint : keep_in_turn)(&s, settings, has_top_k);
    const uint32_t stream = p->call.is_row_stream ? (uint32_t)number : 0;
    return raddle_ops_cpu_draw(&s, raddle_ops_random(settings->seed, settings->offset, stream, 0));
}

static void write_token(const raddle_ops_sample_call *c, int64_t i, int64_t token, bool is_valid) {
    if (c->out_is_i64) {
        ((int64_t *)c->out)[i * c->out_stride] = token;
    } else {
        ((int32_t *)c->out)[i * c->out_stride] = (int32_t)token;
    }
    if (c->valid) {
        c->valid[i * c->valid_stride] = is_valid;
    }
}

static void sample_rows(void *context, int64_t begin, int64_t end, int worker) {
    raddle_ops_rows_job *job = context;
    const raddle_ops_sample_job *p = job->params;
    const raddle_ops_sample_call *c = &p->call;
    const raddle_ops_scratch s = raddle_ops_cpu_worker_scratch(job, worker);
    for (int64_t i = begin; i < end; i++) {
        const int64_t input =
            c->indices ? raddle_ops_index(c->indices, i * c->indices_stride, c->indices_are_i64)
                       : i;
        float max;
        const float *row = raddle_ops_cpu_widen_row(job, s.row, c->x, (raddle_dtype)c->dtype,
                                                    c->x_stride_row, input);
        int reason = raddle_ops_cpu_look_at_row(job, row, &max);
        int32_t token = -1;
        if (reason == RADDLE_OPS_ROW_OK) {
            token = sample_row(job, &s, row, max, &p->settings[i * c->settings_step], i);
            reason = token < 0 ? RADDLE_OPS_ROW_EMPTY : reason;
        }
        if (reason == RADDLE_OPS_ROW_OK || c->valid) {
            write_token(c, i, token < 0 ? 0 : token, reason == RADDLE_OPS_ROW_OK);
        } else {
            raddle_ops_cpu_report_row(job, input, reason);
        }
    }
}

raddle_status raddle_ops_cpu_sample(int32_t device, const raddle_ops_sample_job *sample,
                                    raddle_stream stream) {
    const raddle_ops_sample_call *c = &sample->call;
    (void)device;
    (void)stream;
    for (int64_t i = 0; c->indices && i < c->rows; i++) {
        const int64_t input =
            raddle_ops_index(c->indices, i * c->indices_stride, c->indices_are_i64);
        RADDLE_REQUIRE(input >= 0 && input < c->num_inputs, RADDLE_ERR_VALUE,
                       "indices: %lld at position %lld is out of range for %lld rows",
                       (long long)input, (long long)i, (long long)c->num_inputs);
    }
    raddle_ops_rows_job job = {.name = c->is_probs ? "probs" : "logits",
                               .vocab = c->vocab,
                               .is_probs = c->is_probs,
                               .params = sample,
                               .selects = true};
    return raddle_ops_cpu_run_rows(&job, sample_rows, c->rows);
}

/* ---------------------------------------------------------------- filter */

/* The values that are kept, into out; of probabilities also over their sum. */
static void keep_values(const raddle_ops_sampler *s, float *out) {
    double sum = 0;
    for (int64_t i = 0; s->is_probs && i < s->count; i++) {
        sum += s->x[i] >= s->least && s->x[i] > 0 ? (double)s->x[i] : 0.0;
    }
    const float scale = sum > 0 ? (float)(1.0 / sum) : 0.0f;
    for (int64_t i = 0; i < s->count; i++) {
        const bool is_kept = s->x[i] >= s->least;
        if (s->is_probs) {
            out[i] = is_kept && s->x[i] > 0 ? s->x[i] * scale : 0.0f;
        } else {
            out[i] = is_kept ? s->x[i] : -INFINITY;
        }
    }
}

static void filter_row(raddle_ops_sampler *s, const raddle_ops_sample_row *settings) {
    if (settings->top_k > 0 && settings->top_k < s->count) {
        raddle_ops_cpu_keep_largest(s, false, settings->top_k, 0);
    }
    if (settings->top_p < 1) {
        raddle_ops_cpu_make_weights(s);
        raddle_ops_cpu_keep_largest(s, true, 0, settings->top_p);
    }
    keep_values(s, s->buffers->second);
}

static void filter_rows(void *context, int64_t begin, int64_t end, int worker) {
    const raddle_ops_rows_job *job = context;
    const raddle_ops_sample_job *p = job->params;
    const raddle_ops_sample_call *c = &p->call;
    const raddle_ops_scratch buffers = raddle_ops_cpu_worker_scratch(job, worker);
    for (int64_t i = begin; i < end; i++) {
        const raddle_ops_sample_row *settings = &p->settings[i * c->settings_step];
        const float *row = raddle_ops_cpu_widen_row(job, buffers.row, c->x, (raddle_dtype)c->dtype,
                                                    c->x_stride_row, i);
        float max;
        const int reason = raddle_ops_cpu_look_at_row(job, row, &max);
        if (reason == RADDLE_OPS_ROW_NAN || (job->is_probs && max == INFINITY)) {
            for (int64_t d = 0; d < c->vocab; d++) {
                buffers.second[d] = NAN;
            }
        } else {
            raddle_ops_sampler s = make_sampler(job, &buffers, row, max, 1.0f);
            filter_row(&s, settings);
        }
        char *out = (char *)c->out +
                    i * c->out_stride * (int64_t)raddle_dtype_bytes((raddle_dtype)c->dtype);
        job->vec->store[c->dtype](out, buffers.second, c->vocab);
    }
}

raddle_status raddle_ops_cpu_filter(int32_t device, const raddle_ops_sample_job *filter,
                                    raddle_stream stream) {
    const raddle_ops_sample_call *c = &filter->call;
    (void)device;
    (void)stream;
    raddle_ops_rows_job job = {.name = c->is_probs ? "probs" : "logits",
                               .vocab = c->vocab,
                               .is_probs = c->is_probs,
                               .params = filter,
                               .selects = true,
                               .has_second = true};
    return raddle_ops_cpu_run_rows(&job, filter_rows, c->rows);
}

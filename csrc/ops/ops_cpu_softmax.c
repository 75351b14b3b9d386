/* ops_cpu_softmax.c - the CPU back end of softmax and log-probabilities: one row, one worker. */
#include "ops/ops_cpu_rows.h"

#include <math.h>

enum { EXP_BLOCK = 1024 };

/* A row as float32 and its maximum; NULL when it was refused. */
static const float *open_row(raddle_ops_rows_job *job, float *wide, const void *logits,
                             int32_t dtype, int64_t stride, int64_t i, float *out_max) {
    const float *row = raddle_ops_cpu_widen_row(job, wide, logits, (raddle_dtype)dtype, stride, i);
    const int reason = raddle_ops_cpu_look_at_row(job, row, out_max);
    if (reason != RADDLE_OPS_ROW_OK) {
        raddle_ops_cpu_report_row(job, i, reason);
        return NULL;
    }
    return row;
}

/* ---------------------------------------------------------------- softmax */

static void softmax_rows(void *context, int64_t begin, int64_t end, int worker) {
    raddle_ops_rows_job *job = context;
    const raddle_ops_softmax_params *p = job->params;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        float max;
        float *out = p->out + i * p->out_stride_row;
        const float factor = p->temperature
                                 ? (float)(1.0 / (double)p->temperature[i * p->temperature_stride])
                                 : p->inv_temperature;
        const float *row = open_row(job, out, p->logits, p->dtype, p->logits_stride_row, i, &max);
        if (row) {
            const double sum = job->loops->exp_sum(out, row, p->vocab, max, factor);
            job->vec->scale(out, p->vocab, (float)(1.0 / sum));
        }
    }
}

raddle_status raddle_ops_cpu_softmax(int32_t device, const raddle_ops_softmax_params *params,
                                     raddle_stream stream) {
    (void)device;
    (void)stream;
    raddle_ops_rows_job job = {.name = "logits", .vocab = params->vocab, .params = params};
    return raddle_ops_cpu_run_rows(&job, softmax_rows, params->rows);
}

/* ---------------------------------------------------------------- log-probabilities */

/* The top largest of row, largest first, ties by lower id: insertion into a short sorted list. */
static void find_top(const float *row, int64_t vocab, int32_t top, int32_t *ids) {
    int32_t count = 0;
    for (int64_t i = 0; i < vocab; i++) {
        if (count == top && row[i] <= row[ids[top - 1]]) {
            continue;
        }
        int32_t place = count < top ? count++ : top - 1;
        while (place > 0 && row[ids[place - 1]] < row[i]) {
            ids[place] = ids[place - 1];
            place--;
        }
        ids[place] = (int32_t)i;
    }
}

static double log_sum_exp_below(const raddle_ops_rows_job *job, const float *row, float max) {
    float block[EXP_BLOCK];
    double sum = 0;
    for (int64_t i = 0; i < job->vocab; i += EXP_BLOCK) {
        const int64_t count = job->vocab - i < EXP_BLOCK ? job->vocab - i : EXP_BLOCK;
        sum += job->loops->exp_sum(block, row + i, count, max, 1.0f);
    }
    return log(sum);
}

static void logprobs_rows(void *context, int64_t begin, int64_t end, int worker) {
    raddle_ops_rows_job *job = context;
    const raddle_ops_logprobs_params *p = job->params;
    const raddle_ops_scratch s = raddle_ops_cpu_worker_scratch(job, worker);
    for (int64_t i = begin; i < end; i++) {
        float max;
        const int64_t id = raddle_ops_index(p->ids, i * p->ids_stride, p->ids_are_i64);
        if (id < 0 || id >= p->vocab) {
            raddle_ops_cpu_report_row(job, i, RADDLE_OPS_ROW_ID);
            continue;
        }
        const float *row = open_row(job, s.row, p->logits, p->dtype, p->logits_stride_row, i, &max);
        if (!row) {
            continue;
        }
        /* Differences to the maximum first: exact where it matters. */
        const double log_sum = log_sum_exp_below(job, row, max);
        p->logprobs[i] = (float)((double)row[id] - (double)max - log_sum);
        if (p->top) {
            find_top(row, p->vocab, p->top, p->top_ids + i * p->top);
        }
        for (int32_t t = 0; t < p->top; t++) {
            const float x = row[p->top_ids[i * p->top + t]];
            p->top_logprobs[i * p->top + t] = (float)((double)x - (double)max - log_sum);
        }
    }
}

raddle_status raddle_ops_cpu_logprobs(int32_t device, const raddle_ops_logprobs_params *params,
                                      raddle_stream stream) {
    (void)device;
    (void)stream;
    raddle_ops_rows_job job = {.name = "logits", .vocab = params->vocab, .params = params};
    return raddle_ops_cpu_run_rows(&job, logprobs_rows, params->rows);
}

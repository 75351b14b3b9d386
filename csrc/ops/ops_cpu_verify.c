/* ops_cpu_verify.c - the CPU back end of speculative decoding of a chain: one row, one worker. */
#include "ops/ops_cpu_rows.h"

#include <math.h>
#include <string.h>

/* Element at of rows of a stored type. */
static float value_at(const raddle_ops_verify_params *p, const raddle_vec *vec, const void *rows,
                      int64_t at) {
    float x;
    vec->load[p->dtype](
        &x, (const char *)rows + at * (int64_t)raddle_dtype_bytes((raddle_dtype)p->dtype), 1);
    return x;
}

/* Draws from a target row, less a draft row where there is one; -1 when that cannot be done. */
static int32_t draw(const raddle_ops_rows_job *job, const raddle_ops_scratch *buffers,
                    const float *target, const float *draft, uint64_t random) {
    float *row = buffers->second;
    for (int64_t i = 0; i < job->vocab; i++) {
        row[i] = draft ? target[i] - draft[i] : target[i];
    }
    raddle_ops_sampler s = {.loops = job->loops,
                            .buffers = buffers,
                            .x = row,
                            .count = job->vocab,
                            .least = -INFINITY,
                            .is_probs = true};
    const int reason = raddle_ops_cpu_look_at_row(job, row, &s.max);
    if (reason == RADDLE_OPS_ROW_OK) {
        s.factor = raddle_ops_prob_factor(s.max);
        raddle_ops_cpu_make_weights(&s);
        const int32_t token = raddle_ops_cpu_draw(&s, random);
        if (token >= 0) {
            return token;
        }
    }
    const bool is_left = draft && reason != RADDLE_OPS_ROW_NAN;
    return is_left ? draw(job, buffers, target, NULL, random) : -1;
}

/* The first token that is not kept, and how many would be if each stood alone. */
static int32_t count_kept(const raddle_ops_verify_params *p, const raddle_vec *vec, int64_t row,
                          uint64_t seed, uint64_t offset, uint32_t stream, int32_t *out_accepted) {
    int32_t emitted = p->steps;
    *out_accepted = 0;
    for (int32_t i = 0; i < p->steps; i++) {
        const int64_t id = raddle_ops_index(
            p->ids, row * p->ids_stride_row + i * p->ids_stride_step, p->ids_are_i64);
        const float q =
            value_at(p, vec, p->draft, row * p->draft_stride_row + i * p->draft_stride_step + id);
        const float t = value_at(p, vec, p->target,
                                 row * p->target_stride_row + i * p->target_stride_step + id);
        const bool kept =
            raddle_ops_accepts(raddle_ops_random(seed, offset, stream, (uint32_t)i), q, t);
        *out_accepted += kept;
        emitted = !kept && emitted == p->steps ? i : emitted;
    }
    return emitted;
}

static void verify_rows(void *context, int64_t begin, int64_t end, int worker) {
    raddle_ops_rows_job *job = context;
    const raddle_ops_verify_params *p = job->params;
    const raddle_ops_scratch buffers = raddle_ops_cpu_worker_scratch(job, worker);
    const size_t bytes = raddle_dtype_bytes((raddle_dtype)p->dtype);
    for (int64_t row = begin; row < end; row++) {
        const uint64_t seed = p->seed ? (uint64_t)p->seed[row * p->seed_stride] : p->seed_value;
        const uint64_t offset =
            p->offset ? (uint64_t)p->offset[row * p->offset_stride] : p->offset_value;
        const uint32_t stream = p->is_row_stream ? (uint32_t)row : 0;
        int32_t accepted;
        const int32_t emitted = count_kept(p, job->vec, row, seed, offset, stream, &accepted);
        const void *target =
            (const char *)p->target +
            (row * p->target_stride_row + emitted * p->target_stride_step) * (int64_t)bytes;
        const void *draft =
            (const char *)p->draft +
            (row * p->draft_stride_row + emitted * p->draft_stride_step) * (int64_t)bytes;
        job->vec->load[p->dtype](buffers.row, target, job->vocab);
        float *draft_row = NULL;
        if (emitted < p->steps) {
            draft_row = (float *)(void *)buffers.ids; /* of the same size, and not used otherwise */
            job->vec->load[p->dtype](draft_row, draft, job->vocab);
        }
        const int32_t token = draw(job, &buffers, buffers.row, draft_row,
                                   raddle_ops_random(seed, offset, stream, (uint32_t)p->steps));
        if (token < 0) {
            raddle_ops_cpu_report_row(job, row, RADDLE_OPS_ROW_EMPTY);
            continue;
        }
        int32_t *out = p->out + row * p->out_stride_row;
        for (int32_t i = 0; i <= p->steps; i++) {
            const int64_t at = row * p->ids_stride_row + i * p->ids_stride_step;
            out[i] = i < emitted    ? (int32_t)raddle_ops_index(p->ids, at, p->ids_are_i64)
                     : i == emitted ? token
                                    : -1;
        }
        if (p->accepted) {
            p->accepted[row * p->accepted_stride] += accepted;
        }
        if (p->emitted) {
            p->emitted[row * p->emitted_stride] += emitted;
        }
    }
}

raddle_status raddle_ops_cpu_verify(int32_t device, const raddle_ops_verify_params *p,
                                    raddle_stream stream) {
    (void)device;
    (void)stream;
    for (int64_t i = 0; i < p->rows * p->steps; i++) {
        const int64_t row = i / p->steps, step = i % p->steps;
        const int64_t id = raddle_ops_index(
            p->ids, row * p->ids_stride_row + step * p->ids_stride_step, p->ids_are_i64);
        RADDLE_REQUIRE(id >= 0 && id < p->vocab, RADDLE_ERR_VALUE,
                       "draft_token_ids: %lld in row %lld is out of range for a vocabulary of %lld",
                       (long long)id, (long long)row, (long long)p->vocab);
    }
    raddle_ops_rows_job job = {.name = "target_probs",
                               .vocab = p->vocab,
                               .is_probs = true,
                               .params = p,
                               .selects = true,
                               .has_second = true};
    return raddle_ops_cpu_run_rows(&job, verify_rows, p->rows);
}

/* ops_cpu.c - the CPU back end of activations and the embedding, and its table.
 *
 * Rows are widened to float32 in blocks that stay in the L1 cache, worked on, and rounded back
 * once.
 */
#include "ops/ops_cpu.h"

#include <math.h>
#include <string.h>

#include "base/threads.h"
#include "cpu/vec.h"

enum {
    BLOCK = 512, /* floats of a row that are in work at once */
    ELEMENTS_PER_TASK =
        1 << 12 /* less than this is not worth sharing (a decode step of 64 x 256) */
};

int64_t raddle_ops_cpu_rows_per_task(int64_t elements) {
    return elements >= ELEMENTS_PER_TASK ? 1 : ELEMENTS_PER_TASK / elements;
}

static void *at(const void *data, int64_t element, size_t element_bytes) {
    return (char *)data + element * (int64_t)element_bytes;
}

static int block_length(int64_t begin, int64_t end) {
    return end - begin < BLOCK ? (int)(end - begin) : BLOCK;
}

/* ---------------------------------------------------------------- activations */

typedef struct act_job {
    const raddle_ops_act_params *params;
    const raddle_vec *vec;
    size_t element_bytes;
} act_job;

static void act_row(const act_job *job, const void *x, void *out) {
    const raddle_ops_act_params *p = job->params;
    void (*const act_and_mul)(float *, const float *, int) =
        raddle_ops_cpu_loops_get()->act_and_mul[p->activation];
    float gate[BLOCK], up[BLOCK];
    for (int64_t d = 0; d < p->width; d += BLOCK) {
        const int count = block_length(d, p->width);
        job->vec->load[p->dtype](gate, at(x, d, job->element_bytes), count);
        job->vec->load[p->dtype](up, at(x, p->width + d, job->element_bytes), count);
        act_and_mul(gate, up, count);
        job->vec->store[p->dtype](at(out, d, job->element_bytes), gate, count);
    }
}

static void act_rows(void *context, int64_t begin, int64_t end, int worker) {
    const act_job *job = context;
    const raddle_ops_act_params *p = job->params;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / p->heads, head = i % p->heads;
        act_row(
            job, at(p->x, row * p->x_stride_row + head * p->x_stride_head, job->element_bytes),
            at(p->out, row * p->out_stride_row + head * p->out_stride_head, job->element_bytes));
    }
}

static raddle_status run_act_and_mul(int32_t device, const raddle_ops_act_params *params,
                                     raddle_stream stream) {
    (void)device;
    (void)stream;
    act_job job = {params, raddle_vec_get(), raddle_dtype_bytes(params->dtype)};
    raddle_threads_for(act_rows, &job, params->rows * params->heads,
                       raddle_ops_cpu_rows_per_task(2 * (int64_t)params->width));
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- embedding */

typedef struct embedding_job {
    const raddle_ops_embedding_params *params;
    size_t element_bytes;
} embedding_job;

static void embedding_rows(void *context, int64_t begin, int64_t end, int worker) {
    const embedding_job *job = context;
    const raddle_ops_embedding_params *p = job->params;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const int64_t id = raddle_ops_index(p->ids, i * p->ids_stride, p->ids_are_i64);
        memcpy(at(p->out, i * p->out_stride_row, job->element_bytes),
               at(p->table, id * p->table_stride_row, job->element_bytes),
               (size_t)p->width * job->element_bytes);
    }
}

static raddle_status run_embedding(int32_t device, const raddle_ops_embedding_params *params,
                                   raddle_stream stream) {
    (void)device;
    (void)stream;
    for (int64_t i = 0; i < params->rows; i++) {
        const int64_t id =
            raddle_ops_index(params->ids, i * params->ids_stride, params->ids_are_i64);
        RADDLE_REQUIRE(id >= 0 && id < params->vocab, RADDLE_ERR_VALUE,
                       "ids: %lld at position %lld is out of range for a table of %lld rows",
                       (long long)id, (long long)i, (long long)params->vocab);
    }
    embedding_job job = {params, raddle_dtype_bytes(params->dtype)};
    raddle_threads_for(embedding_rows, &job, params->rows,
                       raddle_ops_cpu_rows_per_task(params->width));
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- the table */

const raddle_ops_backend raddle_ops_backend_cpu = {
    .name = "cpu",
    .norm = raddle_ops_cpu_norm,
    .act_and_mul = run_act_and_mul,
    .embedding = run_embedding,
    .rope = raddle_ops_cpu_rope,
    .rope_fp8 = raddle_ops_cpu_rope_fp8,
    .softmax = raddle_ops_cpu_softmax,
    .sample = raddle_ops_cpu_sample,
    .filter = raddle_ops_cpu_filter,
    .verify = raddle_ops_cpu_verify,
    .logprobs = raddle_ops_cpu_logprobs,
    .linear_pack = raddle_ops_cpu_linear_pack,
    .linear_run = raddle_ops_cpu_linear_run,
    .linear_release = raddle_ops_cpu_linear_release,
};

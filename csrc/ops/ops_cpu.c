/* ops_cpu.c - the CPU back end of rotary embedding, activations and the embedding.
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

/* ---------------------------------------------------------------- rotary embedding */

typedef struct rope_job {
    const raddle_ops_rope_params *params;
    const raddle_vec *vec;
    size_t element_bytes;
} rope_job;

static int64_t index_at(const void *indices, int64_t i, int64_t stride, int32_t are_i64) {
    return are_i64 ? ((const int64_t *)indices)[i * stride]
                   : ((const int32_t *)indices)[i * stride];
}

/* Pairs (i, i + half) of one head. */
static void rotate_halves(const rope_job *job, void *head, const float *cosine, const float *sine) {
    const raddle_ops_rope_params *p = job->params;
    const int half = p->rotary_dim / 2;
    float a[BLOCK], b[BLOCK];
    for (int d = 0; d < half; d += BLOCK) {
        const int count = block_length(d, half);
        void *first = at(head, d, job->element_bytes);
        void *second = at(head, half + d, job->element_bytes);
        job->vec->load[p->dtype](a, first, count);
        job->vec->load[p->dtype](b, second, count);
        for (int i = 0; i < count; i++) {
            const float x = a[i], y = b[i];
            a[i] = x * cosine[d + i] - y * sine[d + i];
            b[i] = y * cosine[d + i] + x * sine[d + i];
        }
        job->vec->store[p->dtype](first, a, count);
        job->vec->store[p->dtype](second, b, count);
    }
}

/* Pairs (2i, 2i + 1) of one head. */
static void rotate_neighbours(const rope_job *job, void *head, const float *cosine,
                              const float *sine) {
    const raddle_ops_rope_params *p = job->params;
    float a[BLOCK];
    for (int d = 0; d < p->rotary_dim; d += BLOCK) {
        const int count = block_length(d, p->rotary_dim);
        void *pairs = at(head, d, job->element_bytes);
        job->vec->load[p->dtype](a, pairs, count);
        for (int i = 0; i < count; i += 2) {
            const float x = a[i], y = a[i + 1];
            const float c = cosine[(d + i) / 2], s = sine[(d + i) / 2];
            a[i] = x * c - y * s;
            a[i + 1] = y * c + x * s;
        }
        job->vec->store[p->dtype](pairs, a, count);
    }
}

static void rope_rows(void *context, int64_t begin, int64_t end, int worker) {
    const rope_job *job = context;
    const raddle_ops_rope_params *p = job->params;
    (void)worker;
    for (int64_t row = begin; row < end; row++) {
        const int64_t position =
            index_at(p->positions, row, p->positions_stride, p->positions_are_i64);
        const float *cosine = p->cos_sin + position * p->cos_sin_stride_row;
        const float *sine = cosine + p->rotary_dim / 2;
        for (int h = 0; h < p->num_qo_heads + p->num_kv_heads; h++) {
            const bool is_q = h < p->num_qo_heads;
            const int64_t element =
                is_q ? row * p->q_stride_row + h * p->q_stride_head
                     : row * p->k_stride_row + (h - p->num_qo_heads) * p->k_stride_head;
            void *head = at(is_q ? p->q : p->k, element, job->element_bytes);
            if (p->interleave) {
                rotate_neighbours(job, head, cosine, sine);
            } else {
                rotate_halves(job, head, cosine, sine);
            }
        }
    }
}

static raddle_status run_rope(int32_t device, const raddle_ops_rope_params *params,
                              raddle_stream stream) {
    (void)device;
    (void)stream;
    for (int64_t i = 0; i < params->rows; i++) {
        const int64_t position =
            index_at(params->positions, i, params->positions_stride, params->positions_are_i64);
        RADDLE_REQUIRE(position >= 0 && position < params->max_position, RADDLE_ERR_VALUE,
                       "positions: %lld at row %lld is out of range for a cos_sin_cache of %lld "
                       "positions",
                       (long long)position, (long long)i, (long long)params->max_position);
    }
    rope_job job = {params, raddle_vec_get(), raddle_dtype_bytes(params->dtype)};
    const int64_t heads = params->num_qo_heads + params->num_kv_heads;
    if (heads > 0) {
        raddle_threads_for(rope_rows, &job, params->rows,
                           raddle_ops_cpu_rows_per_task(heads * params->head_dim));
    }
    return RADDLE_OK;
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
        const int64_t id = index_at(p->ids, i, p->ids_stride, p->ids_are_i64);
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
        const int64_t id = index_at(params->ids, i, params->ids_stride, params->ids_are_i64);
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
    .rope = run_rope,
    .softmax = raddle_ops_cpu_softmax,
    .sample = raddle_ops_cpu_sample,
    .logprobs = raddle_ops_cpu_logprobs,
    .linear_pack = raddle_ops_cpu_linear_pack,
    .linear_run = raddle_ops_cpu_linear_run,
    .linear_release = raddle_ops_cpu_linear_release,
};

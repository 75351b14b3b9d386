/* ops_cpu_norm.c - the CPU back end of norms.
 *
 * Rows are widened to float32 in blocks that stay in the L1 cache, worked on, and rounded back
 * once. Sums are of blocks in float32 and of a row in float64: the order of a float32 sum over a
 * whole row would show. A norm of a sum with a residual is of the sum before it is rounded: the first
 * KEPT sums of a row are kept; those of the rest of a longer row are added anew in every pass, of
 * which the last overwrites the residual.
 */
#include "ops/ops_cpu.h"

#include <math.h>

#include "base/threads.h"
#include "cpu/vec.h"

enum {
    BLOCK = 512,       /* floats of a row that are in work at once */
    KEPT = 16 * BLOCK, /* floats of a row that are kept from the first pass to the last */
};

typedef struct norm_job {
    const raddle_ops_norm_params *params;
    const raddle_vec *vec;
    size_t element_bytes, weight_bytes, out_bytes;
    float factor; /* of an 8-bit result */
} norm_job;

typedef struct norm_memory {
    const void *x;
    void *residual, *out; /* no residual: NULL */
    float *kept;          /* sums of the row's first kept_count elements */
    int64_t kept_count;   /* a multiple of BLOCK or the whole row; no residual: 0 */
} norm_memory;            /* of one row */

static void *at(const void *data, int64_t element, size_t element_bytes) {
    return (char *)data + element * (int64_t)element_bytes;
}

static int block_length(int64_t begin, int64_t end) {
    return end - begin < BLOCK ? (int)(end - begin) : BLOCK;
}

static void load_block(const norm_job *job, const norm_memory *memory, int64_t d, float *block,
                       int count) {
    const raddle_ops_norm_params *p = job->params;
    job->vec->load[p->dtype](block, at(memory->x, d, job->element_bytes), count);
    if (memory->residual) {
        float residual[BLOCK];
        job->vec->load[p->dtype](residual, at(memory->residual, d, job->element_bytes), count);
        for (int i = 0; i < count; i++) {
            block[i] += residual[i];
        }
    }
}

static void store_residual(const norm_job *job, const norm_memory *memory, int64_t d,
                           const float *block, int count) {
    job->vec->store[job->params->dtype](at(memory->residual, d, job->element_bytes), block, count);
}

/* The first pass over elements whose sums are kept: residual gets them rounded. */
static void keep_sums(const norm_job *job, const norm_memory *memory) {
    for (int64_t d = 0; d < memory->kept_count; d += BLOCK) {
        const int count = block_length(d, memory->kept_count);
        load_block(job, memory, d, memory->kept + d, count);
        store_residual(job, memory, d, memory->kept + d, count);
    }
}

/* What the norm is of, from element d: kept, or else loaded into buffer. */
static float *get_block(const norm_job *job, const norm_memory *memory, int64_t d, float *buffer,
                        int count) {
    if (d < memory->kept_count) {
        return memory->kept + d;
    }
    load_block(job, memory, d, buffer, count);
    return buffer;
}

static float mean_of_row(const norm_job *job, const norm_memory *memory) {
    const raddle_ops_norm_params *p = job->params;
    float buffer[BLOCK];
    double sum = 0;
    for (int64_t d = 0; d < p->width; d += BLOCK) {
        const int count = block_length(d, p->width);
        const float *block = get_block(job, memory, d, buffer, count);
        for (int i = 0; i < count; i++) {
            sum += (double)block[i];
        }
    }
    return (float)(sum / p->width);
}

static double sum_squares(const norm_job *job, const norm_memory *memory, float mean) {
    const raddle_ops_norm_params *p = job->params;
    float buffer[BLOCK];
    double sum = 0;
    for (int64_t d = 0; d < p->width; d += BLOCK) {
        const int count = block_length(d, p->width);
        const float *block = get_block(job, memory, d, buffer, count);
        if (p->is_centered) {
            for (int i = 0; i < count; i++) {
                buffer[i] = block[i] - mean;
            }
            block = buffer;
        }
        sum += (double)job->vec->sum_squares(block, count);
    }
    return sum;
}

static void store_block(const norm_job *job, void *out, float *block, int count) {
    const raddle_ops_norm_params *p = job->params;
    if (!p->out_is_fp8) {
        job->vec->store[p->dtype](out, block, count);
        return;
    }
    for (int i = 0; i < count; i++) {
        ((uint8_t *)out)[i] = (uint8_t)raddle_ops_to_fp8(block[i] * job->factor, p->out_is_e5m2);
    }
}

static void norm_row(const norm_job *job, const norm_memory *memory) {
    const raddle_ops_norm_params *p = job->params;
    const float mean = p->is_centered ? mean_of_row(job, memory) : 0;
    const double squares = sum_squares(job, memory, mean);
    const float scale = (float)(1.0 / sqrt(squares / p->width + (double)p->eps));
    const float weight_offset = p->weight_offset;
    float buffer[BLOCK], weight[BLOCK], bias[BLOCK];
    for (int64_t d = 0; d < p->width; d += BLOCK) {
        const int count = block_length(d, p->width);
        float *block = get_block(job, memory, d, buffer, count);
        if (memory->residual && d >= memory->kept_count) {
            store_residual(job, memory, d, block, count);
        }
        job->vec->load[p->weight_dtype](weight, at(p->weight, d, job->weight_bytes), count);
        if (p->is_centered) {
            job->vec->load[p->weight_dtype](bias, at(p->bias, d, job->weight_bytes), count);
            for (int i = 0; i < count; i++) {
                block[i] = (block[i] - mean) * scale * (weight[i] + weight_offset) + bias[i];
            }
        } else {
            for (int i = 0; i < count; i++) {
                block[i] = block[i] * scale * (weight[i] + weight_offset);
            }
        }
        store_block(job, at(memory->out, d, job->out_bytes), block, count);
    }
}

static void norm_rows(void *context, int64_t begin, int64_t end, int worker) {
    const norm_job *job = context;
    const raddle_ops_norm_params *p = job->params;
    const size_t bytes = job->element_bytes;
    float kept[KEPT];
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / p->heads, head = i % p->heads;
        norm_memory memory = {
            .x = at(p->x, row * p->x_stride_row + head * p->x_stride_head, bytes),
            .out = at(p->out, row * p->out_stride_row + head * p->out_stride_head, job->out_bytes),
        };
        if (p->residual) {
            memory.residual = at(
                p->residual, row * p->residual_stride_row + head * p->residual_stride_head, bytes);
            memory.kept = kept;
            memory.kept_count = p->width < KEPT ? p->width : KEPT;
            keep_sums(job, &memory);
        }
        norm_row(job, &memory);
    }
}

raddle_status raddle_ops_cpu_norm(int32_t device, const raddle_ops_norm_params *params,
                                  raddle_stream stream) {
    (void)device;
    (void)stream;
    norm_job job = {
        .params = params,
        .vec = raddle_vec_get(),
        .element_bytes = raddle_dtype_bytes((raddle_dtype)params->dtype),
        .weight_bytes = raddle_dtype_bytes((raddle_dtype)params->weight_dtype),
        .factor = 1.0f / params->scale_value,
    };
    job.out_bytes = params->out_is_fp8 ? 1 : job.element_bytes;
    raddle_threads_for(norm_rows, &job, params->rows * params->heads,
                       raddle_ops_cpu_rows_per_task(params->width));
    return RADDLE_OK;
}

/* ops_cpu_norm.c - the CPU back end of norms.
 *
 * Rows are widened to float32 in blocks that stay in the L1 cache, worked on, and rounded back
 * once. Sums are of blocks in float32 and of a row in float64: the order of a float32 sum over a
 * whole row would show.
 */
#include "ops/ops_cpu.h"

#include <math.h>

#include "base/threads.h"
#include "cpu/vec.h"

enum { BLOCK = 512 }; /* floats of a row that are in work at once */

typedef struct norm_job {
    const raddle_ops_norm_params *params;
    const raddle_vec *vec;
    size_t element_bytes, weight_bytes, out_bytes;
    float factor; /* of an 8-bit result */
} norm_job;

static void *at(const void *data, int64_t element, size_t element_bytes) {
    return (char *)data + element * (int64_t)element_bytes;
}

static int block_length(int64_t begin, int64_t end) {
    return end - begin < BLOCK ? (int)(end - begin) : BLOCK;
}

/* residual += x, rounded to the stored type; the norm reads it back. */
static void add_to_residual(const norm_job *job, const void *x, void *residual) {
    const raddle_ops_norm_params *p = job->params;
    float a[BLOCK], b[BLOCK];
    for (int64_t d = 0; d < p->width; d += BLOCK) {
        const int count = block_length(d, p->width);
        job->vec->load[p->dtype](a, at(x, d, job->element_bytes), count);
        job->vec->load[p->dtype](b, at(residual, d, job->element_bytes), count);
        for (int i = 0; i < count; i++) {
            b[i] += a[i];
        }
        job->vec->store[p->dtype](at(residual, d, job->element_bytes), b, count);
    }
}

static float mean_of_row(const norm_job *job, const void *x) {
    const raddle_ops_norm_params *p = job->params;
    float row[BLOCK];
    double sum = 0;
    for (int64_t d = 0; d < p->width; d += BLOCK) {
        const int count = block_length(d, p->width);
        job->vec->load[p->dtype](row, at(x, d, job->element_bytes), count);
        for (int i = 0; i < count; i++) {
            sum += (double)row[i];
        }
    }
    return (float)(sum / p->width);
}

static double sum_squares(const norm_job *job, const void *x, float mean) {
    const raddle_ops_norm_params *p = job->params;
    float row[BLOCK];
    double sum = 0;
    for (int64_t d = 0; d < p->width; d += BLOCK) {
        const int count = block_length(d, p->width);
        job->vec->load[p->dtype](row, at(x, d, job->element_bytes), count);
        if (p->is_centered) {
            for (int i = 0; i < count; i++) {
                row[i] -= mean;
            }
        }
        sum += (double)job->vec->sum_squares(row, count);
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

static void norm_row(const norm_job *job, const void *x, void *out) {
    const raddle_ops_norm_params *p = job->params;
    const float mean = p->is_centered ? mean_of_row(job, x) : 0;
    const double squares = sum_squares(job, x, mean);
    const float scale = (float)(1.0 / sqrt(squares / p->width + (double)p->eps));
    float row[BLOCK], weight[BLOCK], bias[BLOCK];
    for (int64_t d = 0; d < p->width; d += BLOCK) {
        const int count = block_length(d, p->width);
        job->vec->load[p->dtype](row, at(x, d, job->element_bytes), count);
        job->vec->load[p->weight_dtype](weight, at(p->weight, d, job->weight_bytes), count);
        if (p->is_centered) {
            job->vec->load[p->weight_dtype](bias, at(p->bias, d, job->weight_bytes), count);
            for (int i = 0; i < count; i++) {
                row[i] = (row[i] - mean) * scale * (weight[i] + p->weight_offset) + bias[i];
            }
        } else {
            for (int i = 0; i < count; i++) {
                row[i] = row[i] * scale * (weight[i] + p->weight_offset);
            }
        }
        store_block(job, at(out, d, job->out_bytes), row, count);
    }
}

static void norm_rows(void *context, int64_t begin, int64_t end, int worker) {
    const norm_job *job = context;
    const raddle_ops_norm_params *p = job->params;
    const size_t bytes = job->element_bytes;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / p->heads, head = i % p->heads;
        const void *x = at(p->x, row * p->x_stride_row + head * p->x_stride_head, bytes);
        void *out = at(p->out, row * p->out_stride_row + head * p->out_stride_head, job->out_bytes);
        if (p->residual) {
            void *residual = at(
                p->residual, row * p->residual_stride_row + head * p->residual_stride_head, bytes);
            add_to_residual(job, x, residual);
            x = residual;
        }
        norm_row(job, x, out);
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

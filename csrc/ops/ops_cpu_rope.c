/* ops_cpu_rope.c - the CPU back end of rotary embedding.
 *
 * A row's cosines and sines are read or made once, for all of its heads. Heads are widened to float32
 * in blocks, turned, and rounded back once.
 */
#include "ops/ops_cpu.h"

#include <math.h>
#include <string.h>

#include "base/threads.h"
#include "cpu/vec.h"

enum { BLOCK = 512 }; /* floats of a head that are in work at once; at least the turns of a row */

static void *at(const void *data, int64_t element, size_t element_bytes) {
    return (char *)data + element * (int64_t)element_bytes;
}

static int block_length(int64_t begin, int64_t end) {
    return end - begin < BLOCK ? (int)(end - begin) : BLOCK;
}

/* ---------------------------------------------------------------- turning */

/* a[i], b[i] are a pair. */
static void turn_halves(float *a, float *b, const float *cosine, const float *sine, int count) {
    for (int i = 0; i < count; i++) {
        const float x = a[i], y = b[i];
        a[i] = x * cosine[i] - y * sine[i];
        b[i] = y * cosine[i] + x * sine[i];
    }
}

/* a[2 i], a[2 i + 1] are a pair. */
static void turn_neighbours(float *a, const float *cosine, const float *sine, int pairs) {
    for (int i = 0; i < pairs; i++) {
        const float x = a[2 * i], y = a[2 * i + 1];
        a[2 * i] = x * cosine[i] - y * sine[i];
        a[2 * i + 1] = y * cosine[i] + x * sine[i];
    }
}

/* ---------------------------------------------------------------- rope */

typedef struct rope_job {
    const raddle_ops_rope_params *params;
    const raddle_vec *vec;
    size_t element_bytes;
} rope_job;

static void rotate_halves(const rope_job *job, void *to, const void *from, const float *cosine,
                          const float *sine) {
    const raddle_ops_rope_params *p = job->params;
    const int half = p->rotary_dim / 2;
    float a[BLOCK], b[BLOCK];
    for (int d = 0; d < half; d += BLOCK) {
        const int count = block_length(d, half);
        job->vec->load[p->dtype](a, at(from, d, job->element_bytes), count);
        job->vec->load[p->dtype](b, at(from, half + d, job->element_bytes), count);
        turn_halves(a, b, cosine + d, sine + d, count);
        job->vec->store[p->dtype](at(to, d, job->element_bytes), a, count);
        job->vec->store[p->dtype](at(to, half + d, job->element_bytes), b, count);
    }
}

static void rotate_neighbours(const rope_job *job, void *to, const void *from, const float *cosine,
                              const float *sine) {
    const raddle_ops_rope_params *p = job->params;
    float a[BLOCK];
    for (int d = 0; d < p->rotary_dim; d += BLOCK) {
        const int count = block_length(d, p->rotary_dim);
        job->vec->load[p->dtype](a, at(from, d, job->element_bytes), count);
        turn_neighbours(a, cosine + d / 2, sine + d / 2, count / 2);
        job->vec->store[p->dtype](at(to, d, job->element_bytes), a, count);
    }
}

/* Turns of a position into cosines and sines, each [rotary_dim / 2]. */
static void make_angles(const raddle_ops_rope_params *p, int64_t position, float *cosine,
                        float *sine) {
    for (int i = 0; i < p->rotary_dim / 2; i++) {
        const int64_t turn = (int64_t)((uint64_t)position * p->turns[i]);
        const double angle = (double)turn * (6.283185307179586 * 0x1p-64);
        cosine[i] = (float)(cos(angle) * (double)p->attention_factor);
        sine[i] = (float)(sin(angle) * (double)p->attention_factor);
    }
}

static void rope_heads(const rope_job *job, int64_t row, const float *cosine, const float *sine) {
    const raddle_ops_rope_params *p = job->params;
    const size_t bytes = job->element_bytes;
    const int begin = cosine ? p->rotary_dim : 0; /* of what is only copied */
    for (int h = 0; h < p->num_qo_heads + p->num_kv_heads; h++) {
        const bool is_q = h < p->num_qo_heads;
        const int own = is_q ? h : h - p->num_qo_heads;
        const void *from = is_q ? at(p->q, row * p->q_stride_row + own * p->q_stride_head, bytes)
                                : at(p->k, row * p->k_stride_row + own * p->k_stride_head, bytes);
        void *to =
            is_q ? at(p->q_out, row * p->q_out_stride_row + own * p->q_out_stride_head, bytes)
                 : at(p->k_out, row * p->k_out_stride_row + own * p->k_out_stride_head, bytes);
        if (cosine) {
            (p->interleave ? rotate_neighbours : rotate_halves)(job, to, from, cosine, sine);
        }
        if (!p->in_place) {
            memcpy(at(to, begin, bytes), at(from, begin, bytes),
                   (size_t)(p->head_dim - begin) * bytes);
        }
    }
}

static void rope_rows(void *context, int64_t begin, int64_t end, int worker) {
    const rope_job *job = context;
    const raddle_ops_rope_params *p = job->params;
    float made[2][RADDLE_OPS_MAX_TURNS];
    (void)worker;
    for (int64_t row = begin; row < end; row++) {
        const float *cosine = NULL, *sine = NULL;
        int64_t position;
        if (raddle_ops_rope_position(p, row, &position)) {
            if (p->cos_sin) {
                cosine = p->cos_sin + position * p->cos_sin_stride_row;
                sine = cosine + p->rotary_dim / 2;
            } else {
                make_angles(p, position, made[0], made[1]);
                cosine = made[0];
                sine = made[1];
            }
        }
        rope_heads(job, row, cosine, sine);
    }
}

raddle_status raddle_ops_cpu_rope(int32_t device, const raddle_ops_rope_params *params,
                                  raddle_stream stream) {
    (void)device;
    (void)stream;
    for (int64_t i = 0; params->cos_sin && i < params->rows; i++) {
        int64_t position;
        RADDLE_REQUIRE(!raddle_ops_rope_position(params, i, &position) ||
                           (position >= 0 && position < params->max_position),
                       RADDLE_ERR_VALUE,
                       "%s: %lld at row %lld is out of range for a cos_sin_cache of %lld positions",
                       params->positions ? "positions" : "offsets", (long long)position,
                       (long long)i, (long long)params->max_position);
    }
    rope_job job = {params, raddle_vec_get(), raddle_dtype_bytes((raddle_dtype)params->dtype)};
    const int64_t heads = (int64_t)params->num_qo_heads + params->num_kv_heads;
    if (heads > 0) {
        raddle_threads_for(rope_rows, &job, params->rows,
                           raddle_ops_cpu_rows_per_task(heads * params->head_dim));
    }
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- rope to 8 bits */

typedef struct fp8_job {
    const raddle_ops_rope_fp8_params *params;
    const raddle_vec *vec;
    size_t element_bytes;
} fp8_job;

static void store_fp8(const fp8_job *job, uint8_t *to, const float *x, float scale, int count) {
    for (int i = 0; i < count; i++) {
        to[i] = (uint8_t)raddle_ops_to_fp8(x[i] * scale, job->params->is_e5m2);
    }
}

static void fp8_plain(const fp8_job *job, const raddle_ops_fp8_part *part, const void *from,
                      uint8_t *to) {
    float x[BLOCK];
    for (int d = 0; d < part->width; d += BLOCK) {
        const int count = block_length(d, part->width);
        job->vec->load[job->params->dtype](x, at(from, d, job->element_bytes), count);
        store_fp8(job, to + d, x, part->scale, count);
    }
}

static void fp8_rotated(const fp8_job *job, const raddle_ops_fp8_part *part, const void *from,
                        uint8_t *to, const float *cosine) {
    const raddle_ops_rope_fp8_params *p = job->params;
    const int half = p->rotary_dim / 2;
    const float *sine = cosine + half;
    float a[BLOCK], b[BLOCK];
    if (p->interleave) {
        for (int d = 0; d < 2 * half; d += BLOCK) {
            const int count = block_length(d, 2 * half);
            job->vec->load[p->dtype](a, at(from, d, job->element_bytes), count);
            turn_neighbours(a, cosine + d / 2, sine + d / 2, count / 2);
            store_fp8(job, to + d, a, part->scale, count);
        }
        return;
    }
    for (int d = 0; d < half; d += BLOCK) {
        const int count = block_length(d, half);
        job->vec->load[p->dtype](a, at(from, d, job->element_bytes), count);
        job->vec->load[p->dtype](b, at(from, half + d, job->element_bytes), count);
        turn_halves(a, b, cosine + d, sine + d, count);
        store_fp8(job, to + d, a, part->scale, count);
        store_fp8(job, to + half + d, b, part->scale, count);
    }
}

static void fp8_rows(void *context, int64_t begin, int64_t end, int worker) {
    const fp8_job *job = context;
    const raddle_ops_rope_fp8_params *p = job->params;
    (void)worker;
    for (int64_t row = begin; row < end; row++) {
        const int64_t position =
            raddle_ops_index(p->positions, row * p->positions_stride, p->positions_are_i64);
        const float *cosine = p->cos_sin + position * p->cos_sin_stride_row;
        int64_t page = 0, slot = 0;
        const bool has_page = p->requests && raddle_ops_page_of_row(p, row, &page, &slot);
        for (int i = 0; i < RADDLE_OPS_FP8_PARTS; i++) {
            const raddle_ops_fp8_part *part = &p->parts[i];
            if (part->width == 0 || (part->is_paged && !has_page)) {
                continue;
            }
            uint8_t *to = part->is_paged
                              ? part->to + page * part->to_stride_page + slot * part->to_stride_row
                              : part->to + row * part->to_stride_row;
            for (int64_t h = 0; h < part->heads; h++) {
                const void *from =
                    at(part->from, row * part->from_stride_row + h * part->from_stride_head,
                       job->element_bytes);
                if (part->is_rotated) {
                    fp8_rotated(job, part, from, to + h * part->to_stride_head, cosine);
                } else {
                    fp8_plain(job, part, from, to + h * part->to_stride_head);
                }
            }
        }
    }
}

/* What a kernel would leave out is an error here. */
static raddle_status check_fp8_row(const raddle_ops_rope_fp8_params *p, int64_t row) {
    const int64_t position =
        raddle_ops_index(p->positions, row * p->positions_stride, p->positions_are_i64);
    int64_t page, slot;
    RADDLE_REQUIRE(
        position >= 0 && position < p->max_position, RADDLE_ERR_VALUE,
        "pos_ids: %lld at row %lld is out of range for a cos_sin_cache of %lld positions",
        (long long)position, (long long)row, (long long)p->max_position);
    if (p->requests &&
        raddle_ops_index(p->requests, row * p->requests_stride, p->requests_are_i64) >= 0) {
        RADDLE_REQUIRE(raddle_ops_page_of_row(p, row, &page, &slot), RADDLE_ERR_VALUE,
                       "batch_indices, positions: row %lld is in no page of the tables (%lld "
                       "requests, %lld page ids, a cache of %lld pages)",
                       (long long)row, (long long)p->batch, (long long)p->num_indices,
                       (long long)p->num_pages);
    }
    return RADDLE_OK;
}

raddle_status raddle_ops_cpu_rope_fp8(int32_t device, const raddle_ops_rope_fp8_params *params,
                                      raddle_stream stream) {
    (void)device;
    (void)stream;
    int64_t elements = 0;
    for (int64_t i = 0; i < params->rows; i++) {
        RADDLE_TRY(check_fp8_row(params, i));
    }
    for (int i = 0; i < RADDLE_OPS_FP8_PARTS; i++) {
        elements += (int64_t)params->parts[i].heads * params->parts[i].width;
    }
    fp8_job job = {params, raddle_vec_get(), raddle_dtype_bytes((raddle_dtype)params->dtype)};
    if (elements > 0) {
        raddle_threads_for(fp8_rows, &job, params->rows, raddle_ops_cpu_rows_per_task(elements));
    }
    return RADDLE_OK;
}

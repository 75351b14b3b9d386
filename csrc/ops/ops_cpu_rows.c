/* ops_cpu_rows.c - rows of logits or probabilities on the CPU: buffers, bad rows, selection, drawing.
 *
 * top-k, top-p and min-p each keep a set of the largest values, so each is a least value, and all
 * three together are the largest of those. It is found without a sort: a histogram over the distance
 * from the maximum, then radix selection among the few tokens of one bin. Ties with the least value
 * are all kept.
 */
#include "ops/ops_cpu_rows.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/arena.h"

/* ---------------------------------------------------------------- rows */

/* Over a measuring arena, and over a carving one. */
static raddle_ops_scratch divide_scratch(const raddle_ops_rows_job *job, raddle_arena *arena) {
    const size_t vocab = (size_t)job->vocab;
    raddle_ops_scratch s = {0};
    s.row = raddle_arena_take(arena, vocab * sizeof(float));
    if (job->has_second) {
        s.second = raddle_arena_take(arena, vocab * sizeof(float));
    }
    if (job->selects) {
        s.sums = raddle_arena_take(arena, (vocab / RADDLE_OPS_CPU_SKIP + 1) * sizeof(int64_t));
        s.bins = raddle_arena_take(arena, RADDLE_OPS_CPU_BINS * sizeof(int64_t));
        s.weights = raddle_arena_take(arena, vocab * sizeof(int64_t));
        s.ids = raddle_arena_take(arena, vocab * sizeof(int32_t));
        s.inside = raddle_arena_take(arena, vocab * sizeof(int32_t));
    }
    return s;
}

raddle_ops_scratch raddle_ops_cpu_worker_scratch(const raddle_ops_rows_job *job, int worker) {
    raddle_arena arena;
    raddle_arena_carve(&arena, job->scratch_data + (size_t)worker * job->scratch_bytes,
                       job->scratch_bytes, true);
    return divide_scratch(job, &arena);
}

void raddle_ops_cpu_report_row(raddle_ops_rows_job *job, int64_t row, int reason) {
    const int64_t mine = row * 4 + reason;
    int64_t seen = __atomic_load_n(&job->bad_row, __ATOMIC_RELAXED);
    while (mine < seen && !__atomic_compare_exchange_n(&job->bad_row, &seen, mine, true,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

const float *raddle_ops_cpu_widen_row(const raddle_ops_rows_job *job, float *wide, const void *data,
                                      raddle_dtype dtype, int64_t stride, int64_t i) {
    const char *row = (const char *)data + i * stride * (int64_t)raddle_dtype_bytes(dtype);
    if (dtype == RADDLE_F32) {
        return (const float *)(const void *)row;
    }
    job->vec->load[dtype](wide, row, job->vocab);
    return wide;
}

int raddle_ops_cpu_look_at_row(const raddle_ops_rows_job *job, const float *row, float *out_max) {
    *out_max = job->vec->max(row, job->vocab);
    if (isnan(job->vec->sum_squares(row, job->vocab))) { /* infinity stays infinity */
        return RADDLE_OPS_ROW_NAN;
    }
    const bool is_drawable =
        job->is_probs ? *out_max > 0 && *out_max < INFINITY : *out_max > -INFINITY;
    return is_drawable ? RADDLE_OPS_ROW_OK : RADDLE_OPS_ROW_EMPTY;
}

static raddle_status fail_row(const raddle_ops_rows_job *job) {
    const long long row = job->bad_row / 4;
    switch (job->bad_row % 4) {
    case RADDLE_OPS_ROW_NAN:
        return raddle_fail(RADDLE_ERR_VALUE, "%s: row %lld holds NaN", job->name, row);
    case RADDLE_OPS_ROW_EMPTY:
        return raddle_fail(RADDLE_ERR_VALUE,
                           job->is_probs
                               ? "%s: no token of row %lld has a finite probability above 0"
                               : "%s: no token of row %lld is above -inf",
                           job->name, row);
    default:
        return raddle_fail(RADDLE_ERR_VALUE,
                           "ids: the id of row %lld is out of range for a vocabulary of %lld", row,
                           (long long)job->vocab);
    }
}

raddle_status raddle_ops_cpu_run_rows(raddle_ops_rows_job *job, raddle_loop_body body,
                                      int64_t rows) {
    job->vec = raddle_vec_get();
    job->loops = raddle_ops_cpu_loops_get();
    job->bad_row = INT64_MAX;
    raddle_arena arena;
    raddle_arena_measure(&arena);
    divide_scratch(job, &arena);
    job->scratch_bytes = raddle_arena_bytes(&arena);
    const size_t bytes = job->scratch_bytes * (size_t)raddle_threads_count();
    job->scratch_data = raddle_alloc(bytes);
    if (!job->scratch_data) {
        return raddle_fail_memory(bytes);
    }
    raddle_threads_for(body, job, rows, 1);
    raddle_free(job->scratch_data);
    return job->bad_row == INT64_MAX ? RADDLE_OK : fail_row(job);
}

/* ---------------------------------------------------------------- selection */

void raddle_ops_cpu_make_weights(const raddle_ops_sampler *s) {
    if (s->is_probs) {
        s->loops->prob_weights(s->buffers->weights, s->x, s->count, s->factor);
    } else {
        s->loops->weights(s->buffers->weights, s->x, s->count, s->max, s->factor);
    }
}

static float value_of_key(uint32_t key) {
    return raddle_ops_bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* The bin, from the top, in which the sum of bins reaches need; what is missing at its lower edge is
 * left in *need. The bins reach it. */
static int find_bin(const int64_t *bins, int64_t *need) {
    for (int bin = RADDLE_OPS_CPU_BINS - 1; bin > 0; bin--) {
        if (bins[bin] >= *need) {
            return bin;
        }
        *need -= bins[bin];
    }
    return 0;
}

/* Falls with the distance from the maximum; what is further away than the bins reach shares bin 0. The
 * bits of a probability are a logarithm already: 32 bins an octave. */
static int bin_of(const raddle_ops_sampler *s, float x, float bins_per_unit) {
    if (s->is_probs) {
        const uint32_t steps = (raddle_ops_key(s->max) - raddle_ops_key(x)) >> 18;
        return steps < RADDLE_OPS_CPU_BINS - 1 ? RADDLE_OPS_CPU_BINS - 1 - (int)steps : 0;
    }
    const float down = x == s->max ? 0.0f : (s->max - x) * bins_per_unit;
    return down < (float)(RADDLE_OPS_CPU_BINS - 1) ? RADDLE_OPS_CPU_BINS - 1 - (int)down : 0;
}

/* What token i counts: 1, or its weight. */
static int64_t amount_of(const raddle_ops_sampler *s, bool by_weight, int64_t i) {
    return by_weight ? s->buffers->weights[i] : 1;
}

/* The largest logit among the num_inside tokens of one bin such that those at or above it amount to
 * need, by the digits of their keys: 11, 11 and 10 bits. */
static float select_inside(const raddle_ops_sampler *s, bool by_weight, int64_t num_inside,
                           int64_t need) {
    static const int shifts[3] = {21, 10, 0};
    int64_t *bins = s->buffers->bins;
    uint32_t key = 0, mask = 0;
    for (int digit = 0; digit < 3; digit++) {
        const uint32_t digit_mask = digit == 2 ? 1023u : RADDLE_OPS_CPU_BINS - 1u;
        memset(bins, 0, RADDLE_OPS_CPU_BINS * sizeof(int64_t));
        for (int64_t j = 0; j < num_inside; j++) {
            const int64_t i = s->buffers->inside[j];
            const uint32_t mine = raddle_ops_key(s->x[i]);
            if ((mine & mask) == key) {
                bins[mine >> shifts[digit] & digit_mask] += amount_of(s, by_weight, i);
            }
        }
        key |= (uint32_t)find_bin(bins, &need) << shifts[digit];
        mask |= digit_mask << shifts[digit];
    }
    return value_of_key(key);
}

void raddle_ops_cpu_keep_largest(raddle_ops_sampler *s, bool by_weight, int64_t top_k,
                                 float top_p) {
    /* Weights end 41 binary orders below the maximum; few candidates for top_k lie 40 units below. */
    const float bins_per_unit =
        (RADDLE_OPS_CPU_BINS - 1) * (by_weight ? s->factor / 41.0f : 1.0f / 40.0f);
    int64_t *bins = s->buffers->bins;
    int64_t total = 0, num_inside = 0;
    memset(bins, 0, RADDLE_OPS_CPU_BINS * sizeof(int64_t));
    for (int64_t i = 0; i < s->count; i++) {
        if (s->x[i] >= s->least) {
            const int64_t amount = amount_of(s, by_weight, i);
            bins[bin_of(s, s->x[i], bins_per_unit)] += amount;
            total += amount;
        }
    }
    int64_t need = by_weight ? raddle_ops_top_p_mass(top_p, total) : top_k;
    if (need > total || total == 0) {
        return; /* fewer than top_k are left */
    }
    const int bin = find_bin(bins, &need);
    for (int64_t i = 0; i < s->count; i++) {
        if (s->x[i] >= s->least && bin_of(s, s->x[i], bins_per_unit) == bin) {
            s->buffers->inside[num_inside++] = (int32_t)i;
        }
    }
    s->least = select_inside(s, by_weight, num_inside, need);
}

/* ---------------------------------------------------------------- drawing */

int32_t raddle_ops_cpu_draw(const raddle_ops_sampler *s, uint64_t random) {
    const int64_t *weights = s->buffers->weights;
    int64_t *sums = s->buffers->sums;
    int64_t total = 0;
    for (int64_t begin = 0; begin < s->count; begin += RADDLE_OPS_CPU_SKIP) {
        const int64_t count =
            s->count - begin < RADDLE_OPS_CPU_SKIP ? s->count - begin : RADDLE_OPS_CPU_SKIP;
        sums[begin / RADDLE_OPS_CPU_SKIP] =
            s->loops->sum_weights(weights + begin, s->x + begin, count, s->least);
        total += sums[begin / RADDLE_OPS_CPU_SKIP];
    }
    if (total == 0) {
        return -1;
    }
    int64_t left = raddle_ops_random_below(random, total);
    int64_t i = 0;
    while (left >= sums[i / RADDLE_OPS_CPU_SKIP]) {
        left -= sums[i / RADDLE_OPS_CPU_SKIP];
        i += RADDLE_OPS_CPU_SKIP;
    }
    for (;; i++) {
        left -= s->x[i] >= s->least ? weights[i] : 0;
        if (left < 0) {
            return s->ids ? s->ids[i] : (int32_t)i;
        }
    }
}

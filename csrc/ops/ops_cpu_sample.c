/* ops_cpu_sample.c - the CPU back end of softmax, sampling and log-probabilities: one row, one
 * worker.
 *
 * top-k, top-p and min-p each keep a set of the largest logits, so each is a least key (the order-
 * preserving integer of a logit) and all three together are the largest of those. Least keys are
 * found by radix selection over 11, 11 and 10 bits instead of a sort. Ties with the least key are
 * all kept.
 */
#include "ops/ops_cpu.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "cpu/vec.h"

enum {
    BINS = 2048,
    SKIP = 1024 /* tokens whose weights are summed together, so that the search can pass them */
};

/* What a row was refused for; the first such row is reported. */
enum { ROW_OK = 0, ROW_NAN, ROW_EMPTY, ROW_ID };

/* One worker's buffers. */
typedef struct scratch {
    float *row;       /* [vocab] */
    int64_t *weights; /* [vocab] */
    int64_t *sums;    /* [vocab / SKIP + 1] */
    int64_t *bins;    /* [BINS] */
} scratch;

typedef struct rows_job {
    const raddle_vec *vec;
    const raddle_ops_cpu_loops *loops;
    int64_t vocab;
    char *scratch_data;
    size_t scratch_bytes; /* of one worker */
    const raddle_ops_softmax_params *softmax;
    const raddle_ops_sample_job *sample;
    const raddle_ops_logprobs_params *logprobs;
    int64_t bad_row; /* row * 4 + reason, the least; INT64_MAX when none. Accessed atomically */
} rows_job;

static size_t align_up(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

static scratch worker_scratch(const rows_job *job, int worker) {
    char *data = job->scratch_data + (size_t)worker * job->scratch_bytes;
    scratch s;
    s.row = (float *)(void *)data;
    data += align_up((size_t)job->vocab * sizeof(float));
    s.sums = (int64_t *)(void *)data;
    data += align_up((size_t)(job->vocab / SKIP + 1) * sizeof(int64_t));
    s.bins = (int64_t *)(void *)data;
    data += BINS * sizeof(int64_t);
    s.weights = (int64_t *)(void *)data; /* the last part: only sampling has it */
    return s;
}

static void report_bad_row(rows_job *job, int64_t row, int reason) {
    const int64_t mine = row * 4 + reason;
    int64_t seen = __atomic_load_n(&job->bad_row, __ATOMIC_RELAXED);
    while (mine < seen && !__atomic_compare_exchange_n(&job->bad_row, &seen, mine, true,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

/* Widens row i of logits into s->row and finds its maximum; false when the row was refused. */
static bool open_row(rows_job *job, const scratch *s, const void *logits, raddle_dtype dtype,
                     int64_t stride, int64_t i, float *out_max) {
    bool has_nan;
    const char *data = (const char *)logits + i * stride * (int64_t)raddle_dtype_bytes(dtype);
    job->vec->load[dtype](s->row, data, job->vocab);
    *out_max = job->loops->row_max(s->row, job->vocab, &has_nan);
    if (has_nan || *out_max == -INFINITY) {
        report_bad_row(job, i, has_nan ? ROW_NAN : ROW_EMPTY);
        return false;
    }
    return true;
}

/* Runs body over rows with one scratch per worker, and tells the first bad row. */
static raddle_status run_rows(rows_job *job, raddle_loop_body body, int64_t rows) {
    job->vec = raddle_vec_get();
    job->loops = raddle_ops_cpu_loops_get();
    job->bad_row = INT64_MAX;
    job->scratch_bytes = align_up((size_t)job->vocab * sizeof(float)) +
                         align_up((size_t)(job->vocab / SKIP + 1) * sizeof(int64_t)) +
                         BINS * sizeof(int64_t);
    if (job->sample) {
        job->scratch_bytes += align_up((size_t)job->vocab * sizeof(int64_t));
    }
    const size_t bytes = job->scratch_bytes * (size_t)raddle_threads_count();
    job->scratch_data = raddle_alloc_aligned(bytes, 64);
    if (!job->scratch_data) {
        return raddle_fail_memory(bytes);
    }
    raddle_threads_for(body, job, rows, 1);
    raddle_free(job->scratch_data);
    if (job->bad_row == INT64_MAX) {
        return RADDLE_OK;
    }
    const long long row = job->bad_row / 4;
    switch (job->bad_row % 4) {
    case ROW_NAN:
        return raddle_fail(RADDLE_ERR_VALUE, "logits: row %lld holds NaN", row);
    case ROW_EMPTY:
        return raddle_fail(RADDLE_ERR_VALUE, "logits: no token of row %lld is above -inf", row);
    default:
        return raddle_fail(RADDLE_ERR_VALUE,
                           "ids: the id of row %lld is out of range for a vocabulary of %lld", row,
                           (long long)job->vocab);
    }
}

/* ---------------------------------------------------------------- softmax */

static void softmax_rows(void *context, int64_t begin, int64_t end, int worker) {
    rows_job *job = context;
    const raddle_ops_softmax_params *p = job->softmax;
    const scratch s = worker_scratch(job, worker);
    for (int64_t i = begin; i < end; i++) {
        float max;
        if (!open_row(job, &s, p->logits, (raddle_dtype)p->dtype, p->logits_stride_row, i, &max)) {
            continue;
        }
        const double sum = job->loops->exp_sum(s.row, p->vocab, max, p->inv_temperature);
        job->vec->scale(s.row, p->vocab, (float)(1.0 / sum));
        memcpy(p->out + i * p->out_stride_row, s.row, (size_t)p->vocab * sizeof(float));
    }
}

raddle_status raddle_ops_cpu_softmax(int32_t device, const raddle_ops_softmax_params *params,
                                     raddle_stream stream) {
    (void)device;
    (void)stream;
    rows_job job = {.vocab = params->vocab, .softmax = params};
    return run_rows(&job, softmax_rows, params->rows);
}

/* ---------------------------------------------------------------- sample */

/* A row in work: the tokens with a logit of at least least are those that may be drawn. */
typedef struct sampler {
    const raddle_ops_cpu_loops *loops;
    const scratch *buffers;
    int64_t vocab;
    float least;
} sampler;

static float value_of_key(uint32_t key) {
    return raddle_ops_bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* The bin, from the top, in which the sum of bins reaches need; what is missing at its lower edge is
 * left in *need. The bins reach it. */
static int find_bin(const int64_t *bins, int64_t *need) {
    for (int bin = BINS - 1; bin > 0; bin--) {
        if (bins[bin] >= *need) {
            return bin;
        }
        *need -= bins[bin];
    }
    return 0;
}

/* Adds up, by digit, the tokens whose key starts with prefix and may be drawn: each counts 1, or its
 * weight. */
static int64_t fill_bins(const sampler *s, bool by_weight, uint32_t prefix, uint32_t prefix_mask,
                         int shift) {
    const float *row = s->buffers->row;
    int64_t *bins = s->buffers->bins;
    int64_t total = 0;
    memset(bins, 0, BINS * sizeof(int64_t));
    for (int64_t i = 0; i < s->vocab; i++) {
        const uint32_t key = raddle_ops_key(row[i]);
        if ((key & prefix_mask) == prefix && row[i] >= s->least) {
            const int64_t amount = by_weight ? s->buffers->weights[i] : 1;
            bins[key >> shift & (BINS - 1)] += amount;
            total += amount;
        }
    }
    return total;
}

/* Raises least to the largest logit such that the tokens at or above it are at least top_k many, or
 * weigh at least top_p of all that may be drawn. */
static void keep_largest(sampler *s, int64_t top_k, float top_p) {
    const bool by_weight = top_k == 0;
    const int64_t *bins = s->buffers->bins;
    const int64_t total = fill_bins(s, by_weight, 0, 0, 21);
    int64_t need = by_weight ? raddle_ops_top_p_mass(top_p, total) : top_k;
    if (need > total) {
        return; /* fewer than top_k are left */
    }
    uint32_t key = (uint32_t)find_bin(bins, &need) << 21;
    fill_bins(s, by_weight, key, 0xffffffffu << 21, 10);
    key |= (uint32_t)find_bin(bins, &need) << 10;
    fill_bins(s, by_weight, key, 0xffffffffu << 10, 0);
    /* The last digit has 10 bits, and the bin index 11: the one above is that of the prefix. */
    key |= (uint32_t)find_bin(bins, &need) & 1023;
    s->least = value_of_key(key);
}

static void keep_min_p(sampler *s, float min_p) {
    const int64_t least_weight = raddle_ops_min_weight(min_p);
    float least = INFINITY;
    for (int64_t i = 0; i < s->vocab; i++) {
        const float x = s->buffers->row[i];
        least = x < least && s->buffers->weights[i] >= least_weight ? x : least;
    }
    s->least = least;
}

/* The first token at which the running sum of weights passes a uniform draw below the total. */
static int32_t draw(const sampler *s, uint64_t random) {
    const float *row = s->buffers->row;
    const int64_t *weights = s->buffers->weights;
    int64_t *sums = s->buffers->sums;
    int64_t total = 0;
    for (int64_t begin = 0; begin < s->vocab; begin += SKIP) {
        const int64_t count = s->vocab - begin < SKIP ? s->vocab - begin : SKIP;
        sums[begin / SKIP] = s->loops->sum_weights(weights + begin, row + begin, count, s->least);
        total += sums[begin / SKIP];
    }
    int64_t left = raddle_ops_random_below(random, total);
    int64_t i = 0;
    while (left >= sums[i / SKIP]) {
        left -= sums[i / SKIP];
        i += SKIP;
    }
    for (;; i++) {
        left -= row[i] >= s->least ? weights[i] : 0;
        if (left < 0) {
            return (int32_t)i;
        }
    }
}

static int32_t first_maximum(const float *row, float max) {
    int32_t i = 0;
    while (row[i] != max) {
        i++;
    }
    return i;
}

static int32_t sample_row(const rows_job *job, const scratch *buffers, float max,
                          const raddle_ops_sample_row *settings) {
    if (settings->temperature == 0) {
        return first_maximum(buffers->row, max);
    }
    sampler s = {.loops = job->loops, .buffers = buffers, .vocab = job->vocab, .least = -INFINITY};
    job->loops->weights(buffers->weights, buffers->row, job->vocab, max,
                        raddle_ops_weight_factor(settings->temperature));
    if (settings->min_p > 0) {
        keep_min_p(&s, settings->min_p);
    }
    if (settings->top_k > 0 && settings->top_k < job->vocab) {
        keep_largest(&s, settings->top_k, 0);
    }
    if (settings->top_p < 1) {
        keep_largest(&s, 0, settings->top_p);
    }
    return draw(&s, raddle_ops_random(settings->seed, settings->offset));
}

static void sample_rows(void *context, int64_t begin, int64_t end, int worker) {
    rows_job *job = context;
    const raddle_ops_sample_job *p = job->sample;
    const scratch s = worker_scratch(job, worker);
    for (int64_t i = begin; i < end; i++) {
        float max;
        if (open_row(job, &s, p->logits, p->dtype, p->logits_stride_row, i, &max)) {
            p->out[i * p->out_stride] =
                sample_row(job, &s, max, &p->settings[i * p->settings_step]);
        }
    }
}

raddle_status raddle_ops_cpu_sample(int32_t device, const raddle_ops_sample_job *sample,
                                    raddle_stream stream) {
    (void)device;
    (void)stream;
    rows_job job = {.vocab = sample->vocab, .sample = sample};
    return run_rows(&job, sample_rows, sample->rows);
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

static void logprobs_rows(void *context, int64_t begin, int64_t end, int worker) {
    rows_job *job = context;
    const raddle_ops_logprobs_params *p = job->logprobs;
    const scratch s = worker_scratch(job, worker);
    for (int64_t i = begin; i < end; i++) {
        float max;
        const int64_t id = p->ids_are_i64 ? ((const int64_t *)p->ids)[i * p->ids_stride]
                                          : ((const int32_t *)p->ids)[i * p->ids_stride];
        if (id < 0 || id >= p->vocab) {
            report_bad_row(job, i, ROW_ID);
            continue;
        }
        if (!open_row(job, &s, p->logits, (raddle_dtype)p->dtype, p->logits_stride_row, i, &max)) {
            continue;
        }
        /* Differences to the maximum first: exact where it matters, and exp_sum overwrites the row.
         */
        const double chosen = (double)s.row[id] - (double)max;
        int32_t *top_ids = p->top ? p->top_ids + i * p->top : NULL;
        float *top_logprobs = p->top ? p->top_logprobs + i * p->top : NULL;
        if (p->top) {
            find_top(s.row, p->vocab, p->top, top_ids);
        }
        for (int32_t t = 0; t < p->top; t++) {
            top_logprobs[t] = s.row[top_ids[t]];
        }
        const double log_sum = log(job->loops->exp_sum(s.row, p->vocab, max, 1.0f));
        for (int32_t t = 0; t < p->top; t++) {
            top_logprobs[t] = (float)((double)top_logprobs[t] - (double)max - log_sum);
        }
        p->logprobs[i] = (float)(chosen - log_sum);
    }
}

raddle_status raddle_ops_cpu_logprobs(int32_t device, const raddle_ops_logprobs_params *params,
                                      raddle_stream stream) {
    (void)device;
    (void)stream;
    rows_job job = {.vocab = params->vocab, .logprobs = params};
    return run_rows(&job, logprobs_rows, params->rows);
}

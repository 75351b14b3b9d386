/* ops_cpu_sample.c - the CPU back end of softmax, sampling and log-probabilities: one row, one worker.
 *
 * top-k, top-p and min-p each keep a set of the largest logits, so each is a least logit, and all
 * three together are the largest of those. It is found without a sort: a histogram over the distance
 * from the maximum, then radix selection among the few tokens of one bin. Ties with the least logit are
 * all kept. After top-k the survivors move together, in order, and the rest works on them alone.
 */
#include "ops/ops_cpu.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/arena.h"
#include "base/threads.h"
#include "cpu/vec.h"

enum {
    BINS = 2048,
    SKIP = 1024, /* tokens whose weights are summed together, so that the search can pass them */
    EXP_BLOCK = 1024
};

/* What a row was refused for; the first such row is reported. */
enum { ROW_OK = 0, ROW_NAN, ROW_EMPTY, ROW_ID };

/* One worker's buffers; the last three for sampling only. */
typedef struct scratch {
    float *row;       /* [vocab] */
    int64_t *sums;    /* [vocab / SKIP + 1] */
    int64_t *bins;    /* [BINS] */
    int64_t *weights; /* [vocab] */
    int32_t *ids;     /* [vocab] */
    int32_t *inside;  /* [vocab]: places of the tokens of one bin */
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

/* Over a measuring arena, and over a carving one. */
static scratch divide_scratch(const rows_job *job, raddle_arena *arena) {
    const size_t vocab = (size_t)job->vocab;
    scratch s = {0};
    s.row = raddle_arena_take(arena, vocab * sizeof(float));
    if (job->sample) {
        s.sums = raddle_arena_take(arena, (vocab / SKIP + 1) * sizeof(int64_t));
        s.bins = raddle_arena_take(arena, BINS * sizeof(int64_t));
        s.weights = raddle_arena_take(arena, vocab * sizeof(int64_t));
        s.ids = raddle_arena_take(arena, vocab * sizeof(int32_t));
        s.inside = raddle_arena_take(arena, vocab * sizeof(int32_t));
    }
    return s;
}

static scratch worker_scratch(const rows_job *job, int worker) {
    raddle_arena arena;
    raddle_arena_carve(&arena, job->scratch_data + (size_t)worker * job->scratch_bytes,
                       job->scratch_bytes, true);
    return divide_scratch(job, &arena);
}

static void report_bad_row(rows_job *job, int64_t row, int reason) {
    const int64_t mine = row * 4 + reason;
    int64_t seen = __atomic_load_n(&job->bad_row, __ATOMIC_RELAXED);
    while (mine < seen && !__atomic_compare_exchange_n(&job->bad_row, &seen, mine, true,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

/* Row i of logits as float32: where it lies, or widened into wide. Finds its maximum; NULL when the row
 * was refused. */
static const float *open_row(rows_job *job, float *wide, const void *logits, raddle_dtype dtype,
                             int64_t stride, int64_t i, float *out_max) {
    const char *data = (const char *)logits + i * stride * (int64_t)raddle_dtype_bytes(dtype);
    const float *row = (const float *)(const void *)data;
    if (dtype != RADDLE_F32) {
        job->vec->load[dtype](wide, data, job->vocab);
        row = wide;
    }
    *out_max = job->vec->max(row, job->vocab);
    const bool has_nan =
        isnan(job->vec->sum_squares(row, job->vocab)); /* infinity stays infinity */
    if (has_nan || *out_max == -INFINITY) {
        report_bad_row(job, i, has_nan ? ROW_NAN : ROW_EMPTY);
        return NULL;
    }
    return row;
}

/* Runs body over rows with one scratch per worker, and tells the first bad row. */
static raddle_status run_rows(rows_job *job, raddle_loop_body body, int64_t rows) {
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
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        float max;
        float *out = p->out + i * p->out_stride_row;
        const float *row =
            open_row(job, out, p->logits, (raddle_dtype)p->dtype, p->logits_stride_row, i, &max);
        if (row) {
            const double sum = job->loops->exp_sum(out, row, p->vocab, max, p->inv_temperature);
            job->vec->scale(out, p->vocab, (float)(1.0 / sum));
        }
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

/* A row in work: count tokens in the order of the vocabulary, of which those with a logit of at least
 * least may be drawn. */
typedef struct sampler {
    const raddle_ops_cpu_loops *loops;
    const scratch *buffers;
    const float *x;
    const int32_t *ids; /* NULL: token i is number i */
    int64_t count;
    float max, factor, least;
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

/* Falls with the distance from the maximum; what is further away than the bins reach shares bin 0. */
static int bin_of(const sampler *s, float x, float bins_per_unit) {
    const float down = x == s->max ? 0.0f : (s->max - x) * bins_per_unit;
    return down < (float)(BINS - 1) ? BINS - 1 - (int)down : 0;
}

/* What token i counts: 1, or its weight. */
static int64_t amount_of(const sampler *s, bool by_weight, int64_t i) {
    return by_weight ? s->buffers->weights[i] : 1;
}

/* The largest logit among the num_inside tokens of one bin such that those at or above it amount to
 * need, by the digits of their keys: 11, 11 and 10 bits. */
static float select_inside(const sampler *s, bool by_weight, int64_t num_inside, int64_t need) {
    static const int shifts[3] = {21, 10, 0};
    int64_t *bins = s->buffers->bins;
    uint32_t key = 0, mask = 0;
    for (int digit = 0; digit < 3; digit++) {
        const uint32_t digit_mask = digit == 2 ? 1023u : BINS - 1u;
        memset(bins, 0, BINS * sizeof(int64_t));
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

/* Raises least to the largest logit such that the tokens at or above it are at least top_k many
 * (by_weight false), or weigh at least top_p of all that may be drawn. */
static void keep_largest(sampler *s, bool by_weight, int64_t top_k, float top_p) {
    /* Weights end 41 binary orders below the maximum; few candidates for top_k lie 40 units below. */
    const float bins_per_unit = (BINS - 1) * (by_weight ? s->factor / 41.0f : 1.0f / 40.0f);
    int64_t *bins = s->buffers->bins;
    int64_t total = 0, num_inside = 0;
    memset(bins, 0, BINS * sizeof(int64_t));
    for (int64_t i = 0; i < s->count; i++) {
        if (s->x[i] >= s->least) {
            const int64_t amount = amount_of(s, by_weight, i);
            bins[bin_of(s, s->x[i], bins_per_unit)] += amount;
            total += amount;
        }
    }
    int64_t need = by_weight ? raddle_ops_top_p_mass(top_p, total) : top_k;
    if (need > total) {
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

/* Moves the tokens that may be drawn together. */
static void drop_the_rest(sampler *s) {
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

static void keep_min_p(sampler *s, float min_p) {
    const int64_t least_weight = raddle_ops_min_weight(min_p);
    float least = INFINITY;
    for (int64_t i = 0; i < s->count; i++) {
        const float x = s->x[i];
        least = x < least && s->buffers->weights[i] >= least_weight ? x : least;
    }
    s->least = least;
}

/* The first token at which the running sum of weights passes a uniform draw below the total. */
static int32_t draw(const sampler *s, uint64_t random) {
    const int64_t *weights = s->buffers->weights;
    int64_t *sums = s->buffers->sums;
    int64_t total = 0;
    for (int64_t begin = 0; begin < s->count; begin += SKIP) {
        const int64_t count = s->count - begin < SKIP ? s->count - begin : SKIP;
        sums[begin / SKIP] = s->loops->sum_weights(weights + begin, s->x + begin, count, s->least);
        total += sums[begin / SKIP];
    }
    int64_t left = raddle_ops_random_below(random, total);
    int64_t i = 0;
    while (left >= sums[i / SKIP]) {
        left -= sums[i / SKIP];
        i += SKIP;
    }
    for (;; i++) {
        left -= s->x[i] >= s->least ? weights[i] : 0;
        if (left < 0) {
            return s->ids ? s->ids[i] : (int32_t)i;
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

/* top_k before min_p, the other way round than it is told: both keep the largest logits, so the result
 * is the same, and weights are only made for what top_k leaves. */
static int32_t sample_row(const rows_job *job, const scratch *buffers, const float *row, float max,
                          const raddle_ops_sample_row *settings) {
    if (settings->temperature == 0) {
        return first_maximum(row, max);
    }
    sampler s = {
        .loops = job->loops,
        .buffers = buffers,
        .x = row,
        .count = job->vocab,
        .max = max,
        .factor = raddle_ops_weight_factor(settings->temperature),
        .least = -INFINITY,
    };
    if (settings->top_k > 0 && settings->top_k < job->vocab) {
        keep_largest(&s, false, settings->top_k, 0);
        drop_the_rest(&s);
    }
    s.loops->weights(buffers->weights, s.x, s.count, max, s.factor);
    if (settings->min_p > 0) {
        keep_min_p(&s, settings->min_p);
    }
    if (settings->top_p < 1) {
        keep_largest(&s, true, 0, settings->top_p);
    }
    return draw(&s, raddle_ops_random(settings->seed, settings->offset));
}

static void sample_rows(void *context, int64_t begin, int64_t end, int worker) {
    rows_job *job = context;
    const raddle_ops_sample_job *p = job->sample;
    const scratch s = worker_scratch(job, worker);
    for (int64_t i = begin; i < end; i++) {
        float max;
        const float *row = open_row(job, s.row, p->logits, p->dtype, p->logits_stride_row, i, &max);
        if (row) {
            p->out[i * p->out_stride] =
                sample_row(job, &s, row, max, &p->settings[i * p->settings_step]);
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

static double log_sum_exp_below(const rows_job *job, const float *row, float max) {
    float block[EXP_BLOCK];
    double sum = 0;
    for (int64_t i = 0; i < job->vocab; i += EXP_BLOCK) {
        const int64_t count = job->vocab - i < EXP_BLOCK ? job->vocab - i : EXP_BLOCK;
        sum += job->loops->exp_sum(block, row + i, count, max, 1.0f);
    }
    return log(sum);
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
        const float *row =
            open_row(job, s.row, p->logits, (raddle_dtype)p->dtype, p->logits_stride_row, i, &max);
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
    rows_job job = {.vocab = params->vocab, .logprobs = params};
    return run_rows(&job, logprobs_rows, params->rows);
}

/* ops_cpu_rows.h - rows of logits or probabilities on the CPU, one worker each: buffers, bad rows, and
 * the selection of the largest. */
#ifndef RADDLE_OPS_OPS_CPU_ROWS_H
#define RADDLE_OPS_OPS_CPU_ROWS_H

#include "base/threads.h"
#include "cpu/vec.h"
#include "ops/ops_cpu.h"

enum {
    RADDLE_OPS_CPU_BINS = 2048,
    RADDLE_OPS_CPU_SKIP = 1024 /* tokens whose weights are summed together, for a search to pass */
};

/* What a row was refused for; the first such row is reported. */
enum { RADDLE_OPS_ROW_OK = 0, RADDLE_OPS_ROW_NAN, RADDLE_OPS_ROW_EMPTY, RADDLE_OPS_ROW_ID };

/* One worker's buffers; the second for what has two rows, the rest for what selects or draws. */
typedef struct raddle_ops_scratch {
    float *row;       /* [vocab] */
    float *second;    /* [vocab] */
    int64_t *sums;    /* [vocab / SKIP + 1] */
    int64_t *bins;    /* [BINS] */
    int64_t *weights; /* [vocab] */
    int32_t *ids;     /* [vocab] */
    int32_t *inside;  /* [vocab]: places of the tokens of one bin */
} raddle_ops_scratch;

typedef struct raddle_ops_rows_job {
    const char *name;   /* of the argument that holds the rows, for messages */
    const void *params; /* of the body */
    int64_t vocab;
    bool is_probs;
    bool selects, has_second; /* which buffers it wants */
    /* Filled by raddle_ops_cpu_run_rows. */
    const raddle_vec *vec;
    const raddle_ops_cpu_loops *loops;
    char *scratch_data;
    size_t scratch_bytes; /* of one worker */
    int64_t bad_row; /* row * 4 + reason, the least; INT64_MAX when none. Accessed atomically */
} raddle_ops_rows_job;

/* Runs body over rows with one scratch per worker, and tells the first bad row. */
raddle_status raddle_ops_cpu_run_rows(raddle_ops_rows_job *job, raddle_loop_body body,
                                      int64_t rows);
raddle_ops_scratch raddle_ops_cpu_worker_scratch(const raddle_ops_rows_job *job, int worker);
void raddle_ops_cpu_report_row(raddle_ops_rows_job *job, int64_t row, int reason);
/* A row as float32, where it lies or widened into wide. */
const float *raddle_ops_cpu_widen_row(const raddle_ops_rows_job *job, float *wide, const void *data,
                                      raddle_dtype dtype, int64_t stride, int64_t i);
/* Its maximum, and why nothing can be drawn from it. */
int raddle_ops_cpu_look_at_row(const raddle_ops_rows_job *job, const float *row, float *out_max);

/* A row in work: count tokens in the order of the vocabulary, of which those with a value of at least
 * least may be drawn. */
typedef struct raddle_ops_sampler {
    const raddle_ops_cpu_loops *loops;
    const raddle_ops_scratch *buffers;
    const float *x;
    const int32_t *ids; /* NULL: token i is number i */
    int64_t count;
    float max, factor, least;
    bool is_probs;
} raddle_ops_sampler;

/* Fills buffers->weights. */
void raddle_ops_cpu_make_weights(const raddle_ops_sampler *s);
/* Raises least to the largest value such that the tokens at or above it are at least top_k many
 * (by_weight false), or weigh at least top_p of all that may be drawn. */
void raddle_ops_cpu_keep_largest(raddle_ops_sampler *s, bool by_weight, int64_t top_k, float top_p);
/* The first token at which the running sum of weights passes a uniform draw below the total; -1 when
 * that is 0. */
int32_t raddle_ops_cpu_draw(const raddle_ops_sampler *s, uint64_t random);

#endif

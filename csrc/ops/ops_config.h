/* ops_config.h - what a kernel of the ops family is compiled for, as one small number. */
#ifndef RADDLE_OPS_OPS_CONFIG_H
#define RADDLE_OPS_OPS_CONFIG_H

#include "base/status.h"

typedef enum raddle_ops_kernel {
    RADDLE_OPS_NORM,
    RADDLE_OPS_ROPE,
    RADDLE_OPS_ROPE_FP8,
    RADDLE_OPS_ACT_AND_MUL,
    RADDLE_OPS_EMBEDDING,
    RADDLE_OPS_SOFTMAX,
    RADDLE_OPS_SAMPLE,
    RADDLE_OPS_FILTER,
    RADDLE_OPS_VERIFY,
    RADDLE_OPS_LOGPROBS,
    RADDLE_OPS_LINEAR,
    RADDLE_OPS_NUM_KERNELS
} raddle_ops_kernel;

typedef struct raddle_ops_config {
    raddle_ops_kernel kernel;
    raddle_dtype dtype; /* float32, float16, bfloat16; embedding: only its size counts */
    bool is_vector;     /* rows are read 16 bytes at a time */
    int32_t variant; /* norm and rope: as below; act: which; sample and filter: of probabilities */
    int32_t row_threads; /* norm: 32, 128, 256 or 512 */
} raddle_ops_config;

enum {
    RADDLE_OPS_CONFIG_BYTES = 256,
    RADDLE_OPS_MAX_VARIANTS = 16,
    RADDLE_OPS_NUM_ROW_THREADS = 4
};

/* Parts of a norm's variant. */
enum {
    RADDLE_OPS_NORM_RESIDUAL = 1,
    RADDLE_OPS_NORM_F32_WEIGHT = 2,
    RADDLE_OPS_NORM_CENTERED = 4,
    RADDLE_OPS_NORM_FP8 = 8
};
/* Of rope's, and of rope_fp8's the first. */
enum { RADDLE_OPS_ROPE_INTERLEAVE = 1, RADDLE_OPS_ROPE_FROM_TURNS = 2 };
/* Of linear's. */
enum { RADDLE_OPS_LINEAR_F32_OUT = 1 };

/* 0 .. raddle_ops_num_config_ids() - 1, different for different configs. */
int raddle_ops_config_id(const raddle_ops_config *config);
int raddle_ops_num_config_ids(void);
/* "ops/ops_rmsnorm", and the lines that are put before its source. */
const char *raddle_ops_config_name(const raddle_ops_config *config);
void raddle_ops_config_text(const raddle_ops_config *config, char text[RADDLE_OPS_CONFIG_BYTES]);
/* Elements in 16 bytes, or 1. */
int raddle_ops_config_vector(const raddle_ops_config *config);
/* The threads of a row of so many elements: the fewest that keep it in registers. */
int32_t raddle_ops_row_threads(int32_t width, int vector);

#endif

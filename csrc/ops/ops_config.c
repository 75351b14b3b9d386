/* ops_config.c - configs of the ops kernels: numbers, texts, and the list that is compiled ahead.
 */
#include "ops/ops_config.h"

#include <stdio.h>

#include "base/tensor.h"
#include "ops/ops.h"

static const int32_t row_threads[RADDLE_OPS_NUM_ROW_THREADS] = {32, 128, 256, 512};

enum {
    NUM_DTYPES = 3,
    VECTORS_KEPT = 2 /* ITEMS of ops_norm.cu */
};

static const char *const names[RADDLE_OPS_NUM_KERNELS] = {
    [RADDLE_OPS_NORM] = "ops/ops_norm",           [RADDLE_OPS_ROPE] = "ops/ops_rope",
    [RADDLE_OPS_ROPE_FP8] = "ops/ops_rope_fp8",   [RADDLE_OPS_ACT_AND_MUL] = "ops/ops_act_and_mul",
    [RADDLE_OPS_EMBEDDING] = "ops/ops_embedding", [RADDLE_OPS_SOFTMAX] = "ops/ops_softmax",
    [RADDLE_OPS_SAMPLE] = "ops/ops_sample",       [RADDLE_OPS_FILTER] = "ops/ops_filter",
    [RADDLE_OPS_VERIFY] = "ops/ops_verify",       [RADDLE_OPS_LOGPROBS] = "ops/ops_logprobs",
    [RADDLE_OPS_LINEAR] = "ops/ops_linear",
};

/* ---------------------------------------------------------------- numbers */

static int dtype_number(raddle_dtype dtype) {
    return dtype == RADDLE_BF16 ? 0 : dtype == RADDLE_F16 ? 1 : 2;
}

static int row_threads_number(int32_t threads) {
    int number = 0;
    while (number < RADDLE_OPS_NUM_ROW_THREADS - 1 && row_threads[number] < threads) {
        number++;
    }
    return number;
}

int raddle_ops_config_id(const raddle_ops_config *config) {
    int id = (int)config->kernel;
    id = id * NUM_DTYPES + dtype_number(config->dtype);
    id = id * 2 + config->is_vector;
    id = id * RADDLE_OPS_MAX_VARIANTS + config->variant;
    return id * RADDLE_OPS_NUM_ROW_THREADS + row_threads_number(config->row_threads);
}

int raddle_ops_num_config_ids(void) {
    return RADDLE_OPS_NUM_KERNELS * NUM_DTYPES * 2 * RADDLE_OPS_MAX_VARIANTS *
           RADDLE_OPS_NUM_ROW_THREADS;
}

int raddle_ops_config_vector(const raddle_ops_config *config) {
    return config->is_vector ? 16 / (int)raddle_dtype_bytes(config->dtype) : 1;
}

int32_t raddle_ops_row_threads(int32_t width, int vector) {
    const int32_t wanted = (width + VECTORS_KEPT * vector - 1) / (VECTORS_KEPT * vector);
    return row_threads[row_threads_number(wanted)];
}

/* ---------------------------------------------------------------- texts */

static const char *type_name(raddle_dtype dtype) {
    return dtype == RADDLE_BF16 ? "bf16" : dtype == RADDLE_F16 ? "f16" : "f32";
}

static int has(const raddle_ops_config *config, int32_t part) {
    return (config->variant & part) != 0;
}

const char *raddle_ops_config_name(const raddle_ops_config *config) {
    return names[config->kernel];
}

void raddle_ops_config_text(const raddle_ops_config *config, char text[RADDLE_OPS_CONFIG_BYTES]) {
    const char *type = type_name(config->dtype);
    const int vector = raddle_ops_config_vector(config);
    const int bytes = (int)raddle_dtype_bytes(config->dtype);
    const size_t size = RADDLE_OPS_CONFIG_BYTES;
    switch (config->kernel) {
    case RADDLE_OPS_NORM:
        snprintf(text, size,
                 "#define RADDLE_TYPE %s\n#define RADDLE_WEIGHT_TYPE %s\n"
                 "#define RADDLE_HAS_RESIDUAL %d\n#define RADDLE_IS_CENTERED %d\n"
                 "#define RADDLE_IS_FP8 %d\n#define RADDLE_VECTOR %d\n"
                 "#define RADDLE_ROW_THREADS %d\n",
                 type, has(config, RADDLE_OPS_NORM_F32_WEIGHT) ? "f32" : type,
                 has(config, RADDLE_OPS_NORM_RESIDUAL), has(config, RADDLE_OPS_NORM_CENTERED),
                 has(config, RADDLE_OPS_NORM_FP8), vector, (int)config->row_threads);
        break;
    case RADDLE_OPS_ROPE:
        snprintf(text, size,
                 "#define RADDLE_TYPE %s\n#define RADDLE_INTERLEAVE %d\n"
                 "#define RADDLE_FROM_TURNS %d\n#define RADDLE_VECTOR %d\n",
                 type, has(config, RADDLE_OPS_ROPE_INTERLEAVE),
                 has(config, RADDLE_OPS_ROPE_FROM_TURNS), vector);
        break;
    case RADDLE_OPS_ROPE_FP8:
        snprintf(text, size,
                 "#define RADDLE_TYPE %s\n#define RADDLE_INTERLEAVE %d\n#define RADDLE_VECTOR %d\n",
                 type, has(config, RADDLE_OPS_ROPE_INTERLEAVE), vector);
        break;
    case RADDLE_OPS_ACT_AND_MUL:
        snprintf(text, size,
                 "#define RADDLE_TYPE %s\n#define RADDLE_ACTIVATION %d\n#define RADDLE_VECTOR %d\n",
                 type, (int)config->variant, vector);
        break;
    case RADDLE_OPS_EMBEDDING:
        snprintf(text, size, "#define RADDLE_ELEMENT_BYTES %d\n#define RADDLE_ACCESS_BYTES %d\n",
                 bytes, config->is_vector ? 16 : bytes);
        break;
    case RADDLE_OPS_SAMPLE:
    case RADDLE_OPS_FILTER:
        snprintf(text, size,
                 "#define RADDLE_TYPE %s\n#define RADDLE_IS_PROBS %d\n#define RADDLE_VECTOR %d\n",
                 type, (int)config->variant, vector);
        break;
    case RADDLE_OPS_LINEAR:
        snprintf(text, size, "#define RADDLE_TYPE %s\n#define RADDLE_OUT_TYPE %s\n", type,
                 has(config, RADDLE_OPS_LINEAR_F32_OUT) ? "f32" : type);
        break;
    default:
        snprintf(text, size, "#define RADDLE_TYPE %s\n#define RADDLE_VECTOR %d\n", type, vector);
        break;
    }
}

/* ---------------------------------------------------------------- the list */

/* Every kernel in its common forms, and each unaligned form once: the rest is compiled when needed.
 */
static const raddle_ops_config listed[] = {
    {RADDLE_OPS_NORM, RADDLE_BF16, true, 0, 32},
    {RADDLE_OPS_NORM, RADDLE_BF16, true, 0, 256},
    {RADDLE_OPS_NORM, RADDLE_BF16, true, 1, 128},
    {RADDLE_OPS_NORM, RADDLE_BF16, true, 1, 256},
    {RADDLE_OPS_NORM, RADDLE_BF16, true, 1, 512},
    {RADDLE_OPS_NORM, RADDLE_BF16, true, 3, 512},
    {RADDLE_OPS_NORM, RADDLE_BF16, false, 1, 512},
    {RADDLE_OPS_NORM, RADDLE_F16, true, 0, 256},
    {RADDLE_OPS_NORM, RADDLE_F16, true, 1, 256},
    {RADDLE_OPS_NORM, RADDLE_F32, true, 1, 512},
    {RADDLE_OPS_NORM, RADDLE_BF16, true, RADDLE_OPS_NORM_FP8, 256},
    {RADDLE_OPS_NORM, RADDLE_F16, false, RADDLE_OPS_NORM_FP8 | RADDLE_OPS_NORM_RESIDUAL, 512},
    {RADDLE_OPS_NORM, RADDLE_BF16, true, RADDLE_OPS_NORM_CENTERED | RADDLE_OPS_NORM_F32_WEIGHT,
     512},
    {RADDLE_OPS_ROPE, RADDLE_BF16, true, 0, 0},
    {RADDLE_OPS_ROPE, RADDLE_BF16, true, 1, 0},
    {RADDLE_OPS_ROPE, RADDLE_BF16, false, 0, 0},
    {RADDLE_OPS_ROPE, RADDLE_BF16, false, 1, 0},
    {RADDLE_OPS_ROPE, RADDLE_F16, true, 0, 0},
    {RADDLE_OPS_ROPE, RADDLE_F32, true, 0, 0},
    {RADDLE_OPS_ROPE, RADDLE_F16, true, RADDLE_OPS_ROPE_FROM_TURNS, 0},
    {RADDLE_OPS_ROPE, RADDLE_F16, true, RADDLE_OPS_ROPE_FROM_TURNS | RADDLE_OPS_ROPE_INTERLEAVE, 0},
    {RADDLE_OPS_ROPE, RADDLE_BF16, false, RADDLE_OPS_ROPE_FROM_TURNS, 0},
    {RADDLE_OPS_ROPE_FP8, RADDLE_BF16, true, 0, 0},
    {RADDLE_OPS_ROPE_FP8, RADDLE_BF16, true, RADDLE_OPS_ROPE_INTERLEAVE, 0},
    {RADDLE_OPS_ROPE_FP8, RADDLE_F16, false, RADDLE_OPS_ROPE_INTERLEAVE, 0},
    {RADDLE_OPS_ACT_AND_MUL, RADDLE_BF16, true, RADDLE_OPS_SILU, 0},
    {RADDLE_OPS_ACT_AND_MUL, RADDLE_BF16, true, RADDLE_OPS_GELU, 0},
    {RADDLE_OPS_ACT_AND_MUL, RADDLE_BF16, true, RADDLE_OPS_GELU_TANH, 0},
    {RADDLE_OPS_ACT_AND_MUL, RADDLE_BF16, false, RADDLE_OPS_SILU, 0},
    {RADDLE_OPS_ACT_AND_MUL, RADDLE_F16, true, RADDLE_OPS_SILU, 0},
    {RADDLE_OPS_ACT_AND_MUL, RADDLE_F32, true, RADDLE_OPS_SILU, 0},
    {RADDLE_OPS_EMBEDDING, RADDLE_BF16, true, 0, 0},
    {RADDLE_OPS_EMBEDDING, RADDLE_BF16, false, 0, 0},
    {RADDLE_OPS_EMBEDDING, RADDLE_F32, true, 0, 0},
    {RADDLE_OPS_SOFTMAX, RADDLE_BF16, true, 0, 0},
    {RADDLE_OPS_SOFTMAX, RADDLE_F32, true, 0, 0},
    {RADDLE_OPS_SAMPLE, RADDLE_BF16, true, 0, 0},
    {RADDLE_OPS_SAMPLE, RADDLE_F16, true, 0, 0},
    {RADDLE_OPS_SAMPLE, RADDLE_F32, true, 0, 0},
    {RADDLE_OPS_SAMPLE, RADDLE_F32, false, 0, 0},
    {RADDLE_OPS_SAMPLE, RADDLE_F32, true, 1, 0},
    {RADDLE_OPS_SAMPLE, RADDLE_F32, false, 1, 0},
    {RADDLE_OPS_FILTER, RADDLE_F32, true, 0, 0},
    {RADDLE_OPS_FILTER, RADDLE_F32, true, 1, 0},
    {RADDLE_OPS_FILTER, RADDLE_BF16, true, 1, 0},
    {RADDLE_OPS_FILTER, RADDLE_F16, false, 0, 0},
    {RADDLE_OPS_VERIFY, RADDLE_F32, true, 0, 0},
    {RADDLE_OPS_VERIFY, RADDLE_BF16, false, 0, 0},
    {RADDLE_OPS_LOGPROBS, RADDLE_BF16, true, 0, 0},
    {RADDLE_OPS_LOGPROBS, RADDLE_F32, true, 0, 0},
    {RADDLE_OPS_LOGPROBS, RADDLE_F32, false, 0, 0},
    {RADDLE_OPS_LINEAR, RADDLE_BF16, true, 0, 0},
    {RADDLE_OPS_LINEAR, RADDLE_F16, true, RADDLE_OPS_LINEAR_F32_OUT, 0},
};

int raddle_ops_num_kernel_configs(void) {
    return (int)(sizeof(listed) / sizeof(listed[0]));
}

raddle_status raddle_ops_kernel_config(int index, const char **out_name, char *out_config,
                                       size_t config_bytes) {
    char text[RADDLE_OPS_CONFIG_BYTES];
    RADDLE_REQUIRE(index >= 0 && index < raddle_ops_num_kernel_configs(), RADDLE_ERR_VALUE,
                   "index: there are %d kernel configs, got %d", raddle_ops_num_kernel_configs(),
                   index);
    raddle_ops_config_text(&listed[index], text);
    const int length = snprintf(out_config, config_bytes, "%s", text);
    RADDLE_REQUIRE(length >= 0 && (size_t)length < config_bytes, RADDLE_ERR_CAPACITY,
                   "config: %d bytes do not fit in %zu", length + 1, config_bytes);
    *out_name = raddle_ops_config_name(&listed[index]);
    return RADDLE_OK;
}

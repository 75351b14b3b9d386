/* ops_cuda.c - the CUDA back end of the ops family: chooses a config by alignment, and launches.
 *
 * Rows are read 16 bytes at a time where every pointer and stride allows it, else element by
 * element. A kernel that was launched before is found by its config's number, without a text or a
 * hash.
 */
#include "ops/ops_cuda.h"

#include <limits.h>
#include <stdatomic.h>

#include "cuda/kernel.h"

enum {
    MAX_CACHED_DEVICES = 16,
    MAX_CONFIG_IDS = 4608,
    NORM_CTA_THREADS = 128, /* at least; ops_norm.cu's CTA_THREADS */
    ROPE_CTA_THREADS = 128,
    MANY_ROWS = 1024, /* that fill the device with a CTA each */
    ACT_CTA_THREADS = 256,
    EMBEDDING_CTA_THREADS = 128,
    LOGITS_CTA_THREADS = 1024,
    MAX_GRID_Y = 65535
};

/* Kernels of the process, never unloaded. Racing first launches store the same pointer. */
static _Atomic(const raddle_kernel *) known_kernels[MAX_CACHED_DEVICES][MAX_CONFIG_IDS];

static raddle_status get_kernel(const raddle_cuda_device *device, const raddle_ops_config *config,
                                const raddle_kernel **out_kernel) {
    char text[RADDLE_OPS_CONFIG_BYTES];
    const int id = raddle_ops_config_id(config);
    const bool is_cached = device->index < MAX_CACHED_DEVICES && id < MAX_CONFIG_IDS;
    const raddle_kernel *kernel = NULL;
    if (is_cached) {
        kernel = atomic_load_explicit(&known_kernels[device->index][id], memory_order_acquire);
    }
    if (!kernel) {
        raddle_ops_config_text(config, text);
        RADDLE_TRY(raddle_kernel_get(device, raddle_ops_config_name(config), text, 0, &kernel));
        if (is_cached) {
            atomic_store_explicit(&known_kernels[device->index][id], kernel, memory_order_release);
        }
    }
    *out_kernel = kernel;
    return RADDLE_OK;
}

raddle_status raddle_ops_cuda_prepare(int32_t index, const raddle_ops_config *config) {
    const raddle_cuda_device *device;
    const raddle_kernel *kernel;
    bool pushed;
    RADDLE_TRY(raddle_cuda_device_get(index, &device));
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    const raddle_status status = get_kernel(device, config, &kernel);
    raddle_cuda_pop(device, pushed);
    return status;
}

raddle_status raddle_ops_cuda_launch(int32_t index, const raddle_ops_config *config, int64_t grid_x,
                                     int64_t grid_y, unsigned threads, const void *params,
                                     raddle_stream stream) {
    const raddle_cuda_device *device;
    const raddle_kernel *kernel;
    bool pushed;
    RADDLE_REQUIRE(grid_x <= INT_MAX && grid_y <= MAX_GRID_Y, RADDLE_ERR_UNSUPPORTED,
                   "%s: a grid of %lld by %lld blocks is more than a launch may have",
                   raddle_ops_config_name(config), (long long)grid_x, (long long)grid_y);
    RADDLE_TRY(raddle_cuda_device_get(index, &device));
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    raddle_status status = get_kernel(device, config, &kernel);
    if (status == RADDLE_OK) {
        const raddle_launch shape = {
            .grid = {(unsigned)grid_x, (unsigned)grid_y, 1},
            .block = {threads, 1, 1},
            .programmatic_launch = device->arch >= 90,
        };
        status = raddle_kernel_launch(device, kernel, &shape, params, stream);
    }
    raddle_cuda_pop(device, pushed);
    return status;
}

static int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* Whether data and strides (elements) are multiples of 16 bytes. */
static bool is_aligned(const void *data, int64_t stride_row, int64_t stride_head, size_t bytes) {
    return ((uintptr_t)data | (uintptr_t)stride_row * bytes | (uintptr_t)stride_head * bytes) %
               16 ==
           0;
}

/* ---------------------------------------------------------------- elementwise */

static raddle_status run_norm(int32_t device, const raddle_ops_norm_params *p,
                              raddle_stream stream) {
    const size_t bytes = raddle_dtype_bytes((raddle_dtype)p->dtype);
    /* Strides of an 8-bit out count as x's: as many elements are stored at a time as are loaded. */
    const uintptr_t out = (uintptr_t)p->out * (p->out_is_fp8 ? bytes : 1);
    raddle_ops_config config = {
        .kernel = RADDLE_OPS_NORM,
        .dtype = (raddle_dtype)p->dtype,
        .is_vector =
            (size_t)p->width * bytes % 16 == 0 &&
            is_aligned(p->x, p->x_stride_row, p->x_stride_head, bytes) &&
            is_aligned(p->residual, p->residual_stride_row, p->residual_stride_head, bytes) &&
            is_aligned((const void *)out, p->out_stride_row, p->out_stride_head, bytes) &&
            is_aligned(p->weight, 0, 0, 1) && is_aligned(p->bias, 0, 0, 1),
        .variant = (p->residual ? RADDLE_OPS_NORM_RESIDUAL : 0) |
                   (p->weight_dtype != p->dtype ? RADDLE_OPS_NORM_F32_WEIGHT : 0) |
                   (p->is_centered ? RADDLE_OPS_NORM_CENTERED : 0) |
                   (p->out_is_fp8 ? RADDLE_OPS_NORM_FP8 : 0),
    };
    config.row_threads = raddle_ops_row_threads(p->width, raddle_ops_config_vector(&config));
    const int32_t threads =
        config.row_threads < NORM_CTA_THREADS ? NORM_CTA_THREADS : config.row_threads;
    RADDLE_REQUIRE(p->rows <= INT_MAX / p->heads, RADDLE_ERR_UNSUPPORTED,
                   "x: %lld rows of %d heads are more than the %d that a kernel counts",
                   (long long)p->rows, p->heads, INT_MAX);
    const int64_t grid = divide_up(p->rows * p->heads, threads / config.row_threads);
    return raddle_ops_cuda_launch(device, &config, grid, 1, (unsigned)threads, p, stream);
}

/* Heads of one CTA: with many rows a thread takes several, for which it has its angles already. */
static int32_t heads_per_cta(const raddle_ops_rope_params *p, int pieces) {
    const int lanes = pieces < ROPE_CTA_THREADS ? pieces : ROPE_CTA_THREADS;
    const int at_once = ROPE_CTA_THREADS / lanes;
    return p->rows >= MANY_ROWS ? 4 * at_once : at_once;
}

static raddle_status run_rope(int32_t device, const raddle_ops_rope_params *p,
                              raddle_stream stream) {
    const size_t bytes = raddle_dtype_bytes((raddle_dtype)p->dtype);
    const int half = p->rotary_dim / 2;
    const size_t copied = p->in_place ? 0 : (size_t)p->head_dim * bytes;
    const raddle_ops_config config = {
        .kernel = RADDLE_OPS_ROPE,
        .dtype = (raddle_dtype)p->dtype,
        .is_vector = (size_t)half * bytes % 16 == 0 && copied % 16 == 0 &&
                     is_aligned(p->q, p->q_stride_row, p->q_stride_head, bytes) &&
                     is_aligned(p->k, p->k_stride_row, p->k_stride_head, bytes) &&
                     is_aligned(p->q_out, p->q_out_stride_row, p->q_out_stride_head, bytes) &&
                     is_aligned(p->k_out, p->k_out_stride_row, p->k_out_stride_head, bytes) &&
                     is_aligned(p->cos_sin, p->cos_sin_stride_row, 0, sizeof(float)),
        .variant = (p->interleave ? RADDLE_OPS_ROPE_INTERLEAVE : 0) |
                   (p->cos_sin ? 0 : RADDLE_OPS_ROPE_FROM_TURNS),
    };
    const int64_t heads = (int64_t)p->num_qo_heads + p->num_kv_heads;
    raddle_ops_rope_turns_params whole; /* a kernel with a table reads the first member alone */
    whole.rope = *p;
    whole.rope.heads_per_cta = heads_per_cta(p, half / raddle_ops_config_vector(&config));
    if (heads == 0) {
        return RADDLE_OK;
    }
    for (int i = 0; !p->cos_sin && i < RADDLE_OPS_MAX_TURNS; i++) {
        whole.turns[i] = i < half ? p->turns[i] : 0;
    }
    return raddle_ops_cuda_launch(device, &config, p->rows,
                                  divide_up(heads, whole.rope.heads_per_cta), ROPE_CTA_THREADS,
                                  &whole, stream);
}

/* Whether every part can be read 16 bytes and written as many elements at a time. */
static bool are_parts_aligned(const raddle_ops_rope_fp8_params *p, size_t bytes) {
    const size_t vector = 16 / bytes;
    bool aligned = (size_t)p->rotary_dim / 2 % vector == 0 &&
                   is_aligned(p->cos_sin, p->cos_sin_stride_row, 0, sizeof(float));
    for (int i = 0; i < RADDLE_OPS_FP8_PARTS; i++) {
        const raddle_ops_fp8_part *part = &p->parts[i];
        if (part->width == 0) {
            continue;
        }
        const uint64_t to = (uint64_t)(uintptr_t)part->to | (uint64_t)part->to_stride_row |
                            (uint64_t)part->to_stride_head | (uint64_t)part->to_stride_page |
                            (uint64_t)part->width;
        aligned &= to % vector == 0 &&
                   is_aligned(part->from, part->from_stride_row, part->from_stride_head, bytes);
    }
    return aligned;
}

static raddle_status run_rope_fp8(int32_t device, const raddle_ops_rope_fp8_params *p,
                                  raddle_stream stream) {
    const size_t bytes = raddle_dtype_bytes((raddle_dtype)p->dtype);
    const raddle_ops_config config = {
        .kernel = RADDLE_OPS_ROPE_FP8,
        .dtype = (raddle_dtype)p->dtype,
        .is_vector = are_parts_aligned(p, bytes),
        .variant = p->interleave ? RADDLE_OPS_ROPE_INTERLEAVE : 0,
    };
    const int vector = raddle_ops_config_vector(&config);
    int64_t items = 0;
    for (int i = 0; i < RADDLE_OPS_FP8_PARTS; i++) {
        const raddle_ops_fp8_part *part = &p->parts[i];
        items += (int64_t)part->heads * (part->width / (part->is_rotated ? 2 * vector : vector));
    }
    if (items == 0) {
        return RADDLE_OK;
    }
    return raddle_ops_cuda_launch(device, &config, p->rows, divide_up(items, ROPE_CTA_THREADS),
                                  ROPE_CTA_THREADS, p, stream);
}

static raddle_status run_act_and_mul(int32_t device, const raddle_ops_act_params *p,
                                     raddle_stream stream) {
    const size_t bytes = raddle_dtype_bytes((raddle_dtype)p->dtype);
    const raddle_ops_config config = {
        .kernel = RADDLE_OPS_ACT_AND_MUL,
        .dtype = (raddle_dtype)p->dtype,
        .is_vector = (size_t)p->width * bytes % 16 == 0 &&
                     is_aligned(p->x, p->x_stride_row, p->x_stride_head, bytes) &&
                     is_aligned(p->out, p->out_stride_row, p->out_stride_head, bytes),
        .variant = p->activation,
    };
    const int64_t items = p->width / raddle_ops_config_vector(&config);
    return raddle_ops_cuda_launch(device, &config, p->rows * p->heads,
                                  divide_up(items, ACT_CTA_THREADS), ACT_CTA_THREADS, p, stream);
}

static raddle_status run_embedding(int32_t device, const raddle_ops_embedding_params *p,
                                   raddle_stream stream) {
    const size_t bytes = raddle_dtype_bytes((raddle_dtype)p->dtype);
    const raddle_ops_config config = {
        .kernel = RADDLE_OPS_EMBEDDING,
        .dtype = (raddle_dtype)p->dtype,
        .is_vector = (size_t)p->width * bytes % 16 == 0 &&
                     is_aligned(p->table, p->table_stride_row, 0, bytes) &&
                     is_aligned(p->out, p->out_stride_row, 0, bytes),
    };
    const int64_t items = p->width / raddle_ops_config_vector(&config);
    return raddle_ops_cuda_launch(device, &config, p->rows, divide_up(items, EMBEDDING_CTA_THREADS),
                                  EMBEDDING_CTA_THREADS, p, stream);
}

/* ---------------------------------------------------------------- logits */

static raddle_ops_config logits_config(raddle_ops_kernel kernel, raddle_dtype dtype,
                                       const void *logits, int64_t stride_row, int32_t variant) {
    return (raddle_ops_config){
        .kernel = kernel,
        .dtype = dtype,
        .is_vector = is_aligned(logits, stride_row, 0, raddle_dtype_bytes(dtype)),
        .variant = variant,
    };
}

static raddle_status run_softmax(int32_t device, const raddle_ops_softmax_params *p,
                                 raddle_stream stream) {
    const raddle_ops_config config = logits_config(RADDLE_OPS_SOFTMAX, (raddle_dtype)p->dtype,
                                                   p->logits, p->logits_stride_row, 0);
    return raddle_ops_cuda_launch(device, &config, p->rows, 1, LOGITS_CTA_THREADS, p, stream);
}

/* Element i * stride of an array, or NULL. */
static const void *skip(const void *array, int64_t i, int64_t stride, size_t bytes) {
    return array ? (const char *)array + i * stride * (int64_t)bytes : NULL;
}

/* The call for rows from row on. */
static raddle_ops_sample_call skip_rows(const raddle_ops_sample_call *whole, int64_t row,
                                        int64_t rows, size_t out_bytes) {
    raddle_ops_sample_call c = *whole;
    c.out = (void *)(uintptr_t)skip(c.out, row, c.out_stride, out_bytes);
    c.valid = (void *)(uintptr_t)skip(c.valid, row, c.valid_stride, 1);
    if (c.indices) {
        c.indices = skip(c.indices, row, c.indices_stride, c.indices_are_i64 ? 8 : 4);
    } else {
        c.x = skip(c.x, row, c.x_stride_row, raddle_dtype_bytes((raddle_dtype)c.dtype));
        c.num_inputs -= row;
    }
    c.temperature = skip(c.temperature, row, c.temperature_stride, sizeof(float));
    c.top_p = skip(c.top_p, row, c.top_p_stride, sizeof(float));
    c.min_p = skip(c.min_p, row, c.min_p_stride, sizeof(float));
    c.top_k = skip(c.top_k, row, c.top_k_stride, sizeof(int32_t));
    c.seed = skip(c.seed, row, c.seed_stride, sizeof(int64_t));
    c.offset = skip(c.offset, row, c.offset_stride, sizeof(int64_t));
    c.rows = rows;
    c.first_row = row;
    return c;
}

/* Settings of up to RADDLE_OPS_SAMPLE_ROWS rows travel in one launch; the same for all, in one. */
static raddle_status launch_rows(int32_t device, const raddle_ops_config *config,
                                 const raddle_ops_sample_job *job, size_t out_bytes,
                                 raddle_stream stream) {
    const raddle_ops_sample_call *whole = &job->call;
    const int64_t step = whole->settings_step ? RADDLE_OPS_SAMPLE_ROWS : INT_MAX;
    for (int64_t row = 0; row < whole->rows; row += step) {
        const int64_t rows = whole->rows - row < step ? whole->rows - row : step;
        raddle_ops_sample_params params = {.call = skip_rows(whole, row, rows, out_bytes)};
        for (int64_t i = 0; i < (whole->settings_step ? rows : 1); i++) {
            params.settings[i] = job->settings[row + i];
        }
        RADDLE_TRY(
            raddle_ops_cuda_launch(device, config, rows, 1, LOGITS_CTA_THREADS, &params, stream));
    }
    return RADDLE_OK;
}

static raddle_status run_sample(int32_t device, const raddle_ops_sample_job *job,
                                raddle_stream stream) {
    const raddle_ops_sample_call *c = &job->call;
    const raddle_ops_config config = logits_config(RADDLE_OPS_SAMPLE, (raddle_dtype)c->dtype, c->x,
                                                   c->x_stride_row, c->is_probs);
    return launch_rows(device, &config, job, c->out_is_i64 ? sizeof(int64_t) : sizeof(int32_t),
                       stream);
}

static raddle_status run_filter(int32_t device, const raddle_ops_sample_job *job,
                                raddle_stream stream) {
    const raddle_ops_sample_call *c = &job->call;
    const size_t bytes = raddle_dtype_bytes((raddle_dtype)c->dtype);
    raddle_ops_config config = logits_config(RADDLE_OPS_FILTER, (raddle_dtype)c->dtype, c->x,
                                             c->x_stride_row, c->is_probs);
    config.is_vector &= is_aligned(c->out, c->out_stride, 0, bytes);
    return launch_rows(device, &config, job, bytes, stream);
}

static raddle_status run_verify(int32_t device, const raddle_ops_verify_params *p,
                                raddle_stream stream) {
    const raddle_ops_config config = {
        .kernel = RADDLE_OPS_VERIFY,
        .dtype = (raddle_dtype)p->dtype,
        .is_vector = is_aligned(p->target, p->target_stride_row, p->target_stride_step,
                                raddle_dtype_bytes((raddle_dtype)p->dtype)),
    };
    return raddle_ops_cuda_launch(device, &config, p->rows, 1, LOGITS_CTA_THREADS, p, stream);
}

static raddle_status run_logprobs(int32_t device, const raddle_ops_logprobs_params *p,
                                  raddle_stream stream) {
    RADDLE_REQUIRE(p->top <= RADDLE_OPS_MAX_TOP, RADDLE_ERR_UNSUPPORTED,
                   "top: at most %d on CUDA, got %d", RADDLE_OPS_MAX_TOP, p->top);
    const raddle_ops_config config = logits_config(RADDLE_OPS_LOGPROBS, (raddle_dtype)p->dtype,
                                                   p->logits, p->logits_stride_row, 0);
    return raddle_ops_cuda_launch(device, &config, p->rows, 1, LOGITS_CTA_THREADS, p, stream);
}

/* ---------------------------------------------------------------- the table */

const raddle_ops_backend raddle_ops_backend_cuda = {
    .name = "cuda",
    .norm = run_norm,
    .act_and_mul = run_act_and_mul,
    .embedding = run_embedding,
    .rope = run_rope,
    .rope_fp8 = run_rope_fp8,
    .softmax = run_softmax,
    .sample = run_sample,
    .filter = run_filter,
    .verify = run_verify,
    .logprobs = run_logprobs,
    .linear_pack = raddle_ops_cuda_linear_pack,
    .linear_run = raddle_ops_cuda_linear_run,
    .linear_release = raddle_ops_cuda_linear_release,
};

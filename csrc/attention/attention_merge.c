/* attention_merge.c - merges attention states: outputs over disjoint sets of keys, weighted by
 * their log-sum-exp.
 *
 * Both doors fill one params struct, which the CPU walks itself and CUDA hands to
 * attention_merge.cu; the states are folded in index order on both. A state of -inf weighs nothing,
 * whatever its v holds; when all are -inf the result is 0 and -inf.
 */
#include "attention/attention.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/tensor.h"
#include "base/threads.h"
#include "cpu/vec.h"
#include "cuda/kernel.h"
#include "kernels/attention/attention_merge_params.h"

enum {
    MERGE_GRAIN = 32 * 1024, /* elements read per block of the CPU's loop */
    MERGE_WIDTH = 256,       /* elements of a head handled at a time, on the stack */
    MERGE_BLOCK = 128,       /* CUDA: threads of a CTA; a warp merges one (row, head) */
};

static const float LOG2_E = 1.44269504088896340736f;
static const float LN_2 = 0.69314718055994530942f;

/* ---------------------------------------------------------------- validation */

static bool is_state_dtype(raddle_dtype dtype) {
    return dtype == RADDLE_F32 || dtype == RADDLE_F16 || dtype == RADDLE_BF16;
}

static raddle_status check_v(const raddle_tensor *v, int ndim, const int64_t *shape,
                             const raddle_tensor *like) {
    RADDLE_TRY(raddle_tensor_check_device(v, like->device));
    RADDLE_TRY(raddle_tensor_check_shape(v, ndim, shape));
    RADDLE_TRY(raddle_tensor_check_dtype(v, like->dtype));
    return raddle_tensor_check_inner_contiguous(v);
}

static raddle_status check_s(const raddle_tensor *s, int ndim, const int64_t *shape,
                             const raddle_tensor *like) {
    RADDLE_TRY(raddle_tensor_check_device(s, like->device));
    RADDLE_TRY(raddle_tensor_check_shape(s, ndim, shape));
    return raddle_tensor_check_dtype(s, RADDLE_F32);
}

static raddle_status check_outputs(const raddle_tensor *v_out, const raddle_tensor *s_out,
                                   const int64_t shape[3], const raddle_tensor *like) {
    RADDLE_TRY(check_v(v_out, 3, shape, like));
    RADDLE_TRY(raddle_tensor_check_writable(v_out));
    RADDLE_TRY(raddle_tensor_check_no_overlap(v_out));
    RADDLE_TRY(check_s(s_out, 2, shape, like));
    RADDLE_TRY(raddle_tensor_check_writable(s_out));
    return raddle_tensor_check_no_overlap(s_out);
}

static raddle_status check_first(const raddle_tensor *v, int ndim) {
    const int64_t any[4] = {-1, -1, -1, -1};
    RADDLE_TRY(raddle_tensor_check_shape(v, ndim, any));
    RADDLE_REQUIRE(is_state_dtype(v->dtype), RADDLE_ERR_DTYPE,
                   "%s: expected float32, float16 or bfloat16, got %s", v->name,
                   raddle_dtype_name(v->dtype));
    RADDLE_REQUIRE(v->shape[ndim - 1] <= INT32_MAX && v->shape[ndim - 2] <= INT32_MAX,
                   RADDLE_ERR_SHAPE, "%s: heads and head_dim must fit in 31 bits", v->name);
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- CPU */

typedef struct merge_job {
    const raddle_attention_merge_params *params;
    raddle_dtype dtype;
} merge_job;

/* State i of (row, head): its log-sum-exp in the caller's base, and where its v lies. */
static float state_at(const merge_job *job, int64_t row, int64_t head, int32_t i,
                      const char **out_v) {
    const raddle_attention_merge_params *p = job->params;
    const int64_t element = (int64_t)raddle_dtype_bytes(job->dtype);
    if (p->v_other && i == 1) {
        *out_v = (const char *)p->v_other +
                 (row * p->v_other_stride_row + head * p->v_other_stride_head) * element;
        return p->s_other[row * p->s_other_stride_row + head * p->s_other_stride_head];
    }
    *out_v = (const char *)p->v +
             (row * p->v_stride_row + i * p->v_stride_state + head * p->v_stride_head) * element;
    return p->s[row * p->s_stride_row + i * p->s_stride_state + head * p->s_stride_head];
}

static void merge_head(const merge_job *job, int64_t row, int64_t head) {
    const raddle_attention_merge_params *p = job->params;
    const raddle_vec *vec = raddle_vec_get();
    const int64_t element = (int64_t)raddle_dtype_bytes(job->dtype);
    const int32_t num_states = p->mask && !p->mask[row * p->mask_stride] ? 1 : p->num_states;
    char *out =
        (char *)p->v_out + (row * p->v_out_stride_row + head * p->v_out_stride_head) * element;
    float *s_out = p->s_out + row * p->s_out_stride_row + head * p->s_out_stride_head;
    const char *v;
    float max = -INFINITY;
    float sum = 0.0f;
    for (int32_t i = 0; i < num_states; i++) {
        max = fmaxf(max, state_at(job, row, head, i, &v));
    }
    if (max != -INFINITY) {
        for (int32_t i = 0; i < num_states; i++) {
            sum += exp2f((state_at(job, row, head, i, &v) - max) * p->to_log2);
        }
    }
    /* v_out may be v itself: a piece is stored only after all its states were read, s_out after the
     * last piece. */
    for (int64_t begin = 0; begin < p->head_dim; begin += MERGE_WIDTH) {
        float acc[MERGE_WIDTH], part[MERGE_WIDTH];
        const int64_t width = p->head_dim - begin < MERGE_WIDTH ? p->head_dim - begin : MERGE_WIDTH;
        memset(acc, 0, sizeof(acc));
        for (int32_t i = 0; i < num_states && max != -INFINITY; i++) {
            const float s = state_at(job, row, head, i, &v);
            if (s == -INFINITY) {
                continue;
            }
            const float weight = exp2f((s - max) * p->to_log2) / sum;
            vec->load[job->dtype](part, v + begin * element, width);
            for (int64_t d = 0; d < width; d++) {
                acc[d] += weight * part[d];
            }
        }
        vec->store[job->dtype](out + begin * element, acc, width);
    }
    *s_out = max == -INFINITY ? -INFINITY : max + log2f(sum) * p->from_log2;
}

static void merge_block(void *context, int64_t begin, int64_t end, int worker) {
    const merge_job *job = context;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        merge_head(job, i / job->params->num_heads, i % job->params->num_heads);
    }
}

static raddle_status merge_cpu(const merge_job *job) {
    const raddle_attention_merge_params *p = job->params;
    const int64_t grain = 1 + MERGE_GRAIN / ((int64_t)(p->num_states + 1) * (p->head_dim + 1));
    raddle_threads_for(merge_block, (void *)job, p->rows * p->num_heads, grain);
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- CUDA */

/* Elements of 16 bytes when all of v lies at such addresses, else 1. */
static int vector_width(const merge_job *job) {
    const raddle_attention_merge_params *p = job->params;
    const int64_t width = 16 / (int64_t)raddle_dtype_bytes(job->dtype);
    const int64_t steps = p->v_stride_row | p->v_stride_state | p->v_stride_head |
                          p->v_other_stride_row | p->v_other_stride_head | p->v_out_stride_row |
                          p->v_out_stride_head | p->head_dim;
    const uintptr_t addresses = (uintptr_t)p->v | (uintptr_t)p->v_other | (uintptr_t)p->v_out;
    return steps % width == 0 && addresses % 16 == 0 ? (int)width : 1;
}

static raddle_status merge_cuda(const merge_job *job, raddle_device where, raddle_stream stream) {
    const raddle_attention_merge_params *p = job->params;
    char config[96];
    snprintf(config, sizeof(config), "#define RADDLE_TYPE %s\n#define RADDLE_VECTOR %d\n",
             job->dtype == RADDLE_BF16  ? "bf16"
             : job->dtype == RADDLE_F16 ? "f16"
                                        : "f32",
             vector_width(job));
    const raddle_cuda_device *device;
    RADDLE_TRY(raddle_cuda_device_get(where.index, &device));
    const int64_t num_items = p->rows * p->num_heads;
    RADDLE_REQUIRE(num_items <= INT32_MAX, RADDLE_ERR_UNSUPPORTED,
                   "merge: at most %d rows times heads in one call, got %lld times %d", INT32_MAX,
                   (long long)p->rows, (int)p->num_heads);
    const unsigned num_ctas = ((unsigned)num_items + MERGE_BLOCK / 32 - 1) / (MERGE_BLOCK / 32);
    const raddle_launch launch = {
        .grid = {num_ctas, 1, 1},
        .block = {MERGE_BLOCK, 1, 1},
        .programmatic_launch = device->arch >= 90,
    };
    bool pushed;
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    const raddle_kernel *kernel;
    raddle_status status =
        raddle_kernel_get(device, "attention/attention_merge", config, 0, &kernel);
    if (status == RADDLE_OK) {
        status = raddle_kernel_launch(device, kernel, &launch, p, stream);
    }
    raddle_cuda_pop(device, pushed);
    return status;
}

static raddle_status merge(raddle_attention_merge_params *p, const raddle_tensor *v_out,
                           const raddle_tensor *s_out, raddle_lse_base base, raddle_stream stream) {
    RADDLE_REQUIRE(base == RADDLE_LSE_BASE_2 || base == RADDLE_LSE_BASE_E, RADDLE_ERR_VALUE,
                   "lse_base: expected 0 (base 2) or 1 (base e), got %d", (int)base);
    p->v_out = v_out->data;
    p->s_out = s_out->data;
    p->v_out_stride_row = v_out->stride[0];
    p->v_out_stride_head = v_out->stride[1];
    p->s_out_stride_row = s_out->stride[0];
    p->s_out_stride_head = s_out->stride[1];
    p->rows = v_out->shape[0];
    p->num_heads = (int32_t)v_out->shape[1];
    p->head_dim = (int32_t)v_out->shape[2];
    p->to_log2 = base == RADDLE_LSE_BASE_E ? LOG2_E : 1.0f;
    p->from_log2 = base == RADDLE_LSE_BASE_E ? LN_2 : 1.0f;
    if (p->rows == 0 || p->num_heads == 0) {
        return RADDLE_OK;
    }
    const merge_job job = {.params = p, .dtype = v_out->dtype};
    return v_out->device.type == RADDLE_CUDA ? merge_cuda(&job, v_out->device, stream)
                                             : merge_cpu(&job);
}

/* ---------------------------------------------------------------- public */

raddle_status raddle_attention_merge_state(const raddle_tensor *v_a, const raddle_tensor *s_a,
                                           const raddle_tensor *v_b, const raddle_tensor *s_b,
                                           const raddle_tensor *mask, const raddle_tensor *v_out,
                                           const raddle_tensor *s_out, raddle_lse_base base,
                                           raddle_stream stream) {
    RADDLE_TRY(check_first(v_a, 3));
    RADDLE_TRY(check_v(v_a, 3, v_a->shape, v_a));
    RADDLE_TRY(check_s(s_a, 2, v_a->shape, v_a));
    RADDLE_TRY(check_v(v_b, 3, v_a->shape, v_a));
    RADDLE_TRY(check_s(s_b, 2, v_a->shape, v_a));
    RADDLE_TRY(check_outputs(v_out, s_out, v_a->shape, v_a));
    raddle_attention_merge_params params = {
        .v = v_a->data,
        .s = s_a->data,
        .v_other = v_b->data,
        .s_other = s_b->data,
        .v_stride_row = v_a->stride[0],
        .v_stride_head = v_a->stride[1],
        .s_stride_row = s_a->stride[0],
        .s_stride_head = s_a->stride[1],
        .v_other_stride_row = v_b->stride[0],
        .v_other_stride_head = v_b->stride[1],
        .s_other_stride_row = s_b->stride[0],
        .s_other_stride_head = s_b->stride[1],
        .num_states = 2,
    };
    if (mask) {
        RADDLE_TRY(raddle_tensor_check_device(mask, v_a->device));
        RADDLE_TRY(raddle_tensor_check_shape(mask, 1, v_a->shape));
        RADDLE_REQUIRE(mask->dtype == RADDLE_BOOL || mask->dtype == RADDLE_U8, RADDLE_ERR_DTYPE,
                       "%s: expected bool or uint8, got %s", mask->name,
                       raddle_dtype_name(mask->dtype));
        params.mask = mask->data;
        params.mask_stride = mask->stride[0];
    }
    return merge(&params, v_out, s_out, base, stream);
}

raddle_status raddle_attention_merge_states(const raddle_tensor *v, const raddle_tensor *s,
                                            const raddle_tensor *v_out, const raddle_tensor *s_out,
                                            raddle_lse_base base, raddle_stream stream) {
    RADDLE_TRY(check_first(v, 4));
    RADDLE_TRY(check_v(v, 4, v->shape, v));
    RADDLE_TRY(check_s(s, 3, v->shape, v));
    const int64_t out_shape[3] = {v->shape[0], v->shape[2], v->shape[3]};
    RADDLE_TRY(check_outputs(v_out, s_out, out_shape, v));
    RADDLE_REQUIRE(v->shape[1] <= INT32_MAX, RADDLE_ERR_SHAPE, "%s: at most %d states, got %lld",
                   v->name, INT32_MAX, (long long)v->shape[1]);
    raddle_attention_merge_params params = {
        .v = v->data,
        .s = s->data,
        .v_stride_row = v->stride[0],
        .v_stride_state = v->stride[1],
        .v_stride_head = v->stride[2],
        .s_stride_row = s->stride[0],
        .s_stride_state = s->stride[1],
        .s_stride_head = s->stride[2],
        .num_states = (int32_t)v->shape[1],
    };
    return merge(&params, v_out, s_out, base, stream);
}

/* attention_spec.c - whether a spec can be, its defaults, and the descriptor of a KV cache. */
#include "attention/attention.h"

#include <math.h>
#include <string.h>

#include "base/struct.h"
#include "base/tensor.h"

enum { MAX_HEADS = 4096, CHUNK_MULTIPLE = 64 };

static raddle_status check_head_dim(const char *name, int32_t head_dim) {
    RADDLE_REQUIRE(head_dim > 0 && head_dim <= RADDLE_ATTENTION_MAX_HEAD_DIM && head_dim % 8 == 0,
                   RADDLE_ERR_SHAPE, "%s: expected a multiple of 8 from 8 to %d, got %d", name,
                   RADDLE_ATTENTION_MAX_HEAD_DIM, (int)head_dim);
    return RADDLE_OK;
}

static raddle_status check_float_dtype(const char *name, raddle_dtype dtype) {
    RADDLE_REQUIRE(dtype == RADDLE_F32 || dtype == RADDLE_F16 || dtype == RADDLE_BF16,
                   RADDLE_ERR_DTYPE, "%s: expected float32, float16 or bfloat16, got %s", name,
                   raddle_dtype_name(dtype));
    return RADDLE_OK;
}

static bool is_kv_dtype(raddle_dtype dtype) {
    return dtype == RADDLE_F32 || dtype == RADDLE_F16 || dtype == RADDLE_BF16 ||
           dtype == RADDLE_F8_E4M3 || dtype == RADDLE_F8_E5M2;
}

/* What a logit goes through besides sm_scale. */
static raddle_status check_variant(raddle_attention_spec *spec) {
    RADDLE_REQUIRE(isfinite(spec->logits_soft_cap) && spec->logits_soft_cap >= 0.0f,
                   RADDLE_ERR_VALUE,
                   "logits_soft_cap: expected a positive number, or 0 for none; got %g",
                   (double)spec->logits_soft_cap);
    RADDLE_REQUIRE(spec->pos_encoding == RADDLE_POS_NONE || spec->pos_encoding == RADDLE_POS_ROPE ||
                       spec->pos_encoding == RADDLE_POS_ALIBI,
                   RADDLE_ERR_VALUE, "pos_encoding: expected NONE, ROPE or ALIBI");
    RADDLE_REQUIRE(spec->weights == RADDLE_WEIGHTS_SOFTMAX ||
                       spec->weights == RADDLE_WEIGHTS_SIGMOID,
                   RADDLE_ERR_VALUE, "weights: expected softmax or sigmoid");
    if (spec->rope_scale == 0.0f) {
        spec->rope_scale = 1.0f;
    }
    if (spec->rope_theta == 0.0f) {
        spec->rope_theta = 10000.0f;
    }
    RADDLE_REQUIRE(isfinite(spec->rope_scale) && spec->rope_scale > 0.0f, RADDLE_ERR_VALUE,
                   "rope_scale: expected a positive number, got %g", (double)spec->rope_scale);
    RADDLE_REQUIRE(isfinite(spec->rope_theta) && spec->rope_theta > 0.0f, RADDLE_ERR_VALUE,
                   "rope_theta: expected a positive number, got %g", (double)spec->rope_theta);
    const uint32_t hooks = spec->variant == NULL ? 0 : spec->variant->hooks;
    const bool has_pairs = spec->pos_encoding == RADDLE_POS_ROPE ||
                           (hooks & (RADDLE_HOOK_QUERY | RADDLE_HOOK_KEY)) != 0;
    RADDLE_REQUIRE(!has_pairs || spec->head_dim_qk % 16 == 0, RADDLE_ERR_SHAPE,
                   "head_dim: pairs of elements (pos_encoding ROPE, query and key hooks) want a "
                   "multiple of 16, got %d",
                   (int)spec->head_dim_qk);
    const bool no_softmax = spec->weights == RADDLE_WEIGHTS_SIGMOID ||
                            (spec->variant != NULL && spec->variant->no_softmax);
    RADDLE_REQUIRE(!no_softmax || !spec->has_sinks, RADDLE_ERR_VALUE,
                   "sinks: they enter the sum of a softmax, which is off");
    RADDLE_REQUIRE(spec->weights == RADDLE_WEIGHTS_SOFTMAX || spec->variant == NULL ||
                       !spec->variant->no_softmax,
                   RADDLE_ERR_VALUE,
                   "weights: sigmoid, and a variant that makes weights itself; choose one");
    RADDLE_REQUIRE(!no_softmax || (hooks & RADDLE_HOOK_STATE) == 0, RADDLE_ERR_VALUE,
                   "variant: raddle_variant_state is about the sums of a softmax, which is off");
    return RADDLE_OK;
}

static raddle_status check_limits(raddle_attention_spec *spec) {
    RADDLE_REQUIRE(spec->max_batch > 0 && spec->max_batch <= 1 << 20, RADDLE_ERR_VALUE,
                   "max_batch: expected 1 to %d requests, got %d", 1 << 20, (int)spec->max_batch);
    RADDLE_REQUIRE(spec->max_pages >= 0 && spec->max_pages <= INT32_MAX, RADDLE_ERR_VALUE,
                   "max_pages: expected 0 to %d, got %lld", INT32_MAX, (long long)spec->max_pages);
    RADDLE_REQUIRE(spec->max_qo_len >= 0, RADDLE_ERR_VALUE,
                   "max_qo_len: expected 0 (no limit) or more, got %d", (int)spec->max_qo_len);
    if (spec->max_qo_tokens == 0) {
        RADDLE_REQUIRE(spec->max_qo_len > 0, RADDLE_ERR_VALUE,
                       "max_qo_tokens: give the most query rows of a batch");
        spec->max_qo_tokens = (int64_t)spec->max_batch * spec->max_qo_len;
    }
    RADDLE_REQUIRE(
        spec->max_qo_tokens > 0 && spec->max_qo_tokens <= INT32_MAX / spec->num_qo_heads,
        RADDLE_ERR_VALUE,
        "max_qo_tokens: expected 1 to %d (rows times num_qo_heads must fit 31 bits), got "
        "%lld",
        INT32_MAX / (int)spec->num_qo_heads, (long long)spec->max_qo_tokens);
    RADDLE_REQUIRE(spec->max_ctas >= 0, RADDLE_ERR_VALUE,
                   "max_ctas: expected 0 (all) or more, got %d", (int)spec->max_ctas);
    RADDLE_REQUIRE(spec->fixed_chunk >= 0 && spec->fixed_chunk % CHUNK_MULTIPLE == 0,
                   RADDLE_ERR_VALUE,
                   "fixed_chunk: expected 0 (balanced) or a multiple of %d tokens, got %d",
                   CHUNK_MULTIPLE, (int)spec->fixed_chunk);
    return RADDLE_OK;
}

raddle_status raddle_attention_spec_check(const raddle_attention_spec *given,
                                          raddle_attention_spec *out_spec) {
    raddle_attention_spec spec;
    RADDLE_TRY(raddle_struct_read("spec", given, sizeof spec, &spec));
    if (spec.kv_dtype == RADDLE_DTYPE_NONE) {
        spec.kv_dtype = spec.q_dtype;
    }
    if (spec.o_dtype == RADDLE_DTYPE_NONE) {
        spec.o_dtype = spec.q_dtype;
    }
    if (spec.head_dim_vo == 0) {
        spec.head_dim_vo = spec.head_dim_qk;
    }
    RADDLE_TRY(check_float_dtype("dtype", spec.q_dtype));
    RADDLE_REQUIRE(is_kv_dtype(spec.kv_dtype), RADDLE_ERR_DTYPE,
                   "kv_dtype: expected float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, "
                   "got %s",
                   raddle_dtype_name(spec.kv_dtype));
    RADDLE_TRY(check_float_dtype("o_dtype", spec.o_dtype));
    RADDLE_TRY(check_head_dim("head_dim", spec.head_dim_qk));
    RADDLE_TRY(check_head_dim("head_dim_vo", spec.head_dim_vo));
    RADDLE_REQUIRE(spec.num_kv_heads > 0 && spec.num_kv_heads <= MAX_HEADS, RADDLE_ERR_SHAPE,
                   "num_kv_heads: expected 1 to %d, got %d", MAX_HEADS, (int)spec.num_kv_heads);
    RADDLE_REQUIRE(spec.num_qo_heads > 0 && spec.num_qo_heads <= MAX_HEADS &&
                       spec.num_qo_heads % spec.num_kv_heads == 0,
                   RADDLE_ERR_SHAPE,
                   "num_qo_heads: expected a multiple of num_kv_heads (%d) up to %d, got %d",
                   (int)spec.num_kv_heads, MAX_HEADS, (int)spec.num_qo_heads);
    RADDLE_REQUIRE(spec.page_size >= 0 && spec.page_size <= 1 << 16, RADDLE_ERR_VALUE,
                   "page_size: expected 1 to %d tokens, got %d", 1 << 16, (int)spec.page_size);
    RADDLE_REQUIRE(spec.lse_base == RADDLE_LSE_BASE_2 || spec.lse_base == RADDLE_LSE_BASE_E,
                   RADDLE_ERR_VALUE, "lse_base: expected 2 or e");
    RADDLE_REQUIRE(isfinite(spec.sm_scale) && spec.sm_scale >= 0.0f, RADDLE_ERR_VALUE,
                   "sm_scale: expected a positive number, or 0 for 1/sqrt(head_dim); got %g",
                   (double)spec.sm_scale);
    if (spec.sm_scale == 0.0f) {
        spec.sm_scale = 1.0f / sqrtf((float)spec.head_dim_qk);
    }
    if (spec.window_left < 0) {
        spec.window_left = -1;
    }
    RADDLE_TRY(check_variant(&spec));
    RADDLE_TRY(check_limits(&spec));
    *out_spec = spec;
    return RADDLE_OK;
}

void raddle_attention_config_from_spec(const raddle_attention_spec *spec,
                                       raddle_attention_config *out_config) {
    raddle_attention_config config = {0};
    config.q_dtype = spec->q_dtype;
    config.kv_dtype = spec->kv_dtype;
    config.o_dtype = spec->o_dtype;
    config.head_dim_qk = spec->head_dim_qk;
    config.head_dim_vo = spec->head_dim_vo;
    config.num_qo_heads = spec->num_qo_heads;
    config.num_kv_heads = spec->num_kv_heads;
    config.group_size = spec->num_qo_heads / spec->num_kv_heads;
    config.page_size = spec->page_size;
    /* One query row sees every key of its request: the mask would never bite. */
    config.causal = spec->causal && spec->max_qo_len != 1;
    config.has_window = spec->window_left >= 0;
    config.has_soft_cap = spec->logits_soft_cap > 0.0f;
    config.has_rope = spec->pos_encoding == RADDLE_POS_ROPE;
    config.has_alibi = spec->pos_encoding == RADDLE_POS_ALIBI;
    config.has_sinks = spec->has_sinks;
    config.has_sigmoid = spec->weights == RADDLE_WEIGHTS_SIGMOID;
    config.hooks = spec->variant == NULL ? 0 : spec->variant->hooks;
    config.no_softmax = config.has_sigmoid || (spec->variant != NULL && spec->variant->no_softmax);
    *out_config = config;
}

/* Dimensions of one K or V tensor by meaning, whatever the layout. */
typedef struct kv_axes {
    int page, token, head; /* -1: absent */
} kv_axes;

static raddle_status describe_side(const raddle_tensor *tensor, kv_axes axes, int32_t page_size,
                                   const raddle_kv_cache *other, int64_t *out_strides,
                                   raddle_kv_cache *cache) {
    const int dim_axis = tensor->ndim - 1;
    RADDLE_TRY(raddle_tensor_check_inner_contiguous(tensor));
    const int64_t heads = tensor->shape[axes.head];
    RADDLE_REQUIRE(heads > 0 && heads <= INT32_MAX, RADDLE_ERR_SHAPE,
                   "%s: expected at least one head, got %lld", tensor->name, (long long)heads);
    if (axes.page >= 0) {
        RADDLE_REQUIRE(tensor->shape[axes.token] == page_size, RADDLE_ERR_SHAPE,
                       "%s: expected pages of %d tokens (page_size of the plan), got %lld; is the "
                       "kv_layout right?",
                       tensor->name, (int)page_size, (long long)tensor->shape[axes.token]);
    }
    const int64_t extent = axes.page >= 0 ? tensor->shape[axes.page] : tensor->shape[axes.token];
    const int64_t known = axes.page >= 0 ? cache->num_pages : cache->num_tokens;
    RADDLE_REQUIRE(other == NULL || (extent == known && heads == other->num_kv_heads),
                   RADDLE_ERR_SHAPE,
                   "%s: expected as many %s and heads as K has (%lld, %d), got (%lld, %lld)",
                   tensor->name, axes.page >= 0 ? "pages" : "rows", (long long)known,
                   (int)cache->num_kv_heads, (long long)extent, (long long)heads);
    RADDLE_REQUIRE(tensor->shape[dim_axis] <= INT32_MAX, RADDLE_ERR_SHAPE, "%s: head_dim is %lld",
                   tensor->name, (long long)tensor->shape[dim_axis]);
    cache->num_kv_heads = (int32_t)heads;
    cache->num_pages = axes.page >= 0 ? extent : 0;
    cache->num_tokens = axes.page >= 0 ? extent * page_size : extent;
    out_strides[0] = axes.page >= 0 ? tensor->stride[axes.page] : 0;
    out_strides[1] = tensor->stride[axes.token];
    out_strides[2] = tensor->stride[axes.head];
    return RADDLE_OK;
}

raddle_status raddle_kv_cache_from_tensors(const raddle_tensor *k_or_kv, const raddle_tensor *v,
                                           raddle_kv_layout layout, int32_t page_size,
                                           raddle_kv_cache *out_cache) {
    raddle_tensor k_view = *k_or_kv, v_view;
    const bool paged = page_size > 0;
    RADDLE_REQUIRE(layout == RADDLE_NHD || layout == RADDLE_HND, RADDLE_ERR_VALUE,
                   "kv_layout: expected NHD or HND");
    if (v == NULL) {
        RADDLE_REQUIRE(paged && k_view.ndim == 5 && k_view.shape[1] == 2, RADDLE_ERR_SHAPE,
                       "%s: expected one tensor of 5 dimensions [num_pages, 2, ...], or a (k, v) "
                       "pair; got %d dimensions",
                       k_view.name, (int)k_view.ndim);
        const int64_t split = k_view.stride[1];
        k_view.ndim = 4;
        memmove(&k_view.shape[1], &k_view.shape[2], 3 * sizeof k_view.shape[0]);
        memmove(&k_view.stride[1], &k_view.stride[2], 3 * sizeof k_view.stride[0]);
        v_view = k_view;
        if (v_view.data != NULL) {
            v_view.data = (char *)v_view.data + split * (int64_t)raddle_dtype_bytes(v_view.dtype);
        }
    } else {
        v_view = *v;
    }
    const int ndim = paged ? 4 : 3;
    RADDLE_REQUIRE(k_view.ndim == ndim && v_view.ndim == ndim, RADDLE_ERR_SHAPE,
                   "%s: expected %d dimensions for K and V %s, got %d and %d", k_view.name, ndim,
                   paged ? "[num_pages, page_size, num_kv_heads, head_dim]"
                         : "[tokens, num_kv_heads, head_dim]",
                   (int)k_view.ndim, (int)v_view.ndim);
    RADDLE_TRY(raddle_tensor_check_device(&v_view, k_view.device));
    const int first = paged ? 1 : 0;
    const kv_axes axes = {.page = paged ? 0 : -1,
                          .token = layout == RADDLE_NHD ? first : first + 1,
                          .head = layout == RADDLE_NHD ? first + 1 : first};
    raddle_kv_cache cache = {0};
    int64_t strides[3];
    RADDLE_TRY(describe_side(&k_view, axes, page_size, NULL, strides, &cache));
    cache.k_stride_page = strides[0];
    cache.k_stride_token = strides[1];
    cache.k_stride_head = strides[2];
    RADDLE_TRY(describe_side(&v_view, axes, page_size, &cache, strides, &cache));
    cache.v_stride_page = strides[0];
    cache.v_stride_token = strides[1];
    cache.v_stride_head = strides[2];
    cache.k = k_view.data;
    cache.v = v_view.data;
    cache.page_size = page_size;
    cache.head_dim_qk = (int32_t)k_view.shape[ndim - 1];
    cache.head_dim_vo = (int32_t)v_view.shape[ndim - 1];
    cache.k_dtype = k_view.dtype;
    cache.v_dtype = v_view.dtype;
    cache.device = k_view.device;
    cache.read_only = k_view.read_only || v_view.read_only;
    *out_cache = cache;
    return RADDLE_OK;
}

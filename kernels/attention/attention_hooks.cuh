/* attention_hooks.cuh - what a logit, a key or a finished row goes through on its way: the built-ins
 * that the config asks for, then the hooks of the user's variant.
 *
 * The variant's text stands before the kernel's (attention_variant.c); its struct raddle_variant lies
 * behind the params in the kernel's argument.
 */
#ifndef RADDLE_ATTENTION_HOOKS_CUH
#define RADDLE_ATTENTION_HOOKS_CUH

#include "attention/attention_params.h"
#include "attention/attention_variant.h"
#include "common/softmax.cuh"

#ifndef RADDLE_HAS_LOGIT /* no variant */
#define RADDLE_HAS_QUERY 0
#define RADDLE_HAS_KEY 0
#define RADDLE_HAS_LOGIT 0
#define RADDLE_HAS_MASK 0
#define RADDLE_HAS_STATE 0
#define RADDLE_HAS_OUTPUT 0
struct raddle_variant {};
struct kernel_params {
    raddle_attention_params base;
};
#else
struct kernel_params {
    raddle_attention_params base;
    raddle_variant variant;
};
#endif

/* Never called: what `if constexpr` leaves out must still have a name. */
#if !RADDLE_HAS_QUERY
raddle_pair raddle_variant_query(const raddle_variant *, const raddle_row *, int32_t, raddle_pair);
#endif
#if !RADDLE_HAS_KEY
raddle_pair raddle_variant_key(const raddle_variant *, const raddle_key *, int32_t, raddle_pair);
#endif
#if !RADDLE_HAS_LOGIT
float raddle_variant_logit(const raddle_variant *, const raddle_row *, int32_t, float);
#endif
#if !RADDLE_HAS_MASK
bool raddle_variant_mask(const raddle_variant *, const raddle_row *, int32_t);
#endif
#if !RADDLE_HAS_STATE
void raddle_variant_state(const raddle_variant *, const raddle_row *, float *, float *);
#endif
#if !RADDLE_HAS_OUTPUT
float raddle_variant_output(const raddle_variant *, const raddle_row *, int32_t, float);
#endif

namespace raddle {

constexpr bool SOFT_CAP = RADDLE_SOFT_CAP;
constexpr bool ALIBI = RADDLE_ALIBI;
constexpr bool ROPE = RADDLE_ROPE;
constexpr bool SINKS = RADDLE_SINKS;
constexpr bool SIGMOID = RADDLE_SIGMOID;
constexpr bool NO_SOFTMAX = RADDLE_NO_SOFTMAX;
constexpr bool HAS_QUERY = RADDLE_HAS_QUERY;
constexpr bool HAS_KEY = RADDLE_HAS_KEY;
constexpr bool HAS_LOGIT = RADDLE_HAS_LOGIT;
constexpr bool HAS_MASK = RADDLE_HAS_MASK;
constexpr bool HAS_STATE = RADDLE_HAS_STATE;
constexpr bool HAS_OUTPUT = RADDLE_HAS_OUTPUT;
constexpr bool QUERY_PAIRS = ROPE || HAS_QUERY;
constexpr bool KEY_PAIRS = ROPE || HAS_KEY;
constexpr bool PAIRS = QUERY_PAIRS || KEY_PAIRS;
constexpr bool EACH_LOGIT = SOFT_CAP || ALIBI || HAS_LOGIT || HAS_MASK || NO_SOFTMAX;
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

__device__ __forceinline__ const raddle_variant *variant_of(const raddle_attention_params &p) {
    return (const raddle_variant *)(&p + 1);
}

/* Packed row `row` of the request of a segment or merge, and a K/V head. */
template <typename work>
__device__ __forceinline__ raddle_row row_of(const raddle_attention_params &p, const work &of,
                                             int32_t kv_head, int32_t row) {
    const uint32_t token = raddle_divide((uint32_t)row, p.group_divisor);
    raddle_row r;
    r.token = of.qo_begin + (int64_t)token;
    r.request = of.request;
    r.qo_index = (int32_t)token;
    r.qo_len = of.qo_len;
    r.kv_len = of.kv_len;
    r.qo_head = kv_head * p.group_size + row - (int32_t)token * p.group_size;
    r.kv_head = kv_head;
    return r;
}

/* Keys that query token `token` of its request sees: [begin, end), within what the item sees. */
struct key_range {
    int32_t begin, end;
};

__device__ __forceinline__ key_range keys_of_token(const raddle_attention_params &p, int32_t qo_len,
                                                   int32_t kv_len, int32_t token) {
    const int32_t own = kv_len - qo_len + token;
    return key_range{p.window_left >= 0 && own > p.window_left ? own - p.window_left : 0,
                     p.causal ? min(own + 1, kv_len) : kv_len};
}

/* What scores of a head are multiplied with. */
__device__ __forceinline__ float scale_of_head(const raddle_attention_params &p, int32_t kv_head) {
    return (EACH_LOGIT ? p.sm_scale : p.sm_scale_log2) * (p.k_scales ? p.k_scales[kv_head] : 1.0f);
}

/* From a scaled score that the row sees to what softmax takes, in base 2, or to the weight itself.
 * False when the variant masks it. */
__device__ __forceinline__ bool finish_logit(const raddle_attention_params &p,
                                             const raddle_row &row, int32_t kv_index, float &x) {
    if constexpr (SOFT_CAP) {
        x = raddle_soft_cap(p.logits_soft_cap, x);
    }
    if constexpr (ALIBI) {
        x = raddle_alibi(raddle_alibi_slope(row.qo_head, p.num_qo_heads), &row, kv_index, x);
    }
    if constexpr (HAS_LOGIT) {
        x = raddle_variant_logit(variant_of(p), &row, kv_index, x);
    }
    if constexpr (SIGMOID) {
        x = raddle_sigmoid(x);
    }
    if constexpr (!NO_SOFTMAX) {
        x *= LOG2_E;
    }
    if constexpr (HAS_MASK) {
        return raddle_variant_mask(variant_of(p), &row, kv_index);
    }
    return true;
}

__device__ __forceinline__ raddle_pair finish_query(const raddle_attention_params &p,
                                                    const raddle_row &row, int32_t dim,
                                                    raddle_pair x) {
    if constexpr (ROPE) {
        const float2 turns = ((const float2 *)p.rope_turns)[dim];
        x = raddle_rotate(turns.x, turns.y, raddle_row_position(&row), x);
    }
    if constexpr (HAS_QUERY) {
        x = raddle_variant_query(variant_of(p), &row, dim, x);
    }
    return x;
}

__device__ __forceinline__ raddle_pair finish_key(const raddle_attention_params &p,
                                                  const raddle_key &key, int32_t dim,
                                                  raddle_pair x) {
    if constexpr (ROPE) {
        const float2 turns = ((const float2 *)p.rope_turns)[dim];
        x = raddle_rotate(turns.x, turns.y, key.kv_index, x);
    }
    if constexpr (HAS_KEY) {
        x = raddle_variant_key(variant_of(p), &key, dim, x);
    }
    return x;
}

/* All keys of a row are in: adds the sink, asks the variant. Returns what outputs are to be
 * multiplied with; 0 for a row that sees nothing. */
__device__ __forceinline__ float finish_row(const raddle_attention_params &p, const raddle_row &row,
                                            softmax_state &state) {
    const float out_scale = p.out_scale * (p.v_scales ? p.v_scales[row.kv_head] : 1.0f);
    if constexpr (NO_SOFTMAX) {
        return state.sum == 0.0f ? 0.0f : out_scale; /* the sum counts keys */
    }
    const bool empty = state.sum == 0.0f;
    float factor = out_scale;
    if constexpr (SINKS || HAS_STATE) {
        const float before = state.max;
        float max = state.max * LN_2;
        if constexpr (SINKS) {
            raddle_sink(p.sinks[row.qo_head], &max, &state.sum);
        }
        if constexpr (HAS_STATE) {
            raddle_variant_state(variant_of(p), &row, &max, &state.sum);
        }
        state.max = max * LOG2_E;
        factor *= empty ? 0.0f : exp2_fast(before - state.max);
    }
    return empty ? 0.0f : factor * reciprocal_fast(state.sum);
}

__device__ __forceinline__ float finish_output(const raddle_attention_params &p,
                                               const raddle_row &row, int32_t dim, float x) {
    if constexpr (HAS_OUTPUT) {
        x = raddle_variant_output(variant_of(p), &row, dim, x);
    }
    return x;
}

/* Of a row that finish_row has seen. */
__device__ __forceinline__ void write_lse(const raddle_attention_params &p, const raddle_row &row,
                                          const softmax_state &state) {
    if (p.lse) {
        p.lse[row.token * p.lse_stride_token + row.qo_head * p.lse_stride_head] =
            state.sum == 0.0f ? negative_infinity() : (state.max + log2f(state.sum)) * p.lse_scale;
    }
}

} // namespace raddle

#endif

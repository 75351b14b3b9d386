/* ops_sample.cu - one token per row of logits or of probabilities: greedy, or drawn after min_p,
 * top_k and top_p; sm_80 and later.
 *
 * What      ops_sample_params.h defines weights and random numbers; the token is the same as the
 *           CPU's.
 * Grid      one CTA per row; its warps divide the vocabulary in contiguous ranges.
 * Passes    maximum (greedy ends here) | min_p of logits: 1 | top_k, top_p: 4 each (3 for 16-bit
 *           values) | weights of each warp's range | one warp searches its range. All but the first
 *           read the L2.
 * Shared    two halves of 2048 sums, and one sum per warp.
 * Bound     the L2 bandwidth of one SM: 128256 float32 take about 5 us a pass.
 */
#include "common/copy.cuh"
#include "ops/ops_block.cuh"
#include "ops/ops_params.h"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr int VECTOR = RADDLE_VECTOR;
constexpr bool IS_PROBS = RADDLE_IS_PROBS;
using logits_row = row_of_logits<type, VECTOR>;

/* Device arrays are not checked: a value out of range acts like the nearest in range. */
__device__ __forceinline__ raddle_ops_sample_row settings_of(const raddle_ops_sample_params &p,
                                                             int64_t i) {
    const raddle_ops_sample_call &c = p.call;
    raddle_ops_sample_row s = p.settings[c.settings_step ? i : 0];
    s.temperature = c.temperature ? c.temperature[i * c.temperature_stride] : s.temperature;
    s.temperature = s.temperature > 0 ? s.temperature : 0;
    s.top_p = c.top_p ? c.top_p[i * c.top_p_stride] : s.top_p;
    s.min_p = c.min_p ? c.min_p[i * c.min_p_stride] : s.min_p;
    s.min_p = s.min_p < 1 ? s.min_p : 1;
    s.top_k = c.top_k ? c.top_k[i * c.top_k_stride] : s.top_k;
    s.seed = c.seed ? (uint64_t)c.seed[i * c.seed_stride] : s.seed;
    s.offset = c.offset ? (uint64_t)c.offset[i * c.offset_stride] : s.offset;
    return s;
}

/* The least key of a token at least min_p times as likely as the likeliest. */
__device__ __forceinline__ uint32_t min_p_key(const logits_row &row, selection_shared &s,
                                              const amounts<IS_PROBS> &amount, float min_p) {
    if constexpr (IS_PROBS) {
        return raddle_ops_key(__fmul_rn(min_p, amount.max));
    } else {
        const uint64_t least = (uint64_t)raddle_ops_min_weight(min_p);
        uint32_t least_key = 0xffffffffu;
        row.each([&](float x, int64_t) {
            const uint32_t key = raddle_ops_key(x);
            if (key < least_key && amount.weight(x) >= least) {
                least_key = key;
            }
        });
        return ~(uint32_t)max_block(~least_key, s.scratch);
    }
}

__device__ __forceinline__ uint32_t least_kept_key(const logits_row &row, selection_shared &s,
                                                   amounts<IS_PROBS> amount,
                                                   const raddle_ops_sample_row &settings,
                                                   bool is_joint) {
    uint32_t least_key = 0;
    if (settings.min_p > 0) {
        least_key = min_p_key(row, s, amount, settings.min_p);
    }
#pragma unroll 1
    for (int by_weight = 0; by_weight < 2; by_weight++) {
        amount.by_weight = by_weight != 0;
        if (by_weight ? settings.top_p < 1 : settings.top_k > 0 && settings.top_k < row.vocab) {
            const bool of_all = by_weight && is_joint;
            const uint32_t key = select_key(row, s, amount, of_all ? 0 : least_key);
            least_key = key > least_key ? key : least_key;
        }
    }
    return least_key;
}

/* Where the row's values lie; NULL when indices say that they lie nowhere. */
__device__ __forceinline__ const type *input_of(const raddle_ops_sample_call &c, int64_t i) {
    const int64_t input =
        c.indices ? raddle_ops_index(c.indices, i * c.indices_stride, c.indices_are_i64) : i;
    const bool is_there = input >= 0 && input < c.num_inputs;
    return is_there ? (const type *)c.x + input * c.x_stride_row : nullptr;
}

__device__ __forceinline__ void write_token(const raddle_ops_sample_call &c, int64_t i,
                                            int64_t token, bool is_valid) {
    token = is_valid ? token : c.valid ? 0 : -1;
    if (c.out_is_i64) {
        ((int64_t *)c.out)[i * c.out_stride] = token;
    } else {
        ((int32_t *)c.out)[i * c.out_stride] = (int32_t)token;
    }
    if (c.valid) {
        c.valid[i * c.valid_stride] = is_valid;
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
    ops_sample(const __grid_constant__ raddle_ops_sample_params p) {
    __shared__ selection_shared s;
    const raddle_ops_sample_call &c = p.call;
    const int64_t i = blockIdx.x;
    const float infinity = __uint_as_float(0x7f800000u);
    launch_dependents();
    wait_for_predecessors();
    const type *data = input_of(c, i);
    const logits_row row(data, data ? c.vocab : 0);
    const uint64_t best = first_maximum(row, s.scratch);
    const float max = value_of_key((uint32_t)(best >> 32));
    const raddle_ops_sample_row settings = settings_of(p, i);
    const bool is_drawable = IS_PROBS ? max > 0 && max < infinity : max > -infinity;
    if (best == 0 || !is_drawable || settings.temperature == 0) {
        if (threadIdx.x == 0) {
            write_token(c, i, (uint32_t) ~(uint32_t)best, best != 0 && is_drawable);
        }
        return;
    }
    amounts<IS_PROBS> amount;
    amount.max = max;
    amount.factor =
        IS_PROBS ? raddle_ops_prob_factor(max) : raddle_ops_weight_factor(settings.temperature);
    amount.per_unit = amount.factor * ((BINS - 1) / 41.0f); /* weights end 41 octaves down */
    amount.top_k = settings.top_k;
    amount.top_p = settings.top_p;
    const uint32_t least_key = least_kept_key(row, s, amount, settings, c.is_joint);
    const uint32_t stream = c.is_row_stream ? (uint32_t)(c.first_row + i) : 0;
    const uint64_t random = raddle_ops_random(settings.seed, settings.offset, stream, 0);
    const bool is_drawn = draw_token(
        row, s.scratch, random,
        [&](float x, int64_t) { return raddle_ops_key(x) >= least_key ? amount.weight(x) : 0; },
        [&](int64_t token) { write_token(c, i, token, true); });
    if (!is_drawn && threadIdx.x == 0) {
        write_token(c, i, 0, false);
    }
}

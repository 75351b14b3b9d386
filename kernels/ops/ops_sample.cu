/* ops_sample.cu - one token per row of logits: greedy, or drawn after min_p, top_k and top_p; sm_80
 * and later.
 *
 * What      ops_sample_params.h defines weights and random numbers; the token is the same as the
 * CPU's. Grid      one CTA per row; its warps divide the vocabulary in contiguous ranges. Passes
 * maximum (greedy ends here) | min_p: 1 | top_k, top_p: 4 each (3 for 16-bit logits) | weights of
 * each warp's range | one warp searches its range. All but the first read the L2. Shared    two
 * halves of 2048 sums, and one sum per warp. Bound     the L2 bandwidth of one SM: 128256 float32
 * take about 5 us a pass.
 */
#include "common/copy.cuh"
#include "ops/ops_block.cuh"
#include "ops/ops_params.h"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr int VECTOR = RADDLE_VECTOR;
using logits_row = row_of_logits<type, VECTOR>;

/* Device arrays are not checked: a value out of range acts like the nearest in range. */
__device__ __forceinline__ raddle_ops_sample_row settings_of(const raddle_ops_sample_params &p,
                                                             int64_t i) {
    raddle_ops_sample_row s = p.settings[p.settings_step ? i : 0];
    s.temperature = p.temperature ? p.temperature[i] : s.temperature;
    s.temperature = s.temperature > 0 ? s.temperature : 0;
    s.top_p = p.top_p ? p.top_p[i] : s.top_p;
    s.min_p = p.min_p ? p.min_p[i] : s.min_p;
    s.min_p = s.min_p < 1 ? s.min_p : 1;
    s.top_k = p.top_k ? p.top_k[i] : s.top_k;
    s.seed = p.seed ? (uint64_t)p.seed[i] : s.seed;
    s.offset = p.offset ? (uint64_t)p.offset[i] : s.offset;
    return s;
}

/* The least key of a token at least min_p times as likely as the likeliest. */
__device__ __forceinline__ uint32_t min_p_key(const logits_row &row, selection_shared &s, float max,
                                              float factor, float min_p) {
    const int64_t least = raddle_ops_min_weight(min_p);
    uint32_t least_key = 0xffffffffu;
    row.each([&](float x, int64_t) {
        const uint32_t key = raddle_ops_key(x);
        if (key < least_key && raddle_ops_weight(x, max, factor) >= least) {
            least_key = key;
        }
    });
    return ~(uint32_t)max_block(~least_key, s.scratch);
}

__device__ __forceinline__ uint32_t least_kept_key(const logits_row &row, selection_shared &s,
                                                   float max, float factor,
                                                   const raddle_ops_sample_row &settings) {
    /* Weights end 41 binary orders below the maximum: the bins cover just that. */
    const float bins_per_unit = factor * ((BINS - 1) / 41.0f);
    uint32_t least_key = 0;
    if (settings.min_p > 0) {
        least_key = min_p_key(row, s, max, factor, settings.min_p);
    }
#pragma unroll 1
    for (int by_weight = 0; by_weight < 2; by_weight++) {
        const amounts amount = {by_weight != 0, max, factor, settings.top_k, settings.top_p};
        if (by_weight ? settings.top_p < 1 : settings.top_k > 0 && settings.top_k < row.vocab) {
            least_key = select_key(row, s, amount, bins_per_unit, least_key);
        }
    }
    return least_key;
}

/* The lane, step by step through the warp's range, at which the running sum of weights passes left.
 */
__device__ __forceinline__ void search_range(const logits_row &row, float max, float factor,
                                             uint32_t least_key, uint64_t left, int32_t *out) {
    bool found = false;
    const auto weight = [&](float x, bool is_there) {
        const bool may_be_drawn = is_there && raddle_ops_key(x) >= least_key;
        return may_be_drawn ? (uint64_t)raddle_ops_weight(x, max, factor) : 0;
    };
    row.each_step([&](const float(&x)[VECTOR], int64_t i, int count) {
        uint64_t sum = 0;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            sum += weight(x[j], j < count);
        }
        uint64_t end = sum; /* over the lanes up to this one */
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes <<= 1) {
            const uint64_t below = shuffle_up(end, lanes);
            end += threadIdx.x % 32 >= lanes ? below : 0;
        }
        const uint64_t begin = end - sum;
        if (!found && begin <= left && left < end) {
            uint64_t inside = begin;
            int j = -1;
#pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                inside += weight(x[k], k < count);
                j = j < 0 && inside > left ? k : j;
            }
            *out = (int32_t)(i + j);
        }
        const uint64_t step = (uint64_t)__shfl_sync(ALL_LANES, (uint32_t)(end >> 32), 31) << 32 |
                              __shfl_sync(ALL_LANES, (uint32_t)end, 31);
        found |= left < step;
        left -= found ? 0 : step;
    });
}

} // namespace

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
    ops_sample(const __grid_constant__ raddle_ops_sample_params p) {
    __shared__ selection_shared s;
    const int64_t i = blockIdx.x;
    const logits_row row((const type *)p.logits + i * p.logits_stride_row, p.vocab);
    int32_t *out = p.out + i * p.out_stride;
    launch_dependents();
    wait_for_predecessors();
    const uint64_t best = first_maximum(row, s.scratch);
    const float max = value_of_key((uint32_t)(best >> 32));
    const raddle_ops_sample_row settings = settings_of(p, i);
    const bool is_bad = best == 0 || max == -__uint_as_float(0x7f800000u);
    if (is_bad || settings.temperature == 0) {
        if (threadIdx.x == 0) {
            *out = is_bad ? -1 : (int32_t) ~(uint32_t)best;
        }
        return;
    }
    const float factor = raddle_ops_weight_factor(settings.temperature);
    const uint32_t least_key = least_kept_key(row, s, max, factor, settings);
    uint64_t mine = 0;
    row.each([&](float x, int64_t) {
        if (raddle_ops_key(x) >= least_key) {
            mine += (uint64_t)raddle_ops_weight(x, max, factor);
        }
    });
#pragma unroll
    for (int bit = 1; bit < 32; bit <<= 1) {
        mine += shuffle_xor(mine, bit);
    }
    /* Sums of the warps' ranges; the barrier before separates them from earlier uses of scratch. */
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        s.scratch[threadIdx.x / 32] = mine;
    }
    __syncthreads();
    uint64_t total = 0, begin = 0;
    for (int w = 0; w < ROW_WARPS; w++) {
        begin = w == threadIdx.x / 32 ? total : begin;
        total += s.scratch[w];
    }
    const uint64_t random = raddle_ops_random(settings.seed, settings.offset);
    const uint64_t left = (uint64_t)raddle_ops_random_below(random, (int64_t)total);
    if (begin <= left && left < begin + mine) {
        search_range(row, max, factor, least_key, left - begin, out);
    }
}

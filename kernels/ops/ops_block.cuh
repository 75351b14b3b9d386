/* ops_block.cuh - one CTA over one row of logits or probabilities: passes, reductions, the selection
 * of the largest, and drawing by weight.
 *
 * The CTA's warps divide the row in contiguous ranges, so that order over the vocabulary is order
 * over warps, then over steps of a warp, then over lanes.
 */
#ifndef RADDLE_OPS_BLOCK_CUH
#define RADDLE_OPS_BLOCK_CUH

#include "common/reduce.cuh"
#include "ops/ops_sample_params.h"
#include "ops/ops_vector.cuh"

namespace raddle {

constexpr int ROW_THREADS = 1024;
constexpr int ROW_WARPS = ROW_THREADS / 32;

/* One row, and where this warp works. VECTOR elements per lane and step. */
template <typename T, int VECTOR> struct row_of_logits {
    const T *data;
    int64_t vocab;
    int64_t begin, end; /* this warp's range; begin a multiple of VECTOR */

    __device__ __forceinline__ row_of_logits(const T *row, int64_t count)
        : data(row), vocab(count) {
        constexpr int64_t STEP = 32 * VECTOR;
        const int64_t steps = (count + STEP * ROW_WARPS - 1) / (STEP * ROW_WARPS);
        const int64_t first = (threadIdx.x / 32) * steps * STEP;
        begin = first < count ? first : count;
        end = first + steps * STEP < count ? first + steps * STEP : count;
    }

    /* Calls body(values, index of the first, how many of them are in the row) for each step, all
     * lanes of the warp together; lanes past the end get 0 values. */
    template <typename F> __device__ __forceinline__ void each_step(F body) const {
        for (int64_t step = begin; step < end; step += 32 * VECTOR) {
            const int64_t i = step + (threadIdx.x % 32) * VECTOR;
            float x[VECTOR];
            int count = 0;
            if (i + VECTOR <= vocab) {
                load_vector<T, VECTOR>(x, data + i);
                count = VECTOR;
            } else {
#pragma unroll
                for (int j = 0; j < VECTOR; j++) {
                    x[j] = i + j < vocab ? to_float(data[i + j]) : 0.0f;
                    count += i + j < vocab;
                }
            }
            body(x, i, count);
        }
    }

    /* Calls body(value, index) for each element of this thread. */
    template <typename F> __device__ __forceinline__ void each(F body) const {
        each_step([&](const float(&x)[VECTOR], int64_t i, int count) {
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                if (j < count) {
                    body(x[j], i + j);
                }
            }
        });
    }
};

/* ------------------------------------------------------------------ reductions */

__device__ __forceinline__ uint64_t shuffle_xor(uint64_t x, int bit) {
    const uint32_t low = __shfl_xor_sync(ALL_LANES, (uint32_t)x, bit);
    const uint32_t high = __shfl_xor_sync(ALL_LANES, (uint32_t)(x >> 32), bit);
    return (uint64_t)high << 32 | low;
}

__device__ __forceinline__ uint64_t shuffle_up(uint64_t x, int lanes) {
    const uint32_t low = __shfl_up_sync(ALL_LANES, (uint32_t)x, lanes);
    const uint32_t high = __shfl_up_sync(ALL_LANES, (uint32_t)(x >> 32), lanes);
    return (uint64_t)high << 32 | low;
}

/* combine over the CTA; every thread gets the result. Barriers: scratch is free before, written,
 * read. */
template <typename F>
__device__ __forceinline__ uint64_t reduce_block(uint64_t x, uint64_t *scratch, F combine) {
#pragma unroll
    for (int bit = 1; bit < 32; bit <<= 1) {
        x = combine(x, shuffle_xor(x, bit));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = scratch[threadIdx.x % 32];
#pragma unroll
    for (int bit = 1; bit < 32; bit <<= 1) {
        x = combine(x, shuffle_xor(x, bit));
    }
    return x;
}

__device__ __forceinline__ uint64_t sum_block(uint64_t x, uint64_t *scratch) {
    return reduce_block(x, scratch, [](uint64_t a, uint64_t b) { return a + b; });
}

__device__ __forceinline__ uint64_t max_block(uint64_t x, uint64_t *scratch) {
    return reduce_block(x, scratch, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

__device__ __forceinline__ float sum_block(float x, uint64_t *scratch) {
    const uint64_t bits = reduce_block(__float_as_uint(x), scratch, [](uint64_t a, uint64_t b) {
        return (uint64_t)__float_as_uint(__uint_as_float((uint32_t)a) +
                                         __uint_as_float((uint32_t)b));
    });
    return __uint_as_float((uint32_t)bits);
}

/* Sum of x over the threads before this one. */
__device__ __forceinline__ uint64_t sum_before(uint64_t x, uint64_t *scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t sum = x;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes <<= 1) {
        const uint64_t below = shuffle_up(sum, lanes);
        sum += lane >= lanes ? below : 0;
    }
    __syncthreads();
    if (lane == 31) {
        scratch[warp] = sum;
    }
    __syncthreads();
    for (int w = 0; w < warp; w++) {
        sum += scratch[w];
    }
    return sum - x;
}

/* ------------------------------------------------------------------ maximum */

/* The largest value and the first place where it stands, packed as key << 32 | ~index; 0 when the
 * row holds NaN. */
template <typename T, int VECTOR>
__device__ __forceinline__ uint64_t first_maximum(const row_of_logits<T, VECTOR> &row,
                                                  uint64_t *scratch) {
    uint64_t best = 0;
    bool has_nan = false;
    row.each([&](float x, int64_t i) {
        const uint64_t candidate = (uint64_t)raddle_ops_key(x) << 32 | (uint32_t) ~(uint32_t)i;
        has_nan |= x != x;
        best = candidate > best ? candidate : best;
    });
    best = max_block(best, scratch);
    return __syncthreads_or(has_nan) ? 0 : best;
}

__device__ __forceinline__ float value_of_key(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* ------------------------------------------------------------------ selection */

constexpr int BINS = 2048;

struct selection_shared {
    uint32_t low[BINS],
        high[BINS]; /* sums of 64 bits in two halves: shared memory adds 32 bits at a time */
    uint64_t scratch[ROW_WARPS];
    uint64_t need;
    int bin;
};

/* Exact, whatever the order: the thread that makes the low half wrap carries into the high one. */
__device__ __forceinline__ void add_to_bin(selection_shared &s, int bin, uint64_t amount) {
    const uint32_t part = (uint32_t)amount;
    const uint32_t before = atomicAdd(&s.low[bin], part);
    const uint32_t carry = (uint32_t)(amount >> 32) + (before + part < before);
    if (carry) {
        atomicAdd(&s.high[bin], carry);
    }
}

/* The bin, from the top, in which the running sum reaches s.need, which becomes what is missing at
 * its lower edge. Barriers: bins are complete before; s.bin and s.need are written, then read by
 * all. */
__device__ __forceinline__ int find_bin(selection_shared &s) {
    constexpr int PER_THREAD = BINS / ROW_THREADS;
    const int top = BINS - 1 - PER_THREAD * (int)threadIdx.x;
    uint64_t amounts[PER_THREAD], sum = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        amounts[i] = (uint64_t)s.high[top - i] << 32 | s.low[top - i];
        sum += amounts[i];
    }
    uint64_t before = sum_before(sum, s.scratch);
    const uint64_t need = s.need;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        if (before < need && before + amounts[i] >= need) {
            s.bin = top - i;
            s.need = need - before;
        }
        before += amounts[i];
    }
    __syncthreads();
    return s.bin;
}

__device__ __forceinline__ void clear_bins(selection_shared &s) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += ROW_THREADS) {
        s.low[bin] = 0;
        s.high[bin] = 0;
    }
    __syncthreads();
}

/* How the values of a row count in a selection: 1 each that may be drawn at all, or by weight. */
template <bool IS_PROBS> struct amounts {
    bool by_weight;
    float max, factor; /* of weights */
    float per_unit;    /* of logits: bins for a distance of 1 from the maximum */
    int32_t top_k;     /* not by weight: how many to keep */
    float top_p;       /* by weight: the share to keep */

    __device__ __forceinline__ uint64_t weight(float x) const {
        return (uint64_t)(IS_PROBS ? raddle_ops_prob_weight(x, factor)
                                   : raddle_ops_weight(x, max, factor));
    }
    __device__ __forceinline__ uint64_t of(float x) const {
        const bool is_alive = IS_PROBS ? x > 0 : x > -__uint_as_float(0x7f800000u);
        return by_weight ? weight(x) : is_alive;
    }
    __device__ __forceinline__ uint64_t wanted(uint64_t total) const {
        return by_weight ? (uint64_t)raddle_ops_top_p_mass(top_p, (int64_t)total) : (uint64_t)top_k;
    }
    /* A first cut of values into bins, monotone: by distance from the maximum, where logits spread
     * better than by bits; a probability's bits are a logarithm already, 32 bins an octave. */
    __device__ __forceinline__ int bin(float x) const {
        if constexpr (IS_PROBS) {
            const uint32_t down = (raddle_ops_key(max) - raddle_ops_key(x)) >> 18;
            return down < BINS - 1 ? BINS - 1 - (int)down : 0;
        } else {
            const float down = x == max ? 0.0f : __fmul_rn(__fsub_rn(max, x), per_unit);
            return down < (float)(BINS - 1) ? BINS - 1 - (int)down : 0;
        }
    }
};

/* The largest key such that the elements at or above it, among those with a key of at least
 * least_key, amount to what is wanted; least_key when they do not. A bin by distance first, then
 * the digits of the key inside that bin: each pass reads the row again. Loops are not unrolled:
 * their bodies are long, and compiling takes time too. */
template <typename T, int VECTOR, bool IS_PROBS>
__device__ __forceinline__ uint32_t select_key(const row_of_logits<T, VECTOR> &row,
                                               selection_shared &s, const amounts<IS_PROBS> &amount,
                                               uint32_t least_key) {
    uint64_t total = 0;
    clear_bins(s);
    row.each([&](float x, int64_t) {
        if (raddle_ops_key(x) >= least_key) {
            const uint64_t a = amount.of(x);
            total += a;
            if (a > 0) {
                add_to_bin(s, amount.bin(x), a);
            }
        }
    });
    total = sum_block(total, s.scratch);
    const uint64_t wanted = amount.wanted(total);
    if (wanted > total || total == 0) {
        return least_key;
    }
    if (threadIdx.x == 0) {
        s.need = wanted;
    }
    const int first_bin = find_bin(s);
    constexpr int DIGITS =
        is_same<T, f32>::value ? 3 : 2; /* widened 16-bit floats have zeros below bit 10 */
    uint32_t prefix = 0, mask = 0;
#pragma unroll 1
    for (int digit = 0; digit < DIGITS; digit++) {
        const int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
        const uint32_t digit_mask = digit == 2 ? 1023 : BINS - 1;
        clear_bins(s);
        row.each([&](float x, int64_t) {
            const uint32_t key = raddle_ops_key(x);
            const bool is_inside = (key & mask) == prefix && key >= least_key;
            if (is_inside && amount.bin(x) == first_bin) {
                add_to_bin(s, key >> shift & digit_mask, amount.of(x));
            }
        });
        prefix |= (uint32_t)find_bin(s) << shift;
        mask |= digit_mask << shift;
    }
    return prefix;
}

/* ------------------------------------------------------------------ drawing */

/* The lane, step by step through the warp's range, at which the running sum of weight(value, index)
 * passes left; it calls write(index). */
template <typename T, int VECTOR, typename W, typename F>
__device__ __forceinline__ void search_range(const row_of_logits<T, VECTOR> &row, uint64_t left,
                                             W weight, F write) {
    bool found = false;
    row.each_step([&](const float(&x)[VECTOR], int64_t i, int count) {
        uint64_t sum = 0;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            sum += j < count ? weight(x[j], i + j) : 0;
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
                inside += k < count ? weight(x[k], i + k) : 0;
                j = j < 0 && inside > left ? k : j;
            }
            write(i + j);
        }
        const uint64_t step = (uint64_t)__shfl_sync(ALL_LANES, (uint32_t)(end >> 32), 31) << 32 |
                              __shfl_sync(ALL_LANES, (uint32_t)end, 31);
        found |= left < step;
        left -= found ? 0 : step;
    });
}

/* Draws from the row by weight(value, index), with 64 random bits: one thread calls write(index).
 * False, for all, when every weight is 0. Barriers: scratch is free before, written, read. */
template <typename T, int VECTOR, typename W, typename F>
__device__ __forceinline__ bool draw_token(const row_of_logits<T, VECTOR> &row, uint64_t *scratch,
                                           uint64_t random, W weight, F write) {
    uint64_t mine = 0; /* of this warp's range */
    row.each([&](float x, int64_t i) { mine += weight(x, i); });
#pragma unroll
    for (int bit = 1; bit < 32; bit <<= 1) {
        mine += shuffle_xor(mine, bit);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = mine;
    }
    __syncthreads();
    uint64_t total = 0, begin = 0;
    for (int w = 0; w < ROW_WARPS; w++) {
        begin = w == threadIdx.x / 32 ? total : begin;
        total += scratch[w];
    }
    const uint64_t left = (uint64_t)raddle_ops_random_below(random, (int64_t)total);
    if (begin <= left && left < begin + mine) {
        search_range(row, left - begin, weight, write);
    }
    return total > 0;
}

} // namespace raddle

#endif

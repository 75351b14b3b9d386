/* ops_logprobs.cu - log-probability of one token per row, and of the top most likely ones; sm_80
 * and later.
 *
 * Grid      one CTA per row; its warps divide the vocabulary in contiguous ranges.
 * Passes    maximum | sum of exponentials | top: 4 for the least key (3 for 16-bit logits), 1 to
 * collect. All but the first read the L2. The collected ones are ordered by rank: each counts those
 * before it. Shared    two halves of 2048 sums, and the list of up to RADDLE_OPS_MAX_TOP.
 */
#include "common/copy.cuh"
#include "ops/ops_block.cuh"
#include "ops/ops_params.h"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr int VECTOR = RADDLE_VECTOR;
using logits_row = row_of_logits<type, VECTOR>;

/* Largest first, ties by lower id: key << 32 | ~id in descending order. */
struct top_shared {
    uint64_t list[RADDLE_OPS_MAX_TOP];
    int32_t count;
};

/* Fills the list with the top largest: all above the least key, and of those that equal it the
 * first ones. */
__device__ __forceinline__ void collect_top(const logits_row &row, selection_shared &s,
                                            top_shared &t, uint32_t least_key, int32_t top) {
    uint64_t ties = 0;
    if (threadIdx.x == 0) {
        t.count = 0;
    }
    __syncthreads();
    row.each([&](float x, int64_t i) {
        const uint32_t key = raddle_ops_key(x);
        if (key > least_key) {
            t.list[atomicAdd(&t.count, 1)] = (uint64_t)key << 32 | (uint32_t) ~(uint32_t)i;
        }
        ties += key == least_key;
    });
    /* Ties before this warp's range. */
#pragma unroll
    for (int bit = 1; bit < 32; bit <<= 1) {
        ties += shuffle_xor(ties, bit);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        s.scratch[threadIdx.x / 32] = ties;
    }
    __syncthreads();
    int64_t place = t.count;
    for (int w = 0; w < threadIdx.x / 32; w++) {
        place += (int64_t)s.scratch[w];
    }
    if (ties == 0 || place >= top) {
        return;
    }
    row.each_step([&](const float(&x)[VECTOR], int64_t i, int count) {
        uint32_t mine = 0;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            mine += j < count && raddle_ops_key(x[j]) == least_key;
        }
        uint32_t end = mine;
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes <<= 1) {
            const uint32_t below = __shfl_up_sync(ALL_LANES, end, lanes);
            end += threadIdx.x % 32 >= lanes ? below : 0;
        }
        int64_t at = place + end - mine;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            if (j < count && raddle_ops_key(x[j]) == least_key) {
                if (at < top) {
                    t.list[at] = (uint64_t)least_key << 32 | (uint32_t) ~(uint32_t)(i + j);
                }
                at++;
            }
        }
        place += __shfl_sync(ALL_LANES, end, 31);
    });
}

} // namespace

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
    ops_logprobs(const __grid_constant__ raddle_ops_logprobs_params p) {
    __shared__ selection_shared s;
    __shared__ top_shared t;
    const float infinity = __uint_as_float(0x7f800000u), nan = __uint_as_float(0x7fc00000u);
    const int64_t i = blockIdx.x;
    const type *data = (const type *)p.logits + i * p.logits_stride_row;
    const logits_row row(data, p.vocab);
    launch_dependents();
    wait_for_predecessors();
    const uint64_t best = first_maximum(row, s.scratch);
    const float max = value_of_key((uint32_t)(best >> 32));
    float sum = 0;
    row.each([&](float x, int64_t) { sum += x == max ? 1.0f : expf(x - max); });
    sum = sum_block(sum, s.scratch);
    const bool is_bad = best == 0 || max == -infinity;
    const float log_sum = is_bad ? nan : logf(sum);
    if (threadIdx.x == 0) {
        const int64_t id = load_index(p.ids, i * p.ids_stride, p.ids_are_i64);
        p.logprobs[i] = id >= 0 && id < p.vocab ? to_float(data[id]) - max - log_sum : nan;
    }
    if (p.top == 0) {
        return;
    }
    if (is_bad) { /* the order of NaN means nothing */
        for (int at = threadIdx.x; at < p.top; at += ROW_THREADS) {
            p.top_ids[i * p.top + at] = at;
            p.top_logprobs[i * p.top + at] = nan;
        }
        return;
    }
    /* Bins for 40 units below the maximum, where the likeliest lie; what is further down shares the
     * last one. */
    const amounts<false> amount = {false, max, 0.0f, (BINS - 1) / 40.0f, p.top, 0.0f};
    const uint32_t least_key = select_key(row, s, amount, 0);
    collect_top(row, s, t, least_key, p.top);
    __syncthreads(); /* the list is complete */
    for (int at = threadIdx.x; at < p.top; at += ROW_THREADS) {
        const uint64_t mine = t.list[at];
        int rank = 0;
        for (int other = 0; other < p.top; other++) {
            rank += t.list[other] > mine;
        }
        p.top_ids[i * p.top + rank] = (int32_t) ~(uint32_t)mine;
        p.top_logprobs[i * p.top + rank] = value_of_key((uint32_t)(mine >> 32)) - max - log_sum;
    }
}

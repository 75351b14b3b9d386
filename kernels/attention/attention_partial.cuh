/* attention_partial.cuh - what the attention kernels share: where a packed row lies, results,
 * partials and their merge.
 */
#ifndef RADDLE_ATTENTION_PARTIAL_CUH
#define RADDLE_ATTENTION_PARTIAL_CUH

#include "attention/attention_params.h"
#include "common/copy.cuh"
#include "common/softmax.cuh"
#include "common/types.cuh"

namespace raddle {

/* Row `row` of a request and K/V head: its query token and query head. */
struct row_place {
    int64_t token;
    int64_t head;
};

__device__ __forceinline__ row_place place_of_row(const raddle_attention_params &p,
                                                  int32_t qo_begin, int32_t kv_head, int32_t row) {
    const unsigned group = (unsigned)p.group_size;
    const unsigned token = (unsigned)row / group;
    return row_place{qo_begin + (int64_t)token,
                     kv_head * (int64_t)group + ((unsigned)row - token * group)};
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

/* Four neighbouring outputs of one row; the thread with the first of them writes the lse too. */
template <typename out_type>
__device__ __forceinline__ void write_result(const raddle_attention_params &p,
                                             const row_place &place, int32_t dim,
                                             const float (&acc)[4], const softmax_state &state) {
    const bool empty = state.sum == 0.0f; /* sees nothing: exactly 0 */
    const float inverse = reciprocal_fast(state.sum);
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = empty ? 0.0f : acc[i] * inverse;
    }
    out_type *out =
        (out_type *)p.out + place.token * p.out_stride_token + place.head * p.out_stride_head + dim;
    store4<out_type>(out, x);
    if (dim == 0 && p.lse) {
        p.lse[place.token * p.lse_stride_token + place.head * p.lse_stride_head] =
            empty ? negative_infinity() : (state.max + log2f(state.sum)) * p.lse_scale;
    }
}

/* Index of a row of a partial, in rows. */
__device__ __forceinline__ int64_t partial_row(const raddle_attention_params &p, int32_t slot,
                                               int32_t heads_per_item, int32_t head, int32_t row) {
    return ((int64_t)slot * heads_per_item + head) * p.tile_rows + row;
}

/* Counts this segment's partial in. True on all threads of the CTA when it was the last of its
 * item: then the counter is 0 again for the next launch. `is_last` is one word of shared memory. */
__device__ __forceinline__ bool arrive_at_merge(const raddle_attention_params &p, int32_t merge,
                                                int32_t *is_last) {
    __syncthreads(); /* every thread's part of the partial is written -> thread 0 publishes it */
    if (threadIdx.x == 0) {
        const int32_t others = arrive(&p.arrivals[merge]);
        *is_last = others == p.merges[merge].num_arrivals - 1;
        if (*is_last) {
            p.arrivals[merge] = 0;
        }
    }
    __syncthreads(); /* thread 0 has seen the other partials -> every thread may read them */
    return *is_last != 0;
}

/* Adds the partials of an item up in slot order, whoever arrives last, and writes the results. All
 * threads of the CTA take part, each with four neighbouring outputs of a row at a time. IN_FLIGHT:
 * partials loaded before the first is used. */
template <typename out_type, int HEADS_PER_ITEM, int HEAD_DIM_VO, int THREADS, int IN_FLIGHT>
__device__ __forceinline__ void merge_partials(const raddle_attention_params &p,
                                               int32_t merge_index) {
    constexpr int QUADS = HEAD_DIM_VO / 4;
    const raddle_attention_merge merge = p.merges[merge_index];
    const int32_t qo_begin = p.requests[merge.request].qo_begin;
    const int32_t rows = merge.row_end - merge.row_begin;
    const int32_t heads = min(HEADS_PER_ITEM, p.num_kv_heads - merge.head);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < heads * rows * QUADS; i += THREADS) {
        const int32_t row_of_item = i / QUADS;
        const int32_t dim = 4 * (i % QUADS);
        const int32_t head = row_of_item / rows;
        const int32_t row = row_of_item % rows;
        softmax_state state = empty_state();
        float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (int32_t first = 0; first < merge.slot_count; first += IN_FLIGHT) {
            float2 states[IN_FLIGHT];
            float4 parts[IN_FLIGHT];
#pragma unroll
            for (int k = 0; k < IN_FLIGHT; k++) {
                /* Past the end: the last one again, so that no register is set on some paths only.
                 */
                const int32_t slot = merge.slot_begin + min(first + k, merge.slot_count - 1);
                const int64_t at = partial_row(p, slot, HEADS_PER_ITEM, head, row);
                states[k] = load_shared_by_ctas((const float2 *)p.partial_state + at);
                parts[k] =
                    load_shared_by_ctas((const float4 *)(p.partial_out + at * HEAD_DIM_VO + dim));
            }
#pragma unroll
            for (int k = 0; k < IN_FLIGHT; k++) {
                if (first + k < merge.slot_count) {
                    const float part[4] = {parts[k].x, parts[k].y, parts[k].z, parts[k].w};
                    fold(state, acc, softmax_state{states[k].x, states[k].y}, part);
                }
            }
        }
        write_result<out_type>(p,
                               place_of_row(p, qo_begin, merge.head + head, merge.row_begin + row),
                               dim, acc, state);
    }
}

/* Keeps the first page id outside the pool and its place in the page table, when the plan asks for
 * it. */
__device__ __forceinline__ void report_page(const raddle_attention_params &p, int32_t page,
                                            int32_t entry) {
    if (p.check && p.error && atomicCAS(&p.error[1], 0, entry + 1) == 0) {
        p.error[0] = page;
    }
}

} // namespace raddle

#endif

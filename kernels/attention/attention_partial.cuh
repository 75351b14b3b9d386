/* attention_partial.cuh - what the attention kernels share: results, partials and their merge.
 */
#ifndef RADDLE_ATTENTION_PARTIAL_CUH
#define RADDLE_ATTENTION_PARTIAL_CUH

#include "attention/attention_hooks.cuh"
#include "attention/attention_params.h"
#include "common/copy.cuh"
#include "common/softmax.cuh"
#include "common/types.cuh"

namespace raddle {

/* Four neighbouring outputs of one row; the thread with the first of them writes the lse too. */
template <typename out_type>
__device__ __forceinline__ void write_result(const raddle_attention_params &p,
                                             const raddle_row &row, int32_t dim,
                                             const float (&acc)[4], softmax_state state) {
    const float factor = finish_row(p, row, state);
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        /* A row that sees nothing is exactly 0, whatever the sums hold. */
        x[i] = finish_output(p, row, dim + i, factor == 0.0f ? 0.0f : acc[i] * factor);
    }
    out_type *out =
        (out_type *)p.out + row.token * p.out_stride_token + row.qo_head * p.out_stride_head + dim;
    store4<out_type>(out, x);
    if (dim == 0) {
        write_lse(p, row, state);
    }
}

/* Index of a row of a partial, in rows. */
__device__ __forceinline__ int64_t partial_row(const raddle_attention_params &p, int32_t slot,
                                               int32_t heads_per_item, int32_t head, int32_t row) {
    return ((int64_t)slot * heads_per_item + head) * p.tile_rows + row;
}

/* Counts this segment's partial in. True on all threads of the CTA when it was the last of its item:
 * then the counter is 0 again for the next launch. `is_last` is one word of shared memory. */
__device__ __forceinline__ bool arrive_at_merge(const raddle_attention_params &p, int32_t merge,
                                                int32_t num_arrivals, int32_t *is_last) {
    __syncthreads(); /* every thread's part of the partial is written -> thread 0 publishes it */
    if (threadIdx.x == 0) {
        *is_last = arrive(&p.arrivals[merge]) == num_arrivals - 1;
        if (*is_last) {
            p.arrivals[merge] = 0;
        }
    }
    __syncthreads(); /* thread 0 has seen the other partials -> every thread may read them */
    return *is_last != 0;
}

/* merge_partials with OUTPUTS quads of outputs per thread at a time, SLOTS partials of each loaded
 * before the first is used. */
template <typename out_type, int HEAD_DIM_VO, int THREADS, int OUTPUTS, int SLOTS>
__device__ __forceinline__ void merge_quads(const raddle_attention_params &p,
                                            const raddle_attention_merge &merge,
                                            int32_t heads_per_item, int32_t total) {
    constexpr int QUADS = HEAD_DIM_VO / 4;
    const unsigned rows = (unsigned)(merge.row_end - merge.row_begin);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < total; i += OUTPUTS * THREADS) {
        softmax_state state[OUTPUTS];
        float acc[OUTPUTS][4];
        int32_t row_of_slot[OUTPUTS]; /* in rows of a partial */
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            /* Past the end: the last again, so that no register is set on some paths only. */
            const unsigned row = (unsigned)(min(i + o * THREADS, total - 1) / QUADS);
            row_of_slot[o] = (int32_t)(row / rows * (unsigned)p.tile_rows + row % rows);
            state[o] = empty_state();
            acc[o][0] = acc[o][1] = acc[o][2] = acc[o][3] = 0.0f;
        }
#pragma unroll 1
        for (int32_t first = 0; first < merge.slot_count; first += SLOTS) {
            float2 states[SLOTS][OUTPUTS];
            float4 parts[SLOTS][OUTPUTS];
#pragma unroll
            for (int k = 0; k < SLOTS; k++) {
                const int32_t slot = merge.slot_begin + min(first + k, merge.slot_count - 1);
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++) {
                    const int64_t at = partial_row(p, slot, heads_per_item, 0, row_of_slot[o]);
                    const int32_t dim = 4 * (min(i + o * THREADS, total - 1) % QUADS);
                    states[k][o] = load_shared_by_ctas((const float2 *)p.partial_state + at);
                    parts[k][o] = load_shared_by_ctas(
                        (const float4 *)(p.partial_out + at * HEAD_DIM_VO + dim));
                }
            }
#pragma unroll
            for (int k = 0; k < SLOTS; k++) {
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++) {
                    if (first + k < merge.slot_count) {
                        const float4 &x = parts[k][o];
                        const float part[4] = {x.x, x.y, x.z, x.w};
                        fold(state[o], acc[o], softmax_state{states[k][o].x, states[k][o].y}, part);
                    }
                }
            }
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            const int32_t at = i + o * THREADS;
            if (at < total) {
                const unsigned row = (unsigned)(at / QUADS);
                const raddle_row place = row_of(p, merge, merge.head + (int32_t)(row / rows),
                                                merge.row_begin + (int32_t)(row % rows));
                write_result<out_type>(p, place, 4 * (at % QUADS), acc[o], state[o]);
            }
        }
    }
}

/* Adds the partials of an item up in slot order, whoever arrives last, and writes the results. All
 * threads of the CTA take part. IN_FLIGHT: 16-byte loads that a thread has on their way at once:
 * of many partials of one output, or of few partials of several. */
template <typename out_type, int HEAD_DIM_VO, int THREADS, int IN_FLIGHT>
__device__ __forceinline__ void merge_partials(const raddle_attention_params &p,
                                               const raddle_attention_merge &merge,
                                               int32_t heads_per_item) {
    const int32_t heads = min(heads_per_item, p.num_kv_heads - merge.head);
    const int32_t total = heads * (merge.row_end - merge.row_begin) * (HEAD_DIM_VO / 4);
    if (total > THREADS && merge.slot_count <= IN_FLIGHT / 2) {
        merge_quads<out_type, HEAD_DIM_VO, THREADS, 4, IN_FLIGHT / 4>(p, merge, heads_per_item,
                                                                      total);
    } else {
        merge_quads<out_type, HEAD_DIM_VO, THREADS, 1, IN_FLIGHT>(p, merge, heads_per_item, total);
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

/* ops_rmsnorm.cu - root mean square norm of rows, with or without the residual added before; sm_80
 * and later.
 *
 * What      out = x / sqrt(mean(x^2) + eps) * weight; HAS_RESIDUAL: residual += x first, and the
 * norm is of that. Grid      one group of ROW_THREADS threads per (row, head), ROWS_PER_CTA groups
 * in a CTA. Registers a row of up to ROW_THREADS * ITEMS * VECTOR elements is read once and kept,
 * and the weight with it, so that all loads are in flight together; the rest of a longer row is
 * read twice. Shared    one float per warp, for the sum over a group. Bound     latency: 64 rows of
 * 4096 bf16 move 1 MB, less than a microsecond of bandwidth.
 */
#include "common/copy.cuh"
#include "common/reduce.cuh"
#include "ops/ops_params.h"
#include "ops/ops_vector.cuh"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
using weight_type = RADDLE_WEIGHT_TYPE;
constexpr bool HAS_RESIDUAL = RADDLE_HAS_RESIDUAL;
constexpr int VECTOR = RADDLE_VECTOR;
constexpr int ROW_THREADS = RADDLE_ROW_THREADS;
constexpr int ITEMS = 2; /* vectors of a row that a thread keeps */
constexpr int CTA_THREADS = ROW_THREADS < 128 ? 128 : ROW_THREADS;
constexpr int ROWS_PER_CTA = CTA_THREADS / ROW_THREADS;
constexpr int WARPS = ROW_THREADS / 32;

static_assert(ROW_THREADS % 32 == 0 && CTA_THREADS % ROW_THREADS == 0, "whole warps");

/* Over the threads of one row. Barrier: all of the CTA's threads, between writing and reading sums.
 */
__device__ __forceinline__ float sum_over_row(float x) {
    x = reduce_sum<1, 32>(x);
    if constexpr (WARPS == 1) {
        return x;
    } else {
        __shared__ float sums[WARPS];
        if (threadIdx.x % 32 == 0) {
            sums[threadIdx.x / 32] = x;
        }
        __syncthreads();
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            total += sums[w];
        }
        return total;
    }
}

/* The sum as it will be stored: the norm is of that. */
__device__ __forceinline__ void add(float (&to)[VECTOR], const float (&x)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        to[i] = to_float(from_float<type>(to[i] + x[i]));
    }
}

__device__ __forceinline__ float sum_squares(const float (&x)[VECTOR]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        sum += x[i] * x[i];
    }
    return sum;
}

__device__ __forceinline__ void store_item(type *out, const float (&x)[VECTOR],
                                           const float (&weight)[VECTOR], float scale) {
    float y[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        y[i] = x[i] * scale * weight[i];
    }
    store_vector<type, VECTOR>(out, y);
}

/* A group's row; width 0 for a group past the last row, which only takes part in barriers. */
struct norm_row {
    const type *x;
    type *residual, *out;
    const weight_type *weight;
    int width;
};

__device__ __forceinline__ norm_row row_of_group(const raddle_ops_rmsnorm_params &p) {
    const unsigned index = blockIdx.x * ROWS_PER_CTA + threadIdx.x / ROW_THREADS;
    const bool is_there = index < p.rows * p.heads;
    const int64_t row = is_there ? index / (unsigned)p.heads : 0;
    const int64_t head = is_there ? index % (unsigned)p.heads : 0;
    return {(const type *)p.x + row * p.x_stride_row + head * p.x_stride_head,
            (type *)p.residual + row * p.residual_stride_row + head * p.residual_stride_head,
            (type *)p.out + row * p.out_stride_row + head * p.out_stride_head,
            (const weight_type *)p.weight, is_there ? p.width : 0};
}

/* The part of a row that is not kept in registers: adds the residual and sums squares. */
__device__ __forceinline__ float sum_squares_of_rest(const norm_row &row, int begin) {
    float sum = 0;
    for (int d = begin; d < row.width; d += ROW_THREADS * VECTOR) {
        float x[VECTOR];
        load_vector<type, VECTOR>(x, row.x + d);
        if constexpr (HAS_RESIDUAL) {
            float r[VECTOR];
            load_vector<type, VECTOR>(r, row.residual + d);
            add(x, r);
            store_vector<type, VECTOR>(row.residual + d, x);
        }
        sum += sum_squares(x);
    }
    return sum;
}

__device__ __forceinline__ void store_rest(const norm_row &row, int begin, float scale) {
    for (int d = begin; d < row.width; d += ROW_THREADS * VECTOR) {
        float x[VECTOR], w[VECTOR];
        load_vector<type, VECTOR>(x, HAS_RESIDUAL ? row.residual + d : row.x + d);
        load_vector<weight_type, VECTOR>(w, row.weight + d);
        store_item(row.out + d, x, w, scale);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 1)
    ops_rmsnorm(const __grid_constant__ raddle_ops_rmsnorm_params p) {
    const norm_row row = row_of_group(p);
    const int first = threadIdx.x % ROW_THREADS * VECTOR;
    constexpr int STEP = ROW_THREADS * VECTOR;
    float x[ITEMS][VECTOR], r[ITEMS][VECTOR], w[ITEMS][VECTOR];
    launch_dependents();
    wait_for_predecessors();
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int d = first + item * STEP;
        if (d < row.width) {
            load_vector<type, VECTOR>(x[item], row.x + d);
            if constexpr (HAS_RESIDUAL) {
                load_vector<type, VECTOR>(r[item], row.residual + d);
            }
            load_vector<weight_type, VECTOR>(w[item], row.weight + d);
        }
    }
    float sum = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int d = first + item * STEP;
        if (d < row.width) {
            if constexpr (HAS_RESIDUAL) {
                add(x[item], r[item]);
                store_vector<type, VECTOR>(row.residual + d, x[item]);
            }
            sum += sum_squares(x[item]);
        }
    }
    sum += sum_squares_of_rest(row, first + ITEMS * STEP);
    const float scale = 1.0f / sqrtf(sum_over_row(sum) / p.width + p.eps);
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int d = first + item * STEP;
        if (d < row.width) {
            store_item(row.out + d, x[item], w[item], scale);
        }
    }
    store_rest(row, first + ITEMS * STEP, scale);
}

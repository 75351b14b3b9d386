/* ops_norm.cu - norms of rows, with or without a residual added before; sm_80 and later.
 *
 * What      out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset). HAS_RESIDUAL: the norm is of
 *           x + residual in float32, and residual gets that sum, rounded. IS_CENTERED: a layer norm,
 *           of x - mean(x), with a bias. IS_FP8: out is an 8-bit float, of the result over a scale.
 * Grid      one group of ROW_THREADS threads per (row, head), ROWS_PER_CTA groups in a CTA.
 * Registers a row of up to ROW_THREADS * ITEMS * VECTOR elements is read once and kept, and the
 *           weight with it, so that all loads are in flight together; the rest of a longer row is
 *           read twice (three times when centred), and the residual with it: a thread overwrites
 *           its elements of both when it reads them last.
 * Shared    one float per warp and sum over a group.
 * Bound     latency: 64 rows of 4096 bf16 move 1 MB, less than a microsecond of bandwidth.
 */
#include "common/copy.cuh"
#include "common/reduce.cuh"
#include "ops/ops_fp8.cuh"
#include "ops/ops_params.h"
#include "ops/ops_vector.cuh"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
using weight_type = RADDLE_WEIGHT_TYPE;
constexpr bool HAS_RESIDUAL = RADDLE_HAS_RESIDUAL;
constexpr bool IS_CENTERED = RADDLE_IS_CENTERED;
constexpr bool IS_FP8 = RADDLE_IS_FP8;
constexpr int VECTOR = RADDLE_VECTOR;
constexpr int ROW_THREADS = RADDLE_ROW_THREADS;
constexpr int ITEMS = 2; /* vectors of a row that a thread keeps */
constexpr int CTA_THREADS = ROW_THREADS < 128 ? 128 : ROW_THREADS;
constexpr int ROWS_PER_CTA = CTA_THREADS / ROW_THREADS;
constexpr int WARPS = ROW_THREADS / 32;

static_assert(ROW_THREADS % 32 == 0 && CTA_THREADS % ROW_THREADS == 0, "whole warps");

/* Over the threads of one row, SUM telling one use from another. Barrier: all of the CTA's threads,
 * between writing and reading sums. */
template <int SUM> __device__ __forceinline__ float sum_over_row(float x) {
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

__device__ __forceinline__ void add(float (&to)[VECTOR], const float (&x)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        to[i] += x[i];
    }
}

__device__ __forceinline__ float sum(const float (&x)[VECTOR]) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        total += x[i];
    }
    return total;
}

__device__ __forceinline__ float sum_squares(const float (&x)[VECTOR], float mean) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        const float y = IS_CENTERED ? x[i] - mean : x[i];
        total += y * y;
    }
    return total;
}

/* A group's row; width 0 for a group past the last row, which only takes part in barriers. */
struct norm_row {
    const type *x;
    type *residual;
    char *out;
    const weight_type *weight, *bias;
    int width;
    float weight_offset, factor; /* of the result, before it becomes an 8-bit float */
    bool is_e5m2;
};

__device__ __forceinline__ norm_row row_of_group(const raddle_ops_norm_params &p) {
    const unsigned index = blockIdx.x * ROWS_PER_CTA + threadIdx.x / ROW_THREADS;
    const bool is_there = index < p.rows * p.heads;
    const int64_t row = is_there ? index / (unsigned)p.heads : 0;
    const int64_t head = is_there ? index % (unsigned)p.heads : 0;
    constexpr int64_t OUT_BYTES = IS_FP8 ? 1 : sizeof(type);
    norm_row r;
    r.x = (const type *)p.x + row * p.x_stride_row + head * p.x_stride_head;
    r.residual = (type *)p.residual + row * p.residual_stride_row + head * p.residual_stride_head;
    r.out = (char *)p.out + (row * p.out_stride_row + head * p.out_stride_head) * OUT_BYTES;
    r.weight = (const weight_type *)p.weight;
    r.bias = (const weight_type *)p.bias;
    r.width = is_there ? p.width : 0;
    r.weight_offset = p.weight_offset;
    r.factor = 1.0f;
    r.is_e5m2 = p.out_is_e5m2;
    return r;
}

__device__ __forceinline__ void store_item(const norm_row &row, int d, const float (&x)[VECTOR],
                                           const float (&weight)[VECTOR], float mean, float scale) {
    float y[VECTOR], b[VECTOR];
    if constexpr (IS_CENTERED) {
        load_vector<weight_type, VECTOR>(b, row.bias + d);
    }
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        const float w = weight[i] + row.weight_offset;
        y[i] = IS_CENTERED ? (x[i] - mean) * scale * w + b[i] : x[i] * scale * w;
        y[i] = IS_FP8 ? y[i] * row.factor : y[i];
    }
    if constexpr (IS_FP8) {
        store_fp8<VECTOR>((uint8_t *)row.out + d, y, row.is_e5m2);
    } else {
        store_vector<type, VECTOR>((type *)row.out + d, y);
    }
}

/* What the norm is of. */
__device__ __forceinline__ void load_item(float (&x)[VECTOR], const norm_row &row, int d) {
    load_vector<type, VECTOR>(x, row.x + d);
    if constexpr (HAS_RESIDUAL) {
        float r[VECTOR];
        load_vector<type, VECTOR>(r, row.residual + d);
        add(x, r);
    }
}

/* The part of a row that is not kept in registers: its sum, or for a norm without a mean the sum of
 * squares. With a residual, four items at a time would take registers of rows that have no rest. */
__device__ __forceinline__ float sum_rest_first(const norm_row &row, int begin) {
    float total = 0;
#pragma unroll(HAS_RESIDUAL ? 2 : 4)
    for (int d = begin; d < row.width; d += ROW_THREADS * VECTOR) {
        float x[VECTOR];
        load_item(x, row, d);
        total += IS_CENTERED ? sum(x) : sum_squares(x, 0.0f);
    }
    return total;
}

__device__ __forceinline__ float sum_rest_centered(const norm_row &row, int begin, float mean) {
    float total = 0;
    for (int d = begin; d < row.width; d += ROW_THREADS * VECTOR) {
        float x[VECTOR];
        load_item(x, row, d);
        total += sum_squares(x, mean);
    }
    return total;
}

__device__ __forceinline__ void store_rest(const norm_row &row, int begin, float mean,
                                           float scale) {
    for (int d = begin; d < row.width; d += ROW_THREADS * VECTOR) {
        float x[VECTOR], w[VECTOR];
        load_item(x, row, d);
        load_vector<weight_type, VECTOR>(w, row.weight + d);
        if constexpr (HAS_RESIDUAL) {
            store_vector<type, VECTOR>(row.residual + d, x);
        }
        store_item(row, d, x, w, mean, scale);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 1)
    ops_norm(const __grid_constant__ raddle_ops_norm_params p) {
    norm_row row = row_of_group(p);
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
    if constexpr (IS_FP8) {
        row.factor = 1.0f / (p.scale ? *p.scale : p.scale_value);
    }
    float total = 0, mean = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int d = first + item * STEP;
        if (d < row.width) {
            if constexpr (HAS_RESIDUAL) {
                add(x[item], r[item]);
                store_vector<type, VECTOR>(row.residual + d, x[item]);
            }
            total += IS_CENTERED ? sum(x[item]) : sum_squares(x[item], 0.0f);
        }
    }
    total = sum_over_row<0>(total + sum_rest_first(row, first + ITEMS * STEP));
    if constexpr (IS_CENTERED) {
        mean = total / p.width;
        total = sum_rest_centered(row, first + ITEMS * STEP, mean);
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            if (first + item * STEP < row.width) {
                total += sum_squares(x[item], mean);
            }
        }
        total = sum_over_row<1>(total);
    }
    const float scale = 1.0f / sqrtf(total / p.width + p.eps);
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int d = first + item * STEP;
        if (d < row.width) {
            store_item(row, d, x[item], w[item], mean, scale);
        }
    }
    store_rest(row, first + ITEMS * STEP, mean, scale);
}

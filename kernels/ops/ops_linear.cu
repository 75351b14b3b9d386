/* ops_linear.cu - y = x w^T + bias for few rows of x, 16-bit; sm_80 and later.
 *
 * Grid      CTAs of 8 warps, two per SM; each takes every gridDim-th tile of 16 outputs.
 * Idea      a decode step reads every weight once, so nothing is staged: a warp loads its part of a
 *           tile from global memory straight into mma fragments, y^T[16 outputs x 8 rows] =
 *           W x^T. The warps take turns along in_features and are added up in shared memory, in warp
 *           order. x is small and comes from the L1.
 * Lane      4 g + j holds chunks (16 bytes) 2j and 2j + 1 of every 128 bytes of weight rows g and
 *           g + 8, and of row g of x. The order of a dot product is free as long as both sides agree.
 * Ahead     weights are no launch's result: the first 128 KB of an SM are on their way before the
 *           launches that x comes from have ended.
 * Bound     bytes: out_features x in_features x 2.
 */
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/types.cuh"
#include "ops/ops_params.h"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
using out_type = RADDLE_OUT_TYPE;
constexpr int WARPS = RADDLE_OPS_LINEAR_WARPS;
constexpr int OUTPUTS = RADDLE_OPS_LINEAR_OUTPUTS; /* of a tile */
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = 4; /* of a lane and weight row, loaded at once */
constexpr int BATCH_CHUNKS = 4 * CHUNKS;
constexpr int TILE_VALUES = OUTPUTS * RADDLE_OPS_LINEAR_ROWS;

/* A warp's part of a tile: 16 rows x 256 bytes. */
struct batch {
    uint4 w[2][CHUNKS];
};

__device__ __forceinline__ uint32_t word(const uint4 &chunk, int i) {
    return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
}

/* Where a warp is among its tiles and, within one, along in_features. */
struct place {
    int32_t tile, chunk;
};

} // namespace

extern "C" __global__ void __launch_bounds__(THREADS, RADDLE_OPS_LINEAR_CTAS_PER_SM)
    ops_linear(const __grid_constant__ raddle_ops_linear_params p) {
    __shared__ float sums[2][WARPS][TILE_VALUES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, j = lane % 4;
    const int32_t chunks = p.in_features / 8;
    const int32_t tiles = (p.out_features + OUTPUTS - 1) / OUTPUTS;
    launch_dependents();

    const auto chunk_of = [&](int32_t first, int i) { return first + 8 * (i / 2) + 2 * j + i % 2; };
    const auto row_of = [&](int32_t tile, int r) {
        return (const type *)p.w + min(tile * OUTPUTS + 8 * r + g, p.out_features - 1) * p.w_stride;
    };
    const auto load = [&](const place &at, batch &b) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const type *row = row_of(at.tile, r);
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const int32_t chunk = chunk_of(at.chunk, i);
                b.w[r][i] = chunk < chunks ? load_streaming(row + 8 * (int64_t)chunk)
                                           : make_uint4(0, 0, 0, 0);
            }
        }
    };
    const auto advance = [&](place &at) {
        at.chunk += WARPS * BATCH_CHUNKS;
        if (at.chunk >= chunks) {
            at.chunk = warp * BATCH_CHUNKS;
            at.tile += gridDim.x;
        }
    };
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const auto compute = [&](const place &at, const batch &b) {
        uint4 x[CHUNKS];
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int32_t chunk = chunk_of(at.chunk, i);
            x[i] = make_uint4(0, 0, 0, 0);
            if (g < p.rows && chunk < chunks) {
                x[i] = *(const uint4 *)((const type *)p.x + g * p.x_stride + 8 * (int64_t)chunk);
            }
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                mma_m16n8k16<type>(acc, word(b.w[0][i], e), word(b.w[1][i], e),
                                   word(b.w[0][i], e + 1), word(b.w[1][i], e + 1), word(x[i], e),
                                   word(x[i], e + 1));
            }
        }
    };
    /* The warps' sums of a tile are added up; they change sides, so that one barrier is enough. */
    int side = 0;
    const auto finish = [&](int32_t tile) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            sums[side][warp][(2 * j + c % 2) * OUTPUTS + 8 * (c / 2) + g] = acc[c];
            acc[c] = 0.0f;
        }
        __syncthreads(); /* all warps' sums are written -> they are added up */
        const int32_t row = threadIdx.x / OUTPUTS, output = tile * OUTPUTS + threadIdx.x % OUTPUTS;
        if (row < p.rows && output < p.out_features) {
            float sum = p.bias ? p.bias[output] : 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                sum += sums[side][w][threadIdx.x];
            }
            ((out_type *)p.out)[row * p.out_stride + output] = from_float<out_type>(sum);
        }
        side ^= 1;
    };

    place at{(int32_t)blockIdx.x, warp * BATCH_CHUNKS};
    place next = at;
    batch a, b;
    load(at, a);
    advance(next);
    if (next.tile < tiles) {
        load(next, b);
    }
    wait_for_predecessors();
    const auto step = [&](batch &now) {
        place then = next;
        advance(then);
        compute(at, now);
        if (then.tile < tiles) {
            load(then, now);
        }
        if (next.tile != at.tile) {
            finish(at.tile);
        }
        at = next;
        next = then;
    };
#pragma unroll 1
    while (at.tile < tiles) {
        step(a);
        if (at.tile >= tiles) {
            break;
        }
        step(b);
    }
}

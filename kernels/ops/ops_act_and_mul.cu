/* ops_act_and_mul.cu - out = activation(gate) * up of a gated feed-forward layer; sm_80 and later.
 *
 * Grid      x: (row, head). y: the width, CTA_THREADS * VECTOR elements each.
 * Bound     bytes: three elements moved per result.
 */
#include "common/copy.cuh"
#include "ops/ops_params.h"
#include "ops/ops_vector.cuh"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr int ACTIVATION = RADDLE_ACTIVATION;
constexpr int VECTOR = RADDLE_VECTOR;
constexpr int CTA_THREADS = 256;

__device__ __forceinline__ float activate(float x) {
    if constexpr (ACTIVATION == RADDLE_OPS_SILU) {
        return x / (1.0f + expf(-x)); /* -0 when the exponential is infinite */
    } else if constexpr (ACTIVATION == RADDLE_OPS_GELU) {
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    } else {
        const float inner = 0.79788456f * (x + 0.044715f * x * x * x); /* sqrt(2 / pi) */
        return 0.5f * x * (1.0f + tanhf(inner));
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(CTA_THREADS)
    ops_act_and_mul(const __grid_constant__ raddle_ops_act_params p) {
    const int64_t row = blockIdx.x / (unsigned)p.heads, head = blockIdx.x % (unsigned)p.heads;
    const int d = (blockIdx.y * CTA_THREADS + threadIdx.x) * VECTOR;
    launch_dependents();
    wait_for_predecessors();
    if (d >= p.width) {
        return;
    }
    const type *x = (const type *)p.x + row * p.x_stride_row + head * p.x_stride_head + d;
    type *out = (type *)p.out + row * p.out_stride_row + head * p.out_stride_head + d;
    float gate[VECTOR], up[VECTOR];
    load_vector<type, VECTOR>(gate, x);
    load_vector<type, VECTOR>(up, x + p.width);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        gate[i] = activate(gate[i]) * up[i];
    }
    store_vector<type, VECTOR>(out, gate);
}

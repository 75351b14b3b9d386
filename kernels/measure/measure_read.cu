/* measure_read.cu - reads memory once and keeps nothing: the ceiling of memory-bound kernels.
 *
 * Grid: CTAs of 512 threads, as many as fit; each takes every gridDim-th block of 512 x UNROLL chunks
 * of 16 bytes. With 2 CTAs and 8 loads a thread, 128 KB are in flight per SM, several times what an
 * H100's latency asks for. Bound: bytes.
 */
#include "measure/measure_params.h"

namespace {

constexpr int THREADS = 512;
constexpr int UNROLL = 8;

__device__ __forceinline__ uint4 load(const uint4 *from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}

__device__ __forceinline__ uint32_t fold(uint4 value) {
    return value.x ^ value.y ^ value.z ^ value.w;
}

} // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    measure_read(const __grid_constant__ raddle_measure_params p) {
    const uint4 *data = static_cast<const uint4 *>(p.data);
    const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS * UNROLL;
    int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS * UNROLL + threadIdx.x;
    uint32_t sum = 0;
    for (; at + (UNROLL - 1) * THREADS < p.chunks; at += step) {
        uint4 values[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            values[i] = load(data + at + i * THREADS);
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            sum ^= fold(values[i]);
        }
    }
    for (int i = 0; i < UNROLL && at + i * THREADS < p.chunks; i++) {
        sum ^= fold(load(data + at + i * THREADS));
    }
    if (p.sink != nullptr) {
        *p.sink = sum;
    }
}

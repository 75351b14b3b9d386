/* reduce.cuh - sums and maxima over parts of a warp by butterfly shuffles: every lane of the part
 * gets the result. */
#ifndef RADDLE_COMMON_REDUCE_CUH
#define RADDLE_COMMON_REDUCE_CUH

#include "common/abi.h"

namespace raddle {

constexpr unsigned ALL_LANES = 0xffffffffu;

/* Over lanes that differ in the bits FROM, 2 FROM, .. below TO: <1, 4> the four lanes of a quad,
 * <4, 32> the eight lanes with the same place in their quads, <1, 32> the warp. */
template <int FROM, int TO> __device__ __forceinline__ float reduce_max(float x) {
#pragma unroll
    for (int bit = FROM; bit < TO; bit <<= 1) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, bit));
    }
    return x;
}

template <int FROM, int TO> __device__ __forceinline__ float reduce_sum(float x) {
#pragma unroll
    for (int bit = FROM; bit < TO; bit <<= 1) {
        x += __shfl_xor_sync(ALL_LANES, x, bit);
    }
    return x;
}

} // namespace raddle

#endif

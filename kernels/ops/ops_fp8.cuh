/* ops_fp8.cuh - stores of 8-bit floats, whose kind is known at run time only. */
#ifndef RADDLE_OPS_FP8_CUH
#define RADDLE_OPS_FP8_CUH

#include "ops/ops_bits.h"

namespace raddle {

/* Two floats, lo in the low byte; past the largest finite number, that one. */
__device__ __forceinline__ uint32_t pack2_fp8(float lo, float hi, bool is_e5m2) {
#if __CUDA_ARCH__ >= 890
    uint16_t packed;
    if (is_e5m2) {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %2, %1;" : "=h"(packed) : "f"(lo), "f"(hi));
    } else {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(packed) : "f"(lo), "f"(hi));
    }
    return packed;
#else
    return raddle_ops_to_fp8(lo, is_e5m2) | raddle_ops_to_fp8(hi, is_e5m2) << 8;
#endif
}

/* N is 1, 4 or 8; to is aligned to N bytes. */
template <int N>
__device__ __forceinline__ void store_fp8(uint8_t *to, const float (&x)[N], bool is_e5m2) {
    static_assert(N == 1 || N == 4 || N == 8, "one byte, or whole words");
    if constexpr (N == 1) {
        *to = (uint8_t)pack2_fp8(x[0], 0.0f, is_e5m2);
    } else {
        uint32_t words[N / 4];
#pragma unroll
        for (int w = 0; w < N / 4; w++) {
            words[w] = pack2_fp8(x[4 * w], x[4 * w + 1], is_e5m2) |
                       pack2_fp8(x[4 * w + 2], x[4 * w + 3], is_e5m2) << 16;
        }
        if constexpr (N == 4) {
            *(uint32_t *)to = words[0];
        } else {
            *(uint2 *)to = make_uint2(words[0], words[1]);
        }
    }
}

} // namespace raddle

#endif

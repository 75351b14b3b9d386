/* types.cuh - 16- and 8-bit float types and their conversions. A config names an element type by the
 * struct's name.
 *
 * Values live as raw bits; arithmetic is float32. Conversions round to nearest even.
 */
#ifndef RADDLE_COMMON_TYPES_CUH
#define RADDLE_COMMON_TYPES_CUH

#include "common/abi.h"

namespace raddle {

struct f32 {
    float value;
};
struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};
struct e4m3 { /* no infinities; NaN is 0x7f */
    uint8_t bits;
};
struct e5m2 { /* the upper half of an f16 */
    uint8_t bits;
};

template <typename A, typename B> struct is_same { static constexpr bool value = false; };
template <typename A> struct is_same<A, A> { static constexpr bool value = true; };

/* Two floats to two packed elements, lo in the low half. */
template <typename T> __device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t packed;
    if constexpr (is_same<T, bf16>::value) {
        asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(lo), "f"(hi));
    } else {
        static_assert(is_same<T, f16>::value, "pack2 makes f16 or bf16");
        asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(lo), "f"(hi));
    }
    return packed;
}

/* The reverse of pack2. */
template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t packed) {
    float2 pair;
    if constexpr (is_same<T, bf16>::value) {
        pair.x = __uint_as_float(packed << 16);
        pair.y = __uint_as_float(packed & 0xffff0000u);
    } else {
        static_assert(is_same<T, f16>::value, "unpack2 takes f16 or bf16");
        asm("{.reg .b16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.f32.f16 %0, lo;\n cvt.f32.f16 %1, "
            "hi;}"
            : "=f"(pair.x), "=f"(pair.y)
            : "r"(packed));
    }
    return pair;
}

/* Four packed 8-bit floats to two times two packed f16, exactly. */
template <typename T>
__device__ __forceinline__ void unpack4_to_f16(uint32_t packed, uint32_t &low, uint32_t &high) {
    if constexpr (is_same<T, e5m2>::value) {
        low = __byte_perm(packed, 0, 0x1404);
        high = __byte_perm(packed, 0, 0x3424);
    } else {
        static_assert(is_same<T, e4m3>::value, "unpack4_to_f16 takes e4m3 or e5m2");
#if __CUDA_ARCH__ >= 890
        asm("{.reg .b16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.rn.f16x2.e4m3x2 %0, lo;\n "
            "cvt.rn.f16x2.e4m3x2 %1, hi;}"
            : "=r"(low), "=r"(high)
            : "r"(packed));
#else
        /* Sign, exponent and mantissa in the places of an f16, whose bias is larger by 8: times
         * 2^8, which is exact for subnormals too. NaN, all ones, becomes all ones of the f16. */
        const uint32_t nan = ((packed & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
        low = __byte_perm(packed, 0, 0x1404);
        high = __byte_perm(packed, 0, 0x3424);
        low = (low & 0x80008000u) | ((low & 0x7f007f00u) >> 1);
        high = (high & 0x80008000u) | ((high & 0x7f007f00u) >> 1);
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(low) : "r"(0x5c005c00u));
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(high) : "r"(0x5c005c00u));
        low |= (__byte_perm(nan, 0, 0x1404) >> 15) * 0x7fffu;
        high |= (__byte_perm(nan, 0, 0x3424) >> 15) * 0x7fffu;
#endif
    }
}

/* Stores N (2 or 4) floats as neighbouring elements of type T; to is aligned for the whole store.
 */
template <typename T> __device__ __forceinline__ void store2(void *to, float a, float b) {
    if constexpr (is_same<T, f32>::value) {
        *(float2 *)to = make_float2(a, b);
    } else {
        *(uint32_t *)to = pack2<T>(a, b);
    }
}

template <typename T> __device__ __forceinline__ void store4(void *to, const float (&x)[4]) {
    if constexpr (is_same<T, f32>::value) {
        *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
    } else {
        *(uint2 *)to = make_uint2(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]));
    }
}

/* One element to float and back, for loops that cannot be vectors. */
template <typename T> __device__ __forceinline__ float to_float(T x) {
    if constexpr (is_same<T, f32>::value) {
        return x.value;
    } else {
        return unpack2<T>(x.bits).x;
    }
}

template <typename T> __device__ __forceinline__ T from_float(float x) {
    if constexpr (is_same<T, f32>::value) {
        return T{x};
    } else {
        return T{(uint16_t)pack2<T>(x, 0.0f)};
    }
}

} // namespace raddle

#endif

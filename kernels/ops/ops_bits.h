/* ops_bits.h - the bits of floats, and 8-bit floats made alike on both back ends. C11 and NVRTC. */
#ifndef RADDLE_OPS_BITS_H
#define RADDLE_OPS_BITS_H

#include "common/abi.h"

#ifdef __CUDACC_RTC__
#define RADDLE_OPS_SHARED static __device__ __forceinline__
#else
#include <math.h>
#include <string.h>
#define RADDLE_OPS_SHARED static inline
#endif

RADDLE_OPS_SHARED uint32_t raddle_ops_float_bits(float x) {
#ifdef __CUDACC_RTC__
    return __float_as_uint(x);
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
#endif
}

RADDLE_OPS_SHARED float raddle_ops_bits_float(uint32_t bits) {
#ifdef __CUDACC_RTC__
    return __uint_as_float(bits);
#else
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
#endif
}

/* x as float8_e5m2 or float8_e4m3fn, rounded to nearest even; past the largest finite number, that
 * one with x's sign. NaN is 0x7f. */
RADDLE_OPS_SHARED uint32_t raddle_ops_to_fp8(float x, int is_e5m2) {
    const uint32_t bits = raddle_ops_float_bits(x);
    const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    const int shift = is_e5m2 ? 21 : 20;                               /* mantissa bits that go */
    const uint32_t first_normal = is_e5m2 ? 0x38800000u : 0x3c800000u; /* 2^-14, 2^-6 */
    if (magnitude > 0x7f800000u) {
        return 0x7fu;
    }
    if (magnitude >= (is_e5m2 ? 0x47600000u : 0x43e00000u)) { /* 57344, 448 */
        return sign | (is_e5m2 ? 0x7bu : 0x7eu);
    }
    if (magnitude < first_normal) { /* steps of 2^-16, 2^-9 */
        return sign |
               (uint32_t)rintf(raddle_ops_bits_float(magnitude) * (is_e5m2 ? 65536.0f : 512.0f));
    }
    const uint32_t half = (1u << (shift - 1)) - 1 + (magnitude >> shift & 1);
    const uint32_t biased = is_e5m2 ? 112u << 2 : 120u << 3; /* what the exponents differ by */
    return sign | (((magnitude + half) >> shift) - biased);
}

#endif

/* convert.h - one element between float32 and the 16-bit and 8-bit types, by bit arithmetic: exact,
 * round to nearest even.
 *
 * For loops that are not hot, and for the tails of those that are; whole rows go through the table
 * of vec.h.
 */
#ifndef RADDLE_CPU_CONVERT_H
#define RADDLE_CPU_CONVERT_H

#include <stdint.h>
#include <string.h>

static inline float raddle_f32_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint32_t raddle_f32_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float raddle_bf16_to_f32(uint16_t value) {
    return raddle_f32_from_bits((uint32_t)value << 16);
}

static inline uint16_t raddle_f32_to_bf16(float value) {
    const uint32_t bits = raddle_f32_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN when its low bits fall off */
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The exponent moves from bias 15 to 127. Subnormals: as an integer times 2^-24, which is exact. */
static inline float raddle_f16_to_f32(uint16_t value) {
    const uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    const uint32_t exponent = value >> 10 & 0x1f;
    const uint32_t mantissa = value & 0x3ffu;
    if (exponent == 0) {
        return raddle_f32_from_bits(raddle_f32_to_bits((float)mantissa * 0x1p-24f) | sign);
    }
    if (exponent == 31) {
        return raddle_f32_from_bits(sign | 0x7f800000u | mantissa << 13 |
                                    (mantissa ? 0x400000u : 0));
    }
    return raddle_f32_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* The upper half of a float16. */
static inline float raddle_e5m2_to_f32(uint8_t value) {
    return raddle_f16_to_f32((uint16_t)(value << 8));
}

/* One exponent bit less than float16 (bias 7, not 15): as one it counts 2^-8 of its value, subnormal or
 * not. There are no infinities; 0x7f is NaN. */
static inline float raddle_e4m3_to_f32(uint8_t value) {
    const uint16_t size = value & 0x7f;
    const uint16_t sign = (uint16_t)((value & 0x80) << 8);
    return raddle_f16_to_f32(size == 0x7f ? sign | 0x7e00 : (uint16_t)(sign | size << 7)) * 256.0f;
}

static inline uint16_t raddle_f32_to_f16(float value) {
    const uint32_t bits = raddle_f32_to_bits(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    }
    if (magnitude >= 0x477ff000u) {
        return (uint16_t)(sign | 0x7c00u); /* 65520 and more round to infinity */
    }
    if (magnitude < 0x38800000u) {
        /* Below 2^-14: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by
         * the FPU. */
        const float shifted = raddle_f32_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (raddle_f32_to_bits(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (rounded - 0x38000000u) >> 13);
}

#endif

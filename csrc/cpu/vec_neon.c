/* vec_neon.c - four floats at a time: what every aarch64 has. Table neon. */
#include "cpu/vec.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#define V float32x4_t
#define V_LANES 4
#define V_BLOCKS 1
#define V_DOT_ROWS 4
#define V_TARGET
#define INLINE static inline __attribute__((always_inline))

INLINE float32x4_t v_zero(void) {
    return vdupq_n_f32(0.0f);
}

INLINE float32x4_t v_set1(float x) {
    return vdupq_n_f32(x);
}

INLINE float32x4_t v_add(float32x4_t a, float32x4_t b) {
    return vaddq_f32(a, b);
}

INLINE float32x4_t v_mul(float32x4_t a, float32x4_t b) {
    return vmulq_f32(a, b);
}

INLINE float32x4_t v_fma(float32x4_t a, float32x4_t b, float32x4_t c) {
    return vfmaq_f32(c, a, b);
}

/* maxnm gives the number when one is NaN. */
INLINE float32x4_t v_max(float32x4_t a, float32x4_t b) {
    return vmaxnmq_f32(a, b);
}

INLINE float32x4_t widen(uint16x4_t x, raddle_dtype type) {
    return type == RADDLE_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(x))
                              : vreinterpretq_f32_u32(vshll_n_u16(x, 16));
}

/* Four bytes. e5m2 is the upper half of a float16. e4m3 has one exponent bit less: as a float16 it
 * counts 2^-8 of its value, subnormal or not; 0x7f is NaN. */
INLINE float32x4_t widen_8(const void *p, int count, raddle_dtype type) {
    uint8_t few[8] = {0};
    __builtin_memcpy(few, p, (size_t)count);
    const uint16x4_t wide = vget_low_u16(vmovl_u8(vld1_u8(few)));
    if (type == RADDLE_F8_E5M2) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vshl_n_u16(wide, 8)));
    }
    const uint16x4_t size = vand_u16(wide, vdup_n_u16(0x7f));
    const uint16x4_t nan = vceq_u16(size, vdup_n_u16(0x7f));
    const uint16x4_t sign = vand_u16(vshl_n_u16(wide, 8), vdup_n_u16(0x8000));
    const uint16x4_t half = vorr_u16(vshl_n_u16(size, 7), sign);
    const uint16x4_t quiet = vorr_u16(half, vand_u16(nan, vdup_n_u16(0x7e00)));
    return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(quiet)), 256.0f);
}

INLINE bool is_8(raddle_dtype type) {
    return type == RADDLE_F8_E4M3 || type == RADDLE_F8_E5M2;
}

INLINE float32x4_t v_load(const void *p, raddle_dtype type) {
    return type == RADDLE_F32 ? vld1q_f32(p)
           : is_8(type)       ? widen_8(p, 4, type)
                              : widen(vld1_u16(p), type);
}

INLINE float32x4_t v_load_tail(const void *p, int count, raddle_dtype type) {
    float few[4] = {0};
    uint16_t few_16[4] = {0};
    if (type == RADDLE_F32) {
        __builtin_memcpy(few, p, (size_t)count * sizeof(float));
        return vld1q_f32(few);
    }
    if (is_8(type)) {
        return widen_8(p, count, type);
    }
    __builtin_memcpy(few_16, p, (size_t)count * sizeof(uint16_t));
    return widen(vld1_u16(few_16), type);
}

/* bfloat16: adds half a unit of the kept bits, less one when they are even; NaN made quiet. */
INLINE uint16x4_t narrow_bf16(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}

INLINE uint16x4_t narrow(float32x4_t x, raddle_dtype type) {
    return type == RADDLE_F16 ? vreinterpret_u16_f16(vcvt_f16_f32(x)) : narrow_bf16(x);
}

INLINE void v_store(void *p, float32x4_t x, raddle_dtype type) {
    if (type == RADDLE_F32) {
        vst1q_f32(p, x);
    } else {
        vst1_u16(p, narrow(x, type));
    }
}

INLINE void v_store_tail(void *p, float32x4_t x, int count, raddle_dtype type) {
    float few[4];
    uint16_t few_16[4];
    if (type == RADDLE_F32) {
        vst1q_f32(few, x);
        __builtin_memcpy(p, few, (size_t)count * sizeof(float));
    } else {
        vst1_u16(few_16, narrow(x, type));
        __builtin_memcpy(p, few_16, (size_t)count * sizeof(uint16_t));
    }
}

INLINE float v_sum(float32x4_t x) {
    return vaddvq_f32(x);
}

INLINE float v_maximum(float32x4_t x) {
    return vmaxnmvq_f32(x);
}

INLINE void v_sum4(float *to, float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

/* 2^x: the integer part goes to the exponent, a polynomial of degree 6 (relative error 2e-9,
 * minimax on [-1/2, 1/2]) does the rest. The power of two is applied as two factors, so that
 * results may be subnormal; clamped to [-200, 256], where they are 0 and infinity already. fmax and
 * fmin (not their nm forms) keep NaN. */
INLINE float32x4_t v_exp2(float32x4_t x) {
    const float32x4_t y = vminq_f32(vdupq_n_f32(256.0f), vmaxq_f32(vdupq_n_f32(-200.0f), x));
    const float32x4_t whole = vrndnq_f32(y);
    const float32x4_t f = vsubq_f32(y, whole);
    float32x4_t p = vdupq_n_f32(0x1.41d334p-13f);
    p = vfmaq_f32(vdupq_n_f32(0x1.5f456ap-10f), p, f);
    p = vfmaq_f32(vdupq_n_f32(0x1.3b2dbcp-7f), p, f);
    p = vfmaq_f32(vdupq_n_f32(0x1.c6aed4p-5f), p, f);
    p = vfmaq_f32(vdupq_n_f32(0x1.ebfbdap-3f), p, f);
    p = vfmaq_f32(vdupq_n_f32(0x1.62e43p-1f), p, f);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, f);
    const int32x4_t power = vcvtq_s32_f32(whole);
    const int32x4_t first = vshrq_n_s32(power, 1);
    const int32x4_t second = vsubq_s32(power, first);
    const int32x4_t bias = vdupq_n_s32(127);
    const float32x4_t a = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(first, bias), 23));
    const float32x4_t b = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(second, bias), 23));
    return vmulq_f32(vmulq_f32(p, a), b);
}

INLINE void v_transpose(float32x4_t *x) {
    const float32x4x2_t ab = vtrnq_f32(x[0], x[1]);
    const float32x4x2_t cd = vtrnq_f32(x[2], x[3]);
    x[0] = vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]));
    x[1] = vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]));
    x[2] = vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]));
    x[3] = vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]));
}

#include "cpu/vec_template.inc"

const raddle_vec raddle_vec_neon = RADDLE_VEC_TABLE("neon", NULL, NULL, NULL);

#endif

/* vec_avx512.h - what vec_template.inc asks of an instruction set, for sixteen floats: AVX-512 F,
 * BW, DQ and VL.
 */
#ifndef RADDLE_CPU_VEC_AVX512_H
#define RADDLE_CPU_VEC_AVX512_H

#include "cpu/vec.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define V __m512
#define V_LANES 16
#define V_BLOCKS 4
#define V_DOT_ROWS 4
#define V_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) V_TARGET
#if defined(__clang__)
#define V_UNROLL _Pragma("clang loop unroll(full)")
#else
#define V_UNROLL _Pragma("GCC unroll 16")
#endif

INLINE __m512 v_zero(void) {
    return _mm512_setzero_ps();
}

INLINE __m512 v_set1(float x) {
    return _mm512_set1_ps(x);
}

INLINE __m512 v_add(__m512 a, __m512 b) {
    return _mm512_add_ps(a, b);
}

INLINE __m512 v_mul(__m512 a, __m512 b) {
    return _mm512_mul_ps(a, b);
}

INLINE __m512 v_fma(__m512 a, __m512 b, __m512 c) {
    return _mm512_fmadd_ps(a, b, c);
}

/* maxps returns its second operand when one is NaN. */
INLINE __m512 v_max(__m512 a, __m512 b) {
    return _mm512_max_ps(a, b);
}

INLINE __m512 widen(__m256i x, raddle_dtype type) {
    return type == RADDLE_F16
               ? _mm512_cvtph_ps(x)
               : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* Sixteen bytes. e5m2 is the upper half of a float16. e4m3 has one exponent bit less: as a float16 it
 * counts 2^-8 of its value, subnormal or not; 0x7f is NaN. */
INLINE __m512 widen_8(__m128i x, raddle_dtype type) {
    const __m256i wide = _mm256_cvtepu8_epi16(x);
    const __m256i high = _mm256_slli_epi16(wide, 8);
    if (type == RADDLE_F8_E5M2) {
        return _mm512_cvtph_ps(high);
    }
    const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_and_si256(high, _mm256_set1_epi16((short)0x8000));
    const __m256i half = _mm256_or_si256(_mm256_slli_epi16(size, 7), sign);
    return _mm512_mul_ps(
        _mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00))),
        _mm512_set1_ps(256.0f));
}

INLINE bool is_8(raddle_dtype type) {
    return type == RADDLE_F8_E4M3 || type == RADDLE_F8_E5M2;
}

INLINE __m512 v_load(const void *p, raddle_dtype type) {
    return type == RADDLE_F32 ? _mm512_loadu_ps(p)
           : is_8(type)       ? widen_8(_mm_loadu_si128(p), type)
                              : widen(_mm256_loadu_si256(p), type);
}

INLINE __mmask16 tail_mask(int count) {
    return (__mmask16)((1u << count) - 1);
}

INLINE __m512 v_load_tail(const void *p, int count, raddle_dtype type) {
    const __mmask16 mask = tail_mask(count);
    return type == RADDLE_F32 ? _mm512_maskz_loadu_ps(mask, p)
           : is_8(type)       ? widen_8(_mm_maskz_loadu_epi8(mask, p), type)
                              : widen(_mm256_maskz_loadu_epi16(mask, p), type);
}

/* bfloat16: adds half a unit of the kept bits, less one when they are even; NaN made quiet. */
INLINE __m256i narrow_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i rounded =
        _mm512_mask_or_epi32(_mm512_add_epi32(bits, half), nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE __m256i narrow(__m512 x, raddle_dtype type) {
    return type == RADDLE_F16 ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                              : narrow_bf16(x);
}

INLINE void v_store(void *p, __m512 x, raddle_dtype type) {
    if (type == RADDLE_F32) {
        _mm512_storeu_ps(p, x);
    } else {
        _mm256_storeu_si256(p, narrow(x, type));
    }
}

INLINE void v_store_tail(void *p, __m512 x, int count, raddle_dtype type) {
    if (type == RADDLE_F32) {
        _mm512_mask_storeu_ps(p, tail_mask(count), x);
    } else {
        _mm256_mask_storeu_epi16(p, tail_mask(count), narrow(x, type));
    }
}

INLINE float v_sum(__m512 x) {
    return _mm512_reduce_add_ps(x);
}

INLINE float v_maximum(__m512 x) {
    return _mm512_reduce_max_ps(x);
}

/* Sums inside each 128-bit lane of four vectors at once, then over the lanes. */
INLINE void v_sum4(float *to, __m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* 2^x: the integer part goes to the exponent, a polynomial of degree 6 (relative error 2e-9,
 * minimax on [-1/2, 1/2]) does the rest. Below -200 the result is 0 either way; the clamp keeps
 * -inf finite. */
INLINE __m512 v_exp2(__m512 x) {
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(y, whole);
    __m512 p = _mm512_set1_ps(0x1.41d334p-13f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.5f456ap-10f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3b2dbcp-7f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c6aed4p-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfbdap-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e43p-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* 16 x 16: pairs, then fours inside 128-bit lanes, then the lanes themselves. */
INLINE void v_transpose(__m512 *x) {
    __m512 t[16];
    V_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512 a = _mm512_unpacklo_ps(x[4 * i], x[4 * i + 1]);
        const __m512 b = _mm512_unpackhi_ps(x[4 * i], x[4 * i + 1]);
        const __m512 c = _mm512_unpacklo_ps(x[4 * i + 2], x[4 * i + 3]);
        const __m512 d = _mm512_unpackhi_ps(x[4 * i + 2], x[4 * i + 3]);
        t[4 * i] = _mm512_shuffle_ps(a, c, 0x44);
        t[4 * i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[4 * i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[4 * i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    V_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512 low_01 = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88);
        const __m512 high_01 = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
        const __m512 low_23 = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
        const __m512 high_23 = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
        x[i] = _mm512_shuffle_f32x4(low_01, low_23, 0x88);
        x[4 + i] = _mm512_shuffle_f32x4(high_01, high_23, 0x88);
        x[8 + i] = _mm512_shuffle_f32x4(low_01, low_23, 0xdd);
        x[12 + i] = _mm512_shuffle_f32x4(high_01, high_23, 0xdd);
    }
}

#endif
#endif

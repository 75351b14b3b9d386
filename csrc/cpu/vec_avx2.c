/* vec_avx2.c - eight floats at a time: AVX2 with FMA and F16C. Table avx2. */
#include "cpu/vec.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define V __m256
#define V_LANES 8
#define V_BLOCKS 1
#define V_DOT_ROWS 2
#define V_TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) V_TARGET

INLINE __m256 v_zero(void) {
    return _mm256_setzero_ps();
}

INLINE __m256 v_set1(float x) {
    return _mm256_set1_ps(x);
}

INLINE __m256 v_add(__m256 a, __m256 b) {
    return _mm256_add_ps(a, b);
}

INLINE __m256 v_mul(__m256 a, __m256 b) {
    return _mm256_mul_ps(a, b);
}

INLINE __m256 v_fma(__m256 a, __m256 b, __m256 c) {
    return _mm256_fmadd_ps(a, b, c);
}

/* maxps returns its second operand when one is NaN. */
INLINE __m256 v_max(__m256 a, __m256 b) {
    return _mm256_max_ps(a, b);
}

INLINE __m256 widen(__m128i x, raddle_dtype type) {
    return type == RADDLE_F16
               ? _mm256_cvtph_ps(x)
               : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

/* Eight bytes. e5m2 is the upper half of a float16. e4m3 has one exponent bit less: as a float16 it
 * counts 2^-8 of its value, subnormal or not; 0x7f is NaN. */
INLINE __m256 widen_8(__m128i x, raddle_dtype type) {
    const __m128i wide = _mm_cvtepu8_epi16(x);
    const __m128i high = _mm_slli_epi16(wide, 8);
    if (type == RADDLE_F8_E5M2) {
        return _mm256_cvtph_ps(high);
    }
    const __m128i size = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
    const __m128i nan = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_and_si128(high, _mm_set1_epi16((short)0x8000));
    const __m128i half = _mm_or_si128(_mm_slli_epi16(size, 7), sign);
    const __m128i quiet = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
    return _mm256_mul_ps(_mm256_cvtph_ps(quiet), _mm256_set1_ps(256.0f));
}

INLINE bool is_8(raddle_dtype type) {
    return type == RADDLE_F8_E4M3 || type == RADDLE_F8_E5M2;
}

INLINE __m256 v_load(const void *p, raddle_dtype type) {
    return type == RADDLE_F32 ? _mm256_loadu_ps(p)
           : is_8(type)       ? widen_8(_mm_loadl_epi64(p), type)
                              : widen(_mm_loadu_si128(p), type);
}

/* All ones in the first count of eight 32-bit lanes. */
INLINE __m256i tail_mask(int count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
}

INLINE __m256 v_load_tail(const void *p, int count, raddle_dtype type) {
    if (type == RADDLE_F32) {
        return _mm256_maskload_ps(p, tail_mask(count));
    }
    uint16_t few[8] = {0};
    if (is_8(type)) {
        __builtin_memcpy(few, p, (size_t)count);
        return widen_8(_mm_loadl_epi64((const __m128i *)few), type);
    }
    __builtin_memcpy(few, p, (size_t)count * sizeof(uint16_t));
    return widen(_mm_loadu_si128((const __m128i *)few), type);
}

/* bfloat16: adds half a unit of the kept bits, less one when they are even; NaN made quiet. */
INLINE __m128i narrow_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

INLINE __m128i narrow(__m256 x, raddle_dtype type) {
    return type == RADDLE_F16 ? _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                              : narrow_bf16(x);
}

INLINE void v_store(void *p, __m256 x, raddle_dtype type) {
    if (type == RADDLE_F32) {
        _mm256_storeu_ps(p, x);
    } else {
        _mm_storeu_si128(p, narrow(x, type));
    }
}

INLINE void v_store_tail(void *p, __m256 x, int count, raddle_dtype type) {
    if (type == RADDLE_F32) {
        _mm256_maskstore_ps(p, tail_mask(count), x);
        return;
    }
    uint16_t few[8];
    _mm_storeu_si128((__m128i *)few, narrow(x, type));
    __builtin_memcpy(p, few, (size_t)count * sizeof(uint16_t));
}

INLINE float v_sum(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float v_maximum(__m256 x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* Sums inside each 128-bit lane of four vectors at once, then over the lanes. */
INLINE void v_sum4(float *to, __m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

/* 2^x: the integer part goes to the exponent, a polynomial of degree 6 (relative error 2e-9,
 * minimax on [-1/2, 1/2]) does the rest. The power of two is applied as two factors, so that
 * results may be subnormal; clamped to [-200, 256], where they are 0 and infinity already. */
INLINE __m256 v_exp2(__m256 x) {
    const __m256 y =
        _mm256_min_ps(_mm256_set1_ps(256.0f), _mm256_max_ps(_mm256_set1_ps(-200.0f), x));
    const __m256 whole = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(y, whole);
    __m256 p = _mm256_set1_ps(0x1.41d334p-13f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.5f456ap-10f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.3b2dbcp-7f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.c6aed4p-5f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.ebfbdap-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.62e43p-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_cvtps_epi32(whole);
    const __m256i first = _mm256_srai_epi32(power, 1);
    const __m256i second = _mm256_sub_epi32(power, first);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23));
    const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(p, a), b);
}

/* 8 x 8: pairs, then fours inside 128-bit lanes, then the lanes themselves. */
INLINE void v_transpose(__m256 *x) {
    __m256 t[8];
    for (int i = 0; i < 2; i++) {
        const __m256 a = _mm256_unpacklo_ps(x[4 * i], x[4 * i + 1]);
        const __m256 b = _mm256_unpackhi_ps(x[4 * i], x[4 * i + 1]);
        const __m256 c = _mm256_unpacklo_ps(x[4 * i + 2], x[4 * i + 3]);
        const __m256 d = _mm256_unpackhi_ps(x[4 * i + 2], x[4 * i + 3]);
        t[4 * i] = _mm256_shuffle_ps(a, c, 0x44);
        t[4 * i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[4 * i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[4 * i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
        x[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
    }
}

#include "cpu/vec_template.inc"

const raddle_vec raddle_vec_avx2 = RADDLE_VEC_TABLE("avx2", NULL, NULL, NULL);

#endif

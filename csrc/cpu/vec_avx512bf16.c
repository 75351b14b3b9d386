/* vec_avx512bf16.c - products of bfloat16 with bfloat16 by vdpbf16ps: sixteen sums of two products.
 *
 * Each 32-bit lane of both factors holds two neighbours of the summed index. dot_rows: neighbours
 * of a row, as they lie. add_rows: the same column of two rows, interleaved on the way in. Panels
 * hold such pairs ready: pack_dot [columns / 16][length / 2][16] pairs, pack_add [rows / 2][length
 * up to a multiple of 16] pairs. Micro-tiles are 4 left rows by 4 vectors: 16 sums hide the 6
 * cycles that the instruction takes on Zen 4.
 */
#include "cpu/vec_avx512bf16.h"

#if defined(__x86_64__)

#include <string.h>

enum { LINE_LANES = 32 }; /* bfloat16 in a cache line */

BF16_INLINE const uint16_t *row_at(const void *const *rows, const raddle_vec_rows *b, int n) {
    return (const uint16_t *)rows[n] + b->offset;
}

/* Into the second cache: the first is too small for all that is on its way. */
BF16_INLINE void prefetch_part(const raddle_vec_rows *b, int n, int at, int length) {
    if (b->next && n < b->count) {
        const uint16_t *part = row_at(b->next, b, n) + at;
        for (int i = 0; i < length; i += LINE_LANES) {
            __builtin_prefetch(part + i, 0, 2);
        }
    }
}

BF16_INLINE void prefetch_row(const raddle_vec_rows *b, int n, int length) {
    prefetch_part(b, n, 0, length);
}

/* ---------------------------------------------------------------- rows where they lie */

/* 32 elements of num_rows left and four right rows, fewer in the last step. */
BF16_INLINE void dot_step(__m512 sums[ROWS][VECS], const uint16_t *a, int64_t lda,
                          const uint16_t *const row[VECS], int k, __mmask32 mask, int num_rows) {
    __m512i right[VECS];
    V_UNROLL
    for (int n = 0; n < VECS; n++) {
        right[n] = _mm512_maskz_loadu_epi16(mask, row[n] + k);
    }
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        const __m512i x = _mm512_maskz_loadu_epi16(mask, a + m * lda + k);
        V_UNROLL
        for (int n = 0; n < VECS; n++) {
            sums[m][n] = dot_pairs(sums[m][n], x, right[n]);
        }
    }
}

BF16_INLINE void dot_tile(float *c, int64_t ldc, const uint16_t *a, int64_t lda,
                          const uint16_t *const row[VECS], int left, int depth, int num_rows) {
    __m512 sums[ROWS][VECS];
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int n = 0; n < VECS; n++) {
            sums[m][n] = v_zero();
        }
    }
    int k = 0;
    for (; k + LANES <= depth; k += LANES) {
        dot_step(sums, a, lda, row, k, ALL_LANES, num_rows);
    }
    if (k < depth) {
        dot_step(sums, a, lda, row, k, lanes_mask(depth - k), num_rows);
    }
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        float four[VECS];
        float *to = left == VECS ? c + m * ldc : four;
        v_sum4(to, sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
        for (int n = 0; left < VECS && n < left; n++) {
            c[m * ldc + n] = four[n];
        }
    }
}

static BF16_TARGET void dot_rows(float *c, int64_t ldc, const void *a_rows, int64_t lda,
                                 const raddle_vec_rows *b, int rows, int depth) {
    const uint16_t *a = a_rows;
    for (int n = 0; n < b->count; n += VECS) {
        const int left = b->count - n < VECS ? b->count - n : VECS;
        const uint16_t *row[VECS];
        for (int i = 0; i < VECS; i++) {
            row[i] = row_at(b->rows, b, n + (i < left ? i : left - 1));
            prefetch_row(b, n + i, depth);
        }
        int m = 0;
        for (; m + ROWS <= rows; m += ROWS) {
            dot_tile(c + m * ldc + n, ldc, a + m * lda, lda, row, left, depth, ROWS);
        }
        if (m + 2 <= rows) {
            dot_tile(c + m * ldc + n, ldc, a + m * lda, lda, row, left, depth, 2);
            m += 2;
        }
        if (m < rows) {
            dot_tile(c + m * ldc + n, ldc, a + m * lda, lda, row, left, depth, 1);
        }
    }
}

/* 32 columns of two rows as pairs, 16 columns in each. */
typedef struct pair_lines {
    __m512i first, second;
} pair_lines;

BF16_INLINE pair_lines interleave(__m512i even, __m512i odd) {
    const __m512i first =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const pair_lines pairs = {_mm512_permutex2var_epi16(even, first, odd),
                              _mm512_permutex2var_epi16(even, second, odd)};
    return pairs;
}

/* Adds the weighted rows even and odd (NULL: none) to the sums; width columns exist. */
BF16_INLINE void add_step(__m512 sums[ROWS][VECS], const uint16_t *p, int64_t ldp,
                          const uint16_t *even, const uint16_t *odd, int width, int num_rows,
                          int num_vecs) {
    __m512i right[VECS];
    V_UNROLL
    for (int i = 0; i < num_vecs; i += 2) {
        const __mmask32 mask = lanes_mask(width - i * PAIR_LANES);
        const int at = i * PAIR_LANES;
        const pair_lines pairs =
            interleave(_mm512_maskz_loadu_epi16(mask, even + at),
                       odd ? _mm512_maskz_loadu_epi16(mask, odd + at) : _mm512_setzero_si512());
        right[i] = pairs.first;
        right[i + 1] = pairs.second;
    }
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        const __m512i x = odd ? broadcast_pair(p + m * ldp) : _mm512_set1_epi32(p[m * ldp]);
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            sums[m][i] = dot_pairs(sums[m][i], x, right[i]);
        }
    }
}

/* num_rows rows of c, num_vecs times 16 columns wide, of which width exist. Prefetches, if asked, as
 * much of the next rows as it reads of these. */
BF16_INLINE void add_tile(float *c, int64_t ldc, const uint16_t *p, int64_t ldp,
                          const raddle_vec_rows *b, int at, int width, int num_rows, int num_vecs,
                          bool prefetch) {
    __m512 sums[ROWS][VECS];
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            const __mmask16 mask = pair_mask(width - i * PAIR_LANES);
            sums[m][i] = _mm512_maskz_loadu_ps(mask, c + m * ldc + at + i * PAIR_LANES);
        }
    }
    int n = 0;
    for (; n + 2 <= b->count; n += 2) {
        if (prefetch) {
            prefetch_part(b, n, at, width);
            prefetch_part(b, n + 1, at, width);
        }
        add_step(sums, p + n, ldp, row_at(b->rows, b, n) + at, row_at(b->rows, b, n + 1) + at,
                 width, num_rows, num_vecs);
    }
    if (n < b->count) {
        add_step(sums, p + n, ldp, row_at(b->rows, b, n) + at, NULL, width, num_rows, num_vecs);
    }
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            const __mmask16 mask = pair_mask(width - i * PAIR_LANES);
            _mm512_mask_storeu_ps(c + m * ldc + at + i * PAIR_LANES, mask, sums[m][i]);
        }
    }
}

/* num_rows rows, 64 columns at a time and 32 at the end. */
BF16_INLINE void add_strip(float *c, int64_t ldc, const uint16_t *p, int64_t ldp,
                           const raddle_vec_rows *b, int width, int num_rows, bool prefetch) {
    int d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES) {
        add_tile(c, ldc, p, ldp, b, d, 2 * LANES, num_rows, VECS, prefetch);
    }
    for (; d < width; d += LANES) {
        add_tile(c, ldc, p, ldp, b, d, width - d, num_rows, VECS / 2, prefetch);
    }
}

static BF16_TARGET void add_rows(float *c, int64_t ldc, const void *p_rows, int64_t ldp,
                                 const raddle_vec_rows *b, int rows, int width) {
    const uint16_t *p = p_rows;
    int m = 0;
    for (; m + ROWS <= rows; m += ROWS) {
        add_strip(c + m * ldc, ldc, p + m * ldp, ldp, b, width, ROWS, m == 0);
    }
    if (m + 2 <= rows) {
        add_strip(c + m * ldc, ldc, p + m * ldp, ldp, b, width, 2, m == 0);
        m += 2;
    }
    if (m < rows) {
        add_strip(c + m * ldc, ldc, p + m * ldp, ldp, b, width, 1, m == 0);
    }
}

/* ---------------------------------------------------------------- panels */

static BF16_TARGET void pack_dot(const raddle_vec_panel *panel, const raddle_vec_rows *b) {
    const int pairs = (panel->length + 1) / 2;
    int32_t *to = panel->data;
    for (int n = 0; n < b->count; n += STEP) {
        for (int i = 0; i < STEP; i++) {
            prefetch_row(b, n + i, panel->length);
        }
        for (int k = 0; k < pairs; k += PAIR_LANES) {
            const __mmask32 mask = lanes_mask(panel->length - 2 * k);
            __m512 lines[STEP];
            V_UNROLL
            for (int i = 0; i < STEP; i++) {
                const bool exists = n + i < b->count;
                const uint16_t *row = row_at(b->rows, b, exists ? n + i : n) + 2 * k;
                lines[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(exists ? mask : 0, row));
            }
            v_transpose(lines);
            V_UNROLL
            for (int i = 0; i < PAIR_LANES; i++) {
                if (k + i < pairs) {
                    _mm512_storeu_ps(to + (k + i) * STEP, lines[i]);
                }
            }
        }
        to += pairs * STEP;
    }
}

static BF16_TARGET void pack_add(const raddle_vec_panel *panel, const raddle_vec_rows *b) {
    const int padded = padded_width(panel->length);
    for (int n = 0; n < b->count; n += 2) {
        const bool is_pair = n + 1 < b->count;
        const uint16_t *even = row_at(b->rows, b, n);
        const uint16_t *odd = row_at(b->rows, b, is_pair ? n + 1 : n);
        int32_t *to = (int32_t *)panel->data + (int64_t)(n / 2) * padded;
        prefetch_row(b, n, panel->length);
        prefetch_row(b, n + 1, panel->length);
        for (int d = 0; d < padded; d += LANES) {
            const __mmask32 mask = lanes_mask(panel->length - d);
            const pair_lines pairs =
                interleave(_mm512_maskz_loadu_epi16(mask, even + d),
                           _mm512_maskz_loadu_epi16(is_pair ? mask : 0, odd + d));
            _mm512_storeu_si512(to + d, pairs.first);
            if (d + STEP < padded) {
                _mm512_storeu_si512(to + d + STEP, pairs.second);
            }
        }
    }
}

/* sums[m][i] += over pairs n: left[m * ld + 2 n ..] times the vector at right + n * stride + i *
 * block_stride. */
BF16_INLINE void multiply_tile(__m512 sums[ROWS][VECS], const uint16_t *left, int64_t ld,
                               const int32_t *right, int64_t stride, int64_t block_stride,
                               int pairs, int num_rows, int num_vecs) {
    for (int n = 0; n < pairs; n++) {
        __m512i line[VECS];
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            line[i] = _mm512_loadu_si512(right + n * stride + i * block_stride);
        }
        V_UNROLL
        for (int m = 0; m < num_rows; m++) {
            const __m512i x = broadcast_pair(left + m * ld + 2 * n);
            V_UNROLL
            for (int i = 0; i < num_vecs; i++) {
                sums[m][i] = dot_pairs(sums[m][i], x, line[i]);
            }
        }
    }
}

BF16_INLINE void dot_panel_tile(float *c, int64_t ldc, const uint16_t *a, int64_t lda,
                                const int32_t *right, int length, int num_rows, int num_vecs) {
    __m512 sums[ROWS][VECS];
    const int pairs = length / 2;
    const int64_t block_stride = (int64_t)(length + 1) / 2 * STEP;
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            sums[m][i] = v_zero();
        }
    }
    multiply_tile(sums, a, lda, right, STEP, block_stride, pairs, num_rows, num_vecs);
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            if (length % 2 != 0) {
                /* The last element has no neighbour; that of b is 0, that of a is not ours. */
                const __m512i x = _mm512_set1_epi32(a[m * lda + length - 1]);
                const int32_t *last = right + pairs * STEP + i * block_stride;
                sums[m][i] = dot_pairs(sums[m][i], x, _mm512_loadu_si512(last));
            }
            _mm512_storeu_ps(c + m * ldc + i * STEP, sums[m][i]);
        }
    }
}

BF16_TARGET void raddle_vec_bf16_dot_panel(float *c, int64_t ldc, const void *a_rows, int64_t lda,
                                           const raddle_vec_panel *panel, int rows, int first,
                                           int last) {
    const uint16_t *a = a_rows;
    const int64_t pairs = (panel->length + 1) / 2;
    for (int n = first; n < last;) {
        const int vecs = last - n > (VECS - 1) * STEP ? VECS : 1;
        const int32_t *right = (const int32_t *)panel->data + n * pairs;
        for (int m = 0; m < rows;) {
            const int num_rows = rows - m >= ROWS ? ROWS : 1;
            float *to = c + m * ldc + n;
            const uint16_t *am = a + m * lda;
            if (num_rows == ROWS && vecs == VECS) {
                dot_panel_tile(to, ldc, am, lda, right, panel->length, ROWS, VECS);
            } else if (num_rows == ROWS) {
                dot_panel_tile(to, ldc, am, lda, right, panel->length, ROWS, 1);
            } else if (vecs == VECS) {
                dot_panel_tile(to, ldc, am, lda, right, panel->length, 1, VECS);
            } else {
                dot_panel_tile(to, ldc, am, lda, right, panel->length, 1, 1);
            }
            m += num_rows;
        }
        n += vecs * STEP;
    }
}

BF16_INLINE void add_panel_tile(float *c, int64_t ldc, const uint16_t *p, int64_t ldp,
                                const int32_t *right, int stride, int pairs, int width,
                                int num_rows, int num_vecs) {
    __m512 sums[ROWS][VECS];
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            const __mmask16 mask = pair_mask(width - i * PAIR_LANES);
            sums[m][i] = _mm512_maskz_loadu_ps(mask, c + m * ldc + i * PAIR_LANES);
        }
    }
    multiply_tile(sums, p, ldp, right, stride, STEP, pairs, num_rows, num_vecs);
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            const __mmask16 mask = pair_mask(width - i * PAIR_LANES);
            _mm512_mask_storeu_ps(c + m * ldc + i * PAIR_LANES, mask, sums[m][i]);
        }
    }
}

BF16_TARGET void raddle_vec_bf16_add_panel(float *c, int64_t ldc, const void *p_rows, int64_t ldp,
                                           const raddle_vec_panel *panel, int rows, int first,
                                           int last) {
    const uint16_t *p = (const uint16_t *)p_rows + first;
    const int stride = padded_width(panel->length);
    const int pairs = (last - first + 1) / 2;
    const int32_t *base = (const int32_t *)panel->data + (int64_t)(first / 2) * stride;
    for (int d = 0; d < panel->length;) {
        const int width = panel->length - d;
        const int vecs = width > (VECS - 1) * STEP ? VECS : 1;
        for (int m = 0; m < rows;) {
            const int num_rows = rows - m >= ROWS ? ROWS : 1;
            float *to = c + m * ldc + d;
            const uint16_t *pm = p + m * ldp;
            if (num_rows == ROWS && vecs == VECS) {
                add_panel_tile(to, ldc, pm, ldp, base + d, stride, pairs, width, ROWS, VECS);
            } else if (num_rows == ROWS) {
                add_panel_tile(to, ldc, pm, ldp, base + d, stride, pairs, width, ROWS, 1);
            } else if (vecs == VECS) {
                add_panel_tile(to, ldc, pm, ldp, base + d, stride, pairs, width, 1, VECS);
            } else {
                add_panel_tile(to, ldc, pm, ldp, base + d, stride, pairs, width, 1, 1);
            }
            m += num_rows;
        }
        d += vecs * STEP;
    }
}

/* ---------------------------------------------------------------- weights */

/* The largest of each of four vectors. */
BF16_INLINE __m128 max4(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = v_max(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = v_max(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = v_max(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half =
        _mm256_max_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Raises the maxima of four states; factors and what to subtract come back. */
BF16_INLINE void raise4(__m128 most, float *states, float factors[ROWS], float minus_base[ROWS]) {
    const __m128 first = _mm_loadu_ps(states), last = _mm_loadu_ps(states + 4);
    const __m128 before = _mm_shuffle_ps(first, last, 0x88);
    const __m128 max = _mm_max_ps(most, before);
    const __mmask8 raised = _mm_cmp_ps_mask(max, before, _CMP_NEQ_OQ);
    const __m128 one = _mm_set1_ps(1.0f);
    __m128 factor = one, sum = _mm_shuffle_ps(first, last, 0xdd);
    if (raised) {
        const __m512 power = v_exp2(_mm512_castps128_ps512(_mm_sub_ps(before, max)));
        factor = _mm_mask_mov_ps(one, raised, _mm512_castps512_ps128(power));
        sum = _mm_mul_ps(sum, factor);
    }
    _mm_storeu_ps(states, _mm_unpacklo_ps(max, sum));
    _mm_storeu_ps(states + 4, _mm_unpackhi_ps(max, sum));
    _mm_storeu_ps(factors, factor);
    const __mmask8 is_empty = _mm_cmp_ps_mask(max, _mm_set1_ps(-INFINITY), _CMP_EQ_OQ);
    _mm_storeu_ps(minus_base, _mm_maskz_sub_ps((__mmask8)~is_empty, _mm_setzero_ps(), max));
}

/* Four rows of weigh_rows, of which num_rows exist. */
BF16_INLINE void weigh_tile(uint16_t *to, int64_t ldto, const float *x, int64_t ldx, int count,
                            float scale, float *state, float *out_factors, int num_rows) {
    const __m512 least = v_set1(-INFINITY), by = v_set1(scale);
    float states[2 * ROWS] = {0}, factors[ROWS], minus_base[ROWS], added[ROWS];
    __m512 most[ROWS] = {least, least, least, least};
    __m512 sums[ROWS] = {v_zero(), v_zero(), v_zero(), v_zero()};
    /* Whole vectors without a mask, which would keep loads from taking their data out of stores that
     * are still under way: the logits were stored just now, the weights are loaded at once. */
    int i = 0;
    for (; i + PAIR_LANES <= count; i += PAIR_LANES) {
        V_UNROLL
        for (int m = 0; m < num_rows; m++) {
            most[m] = v_max(_mm512_loadu_ps(x + m * ldx + i), most[m]);
        }
    }
    const __mmask16 tail = pair_mask(count - i);
    if (tail != 0) {
        V_UNROLL
        for (int m = 0; m < num_rows; m++) {
            most[m] = v_max(_mm512_mask_loadu_ps(least, tail, x + m * ldx + i), most[m]);
        }
    }
    memcpy(states, state, 2 * (size_t)num_rows * sizeof *state);
    raise4(_mm_mul_ps(max4(most[0], most[1], most[2], most[3]), _mm_set1_ps(scale)), states,
           factors, minus_base);
    for (i = 0; i + PAIR_LANES <= count; i += PAIR_LANES) {
        V_UNROLL
        for (int m = 0; m < num_rows; m++) {
            const __m512 logits = _mm512_loadu_ps(x + m * ldx + i);
            const __m512 y = v_exp2(v_fma(logits, by, v_set1(minus_base[m])));
            sums[m] = v_add(sums[m], y);
            _mm256_storeu_si256((__m256i *)(to + m * ldto + i), (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
    if (tail != 0) {
        V_UNROLL
        for (int m = 0; m < num_rows; m++) {
            const __m512 logits = _mm512_maskz_loadu_ps(tail, x + m * ldx + i);
            const __m512 y = v_exp2(v_fma(logits, by, v_set1(minus_base[m])));
            sums[m] = _mm512_mask_add_ps(sums[m], tail, sums[m], y);
            _mm256_mask_storeu_epi16(to + m * ldto + i, tail, (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
    v_sum4(added, sums[0], sums[1], sums[2], sums[3]);
    for (int m = 0; m < num_rows; m++) {
        state[2 * m] = states[2 * m];
        state[2 * m + 1] = states[2 * m + 1] + added[m];
        out_factors[m] = factors[m];
    }
}

BF16_TARGET void raddle_vec_bf16_weigh_rows(void *to_rows, int64_t ldto, const float *x,
                                            int64_t ldx, int rows, int count, float scale,
                                            float *state, float *factors) {
    uint16_t *to = to_rows;
    int m = 0;
    for (; m + ROWS <= rows; m += ROWS) {
        weigh_tile(to + m * ldto, ldto, x + m * ldx, ldx, count, scale, state + 2 * m, factors + m,
                   ROWS);
    }
    for (; m < rows; m++) {
        weigh_tile(to + m * ldto, ldto, x + m * ldx, ldx, count, scale, state + 2 * m, factors + m,
                   1);
    }
}

const raddle_vec_block raddle_vec_block_avx512bf16 = {
    .operand = RADDLE_BF16,
    .dot_rows = dot_rows,
    .add_rows = add_rows,
    .pack_dot = pack_dot,
    .pack_add = pack_add,
    .dot_panel = raddle_vec_bf16_dot_panel,
    .add_panel = raddle_vec_bf16_add_panel,
    .weigh_rows = raddle_vec_bf16_weigh_rows,
};

#endif

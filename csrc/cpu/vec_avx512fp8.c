/* vec_avx512fp8.c - products of bfloat16 with float8 rows: bytes become bfloat16, which holds both
 * formats exactly, by table, and vdpbf16ps multiplies pairs of them.
 *
 * The magnitude of a byte (7 bits) chooses the low and the high byte of its bfloat16 out of two
 * tables of 128 bytes each (vpermi2b of AVX512_VBMI); the sign is joined; unpacking low with high
 * gives 64 bfloat16 in two vectors, in each 128-bit lane the lane's first 8 bytes and its last 8.
 * dot_rows: the four lanes hold 16 bytes of four tokens, so that of 16 tokens four vectors of sums
 * are left, added up inside lanes alone. add_rows: columns of two rows are interleaved while they
 * are bytes. 16 tokens of 128 and four left rows take 115 ns for dot_rows and 98 for add_rows where
 * bfloat16 rows take 126 and 114 (Zen 4, cached).
 */
#include "cpu/vec_avx512bf16.h"

#if defined(__x86_64__)

#define FP8_TARGET                                                                                 \
    __attribute__((target("avx512vbmi,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,"     \
                          "f16c")))
#define FP8_INLINE static inline __attribute__((always_inline)) FP8_TARGET

enum {
    TOKENS = 16,     /* of a step of dot_rows */
    GROUP = 4,       /* tokens whose bytes share a vector */
    CHUNK = 16,      /* bytes of a token in it */
    COLUMNS = 64,    /* of a step of add_rows */
    LINE_BYTES = 64, /* of a cache line */
};

/* ---------------------------------------------------------------- tables */

/* Bits of the bfloat16 that has the value of byte m < 128. Subnormal ones by their highest bit. */
#define E4M3_BITS(m)                                                                               \
    ((m) == 127 ? 0x7fc0                                                                           \
     : (m) >= 8 ? ((m) << 4) + 0x3c00                                                              \
     : (m) >= 4 ? 0x3c00 + (((m)&3) << 5)                                                          \
     : (m) >= 2 ? 0x3b80 + (((m)&1) << 6)                                                          \
     : (m) == 1 ? 0x3b00                                                                           \
                : 0)
#define E5M2_BITS(m)                                                                               \
    ((m) > 124    ? 0x7fc0 | ((m)&3) << 5                                                          \
     : (m) == 124 ? 0x7f80                                                                         \
     : (m) >= 4   ? ((m) << 5) + 0x3800                                                            \
     : (m) >= 2   ? 0x3800 + (((m)&1) << 6)                                                        \
     : (m) == 1   ? 0x3780                                                                         \
                  : 0)
#define E4M3_LOW(m) E4M3_BITS(m) & 0xff
#define E4M3_HIGH(m) E4M3_BITS(m) >> 8
#define E5M2_LOW(m) E5M2_BITS(m) & 0xff
#define E5M2_HIGH(m) E5M2_BITS(m) >> 8
#define FOUR(f, m) f((m)), f((m) + 1), f((m) + 2), f((m) + 3)
#define SIXTEEN(f, m) FOUR(f, m), FOUR(f, (m) + 4), FOUR(f, (m) + 8), FOUR(f, (m) + 12)
#define SIXTY_FOUR(f, m)                                                                           \
    SIXTEEN(f, m), SIXTEEN(f, (m) + 16), SIXTEEN(f, (m) + 32), SIXTEEN(f, (m) + 48)

typedef struct byte_tables {
    uint8_t low[128], high[128];
} byte_tables;

static const byte_tables tables_e4m3 = {
    {SIXTY_FOUR(E4M3_LOW, 0), SIXTY_FOUR(E4M3_LOW, 64)},
    {SIXTY_FOUR(E4M3_HIGH, 0), SIXTY_FOUR(E4M3_HIGH, 64)},
};
static const byte_tables tables_e5m2 = {
    {SIXTY_FOUR(E5M2_LOW, 0), SIXTY_FOUR(E5M2_LOW, 64)},
    {SIXTY_FOUR(E5M2_HIGH, 0), SIXTY_FOUR(E5M2_HIGH, 64)},
};

/* In registers. */
typedef struct decoder {
    __m512i low[2], high[2];
} decoder;

FP8_INLINE decoder load_tables(const byte_tables *tables) {
    const decoder d = {
        {_mm512_loadu_si512(tables->low), _mm512_loadu_si512(tables->low + 64)},
        {_mm512_loadu_si512(tables->high), _mm512_loadu_si512(tables->high + 64)},
    };
    return d;
}

/* 64 bfloat16: of each 128-bit lane of bytes its first 8, and its last 8. */
typedef struct decoded {
    __m512i first, last;
} decoded;

FP8_INLINE decoded decode(decoder d, __m512i bytes) {
    const __m512i low = _mm512_permutex2var_epi8(d.low[0], bytes, d.low[1]);
    const __m512i size = _mm512_permutex2var_epi8(d.high[0], bytes, d.high[1]);
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    const __m512i high = _mm512_ternarylogic_epi32(size, bytes, sign, 0xf8); /* a | (b & c) */
    const decoded x = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    return x;
}

/* ---------------------------------------------------------------- rows where they lie */

FP8_INLINE const uint8_t *row_at(const void *const *rows, const raddle_vec_rows *b, int n) {
    return (const uint8_t *)rows[n] + b->offset;
}

/* The cache line at byte `at` of the n-th row to come, into the second cache: the first is too small for
 * all that is on its way. */
FP8_INLINE void prefetch_line(const raddle_vec_rows *b, int n, int at) {
    if (b->next && n < b->count) {
        __builtin_prefetch(row_at(b->next, b, n) + at, 0, 2);
    }
}

FP8_INLINE void prefetch_row(const raddle_vec_rows *b, int n, int length) {
    for (int at = 0; at < length; at += LINE_BYTES) {
        prefetch_line(b, n, at);
    }
}

/* 16 bytes of four tokens, one in each lane. */
FP8_INLINE __m512i load_group(const uint8_t *const row[GROUP], int k) {
    const __m256i low =
        _mm256_loadu2_m128i((const __m128i *)(row[1] + k), (const __m128i *)(row[0] + k));
    const __m256i high =
        _mm256_loadu2_m128i((const __m128i *)(row[3] + k), (const __m128i *)(row[2] + k));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* 8 elements of a left row in every lane. */
FP8_INLINE __m512i broadcast_eight(const uint16_t *a) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)a));
}

/* 64 bytes of a row, of which count exist. */
FP8_INLINE __m512i load_columns(const uint8_t *from, int count) {
    return count >= COLUMNS ? _mm512_loadu_si512(from)
                            : _mm512_maskz_loadu_epi8(((uint64_t)1 << count) - 1, from);
}

/* 16 elements of num_rows left rows and 16 tokens. */
FP8_INLINE void dot_step(__m512 sums[ROWS][VECS], const uint16_t *a, int64_t lda,
                         const uint8_t *const row[TOKENS], int k, int num_rows, decoder d) {
    decoded right[VECS];
    V_UNROLL
    for (int g = 0; g < VECS; g++) {
        right[g] = decode(d, load_group(row + g * GROUP, k));
    }
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        const __m512i first = broadcast_eight(a + m * lda + k);
        const __m512i last = broadcast_eight(a + m * lda + k + CHUNK / 2);
        V_UNROLL
        for (int g = 0; g < VECS; g++) {
            sums[m][g] = dot_pairs(sums[m][g], first, right[g].first);
        }
        V_UNROLL
        for (int g = 0; g < VECS; g++) {
            sums[m][g] = dot_pairs(sums[m][g], last, right[g].last);
        }
    }
}

/* Adds up the four sums in each lane: lane l of sums[g] is token 4 * g + l. */
FP8_INLINE __m512 sum_lanes(const __m512 sums[VECS]) {
    const __m512 ab =
        _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
    const __m512 cd =
        _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
    const __m512 abcd =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(order, abcd);
}

/* width floats of 16; all of them without a mask, which would keep a load from taking its data out of
 * a store that is still under way. */
FP8_INLINE __m512 load_sums(const float *from, int width) {
    return width >= PAIR_LANES ? _mm512_loadu_ps(from)
                               : _mm512_maskz_loadu_ps(pair_mask(width), from);
}

FP8_INLINE void store_sums(float *to, __m512 sums, int width) {
    if (width >= PAIR_LANES) {
        _mm512_storeu_ps(to, sums);
    } else {
        _mm512_mask_storeu_ps(to, pair_mask(width), sums);
    }
}

/* num_rows left rows by 16 tokens, of which left count; depth is a multiple of 16. b, n: to prefetch as
 * much of the next rows from n on, or NULL. */
FP8_INLINE void dot_tile(float *c, int64_t ldc, const uint16_t *a, int64_t lda,
                         const uint8_t *const row[TOKENS], int left, int depth, int num_rows,
                         const raddle_vec_rows *b, int n, decoder d) {
    __m512 sums[ROWS][VECS];
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int g = 0; g < VECS; g++) {
            sums[m][g] = v_zero();
        }
    }
    for (int k = 0; k < depth; k += CHUNK) {
        if (b) { /* a line of each row in the four steps that it lasts */
            for (int i = 0; i < GROUP; i++) {
                prefetch_line(b, n + k % LINE_BYTES / CHUNK * GROUP + i, k);
            }
        }
        dot_step(sums, a, lda, row, k, num_rows, d);
    }
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        store_sums(c + m * ldc, sum_lanes(sums[m]), left);
    }
}

/* Adds elements [begin, end), fewer than 16, to the products of all left rows. Head dims are seldom no
 * multiple of 16. */
static FP8_TARGET void add_tail(float *c, int64_t ldc, const uint16_t *a, int64_t lda,
                                const raddle_vec_rows *b, int rows, int begin, int end, decoder d) {
    const __m512i spread = _mm512_setr_epi64(0, 7, 1, 7, 7, 7, 7, 7);
    const __mmask32 mask = lanes_mask(end - begin);
    for (int n = 0; n < b->count; n++) {
        const __m512i bytes = _mm512_maskz_loadu_epi8(mask, row_at(b->rows, b, n) + begin);
        const __m512i right = decode(d, _mm512_permutexvar_epi64(spread, bytes)).first;
        for (int m = 0; m < rows; m++) {
            const __m512i left = _mm512_maskz_loadu_epi16(mask, a + m * lda + begin);
            c[m * ldc + n] += v_sum(dot_pairs(v_zero(), left, right));
        }
    }
}

static FP8_TARGET void dot_rows(float *c, int64_t ldc, const uint16_t *a, int64_t lda,
                                const raddle_vec_rows *b, int rows, int depth,
                                const byte_tables *tables) {
    const decoder d = load_tables(tables);
    const int whole = depth - depth % CHUNK;
    for (int n = 0; n < b->count; n += TOKENS) {
        const int left = b->count - n < TOKENS ? b->count - n : TOKENS;
        const uint8_t *row[TOKENS];
        for (int i = 0; i < TOKENS; i++) {
            row[i] = row_at(b->rows, b, n + (i < left ? i : left - 1));
        }
        for (int i = 0; whole % LINE_BYTES != 0 && i < TOKENS; i++) { /* a line of fewer steps */
            prefetch_line(b, n + i, whole);
        }
        const raddle_vec_rows *next = b;
        int m = 0;
        for (; m + ROWS <= rows; m += ROWS) {
            dot_tile(c + m * ldc + n, ldc, a + m * lda, lda, row, left, whole, ROWS, next, n, d);
            next = NULL;
        }
        if (m + 2 <= rows) {
            dot_tile(c + m * ldc + n, ldc, a + m * lda, lda, row, left, whole, 2, next, n, d);
            next = NULL;
            m += 2;
        }
        if (m < rows) {
            dot_tile(c + m * ldc + n, ldc, a + m * lda, lda, row, left, whole, 1, next, n, d);
        }
    }
    if (whole < depth) {
        add_tail(c, ldc, a, lda, b, rows, whole, depth, d);
    }
}

/* Bytes of two rows, column by column, so that decoded vectors hold pairs of columns 0.., 16.. and
 * 32.., 48.. . Lane l of the first takes columns 4 l.. and 16 + 4 l.., bytes of odd from 64 on. */
#define PAIR_OF(column) (column), 64 + (column)
#define PAIRS_OF(column)                                                                           \
    PAIR_OF(column), PAIR_OF((column) + 1), PAIR_OF((column) + 2), PAIR_OF((column) + 3)
static const uint8_t pair_order[COLUMNS] = {
    PAIRS_OF(0), PAIRS_OF(16), PAIRS_OF(4),  PAIRS_OF(20),
    PAIRS_OF(8), PAIRS_OF(24), PAIRS_OF(12), PAIRS_OF(28),
};

FP8_INLINE void decode_pairs(__m512i to[VECS], __m512i even, __m512i odd, __m512i order,
                             int num_vecs, decoder d) {
    const decoded x = decode(d, _mm512_permutex2var_epi8(even, order, odd));
    to[0] = x.first;
    to[1] = x.last;
    if (num_vecs > 2) {
        const __m512i behind = _mm512_add_epi8(order, _mm512_set1_epi8(32));
        const decoded y = decode(d, _mm512_permutex2var_epi8(even, behind, odd));
        to[2] = y.first;
        to[3] = y.last;
    }
}

/* num_rows rows of c, num_vecs times 16 columns wide, of which width exist, over all pairs of rows of
 * b. */
FP8_INLINE void add_tile(float *c, int64_t ldc, const uint16_t *p, int64_t ldp,
                         const raddle_vec_rows *b, int at, int width, int num_rows, int num_vecs,
                         bool prefetch, decoder d) {
    const __m512i order = _mm512_loadu_si512(pair_order);
    __m512 sums[ROWS][VECS];
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            sums[m][i] = load_sums(c + m * ldc + at + i * PAIR_LANES, width - i * PAIR_LANES);
        }
    }
    for (int n = 0; n + 2 <= b->count; n += 2) {
        if (prefetch) {
            prefetch_line(b, n, at);
            prefetch_line(b, n + 1, at);
        }
        __m512i right[VECS];
        decode_pairs(right, load_columns(row_at(b->rows, b, n) + at, width),
                     load_columns(row_at(b->rows, b, n + 1) + at, width), order, num_vecs, d);
        V_UNROLL
        for (int m = 0; m < num_rows; m++) {
            const __m512i x = broadcast_pair(p + m * ldp + n);
            V_UNROLL
            for (int i = 0; i < num_vecs; i++) {
                sums[m][i] = dot_pairs(sums[m][i], x, right[i]);
            }
        }
    }
    V_UNROLL
    for (int m = 0; m < num_rows; m++) {
        V_UNROLL
        for (int i = 0; i < num_vecs; i++) {
            store_sums(c + m * ldc + at + i * PAIR_LANES, sums[m][i], width - i * PAIR_LANES);
        }
    }
}

/* The last row of an odd number: one in a request. */
static FP8_TARGET void add_last(float *c, int64_t ldc, const uint16_t *p, int64_t ldp,
                                const raddle_vec_rows *b, int rows, int width, decoder d) {
    const __m512i order = _mm512_loadu_si512(pair_order);
    const int n = b->count - 1;
    for (int at = 0; at < width; at += COLUMNS) {
        __m512i right[VECS];
        prefetch_line(b, n, at);
        decode_pairs(right, load_columns(row_at(b->rows, b, n) + at, width - at),
                     _mm512_setzero_si512(), order, VECS, d);
        for (int m = 0; m < rows; m++) {
            const __m512i x = _mm512_set1_epi32(p[m * ldp + n]);
            for (int i = 0; i < VECS; i++) {
                const int column = at + i * PAIR_LANES;
                float *to = c + m * ldc + column;
                const __m512 sum = load_sums(to, width - column);
                store_sums(to, dot_pairs(sum, x, right[i]), width - column);
            }
        }
    }
}

/* num_rows rows, 64 columns at a time, then what is left. */
FP8_INLINE void add_strip(float *c, int64_t ldc, const uint16_t *p, int64_t ldp,
                          const raddle_vec_rows *b, int width, int num_rows, bool prefetch,
                          decoder d) {
    int at = 0;
    for (; at + COLUMNS <= width; at += COLUMNS) {
        add_tile(c, ldc, p, ldp, b, at, COLUMNS, num_rows, VECS, prefetch, d);
    }
    if (width - at > COLUMNS / 2) {
        add_tile(c, ldc, p, ldp, b, at, width - at, num_rows, VECS, prefetch, d);
    } else if (at < width) {
        add_tile(c, ldc, p, ldp, b, at, width - at, num_rows, VECS / 2, prefetch, d);
    }
}

static FP8_TARGET void add_rows(float *c, int64_t ldc, const uint16_t *p, int64_t ldp,
                                const raddle_vec_rows *b, int rows, int width,
                                const byte_tables *tables) {
    const decoder d = load_tables(tables);
    int m = 0;
    for (; m + ROWS <= rows; m += ROWS) {
        add_strip(c + m * ldc, ldc, p + m * ldp, ldp, b, width, ROWS, m == 0, d);
    }
    if (m + 2 <= rows) {
        add_strip(c + m * ldc, ldc, p + m * ldp, ldp, b, width, 2, m == 0, d);
        m += 2;
    }
    if (m < rows) {
        add_strip(c + m * ldc, ldc, p + m * ldp, ldp, b, width, 1, m == 0, d);
    }
    if (b->count % 2 != 0) {
        add_last(c, ldc, p, ldp, b, rows, width, d);
    }
}

/* ---------------------------------------------------------------- panels */

/* 32 columns of 16 rows at a time: the bytes are spread so that the first halves of the lanes hold
 * them in order. */
static FP8_TARGET void pack_dot(const raddle_vec_panel *panel, const raddle_vec_rows *b,
                                const byte_tables *tables) {
    const decoder d = load_tables(tables);
    const __m512i spread = _mm512_setr_epi64(0, 7, 1, 7, 2, 7, 3, 7);
    const int pairs = (panel->length + 1) / 2;
    int32_t *to = panel->data;
    for (int n = 0; n < b->count; n += STEP) {
        for (int i = 0; i < STEP; i++) {
            prefetch_row(b, n + i, panel->length);
        }
        for (int k = 0; k < pairs; k += PAIR_LANES) {
            const __mmask64 mask = lanes_mask(panel->length - 2 * k);
            __m512 lines[STEP];
            V_UNROLL
            for (int i = 0; i < STEP; i++) {
                const bool exists = n + i < b->count;
                const uint8_t *row = row_at(b->rows, b, exists ? n + i : n) + 2 * k;
                const __m512i bytes = _mm512_maskz_loadu_epi8(exists ? mask : 0, row);
                lines[i] =
                    _mm512_castsi512_ps(decode(d, _mm512_permutexvar_epi64(spread, bytes)).first);
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

static FP8_TARGET void pack_add(const raddle_vec_panel *panel, const raddle_vec_rows *b,
                                const byte_tables *tables) {
    const decoder d = load_tables(tables);
    const __m512i order = _mm512_loadu_si512(pair_order);
    const int padded = padded_width(panel->length);
    for (int n = 0; n < b->count; n += 2) {
        const bool is_pair = n + 1 < b->count;
        int32_t *to = (int32_t *)panel->data + (int64_t)(n / 2) * padded;
        prefetch_row(b, n, panel->length);
        prefetch_row(b, n + 1, panel->length);
        for (int at = 0; at < padded; at += COLUMNS) {
            const int left = panel->length - at;
            __m512i pairs[VECS];
            decode_pairs(pairs, load_columns(row_at(b->rows, b, n) + at, left),
                         is_pair ? load_columns(row_at(b->rows, b, n + 1) + at, left)
                                 : _mm512_setzero_si512(),
                         order, VECS, d);
            V_UNROLL
            for (int i = 0; i < VECS; i++) {
                if (at + i * STEP < padded) {
                    _mm512_storeu_si512(to + at + i * STEP, pairs[i]);
                }
            }
        }
    }
}

/* ---------------------------------------------------------------- one entry per stored type */

#define DEFINE_TYPE(suffix)                                                                        \
    static FP8_TARGET void dot_rows_##suffix(float *c, int64_t ldc, const void *a, int64_t lda,    \
                                             const raddle_vec_rows *b, int rows, int depth) {      \
        dot_rows(c, ldc, a, lda, b, rows, depth, &tables_##suffix);                                \
    }                                                                                              \
    static FP8_TARGET void add_rows_##suffix(float *c, int64_t ldc, const void *p, int64_t ldp,    \
                                             const raddle_vec_rows *b, int rows, int width) {      \
        add_rows(c, ldc, p, ldp, b, rows, width, &tables_##suffix);                                \
    }                                                                                              \
    static FP8_TARGET void pack_dot_##suffix(const raddle_vec_panel *panel,                        \
                                             const raddle_vec_rows *b) {                           \
        pack_dot(panel, b, &tables_##suffix);                                                      \
    }                                                                                              \
    static FP8_TARGET void pack_add_##suffix(const raddle_vec_panel *panel,                        \
                                             const raddle_vec_rows *b) {                           \
        pack_add(panel, b, &tables_##suffix);                                                      \
    }                                                                                              \
    const raddle_vec_block raddle_vec_block_avx512fp8_##suffix = {                                 \
        .operand = RADDLE_BF16,                                                                    \
        .dot_rows = dot_rows_##suffix,                                                             \
        .add_rows = add_rows_##suffix,                                                             \
        .pack_dot = pack_dot_##suffix,                                                             \
        .pack_add = pack_add_##suffix,                                                             \
        .dot_panel = raddle_vec_bf16_dot_panel,                                                    \
        .add_panel = raddle_vec_bf16_add_panel,                                                    \
        .weigh_rows = raddle_vec_bf16_weigh_rows,                                                  \
    };

DEFINE_TYPE(e4m3)
DEFINE_TYPE(e5m2)

#endif

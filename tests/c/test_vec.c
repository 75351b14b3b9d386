// needs: base/status.c base/alloc.c cpu/isa.c cpu/vec*.c
/* test_vec.c - every table of inner loops that this CPU runs, against plain loops in double: odd
 * lengths, tails, pointers off any alignment, exact ends (each row is its own allocation, so that
 * the sanitizer sees a step past it), special values, rounding. */
#include <math.h>
#include <stdlib.h>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/vec.h"

enum { MAX_ROWS = 37, MAX_COUNT = 40, MAX_WIDTH = 256, CANARY = 0x5a };

enum { NUM_DTYPES = 5, NUM_STORED = 3 }; /* the first ones can be stored too */
static const raddle_dtype dtypes[NUM_DTYPES] = {RADDLE_F32, RADDLE_F16, RADDLE_BF16, RADDLE_F8_E4M3,
                                                RADDLE_F8_E5M2};
static uint64_t random_state = 11;

static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

static int random_below(int limit) {
    return (int)(random_bits() % (uint32_t)limit);
}

static double random_value(void) {
    return (double)random_bits() / 2147483648.0 - 1.0;
}

static size_t bytes_of(raddle_dtype dtype) {
    return dtype == RADDLE_F32 ? 4 : dtype == RADDLE_F16 || dtype == RADDLE_BF16 ? 2 : 1;
}

/* ---------------------------------------------------------------- the small types, by arithmetic */

static double decode(raddle_dtype dtype, uint16_t bits) {
    const int mantissa_bits = dtype == RADDLE_F16       ? 10
                              : dtype == RADDLE_BF16    ? 7
                              : dtype == RADDLE_F8_E4M3 ? 3
                                                        : 2;
    const int size_bits = 8 * (int)bytes_of(dtype) - 1;
    const int exponent_bits = size_bits - mantissa_bits;
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    double value;
    if (dtype == RADDLE_F8_E4M3 && (bits & 0x7f) == 0x7f) {
        value = NAN;
    } else if (dtype != RADDLE_F8_E4M3 && exponent == (1 << exponent_bits) - 1) {
        value = mantissa ? NAN : INFINITY;
    } else if (exponent == 0) {
        value = ldexp(mantissa, 1 - bias - mantissa_bits);
    } else {
        value = ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    }
    return bits >> size_bits & 1 ? -value : value;
}

static double element(raddle_dtype dtype, const void *data, int64_t i) {
    return dtype == RADDLE_F32    ? (double)((const float *)data)[i]
           : bytes_of(dtype) == 2 ? decode(dtype, ((const uint16_t *)data)[i])
                                  : decode(dtype, ((const uint8_t *)data)[i]);
}

/* A value that dtype holds exactly: a short fraction, sign and a small power of two; of 8 bits any
 * that is finite. */
static void put_random(raddle_dtype dtype, void *data, int64_t i) {
    const uint32_t bits = random_bits();
    if (dtype == RADDLE_F32) {
        ((float *)data)[i] = (float)random_value();
    } else if (dtype == RADDLE_F16) {
        ((uint16_t *)data)[i] = (uint16_t)((bits & 0x83ff) | (11 + bits % 5) << 10);
    } else if (bytes_of(dtype) == 1) {
        const uint32_t num_finite = dtype == RADDLE_F8_E4M3 ? 127 : 124;
        ((uint8_t *)data)[i] = (uint8_t)(bits % num_finite | (bits >> 16 & 0x80));
    } else {
        ((uint16_t *)data)[i] = (uint16_t)((bits & 0x807f) | (123 + bits % 5) << 7);
    }
}

/* ---------------------------------------------------------------- conversions */

static void test_load(const raddle_vec *vec) {
    enum { COUNT = 65536 };
    uint16_t *all = malloc(COUNT * sizeof(uint16_t));
    float *wide = malloc(COUNT * sizeof(float));
    for (int i = 0; i < COUNT; i++) {
        all[i] = (uint16_t)i;
    }
    for (int t = 1; t < NUM_DTYPES; t++) {
        /* Bytes: every value in every place of a vector. */
        const int count = (int)(COUNT * sizeof(*all) / bytes_of(dtypes[t]));
        const int negative = bytes_of(dtypes[t]) == 2 ? 0x8000 : 0x80;
        int wrong = 0;
        for (int begin = 0; begin < count; begin += COUNT) {
            const char *from = (const char *)all + begin;
            vec->load[dtypes[t]](wide, from, COUNT);
            for (int i = 0; i < COUNT; i++) {
                const int bits = negative == 0x8000 ? i : ((const uint8_t *)from)[i];
                const double expected = decode(dtypes[t], (uint16_t)bits);
                wrong += isnan(expected) ? !isnan(wide[i]) : (double)wide[i] != expected;
                wrong += !isnan(expected) && (signbit(wide[i]) != 0) != (bits >= negative);
            }
        }
        CHECK_INT(wrong, 0);
    }
    free(all);
    free(wide);
}

/* value is a float exactly. Lanes of whole vectors and tails that did not become bits. */
static int count_wrong(const raddle_vec *vec, raddle_dtype dtype, double value, uint16_t bits) {
    float from[21];
    uint16_t to[21];
    for (int i = 0; i < 21; i++) {
        from[i] = (float)value;
    }
    vec->store[dtype](to, from, 21);
    int wrong = 0;
    for (int i = 0; i < 21; i += 5) {
        if (to[i] != bits && wrong++ == 0) {
            printf("    %a became 0x%04x, expected 0x%04x\n", value, to[i], bits);
        }
    }
    return wrong;
}

/* Every value, every midpoint (to even) and the floats on both sides of each. */
static void test_store(const raddle_vec *vec) {
    for (int t = 1; t < NUM_STORED; t++) {
        const raddle_dtype dtype = dtypes[t];
        const int infinity = dtype == RADDLE_F16 ? 0x7c00 : 0x7f80;
        const int step = dtype == RADDLE_F16 ? 1 : 7;
        int wrong = 0;
        for (int i = 0; i < infinity; i += step) {
            const double value = decode(dtype, (uint16_t)i);
            /* Past the largest: as if the exponent went on. */
            const double next = i + 1 < infinity      ? decode(dtype, (uint16_t)(i + 1))
                                : dtype == RADDLE_F16 ? 65536.0
                                                      : 0x1p128;
            const double middle = (value + next) / 2;
            const uint16_t even = (uint16_t)(i % 2 == 0 ? i : i + 1);
            wrong += count_wrong(vec, dtype, value, (uint16_t)i);
            wrong += count_wrong(vec, dtype, -value, (uint16_t)(i | 0x8000));
            wrong += count_wrong(vec, dtype, middle, even);
            wrong += count_wrong(vec, dtype, -middle, (uint16_t)(even | 0x8000));
            wrong += count_wrong(vec, dtype, (double)nextafterf((float)middle, 0.0f), (uint16_t)i);
            wrong += count_wrong(vec, dtype, (double)nextafterf((float)middle, INFINITY),
                                 (uint16_t)(i + 1));
        }
        wrong += count_wrong(vec, dtype, (double)INFINITY, (uint16_t)infinity);
        wrong += count_wrong(vec, dtype, -(double)INFINITY, (uint16_t)(infinity | 0x8000));
        CHECK_INT(wrong, 0);
        /* NaN whose payload would vanish in the low half. */
        const uint32_t nan_bits[2] = {0x7f800001u, 0xffffffffu};
        float nans[2];
        uint16_t to[2];
        memcpy(nans, nan_bits, sizeof nans);
        vec->store[dtype](to, nans, 2);
        CHECK(isnan(decode(dtype, to[0])) && isnan(decode(dtype, to[1])));
    }
}

static void test_lengths(const raddle_vec *vec) {
    for (int t = 0; t < NUM_DTYPES; t++) {
        const raddle_dtype dtype = dtypes[t];
        const size_t bytes = bytes_of(dtype);
        for (int count = 0; count < 70; count++) {
            unsigned char *stored = malloc((size_t)(count + 1) * bytes);
            float *wide = malloc((size_t)(count + 1) * sizeof(float));
            /* One element in: no vector load is aligned. */
            memset(stored, CANARY, (size_t)(count + 1) * bytes);
            for (int i = 0; i < count; i++) {
                put_random(dtype, stored, i + 1);
            }
            memset(wide, CANARY, (size_t)(count + 1) * sizeof(float));
            vec->load[dtype](wide + 1, stored + bytes, count);
            int wrong = ((unsigned char *)wide)[0] != CANARY;
            for (int i = 0; i < count; i++) {
                wrong += (double)wide[i + 1] != element(dtype, stored, i + 1);
            }
            unsigned char *again = malloc((size_t)(count + 1) * bytes);
            memset(again, CANARY, (size_t)(count + 1) * bytes);
            if (t < NUM_STORED) {
                vec->store[dtype](again, wide + 1, count);
                wrong += memcmp(again, stored + bytes, (size_t)count * bytes) != 0;
                wrong += again[(size_t)count * bytes] != CANARY;
            }
            CHECK_INT(wrong, 0);
            free(stored);
            free(wide);
            free(again);
        }
    }
}

static void test_rotated(const raddle_vec *vec) {
    for (int t = 0; t < NUM_DTYPES; t++) {
        const raddle_dtype dtype = dtypes[t];
        for (int half = 0; half < 40; half++) {
            unsigned char *stored = malloc((size_t)(2 * half + 1) * bytes_of(dtype));
            float *wide = malloc((size_t)(2 * half + 1) * sizeof(float));
            float *turns = malloc((size_t)(2 * half + 1) * sizeof(float));
            for (int i = 0; i < 2 * half; i++) {
                put_random(dtype, stored, i + 1);
                turns[i + 1] = (float)random_value();
            }
            memset(wide, CANARY, (size_t)(2 * half + 1) * sizeof(float));
            vec->load_rotated[dtype](wide + 1, stored + bytes_of(dtype), turns + 1, half);
            int wrong = ((unsigned char *)wide)[0] != CANARY;
            for (int i = 0; i < half; i++) {
                const double low = element(dtype, stored, i + 1);
                const double high = element(dtype, stored, half + i + 1);
                const double cosine = turns[i + 1], sine = turns[half + i + 1];
                const double size = 1e-6 * (fabs(low) + fabs(high));
                wrong += fabs(wide[i + 1] - (low * cosine - high * sine)) > size;
                wrong += fabs(wide[half + i + 1] - (high * cosine + low * sine)) > size;
            }
            CHECK_INT(wrong, 0);
            free(stored);
            free(wide);
            free(turns);
        }
    }
}

/* ---------------------------------------------------------------- products */

typedef struct product {
    const raddle_vec_block *block;
    raddle_dtype dtype; /* of b */
    int rows, count, length;
    int64_t lda; /* of the left rows; 3 more than they need */
    int64_t offset;
    void *left; /* [rows, lda] of the operand */
    void *b[MAX_COUNT];
    raddle_vec_rows right;
} product;

/* left_length: of a left row. The rows of b start offset elements in. */
static void open_product(product *p, int left_length) {
    const size_t left_bytes = bytes_of(p->block->operand);
    p->lda = left_length + 3;
    p->offset = random_below(4);
    p->left = malloc((size_t)((p->rows - 1) * p->lda + left_length) * left_bytes);
    for (int m = 0; m < p->rows; m++) {
        for (int k = 0; k < left_length; k++) {
            put_random(p->block->operand, p->left, m * p->lda + k);
        }
    }
    for (int n = 0; n < p->count; n++) {
        p->b[n] = malloc((size_t)(p->offset + p->length) * bytes_of(p->dtype));
        for (int k = 0; k < p->length; k++) {
            put_random(p->dtype, p->b[n], p->offset + k);
        }
    }
    p->right = (raddle_vec_rows){(const void *const *)p->b, NULL, p->offset, p->count};
    if (random_below(2)) {
        p->right.next = p->right.rows;
    }
}

static void close_product(product *p) {
    free(p->left);
    for (int n = 0; n < p->count; n++) {
        free(p->b[n]);
    }
}

static double left_at(const product *p, int m, int k) {
    return element(p->block->operand, p->left, m * p->lda + k);
}

static double right_at(const product *p, int n, int k) {
    return element(p->dtype, p->b[n], p->offset + k);
}

static bool is_close(double got, double expected, double magnitude, int terms) {
    return fabs(got - expected) <= magnitude * (terms + 4) * 0x1p-23;
}

/* Columns [first, last) of a dot product against double; nothing else of c is touched before limit
 * columns of a row, which is where panels may write. */
static int count_wrong_dots(const product *p, const float *c, int64_t ldc, int first, int last) {
    int wrong = 0;
    for (int m = 0; m < p->rows; m++) {
        for (int n = first; n < last; n++) {
            double sum = 0, magnitude = 0;
            for (int k = 0; k < p->length; k++) {
                sum += left_at(p, m, k) * right_at(p, n, k);
                magnitude += fabs(left_at(p, m, k) * right_at(p, n, k));
            }
            wrong += !is_close(c[m * ldc + n], sum, magnitude, p->length);
        }
    }
    return wrong;
}

/* c was filled with m + d before. */
static int count_wrong_sums(const product *p, const float *c, int64_t ldc, int first, int last) {
    int wrong = 0;
    for (int m = 0; m < p->rows; m++) {
        for (int d = 0; d < p->length; d++) {
            double sum = m + d, magnitude = fabs(sum);
            for (int n = first; n < last; n++) {
                sum += left_at(p, m, n) * right_at(p, n, d);
                magnitude += fabs(left_at(p, m, n) * right_at(p, n, d));
            }
            wrong += !is_close(c[m * ldc + d], sum, magnitude, last - first + 1);
        }
        for (int64_t d = p->length; d < ldc && m + 1 < p->rows; d++) {
            wrong += c[m * ldc + d] != -7.0f;
        }
    }
    return wrong;
}

static float *filled_sums(const product *p, int64_t ldc) {
    float *c = malloc((size_t)((p->rows - 1) * ldc + p->length) * sizeof(float));
    for (int m = 0; m < p->rows; m++) {
        for (int64_t d = 0; d < (m + 1 < p->rows ? ldc : p->length); d++) {
            c[m * ldc + d] = d < p->length ? (float)(m + d) : -7.0f;
        }
    }
    return c;
}

static void test_rows(product p) {
    open_product(&p, p.length);
    const int64_t ldc = p.count + 2;
    float *dots = calloc((size_t)(p.rows * ldc), sizeof(float));
    p.block->dot_rows(dots, ldc, p.left, p.lda, &p.right, p.rows, p.length);
    int wrong = count_wrong_dots(&p, dots, ldc, 0, p.count);
    for (int m = 0; m < p.rows; m++) {
        wrong += dots[m * ldc + p.count] != 0.0f || dots[m * ldc + p.count + 1] != 0.0f;
    }
    if (!CHECK(wrong == 0)) {
        printf("    dot_rows %d x %d x %d\n", p.rows, p.count, p.length);
    }
    free(dots);
    close_product(&p);

    open_product(&p, p.count);
    float *sums = filled_sums(&p, p.length + 5);
    p.block->add_rows(sums, p.length + 5, p.left, p.lda, &p.right, p.rows, p.length);
    if (!CHECK(count_wrong_sums(&p, sums, p.length + 5, 0, p.count) == 0)) {
        printf("    add_rows %d x %d x %d\n", p.rows, p.count, p.length);
    }
    free(sums);
    close_product(&p);
}

static void test_panels(product p) {
    const int step = RADDLE_VEC_PANEL_STEP;
    const int padded = (p.count + step - 1) / step * step;
    const int first = random_below((p.count + step - 1) / step) * step;
    const int last = first + 1 + random_below(p.count - first);
    raddle_vec_panel panel = {
        aligned_alloc(64, (raddle_vec_panel_bytes(p.count, p.length) + 63) / 64 * 64), p.length};
    memset(panel.data, 0xff, raddle_vec_panel_bytes(p.count, p.length));

    open_product(&p, p.length);
    const int64_t ldc = padded + 1;
    float *dots = calloc((size_t)(p.rows * ldc), sizeof(float));
    p.block->pack_dot(&panel, &p.right);
    p.block->dot_panel(dots, ldc, p.left, p.lda, &panel, p.rows, first, last);
    int wrong = count_wrong_dots(&p, dots, ldc, first, last);
    const int64_t end = (last + step - 1) / step * step;
    for (int m = 0; m < p.rows; m++) {
        for (int64_t n = 0; n < ldc; n++) {
            wrong += (n < first || n >= end) && dots[m * ldc + n] != 0.0f;
        }
    }
    if (!CHECK(wrong == 0)) {
        printf("    dot_panel %d x %d..%d x %d\n", p.rows, first, last, p.length);
    }
    free(dots);
    close_product(&p);

    open_product(&p, padded);
    memset(panel.data, 0xff, raddle_vec_panel_bytes(p.count, p.length));
    for (int m = 0; m < p.rows; m++) {
        for (int n = last; n < padded; n++) {
            memset((char *)p.left + (size_t)(m * p.lda + n) * bytes_of(p.block->operand), 0,
                   bytes_of(p.block->operand));
        }
    }
    float *sums = filled_sums(&p, p.length + 5);
    p.block->pack_add(&panel, &p.right);
    p.block->add_panel(sums, p.length + 5, p.left, p.lda, &panel, p.rows, first, last);
    if (!CHECK(count_wrong_sums(&p, sums, p.length + 5, first, last) == 0)) {
        printf("    add_panel %d x %d..%d x %d\n", p.rows, first, last, p.length);
    }
    free(sums);
    close_product(&p);
    free(panel.data);
}

static void test_block(const raddle_vec_block *block, raddle_dtype dtype) {
    static const int lengths[] = {1,  7,  8,  15, 16, 17,  24,  31, 32,
                                  33, 40, 63, 64, 72, 128, 136, 256};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (int rows = 1; rows <= 9; rows += 1 + rows / 5) {
            product p = {.block = block, .dtype = dtype, .rows = rows, .length = lengths[i]};
            p.count = 1 + random_below(MAX_COUNT);
            test_rows(p);
            test_panels(p);
        }
    }
    for (int count = 0; count <= 9; count++) {
        product p = {.block = block, .dtype = dtype, .rows = 5, .length = 64, .count = count};
        test_rows(p);
    }
    product most = {block, dtype, MAX_ROWS, MAX_COUNT, 80, 0, 0, NULL, {NULL}, {NULL, NULL, 0, 0}};
    test_rows(most);
    test_panels(most);
}

/* Each byte in turn, everything else 0: its product with 1 is its value, NaN and infinity too. */
static void test_special_bytes(const raddle_vec_block *block, raddle_dtype dtype) {
    if (bytes_of(dtype) != 1) {
        return;
    }
    uint8_t b[80] = {0};
    float left_32[80];
    uint16_t left_16[80];
    for (int i = 0; i < 80; i++) {
        left_32[i] = 1.0f;
        left_16[i] = 0x3f80;
    }
    const void *left = block->operand == RADDLE_F32 ? (const void *)left_32 : left_16;
    const void *rows[1] = {b};
    const raddle_vec_rows right = {rows, NULL, 0, 1};
    int wrong = 0;
    for (int bits = 0; bits < 256; bits++) {
        const double value = decode(dtype, (uint16_t)bits);
        const int at = bits % 80;
        float dot = 0, sums[80] = {0};
        b[at] = (uint8_t)bits;
        block->dot_rows(&dot, 1, left, 80, &right, 1, 80);
        block->add_rows(sums, 80, left, 1, &right, 1, 80);
        b[at] = 0;
        wrong += isnan(value) ? !isnan(dot) || !isnan(sums[at])
                              : (double)dot != value || (double)sums[at] != value;
    }
    CHECK_INT(wrong, 0);
}

/* ---------------------------------------------------------------- weights and reductions */

/* 2^power, from a power that was rounded to float32. */
static bool is_power(double got, double power, double tolerance) {
    const double expected = exp2(power);
    return fabs(got - expected) <= expected * (tolerance + fabs(power) * 0x1p-24);
}

/* Rows of logits x, of which every seventh is -inf, and states before them: none, one below, one
 * above, one with the same maximum. */
static double fill_logits(float *x, int count, int row, float *state) {
    double most = -INFINITY;
    for (int i = 0; i < count; i++) {
        x[i] = (i + row) % 7 == 3 ? -INFINITY : (float)(12 - 40 * fabs(random_value()));
        most = (double)x[i] * 0.25 > most ? (double)x[i] * 0.25 : most;
    }
    const float maxima[4] = {-INFINITY, -20.0f, 30.0f, (float)most};
    state[0] = maxima[row % 4];
    state[1] = state[0] == -INFINITY ? 0.0f : 1.5f;
    return most > (double)state[0] ? most : (double)state[0];
}

static int count_wrong_weights(const raddle_vec_block *block, const float *x, const void *to,
                               int64_t at, int count, double max) {
    const double tolerance = block->operand == RADDLE_F32 ? 5e-7 : 0x1.01p-8;
    int wrong = 0;
    for (int i = 0; i < count; i++) {
        const double got = element(block->operand, to, at + i);
        if (isinf(x[i])) {
            wrong += got != 0.0;
        } else {
            wrong += !is_power(got, (double)x[i] * 0.25 - max, tolerance);
            wrong += (double)x[i] * 0.25 == max && got != 1.0;
        }
    }
    return wrong;
}

static void test_weights(const raddle_vec_block *block) {
    enum { MOST = 6, LENGTH = 70 };
    for (int count = 0; count < LENGTH; count++) {
        const int rows = 1 + count % MOST;
        const int64_t ldx = count + 3, ldto = count + 2;
        const size_t bytes = bytes_of(block->operand);
        float *x = malloc((size_t)(rows * ldx + 1) * sizeof(float));
        unsigned char *to = malloc((size_t)(rows * ldto) * bytes);
        float state[2 * MOST], before[2 * MOST], factors[MOST];
        double max[MOST];
        memset(to, CANARY, (size_t)(rows * ldto) * bytes);
        for (int m = 0; m < rows; m++) {
            max[m] = fill_logits(x + 1 + m * ldx, count, m + count, state + 2 * m);
        }
        memcpy(before, state, sizeof state);
        block->weigh_rows(to, ldto, x + 1, ldx, rows, count, 0.25f, state, factors);
        int wrong = 0;
        for (int m = 0; m < rows; m++) {
            const float *row = x + 1 + m * ldx;
            double sum = 0;
            for (int i = 0; i < count; i++) {
                sum += max[m] == -INFINITY ? 0.0 : exp2((double)row[i] * 0.25 - max[m]);
            }
            const double old = before[2 * m];
            const double factor = old == max[m] ? 1.0 : exp2(old - max[m]);
            sum += factor * (double)before[2 * m + 1];
            wrong += (double)state[2 * m] != max[m];
            wrong += old == -INFINITY || old == max[m]
                         ? (double)factors[m] != factor
                         : !is_power((double)factors[m], old - max[m], 5e-7);
            wrong += fabs((double)state[2 * m + 1] - sum) > sum * 2e-6;
            wrong += count_wrong_weights(block, row, to, m * ldto, count, max[m]);
            for (size_t i = 0; i < 2 * bytes; i++) {
                wrong += to[(size_t)(m * ldto + count) * bytes + i] != CANARY;
            }
        }
        CHECK_INT(wrong, 0);
        free(x);
        free(to);
    }
}

/* NaN makes a sum NaN and is no maximum, in a vector and in a tail; far below is 0, not garbage;
 * nothing but -inf leaves the empty state. */
static void test_special_weights(const raddle_vec_block *block) {
    float x[20], to[20], state[2] = {-INFINITY, 0.0f}, factor;
    for (int i = 0; i < 20; i++) {
        x[i] = -INFINITY;
    }
    block->weigh_rows(to, 20, x, 20, 1, 20, 1.0f, state, &factor);
    CHECK(state[0] == -INFINITY && state[1] == 0.0f && factor == 1.0f);
    CHECK(element(block->operand, to, 0) == 0.0 && element(block->operand, to, 19) == 0.0);
    for (int count = 3; count <= 20; count += 17) {
        for (int i = 0; i < count; i++) {
            x[i] = i == 1 ? NAN : 0.0f;
        }
        state[0] = -INFINITY;
        state[1] = 0.0f;
        block->weigh_rows(to, 20, x, 20, 1, count, 1.0f, state, &factor);
        CHECK(state[0] == 0.0f && isnan(state[1]) && factor == 0.0f);
        CHECK(isnan(element(block->operand, to, 1)) && element(block->operand, to, 2) == 1.0);
    }
    for (int i = 0; i < 20; i++) {
        x[i] = i == 0 ? -1e30f : -1000.0f;
    }
    state[0] = 0.0f;
    state[1] = 0.25f;
    block->weigh_rows(to, 20, x, 20, 1, 20, 1.0f, state, &factor);
    CHECK(state[0] == 0.0f && state[1] == 0.25f && factor == 1.0f);
    CHECK(element(block->operand, to, 0) == 0.0 && element(block->operand, to, 19) == 0.0);
}

static void test_copy_ids(const raddle_vec *vec) {
    int32_t from[80], to[81];
    CHECK(vec->copy_ids(NULL, NULL, 0) == 0);
    for (int count = 1; count < 80; count++) {
        for (int at = 0; at < count; at++) { /* where the largest, or the bad one, is */
            for (int i = 0; i < count; i++) {
                from[i] = i * 7 % 5;
            }
            to[count] = 77;
            from[at] = 1 << 30;
            CHECK(vec->copy_ids(to, from, count) == 1u << 30);
            CHECK(memcmp(to, from, (size_t)count * sizeof(*to)) == 0 && to[count] == 77);
            from[at] = -1;
            CHECK(vec->copy_ids(to, from, count) > INT32_MAX);
        }
    }
}

static void test_reductions(const raddle_vec *vec) {
    CHECK(vec->max(NULL, 0) == -INFINITY);
    CHECK(vec->exp2_sum(NULL, 0, 0.0f) == 0.0f && vec->sum_squares(NULL, 0) == 0.0f);
    for (int count = 1; count < 80; count++) {
        float *x = malloc((size_t)(count + 1) * sizeof(float));
        float *y = malloc((size_t)(count + 1) * sizeof(float));
        double squares = 0, sum = 0;
        float most = -INFINITY;
        for (int i = 0; i < count; i++) {
            x[i + 1] = (float)(random_value() * 10 - 20);
            squares += (double)x[i + 1] * (double)x[i + 1];
            sum += exp2((double)x[i + 1] + 5);
            most = x[i + 1] > most ? x[i + 1] : most;
        }
        CHECK(vec->max(x + 1, count) == most);
        CHECK(fabs((double)vec->sum_squares(x + 1, count) - squares) <= squares * 1e-5);
        memcpy(y + 1, x + 1, (size_t)count * sizeof(float));
        vec->scale(y + 1, count, -0.5f);
        int wrong = 0;
        for (int i = 0; i < count; i++) {
            wrong += y[i + 1] != x[i + 1] * -0.5f;
        }
        CHECK_INT(wrong, 0);
        memcpy(y + 1, x + 1, (size_t)count * sizeof(float));
        CHECK(fabs((double)vec->exp2_sum(y + 1, count, -5.0f) - sum) <= sum * 2e-6);
        wrong = 0;
        for (int i = 0; i < count; i++) {
            const double expected = exp2((double)x[i + 1] + 5);
            wrong += fabs((double)y[i + 1] - expected) > expected * 5e-7;
        }
        CHECK_INT(wrong, 0);
        /* NaN is passed over wherever it stands; alone it leaves -inf. */
        const int at = random_below(count);
        x[at + 1] = NAN;
        most = -INFINITY;
        for (int i = 0; i < count; i++) {
            most = x[i + 1] > most ? x[i + 1] : most;
        }
        CHECK(vec->max(x + 1, count) == most);
        free(x);
        free(y);
    }
    float infinite[19];
    for (int i = 0; i < 19; i++) {
        infinite[i] = -INFINITY;
    }
    CHECK(vec->max(infinite, 19) == -INFINITY);
    CHECK(vec->exp2_sum(infinite, 19, 0.0f) == 0.0f && infinite[0] == 0.0f && infinite[18] == 0.0f);
}

static void test_table(const raddle_vec *vec) {
    printf("%s\n", vec->name);
    test_load(vec);
    test_store(vec);
    test_lengths(vec);
    test_rotated(vec);
    test_reductions(vec);
    test_copy_ids(vec);
    for (int t = 0; t < NUM_DTYPES; t++) {
        const raddle_vec_block *block = vec->blocks[dtypes[t]];
        const raddle_vec_block *block_bf16 = vec->blocks_bf16[dtypes[t]];
        CHECK_INT(block->operand, RADDLE_F32);
        test_block(block, dtypes[t]);
        test_special_bytes(block, dtypes[t]);
        test_weights(block);
        test_special_weights(block);
        if (block_bf16) {
            CHECK_INT(block_bf16->operand, RADDLE_BF16);
            test_block(block_bf16, dtypes[t]);
            test_special_bytes(block_bf16, dtypes[t]);
            test_weights(block_bf16);
            test_special_weights(block_bf16);
        }
    }
}

int main(void) {
    /* The cap is read once, at the first question. */
    setenv("RADDLE_ISA", "generic", 1);
    CHECK_TEXT(raddle_vec_get()->name, "generic");
    setenv("RADDLE_ISA", "avx2", 1);
    CHECK_TEXT(raddle_vec_get()->name, "generic");
    CHECK(raddle_vec_by_name("sse9") == NULL);

    int tables = 0;
    for (int level = 0; level < RADDLE_ISA_COUNT; level++) {
        const raddle_vec *vec = raddle_vec_by_name(raddle_isa_name((raddle_isa)level));
        CHECK((vec != NULL) == raddle_isa_is_supported((raddle_isa)level));
        if (vec) {
            CHECK_TEXT(vec->name, raddle_isa_name((raddle_isa)level));
            test_table(vec);
            tables++;
        }
    }
    CHECK(tables >= 1);
    return check_report();
}

// needs: base/*.c
/* test_ops_shared.c - the arithmetic that both back ends of ops do alike: 8-bit floats, weights,
 * positions and pages. */
#include "ops/ops.h"

#include <math.h>

#include "check.h"

/* ---------------------------------------------------------------- 8-bit floats */

static double value_of(uint32_t code, bool is_e5m2) {
    const int mantissa = is_e5m2 ? 2 : 3, bias = is_e5m2 ? 15 : 7;
    const int exponent = (int)(code & 127) >> mantissa;
    const double fraction = (double)(code & ((1u << mantissa) - 1)) / (1 << mantissa);
    const double size = exponent ? ldexp(1 + fraction, exponent - bias) : ldexp(fraction, 1 - bias);
    return code & 128 ? -size : size;
}

/* The nearest of the finite codes, the even one of two; by looking at all. */
static uint32_t nearest(double x, bool is_e5m2) {
    const uint32_t largest = is_e5m2 ? 0x7b : 0x7e;
    const double size = fabs(x) < 1e6 ? fabs(x) : 1e6; /* differences stay exact */
    uint32_t best = 0;
    for (uint32_t code = 1; code <= largest; code++) {
        const double mine = fabs(value_of(code, is_e5m2) - size);
        const double other = fabs(value_of(best, is_e5m2) - size);
        best = mine < other || (mine == other && code % 2 == 0) ? code : best;
    }
    return best | (signbit(x) ? 128u : 0u);
}

/* All floats whose lower 13 bits are 0 or 1, which every 8-bit number and every tie is among. */
static void test_fp8(void) {
    for (int is_e5m2 = 0; is_e5m2 < 2; is_e5m2++) {
        int64_t wrong = 0;
        for (uint32_t high = 0; high < 1u << 19; high++) {
            for (uint32_t low = 0; low < 2; low++) {
                const float x = raddle_ops_bits_float(high << 13 | low);
                const bool is_big = fabsf(x) > 1e-8f && fabsf(x) < 1e6f;
                if ((high % 64 == 0 || is_big) && !isnan(x)) {
                    wrong += raddle_ops_to_fp8(x, is_e5m2) != nearest((double)x, is_e5m2);
                }
            }
        }
        CHECK_INT(wrong, 0);
        CHECK_INT(raddle_ops_to_fp8(NAN, is_e5m2), 0x7f);
        CHECK_INT(raddle_ops_to_fp8(-INFINITY, is_e5m2), is_e5m2 ? 0xfb : 0xfe);
    }
}

/* ---------------------------------------------------------------- weights and numbers */

static void test_weights_of_probabilities(void) {
    const float tiny = 0x1p-149f;
    CHECK_INT(raddle_ops_prob_weight(0.75f, raddle_ops_prob_factor(0.75f)), RADDLE_OPS_WEIGHT_ONE);
    CHECK_INT(raddle_ops_prob_weight(0.25f, raddle_ops_prob_factor(1.0f)),
              RADDLE_OPS_WEIGHT_ONE / 4);
    CHECK_INT(raddle_ops_prob_weight(0.0f, raddle_ops_prob_factor(tiny)), 0);
    CHECK_INT(raddle_ops_prob_weight(-1.0f, raddle_ops_prob_factor(1.0f)), 0);
    CHECK_INT(raddle_ops_prob_weight(tiny, raddle_ops_prob_factor(tiny)),
              0); /* too small to weigh */
    CHECK_INT(raddle_ops_prob_weight(0x1p-60f, raddle_ops_prob_factor(0x1p-60f)),
              RADDLE_OPS_WEIGHT_ONE);
}

/* Known answers of Philox4x32-10, those that Random123 is tested with. */
static void test_random(void) {
    CHECK_INT((int64_t)raddle_ops_random(0, 0, 0, 0), (int64_t)0xe169c58d6627e8d5u);
    CHECK_INT((int64_t)raddle_ops_random(UINT64_MAX, UINT64_MAX, UINT32_MAX, UINT32_MAX),
              (int64_t)0x41c83b0e408f276du);
    CHECK_INT((int64_t)raddle_ops_random(0x299f31d0a4093822u, 0x85a308d3243f6a88u, 0x13198a2eu,
                                         0x03707344u),
              (int64_t)0x94fdccebd16cfe09u);
    CHECK(raddle_ops_accepts(0, 1.0f, 1e-30f));
    CHECK(!raddle_ops_accepts(UINT64_MAX, 1.0f, 0.5f));
    CHECK(!raddle_ops_accepts(0, 1.0f, 0.0f));
    CHECK(raddle_ops_accepts(UINT64_MAX, 0.5f, 0.5f)); /* u is below 1 */
}

/* ---------------------------------------------------------------- positions and pages */

static int64_t position_of(const raddle_ops_rope_params *p, int64_t row) {
    int64_t position = -7;
    return raddle_ops_rope_position(p, row, &position) ? position : -7;
}

static void test_segments(void) {
    const int32_t indptr[] = {2, 2, 5, 5, 6, 6};
    const int64_t offsets[] = {50, 10, 60, 0, 70};
    const int64_t expected[] = {-7, -7, 10, 11, 12, 0, -7, -7};
    const raddle_ops_rope_params p = {.indptr = indptr,
                                      .offsets = offsets,
                                      .indptr_stride = 1,
                                      .offsets_stride = 1,
                                      .offsets_are_i64 = 1,
                                      .batch = 5};
    for (int64_t row = 0; row < 8; row++) {
        CHECK_INT(position_of(&p, row), expected[row]);
    }
    raddle_ops_rope_params none = p;
    none.batch = 0;
    CHECK_INT(position_of(&none, 3), -7);
}

static int64_t place_of(const raddle_ops_rope_fp8_params *p, int64_t row) {
    int64_t page, slot;
    return raddle_ops_page_of_row(p, row, &page, &slot) ? page * 100 + slot : -1;
}

static void test_pages(void) {
    const int32_t requests[] = {0, 1, 1, 0, -1, 2, 1, 1};
    const int32_t slots[] = {0, 5, 3, 8, 0, 0, -1, 9};
    const int32_t indptr[] = {0, 2, 4};
    const int32_t indices[] = {3, 1, 0, 9};
    const int64_t expected[] = {300, -1, 3, -1, -1, -1, -1, -1};
    const raddle_ops_rope_fp8_params p = {.requests = requests,
                                          .slots = slots,
                                          .kv_indptr = indptr,
                                          .kv_indices = indices,
                                          .requests_stride = 1,
                                          .slots_stride = 1,
                                          .kv_indptr_stride = 1,
                                          .kv_indices_stride = 1,
                                          .batch = 2,
                                          .num_indices = 4,
                                          .num_pages = 4,
                                          .page_size = 4};
    for (int64_t row = 0; row < 8; row++) {
        CHECK_INT(place_of(&p, row), expected[row]);
    }
}

int main(void) {
    test_fp8();
    test_weights_of_probabilities();
    test_random();
    test_segments();
    test_pages();
    return check_report();
}

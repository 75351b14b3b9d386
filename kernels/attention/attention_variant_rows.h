/* attention_variant_rows.h - a user's hooks as loops over rows, for the CPU: the table that the
 * compiled variant exports. C11.
 *
 * The host includes it for the table's type. Behind the variant's own text, with
 * RADDLE_VARIANT_TEXT defined, it also defines the loops, into which the compiler inlines the hooks.
 * The variant and the row are copied first: what a hook writes may otherwise be one of their numbers.
 */
#ifndef RADDLE_ATTENTION_VARIANT_ROWS_H
#define RADDLE_ATTENTION_VARIANT_ROWS_H

#include "attention/attention_variant.h"

/* What the variant lacks is NULL. variant: its raddle_variant. */
typedef struct raddle_variant_rows {
    void (*query)(const void *variant, const raddle_row *row, float *x, int32_t head_dim);
    void (*key)(const void *variant, const raddle_key *key, float *x, int32_t head_dim);
    /* positions: of the keys, ascending. */
    void (*logit)(const void *variant, const raddle_row *row, const int32_t *positions,
                  int32_t count, float *x);
    /* Returns how many are seen. */
    int32_t (*mask)(const void *variant, const raddle_row *row, const int32_t *positions,
                    int32_t count, uint8_t *seen);
    void (*state)(const void *variant, const raddle_row *row, float *max, float *sum);
    void (*output)(const void *variant, const raddle_row *row, float *x, int32_t head_dim);
} raddle_variant_rows;

#ifdef RADDLE_VARIANT_TEXT

#if RADDLE_HAS_QUERY
static void raddle_query_row(const void *variant, const raddle_row *given, float *x,
                             int32_t head_dim) {
    const raddle_variant v = *(const raddle_variant *)variant;
    const raddle_row row = *given;
    for (int32_t dim = 0; dim < head_dim / 2; dim++) {
        const raddle_pair pair = {x[dim], x[dim + head_dim / 2]};
        const raddle_pair changed = raddle_variant_query(&v, &row, dim, pair);
        x[dim] = changed.low;
        x[dim + head_dim / 2] = changed.high;
    }
}
#endif

#if RADDLE_HAS_KEY
static void raddle_key_row(const void *variant, const raddle_key *given, float *x,
                           int32_t head_dim) {
    const raddle_variant v = *(const raddle_variant *)variant;
    const raddle_key key = *given;
    for (int32_t dim = 0; dim < head_dim / 2; dim++) {
        const raddle_pair pair = {x[dim], x[dim + head_dim / 2]};
        const raddle_pair changed = raddle_variant_key(&v, &key, dim, pair);
        x[dim] = changed.low;
        x[dim + head_dim / 2] = changed.high;
    }
}
#endif

/* Keys one behind the other are told by counting, which makes neighbours of what they index. */
static inline bool raddle_is_run(const int32_t *positions, int32_t count) {
    return count > 0 && positions[count - 1] - positions[0] == count - 1;
}

#if RADDLE_HAS_LOGIT
static void raddle_logit_row(const void *variant, const raddle_row *given, const int32_t *positions,
                             int32_t count, float *x) {
    const raddle_variant v = *(const raddle_variant *)variant;
    const raddle_row row = *given;
    if (raddle_is_run(positions, count)) {
        const int32_t first = positions[0];
        for (int32_t i = 0; i < count; i++) {
            x[i] = raddle_variant_logit(&v, &row, first + i, x[i]);
        }
        return;
    }
    for (int32_t i = 0; i < count; i++) {
        x[i] = raddle_variant_logit(&v, &row, positions[i], x[i]);
    }
}
#endif

#if RADDLE_HAS_MASK
static int32_t raddle_mask_row(const void *variant, const raddle_row *given,
                               const int32_t *positions, int32_t count, uint8_t *seen) {
    const raddle_variant v = *(const raddle_variant *)variant;
    const raddle_row row = *given;
    const bool is_run = raddle_is_run(positions, count);
    int32_t num_seen = 0;
    for (int32_t i = 0; is_run && i < count; i++) {
        seen[i] = raddle_variant_mask(&v, &row, positions[0] + i);
        num_seen += seen[i];
    }
    for (int32_t i = 0; !is_run && i < count; i++) {
        seen[i] = raddle_variant_mask(&v, &row, positions[i]);
        num_seen += seen[i];
    }
    return num_seen;
}
#endif

#if RADDLE_HAS_STATE
static void raddle_state_row(const void *variant, const raddle_row *row, float *max, float *sum) {
    raddle_variant_state((const raddle_variant *)variant, row, max, sum);
}
#endif

#if RADDLE_HAS_OUTPUT
static void raddle_output_row(const void *variant, const raddle_row *given, float *x,
                              int32_t head_dim) {
    const raddle_variant v = *(const raddle_variant *)variant;
    const raddle_row row = *given;
    for (int32_t dim = 0; dim < head_dim; dim++) {
        x[dim] = raddle_variant_output(&v, &row, dim, x[dim]);
    }
}
#endif

__attribute__((visibility("default"))) extern const raddle_variant_rows raddle_rows_of_variant;
const raddle_variant_rows raddle_rows_of_variant = {
#if RADDLE_HAS_QUERY
    .query = raddle_query_row,
#endif
#if RADDLE_HAS_KEY
    .key = raddle_key_row,
#endif
#if RADDLE_HAS_LOGIT
    .logit = raddle_logit_row,
#endif
#if RADDLE_HAS_MASK
    .mask = raddle_mask_row,
#endif
#if RADDLE_HAS_STATE
    .state = raddle_state_row,
#endif
#if RADDLE_HAS_OUTPUT
    .output = raddle_output_row,
#endif
};

#endif
#endif

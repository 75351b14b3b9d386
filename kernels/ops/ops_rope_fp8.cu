/* ops_rope_fp8.cu - rotary embedding of parts of q and k, all parts rounded to 8-bit floats, into
 * tensors or into the pages of a cache; sm_80 and later.
 *
 * What      each part (ops_params.h) times its scale; a rotated one first turned by the angle of the
 *           row's position, pairs as in ops_rope.cu. What is past the largest number becomes it.
 * Grid      x: rows. y: the row's items, CTA_THREADS each. An item is VECTOR elements of a head, or
 *           VECTOR pairs of a rotated one, parts one after the other.
 * Bound     bytes: three bytes moved per element.
 */
#include "common/copy.cuh"
#include "ops/ops_fp8.cuh"
#include "ops/ops_params.h"
#include "ops/ops_vector.cuh"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr bool INTERLEAVE = RADDLE_INTERLEAVE;
constexpr int VECTOR = RADDLE_VECTOR;
constexpr int CTA_THREADS = 128;

__device__ __forceinline__ void store_scaled(uint8_t *to, float (&x)[VECTOR], float scale,
                                             bool is_e5m2) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        x[i] *= scale;
    }
    store_fp8<VECTOR>(to, x, is_e5m2);
}

/* VECTOR pairs from pair on. With INTERLEAVE they are neighbours: two vectors side by side, each
 * half of the pairs. */
__device__ __forceinline__ void rotate(uint8_t *to, const type *from, int pair, int half,
                                       const float (&cosine)[VECTOR], const float (&sine)[VECTOR],
                                       float scale, bool is_e5m2) {
    float a[VECTOR], b[VECTOR];
    const int first = INTERLEAVE ? 2 * pair : pair;
    const int second = INTERLEAVE ? first + VECTOR : first + half;
    load_vector<type, VECTOR>(a, from + first);
    load_vector<type, VECTOR>(b, from + second);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        /* The places of pair i. */
        constexpr bool SIDE_BY_SIDE = INTERLEAVE && VECTOR > 1;
        float &x = !SIDE_BY_SIDE ? a[i] : 2 * i < VECTOR ? a[2 * i % VECTOR] : b[2 * i % VECTOR];
        float &y = !SIDE_BY_SIDE    ? b[i]
                   : 2 * i < VECTOR ? a[(2 * i + 1) % VECTOR]
                                    : b[(2 * i + 1) % VECTOR];
        const float turned = x * cosine[i] - y * sine[i];
        y = y * cosine[i] + x * sine[i];
        x = turned;
    }
    store_scaled(to + first, a, scale, is_e5m2);
    store_scaled(to + second, b, scale, is_e5m2);
}

/* The table's VECTOR pairs; no turn where the position is not in it. */
__device__ __forceinline__ void load_angles(const raddle_ops_rope_fp8_params &p, int64_t row,
                                            int pair, float (&cosine)[VECTOR],
                                            float (&sine)[VECTOR]) {
    const int64_t position =
        raddle_ops_index(p.positions, row * p.positions_stride, p.positions_are_i64);
    if (position >= 0 && position < p.max_position) {
        const float *table = p.cos_sin + position * p.cos_sin_stride_row + pair;
        load_vector<f32, VECTOR>(cosine, (const f32 *)table);
        load_vector<f32, VECTOR>(sine, (const f32 *)(table + p.rotary_dim / 2));
        return;
    }
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        cosine[i] = 1.0f;
        sine[i] = 0.0f;
    }
}

__device__ __forceinline__ int items_of(const raddle_ops_fp8_part &part) {
    return part.width / (part.is_rotated ? 2 * VECTOR : VECTOR);
}

} // namespace

extern "C" __global__ void __launch_bounds__(CTA_THREADS)
    ops_rope_fp8(const __grid_constant__ raddle_ops_rope_fp8_params p) {
    const int64_t row = blockIdx.x;
    int item = blockIdx.y * CTA_THREADS + threadIdx.x;
    int number = 0;
    launch_dependents();
    wait_for_predecessors();
    for (; number < RADDLE_OPS_FP8_PARTS; number++) {
        const int items = p.parts[number].heads * items_of(p.parts[number]);
        if (item < items) {
            break;
        }
        item -= items;
    }
    if (number == RADDLE_OPS_FP8_PARTS) {
        return;
    }
    const raddle_ops_fp8_part &part = p.parts[number];
    const int items = items_of(part);
    const int64_t head = item / items;
    const int at = item % items * VECTOR;
    int64_t page = 0, slot = row;
    if (part.is_paged && !raddle_ops_page_of_row(&p, row, &page, &slot)) {
        return;
    }
    const type *from =
        (const type *)part.from + row * part.from_stride_row + head * part.from_stride_head;
    uint8_t *to = part.to + page * part.to_stride_page + slot * part.to_stride_row +
                  head * part.to_stride_head;
    if (part.is_rotated) {
        float cosine[VECTOR], sine[VECTOR];
        load_angles(p, row, at, cosine, sine);
        rotate(to, from, at, p.rotary_dim / 2, cosine, sine, part.scale, p.is_e5m2);
        return;
    }
    float x[VECTOR];
    load_vector<type, VECTOR>(x, from + at);
    store_scaled(to + at, x, part.scale, p.is_e5m2);
}

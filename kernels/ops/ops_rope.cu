/* ops_rope.cu - rotary embedding of q and k in place; sm_80 and later.
 *
 * What      pairs (i, i + rotary_dim / 2), or (2i, 2i + 1) with INTERLEAVE, turned by the angle of
 * the row's position. Grid      x: rows. y: the row's work, CTA_THREADS items each: (head, VECTOR
 * pairs), q heads before k heads. Bound     bytes: every element of the rotated part is read and
 * written once; the table comes from the L2.
 */
#include "common/copy.cuh"
#include "ops/ops_params.h"
#include "ops/ops_vector.cuh"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr bool INTERLEAVE = RADDLE_INTERLEAVE;
constexpr int VECTOR = RADDLE_VECTOR; /* pairs of one item */
constexpr int CTA_THREADS = 128;

/* Loads VECTOR floats of the table; its rows are 16-byte aligned where VECTOR is more than 1. */
__device__ __forceinline__ void load_table(float (&to)[VECTOR], const float *from) {
    load_vector<f32, VECTOR>(to, (const f32 *)from);
}

/* VECTOR pairs from pair on. */
__device__ __forceinline__ void rotate(type *head, int pair, int half,
                                       const float (&cosine)[VECTOR], const float (&sine)[VECTOR]) {
    if constexpr (INTERLEAVE) {
        constexpr int WIDTH = VECTOR == 1 ? 1 : 2 * VECTOR;
        if constexpr (VECTOR == 1) {
            float x[1], y[1];
            load_vector<type, 1>(x, head + 2 * pair);
            load_vector<type, 1>(y, head + 2 * pair + 1);
            const float a[1] = {x[0] * cosine[0] - y[0] * sine[0]};
            const float b[1] = {y[0] * cosine[0] + x[0] * sine[0]};
            store_vector<type, 1>(head + 2 * pair, a);
            store_vector<type, 1>(head + 2 * pair + 1, b);
        } else {
            float v[WIDTH];
            load_vector<type, WIDTH>(v, head + 2 * pair);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                const float x = v[2 * i], y = v[2 * i + 1];
                v[2 * i] = x * cosine[i] - y * sine[i];
                v[2 * i + 1] = y * cosine[i] + x * sine[i];
            }
            store_vector<type, WIDTH>(head + 2 * pair, v);
        }
    } else {
        float a[VECTOR], b[VECTOR];
        load_vector<type, VECTOR>(a, head + pair);
        load_vector<type, VECTOR>(b, head + half + pair);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            const float x = a[i], y = b[i];
            a[i] = x * cosine[i] - y * sine[i];
            b[i] = y * cosine[i] + x * sine[i];
        }
        store_vector<type, VECTOR>(head + pair, a);
        store_vector<type, VECTOR>(head + half + pair, b);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(CTA_THREADS)
    ops_rope(const __grid_constant__ raddle_ops_rope_params p) {
    const int64_t row = blockIdx.x;
    const int half = p.rotary_dim / 2;
    const int items_per_head = half / VECTOR;
    const int item = blockIdx.y * CTA_THREADS + threadIdx.x;
    const int h = item / items_per_head;
    const int pair = item % items_per_head * VECTOR;
    launch_dependents();
    wait_for_predecessors();
    if (h >= p.num_qo_heads + p.num_kv_heads) {
        return;
    }
    const int64_t position = load_index(p.positions, row * p.positions_stride, p.positions_are_i64);
    if (position < 0 || position >= p.max_position) {
        return;
    }
    const float *table = p.cos_sin + position * p.cos_sin_stride_row + pair;
    float cosine[VECTOR], sine[VECTOR];
    load_table(cosine, table);
    load_table(sine, table + half);
    type *head = h < p.num_qo_heads
                     ? (type *)p.q + row * p.q_stride_row + h * p.q_stride_head
                     : (type *)p.k + row * p.k_stride_row + (h - p.num_qo_heads) * p.k_stride_head;
    rotate(head, pair, half, cosine, sine);
}

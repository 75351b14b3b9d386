/* ops_rope.cu - rotary embedding of q and k, in place or into other memory; sm_80 and later.
 *
 * What      pairs (i, i + rotary_dim / 2), or (2i, 2i + 1) with INTERLEAVE, turned by the angle of
 *           the row's position: from a table of cosines and sines, or with FROM_TURNS made here. A
 *           position times a pair's 64-bit fraction of a turn drops whole turns exactly.
 * Grid      x: rows. y: heads_per_cta heads each, q heads before k heads. A thread keeps VECTOR
 *           pairs' cosines and sines and goes through heads with them.
 * Bound     bytes: every element is read and written once; the table comes from the L2.
 */
#include "common/copy.cuh"
#include "ops/ops_params.h"
#include "ops/ops_vector.cuh"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr bool INTERLEAVE = RADDLE_INTERLEAVE;
constexpr bool FROM_TURNS = RADDLE_FROM_TURNS;
constexpr int VECTOR = RADDLE_VECTOR; /* pairs of one item */
constexpr int CTA_THREADS = 128;

template <bool> struct params_of { using type = raddle_ops_rope_params; };
template <> struct params_of<true> { using type = raddle_ops_rope_turns_params; };
using params = params_of<FROM_TURNS>::type;

template <typename P> __device__ __forceinline__ const raddle_ops_rope_params &rope_of(const P &p) {
    if constexpr (FROM_TURNS) {
        return p.rope;
    } else {
        return p;
    }
}

/* Of VECTOR pairs from pair on, at a position. Rows of the table are 16-byte aligned where VECTOR
 * is more than 1. */
template <typename P>
__device__ __forceinline__ void load_angles(const P &p, int64_t position, int pair, int half,
                                            float (&cosine)[VECTOR], float (&sine)[VECTOR]) {
    if constexpr (FROM_TURNS) {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            const int32_t turn = (int32_t)((uint64_t)position * p.turns[pair + i] >> 32);
            const float half_turns = (float)turn * 0x1p-31f; /* [-1, 1] */
            cosine[i] = cospif(half_turns) * p.rope.attention_factor;
            sine[i] = sinpif(half_turns) * p.rope.attention_factor;
        }
    } else {
        const float *table = p.cos_sin + position * p.cos_sin_stride_row + pair;
        load_vector<f32, VECTOR>(cosine, (const f32 *)table);
        load_vector<f32, VECTOR>(sine, (const f32 *)(table + half));
    }
}

__device__ __forceinline__ void turn(float &x, float &y, float cosine, float sine) {
    const float a = x * cosine - y * sine;
    y = y * cosine + x * sine;
    x = a;
}

/* VECTOR pairs from pair on, of one head. */
__device__ __forceinline__ void rotate(type *to, const type *from, int pair, int half,
                                       const float (&cosine)[VECTOR], const float (&sine)[VECTOR]) {
    float a[VECTOR], b[VECTOR];
    if constexpr (INTERLEAVE && VECTOR > 1) {
        float v[2 * VECTOR];
        load_vector<type, 2 * VECTOR>(v, from + 2 * pair);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            turn(v[2 * i], v[2 * i + 1], cosine[i], sine[i]);
        }
        store_vector<type, 2 * VECTOR>(to + 2 * pair, v);
    } else {
        const int first = INTERLEAVE ? 2 * pair : pair;
        const int second = INTERLEAVE ? first + 1 : first + half;
        load_vector<type, VECTOR>(a, from + first);
        load_vector<type, VECTOR>(b, from + second);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            turn(a[i], b[i], cosine[i], sine[i]);
        }
        store_vector<type, VECTOR>(to + first, a);
        store_vector<type, VECTOR>(to + second, b);
    }
}

/* Head h of the row, of q or of k. */
struct head_places {
    const type *from;
    type *to;
};

__device__ __forceinline__ head_places head_of(const raddle_ops_rope_params &p, int64_t row,
                                               int h) {
    if (h < p.num_qo_heads) {
        return {(const type *)p.q + row * p.q_stride_row + h * p.q_stride_head,
                (type *)p.q_out + row * p.q_out_stride_row + h * p.q_out_stride_head};
    }
    h -= p.num_qo_heads;
    return {(const type *)p.k + row * p.k_stride_row + h * p.k_stride_head,
            (type *)p.k_out + row * p.k_out_stride_row + h * p.k_out_stride_head};
}

/* Elements from begin on, of heads of the row. */
__device__ __forceinline__ void copy_rest(const raddle_ops_rope_params &p, int64_t row, int begin,
                                          int first_head, int end_head) {
    const int pieces = (p.head_dim - begin) / VECTOR;
    for (int i = threadIdx.x; i < pieces * (end_head - first_head); i += CTA_THREADS) {
        const head_places head = head_of(p, row, first_head + i / pieces);
        const int d = begin + i % pieces * VECTOR;
        float x[VECTOR];
        load_vector<type, VECTOR>(x, head.from + d);
        store_vector<type, VECTOR>(head.to + d, x);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(CTA_THREADS)
    ops_rope(const __grid_constant__ params whole) {
    const raddle_ops_rope_params &p = rope_of(whole);
    const int64_t row = blockIdx.x;
    const int half = p.rotary_dim / 2;
    const int pieces = half / VECTOR;
    const int lanes = pieces < CTA_THREADS ? pieces : CTA_THREADS; /* threads of one head */
    const int groups = CTA_THREADS / lanes, group = threadIdx.x / lanes;
    const int first_head = blockIdx.y * p.heads_per_cta;
    const int heads = p.num_qo_heads + p.num_kv_heads;
    const int end_head =
        first_head + p.heads_per_cta < heads ? first_head + p.heads_per_cta : heads;
    launch_dependents();
    wait_for_predecessors();
    int64_t position = 0;
    bool is_rotated = raddle_ops_rope_position(&p, row, &position);
    is_rotated &= FROM_TURNS || (position >= 0 && position < p.max_position);
    if (is_rotated && group < groups) {
        for (int piece = threadIdx.x % lanes; piece < pieces; piece += lanes) {
            const int pair = piece * VECTOR;
            float cosine[VECTOR], sine[VECTOR];
            load_angles(whole, position, pair, half, cosine, sine);
            for (int h = first_head + group; h < end_head; h += groups) {
                const head_places head = head_of(p, row, h);
                rotate(head.to, head.from, pair, half, cosine, sine);
            }
        }
    }
    if (!p.in_place) {
        copy_rest(p, row, is_rotated ? p.rotary_dim : 0, first_head, end_head);
    }
}

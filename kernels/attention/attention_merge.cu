/* attention_merge.cu - merges attention states over disjoint sets of keys, in index order.
 *
 * What      v_out = sum of weight_i v_i with weight_i = 2^(s_i) / sum of 2^(s_j), s_out = log of
 *           that sum, in the caller's base. A state of -inf weighs nothing whatever its v holds;
 *           all -inf: 0 and -inf.
 * Grid      a warp per (row, head), 4 warps per CTA; a lane has VECTOR neighbouring elements at a
 *           time.
 * Bound     bytes: (states + 1) x head_dim elements per row and head.
 */
#include "attention/attention_merge_params.h"
#include "common/copy.cuh"
#include "common/reduce.cuh"
#include "common/softmax.cuh"
#include "common/types.cuh"

namespace {

using namespace raddle;

using element = RADDLE_TYPE;
constexpr int VECTOR =
    RADDLE_VECTOR; /* elements of 16 bytes, or 1 where alignment does not allow it */
constexpr int WARPS = 4;

static_assert(VECTOR == 1 || VECTOR * sizeof(element) == 16,
              "a lane moves one element or 16 bytes");

__device__ __forceinline__ void load(const element *from, float (&x)[VECTOR]) {
    if constexpr (VECTOR == 1) {
        x[0] = to_float<element>(*from);
    } else {
        const uint4 chunk = *(const uint4 *)from;
        const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
        if constexpr (VECTOR == 4) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[i] = __uint_as_float(words[i]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 pair = unpack2<element>(words[i]);
                x[2 * i] = pair.x;
                x[2 * i + 1] = pair.y;
            }
        }
    }
}

__device__ __forceinline__ void store(element *to, const float (&x)[VECTOR]) {
    if constexpr (VECTOR == 1) {
        *to = from_float<element>(x[0]);
    } else if constexpr (VECTOR == 4) {
        *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
    } else {
        *(uint4 *)to = make_uint4(pack2<element>(x[0], x[1]), pack2<element>(x[2], x[3]),
                                  pack2<element>(x[4], x[5]), pack2<element>(x[6], x[7]));
    }
}

/* State i of a row and head: its log-sum-exp and its v. */
__device__ __forceinline__ float lse_of(const raddle_attention_merge_params &p, int64_t row,
                                        int64_t head, int64_t i) {
    if (p.v_other && i == 1) {
        return p.s_other[row * p.s_other_stride_row + head * p.s_other_stride_head];
    }
    return p.s[row * p.s_stride_row + i * p.s_stride_state + head * p.s_stride_head];
}

__device__ __forceinline__ const element *values_of(const raddle_attention_merge_params &p,
                                                    int64_t row, int64_t head, int64_t i) {
    if (p.v_other && i == 1) {
        return (const element *)p.v_other + row * p.v_other_stride_row +
               head * p.v_other_stride_head;
    }
    return (const element *)p.v + row * p.v_stride_row + i * p.v_stride_state +
           head * p.v_stride_head;
}

} // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    attention_merge(const __grid_constant__ raddle_attention_merge_params p) {
    launch_dependents();
    wait_for_predecessors(); /* the states may be theirs */
    const int lane = threadIdx.x % 32;
    const unsigned item =
        blockIdx.x * WARPS + threadIdx.x / 32; /* rows times heads fit in 31 bits */
    if (item >= p.rows * p.num_heads) {
        return;
    }
    const int64_t row = item / (unsigned)p.num_heads;
    const int64_t head = item % (unsigned)p.num_heads;
    const int32_t num_states = p.mask && !p.mask[row * p.mask_stride] ? 1 : p.num_states;

    float max = negative_infinity();
    for (int32_t i = lane; i < num_states; i += 32) {
        max = fmaxf(max, lse_of(p, row, head, i));
    }
    max = reduce_max<1, 32>(max);
    const bool empty = max == negative_infinity();
    float sum = 0.0f;
    for (int32_t i = lane; i < num_states; i += 32) {
        sum += empty ? 0.0f : exp2f((lse_of(p, row, head, i) - max) * p.to_log2);
    }
    sum = reduce_sum<1, 32>(sum);
    const float inverse = reciprocal_fast(sum);

    /* v_out may be v itself: a lane reads its elements of every state before it writes them. */
    element *out = (element *)p.v_out + row * p.v_out_stride_row + head * p.v_out_stride_head;
    for (int32_t dim = lane * VECTOR; dim < p.head_dim; dim += 32 * VECTOR) {
        float acc[VECTOR] = {};
        for (int32_t i = 0; i < num_states; i++) {
            const float lse = lse_of(p, row, head, i);
            if (lse == negative_infinity()) {
                continue;
            }
            const float weight = exp2f((lse - max) * p.to_log2) * inverse;
            float x[VECTOR];
            load(values_of(p, row, head, i) + dim, x);
#pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                acc[k] = fmaf(weight, x[k], acc[k]);
            }
        }
        store(out + dim, acc);
    }
    __syncwarp(); /* every lane has read the log-sum-exps -> s_out, which may be s itself, is
                     written */
    if (lane == 0) {
        p.s_out[row * p.s_out_stride_row + head * p.s_out_stride_head] =
            empty ? negative_infinity() : max + log2f(sum) * p.from_log2;
    }
}

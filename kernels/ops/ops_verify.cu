/* ops_verify.cu - how much of a drafted chain of tokens a target distribution keeps, and the token
 * that follows; sm_80 and later.
 *
 * What      arXiv 2302.01318: token i of the draft is kept with probability min(1, p / q). At the
 *           first that is not, a token is drawn from max(p - q, 0) instead; after a chain that was
 *           kept whole, from the target. Random numbers and weights as in ops_sample_params.h: draw i
 *           of the row's stream for token i.
 * Grid      one CTA per row. Every thread goes through the few tokens; the warps divide the
 *           vocabulary for the one that is drawn.
 * Passes    maximum | weights of each warp's range | one warp searches its range.
 * Bound     bytes: three passes over two rows of the vocabulary.
 */
#include "common/copy.cuh"
#include "ops/ops_block.cuh"
#include "ops/ops_params.h"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr int VECTOR = RADDLE_VECTOR;

/* One row of the call. */
struct chain {
    const type *draft, *target;
    int64_t draft_step, target_step;
    uint64_t seed, offset;
    uint32_t stream;
};

__device__ __forceinline__ chain chain_of(const raddle_ops_verify_params &p, int64_t row) {
    return {(const type *)p.draft + row * p.draft_stride_row,
            (const type *)p.target + row * p.target_stride_row,
            p.draft_stride_step,
            p.target_stride_step,
            p.seed ? (uint64_t)p.seed[row * p.seed_stride] : p.seed_value,
            p.offset ? (uint64_t)p.offset[row * p.offset_stride] : p.offset_value,
            p.is_row_stream ? (uint32_t)row : 0};
}

/* Whether token i is kept; one outside the vocabulary is not. */
__device__ __forceinline__ bool is_kept(const chain &c, int64_t vocab, int i, int64_t id) {
    if (id < 0 || id >= vocab) {
        return false;
    }
    const float q = to_float(c.draft[i * c.draft_step + id]);
    const float p = to_float(c.target[i * c.target_step + id]);
    return raddle_ops_accepts(raddle_ops_random(c.seed, c.offset, c.stream, i), q, p);
}

/* Draws from max(target - draft, 0), or where there is nothing of that, from the target; draft NULL:
 * from the target. out gets -1 when that cannot be drawn from. */
__device__ __forceinline__ void draw(const type *target, const type *draft, int64_t vocab,
                                     uint64_t *scratch, uint64_t random, int32_t *out) {
    const row_of_logits<type, VECTOR> row(target, vocab);
    const float infinity = __uint_as_float(0x7f800000u);
#pragma unroll 1
    for (bool is_drawn = false; !is_drawn; draft = nullptr) {
        const auto value = [&](float x, int64_t i) {
            return draft ? __fsub_rn(x, to_float(draft[i])) : x;
        };
        float largest = 0;
        bool has_nan = false;
        row.each([&](float x, int64_t i) {
            const float y = value(x, i);
            has_nan |= y != y;
            largest = y > largest ? y : largest;
        });
        const float max =
            __uint_as_float((uint32_t)max_block((uint64_t)__float_as_uint(largest), scratch));
        has_nan = __syncthreads_or(has_nan);
        const bool is_last = !draft || has_nan;
        if (!has_nan && max > 0 && max < infinity) {
            const float factor = raddle_ops_prob_factor(max);
            is_drawn = draw_token(
                row, scratch, random,
                [&](float x, int64_t i) {
                    return (uint64_t)raddle_ops_prob_weight(value(x, i), factor);
                },
                [&](int64_t token) { *out = (int32_t)token; });
        }
        if (!is_drawn && is_last) {
            if (threadIdx.x == 0) {
                *out = -1;
            }
            return;
        }
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
    ops_verify(const __grid_constant__ raddle_ops_verify_params p) {
    __shared__ uint64_t scratch[ROW_WARPS];
    const int64_t row = blockIdx.x;
    launch_dependents();
    wait_for_predecessors();
    const chain c = chain_of(p, row);
    int32_t *out = p.out + row * p.out_stride_row;
    int accepted = 0, emitted = -1; /* the first that is not kept */
    for (int i = 0; i < p.steps; i++) {
        const int64_t id =
            raddle_ops_index(p.ids, row * p.ids_stride_row + i * p.ids_stride_step, p.ids_are_i64);
        const bool kept = is_kept(c, p.vocab, i, id);
        accepted += kept;
        emitted = emitted < 0 && !kept ? i : emitted;
        if (threadIdx.x == 0) {
            out[i] = emitted < 0 ? (int32_t)id : -1;
        }
    }
    const bool is_whole = emitted < 0;
    emitted = is_whole ? p.steps : emitted;
    if (threadIdx.x == 0) {
        out[p.steps] = -1;
        if (p.accepted) {
            p.accepted[row * p.accepted_stride] += accepted;
        }
        if (p.emitted) {
            p.emitted[row * p.emitted_stride] += emitted;
        }
    }
    __syncthreads(); /* -1 is written, before one thread puts the token over it */
    const uint64_t random = raddle_ops_random(c.seed, c.offset, c.stream, p.steps);
    draw(c.target + emitted * c.target_step, is_whole ? nullptr : c.draft + emitted * c.draft_step,
         p.vocab, scratch, random, out + emitted);
}

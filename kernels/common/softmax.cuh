/* softmax.cuh - online softmax in base 2: exponentials and the state of a row.
 *
 * A running state is the largest logit seen and the sum of 2^(logit - max). While a kernel runs,
 * max starts at a finite floor, so that a wholly masked tile gives 2^(-inf - floor) = 0 and never
 * -inf - -inf; a state that leaves the kernel has max -inf when its sum is 0.
 */
#ifndef RADDLE_COMMON_SOFTMAX_CUH
#define RADDLE_COMMON_SOFTMAX_CUH

#include "common/abi.h"

namespace raddle {

constexpr float LOGIT_FLOOR = -3.0e38f;

__device__ __forceinline__ float negative_infinity() {
    return __int_as_float(0xff800000);
}

/* 2^x by the special-function unit: relative error 2^-22, exact at 0 and -inf, results below 2^-126
 * are 0. */
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x by the special-function unit: relative error 2^-23; a division would be a call. */
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct softmax_state {
    float max; /* base 2 logits */
    float sum;
};

__device__ __forceinline__ softmax_state empty_state() {
    return softmax_state{negative_infinity(), 0.0f};
}

/* The form that leaves the kernel. */
__device__ __forceinline__ softmax_state closed_state(float max, float sum) {
    return softmax_state{sum == 0.0f ? negative_infinity() : max, sum};
}

/* Adds a state and its N outputs to a running one. The operations are spelled out, so that a fold
 * gives the same bits wherever the compiler puts it: in a merge of partials or between the chunks
 * of an uncut item. */
template <int N>
__device__ __forceinline__ void fold(softmax_state &into, float (&acc)[N],
                                     const softmax_state &from, const float (&part)[N]) {
    const float max = fmaxf(into.max, from.max);
    const float base = max == negative_infinity() ? 0.0f : max; /* both empty: 2^-inf twice */
    const float factor_into = exp2_fast(into.max - base);
    const float factor_from = exp2_fast(from.max - base);
    into.max = max;
    into.sum = __fmaf_rn(into.sum, factor_into, __fmul_rn(from.sum, factor_from));
#pragma unroll
    for (int i = 0; i < N; i++) {
        acc[i] = __fmaf_rn(acc[i], factor_into, __fmul_rn(part[i], factor_from));
    }
}

} // namespace raddle

#endif

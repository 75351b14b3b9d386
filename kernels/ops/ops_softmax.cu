/* ops_softmax.cu - probabilities of rows of logits in float32; sm_80 and later.
 *
 * Grid      one CTA per row; its warps divide the vocabulary.
 * Passes    maximum; sum of exponentials; result. The second and third read the L2.
 * Bound     bytes: at 64 rows of 128256 float32, 66 MB moved.
 */
#include "common/copy.cuh"
#include "ops/ops_block.cuh"
#include "ops/ops_params.h"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr int VECTOR = RADDLE_VECTOR;

__device__ __forceinline__ float exponential(float x, float max, float factor) {
    return x == max ? 1.0f : expf((x - max) * factor); /* also when the maximum is infinite */
}

} // namespace

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
    ops_softmax(const __grid_constant__ raddle_ops_softmax_params p) {
    __shared__ uint64_t scratch[ROW_WARPS];
    const int64_t i = blockIdx.x;
    const row_of_logits<type, VECTOR> row((const type *)p.logits + i * p.logits_stride_row,
                                          p.vocab);
    launch_dependents();
    wait_for_predecessors();
    /* A temperature that is not above 0 gives the limit: all to the largest. */
    const float temperature = p.temperature ? p.temperature[i * p.temperature_stride] : 1.0f;
    const float factor = !p.temperature    ? p.inv_temperature
                         : temperature > 0 ? 1.0f / temperature
                                           : __uint_as_float(0x7f800000u);
    const uint64_t best = first_maximum(row, scratch);
    const float max = value_of_key((uint32_t)(best >> 32));
    float sum = 0;
    row.each([&](float x, int64_t) { sum += exponential(x, max, factor); });
    sum = sum_block(sum, scratch);
    /* NaN in the row, or no logit above -inf. */
    const bool is_bad = best == 0 || max == -__uint_as_float(0x7f800000u);
    const float scale = is_bad ? __uint_as_float(0x7fc00000u) : 1.0f / sum;
    float *out = p.out + i * p.out_stride_row;
    row.each([&](float x, int64_t at) { out[at] = exponential(x, max, factor) * scale; });
}

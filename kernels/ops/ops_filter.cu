/* ops_filter.cu - what top_k and top_p leave of rows: probabilities brought to the sum 1 again, or
 * logits with -inf for the rest; sm_80 and later.
 *
 * What      the tokens that ops_sample.cu would draw from, ties with the least one kept. A row with
 *           NaN, or of probabilities one with infinity, becomes NaN.
 * Grid      one CTA per row; its warps divide the vocabulary in contiguous ranges.
 * Passes    maximum | top_k, top_p: 4 each (3 for 16-bit values) | sum of probabilities | result.
 * Shared    two halves of 2048 sums, and one sum per warp.
 * Bound     the L2 bandwidth of one SM: 128256 float32 take about 5 us a pass.
 */
#include "common/copy.cuh"
#include "ops/ops_block.cuh"
#include "ops/ops_params.h"

namespace {

using namespace raddle;

using type = RADDLE_TYPE;
constexpr int VECTOR = RADDLE_VECTOR;
constexpr bool IS_PROBS = RADDLE_IS_PROBS;

} // namespace

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
    ops_filter(const __grid_constant__ raddle_ops_sample_params p) {
    __shared__ selection_shared s;
    const raddle_ops_sample_call &c = p.call;
    const int64_t i = blockIdx.x;
    const float infinity = __uint_as_float(0x7f800000u), nan = __uint_as_float(0x7fc00000u);
    const row_of_logits<type, VECTOR> row((const type *)c.x + i * c.x_stride_row, c.vocab);
    type *out = (type *)c.out + i * c.out_stride;
    launch_dependents();
    wait_for_predecessors();
    const raddle_ops_sample_row &settings = p.settings[c.settings_step ? i : 0];
    const uint64_t best = first_maximum(row, s.scratch);
    const float max = value_of_key((uint32_t)(best >> 32));
    const bool is_bad = best == 0 || (IS_PROBS && max == infinity);
    amounts<IS_PROBS> amount;
    amount.max = max;
    amount.factor = IS_PROBS ? raddle_ops_prob_factor(max) : raddle_ops_weight_factor(1.0f);
    amount.per_unit = amount.factor * ((BINS - 1) / 41.0f);
    amount.top_k = c.top_k ? c.top_k[i * c.top_k_stride] : settings.top_k;
    amount.top_p = c.top_p ? c.top_p[i * c.top_p_stride] : settings.top_p;
    uint32_t least_key = 0;
#pragma unroll 1
    for (int by_weight = 0; by_weight < 2 && !is_bad; by_weight++) {
        amount.by_weight = by_weight != 0;
        if (by_weight ? amount.top_p < 1 : amount.top_k > 0 && amount.top_k < c.vocab) {
            least_key = select_key(row, s, amount, least_key);
        }
    }
    float sum = 0;
    if constexpr (IS_PROBS) {
        row.each([&](float x, int64_t) { sum += raddle_ops_key(x) >= least_key && x > 0 ? x : 0; });
        sum = sum_block(sum, s.scratch);
    }
    const float scale = sum > 0 ? 1.0f / sum : 0.0f;
    row.each_step([&](const float(&x)[VECTOR], int64_t at, int count) {
        float y[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            const bool is_kept = raddle_ops_key(x[j]) >= least_key;
            y[j] = IS_PROBS ? (is_kept && x[j] > 0 ? x[j] * scale : 0.0f)
                            : (is_kept ? x[j] : -infinity);
            y[j] = is_bad ? nan : y[j];
        }
        if (count == VECTOR) {
            store_vector<type, VECTOR>(out + at, y);
            return;
        }
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            if (j < count) {
                out[at + j] = from_float<type>(y[j]);
            }
        }
    });
}

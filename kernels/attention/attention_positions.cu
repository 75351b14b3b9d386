/* attention_positions.cu - request and position of every appended row.
 *
 * One thread per row: a binary search over indptr finds the request r whose rows hold it; the
 * position counts back from the end of the request, seq_lens[r] - (indptr[r + 1] - row). Rows past
 * the last request get request -1 and position 0, which append skips. Bound: launch latency.
 */
#include "attention/attention_index.cuh"

extern "C" __global__ void
attention_positions(const __grid_constant__ raddle_attention_index_params p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= p.rows) {
        return;
    }
    /* The first request that ends behind row. */
    int64_t low = 0, high = p.batch;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (index_load(p.indptr, (middle + 1) * p.indptr_stride, p.wide & 1) > row) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    int64_t position = 0;
    if (low < p.batch) {
        const int64_t end = index_load(p.indptr, (low + 1) * p.indptr_stride, p.wide & 1);
        position = index_load(p.lengths, low * p.lengths_stride, p.wide & 2) - (end - row);
    }
    index_store(p.out, row * p.out_stride, p.wide & 4, low < p.batch ? low : -1);
    index_store(p.positions, row * p.positions_stride, p.wide & 8, position);
}

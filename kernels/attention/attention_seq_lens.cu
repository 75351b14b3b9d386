/* attention_seq_lens.cu - K/V tokens of each request from its page table.
 *
 * One thread per request: (pages - 1) * page_size + last_page_len, 0 for a request without pages.
 * Bound: launch latency.
 */
#include "attention/attention_index.cuh"

extern "C" __global__ void
attention_seq_lens(const __grid_constant__ raddle_attention_index_params p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.batch) {
        return;
    }
    const int64_t pages = index_load(p.indptr, (i + 1) * p.indptr_stride, p.wide & 1) -
                          index_load(p.indptr, i * p.indptr_stride, p.wide & 1);
    const int64_t last = index_load(p.lengths, i * p.lengths_stride, p.wide & 2);
    index_store(p.out, i * p.out_stride, p.wide & 4,
                pages > 0 ? (pages - 1) * p.page_size + last : 0);
}

/* attention_append.cu - writes new K and V rows into a paged cache, by page table or slot number.
 *
 * What      row i of k and v goes to one token of one page; negative batch indices and slot -1 are
 *           skipped, and so is everything that would lie outside the page table or the pool, of
 *           which the first is kept in p.error when there is one.
 * Grid      one CTA per row. Block: 128 threads that copy 16-byte chunks of all heads of K, then
 *           of V.
 * Bound     bytes, read and written once: 4 KB a row for 8 heads of 128 bf16; at decode sizes, a
 *           launch.
 */
#include "attention/attention_append_params.h"
#include "common/copy.cuh"

namespace {

using namespace raddle;

enum { SLOTS, BATCH_INDICES, POSITIONS, KV_INDPTR, KV_INDICES }; /* bits of p.wide */

/* Entry i of an index tensor of int32 or int64. */
__device__ __forceinline__ int64_t index_at(const raddle_attention_append_params &p, int which,
                                            const void *indices, int64_t i, int64_t stride) {
    const bool wide = p.wide >> which & 1;
    return wide ? ((const int64_t *)indices)[i * stride]
                : (int64_t)((const int32_t *)indices)[i * stride];
}

/* The row leads nowhere by an index that is no skip. False, as find_place() then is. All threads of
 * the CTA come here together; the first row of all that claims the record fills it. */
__device__ __forceinline__ bool reject(const raddle_attention_append_params &p, int32_t what,
                                       int64_t row, int64_t value, int64_t limit) {
    if (p.error && threadIdx.x == 0 && atomicCAS(&p.error->claimed, 0, 1) == 0) {
        p.error->row = row;
        p.error->value = value;
        p.error->limit = limit;
        __threadfence(); /* a reader that sees what sees the rest */
        *(volatile int32_t *)&p.error->what = what;
    }
    return false;
}

/* Where a row goes. False: nowhere. */
__device__ __forceinline__ bool find_place(const raddle_attention_append_params &p, int64_t row,
                                           int64_t &page, int64_t &offset) {
    if (p.slots) {
        const int64_t slot = index_at(p, SLOTS, p.slots, row, p.slots_stride);
        page = slot / p.page_size;
        offset = slot - page * p.page_size;
        if (slot == -1) {
            return false;
        }
        return (slot >= 0 && page < p.num_pages) ||
               reject(p, RADDLE_APPEND_SLOT, row, slot, p.num_pages * p.page_size);
    }
    const int64_t request =
        index_at(p, BATCH_INDICES, p.batch_indices, row, p.batch_indices_stride);
    const int64_t position = index_at(p, POSITIONS, p.positions, row, p.positions_stride);
    if (request < 0) {
        return false;
    }
    if (request >= p.batch) {
        return reject(p, RADDLE_APPEND_BATCH_INDEX, row, request, p.batch);
    }
    const int64_t begin = index_at(p, KV_INDPTR, p.kv_indptr, request, p.kv_indptr_stride);
    const int64_t end = index_at(p, KV_INDPTR, p.kv_indptr, request + 1, p.kv_indptr_stride);
    const int64_t entry = position / p.page_size;
    offset = position - entry * p.page_size;
    if (begin < 0 || begin > end || end > p.num_indices) {
        return reject(p, RADDLE_APPEND_INDPTR, row, begin, end);
    }
    if (position < 0 || entry >= end - begin) {
        return reject(p, RADDLE_APPEND_POSITION, row, position, (end - begin) * p.page_size);
    }
    page = index_at(p, KV_INDICES, p.kv_indices, begin + entry, p.kv_indices_stride);
    return (page >= 0 && page < p.num_pages) ||
           reject(p, RADDLE_APPEND_PAGE, row, page, p.num_pages);
}

/* Copies the heads of one row, all threads of the CTA together. */
__device__ __forceinline__ void copy_heads(char *to, int64_t to_head_bytes, const char *from,
                                           int64_t from_head_bytes, int32_t heads, int32_t chunks) {
    for (int32_t i = threadIdx.x; i < heads * chunks; i += blockDim.x) {
        const int32_t head = i / chunks;
        const int32_t chunk = i - head * chunks;
        *(uint4 *)(to + head * to_head_bytes + 16 * chunk) =
            *(const uint4 *)(from + head * from_head_bytes + 16 * chunk);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(128)
    attention_append(const __grid_constant__ raddle_attention_append_params p) {
    launch_dependents();
    wait_for_predecessors(); /* k, v and the indices may be theirs */
    const int64_t row = blockIdx.x;
    int64_t page, offset;
    if (!find_place(p, row, page, offset)) {
        return;
    }
    copy_heads((char *)p.k_cache + page * p.k_cache_page_bytes + offset * p.k_cache_token_bytes,
               p.k_cache_head_bytes, (const char *)p.k + row * p.k_row_bytes, p.k_head_bytes,
               p.num_kv_heads, p.k_chunks);
    copy_heads((char *)p.v_cache + page * p.v_cache_page_bytes + offset * p.v_cache_token_bytes,
               p.v_cache_head_bytes, (const char *)p.v + row * p.v_row_bytes, p.v_head_bytes,
               p.num_kv_heads, p.v_chunks);
}

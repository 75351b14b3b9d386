/* attention_append_params.h - the argument of attention_append.cu. C11 and NVRTC.
 *
 * The kernel moves bytes: every stride of K, V and the cache is in bytes here, a multiple of 16, so
 * that one compiled kernel serves every element type. Strides of index tensors are in elements.
 */
#ifndef RADDLE_ATTENTION_APPEND_PARAMS_H
#define RADDLE_ATTENTION_APPEND_PARAMS_H

#include "common/abi.h"

/* Which index led a row nowhere. */
enum {
    RADDLE_APPEND_SLOT = 1,    /* value: the slot; limit: slots of the cache */
    RADDLE_APPEND_BATCH_INDEX, /* the request; requests */
    RADDLE_APPEND_POSITION,    /* the position; tokens that the request's pages hold */
    RADDLE_APPEND_INDPTR,      /* the request's first entry of the page table; its end */
    RADDLE_APPEND_PAGE         /* the page id; pages of the cache */
};

/* The first such row since the record was cleared: RADDLE_CHECK. */
typedef struct raddle_attention_append_error {
    int32_t claimed; /* by the one row that fills the rest */
    int32_t what;    /* RADDLE_APPEND_*, written last; 0: none */
    int64_t row, value, limit;
} raddle_attention_append_error;
RADDLE_ASSERT_SIZE(raddle_attention_append_error, 2 * 4 + 3 * 8);

typedef struct raddle_attention_append_params {
    const void *k; /* [rows, num_kv_heads, head_dim_qk] */
    const void *v; /* [rows, num_kv_heads, head_dim_vo] */
    void *k_cache; /* [num_pages, page_size, num_kv_heads, head_dim_qk] in any order of strides */
    void *v_cache;
    raddle_attention_append_error *error; /* NULL: rows that lead nowhere are skipped in silence */

    /* Where row i goes: slots[i] = page * page_size + offset, or NULL and by the page table. */
    const void *slots;
    const void *batch_indices; /* [rows], negative: skip */
    const void *positions;     /* [rows] */
    const void *kv_indptr;     /* [batch + 1] */
    const void *kv_indices;    /* [num_indices] */

    int64_t k_row_bytes, k_head_bytes;
    int64_t v_row_bytes, v_head_bytes;
    int64_t k_cache_page_bytes, k_cache_token_bytes, k_cache_head_bytes;
    int64_t v_cache_page_bytes, v_cache_token_bytes, v_cache_head_bytes;
    int64_t slots_stride, batch_indices_stride, positions_stride, kv_indptr_stride,
        kv_indices_stride;
    int64_t rows, num_pages, num_indices, batch;

    int32_t page_size;
    int32_t num_kv_heads;
    int32_t k_chunks, v_chunks; /* 16-byte pieces of one head */
    int32_t
        wide; /* bits, int64 when set: 0 slots, 1 batch_indices, 2 positions, 3 indptr, 4 indices */
    int32_t reserved;
} raddle_attention_append_params;
RADDLE_ASSERT_SIZE(raddle_attention_append_params, 10 * 8 + 19 * 8 + 6 * 4);

#endif

/* attention_index_params.h - arguments of the two index helpers. C11 and NVRTC.
 *
 * Index tensors are int32 or int64: bit b of wide says that tensor b, in the order below, is int64.
 */
#ifndef RADDLE_ATTENTION_INDEX_PARAMS_H
#define RADDLE_ATTENTION_INDEX_PARAMS_H

#include "common/abi.h"

typedef struct raddle_attention_index_params {
    const void *indptr;  /* 0: [batch + 1] */
    const void *lengths; /* 1: [batch] last_page_len, or seq_lens */
    void *out;           /* 2: [batch] seq_lens, or [rows] batch indices */
    void *positions;     /* 3: [rows], of attention_positions only */
    int64_t indptr_stride, lengths_stride, out_stride, positions_stride;
    int64_t batch;
    int64_t rows;
    int32_t page_size;
    int32_t wide;
} raddle_attention_index_params;
RADDLE_ASSERT_SIZE(raddle_attention_index_params, 4 * 8 + 6 * 8 + 2 * 4);

#endif

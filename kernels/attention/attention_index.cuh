/* attention_index.cuh - int32 and int64 index tensors read and written by one piece of code. */
#pragma once

#include "attention/attention_index_params.h"

__device__ __forceinline__ int64_t index_load(const void *data, int64_t at, bool wide) {
    return wide ? static_cast<const int64_t *>(data)[at] : static_cast<const int32_t *>(data)[at];
}

__device__ __forceinline__ void index_store(void *data, int64_t at, bool wide, int64_t value) {
    if (wide) {
        static_cast<int64_t *>(data)[at] = value;
    } else {
        static_cast<int32_t *>(data)[at] = static_cast<int32_t>(value);
    }
}

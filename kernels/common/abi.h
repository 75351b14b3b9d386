/* abi.h - what a header needs that is C11 on the host and CUDA C++ under NVRTC: fixed-width types
 * and size asserts. */
#ifndef RADDLE_COMMON_ABI_H
#define RADDLE_COMMON_ABI_H

#ifdef __CUDACC_RTC__ /* NVRTC has no headers of its own */
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#ifdef __cplusplus
#define RADDLE_ASSERT_SIZE(type, bytes)                                                            \
    static_assert(sizeof(type) == (bytes), "host and device disagree on " #type)
#else
#define RADDLE_ASSERT_SIZE(type, bytes)                                                            \
    _Static_assert(sizeof(type) == (bytes), "host and device disagree on " #type)
#endif

/* A small function that both sides call. */
#ifdef __CUDACC__
#define RADDLE_INLINE static __host__ __device__ __forceinline__ constexpr
#else
#define RADDLE_INLINE static inline
#endif

#endif

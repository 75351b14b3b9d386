/* divide.h - division by a number that is the same in a whole launch, as a multiplication and a
 * shift (Granlund and Montgomery 1994): a GPU has no instruction for it. C11 and NVRTC.
 */
#ifndef RADDLE_COMMON_DIVIDE_H
#define RADDLE_COMMON_DIVIDE_H

#include "common/abi.h"

typedef struct raddle_divisor {
    uint32_t multiplier;
    int32_t shift;
} raddle_divisor;
RADDLE_ASSERT_SIZE(raddle_divisor, 8);

/* 1 <= divisor < 2^31. */
RADDLE_INLINE raddle_divisor raddle_make_divisor(int32_t divisor) {
    int32_t bits = 0; /* the least with divisor <= 2^bits */
    while (((int64_t)1 << bits) < divisor) {
        bits++;
    }
    raddle_divisor d = {0, 31 + bits};
    d.multiplier = (uint32_t)(((uint64_t)1 << (31 + bits)) / (uint32_t)divisor + 1);
    return d;
}

/* n / divisor, n < 2^31. */
RADDLE_INLINE uint32_t raddle_divide(uint32_t n, raddle_divisor d) {
    return (uint32_t)(((uint64_t)n * d.multiplier) >> d.shift);
}

#endif

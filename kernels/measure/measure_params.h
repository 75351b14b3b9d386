/* measure_params.h - the argument of measure_read.cu. C11 and NVRTC. */
#ifndef RADDLE_MEASURE_PARAMS_H
#define RADDLE_MEASURE_PARAMS_H

#include "common/abi.h"

typedef struct raddle_measure_params {
    const void *data; /* 16-byte aligned */
    int64_t chunks;   /* of 16 bytes */
    uint32_t *sink;   /* NULL; a place that keeps the compiler from dropping the loads */
} raddle_measure_params;
RADDLE_ASSERT_SIZE(raddle_measure_params, 24);

#endif

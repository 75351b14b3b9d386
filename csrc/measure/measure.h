/* measure.h - what benchmarks need of the core: the ceiling of memory-bound work on both back ends. */
#ifndef RADDLE_MEASURE_MEASURE_H
#define RADDLE_MEASURE_MEASURE_H

#include "base/status.h"

/* The exclusive or of all 64-bit words, read once by all threads in contiguous shares: nothing but
 * reads. Bytes past the last whole word are not read. */
uint64_t raddle_measure_checksum(const void *data, size_t bytes);

/* Queues one read of GPU memory on stream: data aligned to 16 bytes, whole chunks of 16 only. */
raddle_status raddle_measure_read(int32_t device, const void *data, size_t bytes,
                                  raddle_stream stream);

#endif

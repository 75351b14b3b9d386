/* measure.h - what benchmarks need of the core: the ceiling of memory-bound work on the CPU. */
#ifndef RADDLE_RUNTIME_MEASURE_H
#define RADDLE_RUNTIME_MEASURE_H

#include "base/status.h"

/* The exclusive or of all 64-bit words, read once by all threads in contiguous shares: nothing but
 * reads. Bytes past the last whole word are not read. */
uint64_t raddle_measure_checksum(const void *data, size_t bytes);

#endif

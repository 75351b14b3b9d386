/* sources.h - the text of kernels/, embedded by setup.py, so that no path can be wrong after
 * installation. */
#ifndef RADDLE_CUDA_SOURCES_H
#define RADDLE_CUDA_SOURCES_H

#include <stddef.h>

typedef struct raddle_source {
    const char *name; /* from the root of kernels/: "attention/attention_decode.cu" */
    const char *text; /* NUL-terminated */
    size_t bytes;     /* without the NUL */
} raddle_source;

extern const raddle_source raddle_sources[];
extern const int raddle_num_sources;

#endif

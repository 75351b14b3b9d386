/* alloc.h - the only door to the heap. Counts live blocks, so that a test can ask whether all came
 * back.
 */
#ifndef RADDLE_BASE_ALLOC_H
#define RADDLE_BASE_ALLOC_H

#include <stddef.h>
#include <stdint.h>

/* NULL when out of memory (the caller says raddle_fail_memory). A size of 0 gives a valid block. */
void *raddle_alloc(size_t bytes);
void *raddle_alloc_zero(size_t bytes);
/* align: a power of two of at least sizeof(void *). Freed by raddle_free like the others. */
void *raddle_alloc_aligned(size_t bytes, size_t align);
void *raddle_realloc(void *block, size_t bytes);
char *raddle_strdup(const char *text);
void raddle_free(void *block);
int64_t raddle_alloc_live(void);

#endif

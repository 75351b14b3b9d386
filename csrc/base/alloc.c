/* alloc.c - malloc and its kin behind a count of live blocks. */
#include "base/alloc.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static _Atomic int64_t live_blocks;

static void *count_block(void *block) {
    if (block != NULL) {
        atomic_fetch_add_explicit(&live_blocks, 1, memory_order_relaxed);
    }
    return block;
}

void *raddle_alloc(size_t bytes) {
    return count_block(malloc(bytes != 0 ? bytes : 1));
}

void *raddle_alloc_zero(size_t bytes) {
    return count_block(calloc(1, bytes != 0 ? bytes : 1));
}

void *raddle_alloc_aligned(size_t bytes, size_t align) {
    assert(align >= sizeof(void *) && (align & (align - 1)) == 0);
    void *block = NULL;
    if (posix_memalign(&block, align, bytes != 0 ? bytes : 1) != 0) {
        return NULL;
    }
    return count_block(block);
}

void *raddle_realloc(void *block, size_t bytes) {
    void *moved = realloc(block, bytes != 0 ? bytes : 1);
    return block == NULL ? count_block(moved) : moved;
}

char *raddle_strdup(const char *text) {
    const size_t bytes = strlen(text) + 1;
    char *copy = raddle_alloc(bytes);
    if (copy != NULL) {
        memcpy(copy, text, bytes);
    }
    return copy;
}

void raddle_free(void *block) {
    if (block != NULL) {
        atomic_fetch_sub_explicit(&live_blocks, 1, memory_order_relaxed);
        free(block);
    }
}

int64_t raddle_alloc_live(void) {
    return atomic_load_explicit(&live_blocks, memory_order_relaxed);
}

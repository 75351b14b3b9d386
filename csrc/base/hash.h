/* hash.h - 128-bit content hash for cache keys and checksums. Not for secrets. */
#ifndef RADDLE_BASE_HASH_H
#define RADDLE_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct raddle_hash {
    uint64_t high, low;
} raddle_hash;

typedef struct raddle_hasher {
    uint64_t state[4];
    uint8_t tail[32];
    size_t tail_bytes;
    uint64_t total_bytes;
} raddle_hasher;

void raddle_hash_init(raddle_hasher *hasher);
void raddle_hash_update(raddle_hasher *hasher, const void *data, size_t bytes);
/* A string with its length, so that "ab" + "c" and "a" + "bc" differ. */
void raddle_hash_update_text(raddle_hasher *hasher, const char *text);
raddle_hash raddle_hash_finish(const raddle_hasher *hasher);
raddle_hash raddle_hash_bytes(const void *data, size_t bytes);
/* 32 hexadecimal digits and a NUL. */
void raddle_hash_to_text(raddle_hash hash, char text[33]);

#endif

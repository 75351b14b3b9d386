/* cache.h - compiled kernels on disk: one file per content key in one folder.
 *
 * A file is a header (magic, format, key, length, checksum) and the payload. It appears by rename,
 * so that readers see all of it or nothing; there are no locks, and processes that race write the
 * same bytes. A reader checks everything: what is damaged is removed and counts as absent. Reading
 * marks the file as used; storing removes the files that were unused longest until the folder is
 * within its limit.
 */
#ifndef RADDLE_CUDA_CACHE_H
#define RADDLE_CUDA_CACHE_H

#include "base/hash.h"
#include "base/status.h"

enum { RADDLE_CACHE_FORMAT = 1, RADDLE_CACHE_HEADER_BYTES = 64 };
#define RADDLE_CACHE_LIMIT_BYTES ((uint64_t)256 << 20)

typedef struct raddle_cache_stats {
    int64_t num_files;
    int64_t num_bytes;
    int64_t num_damaged; /* only filled by verify */
} raddle_cache_stats;

/* RADDLE_OK with *out_payload NULL when the key is absent. A file that is there but cannot be read
 * is RADDLE_ERR_IO. The payload is the caller's to raddle_free; a NUL follows its bytes. */
raddle_status raddle_cache_load(const char *folder, raddle_hash key, void **out_payload,
                                size_t *out_bytes);
/* Makes the folder if need be. RADDLE_ERR_IO says what failed; nothing half-written stays. */
raddle_status raddle_cache_store(const char *folder, raddle_hash key, const void *payload,
                                 size_t bytes, uint64_t limit_bytes);
raddle_status raddle_cache_measure(const char *folder, raddle_cache_stats *out_stats);
/* Reads every file; damaged ones are counted, and removed if asked. */
raddle_status raddle_cache_verify(const char *folder, bool remove_damaged,
                                  raddle_cache_stats *out_stats);
/* Removes what raddle wrote, nothing else. */
raddle_status raddle_cache_clear(const char *folder, int64_t *out_num_removed);

#endif

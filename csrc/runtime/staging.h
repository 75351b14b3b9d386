/* staging.h - sends what update() computed to fixed device addresses without ever racing a copy in
 * flight.
 *
 * A ring of pinned host slots, each guarded by an event: acquire waits (rarely) until the slot's
 * last copy has been passed by its stream, the schedule is written into it, commit issues one
 * asynchronous copy to the same device address every time, so that a captured graph keeps reading
 * the right place.
 */
#ifndef RADDLE_RUNTIME_STAGING_H
#define RADDLE_RUNTIME_STAGING_H

#include "runtime/backend.h"

enum { RADDLE_STAGING_SLOTS = 3 };

typedef struct raddle_staging {
    const raddle_backend *backend;
    int32_t device;
    size_t bytes;
    void *data; /* device block, fixed for life */
    void *slots[RADDLE_STAGING_SLOTS];
    raddle_event *events[RADDLE_STAGING_SLOTS]; /* recorded behind the commit of each slot */
    raddle_stream stream;                       /* of the last commit */
    int next, last;
} raddle_staging;

raddle_status raddle_staging_init(raddle_staging *staging, raddle_device device, size_t bytes);
void raddle_staging_fini(raddle_staging *staging);
/* A slot of staging->bytes to write; nothing is sent until commit. Acquiring again without commit
 * gives it again. */
raddle_status raddle_staging_acquire(raddle_staging *staging, void **out_slot);
/* A part of the block: what was written into the slot, or device memory that is copied there. */
typedef struct raddle_range {
    size_t offset, bytes;
    const void *device_source; /* NULL: the slot */
} raddle_range;

/* Copies the ranges, in rising order of offset, to staging->data on stream. Neighbours with a small
 * gap go in one copy, gap included: nothing else may lie there. */
raddle_status raddle_staging_commit(raddle_staging *staging, const raddle_range *ranges,
                                    int num_ranges, raddle_stream stream);
/* Somebody else wrote the block on stream, behind raddle_staging_wait there: what follows on other
 * streams waits for that as for a commit. Not in a capture. */
raddle_status raddle_staging_note(raddle_staging *staging, raddle_stream stream);
/* Makes stream wait for the last commit when that was on another stream. */
raddle_status raddle_staging_wait(raddle_staging *staging, raddle_stream stream);

#endif

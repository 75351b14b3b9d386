/* staging.c - the ring of pinned slots in front of a plan's fixed device block. */
#include "runtime/staging.h"

#include <string.h>

enum { GAP_BYTES = 128 * 1024 }; /* of which a copy takes less time than a second call */

raddle_status raddle_staging_init(raddle_staging *staging, raddle_device device, size_t bytes) {
    raddle_status status = RADDLE_OK;
    memset(staging, 0, sizeof *staging);
    RADDLE_TRY(raddle_backend_for(device, &staging->backend));
    staging->device = device.index;
    staging->bytes = bytes;
    if ((status = staging->backend->alloc(device.index, bytes, &staging->data)) != RADDLE_OK) {
        goto out;
    }
    for (int i = 0; i < RADDLE_STAGING_SLOTS; i++) {
        status = staging->backend->alloc_host(device.index, bytes, &staging->slots[i]);
        if (status == RADDLE_OK) {
            status = staging->backend->event_create(device.index, &staging->events[i]);
        }
        if (status != RADDLE_OK) {
            goto out;
        }
    }
out:
    if (status != RADDLE_OK) {
        raddle_staging_fini(staging);
    }
    return status;
}

void raddle_staging_fini(raddle_staging *staging) {
    if (staging->backend == NULL) {
        return;
    }
    for (int i = 0; i < RADDLE_STAGING_SLOTS; i++) {
        /* A copy may still be reading the slot. */
        if (staging->events[i] != NULL) {
            (void)staging->backend->event_wait_host(staging->device, staging->events[i]);
        }
        staging->backend->event_destroy(staging->device, staging->events[i]);
        staging->backend->free_host(staging->device, staging->slots[i]);
    }
    staging->backend->free(staging->device, staging->data);
    memset(staging, 0, sizeof *staging);
}

raddle_status raddle_staging_acquire(raddle_staging *staging, void **out_slot) {
    RADDLE_TRY(staging->backend->event_wait_host(staging->device, staging->events[staging->next]));
    *out_slot = staging->slots[staging->next];
    return RADDLE_OK;
}

static raddle_status copy_range(const raddle_staging *staging, size_t offset, size_t bytes,
                                const void *device_source, raddle_stream stream) {
    const char *slot = staging->slots[staging->last];
    return staging->backend->copy(
        staging->device, (char *)staging->data + offset,
        device_source == NULL ? slot + offset : device_source, bytes,
        device_source == NULL ? RADDLE_COPY_TO_DEVICE : RADDLE_COPY_ON_DEVICE, stream);
}

static raddle_status copy_ranges(const raddle_staging *staging, const raddle_range *ranges,
                                 int num_ranges, raddle_stream stream) {
    for (int i = 0; i < num_ranges; i++) {
        size_t end = ranges[i].offset + ranges[i].bytes;
        int first = i;
        while (ranges[first].device_source == NULL && i + 1 < num_ranges &&
               ranges[i + 1].device_source == NULL && ranges[i + 1].bytes > 0 &&
               ranges[i + 1].offset - end <= GAP_BYTES) {
            i++;
            end = ranges[i].offset + ranges[i].bytes;
        }
        if (end > ranges[first].offset) {
            RADDLE_TRY(copy_range(staging, ranges[first].offset, end - ranges[first].offset,
                                  ranges[first].device_source, stream));
        }
    }
    return RADDLE_OK;
}

raddle_status raddle_staging_wait(raddle_staging *staging, raddle_stream stream) {
    if (stream == staging->stream) {
        return RADDLE_OK;
    }
    /* A capture cannot wait for what is outside it: the graph's launch does (runtime/graph.c). */
    bool capturing = false;
    RADDLE_TRY(staging->backend->is_capturing(staging->device, stream, &capturing));
    return capturing ? RADDLE_OK
                     : staging->backend->stream_wait_event(staging->device, stream,
                                                           staging->events[staging->last]);
}

raddle_status raddle_staging_commit(raddle_staging *staging, const raddle_range *ranges,
                                    int num_ranges, raddle_stream stream) {
    RADDLE_TRY(raddle_staging_wait(staging, stream)); /* copies to the block keep their order */
    /* A copy that was queued before another failed is in flight all the same: the slot moves on. */
    staging->last = staging->next;
    staging->next = (staging->next + 1) % RADDLE_STAGING_SLOTS;
    staging->stream = stream;
    const raddle_status copied = copy_ranges(staging, ranges, num_ranges, stream);
    const raddle_status recorded =
        staging->backend->event_record(staging->device, staging->events[staging->last], stream);
    return copied != RADDLE_OK ? copied : recorded;
}

raddle_status raddle_staging_note(raddle_staging *staging, raddle_stream stream) {
    /* The slot's copy is older than this on stream: its event may come later. */
    staging->stream = stream;
    return staging->backend->event_record(staging->device, staging->events[staging->last], stream);
}

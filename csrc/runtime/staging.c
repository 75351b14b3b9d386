/* staging.c - the ring of pinned slots in front of a plan's fixed device block. */
#include "runtime/staging.h"

#include <string.h>

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
    status = staging->backend->event_create(device.index, &staging->ready);
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
    staging->backend->event_destroy(staging->device, staging->ready);
    staging->backend->free(staging->device, staging->data);
    memset(staging, 0, sizeof *staging);
}

raddle_status raddle_staging_acquire(raddle_staging *staging, void **out_slot) {
    RADDLE_TRY(staging->backend->event_wait_host(staging->device, staging->events[staging->next]));
    *out_slot = staging->slots[staging->next];
    return RADDLE_OK;
}

raddle_status raddle_staging_commit(raddle_staging *staging, const raddle_range *ranges,
                                    int num_ranges, raddle_stream stream) {
    const raddle_backend *backend = staging->backend;
    const int slot = staging->next;
    /* Once a copy is queued the slot counts as in flight, even if a later step fails. */
    staging->next = (slot + 1) % RADDLE_STAGING_SLOTS;
    staging->stream = stream;
    for (int i = 0; i < num_ranges; i++) {
        if (ranges[i].bytes > 0) {
            RADDLE_TRY(backend->copy(staging->device, (char *)staging->data + ranges[i].offset,
                                     (const char *)staging->slots[slot] + ranges[i].offset,
                                     ranges[i].bytes, RADDLE_COPY_TO_DEVICE, stream));
        }
    }
    RADDLE_TRY(backend->event_record(staging->device, staging->events[slot], stream));
    return backend->event_record(staging->device, staging->ready, stream);
}

raddle_status raddle_staging_wait(raddle_staging *staging, raddle_stream stream) {
    if (stream == staging->stream) {
        return RADDLE_OK;
    }
    /* A capture cannot wait for what is outside it: the graph's launch does (runtime/graph.c). */
    bool capturing = false;
    RADDLE_TRY(staging->backend->is_capturing(staging->device, stream, &capturing));
    return capturing ? RADDLE_OK
                     : staging->backend->stream_wait_event(staging->device, stream, staging->ready);
}

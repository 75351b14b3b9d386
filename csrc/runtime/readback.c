/* readback.c - the ring of pinned slots behind a result that is read while the GPU goes on. */
#include "runtime/readback.h"

#include <string.h>

raddle_status raddle_readback_init(raddle_readback *readback, raddle_device device, size_t bytes) {
    memset(readback, 0, sizeof *readback);
    RADDLE_TRY(raddle_backend_for(device, &readback->backend));
    readback->device = device.index;
    readback->bytes = bytes;
    for (int i = 0; i < RADDLE_READBACK_SLOTS; i++) {
        raddle_status status =
            readback->backend->alloc_host(device.index, bytes, &readback->slots[i]);
        if (status == RADDLE_OK) {
            status = readback->backend->event_create(device.index, &readback->events[i]);
        }
        if (status != RADDLE_OK) {
            raddle_readback_fini(readback);
            return status;
        }
    }
    return RADDLE_OK;
}

void raddle_readback_fini(raddle_readback *readback) {
    if (readback->backend == NULL) {
        return;
    }
    for (int i = 0; i < RADDLE_READBACK_SLOTS; i++) {
        if (readback->events[i] != NULL) { /* a copy may still be writing the slot */
            (void)readback->backend->event_wait_host(readback->device, readback->events[i]);
        }
        readback->backend->event_destroy(readback->device, readback->events[i]);
        readback->backend->free_host(readback->device, readback->slots[i]);
    }
    memset(readback, 0, sizeof *readback);
}

raddle_status raddle_readback_start(raddle_readback *readback, const void *source, size_t bytes,
                                    raddle_stream stream) {
    RADDLE_REQUIRE(bytes <= readback->bytes, RADDLE_ERR_CAPACITY,
                   "readback: %zu bytes do not fit its %zu", bytes, readback->bytes);
    RADDLE_REQUIRE(readback->num_started < RADDLE_READBACK_SLOTS, RADDLE_ERR_STATE,
                   "readback: %d copies were started and none was waited for; wait first",
                   readback->num_started);
    const int slot = (readback->first + readback->num_started) % RADDLE_READBACK_SLOTS;
    readback->used[slot] = bytes;
    readback->num_started++; /* also where the copy is refused after it was queued: fini waits */
    const raddle_status copied = readback->backend->copy(
        readback->device, readback->slots[slot], source, bytes, RADDLE_COPY_TO_HOST, stream);
    const raddle_status recorded =
        readback->backend->event_record(readback->device, readback->events[slot], stream);
    return copied != RADDLE_OK ? copied : recorded;
}

raddle_status raddle_readback_wait(raddle_readback *readback, const void **out_data,
                                   size_t *out_bytes) {
    RADDLE_REQUIRE(readback->num_started > 0, RADDLE_ERR_STATE,
                   "readback: no copy was started; start one first");
    const int slot = readback->first;
    readback->first = (slot + 1) % RADDLE_READBACK_SLOTS;
    readback->num_started--;
    *out_data = readback->slots[slot];
    *out_bytes = readback->used[slot];
    return readback->backend->event_wait_host(readback->device, readback->events[slot]);
}

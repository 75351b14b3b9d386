/* readback.h - what a GPU computed, on the host, without a wait for what was queued behind it.
 *
 * A ring of pinned host slots, each with an event: start queues a copy, wait returns when the
 * oldest that was started is there, whatever the stream has got to do after it.
 */
#ifndef RADDLE_RUNTIME_READBACK_H
#define RADDLE_RUNTIME_READBACK_H

#include "runtime/backend.h"

enum { RADDLE_READBACK_SLOTS = 2 };

typedef struct raddle_readback {
    const raddle_backend *backend;
    int32_t device;
    size_t bytes;
    void *slots[RADDLE_READBACK_SLOTS];
    raddle_event *events[RADDLE_READBACK_SLOTS];
    size_t used[RADDLE_READBACK_SLOTS];
    int first, num_started;
} raddle_readback;

raddle_status raddle_readback_init(raddle_readback *readback, raddle_device device, size_t bytes);
void raddle_readback_fini(raddle_readback *readback);
/* Queues a copy of bytes from device memory. RADDLE_ERR_STATE when every slot waits to be read. */
raddle_status raddle_readback_start(raddle_readback *readback, const void *source, size_t bytes,
                                    raddle_stream stream);
/* The oldest copy that was started and its bytes, which stay until RADDLE_READBACK_SLOTS more were
 * started. RADDLE_ERR_STATE when none was. */
raddle_status raddle_readback_wait(raddle_readback *readback, const void **out_data,
                                   size_t *out_bytes);

#endif

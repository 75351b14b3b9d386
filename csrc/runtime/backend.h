/* backend.h - what a plan needs of a device besides its kernels: memory, ordered copies, events.
 *
 * One complete table per back end, the same shape for both; families never ask which one they hold.
 * On the CPU a stream is ignored, a copy is done when the call returns and an event is always
 * complete.
 */
#ifndef RADDLE_RUNTIME_BACKEND_H
#define RADDLE_RUNTIME_BACKEND_H

#include "base/status.h"

typedef struct raddle_event raddle_event;

typedef enum raddle_copy_kind {
    RADDLE_COPY_TO_DEVICE,
    RADDLE_COPY_TO_HOST,
    RADDLE_COPY_ON_DEVICE
} raddle_copy_kind;

typedef struct raddle_backend {
    const char *name; /* "cpu", "cuda" */
    /* Device memory, aligned to RADDLE_ARENA_ALIGN. Free tolerates NULL and may be called at any
     * time. */
    raddle_status (*alloc)(int32_t device, size_t bytes, void **out_data);
    void (*free)(int32_t device, void *data);
    /* Host memory that asynchronous copies may read (pinned on CUDA). */
    raddle_status (*alloc_host)(int32_t device, size_t bytes, void **out_data);
    void (*free_host)(int32_t device, void *data);
    /* Ordered on stream; the host side of a copy to or from pinned memory is in use until the
     * stream passes it. */
    raddle_status (*copy)(int32_t device, void *dst, const void *src, size_t bytes,
                          raddle_copy_kind kind, raddle_stream stream);
    raddle_status (*fill)(int32_t device, void *dst, uint8_t value, size_t bytes,
                          raddle_stream stream);
    raddle_status (*synchronize)(int32_t device, raddle_stream stream);
    raddle_status (*is_capturing)(int32_t device, raddle_stream stream, bool *out_capturing);
    raddle_status (*event_create)(int32_t device, raddle_event **out_event);
    void (*event_destroy)(int32_t device, raddle_event *event);
    raddle_status (*event_record)(int32_t device, raddle_event *event, raddle_stream stream);
    raddle_status (*event_wait_host)(int32_t device,
                                     raddle_event *event); /* returns at once if never recorded */
    raddle_status (*stream_wait_event)(int32_t device, raddle_stream stream, raddle_event *event);
    /* Parallel workers a schedule should be cut for: threads on the CPU, multiprocessors on CUDA.
     */
    raddle_status (*num_workers)(int32_t device, int32_t *out_workers);
} raddle_backend;

/* The table for device, or a RADDLE_ERR_DEVICE that says what is missing. Opens the CUDA driver on
 * first need. */
raddle_status raddle_backend_for(raddle_device device, const raddle_backend **out_backend);

extern const raddle_backend raddle_backend_cpu;
extern const raddle_backend raddle_backend_cuda;

#endif

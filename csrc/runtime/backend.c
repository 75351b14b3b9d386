/* backend.c - the CPU's table, and the choice between the two. */
#include "runtime/backend.h"

#include <string.h>

#include "base/alloc.h"
#include "base/arena.h"
#include "base/tensor.h"
#include "base/threads.h"

static raddle_status cpu_alloc(int32_t device, size_t bytes, void **out_data) {
    (void)device;
    void *data = raddle_alloc_aligned(bytes, RADDLE_ARENA_ALIGN);
    if (data == NULL) {
        return raddle_fail_memory(bytes);
    }
    *out_data = data;
    return RADDLE_OK;
}

static void cpu_free(int32_t device, void *data) {
    (void)device;
    raddle_free(data);
}

static raddle_status cpu_copy(int32_t device, void *dst, const void *src, size_t bytes,
                              raddle_copy_kind kind, raddle_stream stream) {
    (void)device;
    (void)kind;
    (void)stream;
    if (bytes > 0) {
        memmove(dst, src, bytes);
    }
    return RADDLE_OK;
}

static raddle_status cpu_fill(int32_t device, void *dst, uint8_t value, size_t bytes,
                              raddle_stream stream) {
    (void)device;
    (void)stream;
    if (bytes > 0) {
        memset(dst, value, bytes);
    }
    return RADDLE_OK;
}

static raddle_status cpu_synchronize(int32_t device, raddle_stream stream) {
    (void)device;
    (void)stream;
    return RADDLE_OK;
}

static raddle_status cpu_is_capturing(int32_t device, raddle_stream stream, bool *out_capturing) {
    (void)device;
    (void)stream;
    *out_capturing = false;
    return RADDLE_OK;
}

/* Work is done when a call returns, so an event has nothing to remember: NULL stands for it. */
static raddle_status cpu_event_create(int32_t device, raddle_event **out_event) {
    (void)device;
    *out_event = NULL;
    return RADDLE_OK;
}

static void cpu_event_destroy(int32_t device, raddle_event *event) {
    (void)device;
    (void)event;
}

static raddle_status cpu_event_record(int32_t device, raddle_event *event, raddle_stream stream) {
    (void)device;
    (void)event;
    (void)stream;
    return RADDLE_OK;
}

static raddle_status cpu_event_wait_host(int32_t device, raddle_event *event) {
    (void)device;
    (void)event;
    return RADDLE_OK;
}

static raddle_status cpu_stream_wait_event(int32_t device, raddle_stream stream,
                                           raddle_event *event) {
    (void)device;
    (void)stream;
    (void)event;
    return RADDLE_OK;
}

static raddle_status cpu_num_workers(int32_t device, int32_t *out_workers) {
    (void)device;
    *out_workers = raddle_threads_count();
    return RADDLE_OK;
}

const raddle_backend raddle_backend_cpu = {
    .name = "cpu",
    .alloc = cpu_alloc,
    .free = cpu_free,
    .alloc_host = cpu_alloc,
    .free_host = cpu_free,
    .copy = cpu_copy,
    .fill = cpu_fill,
    .synchronize = cpu_synchronize,
    .is_capturing = cpu_is_capturing,
    .event_create = cpu_event_create,
    .event_destroy = cpu_event_destroy,
    .event_record = cpu_event_record,
    .event_wait_host = cpu_event_wait_host,
    .stream_wait_event = cpu_stream_wait_event,
    .num_workers = cpu_num_workers,
};

raddle_status raddle_backend_for(raddle_device device, const raddle_backend **out_backend) {
    char text[16];
    if (device.type == RADDLE_CPU) {
        RADDLE_REQUIRE(device.index == 0, RADDLE_ERR_DEVICE,
                       "device: there is one CPU, cpu:0; got %s", raddle_device_text(device, text));
        *out_backend = &raddle_backend_cpu;
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(device.type == RADDLE_CUDA, RADDLE_ERR_DEVICE,
                   "device: expected cpu or cuda, got DLPack device type %d", (int)device.type);
    /* Any call of the table would open the driver; asking for its workers tells now whether it and
     * the GPU are there. */
    int32_t workers = 0;
    RADDLE_TRY(raddle_backend_cuda.num_workers(device.index, &workers));
    *out_backend = &raddle_backend_cuda;
    return RADDLE_OK;
}

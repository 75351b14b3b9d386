/* backend_cuda.c - the GPU's table: memory, copies and events through the driver.
 *
 * Every function makes the device's context current for its own duration. Allocating and freeing
 * relax this thread's capture mode, so that a capture elsewhere in the process (torch.cuda.graph's
 * is global) is not disturbed; while this thread captures a graph of raddle's own, what allocates
 * or waits is refused. A raddle_event is a CUevent: no block of ours in between.
 */
#include "runtime/backend.h"

#include "cuda/device.h"

enum {
    EVENT_DISABLE_TIMING = 2,
    CAPTURE_STATUS_NONE = 0,
};

typedef struct device_scope {
    const raddle_cuda_device *device;
    const raddle_cuda_driver *driver;
    bool pushed;
} device_scope;

static raddle_status enter_device(int32_t index, device_scope *scope) {
    RADDLE_TRY(raddle_cuda_device_get(index, &scope->device));
    scope->driver = scope->device->driver;
    return raddle_cuda_push(scope->device, &scope->pushed);
}

static void leave_device(const device_scope *scope) {
    raddle_cuda_pop(scope->device, scope->pushed);
}

/* An integer address of the driver's as a pointer, and back. */
static CUdeviceptr address_of(const void *data) {
    return (CUdeviceptr)(uintptr_t)data;
}

static CUevent event_of(raddle_event *event) {
    return (CUevent)(void *)event;
}

/* ---------------------------------------------------------------- memory */

/* Says how much was asked for and how much there is when memory is what lacks. */
static raddle_status check_alloc(const device_scope *scope, CUresult result, size_t bytes,
                                 const char *doing) {
    enum { ERROR_OUT_OF_MEMORY = 2 };
    size_t free_bytes = 0, total_bytes = 0;
    if (result == ERROR_OUT_OF_MEMORY &&
        scope->driver->mem_get_info(&free_bytes, &total_bytes) == 0) {
        return raddle_fail(
            RADDLE_ERR_MEMORY, "%s: %zu bytes asked for, %zu of %zu bytes are free on cuda:%d (%s)",
            doing, bytes, free_bytes, total_bytes, scope->device->index, scope->device->name);
    }
    return raddle_cuda_check(result, doing);
}

static raddle_status cuda_alloc(int32_t device, size_t bytes, void **out_data) {
    device_scope scope;
    CUdeviceptr data = 0;
    RADDLE_TRY(raddle_cuda_refuse_capture("allocating GPU memory"));
    RADDLE_TRY(enter_device(device, &scope));
    const int mode = raddle_cuda_relax_capture(scope.driver);
    /* The driver refuses 0 bytes; its blocks are aligned to 256 bytes at least. */
    const CUresult result = scope.driver->mem_alloc(&data, bytes > 0 ? bytes : 1);
    raddle_cuda_restore_capture(scope.driver, mode);
    raddle_status status = check_alloc(&scope, result, bytes, "allocating GPU memory");
    leave_device(&scope);
    if (status == RADDLE_OK) {
        *out_data = (void *)(uintptr_t)data;
    }
    return status;
}

/* Freeing waits for the work that may use the block. What fails here (a dying process, a lost
 * device, a forked child) leaves nothing to be done. */
static void cuda_free(int32_t device, void *data) {
    device_scope scope;
    if (data != NULL && enter_device(device, &scope) == RADDLE_OK) {
        const int mode = raddle_cuda_relax_capture(scope.driver);
        scope.driver->mem_free(address_of(data));
        raddle_cuda_restore_capture(scope.driver, mode);
        leave_device(&scope);
    }
}

static raddle_status cuda_alloc_host(int32_t device, size_t bytes, void **out_data) {
    device_scope scope;
    void *data = NULL;
    RADDLE_TRY(raddle_cuda_refuse_capture("allocating pinned memory"));
    RADDLE_TRY(enter_device(device, &scope));
    const int mode = raddle_cuda_relax_capture(scope.driver);
    const CUresult result = scope.driver->mem_host_alloc(&data, bytes > 0 ? bytes : 1, 0);
    raddle_cuda_restore_capture(scope.driver, mode);
    raddle_status status = raddle_cuda_check(result, "allocating pinned host memory");
    leave_device(&scope);
    if (status == RADDLE_OK) {
        *out_data = data;
    }
    return status;
}

static void cuda_free_host(int32_t device, void *data) {
    device_scope scope;
    if (data != NULL && enter_device(device, &scope) == RADDLE_OK) {
        const int mode = raddle_cuda_relax_capture(scope.driver);
        scope.driver->mem_free_host(data);
        raddle_cuda_restore_capture(scope.driver, mode);
        leave_device(&scope);
    }
}

/* ---------------------------------------------------------------- ordered work */

static raddle_status cuda_copy(int32_t device, void *dst, const void *src, size_t bytes,
                               raddle_copy_kind kind, raddle_stream stream) {
    device_scope scope;
    if (bytes == 0) {
        return RADDLE_OK;
    }
    RADDLE_TRY(enter_device(device, &scope));
    CUresult result = 0;
    switch (kind) {
    case RADDLE_COPY_TO_DEVICE:
        result = scope.driver->memcpy_htod_async(address_of(dst), src, bytes, stream);
        break;
    case RADDLE_COPY_TO_HOST:
        result = scope.driver->memcpy_dtoh_async(dst, address_of(src), bytes, stream);
        break;
    case RADDLE_COPY_ON_DEVICE:
        result = scope.driver->memcpy_dtod_async(address_of(dst), address_of(src), bytes, stream);
        break;
    }
    raddle_status status = raddle_cuda_check(result, "copying memory");
    leave_device(&scope);
    return status;
}

static raddle_status cuda_fill(int32_t device, void *dst, uint8_t value, size_t bytes,
                               raddle_stream stream) {
    device_scope scope;
    if (bytes == 0) {
        return RADDLE_OK;
    }
    RADDLE_TRY(enter_device(device, &scope));
    raddle_status status = raddle_cuda_check(
        scope.driver->memset_d8_async(address_of(dst), value, bytes, stream), "filling memory");
    leave_device(&scope);
    return status;
}

static raddle_status query_capture(const device_scope *scope, raddle_stream stream,
                                   bool *out_capturing) {
    int capture_status = CAPTURE_STATUS_NONE;
    RADDLE_TRY(raddle_cuda_check(scope->driver->stream_is_capturing(stream, &capture_status),
                                 "asking whether a stream is captured"));
    *out_capturing = capture_status != CAPTURE_STATUS_NONE;
    return RADDLE_OK;
}

static raddle_status cuda_is_capturing(int32_t device, raddle_stream stream, bool *out_capturing) {
    device_scope scope;
    RADDLE_TRY(enter_device(device, &scope));
    raddle_status status = query_capture(&scope, stream, out_capturing);
    leave_device(&scope);
    return status;
}

static raddle_status synchronize_stream(const device_scope *scope, raddle_stream stream) {
    bool capturing = false;
    RADDLE_TRY(query_capture(scope, stream, &capturing));
    RADDLE_REQUIRE(!capturing, RADDLE_ERR_STATE,
                   "waiting for a stream: not possible while it is being captured; its work runs "
                   "when the graph is launched");
    return raddle_cuda_check(scope->driver->stream_synchronize(stream), "waiting for a stream");
}

static raddle_status cuda_synchronize(int32_t device, raddle_stream stream) {
    device_scope scope;
    RADDLE_TRY(raddle_cuda_refuse_capture("waiting for a stream"));
    RADDLE_TRY(enter_device(device, &scope));
    raddle_status status = synchronize_stream(&scope, stream);
    leave_device(&scope);
    return status;
}

/* ---------------------------------------------------------------- events */

static raddle_status cuda_event_create(int32_t device, raddle_event **out_event) {
    device_scope scope;
    CUevent event = NULL;
    RADDLE_TRY(enter_device(device, &scope));
    raddle_status status = raddle_cuda_check(
        scope.driver->event_create(&event, EVENT_DISABLE_TIMING), "making an event");
    leave_device(&scope);
    if (status == RADDLE_OK) {
        *out_event = (raddle_event *)(void *)event;
    }
    return status;
}

static void cuda_event_destroy(int32_t device, raddle_event *event) {
    device_scope scope;
    if (event != NULL && enter_device(device, &scope) == RADDLE_OK) {
        scope.driver->event_destroy(event_of(event));
        leave_device(&scope);
    }
}

static raddle_status cuda_event_record(int32_t device, raddle_event *event, raddle_stream stream) {
    device_scope scope;
    RADDLE_TRY(enter_device(device, &scope));
    raddle_status status = raddle_cuda_check(scope.driver->event_record(event_of(event), stream),
                                             "recording an event");
    leave_device(&scope);
    return status;
}

static raddle_status cuda_event_wait_host(int32_t device, raddle_event *event) {
    device_scope scope;
    RADDLE_TRY(enter_device(device, &scope));
    const int mode = raddle_cuda_relax_capture(scope.driver);
    const CUresult result = scope.driver->event_synchronize(event_of(event));
    raddle_cuda_restore_capture(scope.driver, mode);
    raddle_status status = raddle_cuda_check(result, "waiting for a copy to the GPU");
    leave_device(&scope);
    return status;
}

static raddle_status cuda_stream_wait_event(int32_t device, raddle_stream stream,
                                            raddle_event *event) {
    device_scope scope;
    RADDLE_TRY(enter_device(device, &scope));
    raddle_status status = raddle_cuda_check(
        scope.driver->stream_wait_event(stream, event_of(event), 0), "ordering two streams");
    leave_device(&scope);
    return status;
}

static raddle_status cuda_num_workers(int32_t device, int32_t *out_workers) {
    const raddle_cuda_device *record = NULL;
    RADDLE_TRY(raddle_cuda_device_get(device, &record));
    *out_workers = record->num_sms;
    return RADDLE_OK;
}

const raddle_backend raddle_backend_cuda = {
    .name = "cuda",
    .alloc = cuda_alloc,
    .free = cuda_free,
    .alloc_host = cuda_alloc_host,
    .free_host = cuda_free_host,
    .copy = cuda_copy,
    .fill = cuda_fill,
    .synchronize = cuda_synchronize,
    .is_capturing = cuda_is_capturing,
    .event_create = cuda_event_create,
    .event_destroy = cuda_event_destroy,
    .event_record = cuda_event_record,
    .event_wait_host = cuda_event_wait_host,
    .stream_wait_event = cuda_stream_wait_event,
    .num_workers = cuda_num_workers,
};

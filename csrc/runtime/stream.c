/* stream.c - makes, waits for and destroys streams. */
#include "runtime/stream.h"

#include "cuda/device.h"
#include "runtime/backend.h"

enum {
    STREAM_NON_BLOCKING = 1,
    PRIORITY_HIGHEST = -1000, /* the driver takes the nearest that it has */
    PRIORITY_DEFAULT = 0
};

raddle_status raddle_stream_create(raddle_device device, bool high_priority,
                                   raddle_stream *out_stream) {
    const raddle_cuda_device *record = NULL;
    CUstream stream = NULL;
    bool pushed = false;
    if (device.type == RADDLE_CPU) {
        *out_stream = NULL;
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_cuda_device_get(device.index, &record));
    RADDLE_TRY(raddle_cuda_refuse_capture("making a stream"));
    RADDLE_TRY(raddle_cuda_push(record, &pushed));
    const raddle_status status = raddle_cuda_check(
        record->driver->stream_create_with_priority(
            &stream, STREAM_NON_BLOCKING, high_priority ? PRIORITY_HIGHEST : PRIORITY_DEFAULT),
        "making a stream");
    raddle_cuda_pop(record, pushed);
    if (status == RADDLE_OK) {
        *out_stream = stream;
    }
    return status;
}

void raddle_stream_destroy(raddle_device device, raddle_stream stream) {
    const raddle_cuda_device *record =
        stream != NULL ? raddle_cuda_device_peek(device.index) : NULL;
    bool pushed = false;
    if (record != NULL && raddle_cuda_push(record, &pushed) == RADDLE_OK) {
        record->driver->stream_destroy(stream);
        raddle_cuda_pop(record, pushed);
    }
}

raddle_status raddle_stream_synchronize(raddle_device device, raddle_stream stream) {
    const raddle_backend *backend = NULL;
    RADDLE_TRY(raddle_backend_for(device, &backend));
    return backend->synchronize(device.index, stream);
}

/* scratch.c - the blocks of every device, under one lock. They live as long as the process. */
#include "cuda/scratch.h"

#include <pthread.h>

enum {
    MAX_STREAMS = 32,
    EVENT_DISABLE_TIMING = 2,
    /* NVIDIA's own sizes: Hopper's kernels split K more. */
    BYTES_BEFORE_HOPPER = 4 << 20,
    BYTES_SINCE_HOPPER = 32 << 20,
};

typedef struct scratch_block {
    CUdeviceptr data; /* 0: not allocated */
    raddle_stream stream;
    uint64_t last_use;
} scratch_block;

typedef struct device_scratch {
    scratch_block streams[MAX_STREAMS];
    uint64_t num_uses;
    CUdeviceptr captured; /* of all graphs */
    CUevent last_launch;  /* behind the last launch of a graph that uses captured */
    raddle_stream last_stream;
    bool was_launched;
} device_scratch;

static pthread_mutex_t scratch_mutex = PTHREAD_MUTEX_INITIALIZER;
static device_scratch scratch[RADDLE_CUDA_MAX_DEVICES];
/* Of the capture that this thread is in. */
static _Thread_local raddle_stream captured_stream;

static size_t block_bytes(const raddle_cuda_device *device) {
    return device->arch >= 90 ? BYTES_SINCE_HOPPER : BYTES_BEFORE_HOPPER;
}

/* All of these with scratch_mutex held. */
static raddle_status ensure_block(const raddle_cuda_device *device, CUdeviceptr *data) {
    if (*data != 0) {
        return RADDLE_OK;
    }
    const int mode = raddle_cuda_relax_capture(device->driver);
    const CUresult result = device->driver->mem_alloc(data, block_bytes(device));
    raddle_cuda_restore_capture(device->driver, mode);
    return raddle_cuda_check(result, "allocating cublasLt's work space");
}

/* The block of stream, else a free one, else the one that was unused longest: freed and allocated
 * anew, since freeing waits for the work on it. */
static scratch_block *choose_block(const raddle_cuda_device *device, raddle_stream stream) {
    scratch_block *blocks = scratch[device->index].streams;
    scratch_block *oldest = &blocks[0];
    for (int i = 0; i < MAX_STREAMS; i++) {
        if (blocks[i].data == 0 || blocks[i].stream == stream) {
            blocks[i].stream = stream;
            return &blocks[i];
        }
        oldest = blocks[i].last_use < oldest->last_use ? &blocks[i] : oldest;
    }
    const int mode = raddle_cuda_relax_capture(device->driver);
    device->driver->mem_free(oldest->data);
    raddle_cuda_restore_capture(device->driver, mode);
    *oldest = (scratch_block){.stream = stream};
    return oldest;
}

/* Branches of one capture run side by side: only one of them may use the block. */
static raddle_status take_captured(const raddle_cuda_device *device, raddle_stream stream,
                                   CUdeviceptr *out_data) {
    RADDLE_REQUIRE(!raddle_cuda_is_thread_capturing() || captured_stream == NULL ||
                       captured_stream == stream,
                   RADDLE_ERR_UNSUPPORTED,
                   "stream: within one captured graph, linear layers must stay on one stream");
    RADDLE_TRY(ensure_block(device, &scratch[device->index].captured));
    captured_stream = raddle_cuda_is_thread_capturing() ? stream : NULL;
    *out_data = scratch[device->index].captured;
    return RADDLE_OK;
}

static raddle_status take_block(const raddle_cuda_device *device, raddle_stream stream,
                                bool captured, CUdeviceptr *out_data) {
    if (captured) {
        return take_captured(device, stream, out_data);
    }
    scratch_block *block = choose_block(device, stream);
    RADDLE_TRY(ensure_block(device, &block->data));
    block->last_use = ++scratch[device->index].num_uses;
    *out_data = block->data;
    return RADDLE_OK;
}

raddle_status raddle_cuda_scratch_get(const raddle_cuda_device *device, raddle_stream stream,
                                      void **out_data, size_t *out_bytes) {
    int capture_status = 0;
    CUdeviceptr data = 0;
    RADDLE_TRY(raddle_cuda_check(device->driver->stream_is_capturing(stream, &capture_status),
                                 "asking whether a stream is captured"));
    pthread_mutex_lock(&scratch_mutex);
    raddle_status status = take_block(device, stream, capture_status != 0, &data);
    pthread_mutex_unlock(&scratch_mutex);
    if (status == RADDLE_OK) {
        *out_data = (void *)(uintptr_t)data;
        *out_bytes = block_bytes(device);
    }
    return status;
}

bool raddle_cuda_scratch_is_captured(void) {
    const bool is_captured = captured_stream != NULL;
    captured_stream = NULL;
    return is_captured;
}

static raddle_status order_launch(const raddle_cuda_device *device, raddle_stream stream) {
    const raddle_cuda_driver *driver = device->driver;
    device_scratch *own = &scratch[device->index];
    int capture_status = 0;
    if (own->last_launch == NULL) {
        RADDLE_TRY(raddle_cuda_check(driver->event_create(&own->last_launch, EVENT_DISABLE_TIMING),
                                     "making an event"));
    }
    if (!own->was_launched || own->last_stream == stream) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_cuda_check(driver->stream_is_capturing(stream, &capture_status),
                                 "asking whether a stream is captured"));
    if (capture_status != 0) {
        return RADDLE_OK; /* the graph that this one becomes a part of is ordered instead */
    }
    return raddle_cuda_check(driver->stream_wait_event(stream, own->last_launch, 0),
                             "ordering two graphs");
}

raddle_status raddle_cuda_scratch_enter(const raddle_cuda_device *device, raddle_stream stream) {
    pthread_mutex_lock(&scratch_mutex);
    raddle_status status = order_launch(device, stream);
    if (status != RADDLE_OK) {
        pthread_mutex_unlock(&scratch_mutex);
    }
    return status;
}

raddle_status raddle_cuda_scratch_leave(const raddle_cuda_device *device, raddle_stream stream) {
    device_scratch *own = &scratch[device->index];
    raddle_status status = RADDLE_OK;
    if (raddle_cuda_is_thread_capturing()) {
        captured_stream = stream; /* launched into a capture: that graph uses the block now */
    } else {
        status = raddle_cuda_check(device->driver->event_record(own->last_launch, stream),
                                   "recording an event");
        own->last_stream = stream;
        own->was_launched = true;
    }
    pthread_mutex_unlock(&scratch_mutex);
    return status;
}

/* count.c - the counters of every device: one per source of kernels/, numbered as raddle_sources.
 *
 * A device's record is written under the lock, published once by its address and never freed: a
 * graph may write the counters at any time. Launches read the flag and the address, and take the
 * lock only when there is no record yet.
 */
#include "cuda/count.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "cuda/sources.h"

enum { STREAM_NON_BLOCKING = 1 };

typedef struct device_counters {
    const raddle_cuda_device *device;
    const raddle_kernel *kernel; /* measure_count */
    CUdeviceptr data;            /* uint64_t[raddle_num_sources] */
    CUstream stream;             /* for clearing and reading alone */
} device_counters;

static pthread_mutex_t count_mutex = PTHREAD_MUTEX_INITIALIZER;
static device_counters counters[RADDLE_CUDA_MAX_DEVICES];
static _Atomic(device_counters *) published[RADDLE_CUDA_MAX_DEVICES]; /* NULL until made */
static atomic_bool is_counting;

static size_t counter_bytes(void) {
    return (size_t)raddle_num_sources * sizeof(uint64_t);
}

/* ---------------------------------------------------------------- one device */

/* All of these with count_mutex held and the device's context current. */
static raddle_status clear(const device_counters *own) {
    const raddle_cuda_driver *driver = own->device->driver;
    RADDLE_TRY(
        raddle_cuda_check(driver->memset_d8_async(own->data, 0, counter_bytes(), own->stream),
                          "clearing launch counters"));
    return raddle_cuda_check(driver->stream_synchronize(own->stream), "clearing launch counters");
}

static void discard(const device_counters *own) {
    const raddle_cuda_driver *driver = own->device->driver;
    if (own->data != 0) {
        driver->mem_free(own->data);
    }
    if (own->stream != NULL) {
        driver->stream_destroy(own->stream);
    }
}

/* With captures relaxed. */
static raddle_status allocate(device_counters *own) {
    const raddle_cuda_driver *driver = own->device->driver;
    raddle_status status = raddle_cuda_check(driver->mem_alloc(&own->data, counter_bytes()),
                                             "allocating launch counters");
    if (status == RADDLE_OK) {
        status = raddle_cuda_check(driver->stream_create(&own->stream, STREAM_NON_BLOCKING),
                                   "making the stream of the launch counters");
    }
    if (status == RADDLE_OK) {
        status = clear(own);
    }
    if (status != RADDLE_OK) {
        discard(own);
    }
    return status;
}

static raddle_status make_counters(const raddle_cuda_device *device) {
    device_counters own = {.device = device};
    RADDLE_TRY(raddle_cuda_refuse_capture("making launch counters"));
    RADDLE_TRY(raddle_kernel_get(device, RADDLE_COUNT_KERNEL, "", 0, &own.kernel));
    const int mode = raddle_cuda_relax_capture(device->driver);
    raddle_status status = allocate(&own);
    raddle_cuda_restore_capture(device->driver, mode);
    if (status == RADDLE_OK) {
        counters[device->index] = own;
        atomic_store_explicit(&published[device->index], &counters[device->index],
                              memory_order_release);
    }
    return status;
}

/* What was launched before the reset counts before it. */
static raddle_status reset_counters(const device_counters *own) {
    RADDLE_TRY(raddle_cuda_refuse_capture("clearing launch counters"));
    RADDLE_TRY(raddle_cuda_check(own->device->driver->ctx_synchronize(),
                                 "waiting for the launches that are counted"));
    return clear(own);
}

static raddle_status add_counters(const device_counters *own, uint64_t *row, uint64_t *totals) {
    const raddle_cuda_driver *driver = own->device->driver;
    RADDLE_TRY(raddle_cuda_refuse_capture("reading launch counters"));
    RADDLE_TRY(
        raddle_cuda_check(driver->ctx_synchronize(), "waiting for the launches that are counted"));
    RADDLE_TRY(
        raddle_cuda_check(driver->memcpy_dtoh_async(row, own->data, counter_bytes(), own->stream),
                          "reading launch counters"));
    RADDLE_TRY(
        raddle_cuda_check(driver->stream_synchronize(own->stream), "reading launch counters"));
    for (int i = 0; i < raddle_num_sources; i++) {
        totals[i] += row[i];
    }
    return RADDLE_OK;
}

static device_counters *find_counters(int device) {
    return atomic_load_explicit(&published[device], memory_order_acquire);
}

/* ---------------------------------------------------------------- all devices */

/* With count_mutex held, in the device's context. */
static raddle_status start_device(const raddle_cuda_device *device) {
    const device_counters *own = find_counters(device->index);
    bool pushed = false;
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    raddle_status status = own != NULL ? reset_counters(own) : make_counters(device);
    raddle_cuda_pop(device, pushed);
    return status;
}

raddle_status raddle_count_start(void) {
    raddle_status status = RADDLE_OK;
    pthread_mutex_lock(&count_mutex);
    for (int i = 0; i < RADDLE_CUDA_MAX_DEVICES && status == RADDLE_OK; i++) {
        const raddle_cuda_device *device = raddle_cuda_device_peek(i);
        status = device != NULL ? start_device(device) : RADDLE_OK;
    }
    if (status == RADDLE_OK) {
        atomic_store(&is_counting, true);
    }
    pthread_mutex_unlock(&count_mutex);
    return status;
}

void raddle_count_stop(void) {
    atomic_store(&is_counting, false);
}

bool raddle_count_is_on(void) {
    return atomic_load_explicit(&is_counting, memory_order_relaxed);
}

/* With count_mutex held. */
static raddle_status read_devices(uint64_t *row, uint64_t *totals) {
    raddle_status status = RADDLE_OK;
    for (int i = 0; i < RADDLE_CUDA_MAX_DEVICES && status == RADDLE_OK; i++) {
        const device_counters *own = find_counters(i);
        bool pushed = false;
        if (own == NULL) {
            continue;
        }
        RADDLE_TRY(raddle_cuda_push(own->device, &pushed));
        status = add_counters(own, row, totals);
        raddle_cuda_pop(own->device, pushed);
    }
    return status;
}

raddle_status raddle_count_read(uint64_t *launches) {
    const size_t bytes = 2 * counter_bytes();
    uint64_t *totals = raddle_alloc_zero(bytes);
    if (totals == NULL) {
        return raddle_fail_memory(bytes);
    }
    pthread_mutex_lock(&count_mutex);
    raddle_status status = read_devices(totals + raddle_num_sources, totals);
    pthread_mutex_unlock(&count_mutex);
    if (status == RADDLE_OK) {
        memcpy(launches, totals, counter_bytes());
    }
    raddle_free(totals);
    return status;
}

/* ---------------------------------------------------------------- kernels */

int raddle_count_index(const char *name) {
    const size_t length = strlen(name);
    for (int i = 0; i < raddle_num_sources && strcmp(name, RADDLE_COUNT_KERNEL) != 0; i++) {
        const char *source = raddle_sources[i].name;
        if (strncmp(source, name, length) == 0 && strcmp(source + length, ".cu") == 0) {
            return i;
        }
    }
    return -1;
}

int raddle_count_num_kernels(void) {
    return raddle_num_sources;
}

void raddle_count_name(int index, char *name, size_t name_bytes) {
    const char *slash = strrchr(raddle_sources[index].name, '/');
    const char *stem = slash != NULL ? slash + 1 : raddle_sources[index].name;
    snprintf(name, name_bytes, "%.*s", (int)strcspn(stem, "."), stem);
}

raddle_status raddle_count_prepare(const raddle_cuda_device *device) {
    raddle_status status = RADDLE_OK;
    bool pushed = false;
    if (find_counters(device->index) != NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    pthread_mutex_lock(&count_mutex);
    if (find_counters(device->index) == NULL) {
        status = make_counters(device);
    }
    pthread_mutex_unlock(&count_mutex);
    raddle_cuda_pop(device, pushed);
    return status;
}

raddle_status raddle_count_launch(const raddle_cuda_device *device, const raddle_kernel *kernel,
                                  raddle_stream stream) {
    if (kernel->counter < 0) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_count_prepare(device));
    const device_counters *own = find_counters(device->index);
    const raddle_launch launch = {.grid = {1, 1, 1}, .block = {1, 1, 1}};
    const CUdeviceptr counter = own->data + (size_t)kernel->counter * sizeof(uint64_t);
    return raddle_kernel_launch(device, own->kernel, &launch, &counter, stream);
}

/* device.c - the table of GPUs, filled one by one at first use and never changed after. */
#include "cuda/device.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

/* CUdevice_attribute */
enum {
    ATTRIBUTE_NUM_SMS = 16,
    ATTRIBUTE_MEMORY_KHZ = 36,
    ATTRIBUTE_MEMORY_BITS = 37,
    ATTRIBUTE_L2_BYTES = 38,
    ATTRIBUTE_MAJOR = 75,
    ATTRIBUTE_MINOR = 76,
    ATTRIBUTE_SHARED_BYTES_OPTIN = 97,
};

static pthread_mutex_t devices_mutex = PTHREAD_MUTEX_INITIALIZER;
static raddle_cuda_device devices[RADDLE_CUDA_MAX_DEVICES];
static _Atomic(raddle_cuda_device *) published[RADDLE_CUDA_MAX_DEVICES]; /* NULL until filled */

static raddle_status read_attributes(raddle_cuda_device *device) {
    const raddle_cuda_driver *driver = device->driver;
    int major = 0, minor = 0, memory_khz = 0, memory_bits = 0;
    struct {
        int id;
        int *value;
    } wanted[] = {
        {ATTRIBUTE_MAJOR, &major},
        {ATTRIBUTE_MINOR, &minor},
        {ATTRIBUTE_NUM_SMS, &device->num_sms},
        {ATTRIBUTE_MEMORY_KHZ, &memory_khz},
        {ATTRIBUTE_MEMORY_BITS, &memory_bits},
        {ATTRIBUTE_SHARED_BYTES_OPTIN, &device->shared_bytes_optin},
        {ATTRIBUTE_L2_BYTES, &device->l2_bytes},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        RADDLE_TRY(raddle_cuda_check(
            driver->device_get_attribute(wanted[i].value, wanted[i].id, device->handle),
            "asking a GPU for its limits"));
    }
    device->arch = 10 * major + minor;
    /* Memory moves two bits per wire and clock, of which reads reach nine in ten. */
    const double bytes_per_us = memory_khz * 1e-3 * 2 * memory_bits / 8;
    device->read_rate = (int)(0.9 * bytes_per_us / device->num_sms);
    RADDLE_TRY(raddle_cuda_check(driver->device_total_mem(&device->memory_bytes, device->handle),
                                 "asking a GPU for its memory"));
    return raddle_cuda_check(
        driver->device_get_name(device->name, (int)sizeof device->name, device->handle),
        "asking a GPU for its name");
}

static raddle_status fill_device(const raddle_cuda_driver *driver, int index,
                                 raddle_cuda_device *device) {
    *device = (raddle_cuda_device){.driver = driver, .index = index};
    RADDLE_TRY(raddle_cuda_check(driver->device_get(&device->handle, index), "opening a GPU"));
    RADDLE_TRY(read_attributes(device));
    RADDLE_REQUIRE(device->arch >= 80, RADDLE_ERR_DEVICE,
                   "device: cuda:%d (%s) has compute capability %d.%d; raddle's kernels need 8.0 "
                   "(Ampere) or newer",
                   index, device->name, device->arch / 10, device->arch % 10);
    return raddle_cuda_check(driver->primary_ctx_retain(&device->context, device->handle),
                             "opening the GPU's primary context");
}

raddle_status raddle_cuda_device_count(int *out_count) {
    const raddle_cuda_driver *driver = NULL;
    int count = 0;
    RADDLE_TRY(raddle_cuda_driver_get(&driver));
    RADDLE_TRY(raddle_cuda_check(driver->device_get_count(&count), "counting GPUs"));
    *out_count = count < RADDLE_CUDA_MAX_DEVICES ? count : RADDLE_CUDA_MAX_DEVICES;
    return RADDLE_OK;
}

raddle_status raddle_cuda_device_get(int index, const raddle_cuda_device **out_device) {
    if (index >= 0 && index < RADDLE_CUDA_MAX_DEVICES) {
        const raddle_cuda_device *known =
            atomic_load_explicit(&published[index], memory_order_acquire);
        if (known != NULL) {
            RADDLE_TRY(raddle_cuda_check_fork());
            *out_device = known;
            return RADDLE_OK;
        }
    }
    const raddle_cuda_driver *driver = NULL;
    int count = 0;
    RADDLE_TRY(raddle_cuda_driver_get(&driver));
    RADDLE_TRY(raddle_cuda_device_count(&count));
    RADDLE_REQUIRE(index >= 0 && index < count, RADDLE_ERR_DEVICE,
                   "device: cuda:%d does not exist; %d GPU%s visible", index, count,
                   count == 1 ? " is" : "s are");

    raddle_status status = RADDLE_OK;
    pthread_mutex_lock(&devices_mutex);
    if (atomic_load_explicit(&published[index], memory_order_relaxed) == NULL) {
        const int mode = raddle_cuda_relax_capture(driver);
        status = fill_device(driver, index, &devices[index]);
        raddle_cuda_restore_capture(driver, mode);
        if (status == RADDLE_OK) {
            atomic_store_explicit(&published[index], &devices[index], memory_order_release);
        }
    }
    pthread_mutex_unlock(&devices_mutex);
    if (status == RADDLE_OK) {
        *out_device = &devices[index];
    }
    return status;
}

const raddle_cuda_device *raddle_cuda_device_peek(int index) {
    return atomic_load_explicit(&published[index], memory_order_acquire);
}

raddle_status raddle_cuda_push(const raddle_cuda_device *device, bool *out_pushed) {
    CUcontext current = NULL;
    RADDLE_TRY(raddle_cuda_check_fork());
    RADDLE_TRY(raddle_cuda_check(device->driver->ctx_get_current(&current),
                                 "asking for the current CUDA context"));
    if (current == device->context) {
        *out_pushed = false;
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_cuda_check(device->driver->ctx_push(device->context),
                                 "making the GPU's context current"));
    *out_pushed = true;
    return RADDLE_OK;
}

void raddle_cuda_pop(const raddle_cuda_device *device, bool pushed) {
    CUcontext popped = NULL;
    if (pushed) {
        /* Nothing to be done about a failure: the next push tells. */
        device->driver->ctx_pop(&popped);
    }
}

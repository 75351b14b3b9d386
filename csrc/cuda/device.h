/* device.h - one record per GPU: its primary context (shared with torch and the runtime API) and
 * its limits. */
#ifndef RADDLE_CUDA_DEVICE_H
#define RADDLE_CUDA_DEVICE_H

#include "cuda/driver.h"

enum { RADDLE_CUDA_MAX_DEVICES = 64 };

typedef struct raddle_cuda_device {
    const raddle_cuda_driver *driver;
    int index;
    CUdevice handle;
    CUcontext context; /* primary, retained for the life of the process */
    int arch;          /* 90 for compute capability 9.0 */
    int num_sms;
    int shared_bytes_optin; /* dynamic shared memory that one block may ask for */
    int l2_bytes;
    int read_rate; /* bytes that an SM reads in a us when all do */
    size_t memory_bytes;
    char name[96];
} raddle_cuda_device;

raddle_status raddle_cuda_device_count(int *out_count);
raddle_status raddle_cuda_device_get(int index, const raddle_cuda_device **out_device);
/* The device if it has been opened, else NULL. Opens nothing. */
const raddle_cuda_device *raddle_cuda_device_peek(int index);
/* Makes the device's context current on this thread until the matching pop; *out_pushed says
 * whether it had to. */
raddle_status raddle_cuda_push(const raddle_cuda_device *device, bool *out_pushed);
void raddle_cuda_pop(const raddle_cuda_device *device, bool pushed);

#endif

/* count.h - counts launches of raddle's kernels, where they happen: on the device.
 *
 * While counting, raddle_kernel_launch puts a launch of one thread (measure/measure_count) behind
 * each kernel, in the same stream, that adds one to the kernel's counter in device memory. A
 * capture takes it into the graph, so that every replay counts too, for as long as the graph lives.
 * Counters are per kernel name and device, and stay until the process ends.
 *
 * A device gets its counters when counting starts, or, opened later, when its first kernel is got
 * (raddle_kernel_get): before any launch on it, hence before any capture of raddle's own. Within a
 * capture by another library they are made without disturbing it.
 * cublasLt's kernels, copies and fills are not counted.
 */
#ifndef RADDLE_CUDA_COUNT_H
#define RADDLE_CUDA_COUNT_H

#include <stdint.h>

#include "cuda/kernel.h"

#define RADDLE_COUNT_KERNEL "measure/measure_count"

/* All of these are thread-safe. */

/* Counters go to 0 and launches count from now on. Waits for the devices that have counters
 * already: not while a stream is captured there (RADDLE_ERR_STATE; the driver may end another
 * library's capture over it). On failure counting stays as it was. Opens neither the driver nor a
 * device. */
raddle_status raddle_count_start(void);
/* Launches add no more; graphs captured while counting go on to. */
void raddle_count_stop(void);
/* One relaxed load. */
bool raddle_count_is_on(void);

/* Number of the counter of a kernel ("attention/attention_decode"); -1: it has none. */
int raddle_count_index(const char *name);
int raddle_count_num_kernels(void);
/* The kernel's symbol ("attention_decode"), cut to name_bytes. */
void raddle_count_name(int index, char *name, size_t name_bytes);
/* launches[i]: of kernel i on all devices. Waits for them, as start does. Untouched on failure. */
raddle_status raddle_count_read(uint64_t *launches);

/* For kernel.c. prepare: the device has counters when this returns. launch: behind a launch of
 * kernel, with the context current. */
raddle_status raddle_count_prepare(const raddle_cuda_device *device);
raddle_status raddle_count_launch(const raddle_cuda_device *device, const raddle_kernel *kernel,
                                  raddle_stream stream);

#endif

/* kernel.h - from a config to something that can be launched: memory, then disk, then NVRTC.
 *
 * A kernel is named by its source, "attention/attention_decode" (symbol: the file's stem), and its
 * config, lines of
 * "#define RADDLE_X value\n" that are put before the source. The content hash over source and every
 * header, config, options, arch, NVRTC version and params ABI is the key in memory (per device) and
 * on disk.
 */
#ifndef RADDLE_CUDA_KERNEL_H
#define RADDLE_CUDA_KERNEL_H

#include "cuda/device.h"

enum { RADDLE_ARCH_BYTES = 24 };

typedef struct raddle_kernel {
    CUfunction function;
    int registers, local_bytes, static_shared_bytes;
    int max_threads;
    int counter; /* of its launches (count.h); -1: they are not counted */
} raddle_kernel;

typedef struct raddle_launch {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes; /* dynamic; the limit of the function is raised by raddle_kernel_get */
    unsigned cluster;      /* CTAs along x, 0 or 1: none */
    bool programmatic_launch; /* may start before its predecessor ends; the kernel waits itself */
} raddle_launch;

/* Borrowed; lives as long as the process. Thread-safe. Fails with RADDLE_ERR_STATE while the
 * calling thread's stream is captured only if it would have to compile or load. shared_bytes: the
 * most dynamic shared memory of any launch. */
raddle_status raddle_kernel_get(const raddle_cuda_device *device, const char *name,
                                const char *config, unsigned shared_bytes,
                                const raddle_kernel **out_kernel);
/* params: the one argument of the kernel, most often a struct. The device's context must be
 * current. While launches are counted (count.h), another launch follows in stream. */
raddle_status raddle_kernel_launch(const raddle_cuda_device *device, const raddle_kernel *kernel,
                                   const raddle_launch *launch, const void *params,
                                   raddle_stream stream);

/* Compiles without a device and without the caches, for the compile tests (image.c). arch:
 * "sm_90a". The image and log are the caller's to raddle_free; the log holds ptxas's report. */
raddle_status raddle_kernel_compile(const char *name, const char *config, const char *arch,
                                    void **out_image, size_t *out_bytes, char **out_log);

/* The architecture that kernels for a device of compute capability device_arch (90) are named by.
 */
void raddle_kernel_arch(int device_arch, char arch[RADDLE_ARCH_BYTES]);
/* The one to compile for with an NVRTC that knows archs; false when none of them will run. */
bool raddle_kernel_arch_fallback(int device_arch, const int *archs, int num_archs,
                                 char arch[RADDLE_ARCH_BYTES]);

#endif

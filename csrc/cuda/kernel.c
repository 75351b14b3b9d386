/* kernel.c - loads images on a device, keeps what was loaded, and launches.
 *
 * Which architecture: the GPU's own where NVRTC knows it (cubin); else the nearest older one of the
 * same major that it knows (cubins run on later minors); else PTX of the newest one below, which
 * the driver translates. PTX needs a driver as new as NVRTC; a cubin only one of the same CUDA
 * major.
 */
#include "cuda/kernel.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/hash.h"
#include "cuda/count.h"
#include "cuda/image.h"
#include "cuda/notice.h"
#include "cuda/nvrtc.h"

/* CUfunction_attribute */
enum {
    ATTRIBUTE_MAX_THREADS = 0,
    ATTRIBUTE_STATIC_SHARED_BYTES = 1,
    ATTRIBUTE_LOCAL_BYTES = 3,
    ATTRIBUTE_REGISTERS = 4,
    ATTRIBUTE_MAX_DYNAMIC_SHARED_BYTES = 8,
};

/* CUlaunchAttributeID */
enum { LAUNCH_CLUSTER_DIMENSION = 4, LAUNCH_PROGRAMMATIC_SERIALIZATION = 6 };

enum {
    ERROR_INVALID_IMAGE = 200,
    ERROR_NO_BINARY_FOR_GPU = 209,
    ERROR_INVALID_PTX = 218,
    ERROR_UNSUPPORTED_PTX_VERSION = 222,
    DEFAULT_SHARED_BYTES = 48 * 1024, /* dynamic shared memory that needs no permission */
};

typedef struct kernel_entry {
    raddle_kernel kernel;
    CUmodule module; /* kept loaded */
    raddle_hash key; /* of name and config: sources do not change within a process */
    int device;
    unsigned dynamic_shared_limit;
} kernel_entry;

static pthread_mutex_t kernels_mutex = PTHREAD_MUTEX_INITIALIZER;
static kernel_entry **kernels;
static size_t num_kernels, kernels_capacity;

/* ---------------------------------------------------------------- which code */

void raddle_kernel_arch(int device_arch, char arch[RADDLE_ARCH_BYTES]) {
    /* wgmma and setmaxnreg exist in the "a" set of 9.0 only. */
    snprintf(arch, RADDLE_ARCH_BYTES, "sm_%d%s", device_arch, device_arch == 90 ? "a" : "");
}

bool raddle_kernel_arch_fallback(int device_arch, const int *archs, int num_archs,
                                 char arch[RADDLE_ARCH_BYTES]) {
    int same_major = 0, newest = 0;
    for (int i = 0; i < num_archs; i++) {
        if (archs[i] == device_arch) {
            raddle_kernel_arch(device_arch, arch);
            return true;
        }
        if (archs[i] < device_arch) {
            newest = archs[i] > newest ? archs[i] : newest;
            if (archs[i] / 10 == device_arch / 10 && archs[i] > same_major) {
                same_major = archs[i];
            }
        }
    }
    if (same_major > 0) {
        snprintf(arch, RADDLE_ARCH_BYTES, "sm_%d", same_major);
    } else if (newest > 0) {
        snprintf(arch, RADDLE_ARCH_BYTES, "compute_%d", newest);
    }
    return newest > 0;
}

static raddle_status find_image(const raddle_cuda_device *device, const char *name,
                                const char *config, const raddle_image **out_image) {
    char arch[RADDLE_ARCH_BYTES];
    const raddle_nvrtc_info *nvrtc = NULL;
    raddle_kernel_arch(device->arch, arch);
    RADDLE_TRY(raddle_image_find(name, config, arch, out_image));
    if (*out_image != NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_nvrtc_get(&nvrtc));
    RADDLE_REQUIRE(
        raddle_kernel_arch_fallback(device->arch, nvrtc->archs, nvrtc->num_archs, arch),
        RADDLE_ERR_COMPILE,
        "%s: NVRTC %d.%d at %.300s compiles for nothing that cuda:%d (%s, compute capability "
        "%d.%d) runs; run: %s",
        name, nvrtc->version / 1000, nvrtc->version % 1000 / 10, nvrtc->path, device->index,
        device->name, device->arch / 10, device->arch % 10, raddle_nvrtc_cure());
    return raddle_image_get(name, config, arch, out_image);
}

/* ---------------------------------------------------------------- loading */

static raddle_status check_load(const raddle_cuda_device *device, const char *name,
                                CUresult result) {
    if (result == ERROR_INVALID_IMAGE || result == ERROR_NO_BINARY_FOR_GPU ||
        result == ERROR_INVALID_PTX || result == ERROR_UNSUPPORTED_PTX_VERSION) {
        const char *error = "an error without a name";
        device->driver->get_error_name(result, &error);
        return raddle_fail(RADDLE_ERR_COMPILE,
                           "%s: the driver (CUDA %d.%d) refuses code that was compiled for %s "
                           "(%s): NVRTC is of a newer CUDA than the driver; update the driver, or "
                           "run: %s",
                           name, device->driver->version / 1000,
                           device->driver->version % 1000 / 10, device->name, error,
                           raddle_nvrtc_cure());
    }
    return raddle_cuda_check(result, "loading a kernel");
}

static raddle_status read_function(const raddle_cuda_device *device, CUfunction function,
                                   raddle_kernel *kernel) {
    struct {
        int id;
        int *value;
    } wanted[] = {
        {ATTRIBUTE_REGISTERS, &kernel->registers},
        {ATTRIBUTE_LOCAL_BYTES, &kernel->local_bytes},
        {ATTRIBUTE_STATIC_SHARED_BYTES, &kernel->static_shared_bytes},
        {ATTRIBUTE_MAX_THREADS, &kernel->max_threads},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        RADDLE_TRY(raddle_cuda_check(
            device->driver->func_get_attribute(wanted[i].value, wanted[i].id, function),
            "asking a kernel for its limits"));
    }
    kernel->function = function;
    return RADDLE_OK;
}

/* The symbol is the last part of the name. */
static raddle_status load_image(const raddle_cuda_device *device, const char *name,
                                const raddle_image *image, kernel_entry *entry) {
    const raddle_cuda_driver *driver = device->driver;
    const char *slash = strrchr(name, '/');
    CUmodule module = NULL;
    CUfunction function = NULL;
    RADDLE_TRY(check_load(device, name, driver->module_load_data(&module, image->code)));
    raddle_status status = raddle_cuda_check(
        driver->module_get_function(&function, module, slash != NULL ? slash + 1 : name),
        "finding a kernel in its module");
    if (status == RADDLE_OK) {
        status = read_function(device, function, &entry->kernel);
    }
    if (status != RADDLE_OK) {
        driver->module_unload(module);
        return status;
    }
    entry->module = module;
    return RADDLE_OK;
}

/* With the context current. */
static raddle_status load_kernel(const raddle_cuda_device *device, const char *name,
                                 const raddle_image *image, kernel_entry *entry) {
    const int mode = raddle_cuda_relax_capture(device->driver);
    raddle_status status = load_image(device, name, image, entry);
    raddle_cuda_restore_capture(device->driver, mode);
    if (status == RADDLE_OK) {
        raddle_log(2, "loaded %s on cuda:%d: %d registers, %d bytes of local memory", name,
                   device->index, entry->kernel.registers, entry->kernel.local_bytes);
    }
    return status;
}

/* ---------------------------------------------------------------- the table */

/* All of these with kernels_mutex held. */
static kernel_entry *find_entry(int device, raddle_hash key) {
    for (size_t i = 0; i < num_kernels; i++) {
        const kernel_entry *entry = kernels[i];
        if (entry->device == device && entry->key.high == key.high && entry->key.low == key.low) {
            return kernels[i];
        }
    }
    return NULL;
}

/* Makes sure that one more entry fits. */
static raddle_status reserve_entry(void) {
    if (num_kernels < kernels_capacity) {
        return RADDLE_OK;
    }
    const size_t capacity = kernels_capacity > 0 ? 2 * kernels_capacity : 32;
    kernel_entry **grown = raddle_realloc(kernels, capacity * sizeof *grown);
    if (grown == NULL) {
        return raddle_fail_memory(capacity * sizeof *grown);
    }
    kernels = grown;
    kernels_capacity = capacity;
    return RADDLE_OK;
}

static raddle_status add_entry(const raddle_cuda_device *device, const char *name, raddle_hash key,
                               const raddle_image *image, kernel_entry **out_entry) {
    RADDLE_TRY(reserve_entry());
    kernel_entry *entry = raddle_alloc_zero(sizeof *entry);
    if (entry == NULL) {
        return raddle_fail_memory(sizeof *entry);
    }
    entry->device = device->index;
    entry->key = key;
    entry->kernel.counter = raddle_count_index(name);
    raddle_status status = load_kernel(device, name, image, entry);
    if (status != RADDLE_OK) {
        raddle_free(entry);
        return status;
    }
    /* What a launch may ask for unasked covers both kinds together. */
    entry->dynamic_shared_limit =
        DEFAULT_SHARED_BYTES - (unsigned)entry->kernel.static_shared_bytes;
    kernels[num_kernels++] = entry;
    *out_entry = entry;
    return RADDLE_OK;
}

static raddle_status allow_shared_bytes(const raddle_cuda_device *device, const char *name,
                                        kernel_entry *entry, unsigned shared_bytes) {
    const long long total = (long long)shared_bytes + entry->kernel.static_shared_bytes;
    RADDLE_REQUIRE(total <= device->shared_bytes_optin, RADDLE_ERR_UNSUPPORTED,
                   "%s: needs %lld bytes of shared memory per block, cuda:%d (%s) has %d", name,
                   total, device->index, device->name, device->shared_bytes_optin);
    if (shared_bytes > entry->dynamic_shared_limit) {
        RADDLE_TRY(raddle_cuda_check(
            device->driver->func_set_attribute(
                entry->kernel.function, ATTRIBUTE_MAX_DYNAMIC_SHARED_BYTES, (int)shared_bytes),
            "raising a kernel's shared memory limit"));
        entry->dynamic_shared_limit = shared_bytes;
    }
    return RADDLE_OK;
}

static raddle_hash hash_request(const char *name, const char *config) {
    raddle_hasher hasher;
    raddle_hash_init(&hasher);
    raddle_hash_update_text(&hasher, name);
    raddle_hash_update_text(&hasher, config);
    return raddle_hash_finish(&hasher);
}

/* image NULL: only look. *out_kernel NULL: not loaded yet. */
static raddle_status lock_and_find(const raddle_cuda_device *device, const char *name,
                                   raddle_hash key, unsigned shared_bytes,
                                   const raddle_image *image, const raddle_kernel **out_kernel) {
    raddle_status status = RADDLE_OK;
    *out_kernel = NULL;
    pthread_mutex_lock(&kernels_mutex);
    kernel_entry *entry = find_entry(device->index, key);
    if (entry == NULL && image != NULL) {
        status = add_entry(device, name, key, image, &entry);
    }
    if (entry != NULL) {
        status = allow_shared_bytes(device, name, entry, shared_bytes);
        *out_kernel = &entry->kernel;
    }
    pthread_mutex_unlock(&kernels_mutex);
    return status;
}

raddle_status raddle_kernel_get(const raddle_cuda_device *device, const char *name,
                                const char *config, unsigned shared_bytes,
                                const raddle_kernel **out_kernel) {
    const raddle_hash key = hash_request(name, config);
    const raddle_kernel *kernel = NULL;
    const raddle_image *image = NULL;
    bool pushed = false;
    if (raddle_count_is_on() && strcmp(name, RADDLE_COUNT_KERNEL) != 0) {
        RADDLE_TRY(raddle_count_prepare(device));
    }
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    raddle_status status = lock_and_find(device, name, key, shared_bytes, NULL, &kernel);
    if (status == RADDLE_OK && kernel == NULL) {
        status = raddle_cuda_refuse_capture("loading a kernel");
        if (status == RADDLE_OK) {
            status = find_image(device, name, config, &image);
        }
        if (status == RADDLE_OK) {
            status = lock_and_find(device, name, key, shared_bytes, image, &kernel);
        }
    }
    raddle_cuda_pop(device, pushed);
    if (status == RADDLE_OK) {
        *out_kernel = kernel;
    }
    return status;
}

/* ---------------------------------------------------------------- launching */

raddle_status raddle_kernel_launch(const raddle_cuda_device *device, const raddle_kernel *kernel,
                                   const raddle_launch *launch, const void *params,
                                   raddle_stream stream) {
    raddle_cu_launch_attribute attributes[2] = {0};
    unsigned num_attributes = 0;
    if (launch->cluster > 1) {
        attributes[num_attributes].id = LAUNCH_CLUSTER_DIMENSION;
        attributes[num_attributes].value.cluster.x = launch->cluster;
        attributes[num_attributes].value.cluster.y = 1;
        attributes[num_attributes].value.cluster.z = 1;
        num_attributes++;
    }
    if (launch->programmatic_launch) {
        attributes[num_attributes].id = LAUNCH_PROGRAMMATIC_SERIALIZATION;
        attributes[num_attributes].value.programmatic_stream_serialization = 1;
        num_attributes++;
    }
    const raddle_cu_launch_config config = {
        .grid_x = launch->grid[0],
        .grid_y = launch->grid[1],
        .grid_z = launch->grid[2],
        .block_x = launch->block[0],
        .block_y = launch->block[1],
        .block_z = launch->block[2],
        .shared_bytes = launch->shared_bytes,
        .stream = stream,
        .attributes = attributes,
        .num_attributes = num_attributes,
    };
    /* The driver copies the struct and takes it as not const. */
    void *arguments[1] = {(void *)(uintptr_t)params};
    RADDLE_TRY(raddle_cuda_check(
        device->driver->launch_kernel_ex(&config, kernel->function, arguments, NULL),
        "launching a kernel"));
    return raddle_count_is_on() ? raddle_count_launch(device, kernel, stream) : RADDLE_OK;
}

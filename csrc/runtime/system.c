/* system.c - hands the questions of doctor, warmup and cache on to csrc/cuda and csrc/cpu. */
#include "runtime/system.h"

#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "cpu/vec.h"
#include "cuda/blas.h"
#include "cuda/bundle.h"
#include "cuda/cache.h"
#include "cuda/count.h"
#include "cuda/environment.h"
#include "cuda/kernel.h"
#include "cuda/library.h"
#include "cuda/notice.h"
#include "cuda/nvrtc.h"

/* ---------------------------------------------------------------- facts */

raddle_system_settings raddle_system_get_settings(void) {
    const raddle_environment *environment = raddle_environment_get();
    return (raddle_system_settings){
        .cache_dir = environment->cache_dir,
        .log_level = environment->log_level,
        .check = environment->check,
        .disable_cuda = environment->disable_cuda,
    };
}

raddle_status raddle_system_get_driver(int *out_version, const char **out_path) {
    const raddle_cuda_driver *driver = NULL;
    RADDLE_TRY(raddle_cuda_driver_get(&driver));
    *out_version = driver->version;
    *out_path = driver->path;
    return RADDLE_OK;
}

raddle_status raddle_system_count_gpus(int *out_count) {
    return raddle_cuda_device_count(out_count);
}

raddle_status raddle_system_get_gpu(int index, raddle_system_gpu *out_gpu) {
    const raddle_cuda_device *device = NULL;
    raddle_system_gpu gpu = {.free_bytes = 0};
    size_t total_bytes = 0;
    bool pushed = false;
    RADDLE_TRY(raddle_cuda_device_get(index, &device));
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    raddle_status status = raddle_cuda_check(
        device->driver->mem_get_info(&gpu.free_bytes, &total_bytes), "asking for free memory");
    raddle_cuda_pop(device, pushed);
    memcpy(gpu.name, device->name, sizeof gpu.name);
    gpu.arch = device->arch;
    gpu.num_sms = device->num_sms;
    gpu.shared_bytes = device->shared_bytes_optin;
    gpu.memory_bytes = device->memory_bytes;
    raddle_kernel_arch(device->arch, gpu.kernel_arch);
    if (status == RADDLE_OK) {
        *out_gpu = gpu;
    }
    return status;
}

raddle_status raddle_system_get_nvrtc(raddle_system_nvrtc *out_nvrtc) {
    const raddle_nvrtc_info *info = NULL;
    RADDLE_TRY(raddle_nvrtc_get(&info));
    *out_nvrtc = (raddle_system_nvrtc){
        .path = info->path,
        .version = info->version,
        .num_archs = info->num_archs,
        .archs = info->archs,
    };
    return RADDLE_OK;
}

raddle_status raddle_system_get_blas(int *out_version, const char **out_path) {
    raddle_blas_info info;
    RADDLE_TRY(raddle_blas_get_info(&info));
    *out_version = info.version;
    *out_path = info.path;
    return RADDLE_OK;
}

const char *raddle_system_nvrtc_cure(void) {
    return raddle_nvrtc_cure();
}

const char *raddle_system_cpu_isa(void) {
    return raddle_vec_get()->name;
}

void raddle_system_add_library_root(const char *folder) {
    raddle_library_add_root(folder);
}

bool raddle_system_get_notice(int i, char *text, size_t text_bytes) {
    char notice[RADDLE_NOTICE_BYTES];
    if (!raddle_notice_text(i, notice)) {
        return false;
    }
    snprintf(text, text_bytes, "%s", notice);
    return true;
}

/* ---------------------------------------------------------------- counters */

raddle_status raddle_system_count_launches(bool on) {
    if (on) {
        return raddle_count_start();
    }
    raddle_count_stop();
    return RADDLE_OK;
}

int raddle_system_num_counters(void) {
    return raddle_count_num_kernels();
}

raddle_status raddle_system_read_counters(uint64_t *launches) {
    return raddle_count_read(launches);
}

void raddle_system_counter_name(int i, char *name, size_t name_bytes) {
    raddle_count_name(i, name, name_bytes);
}

/* ---------------------------------------------------------------- kernels */

raddle_status raddle_system_compile(const raddle_kernel_request *request, void **out_image,
                                    size_t *out_bytes, char **out_log) {
    return raddle_kernel_compile(request->name, request->config, request->arch, out_image,
                                 out_bytes, out_log);
}

void raddle_system_parse_log(const char *log, raddle_system_report *out_report) {
    raddle_nvrtc_report report;
    raddle_nvrtc_parse_log(log, &report);
    *out_report = (raddle_system_report){
        .registers = report.registers,
        .stack_bytes = report.stack_bytes,
        .spill_store_bytes = report.spill_store_bytes,
        .spill_load_bytes = report.spill_load_bytes,
        .num_serialised = report.num_serialised,
        .num_local = report.num_local,
    };
}

raddle_status raddle_system_warm(const raddle_kernel_request *request, const char **out_origin) {
    static const char *const origins[] = {
        [RADDLE_IMAGE_COMPILED] = "compiled",
        [RADDLE_IMAGE_FROM_DISK] = "disk",
        [RADDLE_IMAGE_FROM_BUNDLE] = "bundle",
    };
    const raddle_image *image = NULL;
    RADDLE_TRY(raddle_image_get(request->name, request->config, request->arch, &image));
    *out_origin = origins[image->origin];
    return RADDLE_OK;
}

raddle_status raddle_system_write_bundle(const char *path, const raddle_kernel_request *requests,
                                         int num_requests) {
    const size_t bytes = (size_t)num_requests * sizeof(raddle_image *);
    const raddle_image **images = raddle_alloc(bytes);
    if (images == NULL) {
        return raddle_fail_memory(bytes);
    }
    raddle_status status = RADDLE_OK;
    for (int i = 0; i < num_requests && status == RADDLE_OK; i++) {
        status =
            raddle_image_get(requests[i].name, requests[i].config, requests[i].arch, &images[i]);
    }
    if (status == RADDLE_OK) {
        status = raddle_bundle_write(path, images, num_requests);
    }
    raddle_free(images);
    return status;
}

raddle_status raddle_system_load_bundle(const char *path, bool to_disk, int *out_num_kernels) {
    return raddle_bundle_load(path, to_disk, out_num_kernels);
}

/* ---------------------------------------------------------------- the cache folder */

static raddle_status get_cache_folder(const char **out_folder) {
    *out_folder = raddle_environment_get()->cache_dir;
    RADDLE_REQUIRE((*out_folder)[0] != '\0', RADDLE_ERR_IO,
                   "kernel cache: there is no folder: RADDLE_CACHE_DIR is empty, or neither it, "
                   "XDG_CACHE_HOME nor HOME is set; set RADDLE_CACHE_DIR");
    return RADDLE_OK;
}

static void copy_stats(const raddle_cache_stats *stats, raddle_system_cache *out_cache) {
    *out_cache = (raddle_system_cache){
        .num_files = stats->num_files,
        .num_bytes = stats->num_bytes,
        .num_damaged = stats->num_damaged,
    };
}

raddle_status raddle_system_measure_cache(raddle_system_cache *out_cache) {
    const char *folder = NULL;
    raddle_cache_stats stats;
    RADDLE_TRY(get_cache_folder(&folder));
    RADDLE_TRY(raddle_cache_measure(folder, &stats));
    copy_stats(&stats, out_cache);
    return RADDLE_OK;
}

raddle_status raddle_system_verify_cache(bool remove_damaged, raddle_system_cache *out_cache) {
    const char *folder = NULL;
    raddle_cache_stats stats;
    RADDLE_TRY(get_cache_folder(&folder));
    RADDLE_TRY(raddle_cache_verify(folder, remove_damaged, &stats));
    copy_stats(&stats, out_cache);
    return RADDLE_OK;
}

raddle_status raddle_system_clear_cache(int64_t *out_num_removed) {
    const char *folder = NULL;
    RADDLE_TRY(get_cache_folder(&folder));
    return raddle_cache_clear(folder, out_num_removed);
}

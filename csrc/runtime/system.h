/* system.h - what this machine has and what has been compiled for it: the facts behind doctor, and
 * the work behind `python -m raddle warmup` and `cache`. No plan and no tensor in sight.
 */
#ifndef RADDLE_RUNTIME_SYSTEM_H
#define RADDLE_RUNTIME_SYSTEM_H

#include "base/status.h"

typedef struct raddle_system_settings {
    const char *cache_dir; /* "": kernels stay in memory */
    int log_level;
    bool check, disable_cuda;
} raddle_system_settings;

typedef struct raddle_system_gpu {
    char name[96];
    int arch; /* 90 for compute capability 9.0 */
    int num_sms;
    int shared_bytes; /* that one block may ask for */
    size_t memory_bytes, free_bytes;
    char kernel_arch[24]; /* what kernels are compiled for: "sm_90a" */
} raddle_system_gpu;

typedef struct raddle_system_nvrtc {
    const char *path;
    int version; /* 13050 for 13.5 */
    int num_archs;
    const int *archs;
} raddle_system_nvrtc;

typedef struct raddle_system_cache {
    int64_t num_files, num_bytes, num_damaged;
} raddle_system_cache;

typedef struct raddle_system_report { /* ptxas's words about a kernel, as numbers */
    int registers, stack_bytes, spill_store_bytes, spill_load_bytes;
    int num_serialised; /* warnings C75xx */
    int num_local;      /* warnings of local memory */
} raddle_system_report;

typedef struct raddle_kernel_request {
    const char *name;   /* "attention/attention_decode" */
    const char *config; /* "#define RADDLE_X 1\n.." */
    const char *arch;   /* "sm_90a" */
} raddle_kernel_request;

raddle_system_settings raddle_system_get_settings(void);
/* 13000 for CUDA 13.0. Fails with the reason when there is no driver or it does not start. */
raddle_status raddle_system_get_driver(int *out_version, const char **out_path);
raddle_status raddle_system_count_gpus(int *out_count);
raddle_status raddle_system_get_gpu(int index, raddle_system_gpu *out_gpu);
raddle_status raddle_system_get_nvrtc(raddle_system_nvrtc *out_nvrtc);
/* 130100 for cublasLt 13.1. */
raddle_status raddle_system_get_blas(int *out_version, const char **out_path);
const char *raddle_system_nvrtc_cure(void); /* "pip install .." */
const char *raddle_system_cpu_isa(void);    /* of the CPU back end: "avx512bf16" */

/* One more folder that may hold CUDA wheels (an entry of sys.path). */
void raddle_system_add_library_root(const char *folder);
/* Number i of the notices of this process, copied; false when there are fewer. */
bool raddle_system_get_notice(int i, char *text, size_t text_bytes);

/* Launches of raddle's kernels, counted on the GPUs (cuda/count.h). on: from 0, from now on. */
raddle_status raddle_system_count_launches(bool on);
int raddle_system_num_counters(void);
/* launches[i]: of the kernel of counter i on all GPUs, which it waits for. */
raddle_status raddle_system_read_counters(uint64_t *launches);
void raddle_system_counter_name(int i, char *name, size_t name_bytes);

/* Compiles anew, whatever the caches hold. Image and log are the caller's to raddle_free. */
raddle_status raddle_system_compile(const raddle_kernel_request *request, void **out_image,
                                    size_t *out_bytes, char **out_log);
void raddle_system_parse_log(const char *log, raddle_system_report *out_report);
/* Sees to it that the kernel is in the cache; "compiled", "disk" or "bundle" says where it was. */
raddle_status raddle_system_warm(const raddle_kernel_request *request, const char **out_origin);

raddle_status raddle_system_write_bundle(const char *path, const raddle_kernel_request *requests,
                                         int num_requests);
raddle_status raddle_system_load_bundle(const char *path, bool to_disk, int *out_num_kernels);
raddle_status raddle_system_measure_cache(raddle_system_cache *out_cache);
raddle_status raddle_system_verify_cache(bool remove_damaged, raddle_system_cache *out_cache);
raddle_status raddle_system_clear_cache(int64_t *out_num_removed);

#endif

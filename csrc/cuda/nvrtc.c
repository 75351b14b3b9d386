/* nvrtc.c - finds and opens NVRTC with its builtins, and runs it.
 *
 * NVRTC opens libnvrtc-builtins by soname at its first compile and fails if the loader does not
 * know the folder; opening it here by full path from beside libnvrtc makes the later request
 * succeed.
 */
#include "cuda/nvrtc.h"

#include <dirent.h>
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"
#include "base/io.h"
#include "cuda/driver.h"
#include "cuda/library.h"

typedef struct nvrtc_program_st *nvrtc_program;

#define NVRTC_SYMBOLS(X)                                                                           \
    X(get_error_string, const char *, "nvrtcGetErrorString", (int result))                         \
    X(get_version, int, "nvrtcVersion", (int *major, int *minor))                                  \
    X(get_num_archs, int, "nvrtcGetNumSupportedArchs", (int *count))                               \
    X(get_archs, int, "nvrtcGetSupportedArchs", (int *archs))                                      \
    X(create_program, int, "nvrtcCreateProgram",                                                   \
      (nvrtc_program * program, const char *text, const char *name, int num_headers,               \
       const char *const *header_texts, const char *const *header_names))                          \
    X(destroy_program, int, "nvrtcDestroyProgram", (nvrtc_program * program))                      \
    X(compile_program, int, "nvrtcCompileProgram",                                                 \
      (nvrtc_program program, int num_options, const char *const *options))                        \
    X(get_ptx_size, int, "nvrtcGetPTXSize", (nvrtc_program program, size_t * bytes))               \
    X(get_ptx, int, "nvrtcGetPTX", (nvrtc_program program, char *ptx))                             \
    X(get_cubin_size, int, "nvrtcGetCUBINSize", (nvrtc_program program, size_t * bytes))           \
    X(get_cubin, int, "nvrtcGetCUBIN", (nvrtc_program program, char *cubin))                       \
    X(get_log_size, int, "nvrtcGetProgramLogSize", (nvrtc_program program, size_t * bytes))        \
    X(get_log, int, "nvrtcGetProgramLog", (nvrtc_program program, char *log))

typedef struct nvrtc_functions {
#define NVRTC_DECLARE(member, result, symbol, arguments) result(*member) arguments;
    NVRTC_SYMBOLS(NVRTC_DECLARE)
#undef NVRTC_DECLARE
} nvrtc_functions;

static const raddle_library_spec nvrtc_spec = {
    .stem = "libnvrtc.so",
    .sonames = (const char *const[]){"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", NULL},
    .wheel_folders = (const char *const[]){"nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", NULL},
};

enum { MAX_OPTIONS = 16 };

static nvrtc_functions nvrtc;
static raddle_nvrtc_info nvrtc_info;
static char nvrtc_path[RADDLE_LIBRARY_PATH_BYTES];
static char nvrtc_tried[RADDLE_LIBRARY_TRIED_BYTES];
static pthread_once_t nvrtc_once = PTHREAD_ONCE_INIT;
static atomic_bool nvrtc_is_open;

static int driver_major(void) {
    return raddle_cuda_driver_version() / 1000;
}

static bool is_too_new(int version, char reason[RADDLE_LIBRARY_PATH_BYTES]) {
    const int driver = raddle_cuda_driver_version();
    if (driver == 0 || version / 1000 <= driver / 1000) {
        return false;
    }
    snprintf(reason, RADDLE_LIBRARY_PATH_BYTES, "of CUDA %d.%d, newer than the driver's CUDA %d.%d",
             version / 1000, version % 1000 / 10, driver / 1000, driver % 1000 / 10);
    return true;
}

/* ---------------------------------------------------------------- opening */

static const char *bind_symbols(void *handle, nvrtc_functions *functions) {
#define NVRTC_BIND(member, result, symbol, arguments)                                              \
    {                                                                                              \
        void (*function)(void) = raddle_library_symbol(handle, symbol);                            \
        if (function == NULL) {                                                                    \
            return symbol;                                                                         \
        }                                                                                          \
        functions->member = (result(*) arguments)function;                                         \
    }
    NVRTC_SYMBOLS(NVRTC_BIND)
#undef NVRTC_BIND
    return NULL;
}

/* Best effort: without them NVRTC says itself, at the compile, what it misses. */
static void preload_builtins(const char *path, int version) {
    char builtins[RADDLE_LIBRARY_PATH_BYTES + 64];
    const char *slash = strrchr(path, '/');
    if (slash != NULL) {
        snprintf(builtins, sizeof builtins, "%.*s/libnvrtc-builtins.so.%d.%d", (int)(slash - path),
                 path, version / 1000, version % 1000 / 10);
        dlopen(builtins, RTLD_LAZY | RTLD_GLOBAL);
    }
}

static bool accept_handle(void *handle, char reason[RADDLE_LIBRARY_PATH_BYTES]) {
    nvrtc_functions functions;
    const char *missing = bind_symbols(handle, &functions);
    if (missing != NULL) {
        snprintf(reason, RADDLE_LIBRARY_PATH_BYTES, "too old: it lacks %s", missing);
        return false;
    }
    int major = 0, minor = 0, num_archs = 0;
    int archs[RADDLE_NVRTC_MAX_ARCHS];
    if (functions.get_version(&major, &minor) != 0 || functions.get_num_archs(&num_archs) != 0 ||
        num_archs < 1 || num_archs > RADDLE_NVRTC_MAX_ARCHS || functions.get_archs(archs) != 0) {
        snprintf(reason, RADDLE_LIBRARY_PATH_BYTES, "does not tell its version and architectures");
        return false;
    }
    const int version = 1000 * major + 10 * minor;
    if (is_too_new(version, reason)) {
        return false;
    }
    nvrtc = functions;
    nvrtc_info.version = version;
    nvrtc_info.num_archs = num_archs;
    memcpy(nvrtc_info.archs, archs, sizeof archs);
    return true;
}

static bool open_candidate(void *context, const raddle_library_candidate *candidate,
                           char reason[RADDLE_LIBRARY_PATH_BYTES]) {
    (void)context;
    void *handle = raddle_library_open(candidate, reason);
    if (handle == NULL) {
        return false;
    }
    if (!accept_handle(handle, reason)) {
        dlclose(handle);
        return false;
    }
    raddle_library_path_of(dlsym(handle, "nvrtcVersion"), nvrtc_path);
    preload_builtins(nvrtc_path, nvrtc_info.version);
    return true; /* the handle is kept for the life of the process */
}

static void open_nvrtc(void) {
    nvrtc_is_open = raddle_library_search(&nvrtc_spec, open_candidate, NULL, nvrtc_tried);
    nvrtc_info.path = nvrtc_path;
}

const char *raddle_nvrtc_cure(void) {
    return driver_major() == 12 ? "pip install nvidia-cuda-nvrtc-cu12"
                                : "pip install nvidia-cuda-nvrtc";
}

raddle_status raddle_nvrtc_get(const raddle_nvrtc_info **out_info) {
    pthread_once(&nvrtc_once, open_nvrtc);
    if (!nvrtc_is_open) {
        return raddle_fail_log(RADDLE_ERR_COMPILE, nvrtc_tried,
                               "cuda: NVRTC, which compiles the kernels, was not found; run: %s "
                               "(or give this machine compiled kernels: python -m raddle cache "
                               "--import BUNDLE). Looked at: %s",
                               raddle_nvrtc_cure(), nvrtc_tried);
    }
    *out_info = &nvrtc_info;
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- the version without opening */

/* 12040 for "libnvrtc.so.12.4.127" behind the prefix, 0 when there is no minor number. */
static int version_of_name(const char *name, const char *prefix) {
    const size_t bytes = strlen(prefix);
    int major = 0, minor = 0;
    if (strncmp(name, prefix, bytes) != 0 || sscanf(name + bytes, "%d.%d", &major, &minor) != 2) {
        return 0;
    }
    return 1000 * major + 10 * minor;
}

/* The builtins beside a wheel's libnvrtc carry the minor number; one version only, or no answer. */
static int version_of_builtins(const char *path) {
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%.*s", (int)(strrchr(path, '/') - path), path);
    DIR *listing = opendir(folder);
    int version = 0;
    if (listing == NULL) {
        return 0;
    }
    for (const struct dirent *entry = readdir(listing); entry != NULL; entry = readdir(listing)) {
        const int found = version_of_name(entry->d_name, "libnvrtc-builtins.so.");
        if (found != 0 && version != 0 && found != version) {
            version = 0;
            break;
        }
        version = found != 0 ? found : version;
    }
    closedir(listing);
    return version;
}

static bool peek_candidate(void *context, const raddle_library_candidate *candidate,
                           char reason[RADDLE_LIBRARY_PATH_BYTES]) {
    int *out_version = context;
    char path[PATH_MAX];
    *out_version = 0;
    if (candidate->is_soname || realpath(candidate->path, path) == NULL ||
        strlen(path) >= RADDLE_LIBRARY_PATH_BYTES) {
        return true; /* this one might be taken, and there is no telling its version */
    }
    int version = version_of_name(strrchr(path, '/') + 1, "libnvrtc.so.");
    version = version != 0 ? version : version_of_builtins(path);
    if (version != 0 && is_too_new(version, reason)) {
        return false;
    }
    *out_version = version;
    return true;
}

int raddle_nvrtc_peek_version(void) {
    char tried[RADDLE_LIBRARY_TRIED_BYTES];
    int version = 0;
    if (nvrtc_is_open) {
        return nvrtc_info.version;
    }
    return raddle_library_search(&nvrtc_spec, peek_candidate, &version, tried) ? version : 0;
}

/* ---------------------------------------------------------------- compiling */

static raddle_status read_log(nvrtc_program handle, char **out_log) {
    size_t bytes = 0;
    if (nvrtc.get_log_size(handle, &bytes) != 0) {
        bytes = 0;
    }
    char *log = raddle_alloc_zero(bytes + 1);
    if (log == NULL) {
        return raddle_fail_memory(bytes + 1);
    }
    if (bytes > 0 && nvrtc.get_log(handle, log) != 0) {
        log[0] = '\0';
    }
    *out_log = log;
    return RADDLE_OK;
}

static raddle_status read_image(nvrtc_program handle, const raddle_nvrtc_program *program,
                                void **out_image, size_t *out_bytes) {
    const bool is_ptx = strncmp(program->arch, "compute_", 8) == 0;
    size_t bytes = 0;
    int result = is_ptx ? nvrtc.get_ptx_size(handle, &bytes) : nvrtc.get_cubin_size(handle, &bytes);
    RADDLE_REQUIRE(result == 0 && bytes > 0, RADDLE_ERR_COMPILE,
                   "%s for %s: NVRTC %d.%d made no code (%s)", program->name, program->arch,
                   nvrtc_info.version / 1000, nvrtc_info.version % 1000 / 10,
                   nvrtc.get_error_string(result));
    char *image = raddle_alloc_zero(bytes + 1);
    if (image == NULL) {
        return raddle_fail_memory(bytes + 1);
    }
    result = is_ptx ? nvrtc.get_ptx(handle, image) : nvrtc.get_cubin(handle, image);
    if (result != 0) {
        raddle_free(image);
        return raddle_fail(RADDLE_ERR_COMPILE, "%s for %s: NVRTC did not hand its code out (%s)",
                           program->name, program->arch, nvrtc.get_error_string(result));
    }
    *out_image = image;
    *out_bytes = bytes;
    return RADDLE_OK;
}

static raddle_status run_program(nvrtc_program handle, const raddle_nvrtc_program *program,
                                 void **out_image, size_t *out_bytes, char **out_log) {
    const char *options[MAX_OPTIONS + 1];
    char arch_option[64], line[512];
    int num_options = 0;
    snprintf(arch_option, sizeof arch_option, "--gpu-architecture=%s", program->arch);
    options[num_options++] = arch_option;
    for (int i = 0; program->options[i] != NULL && num_options < MAX_OPTIONS; i++) {
        options[num_options++] = program->options[i];
    }
    const int result = nvrtc.compile_program(handle, num_options, options);
    char *log = NULL;
    RADDLE_TRY(read_log(handle, &log));
    raddle_status status = RADDLE_OK;
    if (result != 0) {
        raddle_first_error_line(log, line, sizeof line);
        status = raddle_fail_log(
            RADDLE_ERR_COMPILE, log,
            "%s for %s does not compile with NVRTC %d.%d (%s): %s; the whole log is in the error's "
            "log attribute",
            program->name, program->arch, nvrtc_info.version / 1000, nvrtc_info.version % 1000 / 10,
            nvrtc.get_error_string(result), line);
    } else {
        status = read_image(handle, program, out_image, out_bytes);
    }
    if (status != RADDLE_OK) {
        raddle_free(log);
        return status;
    }
    *out_log = log;
    return RADDLE_OK;
}

raddle_status raddle_nvrtc_compile(const raddle_nvrtc_program *program, void **out_image,
                                   size_t *out_bytes, char **out_log) {
    const raddle_nvrtc_info *info = NULL;
    RADDLE_TRY(raddle_nvrtc_get(&info));
    nvrtc_program handle = NULL;
    const int result =
        nvrtc.create_program(&handle, program->text, program->name, program->num_headers,
                             program->header_texts, program->header_names);
    RADDLE_REQUIRE(result == 0, RADDLE_ERR_COMPILE, "%s: NVRTC %d.%d at %.300s does not start (%s)",
                   program->name, info->version / 1000, info->version % 1000 / 10, info->path,
                   nvrtc.get_error_string(result));
    raddle_status status = run_program(handle, program, out_image, out_bytes, out_log);
    nvrtc.destroy_program(&handle);
    return status;
}

/* The number in front of what, within the line that ends at end; 0 when it is not there. */
static int number_before(const char *line, const char *end, const char *what) {
    const char *found = strstr(line, what);
    if (found == NULL || found >= end) {
        return 0;
    }
    while (found > line && found[-1] >= '0' && found[-1] <= '9') {
        found--;
    }
    return (int)strtol(found, NULL, 10);
}

void raddle_nvrtc_parse_log(const char *log, raddle_nvrtc_report *out_report) {
    raddle_nvrtc_report report = {0};
    for (const char *line = log; *line != '\0';) {
        const char *end = line + strcspn(line, "\n");
        const int registers = number_before(line, end, " registers");
        report.registers = registers > report.registers ? registers : report.registers;
        report.stack_bytes += number_before(line, end, " bytes stack frame");
        report.spill_store_bytes += number_before(line, end, " bytes spill stores");
        report.spill_load_bytes += number_before(line, end, " bytes spill loads");
        for (const char *at = strstr(line, "(C75"); at != NULL && at < end;
             at = strstr(at + 1, "(C75")) {
            report.num_serialised++;
        }
        const char *local = strstr(line, "ocal memory used");
        report.num_local += local != NULL && local < end;
        line = end + (*end == '\n');
    }
    *out_report = report;
}

/* driver.c - opens libcuda once and binds every symbol of the list. */
#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "cuda/environment.h"
#include "cuda/library.h"

/* The driver reads these structs: fields and sizes as its 64-bit ABI has them. */
_Static_assert(sizeof(raddle_cu_launch_value) == 64, "CUlaunchAttributeValue has 64 bytes");
_Static_assert(sizeof(raddle_cu_launch_attribute) == 72, "CUlaunchAttribute has 72 bytes");
_Static_assert(offsetof(raddle_cu_launch_attribute, value) == 8, "its value begins at byte 8");
_Static_assert(sizeof(raddle_cu_launch_config) == 56, "CUlaunchConfig has 56 bytes");
_Static_assert(offsetof(raddle_cu_launch_config, stream) == 32, "its stream is at byte 32");
_Static_assert(offsetof(raddle_cu_launch_config, num_attributes) == 48, "their count is at 48");

enum {
    CAPTURE_MODE_RELAXED = 2,
    CUDA_ERROR_CAPTURE_FIRST = 900, /* CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED .. */
    CUDA_ERROR_CAPTURE_LAST = 908,  /* .. CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD */
    OLDEST_DRIVER = 11080,          /* has cuLaunchKernelEx */
};

static raddle_cuda_driver driver;
static pthread_once_t open_once = PTHREAD_ONCE_INIT, init_once = PTHREAD_ONCE_INIT;
static bool is_open, is_initialised;
static volatile bool is_forked; /* in a child of a process that had initialised the driver */
static char driver_path[RADDLE_LIBRARY_PATH_BYTES];
static char open_problem[768], init_problem[768];
static raddle_status init_status;

static _Thread_local bool thread_capturing;

static void mark_forked(void) {
    is_forked = true;
}

static void *open_library(void) {
    static const char *const names[] = {"libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"};
    size_t used = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        void *handle = dlopen(names[i], RTLD_LAZY | RTLD_LOCAL);
        if (handle != NULL) {
            return handle;
        }
        const int bytes = snprintf(open_problem + used, sizeof open_problem - used, "%s%s",
                                   used > 0 ? "; " : "", dlerror());
        used += (size_t)bytes < sizeof open_problem - used ? (size_t)bytes : 0;
    }
    return NULL;
}

/* The name of the first symbol that is missing, or NULL. */
static const char *bind_symbols(void *handle) {
#define RADDLE_BIND(member, symbol, arguments)                                                     \
    {                                                                                              \
        void (*function)(void) = raddle_library_symbol(handle, symbol);                            \
        if (function == NULL) {                                                                    \
            return symbol;                                                                         \
        }                                                                                          \
        driver.member = (CUresult(*) arguments)function;                                           \
    }
    RADDLE_CUDA_SYMBOLS(RADDLE_BIND)
#undef RADDLE_BIND
    return NULL;
}

static void open_driver(void) {
    if (raddle_environment_get()->disable_cuda) {
        snprintf(open_problem, sizeof open_problem, "RADDLE_DISABLE_CUDA is set");
        return;
    }
    void *handle = open_library();
    if (handle == NULL) {
        return;
    }
    const void *init = dlsym(handle, "cuInit");
    raddle_library_path_of(init, driver_path);
    driver.path = driver_path;
    const char *missing = bind_symbols(handle);
    if (missing != NULL || driver.driver_get_version(&driver.version) != 0 ||
        driver.version < OLDEST_DRIVER) {
        snprintf(
            open_problem, sizeof open_problem,
            "the driver %.300s is too old (CUDA %d.%d%s%s); CUDA 11.8 (driver 520) or newer is "
            "needed",
            driver_path, driver.version / 1000, driver.version % 1000 / 10,
            missing != NULL ? ", it lacks " : "", missing != NULL ? missing : "");
        driver.version = 0;
        return;
    }
    is_open = true;
}

static void init_driver(void) {
    pthread_once(&open_once, open_driver);
    if (!is_open) {
        init_status = RADDLE_ERR_DEVICE;
        snprintf(init_problem, sizeof init_problem,
                 "cuda: no CUDA driver: %.600s; use the CPU, or install NVIDIA's driver",
                 open_problem);
        return;
    }
    const CUresult result = driver.init(0);
    if (result != 0) {
        const char *name = "unknown error", *text = "";
        driver.get_error_name(result, &name);
        driver.get_error_string(result, &text);
        init_status = RADDLE_ERR_DEVICE;
        snprintf(init_problem, sizeof init_problem,
                 "cuda: the driver %.300s does not start: %s (%s); nvidia-smi tells more, and "
                 "CUDA_VISIBLE_DEVICES may hide every GPU",
                 driver_path, name, text);
        return;
    }
    pthread_atfork(NULL, NULL, mark_forked);
    is_initialised = true;
}

raddle_status raddle_cuda_check_fork(void) {
    RADDLE_REQUIRE(!is_forked, RADDLE_ERR_DEVICE,
                   "cuda: this process was forked from one that had used CUDA, which the driver "
                   "does not support; start it by the spawn or forkserver method, or fork before "
                   "the first use of CUDA");
    return RADDLE_OK;
}

raddle_status raddle_cuda_driver_get(const raddle_cuda_driver **out_driver) {
    pthread_once(&init_once, init_driver);
    if (!is_initialised) {
        return raddle_fail(init_status, "%s", init_problem);
    }
    RADDLE_TRY(raddle_cuda_check_fork());
    *out_driver = &driver;
    return RADDLE_OK;
}

int raddle_cuda_driver_version(void) {
    pthread_once(&open_once, open_driver);
    return is_open ? driver.version : 0;
}

/* Whether work that was queued before failed while it ran. After each of these the driver answers
 * every further call on the context in the same way (the CUresult page of its manual). What a call
 * answers for itself, a launch out of resources (701) too, is not among them. */
static bool is_asynchronous(CUresult result) {
    switch (result) {
    case 214: /* CUDA_ERROR_ECC_UNCORRECTABLE */
    case 226: /* CUDA_ERROR_CONTAINED */
    case 700: /* CUDA_ERROR_ILLEGAL_ADDRESS */
    case 702: /* CUDA_ERROR_LAUNCH_TIMEOUT */
    case 710: /* CUDA_ERROR_ASSERT */
    case 714: /* CUDA_ERROR_HARDWARE_STACK_ERROR */
    case 715: /* CUDA_ERROR_ILLEGAL_INSTRUCTION */
    case 716: /* CUDA_ERROR_MISALIGNED_ADDRESS */
    case 717: /* CUDA_ERROR_INVALID_ADDRESS_SPACE */
    case 718: /* CUDA_ERROR_INVALID_PC */
    case 719: /* CUDA_ERROR_LAUNCH_FAILED */
    case 721: /* CUDA_ERROR_TENSOR_MEMORY_LEAK */
    case 810: /* CUDA_ERROR_MPS_CLIENT_TERMINATED */
    case 911: /* CUDA_ERROR_EXTERNAL_DEVICE */
        return true;
    default:
        return false;
    }
}

raddle_status raddle_cuda_check(CUresult result, const char *doing) {
    if (result == 0) {
        return RADDLE_OK;
    }
    const char *name = "an error without a name", *text = "";
    driver.get_error_name(result, &name);
    driver.get_error_string(result, &text);
    if (result >= CUDA_ERROR_CAPTURE_FIRST && result <= CUDA_ERROR_CAPTURE_LAST) {
        return raddle_fail(RADDLE_ERR_STATE,
                           "%s: not possible while a CUDA stream is being captured (%s: %s); make "
                           "plans, bind workspaces and call plan() before the capture",
                           doing, name, text);
    }
    if (is_asynchronous(result)) {
        return raddle_fail(RADDLE_ERR_CUDA_ASYNC,
                           "%s: the CUDA driver answered %s (%d: %s), an asynchronous error: a "
                           "kernel or copy that this process had queued before failed on the GPU, "
                           "and the CUDA context is lost with all that is in it; restart the "
                           "process; compute-sanitizer shows the kernel, CUDA_LAUNCH_BLOCKING=1 "
                           "the call that launches it",
                           doing, name, result, text);
    }
    return raddle_fail(RADDLE_ERR_CUDA, "%s: the CUDA driver answered %s (%d: %s)", doing, name,
                       result, text);
}

int raddle_cuda_relax_capture(const raddle_cuda_driver *cuda) {
    int mode = CAPTURE_MODE_RELAXED;
    return cuda->thread_exchange_capture_mode(&mode) == 0 ? mode : -1;
}

void raddle_cuda_restore_capture(const raddle_cuda_driver *cuda, int mode) {
    if (mode >= 0) {
        cuda->thread_exchange_capture_mode(&mode);
    }
}

void raddle_cuda_set_capturing(bool capturing) {
    thread_capturing = capturing;
}

bool raddle_cuda_is_thread_capturing(void) {
    return thread_capturing;
}

raddle_status raddle_cuda_refuse_capture(const char *doing) {
    RADDLE_REQUIRE(!thread_capturing, RADDLE_ERR_STATE,
                   "%s: not possible while this thread captures a raddle.Graph; make plans, bind "
                   "workspaces and call plan() before the capture",
                   doing);
    return RADDLE_OK;
}

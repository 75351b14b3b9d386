/* stub_cuda.c - a libcuda of the host: what raddle calls of the driver, with the driver's rules.
 *
 * Memory is malloc's, so that sanitizers see every access. Work on streams is one queue for all of
 * them, in the order of the calls: run at once, or (is_lazy) when somebody waits for an event or a
 * stream. A capture takes the work of its stream instead. What a capture forbids breaks it, as the
 * driver does: allocating, freeing, loading or waiting from the capturing thread in any mode but
 * relaxed, and waiting for a captured stream or its context. Of kernels only measure_count does
 * anything: it adds one.
 */
#include "stub.h"
#include "stub_work.h"

#include <pthread.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    SUCCESS = 0,
    ERROR_INVALID_VALUE = 1,
    ERROR_OUT_OF_MEMORY = 2,
    ERROR_NOT_INITIALIZED = 3,
    ERROR_INVALID_DEVICE = 101,
    ERROR_INVALID_IMAGE = 200,
    ERROR_INVALID_CONTEXT = 201,
    ERROR_NOT_FOUND = 500,
    ERROR_CAPTURE_UNSUPPORTED = 900,
    ERROR_CAPTURE_INVALIDATED = 901,
    ERROR_CAPTURE_UNJOINED = 905,
    MODE_RELAXED = 2,
    MAX_DEPTH = 16,
};

static stub_cuda_state state = {
    .version = 13000,
    .num_devices = 2,
    .arch = 90,
    .free_bytes = (size_t)64 << 30,
};
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static work_list queue;
static uint64_t num_records;
static struct CUctx_st contexts[64];
static struct CUfunc_st *functions; /* of all modules, for the life of the process */
static bool is_initialised;
static pid_t init_pid;

static _Thread_local CUcontext stack[MAX_DEPTH];
static _Thread_local int depth, capture_mode;
static _Thread_local CUstream capturing_stream;

EXPORT void *stub_cuda_panel(void) {
    return &state;
}

/* ---------------------------------------------------------------- rules */

static CUresult enter(const char *name) {
    state.calls++;
    if (state.fail_function != NULL && strcmp(state.fail_function, name) == 0 &&
        state.fail_skip-- == 0) {
        state.fail_function = NULL;
        return state.fail_result;
    }
    return SUCCESS;
}

/* Whether the process may call on a context at all. */
static CUresult check_context(void) {
    return !is_initialised || init_pid != getpid() ? ERROR_NOT_INITIALIZED
           : depth == 0                            ? ERROR_INVALID_CONTEXT
                                                   : SUCCESS;
}

/* What calls on the current context answer since work of it failed. */
static CUresult lost(void) {
    return state.lost[stack[depth - 1]->device];
}

#define TRY(expression)                                                                            \
    do {                                                                                           \
        CUresult result_ = (expression);                                                           \
        if (result_ != SUCCESS) {                                                                  \
            return result_;                                                                        \
        }                                                                                          \
    } while (0)
#define ENTER() TRY(enter(__func__))
/* Freeing goes on in a lost context, so that a test can count what was not freed. */
#define ENTER_TO_FREE()                                                                            \
    ENTER();                                                                                       \
    TRY(check_context())
#define ENTER_WITH_CONTEXT()                                                                       \
    ENTER_TO_FREE();                                                                               \
    TRY(lost())

static bool is_forbidden(void) {
    if (capturing_stream == NULL || capture_mode == MODE_RELAXED) {
        return false;
    }
    capturing_stream->is_broken = true;
    state.num_invalidated++;
    return true;
}

#define NOT_IN_CAPTURE() TRY(is_forbidden() ? ERROR_CAPTURE_UNSUPPORTED : SUCCESS)

/* ---------------------------------------------------------------- work */

static void perform(const work *item) {
    if (item->result != SUCCESS) {
        state.lost[item->device] = item->result;
    }
    if (state.lost[item->device] != SUCCESS) {
        return;
    }
    switch (item->kind) {
    case WORK_COPY:
        memcpy(item->dst, item->src, item->bytes);
        break;
    case WORK_FILL:
        memset(item->dst, item->value, item->bytes);
        break;
    case WORK_EVENT:
        item->event->done = item->mark;
        break;
    case WORK_LAUNCH:
        if (item->dst != NULL) {
            ++*(uint64_t *)item->dst;
        }
        break;
    }
}

static void run_queue(void) {
    while (queue.first != NULL) {
        work *item = queue.first;
        perform(item);
        queue.first = item->next;
        free(item);
    }
    queue = (work_list){0};
}

/* What the driver does when it waits. */
static void drain(void) {
    pthread_mutex_lock(&mutex);
    run_queue();
    pthread_mutex_unlock(&mutex);
}

static CUresult submit(CUstream stream, work item) {
    CUresult result = SUCCESS;
    pthread_mutex_lock(&mutex);
    if (stream != NULL && stream->is_capturing) {
        if (stream->is_broken) {
            result = ERROR_CAPTURE_INVALIDATED;
        } else {
            append(&stream->captured, item);
        }
    } else {
        item.device = stack[depth - 1]->device;
        item.result = state.fail_work;
        state.fail_work = SUCCESS;
        append(&queue, item);
        if (!state.is_lazy) {
            run_queue();
        }
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

static void *host(CUdeviceptr data) {
    return (void *)(uintptr_t)data;
}

/* ---------------------------------------------------------------- driver and devices */

EXPORT CUresult cuInit(unsigned flags) {
    (void)flags;
    ENTER();
    if (state.init_result != SUCCESS) {
        return state.init_result;
    }
    for (int i = 0; i < 64; i++) {
        contexts[i].device = i;
    }
    is_initialised = true;
    init_pid = getpid();
    return SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    ENTER();
    *version = state.version;
    return SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == ERROR_OUT_OF_MEMORY         ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == ERROR_INVALID_VALUE       ? "CUDA_ERROR_INVALID_VALUE"
            : error == ERROR_INVALID_IMAGE       ? "CUDA_ERROR_INVALID_IMAGE"
            : error == ERROR_CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
            : error == 700                       ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                                 : "CUDA_ERROR_OTHER";
    return SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    (void)error;
    *text = "a sentence about it";
    return SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    ENTER();
    *count = state.num_devices;
    return is_initialised ? SUCCESS : ERROR_NOT_INITIALIZED;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER();
    *device = ordinal;
    return ordinal < state.num_devices ? SUCCESS : ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    ENTER();
    snprintf(name, (size_t)length, "Stub GPU %d", device);
    return SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    (void)device;
    ENTER();
    *value = attribute == 16   ? 132
             : attribute == 36 ? 2619000
             : attribute == 37 ? 5120
             : attribute == 38 ? 50 << 20
             : attribute == 75 ? state.arch / 10
             : attribute == 76 ? state.arch % 10
             : attribute == 97 ? 232448
                               : -1;
    return *value >= 0 ? SUCCESS : ERROR_INVALID_VALUE;
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    (void)device;
    ENTER();
    *bytes = (size_t)80 << 30;
    return SUCCESS;
}

EXPORT CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER_WITH_CONTEXT();
    *free_bytes = state.free_bytes;
    *total = (size_t)80 << 30;
    return SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER();
    NOT_IN_CAPTURE();
    *context = &contexts[device];
    return SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    (void)device;
    return SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER();
    if (depth == MAX_DEPTH) {
        return ERROR_INVALID_CONTEXT;
    }
    stack[depth++] = context;
    __atomic_add_fetch(&state.context_depth, 1, __ATOMIC_RELAXED);
    return SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER();
    if (depth == 0) {
        return ERROR_INVALID_CONTEXT;
    }
    *context = stack[--depth];
    __atomic_sub_fetch(&state.context_depth, 1, __ATOMIC_RELAXED);
    return SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER();
    *context = depth > 0 ? stack[depth - 1] : NULL;
    return SUCCESS;
}

EXPORT CUresult cuCtxSynchronize(void) {
    ENTER_WITH_CONTEXT();
    if (capturing_stream != NULL) { /* whatever the mode */
        capturing_stream->is_broken = true;
        state.num_invalidated++;
        return ERROR_CAPTURE_UNSUPPORTED;
    }
    state.num_context_syncs++;
    drain();
    return lost();
}

/* ---------------------------------------------------------------- code */

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER_WITH_CONTEXT();
    NOT_IN_CAPTURE();
    if (strncmp(image, "CUBIN ", 6) != 0 && strncmp(image, "PTX ", 4) != 0) {
        return ERROR_INVALID_IMAGE;
    }
    *module = calloc(1, sizeof **module);
    state.live_modules++;
    state.num_modules_loaded++;
    return SUCCESS;
}

EXPORT CUresult cuModuleUnload(CUmodule module) {
    ENTER();
    free(module);
    state.live_modules--;
    return SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    (void)module;
    ENTER_WITH_CONTEXT();
    if (strstr(name, "missing") != NULL) {
        return ERROR_NOT_FOUND;
    }
    struct CUfunc_st *made = calloc(1, sizeof *made);
    snprintf(made->name, sizeof made->name, "%s", name);
    pthread_mutex_lock(&mutex);
    made->next = functions;
    functions = made;
    pthread_mutex_unlock(&mutex);
    *function = made;
    return SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
    (void)function;
    ENTER();
    if (attribute == 8) {
        state.max_dynamic_shared = value;
    }
    return SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int *value, int attribute, CUfunction function) {
    (void)function;
    ENTER();
    static const int values[] = {256, 1024, 0, 0, 96};
    *value = attribute < 5 ? values[attribute] : 0;
    return SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function,
                                                            int threads, size_t shared_bytes) {
    (void)function;
    ENTER();
    *blocks = shared_bytes > 0 ? (int)(233472 / (shared_bytes + 1024)) : 2048 / threads;
    return SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const raddle_cu_launch_config *config, CUfunction function,
                                 void **params, void **extra) {
    ENTER_WITH_CONTEXT();
    if (config->grid_x == 0 || config->block_x == 0 || extra != NULL || params == NULL) {
        return ERROR_INVALID_VALUE;
    }
    stub_launch launch = {
        .grid = {config->grid_x, config->grid_y, config->grid_z},
        .block = {config->block_x, config->block_y, config->block_z},
        .shared_bytes = config->shared_bytes,
        .stream = config->stream,
        .num_attributes = (int)config->num_attributes,
    };
    for (unsigned i = 0; i < config->num_attributes && i < 4; i++) {
        launch.attribute_ids[i] = config->attributes[i].id;
        if (config->attributes[i].id == 4) {
            memcpy(launch.cluster, &config->attributes[i].value.cluster, sizeof launch.cluster);
        } else if (config->attributes[i].id == 6) {
            launch.programmatic = config->attributes[i].value.programmatic_stream_serialization;
        }
    }
    memcpy(launch.function, function->name, sizeof launch.function);
    work item = {.kind = WORK_LAUNCH};
    const bool is_counter = strcmp(function->name, "measure_count") == 0;
    memcpy(launch.params, params[0], is_counter ? sizeof item.dst : sizeof launch.params);
    if (is_counter) {
        memcpy(&item.dst, launch.params, sizeof item.dst);
    }
    pthread_mutex_lock(&mutex);
    state.launch = launch;
    state.num_launches++;
    pthread_mutex_unlock(&mutex);
    return submit(config->stream, item);
}

/* ---------------------------------------------------------------- memory */

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *data, size_t bytes) {
    ENTER_WITH_CONTEXT();
    NOT_IN_CAPTURE();
    void *block = NULL;
    if (bytes == 0 || bytes > state.free_bytes || posix_memalign(&block, 256, bytes) != 0) {
        return bytes == 0 ? ERROR_INVALID_VALUE : ERROR_OUT_OF_MEMORY;
    }
    memset(block, 0xA5, bytes);
    state.num_allocs++;
    state.live_allocs++;
    *data = (CUdeviceptr)(uintptr_t)block;
    return SUCCESS;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr data) {
    ENTER_TO_FREE();
    NOT_IN_CAPTURE();
    drain();
    free(host(data));
    state.live_allocs--;
    return lost();
}

EXPORT CUresult cuMemHostAlloc(void **data, size_t bytes, unsigned flags) {
    (void)flags;
    ENTER_WITH_CONTEXT();
    NOT_IN_CAPTURE();
    *data = malloc(bytes);
    state.live_host_allocs++;
    return SUCCESS;
}

EXPORT CUresult cuMemFreeHost(void *data) {
    ENTER_TO_FREE();
    NOT_IN_CAPTURE();
    free(data);
    state.live_host_allocs--;
    return lost();
}

static CUresult copy(void *dst, const void *src, size_t bytes, CUstream stream) {
    return submit(stream, (work){.kind = WORK_COPY, .dst = dst, .src = src, .bytes = bytes});
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    ENTER_WITH_CONTEXT();
    return copy(host(dst), host(src), bytes, stream);
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t bytes,
                                     CUstream stream) {
    ENTER_WITH_CONTEXT();
    return copy(host(dst), src, bytes, stream);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    ENTER_WITH_CONTEXT();
    return copy(dst, host(src), bytes, stream);
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr dst, CUdeviceptr src, size_t bytes,
                                     CUstream stream) {
    ENTER_WITH_CONTEXT();
    return copy(host(dst), host(src), bytes, stream);
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t bytes,
                                CUstream stream) {
    ENTER_WITH_CONTEXT();
    return submit(stream,
                  (work){.kind = WORK_FILL, .dst = host(dst), .bytes = bytes, .value = value});
}

/* ---------------------------------------------------------------- streams */

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    (void)flags;
    ENTER_WITH_CONTEXT();
    *stream = calloc(1, sizeof **stream);
    state.live_streams++;
    return SUCCESS;
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    (void)priority;
    return cuStreamCreate(stream, flags);
}

EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER();
    clear(&stream->captured);
    free(stream);
    state.live_streams--;
    return SUCCESS;
}

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
    ENTER_WITH_CONTEXT();
    if (stream != NULL && stream->is_capturing) {
        stream->is_broken = true;
        state.num_invalidated++;
        return ERROR_CAPTURE_UNSUPPORTED;
    }
    NOT_IN_CAPTURE();
    state.num_syncs++;
    drain();
    return lost();
}

EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    (void)flags;
    ENTER_WITH_CONTEXT();
    if (stream != NULL && stream->is_capturing && event->captured_on != stream) {
        stream->is_broken = true; /* an event from outside the capture */
        state.num_invalidated++;
        return ERROR_CAPTURE_UNJOINED;
    }
    state.num_stream_waits++;
    return SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, int *status) {
    ENTER();
    *status = stream == NULL || !stream->is_capturing ? 0 : stream->is_broken ? 2 : 1;
    return SUCCESS;
}

EXPORT CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER();
    const int old = capture_mode;
    capture_mode = *mode;
    *mode = old;
    return SUCCESS;
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) {
    (void)mode;
    ENTER_WITH_CONTEXT();
    if (stream == NULL || stream->is_capturing) {
        return ERROR_CAPTURE_UNSUPPORTED;
    }
    stream->is_capturing = true;
    stream->is_broken = false;
    capturing_stream = stream;
    return SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    CUresult injected = enter(__func__);
    const bool is_broken = stream->is_broken || injected != SUCCESS;
    stream->is_capturing = false;
    capturing_stream = NULL;
    if (is_broken) {
        clear(&stream->captured);
        *graph = NULL;
        return injected != SUCCESS ? injected : ERROR_CAPTURE_INVALIDATED;
    }
    *graph = calloc(1, sizeof **graph);
    (*graph)->nodes = stream->captured;
    stream->captured = (work_list){0};
    state.live_graphs++;
    state.last_graph_nodes = (*graph)->nodes.count;
    return SUCCESS;
}

/* ---------------------------------------------------------------- events */

EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags) {
    (void)flags;
    ENTER_WITH_CONTEXT();
    *event = calloc(1, sizeof **event);
    state.live_events++;
    return SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(CUevent event) {
    ENTER();
    drain(); /* a record of it may be queued */
    free(event);
    state.live_events--;
    return SUCCESS;
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER_WITH_CONTEXT();
    if (stream != NULL && stream->is_capturing) {
        event->captured_on = stream;
        return SUCCESS;
    }
    event->captured_on = NULL;
    event->recorded = ++num_records;
    return submit(stream, (work){.kind = WORK_EVENT, .event = event, .mark = event->recorded});
}

EXPORT CUresult cuEventQuery(CUevent event) {
    ENTER_WITH_CONTEXT();
    return event->done >= event->recorded ? SUCCESS : 600;
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    ENTER_WITH_CONTEXT();
    NOT_IN_CAPTURE();
    if (event->done < event->recorded) {
        state.num_event_syncs++;
        drain();
    }
    return lost();
}

EXPORT CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    (void)start, (void)end;
    *milliseconds = 0;
    return SUCCESS;
}

/* ---------------------------------------------------------------- graphs */

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph,
                                            unsigned long long flags) {
    (void)flags;
    ENTER();
    *exec = calloc(1, sizeof **exec);
    for (const work *item = graph->nodes.first; item != NULL; item = item->next) {
        append(&(*exec)->nodes, *item);
    }
    state.live_execs++;
    return SUCCESS;
}

EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    ENTER_WITH_CONTEXT();
    state.num_graph_launches++;
    for (const work *item = exec->nodes.first; item != NULL; item = item->next) {
        TRY(submit(stream, *item));
    }
    return SUCCESS;
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    ENTER();
    clear(&graph->nodes);
    free(graph);
    state.live_graphs--;
    return SUCCESS;
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
    ENTER();
    clear(&exec->nodes);
    free(exec);
    state.live_execs--;
    return SUCCESS;
}

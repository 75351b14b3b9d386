/* driver.h - libcuda, opened when the first CUDA tensor arrives; the little of its ABI that raddle
 * uses, declared here.
 *
 * Nothing links CUDA and no toolkit header is included. One list below names every symbol once. A
 * missing library or symbol is RADDLE_ERR_DEVICE with where it was looked for;
 * RADDLE_DISABLE_CUDA=1 makes it so on purpose. After a fork every call in the child fails with
 * RADDLE_ERR_DEVICE.
 */
#ifndef RADDLE_CUDA_DRIVER_H
#define RADDLE_CUDA_DRIVER_H

#include <stddef.h>

#include "base/status.h"

typedef int CUresult; /* 0 is success */
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
typedef unsigned long long CUdeviceptr;

typedef union raddle_cu_launch_value {
    char pad[64];
    int programmatic_stream_serialization;
    struct {
        unsigned x, y, z;
    } cluster;
} raddle_cu_launch_value;

typedef struct raddle_cu_launch_attribute {
    int id; /* 4 cluster dimension, 6 programmatic stream serialization */
    char pad[4];
    raddle_cu_launch_value value;
} raddle_cu_launch_attribute;

typedef struct raddle_cu_launch_config {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    CUstream stream;
    raddle_cu_launch_attribute *attributes;
    unsigned num_attributes;
} raddle_cu_launch_config;

/* X(result, member, symbol, arguments): member of raddle_cuda_driver, exported symbol. */
#define RADDLE_CUDA_SYMBOLS(X)                                                                     \
    X(init, "cuInit", (unsigned flags))                                                            \
    X(driver_get_version, "cuDriverGetVersion", (int *version))                                    \
    X(get_error_name, "cuGetErrorName", (CUresult error, const char **name))                       \
    X(get_error_string, "cuGetErrorString", (CUresult error, const char **text))                   \
    X(device_get_count, "cuDeviceGetCount", (int *count))                                          \
    X(device_get, "cuDeviceGet", (CUdevice * device, int ordinal))                                 \
    X(device_get_name, "cuDeviceGetName", (char *name, int length, CUdevice device))               \
    X(device_get_attribute, "cuDeviceGetAttribute", (int *value, int attribute, CUdevice device))  \
    X(device_total_mem, "cuDeviceTotalMem_v2", (size_t * bytes, CUdevice device))                  \
    X(mem_get_info, "cuMemGetInfo_v2", (size_t * free, size_t * total))                            \
    X(primary_ctx_retain, "cuDevicePrimaryCtxRetain", (CUcontext * context, CUdevice device))      \
    X(primary_ctx_release, "cuDevicePrimaryCtxRelease_v2", (CUdevice device))                      \
    X(ctx_push, "cuCtxPushCurrent_v2", (CUcontext context))                                        \
    X(ctx_pop, "cuCtxPopCurrent_v2", (CUcontext * context))                                        \
    X(ctx_get_current, "cuCtxGetCurrent", (CUcontext * context))                                   \
    X(ctx_synchronize, "cuCtxSynchronize", (void))                                                 \
    X(module_load_data, "cuModuleLoadData", (CUmodule * module, const void *image))                \
    X(module_unload, "cuModuleUnload", (CUmodule module))                                          \
    X(module_get_function, "cuModuleGetFunction",                                                  \
      (CUfunction * function, CUmodule module, const char *name))                                  \
    X(func_set_attribute, "cuFuncSetAttribute", (CUfunction function, int attribute, int value))   \
    X(func_get_attribute, "cuFuncGetAttribute", (int *value, int attribute, CUfunction function))  \
    X(occupancy, "cuOccupancyMaxActiveBlocksPerMultiprocessor",                                    \
      (int *blocks, CUfunction function, int block_threads, size_t shared_bytes))                  \
    X(launch_kernel_ex, "cuLaunchKernelEx",                                                        \
      (const raddle_cu_launch_config *config, CUfunction function, void **params, void **extra))   \
    X(mem_alloc, "cuMemAlloc_v2", (CUdeviceptr * data, size_t bytes))                              \
    X(mem_free, "cuMemFree_v2", (CUdeviceptr data))                                                \
    X(mem_host_alloc, "cuMemHostAlloc", (void **data, size_t bytes, unsigned flags))               \
    X(mem_free_host, "cuMemFreeHost", (void *data))                                                \
    X(memcpy_async, "cuMemcpyAsync",                                                               \
      (CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream))                           \
    X(memcpy_htod_async, "cuMemcpyHtoDAsync_v2",                                                   \
      (CUdeviceptr dst, const void *src, size_t bytes, CUstream stream))                           \
    X(memcpy_dtoh_async, "cuMemcpyDtoHAsync_v2",                                                   \
      (void *dst, CUdeviceptr src, size_t bytes, CUstream stream))                                 \
    X(memcpy_dtod_async, "cuMemcpyDtoDAsync_v2",                                                   \
      (CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream))                           \
    X(memset_d8_async, "cuMemsetD8Async",                                                          \
      (CUdeviceptr dst, unsigned char value, size_t bytes, CUstream stream))                       \
    X(stream_create, "cuStreamCreate", (CUstream * stream, unsigned flags))                        \
    X(stream_create_with_priority, "cuStreamCreateWithPriority",                                   \
      (CUstream * stream, unsigned flags, int priority))                                           \
    X(stream_destroy, "cuStreamDestroy_v2", (CUstream stream))                                     \
    X(stream_synchronize, "cuStreamSynchronize", (CUstream stream))                                \
    X(stream_wait_event, "cuStreamWaitEvent", (CUstream stream, CUevent event, unsigned flags))    \
    X(stream_is_capturing, "cuStreamIsCapturing", (CUstream stream, int *status))                  \
    X(thread_exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", (int *mode))              \
    X(stream_begin_capture, "cuStreamBeginCapture_v2", (CUstream stream, int mode))                \
    X(stream_end_capture, "cuStreamEndCapture", (CUstream stream, CUgraph * graph))                \
    X(event_create, "cuEventCreate", (CUevent * event, unsigned flags))                            \
    X(event_destroy, "cuEventDestroy_v2", (CUevent event))                                         \
    X(event_record, "cuEventRecord", (CUevent event, CUstream stream))                             \
    X(event_query, "cuEventQuery", (CUevent event))                                                \
    X(event_synchronize, "cuEventSynchronize", (CUevent event))                                    \
    X(event_elapsed, "cuEventElapsedTime", (float *milliseconds, CUevent start, CUevent end))      \
    X(graph_instantiate, "cuGraphInstantiateWithFlags",                                            \
      (CUgraphExec * exec, CUgraph graph, unsigned long long flags))                               \
    X(graph_launch, "cuGraphLaunch", (CUgraphExec exec, CUstream stream))                          \
    X(graph_destroy, "cuGraphDestroy", (CUgraph graph))                                            \
    X(graph_exec_destroy, "cuGraphExecDestroy", (CUgraphExec exec))

typedef struct raddle_cuda_driver {
#define RADDLE_DECLARE(member, symbol, arguments) CUresult(*member) arguments;
    RADDLE_CUDA_SYMBOLS(RADDLE_DECLARE)
#undef RADDLE_DECLARE
    int version; /* 13000 for CUDA 13.0 */
    const char *path;
} raddle_cuda_driver;

/* Opens the library and initialises it at first use; the same answer ever after. */
raddle_status raddle_cuda_driver_get(const raddle_cuda_driver **out_driver);
/* Version of the driver as in raddle_cuda_driver, without initialising it; 0 when there is none. */
int raddle_cuda_driver_version(void);
/* RADDLE_OK, or RADDLE_ERR_CUDA with what was being done and the driver's name and sentence for
 * result. What a stream capture forbids is RADDLE_ERR_STATE. The failure of work that was queued
 * before is RADDLE_ERR_CUDA_ASYNC, whichever call the driver answers with it. */
raddle_status raddle_cuda_check(CUresult result, const char *doing);
/* RADDLE_ERR_DEVICE in a child of a process that had used CUDA. A flag: no system call. */
raddle_status raddle_cuda_check_fork(void);

/* Between the two, calls that a capture of this or another thread would forbid (allocating,
 * freeing, loading code) are let through and not captured; they do not disturb it. */
int raddle_cuda_relax_capture(const raddle_cuda_driver *driver);
void raddle_cuda_restore_capture(const raddle_cuda_driver *driver, int mode);

/* Whether this thread is between begin and end of a graph of raddle's own: what would allocate,
 * wait or compile is then refused by RADDLE_ERR_STATE before it reaches the driver. */
void raddle_cuda_set_capturing(bool capturing);
bool raddle_cuda_is_thread_capturing(void);
raddle_status raddle_cuda_refuse_capture(const char *doing);

#endif

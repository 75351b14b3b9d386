/* py_system.c - facts for doctor, the kernel cache, and compiling ahead of time; and how the
 * notices of the C core become Python warnings.
 *
 * Everything here is positional: words and docstrings live in
 * python/raddle/{doctor,cache,warmup}.py.
 */
#include "python/module.h"

#include "attention/attention.h"
#include "base/alloc.h"
#include "base/threads.h"
#include "ops/ops.h"
#include "runtime/system.h"

enum { CONFIG_BYTES = 1024, NOTICE_BYTES = 512, KERNEL_NAME_BYTES = 64 };

/* ------------------------------------------------------------------ facts */

static PyObject *get_settings(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const raddle_system_settings settings = raddle_system_get_settings();
    const char *bad_threads = raddle_threads_bad_setting();
    return Py_BuildValue("{s:s,s:i,s:O,s:O,s:s,s:i,s:z}", "cache_dir", settings.cache_dir, "log",
                         settings.log_level, "check", settings.check ? Py_True : Py_False,
                         "disable_cuda", settings.disable_cuda ? Py_True : Py_False, "cpu_isa",
                         raddle_system_cpu_isa(), "cpu_threads", raddle_threads_count(),
                         "bad_threads_setting", bad_threads);
}

static PyObject *get_driver(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    int version = 0;
    const char *path = NULL;
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_get_driver(&version, &path);
    Py_END_ALLOW_THREADS;
    return status == RADDLE_OK ? Py_BuildValue("(is)", version, path) : raddle_raise(status);
}

static PyObject *count_gpus(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    int count = 0;
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_count_gpus(&count);
    Py_END_ALLOW_THREADS;
    return status == RADDLE_OK ? PyLong_FromLong(count) : raddle_raise(status);
}

static PyObject *get_gpu(PyObject *module, PyObject *argument) {
    (void)module;
    const int index = (int)PyLong_AsLong(argument);
    raddle_system_gpu gpu;
    raddle_status status;
    if (index == -1 && PyErr_Occurred()) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_get_gpu(index, &gpu);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    return Py_BuildValue("{s:s,s:i,s:i,s:i,s:n,s:n,s:s}", "name", gpu.name, "arch", gpu.arch,
                         "num_sms", gpu.num_sms, "shared_bytes", gpu.shared_bytes, "memory_bytes",
                         (Py_ssize_t)gpu.memory_bytes, "free_bytes", (Py_ssize_t)gpu.free_bytes,
                         "kernel_arch", gpu.kernel_arch);
}

static PyObject *get_nvrtc(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    raddle_system_nvrtc nvrtc;
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_get_nvrtc(&nvrtc);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    PyObject *archs = PyTuple_New(nvrtc.num_archs);
    for (int i = 0; archs != NULL && i < nvrtc.num_archs; i++) {
        PyObject *arch = PyLong_FromLong(nvrtc.archs[i]);
        if (arch == NULL) {
            Py_CLEAR(archs);
        } else {
            PyTuple_SET_ITEM(archs, i, arch);
        }
    }
    return archs != NULL ? Py_BuildValue("(siN)", nvrtc.path, nvrtc.version, archs) : NULL;
}

static PyObject *get_blas(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    int version = 0;
    const char *path = NULL;
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_get_blas(&version, &path);
    Py_END_ALLOW_THREADS;
    return status == RADDLE_OK ? Py_BuildValue("(si)", path, version) : raddle_raise(status);
}

static PyObject *get_nvrtc_cure(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(raddle_system_nvrtc_cure());
}

static PyObject *get_notices(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    char text[NOTICE_BYTES];
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && raddle_system_get_notice(i, text, sizeof text); i++) {
        PyObject *notice = PyUnicode_DecodeFSDefault(text);
        if (notice == NULL || PyList_Append(list, notice) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(notice);
    }
    return list;
}

int raddle_py_warn_notices(void) {
    static int num_warned; /* guarded by the GIL */
    char text[NOTICE_BYTES];
    while (raddle_system_get_notice(num_warned, text, sizeof text)) {
        num_warned++;
        if (PyErr_WarnEx(PyExc_RuntimeWarning, text, 1) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ kernels */

/* One family's declared configs, in one shape for all. */
typedef struct config_family {
    int (*count)(void);
    raddle_status (*get)(int index, const char **out_name, char *out_config, size_t config_bytes,
                         bool *out_hopper_only);
} config_family;

static raddle_status get_ops_config(int index, const char **out_name, char *out_config,
                                    size_t config_bytes, bool *out_hopper_only) {
    *out_hopper_only = false;
    return raddle_ops_kernel_config(index, out_name, out_config, config_bytes);
}

static const char *const measure_kernels[] = {"measure/measure_read", "measure/measure_count"};

static int count_measure_configs(void) {
    return (int)(sizeof measure_kernels / sizeof *measure_kernels);
}

static raddle_status get_measure_config(int index, const char **out_name, char *out_config,
                                        size_t config_bytes, bool *out_hopper_only) {
    (void)config_bytes;
    *out_name = measure_kernels[index];
    out_config[0] = '\0';
    *out_hopper_only = false;
    return RADDLE_OK;
}

static const config_family config_families[] = {
    {raddle_attention_num_kernel_configs, raddle_attention_kernel_config},
    {raddle_ops_num_kernel_configs, get_ops_config},
    {count_measure_configs, get_measure_config},
};

static int append_config(PyObject *list, const config_family *family, int index) {
    char config[CONFIG_BYTES];
    const char *name = NULL;
    bool hopper_only = false;
    raddle_status status = family->get(index, &name, config, sizeof config, &hopper_only);
    if (status != RADDLE_OK) {
        raddle_raise(status);
        return -1;
    }
    PyObject *row = Py_BuildValue("(ssO)", name, config, hopper_only ? Py_True : Py_False);
    const int failed = row == NULL || PyList_Append(list, row) < 0;
    Py_XDECREF(row);
    return failed ? -1 : 0;
}

static PyObject *get_kernel_configs(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    for (size_t f = 0; f < sizeof config_families / sizeof *config_families; f++) {
        const int count = config_families[f].count();
        for (int i = 0; list != NULL && i < count; i++) {
            if (append_config(list, &config_families[f], i) < 0) {
                Py_CLEAR(list);
            }
        }
    }
    return list;
}

static PyObject *compile_kernel(PyObject *module, PyObject *args) {
    (void)module;
    raddle_kernel_request request;
    void *image = NULL;
    size_t bytes = 0;
    char *log = NULL;
    raddle_status status;
    if (!PyArg_ParseTuple(args, "sss:compile_kernel", &request.name, &request.config,
                          &request.arch)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_compile(&request, &image, &bytes, &log);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    PyObject *result = Py_BuildValue("(y#s)", (const char *)image, (Py_ssize_t)bytes, log);
    raddle_free(image);
    raddle_free(log);
    return result;
}

static PyObject *parse_compile_log(PyObject *module, PyObject *argument) {
    (void)module;
    raddle_system_report report;
    const char *log = PyUnicode_AsUTF8(argument);
    if (log == NULL) {
        return NULL;
    }
    raddle_system_parse_log(log, &report);
    return Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i}", "registers", report.registers, "stack_bytes",
                         report.stack_bytes, "spill_store_bytes", report.spill_store_bytes,
                         "spill_load_bytes", report.spill_load_bytes, "serialised",
                         report.num_serialised, "local_memory", report.num_local);
}

static PyObject *warm_kernel(PyObject *module, PyObject *args) {
    (void)module;
    raddle_kernel_request request;
    const char *origin = NULL;
    raddle_status status;
    if (!PyArg_ParseTuple(args, "sss:warm_kernel", &request.name, &request.config, &request.arch)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_warm(&request, &origin);
    Py_END_ALLOW_THREADS;
    return status == RADDLE_OK ? PyUnicode_FromString(origin) : raddle_raise(status);
}

/* ------------------------------------------------------------------ bundles and the cache */

/* rows: a tuple of (name, config, arch); the strings stay theirs. */
static int parse_requests(PyObject *rows, raddle_kernel_request *requests) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(rows); i++) {
        PyObject *row = PyTuple_GET_ITEM(rows, i);
        if (!PyTuple_Check(row)) {
            PyErr_SetString(PyExc_TypeError, "write_bundle: expected tuples (name, config, arch)");
            return -1;
        }
        if (!PyArg_ParseTuple(row, "sss:write_bundle", &requests[i].name, &requests[i].config,
                              &requests[i].arch)) {
            return -1;
        }
    }
    return 0;
}

static PyObject *write_bundle(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *path = NULL, *rows = NULL;
    if (!PyArg_ParseTuple(args, "O&O!:write_bundle", PyUnicode_FSConverter, &path, &PyTuple_Type,
                          &rows)) {
        Py_XDECREF(path);
        return NULL;
    }
    const int count = (int)PyTuple_GET_SIZE(rows);
    raddle_kernel_request *requests = raddle_alloc((size_t)count * sizeof *requests);
    raddle_status status = RADDLE_OK;
    PyObject *result = NULL;
    if (requests == NULL) {
        PyErr_NoMemory();
    } else if (parse_requests(rows, requests) == 0) {
        Py_BEGIN_ALLOW_THREADS;
        status = raddle_system_write_bundle(PyBytes_AS_STRING(path), requests, count);
        Py_END_ALLOW_THREADS;
        result = status == RADDLE_OK ? Py_NewRef(Py_None) : raddle_raise(status);
    }
    raddle_free(requests);
    Py_DECREF(path);
    return result;
}

static PyObject *load_bundle(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *path = NULL;
    int to_disk = 0, num_kernels = 0;
    raddle_status status;
    if (!PyArg_ParseTuple(args, "O&p:load_bundle", PyUnicode_FSConverter, &path, &to_disk)) {
        Py_XDECREF(path);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_load_bundle(PyBytes_AS_STRING(path), to_disk != 0, &num_kernels);
    Py_END_ALLOW_THREADS;
    Py_DECREF(path);
    return status == RADDLE_OK ? PyLong_FromLong(num_kernels) : raddle_raise(status);
}

static PyObject *cache_row(raddle_status status, const raddle_system_cache *cache) {
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    return Py_BuildValue("{s:L,s:L,s:L}", "files", (long long)cache->num_files, "bytes",
                         (long long)cache->num_bytes, "damaged", (long long)cache->num_damaged);
}

static PyObject *measure_cache(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    raddle_system_cache cache;
    return cache_row(raddle_system_measure_cache(&cache), &cache);
}

static PyObject *verify_cache(PyObject *module, PyObject *argument) {
    (void)module;
    raddle_system_cache cache;
    raddle_status status;
    const int remove_damaged = PyObject_IsTrue(argument);
    if (remove_damaged < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_verify_cache(remove_damaged != 0, &cache);
    Py_END_ALLOW_THREADS;
    return cache_row(status, &cache);
}

static PyObject *clear_cache(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    int64_t num_removed = 0;
    raddle_status status = raddle_system_clear_cache(&num_removed);
    return status == RADDLE_OK ? PyLong_FromLongLong(num_removed) : raddle_raise(status);
}

/* ------------------------------------------------------------------ counters */

static PyObject *count_launches(PyObject *module, PyObject *argument) {
    (void)module;
    raddle_status status;
    const int on = PyObject_IsTrue(argument);
    if (on < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_count_launches(on != 0);
    Py_END_ALLOW_THREADS;
    return status == RADDLE_OK ? Py_NewRef(Py_None) : raddle_raise(status);
}

/* Kernels that were launched. */
static PyObject *counters_dict(const uint64_t *launches, int num_counters) {
    char name[KERNEL_NAME_BYTES];
    PyObject *dict = PyDict_New();
    for (int i = 0; dict != NULL && i < num_counters; i++) {
        if (launches[i] == 0) {
            continue;
        }
        raddle_system_counter_name(i, name, sizeof name);
        PyObject *count = PyLong_FromUnsignedLongLong(launches[i]);
        if (count == NULL || PyDict_SetItemString(dict, name, count) < 0) {
            Py_CLEAR(dict);
        }
        Py_XDECREF(count);
    }
    return dict;
}

static PyObject *launch_counts(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const int num_counters = raddle_system_num_counters();
    uint64_t *launches = PyMem_Calloc((size_t)num_counters, sizeof *launches);
    raddle_status status;
    if (launches == NULL) {
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_system_read_counters(launches);
    Py_END_ALLOW_THREADS;
    PyObject *result =
        status == RADDLE_OK ? counters_dict(launches, num_counters) : raddle_raise(status);
    PyMem_Free(launches);
    return result;
}

/* ------------------------------------------------------------------ module */

static PyMethodDef functions[] = {
    {"settings", get_settings, METH_NOARGS, "settings()\n--\n\nEnvironment and CPU back end."},
    {"driver_info", get_driver, METH_NOARGS, "driver_info()\n--\n\n(version, path) of libcuda."},
    {"gpu_count", count_gpus, METH_NOARGS, "gpu_count()\n--\n\nGPUs that the driver shows."},
    {"gpu_info", get_gpu, METH_O, "gpu_info(index, /)\n--\n\nName, limits and memory of a GPU."},
    {"nvrtc_info", get_nvrtc, METH_NOARGS, "nvrtc_info()\n--\n\n(path, version, archs)."},
    {"blas_info", get_blas, METH_NOARGS, "blas_info()\n--\n\n(path, version) of cublasLt."},
    {"nvrtc_cure", get_nvrtc_cure, METH_NOARGS, "nvrtc_cure()\n--\n\nThe pip line for NVRTC."},
    {"notices", get_notices, METH_NOARGS, "notices()\n--\n\nWhat went wrong without an error."},
    {"kernel_configs", get_kernel_configs, METH_NOARGS,
     "kernel_configs()\n--\n\nDeclared kernels: [(name, config, hopper_only)]."},
    {"compile_kernel", compile_kernel, METH_VARARGS,
     "compile_kernel(name, config, arch, /)\n--\n\n(image, log), past the caches."},
    {"parse_compile_log", parse_compile_log, METH_O,
     "parse_compile_log(log, /)\n--\n\nRegisters, spills and warnings of a log."},
    {"warm_kernel", warm_kernel, METH_VARARGS,
     "warm_kernel(name, config, arch, /)\n--\n\n\"compiled\", \"disk\" or \"bundle\"."},
    {"write_bundle", write_bundle, METH_VARARGS,
     "write_bundle(path, kernels, /)\n--\n\nkernels: tuple of (name, config, arch)."},
    {"load_bundle", load_bundle, METH_VARARGS,
     "load_bundle(path, to_disk, /)\n--\n\nNumber of kernels."},
    {"cache_measure", measure_cache, METH_NOARGS, "cache_measure()\n--\n\nFiles and bytes."},
    {"cache_verify", verify_cache, METH_O, "cache_verify(remove_damaged, /)\n--\n\nReads all."},
    {"cache_clear", clear_cache, METH_NOARGS, "cache_clear()\n--\n\nNumber of files removed."},
    {"count_launches", count_launches, METH_O,
     "count_launches(on, /)\n--\n\nOn: count launches of kernels on the GPUs, from 0."},
    {"launch_counts", launch_counts, METH_NOARGS,
     "launch_counts()\n--\n\nKernel name -> launches; waits for the GPUs."},
    {NULL, NULL, 0, NULL},
};

/* CUDA wheels lie beside other packages: sys.path says where, without a look at the disk. */
static int note_library_roots(void) {
    PyObject *path = PySys_GetObject("path"); /* borrowed */
    for (Py_ssize_t i = 0; path != NULL && PyList_Check(path) && i < PyList_GET_SIZE(path); i++) {
        PyObject *entry = PyList_GET_ITEM(path, i);
        const char *folder = PyUnicode_Check(entry) ? PyUnicode_AsUTF8(entry) : NULL;
        if (folder != NULL) {
            raddle_system_add_library_root(folder);
        } else {
            PyErr_Clear(); /* not text: no folder of packages */
        }
    }
    return 0;
}

int raddle_py_add_system(PyObject *module) {
    return note_library_roots() < 0 ? -1 : PyModule_AddFunctions(module, functions);
}

/* tensor_arg.c - the tensor boundary: finds the door for a Python object, opens it, and lets go
 * again.
 *
 * The door is looked up once per exact type and remembered. Own tensors are read directly. An exact
 * numpy.ndarray goes through NumPy's C API (the only file that includes it, loaded when the first
 * array arrives). Types with a DLPack exchange table lend a view without any Python call.
 * Everything else is asked for a capsule by __dlpack__.
 *
 * A borrowed view carries no flags, so a table whose tensors may be read-only is asked for the
 * owned form when the call wants to write.
 */
#include "python/tensor_arg.h"

#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <numpy/arrayobject.h>

#include "base/dlpack.h"
#include "python/module.h"
#include "python/py_runtime.h"
#include "python/py_tensor.h"
#include "python/tensor_door.h"
#include "runtime/graph.h"

/* ---------------------------------------------------------------- numpy */

/* NumPy's API table, loaded when a type looks like an array and never before. */
int raddle_is_exact_ndarray(const PyTypeObject *type) {
    if (strcmp(type->tp_name, "numpy.ndarray") != 0) {
        return 0;
    }
    if (PyArray_API == NULL && _import_array() < 0) {
        return -1;
    }
    return type == &PyArray_Type;
}

PyObject *raddle_new_ndarray(const int64_t *shape, int ndim, raddle_dtype dtype) {
    static const int numbers[RADDLE_DTYPE_COUNT] = {
        [RADDLE_F32] = NPY_FLOAT32,   [RADDLE_F16] = NPY_FLOAT16,   [RADDLE_BF16] = NPY_UINT16,
        [RADDLE_F8_E4M3] = NPY_UINT8, [RADDLE_F8_E5M2] = NPY_UINT8, [RADDLE_I8] = NPY_INT8,
        [RADDLE_U8] = NPY_UINT8,      [RADDLE_BOOL] = NPY_BOOL,     [RADDLE_I16] = NPY_INT16,
        [RADDLE_U16] = NPY_UINT16,    [RADDLE_I32] = NPY_INT32,     [RADDLE_U32] = NPY_UINT32,
        [RADDLE_I64] = NPY_INT64,     [RADDLE_U64] = NPY_UINT64,    [RADDLE_F64] = NPY_FLOAT64,
    };
    npy_intp extents[RADDLE_MAX_DIM] = {0};
    for (int i = 0; i < ndim; i++) {
        extents[i] = (npy_intp)shape[i];
    }
    return PyArray_SimpleNew(ndim, extents, numbers[dtype]);
}

/* ---------------------------------------------------------------- releasing */

/* Deleters run Python code; an exception that is on its way must survive them. */
static void release_managed(void *managed, int versioned) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (versioned) {
        DLManagedTensorVersioned *tensor = managed;
        if (tensor->deleter) {
            tensor->deleter(tensor);
        }
    } else {
        DLManagedTensor *tensor = managed;
        if (tensor->deleter) {
            tensor->deleter(tensor);
        }
    }
    PyErr_Restore(type, value, traceback);
}

/* The producer raised: say which argument it was about, keep its exception as the cause. Only
 * ordinary exceptions are wrapped: KeyboardInterrupt, MemoryError and our own pass. */
static int fail_from_producer(const char *name, const char *what) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (type == NULL) {
        raddle_raise(raddle_fail(RADDLE_ERR_VALUE, "%s: %s failed without saying why", name, what));
        return -1;
    }
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback) {
        PyException_SetTraceback(value, traceback);
    }
    if (!PyErr_GivenExceptionMatches(type, PyExc_Exception) ||
        PyErr_GivenExceptionMatches(type, PyExc_MemoryError)) {
        PyErr_Restore(type, value, traceback);
        return -1;
    }
    PyObject *text = PyObject_Str(value);
    const char *words = text ? PyUnicode_AsUTF8(text) : NULL;
    PyErr_Clear();
    const int length = words ? (int)strcspn(words, "\n") : 0; /* torch adds its C++ stack */
    raddle_raise(raddle_fail(RADDLE_ERR_VALUE, "%s: %s failed: %s: %.*s", name, what,
                             ((PyTypeObject *)type)->tp_name, length < 400 ? length : 400,
                             words ? words : ""));
    Py_XDECREF(text);

    PyObject *our_type, *our_value, *our_traceback;
    PyErr_Fetch(&our_type, &our_value, &our_traceback);
    PyErr_NormalizeException(&our_type, &our_value, &our_traceback);
    PyException_SetCause(our_value, value); /* steals value */
    PyErr_Restore(our_type, our_value, our_traceback);
    Py_DECREF(type);
    Py_XDECREF(traceback);
    return -1;
}

/* ---------------------------------------------------------------- the doors */

static int fill_from_dlpack(const DLTensor *dl, uint64_t flags, const char *name,
                            raddle_dtype dtype, raddle_tensor_arg *arg) {
    const raddle_status status = raddle_tensor_from_dlpack(dl, flags, name, dtype, &arg->tensor);
    if (status != RADDLE_OK) {
        raddle_raise(status);
        return -1;
    }
    return 0;
}

static int take_versioned(DLManagedTensorVersioned *managed, const char *name, raddle_dtype dtype,
                          raddle_tensor_arg *arg) {
    arg->managed = managed;
    arg->managed_versioned = 1;
    if (managed->version.major != DLPACK_MAJOR_VERSION) {
        raddle_raise(raddle_fail(RADDLE_ERR_UNSUPPORTED,
                                 "%s: its producer speaks DLPack %u.%u, raddle understands %d.x",
                                 name, (unsigned)managed->version.major,
                                 (unsigned)managed->version.minor, DLPACK_MAJOR_VERSION));
        return -1;
    }
    return fill_from_dlpack(&managed->dl_tensor, managed->flags, name, dtype, arg);
}

static int open_table(const raddle_tensor_type *entry, PyObject *object, const char *name,
                      raddle_dtype dtype, bool owned, raddle_tensor_arg *arg) {
    const DLPackExchangeAPI *table = entry->table;
    if (!table->managed_tensor_from_py_object_no_sync ||
        (!owned && table->dltensor_from_py_object_no_sync)) {
        DLTensor view = {0};
        if (table->dltensor_from_py_object_no_sync(object, &view) != 0) {
            return fail_from_producer(name, "its DLPack export");
        }
        if (fill_from_dlpack(&view, 0, name, dtype, arg) < 0) {
            return -1;
        }
    } else {
        DLManagedTensorVersioned *managed = NULL;
        if (table->managed_tensor_from_py_object_no_sync(object, &managed) != 0 || !managed) {
            return fail_from_producer(name, "its DLPack export");
        }
        if (take_versioned(managed, name, dtype, arg) < 0) {
            return -1;
        }
    }
    if (arg->tensor.device.type == RADDLE_CUDA && table->current_work_stream) {
        if (table->current_work_stream(kDLCUDA, arg->tensor.device.index, &arg->stream) != 0) {
            return fail_from_producer(name, "asking its producer for the current stream");
        }
        arg->has_stream = 1;
    }
    return 0;
}

static raddle_dtype numpy_dtype(PyArrayObject *array, bool raw_ok) {
    static const raddle_dtype ints[] = {RADDLE_I8, RADDLE_I16, RADDLE_I32, RADDLE_I64};
    static const raddle_dtype uints[] = {RADDLE_U8, RADDLE_U16, RADDLE_U32, RADDLE_U64};
    const int size = (int)PyArray_ITEMSIZE(array);
    const int log2_size = size == 8 ? 3 : size == 4 ? 2 : size == 2 ? 1 : 0;
    const int number = PyArray_TYPE(array);
    switch (number) {
    case NPY_FLOAT:
        return RADDLE_F32;
    case NPY_HALF:
        return RADDLE_F16;
    case NPY_DOUBLE:
        return RADDLE_F64;
    case NPY_BOOL:
        return RADDLE_BOOL;
    case NPY_BYTE:
    case NPY_SHORT:
    case NPY_INT:
    case NPY_LONG:
    case NPY_LONGLONG:
        return ints[log2_size];
    case NPY_UBYTE:
    case NPY_USHORT:
    case NPY_UINT:
    case NPY_ULONG:
    case NPY_ULONGLONG:
        return uints[log2_size];
    case NPY_VOID: /* what np.load makes of a bfloat16 or fp8 file: bits, if the caller says what
                      they mean */
        if (raw_ok && !PyDataType_HASFIELDS(PyArray_DESCR(array)) && (size == 1 || size == 2)) {
            return uints[log2_size];
        }
        return RADDLE_DTYPE_NONE;
    default:
        break;
    }
    if (PyTypeNum_ISUSERDEF(number)) { /* ml_dtypes: bfloat16, float8_e4m3fn, float8_e5m2 */
        const char *type_name = PyArray_DESCR(array)->typeobj->tp_name;
        const char *dot = strrchr(type_name, '.');
        const raddle_dtype dtype = raddle_dtype_from_name(dot ? dot + 1 : type_name);
        if (dtype != RADDLE_DTYPE_NONE && raddle_dtype_bytes(dtype) == (size_t)size) {
            return dtype;
        }
    }
    return RADDLE_DTYPE_NONE;
}

static raddle_status refuse_numpy_dtype(PyArrayObject *array, const char *name) {
    PyObject *text = PyObject_Str((PyObject *)PyArray_DESCR(array));
    const char *words = text ? PyUnicode_AsUTF8(text) : NULL;
    const raddle_status status = raddle_fail(
        RADDLE_ERR_DTYPE, "%s: NumPy dtype %s is not supported", name, words ? words : "?");
    PyErr_Clear();
    Py_XDECREF(text);
    return status;
}

static raddle_status view_numpy(PyArrayObject *array, const char *name, raddle_dtype dtype,
                                raddle_tensor *tensor) {
    const int ndim = PyArray_NDIM(array);
    tensor->name = name;
    tensor->data = PyArray_DATA(array);
    tensor->device = (raddle_device){RADDLE_CPU, 0};
    tensor->read_only = !PyArray_ISWRITEABLE(array);
    RADDLE_REQUIRE(PyArray_ISNOTSWAPPED(array), RADDLE_ERR_DTYPE,
                   "%s: its bytes are in the other byte order; convert it with astype first", name);
    const raddle_dtype stored = numpy_dtype(array, dtype != RADDLE_DTYPE_NONE);
    if (stored == RADDLE_DTYPE_NONE) {
        return refuse_numpy_dtype(array, name);
    }
    RADDLE_TRY(raddle_dtype_resolve(name, stored, dtype, &tensor->dtype));
    RADDLE_REQUIRE(ndim <= RADDLE_MAX_DIM, RADDLE_ERR_SHAPE,
                   "%s: expected at most %d dimensions, got %d", name, (int)RADDLE_MAX_DIM, ndim);
    tensor->ndim = ndim;
    const int64_t item = (int64_t)raddle_dtype_bytes(stored); /* a power of two: masks and shifts */
    const int shift = __builtin_ctzll((unsigned long long)item);
    for (int i = 0; i < ndim; i++) {
        const int64_t bytes = (int64_t)PyArray_STRIDE(array, i);
        tensor->shape[i] = (int64_t)PyArray_DIM(array, i);
        RADDLE_REQUIRE((bytes & (item - 1)) == 0 || tensor->shape[i] <= 1, RADDLE_ERR_SHAPE,
                       "%s: the stride of %lld bytes in dimension %d is no multiple of the "
                       "element size %lld; pass a copy",
                       name, (long long)bytes, i, (long long)item);
        tensor->stride[i] = bytes >> shift; /* arithmetic: rounds down, exact here */
    }
    return raddle_tensor_check_layout(tensor);
}

/* New reference to what to ask for a capsule: torch refuses those that require grad, under no_grad
 * too. */
static PyObject *exportable(PyObject *object) {
    PyObject *flag = PyObject_GetAttrString(object, "requires_grad");
    if (!flag) {
        PyErr_Clear();
        return Py_NewRef(object);
    }
    const int requires_grad = PyObject_IsTrue(flag);
    Py_DECREF(flag);
    if (requires_grad < 0) {
        return NULL;
    }
    return requires_grad ? PyObject_CallMethod(object, "detach", NULL) : Py_NewRef(object);
}

/* Device from __dlpack_device__; out_type 0 when the producer has no such method. */
static int ask_device(PyObject *object, int *out_type) {
    *out_type = 0;
    PyObject *pair = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (!pair) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    PyObject *type = PySequence_GetItem(pair, 0);
    const long value = type ? PyLong_AsLong(type) : -1;
    Py_XDECREF(type);
    Py_DECREF(pair);
    if (value == -1 && PyErr_Occurred()) {
        return -1;
    }
    *out_type = (int)value;
    return 0;
}

/* stream=-1 asks for no synchronisation: we launch on the producer's stream. Host tensors get no
 * stream argument, which some producers refuse. */
static PyObject *call_dlpack(PyObject *source, bool cuda, bool legacy) {
    PyObject *result = NULL;
    PyObject *method = PyObject_GetAttrString(source, "__dlpack__");
    PyObject *none = PyTuple_New(0);
    PyObject *keywords = PyDict_New();
    PyObject *stream = cuda ? PyLong_FromLong(-1) : NULL;
    PyObject *version =
        legacy ? NULL : Py_BuildValue("(ii)", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
    if (!method || !none || !keywords || (cuda && !stream) || (!legacy && !version)) {
        goto out;
    }
    if (stream && PyDict_SetItemString(keywords, "stream", stream) < 0) {
        goto out;
    }
    if (version && PyDict_SetItemString(keywords, "max_version", version) < 0) {
        goto out;
    }
    result = PyObject_Call(method, none, keywords);
out:
    Py_XDECREF(version);
    Py_XDECREF(stream);
    Py_XDECREF(keywords);
    Py_XDECREF(none);
    Py_XDECREF(method);
    return result;
}

/* What the producer's current stream is, for the two that can be asked without a table. */
static int ask_stream(const raddle_tensor_type *entry, const char *name, raddle_tensor_arg *arg) {
    PyObject *stream = NULL, *handle = NULL;
    PyObject *cuda = raddle_loaded_attribute(entry->is_torch ? "torch" : "cupy", "cuda");
    if (!cuda) {
        return 0;
    }
    if (entry->is_torch) {
        stream = PyObject_CallMethod(cuda, "current_stream", "i", (int)arg->tensor.device.index);
        handle = stream ? PyObject_GetAttrString(stream, "cuda_stream") : NULL;
    } else {
        stream = PyObject_CallMethod(cuda, "get_current_stream", NULL);
        handle = stream ? PyObject_GetAttrString(stream, "ptr") : NULL;
    }
    arg->stream = handle ? PyLong_AsVoidPtr(handle) : NULL;
    const bool failed = !handle || PyErr_Occurred();
    Py_XDECREF(handle);
    Py_XDECREF(stream);
    Py_DECREF(cuda);
    if (failed) {
        return fail_from_producer(name, "asking its producer for the current stream");
    }
    arg->has_stream = 1;
    return 0;
}

/* Takes the content out of a capsule and marks it used, so that its own destructor leaves it to us.
 */
static int take_capsule(PyObject *capsule, const char *name, raddle_dtype dtype,
                        raddle_tensor_arg *arg) {
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) {
            return -1;
        }
        return take_versioned(managed, name, dtype, arg);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") < 0) {
            return -1;
        }
        arg->managed = managed;
        arg->managed_versioned = 0;
        return fill_from_dlpack(&managed->dl_tensor, 0, name, dtype, arg);
    }
    raddle_raise(raddle_fail(
        RADDLE_ERR_VALUE, "%s: __dlpack__ returned no fresh DLPack capsule but %s", name,
        PyCapsule_CheckExact(capsule) ? "one that was used before or has another name"
                                      : Py_TYPE(capsule)->tp_name));
    return -1;
}

static int open_capsule(raddle_tensor_type *entry, PyObject *object, const char *name,
                        raddle_dtype dtype, raddle_tensor_arg *arg) {
    int device_type = 0, result = -1;
    PyObject *capsule = NULL;
    PyObject *source = exportable(object);
    if (!source || ask_device(source, &device_type) < 0) {
        fail_from_producer(name, "its DLPack export");
        goto out;
    }
    const bool cuda = device_type == kDLCUDA;
    capsule = call_dlpack(source, cuda, entry->legacy);
    if (!capsule && !entry->legacy && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        capsule = call_dlpack(source, cuda, true);
        if (capsule) {
            raddle_door_is_legacy(entry->type);
        }
    }
    if (!capsule) {
        fail_from_producer(name, "__dlpack__");
        goto out;
    }
    if (take_capsule(capsule, name, dtype, arg) < 0) {
        goto out;
    }
    if (arg->tensor.device.type == RADDLE_CUDA && (entry->is_torch || entry->is_cupy)) {
        if (ask_stream(entry, name, arg) < 0) {
            goto out;
        }
    }
    result = 0;
out:
    Py_XDECREF(capsule);
    Py_XDECREF(source);
    return result;
}

/* keep: the memory must stay when the object is resized or refilled, so the owned form is asked
 * for. */
static int open_object(PyObject *object, const char *name, int access, raddle_dtype dtype,
                       bool keep, raddle_tensor_arg *arg) {
    arg->view = NULL;
    arg->object = NULL;
    arg->managed = NULL;
    arg->managed_versioned = 0;
    arg->stream = NULL;
    arg->has_stream = 0;
    if (object == Py_None && (access & RADDLE_ARG_OPTIONAL)) {
        memset(&arg->tensor, 0, sizeof arg->tensor);
        arg->tensor.name = name;
        return 0;
    }
    raddle_tensor_type entry;
    if (raddle_find_door(object, name, &entry) < 0) {
        return -1;
    }
    const bool write = (access & RADDLE_ARG_WRITE) != 0;
    raddle_status status = RADDLE_OK;
    int result = 0;
    switch (entry.door) {
    case RADDLE_DOOR_OWN:
        arg->tensor = ((raddle_py_tensor *)object)->tensor;
        arg->tensor.name = name;
        status = raddle_dtype_resolve(name, arg->tensor.dtype, dtype, &arg->tensor.dtype);
        break;
    case RADDLE_DOOR_NUMPY:
        status = view_numpy((PyArrayObject *)object, name, dtype, &arg->tensor);
        break;
    case RADDLE_DOOR_TABLE:
        result = open_table(&entry, object, name, dtype, keep || (write && !entry.is_torch), arg);
        break;
    case RADDLE_DOOR_CAPSULE:
    default:
        result = open_capsule(&entry, object, name, dtype, arg);
        break;
    }
    if (result == 0 && status == RADDLE_OK && write) {
        status = raddle_tensor_check_writable(&arg->tensor);
    }
    if (status != RADDLE_OK) {
        raddle_raise(status);
        result = -1;
    }
    if (result < 0) {
        raddle_tensor_arg_close(arg);
        return -1;
    }
    arg->object = object;
    arg->view = &arg->tensor;
    return 0;
}

/* ---------------------------------------------------------------- public */

void raddle_tensor_arg_close(raddle_tensor_arg *arg) {
    void *managed = arg->managed;
    const int versioned = arg->managed_versioned;
    arg->managed = NULL;
    arg->view = NULL;
    arg->object = NULL;
    if (managed) {
        release_managed(managed, versioned);
    }
}

static const char kept_versioned[] = "raddle_kept_dltensor_versioned";
static const char kept_legacy[] = "raddle_kept_dltensor";

static void release_kept(PyObject *capsule) {
    const int versioned = PyCapsule_IsValid(capsule, kept_versioned);
    release_managed(PyCapsule_GetPointer(capsule, versioned ? kept_versioned : kept_legacy),
                    versioned);
}

/* New reference to what a hold is opened on. A torch tensor can be given other storage later
 * (t.set_(..), param.data = ..), and its export follows: an alias made by detach() does not.
 * (torch's resize_ frees storage under every alias; nothing can be done about that.) */
static PyObject *alias_of(PyObject *object, const char *name) {
    raddle_tensor_type entry;
    if (object == Py_None) {
        return Py_NewRef(object);
    }
    if (raddle_find_door(object, name, &entry) < 0) {
        return NULL;
    }
    if (!entry.is_torch ||
        (entry.door == RADDLE_DOOR_TABLE && !entry.table->managed_tensor_from_py_object_no_sync)) {
        return Py_NewRef(object);
    }
    PyObject *alias = PyObject_CallMethod(object, "detach", NULL);
    if (!alias) {
        fail_from_producer(name, "detach");
    }
    return alias;
}

/* A graph's launches use the memory again: the graph that this thread captures keeps it. */
static int keep_for_capture(PyObject *object, const char *name, raddle_tensor_arg *arg) {
    PyObject *alias = alias_of(object, name);
    const int failed = alias == NULL || raddle_py_graph_keep(alias) < 0;
    Py_XDECREF(alias);
    if (failed) {
        raddle_tensor_arg_close(arg);
    }
    return failed ? -1 : 0;
}

int raddle_tensor_arg_open(PyObject *object, const char *name, int access, raddle_dtype dtype,
                           raddle_tensor_arg *arg) {
    if (open_object(object, name, access, dtype, false, arg) < 0) {
        return -1;
    }
    return raddle_graph_current() == NULL ? 0 : keep_for_capture(object, name, arg);
}

int raddle_tensor_hold_open(PyObject *object, const char *name, int access, raddle_dtype dtype,
                            raddle_tensor_hold *hold) {
    raddle_tensor_arg arg;
    memset(hold, 0, sizeof *hold);
    PyObject *source = alias_of(object, name);
    if (!source) {
        return -1;
    }
    const int opened = open_object(source, name, access, dtype, true, &arg);
    Py_DECREF(source); /* arg.managed keeps what it needs; without it source is object */
    if (opened < 0) {
        return -1;
    }
    hold->tensor = arg.tensor;
    hold->stream = arg.stream;
    hold->has_stream = arg.has_stream;
    if (!arg.view) {
        return 0;
    }
    if (!arg.managed) {
        hold->owner = Py_NewRef(object);
        return 0;
    }
    hold->owner = PyCapsule_New(arg.managed, arg.managed_versioned ? kept_versioned : kept_legacy,
                                release_kept);
    if (!hold->owner) {
        raddle_tensor_arg_close(&arg);
        memset(hold, 0, sizeof *hold);
        return -1;
    }
    return 0;
}

void raddle_tensor_hold_close(raddle_tensor_hold *hold) {
    memset(&hold->tensor, 0, sizeof hold->tensor);
    Py_CLEAR(hold->owner);
}

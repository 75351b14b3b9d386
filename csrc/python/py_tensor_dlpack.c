/* py_tensor_dlpack.c - how a raddle.Tensor leaves: capsules of both generations, and the C exchange
 * table.
 *
 * Every exported struct holds a reference to its Tensor; the consumer's call of the deleter drops
 * it, from any thread, with or without the GIL. */
#include "python/py_tensor.h"

#include <string.h>

#include "base/alloc.h"
#include "base/dlpack.h"
#include "python/tensor_arg.h"

/* A deleter may come after Python has ended; then there is nothing left to give the reference to.
 */
static void drop_reference(void *object) {
    if (Py_IsInitialized()) {
        const PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF((PyObject *)object);
        PyGILState_Release(gil);
    }
}

static void delete_versioned(DLManagedTensorVersioned *managed) {
    drop_reference(managed->manager_ctx);
    raddle_free(managed);
}

static void delete_legacy(DLManagedTensor *managed) {
    drop_reference(managed->manager_ctx);
    raddle_free(managed);
}

static DLManagedTensorVersioned *export_versioned(PyObject *self, bool copied) {
    const raddle_tensor *tensor = &((raddle_py_tensor *)self)->tensor;
    DLManagedTensorVersioned *managed = raddle_alloc_zero(sizeof *managed);
    if (!managed) {
        PyErr_NoMemory();
        return NULL;
    }
    managed->version = (DLPackVersion){DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    managed->manager_ctx = Py_NewRef(self);
    managed->deleter = delete_versioned;
    managed->flags = (tensor->read_only ? DLPACK_FLAG_BITMASK_READ_ONLY : 0) |
                     (copied ? DLPACK_FLAG_BITMASK_IS_COPIED : 0);
    raddle_tensor_to_dlpack(tensor, &managed->dl_tensor);
    return managed;
}

static DLManagedTensor *export_legacy(PyObject *self) {
    DLManagedTensor *managed = raddle_alloc_zero(sizeof *managed);
    if (!managed) {
        PyErr_NoMemory();
        return NULL;
    }
    managed->manager_ctx = Py_NewRef(self);
    managed->deleter = delete_legacy;
    raddle_tensor_to_dlpack(&((raddle_py_tensor *)self)->tensor, &managed->dl_tensor);
    return managed;
}

/* ---------------------------------------------------------------- capsules */

/* Runs for a capsule that nobody consumed; a consumer has renamed it. */
static void close_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        delete_legacy(PyCapsule_GetPointer(capsule, "dltensor"));
    }
}

static PyObject *make_capsule(PyObject *self, bool versioned, bool copied) {
    PyObject *capsule = NULL;
    if (versioned) {
        DLManagedTensorVersioned *managed = export_versioned(self, copied);
        capsule = managed ? PyCapsule_New(managed, "dltensor_versioned", close_capsule) : NULL;
        if (managed && !capsule) {
            delete_versioned(managed);
        }
        return capsule;
    }
    if (((raddle_py_tensor *)self)->tensor.read_only) {
        PyErr_SetString(
            PyExc_BufferError,
            "a read-only tensor needs a consumer that asks for max_version (1, 0) or later");
        return NULL;
    }
    DLManagedTensor *managed = export_legacy(self);
    capsule = managed ? PyCapsule_New(managed, "dltensor", close_capsule) : NULL;
    if (managed && !capsule) {
        delete_legacy(managed);
    }
    return capsule;
}

/* max_version as the consumer gave it: None or absent asks for the legacy capsule. */
static int wants_versioned(PyObject *max_version, bool *out_versioned) {
    *out_versioned = false;
    if (max_version == Py_None) {
        return 0;
    }
    if (!PyTuple_Check(max_version) || PyTuple_GET_SIZE(max_version) != 2) {
        PyErr_SetString(PyExc_TypeError, "max_version: expected None or a tuple (major, minor)");
        return -1;
    }
    const long major = PyLong_AsLong(PyTuple_GET_ITEM(max_version, 0));
    if (major == -1 && PyErr_Occurred()) {
        return -1;
    }
    *out_versioned = major >= 1;
    return 0;
}

/* The consumer's stream (Python's numbering: None and 1 are the legacy default, 2 the per-thread
 * one, -1 asks for no synchronisation) must see what was queued on the legacy default, which is
 * where work on raddle tensors goes unless the caller named a stream; a caller who did orders the
 * two streams himself. Blocking streams are ordered after the legacy default by CUDA itself; for
 * the others nothing but waiting on the host is right everywhere. */
static int synchronize_for(const raddle_tensor *tensor, PyObject *stream) {
    const raddle_backend *backend = NULL;
    if (tensor->device.type == RADDLE_CPU) {
        if (stream != Py_None && !(PyLong_Check(stream) && PyLong_AsLong(stream) == -1)) {
            PyErr_Clear();
            PyErr_SetString(PyExc_BufferError, "stream: a CPU tensor takes None or -1");
            return -1;
        }
        return 0;
    }
    long value = 1;
    if (stream != Py_None) {
        value = PyLong_AsLong(stream);
        if (value == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    if (value < -1 || value == 0) {
        PyErr_SetString(PyExc_ValueError,
                        "stream: 0 is ambiguous; use 1 (legacy default), 2 (per thread) or -1");
        return -1;
    }
    if (value == -1 || value == 1) {
        return 0;
    }
    raddle_status status = raddle_backend_for(tensor->device, &backend);
    if (status == RADDLE_OK) {
        Py_BEGIN_ALLOW_THREADS status = backend->synchronize(tensor->device.index, NULL);
        Py_END_ALLOW_THREADS
    }
    if (status != RADDLE_OK) {
        raddle_raise(status);
        return -1;
    }
    return 0;
}

static int keyword_arguments(PyObject *const *args, Py_ssize_t num_args, PyObject *names,
                             PyObject **stream, PyObject **max_version, PyObject **dl_device,
                             PyObject **copy) {
    if (num_args != 0) {
        PyErr_SetString(PyExc_TypeError, "__dlpack__() takes keyword arguments only");
        return -1;
    }
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++) {
        PyObject *name = PyTuple_GET_ITEM(names, i);
        if (PyUnicode_CompareWithASCIIString(name, "stream") == 0) {
            *stream = args[i];
        } else if (PyUnicode_CompareWithASCIIString(name, "max_version") == 0) {
            *max_version = args[i];
        } else if (PyUnicode_CompareWithASCIIString(name, "dl_device") == 0) {
            *dl_device = args[i];
        } else if (PyUnicode_CompareWithASCIIString(name, "copy") == 0) {
            *copy = args[i];
        } else {
            PyErr_Format(PyExc_TypeError, "__dlpack__() got an unexpected keyword argument '%U'",
                         name);
            return -1;
        }
    }
    return 0;
}

PyObject *raddle_py_tensor_dlpack(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                  PyObject *names) {
    const raddle_tensor *tensor = &((raddle_py_tensor *)self)->tensor;
    PyObject *stream = Py_None, *max_version = Py_None, *dl_device = Py_None, *copy = Py_None;
    raddle_device device = tensor->device;
    bool versioned = false;
    if (keyword_arguments(args, num_args, names, &stream, &max_version, &dl_device, &copy) < 0 ||
        wants_versioned(max_version, &versioned) < 0) {
        return NULL;
    }
    if (dl_device != Py_None && raddle_device_from_object(dl_device, "dl_device", &device) < 0) {
        return NULL;
    }
    const bool moves = !raddle_device_equal(device, tensor->device);
    if (moves && (copy == Py_False || device.type != RADDLE_CPU)) {
        PyErr_SetString(
            PyExc_BufferError,
            "dl_device: the tensor is on another device; a copy goes to the CPU only, and "
            "not with copy=False");
        return NULL;
    }
    if (!moves && copy != Py_True) {
        return synchronize_for(tensor, stream) < 0 ? NULL : make_capsule(self, versioned, false);
    }
    if (!moves && tensor->device.type != RADDLE_CPU) {
        PyErr_SetString(PyExc_BufferError,
                        "copy: copies on a GPU are the consumer's to make; use copy=None");
        return NULL;
    }
    PyObject *fresh = raddle_py_tensor_new(tensor->shape, tensor->ndim, tensor->dtype, device);
    PyObject *done = fresh ? raddle_py_tensor_copy(fresh, &self, 1) : NULL;
    PyObject *capsule = done ? make_capsule(fresh, versioned, true) : NULL;
    Py_XDECREF(done);
    Py_XDECREF(fresh);
    return capsule;
}

PyObject *raddle_py_tensor_dlpack_device(PyObject *self, PyObject *unused) {
    const raddle_device device = ((raddle_py_tensor *)self)->tensor.device;
    (void)unused;
    return Py_BuildValue("(ii)", (int)device.type, (int)device.index);
}

/* ---------------------------------------------------------------- the exchange table */

/* DLPack's way to fail: the pending exception becomes a kind and a message. */
static void pass_exception(void *error_context,
                           void (*set_error)(void *error_context, const char *kind,
                                             const char *message)) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *text = value ? PyObject_Str(value) : NULL;
    const char *words = text ? PyUnicode_AsUTF8(text) : NULL;
    PyErr_Clear();
    set_error(error_context, "RuntimeError", words ? words : "raddle could not allocate");
    Py_XDECREF(text);
    Py_XDECREF(traceback);
    Py_XDECREF(value);
    Py_XDECREF(type);
}

static int table_allocate(DLTensor *prototype, DLManagedTensorVersioned **out, void *error_context,
                          void (*set_error)(void *error_context, const char *kind,
                                            const char *message)) {
    const raddle_dtype dtype = prototype->dtype.lanes == 1
                                   ? raddle_dtype_from_dlpack(prototype->dtype)
                                   : RADDLE_DTYPE_NONE;
    const raddle_device device = {(int32_t)prototype->device.device_type,
                                  prototype->device.device_id};
    if (dtype == RADDLE_DTYPE_NONE) {
        set_error(error_context, "TypeError", "raddle has no such dtype");
        return -1;
    }
    const PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *tensor = raddle_py_tensor_new(prototype->shape, prototype->ndim, dtype, device);
    DLManagedTensorVersioned *managed = tensor ? export_versioned(tensor, false) : NULL;
    Py_XDECREF(tensor);
    if (managed) {
        *out = managed;
    } else {
        pass_exception(error_context, set_error);
    }
    PyGILState_Release(gil);
    return managed ? 0 : -1;
}

static int table_from_object(void *object, DLManagedTensorVersioned **out) {
    DLManagedTensorVersioned *managed = export_versioned(object, false);
    if (!managed) {
        return -1;
    }
    *out = managed;
    return 0;
}

static const char held_name[] = "raddle_imported_dltensor_versioned";

static void release_held(PyObject *capsule) {
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, held_name);
    if (managed->deleter) {
        managed->deleter(managed);
    }
}

/* Ownership of managed is stolen, on failure too. */
static int table_to_object(DLManagedTensorVersioned *managed, void **out_object) {
    raddle_tensor tensor;
    PyObject *owner = PyCapsule_New(managed, held_name, release_held);
    if (!owner) {
        if (managed->deleter) {
            managed->deleter(managed);
        }
        return -1;
    }
    if (managed->version.major != DLPACK_MAJOR_VERSION) {
        PyErr_SetString(PyExc_BufferError, "raddle understands DLPack 1.x only");
        Py_DECREF(owner);
        return -1;
    }
    const raddle_status status = raddle_tensor_from_dlpack(&managed->dl_tensor, managed->flags,
                                                           "tensor", RADDLE_DTYPE_NONE, &tensor);
    if (status != RADDLE_OK) {
        raddle_raise(status);
        Py_DECREF(owner);
        return -1;
    }
    PyObject *object = raddle_py_tensor_wrap(&tensor, owner);
    if (!object) {
        return -1;
    }
    *out_object = object;
    return 0;
}

static int table_view(void *object, DLTensor *out) {
    raddle_tensor_to_dlpack(&((raddle_py_tensor *)object)->tensor, out);
    return 0;
}

static int table_stream(DLDeviceType device_type, int32_t device, void **out_stream) {
    (void)device_type;
    (void)device;
    *out_stream = NULL; /* raddle has no notion of a current stream: the legacy default */
    return 0;
}

const DLPackExchangeAPI raddle_py_tensor_exchange = {
    .header = {.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION}, .prev_api = NULL},
    .managed_tensor_allocator = table_allocate,
    .managed_tensor_from_py_object_no_sync = table_from_object,
    .managed_tensor_to_py_object_no_sync = table_to_object,
    .dltensor_from_py_object_no_sync = table_view,
    .current_work_stream = table_stream,
};

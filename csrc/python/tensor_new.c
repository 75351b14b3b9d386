/* tensor_new.c - results: a new tensor of the same kind as one that the caller gave, out of its own
 * allocator. */
#include "python/tensor_arg.h"

#include "base/dlpack.h"
#include "python/module.h"
#include "python/py_tensor.h"
#include "python/tensor_door.h"

/* DLPack's way to report an error from an allocator; context is unused. */
static void set_error(void *context, const char *kind, const char *message) {
    (void)context;
    const PyGILState_STATE gil = PyGILState_Ensure();
    PyErr_Format(PyExc_RuntimeError, "%s: %s", kind ? kind : "error",
                 message ? message : "(no message)");
    PyGILState_Release(gil);
}

static PyObject *new_from_table(const DLPackExchangeAPI *table, const raddle_tensor *prototype) {
    DLTensor dl;
    DLManagedTensorVersioned *managed = NULL;
    void *object = NULL;
    raddle_tensor_to_dlpack(prototype, &dl);
    if (table->managed_tensor_allocator(&dl, &managed, NULL, set_error) != 0 || !managed) {
        if (!PyErr_Occurred()) {
            raddle_raise(raddle_fail(RADDLE_ERR_MEMORY,
                                     "the caller's framework could not allocate the result"));
        }
        return NULL;
    }
    if (table->managed_tensor_to_py_object_no_sync(managed, &object) != 0) {
        return NULL;
    }
    return object;
}

static PyObject *shape_tuple(const int64_t *shape, int ndim) {
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple && i < ndim; i++) {
        PyObject *extent = PyLong_FromLongLong(shape[i]);
        if (!extent) {
            Py_CLEAR(tuple);
            break;
        }
        PyTuple_SET_ITEM(tuple, i, extent);
    }
    return tuple;
}

/* torch before 2.10 has no table: torch.empty(shape, dtype=torch.<name>, device="cuda:0"). */
static PyObject *new_from_torch(const raddle_tensor *prototype) {
    char device_text[16];
    PyObject *result = NULL, *args = NULL, *keywords = NULL;
    PyObject *function = raddle_loaded_attribute("torch", "empty");
    PyObject *dtype = raddle_loaded_attribute("torch", raddle_dtype_name(prototype->dtype));
    PyObject *device = PyUnicode_FromString(raddle_device_text(prototype->device, device_text));
    PyObject *shape = shape_tuple(prototype->shape, prototype->ndim);
    if (!function || !dtype || !device || !shape) {
        if (!PyErr_Occurred()) {
            raddle_raise(raddle_fail(
                RADDLE_ERR_UNSUPPORTED,
                "this torch has no dtype %s; pass out=", raddle_dtype_name(prototype->dtype)));
        }
        goto out;
    }
    args = PyTuple_Pack(1, shape);
    keywords = PyDict_New();
    if (args && keywords && PyDict_SetItemString(keywords, "dtype", dtype) == 0 &&
        PyDict_SetItemString(keywords, "device", device) == 0) {
        result = PyObject_Call(function, args, keywords);
    }
out:
    Py_XDECREF(keywords);
    Py_XDECREF(args);
    Py_XDECREF(shape);
    Py_XDECREF(device);
    Py_XDECREF(dtype);
    Py_XDECREF(function);
    return result;
}

PyObject *raddle_tensor_arg_new_like(PyObject *like, const int64_t *shape, int ndim,
                                     raddle_dtype dtype, raddle_device device) {
    raddle_tensor prototype = {.name = "result", .ndim = ndim, .dtype = dtype, .device = device};
    raddle_tensor_type entry = {.door = RADDLE_DOOR_OWN};
    if (ndim < 0 || ndim > RADDLE_MAX_DIM) {
        raddle_raise(raddle_fail(RADDLE_ERR_SHAPE, "result: expected 0 to %d dimensions, got %d",
                                 (int)RADDLE_MAX_DIM, ndim));
        return NULL;
    }
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        prototype.shape[i] = shape[i];
        prototype.stride[i] = stride;
        stride *= shape[i] > 1 ? shape[i] : 1;
    }
    if (like && like != Py_None && raddle_find_door(like, "like", &entry) < 0) {
        return NULL;
    }
    if (entry.door == RADDLE_DOOR_NUMPY && device.type == RADDLE_CPU) {
        return raddle_new_ndarray(shape, ndim, dtype);
    }
    if (entry.door == RADDLE_DOOR_TABLE && entry.table->managed_tensor_allocator &&
        entry.table->managed_tensor_to_py_object_no_sync) {
        return new_from_table(entry.table, &prototype);
    }
    if (entry.is_torch) {
        return new_from_torch(&prototype);
    }
    return raddle_py_tensor_new(shape, ndim, dtype, device);
}

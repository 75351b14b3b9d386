/* errors.c - turns a raddle_status and this thread's error record into an exception of
 * raddle.errors.
 *
 * The classes are Python's (python/raddle/errors.py); they are looked up when something is raised,
 * so that importing the module costs nothing and a failing call about a microsecond. */
#include "python/module.h"

#include <string.h>

static const char *const class_names[RADDLE_STATUS_COUNT] = {
    [RADDLE_ERR_VALUE] = "ArgumentError",
    [RADDLE_ERR_SHAPE] = "ShapeError",
    [RADDLE_ERR_DTYPE] = "DTypeError",
    [RADDLE_ERR_DEVICE] = "DeviceError",
    [RADDLE_ERR_CAPACITY] = "CapacityError",
    [RADDLE_ERR_STATE] = "StateError",
    [RADDLE_ERR_UNSUPPORTED] = "UnsupportedError",
    [RADDLE_ERR_COMPILE] = "CompileError",
    [RADDLE_ERR_CUDA] = "CudaError",
    [RADDLE_ERR_IO] = "RaddleIOError",
    [RADDLE_ERR_MEMORY] = "RaddleMemoryError",
    [RADDLE_ERR_CUDA_ASYNC] = "CudaError",
};

/* Messages may quote a compiler or a file name: bytes that are not UTF-8 must not hide the error.
 */
static PyObject *decode(const char *text) {
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

PyObject *raddle_raise(raddle_status status) {
    if (status <= RADDLE_OK || status >= RADDLE_STATUS_COUNT) {
        return PyErr_Format(PyExc_SystemError, "raddle: status %d is not an error", (int)status);
    }
    const raddle_error *record = raddle_last_error();
    const int recorded = record->code == status;
    PyObject *message = NULL, *log = NULL, *errors = NULL, *error_class = NULL, *error = NULL;

    message = decode(recorded ? record->message : raddle_status_name(status));
    log = decode(recorded ? record->log : "");
    raddle_error_clear(); /* both are copied: a log is not kept until the next failure */
    if (!message || !log) {
        goto out;
    }
    errors = PyImport_ImportModule("raddle.errors");
    if (!errors) {
        goto out;
    }
    error_class = PyObject_GetAttrString(errors, class_names[status]);
    if (!error_class) {
        goto out;
    }
    error = PyObject_CallOneArg(error_class, message);
    if (!error || (status == RADDLE_ERR_COMPILE && PyObject_SetAttrString(error, "log", log) < 0)) {
        goto out;
    }
    PyErr_SetObject(error_class, error);
out:
    Py_XDECREF(error);
    Py_XDECREF(error_class);
    Py_XDECREF(errors);
    Py_XDECREF(log);
    Py_XDECREF(message);
    return NULL;
}

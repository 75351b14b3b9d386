/* tensor_words.c - dtypes, devices and streams as users write them: strings, numbers, or a
 * framework's own objects. */
#include "python/tensor_arg.h"

#include <string.h>

#include "python/module.h"
#include "runtime/graph.h"

static int fail(raddle_status status) {
    raddle_raise(status);
    return -1;
}

/* "name: expected X, got <repr>", with whatever repr() can say. */
static int fail_object(raddle_status code, const char *name, const char *expected,
                       PyObject *object) {
    PyObject *text = PyObject_Repr(object);
    const char *words = text ? PyUnicode_AsUTF8(text) : NULL;
    if (!words) {
        PyErr_Clear();
        words = Py_TYPE(object)->tp_name;
    }
    fail(raddle_fail(code, "%s: expected %s, got %.200s", name, expected, words));
    Py_XDECREF(text);
    return -1;
}

/* ---------------------------------------------------------------- dtype */

/* The word that names a dtype object: a string itself, numpy.dtype's name, a scalar class's
 * __name__, str() of torch's. New reference. */
static PyObject *dtype_word(PyObject *object) {
    if (PyUnicode_Check(object)) {
        return Py_NewRef(object);
    }
    PyObject *word = PyObject_GetAttrString(object, PyType_Check(object) ? "__name__" : "name");
    if (!word) {
        PyErr_Clear();
        word = PyObject_Str(object);
    }
    if (word && !PyUnicode_Check(word)) {
        Py_CLEAR(word);
    }
    return word;
}

/* numpy.dtype(">f4") has the name "float32" too. */
static bool is_swapped(PyObject *object) {
    PyObject *native = PyUnicode_Check(object) ? NULL : PyObject_GetAttrString(object, "isnative");
    PyErr_Clear();
    const bool swapped = native == Py_False;
    Py_XDECREF(native);
    return swapped;
}

int raddle_dtype_from_object(PyObject *object, const char *name, raddle_dtype *out_dtype) {
    if (object == Py_None) {
        *out_dtype = RADDLE_DTYPE_NONE;
        return 0;
    }
    PyObject *word = dtype_word(object);
    const char *text = word ? PyUnicode_AsUTF8(word) : NULL;
    PyErr_Clear();
    const raddle_dtype dtype =
        text && !is_swapped(object) ? raddle_dtype_from_name(text) : RADDLE_DTYPE_NONE;
    Py_XDECREF(word);
    if (dtype == RADDLE_DTYPE_NONE) {
        return fail_object(
            RADDLE_ERR_DTYPE, name,
            "a dtype such as \"float16\", \"bfloat16\", \"float32\", \"float8_e4m3fn\", \"uint8\", "
            "\"int32\", a native numpy.dtype or a torch.dtype",
            object);
    }
    *out_dtype = dtype;
    return 0;
}

/* ---------------------------------------------------------------- shape */

static bool extent_from_object(PyObject *object, int64_t *out_extent) {
    PyObject *index = PyIndex_Check(object) ? PyNumber_Index(object) : NULL;
    if (!index) {
        return false;
    }
    *out_extent = PyLong_AsLongLong(index);
    Py_DECREF(index);
    return !PyErr_Occurred();
}

int raddle_shape_from_object(PyObject *object, const char *name, int64_t *shape, int *out_ndim) {
    if (extent_from_object(object, shape)) {
        *out_ndim = 1;
        return 0;
    }
    PyErr_Clear();
    PyObject *items = PyUnicode_Check(object) ? NULL : PySequence_Tuple(object);
    PyErr_Clear();
    const Py_ssize_t count = items ? PyTuple_GET_SIZE(items) : 0;
    bool good = items != NULL && count <= RADDLE_MAX_DIM;
    for (Py_ssize_t i = 0; good && i < count; i++) {
        good = extent_from_object(PyTuple_GET_ITEM(items, i), &shape[i]);
    }
    PyErr_Clear();
    Py_XDECREF(items);
    if (!good) {
        return fail_object(RADDLE_ERR_SHAPE, name, "an int or a sequence of at most 8 ints",
                           object);
    }
    *out_ndim = (int)count;
    return 0;
}

/* ---------------------------------------------------------------- device */

/* "cpu", "cpu:0", "cuda", "cuda:3". */
static bool device_from_text(const char *text, raddle_device *out_device) {
    const bool cuda = strncmp(text, "cuda", 4) == 0;
    if (!cuda && strncmp(text, "cpu", 3) != 0) {
        return false;
    }
    const char *rest = text + (cuda ? 4 : 3);
    int index = 0;
    if (*rest == ':') {
        rest++;
        if (*rest < '0' || *rest > '9') {
            return false;
        }
        while (*rest >= '0' && *rest <= '9' && index < 1000) {
            index = index * 10 + (*rest++ - '0');
        }
    }
    *out_device = (raddle_device){cuda ? RADDLE_CUDA : RADDLE_CPU, index};
    return *rest == '\0' && (cuda || index == 0);
}

/* DLPack's (device type, device index). */
static bool device_from_pair(PyObject *pair, raddle_device *out_device) {
    if (PyTuple_GET_SIZE(pair) != 2) {
        return false;
    }
    const long type = PyLong_AsLong(PyTuple_GET_ITEM(pair, 0));
    const long index = PyErr_Occurred() ? -1 : PyLong_AsLong(PyTuple_GET_ITEM(pair, 1));
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    if (index < 0 || index > 1000 || (type != RADDLE_CPU && type != RADDLE_CUDA) ||
        (type == RADDLE_CPU && index != 0)) {
        return false;
    }
    *out_device = (raddle_device){(int32_t)type, (int32_t)index};
    return true;
}

int raddle_device_from_object(PyObject *object, const char *name, raddle_device *out_device) {
    raddle_device device = {0, 0};
    bool known = false;
    if (PyTuple_Check(object)) {
        known = device_from_pair(object, &device);
    } else {
        PyObject *word = PyObject_Str(object); /* torch.device says "cuda:1" */
        const char *text = word ? PyUnicode_AsUTF8(word) : NULL;
        PyErr_Clear();
        known = text && device_from_text(text, &device);
        Py_XDECREF(word);
    }
    if (!known) {
        return fail_object(
            RADDLE_ERR_DEVICE, name,
            "a device such as \"cpu\", \"cuda\" (which is cuda:0), \"cuda:1\" or a torch.device",
            object);
    }
    *out_device = device;
    return 0;
}

/* ---------------------------------------------------------------- stream */

/* New reference to the integer handle in a stream object, NULL without exception when it has none.
 * cuda.core's
 * __cuda_stream__ is a method (once an attribute) that gives (protocol version, handle). */
static PyObject *stream_handle(PyObject *object) {
    PyObject *handle = PyObject_GetAttrString(object, "cuda_stream");
    if (!handle) {
        PyErr_Clear();
        handle = PyObject_GetAttrString(object, "ptr");
    }
    if (!handle) {
        PyErr_Clear();
        PyObject *protocol = PyObject_GetAttrString(object, "__cuda_stream__");
        PyObject *pair = protocol && PyCallable_Check(protocol) ? PyObject_CallNoArgs(protocol)
                                                                : Py_XNewRef(protocol);
        handle = pair && PyTuple_Check(pair) ? PySequence_GetItem(pair, 1) : NULL;
        Py_XDECREF(pair);
        Py_XDECREF(protocol);
    }
    if (!handle) {
        PyErr_Clear();
    }
    return handle;
}

static int stream_from_object(PyObject *object, raddle_stream *out_stream) {
    PyObject *handle = PyLong_CheckExact(object) ? Py_NewRef(object) : stream_handle(object);
    if (!handle || !PyLong_CheckExact(handle)) {
        Py_XDECREF(handle);
        return fail_object(RADDLE_ERR_VALUE, "stream",
                           "None, an integer CUstream handle, or an object with .cuda_stream, .ptr "
                           "or __cuda_stream__",
                           object);
    }
    const unsigned long long value = PyLong_AsUnsignedLongLong(handle);
    Py_DECREF(handle);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return fail_object(RADDLE_ERR_VALUE, "stream", "a CUstream handle of 0 or more", object);
    }
    *out_stream = (raddle_stream)(uintptr_t)value;
    return 0;
}

int raddle_stream_from_args(PyObject *stream_object, const raddle_tensor_arg *args, int num_args,
                            raddle_stream *out_stream) {
    if (stream_object && stream_object != Py_None) {
        return stream_from_object(stream_object, out_stream);
    }
    if (raddle_graph_current() != NULL) { /* what is not said is meant for the capture */
        *out_stream = raddle_graph_stream(raddle_graph_current());
        return 0;
    }
    *out_stream = NULL;
    for (int i = 0; i < num_args; i++) {
        if (args[i].has_stream) {
            *out_stream = args[i].stream;
            break;
        }
    }
    return 0;
}

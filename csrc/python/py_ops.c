/* py_ops.c - the functions of the ops family, positional: words, defaults and docstrings live in
 * python/raddle/ops.py.
 */
#include "python/py_ops.h"

#include <string.h>

#include "ops/ops.h"

enum {
    SHORT_WORK = 4096
}; /* elements that take a few microseconds: less than waiting for the GIL may */

/* ------------------------------------------------------------------ helpers */

int raddle_py_ops_check_count(const char *function, Py_ssize_t given, Py_ssize_t wanted) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", function, wanted, given);
        return -1;
    }
    return 0;
}

void raddle_py_ops_close(raddle_tensor_arg *args, int count) {
    for (int i = 0; i < count; i++) {
        raddle_tensor_arg_close(&args[i]);
    }
}

static bool is_half(raddle_dtype dtype) {
    return dtype == RADDLE_BF16 || dtype == RADDLE_F16;
}

/* NumPy has no bfloat16: its bits come as uint16. */
static void read_bits_as(raddle_tensor_arg *arg, raddle_dtype dtype) {
    if (arg->view && arg->tensor.dtype == RADDLE_U16 && is_half(dtype)) {
        arg->tensor.dtype = dtype;
    }
}

int raddle_py_ops_open(PyObject *const *objects, const char *const *names, const int *access,
                       int count, raddle_dtype bits, raddle_tensor_arg *args) {
    memset(args, 0, (size_t)count * sizeof(*args));
    for (int i = 0; i < count; i++) {
        if (raddle_tensor_arg_open(objects[i], names[i], access[i], RADDLE_DTYPE_NONE, &args[i]) <
            0) {
            raddle_py_ops_close(args, i);
            return -1;
        }
        read_bits_as(&args[i], bits != RADDLE_DTYPE_NONE ? bits : args[0].tensor.dtype);
    }
    return 0;
}

PyObject *raddle_py_ops_result(PyObject *given, const char *name, PyObject *like,
                               const int64_t *shape, int ndim, raddle_dtype dtype,
                               raddle_device device, raddle_tensor_arg *arg) {
    PyObject *object = given == Py_None
                           ? raddle_tensor_arg_new_like(like, shape, ndim, dtype, device)
                           : Py_NewRef(given);
    if (!object) {
        return NULL;
    }
    if (raddle_tensor_arg_open(object, name, RADDLE_ARG_WRITE, RADDLE_DTYPE_NONE, arg) < 0) {
        Py_DECREF(object);
        return NULL;
    }
    read_bits_as(arg, dtype);
    return object;
}

PyThreadState *raddle_py_ops_begin_work(raddle_device device, int64_t elements) {
    return device.type == RADDLE_CPU && elements > SHORT_WORK ? PyEval_SaveThread() : NULL;
}

void raddle_py_ops_end_work(PyThreadState *state) {
    if (state) {
        PyEval_RestoreThread(state);
    }
}

PyObject *raddle_py_ops_finish(raddle_status status, PyObject *result, raddle_tensor_arg *args,
                               int count) {
    raddle_py_ops_close(args, count);
    if (status != RADDLE_OK) {
        Py_XDECREF(result);
        return raddle_raise(status);
    }
    return result;
}

PyObject *raddle_py_ops_abandon(PyObject *result, raddle_tensor_arg *args, int count) {
    raddle_py_ops_close(args, count);
    Py_XDECREF(result);
    return NULL;
}

bool raddle_py_ops_is_tensor(PyObject *object) {
    if (PyFloat_CheckExact(object) || PyLong_CheckExact(object)) {
        return false;
    }
    PyObject *method = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__dlpack__");
    if (!method) {
        PyErr_Clear();
        return false;
    }
    Py_DECREF(method);
    return true;
}

int raddle_py_ops_parse_double(PyObject *object, const char *name, double *out_value) {
    *out_value = PyFloat_AsDouble(object);
    if (*out_value == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        raddle_raise(raddle_fail(RADDLE_ERR_DTYPE, "%s: expected a number, got %.100s", name,
                                 Py_TYPE(object)->tp_name));
        return -1;
    }
    return 0;
}

int raddle_py_ops_parse_float(PyObject *object, const char *name, float *out_value) {
    double value;
    if (raddle_py_ops_parse_double(object, name, &value) < 0) {
        return -1;
    }
    *out_value = (float)value;
    return 0;
}

/* ------------------------------------------------------------------ activations and embedding */

PyDoc_STRVAR(act_and_mul_doc, "ops_act_and_mul(activation, x, out, dtype, stream, /)\n--\n\n"
                              "activation(x[.., :d]) * x[.., d:]; 0 silu, 1 gelu, 2 tanh gelu.");

static PyObject *act_and_mul(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"x"};
    static const int access[] = {RADDLE_ARG_READ};
    enum { X, OUT, NUM };
    raddle_tensor_arg args[NUM] = {0};
    raddle_dtype bits;
    raddle_stream stream;
    (void)module;
    if (raddle_py_ops_check_count("ops_act_and_mul", count, 5) < 0) {
        return NULL;
    }
    const long activation = PyLong_AsLong(objects[0]);
    if ((activation == -1 && PyErr_Occurred()) ||
        raddle_dtype_from_object(objects[3], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects + 1, names, access, 1, bits, args) < 0) {
        return NULL;
    }
    const raddle_tensor *x = args[X].view;
    int64_t shape[RADDLE_MAX_DIM] = {0};
    for (int d = 0; d < x->ndim; d++) {
        shape[d] = d == x->ndim - 1 ? x->shape[d] / 2 : x->shape[d];
    }
    PyObject *out = raddle_py_ops_result(objects[2], "out", objects[1], shape, x->ndim, x->dtype,
                                         x->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[4], args, NUM, &stream) < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    PyThreadState *state = raddle_py_ops_begin_work(x->device, raddle_tensor_count(x));
    const raddle_status status =
        raddle_ops_act_and_mul((int32_t)activation, x, args[OUT].view, stream);
    raddle_py_ops_end_work(state);
    return raddle_py_ops_finish(status, out, args, NUM);
}

PyDoc_STRVAR(embedding_doc, "ops_embedding(ids, table, out, dtype, stream, /)\n--\n\n"
                            "Rows of a table.");

static PyObject *embedding(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"ids", "table"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ};
    enum { IDS, TABLE, OUT, NUM };
    raddle_tensor_arg args[NUM] = {0};
    raddle_dtype bits;
    raddle_stream stream;
    (void)module;
    if (raddle_py_ops_check_count("ops_embedding", count, 5) < 0 ||
        raddle_dtype_from_object(objects[3], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, 2, RADDLE_DTYPE_NONE, args) < 0) {
        return NULL;
    }
    read_bits_as(&args[TABLE], bits);
    const raddle_tensor *ids = args[IDS].view, *table = args[TABLE].view;
    const int64_t shape[2] = {ids->ndim == 1 ? ids->shape[0] : 0,
                              table->ndim == 2 ? table->shape[1] : 0};
    PyObject *out = raddle_py_ops_result(objects[2], "out", objects[1], shape, 2, table->dtype,
                                         table->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[4], args, NUM, &stream) < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    PyThreadState *state = raddle_py_ops_begin_work(table->device, shape[0] * shape[1]);
    const raddle_status status = raddle_ops_embedding(ids, table, args[OUT].view, stream);
    raddle_py_ops_end_work(state);
    return raddle_py_ops_finish(status, out, args, NUM);
}

/* ------------------------------------------------------------------ the table */

static PyMethodDef functions[] = {
    {"ops_act_and_mul", RADDLE_FASTCALL(act_and_mul), METH_FASTCALL, act_and_mul_doc},
    {"ops_embedding", RADDLE_FASTCALL(embedding), METH_FASTCALL, embedding_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_add_ops(PyObject *module) {
    if (PyModule_AddFunctions(module, functions) < 0 || raddle_py_ops_add_norm(module) < 0 ||
        raddle_py_ops_add_rope(module) < 0 || raddle_py_ops_add_sample(module) < 0) {
        return -1;
    }
    return raddle_py_ops_add_linear(module);
}

/* py_ops.c - the functions of the ops family, positional: words, defaults and docstrings live in
 * python/raddle/ops.py.
 */
#include "python/py_ops.h"

#include <string.h>

#include "base/alloc.h"
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

/* ------------------------------------------------------------------ softmax and log-probabilities
 */

PyDoc_STRVAR(softmax_doc, "ops_softmax(logits, temperature, out, dtype, stream, /)\n--\n\n"
                          "softmax(logits / temperature) in float32.");

static PyObject *softmax(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"logits"};
    static const int access[] = {RADDLE_ARG_READ};
    enum { LOGITS, OUT, NUM };
    raddle_tensor_arg args[NUM] = {0};
    raddle_dtype bits;
    raddle_stream stream;
    float temperature;
    (void)module;
    if (raddle_py_ops_check_count("ops_softmax", count, 5) < 0 ||
        raddle_py_ops_parse_float(objects[1], "temperature", &temperature) < 0 ||
        raddle_dtype_from_object(objects[3], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, 1, bits, args) < 0) {
        return NULL;
    }
    const raddle_tensor *logits = args[LOGITS].view;
    PyObject *out = raddle_py_ops_result(objects[2], "out", objects[0], logits->shape, logits->ndim,
                                         RADDLE_F32, logits->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[4], args, NUM, &stream) < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    PyThreadState *state = raddle_py_ops_begin_work(logits->device, raddle_tensor_count(logits));
    const raddle_status status = raddle_ops_softmax(logits, temperature, args[OUT].view, stream);
    raddle_py_ops_end_work(state);
    return raddle_py_ops_finish(status, out, args, NUM);
}

PyDoc_STRVAR(token_logprobs_doc, "ops_token_logprobs(logits, ids, top, dtype, stream, /)\n--\n\n"
                                 "Log-probability of ids and of the top most likely tokens.");

static PyObject *token_logprobs(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"logits", "ids"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ};
    enum { LOGITS, IDS, LOGPROBS, TOP_IDS, TOP_LOGPROBS, NUM };
    static const char *const out_names[] = {"logprobs", "top_ids", "top_logprobs"};
    static const raddle_dtype out_dtypes[] = {RADDLE_F32, RADDLE_I32, RADDLE_F32};
    raddle_tensor_arg args[NUM] = {0};
    PyObject *outs[3] = {0}, *result = NULL;
    raddle_dtype bits;
    raddle_stream stream;
    (void)module;
    if (raddle_py_ops_check_count("ops_token_logprobs", count, 5) < 0) {
        return NULL;
    }
    const long long top = PyLong_AsLongLong(objects[2]);
    if (top == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (top < 0) {
        return raddle_raise(
            raddle_fail(RADDLE_ERR_VALUE, "top: expected at least 0, got %lld", top));
    }
    if (raddle_dtype_from_object(objects[3], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, 2, bits, args) < 0) {
        return NULL;
    }
    const raddle_tensor *logits = args[LOGITS].view;
    const int64_t shape[2] = {logits->ndim == 2 ? logits->shape[0] : 0, top};
    for (int i = 0; i < 3; i++) {
        outs[i] = raddle_py_ops_result(Py_None, out_names[i], objects[0], shape, i == 0 ? 1 : 2,
                                       out_dtypes[i], logits->device, &args[LOGPROBS + i]);
        if (!outs[i]) {
            goto out;
        }
    }
    if (raddle_stream_from_args(objects[4], args, NUM, &stream) < 0) {
        goto out;
    }
    PyThreadState *state = raddle_py_ops_begin_work(logits->device, raddle_tensor_count(logits));
    const raddle_status status = raddle_ops_token_logprobs(
        logits, args[IDS].view, args[LOGPROBS].view, top ? args[TOP_IDS].view : NULL,
        top ? args[TOP_LOGPROBS].view : NULL, stream);
    raddle_py_ops_end_work(state);
    result =
        status == RADDLE_OK ? PyTuple_Pack(3, outs[0], outs[1], outs[2]) : raddle_raise(status);
out:
    raddle_py_ops_close(args, NUM);
    for (int i = 0; i < 3; i++) {
        Py_XDECREF(outs[i]);
    }
    return result;
}

/* ------------------------------------------------------------------ sample */

enum { TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, OFFSET, NUM_SETTINGS };
static const char *const setting_names[NUM_SETTINGS] = {"temperature", "top_k", "top_p",
                                                        "min_p",       "seed",  "offset"};

/* Negative seeds and those of more than 64 bits are taken modulo 2^64. */
static int parse_u64(PyObject *object, const char *name, uint64_t *out_value) {
    PyObject *integer = PyNumber_Index(object);
    if (!integer) {
        PyErr_Clear();
        raddle_raise(raddle_fail(RADDLE_ERR_DTYPE, "%s: expected an integer, got %.100s", name,
                                 Py_TYPE(object)->tp_name));
        return -1;
    }
    *out_value = PyLong_AsUnsignedLongLongMask(integer);
    Py_DECREF(integer);
    return 0;
}

static int parse_top_k(PyObject *object, int32_t *out_value) {
    uint64_t bits = 0;
    if (parse_u64(object, "top_k", &bits) < 0) {
        return -1;
    }
    const int64_t value = (int64_t)bits;
    *out_value = value > INT32_MAX ? INT32_MAX : value < INT32_MIN ? INT32_MIN : (int32_t)value;
    return 0;
}

static int parse_setting(PyObject *object, int setting, raddle_ops_sample_row *row) {
    switch (setting) {
    case TEMPERATURE:
        return raddle_py_ops_parse_float(object, "temperature", &row->temperature);
    case TOP_K:
        return parse_top_k(object, &row->top_k);
    case TOP_P:
        return raddle_py_ops_parse_float(object, "top_p", &row->top_p);
    case MIN_P:
        return raddle_py_ops_parse_float(object, "min_p", &row->min_p);
    case SEED:
        return parse_u64(object, "seed", &row->seed);
    default:
        return parse_u64(object, "offset", &row->offset);
    }
}

/* 0: a number, 1: a sequence of numbers, 2: a tensor. Scalars of array libraries have no length. */
static int kind_of_setting(PyObject *object) {
    if (PyFloat_CheckExact(object) || PyLong_CheckExact(object)) {
        return 0;
    }
    if (PyUnicode_Check(object) || PyBytes_Check(object)) {
        return 0; /* refused as a number */
    }
    if (PyList_Check(object) || PyTuple_Check(object)) {
        return 1;
    }
    if (PyObject_Size(object) < 0) {
        PyErr_Clear();
        return 0;
    }
    return raddle_py_ops_is_tensor(object) ? 2 : 1;
}

/* Field setting of every row from a sequence of n numbers. */
static int read_sequence(PyObject *object, int setting, raddle_ops_sample_row *rows, int64_t n) {
    PyObject *list = PySequence_Fast(object, "expected a number, a sequence or a tensor");
    if (!list) {
        return -1;
    }
    int result = 0;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
    if (size != n) {
        raddle_raise(raddle_fail(RADDLE_ERR_SHAPE,
                                 "%s: expected one number, or one for each of the %lld rows of "
                                 "logits, got %lld",
                                 setting_names[setting], (long long)n, (long long)size));
        result = -1;
    }
    for (Py_ssize_t i = 0; result == 0 && i < size; i++) {
        result = parse_setting(PySequence_Fast_GET_ITEM(list, i), setting, &rows[i]);
    }
    Py_DECREF(list);
    return result;
}

/* The six settings of a call, read from their Python objects. */
typedef struct sample_settings {
    raddle_ops_sample_row one;
    raddle_ops_sample_row *rows; /* &one, or n of our own */
    int64_t num_rows;
    raddle_tensor_arg tensors[NUM_SETTINGS];
} sample_settings;

static void close_settings(sample_settings *settings) {
    raddle_py_ops_close(settings->tensors, NUM_SETTINGS);
    if (settings->rows != &settings->one) {
        raddle_free(settings->rows);
    }
}

static int open_settings(PyObject *const *objects, int64_t n, sample_settings *settings) {
    int kinds[NUM_SETTINGS];
    bool has_sequence = false;
    memset(settings, 0, sizeof(*settings));
    settings->one.top_p = 1;
    settings->rows = &settings->one;
    settings->num_rows = 1;
    for (int s = 0; s < NUM_SETTINGS; s++) {
        kinds[s] = kind_of_setting(objects[s]);
        has_sequence |= kinds[s] == 1;
        if (kinds[s] == 0 && parse_setting(objects[s], s, &settings->one) < 0) {
            return -1;
        }
    }
    if (has_sequence) {
        settings->num_rows = n;
        settings->rows = raddle_alloc((size_t)n * sizeof(settings->one));
        if (!settings->rows) {
            settings->rows = &settings->one;
            raddle_raise(raddle_fail_memory((size_t)n * sizeof(settings->one)));
            return -1;
        }
    }
    for (int64_t i = 0; has_sequence && i < n; i++) {
        settings->rows[i] = settings->one;
    }
    for (int s = 0; s < NUM_SETTINGS; s++) {
        if ((kinds[s] == 1 && read_sequence(objects[s], s, settings->rows, n) < 0) ||
            (kinds[s] == 2 &&
             raddle_tensor_arg_open(objects[s], setting_names[s], RADDLE_ARG_READ,
                                    RADDLE_DTYPE_NONE, &settings->tensors[s]) < 0)) {
            close_settings(settings);
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(sample_doc, "ops_sample(logits, temperature, top_k, top_p, min_p, seed, offset, out, "
                         "dtype, stream, /)\n--\n\nDraw one token per row.");

static PyObject *sample(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"logits"};
    static const int access[] = {RADDLE_ARG_READ};
    enum { LOGITS, OUT, NUM };
    raddle_tensor_arg args[NUM] = {0};
    sample_settings settings;
    raddle_dtype bits;
    raddle_stream stream;
    (void)module;
    if (raddle_py_ops_check_count("ops_sample", count, 10) < 0 ||
        raddle_dtype_from_object(objects[8], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, 1, bits, args) < 0) {
        return NULL;
    }
    const raddle_tensor *logits = args[LOGITS].view;
    const int64_t n = logits->ndim == 2 ? logits->shape[0] : 0;
    if (open_settings(objects + 1, n, &settings) < 0) {
        return raddle_py_ops_abandon(NULL, args, NUM);
    }
    PyObject *out = raddle_py_ops_result(objects[7], "out", objects[0], &n, 1, RADDLE_I32,
                                         logits->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[9], args, NUM, &stream) < 0) {
        close_settings(&settings);
        return raddle_py_ops_abandon(out, args, NUM);
    }
    const raddle_ops_sample_args sample_args = {
        .logits = logits,
        .out = args[OUT].view,
        .rows = settings.rows,
        .num_rows = settings.num_rows,
        .temperature = settings.tensors[TEMPERATURE].view,
        .top_k = settings.tensors[TOP_K].view,
        .top_p = settings.tensors[TOP_P].view,
        .min_p = settings.tensors[MIN_P].view,
        .seed = settings.tensors[SEED].view,
        .offset = settings.tensors[OFFSET].view,
    };
    PyThreadState *state = raddle_py_ops_begin_work(logits->device, raddle_tensor_count(logits));
    const raddle_status status = raddle_ops_sample(&sample_args, stream);
    raddle_py_ops_end_work(state);
    close_settings(&settings);
    return raddle_py_ops_finish(status, out, args, NUM);
}

/* ------------------------------------------------------------------ the table */

static PyMethodDef functions[] = {
    {"ops_act_and_mul", RADDLE_FASTCALL(act_and_mul), METH_FASTCALL, act_and_mul_doc},
    {"ops_embedding", RADDLE_FASTCALL(embedding), METH_FASTCALL, embedding_doc},
    {"ops_softmax", RADDLE_FASTCALL(softmax), METH_FASTCALL, softmax_doc},
    {"ops_sample", RADDLE_FASTCALL(sample), METH_FASTCALL, sample_doc},
    {"ops_token_logprobs", RADDLE_FASTCALL(token_logprobs), METH_FASTCALL, token_logprobs_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_add_ops(PyObject *module) {
    if (PyModule_AddFunctions(module, functions) < 0 || raddle_py_ops_add_norm(module) < 0 ||
        raddle_py_ops_add_rope(module) < 0) {
        return -1;
    }
    return raddle_py_ops_add_linear(module);
}

/* py_ops_sample.c - softmax, log-probabilities, sampling, what it leaves of rows, and speculative
 * decoding.
 */
#include "python/py_ops.h"

#include <string.h>

#include "base/alloc.h"
#include "ops/ops.h"

/* ------------------------------------------------------------------ settings */

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
        raddle_raise(raddle_fail(
            RADDLE_ERR_SHAPE, "%s: expected one number, or one for each of the %lld rows, got %lld",
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

/* ------------------------------------------------------------------ softmax and log-probabilities
 */

PyDoc_STRVAR(softmax_doc, "ops_softmax(logits, temperature, out, dtype, stream, /)\n--\n\n"
                          "softmax(logits / temperature) in float32.");

static PyObject *softmax(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"logits"};
    static const int access[] = {RADDLE_ARG_READ};
    enum { LOGITS, OUT, TEMPERATURES, NUM };
    raddle_tensor_arg args[NUM] = {0};
    raddle_dtype bits;
    raddle_stream stream;
    float temperature = 1.0f;
    PyObject *out = NULL;
    (void)module;
    if (raddle_py_ops_check_count("ops_softmax", count, 5) < 0 ||
        raddle_dtype_from_object(objects[3], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, 1, bits, args) < 0) {
        return NULL;
    }
    const raddle_tensor *logits = args[LOGITS].view;
    const int failed = kind_of_setting(objects[1]) == 2
                           ? raddle_tensor_arg_open(objects[1], "temperature", RADDLE_ARG_READ,
                                                    RADDLE_DTYPE_NONE, &args[TEMPERATURES])
                           : raddle_py_ops_parse_float(objects[1], "temperature", &temperature);
    if (failed < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    out = raddle_py_ops_result(objects[2], "out", objects[0], logits->shape, logits->ndim,
                               RADDLE_F32, logits->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[4], args, NUM, &stream) < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    PyThreadState *state = raddle_py_ops_begin_work(logits->device, raddle_tensor_count(logits));
    const raddle_status status =
        raddle_ops_softmax(logits, temperature, args[TEMPERATURES].view, args[OUT].view, stream);
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

/* ------------------------------------------------------------------ sample and filter */

static void fill_settings(const sample_settings *settings, raddle_ops_sample_args *args) {
    args->rows = settings->rows;
    args->num_rows = settings->num_rows;
    args->temperature = settings->tensors[TEMPERATURE].view;
    args->top_k = settings->tensors[TOP_K].view;
    args->top_p = settings->tensors[TOP_P].view;
    args->min_p = settings->tensors[MIN_P].view;
    args->seed = settings->tensors[SEED].view;
    args->offset = settings->tensors[OFFSET].view;
}

PyDoc_STRVAR(
    sample_doc,
    "ops_sample(x, is_probs, temperature, top_k, top_p, min_p, seed, offset, indices, "
    "is_joint, is_row_stream, valid, out, dtype, stream, /)\n--\n\nDraw one token per row.");

static PyObject *sample(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    enum { X, INDICES, VALID, OUT, NUM };
    static const char *const names[] = {"", "indices", "valid"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ | RADDLE_ARG_OPTIONAL,
                                 RADDLE_ARG_WRITE | RADDLE_ARG_OPTIONAL};
    raddle_tensor_arg args[NUM] = {0};
    raddle_ops_sample_args sample_args = {0};
    sample_settings settings;
    raddle_dtype bits;
    raddle_stream stream;
    (void)module;
    if (raddle_py_ops_check_count("ops_sample", count, 15) < 0) {
        return NULL;
    }
    const int is_probs = PyObject_IsTrue(objects[1]), is_joint = PyObject_IsTrue(objects[9]),
              is_row_stream = PyObject_IsTrue(objects[10]);
    if (is_probs < 0 || is_joint < 0 || is_row_stream < 0 ||
        raddle_dtype_from_object(objects[13], "dtype", &bits) < 0) {
        return NULL;
    }
    const char *own_names[] = {is_probs ? "probs" : "logits", names[1], names[2]};
    PyObject *const tensors[] = {objects[0], objects[8], objects[11]};
    if (raddle_py_ops_open(tensors, own_names, access, 3, bits, args) < 0) {
        return NULL;
    }
    const raddle_tensor *x = args[X].view, *indices = args[INDICES].view;
    const raddle_tensor *counted = indices ? indices : x;
    const int64_t n = counted->ndim >= 1 ? counted->shape[0] : 0;
    if (open_settings(objects + 2, n, &settings) < 0) {
        return raddle_py_ops_abandon(NULL, args, NUM);
    }
    const raddle_dtype out_dtype =
        indices && indices->dtype == RADDLE_I64 ? RADDLE_I64 : RADDLE_I32;
    PyObject *out = raddle_py_ops_result(objects[12], "out", objects[0], &n, 1, out_dtype,
                                         x->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[14], args, NUM, &stream) < 0) {
        close_settings(&settings);
        return raddle_py_ops_abandon(out, args, NUM);
    }
    sample_args.x = x;
    sample_args.indices = indices;
    sample_args.out = args[OUT].view;
    sample_args.valid = args[VALID].view;
    sample_args.is_probs = is_probs != 0;
    sample_args.is_joint = is_joint != 0;
    sample_args.is_row_stream = is_row_stream != 0;
    fill_settings(&settings, &sample_args);
    PyThreadState *state =
        raddle_py_ops_begin_work(x->device, n * (x->ndim == 2 ? x->shape[1] : 0));
    const raddle_status status = raddle_ops_sample(&sample_args, stream);
    raddle_py_ops_end_work(state);
    close_settings(&settings);
    return raddle_py_ops_finish(status, out, args, NUM);
}

PyDoc_STRVAR(filter_doc, "ops_filter(x, is_probs, top_k, top_p, out, dtype, stream, /)\n--\n\n"
                         "What top_k and top_p leave of rows.");

static PyObject *filter(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    enum { X, OUT, NUM };
    static const int access[] = {RADDLE_ARG_READ};
    raddle_tensor_arg args[NUM] = {0};
    raddle_ops_sample_args filter_args = {0};
    sample_settings settings;
    raddle_dtype bits;
    raddle_stream stream;
    (void)module;
    if (raddle_py_ops_check_count("ops_filter", count, 7) < 0) {
        return NULL;
    }
    const int is_probs = PyObject_IsTrue(objects[1]);
    const char *name = is_probs ? "probs" : "logits";
    if (is_probs < 0 || raddle_dtype_from_object(objects[5], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, &name, access, 1, bits, args) < 0) {
        return NULL;
    }
    const raddle_tensor *x = args[X].view;
    PyObject *one = PyFloat_FromDouble(1.0), *zero = PyLong_FromLong(0);
    PyObject *const given[NUM_SETTINGS] = {one, objects[2], objects[3], zero, zero, zero};
    const int opened =
        one && zero ? open_settings(given, x->ndim >= 1 ? x->shape[0] : 0, &settings) : -1;
    Py_XDECREF(one);
    Py_XDECREF(zero);
    if (opened < 0) {
        return raddle_py_ops_abandon(NULL, args, NUM);
    }
    PyObject *out = raddle_py_ops_result(objects[4], "out", objects[0], x->shape, x->ndim, x->dtype,
                                         x->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[6], args, NUM, &stream) < 0) {
        close_settings(&settings);
        return raddle_py_ops_abandon(out, args, NUM);
    }
    filter_args.x = x;
    filter_args.out = args[OUT].view;
    filter_args.is_probs = is_probs != 0;
    fill_settings(&settings, &filter_args);
    PyThreadState *state = raddle_py_ops_begin_work(x->device, raddle_tensor_count(x));
    const raddle_status status = raddle_ops_filter(&filter_args, stream);
    raddle_py_ops_end_work(state);
    close_settings(&settings);
    return raddle_py_ops_finish(status, out, args, NUM);
}

/* ------------------------------------------------------------------ speculative decoding */

/* A number, or a tensor of them. */
static int open_number(PyObject *object, const char *name, uint64_t *out_value,
                       raddle_tensor_arg *arg) {
    return kind_of_setting(object) == 2
               ? raddle_tensor_arg_open(object, name, RADDLE_ARG_READ, RADDLE_DTYPE_NONE, arg)
               : parse_u64(object, name, out_value);
}

PyDoc_STRVAR(
    verify_doc,
    "ops_verify(draft_probs, draft_token_ids, target_probs, accepted, emitted, seed, offset, "
    "is_row_stream, out, dtype, stream, /)\n--\n\nHow much of a drafted chain is kept.");

static PyObject *verify(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"draft_probs", "draft_token_ids", "target_probs",
                                        "accepted", "emitted"};
    enum { WRITE = RADDLE_ARG_WRITE | RADDLE_ARG_OPTIONAL };
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ, RADDLE_ARG_READ, WRITE, WRITE};
    enum { DRAFT, IDS, TARGET, ACCEPTED, EMITTED, SEEDS, OFFSETS, OUT, NUM };
    raddle_tensor_arg args[NUM] = {0};
    raddle_ops_verify_args verify_args = {0};
    raddle_dtype bits;
    raddle_stream stream;
    PyObject *out = NULL;
    (void)module;
    if (raddle_py_ops_check_count("ops_verify", count, 11) < 0) {
        return NULL;
    }
    const int is_row_stream = PyObject_IsTrue(objects[7]);
    if (is_row_stream < 0 || raddle_dtype_from_object(objects[9], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, 5, bits, args) < 0) {
        return NULL;
    }
    if (open_number(objects[5], "seed", &verify_args.seed_value, &args[SEEDS]) < 0 ||
        open_number(objects[6], "offset", &verify_args.offset_value, &args[OFFSETS]) < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    const raddle_tensor *draft = args[DRAFT].view;
    const int64_t shape[2] = {draft->ndim == 3 ? draft->shape[0] : 0,
                              draft->ndim == 3 ? draft->shape[1] + 1 : 0};
    out = raddle_py_ops_result(objects[8], "out", objects[0], shape, 2, RADDLE_I32, draft->device,
                               &args[OUT]);
    if (!out || raddle_stream_from_args(objects[10], args, NUM, &stream) < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    verify_args.draft = draft;
    verify_args.ids = args[IDS].view;
    verify_args.target = args[TARGET].view;
    verify_args.accepted = args[ACCEPTED].view;
    verify_args.emitted = args[EMITTED].view;
    verify_args.seed = args[SEEDS].view;
    verify_args.offset = args[OFFSETS].view;
    verify_args.out = args[OUT].view;
    verify_args.is_row_stream = is_row_stream != 0;
    PyThreadState *state = raddle_py_ops_begin_work(draft->device, raddle_tensor_count(draft));
    const raddle_status status = raddle_ops_verify(&verify_args, stream);
    raddle_py_ops_end_work(state);
    return raddle_py_ops_finish(status, out, args, NUM);
}

static PyMethodDef functions[] = {
    {"ops_softmax", RADDLE_FASTCALL(softmax), METH_FASTCALL, softmax_doc},
    {"ops_token_logprobs", RADDLE_FASTCALL(token_logprobs), METH_FASTCALL, token_logprobs_doc},
    {"ops_sample", RADDLE_FASTCALL(sample), METH_FASTCALL, sample_doc},
    {"ops_filter", RADDLE_FASTCALL(filter), METH_FASTCALL, filter_doc},
    {"ops_verify", RADDLE_FASTCALL(verify), METH_FASTCALL, verify_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_ops_add_sample(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}

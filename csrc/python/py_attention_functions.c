/* py_attention_functions.c - merging states, appending to a cache, lengths and positions; and the
 * argument helpers that py_attention.c shares.
 */
#include "python/py_attention.h"

#include <string.h>

#include "attention/attention.h"

/* ------------------------------------------------------------------ helpers */

int raddle_py_parse_layout(const char *text, raddle_kv_layout *out_layout) {
    if (strcmp(text, "NHD") == 0 || strcmp(text, "HND") == 0) {
        *out_layout = text[0] == 'N' ? RADDLE_NHD : RADDLE_HND;
        return 0;
    }
    raddle_raise(
        raddle_fail(RADDLE_ERR_VALUE, "kv_layout: expected \"NHD\" or \"HND\", got \"%s\"", text));
    return -1;
}

int raddle_py_parse_lse_base(const char *text, raddle_lse_base *out_base) {
    if (strcmp(text, "2") == 0 || strcmp(text, "e") == 0) {
        *out_base = text[0] == '2' ? RADDLE_LSE_BASE_2 : RADDLE_LSE_BASE_E;
        return 0;
    }
    raddle_raise(
        raddle_fail(RADDLE_ERR_VALUE, "lse_base: expected \"2\" or \"e\", got \"%s\"", text));
    return -1;
}

/* Arrays of 16-bit floats and the like reach NumPy users as uint16: their bits are read as the
 * planned dtype. */
void raddle_py_read_bits_as(raddle_tensor_arg *arg, raddle_dtype dtype) {
    const raddle_dtype given = arg->view == NULL ? RADDLE_DTYPE_NONE : arg->tensor.dtype;
    if ((given == RADDLE_U16 && (dtype == RADDLE_BF16 || dtype == RADDLE_F16)) ||
        (given == RADDLE_U8 && (dtype == RADDLE_F8_E4M3 || dtype == RADDLE_F8_E5M2))) {
        arg->tensor.dtype = dtype;
    }
}

int raddle_py_check_count(const char *function, Py_ssize_t given, Py_ssize_t wanted) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", function, wanted, given);
        return -1;
    }
    return 0;
}

void raddle_py_close_args(raddle_tensor_arg *args, int count) {
    for (int i = 0; i < count; i++) {
        raddle_tensor_arg_close(&args[i]);
    }
}

/* Opens count objects in order. On failure nothing stays open. */
int raddle_py_open_args(PyObject *const *objects, const char *const *names, const int *access,
                        int count, raddle_tensor_arg *args) {
    memset(args, 0, (size_t)count * sizeof *args);
    for (int i = 0; i < count; i++) {
        if (raddle_tensor_arg_open(objects[i], names[i], access[i], RADDLE_DTYPE_NONE, &args[i]) <
            0) {
            raddle_py_close_args(args, i);
            return -1;
        }
    }
    return 0;
}

/* The result: the caller's own tensor, or a new one of q's kind. New reference. */
PyObject *raddle_py_open_result(PyObject *given, PyObject *like, const char *name,
                                const int64_t *shape, int ndim, raddle_dtype dtype,
                                raddle_device device, raddle_tensor_arg *arg) {
    PyObject *object = given == Py_None
                           ? raddle_tensor_arg_new_like(like, shape, ndim, dtype, device)
                           : Py_NewRef(given);
    if (object == NULL) {
        return NULL;
    }
    if (raddle_tensor_arg_open(object, name, RADDLE_ARG_WRITE, RADDLE_DTYPE_NONE, arg) < 0) {
        Py_DECREF(object);
        return NULL;
    }
    raddle_py_read_bits_as(arg, dtype);
    return object;
}

/* ------------------------------------------------------------------ functions */

/* Closes args, drops results, and returns None, the one result or a pair of them; or raises. */
static PyObject *finish(raddle_status status, raddle_tensor_arg *args, int count,
                        PyObject *const *results, int num_results) {
    PyObject *value = NULL;
    raddle_py_close_args(args, count);
    if (status != RADDLE_OK) {
        raddle_raise(status);
    } else if (num_results == 0) {
        value = Py_NewRef(Py_None);
    } else {
        value = num_results == 1 ? Py_NewRef(results[0]) : PyTuple_Pack(2, results[0], results[1]);
    }
    for (int i = 0; i < num_results; i++) {
        Py_XDECREF(results[i]);
    }
    return value;
}

/* Gives up before the core was called: a Python exception is set. */
static PyObject *abandon(raddle_tensor_arg *args, int count, PyObject *const *results,
                         int num_results) {
    raddle_py_close_args(args, count);
    for (int i = 0; i < num_results; i++) {
        Py_XDECREF(results[i]);
    }
    return NULL;
}

static int parse_base_object(PyObject *object, raddle_lse_base *out_base) {
    const char *text = PyUnicode_AsUTF8(object);
    return text == NULL ? -1 : raddle_py_parse_lse_base(text, out_base);
}

PyDoc_STRVAR(merge_state_doc,
             "attention_merge_state(v_a, s_a, v_b, s_b, mask, v_out, s_out, lse_base, stream, /)\n"
             "--\n\nJoin two partial attentions; (v_out, s_out), made like the inputs when None.");

static PyObject *merge_state(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"v_a", "s_a", "v_b", "s_b", "mask"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ, RADDLE_ARG_READ, RADDLE_ARG_READ,
                                 RADDLE_ARG_OPTIONAL};
    enum { V_OUT = 5, S_OUT, NUM };
    (void)module;
    raddle_tensor_arg args[NUM];
    memset(args, 0, sizeof args);
    PyObject *results[2] = {NULL, NULL};
    raddle_lse_base base;
    raddle_stream stream = NULL;
    if (raddle_py_check_count("attention_merge_state", count, NUM + 2) < 0 ||
        parse_base_object(objects[NUM], &base) < 0 ||
        raddle_py_open_args(objects, names, access, 5, args) < 0) {
        return NULL;
    }
    const raddle_tensor *v = &args[0].tensor, *s = &args[1].tensor;
    results[0] = raddle_py_open_result(objects[V_OUT], objects[0], "v_out", v->shape, v->ndim,
                                       v->dtype, v->device, &args[V_OUT]);
    if (results[0] != NULL) {
        results[1] = raddle_py_open_result(objects[S_OUT], objects[1], "s_out", s->shape, s->ndim,
                                           s->dtype, s->device, &args[S_OUT]);
    }
    if (results[1] == NULL || raddle_stream_from_args(objects[NUM + 1], args, NUM, &stream) < 0) {
        return abandon(args, NUM, results, 2);
    }
    return finish(raddle_attention_merge_state(args[0].view, args[1].view, args[2].view,
                                               args[3].view, args[4].view, args[V_OUT].view,
                                               args[S_OUT].view, base, stream),
                  args, NUM, results, 2);
}

PyDoc_STRVAR(merge_states_doc,
             "attention_merge_states(v, s, v_out, s_out, lse_base, stream, /)\n--\n\n"
             "Join any number of partial attentions; (v_out, s_out), made like v and s when None.");

static PyObject *merge_states(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"v", "s"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ};
    enum { V_OUT = 2, S_OUT, NUM };
    (void)module;
    raddle_tensor_arg args[NUM];
    memset(args, 0, sizeof args);
    PyObject *results[2] = {NULL, NULL};
    raddle_lse_base base;
    raddle_stream stream = NULL;
    if (raddle_py_check_count("attention_merge_states", count, NUM + 2) < 0 ||
        parse_base_object(objects[NUM], &base) < 0 ||
        raddle_py_open_args(objects, names, access, 2, args) < 0) {
        return NULL;
    }
    const raddle_tensor *v = &args[0].tensor, *s = &args[1].tensor;
    if (v->ndim != 4 || s->ndim != 3) {
        raddle_raise(raddle_fail(RADDLE_ERR_SHAPE,
                                 "v, s: expected [n, states, heads, dim] and [n, states, heads], "
                                 "got %d and %d dimensions",
                                 (int)v->ndim, (int)s->ndim));
        return abandon(args, NUM, results, 2);
    }
    const int64_t shape[3] = {v->shape[0], v->shape[2], v->shape[3]};
    results[0] = raddle_py_open_result(objects[V_OUT], objects[0], "v_out", shape, 3, v->dtype,
                                       v->device, &args[V_OUT]);
    if (results[0] != NULL) {
        results[1] = raddle_py_open_result(objects[S_OUT], objects[1], "s_out", shape, 2, s->dtype,
                                           s->device, &args[S_OUT]);
    }
    if (results[1] == NULL || raddle_stream_from_args(objects[NUM + 1], args, NUM, &stream) < 0) {
        return abandon(args, NUM, results, 2);
    }
    return finish(raddle_attention_merge_states(args[0].view, args[1].view, args[V_OUT].view,
                                                args[S_OUT].view, base, stream),
                  args, NUM, results, 2);
}

/* k, v, cache (or its K half) and V half or None, then the index tensors: what both appends share.
 * Rows that NumPy holds as uint16 are bits of dtype, where that is known. */
static raddle_status open_cache(raddle_tensor_arg *args, raddle_kv_layout layout,
                                raddle_dtype dtype, raddle_kv_cache *out_cache) {
    for (int i = 0; i < 4; i++) {
        raddle_py_read_bits_as(&args[i], dtype);
    }
    const raddle_tensor *cache = args[2].view;
    const int token_axis = (layout == RADDLE_NHD ? 1 : 2) + (args[3].view == NULL ? 1 : 0);
    RADDLE_REQUIRE(cache->ndim > token_axis && cache->shape[token_axis] <= INT32_MAX,
                   RADDLE_ERR_SHAPE,
                   "kv_cache: expected [num_pages, 2, ...] of 5 dimensions or a (k, v) pair of 4, "
                   "got %d dimensions",
                   (int)cache->ndim);
    return raddle_kv_cache_from_tensors(cache, args[3].view, layout,
                                        (int32_t)cache->shape[token_axis], out_cache);
}

/* A cache whose dtype NumPy cannot name is given by the word dtype (None: as the tensors say). */
static int parse_append(PyObject *layout_object, PyObject *dtype_object,
                        raddle_kv_layout *out_layout, raddle_dtype *out_dtype) {
    const char *text = PyUnicode_AsUTF8(layout_object);
    if (text == NULL || raddle_py_parse_layout(text, out_layout) < 0) {
        return -1;
    }
    return raddle_dtype_from_object(dtype_object, "dtype", out_dtype);
}

PyDoc_STRVAR(append_doc, "attention_append(k, v, k_or_kv_cache, v_cache, batch_indices, positions, "
                         "indptr, indices, kv_layout, dtype, stream, /)\n--\n\n"
                         "Write rows into a paged cache by request and position.");

static PyObject *append(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"append_key",    "append_value", "kv_cache",  "kv_cache",
                                        "batch_indices", "positions",    "kv_indptr", "kv_indices"};
    static const int access[] = {
        RADDLE_ARG_READ, RADDLE_ARG_READ, RADDLE_ARG_WRITE, RADDLE_ARG_WRITE | RADDLE_ARG_OPTIONAL,
        RADDLE_ARG_READ, RADDLE_ARG_READ, RADDLE_ARG_READ,  RADDLE_ARG_READ};
    enum { NUM = 8 };
    (void)module;
    raddle_tensor_arg args[NUM];
    raddle_kv_layout layout;
    raddle_dtype dtype;
    raddle_kv_cache cache;
    raddle_stream stream = NULL;
    if (raddle_py_check_count("attention_append", count, NUM + 3) < 0 ||
        parse_append(objects[NUM], objects[NUM + 1], &layout, &dtype) < 0 ||
        raddle_py_open_args(objects, names, access, NUM, args) < 0) {
        return NULL;
    }
    if (raddle_stream_from_args(objects[NUM + 2], args, NUM, &stream) < 0) {
        return abandon(args, NUM, NULL, 0);
    }
    raddle_status status = open_cache(args, layout, dtype, &cache);
    if (status == RADDLE_OK) {
        status = raddle_attention_append(args[0].view, args[1].view, args[4].view, args[5].view,
                                         args[6].view, args[7].view, &cache, stream);
    }
    return finish(status, args, NUM, NULL, 0);
}

PyDoc_STRVAR(append_slots_doc, "attention_append_slots(k, v, k_or_kv_cache, v_cache, slot_mapping, "
                               "kv_layout, dtype, stream, /)\n--\n\n"
                               "Write rows into a paged cache by slot.");

static PyObject *append_slots(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"k", "v", "kv_cache", "kv_cache", "slot_mapping"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ, RADDLE_ARG_WRITE,
                                 RADDLE_ARG_WRITE | RADDLE_ARG_OPTIONAL, RADDLE_ARG_READ};
    enum { NUM = 5 };
    (void)module;
    raddle_tensor_arg args[NUM];
    raddle_kv_layout layout;
    raddle_dtype dtype;
    raddle_kv_cache cache;
    raddle_stream stream = NULL;
    if (raddle_py_check_count("attention_append_slots", count, NUM + 3) < 0 ||
        parse_append(objects[NUM], objects[NUM + 1], &layout, &dtype) < 0 ||
        raddle_py_open_args(objects, names, access, NUM, args) < 0) {
        return NULL;
    }
    if (raddle_stream_from_args(objects[NUM + 2], args, NUM, &stream) < 0) {
        return abandon(args, NUM, NULL, 0);
    }
    raddle_status status = open_cache(args, layout, dtype, &cache);
    if (status == RADDLE_OK) {
        status =
            raddle_attention_append_slots(args[0].view, args[1].view, args[4].view, &cache, stream);
    }
    return finish(status, args, NUM, NULL, 0);
}

PyDoc_STRVAR(seq_lens_doc,
             "attention_seq_lens(indptr, last_page_len, page_size, out, stream, /)\n--\n\n"
             "Tokens of each request, int32; out, made like indptr when None.");

static PyObject *seq_lens(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"kv_indptr", "kv_last_page_len"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ};
    enum { OUT = 2, NUM };
    (void)module;
    raddle_tensor_arg args[NUM];
    memset(args, 0, sizeof args);
    raddle_stream stream = NULL;
    if (raddle_py_check_count("attention_seq_lens", count, 5) < 0) {
        return NULL;
    }
    const long page_size = PyLong_AsLong(objects[2]);
    if ((page_size == -1 && PyErr_Occurred()) ||
        raddle_py_open_args(objects, names, access, 2, args) < 0) {
        return NULL;
    }
    const int64_t batch = args[1].tensor.ndim == 1 ? args[1].tensor.shape[0] : 0;
    PyObject *result = raddle_py_open_result(objects[3], objects[0], "out", &batch, 1, RADDLE_I32,
                                             args[0].tensor.device, &args[OUT]);
    if (result == NULL || raddle_stream_from_args(objects[4], args, NUM, &stream) < 0) {
        return abandon(args, NUM, &result, 1);
    }
    const int32_t size = page_size > INT32_MAX || page_size < 0 ? 0 : (int32_t)page_size;
    return finish(
        raddle_attention_seq_lens(args[0].view, args[1].view, size, args[OUT].view, stream), args,
        NUM, &result, 1);
}

PyDoc_STRVAR(
    positions_doc,
    "attention_positions(append_indptr, seq_lens, nnz, batch_indices, positions, stream, /)"
    "\n--\n\nRequest and position of each of nnz rows, int32; made when None.");

static PyObject *positions(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"append_indptr", "seq_lens"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ};
    enum { BATCH_INDICES = 2, POSITIONS, NUM };
    (void)module;
    raddle_tensor_arg args[NUM];
    memset(args, 0, sizeof args);
    PyObject *results[2] = {NULL, NULL};
    raddle_stream stream = NULL;
    if (raddle_py_check_count("attention_positions", count, 6) < 0) {
        return NULL;
    }
    const int64_t rows = PyLong_AsLongLong(objects[2]);
    if ((rows == -1 && PyErr_Occurred()) ||
        raddle_py_open_args(objects, names, access, 2, args) < 0) {
        return NULL;
    }
    if (rows < 0) {
        raddle_raise(raddle_fail(RADDLE_ERR_VALUE, "nnz: expected 0 rows or more, got %lld",
                                 (long long)rows));
        return abandon(args, NUM, results, 2);
    }
    const raddle_device device = args[0].tensor.device;
    results[0] = raddle_py_open_result(objects[3], objects[0], "batch_indices", &rows, 1,
                                       RADDLE_I32, device, &args[BATCH_INDICES]);
    if (results[0] != NULL) {
        results[1] = raddle_py_open_result(objects[4], objects[0], "positions", &rows, 1,
                                           RADDLE_I32, device, &args[POSITIONS]);
    }
    if (results[1] == NULL || raddle_stream_from_args(objects[5], args, NUM, &stream) < 0) {
        return abandon(args, NUM, results, 2);
    }
    return finish(raddle_attention_positions(args[0].view, args[1].view, args[BATCH_INDICES].view,
                                             args[POSITIONS].view, stream),
                  args, NUM, results, 2);
}

static PyMethodDef functions[] = {
    {"attention_merge_state", RADDLE_FASTCALL(merge_state), METH_FASTCALL, merge_state_doc},
    {"attention_merge_states", RADDLE_FASTCALL(merge_states), METH_FASTCALL, merge_states_doc},
    {"attention_seq_lens", RADDLE_FASTCALL(seq_lens), METH_FASTCALL, seq_lens_doc},
    {"attention_positions", RADDLE_FASTCALL(positions), METH_FASTCALL, positions_doc},
    {"attention_append", RADDLE_FASTCALL(append), METH_FASTCALL, append_doc},
    {"attention_append_slots", RADDLE_FASTCALL(append_slots), METH_FASTCALL, append_slots_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_add_attention_functions(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}

/* py_ops_rope.c - rotary embedding: the table of cosines and sines, and the two functions that turn. */
#include "python/py_ops.h"

#include <string.h>

#include "base/alloc.h"
#include "ops/ops.h"
#include "python/py_tensor.h"
#include "runtime/backend.h"

/* ------------------------------------------------------------------ the table */

/* Fills a host table and moves it to table's device. */
static raddle_status make_cos_sin(const double *inv_freq, int32_t half, double factor,
                                  const raddle_tensor *table) {
    if (table->device.type == RADDLE_CPU) {
        return raddle_ops_fill_cos_sin(inv_freq, half, factor, table);
    }
    const raddle_backend *backend;
    const size_t bytes = (size_t)raddle_tensor_count(table) * sizeof(float);
    RADDLE_TRY(raddle_backend_for(table->device, &backend));
    raddle_tensor host = *table;
    host.device = (raddle_device){RADDLE_CPU, 0};
    host.data = raddle_alloc(bytes);
    if (!host.data) {
        return raddle_fail_memory(bytes);
    }
    const int32_t device = table->device.index;
    raddle_status status = raddle_ops_fill_cos_sin(inv_freq, half, factor, &host);
    if (status == RADDLE_OK) {
        status = backend->copy(device, table->data, host.data, bytes, RADDLE_COPY_TO_DEVICE, NULL);
    }
    if (status == RADDLE_OK) {
        status = backend->synchronize(device, NULL);
    }
    raddle_free(host.data);
    return status;
}

PyDoc_STRVAR(cos_sin_doc, "ops_cos_sin(inv_freq, factor, max_position, device, /)\n--\n\n"
                          "Table of cosines and sines, float32 [max_position, 2 * len(inv_freq)].");

static PyObject *cos_sin(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    raddle_device device;
    double factor;
    (void)module;
    if (raddle_py_ops_check_count("ops_cos_sin", count, 4) < 0 ||
        raddle_py_ops_parse_double(objects[1], "attention_factor", &factor) < 0 ||
        raddle_device_from_object(objects[3], "device", &device) < 0) {
        return NULL;
    }
    const long long max_position = PyLong_AsLongLong(objects[2]);
    if (max_position == -1 && PyErr_Occurred()) {
        return NULL;
    }
    PyObject *list = PySequence_Fast(objects[0], "inv_freq: expected a sequence of numbers");
    if (!list) {
        return NULL;
    }
    const Py_ssize_t half = PySequence_Fast_GET_SIZE(list);
    const int64_t shape[2] = {max_position, 2 * (int64_t)half};
    raddle_status status = RADDLE_OK;
    PyObject *table = NULL;
    double *inv_freq = raddle_alloc((size_t)half * sizeof(double));
    if (!inv_freq) {
        raddle_raise(raddle_fail_memory((size_t)half * sizeof(double)));
        goto out;
    }
    for (Py_ssize_t i = 0; i < half; i++) {
        if (raddle_py_ops_parse_double(PySequence_Fast_GET_ITEM(list, i), "inv_freq",
                                       &inv_freq[i]) < 0) {
            goto out;
        }
    }
    table = raddle_py_tensor_new(shape, 2, RADDLE_F32, device);
    if (!table) {
        goto out;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = make_cos_sin(inv_freq, (int32_t)half, factor, &((raddle_py_tensor *)table)->tensor);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        Py_CLEAR(table);
        raddle_raise(status);
    }
out:
    raddle_free(inv_freq);
    Py_DECREF(list);
    return table;
}

/* ------------------------------------------------------------------ rope */

/* The turns of python/raddle/ops.py: bytes of uint64, or None. The bytes live as long as object. */
static int read_turns(PyObject *object, raddle_ops_rope_args *args, uint64_t *turns) {
    char *data;
    Py_ssize_t size;
    if (object == Py_None) {
        return 0;
    }
    if (PyBytes_AsStringAndSize(object, &data, &size) < 0) {
        return -1;
    }
    if (size % 8 != 0 || size > RADDLE_OPS_MAX_TURNS * 8) {
        raddle_raise(raddle_fail(RADDLE_ERR_UNSUPPORTED,
                                 "rotary_dim: at most %d without a cos_sin_cache, got %zd",
                                 2 * RADDLE_OPS_MAX_TURNS, size / 4));
        return -1;
    }
    memcpy(turns, data, (size_t)size);
    args->turns = turns;
    args->num_turns = size / 8;
    return 0;
}

PyDoc_STRVAR(rope_doc,
             "ops_rope(q, k, positions, indptr, offsets, cos_sin_cache, q_out, k_out, turns, "
             "attention_factor, interleave, dtype, stream, /)\n--\n\nRotate q and k.");

static PyObject *rope(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {
        "q", "k", "positions", "indptr", "offsets", "cos_sin_cache", "q_out", "k_out"};
    enum { Q, K, POSITIONS, INDPTR, OFFSETS, CACHE, Q_OUT, K_OUT, NUM };
    enum {
        READ = RADDLE_ARG_READ | RADDLE_ARG_OPTIONAL,
        WRITE = RADDLE_ARG_WRITE | RADDLE_ARG_OPTIONAL
    };
    uint64_t turns[RADDLE_OPS_MAX_TURNS];
    raddle_tensor_arg args[NUM];
    raddle_ops_rope_args rope_args = {0};
    raddle_dtype bits;
    raddle_stream stream;
    (void)module;
    if (raddle_py_ops_check_count("ops_rope", count, NUM + 5) < 0 ||
        read_turns(objects[NUM], &rope_args, turns) < 0 ||
        raddle_py_ops_parse_float(objects[NUM + 1], "attention_factor",
                                  &rope_args.attention_factor) < 0) {
        return NULL;
    }
    const int interleave = PyObject_IsTrue(objects[NUM + 2]);
    const bool in_place = objects[Q_OUT] == Py_None;
    const int access[] = {in_place ? RADDLE_ARG_WRITE : RADDLE_ARG_READ,
                          in_place ? WRITE : READ,
                          READ,
                          READ,
                          READ,
                          READ,
                          WRITE,
                          WRITE};
    if (interleave < 0 || raddle_dtype_from_object(objects[NUM + 3], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, NUM, bits, args) < 0) {
        return NULL;
    }
    if (raddle_stream_from_args(objects[NUM + 4], args, NUM, &stream) < 0) {
        return raddle_py_ops_abandon(NULL, args, NUM);
    }
    rope_args.q = args[Q].view;
    rope_args.k = args[K].view;
    rope_args.q_out = args[Q_OUT].view;
    rope_args.k_out = args[K_OUT].view;
    rope_args.positions = args[POSITIONS].view;
    rope_args.indptr = args[INDPTR].view;
    rope_args.offsets = args[OFFSETS].view;
    rope_args.cos_sin = args[CACHE].view;
    rope_args.interleave = interleave != 0;
    PyThreadState *state =
        raddle_py_ops_begin_work(args[Q].tensor.device, raddle_tensor_count(args[Q].view));
    const raddle_status status = raddle_ops_rope(&rope_args, stream);
    raddle_py_ops_end_work(state);
    return raddle_py_ops_finish(status, Py_NewRef(Py_None), args, NUM);
}

/* ------------------------------------------------------------------ rope to 8 bits */

PyDoc_STRVAR(rope_fp8_doc,
             "ops_rope_fp8(q_rope, k_rope, q_nope, k_nope, v, q_rope_out, k_rope_out, q_nope_out, "
             "k_nope_out, v_out, cos_sin_cache, positions, batch_indices, token_positions, "
             "kv_indptr, kv_indices, q_scale, kv_scale, interleave, dtype, stream, /)\n--\n\n"
             "Rotate q and k and round them to 8-bit floats.");

static PyObject *rope_fp8(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {
        "q_rope",        "k_rope",     "q_nope",        "k_nope",          "v",
        "q_rope_out",    "k_rope_out", "q_nope_out",    "k_nope_out",      "v_out",
        "cos_sin_cache", "positions",  "batch_indices", "token_positions", "kv_indptr",
        "kv_indices"};
    enum { READ = RADDLE_ARG_READ, WRITE = RADDLE_ARG_WRITE, OPTIONAL = RADDLE_ARG_OPTIONAL };
    static const int access[] = {
        READ,           READ,  READ | OPTIONAL,  READ | OPTIONAL,  READ | OPTIONAL,
        WRITE,          WRITE, WRITE | OPTIONAL, WRITE | OPTIONAL, WRITE | OPTIONAL,
        READ,           READ,  READ | OPTIONAL,  READ | OPTIONAL,  READ | OPTIONAL,
        READ | OPTIONAL};
    enum {
        Q_ROPE,
        K_ROPE,
        Q_NOPE,
        K_NOPE,
        V,
        Q_ROPE_OUT,
        K_ROPE_OUT,
        Q_NOPE_OUT,
        K_NOPE_OUT,
        V_OUT,
        CACHE,
        POSITIONS,
        REQUESTS,
        SLOTS,
        INDPTR,
        INDICES,
        NUM
    };
    raddle_tensor_arg args[NUM];
    raddle_ops_rope_fp8_args fp8_args;
    raddle_dtype bits;
    raddle_stream stream;
    (void)module;
    if (raddle_py_ops_check_count("ops_rope_fp8", count, NUM + 5) < 0 ||
        raddle_py_ops_parse_float(objects[NUM], "q_scale", &fp8_args.q_scale) < 0 ||
        raddle_py_ops_parse_float(objects[NUM + 1], "kv_scale", &fp8_args.kv_scale) < 0) {
        return NULL;
    }
    const int interleave = PyObject_IsTrue(objects[NUM + 2]);
    if (interleave < 0 || raddle_dtype_from_object(objects[NUM + 3], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, NUM, bits, args) < 0) {
        return NULL;
    }
    if (raddle_stream_from_args(objects[NUM + 4], args, NUM, &stream) < 0) {
        return raddle_py_ops_abandon(NULL, args, NUM);
    }
    for (int i = SLOTS; i <= INDICES; i++) {
        if (!args[i].view != !args[REQUESTS].view) {
            raddle_raise(raddle_fail(RADDLE_ERR_VALUE,
                                     "%s: expected all of batch_indices, token_positions, "
                                     "kv_indptr and kv_indices, or none",
                                     names[i]));
            return raddle_py_ops_abandon(NULL, args, NUM);
        }
    }
    fp8_args.q_rope = args[Q_ROPE].view;
    fp8_args.q_nope = args[Q_NOPE].view;
    fp8_args.k_rope = args[K_ROPE].view;
    fp8_args.k_nope = args[K_NOPE].view;
    fp8_args.v = args[V].view;
    fp8_args.q_rope_out = args[Q_ROPE_OUT].view;
    fp8_args.q_nope_out = args[Q_NOPE_OUT].view;
    fp8_args.k_rope_out = args[K_ROPE_OUT].view;
    fp8_args.k_nope_out = args[K_NOPE_OUT].view;
    fp8_args.v_out = args[V_OUT].view;
    fp8_args.cos_sin = args[CACHE].view;
    fp8_args.positions = args[POSITIONS].view;
    fp8_args.batch_indices = args[REQUESTS].view;
    fp8_args.token_positions = args[SLOTS].view;
    fp8_args.kv_indptr = args[INDPTR].view;
    fp8_args.kv_indices = args[INDICES].view;
    fp8_args.interleave = interleave != 0;
    PyThreadState *state = raddle_py_ops_begin_work(args[Q_ROPE].tensor.device,
                                                    raddle_tensor_count(args[Q_ROPE].view));
    const raddle_status status = raddle_ops_rope_fp8(&fp8_args, stream);
    raddle_py_ops_end_work(state);
    return raddle_py_ops_finish(status, Py_NewRef(Py_None), args, NUM);
}

static PyMethodDef functions[] = {
    {"ops_cos_sin", RADDLE_FASTCALL(cos_sin), METH_FASTCALL, cos_sin_doc},
    {"ops_rope", RADDLE_FASTCALL(rope), METH_FASTCALL, rope_doc},
    {"ops_rope_fp8", RADDLE_FASTCALL(rope_fp8), METH_FASTCALL, rope_fp8_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_ops_add_rope(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}

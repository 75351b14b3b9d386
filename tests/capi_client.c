/* capi_client.c - an extension module that uses raddle through raddle.h and its capsule alone.
 *
 * Compiled by tests/test_capi.py against raddle.get_include(). attention() is what a caller would
 * write; the rest asks for trouble: sizes, versions and addresses that cannot be.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "raddle.h"

#include <string.h>

#include "dlpack.h"

static const raddle_api *api;

/* ---------------------------------------------------------------- attention */

enum { Q, KV, V, OUT, LSE, QO_INDPTR, INDPTR, INDICES, LAST, NUM_TENSORS };

static const char *const names[NUM_TENSORS] = {
    "q", "kv_cache", "v", "out", "lse", "qo_indptr", "indptr", "indices", "last_page_len"};

/* None leaves a NULL. */
static int open_all(PyObject *const *objects, raddle_dtype dtype, raddle_tensor **tensors) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        const raddle_access access = i == OUT || i == LSE ? RADDLE_WRITE : RADDLE_READ;
        const raddle_dtype bits = i <= OUT ? dtype : RADDLE_DTYPE_NONE;
        if (objects[i] != Py_None &&
            api->tensor_open(objects[i], names[i], access, bits, &tensors[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

/* Scratch of the size that the plan names, then the batch, then its attention. */
static raddle_status run_plan(raddle_plan *plan, const raddle_attention_batch *batch,
                              const raddle_attention_args *args) {
    raddle_workspace *workspace = NULL;
    const raddle_device cpu = {RADDLE_CPU, 0};
    raddle_status status = api->workspace_create(cpu, api->plan_workspace_bytes(plan), &workspace);
    if (status == RADDLE_OK) {
        status = api->plan_bind_workspace(plan, workspace);
    }
    api->workspace_destroy(workspace); /* the plan keeps it */
    if (status == RADDLE_OK) {
        status = api->attention_plan_update(plan, batch, NULL);
    }
    return status == RADDLE_OK ? api->attention_plan_run(plan, args, NULL) : status;
}

PyDoc_STRVAR(attention_doc,
             "attention(q, k_or_kv, v, out, lse, qo_indptr, indptr, indices, last_page_len, dtype, "
             "num_qo_heads, num_kv_heads, head_dim, page_size, hnd, causal)");

static PyObject *attention(PyObject *module, PyObject *args) {
    PyObject *objects[NUM_TENSORS];
    raddle_tensor *tensors[NUM_TENSORS] = {NULL};
    raddle_kv_cache *cache = NULL;
    raddle_plan *plan = NULL;
    raddle_status status;
    int dtype, hnd, causal;
    bool failed = true;
    raddle_attention_spec spec = {.struct_size = sizeof spec, .device = {RADDLE_CPU, 0}};
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOiiiiipp", &objects[Q], &objects[KV], &objects[V],
                          &objects[OUT], &objects[LSE], &objects[QO_INDPTR], &objects[INDPTR],
                          &objects[INDICES], &objects[LAST], &dtype, &spec.num_qo_heads,
                          &spec.num_kv_heads, &spec.head_dim_qk, &spec.page_size, &hnd, &causal)) {
        return NULL;
    }
    if (open_all(objects, (raddle_dtype)dtype, tensors) < 0) {
        goto out;
    }
    spec.q_dtype = (raddle_dtype)dtype;
    spec.causal = causal;
    spec.window_left = -1;
    spec.max_batch = 8;
    spec.max_pages = 512;
    spec.max_qo_tokens = 64;
    spec.max_qo_len = tensors[QO_INDPTR] == NULL ? 1 : 0;
    status = api->kv_cache_create(tensors[KV], tensors[V], hnd ? RADDLE_HND : RADDLE_NHD,
                                  spec.page_size, &cache);
    api->tensor_close(tensors[KV]); /* the cache keeps it */
    tensors[KV] = NULL;
    const raddle_attention_batch batch = {
        .struct_size = sizeof batch,
        .qo_indptr = tensors[QO_INDPTR],
        .kv_indptr = tensors[INDPTR],
        .kv_indices = tensors[INDICES],
        .last_page_len = tensors[LAST],
    };
    const raddle_attention_args run = {
        .struct_size = sizeof run,
        .q = tensors[Q],
        .kv = cache,
        .out = tensors[OUT],
        .lse = tensors[LSE],
    };
    if (status == RADDLE_OK) {
        Py_BEGIN_ALLOW_THREADS;
        status = api->attention_plan_create(&spec, &plan);
        if (status == RADDLE_OK) {
            status = run_plan(plan, &batch, &run);
        }
        Py_END_ALLOW_THREADS;
    }
    if (status != RADDLE_OK) {
        api->raise(status);
        goto out;
    }
    failed = false;
out:
    api->plan_destroy(plan);
    api->kv_cache_destroy(cache);
    for (int i = 0; i < NUM_TENSORS; i++) {
        api->tensor_close(tensors[i]);
    }
    return failed ? NULL : Py_NewRef(Py_None);
}

/* ---------------------------------------------------------------- appending, merging */

/* Opens as many tensors as objects has; writable: a mask. */
static int open_tuple(PyObject *objects, unsigned writable, raddle_tensor **tensors) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(objects); i++) {
        const raddle_access access = writable >> i & 1 ? RADDLE_WRITE : RADDLE_READ;
        PyObject *object = PyTuple_GET_ITEM(objects, i);
        if (object != Py_None &&
            api->tensor_open(object, "given", access, RADDLE_DTYPE_NONE, &tensors[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

static raddle_status append_to(raddle_tensor *const *t, Py_ssize_t count, int page_size) {
    raddle_kv_cache *cache = NULL;
    raddle_status status = api->kv_cache_create(t[2], NULL, RADDLE_NHD, page_size, &cache);
    if (status == RADDLE_OK) {
        status = count == 4
                     ? api->attention_append_slots(t[0], t[1], t[3], cache, NULL)
                     : api->attention_append(t[0], t[1], t[3], t[4], t[5], t[6], cache, NULL);
    }
    api->kv_cache_destroy(cache);
    return status;
}

PyDoc_STRVAR(call_doc, "call(kind, tensors, writable, page_size): kind append, or merge of "
                       "(v_a, s_a, v_b, s_b, mask, v_out, s_out) or (v, s, v_out, s_out).");

static PyObject *call(PyObject *module, PyObject *args) {
    const char *kind;
    PyObject *objects;
    unsigned writable;
    int page_size;
    raddle_tensor *t[8] = {NULL};
    raddle_status status;
    (void)module;
    if (!PyArg_ParseTuple(args, "sO!Ii", &kind, &PyTuple_Type, &objects, &writable, &page_size)) {
        return NULL;
    }
    const Py_ssize_t count = PyTuple_GET_SIZE(objects);
    const bool opened = count <= 8 && open_tuple(objects, writable, t) == 0;
    if (opened) {
        if (strcmp(kind, "append") == 0) {
            status = append_to(t, count, page_size);
        } else if (count == 4) {
            status = api->attention_merge_states(t[0], t[1], t[2], t[3], RADDLE_LSE_BASE_2, NULL);
        } else {
            status = api->attention_merge_state(t[0], t[1], t[2], t[3], t[4], t[5], t[6],
                                                RADDLE_LSE_BASE_2, NULL);
        }
        if (status != RADDLE_OK) {
            api->raise(status);
        }
    }
    for (int i = 0; i < 8; i++) {
        api->tensor_close(t[i]);
    }
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* ---------------------------------------------------------------- asking for trouble */

/* (name of the status, message) of what just failed on this thread, without an exception. */
static PyObject *told(raddle_status status) {
    const raddle_error *error = api->last_error();
    return Py_BuildValue("(ss)", api->status_name(status),
                         status == RADDLE_OK     ? ""
                         : error->code == status ? error->message
                                                 : "?");
}

static const raddle_attention_spec good = {
    .struct_size = sizeof good,
    .device = {RADDLE_CPU, 0},
    .q_dtype = RADDLE_F32,
    .num_qo_heads = 2,
    .num_kv_heads = 1,
    .head_dim_qk = 8,
    .page_size = 4,
    .max_batch = 2,
    .max_pages = 64,
    .max_qo_len = 1,
};

PyDoc_STRVAR(sized_doc, "sized(which, struct_size, at, byte): a good spec, or an empty batch or "
                        "args, with that size and one byte of it changed.");

static PyObject *sized(PyObject *module, PyObject *args) {
    union {
        unsigned char bytes[2048];
        raddle_attention_spec spec;
        uint32_t size;
    } given;
    const char *which;
    unsigned size, at, byte;
    (void)module;
    if (!PyArg_ParseTuple(args, "sIII", &which, &size, &at, &byte)) {
        return NULL;
    }
    raddle_plan *plan = NULL;
    raddle_status status = api->attention_plan_create(&good, &plan);
    memset(&given, 0, sizeof given);
    const bool is_spec = strcmp(which, "spec") == 0;
    if (is_spec) {
        given.spec = good;
        api->plan_destroy(plan);
        plan = NULL;
    }
    given.size = size;
    if (byte != 0 && at < sizeof given) {
        given.bytes[at] = (unsigned char)byte;
    }
    if (is_spec) {
        status = api->attention_plan_create(&given.spec, &plan);
    } else if (strcmp(which, "batch") == 0) {
        status = api->attention_plan_update(plan, (const void *)&given, NULL);
    } else {
        status = api->attention_plan_run(plan, (const void *)&given, NULL);
    }
    PyObject *result = told(status);
    api->plan_destroy(plan);
    return result;
}

static void count_release(void *context) {
    ++*(int *)context;
}

PyDoc_STRVAR(lend_doc, "lend(missing): binds scratch of the caller's, so many bytes too small; "
                       "(status, message), the size, and how often it was given back before and "
                       "after the plan ended.");

static PyObject *lend(PyObject *module, PyObject *args) {
    const raddle_device cpu = {RADDLE_CPU, 0};
    raddle_plan *plan = NULL;
    raddle_workspace *workspace = NULL;
    int missing, releases = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "i", &missing)) {
        return NULL;
    }
    raddle_status status = api->attention_plan_create(&good, &plan);
    const size_t bytes = api->plan_workspace_bytes(plan);
    void *data = PyMem_Malloc(bytes);
    if (status == RADDLE_OK) {
        status = api->workspace_wrap(cpu, data, bytes - (size_t)missing, count_release, &releases,
                                     &workspace);
    }
    if (status == RADDLE_OK) {
        status = api->plan_bind_workspace(plan, workspace);
    }
    PyObject *what = told(status);
    api->workspace_destroy(workspace);
    const int before = releases;
    Py_BEGIN_ALLOW_THREADS;
    api->plan_destroy(plan);
    Py_END_ALLOW_THREADS;
    PyMem_Free(data);
    return what == NULL ? NULL : Py_BuildValue("(Nnii)", what, (Py_ssize_t)bytes, before, releases);
}

static PyObject *last(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return told(api->last_error()->code);
}

static PyObject *sizes(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:I}", "spec", sizeof(raddle_attention_spec), "batch",
                         sizeof(raddle_attention_batch), "args", sizeof(raddle_attention_args),
                         "api", sizeof(raddle_api), "version", RADDLE_API_VERSION);
}

/* Every entry with a NULL in place of each address, as (entry, status, message). */
static PyObject *nulls(PyObject *module, PyObject *object) {
    const raddle_device cpu = {RADDLE_CPU, 0};
    raddle_attention_batch batch = {.struct_size = sizeof batch};
    raddle_attention_args args = {.struct_size = sizeof args};
    raddle_attention_spec spec = {.struct_size = sizeof spec};
    raddle_tensor *t = NULL;
    raddle_kv_cache *kv = NULL;
    raddle_plan *plan = NULL;
    raddle_workspace *scratch = NULL;
    raddle_stream stream = NULL;
    (void)module;
    api->tensor_close(NULL);
    api->kv_cache_destroy(NULL);
    api->workspace_destroy(NULL);
    api->plan_destroy(NULL);
    if (api->plan_workspace_bytes(NULL) != 0 || api->tensor_stream(NULL, &stream) ||
        api->tensor_open(object, "x", RADDLE_READ, RADDLE_DTYPE_NONE, &t) < 0 ||
        api->tensor_stream(t, NULL) || api->tensor_stream(t, &stream)) {
        return NULL;
    }
    DLTensor dl = {.device = {kDLCPU, 0}, .dtype = {kDLFloat, 32, 1}};
    PyObject *list = PyList_New(0);
#define ADD(call)                                                                                  \
    do {                                                                                           \
        PyObject *row = told(api->call);                                                           \
        if (list == NULL || row == NULL || PyList_Append(list, row) < 0) {                         \
            Py_CLEAR(list);                                                                        \
        }                                                                                          \
        Py_XDECREF(row);                                                                           \
    } while (0)
    ADD(tensor_from_dlpack(NULL, "x", RADDLE_READ, RADDLE_DTYPE_NONE, &t));
    ADD(tensor_from_dlpack(&dl, NULL, RADDLE_READ, RADDLE_DTYPE_NONE, &t));
    ADD(tensor_from_dlpack(&dl, "x", RADDLE_READ, RADDLE_DTYPE_NONE, NULL));
    ADD(kv_cache_create(NULL, t, RADDLE_NHD, 1, &kv));
    ADD(kv_cache_create(t, NULL, RADDLE_NHD, 1, NULL));
    ADD(workspace_create(cpu, 8, NULL));
    ADD(workspace_wrap(cpu, NULL, 8, NULL, NULL, &scratch));
    ADD(workspace_wrap(cpu, NULL, 0, NULL, NULL, NULL));
    ADD(plan_bind_workspace(NULL, NULL));
    ADD(attention_plan_create(NULL, &plan));
    ADD(attention_plan_create(&spec, NULL));
    ADD(attention_plan_update(NULL, &batch, NULL));
    ADD(attention_plan_run(NULL, &args, NULL));
    ADD(attention_merge_state(t, t, t, NULL, t, t, t, RADDLE_LSE_BASE_2, NULL));
    ADD(attention_merge_states(NULL, t, t, t, RADDLE_LSE_BASE_2, NULL));
    ADD(attention_append(t, t, t, t, t, t, NULL, NULL));
    ADD(attention_append_slots(t, t, NULL, NULL, NULL));
#undef ADD
    api->tensor_close(t);
    return list;
}

PyDoc_STRVAR(open_doc, "open(object, name, access, dtype): opens and closes one tensor.");

static PyObject *open_one(PyObject *module, PyObject *args) {
    PyObject *object;
    const char *name;
    int access, dtype;
    raddle_tensor *tensor = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "Ozii", &object, &name, &access, &dtype)) {
        return NULL;
    }
    if (api->tensor_open(object == Py_None ? NULL : object, name, (raddle_access)access,
                         (raddle_dtype)dtype, &tensor) < 0) {
        return NULL;
    }
    api->tensor_close(tensor);
    Py_RETURN_NONE;
}

static PyObject *stream_of(PyObject *module, PyObject *object) {
    raddle_tensor *tensor = NULL;
    raddle_stream stream = NULL;
    (void)module;
    if (api->tensor_open(object, "x", RADDLE_READ, RADDLE_DTYPE_NONE, &tensor) < 0) {
        return NULL;
    }
    const bool said = api->tensor_stream(tensor, &stream);
    Py_BEGIN_ALLOW_THREADS;
    api->tensor_close(tensor);
    Py_END_ALLOW_THREADS;
    return said ? PyLong_FromVoidPtr(stream) : Py_NewRef(Py_None);
}

PyDoc_STRVAR(copy_doc, "copy(source, target, rows, columns, access): one float32 merge state, with "
                       "itself as both states, through DLTensors made here; (status, message).");

static PyObject *copy_by_dlpack(PyObject *module, PyObject *args) {
    unsigned long long source, target;
    int64_t shape[3] = {0, 1, 0};
    static float zeros[64];
    int access;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKLLi", &source, &target, &shape[0], &shape[2], &access)) {
        return NULL;
    }
    DLTensor v = {.data = (void *)(uintptr_t)source,
                  .device = {kDLCPU, 0},
                  .ndim = 3,
                  .dtype = {kDLFloat, 32, 1},
                  .shape = shape};
    DLTensor s = v, out = v;
    int64_t strides[2] = {1, 1};
    s.ndim = 2;
    s.strides = strides;
    s.data = zeros;
    out.data = (void *)(uintptr_t)target;
    float lse[64];
    DLTensor s_out = s;
    s_out.data = lse;
    raddle_tensor *t[4] = {NULL};
    raddle_status status = api->tensor_from_dlpack(&v, "v", RADDLE_READ, RADDLE_DTYPE_NONE, &t[0]);
    if (status == RADDLE_OK) {
        status = api->tensor_from_dlpack(&s, "s", RADDLE_READ, RADDLE_F32, &t[1]);
    }
    if (status == RADDLE_OK) {
        status = api->tensor_from_dlpack(&out, "v_out", (raddle_access)access, RADDLE_F32, &t[2]);
    }
    if (status == RADDLE_OK) {
        status = api->tensor_from_dlpack(&s_out, "s_out", RADDLE_WRITE, RADDLE_F32, &t[3]);
    }
    memset(shape, 0x7F, sizeof shape); /* not needed any more */
    if (status == RADDLE_OK) {
        status = api->attention_merge_state(t[0], t[1], t[0], t[1], NULL, t[2], t[3],
                                            RADDLE_LSE_BASE_2, NULL);
    }
    PyObject *result = told(status);
    for (int i = 0; i < 4; i++) {
        api->tensor_close(t[i]);
    }
    return result;
}

/* ---------------------------------------------------------------- the capsule */

PyDoc_STRVAR(table_doc, "table(version, struct_size): a capsule with a copy of the table that says "
                        "so.");

static PyObject *table(PyObject *module, PyObject *args) {
    static raddle_api changed;
    unsigned version;
    Py_ssize_t size;
    (void)module;
    if (!PyArg_ParseTuple(args, "In", &version, &size)) {
        return NULL;
    }
    changed = *api;
    changed.version = version;
    changed.struct_size = (size_t)size;
    return PyCapsule_New(&changed, RADDLE_API_CAPSULE, NULL);
}

static PyObject *import_again(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return raddle_api_import() == NULL ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef functions[] = {
    {"attention", attention, METH_VARARGS, attention_doc},
    {"call", call, METH_VARARGS, call_doc},
    {"sized", sized, METH_VARARGS, sized_doc},
    {"lend", lend, METH_VARARGS, lend_doc},
    {"last", last, METH_NOARGS, NULL},
    {"sizes", sizes, METH_NOARGS, NULL},
    {"nulls", nulls, METH_O, NULL},
    {"open", open_one, METH_VARARGS, open_doc},
    {"stream", stream_of, METH_O, NULL},
    {"copy", copy_by_dlpack, METH_VARARGS, copy_doc},
    {"table", table, METH_VARARGS, table_doc},
    {"import_again", import_again, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "capi_client",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit_capi_client(void);

PyMODINIT_FUNC PyInit_capi_client(void) {
    api = raddle_api_import();
    return api == NULL ? NULL : PyModule_Create(&definition);
}

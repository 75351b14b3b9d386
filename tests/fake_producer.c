/* fake_producer.c - a DLPack producer that can lie: every field of the exchanged structs is the
 * test's choice.
 *
 * Compiled by tests/test_dlpack.py as a Python module. Producer gives capsules; a subclass becomes
 * a producer with an exchange table by setting __dlpack_c_exchange_api__ = table(kind). Counters
 * tell how often a deleter ran; blocks are never freed, so that a second call of a deleter is
 * counted instead of crashing.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "third_party/dlpack/dlpack.h"

enum { MAX_DIM = 16 };

typedef struct Producer {
    PyObject_HEAD DLTensor tensor;
    int64_t shape[MAX_DIM], strides[MAX_DIM];
    uint64_t flags;
    DLPackVersion version;
    PyObject *mode;
    PyObject *keywords; /* of the last call of __dlpack__ */
} Producer;

typedef struct Block {
    DLManagedTensorVersioned versioned;
    DLManagedTensor legacy;
    bool deleted;
} Block;

static long num_exports, num_deletes, num_double_deletes;

static void delete_block(Block *block, PyObject *producer) {
    if (block->deleted) {
        num_double_deletes++;
        return;
    }
    block->deleted = true;
    num_deletes++;
    Py_DECREF(producer);
}

static void delete_versioned(DLManagedTensorVersioned *managed) {
    delete_block((Block *)(void *)((char *)managed - offsetof(Block, versioned)),
                 managed->manager_ctx);
}

static void delete_legacy(DLManagedTensor *managed) {
    delete_block((Block *)(void *)((char *)managed - offsetof(Block, legacy)),
                 managed->manager_ctx);
}

static Block *export_block(Producer *self) {
    Block *block = calloc(1, sizeof *block);
    if (!block) {
        PyErr_NoMemory();
        return NULL;
    }
    block->versioned.version = self->version;
    block->versioned.flags = self->flags;
    block->versioned.deleter = delete_versioned;
    block->versioned.manager_ctx = Py_NewRef((PyObject *)self);
    block->versioned.dl_tensor = self->tensor;
    block->legacy.deleter = delete_legacy;
    block->legacy.manager_ctx = self;
    block->legacy.dl_tensor = self->tensor;
    num_exports++;
    return block;
}

/* ---------------------------------------------------------------- the type */

static int read_numbers(PyObject *sequence, int64_t *values, int *out_count) {
    PyObject *items = PySequence_Tuple(sequence);
    if (!items) {
        return -1;
    }
    const Py_ssize_t count = PyTuple_GET_SIZE(items);
    for (Py_ssize_t i = 0; i < count && i < MAX_DIM; i++) {
        values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(items, i));
    }
    Py_DECREF(items);
    *out_count = (int)count;
    return PyErr_Occurred() ? -1 : 0;
}

static int producer_init(PyObject *object, PyObject *args, PyObject *keywords) {
    static char *names[] = {"address", "shape",     "strides",     "code",  "bits",
                            "lanes",   "device",    "byte_offset", "flags", "major",
                            "ndim",    "shapeless", "mode",        NULL};
    Producer *self = (Producer *)object;
    unsigned long long address = 0, byte_offset = 0, flags = 0;
    PyObject *shape = NULL, *strides = Py_None, *mode = NULL;
    int code = kDLFloat, bits = 32, lanes = 1, device_type = kDLCPU, device_id = 0, major = 1,
        ndim = -1, shapeless = 0;
    int count = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "KO|Oiii(ii)KKiipU", names, &address, &shape,
                                     &strides, &code, &bits, &lanes, &device_type, &device_id,
                                     &byte_offset, &flags, &major, &ndim, &shapeless, &mode)) {
        return -1;
    }
    if (read_numbers(shape, self->shape, &count) < 0) {
        return -1;
    }
    self->tensor = (DLTensor){
        .data = (void *)(uintptr_t)address,
        .device = {(DLDeviceType)device_type, device_id},
        .ndim = ndim >= 0 || ndim < -1 ? ndim : count,
        .dtype = {(uint8_t)code, (uint8_t)bits, (uint16_t)lanes},
        .shape = shapeless ? NULL : self->shape,
        .byte_offset = byte_offset,
    };
    if (strides != Py_None) {
        self->tensor.strides = self->strides;
        if (read_numbers(strides, self->strides, &count) < 0) {
            return -1;
        }
    }
    self->flags = flags;
    self->version = (DLPackVersion){(uint32_t)major, 3};
    Py_XSETREF(self->mode, mode ? Py_NewRef(mode) : PyUnicode_FromString("versioned"));
    return 0;
}

static void producer_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(((Producer *)object)->mode);
    Py_XDECREF(((Producer *)object)->keywords);
    type->tp_free(object);
    Py_DECREF(type);
}

static void close_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        delete_legacy(PyCapsule_GetPointer(capsule, "dltensor"));
    }
}

static PyObject *producer_dlpack(PyObject *object, PyObject *args, PyObject *keywords) {
    Producer *self = (Producer *)object;
    (void)args;
    Py_XSETREF(self->keywords, keywords ? PyDict_Copy(keywords) : PyDict_New());
    const char *mode = PyUnicode_AsUTF8(self->mode);
    const bool asks_version = keywords && PyDict_GetItemString(keywords, "max_version");
    if (strcmp(mode, "raises") == 0) {
        PyErr_SetString(PyExc_BufferError, "this tensor cannot leave\nat all");
        return NULL;
    }
    if (strcmp(mode, "list") == 0) {
        return PyList_New(0);
    }
    if (strcmp(mode, "legacy") == 0 && asks_version) {
        PyErr_SetString(PyExc_TypeError,
                        "__dlpack__() got an unexpected keyword argument 'max_version'");
        return NULL;
    }
    Block *block = export_block(self);
    if (!block) {
        return NULL;
    }
    if (strcmp(mode, "used") == 0) {
        delete_versioned(&block->versioned);
        return PyCapsule_New(&block->versioned, "used_dltensor_versioned", NULL);
    }
    if (strcmp(mode, "legacy") == 0) {
        return PyCapsule_New(&block->legacy, "dltensor", close_capsule);
    }
    return PyCapsule_New(&block->versioned, "dltensor_versioned", close_capsule);
}

static PyObject *producer_device(PyObject *object, PyObject *unused) {
    (void)unused;
    const DLDevice device = ((Producer *)object)->tensor.device;
    return Py_BuildValue("(ii)", (int)device.device_type, (int)device.device_id);
}

static PyObject *get_keywords(PyObject *object, void *closure) {
    PyObject *keywords = ((Producer *)object)->keywords;
    (void)closure;
    return Py_NewRef(keywords ? keywords : Py_None);
}

static PyMethodDef producer_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))producer_dlpack, METH_VARARGS | METH_KEYWORDS,
     NULL},
    {"__dlpack_device__", producer_device, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef producer_getset[] = {
    {"keywords", get_keywords, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot producer_slots[] = {
    {Py_tp_init, (void *)producer_init},
    {Py_tp_dealloc, (void *)producer_dealloc},
    {Py_tp_methods, producer_methods},
    {Py_tp_getset, producer_getset},
    {0, NULL},
};

static PyType_Spec producer_spec = {
    .name = "fake_producer.Producer",
    .basicsize = sizeof(Producer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = producer_slots,
};

/* ---------------------------------------------------------------- exchange tables */

static int view(void *object, DLTensor *out) {
    *out = ((Producer *)object)->tensor;
    return 0;
}

static int view_fails(void *object, DLTensor *out) {
    (void)object;
    (void)out;
    PyErr_SetString(PyExc_BufferError, "no view today");
    return -1;
}

static int view_fails_silently(void *object, DLTensor *out) {
    (void)object;
    (void)out;
    return -1;
}

static int owned(void *object, DLManagedTensorVersioned **out) {
    Block *block = export_block(object);
    *out = block ? &block->versioned : NULL;
    return block ? 0 : -1;
}

static int owned_fails(void *object, DLManagedTensorVersioned **out) {
    (void)out;
    return view_fails(object, NULL);
}

static int stream(DLDeviceType type, int32_t device, void **out) {
    (void)type;
    *out = (void *)(uintptr_t)(0x5000 + device);
    return 0;
}

static int allocate_fails(DLTensor *prototype, DLManagedTensorVersioned **out, void *context,
                          void (*set_error)(void *context, const char *kind, const char *message)) {
    (void)prototype;
    (void)out;
    set_error(context, "MemoryError", "the pool is empty");
    return -1;
}

static int to_object(DLManagedTensorVersioned *managed, void **out) {
    (void)out;
    managed->deleter(managed);
    PyErr_SetString(PyExc_RuntimeError, "not reached");
    return -1;
}

#define HEADER(major_, prev)                                                                       \
    { .version = {major_, 3}, .prev_api = prev }
static DLPackExchangeAPI full = {HEADER(1, NULL), allocate_fails, owned, to_object, view, stream};
static DLPackExchangeAPI no_view = {HEADER(1, NULL), allocate_fails, owned,
                                    to_object,       NULL,           stream};
static DLPackExchangeAPI no_owned = {HEADER(1, NULL), NULL, NULL, NULL, view, NULL};
static DLPackExchangeAPI no_export = {HEADER(1, NULL), allocate_fails, NULL,
                                      to_object,       NULL,           stream};
static DLPackExchangeAPI future = {HEADER(2, &full.header), NULL, NULL, NULL, NULL, NULL};
static DLPackExchangeAPI future_only = {HEADER(2, NULL), NULL, NULL, NULL, NULL, NULL};
static DLPackExchangeAPI fails = {HEADER(1, NULL), allocate_fails, owned_fails,
                                  to_object,       view_fails,     stream};
static DLPackExchangeAPI silent = {HEADER(1, NULL), allocate_fails,      owned,
                                   to_object,       view_fails_silently, stream};

static const struct {
    const char *kind;
    DLPackExchangeAPI *table;
} tables[] = {
    {"full", &full},           {"no_view", &no_view}, {"no_owned", &no_owned},
    {"no_export", &no_export}, {"future", &future},   {"future_only", &future_only},
    {"fails", &fails},         {"silent", &silent},
};

static PyObject *table(PyObject *module, PyObject *args) {
    const char *kind = NULL;
    int as_int = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "s|p", &kind, &as_int)) {
        return NULL;
    }
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (strcmp(tables[i].kind, kind) == 0) {
            return as_int ? PyLong_FromVoidPtr(tables[i].table)
                          : PyCapsule_New(tables[i].table, "dlpack_exchange_api", NULL);
        }
    }
    return PyErr_Format(PyExc_KeyError, "%s", kind);
}

static PyObject *counts(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return Py_BuildValue("(lll)", num_exports, num_deletes, num_double_deletes);
}

static PyMethodDef functions[] = {
    {"table", table, METH_VARARGS, NULL},
    {"counts", counts, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fake_producer",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit_fake_producer(void);

PyMODINIT_FUNC PyInit_fake_producer(void) {
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = module ? PyType_FromSpec(&producer_spec) : NULL;
    if (!type || PyModule_AddObjectRef(module, "Producer", type) < 0) {
        Py_XDECREF(type);
        Py_XDECREF(module);
        return NULL;
    }
    Py_DECREF(type);
    return module;
}

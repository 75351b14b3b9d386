/* py_tensor.c - the type raddle.Tensor: memory on the CPU or a GPU for callers without a framework.
 *
 * A Tensor owns a block of a back end, or views memory that its owner reference keeps alive (a
 * slice of another Tensor, a wrapped producer). Nothing about it changes after creation but the
 * elements. It holds at most that one reference and never hands out a way to change it, so it takes
 * no part in garbage collection.
 */
#include "python/py_tensor.h"

#include <stddef.h>
#include <structmember.h>

#include "base/alloc.h"
#include "python/tensor_arg.h"
#include "python/tensor_door.h"

PyTypeObject *raddle_py_tensor_type;

static raddle_py_tensor *cast(PyObject *self) {
    return (raddle_py_tensor *)self;
}

/* ---------------------------------------------------------------- making and ending */

static raddle_status layout_dense(const int64_t *shape, int ndim, raddle_dtype dtype,
                                  raddle_device device, raddle_tensor *out_tensor,
                                  size_t *out_bytes) {
    RADDLE_REQUIRE(dtype != RADDLE_DTYPE_NONE, RADDLE_ERR_DTYPE, "dtype: a new tensor needs one");
    RADDLE_REQUIRE(ndim >= 0 && ndim <= RADDLE_MAX_DIM, RADDLE_ERR_SHAPE,
                   "shape: expected 0 to %d dimensions, got %d", (int)RADDLE_MAX_DIM, ndim);
    raddle_tensor tensor = {.ndim = ndim, .dtype = dtype, .device = device, .name = "tensor"};
    int64_t stride = 1, bytes;
    bool empty = false;
    for (int i = ndim - 1; i >= 0; i--) {
        RADDLE_REQUIRE(shape[i] >= 0, RADDLE_ERR_SHAPE,
                       "shape: negative extent %lld in dimension %d", (long long)shape[i], i);
        empty = empty || shape[i] == 0;
        tensor.shape[i] = shape[i];
        tensor.stride[i] = stride;
        RADDLE_REQUIRE(!__builtin_mul_overflow(stride, shape[i] > 0 ? shape[i] : 1, &stride),
                       RADDLE_ERR_SHAPE, "shape: the extents multiply to more than 2^63 elements");
    }
    RADDLE_REQUIRE(!__builtin_mul_overflow(stride, (int64_t)raddle_dtype_bytes(dtype), &bytes),
                   RADDLE_ERR_SHAPE, "shape: the extents multiply to more than 2^63 bytes");
    *out_tensor = tensor;
    *out_bytes = empty ? 0 : (size_t)bytes;
    return RADDLE_OK;
}

PyObject *raddle_py_tensor_new(const int64_t *shape, int ndim, raddle_dtype dtype,
                               raddle_device device) {
    raddle_tensor tensor;
    size_t bytes = 0;
    const raddle_backend *backend = NULL;
    raddle_status status = layout_dense(shape, ndim, dtype, device, &tensor, &bytes);
    if (status == RADDLE_OK) {
        status = raddle_backend_for(device, &backend);
    }
    if (status == RADDLE_OK && bytes > 0) {
        status = backend->alloc(device.index, bytes, &tensor.data);
    }
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    raddle_py_tensor *self = PyObject_New(raddle_py_tensor, raddle_py_tensor_type);
    if (!self) {
        backend->free(device.index, tensor.data);
        return NULL;
    }
    self->tensor = tensor;
    self->owner = NULL;
    self->backend = backend;
    self->weak_references = NULL;
    return (PyObject *)self;
}

PyObject *raddle_py_tensor_wrap(const raddle_tensor *tensor, PyObject *owner) {
    raddle_py_tensor *self = PyObject_New(raddle_py_tensor, raddle_py_tensor_type);
    if (!self) {
        Py_DECREF(owner);
        return NULL;
    }
    self->tensor = *tensor;
    self->tensor.name = "tensor";
    self->owner = owner;
    self->backend = NULL;
    self->weak_references = NULL;
    return (PyObject *)self;
}

static void tensor_dealloc(PyObject *self) {
    raddle_py_tensor *t = cast(self);
    PyTypeObject *type = Py_TYPE(self);
    if (t->weak_references) {
        PyObject_ClearWeakRefs(self);
    }
    if (t->backend) {
        t->backend->free(t->tensor.device.index, t->tensor.data);
    }
    Py_XDECREF(t->owner);
    PyObject_Free(self);
    Py_DECREF(type);
}

/* ---------------------------------------------------------------- attributes */

static PyObject *tuple_of(const int64_t *values, int count) {
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple && i < count; i++) {
        PyObject *value = PyLong_FromLongLong(values[i]);
        if (!value) {
            Py_CLEAR(tuple);
            break;
        }
        PyTuple_SET_ITEM(tuple, i, value);
    }
    return tuple;
}

static PyObject *get_shape(PyObject *self, void *closure) {
    (void)closure;
    return tuple_of(cast(self)->tensor.shape, cast(self)->tensor.ndim);
}

static PyObject *get_strides(PyObject *self, void *closure) {
    (void)closure;
    return tuple_of(cast(self)->tensor.stride, cast(self)->tensor.ndim);
}

static PyObject *get_dtype(PyObject *self, void *closure) {
    (void)closure;
    return PyUnicode_FromString(raddle_dtype_name(cast(self)->tensor.dtype));
}

static PyObject *device_text(raddle_device device) {
    char text[16];
    return PyUnicode_FromString(raddle_device_text(device, text));
}

static PyObject *get_device(PyObject *self, void *closure) {
    (void)closure;
    return device_text(cast(self)->tensor.device);
}

static PyObject *get_ndim(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(cast(self)->tensor.ndim);
}

static PyObject *get_size(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(raddle_tensor_count(&cast(self)->tensor));
}

static PyObject *get_itemsize(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(raddle_dtype_bytes(cast(self)->tensor.dtype));
}

static PyObject *get_nbytes(PyObject *self, void *closure) {
    (void)closure;
    const raddle_tensor *tensor = &cast(self)->tensor;
    return PyLong_FromLongLong(raddle_tensor_count(tensor) *
                               (int64_t)raddle_dtype_bytes(tensor->dtype));
}

static PyObject *get_data_ptr(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong((unsigned long long)(uintptr_t)cast(self)->tensor.data);
}

static PyObject *get_is_contiguous(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(raddle_tensor_is_contiguous(&cast(self)->tensor));
}

static PyObject *get_read_only(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(cast(self)->tensor.read_only);
}

static PyGetSetDef tensor_attributes[] = {
    {"shape", get_shape, NULL, "Extents, a tuple.", NULL},
    {"strides", get_strides, NULL, "Steps between neighbours of each dimension, in elements.",
     NULL},
    {"dtype", get_dtype, NULL, "Element type, a string as torch spells it.", NULL},
    {"device", get_device, NULL, "\"cpu\" or \"cuda:<index>\".", NULL},
    {"ndim", get_ndim, NULL, "Number of dimensions, at most 8.", NULL},
    {"size", get_size, NULL, "Number of elements.", NULL},
    {"itemsize", get_itemsize, NULL, "Bytes per element.", NULL},
    {"nbytes", get_nbytes, NULL, "Bytes of all elements together.", NULL},
    {"data_ptr", get_data_ptr, NULL, "Address of the first element, an int; 0 when empty.", NULL},
    {"is_contiguous", get_is_contiguous, NULL, "Whether elements lie densely in row-major order.",
     NULL},
    {"read_only", get_read_only, NULL, "Whether writes are refused: it wraps read-only memory.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyObject *tensor_repr(PyObject *self) {
    PyObject *shape = get_shape(self, NULL), *device = get_device(self, NULL);
    PyObject *text = NULL;
    if (shape && device) {
        text = PyUnicode_FromFormat("raddle.Tensor(shape=%R, dtype=%s, device=%U)", shape,
                                    raddle_dtype_name(cast(self)->tensor.dtype), device);
    }
    Py_XDECREF(device);
    Py_XDECREF(shape);
    return text;
}

static Py_ssize_t tensor_length(PyObject *self) {
    if (cast(self)->tensor.ndim == 0) {
        PyErr_SetString(PyExc_TypeError, "len() of a 0-d tensor");
        return -1;
    }
    return (Py_ssize_t)cast(self)->tensor.shape[0];
}

/* ---------------------------------------------------------------- the type */

PyDoc_STRVAR(
    copy_doc,
    "copy_($self, src, stream=None, /)\n--\n\n"
    "Copy all elements of src (any tensor of this shape and dtype) here; returns self.\n\n"
    "Host tensors may have any strides; with a GPU both sides are contiguous or share one\n"
    "dense layout. A copy from or to the host is done on return; one within a GPU is\n"
    "ordered on stream.");
PyDoc_STRVAR(zero_doc, "zero_($self, stream=None, /)\n--\n\n"
                       "Set all elements to zero, ordered on stream; returns self.");
PyDoc_STRVAR(to_doc,
             "to($self, device, stream=None, /)\n--\n\n"
             "This tensor on device: itself when it is there already, else a contiguous copy.\n\n"
             "The copy waits for earlier work on stream and is done on return.");
PyDoc_STRVAR(item_doc, "item($self, /)\n--\n\n"
                       "The one element of a CPU tensor of size 1, as a Python number.");
PyDoc_STRVAR(numpy_doc, "numpy($self, /)\n--\n\n"
                        "A NumPy array over the same memory (CPU only).\n\n"
                        "NumPy has neither bfloat16 nor fp8: their bits come as uint16 and uint8.");
PyDoc_STRVAR(array_doc, "__array__($self, dtype=None, copy=None)\n--\n\n"
                        "Reached only by tensors that have no host memory to show: says so.");
PyDoc_STRVAR(reshape_doc,
             "reshape($self, *shape)\n--\n\n"
             "A view of the same elements with another shape; one extent may be -1.\n\n"
             "ShapeError when the strides allow no view: nothing is copied.");
PyDoc_STRVAR(
    dlpack_doc,
    "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
    "A DLPack capsule: versioned for max_version (1, 0) and later, else the legacy one.");
PyDoc_STRVAR(dlpack_device_doc, "__dlpack_device__($self, /)\n--\n\n"
                                "(device type, device index) in DLPack's numbers.");

static PyMethodDef tensor_methods[] = {
    {"copy_", RADDLE_FASTCALL(raddle_py_tensor_copy), METH_FASTCALL, copy_doc},
    {"zero_", RADDLE_FASTCALL(raddle_py_tensor_zero), METH_FASTCALL, zero_doc},
    {"to", RADDLE_FASTCALL(raddle_py_tensor_to), METH_FASTCALL, to_doc},
    {"item", raddle_py_tensor_item, METH_NOARGS, item_doc},
    {"numpy", raddle_py_tensor_numpy, METH_NOARGS, numpy_doc},
    {"reshape", raddle_py_tensor_reshape, METH_VARARGS, reshape_doc},
    {"__array__", RADDLE_FASTCALL(raddle_py_tensor_array), METH_FASTCALL | METH_KEYWORDS,
     array_doc},
    {"__dlpack__", RADDLE_FASTCALL(raddle_py_tensor_dlpack), METH_FASTCALL | METH_KEYWORDS,
     dlpack_doc},
    {"__dlpack_device__", raddle_py_tensor_dlpack_device, METH_NOARGS, dlpack_device_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef tensor_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(raddle_py_tensor, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(tensor_doc, "An n-dimensional array of one element type on the CPU or a GPU; made by "
                         "raddle.empty and its kin.\n\n"
                         "It exports DLPack, so that any framework can view it without a copy, and "
                         "the buffer protocol on\n"
                         "the CPU. Indexing with ints, slices, ... and None gives views.");

static PyType_Slot tensor_slots[] = {
    {Py_tp_dealloc, RADDLE_SLOT(tensor_dealloc)},
    {Py_tp_repr, RADDLE_SLOT(tensor_repr)},
    {Py_tp_doc, (void *)(uintptr_t)tensor_doc},
    {Py_tp_methods, tensor_methods},
    {Py_tp_members, tensor_members},
    {Py_tp_getset, tensor_attributes},
    {Py_mp_length, RADDLE_SLOT(tensor_length)},
    {Py_mp_subscript, RADDLE_SLOT(raddle_py_tensor_subscript)},
    {Py_sq_item,
     RADDLE_SLOT(
         raddle_py_tensor_item_at)}, /* for iteration only: subscripts take the slot above */
    {Py_bf_getbuffer, RADDLE_SLOT(raddle_py_tensor_get_buffer)},
    {Py_bf_releasebuffer, RADDLE_SLOT(raddle_py_tensor_release_buffer)},
    {0, NULL},
};

static PyType_Spec tensor_spec = {
    .name = "raddle.Tensor",
    .basicsize = sizeof(raddle_py_tensor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = tensor_slots,
};

/* ---------------------------------------------------------------- module functions */

PyDoc_STRVAR(empty_doc, "empty($module, shape, dtype, device, /)\n--\n\nSee raddle.empty.");

static PyObject *module_empty(PyObject *module, PyObject *const *args, Py_ssize_t num_args) {
    int64_t shape[RADDLE_MAX_DIM];
    int ndim = 0;
    raddle_dtype dtype;
    raddle_device device;
    (void)module;
    if (num_args != 3) {
        return PyErr_Format(PyExc_TypeError, "empty() takes 3 arguments, got %zd", num_args);
    }
    if (raddle_shape_from_object(args[0], "shape", shape, &ndim) < 0 ||
        raddle_dtype_from_object(args[1], "dtype", &dtype) < 0 ||
        raddle_device_from_object(args[2], "device", &device) < 0) {
        return NULL;
    }
    return raddle_py_tensor_new(shape, ndim, dtype, device);
}

PyDoc_STRVAR(from_dlpack_doc, "from_dlpack($module, obj, dtype, /)\n--\n\nSee raddle.from_dlpack.");

static PyObject *module_from_dlpack(PyObject *module, PyObject *const *args, Py_ssize_t num_args) {
    raddle_dtype dtype;
    raddle_tensor_hold hold;
    (void)module;
    if (num_args != 2) {
        return PyErr_Format(PyExc_TypeError, "from_dlpack() takes 2 arguments, got %zd", num_args);
    }
    if (raddle_dtype_from_object(args[1], "dtype", &dtype) < 0 ||
        raddle_tensor_hold_open(args[0], "obj", RADDLE_ARG_READ, dtype, &hold) < 0) {
        return NULL;
    }
    return raddle_py_tensor_wrap(&hold.tensor, hold.owner);
}

PyDoc_STRVAR(
    empty_like_doc,
    "empty_like($module, like, shape, dtype, device, /)\n--\n\n"
    "A new tensor of the same kind as like, out of its own framework's allocator: torch for\n"
    "torch, ndarray for ndarray (bfloat16 as uint16, fp8 as uint8), else a Tensor.");

static PyObject *module_empty_like(PyObject *module, PyObject *const *args, Py_ssize_t num_args) {
    int64_t shape[RADDLE_MAX_DIM];
    int ndim = 0;
    raddle_dtype dtype;
    raddle_device device;
    (void)module;
    if (num_args != 4) {
        return PyErr_Format(PyExc_TypeError, "empty_like() takes 4 arguments, got %zd", num_args);
    }
    if (raddle_shape_from_object(args[1], "shape", shape, &ndim) < 0 ||
        raddle_dtype_from_object(args[2], "dtype", &dtype) < 0 ||
        raddle_device_from_object(args[3], "device", &device) < 0) {
        return NULL;
    }
    return raddle_tensor_arg_new_like(args[0], shape, ndim, dtype, device);
}

PyDoc_STRVAR(
    tensor_info_doc,
    "tensor_info($module, tensor, dtype=None, write=False, /)\n--\n\n"
    "How raddle sees a tensor: (dtype, device, shape, strides, read_only, door).\n\n"
    "door is the way in: \"raddle\", \"numpy\", \"exchange table\", \"dlpack\" or\n"
    "\"dlpack legacy\". dtype: how its bits are to be read. write: also demand that it may be\n"
    "written.");

static PyObject *describe(const raddle_tensor *tensor, const char *door) {
    PyObject *shape = tuple_of(tensor->shape, tensor->ndim);
    PyObject *strides = tuple_of(tensor->stride, tensor->ndim);
    PyObject *device = device_text(tensor->device);
    PyObject *result = NULL;
    if (shape && strides && device) {
        result = Py_BuildValue("sOOOOs", raddle_dtype_name(tensor->dtype), device, shape, strides,
                               tensor->read_only ? Py_True : Py_False, door);
    }
    Py_XDECREF(device);
    Py_XDECREF(strides);
    Py_XDECREF(shape);
    return result;
}

static PyObject *module_tensor_info(PyObject *module, PyObject *const *args, Py_ssize_t num_args) {
    raddle_tensor_arg arg;
    raddle_tensor_type entry;
    raddle_dtype dtype = RADDLE_DTYPE_NONE;
    (void)module;
    if (num_args < 1 || num_args > 3) {
        return PyErr_Format(PyExc_TypeError, "tensor_info() takes 1 to 3 arguments, got %zd",
                            num_args);
    }
    const int write = num_args > 2 ? PyObject_IsTrue(args[2]) : 0;
    if (write < 0 || (num_args > 1 && raddle_dtype_from_object(args[1], "dtype", &dtype) < 0)) {
        return NULL;
    }
    if (raddle_tensor_arg_open(args[0], "tensor", write ? RADDLE_ARG_WRITE : RADDLE_ARG_READ, dtype,
                               &arg) < 0) {
        return NULL;
    }
    PyObject *result = NULL;
    if (raddle_find_door(args[0], "tensor", &entry) == 0) {
        result = describe(&arg.tensor, raddle_door_name(&entry));
    }
    raddle_tensor_arg_close(&arg);
    return result;
}

PyDoc_STRVAR(
    alloc_live_doc,
    "alloc_live($module, /)\n--\n\nBlocks of memory that the core holds now; for leak tests.");

static PyObject *module_alloc_live(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyLong_FromLongLong(raddle_alloc_live());
}

static PyMethodDef module_functions[] = {
    {"empty", RADDLE_FASTCALL(module_empty), METH_FASTCALL, empty_doc},
    {"from_dlpack", RADDLE_FASTCALL(module_from_dlpack), METH_FASTCALL, from_dlpack_doc},
    {"empty_like", RADDLE_FASTCALL(module_empty_like), METH_FASTCALL, empty_like_doc},
    {"tensor_info", RADDLE_FASTCALL(module_tensor_info), METH_FASTCALL, tensor_info_doc},
    {"alloc_live", module_alloc_live, METH_NOARGS, alloc_live_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_add_tensor(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
    PyObject *table =
        PyCapsule_New((void *)(uintptr_t)&raddle_py_tensor_exchange, "dlpack_exchange_api", NULL);
    if (!type || !table || PyObject_SetAttrString(type, "__dlpack_c_exchange_api__", table) < 0 ||
        PyModule_AddObjectRef(module, "Tensor", type) < 0 ||
        PyModule_AddFunctions(module, module_functions) < 0) {
        Py_XDECREF(table);
        Py_XDECREF(type);
        return -1;
    }
    Py_DECREF(table);
    Py_XSETREF(raddle_py_tensor_type, (PyTypeObject *)type); /* kept for the life of the process */
    return 0;
}

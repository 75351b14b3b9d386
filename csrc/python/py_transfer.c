/* py_transfer.c - raddle._core.Upload and raddle._core.Readback: int32 numbers to a device and back
 * without a wait for what the stream does meanwhile (runtime/staging.h, runtime/readback.h).
 */
#include "python/py_tensor.h"

#include "python/tensor_arg.h"
#include "runtime/readback.h"
#include "runtime/staging.h"

typedef struct upload_object {
    PyObject_HEAD raddle_staging staging;
    raddle_device device;
    int64_t count;
} upload_object;

typedef struct readback_object {
    PyObject_HEAD raddle_readback readback;
} readback_object;

static PyObject *wrap_numbers(const void *data, int64_t count, raddle_device device,
                              PyObject *owner) {
    const raddle_tensor tensor = {
        .data = (void *)(uintptr_t)data,
        .shape = {count},
        .stride = {1},
        .ndim = 1,
        .dtype = RADDLE_I32,
        .device = device,
        .name = "tensor",
    };
    return raddle_py_tensor_wrap(&tensor, Py_NewRef(owner));
}

static int parse_new(PyObject *args, PyObject *keywords, const char *format, int64_t *out_count,
                     raddle_device *out_device) {
    static char *names[] = {"count", "device", NULL};
    long long count = 0;
    PyObject *device = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, format, names, &count, &device) ||
        raddle_device_from_object(device, "device", out_device) < 0) {
        return -1;
    }
    if (count < 1 || count > INT32_MAX) {
        raddle_raise(raddle_fail(RADDLE_ERR_VALUE, "count: expected 1 to %d numbers, got %lld",
                                 INT32_MAX, count));
        return -1;
    }
    *out_count = count;
    return 0;
}

/* ------------------------------------------------------------------ Upload */

PyDoc_STRVAR(upload_doc,
             "Upload(count, device)\n--\n\n"
             "Sends up to count int32 numbers to one place on a device (tensor), in order with a\n"
             "stream and without a wait for it.");

static PyObject *upload_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    int64_t count;
    raddle_device device;
    if (parse_new(args, keywords, "LO:Upload", &count, &device) < 0) {
        return NULL;
    }
    upload_object *self = (upload_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->device = device;
    self->count = count;
    const raddle_status status =
        raddle_staging_init(&self->staging, device, (size_t)count * sizeof(int32_t));
    if (status != RADDLE_OK) {
        Py_DECREF(self);
        return raddle_raise(status);
    }
    return (PyObject *)self;
}

static void upload_dealloc(upload_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_staging_fini(&self->staging);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *upload_slot(upload_object *self, PyObject *unused) {
    (void)unused;
    void *slot = NULL;
    raddle_status status = RADDLE_OK;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_staging_acquire(&self->staging, &slot);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    return wrap_numbers(slot, self->count, (raddle_device){RADDLE_CPU, 0}, (PyObject *)self);
}

static PyObject *upload_send(upload_object *self, PyObject *args) {
    long long begin, end;
    PyObject *stream_object = Py_None;
    raddle_stream stream = NULL;
    if (!PyArg_ParseTuple(args, "LL|O:send", &begin, &end, &stream_object) ||
        raddle_stream_from_args(stream_object, NULL, 0, &stream) < 0) {
        return NULL;
    }
    raddle_status status = RADDLE_OK;
    if (begin < 0 || begin > end || end > self->count) {
        status = raddle_fail(RADDLE_ERR_VALUE,
                             "begin, end: expected 0 <= begin <= end <= %lld, got %lld and %lld",
                             (long long)self->count, begin, end);
    } else {
        const raddle_range range = {(size_t)begin * sizeof(int32_t),
                                    (size_t)(end - begin) * sizeof(int32_t), NULL};
        status = raddle_staging_commit(&self->staging, &range, 1, stream);
    }
    return status == RADDLE_OK ? Py_NewRef(Py_None) : raddle_raise(status);
}

static PyObject *upload_tensor(upload_object *self, void *unused) {
    (void)unused;
    return wrap_numbers(self->staging.data, self->count, self->device, (PyObject *)self);
}

static PyMethodDef upload_methods[] = {
    {"slot", (PyCFunction)upload_slot, METH_NOARGS,
     "slot($self, /)\n--\n\n"
     "Host Tensor [count] to write before send(); its memory is another one's after that. Waits\n"
     "where the copy before the last but one is not done."},
    {"send", (PyCFunction)upload_send, METH_VARARGS,
     "send($self, begin, end, stream=None, /)\n--\n\n"
     "Queue a copy of the slot's numbers begin to end - 1 to the same places of tensor."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef upload_getters[] = {
    {"tensor", (getter)upload_tensor, NULL, "Tensor [count] on the device.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot upload_slots[] = {
    {Py_tp_new, RADDLE_SLOT(upload_new)},
    {Py_tp_dealloc, RADDLE_SLOT(upload_dealloc)},
    {Py_tp_methods, upload_methods},
    {Py_tp_getset, upload_getters},
    {Py_tp_doc, (void *)(uintptr_t)upload_doc},
    {0, NULL},
};

static PyType_Spec upload_spec = {
    .name = "raddle._core.Upload",
    .basicsize = sizeof(upload_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = upload_slots,
};

/* ------------------------------------------------------------------ Readback */

PyDoc_STRVAR(readback_doc,
             "Readback(count, device)\n--\n\n"
             "Fetches up to count int32 numbers of a device without a wait for what its stream\n"
             "does after them. Two may be under way.");

static PyObject *readback_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    int64_t count;
    raddle_device device;
    if (parse_new(args, keywords, "LO:Readback", &count, &device) < 0) {
        return NULL;
    }
    readback_object *self = (readback_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    const raddle_status status =
        raddle_readback_init(&self->readback, device, (size_t)count * sizeof(int32_t));
    if (status != RADDLE_OK) {
        Py_DECREF(self);
        return raddle_raise(status);
    }
    return (PyObject *)self;
}

static void readback_dealloc(readback_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_readback_fini(&self->readback);
    type->tp_free(self);
    Py_DECREF(type);
}

static raddle_status start_readback(raddle_readback *readback, const raddle_tensor *tensor,
                                    raddle_stream stream) {
    RADDLE_TRY(raddle_tensor_check_dtype(tensor, RADDLE_I32));
    RADDLE_REQUIRE(raddle_tensor_is_contiguous(tensor), RADDLE_ERR_SHAPE,
                   "tensor: expected contiguous memory; make a contiguous copy");
    RADDLE_REQUIRE(
        (tensor->device.type == RADDLE_CUDA) == (readback->backend == &raddle_backend_cuda) &&
            (tensor->device.type == RADDLE_CPU || tensor->device.index == readback->device),
        RADDLE_ERR_DEVICE, "tensor: is not on the device that the Readback was made for");
    return raddle_readback_start(readback, tensor->data,
                                 (size_t)raddle_tensor_count(tensor) * sizeof(int32_t), stream);
}

static PyObject *readback_start(readback_object *self, PyObject *args) {
    PyObject *object, *stream_object = Py_None;
    raddle_tensor_arg arg = {0};
    raddle_stream stream = NULL;
    if (!PyArg_ParseTuple(args, "O|O:start", &object, &stream_object) ||
        raddle_tensor_arg_open(object, "tensor", RADDLE_ARG_READ, RADDLE_DTYPE_NONE, &arg) < 0) {
        return NULL;
    }
    if (raddle_stream_from_args(stream_object, &arg, 1, &stream) < 0) {
        raddle_tensor_arg_close(&arg);
        return NULL;
    }
    const raddle_status status = start_readback(&self->readback, &arg.tensor, stream);
    raddle_tensor_arg_close(&arg);
    return status == RADDLE_OK ? Py_NewRef(Py_None) : raddle_raise(status);
}

static PyObject *readback_wait(readback_object *self, PyObject *unused) {
    (void)unused;
    const void *data = NULL;
    size_t bytes = 0;
    raddle_status status = RADDLE_OK;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_readback_wait(&self->readback, &data, &bytes);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    return wrap_numbers(data, (int64_t)(bytes / sizeof(int32_t)), (raddle_device){RADDLE_CPU, 0},
                        (PyObject *)self);
}

static PyMethodDef readback_methods[] = {
    {"start", (PyCFunction)readback_start, METH_VARARGS,
     "start($self, tensor, stream=None, /)\n--\n\n"
     "Queue a copy of a contiguous int32 tensor. Raises StateError when two were not waited for."},
    {"wait", (PyCFunction)readback_wait, METH_NOARGS,
     "wait($self, /)\n--\n\n"
     "Host Tensor of the oldest numbers that were started, once they are there; its memory is\n"
     "another one's after two more starts. Raises StateError when none was started."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot readback_slots[] = {
    {Py_tp_new, RADDLE_SLOT(readback_new)},
    {Py_tp_dealloc, RADDLE_SLOT(readback_dealloc)},
    {Py_tp_methods, readback_methods},
    {Py_tp_doc, (void *)(uintptr_t)readback_doc},
    {0, NULL},
};

static PyType_Spec readback_spec = {
    .name = "raddle._core.Readback",
    .basicsize = sizeof(readback_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = readback_slots,
};

/* ------------------------------------------------------------------ module */

int raddle_py_add_transfer(PyObject *module) {
    PyType_Spec *specs[] = {&upload_spec, &readback_spec};
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (type == NULL || PyModule_AddType(module, type) < 0) {
            Py_XDECREF(type);
            return -1;
        }
        Py_DECREF(type); /* the module has its own */
    }
    return 0;
}

/* py_stream.c - raddle.Stream: a stream without a framework. */
#include "python/module.h"

#include "base/tensor.h"
#include "python/tensor_arg.h"
#include "runtime/stream.h"

typedef struct stream_object {
    PyObject_HEAD raddle_device device;
    raddle_stream stream; /* NULL on the CPU */
} stream_object;

PyDoc_STRVAR(
    stream_doc,
    "Stream(device='cuda', *, high_priority=False)\n--\n\n"
    "Work that is queued on it runs in order, beside that of other streams. Every stream=\n"
    "of raddle takes it, and so do libraries that read .cuda_stream, the CUstream as an\n"
    "integer. It is not ordered with the legacy default stream, on which tensors are\n"
    "filled: copy something to the host before work here reads them.\n\n"
    "high_priority: CTAs of its kernels go first to an SM that becomes free.\n"
    "On the CPU, where work is done when a call returns, .cuda_stream is 0. Raises\n"
    "DeviceError without a GPU, StateError during a capture, CudaError.");

static PyObject *stream_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"device", "high_priority", NULL};
    PyObject *given = NULL;
    int high_priority = 0;
    raddle_device device;
    raddle_stream stream = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O$p:Stream", names, &given,
                                     &high_priority)) {
        return NULL;
    }
    PyObject *object = given != NULL ? Py_NewRef(given) : PyUnicode_FromString("cuda");
    const int parsed = object != NULL ? raddle_device_from_object(object, "device", &device) : -1;
    Py_XDECREF(object);
    if (parsed < 0) {
        return NULL;
    }
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_stream_create(device, high_priority != 0, &stream);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    stream_object *self = (stream_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        raddle_stream_destroy(device, stream);
        return NULL;
    }
    self->device = device;
    self->stream = stream;
    return (PyObject *)self;
}

static void stream_dealloc(stream_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_stream_destroy(self->device, self->stream);
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(synchronize_doc, "synchronize()\n--\n\n"
                              "Wait for all that is queued on it. Raises StateError during a "
                              "capture, CudaError for work that failed.");

static PyObject *stream_synchronize(stream_object *self, PyObject *unused) {
    (void)unused;
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_stream_synchronize(self->device, self->stream);
    Py_END_ALLOW_THREADS;
    return status == RADDLE_OK ? Py_NewRef(Py_None) : raddle_raise(status);
}

static PyObject *stream_handle(stream_object *self, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(self->stream);
}

static PyObject *stream_device(stream_object *self, void *unused) {
    (void)unused;
    char text[16];
    return PyUnicode_FromString(raddle_device_text(self->device, text));
}

static PyObject *stream_repr(stream_object *self) {
    char text[16];
    return PyUnicode_FromFormat("<raddle.Stream on %s>", raddle_device_text(self->device, text));
}

static PyMethodDef stream_methods[] = {
    {"synchronize", (PyCFunction)stream_synchronize, METH_NOARGS, synchronize_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef stream_getters[] = {
    {"cuda_stream", (getter)stream_handle, NULL, "The CUstream, an integer; 0 on the CPU.", NULL},
    {"device", (getter)stream_device, NULL, "As text: \"cpu\", \"cuda:1\".", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot stream_slots[] = {
    {Py_tp_new, RADDLE_SLOT(stream_new)},
    {Py_tp_dealloc, RADDLE_SLOT(stream_dealloc)},
    {Py_tp_methods, stream_methods},
    {Py_tp_getset, stream_getters},
    {Py_tp_repr, RADDLE_SLOT(stream_repr)},
    {Py_tp_doc, (void *)(uintptr_t)stream_doc},
    {0, NULL},
};

static PyType_Spec stream_spec = {
    .name = "raddle.Stream",
    .basicsize = sizeof(stream_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = stream_slots,
};

int raddle_py_add_stream(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &stream_spec, NULL);
    const int result = type != NULL ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return result;
}

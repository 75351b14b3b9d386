/* py_ops_linear.c - raddle._core.Linear: a packed weight and its bias, and the call that
 * multiplies. */
#include "python/py_ops.h"

#include "ops/ops.h"
#include "python/py_runtime.h"

typedef struct linear_object {
    PyObject_HEAD raddle_ops_linear *linear;
    raddle_tensor_hold weight, bias; /* of layers that use the caller's device memory */
    int64_t in_features, out_features;
    raddle_dtype dtype;
    raddle_device device;
} linear_object;

/* Device memory is used where it lies: kept alive by a reference of our own. */
static int hold_if_borrowed(PyObject *object, const char *name, const raddle_tensor *tensor,
                            raddle_tensor_hold *hold) {
    if (!tensor || tensor->device.type == RADDLE_CPU) {
        return 0;
    }
    return raddle_tensor_hold_open(object, name, RADDLE_ARG_READ, RADDLE_DTYPE_NONE, hold);
}

static int create(linear_object *self, PyObject *const *objects, const raddle_tensor_arg *args,
                  PyObject *device, PyObject *stream_object) {
    const raddle_tensor *weight = args[0].view, *bias = args[1].view;
    raddle_stream stream;
    raddle_status status;
    self->device = weight->device;
    if ((device != Py_None && raddle_device_from_object(device, "device", &self->device) < 0) ||
        raddle_stream_from_args(stream_object, args, 2, &stream) < 0) {
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_ops_linear_create(weight, bias, self->device, stream, &self->linear);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        raddle_raise(status);
        return -1;
    }
    self->out_features = weight->shape[0];
    self->in_features = weight->shape[1];
    self->dtype = weight->dtype;
    if (self->device.type == RADDLE_CPU) {
        return 0;
    }
    if (hold_if_borrowed(objects[0], "weight", weight, &self->weight) < 0 ||
        hold_if_borrowed(objects[1], "bias", bias, &self->bias) < 0) {
        return -1;
    }
    return 0;
}

static PyObject *linear_new(PyTypeObject *type, PyObject *arguments, PyObject *kwargs) {
    static char *keywords[] = {"weight", "bias", "device", "dtype", "stream", NULL};
    static const char *const names[] = {"weight", "bias"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_OPTIONAL};
    PyObject *objects[2], *device, *dtype, *stream;
    raddle_tensor_arg args[2];
    raddle_dtype bits;
    if (!PyArg_ParseTupleAndKeywords(arguments, kwargs, "OOOOO:Linear", keywords, &objects[0],
                                     &objects[1], &device, &dtype, &stream) ||
        raddle_dtype_from_object(dtype, "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, 2, bits, args) < 0) {
        return NULL;
    }
    linear_object *self = (linear_object *)type->tp_alloc(type, 0);
    if (self && create(self, objects, args, device, stream) < 0) {
        Py_CLEAR(self);
    }
    raddle_py_ops_close(args, 2);
    return (PyObject *)self;
}

static void linear_dealloc(linear_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_ops_linear_destroy(self->linear);
    raddle_tensor_hold_close(&self->weight);
    raddle_tensor_hold_close(&self->bias);
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(run_doc,
             "run(x, out, stream, max_sms, /)\n--\n\nx [.., in_features] -> [.., out_features].");

static PyObject *linear_run(linear_object *self, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"x"};
    static const int access[] = {RADDLE_ARG_READ};
    enum { X, OUT, NUM };
    raddle_tensor_arg args[NUM] = {0};
    raddle_stream stream;
    PyObject *result = NULL;
    if (raddle_py_ops_check_count("run", count, 4) < 0) {
        return NULL;
    }
    const long given = PyLong_AsLong(objects[3]);
    const int32_t max_sms = (int32_t)(given > INT32_MAX ? INT32_MAX : given < -1 ? -1 : given);
    if ((given == -1 && PyErr_Occurred()) ||
        raddle_py_ops_open(objects, names, access, 1, self->dtype, args) < 0) {
        return NULL;
    }
    const raddle_tensor *x = args[X].view;
    int64_t shape[RADDLE_MAX_DIM] = {0};
    int64_t elements = self->in_features * self->out_features;
    for (int d = 0; d < x->ndim; d++) {
        shape[d] = d == x->ndim - 1 ? self->out_features : x->shape[d];
    }
    PyObject *out = raddle_py_ops_result(objects[1], "out", objects[0], shape, x->ndim, x->dtype,
                                         x->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[2], args, NUM, &stream) < 0 ||
        raddle_py_graph_keep((PyObject *)self) <
            0) { /* a captured product reads the weight again */
        goto out;
    }
    PyThreadState *state = raddle_py_ops_begin_work(x->device, elements);
    const raddle_status status =
        raddle_ops_linear_run(self->linear, x, args[OUT].view, max_sms, stream);
    raddle_py_ops_end_work(state);
    result = status == RADDLE_OK ? Py_NewRef(out) : raddle_raise(status);
out:
    raddle_py_ops_close(args, NUM);
    Py_XDECREF(out);
    return result;
}

static PyObject *get_in_features(linear_object *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(self->in_features);
}

static PyObject *get_out_features(linear_object *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(self->out_features);
}

static PyObject *get_dtype(linear_object *self, void *closure) {
    (void)closure;
    return PyUnicode_FromString(raddle_dtype_name(self->dtype));
}

static PyObject *get_device(linear_object *self, void *closure) {
    char text[16];
    (void)closure;
    return PyUnicode_FromString(raddle_device_text(self->device, text));
}

static PyMethodDef linear_methods[] = {
    {"run", RADDLE_FASTCALL(linear_run), METH_FASTCALL, run_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef linear_getset[] = {
    {"in_features", (getter)get_in_features, NULL, "Width of x.", NULL},
    {"out_features", (getter)get_out_features, NULL, "Width of the result.", NULL},
    {"dtype", (getter)get_dtype, NULL, "Name of the weight's element type.", NULL},
    {"device", (getter)get_device, NULL, "Where the layer runs, like \"cuda:0\".", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(linear_doc, "A weight in the form that its device multiplies best, and its bias.");

static PyType_Slot linear_slots[] = {
    {Py_tp_new, RADDLE_SLOT(linear_new)}, {Py_tp_dealloc, RADDLE_SLOT(linear_dealloc)},
    {Py_tp_methods, linear_methods},      {Py_tp_getset, linear_getset},
    {Py_tp_doc, (void *)linear_doc},      {0, NULL},
};

static PyType_Spec linear_spec = {
    .name = "raddle._core.Linear",
    .basicsize = sizeof(linear_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = linear_slots,
};

int raddle_py_ops_add_linear(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &linear_spec, NULL);
    if (!type) {
        return -1;
    }
    const int result = PyModule_AddObjectRef(module, "Linear", type);
    Py_DECREF(type);
    return result;
}

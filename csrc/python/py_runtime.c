/* py_runtime.c - raddle._core.Workspace and raddle._core.Graph.
 *
 * A Graph holds Python references to everything that was passed to a call during its capture: the
 * launches read and write that memory. The list is the object's own, so garbage collection sees it.
 */
#include "python/py_runtime.h"

#include "base/alloc.h"
#include "base/tensor.h"
#include "python/tensor_arg.h"
#include "runtime/graph.h"

typedef struct workspace_object {
    PyObject_HEAD raddle_workspace *workspace;
} workspace_object;

typedef struct graph_object {
    PyObject_HEAD raddle_graph *graph; /* NULL before begin */
    PyObject *kept;                    /* list */
    raddle_device device;
    raddle_stream stream; /* as given; NULL: none was, or the legacy default */
} graph_object;

static PyTypeObject *workspace_type; /* set once by the module's exec slot */

/* The object whose graph this thread captures: borrowed, it lives at least until end or abort. */
static _Thread_local graph_object *capturing_object;

/* ------------------------------------------------------------------ Workspace */

static void release_hold(void *context) {
    raddle_tensor_hold *hold = context;
    PyGILState_STATE gil = PyGILState_Ensure();
    raddle_tensor_hold_close(hold);
    PyGILState_Release(gil);
    raddle_free(hold);
}

static raddle_status wrap_hold(raddle_tensor_hold *hold, raddle_workspace **out_workspace) {
    const raddle_tensor *tensor = &hold->tensor;
    RADDLE_REQUIRE(raddle_tensor_is_contiguous(tensor), RADDLE_ERR_SHAPE,
                   "workspace: expected a contiguous tensor; torch.empty(bytes, dtype=torch.uint8) "
                   "on the plan's device is one");
    const size_t bytes = (size_t)raddle_tensor_count(tensor) * raddle_dtype_bytes(tensor->dtype);
    return raddle_workspace_wrap(tensor->device, tensor->data, bytes, release_hold, hold,
                                 out_workspace);
}

static raddle_workspace *wrap_tensor(PyObject *object) {
    raddle_tensor_hold *hold = raddle_alloc_zero(sizeof *hold);
    if (hold == NULL) {
        raddle_raise(raddle_fail_memory(sizeof *hold));
        return NULL;
    }
    if (raddle_tensor_hold_open(object, "workspace", RADDLE_ARG_WRITE, RADDLE_DTYPE_NONE, hold) <
        0) {
        raddle_free(hold);
        return NULL;
    }
    raddle_workspace *workspace = NULL;
    raddle_status status = wrap_hold(hold, &workspace);
    if (status != RADDLE_OK) {
        release_hold(hold);
        raddle_raise(status);
        return NULL;
    }
    return workspace;
}

raddle_workspace *raddle_py_workspace_from_object(PyObject *object) {
    if (PyObject_TypeCheck(object, workspace_type)) {
        return raddle_workspace_retain(((workspace_object *)object)->workspace);
    }
    return wrap_tensor(object);
}

/* Memory of raddle's own; size in bytes. */
static raddle_workspace *make_workspace(PyObject *size, PyObject *device_object) {
    raddle_device device;
    raddle_workspace *workspace = NULL;
    const long long bytes = PyLong_AsLongLong(size);
    if ((bytes == -1 && PyErr_Occurred()) ||
        raddle_device_from_object(device_object, "device", &device) < 0) {
        return NULL;
    }
    raddle_status status = RADDLE_OK;
    if (bytes < 0) {
        status = raddle_fail(RADDLE_ERR_VALUE, "size: expected 0 or more bytes, got %lld", bytes);
    }
    if (status == RADDLE_OK) {
        Py_BEGIN_ALLOW_THREADS;
        status = raddle_workspace_create(device, (size_t)bytes, &workspace);
        Py_END_ALLOW_THREADS;
    }
    if (status != RADDLE_OK) {
        raddle_raise(status);
    }
    return workspace;
}

PyDoc_STRVAR(
    workspace_doc,
    "Workspace(tensor=None, *, size=None, device='cpu')\n--\n\n"
    "Scratch memory for plans whose runs are ordered on one stream: that of a contiguous\n"
    "writable tensor, which is kept alive, or size bytes that raddle allocates on device.\n"
    "A plan needs plan.workspace_size bytes. Raises ShapeError for a tensor with gaps,\n"
    "ArgumentError when both or neither of tensor and size are given.");

static PyObject *workspace_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"tensor", "size", "device", NULL};
    PyObject *tensor = Py_None, *size = Py_None, *device = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O$OO:Workspace", names, &tensor, &size,
                                     &device)) {
        return NULL;
    }
    if ((tensor == Py_None) == (size == Py_None) || (tensor != Py_None && device != NULL)) {
        return raddle_raise(raddle_fail(RADDLE_ERR_VALUE,
                                        "workspace: expected a tensor, or size= in bytes and "
                                        "device=; a tensor brings its own size and device"));
    }
    PyObject *cpu = device == NULL ? PyUnicode_FromString("cpu") : Py_NewRef(device);
    if (cpu == NULL) {
        return NULL;
    }
    raddle_workspace *workspace =
        tensor != Py_None ? raddle_py_workspace_from_object(tensor) : make_workspace(size, cpu);
    Py_DECREF(cpu);
    workspace_object *self = workspace != NULL ? (workspace_object *)type->tp_alloc(type, 0) : NULL;
    if (self == NULL) {
        raddle_workspace_destroy(workspace);
        return NULL;
    }
    self->workspace = workspace;
    return (PyObject *)self;
}

static void workspace_dealloc(workspace_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_workspace_destroy(self->workspace);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *workspace_size(workspace_object *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(raddle_workspace_bytes(self->workspace));
}

static PyObject *workspace_device(workspace_object *self, void *unused) {
    (void)unused;
    char text[16];
    return PyUnicode_FromString(raddle_device_text(self->workspace->device, text));
}

static PyGetSetDef workspace_getters[] = {
    {"size", (getter)workspace_size, NULL, "Bytes.", NULL},
    {"device", (getter)workspace_device, NULL, "As text: \"cpu\", \"cuda:1\".", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot workspace_slots[] = {
    {Py_tp_new, RADDLE_SLOT(workspace_new)},
    {Py_tp_dealloc, RADDLE_SLOT(workspace_dealloc)},
    {Py_tp_getset, workspace_getters},
    {Py_tp_doc, (void *)(uintptr_t)workspace_doc},
    {0, NULL},
};

static PyType_Spec workspace_spec = {
    .name = "raddle.Workspace",
    .basicsize = sizeof(workspace_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = workspace_slots,
};

/* ------------------------------------------------------------------ Graph */

int raddle_py_graph_keep(PyObject *object) {
    return capturing_object != NULL ? PyList_Append(capturing_object->kept, object) : 0;
}

static PyObject *graph_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"device", "stream", NULL};
    PyObject *device_object, *stream_object;
    raddle_device device;
    raddle_stream stream = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO:Graph", names, &device_object,
                                     &stream_object) ||
        raddle_device_from_object(device_object, "device", &device) < 0 ||
        (stream_object != Py_None &&
         raddle_stream_from_args(stream_object, NULL, 0, &stream) < 0)) {
        return NULL;
    }
    graph_object *self = (graph_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->device = device;
    self->stream = stream;
    self->kept = PyList_New(0);
    if (self->kept == NULL || PyList_Append(self->kept, stream_object) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int graph_traverse(graph_object *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->kept);
    return 0;
}

/* The graph goes before what it reads. */
static int graph_clear(graph_object *self) {
    if (capturing_object == self) {
        capturing_object = NULL;
        raddle_graph_abort(self->graph);
    }
    raddle_graph_destroy(self->graph);
    self->graph = NULL;
    Py_CLEAR(self->kept);
    return 0;
}

static void graph_dealloc(graph_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    graph_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *graph_begin(graph_object *self, PyObject *unused) {
    (void)unused;
    raddle_status status = RADDLE_OK;
    if (self->graph != NULL) {
        status = raddle_fail(RADDLE_ERR_STATE,
                             "graph: it was captured before; make a new Graph for a new capture");
    }
    if (status == RADDLE_OK) {
        status = raddle_graph_begin(self->device, self->stream, &self->graph);
    }
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    capturing_object = self;
    Py_RETURN_NONE;
}

static PyObject *graph_end(graph_object *self, PyObject *unused) {
    (void)unused;
    raddle_status status = RADDLE_OK;
    if (capturing_object != self) {
        return raddle_raise(
            raddle_fail(RADDLE_ERR_STATE, "graph: this thread does not capture it"));
    }
    capturing_object = NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_graph_end(self->graph);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    Py_RETURN_NONE;
}

static PyObject *graph_abort(graph_object *self, PyObject *unused) {
    (void)unused;
    if (capturing_object == self) {
        capturing_object = NULL;
        raddle_graph_abort(self->graph);
    }
    Py_RETURN_NONE;
}

static PyObject *graph_launch(graph_object *self, PyObject *stream_object) {
    raddle_stream stream = self->stream;
    if (self->graph == NULL) {
        return raddle_raise(raddle_fail(
            RADDLE_ERR_STATE, "launch: nothing was captured yet; capture in `with graph:` first"));
    }
    if (stream_object != Py_None && raddle_stream_from_args(stream_object, NULL, 0, &stream) < 0) {
        return NULL;
    }
    raddle_status status = raddle_graph_launch(self->graph, stream);
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    if (raddle_py_graph_keep((PyObject *)self) < 0) { /* launched into the capture of another */
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *graph_stream(graph_object *self, void *unused) {
    (void)unused;
    raddle_stream stream = self->graph != NULL ? raddle_graph_stream(self->graph) : self->stream;
    return PyLong_FromVoidPtr(stream);
}

static PyObject *graph_state(graph_object *self, void *unused) {
    (void)unused;
    static const char *const names[] = {
        [RADDLE_GRAPH_CAPTURING] = "capturing",
        [RADDLE_GRAPH_READY] = "ready",
        [RADDLE_GRAPH_STALE] = "stale",
        [RADDLE_GRAPH_FAILED] = "failed",
    };
    return PyUnicode_FromString(self->graph == NULL ? "new"
                                                    : names[raddle_graph_get_state(self->graph)]);
}

static PyMethodDef graph_methods[] = {
    {"begin", (PyCFunction)graph_begin, METH_NOARGS, "begin()\n--\n\nCapture on this thread."},
    {"end", (PyCFunction)graph_end, METH_NOARGS, "end()\n--\n\nMake what was captured ready."},
    {"abort", (PyCFunction)graph_abort, METH_NOARGS, "abort()\n--\n\nForget what was captured."},
    {"launch", (PyCFunction)graph_launch, METH_O, "launch(stream, /)\n--\n\nRun it on a stream."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef graph_getters[] = {
    {"stream", (getter)graph_stream, NULL, "Handle of the captured stream.", NULL},
    {"state", (getter)graph_state, NULL, "new, capturing, ready, stale or failed.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot graph_slots[] = {
    {Py_tp_new, RADDLE_SLOT(graph_new)},
    {Py_tp_dealloc, RADDLE_SLOT(graph_dealloc)},
    {Py_tp_traverse, RADDLE_SLOT(graph_traverse)},
    {Py_tp_clear, RADDLE_SLOT(graph_clear)},
    {Py_tp_methods, graph_methods},
    {Py_tp_getset, graph_getters},
    {Py_tp_doc, (void *)(uintptr_t) "Graph(device, stream)\n--\n\nBehind raddle.Graph."},
    {0, NULL},
};

static PyType_Spec graph_spec = {
    .name = "raddle._core.Graph",
    .basicsize = sizeof(graph_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = graph_slots,
};

/* ------------------------------------------------------------------ module */

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **out_type) {
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type == NULL || PyModule_AddType(module, type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    *out_type = type;
    return 0;
}

int raddle_py_add_runtime(PyObject *module) {
    PyTypeObject *graph_type = NULL;
    if (add_type(module, &workspace_spec, &workspace_type) < 0 ||
        add_type(module, &graph_spec, &graph_type) < 0) {
        return -1;
    }
    Py_DECREF(graph_type); /* the module has its own; workspace_type is kept */
    return 0;
}

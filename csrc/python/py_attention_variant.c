/* py_attention_variant.c - raddle._core.AttentionVariant, and what a run is given besides tensors of
 * the batch: sinks, scales, the arguments of a variant.
 */
#include "python/py_attention.h"

#include <string.h>

#include "python/py_runtime.h"

typedef struct attention_variant_object {
    PyObject_HEAD raddle_attention_variant *variant;
} attention_variant_object;

/* ------------------------------------------------------------------ construction */

/* One (name, dtype, is_written) of a tuple. */
static int parse_argument(PyObject *item, raddle_attention_variant_argument *out) {
    PyObject *dtype;
    int is_written;
    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "sOp", &out->name, &dtype, &is_written)) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "expected tuples (name, dtype, is_written)");
        }
        return -1;
    }
    out->is_written = is_written != 0;
    return raddle_dtype_from_object(dtype, out->name, &out->dtype);
}

static int parse_arguments(PyObject *tuple, const char *what, int32_t most,
                           raddle_attention_variant_argument *out, int32_t *out_count) {
    const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    if (count > most) {
        raddle_raise(raddle_fail(RADDLE_ERR_CAPACITY, "%s: expected at most %d, got %lld", what,
                                 (int)most, (long long)count));
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (parse_argument(PyTuple_GET_ITEM(tuple, i), &out[i]) < 0) {
            return -1;
        }
    }
    *out_count = (int32_t)count;
    return 0;
}

static PyObject *variant_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"name", "source", "filename", "no_softmax", "tensors", "scalars", NULL};
    raddle_attention_variant_argument tensors[RADDLE_VARIANT_MAX_TENSORS];
    raddle_attention_variant_argument scalars[RADDLE_VARIANT_MAX_SCALARS];
    raddle_attention_variant_spec spec = {
        .struct_size = sizeof spec, .tensors = tensors, .scalars = scalars};
    PyObject *tensor_tuple, *scalar_tuple;
    int no_softmax;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sszpO!O!:AttentionVariant", names, &spec.name,
                                     &spec.source, &spec.filename, &no_softmax, &PyTuple_Type,
                                     &tensor_tuple, &PyTuple_Type, &scalar_tuple) ||
        parse_arguments(tensor_tuple, "tensors", RADDLE_VARIANT_MAX_TENSORS, tensors,
                        &spec.num_tensors) < 0 ||
        parse_arguments(scalar_tuple, "scalars", RADDLE_VARIANT_MAX_SCALARS, scalars,
                        &spec.num_scalars) < 0) {
        return NULL;
    }
    spec.no_softmax = no_softmax != 0;
    raddle_attention_variant *variant = NULL;
    const raddle_status status = raddle_attention_variant_create(&spec, &variant);
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    attention_variant_object *self = (attention_variant_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        raddle_attention_variant_destroy(variant);
        return NULL;
    }
    self->variant = variant;
    return (PyObject *)self;
}

static void variant_dealloc(attention_variant_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_attention_variant_destroy(self->variant);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *variant_text(attention_variant_object *self, void *closure) {
    (void)closure;
    return PyUnicode_FromString(self->variant->text);
}

static PyGetSetDef variant_getset[] = {
    {"text", (getter)variant_text, NULL, "What compilers get: declarations, then the source.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(variant_doc, "The hooks of an attention variant and what they are given.");

static PyType_Slot variant_slots[] = {
    {Py_tp_new, RADDLE_SLOT(variant_new)},
    {Py_tp_dealloc, RADDLE_SLOT(variant_dealloc)},
    {Py_tp_getset, variant_getset},
    {Py_tp_doc, (void *)variant_doc},
    {0, NULL},
};

static PyType_Spec variant_spec = {
    .name = "raddle._core.AttentionVariant",
    .basicsize = sizeof(attention_variant_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = variant_slots,
};

int raddle_py_add_attention_variant(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &variant_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    const int added = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return added;
}

int raddle_py_variant_from_object(PyObject *object, const raddle_attention_variant **out_variant) {
    *out_variant = NULL;
    if (object == Py_None) {
        return 0;
    }
    if (strcmp(Py_TYPE(object)->tp_name, variant_spec.name) != 0) {
        PyErr_Format(PyExc_TypeError, "variant: expected a raddle.Variant or None, got %s",
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    *out_variant = ((attention_variant_object *)object)->variant;
    return 0;
}

/* ------------------------------------------------------------------ arguments of a run */

/* A number, or a tensor with one number per head. */
static int open_scale(PyObject *object, const char *name, float *out_number,
                      raddle_tensor_arg *arg) {
    *out_number = 1.0f;
    memset(arg, 0, sizeof(*arg));
    if (object == Py_None) {
        return 0;
    }
    if (PyFloat_Check(object) || PyLong_Check(object)) {
        const double number = PyFloat_AsDouble(object);
        if (number == -1.0 && PyErr_Occurred()) {
            return -1;
        }
        if (number == 0.0) {
            raddle_raise(raddle_fail(RADDLE_ERR_VALUE, "%s: expected a number other than 0", name));
            return -1;
        }
        *out_number = (float)number;
        return 0;
    }
    return raddle_tensor_arg_open(object, name, RADDLE_ARG_READ, RADDLE_DTYPE_NONE, arg);
}

static int open_variant_tensors(const raddle_attention_variant *variant, PyObject *dict,
                                raddle_py_run_extras *extras) {
    for (int32_t i = 0; i < variant->num_tensors; i++) {
        const raddle_attention_variant_argument *one = &variant->tensors[i];
        PyObject *object = PyDict_GetItemString(dict, one->name);
        if (object == NULL) {
            raddle_raise(raddle_fail(RADDLE_ERR_VALUE,
                                     "variant_args: variant %s declares a tensor %s; give it",
                                     variant->name, one->name));
            return -1;
        }
        const int access = one->is_written ? RADDLE_ARG_WRITE : RADDLE_ARG_READ;
        raddle_tensor_arg *arg = &extras->args[extras->num_args];
        if (raddle_tensor_arg_open(object, one->name, access, RADDLE_DTYPE_NONE, arg) < 0) {
            return -1;
        }
        extras->num_args++;
        extras->tensors[i] = arg->view;
    }
    return 0;
}

static int read_variant_scalars(const raddle_attention_variant *variant, PyObject *dict,
                                raddle_py_run_extras *extras) {
    for (int32_t i = 0; i < variant->num_scalars; i++) {
        PyObject *object = PyDict_GetItemString(dict, variant->scalars[i].name);
        if (object == NULL) {
            raddle_raise(raddle_fail(RADDLE_ERR_VALUE,
                                     "variant_args: variant %s declares a number %s; give it",
                                     variant->name, variant->scalars[i].name));
            return -1;
        }
        extras->scalars[i] = PyFloat_AsDouble(object);
        if (extras->scalars[i] == -1.0 && PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError, "variant_args: %s: expected a number, got %s",
                         variant->scalars[i].name, Py_TYPE(object)->tp_name);
            return -1;
        }
    }
    return 0;
}

static bool is_declared(const raddle_attention_variant *variant, const char *name) {
    for (int32_t i = 0; i < variant->num_tensors; i++) {
        if (strcmp(variant->tensors[i].name, name) == 0) {
            return true;
        }
    }
    for (int32_t i = 0; i < variant->num_scalars; i++) {
        if (strcmp(variant->scalars[i].name, name) == 0) {
            return true;
        }
    }
    return false;
}

/* Names one that the variant does not declare. */
static int fail_undeclared(const raddle_attention_variant *variant, PyObject *dict) {
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(dict, &at, &key, &value)) {
        const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8(key) : NULL;
        if (name == NULL || !is_declared(variant, name)) {
            PyErr_Clear();
            raddle_raise(raddle_fail(RADDLE_ERR_VALUE, "variant_args: variant %s declares no %s",
                                     variant->name, name == NULL ? "such name" : name));
            break;
        }
    }
    return -1;
}

static int open_variant_args(const raddle_attention_variant *variant, PyObject *dict,
                             raddle_py_run_extras *extras) {
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "variant_args: expected a dict of names, got %s",
                     Py_TYPE(dict)->tp_name);
        return -1;
    }
    if (open_variant_tensors(variant, dict, extras) < 0 ||
        read_variant_scalars(variant, dict, extras) < 0) {
        return -1;
    }
    if (PyDict_GET_SIZE(dict) != variant->num_tensors + variant->num_scalars) {
        return fail_undeclared(variant, dict);
    }
    return 0;
}

int raddle_py_open_run_extras(const raddle_attention_variant *variant, PyObject *sinks,
                              PyObject *k_scale, PyObject *v_scale, PyObject *variant_args,
                              raddle_py_run_extras *extras) {
    enum { SINKS, K_SCALES, V_SCALES, NUM };
    memset(extras->args, 0, NUM * sizeof(extras->args[0]));
    extras->num_args = NUM;
    if (raddle_tensor_arg_open(sinks, "sinks", RADDLE_ARG_OPTIONAL, RADDLE_DTYPE_NONE,
                               &extras->args[SINKS]) < 0 ||
        open_scale(k_scale, "k_scale", &extras->k_scale, &extras->args[K_SCALES]) < 0 ||
        open_scale(v_scale, "v_scale", &extras->v_scale, &extras->args[V_SCALES]) < 0) {
        goto fail;
    }
    if (variant != NULL) {
        PyObject *dict = variant_args == Py_None ? PyDict_New() : Py_NewRef(variant_args);
        const int opened = dict == NULL ? -1 : open_variant_args(variant, dict, extras);
        Py_XDECREF(dict);
        if (opened < 0) {
            goto fail;
        }
    } else if (variant_args != Py_None) {
        raddle_raise(
            raddle_fail(RADDLE_ERR_VALUE, "variant_args: the plan was made without a variant"));
        goto fail;
    }
    extras->sinks = extras->args[SINKS].view;
    extras->k_scales = extras->args[K_SCALES].view;
    extras->v_scales = extras->args[V_SCALES].view;
    return 0;
fail:
    raddle_py_close_args(extras->args, extras->num_args);
    extras->num_args = 0;
    return -1;
}

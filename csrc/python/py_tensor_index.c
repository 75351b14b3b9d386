/* py_tensor_index.c - views of a raddle.Tensor: subscripts, iteration and reshape. Nothing here
 * copies elements. */
#include "python/py_tensor.h"

#include "python/tensor_arg.h"

/* A view holds the tensor that owns the memory, never a chain of views. */
static PyObject *make_view(PyObject *self, const raddle_tensor *view) {
    const raddle_py_tensor *tensor = (raddle_py_tensor *)self;
    return raddle_py_tensor_wrap(view, Py_NewRef(tensor->owner ? tensor->owner : self));
}

/* What a key has done so far: dimensions [0, taken) of from are used up, to holds the result's.
 * offset in elements. */
typedef struct cursor {
    const raddle_tensor *from;
    raddle_tensor to;
    int taken;
    int64_t offset;
    bool empty; /* the result has no element, so offset must not be applied */
} cursor;

static int push_dim(cursor *c, int64_t extent, int64_t stride) {
    if (c->to.ndim == RADDLE_MAX_DIM) {
        raddle_raise(raddle_fail(RADDLE_ERR_SHAPE, "index: the result has more than %d dimensions",
                                 (int)RADDLE_MAX_DIM));
        return -1;
    }
    c->to.shape[c->to.ndim] = extent;
    c->to.stride[c->to.ndim] = stride;
    c->to.ndim++;
    c->empty = c->empty || extent == 0;
    return 0;
}

static int take_int(cursor *c, Py_ssize_t index) {
    const int64_t extent = c->from->shape[c->taken];
    const int64_t at = index < 0 ? index + extent : index;
    if (at < 0 || at >= extent) {
        PyErr_Format(PyExc_IndexError, "index %zd is out of range for dimension %d of extent %lld",
                     index, c->taken, (long long)extent);
        return -1;
    }
    c->offset += at * c->from->stride[c->taken];
    c->taken++;
    return 0;
}

static int take_slice(cursor *c, PyObject *slice) {
    Py_ssize_t start, stop, step;
    if (PySlice_Unpack(slice, &start, &stop, &step) < 0) {
        return -1;
    }
    const int64_t stride = c->from->stride[c->taken];
    const Py_ssize_t count =
        PySlice_AdjustIndices((Py_ssize_t)c->from->shape[c->taken], &start, &stop, step);
    c->taken++;
    if (count > 0) {
        c->offset += start * stride;
    }
    /* A step past the end is legal for one element; its stride is never used, and must not
     * overflow. */
    return push_dim(c, count, count > 1 ? stride * step : stride);
}

static int take_rest(cursor *c, int keep) {
    while (c->from->ndim - c->taken > keep) {
        if (push_dim(c, c->from->shape[c->taken], c->from->stride[c->taken]) < 0) {
            return -1;
        }
        c->taken++;
    }
    return 0;
}

static bool takes_dim(PyObject *key) {
    return key != Py_None && key != Py_Ellipsis;
}

static int take_key(cursor *c, PyObject *key, int later) {
    if (key == Py_Ellipsis) {
        return take_rest(c, later);
    }
    if (key == Py_None) {
        return push_dim(c, 1, 1);
    }
    if (PySlice_Check(key)) {
        return take_slice(c, key);
    }
    if (PyIndex_Check(key) && !PyBool_Check(key)) {
        const Py_ssize_t index = PyNumber_AsSsize_t(key, PyExc_IndexError);
        if (index != -1 || !PyErr_Occurred()) {
            return take_int(c, index);
        }
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) {
            return -1;
        }
        PyErr_Clear(); /* an array of several: it has __index__, and refuses */
    }
    raddle_raise(raddle_fail(
        RADDLE_ERR_UNSUPPORTED,
        "index: expected ints, slices, ... or None, got %s; gather with NumPy or a framework",
        Py_TYPE(key)->tp_name));
    return -1;
}

PyObject *raddle_py_tensor_subscript(PyObject *self, PyObject *key) {
    const raddle_tensor *from = &((raddle_py_tensor *)self)->tensor;
    PyObject *keys = PyTuple_Check(key) ? Py_NewRef(key) : PyTuple_Pack(1, key);
    if (!keys) {
        return NULL;
    }
    PyObject *result = NULL;
    cursor c = {.from = from, .to = *from};
    c.to.ndim = 0;
    const Py_ssize_t num_keys = PyTuple_GET_SIZE(keys);
    int later = 0, ellipses = 0; /* dimensions that keys not yet seen will take */
    for (Py_ssize_t i = 0; i < num_keys; i++) {
        PyObject *one = PyTuple_GET_ITEM(keys, i);
        later += takes_dim(one);
        ellipses += one == Py_Ellipsis;
    }
    if (later > from->ndim || ellipses > 1) {
        PyErr_Format(PyExc_IndexError,
                     ellipses > 1 ? "an index can have only one ... (got %d)"
                                  : "%d indices for a tensor of %d dimensions",
                     ellipses > 1 ? ellipses : later, from->ndim);
        goto out;
    }
    for (Py_ssize_t i = 0; i < num_keys; i++) {
        PyObject *one = PyTuple_GET_ITEM(keys, i);
        later -= takes_dim(one);
        if (take_key(&c, one, later) < 0) {
            goto out;
        }
    }
    if (take_rest(&c, 0) < 0) {
        goto out;
    }
    if (from->data && !c.empty) {
        c.to.data = (char *)from->data + c.offset * (int64_t)raddle_dtype_bytes(from->dtype);
    }
    result = make_view(self, &c.to);
out:
    Py_DECREF(keys);
    return result;
}

PyObject *raddle_py_tensor_item_at(PyObject *self, Py_ssize_t index) {
    PyObject *key = PyLong_FromSsize_t(index);
    PyObject *result = key ? raddle_py_tensor_subscript(self, key) : NULL;
    Py_XDECREF(key);
    return result;
}

/* ---------------------------------------------------------------- reshape */

/* Puts the extent that -1 stands for; the product must be count. */
static raddle_status resolve_shape(int64_t *shape, int ndim, int64_t count) {
    int64_t product = 1;
    int open = -1;
    bool overflow = false;
    for (int i = 0; i < ndim; i++) {
        RADDLE_REQUIRE(shape[i] >= -1, RADDLE_ERR_SHAPE,
                       "shape: negative extent %lld in dimension %d", (long long)shape[i], i);
        RADDLE_REQUIRE(shape[i] >= 0 || open < 0, RADDLE_ERR_SHAPE,
                       "shape: only one extent can be -1");
        if (shape[i] < 0) {
            open = i;
        } else {
            overflow |= __builtin_mul_overflow(product, shape[i], &product);
        }
    }
    if (open >= 0 && !overflow && product > 0 && count % product == 0) {
        shape[open] = count / product;
        product = count;
    }
    RADDLE_REQUIRE(!overflow && product == count && (open < 0 || shape[open] >= 0),
                   RADDLE_ERR_SHAPE, "shape: expected extents that multiply to %lld elements",
                   (long long)count);
    return RADDLE_OK;
}

/* Strides for shape over the elements of from, in their order; false when no strides can do it.
 * Both are walked from the inside: runs of from that step as one are cut into the new extents.
 * Extents of 1 are left out of both. */
static bool view_strides(const raddle_tensor *from, const int64_t *shape, int ndim,
                         int64_t *out_stride) {
    int old = from->ndim - 1, new = ndim - 1;
    while (new >= 0) {
        while (old >= 0 && from->shape[old] == 1) {
            old--;
        }
        if (shape[new] == 1) {
            out_stride[new --] = 1;
            continue;
        }
        if (old < 0) {
            return false;
        }
        int64_t run = from->shape[old];
        const int64_t step = from->stride[old];
        while (old > 0 && (from->shape[old - 1] == 1 || from->stride[old - 1] == step * run)) {
            run *= from->shape[--old];
        }
        old--;
        int64_t used = 1;
        while (new >= 0 && used < run) {
            out_stride[new] = step * used;
            used *= shape[new --];
        }
        if (used != run) {
            return false;
        }
    }
    return true;
}

PyObject *raddle_py_tensor_reshape(PyObject *self, PyObject *args) {
    const raddle_tensor *from = &((raddle_py_tensor *)self)->tensor;
    raddle_tensor view = *from;
    PyObject *words = PyTuple_GET_SIZE(args) == 1 ? PyTuple_GET_ITEM(args, 0) : args;
    if (raddle_shape_from_object(words, "shape", view.shape, &view.ndim) < 0) {
        return NULL;
    }
    const int64_t count = raddle_tensor_count(from);
    raddle_status status = resolve_shape(view.shape, view.ndim, count);
    if (status == RADDLE_OK && count == 0) {
        int64_t stride = 1;
        for (int i = view.ndim - 1; i >= 0; i--) {
            view.stride[i] = stride;
            stride *= view.shape[i] > 0 ? view.shape[i] : 1;
        }
    } else if (status == RADDLE_OK && !view_strides(from, view.shape, view.ndim, view.stride)) {
        status =
            raddle_fail(RADDLE_ERR_SHAPE,
                        "shape: the tensor's strides allow no view of this shape; copy it into "
                        "a new tensor first");
    }
    return status == RADDLE_OK ? make_view(self, &view) : raddle_raise(status);
}

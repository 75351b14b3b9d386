/* py_tensor.h - the C side of raddle.Tensor for its neighbours in csrc/python. */
#ifndef RADDLE_PYTHON_PY_TENSOR_H
#define RADDLE_PYTHON_PY_TENSOR_H

#include "python/module.h"

#include "base/tensor.h"
#include "runtime/backend.h"
#include "third_party/dlpack/dlpack.h"

/* Immutable but for the elements: shape, strides and address never change, so a view needs no more
 * than a reference. */
typedef struct raddle_py_tensor {
    PyObject_HEAD raddle_tensor tensor;
    PyObject
        *owner; /* keeps the memory of a view or of a wrapped producer alive; NULL: own memory */
    const raddle_backend *backend; /* frees the memory when owner is NULL */
    PyObject *weak_references;
} raddle_py_tensor;

extern PyTypeObject *raddle_py_tensor_type; /* set by the module's exec slot */

/* Uninitialised memory, dense, aligned to RADDLE_ARENA_ALIGN. */
PyObject *raddle_py_tensor_new(const int64_t *shape, int ndim, raddle_dtype dtype,
                               raddle_device device);
/* Memory that owner keeps alive. Steals owner, also on failure. */
PyObject *raddle_py_tensor_wrap(const raddle_tensor *tensor, PyObject *owner);

/* py_tensor_dlpack.c: methods __dlpack__ and __dlpack_device__, and the table behind
 * __dlpack_c_exchange_api__. */
PyObject *raddle_py_tensor_dlpack(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                  PyObject *names);
PyObject *raddle_py_tensor_dlpack_device(PyObject *self, PyObject *unused);
extern const DLPackExchangeAPI raddle_py_tensor_exchange;

/* py_tensor_data.c: elements. */
PyObject *raddle_py_tensor_copy(PyObject *self, PyObject *const *args, Py_ssize_t num_args);
PyObject *raddle_py_tensor_zero(PyObject *self, PyObject *const *args, Py_ssize_t num_args);
PyObject *raddle_py_tensor_to(PyObject *self, PyObject *const *args, Py_ssize_t num_args);
PyObject *raddle_py_tensor_item(PyObject *self, PyObject *unused);
PyObject *raddle_py_tensor_numpy(PyObject *self, PyObject *unused);
PyObject *raddle_py_tensor_array(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                 PyObject *names);
int raddle_py_tensor_get_buffer(PyObject *self, Py_buffer *buffer, int flags);
void raddle_py_tensor_release_buffer(PyObject *self, Py_buffer *buffer);

/* py_tensor_index.c: views. */
PyObject *raddle_py_tensor_subscript(PyObject *self, PyObject *key);
PyObject *raddle_py_tensor_item_at(PyObject *self, Py_ssize_t index);
PyObject *raddle_py_tensor_reshape(PyObject *self, PyObject *args);

#endif

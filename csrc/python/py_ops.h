/* py_ops.h - what the files that bind the ops family share. */
#ifndef RADDLE_PYTHON_PY_OPS_H
#define RADDLE_PYTHON_PY_OPS_H

#include "python/module.h"

#include "python/tensor_arg.h"

/* Opens objects[i] as a tensor called names[i]. bits is the caller's dtype= for 16-bit floats that
 * come as uint16; without it they follow the first tensor. On failure nothing stays open. */
int raddle_py_ops_open(PyObject *const *objects, const char *const *names, const int *access,
                       int count, raddle_dtype bits, raddle_tensor_arg *args);
void raddle_py_ops_close(raddle_tensor_arg *args, int count);
/* The result: given, or when that is None a new tensor of like's kind. Opened into arg; a new
 * reference. */
PyObject *raddle_py_ops_result(PyObject *given, const char *name, PyObject *like,
                               const int64_t *shape, int ndim, raddle_dtype dtype,
                               raddle_device device, raddle_tensor_arg *arg);
/* Lets other Python threads run during work on the host over so many elements, where that is worth
 * it. */
PyThreadState *raddle_py_ops_begin_work(raddle_device device, int64_t elements);
void raddle_py_ops_end_work(PyThreadState *state);
int raddle_py_ops_check_count(const char *function, Py_ssize_t given, Py_ssize_t wanted);

/* Closes args; the result, or the exception of status. Takes over the reference to result. */
PyObject *raddle_py_ops_finish(raddle_status status, PyObject *result, raddle_tensor_arg *args,
                               int count);
/* The same when a Python exception is set. */
PyObject *raddle_py_ops_abandon(PyObject *result, raddle_tensor_arg *args, int count);
int raddle_py_ops_parse_double(PyObject *object, const char *name, double *out_value);
int raddle_py_ops_parse_float(PyObject *object, const char *name, float *out_value);
/* Whether an object of that type can give its memory; scalars of NumPy cannot. */
bool raddle_py_ops_is_tensor(PyObject *object);

/* py_ops_norm.c */
int raddle_py_ops_add_norm(PyObject *module);
/* py_ops_rope.c */
int raddle_py_ops_add_rope(PyObject *module);
/* py_ops_sample.c */
int raddle_py_ops_add_sample(PyObject *module);
/* py_ops_linear.c: the type Linear. */
int raddle_py_ops_add_linear(PyObject *module);

#endif

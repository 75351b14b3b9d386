/* py_attention.h - argument handling that the two files of the attention binding share.
 *
 * Everything is positional; words, defaults and docstrings live in python/raddle/. Functions return
 * 0, or -1 with a Python exception set.
 */
#ifndef RADDLE_PYTHON_PY_ATTENTION_H
#define RADDLE_PYTHON_PY_ATTENTION_H

#include "python/module.h"
#include "python/tensor_arg.h"

int raddle_py_parse_layout(const char *text, raddle_kv_layout *out_layout);
int raddle_py_parse_lse_base(const char *text, raddle_lse_base *out_base);
/* Arrays of 16-bit floats reach NumPy users as uint16: their bits are read as dtype. */
void raddle_py_read_bits_as(raddle_tensor_arg *arg, raddle_dtype dtype);
int raddle_py_check_count(const char *function, Py_ssize_t given, Py_ssize_t wanted);

/* Opens count objects in order; on failure nothing stays open. */
int raddle_py_open_args(PyObject *const *objects, const char *const *names, const int *access,
                        int count, raddle_tensor_arg *args);
void raddle_py_close_args(raddle_tensor_arg *args, int count);
/* The result: the caller's own tensor, or a new one of like's kind when given is None. New
 * reference. */
PyObject *raddle_py_open_result(PyObject *given, PyObject *like, const char *name,
                                const int64_t *shape, int ndim, raddle_dtype dtype,
                                raddle_device device, raddle_tensor_arg *arg);

int raddle_py_add_attention_functions(PyObject *module);

#endif

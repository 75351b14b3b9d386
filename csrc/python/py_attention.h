/* py_attention.h - argument handling that the two files of the attention binding share.
 *
 * Everything is positional; words, defaults and docstrings live in python/raddle/. Functions return
 * 0, or -1 with a Python exception set.
 */
#ifndef RADDLE_PYTHON_PY_ATTENTION_H
#define RADDLE_PYTHON_PY_ATTENTION_H

#include "attention/attention.h"
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

/* What a run is given besides the tensors of the batch; open until raddle_py_close_args(args). */
typedef struct raddle_py_run_extras {
    raddle_tensor_arg args[3 + RADDLE_VARIANT_MAX_TENSORS];
    int num_args;
    float k_scale, v_scale;
    const raddle_tensor *sinks, *k_scales, *v_scales;
    const raddle_tensor *tensors[RADDLE_VARIANT_MAX_TENSORS];
    double scalars[RADDLE_VARIANT_MAX_SCALARS];
} raddle_py_run_extras;

int raddle_py_open_run_extras(const raddle_attention_variant *variant, PyObject *sinks,
                              PyObject *k_scale, PyObject *v_scale, PyObject *variant_args,
                              raddle_py_run_extras *extras);
/* None gives NULL. Borrowed from the object. */
int raddle_py_variant_from_object(PyObject *object, const raddle_attention_variant **out_variant);

int raddle_py_add_attention_functions(PyObject *module);
int raddle_py_add_attention_variant(PyObject *module);

#endif

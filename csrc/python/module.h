/* module.h - the C module raddle._core: what its files give to module.c, and how a status becomes an exception. */
#ifndef RADDLE_PYTHON_MODULE_H
#define RADDLE_PYTHON_MODULE_H

#include <Python.h>

#include "base/status.h"

/* Sets the exception of raddle.errors that belongs to status, with this thread's message and log; returns NULL. */
PyObject *raddle_raise(raddle_status status);

/* Each file of csrc/python that defines types or functions has one of these, called by module.c's exec slot. */
int raddle_py_add_tensor(PyObject *module);    /* py_tensor.c: Tensor, empty */
int raddle_py_add_attention(PyObject *module); /* py_attention.c */
int raddle_py_add_ops(PyObject *module);       /* py_ops.c */
int raddle_py_add_runtime(PyObject *module);   /* py_runtime.c: Workspace, Graph */
int raddle_py_add_system(PyObject *module);    /* py_system.c: doctor's facts, cache, warmup, counters */

#endif

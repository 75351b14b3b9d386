/* module.h - the C module raddle._core: what its files give to module.c, and how a status becomes
 * an exception. */
#ifndef RADDLE_PYTHON_MODULE_H
#define RADDLE_PYTHON_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "base/status.h"

/* CPython's slot and method tables hold functions as void * or as PyCFunction; ISO C only allows
 * that as an extension. */
#define RADDLE_SLOT(function) (__extension__(void *)(function))
#define RADDLE_FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

/* Sets the exception of raddle.errors that belongs to status, with this thread's message and log;
 * returns NULL. */
PyObject *raddle_raise(raddle_status status);

/* Each file of csrc/python that defines types or functions has one of these, called by module.c's
 * exec slot. */
int raddle_py_add_tensor(PyObject *module);    /* Tensor and what makes and inspects it */
int raddle_py_add_attention(PyObject *module); /* plans, merge_state, append */
int raddle_py_add_ops(PyObject *module);       /* what stands around attention, sampling */
int raddle_py_add_runtime(PyObject *module);   /* Workspace, Graph */
int raddle_py_add_transfer(PyObject *module);  /* Upload, Readback */
int raddle_py_add_stream(PyObject *module);    /* Stream */
int raddle_py_add_system(PyObject *module);    /* doctor's facts, cache, warmup, counters */
int raddle_py_add_measure(PyObject *module);   /* what the benchmarks measure by */
int raddle_py_add_capi(PyObject *module);      /* the function table for other extensions */
int raddle_py_add_blend(PyObject *module);     /* BlendRequests: offline scheduling */

/* Raises what the core noticed since the last call (cuda/notice.h) as RuntimeWarning: called when a
 * plan was made. -1 when a warning became an exception. */
int raddle_py_warn_notices(void);

#endif

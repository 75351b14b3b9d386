/* py_runtime.h - what the other bindings need of workspaces and graphs. */
#ifndef RADDLE_PYTHON_PY_RUNTIME_H
#define RADDLE_PYTHON_PY_RUNTIME_H

#include "python/module.h"

/* A reference, the caller's to destroy: that of a raddle.Workspace, or a new one over the memory of
 * a contiguous writable tensor, which stays alive with it. NULL with an exception set. */
raddle_workspace *raddle_py_workspace_from_object(PyObject *object);
/* Lets the graph that this thread captures, if any, keep object alive: what its launches read and
 * write. 0, or -1 with an exception set. */
int raddle_py_graph_keep(PyObject *object);

#endif

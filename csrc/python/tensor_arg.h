/* tensor_arg.h - how a Python object becomes a raddle_tensor, and a result becomes a Python object.
 *
 * Three doors, tried in this order and remembered per exact type: the DLPack C exchange table
 * (type(x).__dlpack_c_exchange_api__: borrowed, nanoseconds), exact numpy.ndarray through the NumPy
 * C API, x.__dlpack__(max_version=(1, 3), stream=-1) (an owned capsule, released by close; older
 * producers: legacy capsule). Functions here return 0, or -1 with a Python exception set, as
 * CPython does.
 */
#ifndef RADDLE_PYTHON_TENSOR_ARG_H
#define RADDLE_PYTHON_TENSOR_ARG_H

#include <Python.h>

#include "base/tensor.h"

enum { RADDLE_ARG_READ = 0, RADDLE_ARG_WRITE = 1, RADDLE_ARG_OPTIONAL = 2 };

typedef struct raddle_tensor_arg {
    raddle_tensor tensor;
    const raddle_tensor *view; /* &tensor, or NULL when the optional argument was None */
    PyObject *object;          /* borrowed */
    void *managed;             /* capsule content to release at close, or NULL */
    int managed_versioned;
    raddle_stream stream; /* the producer's current one, where it can say */
    int has_stream;
} raddle_tensor_arg;

/* name: as the user typed it, a string that outlives the call. dtype: how to read the bits (a
 * uint16 array as bfloat16, say), or RADDLE_DTYPE_NONE to take the producer's word. After -1
 * nothing is held. */
int raddle_tensor_arg_open(PyObject *object, const char *name, int access, raddle_dtype dtype,
                           raddle_tensor_arg *arg);
void raddle_tensor_arg_close(raddle_tensor_arg *arg); /* of an opened or zeroed one */

/* An owned reference to memory that outlives the call (bound workspaces, captured graphs, KV
 * caches). */
typedef struct raddle_tensor_hold {
    raddle_tensor tensor;
    PyObject *owner;
    raddle_stream stream; /* as in raddle_tensor_arg */
    int has_stream;
} raddle_tensor_hold;
int raddle_tensor_hold_open(PyObject *object, const char *name, int access, raddle_dtype dtype,
                            raddle_tensor_hold *hold);
void raddle_tensor_hold_close(raddle_tensor_hold *hold);

/* A new tensor of the same kind as like: torch in, torch out (its own allocator, by the exchange
 * table or torch.empty); ndarray in, ndarray out (bfloat16 as uint16); else a raddle.Tensor. like
 * NULL: a raddle.Tensor. */
PyObject *raddle_tensor_arg_new_like(PyObject *like, const int64_t *shape, int ndim,
                                     raddle_dtype dtype, raddle_device device);

/* The stream a call launches on: stream_object if not None (an int, or an object with .cuda_stream,
 * .ptr or __cuda_stream__), else the one that this thread captures a raddle.Graph on, else that of
 * the first argument with one, else the legacy default. */
int raddle_stream_from_args(PyObject *stream_object, const raddle_tensor_arg *args, int num_args,
                            raddle_stream *out_stream);

/* "bfloat16", torch.bfloat16, numpy.float32, numpy.dtype(..), or None for RADDLE_DTYPE_NONE. */
int raddle_dtype_from_object(PyObject *object, const char *name, raddle_dtype *out_dtype);
/* An int or a sequence of at most RADDLE_MAX_DIM ints; shape has room for as many. */
int raddle_shape_from_object(PyObject *object, const char *name, int64_t *shape, int *out_ndim);
/* "cpu", "cuda", "cuda:1", torch.device(..), (type, index). */
int raddle_device_from_object(PyObject *object, const char *name, raddle_device *out_device);

#endif

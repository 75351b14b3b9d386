/* py_measure.c - what the benchmarks measure by: the cost of a door, the reading of memory. */
#include "python/module.h"

#include "python/tensor_arg.h"
#include "measure/measure.h"

PyDoc_STRVAR(tensor_open_doc, "tensor_open(tensor, count, /)\n--\n\n"
                              "Open and close a tensor count times, as every call does once.");

static PyObject *tensor_open(PyObject *module, PyObject *args) {
    PyObject *object;
    Py_ssize_t count;
    (void)module;
    if (!PyArg_ParseTuple(args, "On:tensor_open", &object, &count)) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        raddle_tensor_arg arg = {0};
        if (raddle_tensor_arg_open(object, "tensor", RADDLE_ARG_READ, RADDLE_DTYPE_NONE, &arg) <
            0) {
            return NULL;
        }
        raddle_tensor_arg_close(&arg);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(memory_read_doc, "memory_read(tensor, /)\n--\n\n"
                              "Read a contiguous tensor once: on the CPU by all threads, on a GPU "
                              "queued on the current stream.");

static raddle_status read_memory(const raddle_tensor *tensor, raddle_stream stream) {
    RADDLE_REQUIRE(raddle_tensor_is_contiguous(tensor), RADDLE_ERR_SHAPE,
                   "tensor: expected contiguous memory; make a contiguous copy");
    RADDLE_TRY(raddle_tensor_check_aligned(tensor, 16));
    const size_t bytes = (size_t)raddle_tensor_count(tensor) * raddle_dtype_bytes(tensor->dtype);
    if (tensor->device.type == RADDLE_CUDA) {
        return raddle_measure_read(tensor->device.index, tensor->data, bytes, stream);
    }
    Py_BEGIN_ALLOW_THREADS;
    (void)raddle_measure_checksum(tensor->data, bytes);
    Py_END_ALLOW_THREADS;
    return RADDLE_OK;
}

static PyObject *memory_read(PyObject *module, PyObject *object) {
    (void)module;
    raddle_tensor_arg arg = {0};
    raddle_stream stream = NULL;
    if (raddle_tensor_arg_open(object, "tensor", RADDLE_ARG_READ, RADDLE_DTYPE_NONE, &arg) < 0) {
        return NULL;
    }
    if (raddle_stream_from_args(Py_None, &arg, 1, &stream) < 0) {
        raddle_tensor_arg_close(&arg);
        return NULL;
    }
    const raddle_status status = read_memory(&arg.tensor, stream);
    raddle_tensor_arg_close(&arg);
    return status == RADDLE_OK ? Py_NewRef(Py_None) : raddle_raise(status);
}

static PyMethodDef functions[] = {
    {"tensor_open", tensor_open, METH_VARARGS, tensor_open_doc},
    {"memory_read", memory_read, METH_O, memory_read_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_add_measure(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}

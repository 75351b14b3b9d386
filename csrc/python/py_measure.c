/* py_measure.c - what the benchmarks measure by: the cost of a door, the reading of memory. */
#include "python/module.h"

#include "python/tensor_arg.h"
#include "runtime/measure.h"

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

PyDoc_STRVAR(memory_checksum_doc, "memory_checksum(tensor, /)\n--\n\n"
                                  "Exclusive or of a contiguous CPU tensor's 64-bit words, read "
                                  "once by all threads.");

static PyObject *memory_checksum(PyObject *module, PyObject *object) {
    (void)module;
    raddle_tensor_arg arg = {0};
    if (raddle_tensor_arg_open(object, "tensor", RADDLE_ARG_READ, RADDLE_DTYPE_NONE, &arg) < 0) {
        return NULL;
    }
    const raddle_device cpu = {.type = RADDLE_CPU};
    raddle_status status = raddle_tensor_check_device(&arg.tensor, cpu);
    if (status == RADDLE_OK && !raddle_tensor_is_contiguous(&arg.tensor)) {
        status = raddle_fail(RADDLE_ERR_SHAPE, "tensor: expected contiguous memory");
    }
    if (status == RADDLE_OK && (uintptr_t)arg.tensor.data % sizeof(uint64_t) != 0) {
        status = raddle_fail(RADDLE_ERR_SHAPE, "tensor: expected memory aligned to 8 bytes");
    }
    uint64_t sum = 0;
    if (status == RADDLE_OK) {
        const size_t bytes =
            (size_t)raddle_tensor_count(&arg.tensor) * raddle_dtype_bytes(arg.tensor.dtype);
        Py_BEGIN_ALLOW_THREADS;
        sum = raddle_measure_checksum(arg.tensor.data, bytes);
        Py_END_ALLOW_THREADS;
    }
    raddle_tensor_arg_close(&arg);
    return status == RADDLE_OK ? PyLong_FromUnsignedLongLong(sum) : raddle_raise(status);
}

static PyMethodDef functions[] = {
    {"tensor_open", tensor_open, METH_VARARGS, tensor_open_doc},
    {"memory_checksum", memory_checksum, METH_O, memory_checksum_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_add_measure(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}

/* py_tensor_data.c - the elements of a raddle.Tensor: copies, single values, and NumPy's view of
 * them. */
#include "python/py_tensor.h"

#include <string.h>

#include "python/tensor_arg.h"
#include "runtime/transfer.h"

static raddle_py_tensor *cast(PyObject *self) {
    return (raddle_py_tensor *)self;
}

enum { GIL_WORTH_BYTES = 1 << 16 }; /* a copy of less is over before the lock is taken back */

PyObject *raddle_py_tensor_copy(PyObject *self, PyObject *const *args, Py_ssize_t num_args) {
    if (num_args < 1 || num_args > 2) {
        return PyErr_Format(PyExc_TypeError, "copy_() takes 1 or 2 arguments, got %zd", num_args);
    }
    raddle_tensor_arg src;
    raddle_stream stream = NULL;
    const raddle_tensor *dst = &cast(self)->tensor;
    if (raddle_tensor_arg_open(args[0], "src", RADDLE_ARG_READ, dst->dtype, &src) < 0) {
        return NULL;
    }
    raddle_status status = RADDLE_OK;
    const int known = raddle_stream_from_args(num_args > 1 ? args[1] : NULL, &src, 1, &stream);
    if (known == 0 && raddle_tensor_count(dst) * 8 > GIL_WORTH_BYTES) {
        Py_BEGIN_ALLOW_THREADS status = raddle_tensor_copy(dst, &src.tensor, stream);
        Py_END_ALLOW_THREADS
    } else if (known == 0) {
        status = raddle_tensor_copy(dst, &src.tensor, stream);
    }
    if (status != RADDLE_OK) {
        raddle_raise(status);
    }
    raddle_tensor_arg_close(&src);
    return known < 0 || status != RADDLE_OK ? NULL : Py_NewRef(self);
}

PyObject *raddle_py_tensor_zero(PyObject *self, PyObject *const *args, Py_ssize_t num_args) {
    raddle_stream stream = NULL;
    if (num_args > 1) {
        return PyErr_Format(PyExc_TypeError, "zero_() takes at most 1 argument, got %zd", num_args);
    }
    if (raddle_stream_from_args(num_args > 0 ? args[0] : NULL, NULL, 0, &stream) < 0) {
        return NULL;
    }
    const raddle_status status = raddle_tensor_zero(&cast(self)->tensor, stream);
    return status == RADDLE_OK ? Py_NewRef(self) : raddle_raise(status);
}

PyObject *raddle_py_tensor_to(PyObject *self, PyObject *const *args, Py_ssize_t num_args) {
    const raddle_tensor *src = &cast(self)->tensor;
    raddle_device device;
    raddle_stream stream = NULL;
    if (num_args < 1 || num_args > 2) {
        return PyErr_Format(PyExc_TypeError, "to() takes 1 or 2 arguments, got %zd", num_args);
    }
    if (raddle_device_from_object(args[0], "device", &device) < 0 ||
        raddle_stream_from_args(num_args > 1 ? args[1] : NULL, NULL, 0, &stream) < 0) {
        return NULL;
    }
    if (raddle_device_equal(device, src->device)) {
        return Py_NewRef(self);
    }
    PyObject *result = raddle_py_tensor_new(src->shape, src->ndim, src->dtype, device);
    if (!result) {
        return NULL;
    }
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS status = raddle_tensor_copy(&cast(result)->tensor, src, stream);
    Py_END_ALLOW_THREADS if (status != RADDLE_OK) {
        Py_DECREF(result);
        return raddle_raise(status);
    }
    return result;
}

/* Sign, exponent and mantissa of an 8-bit float: e4m3fn has bias 7, no infinities and NaN at all
 * ones; e5m2 is IEEE. */
static double decode_f8(uint8_t bits, bool e4m3) {
    const int mantissa_bits = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
    const int mantissa = bits & ((1 << mantissa_bits) - 1),
              exponent = (bits & 0x7F) >> mantissa_bits;
    const double sign = bits & 0x80 ? -1.0 : 1.0;
    double scale = 1.0;
    if (e4m3 ? (bits & 0x7F) == 0x7F : exponent == 31 && mantissa != 0) {
        return Py_NAN;
    }
    if (!e4m3 && exponent == 31) {
        return sign * Py_HUGE_VAL;
    }
    for (int i = exponent > 0 ? exponent : 1; i < bias + mantissa_bits; i++) {
        scale *= 0.5;
    }
    for (int i = bias + mantissa_bits; i < exponent; i++) {
        scale *= 2.0;
    }
    return sign * scale * (mantissa + (exponent > 0 ? 1 << mantissa_bits : 0));
}

static PyObject *decode_element(raddle_dtype dtype, const char *data) {
    union {
        int8_t i8;
        uint8_t u8;
        int16_t i16;
        uint16_t u16;
        int32_t i32;
        uint32_t u32;
        int64_t i64;
        uint64_t u64;
        float f32;
        double f64;
    } value = {0};
    memcpy(&value, data, raddle_dtype_bytes(dtype));
    switch (dtype) {
    case RADDLE_F32:
        return PyFloat_FromDouble((double)value.f32);
    case RADDLE_F64:
        return PyFloat_FromDouble(value.f64);
    case RADDLE_F16:
        return PyFloat_FromDouble(PyFloat_Unpack2(data, PY_LITTLE_ENDIAN));
    case RADDLE_BF16:
        value.u32 = (uint32_t)value.u16 << 16;
        return PyFloat_FromDouble((double)value.f32);
    case RADDLE_F8_E4M3:
    case RADDLE_F8_E5M2:
        return PyFloat_FromDouble(decode_f8(value.u8, dtype == RADDLE_F8_E4M3));
    case RADDLE_BOOL:
        return PyBool_FromLong(value.u8);
    case RADDLE_I8:
        return PyLong_FromLong(value.i8);
    case RADDLE_U8:
        return PyLong_FromLong(value.u8);
    case RADDLE_I16:
        return PyLong_FromLong(value.i16);
    case RADDLE_U16:
        return PyLong_FromLong(value.u16);
    case RADDLE_I32:
        return PyLong_FromLong(value.i32);
    case RADDLE_U32:
        return PyLong_FromUnsignedLong(value.u32);
    case RADDLE_I64:
        return PyLong_FromLongLong(value.i64);
    case RADDLE_U64:
        return PyLong_FromUnsignedLongLong(value.u64);
    default:
        return raddle_raise(raddle_fail(RADDLE_ERR_DTYPE, "tensor: unknown dtype"));
    }
}

PyObject *raddle_py_tensor_item(PyObject *self, PyObject *unused) {
    const raddle_tensor *tensor = &cast(self)->tensor;
    char text[16];
    (void)unused;
    if (raddle_tensor_count(tensor) != 1) {
        return raddle_raise(raddle_fail(RADDLE_ERR_SHAPE,
                                        "item: expected a tensor of one element, got %lld",
                                        (long long)raddle_tensor_count(tensor)));
    }
    if (tensor->device.type != RADDLE_CPU) {
        return raddle_raise(raddle_fail(RADDLE_ERR_DEVICE,
                                        "item: the tensor is on %s; use .to(\"cpu\") first",
                                        raddle_device_text(tensor->device, text)));
    }
    return decode_element(tensor->dtype, tensor->data);
}

/* ---------------------------------------------------------------- NumPy and the buffer protocol */

static const char *buffer_format(raddle_dtype dtype) {
    static const char *const formats[RADDLE_DTYPE_COUNT] = {
        [RADDLE_F32] = "f",     [RADDLE_F16] = "e", [RADDLE_BF16] = "H", [RADDLE_F8_E4M3] = "B",
        [RADDLE_F8_E5M2] = "B", [RADDLE_I8] = "b",  [RADDLE_U8] = "B",   [RADDLE_BOOL] = "?",
        [RADDLE_I16] = "h",     [RADDLE_U16] = "H", [RADDLE_I32] = "i",  [RADDLE_U32] = "I",
        [RADDLE_I64] = "q",     [RADDLE_U64] = "Q", [RADDLE_F64] = "d",
    };
    return formats[dtype];
}

static int refuse_buffer(Py_buffer *buffer, const char *reason) {
    buffer->obj = NULL;
    PyErr_SetString(PyExc_BufferError, reason);
    return -1;
}

static bool is_fortran_dense(const raddle_tensor *tensor) {
    int64_t expected = 1;
    for (int i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] != 1 && tensor->stride[i] != expected) {
            return false;
        }
        expected *= tensor->shape[i];
    }
    return true;
}

int raddle_py_tensor_get_buffer(PyObject *self, Py_buffer *buffer, int flags) {
    static char nothing[1];
    const raddle_tensor *tensor = &cast(self)->tensor;
    const bool dense = raddle_tensor_is_contiguous(tensor);
    const bool fortran =
        dense ? tensor->ndim <= 1 || is_fortran_dense(tensor) : is_fortran_dense(tensor);
    if (tensor->device.type != RADDLE_CPU) {
        return refuse_buffer(buffer, "the tensor is on a GPU; use .to(\"cpu\") first");
    }
    if ((flags & PyBUF_WRITABLE) && tensor->read_only) {
        return refuse_buffer(buffer, "the tensor is read-only");
    }
    const bool want_c = (flags & PyBUF_C_CONTIGUOUS) == PyBUF_C_CONTIGUOUS;
    const bool want_fortran = (flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS;
    const bool want_any = (flags & PyBUF_ANY_CONTIGUOUS) == PyBUF_ANY_CONTIGUOUS;
    const bool strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES;
    if ((want_c && !dense) || (want_fortran && !fortran) || (want_any && !dense && !fortran) ||
        (!strides && !dense)) {
        return refuse_buffer(buffer, "the tensor is not contiguous in the order asked for");
    }
    const Py_ssize_t item = (Py_ssize_t)raddle_dtype_bytes(tensor->dtype);
    Py_ssize_t *extents = PyMem_Malloc(sizeof(Py_ssize_t) * 2 * RADDLE_MAX_DIM);
    if (!extents) {
        buffer->obj = NULL;
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < tensor->ndim; i++) {
        extents[i] = (Py_ssize_t)tensor->shape[i];
        extents[RADDLE_MAX_DIM + i] = (Py_ssize_t)tensor->stride[i] * item;
    }
    *buffer = (Py_buffer){
        .buf = tensor->data ? tensor->data : nothing,
        .obj = Py_NewRef(self),
        .len = (Py_ssize_t)raddle_tensor_count(tensor) * item,
        .itemsize = item,
        .readonly = tensor->read_only,
        .ndim = tensor->ndim,
        .format = flags & PyBUF_FORMAT ? (char *)(uintptr_t)buffer_format(tensor->dtype) : NULL,
        .shape = flags & PyBUF_ND ? extents : NULL,
        .strides = strides ? extents + RADDLE_MAX_DIM : NULL,
        .internal = extents,
    };
    return 0;
}

void raddle_py_tensor_release_buffer(PyObject *self, Py_buffer *buffer) {
    (void)self;
    PyMem_Free(buffer->internal);
}

PyObject *raddle_py_tensor_numpy(PyObject *self, PyObject *unused) {
    const raddle_tensor *tensor = &cast(self)->tensor;
    char text[16];
    (void)unused;
    if (tensor->device.type != RADDLE_CPU) {
        return raddle_raise(raddle_fail(RADDLE_ERR_DEVICE,
                                        "numpy: the tensor is on %s; use .to(\"cpu\") first",
                                        raddle_device_text(tensor->device, text)));
    }
    PyObject *numpy = PyImport_ImportModule("numpy");
    PyObject *array = numpy ? PyObject_CallMethod(numpy, "asarray", "O", self) : NULL;
    Py_XDECREF(numpy);
    return array;
}

/* NumPy reads host tensors by the buffer protocol and comes here only when that refused; without
 * this it would try to build an array of objects out of len() and indexing. */
PyObject *raddle_py_tensor_array(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                 PyObject *names) {
    (void)args;
    (void)num_args;
    (void)names;
    return raddle_py_tensor_numpy(self, NULL);
}

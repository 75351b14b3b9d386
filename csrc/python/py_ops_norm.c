/* py_ops_norm.c - the one function behind every norm of python/raddle/ops.py. */
#include "python/py_ops.h"

#include "ops/ops.h"

/* What divides an 8-bit result: a number, or a tensor that holds one. Scalars of NumPy are numbers. */
static int open_scale(PyObject *object, float *out_scale, raddle_tensor_arg *arg) {
    *out_scale = 1.0f;
    if (object == Py_None) {
        return 0;
    }
    if (raddle_py_ops_is_tensor(object)) {
        return raddle_tensor_arg_open(object, "scale", RADDLE_ARG_READ, RADDLE_DTYPE_NONE, arg);
    }
    return raddle_py_ops_parse_float(object, "scale", out_scale);
}

PyDoc_STRVAR(norm_doc, "ops_norm(x, residual, weight, bias, eps, weight_offset, scale, out, dtype, "
                       "stream, /)\n--\n\nNorm over the last dimension.");

static PyObject *norm(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"x", "residual", "weight", "bias"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_WRITE | RADDLE_ARG_OPTIONAL,
                                 RADDLE_ARG_READ, RADDLE_ARG_READ | RADDLE_ARG_OPTIONAL};
    enum { X, RESIDUAL, WEIGHT, BIAS, OUT, SCALE, NUM };
    raddle_tensor_arg args[NUM] = {0};
    raddle_ops_norm_args norm_args;
    raddle_dtype bits;
    raddle_stream stream;
    PyObject *out = NULL;
    (void)module;
    if (raddle_py_ops_check_count("ops_norm", count, 10) < 0 ||
        raddle_py_ops_parse_float(objects[4], "eps", &norm_args.eps) < 0 ||
        raddle_py_ops_parse_float(objects[5], "weight_offset", &norm_args.weight_offset) < 0 ||
        raddle_dtype_from_object(objects[8], "dtype", &bits) < 0 ||
        raddle_py_ops_open(objects, names, access, 4, bits, args) < 0) {
        return NULL;
    }
    const raddle_tensor *x = args[X].view;
    if (open_scale(objects[6], &norm_args.scale, &args[SCALE]) < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    out = raddle_py_ops_result(objects[7], objects[7] == objects[0] ? "x" : "out", objects[0],
                               x->shape, x->ndim, x->dtype, x->device, &args[OUT]);
    if (!out || raddle_stream_from_args(objects[9], args, NUM, &stream) < 0) {
        return raddle_py_ops_abandon(out, args, NUM);
    }
    norm_args.x = x;
    norm_args.residual = args[RESIDUAL].view;
    norm_args.weight = args[WEIGHT].view;
    norm_args.bias = args[BIAS].view;
    norm_args.out = args[OUT].view;
    norm_args.scale_tensor = args[SCALE].view;
    PyThreadState *state = raddle_py_ops_begin_work(x->device, raddle_tensor_count(x));
    const raddle_status status = raddle_ops_norm(&norm_args, stream);
    raddle_py_ops_end_work(state);
    return raddle_py_ops_finish(status, out, args, NUM);
}

static PyMethodDef functions[] = {
    {"ops_norm", RADDLE_FASTCALL(norm), METH_FASTCALL, norm_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_ops_add_norm(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}

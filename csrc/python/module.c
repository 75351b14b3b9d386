/* module.c - the extension module raddle._core: multi-phase initialisation, one exec slot.
 *
 * Nothing happens at import but the creation of types: no library is opened, no thread started, no
 * framework imported. Sub-interpreters are refused where CPython lets a module say so: NumPy's C
 * API is per process, and so are the type cache of tensor_arg.c and the caches below it.
 */
#include "python/module.h"

static int exec_module(PyObject *module) {
    if (PyModule_AddStringConstant(module, "__version__", raddle_version()) < 0) {
        return -1;
    }
    if (raddle_py_add_tensor(module) < 0 || raddle_py_add_attention(module) < 0 ||
        raddle_py_add_ops(module) < 0 || raddle_py_add_runtime(module) < 0 ||
        raddle_py_add_transfer(module) < 0 || raddle_py_add_stream(module) < 0 ||
        raddle_py_add_system(module) < 0 || raddle_py_add_measure(module) < 0 ||
        raddle_py_add_capi(module) < 0 || raddle_py_add_blend(module) < 0) {
        return -1;
    }
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, RADDLE_SLOT(exec_module)},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "raddle._core",
    .m_doc = "The C core of raddle. Use the classes and functions of the raddle package instead.",
    .m_size = 0,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void);

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&module_definition);
}

/* tensor_door.h - which door a Python type has into raddle, found once and remembered per exact
 * type. */
#ifndef RADDLE_PYTHON_TENSOR_DOOR_H
#define RADDLE_PYTHON_TENSOR_DOOR_H

#include "python/module.h"
#include "third_party/dlpack/dlpack.h"

typedef enum raddle_door {
    RADDLE_DOOR_NONE = 0,
    RADDLE_DOOR_OWN,
    RADDLE_DOOR_NUMPY,
    RADDLE_DOOR_TABLE,
    RADDLE_DOOR_CAPSULE
} raddle_door;

typedef struct raddle_tensor_type {
    PyTypeObject *type;    /* owned, so that the address is not reused */
    PyObject *table_owner; /* owned: what __dlpack_c_exchange_api__ gave */
    const DLPackExchangeAPI *table;
    raddle_door door;
    bool legacy;   /* its __dlpack__ knows no max_version */
    bool is_torch; /* torch.Tensor or a subclass: never read-only, may need detach() */
    bool is_cupy;
} raddle_tensor_type;

/* The entry for object's type, by value: Python code that runs later may push it out of the cache.
 * Returns -1 with an exception that uses name when the object is no tensor. */
int raddle_find_door(PyObject *object, const char *name, raddle_tensor_type *out_entry);
/* "raddle", "numpy", "exchange table", "dlpack" or "dlpack legacy". */
const char *raddle_door_name(const raddle_tensor_type *entry);
/* Its __dlpack__ took no max_version. */
void raddle_door_is_legacy(const PyTypeObject *type);
/* New reference to an attribute of a module that is loaded already, or NULL without an exception.
 */
PyObject *raddle_loaded_attribute(const char *module_name, const char *attribute);
/* tensor_arg.c: 1, 0, or -1 with an exception when NumPy's C API cannot be used. */
int raddle_is_exact_ndarray(const PyTypeObject *type);
/* tensor_arg.c: a new ndarray; bfloat16 as uint16, fp8 as uint8. NumPy's API must be loaded: a door
 * was found. */
PyObject *raddle_new_ndarray(const int64_t *shape, int ndim, raddle_dtype dtype);

#endif

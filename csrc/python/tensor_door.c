/* tensor_door.c - finds the door of a type and remembers it. The cache is guarded by the GIL. */
#include "python/tensor_door.h"

#include <string.h>

#include "python/py_tensor.h"

enum { CACHE_SIZE = 64, CACHE_PROBES = 4 };
static raddle_tensor_type cache[CACHE_SIZE];
static unsigned next_victim;

static unsigned cache_home(const PyTypeObject *type) {
    return (unsigned)(((uintptr_t)type >> 4) * (uintptr_t)0x9E3779B97F4A7C15u >> 40) % CACHE_SIZE;
}

static raddle_tensor_type *cache_find(const PyTypeObject *type) {
    const unsigned home = cache_home(type);
    for (unsigned i = 0; i < CACHE_PROBES; i++) {
        raddle_tensor_type *entry = &cache[(home + i) % CACHE_SIZE];
        if (entry->type == type) {
            return entry;
        }
    }
    return NULL;
}

/* Takes over entry's references. The entry that it replaces is released last: that may run any
 * code. */
static void cache_store(const raddle_tensor_type *entry) {
    const unsigned home = cache_home(entry->type);
    raddle_tensor_type *slot = cache_find(entry->type);
    for (unsigned i = 0; slot == NULL && i < CACHE_PROBES; i++) {
        if (cache[(home + i) % CACHE_SIZE].type == NULL) {
            slot = &cache[(home + i) % CACHE_SIZE];
        }
    }
    if (slot == NULL) {
        slot = &cache[(home + next_victim++ % CACHE_PROBES) % CACHE_SIZE];
    }
    const raddle_tensor_type old = *slot;
    *slot = *entry;
    Py_XDECREF(old.type);
    Py_XDECREF(old.table_owner);
}

PyObject *raddle_loaded_attribute(const char *module_name, const char *attribute) {
    PyObject *result = NULL;
    PyObject *name = PyUnicode_FromString(module_name);
    PyObject *module = name ? PyImport_GetModule(name) : NULL;
    if (module) {
        result = PyObject_GetAttrString(module, attribute);
    }
    Py_XDECREF(module);
    Py_XDECREF(name);
    PyErr_Clear();
    return result;
}

static bool is_subtype_of(PyTypeObject *type, const char *module_name, const char *class_name) {
    PyObject *base = raddle_loaded_attribute(module_name, class_name);
    const bool result = base && PyType_Check(base) && PyType_IsSubtype(type, (PyTypeObject *)base);
    Py_XDECREF(base);
    return result;
}

static bool has_attribute(PyObject *object, const char *name) {
    PyObject *value = PyObject_GetAttrString(object, name);
    PyErr_Clear();
    Py_XDECREF(value);
    return value != NULL;
}

/* The first table of the chain whose layout we know. */
static const DLPackExchangeAPI *usable_table(const void *pointer) {
    const DLPackExchangeAPIHeader *header = pointer;
    while (header && header->version.major != DLPACK_MAJOR_VERSION) {
        header = header->prev_api;
    }
    const DLPackExchangeAPI *table = (const DLPackExchangeAPI *)(const void *)header;
    if (table && !table->dltensor_from_py_object_no_sync &&
        !table->managed_tensor_from_py_object_no_sync) {
        return NULL;
    }
    return table;
}

/* 1.3 publishes a capsule; 1.2 published an integer, and under the second name. */
static void find_table(PyTypeObject *type, raddle_tensor_type *entry) {
    static const char *const names[] = {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"};
    for (int i = 0; i < 2 && !entry->table; i++) {
        PyObject *value = PyObject_GetAttrString((PyObject *)type, names[i]);
        const void *pointer = NULL;
        if (value && PyCapsule_IsValid(value, "dlpack_exchange_api")) {
            pointer = PyCapsule_GetPointer(value, "dlpack_exchange_api");
        } else if (value && PyLong_CheckExact(value)) {
            pointer = PyLong_AsVoidPtr(value);
        }
        PyErr_Clear();
        entry->table = usable_table(pointer);
        if (entry->table) {
            entry->table_owner = value;
        } else {
            Py_XDECREF(value);
        }
    }
}

int raddle_find_door(PyObject *object, const char *name, raddle_tensor_type *out_entry) {
    PyTypeObject *type = Py_TYPE(object);
    const raddle_tensor_type *known = cache_find(type);
    if (known) {
        *out_entry = *known;
        return 0;
    }
    raddle_tensor_type entry = {.type = type};
    const int ndarray = raddle_is_exact_ndarray(type);
    if (ndarray < 0) {
        return -1;
    }
    if (type == raddle_py_tensor_type) {
        entry.door = RADDLE_DOOR_OWN;
    } else if (ndarray) {
        entry.door = RADDLE_DOOR_NUMPY;
    } else {
        entry.is_torch = is_subtype_of(type, "torch", "Tensor");
        entry.is_cupy = is_subtype_of(type, "cupy", "ndarray");
        find_table(type, &entry);
        if (entry.table) {
            entry.door = RADDLE_DOOR_TABLE;
        } else if (has_attribute((PyObject *)type, "__dlpack__")) {
            entry.door = RADDLE_DOOR_CAPSULE;
        }
    }
    if (entry.door == RADDLE_DOOR_NONE) {
        raddle_raise(raddle_fail(
            RADDLE_ERR_DTYPE,
            "%s: expected a tensor (torch, NumPy, raddle, or any object with __dlpack__), got %s",
            name, type->tp_name));
        return -1;
    }
    *out_entry = entry;
    Py_INCREF(type);
    cache_store(&entry);
    return 0;
}

void raddle_door_is_legacy(const PyTypeObject *type) {
    raddle_tensor_type *known = cache_find(type);
    if (known) {
        known->legacy = true;
    }
}

const char *raddle_door_name(const raddle_tensor_type *entry) {
    switch (entry->door) {
    case RADDLE_DOOR_OWN:
        return "raddle";
    case RADDLE_DOOR_NUMPY:
        return "numpy";
    case RADDLE_DOOR_TABLE:
        return "exchange table";
    case RADDLE_DOOR_CAPSULE:
        return entry->legacy ? "dlpack legacy" : "dlpack";
    case RADDLE_DOOR_NONE:
    default:
        return "none";
    }
}

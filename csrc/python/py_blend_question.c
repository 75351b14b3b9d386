/* py_blend_question.c - what a plan is asked for: a policy, a cost model, limits, lengths that were
 * seen.
 */
#include "python/py_blend.h"

#include <stddef.h>
#include <string.h>

#include "base/alloc.h"
#include "python/py_ops.h"

static int raise_if(raddle_status status) {
    if (status != RADDLE_OK) {
        raddle_raise(status);
        return -1;
    }
    return 0;
}

int raddle_py_blend_parse_int(PyObject *object, const char *name, int64_t least, int64_t most,
                              int64_t *out_value) {
    PyObject *index = PyIndex_Check(object) ? PyNumber_Index(object) : NULL;
    if (index == NULL) {
        PyErr_Clear();
        return raise_if(raddle_fail(RADDLE_ERR_DTYPE, "%s: expected an integer, got %.100s", name,
                                    Py_TYPE(object)->tp_name));
    }
    int overflow = 0;
    *out_value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow != 0 || *out_value < least || *out_value > most) {
        const long long shown = overflow < 0 ? INT64_MIN : overflow > 0 ? INT64_MAX : *out_value;
        return raise_if(raddle_fail(RADDLE_ERR_VALUE, "%s: expected %lld to %lld, got %lld", name,
                                    (long long)least, (long long)most, shown));
    }
    return 0;
}

typedef struct cost_field {
    const char *name;
    size_t offset;
} cost_field;

static const cost_field cost_fields[] = {
    {"flops_per_token", offsetof(raddle_blend_cost, flops_per_token)},
    {"flops_per_score", offsetof(raddle_blend_cost, flops_per_score)},
    {"kv_bytes_per_token", offsetof(raddle_blend_cost, kv_bytes_per_token)},
    {"weight_bytes", offsetof(raddle_blend_cost, weight_bytes)},
    {"attention_flops_rate", offsetof(raddle_blend_cost, attention_flops_rate)},
    {"read_rate", offsetof(raddle_blend_cost, read_rate)},
    {"overhead", offsetof(raddle_blend_cost, overhead)},
    {"alpha", offsetof(raddle_blend_cost, alpha)},
};

enum { NUM_COST_FIELDS = (int)(sizeof cost_fields / sizeof *cost_fields) };

static PyObject *cost_item(PyObject *dict, const char *name) {
    PyObject *item = PyDict_GetItemString(dict, name); /* borrowed */
    if (item == NULL) {
        raddle_raise(raddle_fail(RADDLE_ERR_VALUE, "cost model: %s: is missing", name));
    }
    return item;
}

/* At most RADDLE_BLEND_MAX_RATES numbers; how many there are, or -1. */
static int parse_rates(PyObject *dict, const char *name, double *numbers) {
    PyObject *item = cost_item(dict, name);
    PyObject *items = item != NULL ? PySequence_Tuple(item) : NULL;
    const Py_ssize_t count = items != NULL ? PyTuple_GET_SIZE(items) : 0;
    int result = (int)count;
    if (item != NULL && items == NULL) {
        PyErr_Clear();
        result =
            raise_if(raddle_fail(RADDLE_ERR_DTYPE, "%s: expected a sequence of numbers", name));
    } else if (count > RADDLE_BLEND_MAX_RATES) {
        result = raise_if(raddle_fail(RADDLE_ERR_VALUE,
                                      "cost model: %s: expected 1 to %d numbers, got %lld", name,
                                      RADDLE_BLEND_MAX_RATES, (long long)count));
    }
    for (int i = 0; i < result; i++) {
        if (raddle_py_ops_parse_double(PyTuple_GET_ITEM(items, i), name, &numbers[i]) < 0) {
            result = -1;
        }
    }
    Py_XDECREF(items);
    return item != NULL ? result : -1;
}

int raddle_py_blend_parse_cost(PyObject *dict, raddle_blend_cost *cost) {
    memset(cost, 0, sizeof *cost);
    if (!PyDict_Check(dict)) {
        return raise_if(raddle_fail(RADDLE_ERR_DTYPE, "cost model: expected a dict, got %.100s",
                                    Py_TYPE(dict)->tp_name));
    }
    for (int i = 0; i < NUM_COST_FIELDS; i++) {
        PyObject *item = cost_item(dict, cost_fields[i].name);
        double *field = (double *)((char *)cost + cost_fields[i].offset);
        if (item == NULL || raddle_py_ops_parse_double(item, cost_fields[i].name, field) < 0) {
            return -1;
        }
    }
    PyObject *is_in = cost_item(dict, "weights_in_gemms");
    if (is_in == NULL) {
        return -1;
    }
    if (!PyBool_Check(is_in)) {
        return raise_if(raddle_fail(RADDLE_ERR_DTYPE,
                                    "cost model: weights_in_gemms: expected True or False, got "
                                    "%.100s",
                                    Py_TYPE(is_in)->tp_name));
    }
    cost->weights_in_gemms = is_in == Py_True;
    const int rates = parse_rates(dict, "gemm_rate", cost->gemm_rate);
    const int tokens = rates < 0 ? -1 : parse_rates(dict, "rate_tokens", cost->rate_tokens);
    if (tokens < 0) {
        return -1;
    }
    if (tokens != rates) {
        return raise_if(raddle_fail(RADDLE_ERR_SHAPE,
                                    "cost model: rate_tokens: expected as many numbers as "
                                    "gemm_rate, %d, got %d",
                                    rates, tokens));
    }
    cost->num_rates = rates;
    return raise_if(raddle_blend_cost_check(cost));
}

/* A copy of what was seen. What a request says of itself counts as seen where nothing is given and
 * not all is known. */
int raddle_py_blend_parse_seen(const raddle_blend_store *store, bool has_unknown, PyObject *object,
                               int32_t **out_seen) {
    *out_seen = NULL;
    if (object == Py_None && !has_unknown) {
        return 0;
    }
    const size_t bytes = (size_t)store->num_requests * sizeof(int32_t);
    int32_t *seen = raddle_alloc(bytes);
    int result = seen != NULL ? 0 : raise_if(raddle_fail_memory(bytes));
    if (result == 0 && object == Py_None) {
        for (int64_t i = 0; i < store->num_requests; i++) {
            seen[i] = store->requests[i].output_tokens;
        }
    } else if (result == 0) {
        raddle_tensor_arg arg = {0};
        result = raddle_tensor_arg_open(object, "seen", RADDLE_ARG_READ, RADDLE_DTYPE_NONE, &arg);
        if (result == 0) {
            result = raise_if(raddle_py_blend_load_seen(&arg.tensor, store, seen));
            raddle_tensor_arg_close(&arg);
        }
    }
    if (result < 0) {
        raddle_free(seen);
        return -1;
    }
    *out_seen = seen;
    return 0;
}

int raddle_py_blend_parse_seed(PyObject *object, uint64_t *out_seed) {
    int64_t seed = 0;
    if (raddle_py_blend_parse_int(object, "seed", 0, INT64_MAX, &seed) < 0) {
        return -1;
    }
    *out_seed = (uint64_t)seed;
    return 0;
}

int raddle_py_blend_parse_question(const raddle_blend_store *store, bool has_unknown,
                                   PyObject *const *objects, raddle_py_blend_question *q) {
    int64_t step_tokens = 0;
    memset(q, 0, sizeof *q);
    const char *name = PyUnicode_Check(objects[0]) ? PyUnicode_AsUTF8(objects[0]) : NULL;
    if (name == NULL) {
        PyErr_Clear();
        return raise_if(raddle_fail(RADDLE_ERR_DTYPE, "policy: expected a name, got %.100s",
                                    Py_TYPE(objects[0])->tp_name));
    }
    if (raise_if(raddle_blend_policy_find(name, &q->policy)) < 0 ||
        raddle_py_blend_parse_cost(objects[1], &q->cost) < 0 ||
        raddle_py_blend_parse_int(objects[2], "pool_tokens", 1, INT64_MAX / 4,
                                  &q->limits.pool_tokens) < 0 ||
        raddle_py_blend_parse_int(objects[3], "step_tokens", 1, INT32_MAX, &step_tokens) < 0 ||
        raddle_py_blend_parse_seed(objects[4], &q->seed) < 0 ||
        raddle_py_blend_parse_seen(store, has_unknown, objects[5], &q->seen) < 0) {
        return -1;
    }
    q->limits.step_tokens = (int32_t)step_tokens;
    return 0;
}

void raddle_py_blend_close_question(raddle_py_blend_question *q) {
    raddle_free(q->seen);
    raddle_free(q->lengths);
}

raddle_status raddle_py_blend_make_plan(const raddle_py_blend_requests *requests,
                                        raddle_py_blend_question *q, raddle_blend_plan *out_plan) {
    const raddle_blend_store *store = &requests->store;
    if (q->seen != NULL) {
        const size_t bytes = (size_t)store->num_requests * sizeof *q->lengths;
        q->lengths = raddle_alloc(bytes);
        if (q->lengths == NULL) {
            return raddle_fail_memory(bytes);
        }
        RADDLE_TRY(raddle_blend_lengths_guess(store, &requests->trie, q->seen, NULL, q->lengths));
    }
    return raddle_blend_plan_make(store, &requests->trie, &q->cost, &q->limits, q->policy,
                                  q->lengths, q->seed, out_plan);
}

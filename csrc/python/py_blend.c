/* py_blend.c - raddle._core.BlendRequests: requests and the tree of their prefixes; what orders of
 * them cost.
 *
 * Everything here is positional: words, defaults and docstrings live in python/raddle/blend/. An
 * object never changes once it is made: threads may ask it at once.
 */
#include "python/py_blend.h"

#include <stddef.h>
#include <string.h>
#include <time.h>

#include "base/alloc.h"
#include "python/py_attention.h"
#include "python/py_ops.h"
#include "python/py_tensor.h"

enum { MOMENT_COLUMNS = 7 };

typedef raddle_py_blend_requests requests_object;

PyTypeObject *raddle_py_blend_requests_type;

const raddle_py_blend_requests *raddle_py_blend_requests_from(PyObject *object) {
    if (!PyObject_TypeCheck(object, raddle_py_blend_requests_type)) {
        raddle_raise(raddle_fail(RADDLE_ERR_DTYPE, "requests: expected BlendRequests, got %.100s",
                                 Py_TYPE(object)->tp_name));
        return NULL;
    }
    return (const raddle_py_blend_requests *)object;
}

static double monotonic_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ------------------------------------------------------------------ creation */

static raddle_status build(requests_object *self, const raddle_py_blend_arrays *arrays) {
    RADDLE_TRY(raddle_py_blend_load(arrays, &self->store));
    for (int64_t i = 0; i < self->store.num_requests; i++) {
        const raddle_blend_request *request = &self->store.requests[i];
        self->prompt_tokens += request->prompt_tokens;
        self->has_unknown = self->has_unknown || request->output_tokens == RADDLE_BLEND_UNKNOWN;
    }
    const double begin = monotonic_seconds();
    RADDLE_TRY(raddle_blend_trie_build(&self->store, &self->trie));
    self->build_seconds = monotonic_seconds() - begin;
    return RADDLE_OK;
}

static PyObject *requests_new(PyTypeObject *type, PyObject *arguments, PyObject *kwargs) {
    static char *keywords[] = {
        "block_size", "input_lengths", "output_lengths", "max_tokens", "sources",
        "weights",    "hash_ids",      "indptr",         "tokens",     NULL};
    enum { INPUTS, OUTPUTS, MAX_TOKENS, SOURCES, WEIGHTS, HASH_IDS, INDPTR, TOKENS, NUM };
    const char *const *names = (const char *const *)keywords + 1;
    static const int access[NUM] = {
        RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL,
        RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL,
    };
    PyObject *size, *objects[NUM];
    raddle_tensor_arg args[NUM];
    int64_t block_size = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, kwargs, "OOOOOOOOO:BlendRequests", keywords, &size,
                                     &objects[INPUTS], &objects[OUTPUTS], &objects[MAX_TOKENS],
                                     &objects[SOURCES], &objects[WEIGHTS], &objects[HASH_IDS],
                                     &objects[INDPTR], &objects[TOKENS]) ||
        raddle_py_blend_parse_int(size, "block_size", 1, INT32_MAX, &block_size) < 0 ||
        raddle_py_open_args(objects, names, access, NUM, args) < 0) {
        return NULL;
    }
    requests_object *self = (requests_object *)type->tp_alloc(type, 0);
    if (self != NULL) {
        const raddle_py_blend_arrays arrays = {
            .input_lengths = args[INPUTS].view,
            .output_lengths = args[OUTPUTS].view,
            .max_tokens = args[MAX_TOKENS].view,
            .sources = args[SOURCES].view,
            .weights = args[WEIGHTS].view,
            .hash_ids = args[HASH_IDS].view,
            .indptr = args[INDPTR].view,
            .tokens = args[TOKENS].view,
        };
        raddle_blend_store_init(&self->store, (int32_t)block_size);
        raddle_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = build(self, &arrays);
        Py_END_ALLOW_THREADS;
        if (status != RADDLE_OK) {
            raddle_raise(status);
            Py_CLEAR(self);
        }
    }
    raddle_py_close_args(args, NUM);
    return (PyObject *)self;
}

static void requests_dealloc(requests_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_blend_trie_fini(&self->trie);
    raddle_blend_store_fini(&self->store);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ------------------------------------------------------------------ what is asked */

static void *tensor_data(PyObject *object) {
    return ((raddle_py_tensor *)object)->tensor.data;
}

static PyObject *new_tensor(const int64_t *shape, int ndim, raddle_dtype dtype) {
    return raddle_py_tensor_new(shape, ndim, dtype, (raddle_device){RADDLE_CPU, 0});
}

/* An int32 Tensor [count]. */
static PyObject *int32_tensor(const int32_t *numbers, int64_t count) {
    PyObject *result = new_tensor(&count, 1, RADDLE_I32);
    if (result != NULL && count > 0) {
        memcpy(tensor_data(result), numbers, (size_t)count * sizeof *numbers);
    }
    return result;
}

PyDoc_STRVAR(output_lengths_doc, "output_lengths()\n--\n\nint32 [num_requests], -1: unknown.");

static PyObject *output_lengths(requests_object *self, PyObject *unused) {
    (void)unused;
    PyObject *result = new_tensor(&self->store.num_requests, 1, RADDLE_I32);
    for (int64_t i = 0; result != NULL && i < self->store.num_requests; i++) {
        ((int32_t *)tensor_data(result))[i] = self->store.requests[i].output_tokens;
    }
    return result;
}

PyDoc_STRVAR(sample_doc, "sample(rate, quota, seed, /)\n--\n\n"
                         "int32 [..]: requests to run first, ascending; of each source the share "
                         "rate or quota requests, whichever is more.");

static PyObject *sample(requests_object *self, PyObject *const *objects, Py_ssize_t count) {
    double rate = 0;
    int64_t quota = 0, found = 0;
    uint64_t seed = 0;
    if (raddle_py_check_count("sample", count, 3) < 0 ||
        raddle_py_ops_parse_double(objects[0], "sample_rate", &rate) < 0 ||
        raddle_py_blend_parse_int(objects[1], "quota", 0, INT32_MAX, &quota) < 0 ||
        raddle_py_blend_parse_seed(objects[2], &seed) < 0) {
        return NULL;
    }
    const size_t bytes = (size_t)self->store.num_requests * sizeof(int32_t);
    int32_t *requests = raddle_alloc(bytes);
    if (requests == NULL) {
        return raddle_raise(raddle_fail_memory(bytes));
    }
    const raddle_status status =
        raddle_blend_lengths_sample(&self->store, rate, (int32_t)quota, seed, requests, &found);
    PyObject *result = status == RADDLE_OK ? int32_tensor(requests, found) : raddle_raise(status);
    raddle_free(requests);
    return result;
}

/* Streams side by side, each as far on in what its requests cost as the others: as they would be
 * admitted if all fitted at once. */
static void merge_streams(const requests_object *self, const raddle_py_blend_question *q,
                          const raddle_blend_plan *plan, double *seconds, int32_t *out_order) {
    double all[RADDLE_BLEND_MAX_STREAMS] = {0}, done[RADDLE_BLEND_MAX_STREAMS] = {0};
    int32_t next[RADDLE_BLEND_MAX_STREAMS] = {0};
    for (int32_t s = 0, k = 0; s < plan->num_streams; s++) {
        next[s] = k;
        for (; k < plan->stream_end[s]; k++) {
            const raddle_blend_work work =
                raddle_blend_expected_work(&self->store, q->lengths, plan->order[k], 0);
            seconds[k] = raddle_blend_plain_seconds(&q->cost, &work, NULL);
            all[s] += seconds[k];
        }
    }
    for (int64_t i = 0; i < self->store.num_requests; i++) {
        int32_t least = -1;
        for (int32_t s = 0; s < plan->num_streams; s++) {
            if (next[s] < plan->stream_end[s] &&
                (least < 0 || done[s] * all[least] < done[least] * all[s])) {
                least = s;
            }
        }
        const int32_t k = next[least]++;
        out_order[i] = plan->order[k];
        done[least] += seconds[k];
    }
}

static raddle_status make_order(const requests_object *self, raddle_py_blend_question *q,
                                bool is_merged, int32_t *out_order) {
    raddle_blend_plan plan = {0};
    RADDLE_TRY(raddle_py_blend_make_plan(self, q, &plan));
    const size_t requests = (size_t)self->store.num_requests;
    double *seconds = is_merged ? raddle_alloc(requests * sizeof *seconds) : NULL;
    raddle_status status = RADDLE_OK;
    if (!is_merged) {
        memcpy(out_order, plan.order, requests * sizeof *out_order);
    } else if (seconds != NULL) {
        merge_streams(self, q, &plan, seconds, out_order);
    } else {
        status = raddle_fail_memory(requests * sizeof *seconds);
    }
    raddle_free(seconds);
    raddle_blend_plan_fini(&plan);
    return status;
}

PyDoc_STRVAR(order_doc,
             "order(policy, cost, pool_tokens, step_tokens, seed, seen, merged, /)\n--\n\n"
             "int32 [num_requests]: the plan's streams, side by side or one by one.");

static PyObject *order(requests_object *self, PyObject *const *objects, Py_ssize_t count) {
    raddle_py_blend_question q;
    if (raddle_py_check_count("order", count, 7) < 0) {
        return NULL;
    }
    const int is_merged = PyObject_IsTrue(objects[6]);
    if (is_merged < 0 ||
        raddle_py_blend_parse_question(&self->store, self->has_unknown, objects, &q) < 0) {
        return NULL;
    }
    PyObject *result = new_tensor(&self->store.num_requests, 1, RADDLE_I32);
    if (result != NULL) {
        int32_t *numbers = tensor_data(result);
        raddle_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = make_order(self, &q, is_merged != 0, numbers);
        Py_END_ALLOW_THREADS;
        if (status != RADDLE_OK) {
            raddle_raise(status);
            Py_CLEAR(result);
        }
    }
    raddle_py_blend_close_question(&q);
    return result;
}

/* float64 [stretches, 7], a row as raddle_blend_moment has it. */
static PyObject *timeline_tensor(const raddle_blend_timeline *line) {
    PyObject *result = new_tensor((const int64_t[]){line->count, MOMENT_COLUMNS}, 2, RADDLE_F64);
    for (int32_t i = 0; result != NULL && i < line->count; i++) {
        const raddle_blend_moment *m = &line->moments[i];
        const double row[MOMENT_COLUMNS] = {m->seconds,
                                            m->compute,
                                            m->read,
                                            m->held,
                                            (double)m->steps,
                                            (double)m->prompt_tokens,
                                            (double)m->hit_tokens};
        memcpy((double *)tensor_data(result) + (size_t)i * MOMENT_COLUMNS, row, sizeof row);
    }
    return result;
}

static PyObject *result_dict(const raddle_blend_result *r, const raddle_blend_timeline *line,
                             double planning_seconds) {
    PyObject *timeline = timeline_tensor(line);
    if (timeline == NULL) {
        return NULL;
    }
    return Py_BuildValue("{s:d,s:d,s:d,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:N}", "seconds", r->seconds,
                         "bound_seconds", r->bound_seconds, "planning_seconds", planning_seconds,
                         "steps", (long long)r->steps, "preemptions", (long long)r->preemptions,
                         "prompt_tokens", (long long)r->prompt_tokens, "output_tokens",
                         (long long)r->output_tokens, "hit_tokens", (long long)r->hit_tokens,
                         "computed_tokens", (long long)r->computed_tokens, "recomputed_tokens",
                         (long long)r->recomputed_tokens, "peak_tokens", (long long)r->peak_tokens,
                         "timeline", timeline);
}

PyDoc_STRVAR(simulate_doc, "simulate(policy, cost, pool_tokens, step_tokens, seed, seen, /)\n--\n\n"
                           "What a run takes: a dict of numbers, and \"timeline\".");

static PyObject *simulate(requests_object *self, PyObject *const *objects, Py_ssize_t count) {
    raddle_py_blend_question q;
    raddle_blend_plan plan = {0};
    raddle_blend_result result = {0};
    double seconds = 0;
    if (raddle_py_check_count("simulate", count, 6) < 0 ||
        raddle_py_blend_parse_question(&self->store, self->has_unknown, objects, &q) < 0) {
        return NULL;
    }
    raddle_blend_timeline *line = raddle_alloc(sizeof *line);
    raddle_status status = line != NULL ? RADDLE_OK : raddle_fail_memory(sizeof *line);
    Py_BEGIN_ALLOW_THREADS;
    if (status == RADDLE_OK) {
        const double begin = monotonic_seconds();
        status = raddle_py_blend_make_plan(self, &q, &plan);
        seconds = monotonic_seconds() - begin;
    }
    if (status == RADDLE_OK) {
        status = raddle_blend_simulate(&self->store, &self->trie, &q.cost, &q.limits, &plan,
                                       q.lengths, &result, line);
        raddle_blend_plan_fini(&plan);
    }
    Py_END_ALLOW_THREADS;
    PyObject *dict =
        status == RADDLE_OK ? result_dict(&result, line, seconds) : raddle_raise(status);
    raddle_free(line);
    raddle_py_blend_close_question(&q);
    return dict;
}

/* ------------------------------------------------------------------ the type */

static PyObject *get_int64(PyObject *self, void *closure) {
    return PyLong_FromLongLong(*(const int64_t *)((const char *)self + (size_t)closure));
}

static PyObject *get_int32(PyObject *self, void *closure) {
    return PyLong_FromLong(*(const int32_t *)((const char *)self + (size_t)closure));
}

static PyObject *get_build_seconds(requests_object *self, void *closure) {
    (void)closure;
    return PyFloat_FromDouble(self->build_seconds);
}

static PyObject *get_has_unknown(requests_object *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(self->has_unknown);
}

static PyMethodDef requests_methods[] = {
    {"output_lengths", (PyCFunction)(void (*)(void))output_lengths, METH_NOARGS,
     output_lengths_doc},
    {"sample", RADDLE_FASTCALL(sample), METH_FASTCALL, sample_doc},
    {"order", RADDLE_FASTCALL(order), METH_FASTCALL, order_doc},
    {"simulate", RADDLE_FASTCALL(simulate), METH_FASTCALL, simulate_doc},
    {NULL, NULL, 0, NULL},
};

#define AT(field) (void *)offsetof(requests_object, field)

static PyGetSetDef requests_getset[] = {
    {"block_size", get_int32, NULL, "Tokens of a block.", AT(store.block_size)},
    {"num_requests", get_int64, NULL, "Requests.", AT(store.num_requests)},
    {"num_sources", get_int32, NULL, "The largest source and 1.", AT(store.num_groups)},
    {"num_blocks", get_int64, NULL, "Blocks of all prompts.", AT(store.num_blocks)},
    {"distinct_blocks", get_int64, NULL, "Those, shared ones once.", AT(trie.distinct_blocks)},
    {"num_nodes", get_int32, NULL, "Nodes of the tree.", AT(trie.num_nodes)},
    {"prompt_tokens", get_int64, NULL, "Tokens of all prompts.", AT(prompt_tokens)},
    {"has_unknown", (getter)get_has_unknown, NULL, "Whether outputs are unknown.", NULL},
    {"build_seconds", (getter)get_build_seconds, NULL, "That the tree took.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(requests_doc, "Requests and the tree of their prefixes.");

static PyType_Slot requests_slots[] = {
    {Py_tp_new, RADDLE_SLOT(requests_new)}, {Py_tp_dealloc, RADDLE_SLOT(requests_dealloc)},
    {Py_tp_methods, requests_methods},      {Py_tp_getset, requests_getset},
    {Py_tp_doc, (void *)requests_doc},      {0, NULL},
};

static PyType_Spec requests_spec = {
    .name = "raddle._core.BlendRequests",
    .basicsize = sizeof(requests_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = requests_slots,
};

static PyObject *policy_names(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *names = PyTuple_New(RADDLE_BLEND_NUM_POLICIES);
    for (int i = 0; names != NULL && i < RADDLE_BLEND_NUM_POLICIES; i++) {
        PyObject *name = PyUnicode_FromString(raddle_blend_policy_name((raddle_blend_policy)i));
        if (name == NULL) {
            Py_CLEAR(names);
            break;
        }
        PyTuple_SET_ITEM(names, i, name);
    }
    return names;
}

PyDoc_STRVAR(check_cost_doc, "blend_check_cost(cost, /)\n--\n\nRaises what is wrong with it.");

static PyObject *check_cost(PyObject *module, PyObject *object) {
    raddle_blend_cost cost;
    (void)module;
    return raddle_py_blend_parse_cost(object, &cost) < 0 ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(step_seconds_doc,
             "blend_step_seconds(cost, tokens, scores, reads, /)\n--\n\n"
             "(seconds of a step, of its computing alone, of its reading alone).");

static PyObject *step_seconds(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"tokens", "scores", "reads"};
    double work[3];
    raddle_blend_cost cost;
    (void)module;
    if (raddle_py_check_count("blend_step_seconds", count, 4) < 0 ||
        raddle_py_blend_parse_cost(objects[0], &cost) < 0) {
        return NULL;
    }
    for (int i = 0; i < 3; i++) {
        if (raddle_py_ops_parse_double(objects[i + 1], names[i], &work[i]) < 0) {
            return NULL;
        }
        if (!(work[i] >= 0)) {
            return raddle_raise(
                raddle_fail(RADDLE_ERR_VALUE, "%s: expected 0 or more, got %g", names[i], work[i]));
        }
    }
    const raddle_blend_work step = {.tokens = work[0], .scores = work[1], .reads = work[2]};
    return Py_BuildValue("(ddd)", raddle_blend_step_seconds(&cost, &step),
                         raddle_blend_compute_seconds(&cost, &step),
                         raddle_blend_read_seconds(&cost, &step));
}

static PyMethodDef functions[] = {
    {"blend_check_cost", check_cost, METH_O, check_cost_doc},
    {"blend_step_seconds", RADDLE_FASTCALL(step_seconds), METH_FASTCALL, step_seconds_doc},
    {"blend_policy_names", policy_names, METH_NOARGS,
     "blend_policy_names()\n--\n\nThe orders that there are."},
    {NULL, NULL, 0, NULL},
};

int raddle_py_add_blend(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &requests_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    Py_XSETREF(raddle_py_blend_requests_type, (PyTypeObject *)type);
    return PyModule_AddObjectRef(module, "BlendRequests", type) < 0 ||
                   PyModule_AddFunctions(module, functions) < 0 ||
                   raddle_py_blend_add_guess(module) < 0 ||
                   raddle_py_blend_add_partition(module) < 0
               ? -1
               : raddle_py_blend_add_scheduler(module);
}

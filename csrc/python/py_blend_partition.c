/* py_blend_partition.c - raddle._core.blend_partition: requests for several replicas. */
#include "python/py_blend.h"

#include "base/alloc.h"
#include "python/py_attention.h"
#include "python/py_tensor.h"

/* What is thought of outputs follows from seen; NULL: all are known. */
static raddle_status partition(const raddle_py_blend_requests *requests,
                               const raddle_blend_cost *cost, const int32_t *seen,
                               int32_t num_replicas, double tail, int32_t *out_replicas,
                               raddle_blend_shares *out_shares) {
    const size_t bytes = (size_t)requests->store.num_requests * sizeof(raddle_blend_length);
    raddle_blend_length *lengths = NULL;
    raddle_status status = RADDLE_OK;
    if (seen != NULL) {
        lengths = raddle_alloc(bytes);
        status = lengths == NULL ? raddle_fail_memory(bytes)
                                 : raddle_blend_lengths_guess(&requests->store, &requests->trie,
                                                              seen, NULL, lengths);
    }
    if (status == RADDLE_OK) {
        status = raddle_blend_partition(&requests->store, &requests->trie, cost, lengths,
                                        num_replicas, tail, out_replicas, out_shares);
    }
    raddle_free(lengths);
    return status;
}

PyDoc_STRVAR(partition_doc,
             "blend_partition(requests, cost, replicas, tail, seen, /)\n--\n\n"
             "(int32 [num_requests]: a replica each, or `replicas`: anyone's; a dict of numbers).");

static PyObject *blend_partition(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    raddle_blend_cost cost;
    raddle_blend_shares shares = {0};
    int64_t num_replicas = 0;
    int32_t *seen = NULL;
    raddle_status status;
    (void)module;
    if (raddle_py_check_count("blend_partition", count, 5) < 0) {
        return NULL;
    }
    const raddle_py_blend_requests *requests = raddle_py_blend_requests_from(objects[0]);
    if (requests == NULL) {
        return NULL;
    }
    const double tail = PyFloat_AsDouble(objects[3]);
    if ((tail == -1 && PyErr_Occurred()) || raddle_py_blend_parse_cost(objects[1], &cost) < 0 ||
        raddle_py_blend_parse_int(objects[2], "replicas", 1, RADDLE_BLEND_MAX_REPLICAS,
                                  &num_replicas) < 0) {
        return NULL;
    }
    PyObject *result = raddle_py_tensor_new(&requests->store.num_requests, 1, RADDLE_I32,
                                            (raddle_device){RADDLE_CPU, 0});
    if (result == NULL || raddle_py_blend_parse_seen(&requests->store, requests->has_unknown,
                                                     objects[4], &seen) < 0) {
        Py_XDECREF(result);
        return NULL;
    }
    int32_t *replicas = ((raddle_py_tensor *)result)->tensor.data;
    Py_BEGIN_ALLOW_THREADS;
    status = partition(requests, &cost, seen, (int32_t)num_replicas, tail, replicas, &shares);
    Py_END_ALLOW_THREADS;
    raddle_free(seen);
    if (status != RADDLE_OK) {
        Py_DECREF(result);
        return raddle_raise(status);
    }
    return Py_BuildValue("N{s:d,s:d,s:d,s:i}", result, "busiest", shares.busiest, "tokens",
                         shares.tokens, "tokens_again", shares.tokens_again, "num_runs",
                         (int)shares.num_runs);
}

static PyMethodDef functions[] = {
    {"blend_partition", RADDLE_FASTCALL(blend_partition), METH_FASTCALL, partition_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_blend_add_partition(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}

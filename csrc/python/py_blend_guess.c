/* py_blend_guess.c - what is thought of outputs while a job runs. */
#include "python/py_blend.h"

#include <math.h>

#include "base/alloc.h"
#include "python/py_attention.h"
#include "python/py_tensor.h"
#include "python/tensor_arg.h"

/* Tokens that requests which were not seen to end have given, fewer than max_tokens. */
static raddle_status load_so_far(const raddle_tensor *given, const raddle_blend_store *store,
                                 const int32_t *seen, int32_t *out_so_far) {
    RADDLE_TRY(raddle_tensor_check_device(given, (raddle_device){RADDLE_CPU, 0}));
    RADDLE_TRY(raddle_tensor_check_index_dtype(given));
    RADDLE_TRY(raddle_tensor_check_shape(given, 1, (const int64_t[]){store->num_requests}));
    for (int64_t i = 0; i < store->num_requests; i++) {
        const int64_t count = raddle_tensor_index_at(given, i);
        const int32_t most = store->requests[i].max_tokens;
        RADDLE_REQUIRE(count >= 0 && (count < most || seen[i] >= 0), RADDLE_ERR_VALUE,
                       "so_far: expected 0 or more, fewer than max_tokens (%d); got %lld "
                       "(request %lld)",
                       (int)most, (long long)count, (long long)i);
        out_so_far[i] = seen[i] >= 0 ? 0 : (int32_t)count;
    }
    return RADDLE_OK;
}

/* Means, to a token: what was seen, else more than was given, max_tokens at the most. */
static raddle_status guess(const raddle_py_blend_requests *requests, const int32_t *seen,
                           const raddle_tensor *given, int32_t *out_lengths) {
    const raddle_blend_store *store = &requests->store;
    const size_t count = (size_t)store->num_requests;
    int32_t *so_far = raddle_alloc(count * sizeof *so_far);
    raddle_blend_length *lengths = raddle_alloc(count * sizeof *lengths);
    raddle_status status = so_far == NULL || lengths == NULL
                               ? raddle_fail_memory(count * sizeof *lengths)
                               : load_so_far(given, store, seen, so_far);
    if (status == RADDLE_OK) {
        status = raddle_blend_lengths_guess(store, &requests->trie, seen, so_far, lengths);
    }
    for (size_t i = 0; status == RADDLE_OK && i < count; i++) {
        const double mean = fmax(round(lengths[i].mean), so_far[i] + 1);
        out_lengths[i] = (int32_t)fmin(mean, store->requests[i].max_tokens);
    }
    raddle_free(so_far);
    raddle_free(lengths);
    return status;
}

PyDoc_STRVAR(guess_doc, "blend_guess(requests, seen, so_far, /)\n--\n\n"
                        "int32 [num_requests]: what is thought of outputs.");

static PyObject *blend_guess(PyObject *module, PyObject *const *objects, Py_ssize_t count) {
    int32_t *seen = NULL;
    raddle_tensor_arg so_far = {0};
    (void)module;
    if (raddle_py_check_count("blend_guess", count, 3) < 0) {
        return NULL;
    }
    const raddle_py_blend_requests *requests = raddle_py_blend_requests_from(objects[0]);
    if (requests == NULL) {
        return NULL;
    }
    if (raddle_py_blend_parse_seen(&requests->store, true, objects[1], &seen) < 0) {
        return NULL;
    }
    PyObject *result = NULL;
    if (raddle_tensor_arg_open(objects[2], "so_far", RADDLE_ARG_READ, RADDLE_DTYPE_NONE, &so_far) ==
        0) {
        result = raddle_py_tensor_new(&requests->store.num_requests, 1, RADDLE_I32,
                                      (raddle_device){RADDLE_CPU, 0});
    }
    if (result != NULL) {
        raddle_status status;
        int32_t *lengths = ((raddle_py_tensor *)result)->tensor.data;
        Py_BEGIN_ALLOW_THREADS;
        status = guess(requests, seen, &so_far.tensor, lengths);
        Py_END_ALLOW_THREADS;
        if (status != RADDLE_OK) {
            raddle_raise(status);
            Py_CLEAR(result);
        }
    }
    raddle_tensor_arg_close(&so_far);
    raddle_free(seen);
    return result;
}

static PyMethodDef functions[] = {
    {"blend_guess", RADDLE_FASTCALL(blend_guess), METH_FASTCALL, guess_doc},
    {NULL, NULL, 0, NULL},
};

int raddle_py_blend_add_guess(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}

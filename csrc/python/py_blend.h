/* py_blend.h - what the files that bind the blend family share. */
#ifndef RADDLE_PYTHON_PY_BLEND_H
#define RADDLE_PYTHON_PY_BLEND_H

#include "python/module.h"

#include "base/tensor.h"
#include "blend/blend.h"

/* Requests as arrays on the host; an optional one is NULL. [num_requests] are input_lengths,
 * output_lengths (-1: unknown), max_tokens, sources and weights. hash_ids or tokens are those of all
 * requests, one after the other, with indptr [num_requests + 1]. With tokens there are no
 * input_lengths: indptr has them. */
typedef struct raddle_py_blend_arrays {
    const raddle_tensor *input_lengths, *output_lengths, *max_tokens, *sources, *weights;
    const raddle_tensor *hash_ids, *indptr, *tokens;
} raddle_py_blend_arrays;

/* raddle._core.BlendRequests. Never changes once it is made. */
typedef struct raddle_py_blend_requests {
    PyObject_HEAD raddle_blend_store store;
    raddle_blend_trie trie;
    int64_t prompt_tokens;
    bool has_unknown;     /* outputs */
    double build_seconds; /* that the tree took */
} raddle_py_blend_requests;

extern PyTypeObject *raddle_py_blend_requests_type; /* set by the module's exec slot */
/* Borrowed; NULL with an exception set where object is something else. */
const raddle_py_blend_requests *raddle_py_blend_requests_from(PyObject *object);

/* py_blend_load.c. Appends them all. The arrays may change meanwhile: what is read is checked where
 * it is read. No Python: the caller need not hold the GIL. */
raddle_status raddle_py_blend_load(const raddle_py_blend_arrays *arrays, raddle_blend_store *store);
/* lengths [num_requests], int32 or int64: -1, or 1 to the request's max_tokens. */
raddle_status raddle_py_blend_load_seen(const raddle_tensor *lengths,
                                        const raddle_blend_store *store, int32_t *out_seen);

/* What a plan is asked for. */
typedef struct raddle_py_blend_question {
    raddle_blend_policy policy;
    raddle_blend_cost cost;
    raddle_blend_limits limits;
    uint64_t seed;
    int32_t *seen;                /* [num_requests], or NULL: all lengths are known */
    raddle_blend_length *lengths; /* what follows from seen, or NULL */
} raddle_py_blend_question;

/* py_blend_question.c. These return 0, or -1 with a Python exception set. objects: policy, cost,
 * pool_tokens, step_tokens, seed, seen (None: what requests say of themselves). */
int raddle_py_blend_parse_question(const raddle_blend_store *store, bool has_unknown,
                                   PyObject *const *objects, raddle_py_blend_question *q);
void raddle_py_blend_close_question(raddle_py_blend_question *q); /* of one that was parsed */
/* Guesses lengths where not all were seen, and plans. No Python: the caller need not hold the GIL. */
raddle_status raddle_py_blend_make_plan(const raddle_py_blend_requests *requests,
                                        raddle_py_blend_question *q, raddle_blend_plan *out_plan);
/* The fields of raddle_blend_cost; gemm_rate and rate_tokens are sequences of as many numbers. */
int raddle_py_blend_parse_cost(PyObject *dict, raddle_blend_cost *cost);
int raddle_py_blend_parse_int(PyObject *object, const char *name, int64_t least, int64_t most,
                              int64_t *out_value);
int raddle_py_blend_parse_seed(PyObject *object, uint64_t *out_seed);

/* int32 [num_requests], raddle_free it; NULL: None was given, and requests know all their outputs. */
int raddle_py_blend_parse_seen(const raddle_blend_store *store, bool has_unknown, PyObject *object,
                               int32_t **out_seen);

/* py_blend_partition.c, py_blend_guess.c: functions; py_blend_scheduler.c: the type BlendScheduler. */
int raddle_py_blend_add_guess(PyObject *module);
int raddle_py_blend_add_partition(PyObject *module);
int raddle_py_blend_add_scheduler(PyObject *module);

#endif

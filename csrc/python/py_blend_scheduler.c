/* py_blend_scheduler.c - raddle._core.BlendScheduler: what each step of an engine does, of requests
 * whose last tokens the engine tells of.
 *
 * Owns the plan, the lengths and the scheduler, and keeps the requests alive. One thread at a time:
 * a second one is told so. What a step holds is copied; when there is no memory for the copies the
 * step stays, and the next call of step() gives it.
 */
#include "python/py_blend.h"

#include <string.h>

#include "base/alloc.h"
#include "python/py_attention.h"
#include "python/py_tensor.h"

typedef enum step_state {
    BETWEEN, /* steps */
    BEGUN,   /* a step, of which the caller does not know yet */
    GIVEN,   /* to the caller, who has not ended it */
} step_state;

typedef struct scheduler_object {
    PyObject_HEAD raddle_py_blend_requests *requests;
    raddle_py_blend_question question;
    raddle_blend_plan plan;
    raddle_blend_scheduler *scheduler;
    raddle_blend_step step;     /* borrowed from the scheduler, until the next one */
    raddle_blend_counts counts; /* after the last call: read without the busy flag, under the GIL */
    uint8_t *is_begun;          /* [num_requests] had a chunk, and did not step back since */
    step_state state;
    bool is_dead; /* memory ran out halfway */
    int busy;     /* accessed atomically */
} scheduler_object;

/* ------------------------------------------------------------------ one thread at a time */

/* function: of Python, for messages. */
static raddle_status enter(scheduler_object *self, const char *function) {
    int expected = 0;
    RADDLE_REQUIRE(__atomic_compare_exchange_n(&self->busy, &expected, 1, false, __ATOMIC_ACQUIRE,
                                               __ATOMIC_RELAXED),
                   RADDLE_ERR_STATE,
                   "%s: another thread is inside this scheduler; use one scheduler per thread",
                   function);
    if (self->is_dead) {
        __atomic_store_n(&self->busy, 0, __ATOMIC_RELEASE);
        return raddle_fail(RADDLE_ERR_STATE,
                           "%s: memory ran out within an earlier call; make a new scheduler of the "
                           "requests that are left",
                           function);
    }
    return RADDLE_OK;
}

/* With the GIL. The core leaves a step half made when memory runs out in it. */
static void leave(scheduler_object *self, raddle_status status) {
    self->is_dead = status == RADDLE_ERR_MEMORY;
    self->counts = *raddle_blend_scheduler_counts(self->scheduler);
    __atomic_store_n(&self->busy, 0, __ATOMIC_RELEASE);
}

/* ------------------------------------------------------------------ creation */

static raddle_status open_scheduler(scheduler_object *self) {
    const raddle_blend_store *store = &self->requests->store;
    raddle_py_blend_question *q = &self->question;
    self->is_begun = raddle_alloc_zero((size_t)store->num_requests);
    if (self->is_begun == NULL) {
        return raddle_fail_memory((size_t)store->num_requests);
    }
    RADDLE_TRY(raddle_py_blend_make_plan(self->requests, q, &self->plan));
    return raddle_blend_scheduler_create(store, &self->requests->trie, &q->cost, &q->limits,
                                         &self->plan, q->lengths, &self->scheduler);
}

static PyObject *scheduler_new(PyTypeObject *type, PyObject *arguments, PyObject *kwargs) {
    static char *keywords[] = {"requests",    "policy", "cost", "pool_tokens",
                               "step_tokens", "seed",   "seen", NULL};
    PyObject *requests, *objects[6];
    if (!PyArg_ParseTupleAndKeywords(arguments, kwargs, "O!OOOOOO:BlendScheduler", keywords,
                                     raddle_py_blend_requests_type, &requests, &objects[0],
                                     &objects[1], &objects[2], &objects[3], &objects[4],
                                     &objects[5])) {
        return NULL;
    }
    scheduler_object *self = (scheduler_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->requests = (raddle_py_blend_requests *)Py_NewRef(requests);
    if (raddle_py_blend_parse_question(&self->requests->store, self->requests->has_unknown, objects,
                                       &self->question) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = open_scheduler(self);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        raddle_raise(status);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void scheduler_dealloc(scheduler_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_blend_scheduler_destroy(self->scheduler);
    raddle_blend_plan_fini(&self->plan);
    raddle_py_blend_close_question(&self->question);
    raddle_free(self->is_begun);
    Py_XDECREF((PyObject *)self->requests);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ------------------------------------------------------------------ a step */

static const int64_t FREE_MAX = INT64_MAX / 4; /* tokens: nobody says what is free */

/* Arrays of the tuple that step() returns, in order. */
enum { PREEMPTED, REQUEST, BEGIN, COUNT, IS_FIRST, IS_LAST, NUM_ARRAYS };

static bool make_arrays(const raddle_blend_step *step, PyObject **arrays) {
    for (int i = 0; i < NUM_ARRAYS; i++) {
        const int64_t count = i == PREEMPTED ? step->num_preempted : step->num_chunks;
        const raddle_dtype dtype = i < IS_FIRST ? RADDLE_I32 : RADDLE_BOOL;
        arrays[i] = raddle_py_tensor_new(&count, 1, dtype, (raddle_device){RADDLE_CPU, 0});
        if (arrays[i] == NULL) {
            return false;
        }
    }
    return true;
}

static void *data_of(PyObject *const *arrays, int which) {
    return ((raddle_py_tensor *)arrays[which])->tensor.data;
}

static void fill_arrays(const scheduler_object *self, PyObject *const *arrays) {
    const raddle_blend_step *step = &self->step;
    int32_t *request = data_of(arrays, REQUEST), *begin = data_of(arrays, BEGIN);
    int32_t *count = data_of(arrays, COUNT);
    uint8_t *is_first = data_of(arrays, IS_FIRST), *is_last = data_of(arrays, IS_LAST);
    if (step->num_preempted > 0) {
        memcpy(data_of(arrays, PREEMPTED), step->preempted,
               (size_t)step->num_preempted * sizeof(int32_t));
    }
    for (int32_t i = 0; i < step->num_chunks; i++) {
        const raddle_blend_chunk *chunk = &step->chunks[i];
        request[i] = chunk->request;
        begin[i] = chunk->begin;
        count[i] = chunk->count;
        is_first[i] = !self->is_begun[chunk->request];
        is_last[i] = chunk->is_last;
    }
}

static void note_who_has_begun(scheduler_object *self) {
    for (int32_t i = 0; i < self->step.num_chunks; i++) {
        self->is_begun[self->step.chunks[i].request] = 1;
    }
}

/* The step as Python has it; it is the caller's from then on. NULL: it stays. */
static PyObject *give_step(scheduler_object *self) {
    const raddle_blend_step *step = &self->step;
    PyObject *arrays[NUM_ARRAYS] = {NULL}, *result = NULL;
    if (make_arrays(step, arrays)) {
        fill_arrays(self, arrays);
        result =
            Py_BuildValue("(OOOOOOidddLLd)", arrays[PREEMPTED], arrays[REQUEST], arrays[BEGIN],
                          arrays[COUNT], arrays[IS_FIRST], arrays[IS_LAST], (int)step->num_decoding,
                          step->work.tokens, step->work.scores, step->work.reads,
                          (long long)step->prompt_tokens, (long long)step->hit_tokens,
                          raddle_blend_step_seconds(&self->question.cost, &step->work));
    }
    for (int i = 0; i < NUM_ARRAYS; i++) {
        Py_XDECREF(arrays[i]);
    }
    if (result != NULL) {
        note_who_has_begun(self);
        self->state = GIVEN;
    }
    return result;
}

/* Without the GIL. */
static raddle_status begin_step(scheduler_object *self, int64_t free_tokens) {
    const int64_t left = self->requests->store.num_requests - self->counts.done;
    if (self->state != BEGUN) {
        if (self->state != GIVEN) {
            raddle_blend_scheduler_set_free(self->scheduler, free_tokens);
        }
        RADDLE_TRY(raddle_blend_scheduler_begin(self->scheduler, &self->step));
        self->state = BEGUN;
        for (int32_t i = 0; i < self->step.num_preempted; i++) {
            self->is_begun[self->step.preempted[i]] = 0;
        }
    }
    RADDLE_REQUIRE(self->step.work.tokens > 0 || left == 0 || free_tokens < FREE_MAX,
                   RADDLE_ERR_STATE,
                   "step: none of the %lld requests that are left fits into the pool of %lld "
                   "tokens; one gave more tokens than it said, and should have ended at max_tokens",
                   (long long)left, (long long)self->question.limits.pool_tokens);
    return RADDLE_OK;
}

PyDoc_STRVAR(step_doc, "step(free_tokens, /)\n--\n\n"
                       "(preempted, chunk request, begin, count, is_first, is_last, num_decoding, "
                       "tokens, scores, reads, prompt_tokens, hit_tokens, seconds).");

static PyObject *step(scheduler_object *self, PyObject *object) {
    int64_t free_tokens = FREE_MAX;
    if (object != Py_None &&
        raddle_py_blend_parse_int(object, "free_tokens", 0, FREE_MAX - 1, &free_tokens) < 0) {
        return NULL;
    }
    raddle_status status = enter(self, "step");
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    Py_BEGIN_ALLOW_THREADS;
    status = begin_step(self, free_tokens);
    Py_END_ALLOW_THREADS;
    PyObject *result = status == RADDLE_OK ? give_step(self) : raddle_raise(status);
    leave(self, status);
    return result;
}

/* ------------------------------------------------------------------ its end */

static raddle_status new_numbers(const scheduler_object *self, int64_t count, int32_t **out) {
    const long long most = (long long)self->requests->store.num_requests;
    RADDLE_REQUIRE(count <= most, RADDLE_ERR_SHAPE,
                   "ended: expected at most all %lld requests, got %lld", most, (long long)count);
    *out = raddle_alloc((size_t)(count + 1) * sizeof(int32_t));
    return *out != NULL ? RADDLE_OK : raddle_fail_memory((size_t)count * sizeof(int32_t));
}

static raddle_status copy_tensor(const scheduler_object *self, const raddle_tensor *tensor,
                                 int32_t **out_numbers, int32_t *out_count) {
    int32_t *numbers = NULL;
    RADDLE_TRY(raddle_tensor_check_device(tensor, (raddle_device){RADDLE_CPU, 0}));
    RADDLE_TRY(raddle_tensor_check_index_dtype(tensor));
    RADDLE_TRY(raddle_tensor_check_shape(tensor, 1, (const int64_t[]){-1}));
    RADDLE_TRY(new_numbers(self, tensor->shape[0], &numbers));
    for (int64_t i = 0; i < tensor->shape[0]; i++) {
        const int64_t number = raddle_tensor_index_at(tensor, i);
        if (number < INT32_MIN || number > INT32_MAX) {
            raddle_free(numbers);
            return raddle_fail(RADDLE_ERR_VALUE,
                               "ended: expected requests, got %lld at position "
                               "%lld",
                               (long long)number, (long long)i);
        }
        numbers[i] = (int32_t)number;
    }
    *out_numbers = numbers;
    *out_count = (int32_t)tensor->shape[0];
    return RADDLE_OK;
}

/* A list or a tuple of integers. */
static int copy_sequence(const scheduler_object *self, PyObject *object, int32_t **out_numbers,
                         int32_t *out_count) {
    PyObject *items = PySequence_Tuple(object); /* __index__ of an item may change the list */
    if (items == NULL) {
        return -1;
    }
    const Py_ssize_t count = PyTuple_GET_SIZE(items);
    int32_t *numbers = NULL;
    const raddle_status status = new_numbers(self, count, &numbers);
    int result = status == RADDLE_OK ? 0 : -1;
    if (result < 0) {
        raddle_raise(status);
    }
    for (Py_ssize_t i = 0; i < count && result == 0; i++) {
        int64_t number = 0;
        result = raddle_py_blend_parse_int(PyTuple_GET_ITEM(items, i), "ended", INT32_MIN,
                                           INT32_MAX, &number);
        numbers[i] = (int32_t)number;
    }
    Py_DECREF(items);
    if (result < 0) {
        raddle_free(numbers);
        return -1;
    }
    *out_numbers = numbers;
    *out_count = (int32_t)count;
    return 0;
}

/* A copy of ended. 0, or -1 with a Python exception set. */
static int parse_ended(const scheduler_object *self, PyObject *object, int32_t **out_numbers,
                       int32_t *out_count) {
    if (PyList_Check(object) || PyTuple_Check(object)) {
        return copy_sequence(self, object, out_numbers, out_count);
    }
    raddle_tensor_arg arg = {0};
    if (raddle_tensor_arg_open(object, "ended", RADDLE_ARG_READ, RADDLE_DTYPE_NONE, &arg) < 0) {
        return -1;
    }
    const raddle_status status = copy_tensor(self, &arg.tensor, out_numbers, out_count);
    raddle_tensor_arg_close(&arg);
    if (status != RADDLE_OK) {
        raddle_raise(status);
        return -1;
    }
    return 0;
}

/* Without the GIL. */
static raddle_status end_step(scheduler_object *self, const int32_t *ended, int32_t count) {
    RADDLE_REQUIRE(self->state == GIVEN, RADDLE_ERR_STATE,
                   "retire: no step has begun; call step() first");
    RADDLE_TRY(raddle_blend_scheduler_end(self->scheduler, ended, count));
    self->state = BETWEEN;
    return RADDLE_OK;
}

PyDoc_STRVAR(retire_doc, "retire(ended, /)\n--\n\nThe step is done; ended gave last tokens in it.");

static PyObject *retire(scheduler_object *self, PyObject *ended) {
    int32_t *numbers = NULL, count = 0;
    if (parse_ended(self, ended, &numbers, &count) < 0) {
        return NULL;
    }
    raddle_status status = enter(self, "retire");
    if (status == RADDLE_OK) {
        Py_BEGIN_ALLOW_THREADS;
        status = end_step(self, numbers, count);
        Py_END_ALLOW_THREADS;
        leave(self, status);
    }
    raddle_free(numbers);
    return status == RADDLE_OK ? Py_NewRef(Py_None) : raddle_raise(status);
}

/* ------------------------------------------------------------------ what is asked */

PyDoc_STRVAR(generated_doc, "generated(request, /)\n--\n\nTokens up to the last step that ended.");

static PyObject *generated(scheduler_object *self, PyObject *object) {
    int64_t request = 0;
    if (raddle_py_blend_parse_int(object, "request", 0, INT32_MAX, &request) < 0) {
        return NULL;
    }
    const int64_t requests = self->requests->store.num_requests;
    if (request >= requests) {
        return raddle_raise(raddle_fail(RADDLE_ERR_VALUE, "request: expected one of %lld, got %lld",
                                        (long long)requests, (long long)request));
    }
    raddle_status status = enter(self, "generated");
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    const int32_t count = raddle_blend_scheduler_generated(self->scheduler, (int32_t)request);
    leave(self, status);
    return PyLong_FromLong(count);
}

PyDoc_STRVAR(counts_doc, "counts()\n--\n\nA dict of numbers, after the last call.");

static PyObject *counts(scheduler_object *self, PyObject *unused) {
    (void)unused;
    const raddle_blend_counts *c = &self->counts;
    return Py_BuildValue(
        "{s:L,s:L,s:L,s:L,s:L,s:L,s:L,s:i,s:i,s:i}", "steps", (long long)c->steps, "preemptions",
        (long long)c->preemptions, "hit_tokens", (long long)c->hit_tokens, "computed_tokens",
        (long long)c->computed_tokens, "recomputed_tokens", (long long)c->recomputed_tokens,
        "held_tokens", (long long)c->held_tokens, "peak_tokens", (long long)c->peak_tokens,
        "running", (int)c->running, "decoding", (int)c->decoding, "done", (int)c->done);
}

static PyObject *get_num_done(scheduler_object *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(self->counts.done);
}

static PyMethodDef scheduler_methods[] = {
    {"step", (PyCFunction)step, METH_O, step_doc},
    {"retire", (PyCFunction)(void (*)(void))retire, METH_O, retire_doc},
    {"generated", (PyCFunction)(void (*)(void))generated, METH_O, generated_doc},
    {"counts", (PyCFunction)(void (*)(void))counts, METH_NOARGS, counts_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef scheduler_getset[] = {
    {"num_done", (getter)get_num_done, NULL, "Requests that gave their last token.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(scheduler_doc, "Says what each step of an engine does.");

static PyType_Slot scheduler_slots[] = {
    {Py_tp_new, RADDLE_SLOT(scheduler_new)}, {Py_tp_dealloc, RADDLE_SLOT(scheduler_dealloc)},
    {Py_tp_methods, scheduler_methods},      {Py_tp_getset, scheduler_getset},
    {Py_tp_doc, (void *)scheduler_doc},      {0, NULL},
};

static PyType_Spec scheduler_spec = {
    .name = "raddle._core.BlendScheduler",
    .basicsize = sizeof(scheduler_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = scheduler_slots,
};

int raddle_py_blend_add_scheduler(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &scheduler_spec, NULL);
    const int result = type == NULL ? -1 : PyModule_AddObjectRef(module, "BlendScheduler", type);
    Py_XDECREF(type);
    return result;
}

/* py_attention.c - raddle._core.AttentionPlan.
 *
 * Everything here is positional: words, defaults and docstrings live in python/raddle/attention.py.
 */
#include "python/py_attention.h"

#include <string.h>

#include "attention/attention.h"
#include "base/alloc.h"
#include "python/py_runtime.h"

typedef struct attention_plan_object {
    PyObject_HEAD raddle_plan *plan;
    raddle_kv_layout layout;
    bool is_cpu;
} attention_plan_object;

/* ------------------------------------------------------------------ construction */

static int parse_encoding(const char *text, raddle_pos_encoding *out_encoding) {
    *out_encoding = strcmp(text, "ROPE") == 0    ? RADDLE_POS_ROPE
                    : strcmp(text, "ALIBI") == 0 ? RADDLE_POS_ALIBI
                                                 : RADDLE_POS_NONE;
    if (*out_encoding == RADDLE_POS_NONE && strcmp(text, "NONE") != 0) {
        raddle_raise(raddle_fail(
            RADDLE_ERR_VALUE, "pos_encoding: expected 'NONE', 'ROPE' or 'ALIBI', got '%s'", text));
        return -1;
    }
    return 0;
}

static int parse_weights(const char *text, raddle_attention_weights *out_weights) {
    *out_weights = strcmp(text, "sigmoid") == 0 ? RADDLE_WEIGHTS_SIGMOID : RADDLE_WEIGHTS_SOFTMAX;
    if (*out_weights == RADDLE_WEIGHTS_SOFTMAX && strcmp(text, "softmax") != 0) {
        raddle_raise(raddle_fail(RADDLE_ERR_VALUE,
                                 "weights: expected 'softmax' or 'sigmoid', got '%s'", text));
        return -1;
    }
    return 0;
}

static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {
        "num_qo_heads",    "num_kv_heads", "head_dim",    "head_dim_vo", "page_size",
        "dtype",           "kv_dtype",     "o_dtype",     "kv_layout",   "causal",
        "window_left",     "sm_scale",     "lse_base",    "max_batch",   "max_pages",
        "max_qo_tokens",   "max_qo_len",   "fixed_chunk", "max_ctas",    "device",
        "logits_soft_cap", "pos_encoding", "rope_scale",  "rope_theta",  "weights",
        "sinks",           "pdl",          "variant",     NULL};
    raddle_attention_spec spec = {.struct_size = sizeof spec};
    PyObject *dtype, *kv_dtype, *o_dtype, *device, *variant;
    const char *layout_text, *base_text, *encoding_text, *weights_text;
    long long max_pages, max_qo_tokens;
    int causal, has_sinks, pdl;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "iiiiiOOOspifsiLLiiiOfsffsppO:AttentionPlan", names, &spec.num_qo_heads,
            &spec.num_kv_heads, &spec.head_dim_qk, &spec.head_dim_vo, &spec.page_size, &dtype,
            &kv_dtype, &o_dtype, &layout_text, &causal, &spec.window_left, &spec.sm_scale,
            &base_text, &spec.max_batch, &max_pages, &max_qo_tokens, &spec.max_qo_len,
            &spec.fixed_chunk, &spec.max_ctas, &device, &spec.logits_soft_cap, &encoding_text,
            &spec.rope_scale, &spec.rope_theta, &weights_text, &has_sinks, &pdl, &variant)) {
        return NULL;
    }
    raddle_kv_layout layout;
    spec.causal = causal != 0;
    spec.max_pages = max_pages;
    spec.max_qo_tokens = max_qo_tokens;
    spec.has_sinks = has_sinks != 0;
    spec.no_pdl = !pdl;
    if (raddle_dtype_from_object(dtype, "dtype", &spec.q_dtype) < 0 ||
        raddle_dtype_from_object(kv_dtype, "kv_dtype", &spec.kv_dtype) < 0 ||
        raddle_dtype_from_object(o_dtype, "o_dtype", &spec.o_dtype) < 0 ||
        raddle_device_from_object(device, "device", &spec.device) < 0 ||
        raddle_py_parse_layout(layout_text, &layout) < 0 ||
        raddle_py_parse_lse_base(base_text, &spec.lse_base) < 0 ||
        parse_encoding(encoding_text, &spec.pos_encoding) < 0 ||
        parse_weights(weights_text, &spec.weights) < 0 ||
        raddle_py_variant_from_object(variant, &spec.variant) < 0) {
        return NULL;
    }
    raddle_plan *plan = NULL;
    raddle_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_attention_plan_create(&spec, &plan);
    Py_END_ALLOW_THREADS;
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    attention_plan_object *self = (attention_plan_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        raddle_plan_destroy(plan);
        return NULL;
    }
    self->plan = plan;
    self->layout = layout;
    self->is_cpu = spec.device.type == RADDLE_CPU;
    if (raddle_py_warn_notices() < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void plan_dealloc(attention_plan_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    raddle_plan_destroy(self->plan);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ------------------------------------------------------------------ workspace */

PyDoc_STRVAR(plan_bind_doc,
             "bind(workspace, /)\n--\n\nUse a Workspace, or the memory of a contiguous tensor, as "
             "scratch.");

static PyObject *plan_bind(attention_plan_object *self, PyObject *object) {
    raddle_workspace *workspace = raddle_py_workspace_from_object(object);
    if (workspace == NULL) {
        return NULL;
    }
    raddle_status status = raddle_plan_bind_workspace(self->plan, workspace);
    raddle_workspace_destroy(workspace);
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    Py_RETURN_NONE;
}

static PyObject *plan_workspace_size(attention_plan_object *self, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(raddle_plan_workspace_bytes(self->plan));
}

/* ------------------------------------------------------------------ update */

PyDoc_STRVAR(plan_update_doc,
             "update(qo_indptr, indptr, indices, last_page_len, block_table, seq_lens, stream, "
             "on_device, /)\n"
             "--\n\nCompute the schedule of a batch and send it to the device, or have it computed "
             "there.");

static PyObject *plan_update(attention_plan_object *self, PyObject *const *objects,
                             Py_ssize_t count) {
    static const char *const names[] = {"qo_indptr",     "indptr",      "indices",
                                        "last_page_len", "block_table", "seq_lens"};
    static const int access[] = {RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL,
                                 RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL, RADDLE_ARG_OPTIONAL};
    enum { NUM = 6 };
    raddle_tensor_arg args[NUM];
    if (raddle_py_check_count("update", count, NUM + 2) < 0 ||
        raddle_py_open_args(objects, names, access, NUM, args) < 0) {
        return NULL;
    }
    raddle_stream stream = NULL;
    raddle_status status = RADDLE_OK;
    const int on_device = PyObject_IsTrue(objects[NUM + 1]);
    if (on_device < 0 || raddle_stream_from_args(objects[NUM], args, NUM, &stream) < 0) {
        raddle_py_close_args(args, NUM);
        return NULL;
    }
    const raddle_attention_batch batch = {
        .struct_size = sizeof batch,
        .qo_indptr = args[0].view,
        .kv_indptr = args[1].view,
        .kv_indices = args[2].view,
        .last_page_len = args[3].view,
        .block_table = args[4].view,
        .seq_lens = args[5].view,
        .on_device = on_device != 0,
    };
    Py_BEGIN_ALLOW_THREADS;
    status = raddle_attention_plan_update(self->plan, &batch, stream);
    Py_END_ALLOW_THREADS;
    raddle_py_close_args(args, NUM);
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ run */

PyDoc_STRVAR(plan_run_doc, "run(q, k_or_kv, v, out, lse, return_lse, stream, sinks, k_scale, "
                           "v_scale, variant_args, /)\n--\n\n"
                           "Attention of the planned batch; capture-safe when out is given.");

static PyObject *plan_run(attention_plan_object *self, PyObject *const *objects, Py_ssize_t count) {
    static const char *const names[] = {"q", "kv_cache", "v"};
    static const int access[] = {RADDLE_ARG_READ, RADDLE_ARG_READ, RADDLE_ARG_OPTIONAL};
    enum { Q, K, V, OUT, LSE, NUM };
    const raddle_attention_plan *plan = (const raddle_attention_plan *)self->plan;
    raddle_tensor_arg args[NUM];
    memset(args, 0, sizeof args);
    raddle_py_run_extras extras;
    extras.num_args = 0;
    PyObject *out = NULL, *lse = NULL, *result = NULL;
    raddle_kv_cache cache;
    raddle_stream stream = NULL;
    raddle_status status = RADDLE_OK;
    if (raddle_py_check_count("run", count, 11) < 0 ||
        raddle_py_open_args(objects, names, access, 3, args) < 0) {
        return NULL;
    }
    const int want_lse = PyObject_IsTrue(objects[5]);
    if (want_lse < 0) {
        goto out;
    }
    raddle_py_read_bits_as(&args[Q], plan->config.q_dtype);
    raddle_py_read_bits_as(&args[K], plan->config.kv_dtype);
    raddle_py_read_bits_as(&args[V], plan->config.kv_dtype);
    if (plan->base.state != RADDLE_PLAN_PLANNED) {
        /* The core says it better, and before a result of unknown shape is made. */
        status = raddle_plan_enter(self->plan, RADDLE_PLAN_PLANNED);
        if (status == RADDLE_OK) {
            status = raddle_plan_leave(self->plan, status);
        }
    }
    if (status == RADDLE_OK) {
        status = raddle_kv_cache_from_tensors(args[K].view, args[V].view, self->layout,
                                              plan->config.page_size, &cache);
    }
    if (status != RADDLE_OK) {
        raddle_raise(status);
        goto out;
    }
    const int64_t rows = plan->host.header->num_qo_tokens;
    const int64_t shape[3] = {rows, plan->config.num_qo_heads, plan->config.head_dim_vo};
    out = raddle_py_open_result(objects[3], objects[0], "out", shape, 3, plan->config.o_dtype,
                                plan->base.device, &args[OUT]);
    if (out == NULL) {
        goto out;
    }
    if (want_lse || objects[4] != Py_None) {
        lse = raddle_py_open_result(objects[4], objects[0], "lse", shape, 2, RADDLE_F32,
                                    plan->base.device, &args[LSE]);
        if (lse == NULL) {
            goto out;
        }
    }
    if (raddle_stream_from_args(objects[6], args, NUM, &stream) < 0) {
        goto out;
    }
    raddle_attention_args run_args = {
        .struct_size = sizeof run_args,
        .q = args[Q].view,
        .kv = &cache,
        .out = args[OUT].view,
        .lse = lse == NULL ? NULL : args[LSE].view,
    };
    if (plan->variant != NULL || objects[7] != Py_None || objects[8] != Py_None ||
        objects[9] != Py_None || objects[10] != Py_None) {
        if (raddle_py_open_run_extras(plan->variant, objects[7], objects[8], objects[9],
                                      objects[10], &extras) < 0) {
            goto out;
        }
        run_args.sinks = extras.sinks;
        run_args.k_scale = extras.k_scale;
        run_args.v_scale = extras.v_scale;
        run_args.k_scales = extras.k_scales;
        run_args.v_scales = extras.v_scales;
        if (plan->variant != NULL) {
            run_args.variant_tensors = extras.tensors;
            run_args.variant_scalars = extras.scalars;
        }
    }
    if (self->is_cpu) {
        Py_BEGIN_ALLOW_THREADS;
        status = raddle_attention_plan_run(self->plan, &run_args, stream);
        Py_END_ALLOW_THREADS;
    } else {
        status = raddle_attention_plan_run(self->plan, &run_args, stream);
    }
    if (status != RADDLE_OK) {
        raddle_raise(status);
        goto out;
    }
    result = want_lse ? PyTuple_Pack(2, out, lse) : Py_NewRef(out);
out:
    raddle_py_close_args(args, NUM);
    raddle_py_close_args(extras.args, extras.num_args);
    Py_XDECREF(out);
    Py_XDECREF(lse);
    return result;
}

/* ------------------------------------------------------------------ what was planned */

PyDoc_STRVAR(
    plan_schedule_doc,
    "schedule()\n--\n\nThe last schedule as bytes of its arrays, and the config as a dict. "
    "Waits for the GPU when that planned.");

static PyObject *plan_schedule(attention_plan_object *self, PyObject *unused) {
    (void)unused;
    const raddle_attention_plan *plan = (const raddle_attention_plan *)self->plan;
    raddle_status status = raddle_plan_enter(self->plan, RADDLE_PLAN_PLANNED);
    if (status != RADDLE_OK) {
        return raddle_raise(status);
    }
    raddle_attention_schedule schedule = plan->host;
    void *memory = NULL;
    if (plan->device_plan.is_last) {
        Py_BEGIN_ALLOW_THREADS;
        status = raddle_attention_device_plan_read(plan, &schedule, &memory);
        Py_END_ALLOW_THREADS;
        if (status != RADDLE_OK) {
            return raddle_raise(raddle_plan_leave(self->plan, status));
        }
    }
    const raddle_attention_header *header = schedule.header;
    const raddle_attention_config *config = &plan->config;
    PyObject *result = Py_BuildValue(
        "(y#y#y#y#{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i})", (const char *)schedule.requests,
        (Py_ssize_t)((size_t)header->batch * sizeof(raddle_attention_request)),
        (const char *)schedule.worker_indptr,
        (Py_ssize_t)(((size_t)config->num_workers + 1) * sizeof(int32_t)),
        (const char *)schedule.segments,
        (Py_ssize_t)((size_t)header->num_segments * sizeof(raddle_attention_segment)),
        (const char *)schedule.merges,
        (Py_ssize_t)((size_t)header->num_merges * sizeof(raddle_attention_merge)), "tile_rows",
        config->tile_rows, "tile_kv", config->tile_kv, "heads_per_item", header->heads_per_item,
        "segment_cost", config->segment_cost, "num_workers", config->num_workers, "num_slots",
        header->num_slots, "group_size", config->group_size, "num_kv_heads", config->num_kv_heads,
        "token_bytes",
        (config->head_dim_qk + config->head_dim_vo) * (int)raddle_dtype_bytes(config->kv_dtype));
    raddle_free(memory);
    (void)raddle_plan_leave(self->plan, RADDLE_OK);
    return result;
}

static PyObject *plan_generation(attention_plan_object *self, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong(self->plan->generation);
}

static PyMethodDef plan_methods[] = {
    {"bind", (PyCFunction)plan_bind, METH_O, plan_bind_doc},
    {"update", RADDLE_FASTCALL(plan_update), METH_FASTCALL, plan_update_doc},
    {"run", RADDLE_FASTCALL(plan_run), METH_FASTCALL, plan_run_doc},
    {"schedule", (PyCFunction)plan_schedule, METH_NOARGS, plan_schedule_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef plan_getset[] = {
    {"workspace_size", (getter)plan_workspace_size, NULL, "Scratch bytes that this plan needs.",
     NULL},
    {"generation", (getter)plan_generation, NULL, "How many batches were planned.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(plan_doc, "All decisions of one attention operation on one device.");

static PyType_Slot plan_slots[] = {
    {Py_tp_new, RADDLE_SLOT(plan_new)}, {Py_tp_dealloc, RADDLE_SLOT(plan_dealloc)},
    {Py_tp_methods, plan_methods},      {Py_tp_getset, plan_getset},
    {Py_tp_doc, (void *)plan_doc},      {0, NULL},
};

static PyType_Spec plan_spec = {
    .name = "raddle._core.AttentionPlan",
    .basicsize = sizeof(attention_plan_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = plan_slots,
};

int raddle_py_add_attention(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &plan_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    const int added = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    if (added < 0 || raddle_py_add_attention_variant(module) < 0) {
        return -1;
    }
    return raddle_py_add_attention_functions(module);
}

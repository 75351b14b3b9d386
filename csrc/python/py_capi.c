/* py_capi.c - the function table of raddle.h, and the capsule raddle._core._C_API that holds it.
 *
 * The core's functions trust their pointers; those of the table come from other people's C, so a
 * NULL is refused here. Everything else is checked where it is checked for Python's callers.
 *
 * A raddle_tensor of the table is the first member of a tensor_handle, a raddle_kv_cache that of a
 * cache_handle. A cache keeps its tensors by their reference counts.
 */
#include "python/module.h"

#include <stdio.h>

#include "attention/attention.h"
#include "base/alloc.h"
#include "base/dlpack.h"
#include "python/py_runtime.h"
#include "python/tensor_arg.h"
#include "runtime/graph.h"

enum { NAME_BYTES = 64 };

typedef struct tensor_handle {
    raddle_tensor_hold hold; /* its owner is NULL when the memory is the caller's to keep */
    int refs;                /* accessed atomically */
    char name[NAME_BYTES];
} tensor_handle;

typedef struct cache_handle {
    raddle_kv_cache cache;
    tensor_handle *k, *v;
} cache_handle;

#define REQUIRE_GIVEN(argument)                                                                    \
    RADDLE_REQUIRE((argument) != NULL, RADDLE_ERR_VALUE, "%s: expected an address, got NULL",      \
                   #argument)

/* ------------------------------------------------------------------ tensors */

static tensor_handle *handle_of(const raddle_tensor *tensor) {
    return (tensor_handle *)(void *)tensor;
}

/* The words that both ways of opening share, checked, and a handle with the name in it. */
static raddle_status make_handle(const char *name, raddle_access access, tensor_handle **out) {
    REQUIRE_GIVEN(name);
    RADDLE_REQUIRE(access == RADDLE_READ || access == RADDLE_WRITE, RADDLE_ERR_VALUE,
                   "%s: access: expected RADDLE_READ or RADDLE_WRITE, got %d", name, (int)access);
    tensor_handle *handle = raddle_alloc_zero(sizeof *handle);
    if (handle == NULL) {
        return raddle_fail_memory(sizeof *handle);
    }
    handle->refs = 1;
    snprintf(handle->name, sizeof handle->name, "%s", name);
    *out = handle;
    return RADDLE_OK;
}

static raddle_status start_open(PyObject *object, const char *name, raddle_access access,
                                raddle_tensor **out_tensor, tensor_handle **out_handle) {
    REQUIRE_GIVEN(object);
    REQUIRE_GIVEN(out_tensor);
    return make_handle(name, access, out_handle);
}

/* The memory outlives the call, so it is held; a graph that is being captured keeps it as well. */
static int tensor_open(PyObject *object, const char *name, raddle_access access, raddle_dtype dtype,
                       raddle_tensor **out_tensor) {
    tensor_handle *handle = NULL;
    const raddle_status status = start_open(object, name, access, out_tensor, &handle);
    if (status != RADDLE_OK) {
        raddle_raise(status);
        return -1;
    }
    const bool write = access == RADDLE_WRITE;
    raddle_tensor_hold *hold = &handle->hold;
    if (raddle_tensor_hold_open(object, handle->name, write ? RADDLE_ARG_WRITE : RADDLE_ARG_READ,
                                dtype, hold) < 0) {
        raddle_free(handle);
        return -1;
    }
    if (raddle_graph_current() != NULL && raddle_py_graph_keep(hold->owner) < 0) {
        raddle_tensor_hold_close(hold);
        raddle_free(handle);
        return -1;
    }
    hold->tensor.read_only = !write;
    *out_tensor = &hold->tensor;
    return 0;
}

static raddle_status tensor_from_dlpack(const void *dl_tensor, const char *name,
                                        raddle_access access, raddle_dtype dtype,
                                        raddle_tensor **out_tensor) {
    tensor_handle *handle = NULL;
    REQUIRE_GIVEN(dl_tensor);
    REQUIRE_GIVEN(out_tensor);
    RADDLE_TRY(make_handle(name, access, &handle));
    const uint64_t flags = access == RADDLE_WRITE ? 0 : DLPACK_FLAG_BITMASK_READ_ONLY;
    const raddle_status status =
        raddle_tensor_from_dlpack(dl_tensor, flags, handle->name, dtype, &handle->hold.tensor);
    if (status != RADDLE_OK) {
        raddle_free(handle);
        return status;
    }
    *out_tensor = &handle->hold.tensor;
    return RADDLE_OK;
}

static bool tensor_stream(const raddle_tensor *tensor, raddle_stream *out_stream) {
    if (tensor == NULL || out_stream == NULL || !handle_of(tensor)->hold.has_stream) {
        return false;
    }
    *out_stream = handle_of(tensor)->hold.stream;
    return true;
}

static void tensor_close(raddle_tensor *tensor) {
    if (tensor == NULL) {
        return;
    }
    tensor_handle *handle = handle_of(tensor);
    if (__atomic_sub_fetch(&handle->refs, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    if (handle->hold.owner != NULL) {
        const PyGILState_STATE gil = PyGILState_Ensure();
        raddle_tensor_hold_close(&handle->hold);
        PyGILState_Release(gil);
    }
    raddle_free(handle);
}

/* ------------------------------------------------------------------ K/V stores */

static tensor_handle *retain_tensor(const raddle_tensor *tensor) {
    tensor_handle *handle = tensor == NULL ? NULL : handle_of(tensor);
    if (handle != NULL) {
        __atomic_add_fetch(&handle->refs, 1, __ATOMIC_RELAXED);
    }
    return handle;
}

static raddle_status kv_cache_create(const raddle_tensor *k_or_kv, const raddle_tensor *v,
                                     raddle_kv_layout layout, int32_t page_size,
                                     raddle_kv_cache **out_cache) {
    REQUIRE_GIVEN(k_or_kv);
    REQUIRE_GIVEN(out_cache);
    RADDLE_REQUIRE(page_size >= 0, RADDLE_ERR_VALUE,
                   "page_size: expected 1 token or more, or 0 for ragged K/V; got %d",
                   (int)page_size);
    cache_handle *handle = raddle_alloc_zero(sizeof *handle);
    if (handle == NULL) {
        return raddle_fail_memory(sizeof *handle);
    }
    const raddle_status status =
        raddle_kv_cache_from_tensors(k_or_kv, v, layout, page_size, &handle->cache);
    if (status != RADDLE_OK) {
        raddle_free(handle);
        return status;
    }
    handle->k = retain_tensor(k_or_kv);
    handle->v = retain_tensor(v);
    *out_cache = &handle->cache;
    return RADDLE_OK;
}

static void kv_cache_destroy(raddle_kv_cache *cache) {
    cache_handle *handle = (cache_handle *)(void *)cache;
    if (handle == NULL) {
        return;
    }
    tensor_close(handle->k == NULL ? NULL : &handle->k->hold.tensor);
    tensor_close(handle->v == NULL ? NULL : &handle->v->hold.tensor);
    raddle_free(handle);
}

/* ------------------------------------------------------------------ scratch and plans */

static raddle_status workspace_create(raddle_device device, size_t bytes,
                                      raddle_workspace **out_workspace) {
    REQUIRE_GIVEN(out_workspace);
    return raddle_workspace_create(device, bytes, out_workspace);
}

static raddle_status workspace_wrap(raddle_device device, void *data, size_t bytes,
                                    void (*release)(void *), void *context,
                                    raddle_workspace **out_workspace) {
    REQUIRE_GIVEN(out_workspace);
    return raddle_workspace_wrap(device, data, bytes, release, context, out_workspace);
}

static size_t plan_workspace_bytes(const raddle_plan *plan) {
    return plan == NULL ? 0 : raddle_plan_workspace_bytes(plan);
}

static raddle_status plan_bind_workspace(raddle_plan *plan, raddle_workspace *workspace) {
    REQUIRE_GIVEN(plan);
    REQUIRE_GIVEN(workspace);
    return raddle_plan_bind_workspace(plan, workspace);
}

/* ------------------------------------------------------------------ attention */

static raddle_status attention_plan_create(const raddle_attention_spec *spec,
                                           raddle_plan **out_plan) {
    REQUIRE_GIVEN(spec);
    REQUIRE_GIVEN(out_plan);
    return raddle_attention_plan_create(spec, out_plan);
}

static raddle_status attention_plan_update(raddle_plan *plan, const raddle_attention_batch *batch,
                                           raddle_stream stream) {
    REQUIRE_GIVEN(plan);
    REQUIRE_GIVEN(batch);
    return raddle_attention_plan_update(plan, batch, stream);
}

static raddle_status attention_plan_run(raddle_plan *plan, const raddle_attention_args *args,
                                        raddle_stream stream) {
    REQUIRE_GIVEN(plan);
    REQUIRE_GIVEN(args);
    return raddle_attention_plan_run(plan, args, stream);
}

static raddle_status attention_merge_state(const raddle_tensor *v_a, const raddle_tensor *s_a,
                                           const raddle_tensor *v_b, const raddle_tensor *s_b,
                                           const raddle_tensor *mask, const raddle_tensor *v_out,
                                           const raddle_tensor *s_out, raddle_lse_base base,
                                           raddle_stream stream) {
    REQUIRE_GIVEN(v_a);
    REQUIRE_GIVEN(s_a);
    REQUIRE_GIVEN(v_b);
    REQUIRE_GIVEN(s_b);
    REQUIRE_GIVEN(v_out);
    REQUIRE_GIVEN(s_out);
    return raddle_attention_merge_state(v_a, s_a, v_b, s_b, mask, v_out, s_out, base, stream);
}

static raddle_status attention_merge_states(const raddle_tensor *v, const raddle_tensor *s,
                                            const raddle_tensor *v_out, const raddle_tensor *s_out,
                                            raddle_lse_base base, raddle_stream stream) {
    REQUIRE_GIVEN(v);
    REQUIRE_GIVEN(s);
    REQUIRE_GIVEN(v_out);
    REQUIRE_GIVEN(s_out);
    return raddle_attention_merge_states(v, s, v_out, s_out, base, stream);
}

static raddle_status
attention_append(const raddle_tensor *k, const raddle_tensor *v, const raddle_tensor *batch_indices,
                 const raddle_tensor *positions, const raddle_tensor *kv_indptr,
                 const raddle_tensor *kv_indices, const raddle_kv_cache *kv, raddle_stream stream) {
    REQUIRE_GIVEN(k);
    REQUIRE_GIVEN(v);
    REQUIRE_GIVEN(batch_indices);
    REQUIRE_GIVEN(positions);
    REQUIRE_GIVEN(kv_indptr);
    REQUIRE_GIVEN(kv_indices);
    REQUIRE_GIVEN(kv);
    return raddle_attention_append(k, v, batch_indices, positions, kv_indptr, kv_indices, kv,
                                   stream);
}

static raddle_status attention_append_slots(const raddle_tensor *k, const raddle_tensor *v,
                                            const raddle_tensor *slot_mapping,
                                            const raddle_kv_cache *kv, raddle_stream stream) {
    REQUIRE_GIVEN(k);
    REQUIRE_GIVEN(v);
    REQUIRE_GIVEN(slot_mapping);
    REQUIRE_GIVEN(kv);
    return raddle_attention_append_slots(k, v, slot_mapping, kv, stream);
}

static raddle_status attention_variant_create(const raddle_attention_variant_spec *spec,
                                              raddle_attention_variant **out_variant) {
    REQUIRE_GIVEN(spec);
    REQUIRE_GIVEN(out_variant);
    return raddle_attention_variant_create(spec, out_variant);
}

/* ------------------------------------------------------------------ the table */

static const raddle_api api = {
    .struct_size = sizeof api,
    .version = RADDLE_API_VERSION,
    .last_error = raddle_last_error,
    .status_name = raddle_status_name,
    .raise = raddle_raise,
    .tensor_open = tensor_open,
    .tensor_from_dlpack = tensor_from_dlpack,
    .tensor_stream = tensor_stream,
    .tensor_close = tensor_close,
    .kv_cache_create = kv_cache_create,
    .kv_cache_destroy = kv_cache_destroy,
    .workspace_create = workspace_create,
    .workspace_wrap = workspace_wrap,
    .workspace_destroy = raddle_workspace_destroy,
    .plan_workspace_bytes = plan_workspace_bytes,
    .plan_bind_workspace = plan_bind_workspace,
    .plan_destroy = raddle_plan_destroy,
    .attention_plan_create = attention_plan_create,
    .attention_plan_update = attention_plan_update,
    .attention_plan_run = attention_plan_run,
    .attention_merge_state = attention_merge_state,
    .attention_merge_states = attention_merge_states,
    .attention_append = attention_append,
    .attention_append_slots = attention_append_slots,
    .attention_variant_create = attention_variant_create,
    .attention_variant_destroy = raddle_attention_variant_destroy,
};

int raddle_py_add_capi(PyObject *module) {
    PyObject *capsule = PyCapsule_New((void *)&api, RADDLE_API_CAPSULE, NULL);
    const int added = capsule == NULL ? -1 : PyModule_AddObjectRef(module, "_C_API", capsule);
    Py_XDECREF(capsule);
    return added;
}

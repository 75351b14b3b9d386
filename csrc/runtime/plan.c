/* plan.c - what every family's plan has in common. */
#include "runtime/plan.h"

#include "base/alloc.h"
#include "base/tensor.h"

raddle_status raddle_plan_alloc(size_t bytes, const raddle_plan_ops *ops, raddle_device device,
                                raddle_plan **out_plan) {
    const raddle_backend *backend = NULL;
    RADDLE_TRY(raddle_backend_for(device, &backend));
    raddle_plan *plan = raddle_alloc_zero(bytes);
    if (plan == NULL) {
        return raddle_fail_memory(bytes);
    }
    plan->ops = ops;
    plan->backend = backend;
    plan->device = device;
    plan->refs = 1;
    *out_plan = plan;
    return RADDLE_OK;
}

raddle_plan *raddle_plan_retain(raddle_plan *plan) {
    if (plan != NULL) {
        __atomic_add_fetch(&plan->refs, 1, __ATOMIC_RELAXED);
    }
    return plan;
}

void raddle_plan_destroy(raddle_plan *plan) {
    if (plan == NULL || __atomic_sub_fetch(&plan->refs, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    plan->ops->fini(plan);
    raddle_workspace_destroy(plan->workspace);
    raddle_free(plan);
}

size_t raddle_plan_workspace_bytes(const raddle_plan *plan) {
    raddle_arena arena;
    raddle_arena_measure(&arena);
    /* Measuring hands out NULL for every buffer and changes nothing in the plan. */
    plan->ops->layout((raddle_plan *)plan, &arena);
    return raddle_arena_bytes(&arena);
}

static raddle_status carve_workspace(raddle_plan *plan, raddle_workspace *workspace) {
    raddle_arena arena;
    raddle_arena_carve(&arena, workspace->data, workspace->bytes, plan->device.type == RADDLE_CPU);
    plan->ops->layout(plan, &arena);
    if (!raddle_arena_fits(&arena)) {
        return raddle_fail(
            RADDLE_ERR_CAPACITY,
            "workspace: %zu bytes needed, %zu given; make one of plan.workspace_size "
            "bytes, or bind none and the plan makes its own",
            raddle_plan_workspace_bytes(plan), workspace->bytes);
    }
    return RADDLE_OK;
}

raddle_status raddle_plan_bind_workspace(raddle_plan *plan, raddle_workspace *workspace) {
    char want[16], got[16];
    RADDLE_REQUIRE(raddle_device_equal(plan->device, workspace->device), RADDLE_ERR_DEVICE,
                   "workspace: expected memory on %s, the plan's device; got %s",
                   raddle_device_text(plan->device, want),
                   raddle_device_text(workspace->device, got));
    const size_t needed = raddle_plan_workspace_bytes(plan);
    RADDLE_REQUIRE(
        needed <= workspace->bytes, RADDLE_ERR_CAPACITY,
        "workspace: %zu bytes needed, %zu given; make one of plan.workspace_size bytes, or "
        "bind none and the plan makes its own",
        needed, workspace->bytes);
    RADDLE_TRY(raddle_plan_enter(plan, RADDLE_PLAN_READY));
    raddle_status status = carve_workspace(plan, workspace);
    if (status == RADDLE_OK) {
        raddle_workspace_destroy(plan->workspace);
        plan->workspace = raddle_workspace_retain(workspace);
    }
    return raddle_plan_leave(plan, status);
}

raddle_status raddle_plan_enter(raddle_plan *plan, raddle_plan_state want) {
    int expected = 0;
    if (!__atomic_compare_exchange_n(&plan->busy, &expected, 1, false, __ATOMIC_ACQUIRE,
                                     __ATOMIC_RELAXED)) {
        return raddle_fail(RADDLE_ERR_STATE,
                           "plan: another thread is inside this %s plan; use one plan per thread",
                           plan->ops->family);
    }
    char device[16];
    if (plan->state == RADDLE_PLAN_DEAD) {
        return raddle_plan_leave(
            plan, raddle_fail(RADDLE_ERR_STATE,
                              "plan: this %s plan is dead: an earlier call on it found that work "
                              "had failed on %s (an asynchronous error) and the CUDA context was "
                              "lost; restart the process",
                              plan->ops->family, raddle_device_text(plan->device, device)));
    }
    if (plan->state < want) {
        return raddle_plan_leave(
            plan, raddle_fail(RADDLE_ERR_STATE,
                              "run: nothing is planned yet in this %s plan; call plan() first",
                              plan->ops->family));
    }
    return RADDLE_OK;
}

raddle_status raddle_plan_leave(raddle_plan *plan, raddle_status status) {
    char device[16];
    if (status == RADDLE_ERR_CUDA_ASYNC) {
        plan->state = RADDLE_PLAN_DEAD;
        status = raddle_fail(status, "%s; this %s plan on %s (batches planned: %llu) is dead",
                             raddle_last_error()->message, plan->ops->family,
                             raddle_device_text(plan->device, device),
                             (unsigned long long)plan->generation);
    }
    __atomic_store_n(&plan->busy, 0, __ATOMIC_RELEASE);
    return status;
}

raddle_status raddle_plan_ensure_workspace(raddle_plan *plan) {
    if (plan->workspace != NULL) {
        return RADDLE_OK;
    }
    raddle_workspace *workspace = NULL;
    RADDLE_TRY(
        raddle_workspace_create(plan->device, raddle_plan_workspace_bytes(plan), &workspace));
    raddle_status status = carve_workspace(plan, workspace);
    if (status != RADDLE_OK) {
        raddle_workspace_destroy(workspace);
        return status;
    }
    plan->workspace = workspace;
    return RADDLE_OK;
}

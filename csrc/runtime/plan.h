/* plan.h - the part of a plan that every family shares: states, the busy flag, scratch, references.
 *
 * A family's plan begins with a raddle_plan. States: READY (kernels there, nothing planned) ->
 * PLANNED (generation counts updates) -> DEAD (GPU work failed late; only destroy is left). NEW is
 * only seen inside create. Every entry point brackets its work with raddle_plan_enter /
 * raddle_plan_leave: two threads in one plan is an error, not a race. A graph retains the plans it
 * captured; an update that no longer fits fails and marks the generation, so that the graph can
 * tell it is stale.
 */
#ifndef RADDLE_RUNTIME_PLAN_H
#define RADDLE_RUNTIME_PLAN_H

#include "base/arena.h"
#include "runtime/backend.h"
#include "runtime/staging.h"
#include "runtime/workspace.h"

typedef enum raddle_plan_state {
    RADDLE_PLAN_NEW = 0,
    RADDLE_PLAN_READY,
    RADDLE_PLAN_PLANNED,
    RADDLE_PLAN_DEAD
} raddle_plan_state;

typedef struct raddle_plan_ops {
    const char *family; /* "attention", for messages */
    /* Carves the scratch of plan from arena; also run over a measuring arena. */
    void (*layout)(raddle_plan *plan, raddle_arena *arena);
    /* Releases what the family added; the shared part follows. */
    void (*fini)(raddle_plan *plan);
} raddle_plan_ops;

struct raddle_plan {
    const raddle_plan_ops *ops;
    const raddle_backend *backend;
    raddle_device device;
    raddle_plan_state state;
    int refs; /* accessed atomically */
    int busy; /* accessed atomically */
    uint64_t generation;
    uint64_t failed_capacity;    /* updates refused for capacity since creation: a captured graph
                                    compares */
    raddle_workspace *workspace; /* bound, or made at the first update when none was */
    raddle_staging *staging; /* the family's, or NULL: a graph's launch waits for its last commit */
};

/* bytes: of the family's whole struct, zeroed. */
raddle_status raddle_plan_alloc(size_t bytes, const raddle_plan_ops *ops, raddle_device device,
                                raddle_plan **out_plan);
raddle_plan *raddle_plan_retain(raddle_plan *plan);
void raddle_plan_destroy(raddle_plan *plan);
/* Scratch bytes that plan needs for its declared maxima: exact, the same code as its use. */
size_t raddle_plan_workspace_bytes(const raddle_plan *plan);
raddle_status raddle_plan_bind_workspace(raddle_plan *plan, raddle_workspace *workspace);

/* want: the least state that the call needs. Fails with RADDLE_ERR_STATE when another thread is
 * inside, when the plan is dead, or when nothing was planned yet. On success raddle_plan_leave must
 * follow. */
raddle_status raddle_plan_enter(raddle_plan *plan, raddle_plan_state want);
/* Returns status, what came of the call. RADDLE_ERR_CUDA_ASYNC leaves the plan dead, and its message
 * then says so: the driver does not tell whose work failed, but nothing of this plan on the device
 * is left. */
raddle_status raddle_plan_leave(raddle_plan *plan, raddle_status status);
/* Scratch is bound and carved: makes a workspace of the exact size when the user bound none. Not
 * during capture. */
raddle_status raddle_plan_ensure_workspace(raddle_plan *plan);

#endif

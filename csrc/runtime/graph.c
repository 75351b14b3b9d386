/* graph.c - begin, end and launch of graphs, and the plans that a graph holds. */
#include "runtime/graph.h"

#include <string.h>

#include "base/alloc.h"
#include "base/tensor.h"
#include "cuda/device.h"
#include "cuda/scratch.h"

enum {
    STREAM_NON_BLOCKING = 1,
    CAPTURE_THREAD_LOCAL = 1, /* other threads of the process may do what they like meanwhile */
};

typedef struct noted_plan {
    raddle_plan *plan;        /* retained */
    uint64_t failed_capacity; /* of the plan when it was captured */
} noted_plan;

struct raddle_graph {
    int refs; /* the caller's, and the capturing thread's while it captures; accessed atomically */
    raddle_graph_state state;
    const raddle_cuda_device *device;
    raddle_stream stream;
    bool owns_stream;
    bool shares_scratch; /* with other graphs of the device: cuda/scratch.h */
    CUgraphExec exec;
    noted_plan *plans;
    size_t num_plans, plans_capacity;
};

static _Thread_local raddle_graph *current_graph;

static void set_current(raddle_graph *graph) {
    current_graph = graph;
    raddle_cuda_set_capturing(graph != NULL);
}

/* ---------------------------------------------------------------- plans */

static raddle_status add_plan(raddle_graph *graph, raddle_plan *plan) {
    if (graph->num_plans == graph->plans_capacity) {
        const size_t capacity = graph->plans_capacity > 0 ? 2 * graph->plans_capacity : 4;
        noted_plan *grown = raddle_realloc(graph->plans, capacity * sizeof *grown);
        if (grown == NULL) {
            return raddle_fail_memory(capacity * sizeof *grown);
        }
        graph->plans = grown;
        graph->plans_capacity = capacity;
    }
    graph->plans[graph->num_plans++] =
        (noted_plan){raddle_plan_retain(plan), plan->failed_capacity};
    return RADDLE_OK;
}

raddle_status raddle_graph_note_plan(raddle_plan *plan) {
    raddle_graph *graph = current_graph;
    if (graph == NULL) {
        return RADDLE_OK;
    }
    char text[16];
    RADDLE_REQUIRE(plan->device.type == RADDLE_CUDA && plan->device.index == graph->device->index,
                   RADDLE_ERR_DEVICE,
                   "run: this %s plan is on %s, the graph being captured on cuda:%d; a graph holds "
                   "work of one GPU",
                   plan->ops->family, raddle_device_text(plan->device, text), graph->device->index);
    for (size_t i = 0; i < graph->num_plans; i++) {
        if (graph->plans[i].plan == plan) {
            return RADDLE_OK;
        }
    }
    return add_plan(graph, plan);
}

/* Waits on stream for the plan's last update; refuses what the graph no longer fits. */
static raddle_status ready_plan(raddle_graph *graph, const noted_plan *noted,
                                raddle_stream stream) {
    raddle_plan *plan = noted->plan;
    RADDLE_TRY(raddle_plan_enter(plan, RADDLE_PLAN_PLANNED));
    raddle_status status = RADDLE_OK;
    if (plan->failed_capacity != noted->failed_capacity) {
        graph->state = RADDLE_GRAPH_STALE;
        status = raddle_fail(RADDLE_ERR_STATE,
                             "launch: the graph is stale: its %s plan refused a batch beyond its "
                             "maxima since the capture; make a plan that is large enough and "
                             "capture again",
                             plan->ops->family);
    } else if (plan->staging != NULL) {
        status = raddle_staging_wait(plan->staging, stream);
    }
    status = raddle_plan_leave(plan, status);
    return status == RADDLE_OK ? raddle_graph_note_plan(plan) : status;
}

/* ---------------------------------------------------------------- capture */

static raddle_status open_stream(raddle_graph *graph, raddle_stream stream) {
    const raddle_cuda_driver *driver = graph->device->driver;
    int capture_status = 0;
    if (stream == NULL) {
        CUstream own = NULL;
        RADDLE_TRY(raddle_cuda_check(driver->stream_create(&own, STREAM_NON_BLOCKING),
                                     "making a stream to capture"));
        graph->stream = own;
        graph->owns_stream = true;
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(
        (uintptr_t)stream != 1, RADDLE_ERR_VALUE,
        "stream: the legacy default stream cannot be captured; pass another, or none and "
        "the graph makes its own");
    RADDLE_TRY(raddle_cuda_check(driver->stream_is_capturing(stream, &capture_status),
                                 "asking whether a stream is captured"));
    RADDLE_REQUIRE(capture_status == 0, RADDLE_ERR_STATE,
                   "stream: it is being captured already, by another library or thread");
    graph->stream = stream;
    return RADDLE_OK;
}

static raddle_status open_capture(raddle_graph *graph, raddle_stream stream) {
    bool pushed = false;
    RADDLE_TRY(raddle_cuda_push(graph->device, &pushed));
    raddle_status status = open_stream(graph, stream);
    if (status == RADDLE_OK) {
        status = raddle_cuda_check(
            graph->device->driver->stream_begin_capture(graph->stream, CAPTURE_THREAD_LOCAL),
            "beginning the capture of a stream");
    }
    raddle_cuda_pop(graph->device, pushed);
    return status;
}

raddle_status raddle_graph_begin(raddle_device device, raddle_stream stream,
                                 raddle_graph **out_graph) {
    const raddle_cuda_device *record = NULL;
    RADDLE_REQUIRE(device.type == RADDLE_CUDA, RADDLE_ERR_UNSUPPORTED,
                   "graph: a graph is captured GPU work, and on the CPU work is done when a call "
                   "returns, so there is nothing to capture; call run() itself, or use cuda");
    RADDLE_REQUIRE(current_graph == NULL, RADDLE_ERR_STATE,
                   "graph: this thread captures a graph already; end that first");
    RADDLE_TRY(raddle_cuda_device_get(device.index, &record));
    raddle_graph *graph = raddle_alloc_zero(sizeof *graph);
    if (graph == NULL) {
        return raddle_fail_memory(sizeof *graph);
    }
    graph->refs = 1;
    graph->device = record;
    graph->state = RADDLE_GRAPH_FAILED;
    raddle_status status = open_capture(graph, stream);
    if (status != RADDLE_OK) {
        raddle_graph_destroy(graph);
        return status;
    }
    graph->state = RADDLE_GRAPH_CAPTURING;
    graph->refs = 2;
    set_current(graph);
    *out_graph = graph;
    return RADDLE_OK;
}

/* With the context current. The capture is over whatever comes of it. */
static raddle_status close_capture(raddle_graph *graph, bool keep) {
    const raddle_cuda_driver *driver = graph->device->driver;
    CUgraph captured = NULL;
    CUgraphExec exec = NULL;
    const CUresult result = driver->stream_end_capture(graph->stream, &captured);
    set_current(NULL);
    graph->shares_scratch = raddle_cuda_scratch_is_captured();
    raddle_status status = RADDLE_OK;
    if (keep) {
        status = raddle_cuda_check(result, "ending the capture of a stream");
    }
    if (keep && status == RADDLE_OK) {
        status = raddle_cuda_check(driver->graph_instantiate(&exec, captured, 0),
                                   "making a captured graph ready");
    }
    if (captured != NULL) {
        driver->graph_destroy(captured);
    }
    graph->exec = exec;
    graph->state = exec != NULL ? RADDLE_GRAPH_READY : RADDLE_GRAPH_FAILED;
    return status;
}

/* The capturing thread's reference goes with the capture. */
static raddle_status leave_capture(raddle_graph *graph, bool keep) {
    bool pushed = false;
    raddle_status status = raddle_cuda_push(graph->device, &pushed);
    if (status == RADDLE_OK) {
        status = close_capture(graph, keep);
        raddle_cuda_pop(graph->device, pushed);
    } else {
        set_current(NULL);
        graph->state = RADDLE_GRAPH_FAILED;
    }
    raddle_graph_destroy(graph);
    return status;
}

raddle_status raddle_graph_end(raddle_graph *graph) {
    RADDLE_REQUIRE(graph == current_graph, RADDLE_ERR_STATE,
                   "graph: end without begin on this thread");
    return leave_capture(graph, true);
}

void raddle_graph_abort(raddle_graph *graph) {
    if (graph != NULL && graph == current_graph) {
        leave_capture(graph, false);
    }
}

/* ---------------------------------------------------------------- launch and end */

static raddle_status check_ready(const raddle_graph *graph) {
    RADDLE_REQUIRE(graph->state != RADDLE_GRAPH_CAPTURING, RADDLE_ERR_STATE,
                   "launch: the graph is still being captured; end the capture first");
    RADDLE_REQUIRE(graph->state != RADDLE_GRAPH_FAILED || graph->exec != NULL, RADDLE_ERR_STATE,
                   "launch: the capture of this graph failed; capture a new one");
    RADDLE_REQUIRE(graph->state != RADDLE_GRAPH_FAILED, RADDLE_ERR_STATE,
                   "launch: this graph is dead: an earlier launch of it found that work had failed "
                   "on cuda:%d (an asynchronous error) and the CUDA context was lost; restart the "
                   "process",
                   graph->device->index);
    RADDLE_REQUIRE(graph->state != RADDLE_GRAPH_STALE, RADDLE_ERR_STATE,
                   "launch: the graph is stale: a plan refused a batch beyond its maxima since the "
                   "capture; make a plan that is large enough and capture again");
    return RADDLE_OK;
}

static raddle_status launch_exec(raddle_graph *graph, raddle_stream stream) {
    const raddle_cuda_device *device = graph->device;
    if (graph->shares_scratch) {
        RADDLE_TRY(raddle_cuda_scratch_enter(device, stream));
    }
    raddle_status status =
        raddle_cuda_check(device->driver->graph_launch(graph->exec, stream), "launching a graph");
    if (graph->shares_scratch) {
        raddle_status left = raddle_cuda_scratch_leave(device, stream);
        status = status == RADDLE_OK ? left : status;
    }
    return status;
}

raddle_status raddle_graph_launch(raddle_graph *graph, raddle_stream stream) {
    bool pushed = false;
    RADDLE_TRY(check_ready(graph));
    RADDLE_TRY(raddle_cuda_push(graph->device, &pushed));
    raddle_status status = RADDLE_OK;
    for (size_t i = 0; i < graph->num_plans && status == RADDLE_OK; i++) {
        status = ready_plan(graph, &graph->plans[i], stream);
    }
    if (status == RADDLE_OK) {
        status = launch_exec(graph, stream);
    }
    if (status == RADDLE_ERR_CUDA_ASYNC) {
        graph->state = RADDLE_GRAPH_FAILED; /* its plans find out by their own next calls */
    }
    raddle_cuda_pop(graph->device, pushed);
    return status;
}

void raddle_graph_destroy(raddle_graph *graph) {
    if (graph == NULL || __atomic_sub_fetch(&graph->refs, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    bool pushed = false;
    if (raddle_cuda_push(graph->device, &pushed) == RADDLE_OK) {
        const raddle_cuda_driver *driver = graph->device->driver;
        if (graph->exec != NULL) {
            driver->graph_exec_destroy(graph->exec); /* the driver waits for launches in flight */
        }
        if (graph->owns_stream) {
            driver->stream_destroy(graph->stream);
        }
        raddle_cuda_pop(graph->device, pushed);
    }
    for (size_t i = 0; i < graph->num_plans; i++) {
        raddle_plan_destroy(graph->plans[i].plan);
    }
    raddle_free(graph->plans);
    raddle_free(graph);
}

/* ---------------------------------------------------------------- questions */

raddle_stream raddle_graph_stream(const raddle_graph *graph) {
    return graph->stream;
}

raddle_graph_state raddle_graph_get_state(const raddle_graph *graph) {
    return graph->state;
}

raddle_graph *raddle_graph_current(void) {
    return current_graph;
}

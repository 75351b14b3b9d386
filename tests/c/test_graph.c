// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c cuda/scratch.c runtime/backend.c runtime/backend_cuda.c runtime/staging.c runtime/transfer.c runtime/workspace.c runtime/plan.c runtime/graph.c
// shared: libcuda.so.1=stub_cuda.c
/* test_graph.c - capture, launch, re-planning below a captured graph, and what a capture must not be
 * broken by. A toy plan: update() sends one number, run() copies it to the output. */
#include "check.h"
#include "stub.h"

#include <pthread.h>

#include "base/alloc.h"
#include "cuda/device.h"
#include "cuda/scratch.h"
#include "runtime/graph.h"

enum { MAX_NUMBER = 100 };

static const raddle_device gpu = {RADDLE_CUDA, 0}, second_gpu = {RADDLE_CUDA, 1},
                           cpu = {RADDLE_CPU, 0};

typedef struct toy_plan {
    raddle_plan base;
    raddle_staging staging;
} toy_plan;

static int num_dead_toys;

static void toy_layout(raddle_plan *plan, raddle_arena *arena) {
    (void)plan;
    raddle_arena_take(arena, 64);
}

static void toy_fini(raddle_plan *plan) {
    raddle_staging_fini(&((toy_plan *)plan)->staging);
    num_dead_toys++;
}

static const raddle_plan_ops toy_ops = {.family = "toy", .layout = toy_layout, .fini = toy_fini};

static raddle_plan *make_toy(raddle_device device) {
    raddle_plan *plan = NULL;
    CHECK_OK(raddle_plan_alloc(sizeof(toy_plan), &toy_ops, device, &plan));
    toy_plan *toy = (toy_plan *)plan;
    CHECK_OK(raddle_staging_init(&toy->staging, device, sizeof(int)));
    plan->staging = &toy->staging;
    plan->state = RADDLE_PLAN_READY;
    return plan;
}

static raddle_status send_number(raddle_plan *plan, int number, raddle_stream stream) {
    toy_plan *toy = (toy_plan *)plan;
    bool capturing = false;
    void *slot = NULL;
    RADDLE_TRY(plan->backend->is_capturing(plan->device.index, stream, &capturing));
    RADDLE_REQUIRE(!capturing, RADDLE_ERR_STATE, "plan: the stream is being captured");
    RADDLE_REQUIRE(number <= MAX_NUMBER, RADDLE_ERR_CAPACITY, "number: %d of %d", number,
                   (int)MAX_NUMBER);
    RADDLE_TRY(raddle_plan_ensure_workspace(plan));
    RADDLE_TRY(raddle_staging_acquire(&toy->staging, &slot));
    memcpy(slot, &number, sizeof number);
    const raddle_range all = {0, sizeof number, NULL};
    RADDLE_TRY(raddle_staging_commit(&toy->staging, &all, 1, stream));
    plan->state = RADDLE_PLAN_PLANNED;
    plan->generation++;
    return RADDLE_OK;
}

static raddle_status toy_update(raddle_plan *plan, int number, raddle_stream stream) {
    RADDLE_TRY(raddle_plan_enter(plan, RADDLE_PLAN_READY));
    raddle_status status = send_number(plan, number, stream);
    plan->failed_capacity += status == RADDLE_ERR_CAPACITY;
    return raddle_plan_leave(plan, status);
}

static raddle_status toy_run(raddle_plan *plan, void *out, raddle_stream stream) {
    toy_plan *toy = (toy_plan *)plan;
    RADDLE_TRY(raddle_plan_enter(plan, RADDLE_PLAN_PLANNED));
    raddle_status status = raddle_graph_note_plan(plan);
    if (status == RADDLE_OK) {
        status = raddle_staging_wait(&toy->staging, stream);
    }
    if (status == RADDLE_OK) {
        status = plan->backend->copy(plan->device.index, out, toy->staging.data, sizeof(int),
                                     RADDLE_COPY_ON_DEVICE, stream);
    }
    return raddle_plan_leave(plan, status);
}

static int live_objects(void) {
    const stub_cuda_state *cuda = stub_cuda();
    return cuda->live_streams + cuda->live_graphs + cuda->live_execs;
}

/* ---------------------------------------------------------------- the normal case */

static void test_replay_follows_updates(void) {
    stub_cuda_state *cuda = stub_cuda();
    raddle_plan *plan = make_toy(gpu);
    raddle_graph *graph = NULL;
    int out = -1;
    CHECK_OK(toy_update(plan, 1, NULL));
    CHECK(raddle_graph_current() == NULL);
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK(raddle_graph_current() == graph);
    CHECK_INT(raddle_graph_get_state(graph), RADDLE_GRAPH_CAPTURING);
    raddle_stream stream = raddle_graph_stream(graph);
    CHECK(stream != NULL);
    CHECK_OK(toy_run(plan, &out, stream));
    CHECK_OK(toy_run(plan, &out, stream));
    CHECK_OK(raddle_graph_end(graph));
    CHECK(raddle_graph_current() == NULL);
    CHECK_INT(raddle_graph_get_state(graph), RADDLE_GRAPH_READY);
    CHECK_INT(out, -1); /* nothing ran */
    CHECK_INT((int64_t)cuda->last_graph_nodes, 2);
    CHECK_INT(cuda->num_invalidated, 0);

    for (int number = 1; number <= MAX_NUMBER; number++) {
        CHECK_OK(toy_update(plan, number, NULL));
        CHECK_OK(raddle_graph_launch(graph, NULL));
        CHECK_INT(out, number);
    }
    const int waits = cuda->num_stream_waits;
    CHECK_OK(raddle_graph_launch(graph, stream)); /* not the stream of the update: ordered */
    CHECK_INT(cuda->num_stream_waits, waits + 1);

    /* The graph keeps its plan. */
    const int dead = num_dead_toys;
    raddle_plan_destroy(plan);
    CHECK_INT(num_dead_toys, dead);
    out = -1;
    CHECK_OK(raddle_graph_launch(graph, NULL));
    CHECK_INT(out, MAX_NUMBER);
    raddle_graph_destroy(graph);
    CHECK_INT(num_dead_toys, dead + 1);
    CHECK_INT(live_objects(), 0);
    CHECK_INT(cuda->context_depth, 0);
}

static void test_callers_stream(void) {
    const raddle_cuda_device *device = NULL;
    bool pushed = false;
    CUstream stream = NULL;
    raddle_graph *graph = NULL;
    CHECK_OK(raddle_cuda_device_get(0, &device));
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(device->driver->stream_create(&stream, 0), 0);
    CHECK_OK(raddle_graph_begin(gpu, stream, &graph));
    CHECK(raddle_graph_stream(graph) == (raddle_stream)stream);
    CHECK_OK(raddle_graph_end(graph)); /* an empty graph is one */
    CHECK_OK(raddle_graph_launch(graph, stream));
    raddle_graph_destroy(graph);
    CHECK_INT(stub_cuda()->live_streams, 1); /* the caller's stays */

    CHECK_INT(device->driver->stream_begin_capture(stream, 0), 0);
    CHECK_FAILS(raddle_graph_begin(gpu, stream, &graph), RADDLE_ERR_STATE, "captured already");
    CUgraph captured = NULL;
    CHECK_INT(device->driver->stream_end_capture(stream, &captured), 0);
    device->driver->graph_destroy(captured);
    device->driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
    CHECK_FAILS(raddle_graph_begin(gpu, (raddle_stream)(uintptr_t)1, &graph), RADDLE_ERR_VALUE,
                "legacy default stream");
    CHECK_FAILS(raddle_graph_begin(cpu, NULL, &graph), RADDLE_ERR_UNSUPPORTED, "CPU");
    CHECK_FAILS(raddle_graph_begin((raddle_device){RADDLE_CUDA, 9}, NULL, &graph),
                RADDLE_ERR_DEVICE, "cuda:9");
    CHECK_INT(live_objects(), 0);
}

/* ---------------------------------------------------------------- what a capture refuses */

static void test_refusals_leave_the_capture_whole(void) {
    const raddle_backend *backend = &raddle_backend_cuda;
    stub_cuda_state *cuda = stub_cuda();
    raddle_plan *plan = make_toy(gpu), *other = make_toy(second_gpu), *doomed = make_toy(gpu);
    raddle_graph *graph = NULL, *nested = NULL;
    void *data = NULL;
    raddle_workspace *workspace = NULL;
    int out = 0;
    CHECK_OK(toy_update(plan, 5, NULL));
    CHECK_OK(toy_update(other, 5, NULL));
    const int invalidated = cuda->num_invalidated;
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    raddle_stream stream = raddle_graph_stream(graph);
    CHECK_FAILS(raddle_graph_begin(gpu, NULL, &nested), RADDLE_ERR_STATE, "captures a graph");
    CHECK_FAILS(backend->alloc(0, 10, &data), RADDLE_ERR_STATE, "allocating GPU memory");
    CHECK_FAILS(backend->alloc_host(0, 10, &data), RADDLE_ERR_STATE, "pinned");
    CHECK_FAILS(backend->synchronize(0, stream), RADDLE_ERR_STATE, "waiting for a stream");
    CHECK_FAILS(backend->synchronize(0, NULL), RADDLE_ERR_STATE, "waiting for a stream");
    CHECK_FAILS(raddle_workspace_create(gpu, 10, &workspace), RADDLE_ERR_STATE, "allocating");
    CHECK_FAILS(toy_update(plan, 6, stream), RADDLE_ERR_STATE, "captured");
    CHECK_FAILS(toy_run(other, &out, stream), RADDLE_ERR_DEVICE, "is on cuda:1");
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_STATE, "still being captured");
    raddle_plan_destroy(doomed); /* frees in the middle of a capture */
    CHECK_OK(toy_run(plan, &out, stream));
    CHECK_OK(raddle_graph_end(graph));
    CHECK_FAILS(raddle_graph_end(graph), RADDLE_ERR_STATE, "end without begin");
    CHECK_INT(cuda->num_invalidated, invalidated);
    CHECK_OK(raddle_graph_launch(graph, NULL));
    CHECK_INT(out, 5);
    raddle_graph_destroy(graph);
    raddle_graph_destroy(NULL);
    raddle_graph_abort(NULL);
    raddle_plan_destroy(plan);
    raddle_plan_destroy(other);
    CHECK_INT(live_objects(), 0);
}

/* A synchronisation of a stream that somebody else captures is refused before it breaks that. */
static void test_foreign_capture(void) {
    const raddle_cuda_device *device = NULL;
    bool pushed = false, capturing = false;
    CUstream stream = NULL;
    CUgraph captured = NULL;
    void *data = NULL;
    raddle_plan *plan = make_toy(gpu);
    int out = 0;
    CHECK_OK(toy_update(plan, 7, NULL));
    CHECK_OK(raddle_cuda_device_get(0, &device));
    CHECK_OK(raddle_cuda_push(device, &pushed));
    const int invalidated = stub_cuda()->num_invalidated;
    CHECK_INT(device->driver->stream_create(&stream, 0), 0);
    CHECK_INT(device->driver->stream_begin_capture(stream, 0), 0);
    CHECK_OK(raddle_backend_cuda.is_capturing(0, stream, &capturing));
    CHECK(capturing);
    CHECK_FAILS(raddle_backend_cuda.synchronize(0, stream), RADDLE_ERR_STATE, "captured");
    CHECK_OK(raddle_backend_cuda.alloc(0, 100, &data)); /* theirs is not disturbed */
    raddle_backend_cuda.free(0, data);
    CHECK_OK(toy_run(plan, &out, stream));
    CHECK_INT(device->driver->stream_end_capture(stream, &captured), 0);
    CHECK_INT(stub_cuda()->num_invalidated, invalidated);
    CHECK_INT((int64_t)stub_cuda()->last_graph_nodes, 1);
    device->driver->graph_destroy(captured);
    device->driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
    raddle_plan_destroy(plan);
}

/* ---------------------------------------------------------------- stale, dead, failed */

static void test_stale(void) {
    raddle_plan *plan = make_toy(gpu);
    raddle_graph *graph = NULL;
    int out = 0;
    CHECK_OK(toy_update(plan, 1, NULL));
    CHECK_FAILS(toy_update(plan, 101, NULL), RADDLE_ERR_CAPACITY, "101"); /* before: no matter */
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK_OK(toy_run(plan, &out, raddle_graph_stream(graph)));
    CHECK_OK(raddle_graph_end(graph));
    CHECK_OK(raddle_graph_launch(graph, NULL));
    CHECK_FAILS(toy_update(plan, 102, NULL), RADDLE_ERR_CAPACITY, "102");
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_STATE, "its toy plan refused");
    CHECK_INT(raddle_graph_get_state(graph), RADDLE_GRAPH_STALE);
    CHECK_OK(toy_update(plan, 2, NULL));
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_STATE, "stale");
    CHECK_OK(toy_run(plan, &out, NULL)); /* the plan itself is usable */
    CHECK_INT(out, 2);
    raddle_graph_destroy(graph);
    raddle_plan_destroy(plan);
}

static void test_busy_plan(void) {
    raddle_plan *plan = make_toy(gpu);
    raddle_graph *graph = NULL;
    int out = 0;
    CHECK_OK(toy_update(plan, 1, NULL));
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK_OK(toy_run(plan, &out, raddle_graph_stream(graph)));
    CHECK_OK(raddle_graph_end(graph));
    CHECK_OK(raddle_plan_enter(plan, RADDLE_PLAN_READY));
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_STATE, "another thread");
    CHECK_OK(raddle_plan_leave(plan, RADDLE_OK));
    CHECK_OK(raddle_graph_launch(graph, NULL));
    raddle_graph_destroy(graph);
    raddle_plan_destroy(plan);
}

/* What the driver answers for a call itself is over with the call. */
static void test_errors_of_the_call(void) {
    static const char *const functions[] = {"cuEventSynchronize", "cuMemcpyHtoDAsync_v2",
                                            "cuEventRecord"};
    raddle_plan *plan = make_toy(gpu);
    int out = 0;
    CHECK_OK(toy_update(plan, 1, NULL));
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        stub_fail(functions[i], 0, 701);
        CHECK_FAILS(toy_update(plan, 2, NULL), RADDLE_ERR_CUDA, "answered");
        CHECK_OK(toy_update(plan, 3, NULL));
    }
    stub_fail("cuMemcpyDtoDAsync_v2", 0, 1);
    CHECK_FAILS(toy_run(plan, &out, NULL), RADDLE_ERR_CUDA, "INVALID_VALUE");
    CHECK_OK(toy_run(plan, &out, NULL));
    CHECK_INT(out, 3);
    raddle_plan_destroy(plan);
}

/* Whichever call brings an asynchronous error: it kills the plan of that call and no other. */
static void test_late_error_in_every_call(void) {
    static const char *const functions[] = {"cuEventSynchronize", "cuMemcpyHtoDAsync_v2",
                                            "cuEventRecord", "cuStreamIsCapturing"};
    raddle_plan *bystander = make_toy(gpu);
    int out = 0;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        raddle_plan *plan = make_toy(gpu);
        CHECK_OK(toy_update(plan, 1, NULL));
        stub_fail(functions[i], 0, 719);
        CHECK_FAILS(toy_update(plan, 2, NULL), RADDLE_ERR_CUDA_ASYNC,
                    "; this toy plan on cuda:0 (batches planned: 1) is dead");
        CHECK_INT(plan->state, RADDLE_PLAN_DEAD);
        CHECK_FAILS(toy_update(plan, 2, NULL), RADDLE_ERR_STATE, "this toy plan is dead");
        CHECK_FAILS(toy_run(plan, &out, NULL), RADDLE_ERR_STATE, "asynchronous");
        CHECK_OK(toy_update(bystander, 7, NULL));
        CHECK_OK(toy_run(bystander, &out, NULL));
        CHECK_INT(out, 7);
        raddle_plan_destroy(plan);
    }
    stub_fail("cuMemcpyDtoDAsync_v2", 0, 700); /* a launch brings what an earlier one left */
    CHECK_FAILS(toy_run(bystander, &out, NULL), RADDLE_ERR_CUDA_ASYNC, "ILLEGAL_ADDRESS");
    CHECK_INT(bystander->state, RADDLE_PLAN_DEAD);
    raddle_plan_destroy(bystander);
}

/* Work fails while it runs, behind calls that succeeded: from then on the driver answers everything
 * on that GPU with it. */
static void test_lost_context(void) {
    stub_cuda_state *cuda = stub_cuda();
    raddle_plan *plan = make_toy(gpu), *other = make_toy(second_gpu), *on_cpu = make_toy(cpu);
    raddle_plan *late = make_toy(gpu);
    raddle_graph *graph = NULL, *plain = NULL;
    raddle_staging staging;
    int out = 0, number = 0;
    raddle_status status = RADDLE_OK;
    CHECK_OK(toy_update(plan, 1, NULL));
    CHECK_OK(toy_update(late, 1, NULL));
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK_OK(toy_run(plan, &out, raddle_graph_stream(graph)));
    CHECK_OK(raddle_graph_end(graph));
    CHECK_OK(raddle_graph_begin(gpu, NULL, &plain));
    CHECK_OK(raddle_graph_end(plain));

    cuda->is_lazy = true;
    cuda->fail_work = 700;
    CHECK_OK(raddle_graph_launch(graph, NULL)); /* what it queues fails later */
    while (status == RADDLE_OK && number <= RADDLE_STAGING_SLOTS) {
        status = toy_update(plan, ++number, NULL);
    }
    CHECK_FAILS(status, RADDLE_ERR_CUDA_ASYNC, "waiting for a copy to the GPU: the CUDA driver");
    CHECK_INT(number, RADDLE_STAGING_SLOTS + 1); /* the first one that waits */
    CHECK_INT(plan->state, RADDLE_PLAN_DEAD);
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_STATE, "this toy plan is dead");
    CHECK_FAILS(raddle_graph_launch(plain, NULL), RADDLE_ERR_CUDA_ASYNC, "launching a graph");
    CHECK_INT(raddle_graph_get_state(plain), RADDLE_GRAPH_FAILED);
    CHECK_FAILS(toy_run(late, &out, NULL), RADDLE_ERR_CUDA_ASYNC, "restart the process");
    CHECK_FAILS(raddle_staging_init(&staging, gpu, 8), RADDLE_ERR_CUDA_ASYNC, "allocating");
    CHECK_FAILS(raddle_backend_cuda.synchronize(0, NULL), RADDLE_ERR_CUDA_ASYNC, "a stream");

    for (int i = 0; i < 2; i++) { /* another GPU and the CPU go on */
        raddle_plan *usable = i == 0 ? other : on_cpu;
        CHECK_OK(toy_update(usable, 5 + i, NULL));
        CHECK_OK(toy_run(usable, &out, NULL));
        CHECK_OK(usable->backend->synchronize(usable->device.index, NULL));
        CHECK_INT(out, 5 + i);
        raddle_plan_destroy(usable);
    }
    raddle_graph_destroy(graph);
    raddle_graph_destroy(plain);
    raddle_plan_destroy(plan);
    raddle_plan_destroy(late);
    CHECK_INT(live_objects(), 0);
    CHECK_INT(cuda->live_allocs + cuda->live_host_allocs + cuda->live_events, 0);
    CHECK_INT(cuda->context_depth, 0);
    cuda->is_lazy = false;
    cuda->lost[0] = 0;
}

/* Each driver call on the way fails once: a plain error, nothing left, the next capture works. */
static void test_failures(void) {
    static const struct {
        const char *function;
        bool at_begin;
    } steps[] = {{"cuStreamCreate", true},
                 {"cuStreamBeginCapture_v2", true},
                 {"cuStreamEndCapture", false},
                 {"cuGraphInstantiateWithFlags", false}};
    raddle_plan *plan = make_toy(gpu);
    int out = 0;
    CHECK_OK(toy_update(plan, 3, NULL));
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        raddle_graph *graph = NULL;
        stub_fail(steps[i].function, 0, 1);
        if (steps[i].at_begin) {
            CHECK_FAILS(raddle_graph_begin(gpu, NULL, &graph), RADDLE_ERR_CUDA, "INVALID_VALUE");
            CHECK(graph == NULL);
        } else {
            CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
            CHECK_OK(toy_run(plan, &out, raddle_graph_stream(graph)));
            CHECK_FAILS(raddle_graph_end(graph), RADDLE_ERR_CUDA, "INVALID_VALUE");
            CHECK_INT(raddle_graph_get_state(graph), RADDLE_GRAPH_FAILED);
            CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_STATE, "capture a new one");
            raddle_graph_destroy(graph);
        }
        CHECK(raddle_graph_current() == NULL);
        CHECK_INT(live_objects(), 0);
        CHECK_INT(stub_cuda()->context_depth, 0);
    }
    raddle_graph *graph = NULL;
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK_OK(toy_run(plan, &out, raddle_graph_stream(graph)));
    raddle_graph_abort(graph);
    raddle_graph_abort(graph);
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_STATE, "failed");
    raddle_graph_destroy(graph);
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK_OK(toy_run(plan, &out, raddle_graph_stream(graph)));
    CHECK_OK(raddle_graph_end(graph));
    stub_fail("cuGraphLaunch", 0, 701); /* of this launch alone */
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_CUDA, "launching a graph");
    CHECK_OK(raddle_graph_launch(graph, NULL));
    CHECK_INT(out, 3);
    stub_fail("cuGraphLaunch", 0, 700);
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_CUDA_ASYNC, "launching a graph");
    CHECK_INT(raddle_graph_get_state(graph), RADDLE_GRAPH_FAILED);
    CHECK_FAILS(raddle_graph_launch(graph, NULL), RADDLE_ERR_STATE, "this graph is dead");
    raddle_graph_destroy(graph);
    raddle_plan_destroy(plan);
    CHECK_INT(live_objects(), 0);
}

static void *end_elsewhere(void *graph) {
    raddle_status status = raddle_graph_end(graph);
    raddle_graph_abort(graph); /* of no effect here */
    return (void *)(uintptr_t)status;
}

static void test_other_thread(void) {
    raddle_graph *graph = NULL;
    pthread_t thread;
    void *status = NULL;
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK(pthread_create(&thread, NULL, end_elsewhere, graph) == 0);
    pthread_join(thread, &status);
    CHECK_INT((int)(uintptr_t)status, RADDLE_ERR_STATE);
    CHECK(raddle_graph_current() == graph);
    raddle_graph_destroy(graph); /* the capturing thread still holds it */
    CHECK_INT(raddle_graph_get_state(graph), RADDLE_GRAPH_CAPTURING);
    raddle_graph_abort(graph);
    CHECK_INT(live_objects(), 0);
}

/* ---------------------------------------------------------------- scratch of cublasLt */

static raddle_graph *capture_scratch(const raddle_cuda_device *device, void **out_data) {
    raddle_graph *graph = NULL;
    size_t bytes = 0;
    bool pushed = false;
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_OK(raddle_cuda_scratch_get(device, raddle_graph_stream(graph), out_data, &bytes));
    CHECK_INT((int64_t)bytes, 32 << 20);
    void *again = NULL, *branch = NULL;
    CHECK_OK(raddle_cuda_scratch_get(device, raddle_graph_stream(graph), &again, &bytes));
    CHECK(again == *out_data);
    CUstream fork = NULL;
    CHECK_INT(device->driver->stream_create(&fork, 0), 0);
    CHECK_INT(device->driver->stream_begin_capture(fork, 0), 0);
    CHECK_FAILS(raddle_cuda_scratch_get(device, fork, &branch, &bytes), RADDLE_ERR_UNSUPPORTED,
                "one stream");
    CUgraph captured = NULL;
    device->driver->stream_end_capture(fork, &captured);
    device->driver->graph_destroy(captured);
    device->driver->stream_destroy(fork);
    raddle_cuda_pop(device, pushed);
    CHECK_OK(raddle_graph_end(graph));
    return graph;
}

static void test_scratch(void) {
    stub_cuda_state *cuda = stub_cuda();
    const raddle_cuda_device *device = NULL;
    void *first = NULL, *second = NULL, *eager = NULL, *other = NULL;
    size_t bytes = 0;
    bool pushed = false;
    CUstream stream = NULL;
    CHECK_OK(raddle_cuda_device_get(0, &device));
    raddle_graph *a = capture_scratch(device, &first);
    raddle_graph *b = capture_scratch(device, &second);
    CHECK(first == second); /* one block for all graphs: their launches are ordered */
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(device->driver->stream_create(&stream, 0), 0);
    CHECK_OK(raddle_cuda_scratch_get(device, NULL, &eager, &bytes));
    CHECK_OK(raddle_cuda_scratch_get(device, stream, &other, &bytes));
    CHECK(eager != first && other != first && eager != other);
    CHECK_OK(raddle_cuda_scratch_get(device, NULL, &second, &bytes));
    CHECK(second == eager);

    const int waits = cuda->num_stream_waits;
    CHECK_OK(raddle_graph_launch(a, NULL));
    CHECK_OK(raddle_graph_launch(b, NULL));
    CHECK_INT(cuda->num_stream_waits, waits); /* one stream orders them */
    CHECK_OK(raddle_graph_launch(a, stream));
    CHECK_INT(cuda->num_stream_waits, waits + 1);
    CHECK_OK(raddle_graph_launch(b, NULL));
    CHECK_INT(cuda->num_stream_waits, waits + 2);
    raddle_graph_destroy(a);
    raddle_graph_destroy(b);

    raddle_graph *plain = NULL; /* a graph without products pays nothing */
    CHECK_OK(raddle_graph_begin(gpu, NULL, &plain));
    CHECK_OK(raddle_graph_end(plain));
    CHECK_OK(raddle_graph_launch(plain, stream));
    CHECK_INT(cuda->num_stream_waits, waits + 2);
    raddle_graph_destroy(plain);

    /* More streams than blocks: the oldest block moves on, and nothing overlaps. */
    CUstream many[40];
    const int live = cuda->live_allocs;
    for (int i = 0; i < 40; i++) {
        CHECK_INT(device->driver->stream_create(&many[i], 0), 0);
        CHECK_OK(raddle_cuda_scratch_get(device, many[i], &other, &bytes));
    }
    CHECK(cuda->live_allocs <= live + 32);
    for (int i = 0; i < 40; i++) {
        device->driver->stream_destroy(many[i]);
    }
    device->driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
    CHECK_INT(live_objects(), 0);
    CHECK_INT(cuda->context_depth, 0);
}

int main(void) {
    test_replay_follows_updates();
    test_callers_stream();
    test_refusals_leave_the_capture_whole();
    test_foreign_capture();
    test_stale();
    test_busy_plan();
    test_errors_of_the_call();
    test_late_error_in_every_call();
    test_lost_context();
    test_failures();
    test_other_thread();
    CHECK_INT(stub_cuda()->live_allocs + stub_cuda()->live_host_allocs, 0);
    test_scratch();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

// needs: base/*.c cuda/*.c runtime/*.c attention/attention_plan.c attention/attention_batch.c attention/attention_spec.c attention/attention_schedule.c attention/attention_cuda.c attention/attention_choice.c attention/attention_check.c attention/attention_device_plan.c attention/attention_variant.c
// shared: libcuda.so.1=stub_cuda.c libnvrtc.so.13=stub_nvrtc.c
/* test_attention_device_run.c - planning by a kernel, seen from the launches: who may start before
 * its predecessor ends, who waits for whom, what a capture takes. The stub runs no kernel. */
#include "check.h"
#include "stub.h"

#include "attention/attention.h"
#include "base/alloc.h"
#include "cpu/vec.h"
#include "cuda/sources.h"
#include "runtime/graph.h"

/* The CPU's part of the family is another's. */
const raddle_attention_ops raddle_attention_ops_cpu = {0};

const raddle_vec *raddle_vec_get(void) {
    return NULL; /* only page tables on the host are copied by its loops */
}

const raddle_source raddle_sources[] = {
    {"attention/attention_decode.cu", "extern \"C\" ... attention_decode\n", 34},
    {"attention/attention_plan.cu", "extern \"C\" ... attention_plan\n", 32},
    {0}};
const int raddle_num_sources = 2;

enum { BATCH = 2, HEADS = 4, DIM = 64, PAGES = 8, PAGE_SIZE = 16 };

static const raddle_device gpu = {RADDLE_CUDA, 0};

/* The stub's device memory is the host's. */
typedef struct world {
    raddle_plan *plan;
    int32_t indptr[BATCH + 1], indices[4], last[BATCH];
    _Alignas(16) char q[BATCH * HEADS * DIM * 2];
    _Alignas(16) char out[BATCH * HEADS * DIM * 2];
    _Alignas(16) char cache[2 * PAGES * PAGE_SIZE * DIM * 2];
    raddle_tensor tensors[5];
    raddle_kv_cache kv;
    raddle_attention_batch batch;
    raddle_attention_args args;
} world;

static raddle_tensor vector(const char *name, int32_t *data, int64_t count, raddle_device device) {
    return (raddle_tensor){.data = data,
                           .shape = {count},
                           .stride = {1},
                           .ndim = 1,
                           .dtype = RADDLE_I32,
                           .device = device,
                           .name = name};
}

static raddle_tensor rows(const char *name, void *data) {
    return (raddle_tensor){.data = data,
                           .shape = {BATCH, HEADS, DIM},
                           .stride = {HEADS * DIM, DIM, 1},
                           .ndim = 3,
                           .dtype = RADDLE_F16,
                           .device = gpu,
                           .name = name};
}

static void open_world(world *w) {
    memset(w, 0, sizeof *w);
    const raddle_attention_spec spec = {
        .struct_size = sizeof spec,
        .device = gpu,
        .q_dtype = RADDLE_F16,
        .num_qo_heads = HEADS,
        .num_kv_heads = 1,
        .head_dim_qk = DIM,
        .page_size = PAGE_SIZE,
        .window_left = -1,
        .max_batch = BATCH,
        .max_pages = PAGES,
        .max_qo_len = 1,
    };
    CHECK_OK(raddle_attention_plan_create(&spec, &w->plan));
    memcpy(w->indptr, (const int32_t[]){0, 2, 3}, sizeof w->indptr);
    memcpy(w->last, (const int32_t[]){4, 5}, sizeof w->last);
    w->tensors[0] = vector("indptr", w->indptr, BATCH + 1, gpu);
    w->tensors[1] = vector("indices", w->indices, 4, gpu);
    w->tensors[2] = vector("last_page_len", w->last, BATCH, gpu);
    w->tensors[3] = rows("q", w->q);
    w->tensors[4] = rows("out", w->out);
    w->kv = (raddle_kv_cache){.k = w->cache,
                              .v = w->cache + sizeof w->cache / 2,
                              .k_stride_page = PAGE_SIZE * DIM,
                              .k_stride_token = DIM,
                              .k_stride_head = DIM,
                              .v_stride_page = PAGE_SIZE * DIM,
                              .v_stride_token = DIM,
                              .v_stride_head = DIM,
                              .num_pages = PAGES,
                              .page_size = PAGE_SIZE,
                              .num_kv_heads = 1,
                              .head_dim_qk = DIM,
                              .head_dim_vo = DIM,
                              .k_dtype = RADDLE_F16,
                              .v_dtype = RADDLE_F16,
                              .device = gpu};
    w->batch = (raddle_attention_batch){.struct_size = sizeof w->batch,
                                        .kv_indptr = &w->tensors[0],
                                        .kv_indices = &w->tensors[1],
                                        .last_page_len = &w->tensors[2]};
    w->args = (raddle_attention_args){
        .struct_size = sizeof w->args, .q = &w->tensors[3], .kv = &w->kv, .out = &w->tensors[4]};
}

static raddle_status update(world *w, bool on_device, raddle_stream stream) {
    w->batch.on_device = on_device;
    return raddle_attention_plan_update(w->plan, &w->batch, stream);
}

/* A run's launch: 1 when it may start before its predecessor has ended. */
static int run(world *w, raddle_stream stream) {
    const int launches = stub_cuda()->num_launches;
    CHECK_OK(raddle_attention_plan_run(w->plan, &w->args, stream));
    CHECK_INT(stub_cuda()->num_launches, launches + 1);
    CHECK_TEXT(stub_cuda()->launch.function, "attention_decode");
    return stub_cuda()->launch.programmatic;
}

static void test_the_first_run_waits(void) {
    world w;
    open_world(&w);
    const int syncs = stub_cuda()->num_syncs, event_syncs = stub_cuda()->num_event_syncs;
    CHECK_OK(update(&w, true, NULL));
    CHECK_TEXT(stub_cuda()->launch.function, "attention_plan");
    CHECK_INT(stub_cuda()->launch.programmatic, 0);
    CHECK_INT(stub_cuda()->launch.grid[0], 2); /* one plans, one copies */
    CHECK_INT(stub_cuda()->num_syncs, syncs);
    CHECK_INT(stub_cuda()->num_event_syncs, event_syncs);
    CHECK_INT(run(&w, NULL), 0);
    CHECK_INT(run(&w, NULL), 1);
    CHECK_OK(update(&w, false, NULL));
    CHECK_INT(run(&w, NULL), 1);
    CHECK_OK(update(&w, true, NULL));
    CHECK_OK(update(&w, true, NULL));
    stub_cuda()->fail_function = "cuLaunchKernelEx";
    stub_cuda()->fail_skip = 0;
    stub_cuda()->fail_result = 1;
    CHECK(raddle_attention_plan_run(w.plan, &w.args, NULL) != RADDLE_OK);
    CHECK_INT(run(&w, NULL), 0); /* the one that failed was not the first */
    CHECK_INT(run(&w, NULL), 1);
    raddle_plan_destroy(w.plan);
}

static void test_a_capture_counts_for_itself(void) {
    world w;
    raddle_graph *graph = NULL;
    open_world(&w);
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    CHECK_FAILS(update(&w, true, raddle_graph_stream(graph)), RADDLE_ERR_STATE,
                "call it once before the capture");
    CHECK_OK(raddle_graph_end(graph));
    raddle_graph_destroy(graph);

    CHECK_OK(update(&w, true, NULL)); /* its first run is below, behind the capture */
    CHECK_OK(raddle_graph_begin(gpu, NULL, &graph));
    raddle_stream stream = raddle_graph_stream(graph);
    CHECK_INT(run(&w, stream), 1); /* a graph starts when its predecessors have ended */
    CHECK_FAILS(update(&w, false, stream), RADDLE_ERR_STATE, "on_device=True");
    CHECK_OK(update(&w, true, stream));
    CHECK_INT(run(&w, stream), 0);
    CHECK_INT(run(&w, stream), 1);
    CHECK_OK(raddle_graph_end(graph));
    CHECK_INT(stub_cuda()->num_invalidated, 0);
    CHECK_OK(raddle_graph_launch(graph, NULL));
    CHECK_FAILS(raddle_attention_plan_run(w.plan, &w.args, NULL), RADDLE_ERR_STATE,
                "plan outside of it");
    CHECK_OK(update(&w, true, NULL));
    CHECK_INT(run(&w, NULL), 0);
    CHECK_OK(update(&w, false, NULL));
    CHECK_INT(run(&w, NULL), 1);
    raddle_plan_destroy(w.plan);
    CHECK_OK(raddle_graph_launch(graph, NULL)); /* the graph keeps the plan that it writes */
    raddle_graph_destroy(graph);
}

static void test_other_streams_wait(void) {
    world w;
    raddle_graph *graphs[2] = {NULL, NULL};
    raddle_stream streams[2];
    for (int i = 0; i < 2; i++) { /* for their streams */
        CHECK_OK(raddle_graph_begin(gpu, NULL, &graphs[i]));
        CHECK_OK(raddle_graph_end(graphs[i]));
        streams[i] = raddle_graph_stream(graphs[i]);
    }
    open_world(&w);
    const stub_cuda_state *cuda = stub_cuda();
    CHECK_OK(update(&w, false, streams[0]));
    int waits = cuda->num_stream_waits;
    CHECK_OK(update(&w, true, streams[1])); /* for the host's copy */
    CHECK_INT(cuda->num_stream_waits, waits + 1);
    CHECK_INT(run(&w, streams[1]), 0);
    CHECK_INT(cuda->num_stream_waits, waits + 1);
    run(&w, streams[0]); /* for the kernel that plans */
    CHECK_INT(cuda->num_stream_waits, waits + 2);
    waits = cuda->num_stream_waits;
    CHECK_OK(update(&w, false, streams[0])); /* a copy does, too */
    CHECK_INT(cuda->num_stream_waits, waits + 1);
    run(&w, streams[0]);
    CHECK_INT(cuda->num_stream_waits, waits + 1);
    raddle_plan_destroy(w.plan);
    raddle_graph_destroy(graphs[0]);
    raddle_graph_destroy(graphs[1]);
}

int main(void) {
    test_the_first_run_waits();
    test_a_capture_counts_for_itself();
    test_other_streams_wait();
    return check_report();
}

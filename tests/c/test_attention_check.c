// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c cuda/notice.c cuda/nvrtc.c cuda/cache.c cuda/image.c cuda/kernel.c cuda/count.c cuda/bundle.c runtime/backend.c runtime/backend_cuda.c attention/attention_check.c attention/attention_cache.c
// shared: libcuda.so.1=stub_cuda.c libnvrtc.so.13=stub_nvrtc.c
/* test_attention_check.c - RADDLE_CHECK: what a kernel reported reaches the next call, once. The
 * stub runs no kernel, and its device memory is the host's: the test writes what kernels would. */
#include "check.h"
#include "stub.h"

#include <sys/wait.h>
#include <unistd.h>

#include "attention/attention.h"
#include "cuda/device.h"
#include "cuda/sources.h"

const raddle_source raddle_sources[] = {
    {"attention/attention_append.cu", "extern \"C\" ... attention_append\n", 34}, {0}};
const int raddle_num_sources = 1;

static const raddle_device gpu = {RADDLE_CUDA, 0}, second_gpu = {RADDLE_CUDA, 1},
                           cpu = {RADDLE_CPU, 0};

static raddle_attention_plan make_plan(raddle_device device) {
    raddle_attention_plan plan = {.base = {.device = device}};
    CHECK_OK(raddle_backend_for(device, &plan.base.backend));
    CHECK_OK(raddle_attention_check_init(&plan));
    return plan;
}

/* ---------------------------------------------------------------- appends */

/* Two rows into a cache of 4 pages of 8 tokens, one head of 16 bytes. */
static raddle_status append_rows(raddle_device device, raddle_stream stream) {
    static _Alignas(16) char memory[4096];
    const raddle_tensor rows = {.data = memory,
                                .shape = {2, 1, 8},
                                .stride = {8, 8, 1},
                                .ndim = 3,
                                .dtype = RADDLE_F16,
                                .device = device,
                                .name = "k"};
    const raddle_tensor slots = {.data = memory,
                                 .shape = {2},
                                 .stride = {1},
                                 .ndim = 1,
                                 .dtype = RADDLE_I64,
                                 .device = device,
                                 .name = "slot_mapping"};
    const raddle_kv_cache cache = {.k = memory,
                                   .v = memory + 1024,
                                   .k_stride_page = 64,
                                   .k_stride_token = 8,
                                   .k_stride_head = 8,
                                   .v_stride_page = 64,
                                   .v_stride_token = 8,
                                   .v_stride_head = 8,
                                   .num_pages = 4,
                                   .page_size = 8,
                                   .num_kv_heads = 1,
                                   .head_dim_qk = 8,
                                   .head_dim_vo = 8,
                                   .k_dtype = RADDLE_F16,
                                   .v_dtype = RADDLE_F16,
                                   .device = device};
    return raddle_attention_append_slots(&rows, &rows, &slots, &cache, stream);
}

/* The record that the last launch was given; NULL: none. */
static raddle_attention_append_error *launched_record(void) {
    raddle_attention_append_error *record = NULL;
    const size_t at = offsetof(raddle_attention_append_params, error);
    CHECK(at + sizeof record <= sizeof stub_cuda()->launch.params);
    CHECK_TEXT(stub_cuda()->launch.function, "attention_append");
    memcpy(&record, stub_cuda()->launch.params + at, sizeof record);
    return record;
}

static void fill_record(raddle_attention_append_error *record, int32_t what, int64_t value,
                        int64_t limit) {
    *record = (raddle_attention_append_error){
        .claimed = 1, .what = what, .row = 3, .value = value, .limit = limit};
}

static void test_appends(void) {
    static const struct {
        int32_t what;
        int64_t value, limit;
        const char *words;
    } cases[] = {
        {RADDLE_APPEND_SLOT, INT64_MIN, 32,
         "slot_mapping: an earlier append on cuda:0 met slot -9223372036854775808 at row 3, out of "
         "range for a cache of 32 slots; the row was skipped (RADDLE_CHECK)"},
        {RADDLE_APPEND_BATCH_INDEX, 7, 2,
         "batch_indices: an earlier append on cuda:0 met request 7 at row 3, out of range for 2 "
         "requests;"},
        {RADDLE_APPEND_POSITION, -1, 16,
         "positions: an earlier append on cuda:0 met position -1 at row 3, but the pages of its "
         "request hold 16 tokens;"},
        {RADDLE_APPEND_INDPTR, 5, 4,
         "kv_indptr: an earlier append on cuda:0 met a page table that begins at 5 at row 3, and "
         "ends at 4: expected a rising range within kv_indices;"},
        {RADDLE_APPEND_PAGE, 9, 4,
         "kv_indices: an earlier append on cuda:0 met page id 9 at row 3, out of range for a cache "
         "of 4 pages;"},
    };
    raddle_attention_plan plan = make_plan(gpu), on_cpu = make_plan(cpu);
    raddle_attention_plan other = make_plan(second_gpu);
    CHECK_OK(raddle_attention_check_report(&plan, NULL)); /* before the first append */
    CHECK_OK(append_rows(gpu, NULL));
    raddle_attention_append_error *record = launched_record();
    CHECK(record != NULL && record->claimed == 0 && record->what == 0);
    const int allocs = stub_cuda()->num_allocs;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fill_record(record, cases[i].what, cases[i].value, cases[i].limit);
        const int launches = stub_cuda()->num_launches;
        CHECK_OK(raddle_attention_check_report(&on_cpu, NULL));
        CHECK_OK(raddle_attention_check_report(&other, NULL));
        CHECK_FAILS(i % 2 == 0 ? append_rows(gpu, NULL)
                               : raddle_attention_check_report(&plan, NULL),
                    RADDLE_ERR_VALUE, cases[i].words);
        CHECK_INT(stub_cuda()->num_launches, launches);
        CHECK_INT(record->claimed, 0); /* ready for the next */
        CHECK_OK(append_rows(gpu, NULL));
        CHECK(launched_record() == record);
        CHECK_OK(raddle_attention_check_report(&plan, NULL)); /* said once */
    }
    record->claimed = 1; /* a row that is about to say more */
    CHECK_OK(append_rows(gpu, NULL));
    CHECK_INT(record->claimed, 1);
    CHECK_INT(stub_cuda()->num_allocs, allocs);
    raddle_attention_check_fini(&plan);
    raddle_attention_check_fini(&on_cpu);
    raddle_attention_check_fini(&other);
}

/* A capture is not waited in; what its launches meet is reported behind it. */
static void test_captured_append(void) {
    const raddle_cuda_device *devices[2] = {NULL, NULL};
    CHECK_OK(append_rows(gpu, NULL));
    raddle_attention_append_error *record = launched_record();
    for (int i = 0; i < 2; i++) {
        bool pushed = false;
        CUstream stream = NULL;
        CUgraph graph = NULL;
        CHECK_OK(raddle_cuda_device_get(i, &devices[i]));
        CHECK_OK(raddle_cuda_push(devices[i], &pushed));
        CHECK_INT(devices[i]->driver->stream_create(&stream, 0), 0);
        CHECK_INT(devices[i]->driver->stream_begin_capture(stream, 1), 0);
        fill_record(record, RADDLE_APPEND_SLOT, 32, 32);
        const int syncs = stub_cuda()->num_syncs;
        if (i == 0) {
            CHECK_OK(append_rows(gpu, stream));
            CHECK(launched_record() == record);
        } else {
            CHECK_FAILS(append_rows(second_gpu, stream), RADDLE_ERR_STATE, "before the capture");
        }
        CHECK_INT(stub_cuda()->num_syncs, syncs);
        CHECK_INT(devices[i]->driver->stream_end_capture(stream, &graph), 0);
        CHECK_INT((int64_t)stub_cuda()->last_graph_nodes, 1 - i);
        devices[i]->driver->graph_destroy(graph);
        devices[i]->driver->stream_destroy(stream);
        raddle_cuda_pop(devices[i], pushed);
        CHECK_FAILS(append_rows(gpu, NULL), RADDLE_ERR_VALUE, "met slot 32 at row 3");
    }
    CHECK_INT(stub_cuda()->context_depth, 0);
}

/* Making or reading the record fails: a plain error, no block left, and the next append goes. */
static void test_failures(void) {
    static const char *const functions[] = {"cuMemAlloc_v2", "cuMemsetD8Async",
                                            "cuStreamSynchronize"};
    const int live = stub_cuda()->live_allocs;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        stub_fail(functions[i], 0, 1);
        CHECK_FAILS(append_rows(second_gpu, NULL), RADDLE_ERR_CUDA, "INVALID_VALUE");
        CHECK_INT(stub_cuda()->live_allocs, live);
    }
    CHECK_OK(append_rows(second_gpu, NULL));
    stub_fail("cuMemcpyDtoHAsync_v2", 0, 719);
    CHECK_FAILS(append_rows(second_gpu, NULL), RADDLE_ERR_CUDA_ASYNC, "asynchronous");
    CHECK_INT(stub_cuda()->live_allocs, live + 1);
    CHECK_INT(stub_cuda()->context_depth, 0);
}

static void test_check_is_off(void) {
    setenv("RADDLE_CHECK", "0", 1);
    raddle_attention_plan plan = make_plan(gpu);
    const stub_cuda_state *cuda = stub_cuda();
    CHECK(plan.params.error == NULL && plan.params.check == 0);
    for (int i = 0; i < 2; i++) {
        CHECK_OK(append_rows(gpu, NULL));
        CHECK(launched_record() == NULL);
        const int calls = cuda->calls;
        CHECK_OK(raddle_attention_check_report(&plan, NULL));
        CHECK_INT(cuda->calls, calls);
    }
    CHECK_INT(cuda->num_launches, 2);
    CHECK_INT(cuda->num_allocs + cuda->num_syncs + cuda->num_event_syncs, 0);
}

/* ---------------------------------------------------------------- runs */

static void test_runs(raddle_device device) {
    raddle_attention_plan plan = make_plan(device);
    CHECK_INT(plan.params.check, 1);
    CHECK_INT(plan.params.error[0], 0);
    CHECK_INT(plan.params.error[1], 0);
    CHECK_OK(raddle_attention_check_report(&plan, NULL));
    plan.params.error[0] = 4097;
    plan.params.error[1] = 18;
    CHECK_FAILS(raddle_attention_check_report(&plan, NULL), RADDLE_ERR_VALUE,
                "page id 4097 at position 17");
    CHECK_OK(raddle_attention_check_report(&plan, NULL)); /* said once */
    raddle_attention_check_fini(&plan);
    CHECK(plan.params.error == NULL);
}

int main(void) {
    setenv("RADDLE_CACHE_DIR", "", 1);
    CHECK_IN_CHILD(test_check_is_off);
    setenv("RADDLE_CHECK", "1", 1);
    test_runs(cpu);
    test_runs(gpu);
    CHECK_INT(stub_cuda()->live_allocs, 0);
    test_appends();
    test_captured_append();
    test_failures();
    CHECK_INT(stub_cuda()->live_allocs, 2); /* a GPU's record stays */
    return check_report();
}

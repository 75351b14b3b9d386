// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c runtime/backend.c runtime/backend_cuda.c runtime/staging.c runtime/transfer.c
// shared: libcuda.so.1=stub_cuda.c
/* test_staging.c - the ring of pinned slots and the CUDA table below it, with a driver that runs
 * nothing before somebody waits: a slot that were written too early would show in what arrives. */
#include "check.h"
#include "stub.h"

#include "base/alloc.h"
#include "cuda/device.h"
#include "runtime/staging.h"

enum { BYTES = 256 * 1024, FAR = 192 * 1024, ROUNDS = 20 };

static const raddle_device gpu = {RADDLE_CUDA, 0};

/* Twenty updates without a wait in between; behind each, the device block is copied out. */
static void test_ring(void) {
    stub_cuda_state *cuda = stub_cuda();
    const raddle_backend *backend = &raddle_backend_cuda;
    raddle_staging staging;
    unsigned char *seen = raddle_alloc_zero((size_t)ROUNDS * BYTES);
    CHECK_OK(raddle_staging_init(&staging, gpu, BYTES));
    void *const data = staging.data;
    cuda->is_lazy = true;
    const int waits = cuda->num_event_syncs;
    for (int i = 0; i < ROUNDS; i++) {
        void *slot = NULL, *again = NULL;
        CHECK_OK(raddle_staging_acquire(&staging, &slot));
        CHECK_OK(raddle_staging_acquire(&staging, &again));
        CHECK(slot == again);
        memset(slot, i + 1, BYTES);
        const raddle_range all = {0, BYTES, NULL};
        CHECK_OK(raddle_staging_commit(&staging, &all, 1, NULL));
        CHECK_OK(backend->copy(0, seen + (size_t)i * BYTES, staging.data, BYTES,
                               RADDLE_COPY_TO_HOST, NULL));
        if (i < RADDLE_STAGING_SLOTS) {
            CHECK_INT(cuda->num_event_syncs, waits); /* the first ones need not wait */
        }
    }
    CHECK(cuda->num_event_syncs > waits);
    CHECK_OK(backend->synchronize(0, NULL));
    for (int i = 0; i < ROUNDS; i++) {
        CHECK(is_filled(seen + (size_t)i * BYTES, BYTES, (unsigned char)(i + 1)));
    }
    CHECK(staging.data == data); /* a captured graph goes on reading there */

    /* Ranges: only what is named moves. */
    void *slot = NULL;
    CHECK_OK(raddle_staging_acquire(&staging, &slot));
    memset(slot, 99, BYTES);
    const raddle_range parts[] = {{0, 16, NULL}, {512, 0, NULL}, {FAR, 32, NULL}};
    CHECK_OK(raddle_staging_commit(&staging, parts, 3, NULL));
    CHECK_OK(backend->copy(0, seen, staging.data, BYTES, RADDLE_COPY_TO_HOST, NULL));
    CHECK_OK(backend->synchronize(0, NULL));
    CHECK(is_filled(seen, 16, 99));
    CHECK(is_filled(seen + 16, FAR - 16, ROUNDS));
    CHECK(is_filled(seen + FAR, 32, 99));
    CHECK(is_filled(seen + FAR + 32, BYTES - FAR - 32, ROUNDS));

    /* Ending with copies in flight waits for them. */
    CHECK_OK(raddle_staging_acquire(&staging, &slot));
    const raddle_range all = {0, BYTES, NULL};
    CHECK_OK(raddle_staging_commit(&staging, &all, 1, NULL));
    raddle_staging_fini(&staging);
    raddle_staging_fini(&staging); /* twice is once */
    cuda->is_lazy = false;
    raddle_free(seen);
    CHECK_INT(cuda->live_allocs + cuda->live_host_allocs + cuda->live_events, 0);
}

static void test_other_stream(void) {
    stub_cuda_state *cuda = stub_cuda();
    const raddle_cuda_device *device = NULL;
    raddle_staging staging;
    void *slot = NULL;
    bool pushed = false;
    CUstream stream = NULL;
    CHECK_OK(raddle_staging_init(&staging, gpu, BYTES));
    CHECK_OK(raddle_staging_acquire(&staging, &slot));
    const raddle_range all = {0, BYTES, NULL};
    CHECK_OK(raddle_staging_commit(&staging, &all, 1, NULL));
    const int waits = cuda->num_stream_waits;
    CHECK_OK(raddle_staging_wait(&staging, NULL)); /* the stream of the copy itself */
    CHECK_INT(cuda->num_stream_waits, waits);
    CHECK_OK(raddle_cuda_device_get(0, &device));
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(device->driver->stream_create(&stream, 0), 0);
    CHECK_OK(raddle_staging_wait(&staging, stream));
    CHECK_INT(cuda->num_stream_waits, waits + 1);

    /* A captured stream cannot wait for what is outside: no wait, and the capture stays whole. */
    CUgraph graph = NULL;
    CHECK_INT(device->driver->stream_begin_capture(stream, 0), 0);
    CHECK_OK(raddle_staging_wait(&staging, stream));
    CHECK_INT(cuda->num_stream_waits, waits + 1);
    CHECK_INT(device->driver->stream_end_capture(stream, &graph), 0);
    device->driver->graph_destroy(graph);
    device->driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
    raddle_staging_fini(&staging);
}

/* Each step of init fails once: nothing stays. */
static void test_init_failures(void) {
    stub_cuda_state *cuda = stub_cuda();
    static const struct {
        const char *function;
        int skip;
    } steps[] = {{"cuMemAlloc_v2", 0}, {"cuMemHostAlloc", 0}, {"cuMemHostAlloc", 2},
                 {"cuEventCreate", 0}, {"cuEventCreate", 1},  {"cuEventCreate", 2}};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        raddle_staging staging;
        stub_fail(steps[i].function, steps[i].skip, 1);
        CHECK_FAILS(raddle_staging_init(&staging, gpu, BYTES), RADDLE_ERR_CUDA,
                    "CUDA_ERROR_INVALID_VALUE");
        CHECK(cuda->fail_function == NULL);
        CHECK_INT(cuda->live_allocs + cuda->live_host_allocs + cuda->live_events, 0);
        CHECK_INT(cuda->context_depth, 0);
    }
}

/* ---------------------------------------------------------------- the table itself */

static void test_memory(void) {
    const raddle_backend *backend = &raddle_backend_cuda;
    stub_cuda_state *cuda = stub_cuda();
    void *data = NULL;
    CHECK_OK(backend->alloc(1, 0, &data)); /* of 0 bytes, too */
    CHECK(data != NULL);
    backend->free(1, data);
    backend->free(1, NULL);
    backend->free_host(0, NULL);
    backend->event_destroy(0, NULL);
    CHECK_INT(cuda->live_allocs, 0);

    cuda->free_bytes = 1000;
    data = NULL;
    CHECK_FAILS(backend->alloc(0, 2000, &data), RADDLE_ERR_MEMORY,
                "2000 bytes asked for, 1000 of 85899345920 bytes are free on cuda:0 (Stub GPU 0)");
    CHECK(data == NULL);
    cuda->free_bytes = (size_t)1 << 30;
    CHECK_FAILS(backend->alloc(5, 10, &data), RADDLE_ERR_DEVICE, "cuda:5 does not exist");

    unsigned char bytes[64];
    CHECK_OK(backend->alloc(0, sizeof bytes, &data));
    CHECK_OK(backend->fill(0, data, 0x5C, sizeof bytes, NULL));
    CHECK_OK(backend->copy(0, bytes, data, sizeof bytes, RADDLE_COPY_TO_HOST, NULL));
    CHECK_OK(backend->copy(0, NULL, NULL, 0, RADDLE_COPY_TO_DEVICE, NULL));
    CHECK_OK(backend->fill(0, NULL, 0, 0, NULL));
    CHECK(is_filled(bytes, sizeof bytes, 0x5C));
    backend->free(0, data);

    int32_t workers = 0;
    CHECK_OK(backend->num_workers(0, &workers));
    CHECK_INT(workers, 132);
    raddle_event *event = NULL;
    CHECK_OK(backend->event_create(0, &event));
    CHECK_OK(backend->event_wait_host(0, event)); /* never recorded: at once */
    CHECK_OK(backend->event_record(0, event, NULL));
    CHECK_OK(backend->stream_wait_event(0, NULL, event));
    backend->event_destroy(0, event);
    CHECK_INT(cuda->context_depth, 0);
}

static void test_choice(void) {
    const raddle_backend *backend = NULL;
    CHECK_OK(raddle_backend_for(gpu, &backend));
    CHECK(backend == &raddle_backend_cuda);
    CHECK_FAILS(raddle_backend_for((raddle_device){RADDLE_CUDA, 7}, &backend), RADDLE_ERR_DEVICE,
                "cuda:7 does not exist");
}

int main(void) {
    test_ring();
    test_other_stream();
    test_init_failures();
    test_memory();
    test_choice();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c cuda/notice.c cuda/nvrtc.c cuda/cache.c cuda/image.c cuda/kernel.c cuda/count.c
// sanitizers: address thread
// shared: libcuda.so.1=stub_cuda.c libnvrtc.so.13=stub_nvrtc.c
/* test_count.c - launch counters: what is counted, eagerly and by graphs, when counters are made,
 * and that nothing is there when they are off. The stub driver runs the counting kernel. */
#include "check.h"
#include "stub.h"

#include <pthread.h>
#include <unistd.h>

#include "cuda/count.h"
#include "cuda/sources.h"

#define SOURCE(name)                                                                               \
    { name, "some text", 9 }

const raddle_source raddle_sources[] = {
    SOURCE("common/a.cuh"),     SOURCE("fam/fam_step.cu"),          SOURCE("fam/fam_step.cuh"),
    SOURCE("fam/fam_other.cu"), SOURCE("measure/measure_count.cu"), {0},
};
const int raddle_num_sources = 5;

enum { STEP = 1, OTHER = 3, COUNT = 4, THREADS = 8, ROUNDS = 50 };

static const raddle_cuda_device *device;
static const raddle_launch launch = {.grid = {3, 1, 1}, .block = {32, 1, 1}};
static unsigned char params[64];

static void open_device(void) {
    CHECK_OK(raddle_cuda_device_get(0, &device));
}

static const raddle_kernel *get(const raddle_cuda_device *on, const char *name) {
    const raddle_kernel *kernel = NULL;
    CHECK_OK(raddle_kernel_get(on, name, "", 0, &kernel));
    return kernel;
}

static void run_on(const raddle_cuda_device *on, const char *name, raddle_stream stream) {
    const raddle_kernel *kernel = get(on, name);
    bool pushed = false;
    CHECK_OK(raddle_cuda_push(on, &pushed));
    CHECK_OK(raddle_kernel_launch(on, kernel, &launch, params, stream));
    raddle_cuda_pop(on, pushed);
}

static void run(const char *name) {
    run_on(device, name, NULL);
}

static void check_counts(uint64_t step, uint64_t other) {
    uint64_t launches[5] = {9, 9, 9, 9, 9};
    CHECK_OK(raddle_count_read(launches));
    CHECK_INT((int64_t)launches[STEP], (int64_t)step);
    CHECK_INT((int64_t)launches[OTHER], (int64_t)other);
    CHECK_INT((int64_t)(launches[0] + launches[2] + launches[COUNT]), 0);
}

static void test_names(void) {
    char name[16];
    CHECK_INT(raddle_count_num_kernels(), 5);
    CHECK_INT(raddle_count_index("fam/fam_step"), STEP);
    CHECK_INT(raddle_count_index("fam/fam_other"), OTHER);
    CHECK_INT(raddle_count_index("fam/fam"), -1);
    CHECK_INT(raddle_count_index("common/a"), -1);
    CHECK_INT(raddle_count_index(RADDLE_COUNT_KERNEL), -1); /* it does not count itself */
    raddle_count_name(OTHER, name, sizeof name);
    CHECK_TEXT(name, "fam_other");
    raddle_count_name(OTHER, name, 4);
    CHECK_TEXT(name, "fam");
}

static void test_off(void) {
    stub_cuda_state *cuda = stub_cuda();
    open_device();
    run("fam/fam_step");
    CHECK_INT(cuda->num_launches, 1);
    CHECK_INT(cuda->num_allocs, 0);
    CHECK_INT(cuda->num_modules_loaded, 1);
    check_counts(0, 0);
    raddle_count_stop();
    CHECK_INT(cuda->num_context_syncs, 0);
}

/* No driver: starting and reading do not even look for one. */
static void test_without_driver(void) {
    CHECK_OK(raddle_count_start());
    check_counts(0, 0);
    CHECK_INT(stub_cuda()->calls, 0);
    stub_cuda()->init_result = 100;
    CHECK_OK(raddle_count_start());
    check_counts(0, 0);
}

static void test_counts(void) {
    stub_cuda_state *cuda = stub_cuda();
    CUstream stream = NULL;
    open_device();
    run("fam/fam_step"); /* before: not counted, yet its device and kernel are known */
    CHECK_OK(raddle_count_start());
    check_counts(0, 0);
    run("fam/fam_step");
    CHECK_TEXT(cuda->launch.function, "measure_count");
    CHECK_INT(cuda->launch.grid[0], 1);
    CHECK_INT(cuda->launch.block[0], 1);
    CHECK_INT(cuda->launch.num_attributes, 0);
    CHECK_INT(cuda->num_launches, 3);
    bool pushed = false;
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(device->driver->stream_create(&stream, 0), 0);
    run_on(device, "fam/fam_step", stream);
    CHECK(cuda->launch.stream == (void *)stream);
    device->driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
    run("fam/fam_other");
    const raddle_kernel *variant = NULL;
    CHECK_OK(raddle_kernel_get(device, "fam/fam_other", "#define RADDLE_X 2\n", 0, &variant));
    CHECK_INT(variant->counter, OTHER); /* configs of a kernel are one row */
    check_counts(2, 1);
    check_counts(2, 1);

    raddle_count_stop();
    run("fam/fam_step");
    CHECK_TEXT(cuda->launch.function, "fam_step");
    check_counts(2, 1);
    CHECK_OK(raddle_count_start());
    check_counts(0, 0);
    CHECK_INT(cuda->num_allocs, 1);
    CHECK_INT(cuda->context_depth, 0);
}

static void test_second_device(void) {
    const raddle_cuda_device *second = NULL;
    open_device();
    CHECK_OK(raddle_count_start());
    CHECK_OK(raddle_cuda_device_get(1, &second));
    CHECK_INT(stub_cuda()->num_allocs, 1);
    get(second, "fam/fam_step"); /* opened later: its counters come with its first kernel */
    CHECK_INT(stub_cuda()->num_allocs, 2);
    run("fam/fam_step");
    run_on(second, "fam/fam_step", NULL);
    run_on(second, "fam/fam_other", NULL);
    check_counts(2, 1);
    CHECK_INT(stub_cuda()->num_allocs, 2);
}

/* Work that has not run yet is waited for, and what was launched before a reset is not counted. */
static void test_waits(void) {
    open_device();
    CHECK_OK(raddle_count_start());
    stub_cuda()->is_lazy = true;
    run("fam/fam_step");
    check_counts(1, 0);
    run("fam/fam_step");
    CHECK_OK(raddle_count_start());
    check_counts(0, 0);
}

static void test_graph(void) {
    const raddle_cuda_driver *driver = NULL;
    CUstream stream = NULL;
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    bool pushed = false;
    open_device();
    driver = device->driver;
    CHECK_OK(raddle_count_start());
    get(device, "fam/fam_step");
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(driver->stream_create(&stream, 0), 0);
    CHECK_INT(driver->stream_begin_capture(stream, 1), 0);
    raddle_cuda_set_capturing(true);
    run_on(device, "fam/fam_step", stream);
    run_on(device, "fam/fam_step", stream);
    uint64_t launches[5];
    CHECK_FAILS(raddle_count_read(launches), RADDLE_ERR_STATE, "reading launch counters");
    CHECK_FAILS(raddle_count_start(), RADDLE_ERR_STATE, "clearing launch counters");
    raddle_cuda_set_capturing(false);
    CHECK_INT(driver->stream_end_capture(stream, &graph), 0);
    CHECK_INT((int64_t)stub_cuda()->last_graph_nodes, 4);
    CHECK_INT(driver->graph_instantiate(&exec, graph, 0), 0);
    check_counts(0, 0); /* a capture runs nothing */
    for (int i = 0; i < 5; i++) {
        CHECK_INT(driver->graph_launch(exec, stream), 0);
    }
    check_counts(10, 0);
    raddle_count_stop();
    CHECK_INT(driver->graph_launch(exec, stream), 0); /* its counters are still there */
    check_counts(12, 0);
    driver->graph_exec_destroy(exec);
    driver->graph_destroy(graph);
    driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
}

/* The first kernel of a device is got while another library captures: its capture is not broken. */
static void test_foreign_capture(void) {
    CUstream stream = NULL;
    CUgraph graph = NULL;
    bool pushed = false;
    CHECK_OK(raddle_count_start());
    open_device();
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(device->driver->stream_create(&stream, 0), 0);
    CHECK_INT(device->driver->stream_begin_capture(stream, 0), 0);
    run_on(device, "fam/fam_step", stream);
    CHECK_INT(device->driver->stream_end_capture(stream, &graph), 0);
    CHECK_INT((int64_t)stub_cuda()->last_graph_nodes, 2);
    CHECK_INT(stub_cuda()->num_invalidated, 0);
    check_counts(0, 0);
    device->driver->graph_destroy(graph);
    device->driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
}

static void test_failures(void) {
    const raddle_kernel *kernel = NULL;
    stub_cuda_state *cuda = stub_cuda();
    uint64_t launches[5] = {7, 7, 7, 7, 7};
    open_device();
    static const char *const functions[] = {"cuModuleLoadData", "cuMemAlloc_v2", "cuStreamCreate",
                                            "cuMemsetD8Async", "cuStreamSynchronize"};
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        stub_fail(functions[i], 0, 999);
        CHECK_FAILS(raddle_count_start(), RADDLE_ERR_CUDA, "CUDA_ERROR_OTHER");
        CHECK(!raddle_count_is_on());
        CHECK_INT(cuda->live_allocs, 0);
        CHECK_INT(cuda->live_streams, 0);
        CHECK_INT(cuda->context_depth, 0);
    }
    raddle_cuda_set_capturing(true);
    CHECK_FAILS(raddle_count_start(), RADDLE_ERR_STATE, "making launch counters: not possible");
    raddle_cuda_set_capturing(false);
    CHECK_OK(raddle_count_start());
    kernel = get(device, "fam/fam_step");
    bool pushed = false;
    CHECK_OK(raddle_cuda_push(device, &pushed));
    stub_fail("cuLaunchKernelEx", 1, 999); /* the second launch of the two */
    CHECK_FAILS(raddle_kernel_launch(device, kernel, &launch, params, NULL), RADDLE_ERR_CUDA,
                "launching a kernel");
    stub_fail("cuLaunchKernelEx", 0, 999); /* what was not launched does not count */
    CHECK_FAILS(raddle_kernel_launch(device, kernel, &launch, params, NULL), RADDLE_ERR_CUDA,
                "launching a kernel");
    raddle_cuda_pop(device, pushed);
    stub_fail("cuMemcpyDtoHAsync_v2", 0, 999);
    CHECK_FAILS(raddle_count_read(launches), RADDLE_ERR_CUDA, "reading launch counters");
    CHECK_INT((int64_t)launches[STEP], 7);
    stub_fail("cuCtxSynchronize", 0, 999);
    CHECK_FAILS(raddle_count_start(), RADDLE_ERR_CUDA, "waiting for the launches");
    CHECK(raddle_count_is_on());
    check_counts(0, 0);
    CHECK_INT(cuda->context_depth, 0);
}

static void *run_in_thread(void *argument) {
    const int i = *(const int *)argument;
    const raddle_kernel *kernel = NULL;
    bool pushed = false;
    if (raddle_kernel_get(device, i % 2 == 0 ? "fam/fam_step" : "fam/fam_other", "", 0, &kernel) !=
            RADDLE_OK ||
        raddle_cuda_push(device, &pushed) != RADDLE_OK) {
        return NULL;
    }
    for (int round = 0; round < ROUNDS; round++) {
        if (raddle_kernel_launch(device, kernel, &launch, params, NULL) != RADDLE_OK) {
            return NULL;
        }
    }
    raddle_cuda_pop(device, pushed);
    return argument;
}

/* Counting starts before the device is opened: the threads race for who makes its counters. */
static void test_threads(void) {
    pthread_t threads[THREADS];
    int numbers[THREADS];
    void *done = NULL;
    CHECK_OK(raddle_count_start());
    open_device();
    for (int i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, run_in_thread, &numbers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], &done);
        CHECK(done != NULL);
    }
    check_counts(THREADS / 2 * ROUNDS, THREADS / 2 * ROUNDS);
    CHECK_INT(stub_cuda()->num_allocs, 1);
}

static void *stop_and_start(void *unused) {
    (void)unused;
    for (int i = 0; i < 2 * ROUNDS; i++) {
        raddle_count_stop();
        CHECK_OK(raddle_count_start());
    }
    return NULL;
}

static void test_switching_threads(void) {
    pthread_t switcher, runner;
    int number = 0;
    void *done = NULL;
    open_device();
    CHECK(pthread_create(&switcher, NULL, stop_and_start, NULL) == 0);
    CHECK(pthread_create(&runner, NULL, run_in_thread, &number) == 0);
    pthread_join(switcher, NULL);
    pthread_join(runner, &done);
    CHECK(done != NULL);
    CHECK_OK(raddle_count_start());
    run("fam/fam_step");
    check_counts(1, 0);
}

int main(void) {
    setenv("RADDLE_CACHE_DIR", "", 1);
    unsetenv("CUDA_HOME");
    unsetenv("CUDA_PATH");
    test_names();
    CHECK_IN_CHILD(test_off);
    CHECK_IN_CHILD(test_without_driver);
    CHECK_IN_CHILD(test_counts);
    CHECK_IN_CHILD(test_second_device);
    CHECK_IN_CHILD(test_waits);
    CHECK_IN_CHILD(test_graph);
    CHECK_IN_CHILD(test_foreign_capture);
    CHECK_IN_CHILD(test_failures);
    CHECK_IN_CHILD(test_threads);
    CHECK_IN_CHILD(test_switching_threads);
    return check_report();
}

// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c
// shared: libcuda.so.1=stub_cuda.c
/* test_driver.c - opening the driver, its failures, devices and contexts, and what a fork means. */
#include "check.h"
#include "stub.h"

#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "cuda/device.h"
#include "cuda/library.h"

/* The driver is opened once per process: every way it can fail gets a process of its own. */
static void test_disabled(void) {
    setenv("RADDLE_DISABLE_CUDA", "1", 1);
    const raddle_cuda_driver *driver = NULL;
    CHECK_FAILS(raddle_cuda_driver_get(&driver), RADDLE_ERR_DEVICE, "RADDLE_DISABLE_CUDA");
    CHECK(driver == NULL);
    CHECK_INT(raddle_cuda_driver_version(), 0);
}

static void test_no_device(void) {
    stub_cuda()->init_result = 100;
    const raddle_cuda_driver *driver = NULL;
    CHECK_FAILS(raddle_cuda_driver_get(&driver), RADDLE_ERR_DEVICE, "does not start");
    CHECK_FAILS(raddle_cuda_driver_get(&driver), RADDLE_ERR_DEVICE, "CUDA_VISIBLE_DEVICES");
    CHECK_INT(raddle_cuda_driver_version(), 13000);
}

static void test_old_driver(void) {
    stub_cuda()->version = 11040;
    const raddle_cuda_driver *driver = NULL;
    CHECK_FAILS(raddle_cuda_driver_get(&driver), RADDLE_ERR_DEVICE, "too old (CUDA 11.4)");
}

static void test_old_gpu(void) {
    stub_cuda()->arch = 75;
    const raddle_cuda_device *device = NULL;
    CHECK_FAILS(raddle_cuda_device_get(0, &device), RADDLE_ERR_DEVICE,
                "cuda:0 (Stub GPU 0) has compute capability 7.5");
    CHECK(device == NULL);
}

static void test_devices(void) {
    int count = 0;
    CHECK_OK(raddle_cuda_device_count(&count));
    CHECK_INT(count, 2);
    const raddle_cuda_device *device = NULL, *again = NULL, *other = NULL;
    CHECK_FAILS(raddle_cuda_device_get(2, &device), RADDLE_ERR_DEVICE,
                "cuda:2 does not exist; 2 GPUs are visible");
    CHECK_FAILS(raddle_cuda_device_get(-1, &device), RADDLE_ERR_DEVICE, "cuda:-1");
    CHECK_FAILS(raddle_cuda_device_get(1000, &device), RADDLE_ERR_DEVICE, "cuda:1000");

    stub_fail("cuDeviceGetName", 0, 1);
    CHECK_FAILS(raddle_cuda_device_get(1, &device), RADDLE_ERR_CUDA, "CUDA_ERROR_INVALID_VALUE");
    CHECK(device == NULL);
    CHECK_OK(raddle_cuda_device_get(1, &device)); /* a failure leaves nothing behind */
    CHECK_OK(raddle_cuda_device_get(1, &again));
    CHECK(device == again);
    CHECK_INT(device->index, 1);
    CHECK_INT(device->arch, 90);
    CHECK_INT(device->num_sms, 132);
    CHECK_INT(device->shared_bytes_optin, 232448);
    CHECK_TEXT(device->name, "Stub GPU 1");
    CHECK_OK(raddle_cuda_device_get(0, &other));

    bool outer = false, inner = true, third = false;
    CHECK_OK(raddle_cuda_push(device, &outer));
    CHECK(outer);
    CHECK_OK(raddle_cuda_push(device, &inner));
    CHECK(!inner);
    CHECK_OK(raddle_cuda_push(other, &third));
    CHECK(third);
    CHECK_INT(stub_cuda()->context_depth, 2);
    raddle_cuda_pop(other, third);
    raddle_cuda_pop(device, inner);
    raddle_cuda_pop(device, outer);
    CHECK_INT(stub_cuda()->context_depth, 0);
}

static void test_errors(void) {
    CHECK_OK(raddle_cuda_check(0, "nothing"));
    CHECK_FAILS(
        raddle_cuda_check(1, "running a kernel"), RADDLE_ERR_CUDA,
        "running a kernel: the CUDA driver answered CUDA_ERROR_INVALID_VALUE (1: a sentence");
    CHECK_FAILS(
        raddle_cuda_check(700, "copying"), RADDLE_ERR_CUDA_ASYNC,
        "copying: the CUDA driver answered CUDA_ERROR_ILLEGAL_ADDRESS (700: a sentence about "
        "it), an asynchronous error: a kernel or copy that this process had queued before");
    CHECK_FAILS(raddle_cuda_check(719, "copying"), RADDLE_ERR_CUDA_ASYNC, "restart the process");
    static const int of_the_call[] = {2, 101, 201, 400, 701, 703, 709, 711, 713, 720, 722, 999};
    for (size_t i = 0; i < sizeof of_the_call / sizeof *of_the_call; i++) {
        CHECK_INT(raddle_cuda_check(of_the_call[i], "asking"), RADDLE_ERR_CUDA);
    }
    CHECK_FAILS(raddle_cuda_check(900, "loading"), RADDLE_ERR_STATE, "captured");
    CHECK_FAILS(raddle_cuda_check(908, "loading"), RADDLE_ERR_STATE, "captured");
    CHECK_FAILS(raddle_cuda_check(909, "loading"), RADDLE_ERR_CUDA, "909");
}

static void test_in_forked_child(void) {
    const raddle_cuda_device *device = NULL;
    const raddle_cuda_driver *driver = NULL;
    const int calls = stub_cuda()->calls;
    CHECK_FAILS(raddle_cuda_device_get(1, &device), RADDLE_ERR_DEVICE, "forked");
    CHECK_FAILS(raddle_cuda_driver_get(&driver), RADDLE_ERR_DEVICE, "spawn");
    CHECK_INT(stub_cuda()->calls, calls); /* the driver is not touched */
}

static void test_capture_mode(void) {
    const raddle_cuda_driver *driver = NULL;
    CHECK_OK(raddle_cuda_driver_get(&driver));
    const int before = raddle_cuda_relax_capture(driver);
    CHECK_INT(before, 0);
    const int nested = raddle_cuda_relax_capture(driver);
    CHECK_INT(nested, 2);
    raddle_cuda_restore_capture(driver, nested);
    raddle_cuda_restore_capture(driver, before);
    CHECK_INT(raddle_cuda_relax_capture(driver), 0);
    raddle_cuda_restore_capture(driver, 0);
    raddle_cuda_set_capturing(true);
    CHECK_FAILS(raddle_cuda_refuse_capture("allocating"), RADDLE_ERR_STATE,
                "allocating: not possible while this thread captures");
    raddle_cuda_set_capturing(false);
    CHECK_OK(raddle_cuda_refuse_capture("allocating"));
}

/* ---------------------------------------------------------------- where libraries are looked for
 */

typedef struct visit_log {
    char text[4096];
    const char *wanted;
} visit_log;

static bool note_candidate(void *context, const raddle_library_candidate *candidate,
                           char reason[RADDLE_LIBRARY_PATH_BYTES]) {
    visit_log *log = context;
    strncat(log->text, candidate->path, sizeof log->text - strlen(log->text) - 2);
    strcat(log->text, "\n");
    snprintf(reason, RADDLE_LIBRARY_PATH_BYTES, "not this one");
    return log->wanted != NULL && strcmp(candidate->path, log->wanted) == 0;
}

static void make_file(const char *path) {
    FILE *file = fopen(path, "w");
    CHECK(file != NULL && fclose(file) == 0);
}

/* A toolkit and a wheel folder of our own: loaded copies first, then wheels, then the toolkit. */
static void test_library_search(void) {
    const raddle_library_spec spec = {
        .stem = "libcuda.so",
        .sonames = (const char *const[]){"libcuda.so.13", "libcuda.so.12", NULL},
        .wheel_folders = (const char *const[]){"nvidia/cu13/lib", "nvidia/other/lib", NULL},
    };
    char tried[RADDLE_LIBRARY_TRIED_BYTES];
    CHECK(system("mkdir -p root/nvidia/cu13/lib root/nvidia/other/lib toolkit/lib64") == 0);
    make_file("root/nvidia/other/lib/libcuda.so.12");
    make_file("toolkit/lib64/libcuda.so.13");
    raddle_library_add_root("root");
    raddle_library_add_root("root"); /* twice is once */

    visit_log log = {.text = ""};
    CHECK(!raddle_library_search(&spec, note_candidate, &log, tried));
    const char *loaded = strstr(log.text, "/libcuda.so.1\n"); /* the stub is loaded */
    const char *wheel = strstr(log.text, "root/nvidia/other/lib/libcuda.so.12\n");
    const char *toolkit = strstr(log.text, "toolkit/lib64/libcuda.so.13\n");
    const char *system_one = strstr(log.text, "\nlibcuda.so.13\n");
    CHECK(loaded != NULL && wheel != NULL && toolkit != NULL && system_one != NULL);
    CHECK(loaded < wheel && wheel < toolkit && toolkit < system_one);
    CHECK(wheel != NULL && strstr(wheel + 1, "root/nvidia/other") == NULL);
    CHECK(strstr(tried, "root/nvidia/cu13/lib (not in it)") != NULL);
    CHECK(strstr(tried, "toolkit/lib64/libcuda.so.13 (not this one)") != NULL);

    log = (visit_log){.wanted = "root/nvidia/other/lib/libcuda.so.12"};
    CHECK(raddle_library_search(&spec, note_candidate, &log, tried));
    CHECK(strstr(log.text, "toolkit") == NULL);
}

int main(void) {
    unsetenv("RADDLE_DISABLE_CUDA");
    setenv("CUDA_HOME", "toolkit", 1);
    CHECK_IN_CHILD(test_disabled);
    CHECK_IN_CHILD(test_no_device);
    CHECK_IN_CHILD(test_old_driver);
    CHECK_IN_CHILD(test_old_gpu);
    test_devices();
    test_errors();
    test_capture_mode();
    CHECK_IN_CHILD(test_in_forked_child);
    test_library_search();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

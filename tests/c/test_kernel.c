// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c cuda/notice.c cuda/nvrtc.c cuda/cache.c cuda/image.c cuda/kernel.c cuda/count.c cuda/bundle.c
// sanitizers: address thread
// shared: libcuda.so.1=stub_cuda.c libnvrtc.so.13=stub_nvrtc.c
/* test_kernel.c - from a name and a config to a launch: what NVRTC is given, what is kept where, what
 * the driver is given, and every way it can go wrong. */
#include "check.h"
#include "stub.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "cuda/bundle.h"
#include "cuda/cache.h"
#include "cuda/kernel.h"
#include "cuda/library.h"
#include "cuda/notice.h"
#include "cuda/nvrtc.h"
#include "cuda/sources.h"

#define SOURCE(name, text)                                                                         \
    { name, text, sizeof text - 1 }

const raddle_source raddle_sources[] = {
    SOURCE("fam/fam_step.cu", "#include \"common/a.cuh\"\nextern \"C\" ... fam_step\n"),
    SOURCE("fam/fam_other.cu", "extern \"C\" ... fam_other\n"),
    SOURCE("fam/fam_missing.cu", "its symbol is not in the module\n"),
    SOURCE("common/a.cuh", "#pragma once\n#include \"common/b.cuh\"\n#include \"fam/p.h\"\n"),
    SOURCE("common/b.cuh", "#include \"common/a.cuh\"\n"),
    SOURCE("common/unused.cuh", "nobody includes it\n"),
    SOURCE("fam/p.h", "struct p;\n"),
    {0},
};
const int raddle_num_sources = 7;

static const char config[] = "#define RADDLE_X 1\n";
static const raddle_cuda_device *device;

static void open_device(void) {
    CHECK_OK(raddle_cuda_device_get(0, &device));
}

static int count_cached(void) {
    raddle_cache_stats stats = {0};
    CHECK_OK(raddle_cache_measure(getenv("RADDLE_CACHE_DIR"), &stats));
    return (int)stats.num_files;
}

/* ---------------------------------------------------------------- compiling */

static void test_compile(void) {
    stub_nvrtc_state *nvrtc = stub_nvrtc();
    void *image = NULL;
    size_t bytes = 0;
    char *log = NULL;
    CHECK_OK(raddle_kernel_compile("fam/fam_step", config, "sm_90a", &image, &bytes, &log));
    CHECK_TEXT((char *)image, "CUBIN fam/fam_step.cu for sm_90a");
    CHECK_INT((int64_t)bytes, (int64_t)strlen(image) + 1);
    CHECK_TEXT(nvrtc->headers, "common/a.cuh common/b.cuh fam/p.h ");
    CHECK_TEXT(nvrtc->text, "#define RADDLE_X 1\n\n#line 1 \"fam/fam_step.cu\"\n#include "
                            "\"common/a.cuh\"\nextern \"C\" ... fam_step\n");
    CHECK_TEXT(nvrtc->options[0], "--gpu-architecture=sm_90a");
    CHECK_INT(nvrtc->num_options, 6);
    for (int i = 1; i < nvrtc->num_options; i++) { /* NVRTC splits no lists */
        CHECK(strchr(nvrtc->options[i], ',') == NULL);
    }
    raddle_nvrtc_report report;
    raddle_nvrtc_parse_log(log, &report);
    CHECK_INT(report.registers, 42);
    CHECK_INT(report.stack_bytes, 8);
    CHECK_INT(report.spill_store_bytes, 4);
    CHECK_INT(report.spill_load_bytes, 12);
    CHECK_INT(report.num_serialised, 0);
    raddle_free(image);
    raddle_free(log);

    image = log = NULL;
    CHECK_OK(raddle_kernel_compile("fam/fam_step", config, "compute_90", &image, &bytes, &log));
    CHECK_TEXT((char *)image, "PTX fam/fam_step.cu for compute_90");
    raddle_free(image);
    raddle_free(log);
    CHECK_INT(count_cached(), 0); /* past the caches */
}

static void test_compile_errors(void) {
    void *image = NULL;
    size_t bytes = 0;
    char *log = NULL;
    CHECK_FAILS(
        raddle_kernel_compile("fam/fam_step", "#error twice\n", "sm_80", &image, &bytes, &log),
        RADDLE_ERR_COMPILE, "fam/fam_step.cu(1): error: #error twice");
    CHECK(strstr(raddle_last_error()->message, "NVRTC 13.0") != NULL);
    CHECK(strstr(raddle_last_error()->message, "a warning first") == NULL);
    CHECK(strstr(raddle_last_error()->log, "a warning first") != NULL);
    CHECK_FAILS(raddle_kernel_compile("fam/none", config, "sm_80", &image, &bytes, &log),
                RADDLE_ERR_VALUE, "no kernel fam/none");
    CHECK_FAILS(raddle_kernel_compile("fam/p.h", config, "sm_80", &image, &bytes, &log),
                RADDLE_ERR_VALUE, "no kernel fam/p.h");
    static const char *const archs[] = {"", "sm_", "sm_9", "sm_90b", "90", "sm_90a -G", "sm_9000"};
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        CHECK_FAILS(raddle_kernel_compile("fam/fam_step", config, archs[i], &image, &bytes, &log),
                    RADDLE_ERR_VALUE, "arch: expected");
    }
    CHECK(image == NULL && log == NULL);
}

static void test_report_parsing(void) {
    raddle_nvrtc_report report;
    raddle_nvrtc_parse_log("", &report);
    CHECK_INT(report.registers, 0);
    raddle_nvrtc_parse_log("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async\n"
                           "ptxas warning : Local memory used for function 'f'\n"
                           "Used 200 registers\nUsed 12 registers, 1 barriers",
                           &report);
    CHECK_INT(report.num_serialised, 1);
    CHECK_INT(report.num_local, 1);
    CHECK_INT(report.registers, 200);
}

static void test_arch_choice(void) {
    char arch[RADDLE_ARCH_BYTES];
    static const int known[] = {75, 80, 86, 90, 100, 120};
    static const struct {
        int device;
        const char *arch; /* NULL: none */
    } cases[] = {{90, "sm_90a"},  {80, "sm_80"},        {120, "sm_120"},
                 {89, "sm_86"},   {103, "sm_100"},      {110, "compute_100"},
                 {121, "sm_120"}, {200, "compute_120"}, {70, NULL}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const bool found = raddle_kernel_arch_fallback(cases[i].device, known, 6, arch);
        CHECK(found == (cases[i].arch != NULL));
        if (found && cases[i].arch != NULL) {
            CHECK_TEXT(arch, cases[i].arch);
        }
    }
}

/* ---------------------------------------------------------------- memory and disk */

static void get_step(void) {
    const raddle_kernel *kernel = NULL;
    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", config, 0, &kernel));
}

static void test_first_process(void) {
    open_device();
    get_step();
    CHECK_INT(stub_nvrtc()->num_compiles, 1);
    CHECK_INT(count_cached(), 1);
}

static void test_second_process(void) {
    open_device();
    get_step();
    CHECK_INT(stub_nvrtc()->num_compiles, 0);
    CHECK_INT(count_cached(), 1);
}

/* Where file names tell the version, a kernel on disk needs no NVRTC: it is not even opened. */
static void test_without_opening_nvrtc(void) {
    CHECK(system("mkdir -p root/nvidia/cu13/lib && cp libnvrtc.so.13 root/nvidia/cu13/lib && "
                 "touch root/nvidia/cu13/lib/libnvrtc-builtins.so.13.0") == 0);
    raddle_library_add_root("root");
    CHECK_INT(raddle_nvrtc_peek_version(), 13000);
    open_device();
    get_step();
    CHECK(dlopen("libnvrtc.so.13", RTLD_NOW | RTLD_NOLOAD) == NULL);
    CHECK_INT(count_cached(), 1);
    CHECK(system("touch root/nvidia/cu13/lib/libnvrtc-builtins.so.13.1") == 0);
    CHECK_INT(raddle_nvrtc_peek_version(), 0); /* two versions: no telling */
}

static void test_other_version(void) {
    stub_nvrtc()->minor = 5;
    open_device();
    get_step();
    CHECK_INT(stub_nvrtc()->num_compiles, 1); /* the version is part of the key */
    CHECK_INT(count_cached(), 2);
}

static void test_damaged_cache(void) {
    CHECK(system("for f in $RADDLE_CACHE_DIR/*.kernel; do printf X | dd of=$f bs=1 seek=80 "
                 "conv=notrunc 2>/dev/null; done") == 0);
    open_device();
    get_step();
    CHECK_INT(stub_nvrtc()->num_compiles, 1);
    char text[RADDLE_NOTICE_BYTES];
    CHECK(raddle_notice_text(0, text) && strstr(text, "was damaged") != NULL);
}

static void test_no_disk(void) {
    setenv("RADDLE_CACHE_DIR", "/proc/raddle", 1);
    open_device();
    get_step();
    const raddle_kernel *kernel = NULL;
    CHECK_OK(raddle_kernel_get(device, "fam/fam_other", config, 0, &kernel));
    get_step();
    CHECK_INT(stub_nvrtc()->num_compiles, 2);
    CHECK_INT(raddle_notice_count(), 1); /* one warning, not one per kernel */
    char text[RADDLE_NOTICE_BYTES];
    CHECK(raddle_notice_text(0, text) && strstr(text, "RADDLE_CACHE_DIR") != NULL);
}

static void test_cache_off(void) {
    setenv("RADDLE_CACHE_DIR", "", 1);
    open_device();
    get_step();
    CHECK_INT(stub_nvrtc()->num_compiles, 1);
    CHECK_INT(raddle_notice_count(), 0);
}

static void test_newer_gpu(void) {
    setenv("RADDLE_CACHE_DIR", "", 1);
    stub_cuda()->arch = 130;
    open_device();
    get_step();
    CHECK_TEXT(stub_nvrtc()->options[0], "--gpu-architecture=compute_120");
}

static void test_newer_nvrtc(void) {
    setenv("RADDLE_CACHE_DIR", "", 1);
    stub_cuda()->version = 12080; /* the stub NVRTC is 13: passed over, and no other is here */
    open_device();
    const raddle_kernel *kernel = NULL;
    CHECK_FAILS(raddle_kernel_get(device, "fam/fam_step", config, 0, &kernel), RADDLE_ERR_COMPILE,
                "pip install nvidia-cuda-nvrtc-cu12");
    CHECK(strstr(raddle_last_error()->message, "Looked at") != NULL);
    CHECK(strstr(raddle_last_error()->log, "of CUDA 13.0, newer than the driver's CUDA 12.8") !=
          NULL);
}

static void test_refused_image(void) {
    setenv("RADDLE_CACHE_DIR", "", 1);
    open_device();
    const raddle_kernel *kernel = NULL;
    stub_fail("cuModuleLoadData", 0, 222);
    CHECK_FAILS(raddle_kernel_get(device, "fam/fam_step", config, 0, &kernel), RADDLE_ERR_COMPILE,
                "the driver (CUDA 13.0) refuses");
    CHECK(strstr(raddle_last_error()->message, "pip install") != NULL);
    CHECK(kernel == NULL);
    get_step(); /* and goes on */
}

/* ---------------------------------------------------------------- loading and launching */

static void test_kernel_get(void) {
    const raddle_kernel *kernel = NULL, *again = NULL, *other = NULL;
    const raddle_cuda_device *second = NULL;
    stub_cuda_state *cuda = stub_cuda();
    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", config, 0, &kernel));
    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", config, 0, &again));
    CHECK(kernel == again);
    CHECK_INT(cuda->num_modules_loaded, 1);
    CHECK_INT(kernel->registers, 96);
    CHECK_INT(kernel->static_shared_bytes, 1024);
    CHECK_INT(kernel->max_threads, 256);
    CHECK_INT(stub_nvrtc()->num_compiles, 1);

    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", "#define RADDLE_X 2\n", 0, &other));
    CHECK(other != kernel);
    CHECK_OK(raddle_cuda_device_get(1, &second)); /* the image serves both, the module one */
    CHECK_OK(raddle_kernel_get(second, "fam/fam_step", config, 0, &other));
    CHECK(other != kernel);
    CHECK_INT(stub_nvrtc()->num_compiles, 2);
    CHECK_INT(cuda->num_modules_loaded, 3);

    CHECK_INT(cuda->max_dynamic_shared, 0);
    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", config, 100 * 1024, &again));
    CHECK_INT(cuda->max_dynamic_shared, 100 * 1024);
    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", config, 60 * 1024, &again));
    CHECK_INT(cuda->max_dynamic_shared, 100 * 1024);
    CHECK_FAILS(raddle_kernel_get(device, "fam/fam_step", config, 232448, &again),
                RADDLE_ERR_UNSUPPORTED, "233472 bytes of shared memory per block");

    const int live = cuda->live_modules;
    CHECK_FAILS(raddle_kernel_get(device, "fam/fam_missing", config, 0, &other), RADDLE_ERR_CUDA,
                "finding a kernel");
    CHECK_INT(cuda->live_modules, live);
    CHECK_INT(cuda->context_depth, 0);
}

/* While this thread captures: what is loaded is handed out, nothing else is begun. */
static void test_capture(void) {
    const raddle_kernel *kernel = NULL;
    const int calls = stub_nvrtc()->num_compiles;
    raddle_cuda_set_capturing(true);
    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", config, 0, &kernel));
    CHECK_FAILS(raddle_kernel_get(device, "fam/fam_step", "#define RADDLE_X 9\n", 0, &kernel),
                RADDLE_ERR_STATE, "loading a kernel: not possible while");
    raddle_cuda_set_capturing(false);
    CHECK_INT(stub_nvrtc()->num_compiles, calls);
}

/* A capture by another library is not broken by a kernel that has to be loaded. */
static void test_foreign_capture(void) {
    const raddle_kernel *kernel = NULL;
    const raddle_cuda_driver *driver = device->driver;
    CUstream stream = NULL;
    CUgraph graph = NULL;
    bool pushed = false;
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(driver->stream_create(&stream, 0), 0);
    CHECK_INT(driver->stream_begin_capture(stream, 0), 0);
    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", "#define RADDLE_X 10\n", 0, &kernel));
    CHECK_INT(driver->stream_end_capture(stream, &graph), 0);
    CHECK_INT(stub_cuda()->num_invalidated, 0);
    driver->graph_destroy(graph);
    driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
}

static void test_launch(void) {
    const raddle_kernel *kernel = NULL;
    stub_cuda_state *cuda = stub_cuda();
    unsigned char params[64];
    bool pushed = false;
    for (int i = 0; i < 64; i++) {
        params[i] = (unsigned char)(i + 1);
    }
    CHECK_OK(raddle_kernel_get(device, "fam/fam_step", config, 0, &kernel));
    CHECK_OK(raddle_cuda_push(device, &pushed));
    raddle_launch launch = {.grid = {3, 4, 5}, .block = {128, 2, 1}, .shared_bytes = 777};
    CHECK_OK(raddle_kernel_launch(device, kernel, &launch, params, NULL));
    CHECK_TEXT(cuda->launch.function, "fam_step");
    CHECK_INT(cuda->launch.grid[0], 3);
    CHECK_INT(cuda->launch.grid[1], 4);
    CHECK_INT(cuda->launch.grid[2], 5);
    CHECK_INT(cuda->launch.block[0], 128);
    CHECK_INT(cuda->launch.block[1], 2);
    CHECK_INT(cuda->launch.shared_bytes, 777);
    CHECK_INT(cuda->launch.num_attributes, 0);
    CHECK(memcmp(cuda->launch.params, params, sizeof params) == 0);

    launch.cluster = 4;
    launch.programmatic_launch = true;
    CUstream stream = NULL;
    CHECK_INT(device->driver->stream_create(&stream, 0), 0);
    CHECK_OK(raddle_kernel_launch(device, kernel, &launch, params, stream));
    CHECK(cuda->launch.stream == (void *)stream);
    CHECK_INT(cuda->launch.num_attributes, 2);
    CHECK_INT(cuda->launch.attribute_ids[0], 4);
    CHECK_INT(cuda->launch.cluster[0], 4);
    CHECK_INT(cuda->launch.cluster[1], 1);
    CHECK_INT(cuda->launch.attribute_ids[1], 6);
    CHECK_INT(cuda->launch.programmatic, 1);
    device->driver->stream_destroy(stream);

    stub_fail("cuLaunchKernelEx", 0, 700);
    CHECK_FAILS(raddle_kernel_launch(device, kernel, &launch, params, NULL), RADDLE_ERR_CUDA_ASYNC,
                "CUDA_ERROR_ILLEGAL_ADDRESS");
    raddle_cuda_pop(device, pushed);
}

/* ---------------------------------------------------------------- threads */

static void *get_in_thread(void *argument) {
    const raddle_kernel *kernel = NULL;
    const int i = *(int *)argument;
    char text[64];
    snprintf(text, sizeof text, "#define RADDLE_X %d\n", 100 + i % 3);
    if (raddle_kernel_get(device, "fam/fam_step", text, 0, &kernel) != RADDLE_OK) {
        return NULL;
    }
    return (void *)(uintptr_t)kernel;
}

/* Three kernels, twelve threads: each is compiled once and loaded once. */
static void test_threads(void) {
    enum { THREADS = 12 };
    pthread_t threads[THREADS];
    int numbers[THREADS];
    void *kernels[THREADS];
    const int compiles = stub_nvrtc()->num_compiles, loads = stub_cuda()->num_modules_loaded;
    for (int i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, get_in_thread, &numbers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], &kernels[i]);
        CHECK(kernels[i] != NULL);
    }
    for (int i = 3; i < THREADS; i++) {
        CHECK(kernels[i] == kernels[i % 3]);
    }
    CHECK_INT(stub_nvrtc()->num_compiles - compiles, 3);
    CHECK_INT(stub_cuda()->num_modules_loaded - loads, 3);
}

/* ---------------------------------------------------------------- bundles */

static void write_bundle(void) {
    const raddle_image *images[2] = {NULL, NULL};
    CHECK_OK(raddle_image_get("fam/fam_step", config, "sm_90a", &images[0]));
    CHECK_OK(raddle_image_get("fam/fam_other", config, "sm_90a", &images[1]));
    CHECK_OK(raddle_bundle_write("kernels.bundle", images, 2));
    CHECK_FAILS(raddle_bundle_write("no/such/folder/x", images, 2), RADDLE_ERR_IO, "cannot make");
}

/* A machine without NVRTC (here: none that fits the driver) runs from the bundle. */
static void test_bundle(void) {
    setenv("RADDLE_CACHE_DIR", "bundle-cache", 1);
    stub_cuda()->version = 12080;
    int count = 0;
    CHECK_OK(raddle_bundle_load("kernels.bundle", false, &count));
    CHECK_INT(count, 2);
    CHECK_INT(count_cached(), 0);
    open_device();
    get_step();
    CHECK_INT(stub_nvrtc()->num_compiles, 0);
    CHECK_OK(raddle_bundle_load("kernels.bundle", true, &count)); /* known already: disk only */
    CHECK_INT(count_cached(), 2);
}

static void test_imported_bundle(void) {
    setenv("RADDLE_CACHE_DIR", "bundle-cache", 1);
    open_device(); /* the stub NVRTC fits, and is not asked */
    get_step();
    CHECK_INT(stub_nvrtc()->num_compiles, 0);
}

static void damage_bundle(long at, int value) {
    CHECK(system("cp kernels.bundle bad.bundle") == 0);
    FILE *file = fopen("bad.bundle", "r+b");
    CHECK(file != NULL && fseek(file, at, SEEK_SET) == 0);
    fputc(value, file);
    fclose(file);
}

static void test_bad_bundles(void) {
    int count = 0;
    CHECK_FAILS(raddle_bundle_load("none.bundle", false, &count), RADDLE_ERR_IO, "cannot open");
    CHECK_FAILS(raddle_bundle_load(".", false, &count), RADDLE_ERR_IO, ".");
    const long places[] = {0, 8, 12, 13, 16, 30, 45, 60, 100, 120, 150, 200};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        damage_bundle(places[i], 0x5A);
        CHECK_FAILS(raddle_bundle_load("bad.bundle", false, &count), RADDLE_ERR_IO, "bad.bundle");
    }
    for (long length = 0; length < 250; length += 7) {
        damage_bundle(0, 'R');
        CHECK(truncate("bad.bundle", length) == 0);
        CHECK_FAILS(raddle_bundle_load("bad.bundle", false, &count), RADDLE_ERR_IO, "bad.bundle");
    }
    CHECK_INT(count, 0);
}

static void test_on_device(void) {
    setenv("RADDLE_CACHE_DIR", "device-cache", 1);
    open_device();
    test_kernel_get();
    test_capture();
    test_foreign_capture();
    test_launch();
    test_threads();
}

int main(void) {
    setenv("RADDLE_CACHE_DIR", "cache", 1);
    unsetenv("CUDA_HOME");
    unsetenv("CUDA_PATH");
    CHECK_IN_CHILD(test_first_process);
    CHECK_IN_CHILD(test_second_process);
    CHECK_IN_CHILD(test_without_opening_nvrtc);
    CHECK_IN_CHILD(test_other_version);
    CHECK_IN_CHILD(test_damaged_cache);
    CHECK_IN_CHILD(test_cache_off);
    CHECK_IN_CHILD(test_no_disk);
    CHECK_IN_CHILD(test_newer_gpu);
    CHECK_IN_CHILD(test_newer_nvrtc);
    CHECK_IN_CHILD(test_refused_image);
    CHECK_IN_CHILD(test_on_device);
    CHECK_IN_CHILD(write_bundle);
    CHECK_IN_CHILD(test_bundle);
    CHECK_IN_CHILD(test_imported_bundle);
    CHECK_IN_CHILD(test_bad_bundles);
    CHECK(system("rm -r cache") == 0);
    test_compile();
    test_compile_errors();
    test_report_parsing();
    test_arch_choice();
    return check_report();
}

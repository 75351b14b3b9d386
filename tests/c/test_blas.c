// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c cuda/scratch.c cuda/blas.c
// sanitizers: address thread
// shared: libcuda.so.1=stub_cuda.c libcublasLt.so.13=stub_cublaslt.c
/* test_blas.c - dense products: what cublasLt is asked for gives the row-major result, choices are
 * kept per shape, streams do not share work space, and what is missing is named. */
#include "check.h"
#include "stub.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "cuda/blas.h"

static const raddle_cuda_device *device;

static void (*body_of_child)(void);

static void open_and_test(void) {
    CHECK_OK(raddle_cuda_device_get(0, &device));
    body_of_child();
}

static void in_child(void (*body)(void)) {
    body_of_child = body;
    CHECK_IN_CHILD(open_and_test);
}

typedef struct gemm_case {
    int m, n, k;
    int x_gap, w_gap, y_gap; /* elements between rows beyond their length */
    bool has_bias;
} gemm_case;

/* Small whole numbers: every sum is exact. */
static float number(int seed, int i) {
    return (float)((i * 31 + seed * 17 + (i / 7)) % 9 - 4);
}

static void check_case(const gemm_case *test) {
    const int x_stride = test->k + test->x_gap, w_stride = test->k + test->w_gap;
    const int y_stride = test->n + test->y_gap;
    float *x = raddle_alloc(sizeof(float) * (size_t)(test->m * x_stride));
    float *w = raddle_alloc(sizeof(float) * (size_t)(test->n * w_stride));
    float *y = raddle_alloc(sizeof(float) * (size_t)(test->m * y_stride));
    float *bias = raddle_alloc(sizeof(float) * (size_t)test->n);
    for (int i = 0; i < test->m * x_stride; i++) {
        x[i] = number(1, i);
    }
    for (int i = 0; i < test->n * w_stride; i++) {
        w[i] = number(2, i);
    }
    for (int i = 0; i < test->m * y_stride; i++) {
        y[i] = -99;
    }
    for (int i = 0; i < test->n; i++) {
        bias[i] = number(3, i);
    }
    const raddle_blas_gemm_args args = {
        .m = test->m,
        .n = test->n,
        .k = test->k,
        .x = x,
        .w = w,
        .y = y,
        .bias = test->has_bias ? bias : NULL,
        .x_stride = x_stride,
        .w_stride = w_stride,
        .y_stride = y_stride,
        .dtype = RADDLE_F32,
        .y_dtype = RADDLE_F32,
    };
    CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    int wrong = 0;
    for (int i = 0; i < test->m; i++) {
        for (int j = 0; j < y_stride; j++) {
            float expected = -99; /* gaps stay as they are */
            if (j < test->n) {
                expected = test->has_bias ? bias[j] : 0;
                for (int l = 0; l < test->k; l++) {
                    expected += x[i * x_stride + l] * w[j * w_stride + l];
                }
            }
            wrong += y[i * y_stride + j] != expected;
        }
    }
    CHECK_INT(wrong, 0);
    raddle_free(bias);
    raddle_free(y);
    raddle_free(w);
    raddle_free(x);
}

static void test_products(void) {
    static const gemm_case cases[] = {
        {3, 5, 7, 0, 0, 0, false}, {3, 5, 7, 1, 2, 3, true},  {1, 5, 7, 0, 0, 0, true},
        {5, 1, 7, 4, 0, 2, false}, {4, 4, 1, 0, 3, 0, true},  {1, 1, 1, 0, 0, 0, false},
        {16, 8, 8, 0, 0, 0, true}, {1, 6, 3, 9, 0, 9, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        check_case(&cases[i]);
    }
    stub_cublaslt_state *lt = stub_cublaslt();
    CHECK_INT(lt->num_handles, 1);
    const int heuristics = lt->num_heuristics;
    check_case(&cases[0]);
    check_case(&cases[1]);                       /* same shapes; the bias lies elsewhere */
    CHECK(lt->num_heuristics <= heuristics + 2); /* alignment of new blocks may differ */

    const raddle_blas_gemm_args nothing = {.m = 0, .n = 5, .k = 3};
    const int products = lt->num_products;
    CHECK_OK(raddle_blas_gemm(device, &nothing, NULL));
    CHECK_INT(lt->num_products, products);
    CHECK_INT(stub_cuda()->context_depth, 0);
}

static raddle_blas_gemm_args make_args(int m, void *memory) {
    return (raddle_blas_gemm_args){
        .m = m,
        .n = 8,
        .k = 8,
        .x = memory,
        .w = memory,
        .y = memory,
        .x_stride = 8,
        .w_stride = 8,
        .y_stride = 8,
        .dtype = RADDLE_BF16,
        .y_dtype = RADDLE_BF16,
    };
}

static void test_choices_are_kept(void) {
    stub_cublaslt_state *lt = stub_cublaslt();
    char *memory = raddle_alloc_aligned(1 << 20, 256);
    raddle_blas_gemm_args args = make_args(4, memory);
    const int before = lt->num_heuristics;
    for (int i = 0; i < 5; i++) {
        CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    }
    CHECK_INT(lt->num_heuristics, before + 1);
    CHECK_INT((int)lt->alignments[0], 16); /* rows of 8 bfloat16 */
    CHECK_INT((int)lt->reductions, 2);     /* in float32 */
    CHECK_INT((int)lt->alignments[1], 16);
    CHECK_INT((int)lt->alignments[3], 16);
    args.x = memory + 2;
    CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    CHECK_INT(lt->num_heuristics, before + 2); /* a kernel for less alignment */
    CHECK_INT((int)lt->alignments[1], 2);
    args.y_dtype = RADDLE_F32;
    CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    CHECK_INT(lt->num_heuristics, before + 3);

    for (int i = 0; i < 2; i++) {
        args.max_sms = 100;
        CHECK_OK(raddle_blas_gemm(device, &args, NULL));
        CHECK_INT(lt->num_heuristics, before + 4);
        CHECK_INT(lt->num_sms, 100);
        args.max_sms = 0; /* the choice for all of them is still there */
        CHECK_OK(raddle_blas_gemm(device, &args, NULL));
        CHECK_INT(lt->num_heuristics, before + 4);
        CHECK_INT(lt->num_sms, 0);
    }

    for (int m = 1; m <= 2500; m++) { /* more shapes than are kept */
        args = make_args(m, memory);
        CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    }
    CHECK(lt->live_descriptions <= 4 * 1024);
    args = make_args(2500, memory);
    const int last = lt->num_heuristics;
    CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    CHECK_INT(lt->num_heuristics, last);
    raddle_free(memory);
}

static void test_work_space(void) {
    stub_cublaslt_state *lt = stub_cublaslt();
    char *memory = raddle_alloc_aligned(4096, 256);
    raddle_blas_gemm_args args = make_args(4, memory);
    CUstream stream = NULL;
    bool pushed = false;
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(device->driver->stream_create(&stream, 0), 0);
    raddle_cuda_pop(device, pushed);
    CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    void *first = lt->workspace;
    CHECK_OK(raddle_blas_gemm(device, &args, stream));
    CHECK(lt->workspace != first && lt->stream == (void *)stream);
    CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    CHECK(lt->workspace == first);

    /* The first product ever on a captured stream neither breaks the capture nor shares memory. */
    CUgraph graph = NULL;
    CHECK_OK(raddle_cuda_push(device, &pushed));
    CHECK_INT(device->driver->stream_begin_capture(stream, 0), 0);
    args.m = 3;
    CHECK_OK(raddle_blas_gemm(device, &args, stream));
    CHECK(lt->workspace != first);
    CHECK_INT(device->driver->stream_end_capture(stream, &graph), 0);
    CHECK_INT(stub_cuda()->num_invalidated, 0);
    device->driver->graph_destroy(graph);
    device->driver->stream_destroy(stream);
    raddle_cuda_pop(device, pushed);
    raddle_free(memory);
}

static void test_refusals(void) {
    char *memory = raddle_alloc_aligned(4096, 256);
    raddle_blas_gemm_args args = make_args(4, memory);
    args.k = 0;
    CHECK_FAILS(raddle_blas_gemm(device, &args, NULL), RADDLE_ERR_SHAPE, "one input feature");
    args = make_args(4, memory);
    args.x_stride = 7;
    CHECK_FAILS(raddle_blas_gemm(device, &args, NULL), RADDLE_ERR_UNSUPPORTED, "strides 7 (x)");
    args.x_stride = -8;
    CHECK_FAILS(raddle_blas_gemm(device, &args, NULL), RADDLE_ERR_UNSUPPORTED, "backwards");
    args = make_args(4, memory);
    stub_cublaslt()->has_no_kernel = 1;
    const int live = stub_cublaslt()->live_descriptions;
    CHECK_FAILS(raddle_blas_gemm(device, &args, NULL), RADDLE_ERR_UNSUPPORTED,
                "no kernel for [4, 8] times the transpose of [8, 8], bfloat16 to bfloat16");
    CHECK_INT(stub_cublaslt()->live_descriptions, live);
    stub_cublaslt()->has_no_kernel = 0;
    CHECK_OK(raddle_blas_gemm(device, &args, NULL));
    stub_fail("cuMemAlloc_v2", 0, 2);
    const raddle_cuda_device *second = NULL;
    CHECK_OK(raddle_cuda_device_get(1, &second));
    CHECK_FAILS(raddle_blas_gemm(second, &args, NULL), RADDLE_ERR_CUDA, "work space");
    CHECK_OK(raddle_blas_gemm(second, &args, NULL));
    raddle_free(memory);
}

static void test_missing(void) {
    stub_cublaslt()->version =
        140000; /* newer than the driver: passed over, and no other is here */
    raddle_blas_info info;
    CHECK_FAILS(raddle_blas_prepare(device), RADDLE_ERR_UNSUPPORTED, "pip install nvidia-cublas. ");
    CHECK_FAILS(raddle_blas_get_info(&info), RADDLE_ERR_UNSUPPORTED,
                "of CUDA 14, the driver is of CUDA 13");
}

static void test_failing_start(void) {
    stub_cublaslt()->fail_create = 1;
    CHECK_FAILS(raddle_blas_prepare(device), RADDLE_ERR_CUDA, "starting cublasLt");
    stub_cublaslt()->fail_create = 0;
    CHECK_OK(raddle_blas_prepare(device));
    raddle_blas_info info;
    CHECK_OK(raddle_blas_get_info(&info));
    CHECK_INT(info.version, 130100);
    CHECK(strstr(info.path, "libcublasLt.so.13") != NULL);
}

static void *multiply(void *argument) {
    char *memory = raddle_alloc_aligned(65536, 256);
    raddle_status status = RADDLE_OK;
    for (int i = 0; i < 50 && status == RADDLE_OK; i++) {
        const raddle_blas_gemm_args args = make_args(1 + (*(int *)argument + i) % 10, memory);
        status = raddle_blas_gemm(device, &args, NULL);
    }
    raddle_free(memory);
    return (void *)(uintptr_t)status;
}

static void test_threads(void) {
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    int seeds[THREADS];
    for (int i = 0; i < THREADS; i++) {
        seeds[i] = i * 3;
        CHECK(pthread_create(&threads[i], NULL, multiply, &seeds[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        void *status = NULL;
        pthread_join(threads[i], &status);
        CHECK_INT((int)(uintptr_t)status, RADDLE_OK);
    }
    CHECK_INT(stub_cublaslt()->num_products, THREADS * 50);
    CHECK_INT(stub_cublaslt()->num_handles, 1);
}

int main(void) {
    unsetenv("CUDA_HOME");
    unsetenv("CUDA_PATH");
    in_child(test_missing);
    in_child(test_failing_start);
    in_child(test_threads);
    in_child(test_products);
    in_child(test_choices_are_kept);
    in_child(test_work_space);
    in_child(test_refusals);
    return check_report();
}

// needs: base/*.c
/* test_tensor.c - the checks on views: what passes, what is refused, and that the refusal names it.
 */
#include "base/tensor.h"

#include <stdlib.h>

#include "check.h"

static const raddle_device cpu = {RADDLE_CPU, 0};
static float memory[64];

/* stride NULL: contiguous. */
static raddle_tensor make(raddle_dtype dtype, int ndim, const int64_t *shape,
                          const int64_t *stride) {
    raddle_tensor tensor = {
        .data = memory, .ndim = ndim, .dtype = dtype, .device = cpu, .name = "q"};
    int64_t step = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        tensor.shape[i] = shape[i];
        tensor.stride[i] = stride != NULL ? stride[i] : step;
        step = stride != NULL ? 0 : step * shape[i];
    }
    return tensor;
}

#define MAKE(dtype, ...)                                                                           \
    make(dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                         \
         (const int64_t[]){__VA_ARGS__}, NULL)
#define STRIDED2(rows, columns, row_stride, column_stride)                                         \
    make(RADDLE_F32, 2, (const int64_t[]){rows, columns},                                          \
         (const int64_t[]){row_stride, column_stride})

static void test_dtypes(void) {
    for (int i = RADDLE_DTYPE_NONE + 1; i < RADDLE_DTYPE_COUNT; i++) {
        const raddle_dtype dtype = (raddle_dtype)i;
        const char *name = raddle_dtype_name(dtype);
        char long_name[64];
        snprintf(long_name, sizeof long_name, "torch.%s", name);
        CHECK_INT(raddle_dtype_from_name(name), dtype);
        CHECK_INT(raddle_dtype_from_name(long_name), dtype);
        const char *digits = name + strcspn(name, "0123456789"); /* bits, where the name has them */
        CHECK_INT((int64_t)raddle_dtype_bytes(dtype), dtype == RADDLE_BOOL ? 1 : atoi(digits) / 8);
        CHECK(raddle_dtype_is_index(dtype) == (dtype == RADDLE_I32 || dtype == RADDLE_I64));
    }
    CHECK_INT(raddle_dtype_from_name("none"), RADDLE_DTYPE_NONE);
    CHECK_INT(raddle_dtype_from_name(""), RADDLE_DTYPE_NONE);
    CHECK_INT(raddle_dtype_from_name("torch."), RADDLE_DTYPE_NONE);
    CHECK_INT(raddle_dtype_from_name("complex64"), RADDLE_DTYPE_NONE);
    CHECK_TEXT(raddle_dtype_name((raddle_dtype)77), "none");
    CHECK_INT((int64_t)raddle_dtype_bytes((raddle_dtype)77), 0);
}

static void test_devices(void) {
    char text[16];
    const raddle_device cuda0 = {RADDLE_CUDA, 0}, cuda1 = {RADDLE_CUDA, 1}, cpu1 = {RADDLE_CPU, 1};
    CHECK_TEXT(raddle_device_text(cpu, text), "cpu");
    CHECK_TEXT(raddle_device_text(cuda1, text), "cuda:1");
    CHECK(strlen(raddle_device_text((raddle_device){INT32_MIN, INT32_MIN}, text)) < 16);
    CHECK(strlen(raddle_device_text((raddle_device){RADDLE_CUDA, INT32_MIN}, text)) < 16);
    CHECK(raddle_device_equal(cpu, cpu1));
    CHECK(raddle_device_equal(cuda0, cuda0));
    CHECK(!raddle_device_equal(cuda0, cuda1));
    CHECK(!raddle_device_equal(cpu, cuda0));
    raddle_tensor q = MAKE(RADDLE_F32, 2);
    CHECK_OK(raddle_tensor_check_device(&q, cpu1));
    CHECK_FAILS(raddle_tensor_check_device(&q, cuda1), RADDLE_ERR_DEVICE,
                "q: expected device cuda:1, got cpu; move it to cuda:1");
}

static void test_count(void) {
    raddle_tensor q = MAKE(RADDLE_F32, 2, 3, 4);
    CHECK_INT(raddle_tensor_count(&q), 24);
    q.ndim = 0;
    CHECK_INT(raddle_tensor_count(&q), 1);
    q = make(RADDLE_F32, 3, (const int64_t[]){INT64_MAX, INT64_MAX, 0}, (const int64_t[]){1, 1, 1});
    CHECK_INT(raddle_tensor_count(&q), 0);
    q.shape[2] = 2;
    CHECK_INT(raddle_tensor_count(&q), INT64_MAX);
}

static void test_contiguous(void) {
    raddle_tensor q = MAKE(RADDLE_F32, 2, 3, 4);
    CHECK(raddle_tensor_is_contiguous(&q));
    q.stride[0] = 13;
    CHECK(!raddle_tensor_is_contiguous(&q));
    q.shape[0] = 1; /* the stride of an extent of 1 is never stepped */
    CHECK(raddle_tensor_is_contiguous(&q));
    q.shape[1] = 0;
    q.stride[2] = 9;
    CHECK(raddle_tensor_is_contiguous(&q));
    q = STRIDED2(3, 4, 1, 3);
    CHECK(!raddle_tensor_is_contiguous(&q));
    q.ndim = 0;
    CHECK(raddle_tensor_is_contiguous(&q));
    q = make(RADDLE_F32, 2, (const int64_t[]){INT64_MAX, INT64_MAX},
             (const int64_t[]){INT64_MAX, 1});
    CHECK(!raddle_tensor_is_contiguous(&q));
}

static void test_shape(void) {
    const raddle_tensor q = MAKE(RADDLE_F32, 2, 3, 4);
    CHECK_OK(raddle_tensor_check_shape(&q, 3, (const int64_t[]){2, 3, 4}));
    CHECK_OK(raddle_tensor_check_shape(&q, 3, (const int64_t[]){-1, 3, -1}));
    CHECK_FAILS(raddle_tensor_check_shape(&q, 3, (const int64_t[]){-1, 3, 5}), RADDLE_ERR_SHAPE,
                "q: expected shape [any, 3, 5], got [2, 3, 4]; dimension 2 must be 5");
    CHECK_FAILS(raddle_tensor_check_shape(&q, 2, (const int64_t[]){-1, 4}), RADDLE_ERR_SHAPE,
                "q: expected 2 dimensions, shape [any, 4], got 3, shape [2, 3, 4]");
    raddle_tensor wide = {.ndim = RADDLE_MAX_DIM, .name = "wide"};
    for (int i = 0; i < RADDLE_MAX_DIM; i++) {
        wide.shape[i] = INT64_MIN; /* the longest text a shape can have */
    }
    CHECK_FAILS(raddle_tensor_check_shape(&wide, 1, (const int64_t[]){1}), RADDLE_ERR_SHAPE,
                "-9223372036854775808]");
}

static void test_dtype(void) {
    raddle_tensor q = MAKE(RADDLE_F32, 2);
    CHECK_OK(raddle_tensor_check_dtype(&q, RADDLE_F32));
    CHECK_FAILS(raddle_tensor_check_dtype(&q, RADDLE_BF16), RADDLE_ERR_DTYPE,
                "q: expected dtype bfloat16, got float32; convert it to bfloat16");
    CHECK_FAILS(raddle_tensor_check_index_dtype(&q), RADDLE_ERR_DTYPE,
                "q: expected dtype int32 or int64, got float32");
    q.dtype = RADDLE_U16;
    CHECK_FAILS(raddle_tensor_check_dtype(&q, RADDLE_BF16), RADDLE_ERR_DTYPE,
                "say dtype=\"bfloat16\"");
    CHECK_FAILS(raddle_tensor_check_dtype(&q, RADDLE_F8_E4M3), RADDLE_ERR_DTYPE,
                "got uint16; convert it to float8_e4m3fn");
    q.dtype = RADDLE_I64;
    CHECK_OK(raddle_tensor_check_index_dtype(&q));
}

static void test_writable(void) {
    raddle_tensor q = MAKE(RADDLE_F32, 2);
    CHECK_OK(raddle_tensor_check_writable(&q));
    q.read_only = true;
    CHECK_FAILS(raddle_tensor_check_writable(&q), RADDLE_ERR_VALUE,
                "q: expected a tensor that may be");
}

static void test_inner_contiguous(void) {
    raddle_tensor q = STRIDED2(3, 4, 100, 1);
    CHECK_OK(raddle_tensor_check_inner_contiguous(&q));
    q.stride[1] = 2;
    CHECK_FAILS(raddle_tensor_check_inner_contiguous(&q), RADDLE_ERR_UNSUPPORTED,
                "q: expected stride 1 in its last dimension, got 2");
    q.stride[1] = -1;
    CHECK_FAILS(raddle_tensor_check_inner_contiguous(&q), RADDLE_ERR_UNSUPPORTED, "got -1");
    q.shape[1] = 1;
    CHECK_OK(raddle_tensor_check_inner_contiguous(&q));
    q.shape[1] = 4;
    q.shape[0] = 0;
    CHECK_OK(raddle_tensor_check_inner_contiguous(&q));
    q.ndim = 0;
    CHECK_OK(raddle_tensor_check_inner_contiguous(&q));
}

static void test_aligned(void) {
    raddle_tensor q = STRIDED2(3, 4, 8, 1);
    q.data = (void *)(uintptr_t)0x1000;
    CHECK_OK(raddle_tensor_check_aligned(&q, 16));
    CHECK_OK(raddle_tensor_check_aligned(&q, 32));
    CHECK_FAILS(
        raddle_tensor_check_aligned(&q, 64), RADDLE_ERR_UNSUPPORTED,
        "q: expected every stride but the last to be a multiple of 64 bytes, got 8 elements");
    q.stride[0] = -6;
    CHECK_OK(raddle_tensor_check_aligned(&q, 8));
    CHECK_FAILS(raddle_tensor_check_aligned(&q, 16), RADDLE_ERR_UNSUPPORTED, "got -6 elements");
    q.shape[0] = 1;
    CHECK_OK(raddle_tensor_check_aligned(&q, 16));
    q.data = (void *)(uintptr_t)0x1004;
    CHECK_FAILS(raddle_tensor_check_aligned(&q, 16), RADDLE_ERR_UNSUPPORTED, "4 bytes past");
    q.shape[0] = 0;
    CHECK_OK(raddle_tensor_check_aligned(&q, 16));
    q.shape[0] = 2;
    q.data = (void *)(uintptr_t)0x1000;
    q.stride[0] = INT64_MIN;
    CHECK_OK(raddle_tensor_check_aligned(&q, 16));
    q.stride[0] = INT64_MAX;
    CHECK_FAILS(raddle_tensor_check_aligned(&q, 16), RADDLE_ERR_UNSUPPORTED, "dimension 0");
}

/* Whether two index tuples of a small tensor meet, by trying them all. */
static bool overlaps(const raddle_tensor *tensor) {
    int seen[1024] = {0};
    for (int64_t i = 0; i < tensor->shape[0]; i++) {
        for (int64_t j = 0; j < tensor->shape[1]; j++) {
            const int64_t at = 512 + i * tensor->stride[0] + j * tensor->stride[1];
            if (seen[at]++ > 0) {
                return true;
            }
        }
    }
    return false;
}

static void test_no_overlap(void) {
    for (int64_t rows = 0; rows < 5; rows++) {
        for (int64_t columns = 0; columns < 5; columns++) {
            for (int64_t a = -12; a <= 12; a++) {
                for (int64_t b = -12; b <= 12; b++) {
                    const raddle_tensor q = STRIDED2(rows, columns, a, b);
                    if (raddle_tensor_check_no_overlap(&q) == RADDLE_OK) {
                        CHECK(!overlaps(&q));
                    }
                }
            }
        }
    }
    const raddle_tensor accepted[] = {STRIDED2(3, 4, 4, 1),  STRIDED2(3, 4, 1, 3),
                                      STRIDED2(3, 4, -8, 2), STRIDED2(1, 4, 0, 1),
                                      STRIDED2(0, 4, 0, 0),  STRIDED2(3, 4, -4, -1)};
    for (size_t i = 0; i < sizeof accepted / sizeof accepted[0]; i++) {
        CHECK_OK(raddle_tensor_check_no_overlap(&accepted[i]));
    }
    raddle_tensor q = STRIDED2(3, 4, 0, 1); /* expanded rows */
    CHECK_FAILS(raddle_tensor_check_no_overlap(&q), RADDLE_ERR_SHAPE,
                "got stride 0 in dimension 0");
    q = STRIDED2(3, 4, 3, 1); /* sliding windows */
    CHECK_FAILS(raddle_tensor_check_no_overlap(&q), RADDLE_ERR_SHAPE,
                "got stride 3 in dimension 0");
    q = make(RADDLE_F32, 3, (const int64_t[]){2, 1000, 1000},
             (const int64_t[]){INT64_MIN, INT64_MAX / 2, INT64_MAX / 4});
    CHECK_FAILS(raddle_tensor_check_no_overlap(&q), RADDLE_ERR_SHAPE, "dimension 1");
    q.ndim = 0;
    CHECK_OK(raddle_tensor_check_no_overlap(&q));
}

static void test_index_at(void) {
    const int32_t narrow[] = {1, -2, 3, INT32_MIN};
    const int64_t wide[] = {5, -6, INT64_MAX};
    raddle_tensor q = MAKE(RADDLE_I32, 4);
    q.data = (void *)(uintptr_t)narrow;
    CHECK_INT(raddle_tensor_index_at(&q, 3), INT32_MIN);
    q.data = (void *)(uintptr_t)(narrow + 3);
    q.stride[0] = -1;
    CHECK_INT(raddle_tensor_index_at(&q, 2), -2);
    q = MAKE(RADDLE_I64, 2);
    q.data = (void *)(uintptr_t)wide;
    q.stride[0] = 2;
    CHECK_INT(raddle_tensor_index_at(&q, 1), INT64_MAX);
}

int main(void) {
    test_dtypes();
    test_devices();
    test_count();
    test_contiguous();
    test_shape();
    test_dtype();
    test_writable();
    test_inner_contiguous();
    test_aligned();
    test_no_overlap();
    test_index_at();
    return check_report();
}

/* blas.c - finds cublasLt, and keeps per device what it chose for each shape.
 *
 * cublasLt counts columns first: y^T[n, m] = w[n, k] x^T[k, m] is what it is asked for, with w
 * transposed, so that the rows of all three stay contiguous. One lock per device guards the table
 * and the descriptors, whose bias pointer changes with every call, up to the launch.
 */
#include "cuda/blas.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/hash.h"
#include "base/tensor.h"
#include "cuda/library.h"
#include "cuda/scratch.h"

typedef struct lt_handle_st *lt_handle;
typedef struct lt_matmul_st *lt_matmul;
typedef struct lt_layout_st *lt_layout;
typedef struct lt_preference_st *lt_preference;

typedef struct lt_algo {
    uint64_t data[8];
} lt_algo;

typedef struct lt_heuristic {
    lt_algo algo;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
} lt_heuristic;
_Static_assert(sizeof(lt_algo) == 64, "cublasLtMatmulAlgo_t has 64 bytes");
_Static_assert(sizeof(lt_heuristic) == 96, "cublasLtMatmulHeuristicResult_t has 96 bytes");

#define LT_SYMBOLS(X)                                                                              \
    X(get_version, size_t, "cublasLtGetVersion", (void))                                           \
    X(get_status_string, const char *, "cublasLtGetStatusString", (int status))                    \
    X(create, int, "cublasLtCreate", (lt_handle * handle))                                         \
    X(matmul_create, int, "cublasLtMatmulDescCreate",                                              \
      (lt_matmul * matmul, int compute_type, int scale_type))                                      \
    X(matmul_destroy, int, "cublasLtMatmulDescDestroy", (lt_matmul matmul))                        \
    X(matmul_set, int, "cublasLtMatmulDescSetAttribute",                                           \
      (lt_matmul matmul, int attribute, const void *value, size_t bytes))                          \
    X(layout_create, int, "cublasLtMatrixLayoutCreate",                                            \
      (lt_layout * layout, int type, uint64_t rows, uint64_t columns, int64_t stride))             \
    X(layout_destroy, int, "cublasLtMatrixLayoutDestroy", (lt_layout layout))                      \
    X(preference_create, int, "cublasLtMatmulPreferenceCreate", (lt_preference * preference))      \
    X(preference_destroy, int, "cublasLtMatmulPreferenceDestroy", (lt_preference preference))      \
    X(preference_set, int, "cublasLtMatmulPreferenceSetAttribute",                                 \
      (lt_preference preference, int attribute, const void *value, size_t bytes))                  \
    X(get_heuristic, int, "cublasLtMatmulAlgoGetHeuristic",                                        \
      (lt_handle handle, lt_matmul matmul, lt_layout a, lt_layout b, lt_layout c, lt_layout d,     \
       lt_preference preference, int wanted, lt_heuristic *results, int *found))                   \
    X(matmul, int, "cublasLtMatmul",                                                               \
      (lt_handle handle, lt_matmul matmul, const void *alpha, const void *a, lt_layout a_layout,   \
       const void *b, lt_layout b_layout, const void *beta, const void *c, lt_layout c_layout,     \
       void *d, lt_layout d_layout, const lt_algo *algo, void *workspace, size_t workspace_bytes,  \
       CUstream stream))

typedef struct lt_functions {
#define LT_DECLARE(member, result, symbol, arguments) result(*member) arguments;
    LT_SYMBOLS(LT_DECLARE)
#undef LT_DECLARE
} lt_functions;

/* Numbers of cublasLt's headers. */
enum {
    TYPE_R_32F = 0,
    TYPE_R_16F = 2,
    TYPE_R_16BF = 14,
    COMPUTE_32F = 68,
    OPERATION_T = 1,
    MATMUL_TRANSPOSE_A = 3,
    MATMUL_EPILOGUE = 7,
    MATMUL_BIAS_POINTER = 8,
    MATMUL_SM_COUNT_TARGET = 15,
    EPILOGUE_BIAS = 4,
    PREFERENCE_WORKSPACE_BYTES = 1,
    PREFERENCE_REDUCTIONS = 3,
    REDUCTION_IN_COMPUTE_TYPE = 2, /* parts of a sum are added in float32, not in y's dtype */
    PREFERENCE_ALIGNMENT_A = 5,    /* then B, C, D */
};

enum { MAX_CHOICES = 1024, TABLE_SIZE = 2048, MAX_ALIGNMENT = 256 };

/* What a choice depends on. No padding. */
typedef struct choice_key {
    int64_t m, n, k, x_stride, w_stride, y_stride;
    int32_t dtype, y_dtype, has_bias, max_sms;
    uint32_t alignments[3]; /* bytes, of w, x, y */
    int32_t reserved;
} choice_key;
_Static_assert(sizeof(choice_key) == 80, "hashed as bytes");

typedef struct gemm_choice {
    choice_key key;
    lt_matmul matmul;
    lt_layout w, x, y;
    lt_algo algo;
} gemm_choice;

typedef struct device_blas {
    pthread_mutex_t mutex;
    lt_handle handle;
    gemm_choice *table[TABLE_SIZE]; /* open addressing */
    int num_choices;
} device_blas;

static const raddle_library_spec lt_spec = {
    .stem = "libcublasLt.so",
    .sonames = (const char *const[]){"libcublasLt.so.13", "libcublasLt.so.12", NULL},
    .wheel_folders = (const char *const[]){"nvidia/cu13/lib", "nvidia/cublas/lib", NULL},
};

static lt_functions lt;
static raddle_blas_info lt_info;
static char lt_path[RADDLE_LIBRARY_PATH_BYTES];
static char lt_tried[RADDLE_LIBRARY_TRIED_BYTES];
static pthread_once_t lt_once = PTHREAD_ONCE_INIT;
static bool lt_is_open;

static pthread_mutex_t devices_mutex = PTHREAD_MUTEX_INITIALIZER;
static device_blas *devices[RADDLE_CUDA_MAX_DEVICES];

/* ---------------------------------------------------------------- opening */

static const char *bind_symbols(void *handle) {
#define LT_BIND(member, result, symbol, arguments)                                                 \
    {                                                                                              \
        void (*function)(void) = raddle_library_symbol(handle, symbol);                            \
        if (function == NULL) {                                                                    \
            return symbol;                                                                         \
        }                                                                                          \
        lt.member = (result(*) arguments)function;                                                 \
    }
    LT_SYMBOLS(LT_BIND)
#undef LT_BIND
    return NULL;
}

static bool accept_handle(void *handle, char reason[RADDLE_LIBRARY_PATH_BYTES]) {
    const char *missing = bind_symbols(handle);
    if (missing != NULL) {
        snprintf(reason, RADDLE_LIBRARY_PATH_BYTES, "too old: it lacks %s", missing);
        return false;
    }
    const int driver_major = raddle_cuda_driver_version() / 1000;
    lt_info.version = (int)lt.get_version();
    if (lt_info.version / 10000 > driver_major) {
        snprintf(reason, RADDLE_LIBRARY_PATH_BYTES, "of CUDA %d, the driver is of CUDA %d",
                 lt_info.version / 10000, driver_major);
        return false;
    }
    return true;
}

static bool open_candidate(void *context, const raddle_library_candidate *candidate,
                           char reason[RADDLE_LIBRARY_PATH_BYTES]) {
    (void)context;
    void *handle = raddle_library_open(candidate, reason);
    if (handle == NULL) {
        return false;
    }
    if (!accept_handle(handle, reason)) {
        dlclose(handle);
        return false;
    }
    raddle_library_path_of(dlsym(handle, "cublasLtMatmul"), lt_path);
    return true; /* the handle is kept for the life of the process */
}

static void open_lt(void) {
    lt_is_open = raddle_library_search(&lt_spec, open_candidate, NULL, lt_tried);
    lt_info.path = lt_path;
}

raddle_status raddle_blas_get_info(raddle_blas_info *out_info) {
    pthread_once(&lt_once, open_lt);
    RADDLE_REQUIRE(lt_is_open, RADDLE_ERR_UNSUPPORTED,
                   "cuda: cublasLt, which multiplies matrices, was not found; run: pip install %s. "
                   "Looked at: %s",
                   raddle_cuda_driver_version() / 1000 == 12 ? "nvidia-cublas-cu12"
                                                             : "nvidia-cublas",
                   lt_tried);
    *out_info = lt_info;
    return RADDLE_OK;
}

static raddle_status check_lt(int result, const char *doing) {
    RADDLE_REQUIRE(result == 0, RADDLE_ERR_CUDA, "%s: cublasLt %d answered %s", doing,
                   lt_info.version, lt.get_status_string(result));
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- choices */

static int data_type(raddle_dtype dtype) {
    return dtype == RADDLE_F32 ? TYPE_R_32F : dtype == RADDLE_F16 ? TYPE_R_16F : TYPE_R_16BF;
}

/* The largest power of two that divides an address and the bytes between its rows. */
static uint32_t alignment_of(const void *data, int64_t stride, raddle_dtype dtype) {
    const uint64_t bits =
        (uint64_t)(uintptr_t)data | (uint64_t)stride * raddle_dtype_bytes(dtype) | MAX_ALIGNMENT;
    return (uint32_t)(bits & (~bits + 1));
}

static choice_key make_key(const raddle_blas_gemm_args *args) {
    return (choice_key){
        .m = args->m,
        .n = args->n,
        .k = args->k,
        .x_stride = args->x_stride,
        .w_stride = args->w_stride,
        .y_stride = args->y_stride,
        .dtype = (int32_t)args->dtype,
        .y_dtype = (int32_t)args->y_dtype,
        .has_bias = args->bias != NULL,
        .max_sms = args->max_sms,
        .alignments = {alignment_of(args->w, args->w_stride, args->dtype),
                       alignment_of(args->x, args->x_stride, args->dtype),
                       alignment_of(args->y, args->y_stride, args->y_dtype)},
    };
}

static void destroy_choice(gemm_choice *choice) {
    if (choice->matmul != NULL) {
        lt.matmul_destroy(choice->matmul);
    }
    lt_layout layouts[] = {choice->w, choice->x, choice->y};
    for (int i = 0; i < 3; i++) {
        if (layouts[i] != NULL) {
            lt.layout_destroy(layouts[i]);
        }
    }
    raddle_free(choice);
}

static raddle_status describe_gemm(const choice_key *key, gemm_choice *choice) {
    const int type = data_type((raddle_dtype)key->dtype);
    const int y_type = data_type((raddle_dtype)key->y_dtype);
    const int transpose = OPERATION_T;
    const uint32_t epilogue = EPILOGUE_BIAS;
    RADDLE_TRY(check_lt(lt.matmul_create(&choice->matmul, COMPUTE_32F, TYPE_R_32F),
                        "describing a product"));
    RADDLE_TRY(
        check_lt(lt.matmul_set(choice->matmul, MATMUL_TRANSPOSE_A, &transpose, sizeof transpose),
                 "describing a product"));
    if (key->has_bias) {
        RADDLE_TRY(
            check_lt(lt.matmul_set(choice->matmul, MATMUL_EPILOGUE, &epilogue, sizeof epilogue),
                     "describing a product"));
    }
    if (key->max_sms > 0) {
        RADDLE_TRY(check_lt(lt.matmul_set(choice->matmul, MATMUL_SM_COUNT_TARGET, &key->max_sms,
                                          sizeof key->max_sms),
                            "describing a product"));
    }
    const uint64_t m = (uint64_t)key->m, n = (uint64_t)key->n, k = (uint64_t)key->k;
    RADDLE_TRY(
        check_lt(lt.layout_create(&choice->w, type, k, n, key->w_stride), "describing a weight"));
    RADDLE_TRY(
        check_lt(lt.layout_create(&choice->x, type, k, m, key->x_stride), "describing an input"));
    return check_lt(lt.layout_create(&choice->y, y_type, n, m, key->y_stride),
                    "describing an output");
}

static raddle_status fill_preference(const choice_key *key, uint64_t workspace_bytes,
                                     lt_preference preference) {
    RADDLE_TRY(check_lt(lt.preference_set(preference, PREFERENCE_WORKSPACE_BYTES, &workspace_bytes,
                                          sizeof workspace_bytes),
                        "choosing a product's kernel"));
    const uint32_t reductions = REDUCTION_IN_COMPUTE_TYPE;
    RADDLE_TRY(check_lt(
        lt.preference_set(preference, PREFERENCE_REDUCTIONS, &reductions, sizeof reductions),
        "choosing a product's kernel"));
    static const int operands[] = {0, 1, 2, 2}; /* A is w, B is x, C and D are y */
    for (int i = 0; i < 4; i++) {
        const uint32_t bytes = key->alignments[operands[i]];
        RADDLE_TRY(check_lt(
            lt.preference_set(preference, PREFERENCE_ALIGNMENT_A + i, &bytes, sizeof bytes),
            "choosing a product's kernel"));
    }
    return RADDLE_OK;
}

static raddle_status choose_algo(lt_handle handle, const choice_key *key, const void *bias,
                                 size_t workspace_bytes, gemm_choice *choice) {
    lt_preference preference = NULL;
    lt_heuristic result;
    int found = 0;
    if (bias != NULL) { /* the heuristic looks at it */
        RADDLE_TRY(check_lt(
            lt.matmul_set(choice->matmul, MATMUL_BIAS_POINTER, (const void *)&bias, sizeof bias),
            "describing a bias"));
    }
    RADDLE_TRY(check_lt(lt.preference_create(&preference), "choosing a product's kernel"));
    raddle_status status = fill_preference(key, workspace_bytes, preference);
    if (status == RADDLE_OK) {
        const int answer = lt.get_heuristic(handle, choice->matmul, choice->w, choice->x, choice->y,
                                            choice->y, preference, 1, &result, &found);
        if (answer != 0 || found < 1 || result.state != 0) {
            status = raddle_fail(
                RADDLE_ERR_UNSUPPORTED,
                "linear: cublasLt %d has no kernel for [%lld, %lld] times the transpose of "
                "[%lld, %lld], %s to %s (%s)",
                lt_info.version, (long long)key->m, (long long)key->k, (long long)key->n,
                (long long)key->k, raddle_dtype_name((raddle_dtype)key->dtype),
                raddle_dtype_name((raddle_dtype)key->y_dtype),
                answer != 0 ? lt.get_status_string(answer) : "none found");
        } else {
            choice->algo = result.algo;
        }
    }
    lt.preference_destroy(preference);
    return status;
}

static raddle_status make_choice(lt_handle handle, const choice_key *key, const void *bias,
                                 size_t workspace_bytes, gemm_choice **out_choice) {
    gemm_choice *choice = raddle_alloc_zero(sizeof *choice);
    if (choice == NULL) {
        return raddle_fail_memory(sizeof *choice);
    }
    choice->key = *key;
    raddle_status status = describe_gemm(key, choice);
    if (status == RADDLE_OK) {
        status = choose_algo(handle, key, bias, workspace_bytes, choice);
    }
    if (status != RADDLE_OK) {
        destroy_choice(choice);
        return status;
    }
    *out_choice = choice;
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- the table */

/* Where key is, or where it would go. */
static gemm_choice **find_place(device_blas *blas, const choice_key *key) {
    size_t at = (size_t)raddle_hash_bytes(key, sizeof *key).low % TABLE_SIZE;
    while (blas->table[at] != NULL && memcmp(&blas->table[at]->key, key, sizeof *key) != 0) {
        at = (at + 1) % TABLE_SIZE;
    }
    return &blas->table[at];
}

/* Shapes come and go with the batch; starting over now and then costs little. */
static void clear_table(device_blas *blas) {
    for (size_t i = 0; i < TABLE_SIZE; i++) {
        if (blas->table[i] != NULL) {
            destroy_choice(blas->table[i]);
            blas->table[i] = NULL;
        }
    }
    blas->num_choices = 0;
}

static raddle_status get_choice(device_blas *blas, const choice_key *key, const void *bias,
                                size_t workspace_bytes, const gemm_choice **out_choice) {
    gemm_choice **place = find_place(blas, key);
    if (*place == NULL) {
        if (blas->num_choices == MAX_CHOICES) {
            clear_table(blas);
            place = find_place(blas, key);
        }
        RADDLE_TRY(make_choice(blas->handle, key, bias, workspace_bytes, place));
        blas->num_choices++;
    }
    *out_choice = *place;
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- devices */

/* With devices_mutex held and the context current. */
static raddle_status open_device(const raddle_cuda_device *device, device_blas **out_blas) {
    device_blas *blas = raddle_alloc_zero(sizeof *blas);
    if (blas == NULL) {
        return raddle_fail_memory(sizeof *blas);
    }
    const int mode = raddle_cuda_relax_capture(device->driver);
    raddle_status status = check_lt(lt.create(&blas->handle), "starting cublasLt");
    raddle_cuda_restore_capture(device->driver, mode);
    if (status != RADDLE_OK) {
        raddle_free(blas);
        return status;
    }
    pthread_mutex_init(&blas->mutex, NULL);
    *out_blas = blas;
    return RADDLE_OK;
}

static raddle_status get_device(const raddle_cuda_device *device, device_blas **out_blas) {
    device_blas **place = &devices[device->index];
    raddle_blas_info info;
    *out_blas = __atomic_load_n(place, __ATOMIC_ACQUIRE);
    if (*out_blas != NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_blas_get_info(&info));
    raddle_status status = RADDLE_OK;
    pthread_mutex_lock(&devices_mutex);
    if (*place == NULL) {
        device_blas *blas = NULL;
        status = open_device(device, &blas);
        __atomic_store_n(place, blas, __ATOMIC_RELEASE);
    }
    *out_blas = *place;
    pthread_mutex_unlock(&devices_mutex);
    return status;
}

raddle_status raddle_blas_prepare(const raddle_cuda_device *device) {
    device_blas *blas = NULL;
    bool pushed = false;
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    raddle_status status = get_device(device, &blas);
    raddle_cuda_pop(device, pushed);
    return status;
}

/* ---------------------------------------------------------------- the product */

/* With blas->mutex held. */
static raddle_status launch_gemm(device_blas *blas, const raddle_blas_gemm_args *args,
                                 void *workspace, size_t workspace_bytes, raddle_stream stream) {
    static const float one = 1.0f, zero = 0.0f;
    const choice_key key = make_key(args);
    const gemm_choice *choice = NULL;
    RADDLE_TRY(get_choice(blas, &key, args->bias, workspace_bytes, &choice));
    if (args->bias != NULL) {
        RADDLE_TRY(check_lt(lt.matmul_set(choice->matmul, MATMUL_BIAS_POINTER,
                                          (const void *)&args->bias, sizeof args->bias),
                            "describing a bias"));
    }
    return check_lt(lt.matmul(blas->handle, choice->matmul, &one, args->w, choice->w, args->x,
                              choice->x, &zero, args->y, choice->y, args->y, choice->y,
                              &choice->algo, workspace, workspace_bytes, stream),
                    "multiplying matrices");
}

static raddle_status run_gemm(const raddle_cuda_device *device, const raddle_blas_gemm_args *args,
                              raddle_stream stream) {
    device_blas *blas = NULL;
    void *workspace = NULL;
    size_t workspace_bytes = 0;
    RADDLE_TRY(get_device(device, &blas));
    RADDLE_TRY(raddle_cuda_scratch_get(device, stream, &workspace, &workspace_bytes));
    /* The first launch of a kernel may load it, which a capture would forbid. */
    const int mode = raddle_cuda_relax_capture(device->driver);
    pthread_mutex_lock(&blas->mutex);
    raddle_status status = launch_gemm(blas, args, workspace, workspace_bytes, stream);
    pthread_mutex_unlock(&blas->mutex);
    raddle_cuda_restore_capture(device->driver, mode);
    return status;
}

raddle_status raddle_blas_gemm(const raddle_cuda_device *device, const raddle_blas_gemm_args *args,
                               raddle_stream stream) {
    bool pushed = false;
    if (args->m == 0 || args->n == 0) {
        return RADDLE_OK;
    }
    RADDLE_REQUIRE(args->k > 0, RADDLE_ERR_SHAPE,
                   "linear: expected at least one input feature, got %lld", (long long)args->k);
    raddle_blas_gemm_args gemm = *args;
    if (gemm.m == 1) { /* the stride of a single row says nothing */
        gemm.x_stride = gemm.k;
        gemm.y_stride = gemm.n;
    }
    gemm.w_stride = gemm.n == 1 ? gemm.k : gemm.w_stride;
    RADDLE_REQUIRE(gemm.x_stride >= gemm.k && gemm.w_stride >= gemm.k && gemm.y_stride >= gemm.n,
                   RADDLE_ERR_UNSUPPORTED,
                   "linear: rows must not overlap or run backwards on CUDA; got strides %lld (x), "
                   "%lld (weight), %lld (out) for rows of %lld, %lld and %lld",
                   (long long)gemm.x_stride, (long long)gemm.w_stride, (long long)gemm.y_stride,
                   (long long)gemm.k, (long long)gemm.k, (long long)gemm.n);
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    raddle_status status = run_gemm(device, &gemm, stream);
    raddle_cuda_pop(device, pushed);
    return status;
}

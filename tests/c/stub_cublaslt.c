/* stub_cublaslt.c - a cublasLt of the host that multiplies: float32 matrices, columns first, by the
 * attributes that it was given, with the rules that the real one has.
 */
#include "stub.h"

#define EXPORT __attribute__((visibility("default")))

enum {
    INVALID_VALUE = 7,
    NOT_SUPPORTED = 15,
    TYPE_32F = 0,
    COMPUTE_32F = 68,
    ATTRIBUTE_TRANSPOSE_A = 3,
    ATTRIBUTE_EPILOGUE = 7,
    ATTRIBUTE_BIAS = 8,
    ATTRIBUTE_SM_COUNT_TARGET = 15,
    PREFERENCE_WORKSPACE = 1,
    PREFERENCE_REDUCTIONS = 3,
    PREFERENCE_ALIGNMENT_A = 5,
};

typedef struct matmul_desc {
    int compute_type, transpose_a, epilogue, num_sms;
    const float *bias;
} matmul_desc;

typedef struct layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
} layout;

typedef struct preference {
    uint64_t workspace_bytes;
    unsigned alignments[4], reductions;
} preference;

typedef struct heuristic {
    uint64_t algo[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
} heuristic;

static stub_cublaslt_state state = {.version = 130100};
static int the_handle;

EXPORT void *stub_cublaslt_panel(void) {
    return &state;
}

EXPORT size_t cublasLtGetVersion(void) {
    return (size_t)state.version;
}

EXPORT const char *cublasLtGetStatusString(int status) {
    return status == NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_OTHER";
}

EXPORT int cublasLtCreate(int **handle) {
    if (state.fail_create) {
        return INVALID_VALUE;
    }
    state.num_handles++;
    *handle = &the_handle;
    return 0;
}

/* ---------------------------------------------------------------- descriptions */

EXPORT int cublasLtMatmulDescCreate(matmul_desc **made, int compute_type, int scale_type) {
    if (scale_type != TYPE_32F) {
        return INVALID_VALUE;
    }
    *made = calloc(1, sizeof **made);
    (*made)->compute_type = compute_type;
    (*made)->epilogue = 1;
    state.live_descriptions++;
    return 0;
}

EXPORT int cublasLtMatmulDescDestroy(matmul_desc *self) {
    free(self);
    state.live_descriptions--;
    return 0;
}

EXPORT int cublasLtMatmulDescSetAttribute(matmul_desc *self, int attribute, const void *value,
                                          size_t bytes) {
    if (attribute == ATTRIBUTE_TRANSPOSE_A && bytes == 4) {
        memcpy(&self->transpose_a, value, bytes);
    } else if (attribute == ATTRIBUTE_EPILOGUE && bytes == 4) {
        memcpy(&self->epilogue, value, bytes);
    } else if (attribute == ATTRIBUTE_BIAS && bytes == sizeof self->bias) {
        memcpy(&self->bias, value, bytes);
    } else if (attribute == ATTRIBUTE_SM_COUNT_TARGET && bytes == 4) {
        memcpy(&self->num_sms, value, bytes);
    } else {
        return INVALID_VALUE;
    }
    return 0;
}

EXPORT int cublasLtMatrixLayoutCreate(layout **made, int type, uint64_t rows, uint64_t columns,
                                      int64_t stride) {
    if (stride < (int64_t)rows || rows == 0 || columns == 0) {
        return INVALID_VALUE;
    }
    *made = malloc(sizeof **made);
    **made = (layout){type, rows, columns, stride};
    state.live_descriptions++;
    return 0;
}

EXPORT int cublasLtMatrixLayoutDestroy(layout *self) {
    free(self);
    state.live_descriptions--;
    return 0;
}

EXPORT int cublasLtMatmulPreferenceCreate(preference **made) {
    *made = calloc(1, sizeof **made);
    state.live_descriptions++;
    return 0;
}

EXPORT int cublasLtMatmulPreferenceDestroy(preference *self) {
    free(self);
    state.live_descriptions--;
    return 0;
}

EXPORT int cublasLtMatmulPreferenceSetAttribute(preference *self, int attribute, const void *value,
                                                size_t bytes) {
    if (attribute == PREFERENCE_WORKSPACE && bytes == 8) {
        memcpy(&self->workspace_bytes, value, bytes);
    } else if (attribute == PREFERENCE_REDUCTIONS && bytes == 4) {
        memcpy(&self->reductions, value, bytes);
    } else if (attribute >= PREFERENCE_ALIGNMENT_A && attribute < PREFERENCE_ALIGNMENT_A + 4 &&
               bytes == 4) {
        memcpy(&self->alignments[attribute - PREFERENCE_ALIGNMENT_A], value, bytes);
    } else {
        return INVALID_VALUE;
    }
    return 0;
}

/* ---------------------------------------------------------------- products */

static bool fits(const matmul_desc *matmul, const layout *a, const layout *b, const layout *d) {
    const uint64_t inner = matmul->transpose_a ? a->rows : a->columns;
    const uint64_t outer = matmul->transpose_a ? a->columns : a->rows;
    return inner == b->rows && outer == d->rows && b->columns == d->columns;
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(int *handle, const matmul_desc *matmul, const layout *a,
                                          const layout *b, const layout *c, const layout *d,
                                          const preference *wanted, int count, heuristic *results,
                                          int *found) {
    if (handle != &the_handle || !fits(matmul, a, b, d) || c != d || count < 1) {
        return INVALID_VALUE;
    }
    state.num_heuristics++;
    memcpy(state.alignments, wanted->alignments, sizeof state.alignments);
    state.reductions = wanted->reductions;
    *found = state.has_no_kernel ? 0 : 1;
    if (state.has_no_kernel) {
        return NOT_SUPPORTED;
    }
    memset(results, 0, sizeof *results);
    results->algo[0] = 0x1234;
    results->workspace_bytes = wanted->workspace_bytes;
    return 0;
}

EXPORT int cublasLtMatmul(int *handle, const matmul_desc *matmul, const float *alpha,
                          const float *a, const layout *a_layout, const float *b,
                          const layout *b_layout, const float *beta, const float *c,
                          const layout *c_layout, float *d, const layout *d_layout,
                          const uint64_t *algo, void *workspace, size_t workspace_bytes,
                          void *stream) {
    (void)c, (void)c_layout;
    if (handle != &the_handle || algo[0] != 0x1234 || *alpha != 1 || *beta != 0 ||
        matmul->compute_type != COMPUTE_32F || workspace == NULL ||
        !fits(matmul, a_layout, b_layout, d_layout)) {
        return INVALID_VALUE;
    }
    state.num_products++;
    state.stream = stream;
    state.workspace = workspace;
    state.num_sms = matmul->num_sms;
    memset(workspace, 0, workspace_bytes < 4096 ? workspace_bytes : 4096);
    if (a_layout->type != TYPE_32F || d_layout->type != TYPE_32F) {
        return 0; /* only counted */
    }
    const int64_t inner = (int64_t)b_layout->rows;
    for (int64_t column = 0; column < (int64_t)d_layout->columns; column++) {
        for (int64_t row = 0; row < (int64_t)d_layout->rows; row++) {
            float sum = matmul->epilogue == 4 ? matmul->bias[row] : 0.0f;
            for (int64_t i = 0; i < inner; i++) {
                const int64_t at =
                    matmul->transpose_a ? i + row * a_layout->stride : row + i * a_layout->stride;
                sum += a[at] * b[i + column * b_layout->stride];
            }
            d[row + column * d_layout->stride] = sum;
        }
    }
    return 0;
}

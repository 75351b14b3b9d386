/* gemm.c - packs weights, cuts a product into tiles for the micro kernels, and hands them to
 * threads.
 *
 * A worker owns panels: RADDLE_GEMM_COLUMNS columns of the weight, whose whole depth is read once,
 * in order, while all rows of x (up to CHUNK_ROWS, packed before, shared by all) pass over it:
 *
 *   for each chunk of rows:  pack x into tiles
 *     for each panel (parallel):  for each block of depth:  for each tile:  c[tile] += tile * block
 *                                 c + bias -> out
 *
 * A block of a panel stays in the L1 cache while the tiles pass, c and the tiles come from the L2.
 * With one row that is a plain stream through the weight. A sum over depth is always made of the
 * same blocks in the same order, so a row's result does not depend on the others.
 */
#include "cpu/gemm.h"

#include <string.h>

#include "base/alloc.h"
#include "base/threads.h"
#include "cpu/gemm_kernels.h"
#include "cpu/vec.h"

enum {
    COLUMNS = RADDLE_GEMM_COLUMNS,
    BLOCK_DEPTH = 256, /* even; a block of float32 is 32 KB, of 16-bit types half of that */
    CHUNK_ROWS = 256,
    PACK_DEPTH = 64,
    TASK_BYTES = 1 << 16,   /* of weight: about 5 us of one core's memory bandwidth */
    TASK_PRODUCTS = 1 << 19 /* the same in multiplications */
};

struct raddle_gemm_weight {
    const raddle_gemm_kernels *kernels;
    raddle_dtype dtype;
    size_t element_bytes;
    int64_t columns, depth;
    int64_t depth_padded; /* even for bfloat16 */
    int64_t num_panels;
    char *data; /* [num_panels][depth_padded][COLUMNS] elements */
};

/* ---------------------------------------------------------------- weight */

typedef struct pack_job {
    const raddle_gemm_weight *packed;
    const raddle_tensor *weight;
} pack_job;

/* Where element (k, n) of a panel lies. */
static int64_t panel_element(raddle_dtype dtype, int64_t k, int n) {
    return dtype == RADDLE_BF16 ? (k / 2 * COLUMNS + n) * 2 + k % 2 : k * COLUMNS + n;
}

/* count elements of one row of the weight, from depth k on, to column n of a panel. */
static void pack_column(const pack_job *job, char *panel, int n, const char *row, int64_t k,
                        int64_t count) {
    const raddle_dtype dtype = job->packed->dtype;
    const int64_t step = job->weight->stride[1];
    if (dtype == RADDLE_F32) {
        const uint32_t *from = (const uint32_t *)(const void *)row + k * step;
        uint32_t *to = (uint32_t *)(void *)panel + k * COLUMNS + n;
        for (int64_t i = 0; i < count; i++) {
            to[i * COLUMNS] = from[i * step];
        }
        return;
    }
    const uint16_t *from = (const uint16_t *)(const void *)row;
    int64_t i = k;
    for (; dtype == RADDLE_BF16 && step == 1 && i + 2 <= k + count; i += 2) {
        memcpy(panel + (i / 2 * COLUMNS + n) * 4, from + i, 4);
    }
    for (; i < k + count; i++) {
        ((uint16_t *)(void *)panel)[panel_element(dtype, i, n)] = from[i * step];
    }
}

/* In blocks of depth that stay in the L1 cache until all columns are written. */
static void pack_panel(const pack_job *job, int64_t panel) {
    const raddle_gemm_weight *p = job->packed;
    const int64_t bytes = (int64_t)p->element_bytes;
    const int64_t left = p->columns - panel * COLUMNS;
    const int columns = (int)(left < COLUMNS ? left : COLUMNS);
    char *data = p->data + panel * p->depth_padded * COLUMNS * bytes;
    if (columns < COLUMNS || p->depth < p->depth_padded) {
        memset(data, 0, (size_t)(p->depth_padded * COLUMNS * bytes));
    }
    for (int64_t k = 0; k < p->depth; k += PACK_DEPTH) {
        const int64_t count = p->depth - k < PACK_DEPTH ? p->depth - k : PACK_DEPTH;
        for (int n = 0; n < columns; n++) {
            const int64_t row = (panel * COLUMNS + n) * job->weight->stride[0];
            pack_column(job, data, n, (const char *)job->weight->data + row * bytes, k, count);
        }
    }
}

static void pack_panels(void *context, int64_t begin, int64_t end, int worker) {
    (void)worker;
    for (int64_t panel = begin; panel < end; panel++) {
        pack_panel(context, panel);
    }
}

raddle_status raddle_gemm_weight_create(const raddle_tensor *weight,
                                        raddle_gemm_weight **out_weight) {
    raddle_gemm_weight *packed = raddle_alloc_zero(sizeof(*packed));
    if (!packed) {
        return raddle_fail_memory(sizeof(*packed));
    }
    packed->kernels = raddle_gemm_kernels_get();
    packed->dtype = weight->dtype;
    packed->element_bytes = raddle_dtype_bytes(weight->dtype);
    packed->columns = weight->shape[0];
    packed->depth = weight->shape[1];
    packed->depth_padded =
        weight->dtype == RADDLE_BF16 ? (packed->depth + 1) / 2 * 2 : packed->depth;
    packed->num_panels = (packed->columns + COLUMNS - 1) / COLUMNS;
    const size_t bytes =
        (size_t)(packed->num_panels * packed->depth_padded * COLUMNS) * packed->element_bytes;
    packed->data = raddle_alloc_aligned(bytes, 64);
    if (!packed->data) {
        raddle_free(packed);
        return raddle_fail_memory(bytes);
    }
    pack_job job = {packed, weight};
    raddle_threads_for(pack_panels, &job, packed->num_panels, 1);
    *out_weight = packed;
    return RADDLE_OK;
}

void raddle_gemm_weight_destroy(raddle_gemm_weight *weight) {
    if (weight) {
        raddle_free(weight->data);
        raddle_free(weight);
    }
}

/* ---------------------------------------------------------------- run */

/* One chunk of rows. */
typedef struct chunk_job {
    const raddle_gemm_weight *weight;
    const raddle_gemm_args *args;
    const raddle_vec *vec;
    int64_t row_begin;
    int rows;
    int tile_rows, num_tiles; /* the last tile may have fewer rows */
    const char *a;            /* packed x: tile t begins at element t * tile_rows * depth_padded */
    size_t a_element_bytes;
} chunk_job;

static int rows_of_tile(const chunk_job *job, int tile) {
    const int left = job->rows - tile * job->tile_rows;
    return left < job->tile_rows ? left : job->tile_rows;
}

static bool a_is_bf16(const raddle_gemm_weight *w) {
    return w->dtype == RADDLE_BF16 && w->kernels->a_is_bf16;
}

/* count elements of one row of x, from depth k on, to [depth / 2][rows][2]: whole pairs, then a
 * half one. */
static void pack_pairs(char *to, const char *x, int count, int rows) {
    for (int i = 0; i < count / 2; i++) {
        memcpy(to + (size_t)i * (size_t)rows * 4, x + 4 * i, 4);
    }
    if (count % 2 != 0) {
        char *last = to + (size_t)(count / 2) * (size_t)rows * 4;
        memcpy(last, x + 4 * (count / 2), 2);
        memset(last + 2, 0, 2);
    }
}

/* The same to [depth][rows], widened. */
static void pack_floats(const chunk_job *job, float *to, const char *x, int count, int rows) {
    float wide[BLOCK_DEPTH];
    job->vec->load[job->weight->dtype](wide, x, count);
    for (int i = 0; i < count; i++) {
        to[i * rows] = wide[i];
    }
    if (count % 2 != 0 && job->weight->dtype == RADDLE_BF16) {
        to[count * rows] = 0; /* the depth that makes it even */
    }
}

/* Block by block, so that what is written stays in the L1 cache until all rows are there. */
static void pack_tile(const chunk_job *job, int tile) {
    const raddle_gemm_weight *w = job->weight;
    const int rows = rows_of_tile(job, tile);
    const int64_t first = job->row_begin + (int64_t)tile * job->tile_rows;
    const int64_t step = (int64_t)job->a_element_bytes;
    char *a = (char *)job->a + (int64_t)tile * job->tile_rows * w->depth_padded * step;
    for (int64_t k = 0; k < w->depth; k += BLOCK_DEPTH) {
        const int count = (int)(w->depth - k < BLOCK_DEPTH ? w->depth - k : BLOCK_DEPTH);
        for (int r = 0; r < rows; r++) {
            const char *x = (const char *)job->args->x +
                            ((first + r) * job->args->x_stride_row + k) * (int64_t)w->element_bytes;
            if (a_is_bf16(w)) {
                pack_pairs(a + (k * rows + 2 * r) * step, x, count, rows);
            } else {
                pack_floats(job, (float *)(void *)(a + (k * rows + r) * step), x, count, rows);
            }
        }
    }
}

static void pack_tiles(void *context, int64_t begin, int64_t end, int worker) {
    (void)worker;
    for (int64_t tile = begin; tile < end; tile++) {
        pack_tile(context, (int)tile);
    }
}

/* Adds the bias and writes columns of out. */
static void store_panel(const chunk_job *job, float *c, int64_t panel) {
    const raddle_gemm_args *args = job->args;
    const int64_t first = panel * COLUMNS;
    const int64_t left = job->weight->columns - first;
    const int columns = (int)(left < COLUMNS ? left : COLUMNS);
    const int64_t bytes = (int64_t)raddle_dtype_bytes(args->out_dtype);
    for (int r = 0; r < job->rows; r++) {
        float *row = c + r * COLUMNS;
        for (int n = 0; args->bias && n < columns; n++) {
            row[n] += args->bias[first + n];
        }
        char *out =
            (char *)args->out + ((job->row_begin + r) * args->out_stride_row + first) * bytes;
        job->vec->store[args->out_dtype](out, row, columns);
    }
}

static void multiply_panel(const chunk_job *job, float *c, int64_t panel) {
    const raddle_gemm_weight *w = job->weight;
    const raddle_gemm_tile tile = w->kernels->tile[w->dtype];
    const char *b = w->data + panel * w->depth_padded * COLUMNS * (int64_t)w->element_bytes;
    for (int64_t k = 0; k < w->depth_padded; k += BLOCK_DEPTH) {
        const int64_t left = w->depth_padded - k;
        const int depth = (int)(left < BLOCK_DEPTH ? left : BLOCK_DEPTH);
        for (int t = 0; t < job->num_tiles; t++) {
            const int rows = rows_of_tile(job, t);
            const int64_t element = (int64_t)t * job->tile_rows * w->depth_padded + k * rows;
            tile(c + (size_t)t * (size_t)job->tile_rows * COLUMNS,
                 job->a + element * (int64_t)job->a_element_bytes,
                 b + k * COLUMNS * (int64_t)w->element_bytes, rows, depth, k > 0);
        }
    }
}

static void multiply_panels(void *context, int64_t begin, int64_t end, int worker) {
    _Alignas(64) float c[CHUNK_ROWS * RADDLE_GEMM_COLUMNS];
    (void)worker;
    for (int64_t panel = begin; panel < end; panel++) {
        multiply_panel(context, c, panel);
        store_panel(context, c, panel);
    }
}

/* Without depth the product is zero. */
static void store_bias(chunk_job *job) {
    float c[CHUNK_ROWS * RADDLE_GEMM_COLUMNS];
    for (int64_t panel = 0; panel < job->weight->num_panels; panel++) {
        memset(c, 0, sizeof(c));
        store_panel(job, c, panel);
    }
}

static int64_t panels_per_task(const chunk_job *job) {
    const int64_t elements = job->weight->depth_padded * COLUMNS;
    const int64_t by_bytes = TASK_BYTES / (elements * (int64_t)job->weight->element_bytes);
    const int64_t by_products = TASK_PRODUCTS / (elements * job->rows);
    const int64_t panels = by_bytes < by_products ? by_bytes : by_products;
    return panels < 1 ? 1 : panels;
}

/* One row of the type that the kernel reads needs no packing. */
static bool can_use_directly(const raddle_gemm_weight *w, int rows) {
    return rows == 1 && w->depth == w->depth_padded && (w->dtype == RADDLE_F32 || a_is_bf16(w));
}

raddle_status raddle_gemm_run(const raddle_gemm_weight *weight, const raddle_gemm_args *args) {
    const int max_rows = weight->kernels->max_rows;
    const int64_t chunk = args->rows < CHUNK_ROWS ? args->rows : CHUNK_ROWS;
    chunk_job job = {
        .weight = weight,
        .args = args,
        .vec = raddle_vec_get(),
        .a_element_bytes = a_is_bf16(weight) ? sizeof(uint16_t) : sizeof(float),
    };
    char *packed = NULL;
    if (!can_use_directly(weight, (int)chunk)) {
        const size_t bytes = (size_t)(chunk * weight->depth_padded) * job.a_element_bytes;
        packed = raddle_alloc_aligned(bytes, 64);
        if (!packed) {
            return raddle_fail_memory(bytes);
        }
    }
    for (int64_t row = 0; row < args->rows; row += CHUNK_ROWS) {
        job.row_begin = row;
        job.rows = (int)(args->rows - row < CHUNK_ROWS ? args->rows - row : CHUNK_ROWS);
        job.num_tiles = (job.rows + max_rows - 1) / max_rows;
        job.tile_rows = (job.rows + job.num_tiles - 1) / job.num_tiles;
        if (weight->depth == 0) {
            store_bias(&job);
            continue;
        }
        if (packed) {
            job.a = packed;
            raddle_threads_for(pack_tiles, &job, job.num_tiles, 4);
        } else {
            job.a = (const char *)args->x;
        }
        raddle_threads_for(multiply_panels, &job, weight->num_panels, panels_per_task(&job));
    }
    raddle_free(packed);
    return RADDLE_OK;
}

/* gemm.c - packs weights, cuts a product into tiles for the micro kernels, and hands them to
 * threads.
 *
 * The rows of x are cut into groups, as many as there are threads when each gets two tiles or more;
 * RADDLE_GEMM_COLUMNS columns of the weight are a panel. A worker packs the rows of a group for
 * itself and passes them over panel after panel:
 *
 *   for each group, for each panel (parallel):
 *     x of the group -> tiles, unless this worker did so for the panel before
 *     for each block of depth:  for each tile:  c[tile] += tile * block
 *     c + bias -> out
 *
 * Threads share nothing that is written: a line that one core wrote and another reads costs more
 * than packing it twice, and the loops around a product cut their rows at the same places. A block
 * of a panel stays in the L1 cache while the tiles pass, c and the tiles come from the L2. With one
 * row that is a plain stream through the weight. A sum over depth is always made of the same blocks
 * in the same order, so a row's result does not depend on the others.
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
    L2_BYTES = 1 << 20,
    MIN_GROUP_ROWS = 2 * RADDLE_GEMM_MAX_ROWS,
    MIN_STREAM_ROWS = 64, /* of a group when its panels come from memory: 4 GB/s for a core */
    MAX_GROUP_ROWS = 256,
    PACK_DEPTH = 64,
    TASK_BYTES = 1 << 16,    /* of weight: about 5 us of one core's memory bandwidth */
    TASK_PRODUCTS = 1 << 19, /* the same in multiplications */
    CACHE_LINE = 64
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

typedef struct gemm_job {
    const raddle_gemm_weight *weight;
    const raddle_gemm_args *args;
    const raddle_vec *vec;
    int64_t group_rows; /* the last group may have fewer */
    size_t a_element_bytes;
    char *buffers; /* one per worker: packed_group, then x of that group; NULL: x as it is */
    size_t buffer_bytes;
} gemm_job;

/* One group of rows. */
typedef struct row_group {
    int64_t row_begin;
    int rows;
    int tile_rows, num_tiles; /* the last tile may have fewer rows */
    const char *a;            /* tile t begins at element t * tile_rows * depth_padded */
} row_group;

static int rows_of_tile(const row_group *group, int tile) {
    const int left = group->rows - tile * group->tile_rows;
    return left < group->tile_rows ? left : group->tile_rows;
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
static void pack_floats(const gemm_job *job, float *to, const char *x, int count, int rows) {
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
static void pack_tile(const gemm_job *job, const row_group *group, int tile, char *a) {
    const raddle_gemm_weight *w = job->weight;
    const int rows = rows_of_tile(group, tile);
    const int64_t first = group->row_begin + (int64_t)tile * group->tile_rows;
    const int64_t step = (int64_t)job->a_element_bytes;
    a += (int64_t)tile * group->tile_rows * w->depth_padded * step;
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

/* Group number `index`, packed in this worker's buffer. */
static row_group open_group(const gemm_job *job, int64_t index, int worker) {
    const int max_rows = job->weight->kernels->max_rows;
    const int64_t row_begin = index * job->group_rows;
    const int64_t left = job->args->rows - row_begin;
    row_group group = {
        .row_begin = row_begin,
        .rows = (int)(left < job->group_rows ? left : job->group_rows),
        .a = job->args->x,
    };
    group.num_tiles = (group.rows + max_rows - 1) / max_rows;
    group.tile_rows = (group.rows + group.num_tiles - 1) / group.num_tiles;
    if (job->buffers) {
        char *buffer = job->buffers + (size_t)worker * job->buffer_bytes;
        int64_t *packed_group = (int64_t *)(void *)buffer;
        group.a = buffer + CACHE_LINE;
        for (int tile = 0; *packed_group != index && tile < group.num_tiles; tile++) {
            pack_tile(job, &group, tile, buffer + CACHE_LINE);
        }
        *packed_group = index;
    }
    return group;
}

/* Adds the bias and writes columns of out. */
static void store_panel(const gemm_job *job, const row_group *group, float *c, int64_t panel) {
    const raddle_gemm_args *args = job->args;
    const int64_t first = panel * COLUMNS;
    const int64_t left = job->weight->columns - first;
    const int columns = (int)(left < COLUMNS ? left : COLUMNS);
    const int64_t bytes = (int64_t)raddle_dtype_bytes(args->out_dtype);
    for (int r = 0; r < group->rows; r++) {
        float *row = c + r * COLUMNS;
        for (int n = 0; args->bias && n < columns; n++) {
            row[n] += args->bias[first + n];
        }
        char *out =
            (char *)args->out + ((group->row_begin + r) * args->out_stride_row + first) * bytes;
        job->vec->store[args->out_dtype](out, row, columns);
    }
}

static void multiply_panel(const gemm_job *job, const row_group *group, float *c, int64_t panel) {
    const raddle_gemm_weight *w = job->weight;
    const raddle_gemm_tile tile = w->kernels->tile[w->dtype];
    const char *b = w->data + panel * w->depth_padded * COLUMNS * (int64_t)w->element_bytes;
    if (w->depth == 0) {
        memset(c, 0, (size_t)group->rows * COLUMNS * sizeof(*c));
    }
    for (int64_t k = 0; k < w->depth_padded; k += BLOCK_DEPTH) {
        const int64_t left = w->depth_padded - k;
        const int depth = (int)(left < BLOCK_DEPTH ? left : BLOCK_DEPTH);
        for (int t = 0; t < group->num_tiles; t++) {
            const int rows = rows_of_tile(group, t);
            const int64_t element = (int64_t)t * group->tile_rows * w->depth_padded + k * rows;
            tile(c + (size_t)t * (size_t)group->tile_rows * COLUMNS,
                 group->a + element * (int64_t)job->a_element_bytes,
                 b + k * COLUMNS * (int64_t)w->element_bytes, rows, depth, k > 0);
        }
    }
}

/* Panels of all groups are numbered one group behind the other. */
static void multiply_panels(void *context, int64_t begin, int64_t end, int worker) {
    _Alignas(CACHE_LINE) float c[MAX_GROUP_ROWS * RADDLE_GEMM_COLUMNS];
    const gemm_job *job = context;
    const int64_t num_panels = job->weight->num_panels;
    while (begin < end) {
        const row_group group = open_group(job, begin / num_panels, worker);
        do {
            multiply_panel(job, &group, c, begin % num_panels);
            store_panel(job, &group, c, begin % num_panels);
            begin++;
        } while (begin < end && begin % num_panels != 0);
    }
}

static int64_t min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t max_i64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t choose_group_rows(const gemm_job *job) {
    const raddle_gemm_weight *w = job->weight;
    const int64_t rows = job->args->rows;
    const int64_t row_bytes = max_i64(1, w->depth_padded * (int64_t)job->a_element_bytes);
    const int64_t most = min_i64(MAX_GROUP_ROWS, max_i64(MIN_STREAM_ROWS, L2_BYTES / row_bytes));
    const int64_t weight_bytes = w->columns * w->depth_padded * (int64_t)w->element_bytes;
    const int64_t least = weight_bytes <= L2_BYTES ? MIN_GROUP_ROWS : MIN_STREAM_ROWS;
    const int64_t of_threads = min_i64(raddle_threads_count(), rows / least);
    const int64_t num_groups = max_i64(max_i64(1, of_threads), (rows + most - 1) / most);
    return (rows + num_groups - 1) / num_groups;
}

static int64_t panels_per_task(const gemm_job *job) {
    const int64_t elements = max_i64(1, job->weight->depth_padded * COLUMNS);
    const int64_t by_bytes = TASK_BYTES / (elements * (int64_t)job->weight->element_bytes);
    const int64_t by_products = TASK_PRODUCTS / (elements * job->group_rows);
    return max_i64(1, min_i64(by_bytes, by_products));
}

/* One row of the type that the kernel reads needs no packing. */
static bool can_use_directly(const gemm_job *job) {
    const raddle_gemm_weight *w = job->weight;
    return job->group_rows == 1 && w->depth == w->depth_padded &&
           (w->dtype == RADDLE_F32 || a_is_bf16(w));
}

static raddle_status allocate_buffers(gemm_job *job) {
    const size_t num_workers = (size_t)raddle_threads_count();
    const size_t bytes =
        (size_t)(job->group_rows * job->weight->depth_padded) * job->a_element_bytes;
    job->buffer_bytes = (bytes + 2 * CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    job->buffers = raddle_alloc_aligned(num_workers * job->buffer_bytes, CACHE_LINE);
    if (!job->buffers) {
        return raddle_fail_memory(num_workers * job->buffer_bytes);
    }
    for (size_t i = 0; i < num_workers; i++) {
        *(int64_t *)(void *)(job->buffers + i * job->buffer_bytes) = -1;
    }
    return RADDLE_OK;
}

raddle_status raddle_gemm_run(const raddle_gemm_weight *weight, const raddle_gemm_args *args) {
    if (args->rows == 0 || weight->columns == 0) {
        return RADDLE_OK;
    }
    gemm_job job = {
        .weight = weight,
        .args = args,
        .vec = raddle_vec_get(),
        .a_element_bytes = a_is_bf16(weight) ? sizeof(uint16_t) : sizeof(float),
    };
    job.group_rows = choose_group_rows(&job);
    if (!can_use_directly(&job)) {
        RADDLE_TRY(allocate_buffers(&job));
    }
    const int64_t num_groups = (args->rows + job.group_rows - 1) / job.group_rows;
    raddle_threads_for(multiply_panels, &job, num_groups * weight->num_panels,
                       panels_per_task(&job));
    raddle_free(job.buffers);
    return RADDLE_OK;
}

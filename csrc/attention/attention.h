/* attention.h - what the files of this family share: the compile-time config, the plan, the two
 * back ends.
 *
 * attention_spec.c says whether a spec can be and derives the config; attention_schedule.c is the
 * planner, pure C over plain structs; attention_plan.c holds the life cycle; attention_cuda.c and
 * attention_cpu.c launch; attention_cache.c appends, attention_merge.c merges states.
 */
#ifndef RADDLE_ATTENTION_ATTENTION_H
#define RADDLE_ATTENTION_ATTENTION_H

#include "base/arena.h"
#include "base/tensor.h"
#include "kernels/attention/attention_append_params.h"
#include "kernels/attention/attention_params.h"
#include "kernels/attention/attention_variant.h"
#include "runtime/plan.h"

/* One descriptor for every K/V store. Paged: page_size >= 1 and num_pages pages. Ragged: page_size
 * 0, num_tokens rows, stride_page 0. Innermost stride is 1. */
struct raddle_kv_cache {
    void *k, *v;
    int64_t k_stride_page, k_stride_token, k_stride_head; /* elements */
    int64_t v_stride_page, v_stride_token, v_stride_head;
    int64_t num_pages;
    int64_t num_tokens;
    int32_t page_size;
    int32_t num_kv_heads;
    int32_t head_dim_qk, head_dim_vo;
    raddle_dtype k_dtype, v_dtype;
    raddle_device device;
    bool read_only;
};

/* ---------------------------------------------------------------- variants */

enum {
    RADDLE_VARIANT_MAX_TENSORS = 8,
    RADDLE_VARIANT_MAX_SCALARS = 16,
    RADDLE_VARIANT_MAX_DIMS = 4,
};

enum { RADDLE_ATTENTION_MAX_HEAD_DIM = 256 };

/* Which hooks a variant has. */
typedef enum raddle_attention_hook {
    RADDLE_HOOK_QUERY = 1 << 0,
    RADDLE_HOOK_KEY = 1 << 1,
    RADDLE_HOOK_LOGIT = 1 << 2,
    RADDLE_HOOK_MASK = 1 << 3,
    RADDLE_HOOK_STATE = 1 << 4,
    RADDLE_HOOK_OUTPUT = 1 << 5,
    RADDLE_NUM_HOOKS = 6
} raddle_attention_hook;

/* How the generated struct raddle_variant begins: one of these per tensor, then the scalars, four
 * bytes each. */
typedef struct raddle_variant_tensor {
    void *data;
    int64_t stride[RADDLE_VARIANT_MAX_DIMS];
    int64_t shape[RADDLE_VARIANT_MAX_DIMS]; /* 1, and stride 0, past its dimensions */
} raddle_variant_tensor;

typedef struct raddle_variant_block {
    char bytes[RADDLE_VARIANT_MAX_TENSORS * sizeof(raddle_variant_tensor) +
               RADDLE_VARIANT_MAX_SCALARS * 4];
} raddle_variant_block;

/* Counted: plans share it. Never changes once made. */
struct raddle_attention_variant {
    int32_t references;
    uint32_t hooks;
    bool no_softmax;
    int32_t num_tensors, num_scalars;
    raddle_attention_variant_argument tensors[RADDLE_VARIANT_MAX_TENSORS]; /* names owned */
    raddle_attention_variant_argument scalars[RADDLE_VARIANT_MAX_SCALARS];
    char *name;
    char *text; /* #define RADDLE_HOOK_..., struct raddle_variant, #line, the source */
};

/* Everything that a kernel is compiled for and the planner cuts by. No padding, hashable. */
typedef struct raddle_attention_config {
    raddle_dtype q_dtype, kv_dtype, o_dtype;
    int32_t head_dim_qk, head_dim_vo;
    int32_t num_qo_heads, num_kv_heads, group_size;
    int32_t page_size; /* 0: ragged */
    int32_t causal;    /* 0 when every request has one query row: nothing to mask */
    int32_t has_window;
    int32_t has_soft_cap, has_rope, has_alibi, has_sinks, has_sigmoid;
    uint32_t hooks;     /* raddle_attention_hook bits of the variant */
    int32_t no_softmax; /* of the variant, or sigmoid: weights are summed as they are */
    int32_t tile_rows;  /* packed rows per item and K/V head */
    int32_t tile_kv;    /* tokens: cuts lie at multiples of it */
    /* K/V heads that one worker handles together: the most, and the fewest. The planner takes the
     * fewest, twice that, .. */
    int32_t heads_per_item, min_heads_per_item;
    int32_t num_workers; /* the most that a launch uses */
    /* In tokens of one K/V head: starting a segment; what a segment costs besides that is a part of
     * an item; merging one head of such a part. */
    int32_t segment_cost, cut_cost, merge_cost;
} raddle_attention_config;

/* The limits that the schedule's arrays are sized for. */
typedef struct raddle_attention_limits {
    int32_t max_batch;
    int64_t max_pages;
    int64_t max_qo_tokens;
    int64_t max_segments, max_merges, max_slots;
} raddle_attention_limits;

/* Arrays to fill, sized by the limits, and how much of each is used (in header). */
typedef struct raddle_attention_schedule {
    raddle_attention_header *header;
    raddle_attention_request *requests;
    int32_t *worker_indptr;
    raddle_attention_segment *first_segments;
    raddle_attention_segment *segments;
    raddle_attention_merge *merges;
} raddle_attention_schedule;

typedef struct raddle_attention_plan raddle_attention_plan;

/* What a launch is given: on CUDA the kernel's argument as it lies here. */
typedef struct raddle_attention_run_params {
    raddle_attention_params params;
    raddle_variant_block variant;
} raddle_attention_run_params;

/* One back end. Both are complete; what a GPU plans itself is attention_device_plan.c's. */
typedef struct raddle_attention_ops {
    /* Chooses the config from tile_rows on; compiles what run() will launch.
     * RADDLE_ERR_UNSUPPORTED with every reason when it cannot. */
    raddle_status (*prepare)(raddle_attention_plan *plan);
    raddle_status (*run)(raddle_attention_plan *plan, const raddle_attention_run_params *params,
                         raddle_stream stream);
    void (*release)(raddle_attention_plan *plan);
} raddle_attention_ops;

extern const raddle_attention_ops raddle_attention_ops_cpu;
extern const raddle_attention_ops raddle_attention_ops_cuda;

struct raddle_kernel;

/* What a plan that is planned on the device needs besides: attention_device_plan.c. */
typedef struct raddle_attention_device_plan {
    const struct raddle_kernel *kernel; /* NULL before the first time */
    int64_t *prefix;                    /* device memory, or NULL when shared memory is enough */
    raddle_attention_header header;     /* plan.host.header: batch and num_qo_tokens alone */
    bool is_last;                       /* the last update was of this kind */
    bool was_captured;                  /* and captured: the device has it after a replay */
    /* Of the last such update no run was launched yet; and of the last captured one, captured. */
    bool is_fresh[2];
} raddle_attention_device_plan;

struct raddle_attention_plan {
    raddle_plan base;
    const raddle_attention_ops *ops;
    raddle_attention_spec spec; /* defaults filled in */
    raddle_attention_config config;
    raddle_attention_limits limits;
    raddle_staging staging; /* the schedule and the page table, one block */
    size_t pages_offset;    /* of the page table in that block */
    /* Of the last update, in its slot: for checks and plan.schedule(). */
    raddle_attention_schedule host;
    const int32_t *host_pages;
    int64_t max_page_id;               /* -1: the page table came from the device, or is empty */
    raddle_attention_params params;    /* all but the tensors of a run */
    raddle_attention_variant *variant; /* or NULL */
    float *rope_turns;                 /* device memory of the plan: params.rope_turns */
    int32_t *arrivals;                 /* device memory of the plan, zeroed once */
    raddle_attention_device_plan device_plan;
    void *backend_state; /* kernels on CUDA, scratch on the CPU */
};

/* ---------------------------------------------------------------- what others call
 *
 * raddle.h says what each does, beside its entry in the table. Pointers are not NULL but where it
 * allows it. */

raddle_status raddle_kv_cache_from_tensors(const raddle_tensor *k_or_kv, const raddle_tensor *v,
                                           raddle_kv_layout layout, int32_t page_size,
                                           raddle_kv_cache *out_cache);

raddle_status raddle_attention_plan_create(const raddle_attention_spec *spec,
                                           raddle_plan **out_plan);
raddle_status raddle_attention_plan_update(raddle_plan *plan, const raddle_attention_batch *batch,
                                           raddle_stream stream);
raddle_status raddle_attention_plan_run(raddle_plan *plan, const raddle_attention_args *args,
                                        raddle_stream stream);
raddle_status raddle_attention_merge_state(const raddle_tensor *v_a, const raddle_tensor *s_a,
                                           const raddle_tensor *v_b, const raddle_tensor *s_b,
                                           const raddle_tensor *mask, const raddle_tensor *v_out,
                                           const raddle_tensor *s_out, raddle_lse_base base,
                                           raddle_stream stream);
raddle_status raddle_attention_merge_states(const raddle_tensor *v, const raddle_tensor *s,
                                            const raddle_tensor *v_out, const raddle_tensor *s_out,
                                            raddle_lse_base base, raddle_stream stream);
raddle_status raddle_attention_append(const raddle_tensor *k, const raddle_tensor *v,
                                      const raddle_tensor *batch_indices,
                                      const raddle_tensor *positions,
                                      const raddle_tensor *kv_indptr,
                                      const raddle_tensor *kv_indices, const raddle_kv_cache *kv,
                                      raddle_stream stream);
raddle_status raddle_attention_append_slots(const raddle_tensor *k, const raddle_tensor *v,
                                            const raddle_tensor *slot_mapping,
                                            const raddle_kv_cache *kv, raddle_stream stream);
raddle_status raddle_attention_variant_create(const raddle_attention_variant_spec *spec,
                                              raddle_attention_variant **out_variant);
void raddle_attention_variant_destroy(raddle_attention_variant *variant);
/* Not in the table yet. out[i] = K/V tokens of request i: (pages - 1) * page_size + last_page_len,
 * or 0 without pages. */
raddle_status raddle_attention_seq_lens(const raddle_tensor *indptr,
                                        const raddle_tensor *last_page_len, int32_t page_size,
                                        const raddle_tensor *out, raddle_stream stream);
/* Nor this. Request and position of each of n appended rows: the rows of request i, from
 * append_indptr[i] on, are its last tokens. Rows past the last request get -1 and 0, which append
 * skips. */
raddle_status raddle_attention_positions(const raddle_tensor *append_indptr,
                                         const raddle_tensor *seq_lens,
                                         const raddle_tensor *batch_indices,
                                         const raddle_tensor *positions, raddle_stream stream);

/* ---------------------------------------------------------------- within the family */

/* attention_spec.c */
raddle_status raddle_attention_spec_check(const raddle_attention_spec *spec,
                                          raddle_attention_spec *out_spec);
void raddle_attention_config_from_spec(const raddle_attention_spec *spec,
                                       raddle_attention_config *out_config);

/* attention_variant.c */
raddle_attention_variant *raddle_attention_variant_retain(const raddle_attention_variant *variant);
/* Checks a run's tensors and numbers against the declarations, and lays them out. */
raddle_status raddle_attention_variant_bind(const raddle_attention_variant *variant,
                                            const raddle_tensor *const *tensors,
                                            const double *scalars, raddle_device device,
                                            raddle_variant_block *out_block);

/* attention_schedule.c: the planner. requests is filled already (batch of them). */
raddle_status raddle_attention_limits_derive(const raddle_attention_spec *spec,
                                             const raddle_attention_config *config,
                                             raddle_attention_limits *out_limits);
raddle_status raddle_attention_schedule_build(const raddle_attention_spec *spec,
                                              const raddle_attention_config *config,
                                              const raddle_attention_limits *limits, int32_t batch,
                                              raddle_attention_schedule *schedule);
/* K/V tokens that rows [row_begin, row_end) of a request can see: [*begin, *end). */
void raddle_attention_visible(const raddle_attention_request *request, int32_t group_size,
                              bool causal, int32_t window_left, int32_t row_begin, int32_t row_end,
                              int32_t *out_begin, int32_t *out_end);

/* attention_batch.c: what one update brings. */
typedef struct raddle_attention_reading {
    int32_t batch;
    int64_t num_pages; /* entries of the page table in use */
    const void
        *device_pages;   /* int32 page table that lies on the device, still to be copied; or NULL */
    int64_t max_page_id; /* of a page table read on the host; -1: none */
} raddle_attention_reading;

/* Whether the tensors belong together, as far as shapes tell. */
raddle_status raddle_attention_batch_check(const raddle_attention_plan *plan,
                                           const raddle_attention_batch *batch, int32_t *out_batch);
/* Fills requests [batch] and pages [num_pages]; nothing is sent. */
raddle_status raddle_attention_batch_read(const raddle_attention_plan *plan,
                                          const raddle_attention_batch *batch, raddle_stream stream,
                                          raddle_attention_request *requests, int32_t *pages,
                                          raddle_attention_reading *out_reading);

/* attention_device_plan.c: plans by a kernel, on CUDA. */
raddle_status raddle_attention_device_plan_update(raddle_attention_plan *plan,
                                                  const raddle_attention_batch *batch,
                                                  raddle_stream stream);
void raddle_attention_device_plan_fini(raddle_attention_plan *plan);
/* Whether a run may be queued on stream. *out_fresh: when set, the launch must not start before
 * its predecessor has ended, and clears it; or NULL. */
raddle_status raddle_attention_device_plan_before_run(raddle_attention_plan *plan,
                                                      raddle_stream stream, bool **out_fresh);
/* What the device has, in memory to raddle_free. Waits. */
raddle_status raddle_attention_device_plan_read(const raddle_attention_plan *plan,
                                                raddle_attention_schedule *out_schedule,
                                                void **out_memory);

/* attention_check.c: RADDLE_CHECK. report fails with RADDLE_ERR_VALUE if an earlier run met a page id
 * outside its cache, or an earlier append on its GPU an index that led nowhere; once for each time.
 * All do nothing when the setting is off. */
raddle_status raddle_attention_check_init(raddle_attention_plan *plan);
void raddle_attention_check_fini(raddle_attention_plan *plan);
raddle_status raddle_attention_check_report(const raddle_attention_plan *plan,
                                            raddle_stream stream);
/* For an append on a GPU: reports what an earlier one met there, and gives the record for what this
 * one meets; NULL when the setting is off. */
raddle_status raddle_attention_check_append(int32_t device, raddle_stream stream,
                                            raddle_attention_append_error **out_record);

/* attention_cuda.c: the configs that warmup and the compile tests build, in order. hopper_only: of
 * instructions that sm_90a alone has. */
int raddle_attention_num_kernel_configs(void);
raddle_status raddle_attention_kernel_config(int index, const char **out_name, char *out_config,
                                             size_t config_bytes, bool *out_hopper_only);

#endif

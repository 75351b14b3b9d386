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
#include "kernels/attention/attention_params.h"
#include "runtime/plan.h"

/* Everything that a kernel is compiled for and the planner cuts by. No padding, hashable. */
typedef struct raddle_attention_config {
    raddle_dtype q_dtype, kv_dtype, o_dtype;
    int32_t head_dim_qk, head_dim_vo;
    int32_t num_qo_heads, num_kv_heads, group_size;
    int32_t page_size; /* 0: ragged */
    int32_t causal;    /* 0 when every request has one query row: nothing to mask */
    int32_t has_window;
    int32_t tile_rows;      /* packed rows per item and K/V head */
    int32_t tile_kv;        /* tokens: cuts lie at multiples of it */
    int32_t heads_per_item; /* K/V heads that one worker handles together */
    int32_t num_workers;    /* the most that a launch uses */
    int32_t segment_cost;   /* price of starting a segment, in tokens of one item */
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
    raddle_attention_segment *segments;
    raddle_attention_merge *merges;
} raddle_attention_schedule;

typedef struct raddle_attention_plan raddle_attention_plan;

/* One back end. Both are complete. */
typedef struct raddle_attention_ops {
    /* Chooses tile_rows, tile_kv, heads_per_item, num_workers and segment_cost; compiles what run()
     * will launch. RADDLE_ERR_UNSUPPORTED with every reason when it cannot. */
    raddle_status (*prepare)(raddle_attention_plan *plan);
    raddle_status (*run)(raddle_attention_plan *plan, const raddle_attention_params *params,
                         raddle_stream stream);
    void (*release)(raddle_attention_plan *plan);
} raddle_attention_ops;

extern const raddle_attention_ops raddle_attention_ops_cpu;
extern const raddle_attention_ops raddle_attention_ops_cuda;

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
    int64_t max_page_id;            /* -1: the page table came from the device, or is empty */
    raddle_attention_params params; /* all but the tensors of a run */
    int32_t *arrivals;              /* device memory of the plan, zeroed once */
    void *backend_state;            /* kernels on CUDA, scratch on the CPU */
};

/* attention_spec.c */
raddle_status raddle_attention_spec_check(const raddle_attention_spec *spec,
                                          raddle_attention_spec *out_spec);
void raddle_attention_config_from_spec(const raddle_attention_spec *spec,
                                       raddle_attention_config *out_config);

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

/* Fills requests [batch] and pages [num_pages]; nothing is sent. */
raddle_status raddle_attention_batch_read(const raddle_attention_plan *plan,
                                          const raddle_attention_batch *batch, raddle_stream stream,
                                          raddle_attention_request *requests, int32_t *pages,
                                          raddle_attention_reading *out_reading);

/* attention_check.c: RADDLE_CHECK. report fails with RADDLE_ERR_VALUE if an earlier run met a page id
 * outside its cache, once for each time. All do nothing when the setting is off. */
raddle_status raddle_attention_check_init(raddle_attention_plan *plan);
void raddle_attention_check_fini(raddle_attention_plan *plan);
raddle_status raddle_attention_check_report(const raddle_attention_plan *plan,
                                            raddle_stream stream);

/* attention_cuda.c: the configs that warmup and the compile tests build, in order. hopper_only: of
 * instructions that sm_90a alone has. */
int raddle_attention_num_kernel_configs(void);
raddle_status raddle_attention_kernel_config(int index, const char **out_name, char *out_config,
                                             size_t config_bytes, bool *out_hopper_only);

#endif

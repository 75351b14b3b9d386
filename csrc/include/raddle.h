/* raddle.h - the public C interface: types, enums and functions that callers outside the library
 * may use.
 *
 * Conventions. Every fallible function returns a raddle_status and leaves its outputs untouched on
 * failure; raddle_last_error() then tells the calling thread what happened. Handles are opaque;
 * destroy accepts NULL. Strides are in elements, sizes in bytes say so in their name. Structs that
 * a caller fills begin with struct_size = sizeof the struct as the caller knows it, so that fields
 * can be added behind the last.
 */
#ifndef RADDLE_H
#define RADDLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- status */

typedef enum raddle_status {
    RADDLE_OK = 0,
    RADDLE_ERR_VALUE,       /* an argument has a value that cannot be */
    RADDLE_ERR_SHAPE,       /* rank, extent, stride or alignment */
    RADDLE_ERR_DTYPE,       /* element type */
    RADDLE_ERR_DEVICE,      /* no such device, wrong device, mixed devices, use after fork */
    RADDLE_ERR_CAPACITY,    /* more than the declared maximum, or a workspace too small */
    RADDLE_ERR_STATE,       /* right call, wrong moment */
    RADDLE_ERR_UNSUPPORTED, /* legal, but this back end cannot; the message lists why */
    RADDLE_ERR_COMPILE,     /* a kernel did not compile; the log is in the record */
    RADDLE_ERR_CUDA,        /* the driver said no; the message has its own name for it */
    RADDLE_ERR_IO,          /* a file could not be read or written */
    RADDLE_ERR_MEMORY,      /* an allocation failed */
    RADDLE_STATUS_COUNT
} raddle_status;

/* What the last failing call on this thread left. The strings live until that thread fails again.
 */
typedef struct raddle_error {
    raddle_status code;
    const char *message; /* argument, what was expected, what came, what to do */
    const char *log;     /* compiler log, or "" */
} raddle_error;

const raddle_error *raddle_last_error(void);
const char *raddle_status_name(raddle_status status);
const char *raddle_version(void);

/* ---------------------------------------------------------------- tensors */

typedef enum raddle_dtype {
    RADDLE_DTYPE_NONE = 0,
    RADDLE_F32,
    RADDLE_F16,
    RADDLE_BF16,
    RADDLE_F8_E4M3,
    RADDLE_F8_E5M2,
    RADDLE_I8,
    RADDLE_U8,
    RADDLE_BOOL,
    RADDLE_I16,
    RADDLE_U16,
    RADDLE_I32,
    RADDLE_U32,
    RADDLE_I64,
    RADDLE_U64,
    RADDLE_F64,
    RADDLE_DTYPE_COUNT
} raddle_dtype;

typedef enum raddle_device_type {
    RADDLE_CPU = 1,
    RADDLE_CUDA = 2
} raddle_device_type; /* DLPack's numbers */

typedef struct raddle_device {
    int32_t type; /* raddle_device_type */
    int32_t index;
} raddle_device;

/* A CUstream. NULL is the legacy default stream; ignored on the CPU. */
typedef void *raddle_stream;

enum { RADDLE_MAX_DIM = 8 };

/* A view of memory that somebody else keeps alive for the duration of the call. */
typedef struct raddle_tensor {
    void *data; /* byte offset applied; may be NULL only when an extent is 0 */
    int64_t shape[RADDLE_MAX_DIM];
    int64_t stride[RADDLE_MAX_DIM]; /* elements, any sign */
    int32_t ndim;
    raddle_dtype dtype;
    raddle_device device;
    bool read_only;
    const char *name; /* as the user typed it, for messages; never NULL */
} raddle_tensor;

/* ---------------------------------------------------------------- plans and workspaces */

typedef struct raddle_plan raddle_plan; /* all decisions of one family for one device */
typedef struct raddle_workspace
    raddle_workspace; /* scratch memory; plans ordered on one stream may share it */
typedef struct raddle_graph raddle_graph; /* captured CUDA work and the plans it reads */

void raddle_plan_destroy(raddle_plan *plan);
/* Scratch bytes that plan needs for its declared maxima: exact, the same code as its use. */
size_t raddle_plan_workspace_bytes(const raddle_plan *plan);
raddle_status raddle_plan_bind_workspace(raddle_plan *plan, raddle_workspace *workspace);

/* Scratch owned by raddle. */
raddle_status raddle_workspace_create(raddle_device device, size_t bytes,
                                      raddle_workspace **out_workspace);
/* Scratch lent by the caller; release(context) runs when the last user is gone. release may be
 * NULL. */
raddle_status raddle_workspace_wrap(raddle_device device, void *data, size_t bytes,
                                    void (*release)(void *), void *context,
                                    raddle_workspace **out_workspace);
void raddle_workspace_destroy(raddle_workspace *workspace);
size_t raddle_workspace_bytes(const raddle_workspace *workspace);

/* ---------------------------------------------------------------- graphs */

/* Captures what this thread launches between begin and end, to be launched again as one. stream
 * NULL: a stream of the graph's own (the legacy default stream cannot be captured);
 * raddle_graph_stream tells it. CUDA only. Between begin and end nothing may be planned, allocated
 * or waited for. Plans that run are kept alive by the graph and may be updated between launches
 * within their maxima; tensors stay the caller's to keep alive. */
raddle_status raddle_graph_begin(raddle_device device, raddle_stream stream,
                                 raddle_graph **out_graph);
/* On the thread that began. A failure leaves a graph that is only good for destroy. */
raddle_status raddle_graph_end(raddle_graph *graph);
/* Ends the capture and forgets what was captured; on the thread that began. */
void raddle_graph_abort(raddle_graph *graph);
/* Waits on stream for the last update of every captured plan, then runs the graph there. Updates of
 * those plans must be ordered behind it by the caller if they go to another stream.
 * RADDLE_ERR_STATE when a plan was refused for capacity since the capture: the graph is stale,
 * capture anew. */
raddle_status raddle_graph_launch(raddle_graph *graph, raddle_stream stream);
raddle_stream raddle_graph_stream(const raddle_graph *graph);
void raddle_graph_destroy(raddle_graph *graph);

/* ---------------------------------------------------------------- KV cache */

typedef enum raddle_kv_layout { RADDLE_NHD = 0, RADDLE_HND = 1 } raddle_kv_layout;

/* How a kernel multiplies stored K and V back. More kinds (per head, per token and head) add values
 * here. */
typedef enum raddle_kv_scale { RADDLE_KV_SCALE_NONE = 0 } raddle_kv_scale;

/* One descriptor for every K/V store. Paged: page_size >= 1 and num_pages pages. Ragged: page_size
 * 0, num_tokens rows, stride_page 0. Innermost stride is 1. */
typedef struct raddle_kv_cache {
    void *k, *v;
    int64_t k_stride_page, k_stride_token, k_stride_head; /* elements */
    int64_t v_stride_page, v_stride_token, v_stride_head;
    int64_t num_pages;
    int64_t num_tokens;
    int32_t page_size;
    int32_t num_kv_heads;
    int32_t head_dim_qk, head_dim_vo;
    raddle_dtype k_dtype, v_dtype;
    raddle_kv_scale k_scale, v_scale;
    raddle_device device;
    bool read_only;
} raddle_kv_cache;

/* Paged: k_or_kv is [num_pages, 2, page_size, num_kv_heads, head_dim] (NHD) or [num_pages, 2,
 * num_kv_heads, page_size, head_dim] (HND) with v NULL, or k and v apart, each without the 2.
 * page_size 0 says ragged: k and v are [tokens, num_kv_heads, head_dim] (NHD) or [num_kv_heads,
 * tokens, head_dim] (HND). */
raddle_status raddle_kv_cache_from_tensors(const raddle_tensor *k_or_kv, const raddle_tensor *v,
                                           raddle_kv_layout layout, int32_t page_size,
                                           raddle_kv_cache *out_cache);

/* ---------------------------------------------------------------- attention */

typedef enum raddle_lse_base { RADDLE_LSE_BASE_2 = 0, RADDLE_LSE_BASE_E = 1 } raddle_lse_base;

/* What is asked for; fixed for the life of a plan. Zero means the default where one is named. */
typedef struct raddle_attention_spec {
    uint32_t struct_size;
    raddle_device device;
    raddle_dtype q_dtype, kv_dtype, o_dtype; /* o_dtype NONE: as q */
    int32_t num_qo_heads, num_kv_heads;      /* num_qo_heads a multiple of num_kv_heads */
    int32_t head_dim_qk, head_dim_vo;        /* multiples of 8 up to 256; head_dim_vo 0: as qk */
    int32_t page_size;                       /* 0: ragged K/V */
    bool causal; /* bottom-right aligned: key j is seen by query i iff j <= kv_len - qo_len + i */
    int32_t window_left; /* keys before the query's own that it sees; negative: all */
    float sm_scale;      /* 0: 1 / sqrt(head_dim_qk) */
    raddle_lse_base lse_base;
    int32_t max_batch; /* requests per update */
    int64_t
        max_pages; /* paged: page ids per update, over all requests; ragged: K/V rows per update */
    int64_t max_qo_tokens; /* query rows per update; 0: max_batch * max_qo_len, or refused */
    int32_t max_qo_len;    /* query rows of one request; 1: decode; 0: as many as max_qo_tokens */
    int32_t fixed_chunk;   /* 0: balanced; else every KV range is cut at multiples of this many
                              tokens, whatever   else is in the batch, so that a request's result does
                              not depend on its neighbours */
    int32_t max_ctas;      /* 0: all of the device; else at most so many CTAs (CPU: threads) */
} raddle_attention_spec;

/* One batch. Index tensors are int32 or int64, 1-D, on the host or on the plan's device. */
typedef struct raddle_attention_batch {
    uint32_t struct_size;
    const raddle_tensor *qo_indptr; /* [batch + 1]; NULL: one query row per request (decode) */
    const raddle_tensor
        *kv_indptr; /* [batch + 1]: offsets into kv_indices (paged) or K/V rows (ragged) */
    const raddle_tensor
        *kv_indices; /* [kv_indptr[batch]] page ids; NULL when ragged or with block_table */
    const raddle_tensor
        *last_page_len; /* [batch], 1..page_size, 0 only for a request without pages */
    const raddle_tensor
        *block_table; /* [batch, max_blocks] page ids, rows padded with anything; excludes CSR */
    const raddle_tensor *seq_lens; /* [batch] K/V tokens per request; with block_table */
} raddle_attention_batch;

typedef struct raddle_attention_args {
    uint32_t struct_size;
    const raddle_tensor *q; /* [qo tokens, num_qo_heads, head_dim_qk] */
    const raddle_kv_cache *kv;
    const raddle_tensor *out; /* [qo tokens, num_qo_heads, head_dim_vo] */
    const raddle_tensor *lse; /* float32 [qo tokens, num_qo_heads], or NULL */
} raddle_attention_args;

raddle_status raddle_attention_plan_create(const raddle_attention_spec *spec,
                                           raddle_plan **out_plan);
/* Computes the schedule on the host and sends it to the device on stream. A failure leaves the
 * previous batch. */
raddle_status raddle_attention_plan_update(raddle_plan *plan, const raddle_attention_batch *batch,
                                           raddle_stream stream);
raddle_status raddle_attention_plan_run(raddle_plan *plan, const raddle_attention_args *args,
                                        raddle_stream stream);

/* v [n, heads, dim], s float32 [n, heads]; out may alias a. */
raddle_status raddle_attention_merge_state(const raddle_tensor *v_a, const raddle_tensor *s_a,
                                           const raddle_tensor *v_b, const raddle_tensor *s_b,
                                           const raddle_tensor *mask, const raddle_tensor *v_out,
                                           const raddle_tensor *s_out, raddle_lse_base base,
                                           raddle_stream stream);
/* v [n, states, heads, dim], s float32 [n, states, heads] -> [n, heads, dim], [n, heads]. */
raddle_status raddle_attention_merge_states(const raddle_tensor *v, const raddle_tensor *s,
                                            const raddle_tensor *v_out, const raddle_tensor *s_out,
                                            raddle_lse_base base, raddle_stream stream);

/* Writes k and v [n, num_kv_heads, head_dim] into the cache. Page table: row i goes to position
 * positions[i] of request batch_indices[i]; a negative batch index skips the row. */
raddle_status raddle_attention_append(const raddle_tensor *k, const raddle_tensor *v,
                                      const raddle_tensor *batch_indices,
                                      const raddle_tensor *positions,
                                      const raddle_tensor *kv_indptr,
                                      const raddle_tensor *kv_indices, const raddle_kv_cache *kv,
                                      raddle_stream stream);
/* Row i goes to slot_mapping[i] = page * page_size + offset; -1 skips it. */
raddle_status raddle_attention_append_slots(const raddle_tensor *k, const raddle_tensor *v,
                                            const raddle_tensor *slot_mapping,
                                            const raddle_kv_cache *kv, raddle_stream stream);

/* out[i] = K/V tokens of request i: (pages - 1) * page_size + last_page_len, or 0 without pages. */
raddle_status raddle_attention_seq_lens(const raddle_tensor *indptr,
                                        const raddle_tensor *last_page_len, int32_t page_size,
                                        const raddle_tensor *out, raddle_stream stream);
/* Request and position of each of n appended rows: the rows of request i, from append_indptr[i] on,
 * are its last tokens. Rows past the last request get -1 and 0, which append skips. */
raddle_status raddle_attention_positions(const raddle_tensor *append_indptr,
                                         const raddle_tensor *seq_lens,
                                         const raddle_tensor *batch_indices,
                                         const raddle_tensor *positions, raddle_stream stream);

#ifdef __cplusplus
}
#endif
#endif

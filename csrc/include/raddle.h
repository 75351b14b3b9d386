/* raddle.h - the public C interface: how another extension module uses raddle.
 *
 * There is nothing to link. raddle.get_include() names the folder of this file; Python.h comes
 * first, and once, say in the module's exec slot,
 *
 *     const raddle_api *api = raddle_api_import();
 *
 * fetches the table of functions out of the capsule raddle._core._C_API, or sets ImportError.
 *
 * Conventions. Fallible functions return a raddle_status and leave their outputs untouched on
 * failure; last_error then tells the calling thread what happened, and raise makes it the exception
 * that raddle's Python functions raise. Handles are opaque; destroy and close accept NULL. Strides
 * are in elements; sizes in bytes say so in their name.
 *
 * Structs that a caller fills begin with struct_size = sizeof the struct as the caller's header has
 * it, and are zeroed before. An older caller's struct is shorter: what it lacks counts as zero, and
 * zero means what the library did before the field came. A newer caller's is longer: it is refused
 * with RADDLE_ERR_UNSUPPORTED if anything behind the end that the library knows is not zero. Fields
 * are added behind the last, never into padding.
 *
 * Threads. tensor_open and raise are called with the GIL held. Everything else may be called with
 * or without it, from any thread; release it around attention_plan_create (which may compile),
 * attention_plan_update and, on the CPU, whatever computes. One thread at a time may be inside a
 * plan: a second one gets RADDLE_ERR_STATE. Tensors and caches never change once made: any number
 * of threads may pass the same one. Nothing may be called while a handle that it uses is closed or
 * destroyed by another thread, nor after the interpreter has ended.
 *
 * Errors that arrive late. RADDLE_ERR_CUDA_ASYNC from a call on a plan leaves it dead: later calls
 * on it are RADDLE_ERR_STATE, and destroy is all that is left. After any other error it can be used.
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
    RADDLE_ERR_CUDA_ASYNC, /* GPU work queued by an earlier call failed: the CUDA context is lost */
    RADDLE_STATUS_COUNT
} raddle_status;

/* What the last failing call on this thread left. The strings live until that thread fails again,
 * or raises. */
typedef struct raddle_error {
    raddle_status code;
    const char *message; /* argument, what was expected, what came, what to do */
    const char *log;     /* compiler log, or "" */
} raddle_error;

/* ---------------------------------------------------------------- words */

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

/* What a tensor is opened for. Writing into one that was opened to be read is refused. */
typedef enum raddle_access { RADDLE_READ = 0, RADDLE_WRITE = 1 } raddle_access;

/* Order of a K/V store's axes: [.., tokens, heads, dim] or [.., heads, tokens, dim]. */
typedef enum raddle_kv_layout { RADDLE_NHD = 0, RADDLE_HND = 1 } raddle_kv_layout;

typedef enum raddle_lse_base { RADDLE_LSE_BASE_2 = 0, RADDLE_LSE_BASE_E = 1 } raddle_lse_base;

/* What tells attention where a token stands. ROPE rotates q and the keys, which are stored as they
 * are before; ALIBI biases the logits by the distance. */
typedef enum raddle_pos_encoding {
    RADDLE_POS_NONE = 0,
    RADDLE_POS_ROPE = 1,
    RADDLE_POS_ALIBI = 2
} raddle_pos_encoding;

/* How a logit becomes the weight of its V row. SIGMOID: each by itself, nothing is divided. */
typedef enum raddle_attention_weights {
    RADDLE_WEIGHTS_SOFTMAX = 0,
    RADDLE_WEIGHTS_SIGMOID = 1
} raddle_attention_weights;

/* ---------------------------------------------------------------- handles */

typedef struct raddle_tensor raddle_tensor;       /* a checked view of somebody's memory */
typedef struct raddle_kv_cache raddle_kv_cache;   /* K and V, and how they are laid out */
typedef struct raddle_plan raddle_plan;           /* all decisions of one family for one device */
typedef struct raddle_workspace raddle_workspace; /* scratch; plans of one stream may share it */
typedef struct raddle_attention_variant raddle_attention_variant; /* a user's hooks, as text */

/* ---------------------------------------------------------------- attention */

/* A tensor or scalar that a variant declares: v->name in its text. */
typedef struct raddle_attention_variant_argument {
    const char *name;
    raddle_dtype dtype; /* tensors: F32, I32, I64, U8 or BOOL; scalars: F32 or I32 */
    bool is_written;    /* of a tensor */
} raddle_attention_variant_argument;

/* The text is C functions named raddle_variant_query, _key, _logit, _mask, _state and _output, each
 * optional; kernels/attention/attention_variant.h says what they are told and give back. It is
 * compiled by NVRTC, and by a C compiler for the CPU. */
typedef struct raddle_attention_variant_spec {
    uint32_t struct_size;
    const char *name; /* an identifier */
    const char *source;
    const char *filename; /* of the text in compilers' messages; NULL: name */
    bool no_softmax;      /* logits are weights already; nothing is divided, there is no lse */
    int32_t num_tensors, num_scalars; /* at most 8 and 16 */
    const raddle_attention_variant_argument *tensors;
    const raddle_attention_variant_argument *scalars;
} raddle_attention_variant_spec;

/* What is asked for; fixed for the life of a plan. Zero means the default where one is named. */
typedef struct raddle_attention_spec {
    uint32_t struct_size;
    raddle_device device;
    raddle_dtype q_dtype, kv_dtype, o_dtype; /* kv_dtype, o_dtype NONE: as q */
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
                              tokens, whatever else is in the batch, so that a request's result does
                              not depend on its neighbours */
    int32_t max_ctas;      /* 0: all of the device; else at most so many CTAs (CPU: threads) */
    float logits_soft_cap; /* 0: none; else logits are cap * tanh(logit / cap) */
    raddle_pos_encoding pos_encoding;
    float rope_scale, rope_theta; /* of ROPE; 0: 1 and 10000 */
    raddle_attention_weights weights;
    bool has_sinks; /* every run brings args.sinks */
    bool no_pdl;    /* CUDA: a launch waits for its predecessor's end before it starts */
    const raddle_attention_variant *variant; /* or NULL; the plan keeps what it needs of it */
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
    /* CUDA: a kernel plans; nothing is waited for and the update may be captured. All but qo_indptr
     * int32, contiguous, on the plan's device; qo_indptr, in equal steps, on the host. What the
     * lengths say is clamped to the tables' sizes. The CPU plans as ever. */
    bool on_device;
} raddle_attention_batch;

typedef struct raddle_attention_args {
    uint32_t struct_size;
    const raddle_tensor *q; /* [qo tokens, num_qo_heads, head_dim_qk] */
    const raddle_kv_cache *kv;
    const raddle_tensor *out;   /* [qo tokens, num_qo_heads, head_dim_vo] */
    const raddle_tensor *lse;   /* float32 [qo tokens, num_qo_heads], or NULL */
    const raddle_tensor *sinks; /* float32 [num_qo_heads]: one more logit per head, that only enters
                                   the sum; with spec.has_sinks, and else NULL */
    float k_scale, v_scale;     /* of stored K and V; 0: 1 */
    const raddle_tensor *k_scales, *v_scales; /* float32 [num_kv_heads], or NULL: the same per head,
                                                 times k_scale and v_scale */
    const raddle_tensor *const *variant_tensors; /* in the order in which they are declared */
    const double *variant_scalars;
} raddle_attention_args;

/* ---------------------------------------------------------------- the table */

struct _object; /* PyObject */

/* Goes up when an entry changes its meaning or its place; entries that are added only make
 * struct_size larger. */
#define RADDLE_API_VERSION 1u
#define RADDLE_API_CAPSULE "raddle._core._C_API"

typedef struct raddle_api {
    size_t struct_size;
    uint32_t version;
    uint32_t reserved;

    /* ---- errors */

    const raddle_error *(*last_error)(void);
    const char *(*status_name)(raddle_status status);
    /* Sets the exception of raddle.errors for the failure that this thread just had; NULL. */
    struct _object *(*raise)(raddle_status status);

    /* ---- tensors */

    /* Any object that raddle's Python functions take: torch, NumPy, raddle, whatever has
     * __dlpack__. Its memory stays until close. name appears in messages and is copied. dtype: how
     * to read the bits (bfloat16 out of a uint16 array, say), or NONE for the producer's word. As
     * CPython's functions do, it returns 0, or -1 with an exception set. */
    int (*tensor_open)(struct _object *object, const char *name, raddle_access access,
                       raddle_dtype dtype, raddle_tensor **out_tensor);
    /* dl_tensor: a DLTensor of DLPack 1.x. Its memory is the caller's to keep until close; the
     * struct itself, its shape and its strides are not needed afterwards. */
    raddle_status (*tensor_from_dlpack)(const void *dl_tensor, const char *name,
                                        raddle_access access, raddle_dtype dtype,
                                        raddle_tensor **out_tensor);
    /* The stream that the object's framework was working on when it was opened, where it could say:
     * what was computed there is only safe to read there. */
    bool (*tensor_stream)(const raddle_tensor *tensor, raddle_stream *out_stream);
    void (*tensor_close)(raddle_tensor *tensor);

    /* ---- K/V stores */

    /* Paged: k_or_kv is [num_pages, 2, page_size, num_kv_heads, head_dim] (NHD) or [num_pages, 2,
     * num_kv_heads, page_size, head_dim] (HND) with v NULL, or k and v apart, each without the 2.
     * page_size 0 says ragged: k and v are [tokens, num_kv_heads, head_dim] (NHD) or [num_kv_heads,
     * tokens, head_dim] (HND). The tensors live on with the cache, closed or not. */
    raddle_status (*kv_cache_create)(const raddle_tensor *k_or_kv, const raddle_tensor *v,
                                     raddle_kv_layout layout, int32_t page_size,
                                     raddle_kv_cache **out_cache);
    void (*kv_cache_destroy)(raddle_kv_cache *cache);

    /* ---- scratch */

    /* Owned by raddle. */
    raddle_status (*workspace_create)(raddle_device device, size_t bytes,
                                      raddle_workspace **out_workspace);
    /* Lent by the caller; release(context) runs when the last user is gone, on its thread. release
     * may be NULL. */
    raddle_status (*workspace_wrap)(raddle_device device, void *data, size_t bytes,
                                    void (*release)(void *), void *context,
                                    raddle_workspace **out_workspace);
    /* Plans that it is bound to keep it. */
    void (*workspace_destroy)(raddle_workspace *workspace);

    /* ---- plans */

    /* Scratch that plan needs for its declared maxima: exact, the same code as its use. NULL: 0. */
    size_t (*plan_workspace_bytes)(const raddle_plan *plan);
    /* A plan that none is bound to makes its own at the first update. */
    raddle_status (*plan_bind_workspace)(raddle_plan *plan, raddle_workspace *workspace);
    void (*plan_destroy)(raddle_plan *plan);

    /* ---- attention */

    raddle_status (*attention_plan_create)(const raddle_attention_spec *spec,
                                           raddle_plan **out_plan);
    /* Computes the schedule on the host and sends it to the device on stream. The tensors are not
     * needed afterwards, but for a page table on the device: until stream has passed. A failure
     * leaves the previous batch, one of the driver while it sends leaves none. */
    raddle_status (*attention_plan_update)(raddle_plan *plan, const raddle_attention_batch *batch,
                                           raddle_stream stream);
    /* Allocates nothing; on CUDA it only launches, and may be captured. The memory of q, kv, out
     * and lse is the caller's to keep until stream has passed, or for the life of a graph. */
    raddle_status (*attention_plan_run)(raddle_plan *plan, const raddle_attention_args *args,
                                        raddle_stream stream);
    /* v [n, heads, dim], s float32 [n, heads], mask bool [n] or NULL: rows where it is false keep
     * a. out may alias a. */
    raddle_status (*attention_merge_state)(const raddle_tensor *v_a, const raddle_tensor *s_a,
                                           const raddle_tensor *v_b, const raddle_tensor *s_b,
                                           const raddle_tensor *mask, const raddle_tensor *v_out,
                                           const raddle_tensor *s_out, raddle_lse_base base,
                                           raddle_stream stream);
    /* v [n, states, heads, dim], s float32 [n, states, heads] -> [n, heads, dim], [n, heads]. */
    raddle_status (*attention_merge_states)(const raddle_tensor *v, const raddle_tensor *s,
                                            const raddle_tensor *v_out, const raddle_tensor *s_out,
                                            raddle_lse_base base, raddle_stream stream);
    /* Writes k and v [n, num_kv_heads, head_dim] into the cache: row i goes to position
     * positions[i] of request batch_indices[i]; a negative batch index skips the row. */
    raddle_status (*attention_append)(const raddle_tensor *k, const raddle_tensor *v,
                                      const raddle_tensor *batch_indices,
                                      const raddle_tensor *positions,
                                      const raddle_tensor *kv_indptr,
                                      const raddle_tensor *kv_indices, const raddle_kv_cache *kv,
                                      raddle_stream stream);
    /* Row i goes to slot_mapping[i] = page * page_size + offset; -1 skips it. */
    raddle_status (*attention_append_slots)(const raddle_tensor *k, const raddle_tensor *v,
                                            const raddle_tensor *slot_mapping,
                                            const raddle_kv_cache *kv, raddle_stream stream);

    /* ---- variants */

    /* Checks names and declarations; the text is compiled by the plans that use it. */
    raddle_status (*attention_variant_create)(const raddle_attention_variant_spec *spec,
                                              raddle_attention_variant **out_variant);
    void (*attention_variant_destroy)(raddle_attention_variant *variant);
} raddle_api;

#ifdef Py_PYTHON_H /* Python.h was included before */
/* Imports raddle if need be. The table lives as long as the process. With the GIL held; NULL with
 * an exception set. */
static inline const raddle_api *raddle_api_import(void) {
    const raddle_api *api = (const raddle_api *)PyCapsule_Import(RADDLE_API_CAPSULE, 0);
    if (api != NULL && (api->version != RADDLE_API_VERSION || api->struct_size < sizeof *api)) {
        PyErr_Format(PyExc_ImportError,
                     "raddle: its C table has version %u and %zu bytes, this module was built for "
                     "version %u and %zu; upgrade raddle, or build the module against its raddle.h",
                     (unsigned)api->version, api->struct_size, (unsigned)RADDLE_API_VERSION,
                     sizeof *api);
        return NULL;
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif
#endif

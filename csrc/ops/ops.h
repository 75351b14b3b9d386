/* ops.h - what a transformer needs around its attention: norms, rotary embedding, activations,
 * embedding, linear layers, softmax and sampling.
 *
 * The functions here check their arguments once for both back ends (ops_norm.c, ops_elementwise.c,
 * ops_rope.c, ops_linear.c, ops_sample.c), fill a params struct and hand it to a raddle_ops_backend: ops_cpu*.c
 * or ops_cuda*.c. They hold no state; only a linear layer has a life of its own.
 *
 * dtypes: float32, float16, bfloat16; arithmetic is float32. Tensors of one call are on one device.
 */
#ifndef RADDLE_OPS_OPS_H
#define RADDLE_OPS_OPS_H

#include "base/tensor.h"
#include "kernels/ops/ops_params.h"
#include "kernels/ops/ops_sample_params.h"

/* ---------------------------------------------------------------- elementwise */

/* out = norm(x) * (weight + weight_offset), rounded once. x, residual and out [.., d], any leading
 * dimensions that strides join to at most two levels; out may be x. */
typedef struct raddle_ops_norm_args {
    const raddle_tensor *x;
    const raddle_tensor
        *residual;               /* or NULL; the norm is of x + residual in float32, which residual
                                      gets, rounded to its dtype */
    const raddle_tensor *weight; /* [d], of x's dtype or float32 */
    const raddle_tensor *bias; /* [d], of weight's dtype: a layer norm, (x - mean) over the standard
                                      deviation, + bias; NULL: x over its root mean square */
    const raddle_tensor *out;  /* of x's dtype, or float8: then of the result over scale */
    const raddle_tensor *scale_tensor; /* one float32 on the host or x's device; NULL: scale */
    float eps, weight_offset, scale;
} raddle_ops_norm_args;
raddle_status raddle_ops_norm(const raddle_ops_norm_args *args, raddle_stream stream);
/* x [.., 2d] -> out [.., d] = activation(x[.., :d]) * x[.., d:]; activation: RADDLE_OPS_SILU, .. */
raddle_status raddle_ops_act_and_mul(int32_t activation, const raddle_tensor *x,
                                     const raddle_tensor *out, raddle_stream stream);
/* ids [n] -> out [n, d] = table[ids]. On the CPU an id outside the table is an error; on CUDA its
 * row becomes zero. */
raddle_status raddle_ops_embedding(const raddle_tensor *ids, const raddle_tensor *table,
                                   const raddle_tensor *out, raddle_stream stream);

/* ---------------------------------------------------------------- rotary embedding */

/* Row p of out, float32 [max_position, 2 * half] on the host: cos(p * inv_freq[i]) * factor, then
 * the sines. Computed in float64. */
raddle_status raddle_ops_fill_cos_sin(const double *inv_freq, int32_t half, double factor,
                                      const raddle_tensor *out);
typedef struct raddle_ops_rope_args {
    const raddle_tensor *q;                /* [n, num_qo_heads, head_dim] */
    const raddle_tensor *k;                /* [n, num_kv_heads, head_dim], or NULL */
    const raddle_tensor *q_out, *k_out;    /* like q and k; q_out NULL: in place */
    const raddle_tensor *positions;        /* [n], or NULL: then those of segments of rows, */
    const raddle_tensor *indptr, *offsets; /* [batch + 1], and [batch] positions of first rows */
    const raddle_tensor *cos_sin;          /* as raddle_ops_fill_cos_sin makes it, or NULL: */
    const uint64_t *turns;                 /* [num_turns]: of each pair per position, 2^-64 turns */
    int64_t num_turns;                     /* at most RADDLE_OPS_MAX_TURNS */
    float attention_factor;                /* of cosines and sines made of turns */
    bool interleave;
} raddle_ops_rope_args;
/* Rows in no segment are not rotated. On the CPU a position outside the table is an error; on CUDA
 * its row is not rotated. */
raddle_status raddle_ops_rope(const raddle_ops_rope_args *args, raddle_stream stream);

/* What becomes 8-bit floats: NULL to is NULL from. */
typedef struct raddle_ops_rope_fp8_args {
    /* q_rope, k_rope [n, heads, rotary_dim]; q_nope, k_nope, v [n, heads, width] or NULL. */
    const raddle_tensor *q_rope, *q_nope, *k_rope, *k_nope, *v;
    /* Of one float8 type, like their sources; with batch_indices those of k and v are
     * [num_pages, page_size, heads, width]. */
    const raddle_tensor *q_rope_out, *q_nope_out, *k_rope_out, *k_nope_out, *v_out;
    const raddle_tensor *cos_sin, *positions; /* as in rope; [n] */
    /* NULL, or: request of each row [n] (below 0: none), its place there [n], and the page tables
     * [batch + 1] and [num_indices]. */
    const raddle_tensor *batch_indices, *token_positions, *kv_indptr, *kv_indices;
    float q_scale, kv_scale; /* multiply */
    bool interleave;
} raddle_ops_rope_fp8_args;
raddle_status raddle_ops_rope_fp8(const raddle_ops_rope_fp8_args *args, raddle_stream stream);

/* ---------------------------------------------------------------- linear */

/* A weight in the form that its device multiplies best, and its bias. Immutable after creation:
 * any number of threads may run it at once. */
typedef struct raddle_ops_linear raddle_ops_linear;

/* weight [out_features, in_features], bias [out_features] or NULL, of weight's dtype or float32; on
 * the host or on device. On the CPU any strides; both are copied and not needed afterwards. On CUDA
 * host memory is copied, but memory of that device is used where it lies: the caller keeps it
 * alive. */
raddle_status raddle_ops_linear_create(const raddle_tensor *weight, const raddle_tensor *bias,
                                       raddle_device device, raddle_stream stream,
                                       raddle_ops_linear **out_linear);
void raddle_ops_linear_destroy(raddle_ops_linear *linear);
/* x [.., in_features] -> out [.., out_features], out of x's dtype or float32. max_sms (CUDA): the
 * multiprocessors that the kernel is chosen and cut for, where others are busy; 0: all. */
raddle_status raddle_ops_linear_run(const raddle_ops_linear *linear, const raddle_tensor *x,
                                    const raddle_tensor *out, int32_t max_sms,
                                    raddle_stream stream);

/* ---------------------------------------------------------------- sampling */

/* logits [n, vocab] -> out float32 [n, vocab] = softmax(logits / temperature); temperatures: float32
 * [n] on logits' device, in its place, or NULL. */
raddle_status raddle_ops_softmax(const raddle_tensor *logits, float temperature,
                                 const raddle_tensor *temperatures, const raddle_tensor *out,
                                 raddle_stream stream);

/* Settings: rows[0] for all rows, or one each (num_rows is 1 or n). A tensor that is not NULL, [n] of
 * any stride, replaces its field; one of the host is read and checked, one on x's device is read by
 * the kernel: temperature, top_p, min_p float32, top_k int32, seed and offset int64 or uint64. */
typedef struct raddle_ops_sample_args {
    const raddle_tensor *x;       /* [inputs, vocab]: logits, or probabilities of any sum */
    const raddle_tensor *indices; /* [n]: rows of x; or NULL: n is inputs */
    const raddle_tensor *out;     /* sample: [n] int32 or int64; filter: like x, may be x */
    const raddle_tensor *valid;   /* sample: [n] bool or uint8, or NULL */
    const raddle_ops_sample_row *rows;
    int64_t num_rows;
    const raddle_tensor *temperature, *top_k, *top_p, *min_p, *seed, *offset;
    bool is_probs;
    bool is_joint;      /* top_p is of all tokens, not of those that min_p and top_k leave */
    bool is_row_stream; /* rows of one seed and offset draw different numbers */
} raddle_ops_sample_args;

/* Temperature, min_p, top_k, then top_p of what is left; then inverse transform sampling over the
 * vocabulary in order. A row's result is a function of its values and settings alone (and of its
 * number with is_row_stream), the same on every back end. A row with NaN, without a logit above -inf,
 * or of probabilities with infinity or without one above 0, is an error on the CPU and -1 on CUDA;
 * with valid, it is 0 and not valid on both. */
raddle_status raddle_ops_sample(const raddle_ops_sample_args *args, raddle_stream stream);
/* What top_k and then top_p leave: probabilities brought to the sum 1, logits with -inf elsewhere. A
 * row with NaN, or of probabilities with infinity, becomes NaN. */
raddle_status raddle_ops_filter(const raddle_ops_sample_args *args, raddle_stream stream);

/* Speculative decoding of a drafted chain (arXiv 2302.01318), as raddle_ops_verify_params has it. On
 * the CPU a drafted token outside the vocabulary or a row that cannot be drawn from is an error. */
typedef struct raddle_ops_verify_args {
    const raddle_tensor *draft, *target;     /* [n, steps, vocab], [n, steps + 1, vocab] */
    const raddle_tensor *ids;                /* [n, steps] */
    const raddle_tensor *out;                /* int32 [n, steps + 1] */
    const raddle_tensor *accepted, *emitted; /* int32 [n], added to; or NULL */
    const raddle_tensor *seed, *offset;      /* [n] int64 or uint64 on draft's device; or NULL: */
    uint64_t seed_value, offset_value;
    bool is_row_stream;
} raddle_ops_verify_args;
raddle_status raddle_ops_verify(const raddle_ops_verify_args *args, raddle_stream stream);

/* logits [n, vocab], ids [n] -> logprobs float32 [n]; top_ids int32 and top_logprobs float32
 * [n, top], both NULL when no alternatives are wanted. */
raddle_status raddle_ops_token_logprobs(const raddle_tensor *logits, const raddle_tensor *ids,
                                        const raddle_tensor *logprobs, const raddle_tensor *top_ids,
                                        const raddle_tensor *top_logprobs, raddle_stream stream);

/* ---------------------------------------------------------------- kernel configs */

/* The configs that warmup and the compile tests build, in order: kernel name and its config text.
 */
int raddle_ops_num_kernel_configs(void);
raddle_status raddle_ops_kernel_config(int index, const char **out_name, char *out_config,
                                       size_t config_bytes);

#endif

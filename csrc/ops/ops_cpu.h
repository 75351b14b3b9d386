/* ops_cpu.h - what the files of the CPU back end of ops give to each other. */
#ifndef RADDLE_OPS_OPS_CPU_H
#define RADDLE_OPS_OPS_CPU_H

#include "ops/ops_backend.h"

/* Loops over float32 in the cache, one table per instruction set. */
typedef struct raddle_ops_cpu_loops {
    /* gate[i] = activation(gate[i]) * up[i]. */
    void (*act_and_mul[RADDLE_OPS_NUM_ACTIVATIONS])(float *gate, const float *up, int count);
    /* out[i] = e^((x[i] - max) * factor), 1 for the maximum; returns the sum. out may be x. */
    double (*exp_sum)(float *out, const float *x, int64_t count, float max, float factor);
    /* out[i] = raddle_ops_weight(x[i], max, factor). */
    void (*weights)(int64_t *out, const float *x, int64_t count, float max, float factor);
    /* out[i] = raddle_ops_prob_weight(x[i], factor). */
    void (*prob_weights)(int64_t *out, const float *x, int64_t count, float factor);
    /* Sum of weight[i] where x[i] >= least. */
    int64_t (*sum_weights)(const int64_t *weight, const float *x, int64_t count, float least);
} raddle_ops_cpu_loops;

extern const raddle_ops_cpu_loops raddle_ops_cpu_loops_generic;
#if defined(__x86_64__)
extern const raddle_ops_cpu_loops raddle_ops_cpu_loops_avx2;
extern const raddle_ops_cpu_loops raddle_ops_cpu_loops_avx512;
#endif

/* The table for isa.h's choice; never NULL. */
const raddle_ops_cpu_loops *raddle_ops_cpu_loops_get(void);

/* ops_cpu.c: rows of so many elements that make one piece of work. */
int64_t raddle_ops_cpu_rows_per_task(int64_t elements);

/* ops_cpu_norm.c */
raddle_status raddle_ops_cpu_norm(int32_t device, const raddle_ops_norm_params *params,
                                  raddle_stream stream);

/* ops_cpu_rope.c */
raddle_status raddle_ops_cpu_rope(int32_t device, const raddle_ops_rope_params *params,
                                  raddle_stream stream);
raddle_status raddle_ops_cpu_rope_fp8(int32_t device, const raddle_ops_rope_fp8_params *params,
                                      raddle_stream stream);

/* ops_cpu_softmax.c */
raddle_status raddle_ops_cpu_softmax(int32_t device, const raddle_ops_softmax_params *params,
                                     raddle_stream stream);
raddle_status raddle_ops_cpu_logprobs(int32_t device, const raddle_ops_logprobs_params *params,
                                      raddle_stream stream);

/* ops_cpu_sample.c */
raddle_status raddle_ops_cpu_sample(int32_t device, const raddle_ops_sample_job *sample,
                                    raddle_stream stream);
raddle_status raddle_ops_cpu_filter(int32_t device, const raddle_ops_sample_job *filter,
                                    raddle_stream stream);

/* ops_cpu_verify.c */
raddle_status raddle_ops_cpu_verify(int32_t device, const raddle_ops_verify_params *p,
                                    raddle_stream stream);

/* ops_cpu_linear.c */
raddle_status raddle_ops_cpu_linear_pack(raddle_ops_linear *linear, const raddle_tensor *weight,
                                         const raddle_tensor *bias, raddle_stream stream);
raddle_status raddle_ops_cpu_linear_run(const raddle_ops_linear *linear,
                                        const raddle_ops_linear_args *args, raddle_stream stream);
void raddle_ops_cpu_linear_release(raddle_ops_linear *linear);

#endif

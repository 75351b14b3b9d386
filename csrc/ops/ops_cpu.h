/* ops_cpu.h - what the files of the CPU back end of ops give to each other. */
#ifndef RADDLE_OPS_OPS_CPU_H
#define RADDLE_OPS_OPS_CPU_H

#include "ops/ops_backend.h"

/* ops_cpu_math.c: loops over float32 in the cache, vectorised for the CPU at hand. */
/* gate[i] = activation(gate[i]) * up[i]. */
void raddle_ops_cpu_act_and_mul_block(float *gate, const float *up, int count, int32_t activation);
/* x[i] = e^((x[i] - max) * factor); returns the sum. */
double raddle_ops_cpu_exp_sum(float *x, int64_t count, float max, float factor);
/* The largest of x; *out_has_nan tells whether one was NaN (then the result means nothing). */
float raddle_ops_cpu_row_max(const float *x, int64_t count, bool *out_has_nan);

/* ops_cpu_sample.c */
raddle_status raddle_ops_cpu_softmax(int32_t device, const raddle_ops_softmax_params *params,
                                     raddle_stream stream);
raddle_status raddle_ops_cpu_sample(int32_t device, const raddle_ops_sample_job *job,
                                    raddle_stream stream);
raddle_status raddle_ops_cpu_logprobs(int32_t device, const raddle_ops_logprobs_params *params,
                                      raddle_stream stream);

/* ops_cpu_linear.c */
raddle_status raddle_ops_cpu_linear_pack(raddle_ops_linear *linear, const raddle_tensor *weight,
                                         const raddle_tensor *bias, raddle_stream stream);
raddle_status raddle_ops_cpu_linear_run(const raddle_ops_linear *linear,
                                        const raddle_ops_linear_args *args, raddle_stream stream);
void raddle_ops_cpu_linear_release(raddle_ops_linear *linear);

#endif

/* ops_cuda.c - the CUDA back end of the ops family. */
#include "ops/ops_backend.h"

static raddle_status refuse(const char *what) {
    return raddle_fail(RADDLE_ERR_UNSUPPORTED, "%s: not on CUDA", what);
}

static raddle_status run_rmsnorm(int32_t device, const raddle_ops_rmsnorm_params *params,
                                 raddle_stream stream) {
    (void)device, (void)params, (void)stream;
    return refuse("rmsnorm");
}
static raddle_status run_act(int32_t device, const raddle_ops_act_params *params,
                             raddle_stream stream) {
    (void)device, (void)params, (void)stream;
    return refuse("act_and_mul");
}
static raddle_status run_embedding(int32_t device, const raddle_ops_embedding_params *params,
                                   raddle_stream stream) {
    (void)device, (void)params, (void)stream;
    return refuse("embedding");
}
static raddle_status run_rope(int32_t device, const raddle_ops_rope_params *params,
                              raddle_stream stream) {
    (void)device, (void)params, (void)stream;
    return refuse("apply_rope");
}
static raddle_status run_softmax(int32_t device, const raddle_ops_softmax_params *params,
                                 raddle_stream stream) {
    (void)device, (void)params, (void)stream;
    return refuse("softmax");
}
static raddle_status run_sample(int32_t device, const raddle_ops_sample_job *job,
                                raddle_stream stream) {
    (void)device, (void)job, (void)stream;
    return refuse("sample");
}
static raddle_status run_logprobs(int32_t device, const raddle_ops_logprobs_params *params,
                                  raddle_stream stream) {
    (void)device, (void)params, (void)stream;
    return refuse("token_logprobs");
}
static raddle_status linear_pack(raddle_ops_linear *linear, const raddle_tensor *weight,
                                 const raddle_tensor *bias, raddle_stream stream) {
    (void)linear, (void)weight, (void)bias, (void)stream;
    return refuse("Linear");
}
static raddle_status linear_run(const raddle_ops_linear *linear, const raddle_ops_linear_args *args,
                                raddle_stream stream) {
    (void)linear, (void)args, (void)stream;
    return refuse("Linear");
}
static void linear_release(raddle_ops_linear *linear) {
    (void)linear;
}

const raddle_ops_backend raddle_ops_backend_cuda = {
    .name = "cuda",
    .rmsnorm = run_rmsnorm,
    .act_and_mul = run_act,
    .embedding = run_embedding,
    .rope = run_rope,
    .softmax = run_softmax,
    .sample = run_sample,
    .logprobs = run_logprobs,
    .linear_pack = linear_pack,
    .linear_run = linear_run,
    .linear_release = linear_release,
};

int raddle_ops_num_kernel_configs(void) {
    return 0;
}

raddle_status raddle_ops_kernel_config(int index, const char **out_name, char *out_config,
                                       size_t config_bytes) {
    (void)out_name, (void)out_config, (void)config_bytes;
    return raddle_fail(RADDLE_ERR_VALUE, "index: no kernel config %d", index);
}

/* attention_cuda.c - the CUDA back end of attention: compiles what the choice names, and launches
 * it.
 *
 * The grid is the same for every run, so that a captured launch serves every later schedule: a CTA
 * whose worker has no segments leaves at once.
 */
#include "attention/attention.h"

#include <stdio.h>
#include <string.h>

#include "attention/attention_choice.h"
#include "base/alloc.h"
#include "base/tensor.h"
#include "cuda/kernel.h"

enum {
    ATTRIBUTE_SHARED_CARVEOUT = 9,  /* CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT */
    CTA_OVERHEAD_BYTES = 10 * 1024, /* static shared memory and the driver's own, at least */
};

typedef struct cuda_plan_state {
    const raddle_cuda_device *device;
    const raddle_kernel *kernel;
    raddle_launch launch;
} cuda_plan_state;

static void cuda_release(raddle_attention_plan *plan) {
    raddle_free(plan->backend_state); /* kernels live as long as the process */
    plan->backend_state = NULL;
}

/* CTAs that may run at once, as compiled and as the SM's registers and shared memory allow. */
static raddle_status count_workers(const cuda_plan_state *state,
                                   const raddle_attention_choice *choice, int32_t max_ctas,
                                   int32_t *out_workers) {
    const raddle_cuda_device *device = state->device;
    /* A hint: as much of the SM's memory as shared memory as these CTAs need. */
    const int needed = choice->ctas_per_sm * (choice->shared_bytes + CTA_OVERHEAD_BYTES);
    const int percent = 100 * (needed / 1024 + 1) / (device->shared_bytes_optin / 1024 + 1);
    RADDLE_TRY(raddle_cuda_check(device->driver->func_set_attribute(state->kernel->function,
                                                                    ATTRIBUTE_SHARED_CARVEOUT,
                                                                    percent < 100 ? percent : 100),
                                 "setting the shared memory carve-out of an attention kernel"));
    int resident = 0;
    RADDLE_TRY(raddle_cuda_check(device->driver->occupancy(&resident, state->kernel->function,
                                                           choice->block_threads,
                                                           (size_t)choice->shared_bytes),
                                 "asking how many attention CTAs fit on a multiprocessor"));
    RADDLE_REQUIRE(
        resident > 0, RADDLE_ERR_UNSUPPORTED,
        "attention on CUDA: a CTA of %s with %d bytes of shared memory does not fit on %s",
        choice->kernel, (int)choice->shared_bytes, device->name);
    const int32_t per_sm = resident < choice->ctas_per_sm ? resident : choice->ctas_per_sm;
    const int32_t workers = device->num_sms * per_sm;
    *out_workers = max_ctas > 0 && max_ctas < workers ? max_ctas : workers;
    return RADDLE_OK;
}

/* The choice's kernel, with the variant's text before it. */
static raddle_status get_kernel(const raddle_attention_plan *plan, const cuda_plan_state *state,
                                const raddle_attention_choice *choice,
                                const raddle_kernel **out_kernel) {
    static const char include[] = "#include \"attention/attention_variant.h\"\n";
    const unsigned shared_bytes = (unsigned)choice->shared_bytes;
    if (plan->variant == NULL) {
        return raddle_kernel_get(state->device, choice->kernel, choice->config, shared_bytes,
                                 out_kernel);
    }
    const size_t bytes = strlen(choice->config) + sizeof(include) + strlen(plan->variant->text) + 1;
    char *config = raddle_alloc(bytes);
    if (config == NULL) {
        return raddle_fail_memory(bytes);
    }
    snprintf(config, bytes, "%s%s%s", choice->config, include, plan->variant->text);
    const raddle_status status =
        raddle_kernel_get(state->device, choice->kernel, config, shared_bytes, out_kernel);
    raddle_free(config);
    return status;
}

static raddle_status prepare_kernel(raddle_attention_plan *plan, cuda_plan_state *state) {
    const raddle_attention_machine machine = {
        .arch = state->device->arch,
        .num_sms = state->device->num_sms,
        .shared_bytes = state->device->shared_bytes_optin,
        .read_rate = state->device->read_rate,
    };
    raddle_attention_config *config = &plan->config;
    raddle_attention_choice choice;
    RADDLE_TRY(raddle_attention_choose(&plan->spec, config, &machine, &choice));
    RADDLE_TRY(get_kernel(plan, state, &choice, &state->kernel));
    RADDLE_TRY(count_workers(state, &choice, plan->spec.max_ctas, &config->num_workers));
    config->tile_rows = choice.tile_rows;
    config->tile_kv = choice.tile_kv;
    config->heads_per_item = choice.heads_per_item;
    config->min_heads_per_item = choice.min_heads_per_item;
    config->segment_cost = choice.segment_cost;
    config->cut_cost = choice.cut_cost;
    config->merge_cost = choice.merge_cost;
    plan->params.tile_rows = choice.tile_rows;
    state->launch = (raddle_launch){
        .grid = {(unsigned)config->num_workers, 1, 1},
        .block = {(unsigned)choice.block_threads, 1, 1},
        .shared_bytes = (unsigned)choice.shared_bytes,
        .programmatic_launch = state->device->arch >= 90 && !plan->spec.no_pdl,
    };
    return RADDLE_OK;
}

static raddle_status cuda_prepare(raddle_attention_plan *plan) {
    cuda_plan_state *state = raddle_alloc_zero(sizeof(*state));
    if (state == NULL) {
        return raddle_fail_memory(sizeof(*state));
    }
    plan->backend_state = state; /* released with the plan, also when what follows fails */
    RADDLE_TRY(raddle_cuda_device_get(plan->base.device.index, &state->device));
    bool pushed;
    RADDLE_TRY(raddle_cuda_push(state->device, &pushed));
    const raddle_status status = prepare_kernel(plan, state);
    raddle_cuda_pop(state->device, pushed);
    return status;
}

static raddle_status cuda_run(raddle_attention_plan *plan,
                              const raddle_attention_run_params *params, raddle_stream stream) {
    const cuda_plan_state *state = plan->backend_state;
    raddle_launch launch = state->launch;
    bool pushed, *fresh;
    RADDLE_TRY(raddle_attention_device_plan_before_run(plan, stream, &fresh));
    if (fresh != NULL && *fresh) {
        launch.programmatic_launch = false; /* kernels read the schedule before they wait */
    }
    RADDLE_TRY(raddle_cuda_push(state->device, &pushed));
    const raddle_status status =
        raddle_kernel_launch(state->device, state->kernel, &launch, params, stream);
    raddle_cuda_pop(state->device, pushed);
    if (fresh != NULL && status == RADDLE_OK) {
        *fresh = false;
    }
    return status;
}

const raddle_attention_ops raddle_attention_ops_cuda = {
    .prepare = cuda_prepare,
    .run = cuda_run,
    .release = cuda_release,
};

/* ---------------------------------------------------------------- configs for warmup and tests */

/* A plan whose kernel is common enough to be built ahead. rows: packed rows of a request. */
typedef struct common_plan {
    raddle_dtype dtype;
    int16_t head_dim_qk, head_dim_vo;
    int16_t group_size, qo_len;
    raddle_dtype kv_dtype; /* NONE: dtype */
    unsigned built_ins;
} common_plan;

/* Of built_ins. */
enum { CAP = 1, SINK = 2, BIAS = 4, ROTATE = 8, PLAIN_WEIGHTS = 16 };

static const common_plan common_plans[] = {
    /* Decode. */
    {RADDLE_BF16, 128, 128, 4, 1, 0, 0},
    {RADDLE_BF16, 64, 64, 4, 1, 0, 0},
    {RADDLE_BF16, 256, 256, 4, 1, 0, 0},
    {RADDLE_BF16, 80, 80, 4, 1, 0, 0},
    {RADDLE_BF16, 96, 96, 4, 1, 0, 0},
    {RADDLE_BF16, 112, 112, 4, 1, 0, 0},
    {RADDLE_BF16, 192, 192, 4, 1, 0, 0},
    {RADDLE_BF16, 192, 128, 4, 1, 0, 0},
    {RADDLE_BF16, 8, 8, 4, 1, 0, 0},
    {RADDLE_F16, 128, 128, 4, 1, 0, 0},
    {RADDLE_F16, 64, 64, 4, 1, 0, 0},
    {RADDLE_F16, 256, 256, 4, 1, 0, 0},
    /* Decode with 9 to 16 rows. */
    {RADDLE_BF16, 128, 128, 4, 4, 0, 0},
    {RADDLE_BF16, 64, 64, 16, 1, 0, 0},
    {RADDLE_BF16, 32, 32, 16, 1, 0, 0},
    {RADDLE_BF16, 80, 80, 16, 1, 0, 0},
    {RADDLE_BF16, 192, 192, 16, 1, 0, 0},
    {RADDLE_F16, 128, 128, 16, 1, 0, 0},
    /* fp8 K/V: one stage and more, one row tile and two. */
    {RADDLE_BF16, 128, 128, 4, 1, RADDLE_F8_E4M3, 0},
    {RADDLE_BF16, 128, 128, 4, 4, RADDLE_F8_E4M3, 0},
    {RADDLE_BF16, 64, 64, 4, 1, RADDLE_F8_E4M3, 0},
    {RADDLE_BF16, 256, 256, 4, 1, RADDLE_F8_E4M3, 0},
    {RADDLE_BF16, 80, 80, 4, 1, RADDLE_F8_E4M3, 0},
    {RADDLE_BF16, 128, 128, 4, 1, RADDLE_F8_E5M2, 0},
    {RADDLE_F16, 128, 128, 4, 1, RADDLE_F8_E4M3, 0},
    {RADDLE_F16, 128, 128, 4, 1, RADDLE_F8_E5M2, 0},
    /* Built-in variants. */
    {RADDLE_BF16, 256, 256, 4, 1, 0, CAP},
    {RADDLE_BF16, 64, 64, 8, 1, 0, SINK},
    {RADDLE_BF16, 128, 128, 4, 1, 0, BIAS},
    {RADDLE_BF16, 128, 128, 4, 1, 0, ROTATE},
    {RADDLE_F16, 128, 128, 4, 1, 0, ROTATE},
    {RADDLE_BF16, 256, 256, 4, 1, 0, ROTATE},
    {RADDLE_BF16, 80, 80, 4, 4, 0, ROTATE},
    {RADDLE_BF16, 128, 128, 4, 1, RADDLE_F8_E4M3, ROTATE},
    {RADDLE_BF16, 128, 128, 4, 1, 0, PLAIN_WEIGHTS},
    {RADDLE_BF16, 128, 128, 4, 1, RADDLE_F8_E4M3, CAP | SINK | BIAS},
    {RADDLE_BF16, 256, 256, 4, 512, 0, CAP},
    {RADDLE_BF16, 64, 64, 8, 512, 0, SINK},
    {RADDLE_BF16, 128, 128, 4, 512, 0, BIAS | CAP},
    /* Decode: 24 and 32 rows in one tile. */
    {RADDLE_BF16, 128, 128, 24, 1, 0, 0},
    {RADDLE_BF16, 128, 128, 32, 1, 0, 0},
    {RADDLE_F16, 64, 64, 32, 1, 0, 0},
    /* Prefill: 128 rows, then 64 with two stages and with one. */
    {RADDLE_BF16, 128, 128, 4, 512, 0, 0},
    {RADDLE_BF16, 64, 64, 4, 512, 0, 0},
    {RADDLE_BF16, 80, 80, 4, 512, 0, 0},
    {RADDLE_BF16, 96, 96, 4, 512, 0, 0},
    {RADDLE_BF16, 8, 8, 4, 512, 0, 0},
    {RADDLE_F16, 128, 128, 4, 512, 0, 0},
    {RADDLE_F16, 64, 64, 4, 512, 0, 0},
    {RADDLE_BF16, 128, 128, 48, 1, 0, 0},
    {RADDLE_BF16, 64, 64, 48, 1, 0, 0},
    {RADDLE_BF16, 112, 112, 4, 512, 0, 0},
    {RADDLE_BF16, 192, 192, 4, 512, 0, 0},
    {RADDLE_BF16, 192, 128, 4, 512, 0, 0},
    {RADDLE_BF16, 256, 256, 4, 512, 0, 0},
    {RADDLE_F16, 256, 256, 4, 512, 0, 0},
};

/* Kernels that no plan chooses. */
typedef struct plain_config {
    const char *kernel, *config;
} plain_config;

static const plain_config plain_configs[] = {
    {"attention/attention_append", ""},
    {"attention/attention_plan", ""},
    {"attention/attention_seq_lens", ""},
    {"attention/attention_positions", ""},
    {"attention/attention_merge", "#define RADDLE_TYPE bf16\n#define RADDLE_VECTOR 8\n"},
    {"attention/attention_merge", "#define RADDLE_TYPE bf16\n#define RADDLE_VECTOR 1\n"},
    {"attention/attention_merge", "#define RADDLE_TYPE f16\n#define RADDLE_VECTOR 8\n"},
    {"attention/attention_merge", "#define RADDLE_TYPE f16\n#define RADDLE_VECTOR 1\n"},
    {"attention/attention_merge", "#define RADDLE_TYPE f32\n#define RADDLE_VECTOR 4\n"},
    {"attention/attention_merge", "#define RADDLE_TYPE f32\n#define RADDLE_VECTOR 1\n"},
};

enum {
    NUM_COMMON = sizeof(common_plans) / sizeof(common_plans[0]),
    NUM_PLAIN = sizeof(plain_configs) / sizeof(plain_configs[0]),
    COMMON_BATCH = 64,                /* enough that 32 rows of a head are one tile */
    AMPERE_SHARED_BYTES = 163 * 1024, /* that one CTA may have on sm_80 */
};

int raddle_attention_num_kernel_configs(void) {
    return NUM_COMMON + NUM_PLAIN;
}

static raddle_status choose_common(const common_plan *common, raddle_attention_choice *choice) {
    const raddle_attention_spec spec = {
        .max_batch = COMMON_BATCH,
        .max_qo_tokens = (int64_t)COMMON_BATCH * common->qo_len,
        .max_qo_len = common->qo_len,
    };
    const raddle_attention_config config = {
        .q_dtype = common->dtype,
        .kv_dtype = common->kv_dtype == RADDLE_DTYPE_NONE ? common->dtype : common->kv_dtype,
        .o_dtype = common->dtype,
        .head_dim_qk = common->head_dim_qk,
        .head_dim_vo = common->head_dim_vo,
        .num_qo_heads = 8 * common->group_size,
        .num_kv_heads = 8,
        .group_size = common->group_size,
        .has_soft_cap = (common->built_ins & CAP) != 0,
        .has_sinks = (common->built_ins & SINK) != 0,
        .has_alibi = (common->built_ins & BIAS) != 0,
        .has_rope = (common->built_ins & ROTATE) != 0,
        .has_sigmoid = (common->built_ins & PLAIN_WEIGHTS) != 0,
        .no_softmax = (common->built_ins & PLAIN_WEIGHTS) != 0,
    };
    const raddle_attention_machine machine = {
        .arch = 90, .num_sms = 132, .shared_bytes = 227 * 1024, .read_rate = 23000};
    return raddle_attention_choose(&spec, &config, &machine, choice);
}

raddle_status raddle_attention_kernel_config(int index, const char **out_name, char *out_config,
                                             size_t config_bytes, bool *out_hopper_only) {
    RADDLE_REQUIRE(index >= 0 && index < raddle_attention_num_kernel_configs(), RADDLE_ERR_VALUE,
                   "index: expected 0 to %d, got %d", raddle_attention_num_kernel_configs() - 1,
                   index);
    raddle_attention_choice choice;
    const char *name, *config;
    if (index < NUM_COMMON) {
        RADDLE_TRY(choose_common(&common_plans[index], &choice));
        name = choice.kernel;
        config = choice.config;
    } else {
        name = plain_configs[index - NUM_COMMON].kernel;
        config = plain_configs[index - NUM_COMMON].config;
    }
    RADDLE_REQUIRE(strlen(config) < config_bytes, RADDLE_ERR_CAPACITY,
                   "config_bytes: expected more than %zu, got %zu", strlen(config), config_bytes);
    strcpy(out_config, config);
    *out_name = name;
    *out_hopper_only = index < NUM_COMMON && choice.shared_bytes > AMPERE_SHARED_BYTES;
    return RADDLE_OK;
}

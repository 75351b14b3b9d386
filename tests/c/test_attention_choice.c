// needs: base/status.c base/alloc.c base/tensor.c attention/attention_choice.c
/* test_attention_choice.c - which CUDA kernel a plan gets, and what is refused with which words. */
#include "check.h"

#include <string.h>

#include "attention/attention_choice.h"

static const raddle_attention_machine hopper = {
    .arch = 90, .num_sms = 132, .shared_bytes = 227 * 1024, .read_rate = 23000};
static const raddle_attention_machine small = {
    .arch = 86, .num_sms = 84, .shared_bytes = 99 * 1024, .read_rate = 10000};

typedef struct choice_case {
    int32_t head_dim_qk, head_dim_vo, num_kv_heads, group_size, qo_len, max_batch, fixed_chunk;
} choice_case;

static raddle_status choose(const choice_case *c, raddle_dtype q, raddle_dtype kv,
                            const raddle_attention_machine *machine,
                            raddle_attention_choice *choice) {
    const raddle_attention_spec spec = {
        .max_batch = c->max_batch,
        .max_qo_tokens = (int64_t)c->max_batch * c->qo_len,
        .max_qo_len = c->qo_len,
        .fixed_chunk = c->fixed_chunk,
    };
    const raddle_attention_config config = {
        .q_dtype = q,
        .kv_dtype = kv,
        .o_dtype = q,
        .head_dim_qk = c->head_dim_qk,
        .head_dim_vo = c->head_dim_vo,
        .num_qo_heads = c->num_kv_heads * c->group_size,
        .num_kv_heads = c->num_kv_heads,
        .group_size = c->group_size,
    };
    return raddle_attention_choose(&spec, &config, machine, choice);
}

static void test_kernels(void) {
    static const struct {
        choice_case c;
        bool decode;
        int32_t tile_rows, heads_per_item;
    } cases[] = {
        {{128, 128, 8, 4, 1, 1, 0}, true, 4, 8},    /* a warp per head */
        {{128, 128, 12, 4, 1, 256, 0}, true, 4, 4}, /* what divides the heads */
        {{128, 128, 7, 4, 1, 4096, 0}, true, 4, 1}, /* odd heads are not paired */
        {{128, 128, 8, 4, 4, 256, 0}, true, 16, 2}, /* 4 query tokens */
        {{128, 128, 1, 20, 1, 1, 0}, true, 10, 1},  /* two even tiles */
        {{128, 128, 1, 20, 1, 64, 0}, true, 20, 1}, /* many requests: one */
        {{128, 128, 1, 32, 1, 64, 0}, true, 32, 1},
        {{128, 128, 8, 4, 8, 64, 64}, true, 16, 2}, /* folded chunks need the memory */
        {{128, 128, 1, 33, 1, 64, 0}, false, 64, 1},
        {{256, 256, 2, 16, 1, 1, 0}, true, 8, 2}, /* 16 rows do not fit in registers */
        {{128, 128, 8, 4, 512, 1, 0}, false, 128, 1},
        {{112, 112, 8, 4, 512, 1, 0}, false, 64, 1},
        {{128, 128, 8, 4, 512, 1, 64}, false, 64, 1}, /* folded chunks need the memory */
        {{128, 128, 8, 4, 1, 1, 64}, true, 4, 2},     /* the batch does not decide the width */
        {{128, 128, 8, 4, 1, 64, 64}, true, 4, 2},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        raddle_attention_choice choice;
        CHECK_OK(choose(&cases[i].c, RADDLE_BF16, RADDLE_BF16, &hopper, &choice));
        CHECK_INT(strcmp(choice.kernel, cases[i].decode ? "attention/attention_decode"
                                                        : "attention/attention_prefill"),
                  0);
        CHECK_INT(choice.tile_rows, cases[i].tile_rows);
        CHECK_INT(choice.heads_per_item, cases[i].heads_per_item);
        CHECK_INT(choice.min_heads_per_item,
                  cases[i].c.fixed_chunk > 0 ? choice.heads_per_item : 1);
        CHECK(choice.segment_cost > 0 && choice.tile_kv > 0 && choice.shared_bytes > 0);
        CHECK(strstr(choice.config, "#define RADDLE_KV_TYPE bf16\n") != NULL);
        /* The last line is whole: nothing was cut off. */
        CHECK_INT(choice.config[strlen(choice.config) - 1], '\n');
        CHECK(strlen(choice.config) + 64 < sizeof(choice.config));
    }
}

/* Every head_dim has a kernel on every machine, within its shared memory. */
static void test_all_head_dims(void) {
    for (int32_t qk = 8; qk <= 256; qk += 8) {
        for (int32_t vo = 8; vo <= 256; vo += 8) {
            for (int32_t qo_len = 1; qo_len <= 4096; qo_len *= 8) {
                const choice_case c = {qk, vo, 8, 4, qo_len, 1, 0};
                raddle_attention_choice choice;
                CHECK_OK(choose(&c, RADDLE_F16, RADDLE_F16, &hopper, &choice));
                CHECK(choice.shared_bytes <= hopper.shared_bytes);
                if (choose(&c, RADDLE_F16, RADDLE_F16, &small, &choice) == RADDLE_OK) {
                    CHECK(choice.shared_bytes <= small.shared_bytes);
                } else {
                    CHECK(2 * qk + vo > 680); /* tiles of 64 rows of Q, K and V are too much */
                }
            }
        }
    }
}

static void test_refusals(void) {
    const choice_case c = {128, 128, 8, 4, 1, 1, 0};
    raddle_attention_choice choice = {.tile_rows = -7};
    CHECK_FAILS(choose(&c, RADDLE_F32, RADDLE_F32, &hopper, &choice), RADDLE_ERR_UNSUPPORTED,
                "q is float32");
    CHECK_FAILS(choose(&c, RADDLE_F16, RADDLE_BF16, &hopper, &choice), RADDLE_ERR_UNSUPPORTED,
                "K and V are bfloat16");
    const raddle_attention_machine old = {.arch = 75, .num_sms = 40, .shared_bytes = 64 * 1024};
    CHECK_FAILS(choose(&c, RADDLE_F32, RADDLE_BF16, &old, &choice), RADDLE_ERR_UNSUPPORTED,
                "q is float32");
    CHECK(strstr(raddle_last_error()->message, "K and V are bfloat16") != NULL);
    CHECK(strstr(raddle_last_error()->message, "compute capability 7.5") != NULL);
    const raddle_attention_machine tiny = {.arch = 80, .num_sms = 1, .shared_bytes = 48 * 1024};
    const choice_case big = {256, 256, 8, 4, 512, 1, 0};
    CHECK_FAILS(choose(&big, RADDLE_BF16, RADDLE_BF16, &tiny, &choice), RADDLE_ERR_UNSUPPORTED,
                "shared memory");
    CHECK_INT(choice.tile_rows, -7); /* untouched by a failure */
}

int main(void) {
    test_kernels();
    test_all_head_dims();
    test_refusals();
    return check_report();
}

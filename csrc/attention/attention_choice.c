/* attention_choice.c - which CUDA kernel a plan runs. Every constant cites the measurement it comes
 * from.
 *
 * Up to 16 packed rows (query heads of a group x query tokens of a request) go to the decode
 * kernel, which holds K, V and outputs in registers: a second tile of 8 rows still fits, more do
 * not, and reading K/V again for each 8 rows would cost more L2 traffic than the prefill kernel's
 * shared memory saves.
 */
#include "attention/attention_choice.h"

#include <stdio.h>
#include <string.h>

#include "base/tensor.h"
#include "kernels/attention/attention_shared.h"

enum {
    /* Registers that decode tiles, outputs and q may take of 255 (two CTAs per SM: of 128); the
     * rest of the kernel needs the difference. Found by compiling the grid of head dims for sm_80
     * and sm_90a without a spill. */
    DECODE_REGISTERS = 200,
    DECODE_REGISTERS_TWO_CTAS = 90,
    DECODE_REGISTERS_ONE_STAGE = 196,
    DECODE_STATIC_BYTES = 10 * 1024, /* at least the warps' notes */
    PREFILL_STATIC_BYTES = 6 * 1024, /* at least the threads' lookups */

    /* Wide items read long rows, narrow ones merge in parallel: as wide as leaves this many items
       per batch. */
    DECODE_MIN_ITEMS = 64,
    /* What one SM would have read in the 1.5 to 2 us that a cut costs: 24 GB/s x 1.75 us (H100,
       decode-direct probe). */
    DECODE_SEGMENT_BYTES = 40 * 1024,
    /* A cut costs a prefill worker about one tile of K/V: first loads, partials of all rows, merge.
     */
    PREFILL_SEGMENT_COST = RADDLE_PREFILL_TILE_KV,
};

/* ---------------------------------------------------------------- config lines */

static const char *type_name(raddle_dtype dtype) {
    return dtype == RADDLE_BF16 ? "bf16" : dtype == RADDLE_F16 ? "f16" : "f32";
}

static void define(char *config, const char *name, const char *value) {
    const size_t used = strlen(config);
    snprintf(config + used, RADDLE_ATTENTION_CONFIG_BYTES - used, "#define RADDLE_%s %s\n", name,
             value);
}

static void define_int(char *config, const char *name, int32_t value) {
    char text[16];
    snprintf(text, sizeof(text), "%d", (int)value);
    define(config, name, text);
}

static void define_common(const raddle_attention_config *config, raddle_attention_choice *choice) {
    choice->config[0] = '\0';
    define(choice->config, "KV_TYPE", type_name(config->kv_dtype));
    define(choice->config, "OUT_TYPE", type_name(config->o_dtype));
    define_int(choice->config, "HEAD_DIM_QK", config->head_dim_qk);
    define_int(choice->config, "HEAD_DIM_VO", config->head_dim_vo);
    define_int(choice->config, "CTAS_PER_SM", choice->ctas_per_sm);
}

/* ---------------------------------------------------------------- decode */

typedef struct decode_shape {
    int32_t row_tiles, stages, ctas_per_sm;
    bool q_in_shared;
} decode_shape;

/* False when the rows do not fit in registers. */
static bool shape_decode(const raddle_attention_config *config, int32_t rows, decode_shape *shape) {
    const int32_t k_chunks = (config->head_dim_qk + 31) / 32,
                  v_chunks = (config->head_dim_vo + 63) / 64;
    shape->row_tiles = (rows + RADDLE_DECODE_ROWS - 1) / RADDLE_DECODE_ROWS;
    const int32_t tile = 8 * k_chunks + 16 * v_chunks;
    const int32_t out = 16 * v_chunks * shape->row_tiles;
    const int32_t q = 4 * k_chunks * shape->row_tiles;
    shape->ctas_per_sm = 1;
    shape->q_in_shared = false;
    if (2 * tile + out + q <= DECODE_REGISTERS) {
        shape->stages = 2;
        shape->ctas_per_sm = 2 * tile + out + q <= DECODE_REGISTERS_TWO_CTAS ? 2 : 1;
        return shape->row_tiles <= 2;
    }
    shape->stages = 1;
    shape->q_in_shared = tile + out + q > DECODE_REGISTERS_ONE_STAGE;
    return shape->row_tiles <= 2 && tile + out <= DECODE_REGISTERS_ONE_STAGE;
}

/* The widest item of 8, 4, 2 or 1 whole K/V heads that leaves enough items. In fixed-chunk mode the
 * width shapes the order of additions, so that it follows from the heads alone. */
static int32_t choose_heads_per_item(const raddle_attention_spec *spec,
                                     const raddle_attention_config *config) {
    int32_t heads = spec->fixed_chunk > 0 ? 2 : RADDLE_DECODE_WARPS;
    while (heads > 1 &&
           (config->num_kv_heads % heads != 0 ||
            (spec->fixed_chunk == 0 &&
             (int64_t)spec->max_batch * (config->num_kv_heads / heads) < DECODE_MIN_ITEMS))) {
        heads /= 2;
    }
    return heads;
}

static bool choose_decode(const raddle_attention_spec *spec, const raddle_attention_config *config,
                          const raddle_attention_machine *machine, int32_t rows,
                          raddle_attention_choice *choice) {
    decode_shape shape;
    if (!shape_decode(config, rows, &shape)) {
        return false;
    }
    const int32_t heads = choose_heads_per_item(spec, config);
    const int32_t shared =
        raddle_decode_shared_bytes(rows, shape.row_tiles, config->head_dim_qk, config->head_dim_vo,
                                   heads, shape.q_in_shared, spec->fixed_chunk > 0);
    if (shared + DECODE_STATIC_BYTES > machine->shared_bytes) {
        return false;
    }
    const int32_t token_bytes = heads * (config->head_dim_qk + config->head_dim_vo) *
                                (int32_t)raddle_dtype_bytes(config->kv_dtype);
    *choice = (raddle_attention_choice){
        .kernel = "attention/attention_decode",
        .block_threads = 32 * RADDLE_DECODE_WARPS,
        .ctas_per_sm = shape.ctas_per_sm,
        .shared_bytes = shared,
        .tile_rows = rows,
        .tile_kv = RADDLE_DECODE_TILE_KV,
        .heads_per_item = heads,
        .segment_cost = DECODE_SEGMENT_BYTES / shape.ctas_per_sm / token_bytes + 1,
    };
    define_common(config, choice);
    define_int(choice->config, "HEADS_PER_ITEM", heads);
    define_int(choice->config, "ROW_TILES", shape.row_tiles);
    define_int(choice->config, "STAGES", shape.stages);
    define(choice->config, "Q_IN_SHARED", shape.q_in_shared ? "true" : "false");
    return true;
}

/* ---------------------------------------------------------------- prefill */

/* 128 rows per CTA read each K/V tile half as often as 64, where the outputs leave registers for it
 * (compiled for sm_80 and sm_90a without a spill; 128 is the common head_dim, its neighbours spill
 * a few bytes). */
static int32_t prefill_rows(const raddle_attention_config *config, int64_t rows) {
    const bool wide =
        config->head_dim_vo <= 96 || (config->head_dim_vo == 128 && config->head_dim_qk == 128);
    return wide && rows > 64 ? 128 : 64;
}

static int32_t prefill_ctas_per_sm(const raddle_attention_config *config, int32_t tile_rows) {
    if (tile_rows == 128 || config->head_dim_vo > 128) {
        return 2;
    }
    return config->head_dim_vo > 64 ? 3 : 4;
}

static bool choose_prefill(const raddle_attention_spec *spec, const raddle_attention_config *config,
                           const raddle_attention_machine *machine, int32_t tile_rows,
                           raddle_attention_choice *choice) {
    const int32_t shared = raddle_prefill_shared_bytes(tile_rows, config->head_dim_qk,
                                                       config->head_dim_vo, spec->fixed_chunk > 0);
    *choice = (raddle_attention_choice){
        .kernel = "attention/attention_prefill",
        .block_threads = 32 * RADDLE_PREFILL_WARPS,
        .ctas_per_sm = prefill_ctas_per_sm(config, tile_rows),
        .shared_bytes = shared,
        .tile_rows = tile_rows,
        .tile_kv = RADDLE_PREFILL_TILE_KV,
        .heads_per_item = 1,
        .segment_cost = PREFILL_SEGMENT_COST,
    };
    define_common(config, choice);
    define_int(choice->config, "TILE_ROWS", tile_rows);
    return shared + PREFILL_STATIC_BYTES <= machine->shared_bytes;
}

/* ---------------------------------------------------------------- choice */

/* Appends a reason to a list. */
static void add_reason(char *reasons, size_t bytes, const char *reason) {
    const size_t used = strlen(reasons);
    snprintf(reasons + used, bytes - used, "%s%s", used ? "; " : "", reason);
}

static raddle_status check_support(const raddle_attention_config *config,
                                   const raddle_attention_machine *machine) {
    char reasons[256] = "", text[96];
    if (config->q_dtype != RADDLE_F16 && config->q_dtype != RADDLE_BF16) {
        snprintf(text, sizeof(text), "q is %s, expected float16 or bfloat16",
                 raddle_dtype_name(config->q_dtype));
        add_reason(reasons, sizeof(reasons), text);
    }
    if (config->q_dtype != config->kv_dtype) {
        snprintf(text, sizeof(text), "K and V are %s, expected the dtype of q, %s",
                 raddle_dtype_name(config->kv_dtype), raddle_dtype_name(config->q_dtype));
        add_reason(reasons, sizeof(reasons), text);
    }
    if (machine->arch < 80) {
        snprintf(text, sizeof(text), "the GPU has compute capability %d.%d, expected 8.0 or later",
                 (int)machine->arch / 10, (int)machine->arch % 10);
        add_reason(reasons, sizeof(reasons), text);
    }
    RADDLE_REQUIRE(reasons[0] == '\0', RADDLE_ERR_UNSUPPORTED,
                   "attention on CUDA cannot run this: %s", reasons);
    return RADDLE_OK;
}

raddle_status raddle_attention_choose(const raddle_attention_spec *spec,
                                      const raddle_attention_config *config,
                                      const raddle_attention_machine *machine,
                                      raddle_attention_choice *out_choice) {
    RADDLE_TRY(check_support(config, machine));
    /* The most packed rows of one request. */
    const int64_t tokens = spec->max_qo_len > 0 ? spec->max_qo_len : spec->max_qo_tokens;
    const int64_t rows = tokens * config->group_size;
    if (rows <= 2 * RADDLE_DECODE_ROWS &&
        choose_decode(spec, config, machine, (int32_t)rows, out_choice)) {
        return RADDLE_OK;
    }
    for (int32_t tile_rows = prefill_rows(config, rows); tile_rows >= 64; tile_rows /= 2) {
        if (choose_prefill(spec, config, machine, tile_rows, out_choice)) {
            return RADDLE_OK;
        }
    }
    return raddle_fail(RADDLE_ERR_UNSUPPORTED,
                       "attention on CUDA cannot run this: head_dim %d and %d%s need %d bytes of "
                       "shared memory per CTA, the GPU has %d",
                       (int)config->head_dim_qk, (int)config->head_dim_vo,
                       spec->fixed_chunk > 0 ? " in fixed-chunk mode" : "",
                       (int)out_choice->shared_bytes + PREFILL_STATIC_BYTES,
                       (int)machine->shared_bytes);
}

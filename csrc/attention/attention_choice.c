/* attention_choice.c - which CUDA kernel a plan runs. Every constant cites the measurement it comes
 * from (H100 80GB HBM3, CUDA 13.0; 32/8 heads, head_dim 128, bf16 unless said).
 *
 * Few packed rows (query heads of a group x query tokens of a request) go to the decode kernel,
 * which holds K, V and outputs in registers: up to 16 rows in one tile, up to 32 in one or in two,
 * the second of which finds K and V in the L2. One has partials that take twice as long to merge,
 * which few requests and heads, cut into many parts, do not make up for (H200, us, one and two tiles
 * of 32 rows: 32 x 4096, 64/8 heads, 4 query tokens 181 and 255; 64 x 4096, 8 query tokens 362 and
 * 505; 32 x 4096, 32/1 heads 31.0 and 31.0; 4 x 4096, 32/1 24.1 and 13.6). More rows go to the
 * prefill kernel.
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
    DECODE_UNPACK_REGISTERS = 16, /* a chunk of two tokens as f16 */
    DECODE_LOGIT_REGISTERS = 16,
    DECODE_PAIR_REGISTERS = 24,     /* two chunks as floats, their sines and cosines */
    DECODE_FP8_PAIR_REGISTERS = 40, /* twice as many elements in a chunk */
    DECODE_MAX_ROWS = 32,           /* of a request and K/V head */

    /* Rows of all heads of an item, for which partials have room: a merge of more would take longer
     * than wide items save. In fixed-chunk mode the width shapes the order of additions, so that it
     * follows from the heads alone. */
    DECODE_ITEM_ROWS = 32,
    DECODE_FIXED_HEADS = 2,
    /* Starting a segment, and what a segment costs besides that is a part of an item (H200: 32
     * segments of 16 tokens one after the other take 97 us, but 1 x 32768 takes 36.3 us with 3900
     * and 37.8 with 3300; 16 x 8192 takes 130 us on 132 cut shares, 125 on 128 whole items). */
    DECODE_SEGMENT_NS = 3900,
    DECODE_CUT_NS = 4400,
    /* A cut costs a prefill worker about one tile of K/V: first loads, partials of all rows, merge.
     */
    PREFILL_SEGMENT_COST = RADDLE_PREFILL_TILE_KV,

    /* Shared memory besides what the kernels are asked for: static (at most), and the driver's. */
    DECODE_STATIC_BYTES = 25 * 1024,
    PREFILL_STATIC_BYTES = 5200,
    CTA_RESERVED_BYTES = 1024,
};

/* ---------------------------------------------------------------- config lines */

static const char *type_name(raddle_dtype dtype) {
    switch (dtype) {
    case RADDLE_BF16:
        return "bf16";
    case RADDLE_F16:
        return "f16";
    case RADDLE_F8_E4M3:
        return "e4m3";
    case RADDLE_F8_E5M2:
        return "e5m2";
    default:
        return "f32";
    }
}

static bool is_fp8(const raddle_attention_config *config) {
    return raddle_dtype_bytes(config->kv_dtype) == 1;
}

/* Whether elements of q and K are looked at in pairs, half a row apart. */
static bool has_pairs(const raddle_attention_config *config) {
    return config->has_rope || (config->hooks & (RADDLE_HOOK_QUERY | RADDLE_HOOK_KEY)) != 0;
}

/* Whether each logit is looked at, and not only the largest. */
static bool each_logit(const raddle_attention_config *config) {
    return config->has_soft_cap || config->has_alibi || config->no_softmax ||
           (config->hooks & (RADDLE_HOOK_LOGIT | RADDLE_HOOK_MASK)) != 0;
}

/* What K needs on its way to the multiply is done in registers, which only decode has it in. */
static bool only_decode(const raddle_attention_config *config) {
    return is_fp8(config) || has_pairs(config);
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
    define(choice->config, "Q_TYPE", type_name(config->q_dtype));
    define(choice->config, "KV_TYPE", type_name(config->kv_dtype));
    define(choice->config, "OUT_TYPE", type_name(config->o_dtype));
    define_int(choice->config, "HEAD_DIM_QK", config->head_dim_qk);
    define_int(choice->config, "HEAD_DIM_VO", config->head_dim_vo);
    define_int(choice->config, "CTAS_PER_SM", choice->ctas_per_sm);
    define_int(choice->config, "SOFT_CAP", config->has_soft_cap);
    define_int(choice->config, "ALIBI", config->has_alibi);
    define_int(choice->config, "ROPE", config->has_rope);
    define_int(choice->config, "SINKS", config->has_sinks);
    define_int(choice->config, "SIGMOID", config->has_sigmoid);
    define_int(choice->config, "NO_SOFTMAX", config->no_softmax);
}

/* ---------------------------------------------------------------- decode */

typedef struct decode_shape {
    int32_t row_tiles, stages, halves, ctas_per_sm;
    int32_t q_quads; /* of 16 bytes, per lane and row tile */
    bool q_in_shared;
} decode_shape;

/* Registers for what is done to K and logits on their way. */
static int32_t count_work_registers(const raddle_attention_config *config) {
    return (is_fp8(config) ? DECODE_UNPACK_REGISTERS : 0) +
           (each_logit(config) ? DECODE_LOGIT_REGISTERS : 0) +
           (has_pairs(config) ? DECODE_PAIR_REGISTERS : 0) +
           (has_pairs(config) && is_fp8(config) ? DECODE_FP8_PAIR_REGISTERS : 0);
}

/* Registers of a lane: what attention_decode_tile.cuh declares. False when the rows do not fit. */
static bool shape_decode(const raddle_attention_config *config, int32_t rows, decode_shape *shape) {
    const int32_t elements = 16 / (int32_t)raddle_dtype_bytes(config->kv_dtype);
    const int32_t together = has_pairs(config) ? 2 : 1;
    const int32_t k_chunks = (config->head_dim_qk / elements / together + 3) / 4 * together;
    const int32_t v_chunks = (config->head_dim_vo + 8 * elements - 1) / (8 * elements);
    shape->row_tiles = (rows + RADDLE_DECODE_ROWS - 1) / RADDLE_DECODE_ROWS;
    shape->q_quads = k_chunks * elements / 8;
    const int32_t tile = 8 * k_chunks + 16 * v_chunks;
    const int32_t out = 2 * elements * v_chunks * shape->row_tiles;
    const int32_t q = 4 * shape->q_quads * shape->row_tiles;
    const int32_t work = count_work_registers(config);
    shape->ctas_per_sm = 1;
    shape->q_in_shared = false;
    shape->halves = 1;
    if (is_fp8(config) && 4 * tile + out + q + work <= DECODE_REGISTERS) {
        shape->halves = 2;
        shape->stages = 2;
        return true;
    }
    if (2 * tile + out + q + work <= DECODE_REGISTERS) {
        shape->stages = 2;
        const bool is_small = 2 * tile + out + q <= DECODE_REGISTERS_TWO_CTAS;
        const bool is_plain = !only_decode(config) && !each_logit(config);
        /* No lane's chunks lie past a row, which would take registers to tell. */
        const bool is_whole =
            config->head_dim_qk % (4 * elements) == 0 && config->head_dim_vo % (8 * elements) == 0;
        shape->ctas_per_sm = is_small && is_plain && is_whole && shape->row_tiles == 1 ? 2 : 1;
        return true;
    }
    if (!only_decode(config) && !each_logit(config) && 2 * tile + out <= DECODE_REGISTERS) {
        shape->stages = 2;
        shape->q_in_shared = true;
        return true;
    }
    shape->stages = 1;
    const bool k_late = has_pairs(config) || each_logit(config); /* as NEXT_K in the kernel */
    const int32_t held = k_late ? 8 * k_chunks : tile;
    shape->q_in_shared = k_late || held + out + q + work > DECODE_REGISTERS_ONE_STAGE;
    return held + out + work <= DECODE_REGISTERS_ONE_STAGE;
}

/* The largest power of two that divides the heads and leaves an item's rows within bounds. */
static int32_t most_heads_per_item(const raddle_attention_spec *spec,
                                   const raddle_attention_config *config, int32_t tile_rows) {
    const int32_t most = spec->fixed_chunk > 0 ? DECODE_FIXED_HEADS : RADDLE_DECODE_WARPS;
    int32_t heads = 1;
    while (2 * heads <= most && config->num_kv_heads % (2 * heads) == 0 &&
           2 * heads * tile_rows <= DECODE_ITEM_ROWS) {
        heads *= 2;
    }
    return heads;
}

/* Shared memory of a CTA besides what is static. */
static int32_t decode_shared_bytes(const raddle_attention_spec *spec,
                                   const raddle_attention_config *config, int32_t tile_rows,
                                   const decode_shape *shape) {
    return raddle_decode_shared_bytes(
        tile_rows, shape->row_tiles, shape->q_quads, config->head_dim_vo,
        most_heads_per_item(spec, config, tile_rows), shape->q_in_shared, spec->fixed_chunk > 0);
}

/* Rows of one tile when a request has `rows`; 0 when the prefill kernel should take them. */
static int32_t decode_tile_rows(const raddle_attention_spec *spec,
                                const raddle_attention_config *config,
                                const raddle_attention_machine *machine, int64_t rows,
                                decode_shape *shape) {
    const bool is_plain = !only_decode(config) && !each_logit(config);
    const bool are_many = 4 * (int64_t)config->num_kv_heads * spec->max_batch > machine->num_sms;
    for (int32_t most = is_plain && are_many ? 4 * RADDLE_DECODE_ROWS : 2 * RADDLE_DECODE_ROWS;
         most > 0; most /= 2) {
        const int64_t tiles = (rows + most - 1) / most;
        if (!only_decode(config) && (rows > DECODE_MAX_ROWS || tiles > 2)) {
            continue;
        }
        const int32_t tile_rows = (int32_t)((rows + tiles - 1) / tiles);
        if (shape_decode(config, tile_rows, shape) &&
            decode_shared_bytes(spec, config, tile_rows, shape) + DECODE_STATIC_BYTES <=
                machine->shared_bytes) {
            return tile_rows;
        }
    }
    return 0;
}

/* Tokens of one K/V head that a worker reads meanwhile. */
static int32_t tokens_in(int32_t ns, int32_t bytes_per_us, int32_t token_bytes) {
    return (int32_t)((int64_t)ns * bytes_per_us / 1000 / token_bytes) + 1;
}

static bool choose_decode(const raddle_attention_spec *spec, const raddle_attention_config *config,
                          const raddle_attention_machine *machine, int64_t rows,
                          raddle_attention_choice *choice) {
    decode_shape shape;
    const int32_t tile_rows = decode_tile_rows(spec, config, machine, rows, &shape);
    if (tile_rows == 0) {
        return false;
    }
    const int32_t heads = most_heads_per_item(spec, config, tile_rows);
    const int32_t token_bytes =
        (config->head_dim_qk + config->head_dim_vo) * (int32_t)raddle_dtype_bytes(config->kv_dtype);
    const int32_t read_rate = machine->read_rate / shape.ctas_per_sm; /* of a worker */
    *choice = (raddle_attention_choice){
        .kernel = "attention/attention_decode",
        .block_threads = 32 * RADDLE_DECODE_WARPS,
        .ctas_per_sm = shape.ctas_per_sm,
        .shared_bytes = decode_shared_bytes(spec, config, tile_rows, &shape),
        .tile_rows = tile_rows,
        .tile_kv = RADDLE_DECODE_TILE_KV,
        .heads_per_item = heads,
        .min_heads_per_item = spec->fixed_chunk > 0 ? heads : 1,
        .segment_cost = tokens_in(DECODE_SEGMENT_NS, read_rate, token_bytes),
        .cut_cost = tokens_in(DECODE_CUT_NS, read_rate, token_bytes),
        .merge_cost = tile_rows * config->head_dim_vo * 4 / token_bytes + 1,
    };
    define_common(config, choice);
    define_int(choice->config, "ROW_TILES", shape.row_tiles);
    define_int(choice->config, "STAGES", shape.stages);
    define_int(choice->config, "HALVES", shape.halves);
    define(choice->config, "Q_IN_SHARED", shape.q_in_shared ? "true" : "false");
    return true;
}

/* ---------------------------------------------------------------- prefill */

/* In order of preference: 128 rows read each K/V tile half as often as 64, two stages load a whole
 * tile ahead. */
static const struct { int32_t tile_rows, stages; } prefill_forms[] = {{128, 2}, {64, 2}, {64, 1}};

enum { NUM_PREFILL_FORMS = sizeof(prefill_forms) / sizeof(prefill_forms[0]) };

/* Whether the outputs of the rows leave registers for the rest (compiled for sm_80 and sm_90a
 * without a spill; 128 is the common head_dim, its neighbours spill a few bytes). */
static bool has_registers_for(const raddle_attention_config *config, int32_t tile_rows) {
    return tile_rows == 64 ||
           (each_logit(config) ? config->head_dim_vo <= 64 : config->head_dim_vo <= 96) ||
           (config->head_dim_vo == 128 && config->head_dim_qk == 128 && !each_logit(config));
}

static int32_t prefill_shared_bytes(const raddle_attention_spec *spec,
                                    const raddle_attention_config *config, int form) {
    return raddle_prefill_shared_bytes(prefill_forms[form].tile_rows, prefill_forms[form].stages,
                                       config->head_dim_qk, config->head_dim_vo,
                                       spec->fixed_chunk > 0);
}

/* The first form of which two CTAs fit on an SM, else the smallest. */
static int choose_prefill_form(const raddle_attention_spec *spec,
                               const raddle_attention_config *config,
                               const raddle_attention_machine *machine, int64_t rows) {
    for (int form = rows > 64 ? 0 : 1; form < NUM_PREFILL_FORMS; form++) {
        const int32_t bytes =
            prefill_shared_bytes(spec, config, form) + PREFILL_STATIC_BYTES + CTA_RESERVED_BYTES;
        if (has_registers_for(config, prefill_forms[form].tile_rows) &&
            2 * bytes <= machine->shared_bytes + CTA_RESERVED_BYTES) {
            return form;
        }
    }
    return NUM_PREFILL_FORMS - 1;
}

static void choose_prefill(const raddle_attention_spec *spec, const raddle_attention_config *config,
                           const raddle_attention_machine *machine, int64_t rows,
                           raddle_attention_choice *choice) {
    const int form = choose_prefill_form(spec, config, machine, rows);
    *choice = (raddle_attention_choice){
        .kernel = "attention/attention_prefill",
        .block_threads = 32 * RADDLE_PREFILL_WARPS,
        .ctas_per_sm = 2,
        .shared_bytes = prefill_shared_bytes(spec, config, form),
        .tile_rows = prefill_forms[form].tile_rows,
        .tile_kv = RADDLE_PREFILL_TILE_KV,
        .heads_per_item = 1,
        .min_heads_per_item = 1,
        .segment_cost = PREFILL_SEGMENT_COST,
    };
    define_common(config, choice);
    define_int(choice->config, "TILE_ROWS", choice->tile_rows);
    define_int(choice->config, "STAGES", prefill_forms[form].stages);
}

/* ---------------------------------------------------------------- choice */

/* Appends a reason to a list. */
static void add_reason(char *reasons, size_t bytes, const char *reason) {
    const size_t used = strlen(reasons);
    snprintf(reasons + used, bytes - used, "%s%s", used ? "; " : "", reason);
}

static raddle_status check_support(const raddle_attention_config *config,
                                   const raddle_attention_machine *machine) {
    char reasons[384] = "", text[128];
    if (config->q_dtype != RADDLE_F16 && config->q_dtype != RADDLE_BF16) {
        snprintf(text, sizeof(text), "q is %s, expected float16 or bfloat16",
                 raddle_dtype_name(config->q_dtype));
        add_reason(reasons, sizeof(reasons), text);
    }
    const int32_t elements = 16 / (int32_t)raddle_dtype_bytes(config->kv_dtype);
    if (config->q_dtype != config->kv_dtype && !is_fp8(config)) {
        snprintf(text, sizeof(text), "K and V are %s, expected float8 or the dtype of q, %s",
                 raddle_dtype_name(config->kv_dtype), raddle_dtype_name(config->q_dtype));
        add_reason(reasons, sizeof(reasons), text);
    }
    if (config->head_dim_qk % (elements * (has_pairs(config) ? 2 : 1)) != 0 ||
        config->head_dim_vo % elements != 0) {
        snprintf(text, sizeof(text), "head_dim is %d and %d, expected a multiple of %d and %d%s%s",
                 (int)config->head_dim_qk, (int)config->head_dim_vo,
                 (int)(elements * (has_pairs(config) ? 2 : 1)), (int)elements,
                 is_fp8(config) ? " for float8 K/V" : "",
                 has_pairs(config) ? " for pairs of elements" : "");
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
    raddle_attention_choice choice;
    if (!choose_decode(spec, config, machine, rows, &choice)) {
        choose_prefill(spec, config, machine, rows, &choice);
        RADDLE_REQUIRE(choice.shared_bytes + PREFILL_STATIC_BYTES <= machine->shared_bytes,
                       RADDLE_ERR_UNSUPPORTED,
                       "attention on CUDA cannot run this: head_dim %d and %d%s need %d bytes of "
                       "shared memory per CTA, the GPU has %d",
                       (int)config->head_dim_qk, (int)config->head_dim_vo,
                       spec->fixed_chunk > 0 ? " in fixed-chunk mode" : "",
                       (int)choice.shared_bytes + PREFILL_STATIC_BYTES, (int)machine->shared_bytes);
    }
    *out_choice = choice;
    return RADDLE_OK;
}

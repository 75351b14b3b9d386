/* attention_choice.h - which CUDA kernel a plan runs, compiled how, and how the planner should cut
 * for it. Pure functions over plain structs: no driver, no GPU.
 */
#ifndef RADDLE_ATTENTION_CHOICE_H
#define RADDLE_ATTENTION_CHOICE_H

#include "attention/attention.h"

enum { RADDLE_ATTENTION_CONFIG_BYTES = 768 };

/* What the choice depends on besides the spec. */
typedef struct raddle_attention_machine {
    int32_t arch; /* 90 for compute capability 9.0 */
    int32_t num_sms;
    int32_t shared_bytes; /* that one CTA may have, static and dynamic */
    int32_t read_rate;    /* bytes that one SM reads in a us when all do */
} raddle_attention_machine;

typedef struct raddle_attention_choice {
    const char *kernel;                         /* "attention/attention_decode" */
    char config[RADDLE_ATTENTION_CONFIG_BYTES]; /* lines of #define */
    int32_t block_threads;
    int32_t ctas_per_sm;  /* that the kernel is compiled for */
    int32_t shared_bytes; /* dynamic */
    int32_t tile_rows, tile_kv, heads_per_item, min_heads_per_item; /* as the config has them */
    int32_t segment_cost, cut_cost, merge_cost;
} raddle_attention_choice;

/* RADDLE_ERR_UNSUPPORTED with every reason. */
raddle_status raddle_attention_choose(const raddle_attention_spec *spec,
                                      const raddle_attention_config *config,
                                      const raddle_attention_machine *machine,
                                      raddle_attention_choice *out_choice);

#endif

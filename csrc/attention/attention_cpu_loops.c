/* attention_cpu_loops.c - the loops of attention_cpu_loops.h in plain C, and the choice among all of
 * them. */
#define LOOP_TARGET
#define LOOP_TABLE raddle_attention_cpu_loops_generic
#include "attention/attention_cpu_loops.h"

#include "cpu/isa.h"

const attention_cpu_loops *raddle_attention_cpu_loops_get(void) {
    switch (raddle_isa_get()) {
#if defined(__x86_64__)
    case RADDLE_ISA_AVX512BF16:
    case RADDLE_ISA_AVX512:
        return &raddle_attention_cpu_loops_avx512;
    case RADDLE_ISA_AVX2:
        return &raddle_attention_cpu_loops_avx2;
#endif
    default:
        return &raddle_attention_cpu_loops_generic;
    }
}

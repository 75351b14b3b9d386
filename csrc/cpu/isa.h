/* isa.h - which instruction sets this process may use: what the CPU and the operating system offer,
 * capped by RADDLE_ISA.
 *
 * The levels of one architecture are ordered: each includes the ones before it. RADDLE_ISA=<level>
 * lowers the choice (never raises it) and is read once, at the first question.
 */
#ifndef RADDLE_CPU_ISA_H
#define RADDLE_CPU_ISA_H

#include <stdbool.h>

typedef enum raddle_isa {
    RADDLE_ISA_GENERIC = 0,
    RADDLE_ISA_AVX2,       /* with FMA and F16C */
    RADDLE_ISA_AVX512,     /* F, BW, DQ, VL */
    RADDLE_ISA_AVX512BF16, /* with AVX512_BF16 and AVX512_VBMI */
    RADDLE_ISA_NEON,       /* every aarch64 */
    RADDLE_ISA_COUNT
} raddle_isa;

/* The level to use: the best one, or what RADDLE_ISA says if that is lower. An unknown name changes
 * nothing. */
raddle_isa raddle_isa_get(void);
/* Whether this CPU runs level, whatever RADDLE_ISA says. */
bool raddle_isa_is_supported(raddle_isa level);
const char *raddle_isa_name(raddle_isa level);

#endif

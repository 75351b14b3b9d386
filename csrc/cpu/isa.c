/* isa.c - cpuid and xgetbv on x86-64, nothing to ask on aarch64.
 *
 * A vector level counts only when the operating system saves its registers: XCR0 bits 1-2 (SSE,
 * AVX) for AVX2, bits 5-7 (opmask, upper halves, upper sixteen) too for AVX-512. Bit numbers: Intel
 * SDM volume 2, CPUID leaves 1 and 7.
 */
#include "cpu/isa.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const char *const isa_names[RADDLE_ISA_COUNT] = {
    [RADDLE_ISA_GENERIC] = "generic", [RADDLE_ISA_AVX2] = "avx2",
    [RADDLE_ISA_AVX512] = "avx512",   [RADDLE_ISA_AVX512BF16] = "avx512bf16",
    [RADDLE_ISA_NEON] = "neon",
};

/* 0: not asked yet; else level + 1. Racing first calls compute the same value. */
static atomic_int isa_detected;
static atomic_int isa_chosen;

#if defined(__x86_64__)
static uint64_t isa_xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

static raddle_isa isa_detect(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return RADDLE_ISA_GENERIC;
    }
    const uint32_t want_1 = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29; /* FMA, OSXSAVE, AVX, F16C */
    if ((c & want_1) != want_1) {
        return RADDLE_ISA_GENERIC;
    }
    const uint64_t xcr0 = isa_xcr0();
    if ((xcr0 & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & 1u << 5)) {
        return RADDLE_ISA_GENERIC;
    }
    const uint32_t want_7 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* AVX512 F, DQ, BW, VL */
    if ((b & want_7) != want_7 || (xcr0 & 0xe6) != 0xe6) {
        return RADDLE_ISA_AVX2;
    }
    const bool vbmi = (c & 1u << 1) != 0;
    const bool bf16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
    return bf16 && vbmi ? RADDLE_ISA_AVX512BF16 : RADDLE_ISA_AVX512;
}
#elif defined(__aarch64__)
static raddle_isa isa_detect(void) {
    return RADDLE_ISA_NEON;
}
#else
static raddle_isa isa_detect(void) {
    return RADDLE_ISA_GENERIC;
}
#endif

static raddle_isa isa_best(void) {
    int known = atomic_load_explicit(&isa_detected, memory_order_relaxed);
    if (known == 0) {
        known = (int)isa_detect() + 1;
        atomic_store_explicit(&isa_detected, known, memory_order_relaxed);
    }
    return (raddle_isa)(known - 1);
}

bool raddle_isa_is_supported(raddle_isa level) {
    const raddle_isa best = isa_best();
    if (level == RADDLE_ISA_GENERIC || level == best) {
        return true;
    }
    /* NEON is not on the x86 ladder, nor the other way round. */
    return best != RADDLE_ISA_NEON && level < best;
}

raddle_isa raddle_isa_get(void) {
    int known = atomic_load_explicit(&isa_chosen, memory_order_relaxed);
    if (known == 0) {
        raddle_isa level = isa_best();
        const char *cap = getenv("RADDLE_ISA");
        for (int i = 0; cap && i < RADDLE_ISA_COUNT; i++) {
            if (strcmp(cap, isa_names[i]) == 0 && raddle_isa_is_supported((raddle_isa)i)) {
                level = (raddle_isa)i;
            }
        }
        known = (int)level + 1;
        atomic_store_explicit(&isa_chosen, known, memory_order_relaxed);
    }
    return (raddle_isa)(known - 1);
}

const char *raddle_isa_name(raddle_isa level) {
    return level >= 0 && level < RADDLE_ISA_COUNT ? isa_names[level] : "unknown";
}

/* vec.c - chooses the table of inner loops: the highest level of isa.h that is compiled in. */
#include "cpu/vec.h"

#include <string.h>

#include "cpu/isa.h"

static const raddle_vec *const vec_tables[RADDLE_ISA_COUNT] = {
    [RADDLE_ISA_GENERIC] = &raddle_vec_generic,
#if defined(__x86_64__)
    [RADDLE_ISA_AVX2] = &raddle_vec_avx2,
    [RADDLE_ISA_AVX512] = &raddle_vec_avx512,
    [RADDLE_ISA_AVX512BF16] = &raddle_vec_avx512bf16,
#elif defined(__aarch64__)
    [RADDLE_ISA_NEON] = &raddle_vec_neon,
#endif
};

const raddle_vec *raddle_vec_get(void) {
    for (int level = (int)raddle_isa_get(); level > RADDLE_ISA_GENERIC; level--) {
        if (vec_tables[level] && raddle_isa_is_supported((raddle_isa)level)) {
            return vec_tables[level];
        }
    }
    return &raddle_vec_generic;
}

const raddle_vec *raddle_vec_by_name(const char *name) {
    for (int level = 0; level < RADDLE_ISA_COUNT; level++) {
        if (vec_tables[level] && strcmp(vec_tables[level]->name, name) == 0 &&
            raddle_isa_is_supported((raddle_isa)level)) {
            return vec_tables[level];
        }
    }
    return NULL;
}

/* vec_avx512.c - tables avx512 and, with the blocks of vec_avx512bf16.c and vec_avx512fp8.c,
 * avx512bf16. */
#include "cpu/vec_avx512.h"

#if defined(__x86_64__)

#include "cpu/vec_template.inc"

const raddle_vec raddle_vec_avx512 = RADDLE_VEC_TABLE("avx512", NULL, NULL, NULL);
const raddle_vec raddle_vec_avx512bf16 =
    RADDLE_VEC_TABLE("avx512bf16", &raddle_vec_block_avx512bf16, &raddle_vec_block_avx512fp8_e4m3,
                     &raddle_vec_block_avx512fp8_e5m2);

#endif

/* attention_cpu_loops_avx2.c - the loops of attention_cpu_loops.h for AVX2 with FMA. */
#if defined(__x86_64__)
#define LOOP_TARGET __attribute__((target("avx2,fma")))
#define LOOP_TABLE raddle_attention_cpu_loops_avx2
#include "attention/attention_cpu_loops.h"
#else
typedef int raddle_attention_no_avx2; /* ISO C wants a declaration in every file */
#endif

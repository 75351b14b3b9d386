/* attention_cpu_loops_avx512.c - the loops of attention_cpu_loops.h for AVX-512. */
#if defined(__x86_64__)
#define LOOP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define LOOP_TABLE raddle_attention_cpu_loops_avx512
#include "attention/attention_cpu_loops.h"
#else
typedef int raddle_attention_no_avx512; /* ISO C wants a declaration in every file */
#endif

/* ops_cpu_math_avx2.c - the loops of ops_cpu_loops.h for AVX2 with FMA. */
#if defined(__x86_64__)
#define LOOP_TARGET __attribute__((target("avx2,fma")))
#define LOOP_TABLE raddle_ops_cpu_loops_avx2
#include "ops/ops_cpu_loops.h"
#else
typedef int raddle_ops_no_avx2; /* ISO C wants a declaration in every file */
#endif

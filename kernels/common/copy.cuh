/* copy.cuh - moving bytes: streaming loads, cp.async, and the order between CTAs and between
 * launches. */
#ifndef RADDLE_COMMON_COPY_CUH
#define RADDLE_COMMON_COPY_CUH

#include "common/abi.h"

namespace raddle {

/* 16 bytes that nobody reads again soon: past the L1, whole 128-byte lines into the L2. The memory
 * must not be written while the kernel runs. volatile keeps a tile's loads together where they are
 * written. */
__device__ __forceinline__ uint4 load_streaming(const void *from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

/* What other CTAs wrote in this launch: reads from the L2. */
__device__ __forceinline__ float4 load_shared_by_ctas(const float4 *from) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ float2 load_shared_by_ctas(const float2 *from) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "l"(from)
                 : "memory");
    return v;
}

/* Makes the compiler forget where a value came from: what follows from it is computed anew instead
 * of being kept in registers since the last time. */
__device__ __forceinline__ void forget(int32_t &x) {
    asm volatile("" : "+r"(x));
}

/* threadIdx.x, read where it is written, for the same reason. */
__device__ __forceinline__ int32_t thread_here() {
    int32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

/* Address of shared memory in its own 32-bit space. */
__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Starts a copy of 16 bytes from global to shared memory. */
__device__ __forceinline__ void cp_async_16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
                 : "memory");
}

/* The same of 4 bytes. */
__device__ __forceinline__ void cp_async_4(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until all of this thread's groups but the last PENDING have landed. */
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Waits for all of this thread's copies, grouped or not. */
__device__ __forceinline__ void cp_async_wait_all() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Programmatic dependent launch (sm_90; nothing elsewhere): lets the next launch start its
 * prologue. */
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Waits until the launches that this one depends on are done and their writes can be seen. */
__device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Adds 1 to a counter that other CTAs share and returns what it was: what this thread (and, through
 * a barrier before, its CTA) wrote is seen by whoever reads a later value, and the other way round.
 */
__device__ __forceinline__ int32_t arrive(int32_t *counter) {
    int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
}

} // namespace raddle

#endif

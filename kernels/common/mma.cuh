/* mma.cuh - tensor-core instructions of sm_80 and later, one function per instruction.
 *
 * Fragments of m16n8k16, lane = 4 g + j: a0 (row g, k 2j..), a1 (row g + 8, k 2j..), a2 (row g, k
 * 2j + 8..), a3 (row g + 8, k 2j + 8..); b0 (k 2j.., column g), b1 (k 2j + 8.., column g); c0 c1
 * (row g, columns 2j, 2j + 1), c2 c3 (row g + 8, the same columns).
 */
#ifndef RADDLE_COMMON_MMA_CUH
#define RADDLE_COMMON_MMA_CUH

#include "common/types.cuh"

namespace raddle {

/* c += a b, float32 accumulation. */
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
    if constexpr (is_same<T, bf16>::value) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        static_assert(is_same<T, f16>::value, "mma takes f16 or bf16");
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

/* Transposes an 8 x 8 matrix of 16-bit elements spread over the warp: lane (g, j) holds row g,
 * columns 2j, 2j + 1. */
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t rows) {
    uint32_t columns;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
    return columns;
}

/* Loads four 8 x 8 matrices from shared memory: lanes 8 i .. 8 i + 7 give the row addresses of
 * matrix i (16 bytes each, aligned), register i gets it in the layout of movmatrix_trans's input.
 */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address)
                 : "memory");
}

/* The same, each matrix transposed. */
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address)
                 : "memory");
}

} // namespace raddle

#endif

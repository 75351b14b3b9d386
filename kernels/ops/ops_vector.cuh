/* ops_vector.cuh - rows in pieces of VECTOR elements: 16 bytes at a time where alignment allows,
 * else one element.
 *
 * Values are float32 in registers; stores round to nearest even.
 */
#ifndef RADDLE_OPS_VECTOR_CUH
#define RADDLE_OPS_VECTOR_CUH

#include "common/types.cuh"

namespace raddle {

/* Elements of T in 16 bytes. */
template <typename T> constexpr int elements_per_16_bytes = 16 / (int)sizeof(T);

template <typename T, int VECTOR>
__device__ __forceinline__ void load_vector(float (&to)[VECTOR], const T *from) {
    static_assert(VECTOR == 1 || (VECTOR * sizeof(T)) % 16 == 0, "one element, or whole 16 bytes");
    if constexpr (VECTOR == 1) {
        to[0] = to_float(*from);
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i += elements_per_16_bytes<T>) {
            const uint4 v = *(const uint4 *)(from + i);
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int w = 0; w < 4; w++) {
                if constexpr (is_same<T, f32>::value) {
                    to[i + w] = __uint_as_float(words[w]);
                } else {
                    const float2 pair = unpack2<T>(words[w]);
                    to[i + 2 * w] = pair.x;
                    to[i + 2 * w + 1] = pair.y;
                }
            }
        }
    }
}

template <typename T, int VECTOR>
__device__ __forceinline__ void store_vector(T *to, const float (&from)[VECTOR]) {
    if constexpr (VECTOR == 1) {
        *to = from_float<T>(from[0]);
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i += elements_per_16_bytes<T>) {
            uint32_t words[4];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                if constexpr (is_same<T, f32>::value) {
                    words[w] = __float_as_uint(from[i + w]);
                } else {
                    words[w] = pack2<T>(from[i + 2 * w], from[i + 2 * w + 1]);
                }
            }
            *(uint4 *)(to + i) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

/* Element i of int32 or int64 indices. */
__device__ __forceinline__ int64_t load_index(const void *indices, int64_t i, int32_t are_i64) {
    return are_i64 ? ((const int64_t *)indices)[i] : ((const int32_t *)indices)[i];
}

} // namespace raddle

#endif

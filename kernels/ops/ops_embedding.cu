/* ops_embedding.cu - rows of a table; sm_80 and later. Copies bits, whatever their type.
 *
 * Grid      x: rows. y: the row, CTA_THREADS pieces of ACCESS_BYTES each. An id outside the table
 * gives a zero row. Bound     bytes: each is read and written once.
 */
#include "common/copy.cuh"
#include "ops/ops_params.h"
#include "ops/ops_vector.cuh"

namespace {

using namespace raddle;

constexpr int ELEMENT_BYTES = RADDLE_ELEMENT_BYTES;
constexpr int ACCESS_BYTES = RADDLE_ACCESS_BYTES; /* 16, or one element */
constexpr int CTA_THREADS = 128;

template <int BYTES> struct access_of;
template <> struct access_of<2> { using type = uint16_t; };
template <> struct access_of<4> { using type = uint32_t; };
template <> struct access_of<16> { using type = uint4; };
using access = access_of<ACCESS_BYTES>::type;

} // namespace

extern "C" __global__ void __launch_bounds__(CTA_THREADS)
    ops_embedding(const __grid_constant__ raddle_ops_embedding_params p) {
    const int64_t row = blockIdx.x;
    const int64_t byte = (int64_t)(blockIdx.y * CTA_THREADS + threadIdx.x) * ACCESS_BYTES;
    launch_dependents();
    wait_for_predecessors();
    if (byte >= (int64_t)p.width * ELEMENT_BYTES) {
        return;
    }
    const int64_t id = load_index(p.ids, row * p.ids_stride, p.ids_are_i64);
    access value = {};
    if (id >= 0 && id < p.vocab) {
        value = *(const access *)((const char *)p.table + id * p.table_stride_row * ELEMENT_BYTES +
                                  byte);
    }
    *(access *)((char *)p.out + row * p.out_stride_row * ELEMENT_BYTES + byte) = value;
}

/* measure_count.cu - adds one to a counter: launched behind every kernel while raddle counts
 * launches (csrc/cuda/count.c).
 *
 * Grid: one thread. Atomic, since streams run side by side. Without programmatic launch on either
 * edge: it runs when the kernel before it is done, and the one behind it waits for both.
 */
#include "common/abi.h"

extern "C" __global__ void __launch_bounds__(1) measure_count(uint64_t *counter) {
    atomicAdd(counter, static_cast<uint64_t>(1));
}

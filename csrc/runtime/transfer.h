/* transfer.h - copies and clears whole tensors, within a device and between host and device. */
#ifndef RADDLE_RUNTIME_TRANSFER_H
#define RADDLE_RUNTIME_TRANSFER_H

#include "base/tensor.h"

/* dst and src have one shape and one dtype; they may overlap. On the host any strides; where a GPU
 * is involved both are dense or share one dense layout (a copy of bytes), else
 * RADDLE_ERR_UNSUPPORTED. A copy that reads or writes host memory is done when the call returns;
 * one within a GPU is ordered on stream. */
raddle_status raddle_tensor_copy(const raddle_tensor *dst, const raddle_tensor *src,
                                 raddle_stream stream);
/* Same layouts as for a copy; ordered on stream. */
raddle_status raddle_tensor_zero(const raddle_tensor *dst, raddle_stream stream);

#endif

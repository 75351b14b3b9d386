/* dlpack.h - DLPack's view of a tensor and ours, translated both ways and checked on the way in.
 *
 * What passes here is safe to index: rank at most RADDLE_MAX_DIM, extents and byte spans without
 * overflow, an address aligned to the element. Whether the layout suits an operation is that
 * operation's business. */
#ifndef RADDLE_BASE_DLPACK_H
#define RADDLE_BASE_DLPACK_H

#include "base/tensor.h"
#include "third_party/dlpack/dlpack.h"

/* Element type for (code, bits) of one lane; RADDLE_DTYPE_NONE when raddle has none. */
raddle_dtype raddle_dtype_from_dlpack(DLDataType dtype);
DLDataType raddle_dtype_to_dlpack(raddle_dtype dtype);
/* Text like "complex64" or "code 17 with 4 bits"; returns buffer. */
const char *raddle_dlpack_dtype_text(DLDataType dtype, char buffer[48]);

/* How elements stored as stored are read when the user asked for wanted (NONE: as they are): the
 * same type, or the 8-bit and 16-bit floats that NumPy lacks out of integers of their width. */
raddle_status raddle_dtype_resolve(const char *name, raddle_dtype stored, raddle_dtype wanted,
                                   raddle_dtype *out_dtype);

/* tensor holds data, ndim, shape, stride, dtype and name. Strides of dimensions that never step are
 * made sane. */
raddle_status raddle_tensor_check_layout(raddle_tensor *tensor);

/* wanted as in raddle_dtype_resolve. flags: DLPACK_FLAG_BITMASK_*. out_tensor is filled in place:
 * garbage on failure, and its entries past ndim are left alone. */
raddle_status raddle_tensor_from_dlpack(const DLTensor *dl, uint64_t flags, const char *name,
                                        raddle_dtype wanted, raddle_tensor *out_tensor);
/* Shape and strides of out_dl point into tensor. */
void raddle_tensor_to_dlpack(const raddle_tensor *tensor, DLTensor *out_dl);

#endif

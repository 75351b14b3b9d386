/* bundle.h - compiled kernels in one file, for machines without NVRTC or without a network.
 *
 * `python -m raddle warmup -o FILE` writes one; it is read only when the user names it. Layout, in
 * the byte order of x86-64 and aarch64: header, table of entries, checksum of both, payloads.
 * Everything is checked before the first kernel is taken.
 */
#ifndef RADDLE_CUDA_BUNDLE_H
#define RADDLE_CUDA_BUNDLE_H

#include "cuda/image.h"

/* Replaces path by rename. */
raddle_status raddle_bundle_write(const char *path, const raddle_image *const *images,
                                  int num_images);
/* Makes the kernels of a bundle known to this process; to_disk: also stores them in the kernel
 * cache for those to come. RADDLE_ERR_IO names what is wrong with the file. */
raddle_status raddle_bundle_load(const char *path, bool to_disk, int *out_num_images);

#endif

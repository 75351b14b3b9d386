/* image.h - compiled kernels, known by name, config and architecture: memory, then disk, then
 * NVRTC.
 *
 * The key is a content hash over the source and every header that it includes, config, options,
 * architecture and raddle's version; on disk NVRTC's version joins it. What a bundle brought is
 * kept under version 0: the user named that file, so it serves whatever NVRTC is here, or none.
 * Knows no device. An image lives as long as the process.
 */
#ifndef RADDLE_CUDA_IMAGE_H
#define RADDLE_CUDA_IMAGE_H

#include "base/hash.h"
#include "base/status.h"

typedef enum raddle_image_origin {
    RADDLE_IMAGE_COMPILED = 0,
    RADDLE_IMAGE_FROM_DISK,
    RADDLE_IMAGE_FROM_BUNDLE
} raddle_image_origin;

typedef struct raddle_image {
    raddle_hash key; /* without NVRTC's version */
    void *payload;   /* what disk and bundles hold: length of the code, code, NUL, log */
    size_t payload_bytes;
    const void *code; /* a cubin, or PTX with its NUL */
    size_t code_bytes;
    const char *log; /* of NVRTC and ptxas */
    raddle_image_origin origin;
} raddle_image;

/* Thread-safe: each key is compiled by one thread, the others wait for it. */
raddle_status raddle_image_get(const char *name, const char *config, const char *arch,
                               const raddle_image **out_image);
/* The same without compiling: *out_image is NULL when neither memory nor disk has it. */
raddle_status raddle_image_find(const char *name, const char *config, const char *arch,
                                const raddle_image **out_image);
/* Takes what a bundle holds for key; copies payload. to_disk: also into the kernel cache. */
raddle_status raddle_image_adopt(raddle_hash key, const void *payload, size_t payload_bytes,
                                 bool to_disk);

#endif

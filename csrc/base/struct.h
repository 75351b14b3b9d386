/* struct.h - structs that cross the C interface: read by the size that the caller knows. */
#ifndef RADDLE_BASE_STRUCT_H
#define RADDLE_BASE_STRUCT_H

#include "base/status.h"

/* given begins with uint32_t struct_size. Copies it to out, a struct of known_bytes: what a shorter
 * one lacks becomes zero; a longer one must be zero behind known_bytes. struct_size of out is
 * known_bytes. name: of the argument, for messages. */
raddle_status raddle_struct_read(const char *name, const void *given, size_t known_bytes,
                                 void *out);

#endif

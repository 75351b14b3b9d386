/* struct.c - one rule for every struct that begins with struct_size.
 *
 * A size that was never set is garbage: the bounds keep that from becoming a read of the whole
 * stack. */
#include "base/struct.h"

#include <string.h>

enum { MOST_BYTES = 1024 }; /* several times the largest struct of raddle.h */

raddle_status raddle_struct_read(const char *name, const void *given, size_t known_bytes,
                                 void *out) {
    uint32_t given_bytes;
    const uint32_t known = (uint32_t)known_bytes;
    memcpy(&given_bytes, given, sizeof given_bytes);
    RADDLE_REQUIRE(given_bytes >= sizeof given_bytes && given_bytes <= MOST_BYTES, RADDLE_ERR_VALUE,
                   "%s: expected struct_size = sizeof the struct (%zu in this library), got %u",
                   name, known_bytes, (unsigned)given_bytes);
    const unsigned char *bytes = given;
    for (size_t i = known_bytes; i < given_bytes; i++) {
        RADDLE_REQUIRE(bytes[i] == 0, RADDLE_ERR_UNSUPPORTED,
                       "%s: its struct_size is %u, this library knows %zu bytes, and byte %zu is "
                       "not zero: a field that came later; leave it zero, or upgrade raddle",
                       name, (unsigned)given_bytes, known_bytes, i);
    }
    memset(out, 0, known_bytes);
    memcpy(out, given, given_bytes < known_bytes ? given_bytes : known_bytes);
    memcpy(out, &known, sizeof known);
    return RADDLE_OK;
}

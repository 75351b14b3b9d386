/* arena.c - measuring and carving are the same walk; only the base differs.
 *
 * base                      one buffer
 *  |<- multiple of 256 ->|<- bytes ->|<- canary ->|<- up to the next multiple of 256
 *
 * The canary stands right behind the last byte asked for, so that an overrun by one byte shows. A
 * size that overflows size_t sticks at SIZE_MAX: it never fits, and no allocator grants it.
 */
#include "base/arena.h"

#include <assert.h>
#include <string.h>

enum { ZONE_BYTES = 64 };

#ifdef RADDLE_DEBUG
static const bool default_red_zones = true;
#else
static const bool default_red_zones = false;
#endif

static size_t add_sizes(size_t a, size_t b) {
    return a > SIZE_MAX - b ? SIZE_MAX : a + b;
}

/* Differs from byte to byte and from zone to zone, so that a copied or shifted block does not look
 * intact. */
static unsigned char canary_byte(int zone, int at) {
    return (unsigned char)(0xA5 ^ (zone * 29 + at * 7));
}

void raddle_arena_measure(raddle_arena *arena) {
    memset(arena, 0, sizeof *arena);
    arena->capacity = SIZE_MAX;
    arena->red_zones = default_red_zones;
}

void raddle_arena_carve(raddle_arena *arena, void *data, size_t bytes, bool host) {
    assert(data != NULL || bytes == 0);
    memset(arena, 0, sizeof *arena);
    const size_t slack = (size_t)(-(uintptr_t)data & (RADDLE_ARENA_ALIGN - 1));
    if (slack <= bytes && data != NULL) {
        arena->base = (char *)data + slack;
        arena->capacity = bytes - slack;
    }
    arena->red_zones = default_red_zones;
    arena->host = host;
}

void *raddle_arena_take(raddle_arena *arena, size_t bytes) {
    size_t start = add_sizes(arena->used, RADDLE_ARENA_ALIGN - 1);
    if (start != SIZE_MAX) {
        start -= start % RADDLE_ARENA_ALIGN;
    }
    const size_t end = add_sizes(start, bytes);
    arena->used = arena->red_zones ? add_sizes(end, ZONE_BYTES) : end;
    if (arena->base == NULL || !raddle_arena_fits(arena)) {
        return NULL;
    }
    const int max_zones = (int)(sizeof arena->zones / sizeof arena->zones[0]);
    if (arena->red_zones && arena->host && arena->num_zones < max_zones) {
        for (int i = 0; i < ZONE_BYTES; i++) {
            arena->base[end + (size_t)i] = (char)canary_byte(arena->num_zones, i);
        }
        arena->zones[arena->num_zones++] = end;
    }
    return arena->base + start;
}

bool raddle_arena_fits(const raddle_arena *arena) {
    return arena->used <= arena->capacity && arena->used != SIZE_MAX;
}

size_t raddle_arena_bytes(const raddle_arena *arena) {
    return arena->used == 0 ? 0 : add_sizes(arena->used, RADDLE_ARENA_ALIGN - 1);
}

raddle_status raddle_arena_check(const raddle_arena *arena) {
    for (int zone = 0; zone < arena->num_zones; zone++) {
        for (int i = 0; i < ZONE_BYTES; i++) {
            const size_t at = arena->zones[zone] + (size_t)i;
            RADDLE_REQUIRE(
                (unsigned char)arena->base[at] == canary_byte(zone, i), RADDLE_ERR_STATE,
                "workspace: scratch buffer %d was overrun: byte %d behind its end (offset %zu) was "
                "overwritten; if nothing else writes into the workspace, this is a defect in "
                "raddle",
                zone, i, at);
        }
    }
    return RADDLE_OK;
}

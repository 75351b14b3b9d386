/* arena.h - one layout function for both questions: how many bytes, and where does each buffer lie.
 *
 * layout(plan, arena) calls raddle_arena_take once per buffer. Run over a measuring arena it
 * counts; over a carving one it hands out addresses: size and use cannot disagree. With red zones
 * on (debug builds, host memory only) every buffer is followed by a canary that
 * raddle_arena_check() verifies; the zones are part of both modes.
 */
#ifndef RADDLE_BASE_ARENA_H
#define RADDLE_BASE_ARENA_H

#include "base/status.h"

/* Every buffer starts at a multiple of this, counted from an aligned base. */
enum { RADDLE_ARENA_ALIGN = 256 };

typedef struct raddle_arena {
    char *base; /* NULL while measuring; aligned up to RADDLE_ARENA_ALIGN while carving */
    size_t used;
    size_t capacity; /* bytes behind base, SIZE_MAX while measuring */
    bool red_zones;  /* room for canaries is part of the layout */
    bool host;       /* the memory may be touched from here: canaries are written */
    int num_zones;
    size_t zones[32]; /* offsets of the canaries */
} raddle_arena;

void raddle_arena_measure(raddle_arena *arena);
/* data need not be aligned: the slack is part of raddle_arena_bytes(). host: the memory may be
 * touched from here. */
void raddle_arena_carve(raddle_arena *arena, void *data, size_t bytes, bool host);
/* Address of the next buffer (NULL while measuring, and when it does not fit: raddle_arena_fits
 * tells). */
void *raddle_arena_take(raddle_arena *arena, size_t bytes);
bool raddle_arena_fits(const raddle_arena *arena);
/* Bytes that a carve of the same takes needs, alignment slack included. */
size_t raddle_arena_bytes(const raddle_arena *arena);
/* RADDLE_ERR_STATE naming the first overwritten zone. */
raddle_status raddle_arena_check(const raddle_arena *arena);

#endif

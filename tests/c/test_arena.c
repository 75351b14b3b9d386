// needs: base/*.c
/* test_arena.c - measuring and carving agree for any sequence of takes; overruns and overflows are
 * told. */
#include "base/arena.h"

#include "base/alloc.h"
#include "check.h"

enum { MAX_TAKES = 40 };

static uint64_t random_state = 12345;

static size_t random_below(size_t limit) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (size_t)(random_state >> 33) % limit;
}

static void start(raddle_arena *arena, bool red_zones) {
    raddle_arena_measure(arena);
    arena->red_zones = red_zones;
}

static void carve(raddle_arena *arena, void *data, size_t bytes, bool red_zones) {
    raddle_arena_carve(arena, data, bytes, true);
    arena->red_zones = red_zones;
}

/* The exact number of bytes suffices, whatever the alignment of the block, and one fewer may not.
 */
static void check_agreement(const size_t *sizes, int count, size_t misalignment, bool red_zones) {
    raddle_arena measured, carved;
    start(&measured, red_zones);
    for (int i = 0; i < count; i++) {
        CHECK(raddle_arena_take(&measured, sizes[i]) == NULL);
    }
    CHECK(raddle_arena_fits(&measured));
    const size_t bytes = raddle_arena_bytes(&measured);
    char *block = raddle_alloc_aligned(misalignment + bytes, RADDLE_ARENA_ALIGN);
    char *data = block + misalignment;
    carve(&carved, data, bytes, red_zones);
    const char *end = data;
    for (int i = 0; i < count; i++) {
        char *buffer = raddle_arena_take(&carved, sizes[i]);
        CHECK((uintptr_t)buffer % RADDLE_ARENA_ALIGN == 0);
        if (CHECK(buffer >= end && buffer + sizes[i] <= data + bytes)) {
            memset(buffer, 0x5A, sizes[i]);
            end = buffer + sizes[i];
        }
    }
    CHECK(raddle_arena_fits(&carved));
    CHECK_INT((int64_t)carved.used, (int64_t)measured.used);
    CHECK_OK(raddle_arena_check(&carved));
    carve(&carved, block, measured.used - 1, red_zones); /* an aligned block needs all of used */
    for (int i = 0; i < count; i++) {
        raddle_arena_take(&carved, sizes[i]);
    }
    CHECK(!raddle_arena_fits(&carved));
    CHECK_INT((int64_t)raddle_arena_bytes(&carved), (int64_t)bytes);
    raddle_free(block);
}

static void test_agreement(void) {
    for (int round = 0; round < 200; round++) {
        size_t sizes[MAX_TAKES];
        const int count = 1 + (int)random_below(MAX_TAKES);
        for (int i = 0; i < count; i++) {
            sizes[i] = random_below(4) == 0 ? 0 : random_below(3000);
        }
        sizes[0]++; /* something to be short of */
        check_agreement(sizes, count, random_below(RADDLE_ARENA_ALIGN), round % 2 == 1);
    }
}

static void test_empty(void) {
    raddle_arena arena;
    start(&arena, false);
    CHECK_INT((int64_t)raddle_arena_bytes(&arena), 0);
    raddle_arena_take(&arena, 0);
    CHECK_INT((int64_t)raddle_arena_bytes(&arena), 0);
    raddle_arena_carve(&arena, NULL, 0, true);
    arena.red_zones = false;
    raddle_arena_take(&arena, 0);
    CHECK(raddle_arena_fits(&arena));
    CHECK(raddle_arena_take(&arena, 1) == NULL);
    CHECK(!raddle_arena_fits(&arena));
    char few[16]; /* fewer than the slack to the next boundary may take */
    raddle_arena_carve(&arena, few, sizeof few, true);
    CHECK(raddle_arena_take(&arena, 1000) == NULL);
    CHECK(!raddle_arena_fits(&arena));
}

static void test_overrun(void) {
    raddle_arena arena;
    char *block = raddle_alloc_aligned(4096, RADDLE_ARENA_ALIGN);
    for (int which = 0; which < 3; which++) {
        carve(&arena, block, 4096, true);
        char *buffers[3];
        const size_t sizes[3] = {1, 300, 256};
        for (int i = 0; i < 3; i++) {
            buffers[i] = raddle_arena_take(&arena, sizes[i]);
        }
        CHECK_OK(raddle_arena_check(&arena));
        char expected[40];
        snprintf(expected, sizeof expected, "scratch buffer %d was overrun", which);
        buffers[which][sizes[which]] ^= 1; /* one bit of the first byte behind it */
        CHECK_FAILS(raddle_arena_check(&arena), RADDLE_ERR_STATE, expected);
        buffers[which][sizes[which]] ^= 1;
        buffers[which][sizes[which] + 60] ^= 64;
        CHECK_FAILS(raddle_arena_check(&arena), RADDLE_ERR_STATE, expected);
    }
    raddle_free(block);
}

/* Device memory must not be touched, but has the same layout. */
static void test_device_memory(void) {
    raddle_arena measured, carved;
    start(&measured, true);
    raddle_arena_take(&measured, 100);
    raddle_arena_take(&measured, 100);
    char *nowhere = (char *)(uintptr_t)0x7000;
    raddle_arena_carve(&carved, nowhere, raddle_arena_bytes(&measured), false);
    carved.red_zones = true;
    CHECK(raddle_arena_take(&carved, 100) == nowhere);
    CHECK(raddle_arena_take(&carved, 100) == nowhere + 256);
    CHECK(raddle_arena_fits(&carved));
    CHECK_OK(raddle_arena_check(&carved));
}

static void test_overflow(void) {
    const size_t huge[] = {SIZE_MAX, SIZE_MAX - 10, SIZE_MAX / 2 + 1};
    for (int i = 0; i < 3; i++) {
        raddle_arena arena;
        start(&arena, false);
        raddle_arena_take(&arena, huge[i]);
        raddle_arena_take(&arena, huge[i]);
        CHECK(!raddle_arena_fits(&arena));
        raddle_arena_take(&arena, 1);
        CHECK(!raddle_arena_fits(&arena));
        CHECK(raddle_arena_bytes(&arena) == SIZE_MAX);
        char small[600];
        carve(&arena, small, sizeof small, true);
        raddle_arena_take(&arena, huge[i]);
        CHECK(raddle_arena_take(&arena, huge[i]) == NULL);
        CHECK(raddle_arena_take(&arena, 1) == NULL);
        CHECK(!raddle_arena_fits(&arena));
    }
}

int main(void) {
    test_agreement();
    test_empty();
    test_overrun();
    test_device_memory();
    test_overflow();
    return check_report();
}

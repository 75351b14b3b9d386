// needs: base/*.c
/* test_alloc.c - the heap's door: alignment, zeroes, refusals, and a count that comes back to where
 * it was. */
#include "base/alloc.h"

#include "check.h"

static void test_blocks(void) {
    const int64_t before = raddle_alloc_live();
    char *block = raddle_alloc(100);
    char *zero = raddle_alloc_zero(1000);
    CHECK_INT(raddle_alloc_live(), before + 2);
    memset(block, 1, 100);
    for (int i = 0; i < 1000; i++) {
        CHECK(zero[i] == 0);
    }
    block = raddle_realloc(block, 10000);
    CHECK(block != NULL && block[99] == 1);
    CHECK_INT(raddle_alloc_live(), before + 2);
    char *fresh = raddle_realloc(NULL, 5);
    char *text = raddle_strdup("some text");
    CHECK_TEXT(text, "some text");
    CHECK_INT(raddle_alloc_live(), before + 4);
    raddle_free(block);
    raddle_free(zero);
    raddle_free(fresh);
    raddle_free(text);
    raddle_free(NULL);
    CHECK_INT(raddle_alloc_live(), before);
}

static void test_alignment(void) {
    for (size_t align = sizeof(void *); align <= 4096; align *= 2) {
        for (size_t bytes = 0; bytes < 3 * align; bytes += align / 2 + 1) {
            char *block = raddle_alloc_aligned(bytes, align);
            CHECK(block != NULL && (uintptr_t)block % align == 0);
            memset(block, 7, bytes);
            raddle_free(block);
        }
    }
}

static void test_edges(void) {
    const int64_t before = raddle_alloc_live();
    void *none[4] = {raddle_alloc(0), raddle_alloc_zero(0), raddle_alloc_aligned(0, 64),
                     raddle_realloc(NULL, 0)};
    for (int i = 0; i < 4; i++) {
        CHECK(none[i] != NULL);
    }
    none[0] = raddle_realloc(none[0], 0);
    CHECK(none[0] != NULL);
    CHECK_INT(raddle_alloc_live(), before + 4);
    for (int i = 0; i < 4; i++) {
        raddle_free(none[i]);
    }
    volatile size_t too_many = SIZE_MAX / 2 + 2; /* more than malloc ever gives */
    CHECK(raddle_alloc(too_many) == NULL);
    CHECK(raddle_alloc_zero(too_many) == NULL);
    CHECK(raddle_alloc_aligned(too_many, 64) == NULL);
    char *kept = raddle_strdup("kept");
    CHECK(raddle_realloc(kept, too_many) == NULL);
    CHECK_TEXT(kept, "kept"); /* a refused realloc leaves the block */
    raddle_free(kept);
    CHECK_INT(raddle_alloc_live(), before);
}

int main(void) {
    test_blocks();
    test_alignment();
    test_edges();
    return check_report();
}

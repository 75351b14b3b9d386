// needs: base/*.c
/* test_struct.c - structs are read by the size that their caller knows, and not a byte further. */
#include "base/struct.h"

#include <stdlib.h>

#include "check.h"

typedef struct known {
    uint32_t struct_size;
    uint32_t a;
    uint64_t b;
} known;

/* Exactly bytes of memory, so that reading more is a fault; every byte behind the size is fill. */
static void *make(uint32_t bytes, unsigned char fill) {
    unsigned char *given = malloc(bytes);
    memset(given, fill, bytes);
    memcpy(given, &bytes, sizeof bytes);
    return given;
}

static void test_shorter(void) {
    for (uint32_t bytes = 4; bytes <= sizeof(known); bytes++) {
        void *given = make(bytes, 0xFF);
        known out = {1, 2, 3}, want = {0};
        memcpy(&want, given, bytes);
        want.struct_size = sizeof(known);
        CHECK_OK(raddle_struct_read("spec", given, sizeof out, &out));
        CHECK_INT(memcmp(&out, &want, sizeof out), 0);
        free(given);
    }
}

static void test_longer(void) {
    const uint32_t sizes[] = {sizeof(known) + 1, sizeof(known) + 8, 1024};
    for (int i = 0; i < 3; i++) {
        unsigned char *given = make(sizes[i], 0);
        known out = {1, 2, 3};
        given[sizeof(known) - 1] = 5;
        CHECK_OK(raddle_struct_read("spec", given, sizeof out, &out));
        CHECK_INT(out.struct_size, sizeof(known));
        CHECK_INT(out.b >> 56, 5);
        given[sizes[i] - 1] = 1;
        out.a = 7;
        CHECK_FAILS(raddle_struct_read("spec", given, sizeof out, &out), RADDLE_ERR_UNSUPPORTED,
                    "upgrade raddle");
        CHECK_INT(out.a, 7); /* untouched */
        free(given);
    }
}

static void test_sizes_that_cannot_be(void) {
    const uint32_t sizes[] = {0, 3, 1025, UINT32_MAX};
    for (int i = 0; i < 4; i++) {
        known out = {1, 2, 3}, given = {.struct_size = sizes[i]};
        CHECK_FAILS(raddle_struct_read("batch", &given, sizeof out, &out), RADDLE_ERR_VALUE,
                    "batch: expected struct_size = sizeof the struct (16 in this library), got ");
        CHECK_INT(out.a, 2);
    }
}

int main(void) {
    test_shorter();
    test_longer();
    test_sizes_that_cannot_be();
    return check_report();
}

// needs: base/*.c
/* test_hash.c - the same bytes give the same hash however they come; other bytes another, well
 * spread. */
#include "base/hash.h"

#include <stdlib.h>

#include "base/alloc.h"
#include "check.h"

enum { MAX_BYTES = 300, NUM_HASHES = 200000 };

static void fill(uint8_t *data, size_t bytes) {
    uint64_t x = 99;
    for (size_t i = 0; i < bytes; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        data[i] = (uint8_t)(x >> 56);
    }
}

static bool is_same(raddle_hash a, raddle_hash b) {
    return a.high == b.high && a.low == b.low;
}

static void test_pieces(void) {
    uint8_t data[MAX_BYTES];
    fill(data, sizeof data);
    for (size_t bytes = 0; bytes <= 100; bytes++) {
        const raddle_hash whole = raddle_hash_bytes(data, bytes);
        for (size_t cut = 0; cut <= bytes; cut++) {
            raddle_hasher hasher;
            raddle_hash_init(&hasher);
            raddle_hash_update(&hasher, data, cut);
            raddle_hash_update(&hasher, NULL, 0);
            raddle_hash_update(&hasher, data + cut, bytes - cut);
            CHECK(is_same(raddle_hash_finish(&hasher), whole));
            CHECK(is_same(raddle_hash_finish(&hasher), whole)); /* finishing changes nothing */
        }
    }
    raddle_hasher hasher;
    raddle_hash_init(&hasher);
    for (size_t i = 0; i < sizeof data; i++) {
        raddle_hash_update(&hasher, data + i, 1);
    }
    CHECK(is_same(raddle_hash_finish(&hasher), raddle_hash_bytes(data, sizeof data)));
}

static void test_text(void) {
    raddle_hasher a, b;
    raddle_hash_init(&a);
    raddle_hash_init(&b);
    raddle_hash_update_text(&a, "ab");
    raddle_hash_update_text(&a, "c");
    raddle_hash_update_text(&b, "a");
    raddle_hash_update_text(&b, "bc");
    CHECK(!is_same(raddle_hash_finish(&a), raddle_hash_finish(&b)));
    char text[33];
    raddle_hash_to_text((raddle_hash){.high = 0x0123456789abcdef, .low = 0xf00000000000000e}, text);
    CHECK_TEXT(text, "0123456789abcdeff00000000000000e");
}

/* Every input bit changes every output bit about half the time. */
static void test_avalanche(void) {
    enum { BYTES = 75, INPUTS = 64 };
    static int flips[128];
    int inputs = 0;
    uint8_t data[BYTES + INPUTS];
    fill(data, sizeof data);
    for (int input = 0; input < INPUTS; input++) {
        uint8_t *bytes = data + input;
        const raddle_hash base = raddle_hash_bytes(bytes, BYTES);
        for (int bit = 0; bit < BYTES * 8; bit++) {
            bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
            const raddle_hash other = raddle_hash_bytes(bytes, BYTES);
            bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
            int changed = 0;
            for (int i = 0; i < 64; i++) {
                flips[i] += (int)((base.high ^ other.high) >> i & 1);
                flips[64 + i] += (int)((base.low ^ other.low) >> i & 1);
                changed += (int)((base.high ^ other.high) >> i & 1);
                changed += (int)((base.low ^ other.low) >> i & 1);
            }
            CHECK(changed > 20 && changed < 108); /* 64 +- 7.8 standard deviations of 5.66 */
            inputs++;
        }
    }
    for (int i = 0; i < 128; i++) { /* half of 38400, +- 8 standard deviations of 98 */
        CHECK(abs(flips[i] - inputs / 2) < 784);
    }
}

static int compare_hashes(const void *a, const void *b) {
    const raddle_hash *x = a, *y = b;
    if (x->high != y->high) {
        return x->high < y->high ? -1 : 1;
    }
    return x->low < y->low ? -1 : x->low > y->low;
}

/* Counters, runs of zeros and swapped words are what keys look like. Each half alone must tell most
 * apart: among 2e5 values of 64 bits a collision has a chance of 1e-9. */
static void test_collisions(void) {
    raddle_hash *hashes = raddle_alloc(NUM_HASHES * sizeof *hashes);
    uint8_t data[MAX_BYTES * 4] = {0};
    int count = 0;
    for (size_t bytes = 0; bytes < sizeof data; bytes++) {
        hashes[count++] = raddle_hash_bytes(data, bytes);
    }
    for (int lane = 0; lane < 8; lane++) { /* the same word in another place */
        for (uint64_t value = 1; value < 10000; value++) {
            uint64_t words[8] = {0};
            words[lane] = value;
            hashes[count++] = raddle_hash_bytes(words, sizeof words);
        }
    }
    while (count < NUM_HASHES) {
        const uint64_t pair[2] = {(uint64_t)count, (uint64_t)count << 32};
        hashes[count++] = raddle_hash_bytes(pair, sizeof pair);
    }
    for (int half = 0; half < 2; half++) {
        qsort(hashes, NUM_HASHES, sizeof *hashes, compare_hashes);
        int same = 0;
        for (int i = 1; i < NUM_HASHES; i++) {
            same += hashes[i].high == hashes[i - 1].high;
        }
        CHECK_INT(same, 0);
        for (int i = 0; i < NUM_HASHES; i++) {
            hashes[i] = (raddle_hash){.high = hashes[i].low, .low = hashes[i].high};
        }
    }
    raddle_free(hashes);
}

int main(void) {
    test_pieces();
    test_text();
    test_avalanche();
    test_collisions();
    return check_report();
}

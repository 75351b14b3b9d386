/* hash.c - four independent 64-bit lanes over stripes of 32 bytes, folded into 128 bits at the end.
 *
 * Lane step: state = rotl(state ^ word * M1, 29) * M2 + M3. M1 and M2 are odd, so that for a given
 * state the step is a bijection of the word, and for a given word a bijection of the state: two
 * inputs that differ in one word can only meet in the fold. The fold adds the lanes crosswise with
 * the length and sends each sum through the 64-bit finaliser of splitmix64 (Steele, Lea and Flood
 * 2014) twice, each half feeding the other. Words are read in the machine's byte order: a hash is
 * only compared with others of the same machine.
 */
#include "base/hash.h"

#include <string.h>

static const uint64_t word_multiplier = 0x9E3779B97F4A7C15u;  /* 2^64 / golden ratio, odd */
static const uint64_t state_multiplier = 0xC2B2AE3D27D4EB4Fu; /* odd, bits in balance */
static const uint64_t state_increment = 0x165667B19E3779F9u;

static uint64_t rotate_left(uint64_t x, int bits) {
    return (x << bits) | (x >> (64 - bits));
}

static uint64_t finalise(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static void mix_stripe(uint64_t state[4], const uint8_t *stripe) {
    for (int lane = 0; lane < 4; lane++) {
        uint64_t word;
        memcpy(&word, stripe + 8 * lane, sizeof word);
        const uint64_t mixed = rotate_left(state[lane] ^ (word * word_multiplier), 29);
        state[lane] = mixed * state_multiplier + state_increment;
    }
}

void raddle_hash_init(raddle_hasher *hasher) {
    memset(hasher, 0, sizeof *hasher);
    for (int lane = 0; lane < 4; lane++) {
        hasher->state[lane] = finalise((uint64_t)(lane + 1) * word_multiplier);
    }
}

void raddle_hash_update(raddle_hasher *hasher, const void *data, size_t bytes) {
    const uint8_t *next = data;
    hasher->total_bytes += bytes;
    if (hasher->tail_bytes > 0) {
        const size_t room = sizeof hasher->tail - hasher->tail_bytes;
        const size_t taken = bytes < room ? bytes : room;
        if (taken > 0) {
            memcpy(hasher->tail + hasher->tail_bytes, next, taken);
            next += taken;
        }
        hasher->tail_bytes += taken;
        bytes -= taken;
        if (hasher->tail_bytes < sizeof hasher->tail) {
            return;
        }
        mix_stripe(hasher->state, hasher->tail);
        hasher->tail_bytes = 0;
    }
    for (; bytes >= sizeof hasher->tail; bytes -= sizeof hasher->tail) {
        mix_stripe(hasher->state, next);
        next += sizeof hasher->tail;
    }
    if (bytes > 0) {
        memcpy(hasher->tail, next, bytes);
        hasher->tail_bytes = bytes;
    }
}

void raddle_hash_update_text(raddle_hasher *hasher, const char *text) {
    const uint64_t bytes = strlen(text);
    raddle_hash_update(hasher, &bytes, sizeof bytes);
    raddle_hash_update(hasher, text, (size_t)bytes);
}

raddle_hash raddle_hash_finish(const raddle_hasher *hasher) {
    uint64_t s[4];
    memcpy(s, hasher->state, sizeof s);
    if (hasher->tail_bytes > 0) { /* zero padding is told apart by the length below */
        uint8_t stripe[sizeof hasher->tail] = {0};
        memcpy(stripe, hasher->tail, hasher->tail_bytes);
        mix_stripe(s, stripe);
    }
    uint64_t high = s[0] + rotate_left(s[1], 17) + rotate_left(s[2], 31) + rotate_left(s[3], 47);
    uint64_t low = s[3] + rotate_left(s[2], 13) + rotate_left(s[1], 37) + rotate_left(s[0], 53);
    high = finalise(high ^ hasher->total_bytes);
    low = finalise(low + high);
    high = finalise(high + low * word_multiplier);
    low = finalise(low ^ rotate_left(high, 32));
    return (raddle_hash){.high = high, .low = low};
}

raddle_hash raddle_hash_bytes(const void *data, size_t bytes) {
    raddle_hasher hasher;
    raddle_hash_init(&hasher);
    raddle_hash_update(&hasher, data, bytes);
    return raddle_hash_finish(&hasher);
}

void raddle_hash_to_text(raddle_hash hash, char text[33]) {
    static const char digits[] = "0123456789abcdef";
    for (int i = 0; i < 16; i++) {
        const int shift = 60 - 4 * i;
        text[i] = digits[(hash.high >> shift) & 15];
        text[16 + i] = digits[(hash.low >> shift) & 15];
    }
    text[32] = '\0';
}

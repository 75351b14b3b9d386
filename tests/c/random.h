/* random.h - numbers for tests, the same in every run. A test sets its own seed. */
#ifndef RADDLE_TESTS_RANDOM_H
#define RADDLE_TESTS_RANDOM_H

#include <stdint.h>

static uint64_t random_state = 7;

static inline int32_t random_below(int32_t limit) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int32_t)((random_state >> 33) % (uint64_t)limit);
}

#endif

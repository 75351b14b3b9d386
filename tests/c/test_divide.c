// needs: base/status.c base/alloc.c
/* test_divide.c - division by multiplication gives what division gives, at every edge. */
#include "check.h"
#include "kernels/common/divide.h"

static void check_around(uint32_t n, int32_t divisor) {
    const raddle_divisor by = raddle_make_divisor(divisor);
    for (int32_t off = -2; off <= 2; off++) {
        const int64_t near = (int64_t)n + off;
        if (near >= 0 && near <= INT32_MAX) {
            CHECK_INT(raddle_divide((uint32_t)near, by), (uint32_t)near / (uint32_t)divisor);
        }
    }
}

int main(void) {
    uint64_t state = 7;
    for (int round = 0; round < 200000; round++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const int32_t divisor = (int32_t)((state >> 33) >> (round % 31)) + (round % 31 > 0);
        const uint32_t limit = (uint32_t)INT32_MAX;
        if (divisor > 0) {
            const uint32_t quotient =
                (uint32_t)(state & 0xffffffffu) % (limit / (uint32_t)divisor + 1);
            check_around(quotient * (uint32_t)divisor, divisor);
            check_around(limit, divisor);
            check_around(0, divisor);
        }
    }
    for (int32_t bits = 0; bits < 31; bits++) {
        for (int32_t off = -1; off <= 1; off++) {
            const int64_t divisor = ((int64_t)1 << bits) + off;
            if (divisor > 0 && divisor <= INT32_MAX) {
                check_around((uint32_t)INT32_MAX, (int32_t)divisor);
                check_around((uint32_t)divisor, (int32_t)divisor);
            }
        }
    }
    check_around((uint32_t)INT32_MAX, INT32_MAX);
    return check_report();
}

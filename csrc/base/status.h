/* status.h - how a function says no: a code as its result, the words in a record of the calling
 * thread.
 *
 * A message names the argument as the user typed it, what came, what was expected, and what to do;
 * it starts in lower case and has no full stop at its end. Nothing here prints, exits or aborts.
 */
#ifndef RADDLE_BASE_STATUS_H
#define RADDLE_BASE_STATUS_H

#include "raddle.h"

#if defined(__GNUC__)
#define RADDLE_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define RADDLE_PRINTF(fmt, args)
#endif

/* This thread's record. The strings live until the thread fails again. */
const raddle_error *raddle_last_error(void);
const char *raddle_status_name(raddle_status status);
const char *raddle_version(void);

/* Fills this thread's record and returns code. */
raddle_status raddle_fail(raddle_status code, const char *fmt, ...) RADDLE_PRINTF(2, 3);
/* The same with a log (a compiler's output, say), which is copied. */
raddle_status raddle_fail_log(raddle_status code, const char *log, const char *fmt, ...)
    RADDLE_PRINTF(3, 4);
raddle_status raddle_fail_memory(size_t bytes);
/* Forgets this thread's record and frees its log: for a caller that has copied the strings. */
void raddle_error_clear(void);

/* A user's error: leave with a message. */
#define RADDLE_REQUIRE(condition, code, ...)                                                       \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            return raddle_fail((code), __VA_ARGS__);                                               \
        }                                                                                          \
    } while (0)

/* Pass a failure on. */
#define RADDLE_TRY(expression)                                                                     \
    do {                                                                                           \
        raddle_status raddle_try_status_ = (expression);                                           \
        if (raddle_try_status_ != RADDLE_OK) {                                                     \
            return raddle_try_status_;                                                             \
        }                                                                                          \
    } while (0)

#endif

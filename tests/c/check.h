/* check.h - the little that a native test needs: checks that count, say where they failed, and go
 * on.
 *
 * A test file names in its first lines what tests/test_c.py builds it from:
 *   // needs: base/status.c cuda/driver.c       sources, globs below csrc
 *   // sanitizers: address thread           one build for each; address (with UB and leaks) when
 * absent
 *   // shared: libcuda.so.1=stub_cuda.c     libraries made of files in tests/c, found by dlopen
 * and ends main with return check_report().
 */
#ifndef RADDLE_TESTS_CHECK_H
#define RADDLE_TESTS_CHECK_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/status.h"

static _Atomic int check_failures;
static _Atomic int check_count;

static inline bool check_that(bool holds, const char *what, const char *file, int line) {
    check_count++;
    if (!holds) {
        check_failures++;
        printf("%s:%d: failed: %s\n", file, line, what);
    }
    return holds;
}

static inline void check_int(int64_t got, int64_t expected, const char *what, const char *file,
                             int line) {
    if (!check_that(got == expected, what, file, line)) {
        printf("    got %" PRId64 ", expected %" PRId64 "\n", got, expected);
    }
}

static inline void check_text(const char *got, const char *expected, const char *what,
                              const char *file, int line) {
    if (!check_that(strcmp(got, expected) == 0, what, file, line)) {
        printf("    got \"%s\"\n    expected \"%s\"\n", got, expected);
    }
}

/* The call failed with this status, left it in the record, and its message holds this text. */
static inline void check_fails(raddle_status got, raddle_status expected, const char *text,
                               const char *what, const char *file, int line) {
    const raddle_error *error = raddle_last_error();
    const bool holds = got == expected && error->code == expected && strstr(error->message, text);
    if (!check_that(holds, what, file, line)) {
        printf("    got %s, \"%s\"\n    expected %s, \"..%s..\"\n", raddle_status_name(got),
               error->message, raddle_status_name(expected), text);
    }
}

static inline bool is_filled(const unsigned char *data, size_t bytes, unsigned char value) {
    for (size_t i = 0; i < bytes; i++) {
        if (data[i] != value) {
            return false;
        }
    }
    return true;
}

/* Runs body in a process of its own: what is opened once per process can so be opened again. */
static inline void check_in_child(void (*body)(void), const char *what, const char *file,
                                  int line) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        check_failures = 0;
        body();
        fflush(stdout);
        exit(check_failures != 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    check_that(WIFEXITED(status) && WEXITSTATUS(status) == 0, what, file, line);
}

static inline int check_report(void) {
    printf("%d checks, %d failed\n", check_count, check_failures);
    return check_failures != 0 || check_count == 0;
}

#define CHECK(condition) check_that((condition), #condition, __FILE__, __LINE__)
#define CHECK_INT(got, expected) check_int((got), (expected), #got, __FILE__, __LINE__)
#define CHECK_TEXT(got, expected) check_text((got), (expected), #got, __FILE__, __LINE__)
#define CHECK_OK(call) check_int((call), RADDLE_OK, #call, __FILE__, __LINE__)
#define CHECK_FAILS(call, status, text)                                                            \
    check_fails((call), (status), (text), #call, __FILE__, __LINE__)
#define CHECK_IN_CHILD(body) check_in_child((body), #body, __FILE__, __LINE__)

#endif

// needs: base/*.c
// sanitizers: address thread
/* test_status.c - the record of the last failure: its words, its log, one per thread. */
#include "base/status.h"

#include <pthread.h>
#include <stdlib.h>

#include "base/alloc.h"
#include "check.h"

static void test_first_look(void) {
    const raddle_error *error = raddle_last_error();
    CHECK_INT(error->code, RADDLE_OK);
    CHECK_TEXT(error->message, "");
    CHECK_TEXT(error->log, "");
}

static raddle_status require_positive(int x) {
    RADDLE_REQUIRE(x > 0, RADDLE_ERR_VALUE, "x: expected a positive number, got %d", x);
    return RADDLE_OK;
}

static raddle_status try_both(int x, int *reached) {
    RADDLE_TRY(require_positive(x));
    *reached = 1;
    return RADDLE_OK;
}

static void test_fail(void) {
    CHECK_FAILS(raddle_fail(RADDLE_ERR_SHAPE, "q: got %d of %s", 7, "these"), RADDLE_ERR_SHAPE,
                "q: got 7 of these");
    int reached = 0;
    CHECK_OK(try_both(1, &reached));
    CHECK_INT(reached, 1);
    reached = 0;
    CHECK_FAILS(try_both(-3, &reached), RADDLE_ERR_VALUE, "x: expected a positive number, got -3");
    CHECK_INT(reached, 0);
    CHECK_FAILS(raddle_fail_memory(12345), RADDLE_ERR_MEMORY, "12345 bytes");
}

static void test_long_message(void) {
    char text[5000];
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    raddle_fail(RADDLE_ERR_VALUE, "%s", text);
    const char *message = raddle_last_error()->message;
    const size_t length = strlen(message);
    CHECK(length > 1000 && length < 1024);
    CHECK_TEXT(message + length - 4, "a...");
    for (size_t shift = 0; shift < 2;
         shift++) { /* two bytes each: one of the two cuts in between */
        for (size_t i = shift; i + 2 < sizeof text; i += 2) {
            memcpy(text + i, "\xC3\xA9", 2);
        }
        raddle_fail(RADDLE_ERR_VALUE, "%s", text);
        message = raddle_last_error()->message;
        CHECK_TEXT(message + strlen(message) - 5, "\xC3\xA9...");
    }
}

static void test_record_quotes_itself(void) {
    raddle_fail_log(RADDLE_ERR_COMPILE, "the log", "inner");
    const raddle_error *inner = raddle_last_error();
    raddle_fail_log(RADDLE_ERR_COMPILE, inner->log, "outer: %s", inner->message);
    CHECK_TEXT(raddle_last_error()->message, "outer: inner");
    CHECK_TEXT(raddle_last_error()->log, "the log");
}

static void test_log(void) {
    raddle_error_clear();
    const int64_t before = raddle_alloc_live();
    char log[] = "line 1\nline 2\n";
    raddle_fail_log(RADDLE_ERR_COMPILE, log, "kernel %s did not compile", "k");
    memset(log, 'x', sizeof log - 1);
    CHECK_TEXT(raddle_last_error()->log, "line 1\nline 2\n");
    raddle_fail_log(RADDLE_ERR_COMPILE, "another", "again");
    CHECK_TEXT(raddle_last_error()->log, "another");
    raddle_fail(RADDLE_ERR_VALUE, "no log");
    CHECK_TEXT(raddle_last_error()->log, "");
    CHECK_INT(raddle_alloc_live(), before);
    raddle_fail_log(RADDLE_ERR_COMPILE, "to be forgotten", "again");
    raddle_error_clear();
    CHECK_INT(raddle_last_error()->code, RADDLE_OK);
    CHECK_TEXT(raddle_last_error()->message, "");
    CHECK_TEXT(raddle_last_error()->log, "");
    CHECK_INT(raddle_alloc_live(), before);
    raddle_fail_log(RADDLE_ERR_COMPILE, "", "an empty log is none");
    CHECK_INT(raddle_alloc_live(), before);
}

static void *fail_in_thread(void *context) {
    const int number = *(const int *)context;
    for (int i = 0; i < 200; i++) {
        char expected[32];
        snprintf(expected, sizeof expected, "thread %d turn %d", number, i);
        raddle_fail_log(RADDLE_ERR_IO, expected, "%s", expected);
        if (strcmp(raddle_last_error()->message, expected) != 0 ||
            strcmp(raddle_last_error()->log, expected) != 0) {
            return "another thread's words";
        }
    }
    return NULL;
}

static void test_threads(void) {
    const int64_t before = raddle_alloc_live();
    raddle_fail(RADDLE_ERR_STATE, "mine");
    pthread_t threads[4];
    int numbers[4];
    for (int i = 0; i < 4; i++) {
        numbers[i] = i;
        CHECK_INT(pthread_create(&threads[i], NULL, fail_in_thread, &numbers[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *complaint = NULL;
        CHECK_INT(pthread_join(threads[i], &complaint), 0);
        CHECK(complaint == NULL);
    }
    CHECK_TEXT(raddle_last_error()->message, "mine");
    CHECK_INT(raddle_alloc_live(), before); /* the logs went with their threads */
}

static void test_names(void) {
    for (int status = 0; status < RADDLE_STATUS_COUNT; status++) {
        const char *name = raddle_status_name((raddle_status)status);
        CHECK(strncmp(name, "RADDLE_", 7) == 0 && strcmp(name, "RADDLE_ERR_UNKNOWN") != 0);
        for (int other = 0; other < status; other++) {
            CHECK(strcmp(name, raddle_status_name((raddle_status)other)) != 0);
        }
    }
    CHECK_TEXT(raddle_status_name((raddle_status)999), "RADDLE_ERR_UNKNOWN");
    CHECK_TEXT(raddle_version(), RADDLE_VERSION);
}

int main(void) {
    test_first_look();
    test_fail();
    test_long_message();
    test_record_quotes_itself();
    test_log();
    test_threads();
    test_names();
    return check_report();
}

/* status.c - the record of the calling thread's last failure: a fixed buffer for the message, a
 * heap copy of the log.
 *
 * The log is rare (compile errors) and may be long; it is freed by the next failure, by
 * raddle_error_clear and when the thread ends. A message may quote the record that it replaces.
 */
#include "base/status.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"

#ifndef RADDLE_VERSION
#define RADDLE_VERSION "0+unpackaged" /* setup.py passes the version of pyproject.toml */
#endif

enum { MESSAGE_BYTES = 1024 };

typedef struct error_record {
    raddle_error error;
    char *log;
    char message[MESSAGE_BYTES];
} error_record;

static _Thread_local error_record thread_record;

static pthread_once_t log_key_once = PTHREAD_ONCE_INIT;
static pthread_key_t log_key;
static bool log_key_exists;

static void make_log_key(void) {
    log_key_exists = pthread_key_create(&log_key, raddle_free) == 0;
}

/* Takes log over. The key only serves to free it when the thread ends: a log that could not be tied
 * to it is dropped rather than leaked. */
static void replace_log(error_record *record, char *log) {
    if (record->log != NULL || log != NULL) {
        pthread_once(&log_key_once, make_log_key);
        if (!log_key_exists || pthread_setspecific(log_key, log) != 0) {
            raddle_free(log);
            log = NULL;
        }
    }
    raddle_free(record->log);
    record->log = log;
    record->error.log = log != NULL ? log : "";
}

/* Ends a message that did not fit with "...", behind a whole UTF-8 character. */
static void mark_truncated(char *message) {
    size_t end = MESSAGE_BYTES - sizeof "...";
    while (end > 0 && ((unsigned char)message[end] & 0xC0) == 0x80) {
        end--;
    }
    memcpy(message + end, "...", sizeof "...");
}

static RADDLE_PRINTF(3, 0) raddle_status
    fill_record(raddle_status code, const char *log, const char *fmt, va_list args) {
    error_record *record = &thread_record;
    char message[MESSAGE_BYTES]; /* apart, because args may point into the record */
    const int length = vsnprintf(message, sizeof message, fmt, args);
    if (length < 0) {
        snprintf(message, sizeof message, "%s", fmt);
    } else if ((size_t)length >= sizeof message) {
        mark_truncated(message);
    }
    char *log_copy = log != NULL && log[0] != '\0' ? raddle_strdup(log) : NULL;
    memcpy(record->message, message, strlen(message) + 1);
    record->error.code = code;
    record->error.message = record->message;
    replace_log(record, log_copy);
    return code;
}

raddle_status raddle_fail(raddle_status code, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fill_record(code, NULL, fmt, args);
    va_end(args);
    return code;
}

raddle_status raddle_fail_log(raddle_status code, const char *log, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fill_record(code, log, fmt, args);
    va_end(args);
    return code;
}

raddle_status raddle_fail_memory(size_t bytes) {
    return raddle_fail(
        RADDLE_ERR_MEMORY,
        "out of memory: %zu bytes of host memory were not to be had; free some, or ask for less",
        bytes);
}

void raddle_error_clear(void) {
    error_record *record = &thread_record;
    replace_log(record, NULL);
    record->error.code = RADDLE_OK;
    record->error.message = "";
}

const raddle_error *raddle_last_error(void) {
    error_record *record = &thread_record;
    if (record->error.message == NULL) { /* this thread never failed */
        record->error.message = "";
        record->error.log = "";
    }
    return &record->error;
}

const char *raddle_status_name(raddle_status status) {
    static const char *const names[RADDLE_STATUS_COUNT] = {
        [RADDLE_OK] = "RADDLE_OK",
        [RADDLE_ERR_VALUE] = "RADDLE_ERR_VALUE",
        [RADDLE_ERR_SHAPE] = "RADDLE_ERR_SHAPE",
        [RADDLE_ERR_DTYPE] = "RADDLE_ERR_DTYPE",
        [RADDLE_ERR_DEVICE] = "RADDLE_ERR_DEVICE",
        [RADDLE_ERR_CAPACITY] = "RADDLE_ERR_CAPACITY",
        [RADDLE_ERR_STATE] = "RADDLE_ERR_STATE",
        [RADDLE_ERR_UNSUPPORTED] = "RADDLE_ERR_UNSUPPORTED",
        [RADDLE_ERR_COMPILE] = "RADDLE_ERR_COMPILE",
        [RADDLE_ERR_CUDA] = "RADDLE_ERR_CUDA",
        [RADDLE_ERR_IO] = "RADDLE_ERR_IO",
        [RADDLE_ERR_MEMORY] = "RADDLE_ERR_MEMORY",
        [RADDLE_ERR_CUDA_ASYNC] = "RADDLE_ERR_CUDA_ASYNC",
    };
    const unsigned index = (unsigned)status;
    return index < RADDLE_STATUS_COUNT ? names[index] : "RADDLE_ERR_UNKNOWN";
}

const char *raddle_version(void) {
    return RADDLE_VERSION;
}

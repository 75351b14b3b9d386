/* io.c - whole writes, the line of a log that says what is wrong, a clock. */
#include "base/io.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

bool raddle_write_all(int file, const void *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t put = write(file, (const char *)data + done, bytes - done);
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            errno = put == 0 ? ENOSPC : errno;
            return false;
        }
        done += (size_t)put;
    }
    return true;
}

void raddle_first_error_line(const char *log, char *line, size_t line_bytes) {
    const char *begin = log;
    const char *chosen = log;
    while (*begin != '\0') {
        const size_t length = strcspn(begin, "\n");
        const char *found = strstr(begin, "error");
        if (found != NULL && found < begin + length) {
            chosen = begin;
            break;
        }
        begin += length + (begin[length] == '\n');
    }
    snprintf(line, line_bytes, "%.*s", (int)strcspn(chosen, "\n"), chosen);
}

double raddle_now_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* notice.c - a short list under one lock. */
#include "cuda/notice.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cuda/environment.h"

static pthread_mutex_t notice_mutex = PTHREAD_MUTEX_INITIALIZER;
static char notices[RADDLE_NOTICE_MAX][RADDLE_NOTICE_BYTES];
static int num_notices;

/* One write, so that lines of several threads do not mix. Nobody can be told if it fails. */
static void write_line(const char *text) {
    char line[RADDLE_NOTICE_BYTES + 16];
    const int bytes = snprintf(line, sizeof line, "raddle: %s\n", text);
    const ssize_t written = write(STDERR_FILENO, line, (size_t)bytes);
    (void)written;
}

void raddle_notice(const char *fmt, ...) {
    char text[RADDLE_NOTICE_BYTES];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);

    bool is_new = true;
    pthread_mutex_lock(&notice_mutex);
    for (int i = 0; i < num_notices; i++) {
        is_new = is_new && strcmp(notices[i], text) != 0;
    }
    is_new = is_new && num_notices < RADDLE_NOTICE_MAX;
    if (is_new) {
        memcpy(notices[num_notices], text, strlen(text) + 1);
        num_notices++;
    }
    pthread_mutex_unlock(&notice_mutex);
    if (is_new && raddle_environment_get()->log_level >= 1) {
        write_line(text);
    }
}

int raddle_notice_count(void) {
    pthread_mutex_lock(&notice_mutex);
    const int count = num_notices;
    pthread_mutex_unlock(&notice_mutex);
    return count;
}

bool raddle_notice_text(int i, char text[RADDLE_NOTICE_BYTES]) {
    pthread_mutex_lock(&notice_mutex);
    const bool exists = i >= 0 && i < num_notices;
    if (exists) {
        memcpy(text, notices[i], RADDLE_NOTICE_BYTES);
    }
    pthread_mutex_unlock(&notice_mutex);
    return exists;
}

void raddle_log(int level, const char *fmt, ...) {
    if (raddle_environment_get()->log_level < level) {
        return;
    }
    char text[RADDLE_NOTICE_BYTES];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    write_line(text);
}

/* io.h - what caches and compilers share: whole writes, the line of a log that says what is wrong,
 * a clock.
 */
#ifndef RADDLE_BASE_IO_H
#define RADDLE_BASE_IO_H

#include <stdbool.h>
#include <stddef.h>

/* Writes all of data to an open file. False with errno set. */
bool raddle_write_all(int file, const void *data, size_t bytes);

/* The first line of a compiler's log that has "error" in it, else its first line; NUL-terminated in
 * line. */
void raddle_first_error_line(const char *log, char *line, size_t line_bytes);

/* Of a clock that only goes forward. */
double raddle_now_seconds(void);

#endif

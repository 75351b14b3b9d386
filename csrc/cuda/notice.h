/* notice.h - things that went wrong without stopping anybody: a cache folder that cannot be
 * written, a damaged file that was replaced.
 *
 * A text is kept once per process. The Python layer raises what is new as a warning when the next
 * plan is made; `python -m raddle doctor` shows all. RADDLE_LOG=1 also writes each to stderr at
 * once.
 */
#ifndef RADDLE_CUDA_NOTICE_H
#define RADDLE_CUDA_NOTICE_H

#include "base/status.h"

enum { RADDLE_NOTICE_MAX = 32, RADDLE_NOTICE_BYTES = 512 };

void raddle_notice(const char *fmt, ...) RADDLE_PRINTF(1, 2);
/* Notices so far; number i of them is copied to text. */
int raddle_notice_count(void);
bool raddle_notice_text(int i, char text[RADDLE_NOTICE_BYTES]);
/* A line on stderr if RADDLE_LOG is at least level. */
void raddle_log(int level, const char *fmt, ...) RADDLE_PRINTF(2, 3);

#endif

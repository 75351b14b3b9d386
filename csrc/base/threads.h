/* threads.h - the CPU back end's thread pool: one per process, built at first use, rebuilt in a
 * forked child.
 *
 * Workers spin for a short while after a job (so that kernels of one step follow each other without
 * a wake-up), then sleep; an idle pool costs nothing. Size: RADDLE_THREADS, else the affinity mask.
 * Workers may use the cores that the caller may use, but not the one that it is on.
 * Jobs of several Python threads are taken one after the other; a job started from inside a worker
 * runs on that worker alone. Worker numbers may be taken one after the other by one thread, so a
 * task must not wait for another number of its job.
 */
#ifndef RADDLE_BASE_THREADS_H
#define RADDLE_BASE_THREADS_H

#include "base/status.h"

/* worker is 0..num_workers-1; the caller is worker 0. */
typedef void (*raddle_task)(void *context, int worker, int num_workers);
/* [begin, end) of a loop. */
typedef void (*raddle_loop_body)(void *context, int64_t begin, int64_t end, int worker);

/* Threads that a job may use, the caller included; at least 1. Starts no thread. */
int raddle_threads_count(void);
/* The text of RADDLE_THREADS when it is ignored because it is no number from 1 to 1024; else NULL.
 * For doctor. */
const char *raddle_threads_bad_setting(void);
/* Runs task on min(num_workers, raddle_threads_count()) threads, which may each take several worker
 * numbers, and returns when all are done. Falls back to fewer threads when one cannot be started:
 * never fails. */
void raddle_threads_run(raddle_task task, void *context, int num_workers);
/* Splits [0, count) in blocks of at least grain. A worker begins with its own part of them, which
 * lies at the same fraction of every loop, and then helps the others. */
void raddle_threads_for(raddle_loop_body body, void *context, int64_t count, int64_t grain);

#endif

/* threads.c - a pool whose jobs are handed out through one word.
 *
 * The word holds the job's number (high half) and how many worker numbers are still to be had (low
 * half). A thread takes one by compare-and-swap; only then may it read the job's fields, which stay
 * as they are until every number that was taken has been given back. A thread that wakes too late
 * for a job finds none left and touches nothing. The caller takes numbers too, so a job never waits
 * for a sleeping thread, and fewer threads than hoped for (none, even) only make it slower.
 *
 * caller:  write fields, pending = n, word = (job, n - 1), wake sleepers; run 0, take others; wait
 * worker:  spin on word, then sleep on wakes; take a number, run it, pending--
 *
 * A thread that is woken tends to be put on the core of who wakes it, to wait there until the job is
 * over or the scheduler's next round: so workers are kept off the core that the caller is on.
 *
 * Sleeping loses no wake-up: a worker counts itself in sleepers and looks at the word again before
 * it waits; the caller writes the word before it looks at sleepers (both sequentially consistent).
 */
#include "base/threads.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_THREADS = 1024,
    SPIN_NS = 100 * 1000,      /* past this a thread sleeps */
    PAUSE_ONLY_NS = 20 * 1000, /* past this it offers its core to others at every turn */
    PAUSES_PER_TURN = 32,
    BLOCKS_PER_THREAD = 8, /* of a loop: evens out threads that start late or are interrupted */
    MAX_SHARES = 64,
    MOVE_NS = 1000 * 1000, /* workers are moved once in so long at most: callers may take turns */
    CACHE_LINE = 64
};

typedef struct thread_pool {
    alignas(CACHE_LINE) _Atomic uint64_t word; /* see the top of the file */
    alignas(CACHE_LINE) raddle_task task;
    void *context;
    int num_workers;
    uint32_t job;
    alignas(CACHE_LINE) _Atomic uint32_t pending; /* numbers not yet finished */
    _Atomic uint32_t caller_sleeps;               /* on pending */
    alignas(CACHE_LINE) _Atomic uint32_t wakes;   /* workers sleep on it */
    _Atomic uint32_t sleepers;
    pthread_mutex_t callers; /* one job at a time; also guards what is below */
    pthread_t threads[MAX_THREADS];
    int num_started;
    bool can_start;   /* false once a thread could not be made */
    int avoided_core; /* where workers may not run, or -1 */
    int64_t moved_at; /* ns */
} thread_pool;

static thread_pool pool = {
    .callers = PTHREAD_MUTEX_INITIALIZER, .can_start = true, .avoided_core = -1};

typedef struct thread_settings {
    int count;
    bool oversubscribed; /* more threads than cores: who spins may keep the worker off its core */
    char bad_setting[64];
} thread_settings;

static pthread_once_t settings_once = PTHREAD_ONCE_INIT;
static thread_settings settings;

static _Thread_local bool inside_job;

/* -- settings ------------------------------------------------------------------------------- */

/* The cores that this thread may use, for the caller to CPU_FREE; NULL when they are not known. */
static cpu_set_t *allowed_cores(size_t *out_bytes) {
    /* The kernel refuses a set that is smaller than its own. */
    for (size_t max_cores = 1024; max_cores <= 64 * 1024; max_cores *= 2) {
        cpu_set_t *set = CPU_ALLOC(max_cores);
        *out_bytes = CPU_ALLOC_SIZE(max_cores);
        if (set == NULL || sched_getaffinity(0, *out_bytes, set) == 0) {
            return set;
        }
        CPU_FREE(set);
    }
    return NULL;
}

static int count_allowed_cores(void) {
    size_t bytes;
    cpu_set_t *set = allowed_cores(&bytes);
    if (set != NULL) {
        const int count = CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
        return count;
    }
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online <= MAX_THREADS ? (int)online : 1;
}

static void forget_pool_in_child(void) {
    pthread_mutex_init(&pool.callers, NULL);
    atomic_store(&pool.word, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.caller_sleeps, 0);
    pool.num_started = 0;
    pool.can_start = true;
    pool.avoided_core = -1;
    inside_job = false;
}

static void read_settings(void) {
    const int cores = count_allowed_cores();
    settings.count = cores < MAX_THREADS ? cores : MAX_THREADS;
    const char *text = getenv("RADDLE_THREADS");
    if (text != NULL && text[0] != '\0') {
        char *end;
        errno = 0;
        const long asked = strtol(text, &end, 10);
        if (*end == '\0' && errno == 0 && asked >= 1 && asked <= MAX_THREADS) {
            settings.count = (int)asked;
        } else {
            snprintf(settings.bad_setting, sizeof settings.bad_setting, "%s", text);
        }
    }
    settings.oversubscribed = settings.count > cores;
    if (pthread_atfork(NULL, NULL, forget_pool_in_child) != 0) {
        settings.count = 1; /* no pool that a fork would break */
    }
}

static const thread_settings *get_settings(void) {
    pthread_once(&settings_once, read_settings);
    return &settings;
}

/* -- waiting -------------------------------------------------------------------------------- */

static void futex_wait(_Atomic uint32_t *address, uint32_t value) {
    syscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *address, int count) {
    syscall(SYS_futex, address, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static bool is_number_left(void) {
    return (uint32_t)atomic_load(&pool.word) != 0;
}

static bool is_job_done(void) {
    return atomic_load(&pool.pending) == 0;
}

/* False when the condition did not come true in the time that is worth a core. */
static bool spin_until(bool (*condition)(void)) {
    const int64_t start = now_ns();
    for (;;) {
        for (int i = 0; i < PAUSES_PER_TURN; i++) {
            if (condition()) {
                return true;
            }
            pause_core();
        }
        const int64_t elapsed = now_ns() - start;
        if (elapsed > SPIN_NS) {
            return condition();
        }
        if (elapsed > PAUSE_ONLY_NS || settings.oversubscribed) {
            sched_yield();
        }
    }
}

static void sleep_until_woken(void) {
    const uint32_t seen = atomic_load(&pool.wakes);
    atomic_fetch_add(&pool.sleepers, 1);
    if (!is_number_left()) {
        futex_wait(&pool.wakes, seen);
    }
    atomic_fetch_sub(&pool.sleepers, 1);
}

static void wait_for_job(void) {
    if (spin_until(is_job_done)) {
        return;
    }
    atomic_store(&pool.caller_sleeps, 1);
    for (;;) {
        const uint32_t left = atomic_load(&pool.pending);
        if (left == 0) {
            break;
        }
        futex_wait(&pool.pending, left);
    }
    atomic_store(&pool.caller_sleeps, 0);
}

/* -- working -------------------------------------------------------------------------------- */

static bool take_number(int *out_worker) {
    uint64_t word = atomic_load(&pool.word);
    while ((uint32_t)word != 0) {
        if (atomic_compare_exchange_weak(&pool.word, &word, word - 1)) {
            *out_worker = (int)(uint32_t)word;
            return true;
        }
    }
    return false;
}

static void run_number(int worker) {
    pool.task(pool.context, worker, pool.num_workers);
    /* Past the decrement the job may be over and the next one under way. */
    if (atomic_fetch_sub(&pool.pending, 1) == 1 && atomic_load(&pool.caller_sleeps) != 0) {
        futex_wake(&pool.pending, 1);
    }
}

static void run_numbers_left(void) {
    int worker;
    while (take_number(&worker)) {
        run_number(worker);
    }
}

static void *worker_main(void *unused) {
    (void)unused;
    inside_job = true;
    for (;;) {
        run_numbers_left();
        if (!spin_until(is_number_left)) {
            sleep_until_woken();
        }
    }
    return NULL;
}

/* Lets the workers run on every core that the caller may use but the one that it is on. */
static void keep_off_this_core(void) {
    const int core = sched_getcpu();
    if (core == pool.avoided_core || core < 0 || settings.oversubscribed) {
        return;
    }
    const int64_t now = now_ns();
    if (pool.avoided_core >= 0 && now - pool.moved_at < MOVE_NS) {
        return;
    }
    size_t bytes;
    cpu_set_t *set = allowed_cores(&bytes);
    if (set == NULL) {
        return;
    }
    CPU_CLR_S((size_t)core, bytes, set);
    for (int i = 0; i < pool.num_started && CPU_COUNT_S(bytes, set) > 0; i++) {
        pthread_setaffinity_np(pool.threads[i], bytes, set);
    }
    CPU_FREE(set);
    pool.avoided_core = core;
    pool.moved_at = now;
}

/* Detached, so that nothing has to be joined at exit; deaf to signals, which belong to the
 * program's own threads. */
static void start_threads(int wanted) {
    pthread_attr_t attributes;
    if (!pool.can_start || pthread_attr_init(&attributes) != 0) {
        return;
    }
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.can_start && pool.num_started < wanted) {
        pthread_t *thread = &pool.threads[pool.num_started];
        pool.can_start = pthread_create(thread, &attributes, worker_main, NULL) == 0;
        if (pool.can_start) {
            pthread_setname_np(*thread, "raddle");
            pool.num_started++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static void run_on_pool(raddle_task task, void *context, int num_workers, int num_threads) {
    pthread_mutex_lock(&pool.callers);
    if (pool.num_started < num_threads - 1) {
        start_threads(num_threads - 1);
        pool.avoided_core = -1; /* the new ones do not avoid it yet */
    }
    keep_off_this_core();
    pool.task = task;
    pool.context = context;
    pool.num_workers = num_workers;
    pool.job++;
    atomic_store(&pool.pending, (uint32_t)num_workers);
    atomic_store(&pool.word, (uint64_t)pool.job << 32 | (uint32_t)(num_workers - 1));
    if (atomic_load(&pool.sleepers) != 0) {
        atomic_fetch_add(&pool.wakes, 1);
        futex_wake(&pool.wakes, num_threads - 1);
    }
    inside_job = true;
    run_number(0);
    run_numbers_left();
    inside_job = false;
    wait_for_job();
    pthread_mutex_unlock(&pool.callers);
}

/* Blocks are dealt out in shares, one behind the other, a share for each worker: loops of the same
 * length over the same rows find them in the cache of the thread that wrote them. Who is done with
 * its own share takes from the others'. */
typedef struct loop_share {
    alignas(CACHE_LINE) _Atomic int64_t next_block;
    int64_t end_block;
} loop_share;

typedef struct loop_job {
    raddle_loop_body body;
    void *context;
    int64_t block_size, num_longer; /* the first num_longer blocks have one more */
    int num_shares;
    loop_share shares[MAX_SHARES];
} loop_job;

static void run_block(const loop_job *loop, int64_t block, int worker) {
    const bool is_longer = block < loop->num_longer;
    const int64_t begin = block * loop->block_size + (is_longer ? block : loop->num_longer);
    loop->body(loop->context, begin, begin + loop->block_size + (is_longer ? 1 : 0), worker);
}

static void run_blocks(void *context, int worker, int num_workers) {
    (void)num_workers;
    loop_job *loop = context;
    for (int i = 0; i < loop->num_shares; i++) {
        loop_share *share = &loop->shares[(worker + i) % loop->num_shares];
        while (atomic_load_explicit(&share->next_block, memory_order_relaxed) < share->end_block) {
            const int64_t block =
                atomic_fetch_add_explicit(&share->next_block, 1, memory_order_relaxed);
            if (block < share->end_block) {
                run_block(loop, block, worker);
            }
        }
    }
}

/* -- public --------------------------------------------------------------------------------- */

int raddle_threads_count(void) {
    return get_settings()->count;
}

const char *raddle_threads_bad_setting(void) {
    const char *text = get_settings()->bad_setting;
    return text[0] != '\0' ? text : NULL;
}

void raddle_threads_run(raddle_task task, void *context, int num_workers) {
    const int count = raddle_threads_count();
    const int num_threads = num_workers < count ? num_workers : count;
    if (num_threads > 1 && !inside_job) {
        run_on_pool(task, context, num_workers, num_threads);
        return;
    }
    for (int worker = 0; worker < num_workers; worker++) {
        task(context, worker, num_workers);
    }
}

void raddle_threads_for(raddle_loop_body body, void *context, int64_t count, int64_t grain) {
    if (count <= 0) {
        return;
    }
    const int64_t num_threads = inside_job ? 1 : raddle_threads_count();
    const int64_t fitting = grain > 1 ? count / grain : count;
    const int64_t wanted = num_threads * BLOCKS_PER_THREAD;
    const int64_t num_blocks = fitting < wanted ? fitting : wanted;
    if (num_threads == 1 || num_blocks <= 1) {
        body(context, 0, count, 0);
        return;
    }
    const int num_workers = (int)(num_blocks < num_threads ? num_blocks : num_threads);
    loop_job loop;
    loop.body = body;
    loop.context = context;
    loop.block_size = count / num_blocks;
    loop.num_longer = count % num_blocks;
    loop.num_shares = num_workers < MAX_SHARES ? num_workers : MAX_SHARES;
    for (int i = 0; i < loop.num_shares; i++) {
        atomic_init(&loop.shares[i].next_block, num_blocks * i / loop.num_shares);
        loop.shares[i].end_block = num_blocks * (i + 1) / loop.num_shares;
    }
    raddle_threads_run(run_blocks, &loop, num_workers);
}

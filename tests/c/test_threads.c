// needs: base/*.c
// sanitizers: address thread
/* test_threads.c - the pool: every number runs once, callers and nesting, sleep, fork,
 * oversubscription.
 *
 * Runs itself again with other values of RADDLE_THREADS, because the setting is read once.
 */
#include "base/threads.h"

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

enum { MAX_NUMBERS = 300 };

typedef struct tally {
    _Atomic int runs[MAX_NUMBERS];
    _Atomic int num_workers_seen;
    pthread_t caller;
    bool is_nested;
} tally;

static void count_run(void *context, int worker, int num_workers) {
    tally *t = context;
    atomic_fetch_add(&t->runs[worker], 1);
    atomic_store(&t->num_workers_seen, num_workers);
    if (worker == 0) {
        CHECK(t->is_nested || pthread_equal(pthread_self(), t->caller));
    }
}

static void check_tally(tally *t, int num_workers, int expected) {
    for (int i = 0; i < MAX_NUMBERS; i++) {
        if (atomic_load(&t->runs[i]) != (i < num_workers ? expected : 0)) {
            CHECK_INT(atomic_load(&t->runs[i]), i < num_workers ? expected : 0);
        }
    }
    CHECK(num_workers <= 0 || atomic_load(&t->num_workers_seen) == num_workers);
}

static void test_numbers(void) {
    const int sizes[] = {-1, 0, 1, 2, 3, 7, 64, MAX_NUMBERS};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        tally t = {.caller = pthread_self()};
        for (int repeat = 0; repeat < 50; repeat++) {
            raddle_threads_run(count_run, &t, sizes[i]);
        }
        check_tally(&t, sizes[i], 50);
    }
}

/* Plain memory written by the workers is seen by the caller, and by the workers of the next job. */
static void add_one(void *context, int worker, int num_workers) {
    int *cells = context;
    cells[(worker + 1) % num_workers]++;
}

static void test_memory_order(void) {
    int cells[8] = {0};
    for (int turn = 1; turn <= 2000; turn++) {
        raddle_threads_run(add_one, cells, 8);
        for (int i = 0; i < 8; i++) {
            if (cells[i] != turn) {
                CHECK_INT(cells[i], turn);
                return;
            }
        }
    }
    CHECK(true);
}

typedef struct loop_tally {
    uint8_t *seen;
    int64_t count, grain;
    int num_threads;
    _Atomic int bad;
} loop_tally;

static void mark_range(void *context, int64_t begin, int64_t end, int worker) {
    loop_tally *t = context;
    const bool is_small = end - begin < t->grain && end - begin < t->count;
    if (begin < 0 || end > t->count || begin >= end || is_small || worker < 0 ||
        worker >= t->num_threads) {
        atomic_fetch_add(&t->bad, 1);
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        t->seen[i]++;
    }
}

static void test_loop(void) {
    const int64_t counts[] = {-5, 0, 1, 2, 15, 16, 17, 1000, 4099};
    const int64_t grains[] = {-1, 0, 1, 2, 16, 999, 1 << 20};
    for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        for (size_t g = 0; g < sizeof grains / sizeof grains[0]; g++) {
            uint8_t seen[4100] = {0};
            loop_tally t = {.seen = seen,
                            .count = counts[c],
                            .grain = grains[g],
                            .num_threads = raddle_threads_count()};
            raddle_threads_for(mark_range, &t, counts[c], grains[g]);
            int64_t once = 0, twice = 0;
            for (int64_t i = 0; i < 4100; i++) {
                once += seen[i] == 1;
                twice += seen[i] > 1;
            }
            CHECK_INT(once, counts[c] > 0 ? counts[c] : 0);
            CHECK_INT(twice, 0);
            CHECK_INT(atomic_load(&t.bad), 0);
        }
    }
}

static void skip_range(void *context, int64_t begin, int64_t end, int worker) {
    (void)worker;
    atomic_fetch_add((_Atomic int64_t *)context, end - begin);
}

static void test_huge_loop(void) {
    _Atomic int64_t covered = 0;
    raddle_threads_for(skip_range, &covered, INT64_MAX - 3, 1);
    CHECK(atomic_load(&covered) == INT64_MAX - 3);
}

typedef struct nest {
    tally inner[4];
    _Atomic int strangers; /* inner numbers that ran on another thread than the outer one */
} nest;

typedef struct nested_call {
    nest *shared;
    tally *inner;
    pthread_t outer;
} nested_call;

static void run_inner(void *context, int worker, int num_workers) {
    nested_call *call = context;
    if (!pthread_equal(pthread_self(), call->outer)) {
        atomic_fetch_add(&call->shared->strangers, 1);
    }
    count_run(call->inner, worker, num_workers);
}

static void run_outer(void *context, int worker, int num_workers) {
    (void)num_workers;
    nest *n = context;
    n->inner[worker].is_nested = true;
    nested_call call = {.shared = n, .inner = &n->inner[worker], .outer = pthread_self()};
    raddle_threads_run(run_inner, &call, 5);
    _Atomic int64_t covered = 0;
    raddle_threads_for(skip_range, &covered, 1000, 1);
    if (atomic_load(&covered) != 1000) {
        atomic_fetch_add(&n->strangers, 1000);
    }
}

static void test_nested(void) {
    static nest n;
    raddle_threads_run(run_outer, &n, 4);
    for (int i = 0; i < 4; i++) {
        check_tally(&n.inner[i], 5, 1);
    }
    CHECK_INT(atomic_load(&n.strangers), 0);
}

static void *call_often(void *context) {
    tally *t = context;
    t->caller = pthread_self();
    for (int i = 0; i < 300; i++) {
        raddle_threads_run(count_run, t, 6);
    }
    return NULL;
}

static void test_callers(void) {
    static tally tallies[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        CHECK_INT(pthread_create(&threads[i], NULL, call_often, &tallies[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        check_tally(&tallies[i], 6, 300);
    }
}

/* State and signal mask of the pool's threads, from /proc. Returns how many there are. */
static int inspect_pool(int *out_asleep, bool *out_deaf) {
    int count = 0;
    *out_asleep = 0;
    *out_deaf = true;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *entry; tasks != NULL && (entry = readdir(tasks)) != NULL;) {
        char path[300], line[256], state = '?';
        bool is_ours = false;
        unsigned long long blocked = 0;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", entry->d_name);
        FILE *file = fopen(path, "r");
        while (file != NULL && fgets(line, sizeof line, file) != NULL) {
            is_ours = is_ours || strcmp(line, "Name:\traddle\n") == 0;
            sscanf(line, "State: %c", &state);
            sscanf(line, "SigBlk: %llx", &blocked);
        }
        if (file != NULL) {
            fclose(file);
        }
        if (is_ours) {
            count++;
            *out_asleep += state == 'S';
            *out_deaf = *out_deaf && (blocked >> (SIGINT - 1) & 1) != 0;
        }
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return count;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* An idle pool sleeps: all its threads come to rest. The limit is far above what they need. */
static void test_idle(void) {
    tally t = {.caller = pthread_self()};
    raddle_threads_run(count_run, &t, raddle_threads_count());
    const double limit = seconds() + 20;
    int count, asleep;
    bool deaf;
    do {
        sched_yield();
        count = inspect_pool(&asleep, &deaf);
    } while (asleep < count && seconds() < limit);
    CHECK_INT(count, raddle_threads_count() - 1);
    CHECK_INT(asleep, count);
    CHECK(deaf);
    tally again = {.caller = pthread_self()}; /* and wakes */
    raddle_threads_run(count_run, &again, 40);
    check_tally(&again, 40, 1);
}

/* Workers may run on all cores but the caller's, if there are others. */
typedef struct core_count {
    pthread_t caller;
    _Atomic int of_workers; /* cores, as a worker that took part saw it */
} core_count;

static void count_cores(void *context, int worker, int num_workers) {
    (void)worker, (void)num_workers;
    core_count *cores = context;
    cpu_set_t set;
    if (!pthread_equal(pthread_self(), cores->caller) &&
        sched_getaffinity(0, sizeof set, &set) == 0) {
        atomic_store(&cores->of_workers, CPU_COUNT(&set));
    }
}

static void test_cores(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) {
        return; /* more cores than the set has */
    }
    const int allowed = CPU_COUNT(&set);
    const bool are_moved = allowed > 1 && raddle_threads_count() <= allowed;
    core_count cores = {.caller = pthread_self()};
    const double limit = seconds() + 20;
    while (raddle_threads_count() > 1 && atomic_load(&cores.of_workers) == 0 && seconds() < limit) {
        raddle_threads_run(count_cores, &cores, 64);
    }
    CHECK_INT(atomic_load(&cores.of_workers), raddle_threads_count() == 1 ? 0
                                              : are_moved                 ? allowed - 1
                                                                          : allowed);
}

/* Asleep threads do take part: each number waits until another thread has come, if there is one to
 * come. */
typedef struct meeting {
    _Atomic int arrived;
    _Atomic bool gave_up;
} meeting;

static void meet(void *context, int worker, int num_workers) {
    (void)worker;
    (void)num_workers;
    meeting *m = context;
    atomic_fetch_add(&m->arrived, 1);
    const double limit = seconds() + 20;
    while (atomic_load(&m->arrived) < 2) {
        if (seconds() > limit) {
            atomic_store(&m->gave_up, true);
            return;
        }
        sched_yield();
    }
}

static void test_parallel(void) {
    if (raddle_threads_count() < 2) {
        return;
    }
    for (int turn = 0; turn < 20; turn++) {
        meeting m = {0};
        raddle_threads_run(meet, &m, 2);
        CHECK(!atomic_load(&m.gave_up));
    }
}

static void test_fork(void) {
    tally before = {.caller = pthread_self()};
    raddle_threads_run(count_run, &before, 8);
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        tally t = {.caller = pthread_self()};
        for (int i = 0; i < 100; i++) {
            raddle_threads_run(count_run, &t, 8);
        }
        check_tally(&t, 8, 100);
        test_idle(); /* it has threads of its own */
        fflush(stdout);
        _exit(check_failures != 0);
    }
    int result = -1;
    CHECK(waitpid(child, &result, 0) == child);
    CHECK(WIFEXITED(result) && WEXITSTATUS(result) == 0);
    raddle_threads_run(count_run, &before, 8);
    check_tally(&before, 8, 2);
}

/* The same while another thread of this process keeps the pool busy, its lock held. */
static _Atomic bool stop_calling;

static void *call_until_stopped(void *context) {
    while (!atomic_load(&stop_calling)) {
        call_often(context);
    }
    return NULL;
}

static void test_fork_while_busy(void) {
    static tally busy;
    pthread_t thread;
    CHECK_INT(pthread_create(&thread, NULL, call_until_stopped, &busy), 0);
    for (int i = 0; i < 6; i++) {
        test_fork();
    }
    atomic_store(&stop_calling, true);
    pthread_join(thread, NULL);
}

static void test_settings(const char *self) {
    static const struct {
        const char *text;
        int count; /* 0: as without */
    } cases[] = {{"1", 1},
                 {"2", 2},
                 {"5", 5},
                 {"", 0},
                 {"0", 0},
                 {"-1", 0},
                 {"x", 0},
                 {"3x", 0},
                 {"2.5", 0},
                 {"1025", 0},
                 {"99999999999999999999", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char count[16];
        snprintf(count, sizeof count, "%d", cases[i].count);
        setenv("RADDLE_THREADS", cases[i].text, 1);
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            execl("/proc/self/exe", self, count, (char *)NULL);
            _exit(99);
        }
        int result = -1;
        CHECK(waitpid(child, &result, 0) == child);
        if (!CHECK(WIFEXITED(result) && WEXITSTATUS(result) == 0)) {
            printf("    with RADDLE_THREADS=%s\n", cases[i].text);
        }
    }
    unsetenv("RADDLE_THREADS");
}

static void test_with_setting(int count) {
    const char *text = getenv("RADDLE_THREADS");
    const char *bad = raddle_threads_bad_setting();
    if (count != 0) {
        CHECK_INT(raddle_threads_count(), count);
        CHECK(bad == NULL);
    } else {
        cpu_set_t set;
        CHECK_INT(sched_getaffinity(0, sizeof set, &set), 0);
        CHECK_INT(raddle_threads_count(), CPU_COUNT(&set));
        CHECK(text[0] == '\0' ? bad == NULL : bad != NULL && strcmp(bad, text) == 0);
    }
    test_numbers();
    test_parallel();
    test_loop();
}

int main(int argc, char **argv) {
    if (argc > 1) {
        test_with_setting(atoi(argv[1]));
        return check_report();
    }
    unsetenv("RADDLE_THREADS");
    CHECK(raddle_threads_count() >= 1);
    int asleep;
    bool deaf;
    CHECK_INT(inspect_pool(&asleep, &deaf), 0); /* asking for the count starts nothing */
    test_numbers();
    test_memory_order();
    test_loop();
    test_huge_loop();
    test_nested();
    test_callers();
    test_cores();
    test_idle();
    test_parallel();
    test_fork();
    test_settings(argv[0]);
    test_fork_while_busy();
    return check_report();
}

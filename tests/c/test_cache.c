// needs: base/*.c cuda/cache.c cuda/notice.c cuda/environment.c
/* test_cache.c - the kernel cache on disk: round trips, every kind of damage, full and forbidden
 * disks, the size limit, and processes that write the same key at once. */
#include "check.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/alloc.h"
#include "cuda/cache.h"

enum { PAYLOAD_BYTES = 1000 };

static const char folder[] = "cache/deep/down";
static const raddle_hash key = {0x0123456789abcdefu, 0xfedcba9876543210u};
static const char key_path[] = "cache/deep/down/0123456789abcdeffedcba9876543210.kernel";

static void fill(char *payload, unsigned seed) {
    for (int i = 0; i < PAYLOAD_BYTES; i++) {
        payload[i] = (char)((unsigned)i * 7 + seed);
    }
}

static void store(raddle_hash at, unsigned seed) {
    char payload[PAYLOAD_BYTES];
    fill(payload, seed);
    CHECK_OK(raddle_cache_store(folder, at, payload, sizeof payload, RADDLE_CACHE_LIMIT_BYTES));
}

/* True if key holds the payload of seed; false if it is absent. Anything else is a failure. */
static bool holds(raddle_hash at, unsigned seed) {
    char expected[PAYLOAD_BYTES];
    void *payload = NULL;
    size_t bytes = 0;
    fill(expected, seed);
    CHECK_OK(raddle_cache_load(folder, at, &payload, &bytes));
    const bool present = payload != NULL;
    if (present) {
        CHECK_INT((int64_t)bytes, PAYLOAD_BYTES);
        CHECK(memcmp(payload, expected, sizeof expected) == 0);
        CHECK(((char *)payload)[bytes] == '\0');
    }
    raddle_free(payload);
    return present;
}

static bool exists(const char *path) {
    return access(path, F_OK) == 0;
}

static int64_t file_bytes(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 ? (int64_t)info.st_size : -1;
}

static int count_files(const char *pattern) {
    char command[256], line[64] = "";
    snprintf(command, sizeof command, "ls -a %s | grep -c '%s'", folder, pattern);
    FILE *pipe = popen(command, "r");
    CHECK(pipe != NULL && fgets(line, sizeof line, pipe) != NULL);
    pclose(pipe);
    return atoi(line);
}

/* ---------------------------------------------------------------- the normal case */

static void test_round_trip(void) {
    CHECK(!holds(key, 1)); /* no folder yet */
    store(key, 1);
    CHECK(exists(key_path));
    CHECK_INT(file_bytes(key_path), RADDLE_CACHE_HEADER_BYTES + PAYLOAD_BYTES);
    CHECK(holds(key, 1));
    store(key, 2); /* replaces */
    CHECK(holds(key, 2));
    CHECK(!holds((raddle_hash){key.high, key.low + 1}, 2));
    CHECK_INT(count_files("tmp"), 0);

    void *payload = NULL;
    size_t bytes = 9;
    const raddle_hash empty = {1, 2};
    CHECK_OK(raddle_cache_store(folder, empty, "", 0, RADDLE_CACHE_LIMIT_BYTES));
    CHECK_OK(raddle_cache_load(folder, empty, &payload, &bytes));
    CHECK(payload != NULL && bytes == 0);
    raddle_free(payload);
}

/* ---------------------------------------------------------------- damage */

static void change_byte(long at) {
    FILE *file = fopen(key_path, "r+b");
    CHECK(file != NULL && fseek(file, at, SEEK_SET) == 0);
    const int old = fgetc(file);
    fseek(file, at, SEEK_SET);
    fputc(old ^ 0x40, file);
    fclose(file);
}

static void test_damage(void) {
    const long ends[] = {0,
                         8,
                         16,
                         31,
                         32,
                         40,
                         55,
                         RADDLE_CACHE_HEADER_BYTES,
                         RADDLE_CACHE_HEADER_BYTES + PAYLOAD_BYTES - 1};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        store(key, 3);
        change_byte(ends[i]);
        CHECK(!holds(key, 3));
        CHECK(!exists(key_path)); /* removed, so that it is written anew */
    }
    const long lengths[] = {0, 1, 63, 64, 500, RADDLE_CACHE_HEADER_BYTES + PAYLOAD_BYTES - 1};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        store(key, 4);
        CHECK(truncate(key_path, lengths[i]) == 0);
        CHECK(!holds(key, 4));
    }
    store(key, 5);
    CHECK(truncate(key_path, RADDLE_CACHE_HEADER_BYTES + PAYLOAD_BYTES + 1) == 0);
    CHECK(!holds(key, 5));
    store(key, 5);
    CHECK(holds(key, 5));
}

/* What somebody else put where a kernel should be. */
static void test_foreign(void) {
    const raddle_hash other = {7, 7};
    const char other_path[] = "cache/deep/down/00000000000000070000000000000007.kernel";
    store(other, 6);
    CHECK(rename(other_path, key_path) == 0); /* whole, but of another key */
    CHECK(!holds(key, 6));

    CHECK(mkdir(key_path, 0700) == 0);
    CHECK(!holds(key, 6));
    char payload[PAYLOAD_BYTES];
    fill(payload, 6);
    CHECK_FAILS(raddle_cache_store(folder, key, payload, sizeof payload, RADDLE_CACHE_LIMIT_BYTES),
                RADDLE_ERR_IO, "cannot rename");
    CHECK_INT(count_files("tmp"), 0);
    CHECK(rmdir(key_path) == 0);

    CHECK(mkfifo(key_path, 0600) == 0); /* must not block */
    CHECK(!holds(key, 6));
    store(key, 6);
    CHECK(holds(key, 6));
}

/* ---------------------------------------------------------------- disks that refuse */

static void test_forbidden(void) {
    void *payload = NULL;
    size_t bytes = 0;
    FILE *file = fopen("plain", "w");
    CHECK(file != NULL && fclose(file) == 0);
    CHECK_FAILS(raddle_cache_store("plain/cache", key, "x", 1, RADDLE_CACHE_LIMIT_BYTES),
                RADDLE_ERR_IO, "plain/cache");
    CHECK_OK(raddle_cache_load("plain/cache", key, &payload, &bytes));
    CHECK(payload == NULL);
    CHECK_FAILS(raddle_cache_store("/proc/raddle", key, "x", 1, RADDLE_CACHE_LIMIT_BYTES),
                RADDLE_ERR_IO, "cannot make the folder /proc/raddle");
    if (geteuid() != 0) { /* root may write anywhere */
        CHECK(mkdir("locked", 0500) == 0);
        CHECK_FAILS(raddle_cache_store("locked", key, "x", 1, RADDLE_CACHE_LIMIT_BYTES),
                    RADDLE_ERR_IO, "Permission denied");
    }
    char *name = raddle_alloc(8000);
    memset(name, 'a', 7999);
    name[7999] = '\0';
    CHECK_FAILS(raddle_cache_store(name, key, "x", 1, RADDLE_CACHE_LIMIT_BYTES), RADDLE_ERR_IO,
                "too long");
    CHECK_FAILS(raddle_cache_load(name, key, &payload, &bytes), RADDLE_ERR_IO, "too long");
    raddle_free(name);
}

/* A disk that fills up in the middle of a file: a limit on file sizes fails write() the same way.
 */
static void test_full_disk(void) {
    struct rlimit old, small;
    char payload[PAYLOAD_BYTES];
    store(key, 7);
    fill(payload, 8);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    const rlim_t sizes[] = {0, 10, 64, 500};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        small = old;
        small.rlim_cur = sizes[i];
        setrlimit(RLIMIT_FSIZE, &small);
        raddle_status status =
            raddle_cache_store(folder, key, payload, sizeof payload, RADDLE_CACHE_LIMIT_BYTES);
        setrlimit(RLIMIT_FSIZE, &old);
        CHECK_FAILS(status, RADDLE_ERR_IO, "cannot write");
        CHECK_INT(count_files("tmp"), 0);
        CHECK(holds(key, 7)); /* the old file stands */
    }
}

/* ---------------------------------------------------------------- limit and cleaning */

static void set_age(raddle_hash at, int seconds) {
    char path[256], text[33];
    raddle_hash_to_text(at, text);
    snprintf(path, sizeof path, "%s/%s.kernel", folder, text);
    const struct timespec times[2] = {{.tv_sec = time(NULL) - seconds},
                                      {.tv_sec = time(NULL) - seconds}};
    CHECK(utimensat(AT_FDCWD, path, times, 0) == 0);
}

static void test_limit(void) {
    int64_t removed = 0;
    raddle_cache_stats stats;
    CHECK_OK(raddle_cache_clear(folder, &removed));
    const uint64_t file = RADDLE_CACHE_HEADER_BYTES + PAYLOAD_BYTES;
    char payload[PAYLOAD_BYTES];
    fill(payload, 9);
    for (uint64_t i = 0; i < 5; i++) {
        const raddle_hash at = {i, i};
        CHECK_OK(raddle_cache_store(folder, at, payload, sizeof payload, 5 * file));
        set_age(at, 1000 - 100 * (int)i);
    }
    CHECK(holds((raddle_hash){0, 0}, 9)); /* used just now: 1 is the oldest */
    CHECK_OK(raddle_cache_store(folder, key, payload, sizeof payload, 4 * file));
    CHECK(!holds((raddle_hash){1, 1}, 9));
    CHECK(!holds((raddle_hash){2, 2}, 9));
    CHECK(holds((raddle_hash){0, 0}, 9));
    CHECK(holds((raddle_hash){3, 3}, 9));
    CHECK(holds((raddle_hash){4, 4}, 9));
    CHECK(holds(key, 9));
    CHECK_OK(raddle_cache_measure(folder, &stats));
    CHECK_INT(stats.num_files, 4);
    CHECK_INT(stats.num_bytes, (int64_t)(4 * file));
    /* A single file over the limit stays: it was asked for. */
    CHECK_OK(raddle_cache_store(folder, key, payload, sizeof payload, 1));
    CHECK_OK(raddle_cache_measure(folder, &stats));
    CHECK_INT(stats.num_files, 1);
    CHECK(holds(key, 9));
}

static void test_cleaning(void) {
    raddle_cache_stats stats;
    int64_t removed = 0;
    CHECK_OK(raddle_cache_clear(folder, &removed));
    store(key, 10);
    store((raddle_hash){5, 5}, 10);
    char path[256];
    snprintf(path, sizeof path, "%s/notes.txt", folder);
    FILE *file = fopen(path, "w");
    CHECK(file != NULL && fclose(file) == 0);
    CHECK(truncate(key_path, 100) == 0);
    CHECK_OK(raddle_cache_verify(folder, false, &stats));
    CHECK_INT(stats.num_files, 2);
    CHECK_INT(stats.num_damaged, 1);
    CHECK(exists(key_path));
    CHECK_OK(raddle_cache_verify(folder, true, &stats));
    CHECK_INT(stats.num_damaged, 1);
    CHECK(!exists(key_path));
    CHECK_OK(raddle_cache_verify(folder, true, &stats));
    CHECK_INT(stats.num_files, 1);
    CHECK_INT(stats.num_damaged, 0);

    /* Temporary files of a process that was killed go after an hour, others stay. */
    CHECK(system("touch -d '2 hours ago' cache/deep/down/.tmp-old") == 0);
    CHECK(system("touch cache/deep/down/.tmp-new") == 0);
    store(key, 10);
    CHECK(!exists("cache/deep/down/.tmp-old"));
    CHECK(exists("cache/deep/down/.tmp-new"));
    CHECK_OK(raddle_cache_clear(folder, &removed));
    CHECK_INT(removed, 2);
    CHECK(!exists("cache/deep/down/.tmp-new"));
    CHECK(exists(path)); /* what is not raddle's is left alone */
    CHECK_OK(raddle_cache_measure("nowhere", &stats));
    CHECK_INT(stats.num_files, 0);
}

/* ---------------------------------------------------------------- many processes */

/* Writers of one key and readers of it: a reader sees nothing or all of what one writer wrote. */
static void test_processes(void) {
    enum { PROCESSES = 6, ROUNDS = 60 };
    pid_t children[PROCESSES];
    fflush(stdout);
    for (int p = 0; p < PROCESSES; p++) {
        children[p] = fork();
        if (children[p] == 0) {
            check_failures = 0;
            for (int i = 0; i < ROUNDS; i++) {
                if (p % 2 == 0) {
                    store(key, 11);
                } else {
                    holds(key, 11);
                }
            }
            fflush(stdout);
            exit(check_failures != 0);
        }
    }
    for (int p = 0; p < PROCESSES; p++) {
        int status = 0;
        waitpid(children[p], &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    CHECK(holds(key, 11));
    CHECK_INT(count_files("tmp"), 0);
}

int main(void) {
    test_round_trip();
    test_damage();
    test_foreign();
    test_forbidden();
    test_full_disk();
    test_limit();
    test_cleaning();
    test_processes();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

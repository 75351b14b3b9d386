/* cache.c - files of the form <key>.kernel, written as .tmp-<pid>-<count> and renamed. */
#include "cuda/cache.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/io.h"
#include "cuda/notice.h"

enum {
    PATH_BYTES = 4096,
    KEY_CHARS = 32,
    TEMPORARY_SECONDS = 3600, /* an older temporary file is of a process that was killed */
};

static const char magic[8] = {'R', 'A', 'D', 'D', 'L', 'E', 'K', '\n'};
static const char suffix[] = ".kernel";
static const char temporary_prefix[] = ".tmp-";

/* As it lies in the file; every byte is set. */
typedef struct cache_header {
    char magic[8];
    uint32_t format, reserved;
    raddle_hash key;
    uint64_t bytes;
    raddle_hash checksum; /* of the payload */
    uint64_t reserved_end;
} cache_header;
_Static_assert(sizeof(cache_header) == RADDLE_CACHE_HEADER_BYTES, "the header has no padding");

typedef struct cache_entry {
    char name[KEY_CHARS + sizeof suffix];
    int64_t bytes;
    struct timespec used;
} cache_entry;

typedef struct entry_list {
    cache_entry *entries;
    size_t count, capacity;
} entry_list;

static bool hash_equal(raddle_hash a, raddle_hash b) {
    return a.high == b.high && a.low == b.low;
}

static raddle_status fail_io(const char *doing, const char *path) {
    return raddle_fail(RADDLE_ERR_IO, "kernel cache: %s %.600s: %s", doing, path, strerror(errno));
}

static bool make_entry_path(char path[PATH_BYTES], const char *folder, raddle_hash key) {
    char text[KEY_CHARS + 1];
    raddle_hash_to_text(key, text);
    return (size_t)snprintf(path, PATH_BYTES, "%s/%s%s", folder, text, suffix) < PATH_BYTES;
}

/* ---------------------------------------------------------------- reading */

static bool read_all(int file, void *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t got = read(file, (char *)data + done, bytes - done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return false;
        }
        done += (size_t)got;
    }
    return true;
}

/* Everything that the header claims, against the key that was asked for and the file's size. */
static bool header_fits(const cache_header *header, raddle_hash key, int64_t file_bytes) {
    return memcmp(header->magic, magic, sizeof magic) == 0 &&
           header->format == RADDLE_CACHE_FORMAT && hash_equal(header->key, key) &&
           header->bytes == (uint64_t)(file_bytes - RADDLE_CACHE_HEADER_BYTES);
}

/* RADDLE_OK and NULL for a damaged file. */
static raddle_status read_open_file(int file, raddle_hash key, const char *path, void **out_payload,
                                    size_t *out_bytes) {
    struct stat info;
    cache_header header;
    if (fstat(file, &info) != 0) {
        return fail_io("cannot read", path);
    }
    if (!S_ISREG(info.st_mode) || info.st_size < RADDLE_CACHE_HEADER_BYTES ||
        !read_all(file, &header, sizeof header) || !header_fits(&header, key, info.st_size)) {
        return RADDLE_OK;
    }
    const size_t bytes = (size_t)header.bytes;
    char *payload = raddle_alloc(bytes + 1);
    if (payload == NULL) {
        return raddle_fail_memory(bytes + 1);
    }
    payload[bytes] = '\0';
    if (!read_all(file, payload, bytes) ||
        !hash_equal(raddle_hash_bytes(payload, bytes), header.checksum)) {
        raddle_free(payload);
        return RADDLE_OK;
    }
    *out_payload = payload;
    *out_bytes = bytes;
    return RADDLE_OK;
}

static raddle_status load_path(const char *path, raddle_hash key, bool *out_damaged,
                               void **out_payload, size_t *out_bytes) {
    void *payload = NULL;
    *out_damaged = false;
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) {
        if (errno == ENOENT || errno == ENOTDIR) {
            *out_payload = NULL;
            return RADDLE_OK;
        }
        return fail_io("cannot open", path);
    }
    raddle_status status = read_open_file(file, key, path, &payload, out_bytes);
    if (status == RADDLE_OK) {
        *out_damaged = payload == NULL;
        *out_payload = payload;
    }
    close(file);
    return status;
}

raddle_status raddle_cache_load(const char *folder, raddle_hash key, void **out_payload,
                                size_t *out_bytes) {
    char path[PATH_BYTES];
    bool damaged = false;
    RADDLE_REQUIRE(make_entry_path(path, folder, key), RADDLE_ERR_IO,
                   "kernel cache: the folder's name is too long");
    RADDLE_TRY(load_path(path, key, &damaged, out_payload, out_bytes));
    if (damaged) {
        raddle_notice("kernel cache: %.300s was damaged; its kernel is compiled again", path);
        unlink(path);
    } else if (*out_payload != NULL) {
        utimensat(AT_FDCWD, path, NULL,
                  0); /* last use; a read-only disk refuses, and evicts none */
    }
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- the folder */

static bool parse_key(const char *name, raddle_hash *out_key) {
    char digits[17] = {0};
    if (strlen(name) != KEY_CHARS + sizeof suffix - 1 || strcmp(name + KEY_CHARS, suffix) != 0 ||
        strspn(name, "0123456789abcdef") != KEY_CHARS) {
        return false;
    }
    memcpy(digits, name, 16);
    out_key->high = strtoull(digits, NULL, 16);
    memcpy(digits, name + 16, 16);
    out_key->low = strtoull(digits, NULL, 16);
    return true;
}

static bool is_temporary(const char *name) {
    return strncmp(name, temporary_prefix, sizeof temporary_prefix - 1) == 0;
}

static raddle_status add_entry(entry_list *list, const char *name, const struct stat *info) {
    if (list->count == list->capacity) {
        const size_t capacity = list->capacity > 0 ? 2 * list->capacity : 64;
        cache_entry *grown = raddle_realloc(list->entries, capacity * sizeof *grown);
        if (grown == NULL) {
            return raddle_fail_memory(capacity * sizeof *grown);
        }
        list->entries = grown;
        list->capacity = capacity;
    }
    cache_entry *entry = &list->entries[list->count++];
    memcpy(entry->name, name, sizeof entry->name);
    entry->bytes = info->st_size;
    entry->used = info->st_mtim;
    return RADDLE_OK;
}

/* Lists the kernels; removes temporary files that are older than max_age_seconds. A folder that
 * does not exist is empty. The list is the caller's to free, also after a failure. */
static raddle_status list_folder(const char *folder, int64_t max_age_seconds, entry_list *list) {
    DIR *listing = opendir(folder);
    if (listing == NULL) {
        return errno == ENOENT ? RADDLE_OK : fail_io("cannot list", folder);
    }
    raddle_status status = RADDLE_OK;
    const time_t now = time(NULL);
    for (const struct dirent *item = readdir(listing); item != NULL && status == RADDLE_OK;
         item = readdir(listing)) {
        raddle_hash key;
        struct stat info;
        if (fstatat(dirfd(listing), item->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0 ||
            !S_ISREG(info.st_mode)) {
            continue; /* removed meanwhile, or not ours */
        }
        if (is_temporary(item->d_name) && now - info.st_mtime >= max_age_seconds) {
            unlinkat(dirfd(listing), item->d_name, 0);
        } else if (parse_key(item->d_name, &key)) {
            status = add_entry(list, item->d_name, &info);
        }
    }
    closedir(listing);
    return status;
}

static bool remove_entry(const char *folder, const char *name) {
    char path[PATH_BYTES];
    return (size_t)snprintf(path, sizeof path, "%s/%s", folder, name) < sizeof path &&
           unlink(path) == 0;
}

static int compare_by_use(const void *a, const void *b) {
    const struct timespec *x = &((const cache_entry *)a)->used;
    const struct timespec *y = &((const cache_entry *)b)->used;
    if (x->tv_sec != y->tv_sec) {
        return x->tv_sec < y->tv_sec ? -1 : 1;
    }
    return (x->tv_nsec > y->tv_nsec) - (x->tv_nsec < y->tv_nsec);
}

/* Best effort: what cannot be listed or removed stays. keep: the name that was stored just now. */
static void shrink_folder(const char *folder, const char *keep, uint64_t limit_bytes) {
    entry_list list = {0};
    uint64_t total = 0;
    if (list_folder(folder, TEMPORARY_SECONDS, &list) == RADDLE_OK) {
        for (size_t i = 0; i < list.count; i++) {
            total += (uint64_t)list.entries[i].bytes;
        }
        if (total > limit_bytes) {
            qsort(list.entries, list.count, sizeof *list.entries, compare_by_use);
        }
        for (size_t i = 0; i < list.count && total > limit_bytes; i++) {
            if (strcmp(list.entries[i].name, keep) != 0) {
                remove_entry(folder, list.entries[i].name);
                total -= (uint64_t)list.entries[i].bytes;
            }
        }
    }
    raddle_free(list.entries);
}

/* ---------------------------------------------------------------- writing */

/* mkdir -p; folders that are there already are left as they are. */
static raddle_status make_folder(const char *folder) {
    char path[PATH_BYTES];
    if ((size_t)snprintf(path, sizeof path, "%s", folder) >= sizeof path) {
        errno = ENAMETOOLONG;
        return fail_io("cannot make the folder", folder);
    }
    for (char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0700); /* the last one tells whether it went well */
        *slash = '/';
    }
    if (mkdir(path, 0700) != 0 && errno != EEXIST) {
        return fail_io("cannot make the folder", folder);
    }
    return RADDLE_OK;
}

static raddle_status write_file(const char *folder, const char *path, const cache_header *header,
                                const void *payload, size_t bytes) {
    const int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0) {
        return fail_io("cannot write in", folder);
    }
    raddle_status status = RADDLE_OK;
    if (!raddle_write_all(file, header, sizeof *header) ||
        !raddle_write_all(file, payload, bytes) || fsync(file) != 0) {
        status = fail_io("cannot write in", folder);
    }
    if (close(file) != 0 && status == RADDLE_OK) {
        status = fail_io("cannot write in", folder);
    }
    return status;
}

static void sync_folder(const char *folder) {
    const int file = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (file >= 0) {
        fsync(file); /* a lost rename only costs a compile */
        close(file);
    }
}

raddle_status raddle_cache_store(const char *folder, raddle_hash key, const void *payload,
                                 size_t bytes, uint64_t limit_bytes) {
    static atomic_uint counter;
    char path[PATH_BYTES], temporary[PATH_BYTES];
    cache_header header = {.format = RADDLE_CACHE_FORMAT, .key = key, .bytes = bytes};
    memcpy(header.magic, magic, sizeof magic);
    header.checksum = raddle_hash_bytes(payload, bytes);

    RADDLE_TRY(make_folder(folder));
    /* The time tells processes of several machines apart that share a folder and a process id. */
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const int length =
        snprintf(temporary, sizeof temporary, "%s/%s%ld-%u-%ld", folder, temporary_prefix,
                 (long)getpid(), atomic_fetch_add(&counter, 1), now.tv_nsec);
    if ((size_t)length >= sizeof temporary || !make_entry_path(path, folder, key)) {
        errno = ENAMETOOLONG;
        return fail_io("cannot write in", folder);
    }
    raddle_status status = write_file(folder, temporary, &header, payload, bytes);
    if (status == RADDLE_OK && rename(temporary, path) != 0) {
        status = fail_io("cannot rename a file to", path);
    }
    if (status != RADDLE_OK) {
        unlink(temporary);
        return status;
    }
    sync_folder(folder);
    shrink_folder(folder, strrchr(path, '/') + 1, limit_bytes);
    return RADDLE_OK;
}

/* ---------------------------------------------------------------- the user's commands */

raddle_status raddle_cache_measure(const char *folder, raddle_cache_stats *out_stats) {
    entry_list list = {0};
    raddle_cache_stats stats = {0};
    raddle_status status = list_folder(folder, TEMPORARY_SECONDS, &list);
    for (size_t i = 0; i < list.count; i++) {
        stats.num_bytes += list.entries[i].bytes;
    }
    stats.num_files = (int64_t)list.count;
    raddle_free(list.entries);
    if (status == RADDLE_OK) {
        *out_stats = stats;
    }
    return status;
}

raddle_status raddle_cache_verify(const char *folder, bool remove_damaged,
                                  raddle_cache_stats *out_stats) {
    entry_list list = {0};
    raddle_cache_stats stats = {0};
    raddle_status status = list_folder(folder, TEMPORARY_SECONDS, &list);
    for (size_t i = 0; i < list.count && status == RADDLE_OK; i++) {
        char path[PATH_BYTES];
        raddle_hash key;
        void *payload = NULL;
        size_t bytes = 0;
        bool damaged = false;
        parse_key(list.entries[i].name, &key);
        snprintf(path, sizeof path, "%s/%s", folder, list.entries[i].name);
        status = load_path(path, key, &damaged, &payload, &bytes);
        raddle_free(payload);
        stats.num_files++;
        stats.num_bytes += list.entries[i].bytes;
        stats.num_damaged += damaged;
        if (damaged && remove_damaged) {
            remove_entry(folder, list.entries[i].name);
        }
    }
    raddle_free(list.entries);
    if (status == RADDLE_OK) {
        *out_stats = stats;
    }
    return status;
}

raddle_status raddle_cache_clear(const char *folder, int64_t *out_num_removed) {
    entry_list list = {0};
    int64_t num_removed = 0;
    raddle_status status = list_folder(folder, 0, &list);
    for (size_t i = 0; i < list.count && status == RADDLE_OK; i++) {
        if (remove_entry(folder, list.entries[i].name)) {
            num_removed++;
        } else if (errno != ENOENT) {
            status = fail_io("cannot remove", list.entries[i].name);
        }
    }
    raddle_free(list.entries);
    if (status == RADDLE_OK) {
        *out_num_removed = num_removed;
    }
    return status;
}

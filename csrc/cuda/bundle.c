/* bundle.c - writes and reads bundles. */
#include "cuda/bundle.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/alloc.h"

enum { BUNDLE_FORMAT = 1, MAX_IMAGES = 65536 };

static const char magic[8] = {'R', 'A', 'D', 'D', 'L', 'E', 'B', '\n'};

typedef struct bundle_header {
    char magic[8];
    uint32_t format, num_images;
    uint64_t file_bytes;
} bundle_header;
_Static_assert(sizeof(bundle_header) == 24, "no padding");

typedef struct bundle_entry {
    raddle_hash key;
    uint64_t offset, bytes; /* of the payload in the file */
    raddle_hash checksum;
} bundle_entry;
_Static_assert(sizeof(bundle_entry) == 48, "no padding");

static raddle_status fail_io(const char *doing, const char *path) {
    return raddle_fail(RADDLE_ERR_IO, "bundle: cannot %s %.600s: %s", doing, path, strerror(errno));
}

static raddle_status fail_damaged(const char *path, const char *what) {
    return raddle_fail(RADDLE_ERR_IO,
                       "bundle: %.600s %s; make it with this version of raddle: python -m raddle "
                       "warmup -o FILE",
                       path, what);
}

/* ---------------------------------------------------------------- writing */

static size_t table_bytes(int num_images) {
    return sizeof(bundle_header) + (size_t)num_images * sizeof(bundle_entry);
}

/* Header and entries in one block, the caller's to free. */
static raddle_status make_table(const raddle_image *const *images, int num_images,
                                char **out_table) {
    const size_t bytes = table_bytes(num_images);
    char *table = raddle_alloc_zero(bytes);
    if (table == NULL) {
        return raddle_fail_memory(bytes);
    }
    bundle_header header = {.format = BUNDLE_FORMAT, .num_images = (uint32_t)num_images};
    uint64_t offset = bytes + sizeof(raddle_hash);
    for (int i = 0; i < num_images; i++) {
        const bundle_entry entry = {
            .key = images[i]->key,
            .offset = offset,
            .bytes = images[i]->payload_bytes,
            .checksum = raddle_hash_bytes(images[i]->payload, images[i]->payload_bytes),
        };
        memcpy(table + table_bytes(i), &entry, sizeof entry);
        offset += entry.bytes;
    }
    memcpy(header.magic, magic, sizeof magic);
    header.file_bytes = offset;
    memcpy(table, &header, sizeof header);
    *out_table = table;
    return RADDLE_OK;
}

static bool write_parts(FILE *file, const char *table, const raddle_image *const *images,
                        int num_images) {
    const raddle_hash checksum = raddle_hash_bytes(table, table_bytes(num_images));
    bool good = fwrite(table, table_bytes(num_images), 1, file) == 1 &&
                fwrite(&checksum, sizeof checksum, 1, file) == 1;
    for (int i = 0; i < num_images && good; i++) {
        good = fwrite(images[i]->payload, images[i]->payload_bytes, 1, file) == 1;
    }
    return good && fflush(file) == 0 && fsync(fileno(file)) == 0;
}

raddle_status raddle_bundle_write(const char *path, const raddle_image *const *images,
                                  int num_images) {
    char temporary[4096];
    char *table = NULL;
    if ((size_t)snprintf(temporary, sizeof temporary, "%s.%ld.tmp", path, (long)getpid()) >=
        sizeof temporary) {
        errno = ENAMETOOLONG;
        return fail_io("write", path);
    }
    RADDLE_REQUIRE(num_images <= MAX_IMAGES, RADDLE_ERR_VALUE,
                   "bundle: holds at most %d kernels, got %d", (int)MAX_IMAGES, num_images);
    RADDLE_TRY(make_table(images, num_images, &table));
    raddle_status status = RADDLE_OK;
    FILE *file = fopen(temporary, "wbe");
    if (file == NULL) {
        status = fail_io("make", temporary);
    } else {
        if (!write_parts(file, table, images, num_images)) {
            status = fail_io("write", temporary);
        }
        if (fclose(file) != 0 && status == RADDLE_OK) {
            status = fail_io("write", temporary);
        }
        if (status == RADDLE_OK && rename(temporary, path) != 0) {
            status = fail_io("rename a file to", path);
        }
        if (status != RADDLE_OK) {
            unlink(temporary);
        }
    }
    raddle_free(table);
    return status;
}

/* ---------------------------------------------------------------- reading */

static raddle_status read_file(const char *path, char **out_data, size_t *out_bytes) {
    struct stat info;
    FILE *file = fopen(path, "rbe");
    if (file == NULL) {
        return fail_io("open", path);
    }
    raddle_status status = RADDLE_OK;
    char *data = NULL;
    if (fstat(fileno(file), &info) != 0 || !S_ISREG(info.st_mode)) {
        status = fail_damaged(path, "is not a file");
    } else {
        data = raddle_alloc((size_t)info.st_size);
        if (data == NULL) {
            status = raddle_fail_memory((size_t)info.st_size);
        } else if (fread(data, 1, (size_t)info.st_size, file) != (size_t)info.st_size) {
            status = fail_io("read", path);
        }
    }
    fclose(file);
    if (status != RADDLE_OK) {
        raddle_free(data);
        return status;
    }
    *out_data = data;
    *out_bytes = (size_t)info.st_size;
    return RADDLE_OK;
}

static bundle_entry entry_at(const char *data, int i) {
    bundle_entry entry;
    memcpy(&entry, data + table_bytes(i), sizeof entry);
    return entry;
}

static raddle_status check_bundle(const char *path, const char *data, size_t bytes,
                                  int *out_num_images) {
    bundle_header header;
    raddle_hash checksum;
    if (bytes < sizeof header + sizeof checksum || memcmp(data, magic, sizeof magic) != 0) {
        return fail_damaged(path, "is no bundle of raddle's");
    }
    memcpy(&header, data, sizeof header);
    if (header.format != BUNDLE_FORMAT || header.num_images > MAX_IMAGES) {
        return fail_damaged(path, "has a format that this version does not read");
    }
    const int num_images = (int)header.num_images;
    const size_t begin = table_bytes(num_images) + sizeof checksum;
    if (header.file_bytes != bytes || begin > bytes) {
        return fail_damaged(path, "is cut off");
    }
    memcpy(&checksum, data + table_bytes(num_images), sizeof checksum);
    raddle_hash actual = raddle_hash_bytes(data, table_bytes(num_images));
    bool good = memcmp(&checksum, &actual, sizeof actual) == 0;
    for (int i = 0; i < num_images && good; i++) {
        const bundle_entry entry = entry_at(data, i);
        good =
            entry.offset >= begin && entry.offset <= bytes && entry.bytes <= bytes - entry.offset;
        if (good) {
            actual = raddle_hash_bytes(data + entry.offset, (size_t)entry.bytes);
            good = memcmp(&entry.checksum, &actual, sizeof actual) == 0;
        }
    }
    if (!good) {
        return fail_damaged(path, "is damaged");
    }
    *out_num_images = num_images;
    return RADDLE_OK;
}

raddle_status raddle_bundle_load(const char *path, bool to_disk, int *out_num_images) {
    char *data = NULL;
    size_t bytes = 0;
    int num_images = 0;
    RADDLE_TRY(read_file(path, &data, &bytes));
    raddle_status status = check_bundle(path, data, bytes, &num_images);
    for (int i = 0; i < num_images && status == RADDLE_OK; i++) {
        const bundle_entry entry = entry_at(data, i);
        status = raddle_image_adopt(entry.key, data + entry.offset, (size_t)entry.bytes, to_disk);
    }
    raddle_free(data);
    if (status == RADDLE_OK) {
        *out_num_images = num_images;
    }
    return status;
}

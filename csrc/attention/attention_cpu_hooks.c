/* attention_cpu_hooks.c - a user's variant compiled for the CPU: memory, then disk, then the C
 * compiler.
 *
 * The translation unit is common/abi.h and attention_variant.h without their #include lines, the
 * declarations of the hooks that the variant has (so that a wrong one is told at its own line), expf
 * and tanhf as attention_variant.h has them, the variant's text, and attention_variant_rows.h. A
 * content hash is its key in the table of this process and in the kernel cache. Compiled variants
 * live as long as the process.
 */
#include "attention/attention_cpu.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/hash.h"
#include "base/io.h"
#include "cpu/compile.h"
#include "cuda/cache.h"
#include "cuda/environment.h"
#include "cuda/notice.h"
#include "cuda/sources.h"

enum { NAME_BYTES = 128 };

static const char rows_symbol[] = "raddle_rows_of_variant";

typedef struct compiled_variant {
    raddle_hash key;
    const raddle_variant_rows *rows;
    struct compiled_variant *next;
} compiled_variant;

/* Held while a variant is compiled: others wait, and find it then. */
static pthread_mutex_t compiled_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t compiled_once = PTHREAD_ONCE_INIT;
static compiled_variant *compiled;

/* ---------------------------------------------------------------- text */

static const char *const declarations[RADDLE_NUM_HOOKS] = {
    "raddle_pair raddle_variant_query(const raddle_variant *, const raddle_row *, int32_t, "
    "raddle_pair);\n",
    "raddle_pair raddle_variant_key(const raddle_variant *, const raddle_key *, int32_t, "
    "raddle_pair);\n",
    "float raddle_variant_logit(const raddle_variant *, const raddle_row *, int32_t, float);\n",
    "bool raddle_variant_mask(const raddle_variant *, const raddle_row *, int32_t);\n",
    "void raddle_variant_state(const raddle_variant *, const raddle_row *, float *, float *);\n",
    "float raddle_variant_output(const raddle_variant *, const raddle_row *, int32_t, float);\n",
};

/* A text that grows; size is what it takes, written or not. */
typedef struct text_writer {
    char *to; /* NULL: only measure */
    size_t size;
} text_writer;

static void put(text_writer *writer, const char *text, size_t bytes) {
    if (writer->to != NULL) {
        memcpy(writer->to + writer->size, text, bytes);
    }
    writer->size += bytes;
}

static void put_text(text_writer *writer, const char *text) {
    put(writer, text, strlen(text));
}

/* A header of kernels/, its own #include lines left empty. */
static void put_header(text_writer *writer, const char *name) {
    static const char include[] = "#include \"";
    const raddle_source *source = raddle_sources;
    while (strcmp(source->name, name) != 0) {
        source++;
    }
    put_text(writer, "#line 1 \"kernels/");
    put_text(writer, name);
    put_text(writer, "\"\n");
    for (const char *line = source->text; *line != '\0';) {
        const size_t length = strcspn(line, "\n");
        if (strncmp(line, include, sizeof include - 1) != 0) {
            put(writer, line, length);
        }
        put_text(writer, "\n");
        line += length + (line[length] == '\n');
    }
}

static void put_program(text_writer *writer, const raddle_attention_variant *variant) {
    put_header(writer, "common/abi.h");
    put_header(writer, "attention/attention_variant.h");
    put_text(writer, "typedef struct raddle_variant raddle_variant;\n");
    /* Of these compilers make vectors, of calls into the C library none. */
    put_text(writer, "#define expf(x) raddle_exp(x)\n#define tanhf(x) raddle_tanh(x)\n");
    for (int i = 0; i < RADDLE_NUM_HOOKS; i++) {
        if (variant->hooks >> i & 1) {
            put_text(writer, "static inline __attribute__((always_inline)) ");
            put_text(writer, declarations[i]);
        }
    }
    put_text(writer, variant->text);
    put_text(writer, "#define RADDLE_VARIANT_TEXT 1\n");
    put_header(writer, "attention/attention_variant_rows.h");
    put(writer, "", 1);
}

static raddle_status write_program(const raddle_attention_variant *variant, char **out_text) {
    text_writer writer = {0};
    put_program(&writer, variant);
    writer.to = raddle_alloc(writer.size);
    if (writer.to == NULL) {
        return raddle_fail_memory(writer.size);
    }
    writer.size = 0;
    put_program(&writer, variant);
    *out_text = writer.to;
    return RADDLE_OK;
}

static raddle_hash hash_program(const char *text) {
    raddle_hasher hasher;
    raddle_hash_init(&hasher);
    raddle_hash_update_text(&hasher, "attention variant for the CPU");
    raddle_hash_update_text(&hasher, raddle_version());
    raddle_hash_update_text(&hasher, raddle_compile_signature());
    raddle_hash_update_text(&hasher, text);
    return raddle_hash_finish(&hasher);
}

/* ---------------------------------------------------------------- disk and compiler */

/* Whatever is wrong with the disk is a notice, not an error. */
static void load_from_disk(raddle_hash key, void **out_object, size_t *out_bytes) {
    const char *folder = raddle_environment_get()->cache_dir;
    if (folder[0] != '\0' && raddle_cache_load(folder, key, out_object, out_bytes) != RADDLE_OK) {
        raddle_notice("%.400s; variants are compiled anew", raddle_last_error()->message);
    }
}

static void store_to_disk(raddle_hash key, const void *object, size_t bytes) {
    const char *folder = raddle_environment_get()->cache_dir;
    if (folder[0] != '\0' &&
        raddle_cache_store(folder, key, object, bytes, RADDLE_CACHE_LIMIT_BYTES) != RADDLE_OK) {
        raddle_notice("%.350s; variants stay in memory and every process compiles its own. Set "
                      "RADDLE_CACHE_DIR to a folder that can be written",
                      raddle_last_error()->message);
    }
}

static raddle_status build_rows(const raddle_compile_program *program, raddle_hash key,
                                const raddle_variant_rows **out_rows) {
    void *object = NULL, *rows = NULL;
    size_t bytes = 0;
    load_from_disk(key, &object, &bytes);
    if (object != NULL) {
        const raddle_status status =
            raddle_compile_load(program->name, object, bytes, rows_symbol, &rows);
        raddle_free(object);
        if (status == RADDLE_OK) {
            *out_rows = rows;
            return RADDLE_OK;
        }
        object = NULL; /* made where other libraries are; this machine's compiler may do */
    }
    const double begin = raddle_now_seconds();
    RADDLE_TRY(raddle_compile(program, &object, &bytes));
    raddle_log(2, "compiled %s in %.0f ms", program->name, 1e3 * (raddle_now_seconds() - begin));
    const raddle_status status =
        raddle_compile_load(program->name, object, bytes, rows_symbol, &rows);
    if (status == RADDLE_OK) {
        store_to_disk(key, object, bytes);
        *out_rows = rows;
    }
    raddle_free(object);
    return status;
}

/* ---------------------------------------------------------------- the table */

/* A fork waits for the compiler, so that the child does not find the lock held by nobody. */
static void lock_compiled(void) {
    pthread_mutex_lock(&compiled_mutex);
}

static void unlock_compiled(void) {
    pthread_mutex_unlock(&compiled_mutex);
}

static void watch_forks(void) {
    pthread_atfork(lock_compiled, unlock_compiled, unlock_compiled);
}

static raddle_status find_rows(const raddle_compile_program *program, raddle_hash key,
                               const raddle_variant_rows **out_rows) {
    for (const compiled_variant *one = compiled; one != NULL; one = one->next) {
        if (one->key.high == key.high && one->key.low == key.low) {
            *out_rows = one->rows;
            return RADDLE_OK;
        }
    }
    compiled_variant *added = raddle_alloc_zero(sizeof *added);
    if (added == NULL) {
        return raddle_fail_memory(sizeof *added);
    }
    const raddle_status status = build_rows(program, key, &added->rows);
    if (status != RADDLE_OK) {
        raddle_free(added);
        return status;
    }
    added->key = key;
    added->next = compiled;
    compiled = added;
    *out_rows = added->rows;
    return RADDLE_OK;
}

raddle_status raddle_attention_cpu_hooks_get(const raddle_attention_variant *variant,
                                             const raddle_variant_rows **out_rows) {
    char name[NAME_BYTES];
    char *text = NULL;
    RADDLE_TRY(write_program(variant, &text));
    snprintf(name, sizeof name, "variant %s", variant->name);
    const raddle_compile_program program = {.name = name, .text = text};
    pthread_once(&compiled_once, watch_forks);
    lock_compiled();
    const raddle_status status = find_rows(&program, hash_program(text), out_rows);
    unlock_compiled();
    raddle_free(text);
    return status;
}

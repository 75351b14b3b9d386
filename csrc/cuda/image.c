/* image.c - puts a program together from the embedded sources, and keeps what came of it. */
#include "cuda/image.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/io.h"
#include "cuda/cache.h"
#include "cuda/environment.h"
#include "cuda/kernel.h"
#include "cuda/notice.h"
#include "cuda/nvrtc.h"
#include "cuda/sources.h"

enum { VERSION_OF_BUNDLES = 0 };

static const char *const compile_options[] = {
    "--std=c++17",
    "-default-device",
    /* One per option: NVRTC does not split lists. */
    "--ptxas-options=-v",
    "--ptxas-options=--warn-on-spills",
    "--ptxas-options=--warn-on-local-memory-usage",
    NULL,
};

/* A kernel's source and the headers that it includes, directly or not. */
typedef struct source_closure {
    const raddle_source *source;
    int num_headers;
    const raddle_source **headers; /* in the order of raddle_sources */
} source_closure;

typedef struct image_slot {
    raddle_image image;
    bool is_ready; /* else some thread is building it */
} image_slot;

static pthread_mutex_t slots_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t slots_changed = PTHREAD_COND_INITIALIZER;
static image_slot **slots;
static size_t num_slots, slots_capacity;

/* ---------------------------------------------------------------- sources */

static const raddle_source *find_source(const char *name, size_t name_bytes) {
    for (int i = 0; i < raddle_num_sources; i++) {
        if (strlen(raddle_sources[i].name) == name_bytes &&
            memcmp(raddle_sources[i].name, name, name_bytes) == 0) {
            return &raddle_sources[i];
        }
    }
    return NULL;
}

/* Marks every header that text includes. An include in a comment or an unused branch counts: the
 * closure may be too large, never too small. A header that does not exist is left to NVRTC to name.
 */
static void mark_includes(const char *text, bool *marks) {
    static const char directive[] = "#include \"";
    for (const char *at = strstr(text, directive); at != NULL; at = strstr(at, directive)) {
        at += sizeof directive - 1;
        const raddle_source *header = find_source(at, strcspn(at, "\"\n"));
        if (header != NULL && !marks[header - raddle_sources]) {
            marks[header - raddle_sources] = true;
            mark_includes(header->text, marks);
        }
    }
}

static void closure_fini(source_closure *closure) {
    raddle_free(closure->headers);
}

static raddle_status closure_init(source_closure *closure, const char *name, const char *config) {
    char file[256];
    const int length = snprintf(file, sizeof file, "%s.cu", name);
    *closure = (source_closure){0};
    closure->source = (size_t)length < sizeof file ? find_source(file, (size_t)length) : NULL;
    RADDLE_REQUIRE(closure->source != NULL, RADDLE_ERR_VALUE,
                   "name: raddle has no kernel %.200s; expected the path of a .cu file below "
                   "kernels/ without its ending, as \"attention/attention_decode\"",
                   name);
    const size_t bytes = (size_t)raddle_num_sources * sizeof *closure->headers;
    bool *marks = raddle_alloc_zero((size_t)raddle_num_sources);
    closure->headers = raddle_alloc(bytes);
    if (marks == NULL || closure->headers == NULL) {
        raddle_free(marks);
        closure_fini(closure);
        return raddle_fail_memory(bytes);
    }
    mark_includes(config, marks);
    mark_includes(closure->source->text, marks);
    for (int i = 0; i < raddle_num_sources; i++) {
        if (marks[i]) {
            closure->headers[closure->num_headers++] = &raddle_sources[i];
        }
    }
    raddle_free(marks);
    return RADDLE_OK;
}

static raddle_hash hash_program(const source_closure *closure, const char *config,
                                const char *arch) {
    raddle_hasher hasher;
    raddle_hash_init(&hasher);
    raddle_hash_update_text(&hasher, raddle_version());
    for (int i = 0; compile_options[i] != NULL; i++) {
        raddle_hash_update_text(&hasher, compile_options[i]);
    }
    raddle_hash_update_text(&hasher, arch);
    raddle_hash_update_text(&hasher, config);
    raddle_hash_update_text(&hasher, closure->source->name);
    raddle_hash_update_text(&hasher, closure->source->text);
    for (int i = 0; i < closure->num_headers; i++) {
        raddle_hash_update_text(&hasher, closure->headers[i]->name);
        raddle_hash_update_text(&hasher, closure->headers[i]->text);
    }
    return raddle_hash_finish(&hasher);
}

/* ---------------------------------------------------------------- compiling */

/* "sm_90a" or "compute_90": nothing else may reach the option. */
static raddle_status check_arch(const char *arch) {
    const char *digits = strncmp(arch, "sm_", 3) == 0        ? arch + 3
                         : strncmp(arch, "compute_", 8) == 0 ? arch + 8
                                                             : "";
    const size_t count = strspn(digits, "0123456789");
    const char *end = digits + count;
    RADDLE_REQUIRE(count >= 2 && count <= 3 &&
                       (end[0] == '\0' || ((end[0] == 'a' || end[0] == 'f') && end[1] == '\0')),
                   RADDLE_ERR_VALUE,
                   "arch: expected one like \"sm_80\", \"sm_90a\" or \"compute_90\", got \"%.40s\"",
                   arch);
    return RADDLE_OK;
}

static raddle_status compile_closure(const source_closure *closure, const char *config,
                                     const char *arch, void **out_image, size_t *out_bytes,
                                     char **out_log) {
    const raddle_source *source = closure->source;
    const size_t text_bytes = strlen(config) + source->bytes + strlen(source->name) + 32;
    const size_t names_bytes = (size_t)closure->num_headers * sizeof(char *);
    raddle_status status = RADDLE_OK;
    char *text = raddle_alloc(text_bytes);
    const char **names = raddle_alloc(names_bytes);
    const char **texts = raddle_alloc(names_bytes);
    if (text == NULL || names == NULL || texts == NULL) {
        status = raddle_fail_memory(text_bytes);
        goto out;
    }
    snprintf(text, text_bytes, "%s\n#line 1 \"%s\"\n%s", config, source->name, source->text);
    for (int i = 0; i < closure->num_headers; i++) {
        names[i] = closure->headers[i]->name;
        texts[i] = closure->headers[i]->text;
    }
    const raddle_nvrtc_program program = {
        .name = source->name,
        .text = text,
        .num_headers = closure->num_headers,
        .header_names = names,
        .header_texts = texts,
        .options = compile_options,
        .arch = arch,
    };
    status = raddle_nvrtc_compile(&program, out_image, out_bytes, out_log);
out:
    raddle_free(texts);
    raddle_free(names);
    raddle_free(text);
    return status;
}

raddle_status raddle_kernel_compile(const char *name, const char *config, const char *arch,
                                    void **out_image, size_t *out_bytes, char **out_log) {
    source_closure closure;
    RADDLE_TRY(check_arch(arch));
    RADDLE_TRY(closure_init(&closure, name, config));
    raddle_status status = compile_closure(&closure, config, arch, out_image, out_bytes, out_log);
    closure_fini(&closure);
    return status;
}

/* ---------------------------------------------------------------- payloads and the disk */

/* Points image into payload, which it takes over; false if the lengths cannot be. */
static bool open_payload(raddle_image *image, void *payload, size_t bytes,
                         raddle_image_origin origin) {
    uint64_t code_bytes = 0;
    char *data = payload;
    if (bytes < sizeof code_bytes + 2) {
        return false;
    }
    memcpy(&code_bytes, data, sizeof code_bytes);
    if (code_bytes > bytes - sizeof code_bytes - 2 || data[bytes - 1] != '\0' ||
        data[sizeof code_bytes + code_bytes] != '\0') {
        return false;
    }
    image->payload = payload;
    image->payload_bytes = bytes;
    image->code = data + sizeof code_bytes;
    image->code_bytes = (size_t)code_bytes;
    image->log = data + sizeof code_bytes + code_bytes + 1;
    image->origin = origin;
    return true;
}

static raddle_status make_payload(raddle_image *image, const void *code, size_t code_bytes,
                                  const char *log) {
    const uint64_t length = code_bytes;
    const size_t log_bytes = strlen(log) + 1;
    const size_t bytes = sizeof length + code_bytes + 1 + log_bytes;
    char *payload = raddle_alloc(bytes);
    if (payload == NULL) {
        return raddle_fail_memory(bytes);
    }
    memcpy(payload, &length, sizeof length);
    memcpy(payload + sizeof length, code, code_bytes);
    payload[sizeof length + code_bytes] = '\0';
    memcpy(payload + sizeof length + code_bytes + 1, log, log_bytes);
    open_payload(image, payload, bytes, RADDLE_IMAGE_COMPILED);
    return RADDLE_OK;
}

static raddle_hash disk_key(raddle_hash key, int nvrtc_version) {
    raddle_hasher hasher;
    raddle_hash_init(&hasher);
    raddle_hash_update(&hasher, &key, sizeof key);
    raddle_hash_update(&hasher, &nvrtc_version, sizeof nvrtc_version);
    return raddle_hash_finish(&hasher);
}

/* True if the disk has it. Whatever is wrong with the disk is a notice, not an error. */
static bool load_from_disk(raddle_image *image, int nvrtc_version) {
    const char *folder = raddle_environment_get()->cache_dir;
    void *payload = NULL;
    size_t bytes = 0;
    if (folder[0] == '\0') {
        return false;
    }
    if (raddle_cache_load(folder, disk_key(image->key, nvrtc_version), &payload, &bytes) !=
        RADDLE_OK) {
        raddle_notice("%.400s; kernels are compiled anew", raddle_last_error()->message);
        return false;
    }
    const raddle_image_origin origin =
        nvrtc_version == VERSION_OF_BUNDLES ? RADDLE_IMAGE_FROM_BUNDLE : RADDLE_IMAGE_FROM_DISK;
    if (payload == NULL || !open_payload(image, payload, bytes, origin)) {
        raddle_free(payload);
        return false;
    }
    return true;
}

static void store_to_disk(const raddle_image *image, int nvrtc_version) {
    const char *folder = raddle_environment_get()->cache_dir;
    if (folder[0] != '\0' &&
        raddle_cache_store(folder, disk_key(image->key, nvrtc_version), image->payload,
                           image->payload_bytes, RADDLE_CACHE_LIMIT_BYTES) != RADDLE_OK) {
        raddle_notice("%.350s; kernels stay in memory and every process compiles its own. Set "
                      "RADDLE_CACHE_DIR to a folder that can be written",
                      raddle_last_error()->message);
    }
}

static raddle_status compile_image(raddle_image *image, const source_closure *closure,
                                   const char *config, const char *arch, int nvrtc_version) {
    void *code = NULL;
    size_t code_bytes = 0;
    char *log = NULL;
    const double begin = raddle_now_seconds();
    RADDLE_TRY(compile_closure(closure, config, arch, &code, &code_bytes, &log));
    raddle_status status = make_payload(image, code, code_bytes, log);
    raddle_free(code);
    raddle_free(log);
    if (status == RADDLE_OK) {
        raddle_log(2, "compiled %s for %s in %.0f ms", closure->source->name, arch,
                   1e3 * (raddle_now_seconds() - begin));
        store_to_disk(image, nvrtc_version);
    }
    return status;
}

/* Fills image; with may_compile false its payload stays NULL when the disk has nothing. */
static raddle_status build_image(raddle_image *image, const source_closure *closure,
                                 const char *config, const char *arch, bool may_compile) {
    const raddle_nvrtc_info *nvrtc = NULL;
    const int guess = raddle_nvrtc_peek_version();
    if ((guess != 0 && load_from_disk(image, guess)) || load_from_disk(image, VERSION_OF_BUNDLES)) {
        return RADDLE_OK;
    }
    if (!may_compile && guess != 0) {
        return RADDLE_OK;
    }
    if (raddle_nvrtc_get(&nvrtc) != RADDLE_OK) {
        return may_compile ? RADDLE_ERR_COMPILE : RADDLE_OK;
    }
    if (nvrtc->version != guess && load_from_disk(image, nvrtc->version)) {
        return RADDLE_OK;
    }
    return may_compile ? compile_image(image, closure, config, arch, nvrtc->version) : RADDLE_OK;
}

/* ---------------------------------------------------------------- the table */

/* All of these with slots_mutex held. */
static image_slot *find_slot(raddle_hash key) {
    for (size_t i = 0; i < num_slots; i++) {
        if (slots[i]->image.key.high == key.high && slots[i]->image.key.low == key.low) {
            return slots[i];
        }
    }
    return NULL;
}

static image_slot *add_slot(raddle_hash key) {
    if (num_slots == slots_capacity) {
        const size_t capacity = slots_capacity > 0 ? 2 * slots_capacity : 32;
        image_slot **grown = raddle_realloc(slots, capacity * sizeof *grown);
        if (grown == NULL) {
            return NULL;
        }
        slots = grown;
        slots_capacity = capacity;
    }
    image_slot *slot = raddle_alloc_zero(sizeof *slot);
    if (slot != NULL) {
        slot->image.key = key;
        slots[num_slots++] = slot;
    }
    return slot;
}

static void remove_slot(image_slot *slot) {
    for (size_t i = 0; i < num_slots; i++) {
        if (slots[i] == slot) {
            slots[i] = slots[--num_slots];
            break;
        }
    }
    raddle_free(slot);
}

/* The slot of key: a ready one, or (with *out_is_mine) a new one for the caller to build. NULL: out
 * of memory. */
static image_slot *claim_slot(raddle_hash key, bool *out_is_mine) {
    *out_is_mine = false;
    pthread_mutex_lock(&slots_mutex);
    image_slot *slot = find_slot(key);
    while (slot != NULL && !slot->is_ready) {
        pthread_cond_wait(&slots_changed, &slots_mutex);
        slot = find_slot(key); /* its builder may have failed and removed it */
    }
    if (slot == NULL) {
        slot = add_slot(key);
        *out_is_mine = slot != NULL;
    }
    pthread_mutex_unlock(&slots_mutex);
    return slot;
}

static void settle_slot(image_slot *slot, bool is_ready) {
    pthread_mutex_lock(&slots_mutex);
    slot->is_ready = is_ready;
    if (!is_ready) {
        remove_slot(slot);
    }
    pthread_cond_broadcast(&slots_changed);
    pthread_mutex_unlock(&slots_mutex);
}

static raddle_status obtain_image(const char *name, const char *config, const char *arch,
                                  bool may_compile, const raddle_image **out_image) {
    source_closure closure;
    bool is_mine = false;
    RADDLE_TRY(check_arch(arch));
    RADDLE_TRY(closure_init(&closure, name, config));
    raddle_status status = RADDLE_OK;
    image_slot *slot = claim_slot(hash_program(&closure, config, arch), &is_mine);
    if (slot == NULL) {
        status = raddle_fail_memory(sizeof *slot);
    } else if (is_mine) {
        status = build_image(&slot->image, &closure, config, arch, may_compile);
        const bool is_ready = slot->image.payload != NULL;
        settle_slot(slot, is_ready);
        slot = is_ready ? slot : NULL;
    }
    closure_fini(&closure);
    if (status == RADDLE_OK) {
        *out_image = slot != NULL ? &slot->image : NULL;
    }
    return status;
}

raddle_status raddle_image_get(const char *name, const char *config, const char *arch,
                               const raddle_image **out_image) {
    return obtain_image(name, config, arch, true, out_image);
}

raddle_status raddle_image_find(const char *name, const char *config, const char *arch,
                                const raddle_image **out_image) {
    return obtain_image(name, config, arch, false, out_image);
}

raddle_status raddle_image_adopt(raddle_hash key, const void *payload, size_t payload_bytes,
                                 bool to_disk) {
    raddle_image image = {.key = key};
    char *copy = raddle_alloc(payload_bytes);
    bool is_mine = false;
    if (copy == NULL) {
        return raddle_fail_memory(payload_bytes);
    }
    memcpy(copy, payload, payload_bytes);
    if (!open_payload(&image, copy, payload_bytes, RADDLE_IMAGE_FROM_BUNDLE)) {
        raddle_free(copy);
        return raddle_fail(RADDLE_ERR_IO, "bundle: a kernel in it has impossible lengths; it is "
                                          "damaged, make it anew with python -m raddle warmup -o");
    }
    raddle_status status = RADDLE_OK;
    if (to_disk) {
        const char *folder = raddle_environment_get()->cache_dir;
        status = raddle_cache_store(folder, disk_key(key, VERSION_OF_BUNDLES), copy, payload_bytes,
                                    RADDLE_CACHE_LIMIT_BYTES);
    }
    image_slot *slot = status == RADDLE_OK ? claim_slot(key, &is_mine) : NULL;
    if (is_mine) {
        slot->image = image;
        settle_slot(slot, true);
    } else {
        raddle_free(copy); /* known already: the first stays, since kernels were made of it */
        status = status == RADDLE_OK && slot == NULL ? raddle_fail_memory(sizeof *slot) : status;
    }
    return status;
}

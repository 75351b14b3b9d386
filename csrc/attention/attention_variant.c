/* attention_variant.c - a user's attention variant: its hooks found by name, its declarations as a C
 * struct, its arguments checked and laid out as that struct.
 *
 * The text that compilers get is
 *   #define RADDLE_HAS_LOGIT 1 ...     which hooks there are
 *   typedef struct raddle_variant { .. } raddle_variant;
 *   #line 1 "file"
 *   the user's source
 */
#include "attention/attention.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/struct.h"

enum { MAX_NAME = 64, MAX_SOURCE = 1 << 20, LINE_BYTES = 256 };

static const char HOOK_PREFIX[] = "raddle_variant_";
static const char *const hook_names[RADDLE_NUM_HOOKS] = {"query", "key",   "logit",
                                                         "mask",  "state", "output"};

/* ------------------------------------------------------------------ reading the source */

static bool is_word(char c) {
    return isalnum((unsigned char)c) || c == '_';
}

/* Where the code goes on behind a comment or a literal that starts at text; text itself when none
 * does. */
static const char *skip_quiet(const char *text) {
    if (text[0] == '/' && text[1] == '/') {
        return text + strcspn(text, "\n");
    }
    if (text[0] == '/' && text[1] == '*') {
        const char *end = strstr(text + 2, "*/");
        return end == NULL ? text + strlen(text) : end + 2;
    }
    if (text[0] == '"' || text[0] == '\'') {
        const char *at = text + 1;
        while (*at != '\0' && *at != *text && *at != '\n') {
            at += at[0] == '\\' && at[1] != '\0' ? 2 : 1;
        }
        return *at == *text ? at + 1 : at;
    }
    return text;
}

static raddle_status note_hook(const char *name, size_t length, uint32_t *hooks) {
    for (int i = 0; i < RADDLE_NUM_HOOKS; i++) {
        if (strlen(hook_names[i]) == length && strncmp(hook_names[i], name, length) == 0) {
            *hooks |= 1u << i;
            return RADDLE_OK;
        }
    }
    return raddle_fail(RADDLE_ERR_VALUE,
                       "source: there is no hook raddle_variant_%.*s; the hooks are query, key, "
                       "logit, mask, state and output",
                       (int)(length < MAX_NAME ? length : MAX_NAME), name);
}

/* Every name raddle_variant_x in front of a parenthesis is a hook. */
static raddle_status find_hooks(const char *source, uint32_t *out_hooks) {
    const size_t prefix = strlen(HOOK_PREFIX);
    uint32_t hooks = 0;
    for (const char *at = source; *at != '\0';) {
        const char *behind = skip_quiet(at);
        if (behind != at) {
            at = behind;
            continue;
        }
        size_t length = 0;
        while (is_word(at[length])) {
            length++;
        }
        const char *next = at + length;
        next += strspn(next, " \t\r\n");
        if (length > prefix && strncmp(at, HOOK_PREFIX, prefix) == 0 && *next == '(') {
            RADDLE_TRY(note_hook(at + prefix, length - prefix, &hooks));
        }
        at += length > 0 ? length : 1;
    }
    RADDLE_REQUIRE(hooks != 0, RADDLE_ERR_VALUE,
                   "source: defines no hook; write at least one of raddle_variant_query, _key, "
                   "_logit, _mask, _state and _output");
    *out_hooks = hooks;
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ declarations */

static raddle_status check_name(const char *what, const char *name) {
    RADDLE_REQUIRE(name != NULL && name[0] != '\0', RADDLE_ERR_VALUE, "%s: expected a name", what);
    size_t length = 0;
    while (is_word(name[length])) {
        length++;
    }
    RADDLE_REQUIRE(name[length] == '\0' && length < MAX_NAME && !isdigit((unsigned char)name[0]),
                   RADDLE_ERR_VALUE,
                   "%s: expected a C identifier of fewer than %d characters, got '%s'", what,
                   MAX_NAME, name);
    return RADDLE_OK;
}

static const char *c_type(raddle_dtype dtype) {
    switch (dtype) {
    case RADDLE_F32:
        return "float";
    case RADDLE_I32:
        return "int32_t";
    case RADDLE_I64:
        return "int64_t";
    case RADDLE_U8:
    case RADDLE_BOOL:
        return "uint8_t";
    default:
        return NULL;
    }
}

static raddle_status check_spec(const raddle_attention_variant_spec *spec) {
    RADDLE_TRY(check_name("name", spec->name));
    RADDLE_REQUIRE(spec->source != NULL && strlen(spec->source) < MAX_SOURCE, RADDLE_ERR_VALUE,
                   "source: expected C text of less than %d bytes", MAX_SOURCE);
    RADDLE_REQUIRE(spec->filename == NULL || (strlen(spec->filename) < LINE_BYTES - 16 &&
                                              strpbrk(spec->filename, "\"\\\n") == NULL),
                   RADDLE_ERR_VALUE,
                   "filename: expected less than %d characters, no quote, backslash or line end",
                   LINE_BYTES - 16);
    RADDLE_REQUIRE(spec->num_tensors >= 0 && spec->num_tensors <= RADDLE_VARIANT_MAX_TENSORS,
                   RADDLE_ERR_CAPACITY, "tensors: expected at most %d, got %d",
                   RADDLE_VARIANT_MAX_TENSORS, (int)spec->num_tensors);
    RADDLE_REQUIRE(spec->num_scalars >= 0 && spec->num_scalars <= RADDLE_VARIANT_MAX_SCALARS,
                   RADDLE_ERR_CAPACITY, "scalars: expected at most %d, got %d",
                   RADDLE_VARIANT_MAX_SCALARS, (int)spec->num_scalars);
    const int32_t total = spec->num_tensors + spec->num_scalars;
    for (int32_t i = 0; i < total; i++) {
        const bool is_tensor = i < spec->num_tensors;
        const raddle_attention_variant_argument *one =
            is_tensor ? &spec->tensors[i] : &spec->scalars[i - spec->num_tensors];
        RADDLE_TRY(check_name(is_tensor ? "tensors" : "scalars", one->name));
        RADDLE_REQUIRE(is_tensor ? c_type(one->dtype) != NULL
                                 : one->dtype == RADDLE_F32 || one->dtype == RADDLE_I32,
                       RADDLE_ERR_DTYPE, "%s: %s is %s, expected %s",
                       is_tensor ? "tensors" : "scalars", one->name, raddle_dtype_name(one->dtype),
                       is_tensor ? "float32, int32, int64, uint8 or bool" : "float32 or int32");
        for (int32_t k = 0; k < i; k++) {
            const char *other = k < spec->num_tensors ? spec->tensors[k].name
                                                      : spec->scalars[k - spec->num_tensors].name;
            RADDLE_REQUIRE(strcmp(other, one->name) != 0, RADDLE_ERR_VALUE,
                           "tensors, scalars: %s is declared twice", one->name);
        }
    }
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ text */

static void append(char *text, size_t bytes, const char *line) {
    const size_t used = strlen(text);
    snprintf(text + used, bytes - used, "%s", line);
}

static raddle_status write_text(const raddle_attention_variant_spec *spec,
                                raddle_attention_variant *variant) {
    const size_t lines = RADDLE_NUM_HOOKS + 8 + (size_t)(spec->num_tensors + spec->num_scalars);
    const size_t bytes = lines * LINE_BYTES + strlen(spec->source);
    char line[LINE_BYTES];
    char *text = raddle_alloc_zero(bytes);
    if (text == NULL) {
        return raddle_fail_memory(bytes);
    }
    for (int i = 0; i < RADDLE_NUM_HOOKS; i++) {
        char flag[MAX_NAME] = "";
        for (size_t c = 0; hook_names[i][c] != '\0'; c++) {
            flag[c] = (char)toupper((unsigned char)hook_names[i][c]);
        }
        snprintf(line, sizeof line, "#define RADDLE_HAS_%s %d\n", flag,
                 (int)(variant->hooks >> i & 1));
        append(text, bytes, line);
    }
    append(text, bytes, "typedef struct raddle_variant {\n");
    for (int32_t i = 0; i < spec->num_tensors; i++) {
        const raddle_attention_variant_argument *one = &spec->tensors[i];
        snprintf(line, sizeof line,
                 "    struct { %s%s *data; int64_t stride[%d]; int64_t shape[%d]; } %s;\n",
                 one->is_written ? "" : "const ", c_type(one->dtype), RADDLE_VARIANT_MAX_DIMS,
                 RADDLE_VARIANT_MAX_DIMS, one->name);
        append(text, bytes, line);
    }
    for (int32_t i = 0; i < spec->num_scalars; i++) {
        snprintf(line, sizeof line, "    %s %s;\n", c_type(spec->scalars[i].dtype),
                 spec->scalars[i].name);
        append(text, bytes, line);
    }
    if (spec->num_tensors + spec->num_scalars == 0) {
        append(text, bytes, "    int32_t nothing;\n");
    }
    append(text, bytes, "} raddle_variant;\n");
    snprintf(line, sizeof line, "#line 1 \"%s\"\n",
             spec->filename == NULL ? spec->name : spec->filename);
    append(text, bytes, line);
    append(text, bytes, spec->source);
    append(text, bytes, "\n");
    variant->text = text;
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ life */

static char *copy_text(const char *text) {
    char *copy = raddle_alloc(strlen(text) + 1);
    if (copy != NULL) {
        strcpy(copy, text);
    }
    return copy;
}

static void free_variant(raddle_attention_variant *variant) {
    for (int32_t i = 0; i < variant->num_tensors; i++) {
        raddle_free((char *)variant->tensors[i].name);
    }
    for (int32_t i = 0; i < variant->num_scalars; i++) {
        raddle_free((char *)variant->scalars[i].name);
    }
    raddle_free(variant->name);
    raddle_free(variant->text);
    raddle_free(variant);
}

static raddle_status copy_arguments(const raddle_attention_variant_argument *from, int32_t count,
                                    raddle_attention_variant_argument *to, int32_t *out_count) {
    for (int32_t i = 0; i < count; i++) {
        to[i] = from[i];
        to[i].name = copy_text(from[i].name);
        if (to[i].name == NULL) {
            return raddle_fail_memory(strlen(from[i].name) + 1);
        }
        *out_count = i + 1;
    }
    return RADDLE_OK;
}

raddle_status raddle_attention_variant_create(const raddle_attention_variant_spec *given,
                                              raddle_attention_variant **out_variant) {
    raddle_attention_variant_spec spec;
    RADDLE_TRY(raddle_struct_read("spec", given, sizeof spec, &spec));
    RADDLE_TRY(check_spec(&spec));
    uint32_t hooks = 0;
    RADDLE_TRY(find_hooks(spec.source, &hooks));
    RADDLE_REQUIRE(!spec.no_softmax || (hooks & RADDLE_HOOK_STATE) == 0, RADDLE_ERR_VALUE,
                   "source: raddle_variant_state is about the sums of a softmax, which is off");
    raddle_attention_variant *variant = raddle_alloc_zero(sizeof(*variant));
    if (variant == NULL) {
        return raddle_fail_memory(sizeof(*variant));
    }
    variant->references = 1;
    variant->hooks = hooks;
    variant->no_softmax = spec.no_softmax;
    variant->name = copy_text(spec.name);
    raddle_status status =
        variant->name == NULL ? raddle_fail_memory(strlen(spec.name)) : RADDLE_OK;
    if (status == RADDLE_OK) {
        status =
            copy_arguments(spec.tensors, spec.num_tensors, variant->tensors, &variant->num_tensors);
    }
    if (status == RADDLE_OK) {
        status =
            copy_arguments(spec.scalars, spec.num_scalars, variant->scalars, &variant->num_scalars);
    }
    if (status == RADDLE_OK) {
        status = write_text(&spec, variant);
    }
    if (status != RADDLE_OK) {
        free_variant(variant);
        return status;
    }
    *out_variant = variant;
    return RADDLE_OK;
}

raddle_attention_variant *raddle_attention_variant_retain(const raddle_attention_variant *variant) {
    raddle_attention_variant *own = (raddle_attention_variant *)variant;
    if (own != NULL) {
        __atomic_add_fetch(&own->references, 1, __ATOMIC_RELAXED);
    }
    return own;
}

void raddle_attention_variant_destroy(raddle_attention_variant *variant) {
    if (variant != NULL && __atomic_sub_fetch(&variant->references, 1, __ATOMIC_ACQ_REL) == 0) {
        free_variant(variant);
    }
}

/* ------------------------------------------------------------------ arguments of a run */

static raddle_status bind_tensor(const raddle_attention_variant_argument *declared,
                                 const raddle_tensor *tensor, raddle_device device,
                                 raddle_variant_tensor *out) {
    RADDLE_REQUIRE(tensor != NULL, RADDLE_ERR_VALUE,
                   "variant_args: the variant declares a tensor %s, got none", declared->name);
    RADDLE_TRY(raddle_tensor_check_device(tensor, device));
    RADDLE_TRY(raddle_tensor_check_dtype(tensor, declared->dtype));
    RADDLE_REQUIRE(tensor->ndim <= RADDLE_VARIANT_MAX_DIMS, RADDLE_ERR_SHAPE,
                   "%s: expected at most %d dimensions, got %d", tensor->name,
                   RADDLE_VARIANT_MAX_DIMS, (int)tensor->ndim);
    if (declared->is_written) {
        RADDLE_TRY(raddle_tensor_check_writable(tensor));
    }
    out->data = tensor->data;
    for (int i = 0; i < RADDLE_VARIANT_MAX_DIMS; i++) {
        out->stride[i] = i < tensor->ndim ? tensor->stride[i] : 0;
        out->shape[i] = i < tensor->ndim ? tensor->shape[i] : 1;
    }
    return RADDLE_OK;
}

raddle_status raddle_attention_variant_bind(const raddle_attention_variant *variant,
                                            const raddle_tensor *const *tensors,
                                            const double *scalars, raddle_device device,
                                            raddle_variant_block *out_block) {
    RADDLE_REQUIRE((variant->num_tensors == 0 || tensors != NULL) &&
                       (variant->num_scalars == 0 || scalars != NULL),
                   RADDLE_ERR_VALUE, "variant_args: variant %s takes %d tensors and %d scalars",
                   variant->name, (int)variant->num_tensors, (int)variant->num_scalars);
    char *to = out_block->bytes;
    for (int32_t i = 0; i < variant->num_tensors; i++, to += sizeof(raddle_variant_tensor)) {
        raddle_variant_tensor bound;
        RADDLE_TRY(bind_tensor(&variant->tensors[i], tensors[i], device, &bound));
        memcpy(to, &bound, sizeof bound);
    }
    for (int32_t i = 0; i < variant->num_scalars; i++, to += 4) {
        const double value = scalars[i];
        if (variant->scalars[i].dtype == RADDLE_I32) {
            RADDLE_REQUIRE(value == floor(value) && value >= INT32_MIN && value <= INT32_MAX,
                           RADDLE_ERR_VALUE, "%s: expected an integer of 32 bits, got %g",
                           variant->scalars[i].name, value);
            const int32_t whole = (int32_t)value;
            memcpy(to, &whole, 4);
        } else {
            const float number = (float)value;
            memcpy(to, &number, 4);
        }
    }
    return RADDLE_OK;
}

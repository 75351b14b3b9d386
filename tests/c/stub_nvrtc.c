/* stub_nvrtc.c - a libnvrtc that compiles nothing: it writes its books and makes a file that
 * stub_cuda.c loads. A text with "#error WORDS" fails, as the compiler would, with file and line.
 */
#include "stub.h"

#include <pthread.h>

#define EXPORT __attribute__((visibility("default")))

enum { ERROR_COMPILATION = 6 };

typedef struct program {
    char name[128], text[4096], log[256], image[256];
} program;

static stub_nvrtc_state state = {
    .major = 13,
    .minor = 0,
    .num_archs = 4,
    .archs = {80, 90, 100, 120},
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

EXPORT void *stub_nvrtc_panel(void) {
    return &state;
}

EXPORT const char *nvrtcGetErrorString(int result) {
    return result == ERROR_COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_OTHER";
}

EXPORT int nvrtcVersion(int *major, int *minor) {
    *major = state.major;
    *minor = state.minor;
    return 0;
}

EXPORT int nvrtcGetNumSupportedArchs(int *count) {
    *count = state.num_archs;
    return 0;
}

EXPORT int nvrtcGetSupportedArchs(int *archs) {
    memcpy(archs, state.archs, sizeof(int) * (size_t)state.num_archs);
    return 0;
}

EXPORT int nvrtcCreateProgram(program **made, const char *text, const char *name, int num_headers,
                              const char *const *texts, const char *const *names) {
    program *self = calloc(1, sizeof *self);
    snprintf(self->name, sizeof self->name, "%s", name);
    snprintf(self->text, sizeof self->text, "%s", text);
    pthread_mutex_lock(&mutex);
    state.num_headers = num_headers;
    state.headers[0] = '\0';
    for (int i = 0; i < num_headers; i++) {
        strncat(state.headers, names[i], sizeof state.headers - strlen(state.headers) - 2);
        strcat(state.headers, texts[i] != NULL ? " " : "?");
    }
    memcpy(state.text, self->text, sizeof state.text);
    pthread_mutex_unlock(&mutex);
    *made = self;
    return 0;
}

EXPORT int nvrtcDestroyProgram(program **self) {
    free(*self);
    *self = NULL;
    return 0;
}

EXPORT int nvrtcCompileProgram(program *self, int num_options, const char *const *options) {
    pthread_mutex_lock(&mutex);
    state.num_compiles++;
    state.num_options = num_options;
    for (int i = 0; i < num_options && i < 8; i++) {
        snprintf(state.options[i], sizeof state.options[i], "%s", options[i]);
    }
    pthread_mutex_unlock(&mutex);
    const char *error = strstr(self->text, "#error ");
    if (error != NULL) {
        snprintf(self->log, sizeof self->log, "a warning first\n%.100s(1): error: %.60s\n1 error\n",
                 self->name, error);
        return ERROR_COMPILATION;
    }
    const char *arch = strchr(options[0], '=') + 1;
    snprintf(self->image, sizeof self->image, "%s %s for %s",
             strncmp(arch, "sm_", 3) == 0 ? "CUBIN" : "PTX", self->name, arch);
    snprintf(
        self->log, sizeof self->log,
        "ptxas info    : Used 42 registers\n"
        "ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n");
    return 0;
}

static int get_size(const program *self, size_t *bytes) {
    *bytes = strlen(self->image) + 1;
    return 0;
}

static int get_image(const program *self, char *image) {
    strcpy(image, self->image);
    return 0;
}

EXPORT int nvrtcGetPTXSize(program *self, size_t *bytes) {
    return get_size(self, bytes);
}

EXPORT int nvrtcGetPTX(program *self, char *ptx) {
    return get_image(self, ptx);
}

EXPORT int nvrtcGetCUBINSize(program *self, size_t *bytes) {
    return get_size(self, bytes);
}

EXPORT int nvrtcGetCUBIN(program *self, char *cubin) {
    return get_image(self, cubin);
}

EXPORT int nvrtcGetProgramLogSize(program *self, size_t *bytes) {
    *bytes = strlen(self->log) + 1;
    return 0;
}

EXPORT int nvrtcGetProgramLog(program *self, char *log) {
    strcpy(log, self->log);
    return 0;
}

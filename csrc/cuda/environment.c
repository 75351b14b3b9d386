/* environment.c - copies the variables, so that a later setenv in the process changes nothing. */
#include "cuda/environment.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_BYTES = 4096 };

static raddle_environment environment;
static char cache_dir[PATH_BYTES], cuda_home[PATH_BYTES], cuda_path[PATH_BYTES];
static pthread_once_t environment_once = PTHREAD_ONCE_INIT;

static const char *text_of(const char *name) {
    const char *value = getenv(name);
    return value != NULL ? value : "";
}

static bool is_on(const char *name) {
    const char *value = text_of(name);
    return value[0] != '\0' && strcmp(value, "0") != 0;
}

static void copy_text(char buffer[PATH_BYTES], const char *folder, const char *below) {
    if ((size_t)snprintf(buffer, PATH_BYTES, "%s%s", folder, below) >= PATH_BYTES) {
        buffer[0] = '\0';
    }
}

static void read_environment(void) {
    const char *home = text_of("HOME");
    const char *xdg = text_of("XDG_CACHE_HOME");
    if (getenv("RADDLE_CACHE_DIR") != NULL) {
        copy_text(cache_dir, text_of("RADDLE_CACHE_DIR"), "");
    } else if (xdg[0] == '/') { /* the XDG specification has relative ones ignored */
        copy_text(cache_dir, xdg, "/raddle");
    } else if (home[0] != '\0') {
        copy_text(cache_dir, home, "/.cache/raddle");
    }
    copy_text(cuda_home, text_of("CUDA_HOME"), "");
    copy_text(cuda_path, text_of("CUDA_PATH"), "");
    environment.cache_dir = cache_dir;
    environment.cuda_home = cuda_home;
    environment.cuda_path = cuda_path;
    environment.log_level = (int)strtol(text_of("RADDLE_LOG"), NULL, 10);
    environment.check = is_on("RADDLE_CHECK");
    environment.disable_cuda = is_on("RADDLE_DISABLE_CUDA");
}

const raddle_environment *raddle_environment_get(void) {
    pthread_once(&environment_once, read_environment);
    return &environment;
}

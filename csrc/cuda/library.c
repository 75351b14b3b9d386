/* library.c - walks the places. The roots of wheels are the folders that Python passed, the one
 * that holds raddle itself, and every site-packages or dist-packages that this process has a
 * library mapped from. */
#include "cuda/library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "cuda/environment.h"

enum { MAX_ROOTS = 64, MAX_LOADED = 8 };

typedef char path_text[RADDLE_LIBRARY_PATH_BYTES];

typedef struct path_list {
    int count;
    path_text *paths;
    int capacity;
} path_list;

typedef struct search_state {
    const raddle_library_spec *spec;
    raddle_library_visitor visit;
    void *context;
    char *tried;
    size_t tried_used;
} search_state;

static pthread_mutex_t roots_mutex = PTHREAD_MUTEX_INITIALIZER;
static path_text added_roots[MAX_ROOTS];
static int num_added_roots;

/* ISO C has no conversion between the two kinds of pointers; POSIX promises that they agree. */
void (*raddle_library_symbol(void *handle, const char *name))(void) {
    void (*function)(void) = NULL;
    void *address = dlsym(handle, name);
    memcpy(&function, &address, sizeof function);
    return function;
}

void *raddle_library_open(const raddle_library_candidate *candidate, path_text reason) {
    const int flags = RTLD_LAZY | RTLD_LOCAL | (candidate->is_loaded ? RTLD_NOLOAD : 0);
    void *handle = dlopen(candidate->path, flags);
    if (handle == NULL) {
        const char *problem = dlerror();
        snprintf(reason, RADDLE_LIBRARY_PATH_BYTES, "%s", problem != NULL ? problem : "not loaded");
    }
    return handle;
}

void raddle_library_path_of(const void *address, path_text path) {
    Dl_info info;
    path[0] = '\0';
    if (dladdr(address, &info) != 0 && info.dli_fname != NULL) {
        snprintf(path, RADDLE_LIBRARY_PATH_BYTES, "%s", info.dli_fname);
    }
}

static void add_path(path_list *list, const char *path) {
    if (path[0] == '\0' || strlen(path) >= RADDLE_LIBRARY_PATH_BYTES ||
        list->count == list->capacity) {
        return;
    }
    for (int i = 0; i < list->count; i++) {
        if (strcmp(list->paths[i], path) == 0) {
            return;
        }
    }
    strcpy(list->paths[list->count++], path);
}

void raddle_library_add_root(const char *folder) {
    pthread_mutex_lock(&roots_mutex);
    path_list list = {num_added_roots, added_roots, MAX_ROOTS};
    add_path(&list, folder);
    num_added_roots = list.count;
    pthread_mutex_unlock(&roots_mutex);
}

static void append_tried(search_state *state, const char *place, const char *reason) {
    const size_t room = RADDLE_LIBRARY_TRIED_BYTES - state->tried_used;
    const int bytes = snprintf(state->tried + state->tried_used, room, "%s%s (%s)",
                               state->tried_used > 0 ? "; " : "", place, reason);
    state->tried_used += (size_t)bytes < room ? (size_t)bytes : room - 1;
}

static bool try_candidate(search_state *state, const char *path, bool is_loaded, bool is_soname) {
    const raddle_library_candidate candidate = {path, is_loaded, is_soname};
    path_text reason = "not usable";
    if (state->visit(state->context, &candidate, reason)) {
        return true;
    }
    append_tried(state, path, reason);
    return false;
}

static bool try_folder(search_state *state, const char *root, const char *below) {
    path_text folder, path;
    bool has_one = false;
    if ((size_t)snprintf(folder, sizeof folder, "%s/%s", root, below) >= sizeof folder) {
        return false;
    }
    if (access(folder, R_OK | X_OK) != 0) {
        return false; /* most places do not exist: naming them all would bury the rest */
    }
    for (const char *const *soname = state->spec->sonames; *soname != NULL; soname++) {
        const int bytes = snprintf(path, sizeof path, "%s/%s", folder, *soname);
        if ((size_t)bytes < sizeof path && access(path, R_OK) == 0) {
            has_one = true;
            if (try_candidate(state, path, false, false)) {
                return true;
            }
        }
    }
    if (!has_one) {
        append_tried(state, folder, "not in it");
    }
    return false;
}

/* The path of a line of /proc/self/maps, or NULL; cuts the newline off. */
static char *mapped_path(char *line) {
    char *path = strchr(line, '/');
    if (path != NULL) {
        path[strcspn(path, "\n")] = '\0';
    }
    return path;
}

/* One pass over the process's mappings: copies of the library, and roots of wheels. */
static void read_mappings(const char *stem, path_list *loaded, path_list *roots) {
    static const char *const root_ends[] = {"/site-packages/", "/dist-packages/"};
    FILE *file = fopen("/proc/self/maps", "re");
    char line[RADDLE_LIBRARY_PATH_BYTES + 128];
    if (file == NULL) {
        return;
    }
    while (fgets(line, sizeof line, file) != NULL) {
        char *path = mapped_path(line);
        if (path == NULL) {
            continue;
        }
        if (strncmp(strrchr(path, '/') + 1, stem, strlen(stem)) == 0) {
            add_path(loaded, path);
        }
        for (size_t i = 0; i < sizeof root_ends / sizeof *root_ends; i++) {
            char *end = strstr(path, root_ends[i]);
            if (end != NULL) {
                end[strlen(root_ends[i]) - 1] = '\0';
                add_path(roots, path);
                break;
            }
        }
    }
    fclose(file);
}

static void collect_roots(path_list *roots) {
    pthread_mutex_lock(&roots_mutex);
    for (int i = 0; i < num_added_roots; i++) {
        add_path(roots, added_roots[i]);
    }
    pthread_mutex_unlock(&roots_mutex);
    /* site-packages/raddle/_core.so: two names up. */
    path_text own;
    raddle_library_path_of(&num_added_roots, own);
    for (int level = 0; level < 2; level++) {
        char *slash = strrchr(own, '/');
        if (slash == NULL) {
            return;
        }
        *slash = '\0';
    }
    add_path(roots, own);
}

static bool try_toolkit(search_state *state, const char *home) {
#if defined(__aarch64__)
    static const char *const folders[] = {"lib64", "lib", "targets/sbsa-linux/lib", NULL};
#else
    static const char *const folders[] = {"lib64", "lib", "targets/x86_64-linux/lib", NULL};
#endif
    for (const char *const *folder = folders; home[0] != '\0' && *folder != NULL; folder++) {
        if (try_folder(state, home, *folder)) {
            return true;
        }
    }
    return false;
}

static bool search_places(search_state *state, const path_list *loaded, const path_list *roots) {
    const raddle_environment *environment = raddle_environment_get();
    for (int i = 0; i < loaded->count; i++) {
        if (try_candidate(state, loaded->paths[i], true, false)) {
            return true;
        }
    }
    for (int i = 0; i < roots->count; i++) {
        for (const char *const *folder = state->spec->wheel_folders; *folder != NULL; folder++) {
            if (try_folder(state, roots->paths[i], *folder)) {
                return true;
            }
        }
    }
    if (try_toolkit(state, environment->cuda_home) || try_toolkit(state, environment->cuda_path)) {
        return true;
    }
    for (const char *const *soname = state->spec->sonames; *soname != NULL; soname++) {
        if (try_candidate(state, *soname, false, true)) {
            return true;
        }
    }
    return try_toolkit(state, "/usr/local/cuda");
}

bool raddle_library_search(const raddle_library_spec *spec, raddle_library_visitor visit,
                           void *context, char tried[RADDLE_LIBRARY_TRIED_BYTES]) {
    search_state state = {spec, visit, context, tried, 0};
    tried[0] = '\0';
    path_text *paths = raddle_alloc(sizeof(path_text) * (MAX_ROOTS + MAX_LOADED));
    if (paths == NULL) {
        append_tried(&state, spec->stem, "out of memory");
        return false;
    }
    path_list loaded = {0, paths, MAX_LOADED};
    path_list roots = {0, paths + MAX_LOADED, MAX_ROOTS};
    collect_roots(&roots);
    read_mappings(spec->stem, &loaded, &roots);
    const bool found = search_places(&state, &loaded, &roots);
    raddle_free(paths);
    return found;
}

/* compile.c - runs the compiler in a folder of its own, reads what it made, loads objects.
 *
 * An object is loaded from memory that only this process has (memfd), whose descriptor stays open:
 * the loader knows objects by their path, so that no path may come twice. Where there is no memfd, a
 * file in the temporary folder serves, and is removed at once.
 */
#include "cpu/compile.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/io.h"
#include "cpu/isa.h"

extern char **environ;

enum { PATH_BYTES = 4096, MAX_WORDS = 64, COMMAND_BYTES = 1024, LINE_BYTES = 512 };

static const char *const compile_flags[] = {
    "-std=c11",
    "-O3",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    /* C++ refuses these, and so does NVRTC. */
    "-Werror=implicit-function-declaration",
    "-Werror=int-conversion",
    "-Werror=incompatible-pointer-types",
    "-Werror=return-type",
};

static const char *const level_flags[RADDLE_ISA_COUNT] = {
    [RADDLE_ISA_AVX2] = "-mavx2 -mfma -mf16c",
    [RADDLE_ISA_AVX512] = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
    [RADDLE_ISA_AVX512BF16] = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
};

/* The words of a command line. */
typedef struct word_list {
    char text[COMMAND_BYTES];
    char *words[MAX_WORDS + 1]; /* NULL behind the last */
    int count;
} word_list;

/* ---------------------------------------------------------------- the command */

static pthread_once_t command_once = PTHREAD_ONCE_INIT;
static word_list command; /* the compiler and its flags, up to -o */
static char signature[2 * COMMAND_BYTES];

/* Adds the words of text, which must fit: false when they do not. */
static bool add_words(word_list *list, const char *text) {
    const size_t used = list->count == 0 ? 0
                                         : (size_t)(list->words[list->count - 1] - list->text) +
                                               strlen(list->words[list->count - 1]) + 1;
    if (used + strlen(text) + 1 > sizeof list->text) {
        return false;
    }
    char *at = list->text + used;
    memcpy(at, text, strlen(text) + 1);
    for (at += strspn(at, " \t"); *at != '\0'; at += strspn(at, " \t")) {
        if (list->count == MAX_WORDS) {
            return false;
        }
        list->words[list->count++] = at;
        at += strcspn(at, " \t");
        if (*at != '\0') {
            *at++ = '\0';
        }
    }
    return true;
}

static void read_command(void) {
    const char *named = getenv("CC");
    const char *level = level_flags[raddle_isa_get()];
    bool fits = named != NULL && add_words(&command, named);
    if (!fits || command.count == 0) {
        command = (word_list){.count = 0};
        add_words(&command, "cc");
    }
    for (size_t i = 0; i < sizeof compile_flags / sizeof *compile_flags; i++) {
        add_words(&command, compile_flags[i]);
    }
    add_words(&command, level == NULL ? "" : level);
    for (int i = 0; i < command.count; i++) {
        const size_t used = strlen(signature);
        snprintf(signature + used, sizeof signature - used, "%s ", command.words[i]);
    }
}

const char *raddle_compile_signature(void) {
    pthread_once(&command_once, read_command);
    return signature;
}

/* ---------------------------------------------------------------- files */

static raddle_status fail_io(const char *doing, const char *path) {
    return raddle_fail(RADDLE_ERR_IO, "variant: cannot %s %.600s: %s", doing, path,
                       strerror(errno));
}

/* All of a file, with a NUL behind it. */
static raddle_status read_file(const char *path, char **out_data, size_t *out_bytes) {
    struct stat info;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &info) != 0) {
        const raddle_status status = fail_io("read", path);
        if (file >= 0) {
            close(file);
        }
        return status;
    }
    const size_t bytes = (size_t)info.st_size;
    char *data = raddle_alloc(bytes + 1);
    size_t done = 0;
    while (data != NULL && done < bytes) {
        const ssize_t got = read(file, data + done, bytes - done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            break;
        }
        done += (size_t)got;
    }
    close(file);
    if (data == NULL) {
        return raddle_fail_memory(bytes + 1);
    }
    data[done] = '\0';
    *out_data = data;
    *out_bytes = done;
    return RADDLE_OK;
}

static raddle_status write_file(const char *path, const void *data, size_t bytes) {
    const int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0) {
        return fail_io("make", path);
    }
    const bool is_written = raddle_write_all(file, data, bytes);
    const raddle_status status = is_written ? RADDLE_OK : fail_io("write", path);
    close(file);
    return status;
}

/* A folder that only this user may look into. */
static raddle_status make_private_folder(char path[PATH_BYTES]) {
    const char *const parents[] = {getenv("TMPDIR"), "/tmp", "/var/tmp"};
    for (size_t i = 0; i < sizeof parents / sizeof *parents; i++) {
        if (parents[i] != NULL && parents[i][0] != '\0' &&
            snprintf(path, PATH_BYTES, "%.3000s/raddle-XXXXXX", parents[i]) > 0 &&
            mkdtemp(path) != NULL) {
            return RADDLE_OK;
        }
    }
    return raddle_fail(RADDLE_ERR_IO, "variant: there is no temporary folder to compile it in; set "
                                      "TMPDIR to one that can be written");
}

static void join(char path[PATH_BYTES], const char *folder, const char *name) {
    snprintf(path, PATH_BYTES, "%.3500s/%s", folder, name);
}

/* ---------------------------------------------------------------- running the compiler */

/* A copy of the environment in which messages are in English, so that an error can be found in them.
 * The strings are the environment's own. */
static char **english_environment(void) {
    static char all[] = "LC_ALL=C";
    size_t count = 0;
    while (environ[count] != NULL) {
        count++;
    }
    char **copy = raddle_alloc((count + 2) * sizeof *copy);
    size_t kept = 0;
    for (size_t i = 0; copy != NULL && i < count; i++) {
        if (strncmp(environ[i], "LC_ALL=", 7) != 0 && strncmp(environ[i], "LANGUAGE=", 9) != 0) {
            copy[kept++] = environ[i];
        }
    }
    if (copy != NULL) {
        copy[kept++] = all;
        copy[kept] = NULL;
    }
    return copy;
}

/* 0, or the errno of what kept the compiler from starting. */
static int spawn_compiler(char *const argv[], const char *source, const char *log, pid_t *out_pid) {
    posix_spawn_file_actions_t actions;
    char **environment = english_environment();
    if (environment == NULL) {
        return ENOMEM;
    }
    int error = posix_spawn_file_actions_init(&actions);
    if (error == 0) {
        error = posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, source, O_RDONLY, 0);
        if (error == 0) {
            error = posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, log,
                                                     O_WRONLY | O_CREAT | O_TRUNC, 0600);
        }
        if (error == 0) {
            error = posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
        }
        if (error == 0) {
            error = posix_spawnp(out_pid, argv[0], &actions, NULL, argv, environment);
        }
        posix_spawn_file_actions_destroy(&actions);
    }
    raddle_free(environment);
    return error;
}

/* Whether the child ended well; as far as can be known where the program reaps all its children. */
static bool wait_for(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0) {
        if (errno != EINTR) {
            return errno == ECHILD;
        }
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static raddle_status fail_compile(const raddle_compile_program *program, const char *log_path) {
    char *log = NULL;
    char line[LINE_BYTES];
    size_t bytes = 0;
    RADDLE_TRY(read_file(log_path, &log, &bytes));
    raddle_first_error_line(log, line, sizeof line);
    raddle_fail_log(RADDLE_ERR_COMPILE, log,
                    "%s does not compile with %s: %s; the whole log is in the error's log "
                    "attribute",
                    program->name, command.words[0], line);
    raddle_free(log);
    return RADDLE_ERR_COMPILE;
}

static raddle_status fail_spawn(const raddle_compile_program *program, int error) {
    if (error != ENOENT && error != EACCES) {
        return raddle_fail(RADDLE_ERR_IO, "%s: the C compiler %s does not start: %s", program->name,
                           command.words[0], strerror(error));
    }
    return raddle_fail(RADDLE_ERR_UNSUPPORTED,
                       "%s: on the CPU variants are compiled by a C compiler, and there is no %s "
                       "here; install one (apt install gcc, dnf install gcc, apk add gcc musl-dev) "
                       "or name one in the environment variable CC",
                       program->name, command.words[0]);
}

static raddle_status compile_in(const raddle_compile_program *program, const char *folder,
                                void **out_object, size_t *out_bytes) {
    char source[PATH_BYTES], object[PATH_BYTES], log[PATH_BYTES];
    char *argv[MAX_WORDS + 8];
    int count = 0;
    pid_t pid = 0;
    join(source, folder, "text.c");
    join(object, folder, "object.so");
    join(log, folder, "log");
    raddle_compile_signature();
    for (; count < command.count; count++) {
        argv[count] = command.words[count];
    }
    char *const last[] = {"-x", "c", "-", "-o", object, "-lm", NULL};
    memcpy(argv + count, last, sizeof last);
    raddle_status status = write_file(source, program->text, strlen(program->text));
    if (status == RADDLE_OK) {
        const int error = spawn_compiler(argv, source, log, &pid);
        status = error == 0 ? RADDLE_OK : fail_spawn(program, error);
    }
    if (status == RADDLE_OK) {
        char *data = NULL;
        if (!wait_for(pid) || access(object, R_OK) != 0) {
            status = fail_compile(program, log);
        } else if ((status = read_file(object, &data, out_bytes)) == RADDLE_OK) {
            *out_object = data;
        }
    }
    unlink(source);
    unlink(object);
    unlink(log);
    return status;
}

raddle_status raddle_compile(const raddle_compile_program *program, void **out_object,
                             size_t *out_bytes) {
    char folder[PATH_BYTES];
    RADDLE_TRY(make_private_folder(folder));
    const raddle_status status = compile_in(program, folder, out_object, out_bytes);
    rmdir(folder);
    return status;
}

/* ---------------------------------------------------------------- loading */

/* NULL where the system has no such memory, or lets nothing be run from it. */
static void *load_from_memory(const void *object, size_t bytes) {
    void *handle = NULL;
#ifdef MFD_CLOEXEC
    char path[64];
    const int file = memfd_create("raddle-variant", MFD_CLOEXEC);
    if (file >= 0 && raddle_write_all(file, object, bytes)) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
        handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    if (file >= 0 && handle == NULL) {
        close(file);
    }
#else
    (void)object;
    (void)bytes;
#endif
    return handle;
}

static raddle_status load_from_file(const char *name, const void *object, size_t bytes,
                                    void **out_handle) {
    char folder[PATH_BYTES], path[PATH_BYTES];
    RADDLE_TRY(make_private_folder(folder));
    join(path, folder, "object.so");
    raddle_status status = write_file(path, object, bytes);
    if (status == RADDLE_OK) {
        *out_handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (*out_handle == NULL) {
            const char *reason = dlerror();
            status = raddle_fail_log(RADDLE_ERR_COMPILE, reason == NULL ? "" : reason,
                                     "%s compiles, but does not load: %s", name,
                                     reason == NULL ? "no reason given" : reason);
        }
    }
    unlink(path);
    rmdir(folder);
    return status;
}

raddle_status raddle_compile_load(const char *name, const void *object, size_t bytes,
                                  const char *symbol, void **out_address) {
    void *handle = load_from_memory(object, bytes);
    if (handle == NULL) {
        RADDLE_TRY(load_from_file(name, object, bytes, &handle));
    }
    void *address = dlsym(handle, symbol);
    if (address == NULL) {
        dlclose(handle);
        return raddle_fail(RADDLE_ERR_COMPILE, "%s compiles, but has no symbol %s", name, symbol);
    }
    *out_address = address;
    return RADDLE_OK;
}

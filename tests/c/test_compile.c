// needs: base/status.c base/alloc.c base/io.c cpu/isa.c cpu/compile.c
/* test_compile.c - C text to functions by the machine's compiler: what comes out runs, what is wrong
 * is told, nothing stays behind. Where there is no compiler, the message says so. */
#include <dirent.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "check.h"
#include "cpu/compile.h"

typedef int (*add_function)(int);

static bool has_compiler(void) {
    return system("cc --version > /dev/null 2>&1") == 0;
}

static int count_files(const char *folder) {
    int count = 0;
    DIR *listing = opendir(folder);
    while (listing != NULL && readdir(listing) != NULL) {
        count++;
    }
    if (listing != NULL) {
        closedir(listing);
    }
    return count - 2; /* . and .. */
}

/* Two objects of the same size and name are told apart. */
static void test_two_objects(void) {
    static const char *const texts[2] = {
        "__attribute__((visibility(\"default\"))) int add(int x);\n"
        "int add(int x) { return x + 1; }\n",
        "__attribute__((visibility(\"default\"))) int add(int x);\n"
        "int add(int x) { return x + 2; }\n"};
    add_function add[2];
    for (int i = 0; i < 2; i++) {
        const raddle_compile_program program = {"two objects", texts[i]};
        void *object = NULL, *address = NULL;
        size_t bytes = 0;
        CHECK_INT(raddle_compile(&program, &object, &bytes), RADDLE_OK);
        CHECK_INT(raddle_compile_load("two objects", object, bytes, "add", &address), RADDLE_OK);
        raddle_free(object);
        memcpy(&add[i], &address, sizeof address);
    }
    CHECK_INT(add[0](40), 41);
    CHECK_INT(add[1](40), 42);
}

static void test_wrong_text(void) {
    const raddle_compile_program program = {"variant wrong",
                                            "int a;\n#line 7 \"mine.c\"\nint add(int x) {\n"
                                            "    return y;\n}\n"};
    void *object = NULL;
    size_t bytes = 0;
    CHECK_INT(raddle_compile(&program, &object, &bytes), RADDLE_ERR_COMPILE);
    CHECK(object == NULL);
    CHECK(strstr(raddle_last_error()->message, "variant wrong does not compile with cc") != NULL);
    CHECK(strstr(raddle_last_error()->message, "mine.c:8") != NULL);
    CHECK(strstr(raddle_last_error()->log, "mine.c:8") != NULL);
    const raddle_compile_program undeclared = {"undeclared", "int f(void) { return g(); }\n"};
    CHECK_INT(raddle_compile(&undeclared, &object, &bytes), RADDLE_ERR_COMPILE);
}

static void test_wrong_object(void) {
    void *object = NULL, *address = NULL;
    size_t bytes = 0;
    CHECK_INT(raddle_compile_load("noise", "noise", 5, "add", &address), RADDLE_ERR_COMPILE);
    CHECK(strstr(raddle_last_error()->message, "does not load") != NULL);
    const raddle_compile_program program = {"empty", "typedef int nothing;\n"};
    CHECK_INT(raddle_compile(&program, &object, &bytes), RADDLE_OK);
    CHECK_INT(raddle_compile_load("empty", object, bytes, "add", &address), RADDLE_ERR_COMPILE);
    CHECK(strstr(raddle_last_error()->message, "no symbol add") != NULL);
    const raddle_compile_program missing = {
        "missing", "int elsewhere(void);\nint add(void);\nint add(void) { return elsewhere(); }\n"
                   "extern __attribute__((visibility(\"default\"))) int (*keep)(void);\n"
                   "int (*keep)(void) = add;\n"};
    raddle_free(object);
    object = NULL;
    CHECK_INT(raddle_compile(&missing, &object, &bytes), RADDLE_OK);
    CHECK_INT(raddle_compile_load("missing", object, bytes, "keep", &address), RADDLE_ERR_COMPILE);
    CHECK(strstr(raddle_last_error()->message, "elsewhere") != NULL);
    raddle_free(object);
}

/* In a child: the command is read once. */
static int check_missing(const char *compiler) {
    const raddle_compile_program program = {"variant v", "typedef int nothing;\n"};
    void *object = NULL;
    size_t bytes = 0;
    setenv("CC", compiler, 1);
    if (raddle_compile(&program, &object, &bytes) != RADDLE_ERR_UNSUPPORTED || object != NULL) {
        return 1;
    }
    const char *message = raddle_last_error()->message;
    return strstr(message, "no-such-cc") != NULL && strstr(message, "install") != NULL ? 0 : 2;
}

static void test_no_compiler(void) {
    fflush(stdout);
    const pid_t pid = fork();
    if (pid == 0) {
        _exit(check_missing("no-such-cc -O2"));
    }
    int status = -1;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    CHECK_INT(WEXITSTATUS(status), 0);
}

int main(void) {
    char folder[] = "compile-XXXXXX";
    CHECK(mkdtemp(folder) != NULL);
    setenv("TMPDIR", folder, 1);
    unsetenv("CC");
    test_no_compiler();
    if (has_compiler()) {
        test_two_objects();
        test_wrong_text();
        test_wrong_object();
        CHECK(strstr(raddle_compile_signature(), "cc -std=c11 ") != NULL);
    }
    CHECK_INT(count_files(folder), 0);
    CHECK(rmdir(folder) == 0);
    return check_report();
}

/* compile.h - C text to functions of this process, by the machine's C compiler. Knows no family and
 * no cache: what is made are the bytes of a shared object, which may come from elsewhere next time.
 *
 * The compiler is $CC, split at blanks, or cc. It is run by an argument vector, never by a shell;
 * the text goes in as a file on its standard input. Code is made for the level of isa.h and no more,
 * so that the bytes run on whatever else has this level.
 */
#ifndef RADDLE_CPU_COMPILE_H
#define RADDLE_CPU_COMPILE_H

#include "base/status.h"

/* One translation unit, that includes nothing but system headers. */
typedef struct raddle_compile_program {
    const char *name; /* for messages */
    const char *text;
} raddle_compile_program;

/* Everything that makes the code besides the text: compiler, flags, level. For cache keys. */
const char *raddle_compile_signature(void);
/* RADDLE_ERR_UNSUPPORTED: there is no compiler, and the message says how to get one.
 * RADDLE_ERR_COMPILE: the message has the first error, which #line leads to the text's own file, the
 * record has the whole log. The object is the caller's to raddle_free. */
raddle_status raddle_compile(const raddle_compile_program *program, void **out_object,
                             size_t *out_bytes);
/* Loads such bytes, for the life of the process, and finds a symbol in them. */
raddle_status raddle_compile_load(const char *name, const void *object, size_t bytes,
                                  const char *symbol, void **out_address);

#endif

/* library.h - where a CUDA library may lie on a machine, in one order for all of them.
 *
 * 1. a copy that this process has loaded already (torch's, say); 2. wheels beside raddle, torch or
 * numpy (site-packages/nvidia/..); 3. CUDA_HOME, CUDA_PATH; 4. the system loader; 5.
 * /usr/local/cuda. Nothing is opened here: a visitor gets one candidate after the other and says
 * which it takes. Every place and what was wrong with it is written down for the error text and for
 * doctor.
 */
#ifndef RADDLE_CUDA_LIBRARY_H
#define RADDLE_CUDA_LIBRARY_H

#include "base/status.h"

enum { RADDLE_LIBRARY_PATH_BYTES = 1024, RADDLE_LIBRARY_TRIED_BYTES = 4096 };

typedef struct raddle_library_spec {
    const char *stem;                 /* "libnvrtc.so": the names of loaded copies begin with it */
    const char *const *sonames;       /* best first, NULL behind the last */
    const char *const *wheel_folders; /* below site-packages, NULL behind the last */
} raddle_library_spec;

typedef struct raddle_library_candidate {
    const char *path; /* of a file that exists, or a bare soname for the system loader */
    bool is_loaded;
    bool is_soname;
} raddle_library_candidate;

/* True takes the candidate and ends the search; else reason says what is wrong with it. */
typedef bool (*raddle_library_visitor)(void *context, const raddle_library_candidate *candidate,
                                       char reason[RADDLE_LIBRARY_PATH_BYTES]);

/* False when no candidate was taken. tried: one place and reason after the other, "; " between. */
bool raddle_library_search(const raddle_library_spec *spec, raddle_library_visitor visit,
                           void *context, char tried[RADDLE_LIBRARY_TRIED_BYTES]);
/* Opens a candidate; NULL with the loader's words in reason. A visitor that takes it keeps it open for
 * the life of the process, one that does not closes it. */
void *raddle_library_open(const raddle_library_candidate *candidate,
                          char reason[RADDLE_LIBRARY_PATH_BYTES]);
/* One more folder that may hold nvidia/ wheels (an entry of sys.path). Does not touch the disk. */
void raddle_library_add_root(const char *folder);
/* The file that address (of a function of the library) was loaded from; "" when unknown. */
void raddle_library_path_of(const void *address, char path[RADDLE_LIBRARY_PATH_BYTES]);
/* A function address as a pointer to code: ISO C has no cast from void * to one. */
void (*raddle_library_symbol(void *handle, const char *name))(void);

#endif

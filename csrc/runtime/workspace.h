/* workspace.h - scratch memory with a reference count: the maker and every bound plan hold one. */
#ifndef RADDLE_RUNTIME_WORKSPACE_H
#define RADDLE_RUNTIME_WORKSPACE_H

#include "runtime/backend.h"

struct raddle_workspace {
    int refs; /* accessed atomically */
    raddle_device device;
    void *data;
    size_t bytes;
    void (*release)(void *context); /* NULL for memory that raddle owns, or that needs no word */
    void *context;
    bool owned;
};

raddle_workspace *raddle_workspace_retain(raddle_workspace *workspace);

#endif

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

/* Scratch owned by raddle. */
raddle_status raddle_workspace_create(raddle_device device, size_t bytes,
                                      raddle_workspace **out_workspace);
/* Scratch lent by the caller; release(context) runs when the last user is gone. release may be
 * NULL. */
raddle_status raddle_workspace_wrap(raddle_device device, void *data, size_t bytes,
                                    void (*release)(void *), void *context,
                                    raddle_workspace **out_workspace);
raddle_workspace *raddle_workspace_retain(raddle_workspace *workspace);
void raddle_workspace_destroy(raddle_workspace *workspace);
size_t raddle_workspace_bytes(const raddle_workspace *workspace);

#endif

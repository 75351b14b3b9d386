/* stub_work.h - what stub_cuda.c queues, captures and replays, and what is behind the driver's
 * opaque types. For that file alone. */
#ifndef RADDLE_TESTS_STUB_WORK_H
#define RADDLE_TESTS_STUB_WORK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "cuda/driver.h"

typedef enum work_kind { WORK_COPY, WORK_FILL, WORK_EVENT, WORK_LAUNCH } work_kind;

typedef struct work {
    struct work *next;
    work_kind kind;
    void *dst;
    const void *src;
    size_t bytes;
    unsigned char value;
    CUevent event;
    uint64_t mark; /* of the event's record */
    int device;
    CUresult result; /* not SUCCESS: fails when it runs */
} work;

typedef struct work_list {
    work *first, *last;
    size_t count;
} work_list;

struct CUctx_st {
    int device;
};
struct CUstream_st {
    bool is_capturing, is_broken;
    work_list captured;
};
struct CUevent_st {
    uint64_t recorded, done;
    CUstream captured_on;
};
struct CUmod_st {
    int refs;
};
struct CUfunc_st {
    char name[64];
    struct CUfunc_st *next;
};
struct CUgraph_st {
    work_list nodes;
};
struct CUgraphExec_st {
    work_list nodes;
};

static void append(work_list *list, work item) {
    work *copy = malloc(sizeof *copy);
    *copy = item;
    copy->next = NULL;
    if (list->last != NULL) {
        list->last->next = copy;
    } else {
        list->first = copy;
    }
    list->last = copy;
    list->count++;
}

static void clear(work_list *list) {
    while (list->first != NULL) {
        work *next = list->first->next;
        free(list->first);
        list->first = next;
    }
    *list = (work_list){0};
}

#endif

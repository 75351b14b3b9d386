/* stub.h - the control panels of the stub libraries libcuda, libnvrtc and libcublasLt (stub_*.c).
 *
 * The stubs keep the driver's books (allocations, contexts, captures, queued work) on the host, so
 * that launch code runs, and is held to the driver's rules, on machines without a GPU. A test finds
 * a panel by stub_cuda(), stub_nvrtc() and stub_cublaslt().
 */
#ifndef RADDLE_TESTS_STUB_H
#define RADDLE_TESTS_STUB_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct stub_launch {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    int num_attributes;
    int attribute_ids[4];
    unsigned cluster[3];
    int programmatic;
    char function[64];
    unsigned char params[64]; /* first bytes of the one argument */
} stub_launch;

typedef struct stub_cuda_state { /* tests/stub_driver.py has its beginning, too */
    /* What the machine has. */
    int version, num_devices, arch, init_result;
    size_t free_bytes;
    /* Failure to inject: the skip-th next call of this function answers result; once. */
    const char *fail_function;
    int fail_skip, fail_result;
    /* What the next work answers when it runs, whose call succeeds; once. Its context is lost with
     * it: nothing else there runs, and calls answer lost[device]. */
    int fail_work, lost[2];
    /* Work is queued and only run when somebody waits for it (default: at once). */
    bool is_lazy;
    /* Books. */
    _Atomic int calls; /* of anything */
    int num_allocs, live_allocs, live_host_allocs, live_events, live_streams, live_graphs,
        live_execs, live_modules, num_modules_loaded;
    int num_launches, num_graph_launches, num_syncs, num_event_syncs, num_stream_waits,
        num_context_syncs;
    int num_invalidated; /* captures that a forbidden call broke */
    int context_depth;   /* pushes without pop, all threads */
    stub_launch launch;  /* the last one */
    size_t last_graph_nodes;
    int max_dynamic_shared;
} stub_cuda_state;

typedef struct stub_nvrtc_state {
    int major, minor, num_archs, archs[16];
    _Atomic int num_compiles;
    char options[8][96]; /* of the last compile */
    int num_options, num_headers;
    char headers[512]; /* names, each followed by a space */
    char text[4096];
} stub_nvrtc_state;

typedef struct stub_cublaslt_state {
    int version, fail_create, has_no_kernel;
    int num_handles, live_descriptions, num_heuristics, num_products;
    unsigned alignments[4]; /* of the last choice: A, B, C, D */
    unsigned reductions;    /* that the last heuristic might choose from */
    int num_sms;            /* of the last product: what it was asked to fit in, or 0 */
    void *stream, *workspace;
} stub_cublaslt_state;

static inline void *stub_panel(const char *library, const char *function) {
    void *handle = dlopen(library, RTLD_NOW);
    void *(*panel)(void) = NULL;
    void *address = handle != NULL ? dlsym(handle, function) : NULL;
    if (address == NULL) {
        printf("no stub %s: %s\n", library, dlerror());
        exit(2);
    }
    memcpy(&panel, &address, sizeof panel);
    return panel();
}

static inline stub_cuda_state *stub_cuda(void) {
    return stub_panel("libcuda.so.1", "stub_cuda_panel");
}

static inline stub_nvrtc_state *stub_nvrtc(void) {
    return stub_panel("libnvrtc.so.13", "stub_nvrtc_panel");
}

static inline stub_cublaslt_state *stub_cublaslt(void) {
    return stub_panel("libcublasLt.so.13", "stub_cublaslt_panel");
}

static inline void stub_fail(const char *function, int skip, int result) {
    stub_cuda_state *state = stub_cuda();
    state->fail_function = function;
    state->fail_skip = skip;
    state->fail_result = result;
}

#endif

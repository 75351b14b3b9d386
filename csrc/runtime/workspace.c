/* workspace.c - scratch memory: owned, or lent by the caller with a word to say when it is free
 * again. */
#include "runtime/workspace.h"

#include "base/alloc.h"
#include "base/tensor.h"

static raddle_status make_workspace(raddle_device device, raddle_workspace **out_workspace) {
    raddle_workspace *workspace = raddle_alloc_zero(sizeof *workspace);
    if (workspace == NULL) {
        return raddle_fail_memory(sizeof *workspace);
    }
    workspace->refs = 1;
    workspace->device = device;
    *out_workspace = workspace;
    return RADDLE_OK;
}

raddle_status raddle_workspace_create(raddle_device device, size_t bytes,
                                      raddle_workspace **out_workspace) {
    const raddle_backend *backend = NULL;
    RADDLE_TRY(raddle_backend_for(device, &backend));
    void *data = NULL;
    RADDLE_TRY(backend->alloc(device.index, bytes, &data));
    raddle_workspace *workspace = NULL;
    raddle_status status = make_workspace(device, &workspace);
    if (status != RADDLE_OK) {
        backend->free(device.index, data);
        return status;
    }
    workspace->data = data;
    workspace->bytes = bytes;
    workspace->owned = true;
    *out_workspace = workspace;
    return RADDLE_OK;
}

raddle_status raddle_workspace_wrap(raddle_device device, void *data, size_t bytes,
                                    void (*release)(void *), void *context,
                                    raddle_workspace **out_workspace) {
    const raddle_backend *backend = NULL;
    RADDLE_TRY(raddle_backend_for(device, &backend));
    RADDLE_REQUIRE(data != NULL || bytes == 0, RADDLE_ERR_VALUE,
                   "workspace: expected memory, got a null pointer for %zu bytes", bytes);
    raddle_workspace *workspace = NULL;
    RADDLE_TRY(make_workspace(device, &workspace));
    workspace->data = data;
    workspace->bytes = bytes;
    workspace->release = release;
    workspace->context = context;
    *out_workspace = workspace;
    return RADDLE_OK;
}

raddle_workspace *raddle_workspace_retain(raddle_workspace *workspace) {
    if (workspace != NULL) {
        __atomic_add_fetch(&workspace->refs, 1, __ATOMIC_RELAXED);
    }
    return workspace;
}

void raddle_workspace_destroy(raddle_workspace *workspace) {
    if (workspace == NULL || __atomic_sub_fetch(&workspace->refs, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    if (workspace->owned) {
        const raddle_backend *backend =
            workspace->device.type == RADDLE_CPU ? &raddle_backend_cpu : &raddle_backend_cuda;
        backend->free(workspace->device.index, workspace->data);
    }
    if (workspace->release != NULL) {
        workspace->release(workspace->context);
    }
    raddle_free(workspace);
}

size_t raddle_workspace_bytes(const raddle_workspace *workspace) {
    return workspace->bytes;
}

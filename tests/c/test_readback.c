// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c runtime/backend.c runtime/backend_cuda.c runtime/readback.c runtime/transfer.c
// shared: libcuda.so.1=stub_cuda.c
/* test_readback.c - results read while the device goes on, with a driver that runs nothing before
 * somebody waits: a slot that were read too early would show. */
#include "check.h"
#include "stub.h"

#include "base/alloc.h"
#include "cuda/device.h"
#include "runtime/readback.h"

enum { BYTES = 4096, ROUNDS = 12 };

static const raddle_device gpu = {RADDLE_CUDA, 0};

/* The device block changes behind every copy; two copies are under way at once. */
static void test_ring(void) {
    stub_cuda_state *cuda = stub_cuda();
    const raddle_backend *backend = &raddle_backend_cuda;
    raddle_readback readback;
    void *source = NULL;
    const void *data = NULL;
    size_t bytes = 0;
    CHECK_OK(raddle_readback_init(&readback, gpu, BYTES));
    CHECK_OK(backend->alloc(0, BYTES, &source));
    cuda->is_lazy = true;
    CHECK_OK(backend->fill(0, source, 1, BYTES, NULL));
    CHECK_OK(raddle_readback_start(&readback, source, BYTES, NULL));
    for (int i = 2; i <= ROUNDS; i++) {
        const size_t size = (size_t)BYTES / (size_t)i;
        CHECK_OK(backend->fill(0, source, (uint8_t)i, BYTES, NULL));
        CHECK_OK(raddle_readback_start(&readback, source, size, NULL));
        CHECK_FAILS(raddle_readback_start(&readback, source, 1, NULL), RADDLE_ERR_STATE,
                    "2 copies were started and none was waited for");
        CHECK_OK(raddle_readback_wait(&readback, &data, &bytes));
        CHECK(bytes == (i == 2 ? (size_t)BYTES : (size_t)BYTES / (size_t)(i - 1)));
        CHECK(is_filled(data, bytes, (unsigned char)(i - 1)));
    }
    CHECK_OK(raddle_readback_wait(&readback, &data, &bytes));
    CHECK(is_filled(data, bytes, ROUNDS));
    CHECK_FAILS(raddle_readback_wait(&readback, &data, &bytes), RADDLE_ERR_STATE,
                "no copy was started");
    CHECK_FAILS(raddle_readback_start(&readback, source, BYTES + 1, NULL), RADDLE_ERR_CAPACITY,
                "do not fit its 4096");

    /* Ending with a copy in flight waits for it. */
    CHECK_OK(raddle_readback_start(&readback, source, BYTES, NULL));
    raddle_readback_fini(&readback);
    raddle_readback_fini(&readback); /* twice is once */
    cuda->is_lazy = false;
    backend->free(0, source);
    CHECK_INT(cuda->live_allocs + cuda->live_host_allocs + cuda->live_events, 0);
}

int main(void) {
    test_ring();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

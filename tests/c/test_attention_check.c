// needs: base/*.c cuda/driver.c cuda/device.c cuda/environment.c cuda/library.c runtime/backend.c runtime/backend_cuda.c attention/attention_check.c
// shared: libcuda.so.1=stub_cuda.c
/* test_attention_check.c - RADDLE_CHECK: what a kernel reported reaches the next call, once. */
#include "check.h"
#include "stub.h"

#include "attention/attention.h"
#include "base/alloc.h"

static void test_device(raddle_device device) {
    raddle_attention_plan plan = {.base = {.device = device}};
    CHECK_OK(raddle_backend_for(device, &plan.base.backend));
    CHECK_OK(raddle_attention_check_init(&plan));
    CHECK_INT(plan.params.check, 1);
    CHECK_INT(plan.params.error[0], 0);
    CHECK_INT(plan.params.error[1], 0);
    CHECK_OK(raddle_attention_check_report(&plan, NULL));
    plan.params.error[0] = 4097; /* as the kernels do: the stub's device memory is the host's */
    plan.params.error[1] = 18;
    CHECK_FAILS(raddle_attention_check_report(&plan, NULL), RADDLE_ERR_VALUE,
                "page id 4097 at position 17");
    CHECK_OK(raddle_attention_check_report(&plan, NULL)); /* said once */
    raddle_attention_check_fini(&plan);
    CHECK(plan.params.error == NULL);
}

int main(void) {
    setenv("RADDLE_CHECK", "1", 1);
    test_device((raddle_device){RADDLE_CPU, 0});
    test_device((raddle_device){RADDLE_CUDA, 0});
    CHECK_INT(stub_cuda()->live_allocs, 0);
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

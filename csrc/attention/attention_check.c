/* attention_check.c - RADDLE_CHECK=1: page ids that only the device saw and that lay outside the
 * cache are reported by the plan's next call.
 *
 * Kernels skip such pages whatever the setting, and keep the first in two integers of the plan: the
 * id, and its place in the page table plus one (0: none). Reading them costs a wait for the stream
 * at every call, which is why it must be asked for.
 */
#include "attention/attention.h"

#include "cuda/environment.h"

enum { ERROR_BYTES = 2 * sizeof(int32_t) };

raddle_status raddle_attention_check_init(raddle_attention_plan *plan) {
    const raddle_backend *backend = plan->base.backend;
    const int32_t device = plan->base.device.index;
    if (!raddle_environment_get()->check) {
        return RADDLE_OK;
    }
    RADDLE_TRY(backend->alloc(device, ERROR_BYTES, (void **)&plan->params.error));
    RADDLE_TRY(backend->fill(device, plan->params.error, 0, ERROR_BYTES, NULL));
    RADDLE_TRY(backend->synchronize(device, NULL));
    plan->params.check = 1;
    return RADDLE_OK;
}

void raddle_attention_check_fini(raddle_attention_plan *plan) {
    plan->base.backend->free(plan->base.device.index, plan->params.error);
    plan->params.error = NULL;
}

static raddle_status read_error(const raddle_attention_plan *plan, int32_t error[2],
                                raddle_stream stream) {
    const raddle_backend *backend = plan->base.backend;
    const int32_t device = plan->base.device.index;
    RADDLE_TRY(
        backend->copy(device, error, plan->params.error, ERROR_BYTES, RADDLE_COPY_TO_HOST, stream));
    RADDLE_TRY(backend->synchronize(device, stream));
    return error[1] == 0 ? RADDLE_OK
                         : backend->fill(device, plan->params.error, 0, ERROR_BYTES, stream);
}

raddle_status raddle_attention_check_report(const raddle_attention_plan *plan,
                                            raddle_stream stream) {
    int32_t error[2] = {0, 0};
    bool capturing = false;
    if (!plan->params.check) {
        return RADDLE_OK;
    }
    RADDLE_TRY(plan->base.backend->is_capturing(plan->base.device.index, stream, &capturing));
    if (capturing) {
        return RADDLE_OK; /* the call behind the capture reports */
    }
    RADDLE_TRY(read_error(plan, error, stream));
    RADDLE_REQUIRE(error[1] == 0, RADDLE_ERR_VALUE,
                   "indices: an earlier run of this plan met page id %d at position %d, out of "
                   "range for its cache; the page was skipped (RADDLE_CHECK)",
                   (int)error[0], (int)error[1] - 1);
    return RADDLE_OK;
}

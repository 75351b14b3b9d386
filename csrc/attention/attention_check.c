/* attention_check.c - RADDLE_CHECK=1: indices that only the device saw and that led outside the cache
 * are reported by the next call.
 *
 * Kernels skip such pages and rows whatever the setting, and keep the first in a record. Each plan
 * has one for its runs, two integers: the page id, and its place in the page table plus one (0:
 * none). Appends have no plan: theirs is one per GPU, which the next append or call on a plan there
 * reports. Reading a record costs a wait for the stream at every call, which is why it must be asked
 * for.
 */
#include "attention/attention.h"

#include <assert.h>
#include <pthread.h>

#include "cuda/device.h"
#include "cuda/environment.h"

enum { RUN_BYTES = 2 * sizeof(int32_t), APPEND_BYTES = sizeof(raddle_attention_append_error) };

static pthread_mutex_t append_mutex = PTHREAD_MUTEX_INITIALIZER;
/* Device memory, from the first append on that GPU for the life of the process. */
static raddle_attention_append_error *append_records[RADDLE_CUDA_MAX_DEVICES];

/* ---------------------------------------------------------------- records */

static raddle_status make_record(const raddle_backend *backend, int32_t device, size_t bytes,
                                 void **out_record) {
    void *record = NULL;
    RADDLE_TRY(backend->alloc(device, bytes, &record));
    raddle_status status = backend->fill(device, record, 0, bytes, NULL);
    if (status == RADDLE_OK) {
        status = backend->synchronize(device, NULL);
    }
    if (status != RADDLE_OK) {
        backend->free(device, record);
        return status;
    }
    *out_record = record;
    return RADDLE_OK;
}

static raddle_status read_record(const raddle_backend *backend, int32_t device, const void *record,
                                 size_t bytes, void *host, raddle_stream stream) {
    RADDLE_TRY(backend->copy(device, host, record, bytes, RADDLE_COPY_TO_HOST, stream));
    return backend->synchronize(device, stream);
}

/* ---------------------------------------------------------------- appends */

/* "slot_mapping: .. met slot 99 at row 3, out of range for a cache of 80 slots; .." */
typedef struct append_words {
    const char *argument, *value, *limit, *end;
} append_words;

static const append_words words_of[] = {
    [RADDLE_APPEND_SLOT] = {"slot_mapping", "slot", "out of range for a cache of", " slots"},
    [RADDLE_APPEND_BATCH_INDEX] = {"batch_indices", "request", "out of range for", " requests"},
    [RADDLE_APPEND_POSITION] = {"positions", "position", "but the pages of its request hold",
                                " tokens"},
    [RADDLE_APPEND_INDPTR] = {"kv_indptr", "a page table that begins at", "and ends at",
                              ": expected a rising range within kv_indices"},
    [RADDLE_APPEND_PAGE] = {"kv_indices", "page id", "out of range for a cache of", " pages"},
};

static raddle_status fail_append(int32_t device, const raddle_attention_append_error *error) {
    assert(error->what > 0 && error->what <= RADDLE_APPEND_PAGE);
    const append_words *words = &words_of[error->what];
    return raddle_fail(RADDLE_ERR_VALUE,
                       "%s: an earlier append on cuda:%d met %s %lld at row %lld, %s %lld%s; the "
                       "row was skipped (RADDLE_CHECK)",
                       words->argument, (int)device, words->value, (long long)error->value,
                       (long long)error->row, words->limit, (long long)error->limit, words->end);
}

/* record NULL: there was no append. */
static raddle_status report_append(int32_t device, raddle_attention_append_error *record,
                                   raddle_stream stream) {
    const raddle_backend *backend = &raddle_backend_cuda;
    raddle_attention_append_error error = {0};
    if (record == NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(read_record(backend, device, record, APPEND_BYTES, &error, stream));
    if (error.what == 0) {
        return RADDLE_OK; /* or a row of another stream is about to fill it */
    }
    RADDLE_TRY(backend->fill(device, record, 0, APPEND_BYTES, stream));
    return fail_append(device, &error);
}

/* may_make false: NULL when there is none. */
static raddle_status get_append_record(int32_t device, bool may_make,
                                       raddle_attention_append_error **out_record) {
    raddle_status status = RADDLE_OK;
    pthread_mutex_lock(&append_mutex);
    if (append_records[device] == NULL && may_make) {
        status = make_record(&raddle_backend_cuda, device, APPEND_BYTES,
                             (void **)&append_records[device]);
    }
    *out_record = append_records[device];
    pthread_mutex_unlock(&append_mutex);
    return status;
}

raddle_status raddle_attention_check_append(int32_t device, raddle_stream stream,
                                            raddle_attention_append_error **out_record) {
    bool capturing = false;
    *out_record = NULL;
    if (!raddle_environment_get()->check) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_backend_cuda.is_capturing(device, stream, &capturing));
    RADDLE_TRY(get_append_record(device, !capturing, out_record));
    RADDLE_REQUIRE(*out_record != NULL, RADDLE_ERR_STATE,
                   "append: with RADDLE_CHECK=1 the first one on a GPU allocates; append once "
                   "before the capture");
    /* What a captured one meets, the call behind the capture reports. */
    return capturing ? RADDLE_OK : report_append(device, *out_record, stream);
}

/* ---------------------------------------------------------------- plans */

raddle_status raddle_attention_check_init(raddle_attention_plan *plan) {
    if (!raddle_environment_get()->check) {
        return RADDLE_OK;
    }
    RADDLE_TRY(make_record(plan->base.backend, plan->base.device.index, RUN_BYTES,
                           (void **)&plan->params.error));
    plan->params.check = 1;
    return RADDLE_OK;
}

void raddle_attention_check_fini(raddle_attention_plan *plan) {
    plan->base.backend->free(plan->base.device.index, plan->params.error);
    plan->params.error = NULL;
}

static raddle_status report_run(const raddle_attention_plan *plan, raddle_stream stream) {
    const raddle_backend *backend = plan->base.backend;
    const int32_t device = plan->base.device.index;
    int32_t error[2] = {0, 0};
    RADDLE_TRY(read_record(backend, device, plan->params.error, RUN_BYTES, error, stream));
    if (error[1] == 0) {
        return RADDLE_OK;
    }
    RADDLE_TRY(backend->fill(device, plan->params.error, 0, RUN_BYTES, stream));
    return raddle_fail(RADDLE_ERR_VALUE,
                       "indices: an earlier run of this plan met page id %d at position %d, out of "
                       "range for its cache; the page was skipped (RADDLE_CHECK)",
                       (int)error[0], (int)error[1] - 1);
}

raddle_status raddle_attention_check_report(const raddle_attention_plan *plan,
                                            raddle_stream stream) {
    const int32_t device = plan->base.device.index;
    raddle_attention_append_error *record = NULL;
    bool capturing = false;
    if (!plan->params.check) {
        return RADDLE_OK;
    }
    RADDLE_TRY(plan->base.backend->is_capturing(device, stream, &capturing));
    if (capturing) {
        return RADDLE_OK; /* the call behind the capture reports */
    }
    RADDLE_TRY(report_run(plan, stream));
    if (plan->base.device.type == RADDLE_CPU) {
        return RADDLE_OK; /* appends are checked there by the call itself */
    }
    RADDLE_TRY(get_append_record(device, false, &record));
    return report_append(device, record, stream);
}

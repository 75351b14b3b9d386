/* blend_balance.c - an even mix without a look at prefixes: requests sorted by density, dealt out to
 * streams of equal work, each in the order in which they came.
 */
#include "blend/blend.h"

#include <stdlib.h>

#include "base/alloc.h"

typedef struct item {
    double compute, read; /* seconds */
    int32_t request;
} item;

/* Densest first; of equal ones the earlier. compute / read, without dividing by 0. */
static int by_density(const void *a, const void *b) {
    const item *x = a, *y = b;
    const double left = x->compute * y->read, right = y->compute * x->read;
    return left > right   ? -1
           : left < right ? 1
                          : (x->request > y->request) - (x->request < y->request);
}

static int by_request(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

raddle_status raddle_blend_plan_balance(const raddle_blend_store *store,
                                        const raddle_blend_cost *cost,
                                        const raddle_blend_length *lengths,
                                        raddle_blend_plan *plan) {
    const int32_t count = (int32_t)store->num_requests;
    const size_t bytes = (size_t)count * sizeof(item);
    item *items = raddle_alloc(bytes);
    double all = 0, before = 0;
    if (items == NULL) {
        return raddle_fail_memory(bytes);
    }
    for (int32_t i = 0; i < count; i++) {
        const raddle_blend_work work = raddle_blend_expected_work(store, lengths, i, 0);
        const double seconds = raddle_blend_plain_seconds(cost, &work, &items[i].read);
        items[i].compute = seconds - items[i].read;
        items[i].request = i;
        all += seconds;
    }
    qsort(items, (size_t)count, sizeof(item), by_density);
    plan->num_streams = 0;
    for (int32_t i = 0; i < count; i++) {
        const double own = items[i].compute + items[i].read;
        const int32_t stream = plan->num_streams - 1;
        if (i == 0 || (before >= all * plan->num_streams / RADDLE_BLEND_MAX_STREAMS &&
                       plan->num_streams < RADDLE_BLEND_MAX_STREAMS)) {
            plan->stream_seconds[plan->num_streams] = own;
            plan->stream_end[plan->num_streams++] = i + 1;
        } else {
            plan->stream_seconds[stream] += own;
            plan->stream_end[stream] = i + 1;
        }
        plan->order[i] = items[i].request;
        before += own;
    }
    raddle_free(items);
    for (int32_t i = 0, begin = 0; i < plan->num_streams; begin = plan->stream_end[i++]) {
        qsort(plan->order + begin, (size_t)(plan->stream_end[i] - begin), sizeof(int32_t),
              by_request);
    }
    return RADDLE_OK;
}

/* blend_forecast.c - how much room running requests will take.
 *
 * At step t a request holds base + t, so that those of a bucket are a count and a sum. A peak lies
 * where some end: at the end of a bucket, when all of it and behind it still run. From the last
 * bucket to the first, one pass adds them up; one more request adds to every bucket up to its own.
 */
#include "blend/blend.h"

#include <string.h>

#include "base/alloc.h"

raddle_status raddle_blend_forecast_init(raddle_blend_forecast *forecast, int64_t longest) {
    int32_t buckets = 4;
    while ((int64_t)buckets * RADDLE_BLEND_BUCKET < longest + 2 * RADDLE_BLEND_BUCKET) {
        buckets *= 2;
    }
    const size_t bytes = (size_t)buckets * sizeof(int64_t);
    *forecast = (raddle_blend_forecast){.num_buckets = buckets};
    forecast->counts = raddle_alloc_zero(bytes);
    forecast->bases = raddle_alloc_zero(bytes);
    forecast->later = raddle_alloc(bytes);
    forecast->sooner = raddle_alloc(bytes);
    if (forecast->counts == NULL || forecast->bases == NULL || forecast->later == NULL ||
        forecast->sooner == NULL) {
        raddle_blend_forecast_fini(forecast);
        return raddle_fail_memory(4 * bytes);
    }
    return RADDLE_OK;
}

void raddle_blend_forecast_fini(raddle_blend_forecast *forecast) {
    raddle_free(forecast->counts);
    raddle_free(forecast->bases);
    raddle_free(forecast->later);
    raddle_free(forecast->sooner);
    memset(forecast, 0, sizeof *forecast);
}

static int32_t slot_of(const raddle_blend_forecast *forecast, int64_t step) {
    return (int32_t)(step / RADDLE_BLEND_BUCKET) & (forecast->num_buckets - 1);
}

void raddle_blend_forecast_advance(raddle_blend_forecast *forecast, int64_t now) {
    while (forecast->now / RADDLE_BLEND_BUCKET < now / RADDLE_BLEND_BUCKET) {
        const int32_t from = slot_of(forecast, forecast->now);
        forecast->now = (forecast->now / RADDLE_BLEND_BUCKET + 1) * RADDLE_BLEND_BUCKET;
        const int32_t to = slot_of(forecast, forecast->now);
        forecast->counts[to] += forecast->counts[from];
        forecast->bases[to] += forecast->bases[from];
        forecast->counts[from] = forecast->bases[from] = 0;
        forecast->last -= forecast->last > 0;
        forecast->is_fresh = false;
    }
    forecast->now = now;
}

void raddle_blend_forecast_add(raddle_blend_forecast *forecast, int64_t base, int64_t end,
                               int32_t count) {
    const int64_t at = end > forecast->now ? end : forecast->now; /* overdue: moved already */
    const int32_t slot = slot_of(forecast, at);
    const int32_t ahead = (int32_t)(at / RADDLE_BLEND_BUCKET - forecast->now / RADDLE_BLEND_BUCKET);
    forecast->counts[slot] += count;
    forecast->bases[slot] += count * base;
    forecast->last = ahead > forecast->last ? ahead : forecast->last;
    forecast->is_fresh = false;
}

/* What a request of base 0 holds when a bucket ends. */
static int64_t grown_at(int64_t bucket) {
    return (bucket + 1) * RADDLE_BLEND_BUCKET - 1;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static void refresh(raddle_blend_forecast *forecast) {
    const int64_t first = forecast->now / RADDLE_BLEND_BUCKET;
    int64_t count = 0, sum = 0, peak = 0;
    for (int32_t ahead = forecast->last; ahead >= 0; ahead--) {
        const int32_t slot = (int32_t)(first + ahead) & (forecast->num_buckets - 1);
        forecast->later[ahead] = peak;
        count += forecast->counts[slot];
        sum += forecast->bases[slot];
        const int64_t then = count > 0 ? sum + count * grown_at(first + ahead) : 0;
        forecast->sooner[ahead] = then + grown_at(first + ahead);
        peak = larger(peak, then);
    }
    for (int32_t ahead = 1; ahead <= forecast->last; ahead++) {
        forecast->sooner[ahead] = larger(forecast->sooner[ahead], forecast->sooner[ahead - 1]);
    }
    forecast->is_fresh = true;
}

int64_t raddle_blend_forecast_peak(raddle_blend_forecast *forecast, int64_t base, int64_t end) {
    const int64_t first = forecast->now / RADDLE_BLEND_BUCKET;
    const int64_t own = larger(end / RADDLE_BLEND_BUCKET - first, 0);
    if (!forecast->is_fresh) {
        refresh(forecast);
    }
    if (own > forecast->last) {
        return base + larger(forecast->sooner[forecast->last], grown_at(first + own));
    }
    return larger(base + forecast->sooner[own], forecast->later[own]);
}

/* attention_schedule_check.h - a batch to plan, and what every schedule of it must keep to. */
#ifndef RADDLE_TESTS_ATTENTION_SCHEDULE_CHECK_H
#define RADDLE_TESTS_ATTENTION_SCHEDULE_CHECK_H

#include "attention/attention.h"

#include "base/alloc.h"
#include "check.h"
#include "random.h"

enum { MAX_BATCH = 544 };

typedef struct problem {
    raddle_attention_spec spec;
    raddle_attention_config config;
    raddle_attention_limits limits;
    raddle_attention_header header;
    raddle_attention_schedule schedule;
    int32_t batch;
} problem;

static inline void start(problem *p, int32_t workers, int32_t group_size, int32_t kv_heads,
                         int32_t heads_per_item, int32_t tile_rows, int32_t tile_kv,
                         int32_t price) {
    memset(p, 0, sizeof *p);
    p->spec.max_batch = MAX_BATCH;
    p->spec.max_pages = 1 << 22;
    p->spec.max_qo_tokens = 1 << 17;
    p->spec.page_size = 1;
    p->spec.window_left = -1;
    p->config.group_size = group_size;
    p->config.num_kv_heads = kv_heads;
    p->config.num_qo_heads = kv_heads * group_size;
    p->config.heads_per_item = p->config.min_heads_per_item = heads_per_item;
    p->config.tile_rows = tile_rows;
    p->config.tile_kv = tile_kv;
    p->config.num_workers = workers;
    p->config.segment_cost = price * heads_per_item;
}

static inline void open_problem(problem *p) {
    CHECK_OK(raddle_attention_limits_derive(&p->spec, &p->config, &p->limits));
    p->schedule.header = &p->header;
    p->schedule.requests = raddle_alloc_zero(MAX_BATCH * sizeof(raddle_attention_request));
    p->schedule.worker_indptr =
        raddle_alloc_zero(((size_t)p->config.num_workers + 1) * sizeof(int32_t));
    p->schedule.first_segments =
        raddle_alloc_zero((size_t)p->config.num_workers * sizeof(raddle_attention_segment));
    p->schedule.segments =
        raddle_alloc_zero((size_t)p->limits.max_segments * sizeof(raddle_attention_segment));
    p->schedule.merges =
        raddle_alloc_zero(((size_t)p->limits.max_merges + 1) * sizeof(raddle_attention_merge));
}

static inline void close_problem(problem *p) {
    raddle_free(p->schedule.requests);
    raddle_free(p->schedule.worker_indptr);
    raddle_free(p->schedule.first_segments);
    raddle_free(p->schedule.segments);
    raddle_free(p->schedule.merges);
}

static inline void add(problem *p, int32_t qo_len, int32_t kv_len) {
    const raddle_attention_request *last = p->schedule.requests + p->batch - 1;
    const int32_t begin = p->batch == 0 ? 0 : last->qo_begin + last->qo_len;
    p->schedule.requests[p->batch++] =
        (raddle_attention_request){.qo_begin = begin, .qo_len = qo_len, .kv_len = kv_len};
}

/* Walks the segments as the kernels do and holds them against the definition of an item. */
static inline void check_coverage(const problem *p) {
    const raddle_attention_schedule *s = &p->schedule;
    int32_t at = 0, merge = 0, slot = 0;
    CHECK_INT(s->worker_indptr[0], 0);
    CHECK_INT(s->worker_indptr[p->config.num_workers], p->header.num_segments);
    for (int32_t w = 0; w < p->config.num_workers; w++) {
        CHECK(s->worker_indptr[w] <= s->worker_indptr[w + 1]);
        CHECK(s->worker_indptr[w] == s->worker_indptr[w + 1] ||
              memcmp(&s->first_segments[w], &s->segments[s->worker_indptr[w]],
                     sizeof *s->segments) == 0);
    }
    for (int32_t r = 0; r < p->batch; r++) {
        const raddle_attention_request *request = &s->requests[r];
        const int32_t rows = request->qo_len * p->config.group_size;
        for (int32_t head = 0; head < p->config.num_kv_heads; head += p->header.heads_per_item) {
            for (int32_t row = 0; row < rows; row += p->config.tile_rows) {
                const int32_t row_end =
                    row + p->config.tile_rows < rows ? row + p->config.tile_rows : rows;
                int32_t begin, end, first_slot = slot, pieces = 0;
                raddle_attention_visible(request, p->config.group_size, p->config.causal,
                                         p->spec.window_left, row, row_end, &begin, &end);
                do {
                    if (!CHECK(at < p->header.num_segments)) {
                        return;
                    }
                    const raddle_attention_segment *segment = &s->segments[at++];
                    CHECK(segment->request == r && segment->head == head);
                    CHECK(segment->row_begin == row && segment->row_end == row_end);
                    CHECK(segment->qo_begin == request->qo_begin);
                    CHECK(segment->qo_len == request->qo_len);
                    CHECK(segment->kv_origin == request->kv_begin);
                    CHECK(segment->kv_len == request->kv_len);
                    CHECK_INT(segment->kv_begin, begin);
                    CHECK(segment->kv_end > segment->kv_begin || begin == end);
                    const bool whole = pieces == 0 && segment->kv_end == end;
                    CHECK_INT(segment->slot, whole ? -1 : slot);
                    CHECK_INT(segment->merge, whole ? -1 : merge);
                    if (!whole && segment->kv_end < end) {
                        const int32_t grain =
                            p->spec.fixed_chunk ? p->spec.fixed_chunk : p->config.tile_kv;
                        CHECK_INT(segment->kv_end % grain, 0);
                    }
                    slot += !whole;
                    pieces++;
                    begin = segment->kv_end;
                } while (begin < end);
                if (slot > first_slot) {
                    const raddle_attention_merge *m = &s->merges[merge++];
                    CHECK(m->request == r && m->head == head && m->row_begin == row);
                    CHECK(m->row_end == row_end && m->slot_begin == first_slot);
                    CHECK_INT(m->slot_count, slot - first_slot);
                    CHECK_INT(m->num_arrivals, slot - first_slot);
                    CHECK(m->qo_begin == request->qo_begin && m->qo_len == request->qo_len);
                    CHECK(m->kv_len == request->kv_len);
                }
            }
        }
    }
    CHECK_INT(at, p->header.num_segments);
    CHECK_INT(merge, p->header.num_merges);
    CHECK_INT(slot, p->header.num_slots);
    CHECK(slot <= p->limits.max_slots && merge <= p->limits.max_merges);
}

#endif

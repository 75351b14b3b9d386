// needs: base/status.c base/alloc.c attention/attention_schedule.c
/* test_attention_schedule.c - the planner: every key of every row exactly once, partials in order,
 * shares that balance, whatever the batch. */
#include "attention/attention.h"

#include "base/alloc.h"
#include "check.h"

enum { MAX_BATCH = 512 };

typedef struct problem {
    raddle_attention_spec spec;
    raddle_attention_config config;
    raddle_attention_limits limits;
    raddle_attention_header header;
    raddle_attention_schedule schedule;
    int32_t batch;
} problem;

static uint64_t random_state = 7;

static int32_t random_below(int32_t limit) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int32_t)((random_state >> 33) % (uint64_t)limit);
}

static void start(problem *p, int32_t workers, int32_t group_size, int32_t kv_heads,
                  int32_t heads_per_item, int32_t tile_rows, int32_t tile_kv, int32_t price) {
    memset(p, 0, sizeof *p);
    p->spec.max_batch = MAX_BATCH;
    p->spec.max_pages = 1 << 22;
    p->spec.max_qo_tokens = 1 << 17;
    p->spec.page_size = 1;
    p->spec.window_left = -1;
    p->config.group_size = group_size;
    p->config.num_kv_heads = kv_heads;
    p->config.num_qo_heads = kv_heads * group_size;
    p->config.heads_per_item = heads_per_item;
    p->config.tile_rows = tile_rows;
    p->config.tile_kv = tile_kv;
    p->config.num_workers = workers;
    p->config.segment_cost = price;
}

static void open_problem(problem *p) {
    CHECK_OK(raddle_attention_limits_derive(&p->spec, &p->config, &p->limits));
    p->schedule.header = &p->header;
    p->schedule.requests = raddle_alloc_zero(MAX_BATCH * sizeof(raddle_attention_request));
    p->schedule.worker_indptr =
        raddle_alloc_zero(((size_t)p->config.num_workers + 1) * sizeof(int32_t));
    p->schedule.segments =
        raddle_alloc_zero((size_t)p->limits.max_segments * sizeof(raddle_attention_segment));
    p->schedule.merges =
        raddle_alloc_zero(((size_t)p->limits.max_merges + 1) * sizeof(raddle_attention_merge));
}

static void close_problem(problem *p) {
    raddle_free(p->schedule.requests);
    raddle_free(p->schedule.worker_indptr);
    raddle_free(p->schedule.segments);
    raddle_free(p->schedule.merges);
}

static void add(problem *p, int32_t qo_len, int32_t kv_len) {
    const raddle_attention_request *last = p->schedule.requests + p->batch - 1;
    const int32_t begin = p->batch == 0 ? 0 : last->qo_begin + last->qo_len;
    p->schedule.requests[p->batch++] =
        (raddle_attention_request){.qo_begin = begin, .qo_len = qo_len, .kv_len = kv_len};
}

static void build(problem *p) {
    CHECK_OK(
        raddle_attention_schedule_build(&p->spec, &p->config, &p->limits, p->batch, &p->schedule));
}

/* Walks the segments as the kernels do and holds them against the definition of an item. */
static void check_coverage(const problem *p) {
    const raddle_attention_schedule *s = &p->schedule;
    int32_t at = 0, merge = 0, slot = 0;
    CHECK_INT(s->worker_indptr[0], 0);
    CHECK_INT(s->worker_indptr[p->config.num_workers], p->header.num_segments);
    for (int32_t w = 0; w < p->config.num_workers; w++) {
        CHECK(s->worker_indptr[w] <= s->worker_indptr[w + 1]);
    }
    for (int32_t r = 0; r < p->batch; r++) {
        const raddle_attention_request *request = &s->requests[r];
        const int32_t rows = request->qo_len * p->config.group_size;
        for (int32_t head = 0; head < p->config.num_kv_heads; head += p->config.heads_per_item) {
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
                }
            }
        }
    }
    CHECK_INT(at, p->header.num_segments);
    CHECK_INT(merge, p->header.num_merges);
    CHECK_INT(slot, p->header.num_slots);
    CHECK(slot <= p->limits.max_slots && merge <= p->limits.max_merges);
}

/* Largest share over the mean of the workers that have work, in K/V tokens, less one tile. */
static double imbalance(const problem *p) {
    const raddle_attention_schedule *s = &p->schedule;
    int64_t most = 0, sum = 0;
    int32_t used = 0;
    for (int32_t w = 0; w < p->config.num_workers; w++) {
        int64_t share = 0;
        for (int32_t i = s->worker_indptr[w]; i < s->worker_indptr[w + 1]; i++) {
            share += s->segments[i].kv_end - s->segments[i].kv_begin;
        }
        used += s->worker_indptr[w + 1] > s->worker_indptr[w];
        sum += share;
        most = share > most ? share : most;
    }
    return (double)(most - p->config.tile_kv) * used / (double)sum;
}

static void test_random_batches(void) {
    for (int round = 0; round < 300; round++) {
        problem p;
        const int32_t group_size = 1 + random_below(8), kv_heads = 1 + random_below(9);
        start(&p, 1 + random_below(140), group_size, kv_heads, 1 + random_below(kv_heads),
              8 << random_below(4), 16 << random_below(3), random_below(100));
        p.config.causal = random_below(2);
        p.spec.window_left = random_below(3) == 0 ? random_below(200) : -1;
        p.spec.fixed_chunk = random_below(3) == 0 ? 64 * (1 + random_below(4)) : 0;
        open_problem(&p);
        const int32_t batch = random_below(40);
        for (int32_t i = 0; i < batch; i++) {
            const int32_t kv_len = random_below(4) == 0 ? 0 : random_below(3000);
            add(&p, random_below(4) == 0 ? random_below(200) : 1, kv_len);
        }
        build(&p);
        check_coverage(&p);
        close_problem(&p);
    }
}

static void test_decode_is_balanced(void) {
    /* An H100's 132 multiprocessors, 8 K/V heads of which one item takes all, tiles of 16. */
    for (int kind = 0; kind < 3; kind++) {
        problem p;
        start(&p, 132, 4, 8, 8, 8, 16, 9);
        p.spec.max_qo_len = 1;
        p.spec.max_qo_tokens = MAX_BATCH;
        open_problem(&p);
        for (int i = 0; i < 64; i++) {
            const int32_t zipf = 65536 / (i + 1);
            const int32_t skew = i == 0 ? 65536 : 512;
            add(&p, 1, kind == 0 ? 1000 + random_below(48) : kind == 1 ? zipf : skew);
        }
        build(&p);
        check_coverage(&p);
        CHECK(imbalance(&p) <= 1.05);
        close_problem(&p);
    }
}

static void test_existing_boundaries_win(void) {
    /* 128 equal items on 132 workers: cutting them would cost more than four idle workers. */
    problem p;
    start(&p, 132, 4, 8, 1, 8, 16, 72);
    p.spec.max_qo_len = 1;
    p.spec.max_qo_tokens = MAX_BATCH;
    open_problem(&p);
    for (int i = 0; i < 16; i++) {
        add(&p, 1, 1024);
    }
    build(&p);
    CHECK_INT(p.header.num_segments, 128);
    CHECK_INT(p.header.num_merges, 0);
    close_problem(&p);
}

static void test_little_work_uses_few_workers(void) {
    problem p;
    start(&p, 132, 4, 1, 1, 8, 16, 64);
    open_problem(&p);
    add(&p, 1, 100);
    build(&p);
    CHECK(p.header.num_workers <= 100 / (64 / 2)); /* half the price of a segment is worth one */
    close_problem(&p);
}

static void test_fixed_chunks_are_the_same_in_any_batch(void) {
    problem p;
    start(&p, 132, 4, 2, 1, 8, 16, 20);
    p.spec.fixed_chunk = 256;
    open_problem(&p);
    add(&p, 1, 10000);
    add(&p, 1, 3);
    build(&p);
    check_coverage(&p);
    for (int32_t i = 0; i < p.header.num_segments; i++) {
        const raddle_attention_segment *segment = &p.schedule.segments[i];
        if (segment->slot >= 0) {
            CHECK(segment->kv_begin % 256 == 0 && segment->kv_end - segment->kv_begin <= 256);
        }
    }
    close_problem(&p);
}

static void test_cost_grows_with_the_work(void) {
    /* Not timed: the number of segments stays items + workers - 1, at any length. */
    for (int32_t kv_len = 1000; kv_len <= 100000; kv_len *= 10) {
        problem p;
        start(&p, 132, 4, 8, 8, 8, 16, 9);
        open_problem(&p);
        for (int i = 0; i < 256; i++) {
            add(&p, 1, kv_len);
        }
        build(&p);
        CHECK(p.header.num_segments <= 256 + 131);
        close_problem(&p);
    }
}

int main(void) {
    test_random_batches();
    test_decode_is_balanced();
    test_existing_boundaries_win();
    test_little_work_uses_few_workers();
    test_fixed_chunks_are_the_same_in_any_batch();
    test_cost_grows_with_the_work();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

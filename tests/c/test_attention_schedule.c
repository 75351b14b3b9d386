// needs: base/status.c base/alloc.c attention/attention_schedule.c
/* test_attention_schedule.c - the planner: every key of every row exactly once, partials in order,
 * shares that balance, whatever the batch. */
#include "attention_schedule_check.h"

static void build(problem *p) {
    CHECK_OK(
        raddle_attention_schedule_build(&p->spec, &p->config, &p->limits, p->batch, &p->schedule));
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
        p.config.min_heads_per_item = random_below(2) ? 1 : p.config.heads_per_item;
        p.config.cut_cost = random_below(100);
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

/* Which width an H200 was fastest with: LOG.md. */
static void test_width_follows_the_batch(void) {
    static const struct {
        int32_t batch, kv_len, longest, heads;
    } cases[] = {
        {64, 16384, 0, 8},   {64, 4096, 0, 4}, {64, 1024, 0, 4}, {16, 8192, 0, 1},
        {16, 1024, 0, 1},    {8, 1024, 0, 1},  {1, 32768, 0, 1}, {1, 1024, 0, 1},
        {63, 512, 65536, 2}, {528, 16, 0, 8},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        problem p;
        start(&p, 132, 4, 8, 8, 4, 16, 0);
        p.config.min_heads_per_item = 1;
        p.config.segment_cost = 260;
        p.config.cut_cost = 290;
        p.config.merge_cost = 5;
        p.spec.max_qo_len = 1;
        p.spec.max_qo_tokens = MAX_BATCH;
        open_problem(&p);
        if (cases[i].longest > 0) {
            add(&p, 1, cases[i].longest);
        }
        for (int32_t k = 0; k < cases[i].batch && k < MAX_BATCH; k++) {
            add(&p, 1, cases[i].kv_len);
        }
        build(&p);
        check_coverage(&p);
        CHECK_INT(p.header.heads_per_item, cases[i].heads);
        close_problem(&p);
    }
}

static void test_little_work_uses_few_workers(void) {
    problem p;
    start(&p, 132, 4, 1, 1, 8, 16, 64);
    open_problem(&p);
    add(&p, 1, 100);
    build(&p);
    CHECK(p.header.num_workers <=
          100 / (64 / 4)); /* a quarter of the price of a segment is worth one */
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
    test_width_follows_the_batch();
    test_little_work_uses_few_workers();
    test_fixed_chunks_are_the_same_in_any_batch();
    test_cost_grows_with_the_work();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

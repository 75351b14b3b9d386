// needs: base/status.c base/alloc.c attention/attention_schedule.c
// sanitizers: address thread
/* test_attention_device_plan.c - the planner that runs on the GPU, by threads of the host: every key
 * of every row exactly once, shares as even as the host's, and lengths that lie. */
#include "attention_schedule_check.h"

#include <pthread.h>

/* A CTA of this machine's threads. */
static pthread_barrier_t barrier;
static int32_t num_threads = 1;
static pthread_mutex_t atomics = PTHREAD_MUTEX_INITIALIZER;

static void wait_for_all(void) {
    if (num_threads > 1) {
        pthread_barrier_wait(&barrier);
    }
}

static void lock_atomics(bool lock) {
    if (num_threads > 1) {
        (void)(lock ? pthread_mutex_lock : pthread_mutex_unlock)(&atomics);
    }
}

static void keep_larger(long long *to, long long value) {
    lock_atomics(true);
    *to = *to > value ? *to : value;
    lock_atomics(false);
}

static void keep_smaller(int32_t *to, int32_t value) {
    lock_atomics(true);
    *to = *to < value ? *to : value;
    lock_atomics(false);
}

#define RADDLE_PLAN_SYNC() wait_for_all()
#define RADDLE_PLAN_MAX(to, value) keep_larger((to), (value))
#define RADDLE_PLAN_MIN(to, value) keep_smaller((to), (value))
#include "kernels/attention/attention_plan.h"

enum { MAX_THREADS = 7 };

/* A page table as the GPU sees it, without its ids, which another CTA copies; and the schedule. */
typedef struct device_plan {
    problem result;
    int32_t indptr[MAX_BATCH + 1], lengths[MAX_BATCH];
    raddle_attention_plan_params params;
    void *space_memory;
} device_plan;

static device_plan *open_device_plan(const problem *like, int32_t qo_len) {
    device_plan *plan = raddle_alloc_zero(sizeof *plan);
    problem *result = &plan->result;
    result->spec = like->spec;
    result->config = like->config;
    open_problem(result);
    plan->space_memory =
        raddle_alloc_zero((size_t)raddle_plan_space_bytes(like->config.num_workers, MAX_THREADS));
    plan->params = (raddle_attention_plan_params){
        .indptr = plan->indptr,
        .lengths = plan->lengths,
        .header = result->schedule.header,
        .requests = result->schedule.requests,
        .worker_indptr = result->schedule.worker_indptr,
        .first_segments = result->schedule.first_segments,
        .segments = result->schedule.segments,
        .merges = result->schedule.merges,
        .table_entries = like->spec.max_pages,
        .qo_len = qo_len,
        .page_size = like->spec.page_size,
        .group_size = like->config.group_size,
        .num_kv_heads = like->config.num_kv_heads,
        .heads_per_item = like->config.heads_per_item,
        .min_heads_per_item = like->config.min_heads_per_item,
        .tile_rows = like->config.tile_rows,
        .tile_kv = like->config.tile_kv,
        .num_workers = like->config.num_workers,
        .segment_cost = like->config.segment_cost,
        .cut_cost = like->config.cut_cost,
        .merge_cost = like->config.merge_cost,
        .causal = like->config.causal,
        .window_left = like->spec.window_left,
        .fixed_chunk = like->spec.fixed_chunk,
        .max_slots = (int32_t)result->limits.max_slots,
    };
    return plan;
}

static void close_device_plan(device_plan *plan) {
    close_problem(&plan->result);
    raddle_free(plan->space_memory);
    raddle_free(plan->params.prefix);
    raddle_free(plan);
}

typedef struct thread_of_plan {
    device_plan *plan;
    int32_t thread;
} thread_of_plan;

static void *run_thread(void *argument) {
    const thread_of_plan *self = argument;
    raddle_plan_space space;
    raddle_plan_carve(self->plan->space_memory, self->plan->params.num_workers, num_threads,
                      &space);
    raddle_plan_batch(&self->plan->params, &space, self->thread, num_threads);
    return NULL;
}

static void build_by_threads(device_plan *plan, int32_t threads) {
    pthread_t handles[MAX_THREADS];
    thread_of_plan arguments[MAX_THREADS];
    num_threads = threads;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    for (int32_t i = 0; i < threads; i++) {
        arguments[i] = (thread_of_plan){plan, i};
        CHECK_INT(pthread_create(&handles[i], NULL, run_thread, &arguments[i]), 0);
    }
    for (int32_t i = 0; i < threads; i++) {
        pthread_join(handles[i], NULL);
    }
    pthread_barrier_destroy(&barrier);
    num_threads = 1;
}

static void build_on_device(device_plan *plan, int32_t batch) {
    plan->params.batch = batch;
    plan->result.batch = batch;
    const int64_t kinds = (int64_t)batch * plan->params.qo_len * plan->params.group_size;
    raddle_free(plan->params.prefix);
    plan->params.prefix =
        kinds > RADDLE_PLAN_SHARED_KINDS ? raddle_alloc((size_t)(kinds + 1) * 16) : NULL;
    run_thread(&(thread_of_plan){plan, 0});
}

/* The batch of a problem, as a page table of pages that follow each other. */
static void lay_out(const problem *p, device_plan *plan) {
    const int32_t page_size = p->spec.page_size;
    for (int32_t r = 0; r < p->batch; r++) {
        const int32_t kv_len = p->schedule.requests[r].kv_len;
        const int32_t pages = (kv_len + page_size - 1) / page_size;
        plan->indptr[r + 1] = plan->indptr[r] + pages;
        plan->lengths[r] = pages == 0 ? 0 : kv_len - (pages - 1) * page_size;
    }
}

/* Cost of the largest share. */
static int64_t makespan(const problem *p) {
    const raddle_attention_schedule *s = &p->schedule;
    int64_t most = 0;
    for (int32_t w = 0; w < p->config.num_workers; w++) {
        int64_t share = 0;
        for (int32_t i = s->worker_indptr[w]; i < s->worker_indptr[w + 1]; i++) {
            const raddle_attention_segment *segment = &s->segments[i];
            const bool goes_on = i > s->worker_indptr[w] && segment->merge >= 0 &&
                                 segment->merge == segment[-1].merge; /* of chunks */
            share += (int64_t)(segment->kv_end - segment->kv_begin) * p->header.heads_per_item;
            share += goes_on ? 0 : p->config.segment_cost;
            share += goes_on || segment->slot < 0 ? 0 : p->config.cut_cost;
        }
        most = share > most ? share : most;
    }
    return most;
}

/* Plans the problem on both sides; returns how much longer the device's largest share is. */
static double compare(problem *p, int32_t qo_len) {
    device_plan *plan = open_device_plan(p, qo_len);
    CHECK_OK(
        raddle_attention_schedule_build(&p->spec, &p->config, &p->limits, p->batch, &p->schedule));
    check_coverage(p);
    lay_out(p, plan);
    build_on_device(plan, p->batch);
    for (int32_t r = 0; r < p->batch; r++) {
        CHECK_INT(plan->result.schedule.requests[r].kv_len, p->schedule.requests[r].kv_len);
        CHECK_INT(plan->result.schedule.requests[r].qo_begin, p->schedule.requests[r].qo_begin);
        CHECK_INT(plan->result.schedule.requests[r].kv_begin, plan->indptr[r]);
    }
    CHECK_INT(plan->result.header.num_qo_tokens, p->header.num_qo_tokens);
    CHECK_INT(plan->result.header.batch, p->batch);
    CHECK_INT(plan->result.header.heads_per_item, p->header.heads_per_item);
    check_coverage(&plan->result);
    const int64_t host = makespan(p), device = makespan(&plan->result);
    close_device_plan(plan);
    return host == 0 ? 1.0 : (double)device / (double)host;
}

static void test_random_batches(void) {
    for (int round = 0; round < 400; round++) {
        problem p;
        const int32_t group_size = 1 + random_below(8), kv_heads = 1 + random_below(9);
        start(&p, 1 + random_below(140), group_size, kv_heads, 1 + random_below(kv_heads),
              8 << random_below(4), 16 << random_below(3), random_below(100));
        p.config.min_heads_per_item = random_below(2) ? 1 : p.config.heads_per_item;
        p.config.cut_cost = random_below(100);
        p.config.causal = random_below(2);
        p.spec.window_left = random_below(3) == 0 ? random_below(200) : -1;
        p.spec.page_size = 1 << random_below(6);
        p.spec.fixed_chunk = random_below(3) == 0 ? 64 * (1 + random_below(4)) : 0;
        p.spec.max_pages = (1 << 17) / p.spec.page_size + 40; /* 40 requests of 3000 */
        open_problem(&p);
        const int32_t batch = random_below(40), qo_len = random_below(3) ? 1 : random_below(50);
        for (int32_t i = 0; i < batch; i++) {
            add(&p, qo_len, random_below(4) == 0 ? 0 : random_below(3000));
        }
        compare(&p, qo_len);
        close_problem(&p);
    }
}

/* H200: heads of 128, tiles of 16. */
static void start_decode(problem *p, int32_t workers, int32_t kv_heads, int32_t heads_per_item) {
    start(p, workers, 4, kv_heads, heads_per_item, 4, 16, 0);
    p->config.min_heads_per_item = 1;
    p->config.segment_cost = 260;
    p->config.cut_cost = 290;
    p->config.merge_cost = 5;
    p->spec.max_qo_len = 1;
    p->spec.max_qo_tokens = MAX_BATCH;
    open_problem(p);
}

static int32_t length_of_kind(int kind, int32_t i, int32_t mean) {
    switch (kind) {
    case 0: /* equal */
        return mean;
    case 1: /* about equal */
        return mean - mean / 16 + random_below(mean / 8);
    case 2: /* anything */
        return 1 + random_below(2 * mean);
    case 3: /* one is long */
        return i == 0 ? 16 * mean : mean / 8;
    default: /* Zipf */
        return 8 * mean / (i + 1) + 1;
    }
}

static void test_shares_are_as_even_as_the_hosts(void) {
    static const int32_t batches[] = {1, 2, 3, 4, 8, 16, 37, 64, 256}, means[] = {256, 1024, 4096};
    static const int32_t workers[] = {132, 264}, heads[] = {1, 2, 8, 32};
    double sum = 0.0, worst = 0.0;
    int count = 0, uneven = 0;
    for (int w = 0; w < 2; w++) {
        for (int h = 0; h < 4; h++) {
            for (int b = 0; b < 9; b++) {
                for (int m = 0; m < 3; m++) {
                    for (int kind = 0; kind < 5; kind++) {
                        problem p;
                        start_decode(&p, workers[w], heads[h],
                                     heads[h] < 8 ? heads[h] : 1 << 3 * (m & 1));
                        for (int32_t i = 0; i < batches[b]; i++) {
                            add(&p, 1, length_of_kind(kind, i, means[m]));
                        }
                        const double ratio = compare(&p, 1);
                        uneven += ratio > 1.15;
                        worst = ratio > worst ? ratio : worst;
                        sum += ratio;
                        count++;
                        close_problem(&p);
                    }
                }
            }
        }
    }
    printf("largest share over the host's: mean %.4f, worst %.3f, %d of %d above 1.15\n",
           sum / count, worst, uneven, count);
    CHECK(sum / count <= 1.01);
    /* A few requests that are long among short ones, most of them: the host weighs each cut. */
    CHECK(uneven <= count / 18);
    CHECK(worst <= 1.5);
}

/* A cut item is cut at every chunk, so that partials do not depend on the rest of the batch. */
static void test_fixed_chunks(void) {
    double sum = 0.0;
    enum { ROUNDS = 60 };
    for (int round = 0; round < ROUNDS; round++) {
        problem p;
        start(&p, 132, 4, 1 + random_below(8), 1, 4, 16, 100);
        p.spec.max_qo_len = 1;
        p.spec.max_qo_tokens = MAX_BATCH;
        p.spec.fixed_chunk = 64 << random_below(4);
        p.spec.max_pages = 40 * 10000;
        p.spec.window_left = random_below(2) ? 1000 + random_below(1000) : -1;
        open_problem(&p);
        const int32_t batch = 1 + random_below(40);
        for (int32_t i = 0; i < batch; i++) {
            add(&p, 1, random_below(10000));
        }
        device_plan *plan = open_device_plan(&p, 1);
        lay_out(&p, plan);
        build_on_device(plan, batch);
        const problem *result = &plan->result;
        check_coverage(result);
        for (int32_t i = 0; i < result->header.num_segments; i++) {
            const raddle_attention_segment *segment = &result->schedule.segments[i];
            CHECK(segment->slot < 0 || segment->kv_begin / p.spec.fixed_chunk ==
                                           (segment->kv_end - 1) / p.spec.fixed_chunk);
        }
        close_device_plan(plan);
        sum += compare(&p, 1);
        close_problem(&p);
    }
    CHECK(sum / ROUNDS <= 1.02);
}

static void test_many_kinds(void) {
    /* More than fit in shared memory, long rows of tiles. */
    problem p;
    start(&p, 132, 4, 2, 1, 16, 64, 64);
    p.config.causal = 1;
    open_problem(&p);
    for (int i = 0; i < 9; i++) {
        add(&p, 1500, 1500 + 100 * i);
    }
    CHECK(compare(&p, 1500) <= 1.05);
    close_problem(&p);
}

static void test_block_table(void) {
    problem p;
    start(&p, 132, 4, 8, 1, 4, 16, 100);
    p.spec.page_size = 16;
    open_problem(&p);
    device_plan *plan = open_device_plan(&p, 1);
    plan->params.indptr = NULL;
    plan->params.table_width = 10;
    plan->params.table_entries = 50;
    const int32_t lengths[5] = {100, -3, 160, 1000000, 0};
    const int32_t seen[5] = {100, 0, 160, 160, 0};
    memcpy(plan->lengths, lengths, sizeof lengths);
    build_on_device(plan, 5);
    for (int i = 0; i < 5; i++) {
        CHECK_INT(plan->result.schedule.requests[i].kv_len, seen[i]);
        CHECK_INT(plan->result.schedule.requests[i].kv_begin, 10 * i);
    }
    check_coverage(&plan->result);
    close_device_plan(plan);
    close_problem(&p);
}

/* Whatever the GPU finds, requests stay inside the table. */
static void test_lengths_that_lie(void) {
    for (int round = 0; round < 500; round++) {
        problem p;
        start(&p, 1 + random_below(140), 2, 3, 1, 8, 16, random_below(100));
        p.spec.page_size = 1 + random_below(70);
        p.spec.window_left = random_below(3) == 0 ? random_below(200) : -1;
        p.spec.fixed_chunk = random_below(2) == 0 ? 64 : 0;
        p.spec.max_pages = 300;
        p.spec.max_batch = 20;
        p.spec.max_qo_len = 5;
        open_problem(&p);
        device_plan *plan = open_device_plan(&p, 1 + random_below(5));
        const int32_t batch = random_below(20), entries = random_below(300);
        plan->params.table_entries = entries;
        for (int32_t i = 0; i <= batch; i++) {
            plan->indptr[i] = random_below(3) ? random_below(400)
                                              : (int32_t)((uint32_t)random_below(INT32_MAX) * 2u);
            plan->lengths[i] = random_below(3) ? random_below(100)
                                               : (int32_t)((uint32_t)random_below(INT32_MAX) * 2u);
        }
        build_on_device(plan, batch);
        for (int32_t i = 0; i < batch; i++) {
            const raddle_attention_request *request = &plan->result.schedule.requests[i];
            const int64_t pages =
                ((int64_t)request->kv_len + p.spec.page_size - 1) / p.spec.page_size;
            CHECK(request->kv_begin >= 0 && request->kv_len >= 0);
            CHECK(request->kv_begin + pages <= entries);
        }
        check_coverage(&plan->result);
        close_device_plan(plan);
        close_problem(&p);
    }
}

static void check_same(const problem *a, const problem *b) {
    const raddle_attention_header *header = &a->header;
    CHECK(memcmp(header, &b->header, sizeof *header) == 0);
    CHECK(memcmp(a->schedule.worker_indptr, b->schedule.worker_indptr,
                 ((size_t)a->config.num_workers + 1) * sizeof(int32_t)) == 0);
    CHECK(memcmp(a->schedule.segments, b->schedule.segments,
                 (size_t)header->num_segments * sizeof(raddle_attention_segment)) == 0);
    CHECK(memcmp(a->schedule.merges, b->schedule.merges,
                 (size_t)header->num_merges * sizeof(raddle_attention_merge)) == 0);
}

/* However many threads, the schedule is the same. */
static void test_threads(void) {
    static const int32_t threads[] = {2, 3, 4, MAX_THREADS};
    for (int round = 0; round < 16; round++) {
        problem p;
        const int32_t kv_heads = 1 + random_below(9), qo_len = random_below(2) ? 1 : 30;
        start(&p, 1 + random_below(140), 4, kv_heads, 1 + random_below(kv_heads), 16, 16,
              random_below(200));
        p.config.causal = qo_len > 1;
        open_problem(&p);
        const int32_t batch = round == 0 ? 0 : random_below(60);
        for (int32_t i = 0; i < batch; i++) {
            add(&p, qo_len, random_below(4) == 0 ? 0 : random_below(5000));
        }
        device_plan *alone = open_device_plan(&p, qo_len), *plan = open_device_plan(&p, qo_len);
        lay_out(&p, alone);
        lay_out(&p, plan);
        build_on_device(alone, batch);
        build_on_device(plan, batch);
        check_same(&alone->result, &plan->result); /* twice is the same */
        build_by_threads(plan, threads[round % 4]);
        check_same(&alone->result, &plan->result);
        close_device_plan(alone);
        close_device_plan(plan);
        close_problem(&p);
    }
}

int main(void) {
    test_random_batches();
    test_shares_are_as_even_as_the_hosts();
    test_fixed_chunks();
    test_many_kinds();
    test_block_table();
    test_lengths_that_lie();
    test_threads();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

// needs: base/status.c base/alloc.c base/hash.c blend/*.c
/* test_blend_lengths.c - guesses against their definition, request by request, also when some requests
 * are under way; samples are as many as asked and no request is preferred. */
#include <math.h>

#include "check.h"
#include "random.h"

#include "base/alloc.h"
#include "blend/blend.h"

enum { BLOCK = 4, GROUPS = 4, MOST = 120 };

static void add(raddle_blend_store *store, const uint64_t *blocks, int32_t count, int32_t group,
                int32_t output, int32_t most) {
    const raddle_blend_request request = {
        .num_blocks = count,
        .prompt_tokens = count * BLOCK + 1,
        .output_tokens = output,
        .max_tokens = most,
        .group = group,
        .weight = 1.0f,
    };
    CHECK_OK(raddle_blend_store_add(store, &request, blocks));
}

/* ------------------------------------------------------------------ guesses */

typedef struct reference {
    const raddle_blend_store *store;
    const raddle_blend_trie *trie;
    const int32_t *seen;
    int32_t node[MOST]; /* by request */
} reference;

static bool is_below(const reference *r, int32_t request, int32_t node) {
    int32_t at = r->node[request];
    while (at != node && at > 0) {
        at = r->trie->nodes[at].parent;
    }
    return at == node;
}

/* Moments of what was seen: below a node, or of a group, or at all (-1). */
static double moment(const reference *r, int32_t node, int32_t group, int power, int *out_count) {
    double sum = 0;
    *out_count = 0;
    for (int32_t i = 0; i < (int32_t)r->store->num_requests; i++) {
        if (r->seen[i] >= 0 && is_below(r, i, node) &&
            (group < 0 || r->store->requests[i].group == group)) {
            sum += pow(r->seen[i], power);
            *out_count += 1;
        }
    }
    return sum;
}

static bool is_pure(const reference *r, int32_t node) {
    int32_t group = -1;
    for (int32_t i = 0; i < (int32_t)r->store->num_requests; i++) {
        const int32_t own = r->store->requests[i].group;
        if (is_below(r, i, node) && group >= 0 && own != group) {
            return false;
        }
        group = is_below(r, i, node) ? own : group;
    }
    return true;
}

static double of_group(const reference *r, int32_t group, int power) {
    int count = 0;
    const double own = moment(r, 0, group, power, &count);
    if (count > 0) {
        return own / count;
    }
    const double all = moment(r, 0, -1, power, &count);
    return count > 0 ? all / count : INFINITY;
}

static double of_node(const reference *r, int32_t node, int32_t group, int power) {
    if (node <= 0 || !is_pure(r, node)) {
        return of_group(r, group, power);
    }
    const double prior = of_node(r, r->trie->nodes[node].parent, group, power);
    int count = 0;
    const double own = moment(r, node, -1, power, &count);
    return count > 0 ? (own + 8 * prior) / (count + 8) : prior;
}

static void check_guesses(const reference *r, const raddle_blend_length *lengths) {
    for (int32_t i = 0; i < (int32_t)r->store->num_requests; i++) {
        const raddle_blend_request *request = &r->store->requests[i];
        const double most = request->max_tokens;
        if (r->seen[i] >= 0) {
            CHECK_INT(lengths[i].room, r->seen[i]);
            CHECK(lengths[i].mean == (float)r->seen[i]);
            continue;
        }
        const double mean = fmin(of_node(r, r->node[i], request->group, 1), most);
        const double square = of_node(r, r->node[i], request->group, 2);
        CHECK(fabs(lengths[i].mean - mean) <= 1e-5 * mean);
        if (square <= mean * most && square >= mean * mean) {
            CHECK(fabs(lengths[i].square - square) <= 1e-5 * square);
        }
        CHECK(lengths[i].square >= lengths[i].mean * lengths[i].mean * (1 - 1e-5f));
        CHECK(lengths[i].square <= lengths[i].mean * (float)most * (1 + 1e-5f));
        CHECK(lengths[i].room >= (int32_t)lengths[i].mean && lengths[i].room <= most);
    }
}

static void test_guesses(void) {
    for (int round = 0; round < 200; round++) {
        raddle_blend_store store;
        raddle_blend_trie trie;
        int32_t seen[MOST];
        raddle_blend_length lengths[MOST];
        reference r = {.store = &store, .trie = &trie, .seen = seen};
        raddle_blend_store_init(&store, BLOCK);
        const int32_t count = 1 + random_below(MOST), odds = random_below(11);
        for (int32_t i = 0; i < count; i++) {
            uint64_t blocks[6];
            const int32_t group = random_below(GROUPS), num_blocks = random_below(7);
            for (int32_t k = 0; k < num_blocks; k++) { /* some prefixes of one group, some of all */
                blocks[k] = (uint64_t)(random_below(2) + (round % 2 == 0 ? 10 * group : 0));
            }
            const int32_t output = 1 + random_below(200);
            add(&store, blocks, num_blocks, group, output, output + random_below(100));
            seen[i] = random_below(10) < odds ? output : RADDLE_BLEND_UNKNOWN;
        }
        CHECK_OK(raddle_blend_trie_build(&store, &trie));
        for (int32_t k = 0; k < count; k++) {
            r.node[trie.order[k]] = trie.node_of[k];
        }
        CHECK_OK(raddle_blend_lengths_guess(&store, &trie, seen, NULL, lengths));
        check_guesses(&r, lengths);
        raddle_blend_trie_fini(&trie);
        raddle_blend_store_fini(&store);
    }
}

/* Room is the upper fifth's edge of the group, in proportion to the request's mean. */
static void test_room(void) {
    raddle_blend_store store;
    raddle_blend_trie trie;
    int32_t seen[12];
    raddle_blend_length lengths[12];
    raddle_blend_store_init(&store, BLOCK);
    for (int32_t i = 0; i < 12; i++) {
        add(&store, NULL, 0, 0, 10 * (i + 1), 1000);
        seen[i] = i < 11 ? 10 * (i + 1) : RADDLE_BLEND_UNKNOWN;
    }
    CHECK_OK(raddle_blend_trie_build(&store, &trie));
    CHECK_OK(raddle_blend_lengths_guess(&store, &trie, seen, NULL, lengths));
    CHECK(lengths[11].mean == 60.0f);
    CHECK(lengths[11].square == 4600.0f); /* of 10, 20, ... 110 */
    CHECK_INT(lengths[11].room, 90);
    raddle_blend_trie_fini(&trie);
    raddle_blend_store_fini(&store);
}

static void test_expected_work(void) {
    raddle_blend_store store;
    raddle_blend_store_init(&store, BLOCK);
    for (int32_t i = 0; i < 20; i++) {
        uint64_t blocks[6] = {1, 2, 3, 4, 5, 6};
        add(&store, blocks, random_below(7), 0, 1 + random_below(300), 400);
    }
    for (int32_t i = 0; i < 20; i++) {
        const raddle_blend_request *request = &store.requests[i];
        const raddle_blend_work is = raddle_blend_expected_work(&store, NULL, i, 1000);
        const raddle_blend_work should = raddle_blend_request_work(
            request->prompt_tokens, request->prompt_tokens - 1, request->output_tokens);
        CHECK(is.tokens == should.tokens && is.scores == should.scores);
        CHECK(fabs(is.reads - should.reads) <= 1e-6 * should.reads);
    }
    /* Two lengths as likely: what is read lies between, and is their mean. */
    const raddle_blend_length either = {.mean = 55, .square = 5050, .room = 100}; /* 10 or 100 */
    raddle_blend_length lengths[20];
    lengths[0] = either;
    const double prompt = store.requests[0].prompt_tokens;
    const double reads = (9 * prompt + 45 + 99 * prompt + 4950) / 2;
    CHECK(fabs(raddle_blend_expected_work(&store, lengths, 0, 0).reads - reads) <= 1e-9 * reads);
    raddle_blend_store_fini(&store);
}

/* ------------------------------------------------------------------ under way */

/* Lengths of one group: the outputs of those that ended, what the others have given so far. */
typedef struct observed {
    int32_t count, length[MOST];
    bool has_ended[MOST];
} observed;

static int32_t longest_of(const observed *all) {
    int32_t longest = 0;
    for (int32_t i = 0; i < all->count; i++) {
        longest = all->length[i] > longest ? all->length[i] : longest;
    }
    return longest;
}

/* The share of lengths above t, as Kaplan and Meier define it: of those that were seen to reach u, who
 * did not end there, multiplied over all u up to t. Behind the longest it is 0. */
static double survival(const observed *all, int32_t t) {
    double share = 1;
    for (int32_t u = 1; u <= t; u++) {
        int32_t reached = 0, ended = 0;
        for (int32_t i = 0; i < all->count; i++) {
            reached += all->length[i] >= u;
            ended += all->length[i] == u && all->has_ended[i];
        }
        share *= reached > 0 ? 1 - (double)ended / reached : 0;
    }
    return t < longest_of(all) ? share : 0;
}

/* Mean of the length, or of its square, of those that are longer than so_far. */
static double mean_beyond(const observed *all, int32_t so_far, int power) {
    const double reached = survival(all, so_far);
    double mean = power == 1 ? so_far : (double)so_far * so_far;
    for (int32_t t = so_far; reached > 0 && t < longest_of(all); t++) {
        mean += survival(all, t) / reached * (power == 1 ? 1 : 2 * t + 1);
    }
    return mean;
}

/* The group's shortest length that at most this share is longer than. */
static int32_t exceeded_by(const observed *all, double share) {
    int32_t shortest = longest_of(all);
    for (int32_t i = 0; i < all->count; i++) {
        const bool is_enough = survival(all, all->length[i]) <= share;
        shortest = is_enough && all->length[i] < shortest ? all->length[i] : shortest;
    }
    return shortest;
}

static void check_under_way(const observed *all, const raddle_blend_request *request,
                            int32_t so_far, const raddle_blend_length *is) {
    const double most = request->max_tokens;
    const double mean = fmin(fmax(mean_beyond(all, so_far, 1), 1), most);
    const double square = fmax(fmin(mean_beyond(all, so_far, 2), mean * most), mean * mean);
    const double low = fmax(exceeded_by(all, 0.2 + 1e-9) / mean_beyond(all, 0, 1), 1);
    const double high = fmax(exceeded_by(all, 0.2 - 1e-9) / mean_beyond(all, 0, 1), 1);
    CHECK(fabs(is->mean - mean) <= 1e-6 * mean);
    CHECK(fabs(is->square - square) <= 1e-6 * square);
    CHECK(!is->is_seen && is->mean >= (float)so_far && is->room >= so_far);
    CHECK(is->room >= fmin(mean * low, most) * (1 - 1e-9)); /* rounded up */
    CHECK(is->room <= fmin(mean * high * (1 + 1e-9) + 1, most));
}

typedef enum censoring { NONE_ENDED, ALL_ENDED, LONGEST_UNDER_WAY, ANY, NUM_CENSORINGS } censoring;

/* One group's requests: lengths of few values, and some that have given nothing yet. */
static void add_observed(raddle_blend_store *store, int32_t group, censoring kind, int32_t count,
                         observed *all, int32_t *seen, int32_t *so_far) {
    const int32_t values = 1 + random_below(30), odds = 1 + random_below(9);
    int32_t longest = -1;
    *all = (observed){0};
    for (int32_t k = 0; k < count; k++) {
        const int32_t i = (int32_t)store->num_requests, length = 1 + random_below(values);
        const bool has_ended = kind == ALL_ENDED || (kind != NONE_ENDED && random_below(10) < odds);
        const bool is_observed = has_ended || kind == NONE_ENDED || random_below(4) > 0;
        add(store, NULL, 0, group, RADDLE_BLEND_UNKNOWN, length + random_below(2 * values));
        seen[i] = has_ended ? length : RADDLE_BLEND_UNKNOWN;
        so_far[i] = is_observed && (!has_ended || random_below(2)) ? length : 0;
        if (is_observed) {
            longest = longest < 0 || length >= all->length[longest] ? all->count : longest;
            all->length[all->count] = length;
            all->has_ended[all->count++] = has_ended;
        }
    }
    /* The last is the longest, and under way, or only it has ended. */
    const int32_t last = (int32_t)store->num_requests;
    const int32_t length = kind == LONGEST_UNDER_WAY ? values + 1 + random_below(9) : values;
    add(store, NULL, 0, group, RADDLE_BLEND_UNKNOWN, 2 * length);
    seen[last] = kind == ALL_ENDED ? length : RADDLE_BLEND_UNKNOWN;
    so_far[last] = kind == ALL_ENDED ? 0 : length;
    all->length[all->count] = length;
    all->has_ended[all->count++] = kind == ALL_ENDED;
}

static void test_under_way(void) {
    for (int round = 0; round < 160; round++) {
        raddle_blend_store store;
        raddle_blend_trie trie;
        int32_t seen[MOST], so_far[MOST];
        raddle_blend_length lengths[MOST], again[MOST];
        observed of[GROUPS];
        raddle_blend_store_init(&store, BLOCK);
        for (int32_t g = 0; g < GROUPS; g++) {
            add_observed(&store, g, (censoring)random_below(NUM_CENSORINGS),
                         random_below(MOST / GROUPS - 1), &of[g], seen, so_far);
        }
        CHECK_OK(raddle_blend_trie_build(&store, &trie));
        CHECK_OK(raddle_blend_lengths_guess(&store, &trie, seen, so_far, lengths));
        for (int32_t i = 0; i < (int32_t)store.num_requests; i++) {
            const raddle_blend_request *request = &store.requests[i];
            if (seen[i] >= 0) {
                CHECK(lengths[i].mean == (float)seen[i] && lengths[i].room == seen[i]);
                CHECK(lengths[i].is_seen);
            } else {
                check_under_way(&of[request->group], request, so_far[i], &lengths[i]);
            }
        }
        /* What happens in one group changes nothing in the others. */
        const int32_t other = random_below(GROUPS);
        for (int32_t i = 0; i < (int32_t)store.num_requests; i++) {
            if (store.requests[i].group == other) {
                seen[i] = random_below(2) ? 1 + random_below(500) : RADDLE_BLEND_UNKNOWN;
                so_far[i] = random_below(500);
            }
        }
        CHECK_OK(raddle_blend_lengths_guess(&store, &trie, seen, so_far, again));
        for (int32_t i = 0; i < (int32_t)store.num_requests; i++) {
            const raddle_blend_length *a = &lengths[i], *b = &again[i];
            CHECK(store.requests[i].group == other ||
                  (a->mean == b->mean && a->square == b->square && a->room == b->room));
        }
        raddle_blend_trie_fini(&trie);
        raddle_blend_store_fini(&store);
    }
}

/* Requests that began one after the other, looked at while many still run: those that ended are the
 * short ones. The longer a request has run, the sooner it ends: an even draw from a range. */
static void test_those_that_end_early_do_not_mislead(void) {
    enum { COUNT = 1500, LONGEST = 200 };
    for (int round = 0; round < 12; round++) {
        raddle_blend_store store;
        raddle_blend_trie trie;
        static int32_t seen[COUNT], so_far[COUNT];
        static raddle_blend_length lengths[COUNT];
        double ended = 0, sum = 0, under_way = 0, rest = 0;
        raddle_blend_store_init(&store, BLOCK);
        for (int32_t i = 0; i < COUNT; i++) {
            const int32_t output = 1 + random_below(LONGEST), time = random_below(LONGEST + 20);
            add(&store, NULL, 0, 0, RADDLE_BLEND_UNKNOWN, 1000);
            seen[i] = output <= time ? output : RADDLE_BLEND_UNKNOWN;
            so_far[i] = output <= time ? 0 : time;
            ended += output <= time;
            sum += output <= time ? output : 0;
            under_way += output > time;
            rest += output > time ? output : 0;
        }
        CHECK_OK(raddle_blend_trie_build(&store, &trie));
        CHECK_OK(raddle_blend_lengths_guess(&store, &trie, seen, so_far, lengths));
        const double truth = (1 + LONGEST) / 2.0;
        double guessed = 0, of_one_to_come = 0;
        for (int32_t i = 0; i < COUNT; i++) {
            guessed += seen[i] < 0 ? lengths[i].mean : 0;
            of_one_to_come = seen[i] < 0 && so_far[i] == 0 ? lengths[i].mean : of_one_to_come;
        }
        CHECK(truth - sum / ended > 15); /* so much they mislead */
        CHECK(fabs(of_one_to_come - truth) < 6);
        CHECK(fabs(guessed / under_way - rest / under_way) < 6); /* of those under way, too */
        raddle_blend_trie_fini(&trie);
        raddle_blend_store_fini(&store);
    }
}

/* ------------------------------------------------------------------ samples */

static void test_samples(void) {
    enum { COUNT = 60, SEEDS = 4000 };
    static const int32_t sizes[GROUPS] = {40, 12, 3, 5}, wanted[GROUPS] = {8, 4, 3, 4};
    raddle_blend_store store;
    int32_t picked[COUNT], times[COUNT] = {0};
    int64_t count = -1;
    raddle_blend_store_init(&store, BLOCK);
    for (int32_t g = 0; g < GROUPS; g++) {
        for (int32_t i = 0; i < sizes[g]; i++) {
            add(&store, NULL, 0, g, 5, 5);
        }
    }
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        int32_t of_group[GROUPS] = {0};
        CHECK_OK(raddle_blend_lengths_sample(&store, 0.2, 4, seed, picked, &count));
        CHECK_INT(count, 8 + 4 + 3 + 4);
        for (int64_t k = 0; k < count; k++) {
            CHECK(k == 0 || picked[k] > picked[k - 1]);
            of_group[store.requests[picked[k]].group]++;
            times[picked[k]]++;
        }
        CHECK_INT(memcmp(of_group, wanted, sizeof wanted), 0);
    }
    for (int32_t i = 0; i < COUNT; i++) {
        const int32_t g = store.requests[i].group;
        const double odds = (double)wanted[g] / sizes[g];
        CHECK(fabs(times[i] - SEEDS * odds) <= 5 * sqrt(SEEDS * odds * (1 - odds)));
    }
    CHECK_OK(raddle_blend_lengths_sample(&store, 0, 0, 1, picked, &count));
    CHECK_INT(count, 0);
    CHECK_OK(raddle_blend_lengths_sample(&store, 1, 0, 1, picked, &count));
    CHECK_INT(count, COUNT);
    CHECK_FAILS(raddle_blend_lengths_sample(&store, 1.5, 0, 1, picked, &count), RADDLE_ERR_VALUE,
                "sample_rate: expected 0 to 1, got 1.5");
    CHECK_FAILS(raddle_blend_lengths_sample(&store, NAN, 0, 1, picked, &count), RADDLE_ERR_VALUE,
                "sample_rate");
    CHECK_FAILS(raddle_blend_lengths_sample(&store, 0.1, -1, 1, picked, &count), RADDLE_ERR_VALUE,
                "quota: expected at least 0, got -1");
    raddle_blend_store_fini(&store);
}

int main(void) {
    random_state = 5;
    test_guesses();
    test_room();
    test_under_way();
    test_those_that_end_early_do_not_mislead();
    test_expected_work();
    test_samples();
    CHECK_INT(raddle_alloc_live(), 0);
    return check_report();
}

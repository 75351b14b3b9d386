/* blend.h - the offline scheduler: requests, the tree of their shared prefixes, what steps cost, and
 * what no order can beat. No device code, no Python.
 *
 * Words. A block is block_size tokens of a prompt; requests share a prefix of as many blocks as are
 * equal from the first on. What is left of a prompt behind its last full block is the request's own.
 */
#ifndef RADDLE_BLEND_BLEND_H
#define RADDLE_BLEND_BLEND_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

/* ------------------------------------------------------------------ requests */

enum { RADDLE_BLEND_UNKNOWN = -1 };

typedef struct raddle_blend_request {
    int64_t first_block;   /* of the store's block ids */
    int32_t num_blocks;    /* full ones */
    int32_t prompt_tokens; /* at least num_blocks * block_size */
    int32_t output_tokens; /* or RADDLE_BLEND_UNKNOWN */
    int32_t max_tokens;    /* that may be generated, at least 1 */
    int32_t group;         /* where the request comes from, from 0 on */
    float weight;          /* the user's */
} raddle_blend_request;

typedef struct raddle_blend_store {
    int32_t block_size, num_groups;
    int64_t num_requests, request_capacity;
    int64_t num_blocks, block_capacity;
    raddle_blend_request *requests;
    uint64_t *blocks; /* ids of all requests, one after the other */
} raddle_blend_store;

/* block_size: at least 1. */
void raddle_blend_store_init(raddle_blend_store *store, int32_t block_size);
void raddle_blend_store_fini(raddle_blend_store *store);
/* Appends a request; first_block is filled in. blocks: an id for each full block, equal where the
 * blocks are; ids need not tell prefixes apart. RADDLE_ERR_VALUE names what is wrong. */
raddle_status raddle_blend_store_add(raddle_blend_store *store, const raddle_blend_request *request,
                                     const uint64_t *blocks);
/* The same from the prompt's tokens: num_blocks follows, ids are hashes of the blocks. */
raddle_status raddle_blend_store_add_tokens(raddle_blend_store *store,
                                            const raddle_blend_request *request,
                                            const int32_t *tokens);

/* ------------------------------------------------------------------ the tree of prefixes */

/* A run of blocks that the same requests share. Nodes lie in preorder, the root (no blocks) first,
 * siblings in the order in which their first requests came; a subtree is a range of nodes, and of
 * requests in `order`, the node's own first. */
typedef struct raddle_blend_node {
    int32_t parent; /* -1: the root */
    int32_t end;    /* behind the last node of the subtree */
    int32_t depth;  /* blocks from the root to this node's end */
    int32_t request_begin, request_end;
} raddle_blend_node;

typedef struct raddle_blend_trie {
    int32_t num_nodes, num_requests;
    raddle_blend_node *nodes;
    int32_t *order;          /* requests depth first */
    int32_t *node_of;        /* [num_requests] in the same order: where each ends */
    int64_t distinct_blocks; /* what is left to compute when nothing is computed twice */
} raddle_blend_trie;

/* Compresses chains while it builds: time follows the blocks, memory the requests. */
raddle_status raddle_blend_trie_build(const raddle_blend_store *store, raddle_blend_trie *out_trie);
void raddle_blend_trie_fini(raddle_blend_trie *trie);
/* Blocks that the k-th request of the tree's order shares with those before it (the last of them
 * shares most), and with any other. */
int32_t raddle_blend_trie_shared_before(const raddle_blend_trie *trie, int32_t k);
int32_t raddle_blend_trie_shared(const raddle_blend_trie *trie, int32_t k);
/* Blocks that two requests of the tree's order share, earlier < later. */
int32_t raddle_blend_trie_shared_between(const raddle_blend_trie *trie, int32_t earlier,
                                         int32_t later);

/* ------------------------------------------------------------------ the pool of K and V */

/* What lies in memory, in tokens: shared nodes once each while they are resident, and what requests
 * have for themselves (the ends of their prompts, what they generated). A node stays when the last
 * request that reads it leaves, for as long as one that waits will read it and nobody needs the room;
 * then the least recently used goes first, children before their parents (which count as used when
 * their last child goes). */
typedef struct raddle_blend_pool {
    const raddle_blend_trie *trie;
    int32_t block_size;
    int64_t capacity, shared_tokens, own_tokens;
    int64_t evictable_tokens; /* of shared_tokens: resident and read by no running request */
    struct raddle_blend_residence *nodes; /* [num_nodes] */
    int32_t oldest, newest; /* evictable nodes without resident children, by last use */
} raddle_blend_pool;

raddle_status raddle_blend_pool_init(raddle_blend_pool *pool, const raddle_blend_trie *trie,
                                     int32_t block_size, int64_t capacity);
void raddle_blend_pool_fini(raddle_blend_pool *pool);
/* Tokens of a node's path that are resident. */
int64_t raddle_blend_pool_cached(const raddle_blend_pool *pool, int32_t node);
/* Of them, those that running requests hold: the rest may have to be evicted before it is used. */
int64_t raddle_blend_pool_held(const raddle_blend_pool *pool, int32_t node);
/* Room there is: nobody reads it, or it is free. */
int64_t raddle_blend_pool_room(const raddle_blend_pool *pool);
/* A waiting request that ends at node begins to run with own tokens of its own: its path becomes
 * resident. False, and nothing happens, when there is no room. out_cached: what was resident. */
bool raddle_blend_pool_acquire(raddle_blend_pool *pool, int32_t node, int64_t own,
                               int64_t *out_cached);
/* Another capacity; what nobody runs on goes until it fits, or nothing is left of it. */
void raddle_blend_pool_resize(raddle_blend_pool *pool, int64_t capacity);
/* Running requests need more (less, if negative) for themselves. False as above. */
bool raddle_blend_pool_grow(raddle_blend_pool *pool, int64_t own);
/* A running request ends, or with waits_again steps back to wait. */
void raddle_blend_pool_release(raddle_blend_pool *pool, int32_t node, int64_t own,
                               bool waits_again);

/* ------------------------------------------------------------------ what a step costs */

enum { RADDLE_BLEND_MAX_RATES = 16 };

/* A model on a machine. Rates are what is reached, not what is printed on the box. */
typedef struct raddle_blend_cost {
    double flops_per_token; /* of the GEMMs: two per active parameter */
    double flops_per_score; /* of prefill attention, per query and key: 4 x heads x dim x layers */
    double kv_bytes_per_token; /* of all layers */
    double weight_bytes;       /* that a step reads */
    bool weights_in_gemms;     /* gemm_rate was timed: it has the weights' read in it, which is not
                                    charged a second time. Needs two rates or more */
    double attention_flops_rate; /* per second */
    double read_rate;            /* bytes per second */
    double overhead;             /* seconds of a step besides */
    double
        alpha; /* of the shorter of computing and reading, the share that is not hidden: 0 to 1 */
    int32_t num_rates; /* FLOP/s of GEMMs by tokens, ascending; between them, linear */
    double rate_tokens[RADDLE_BLEND_MAX_RATES], gemm_rate[RADDLE_BLEND_MAX_RATES];
} raddle_blend_cost;

/* What one step, or many, do. */
typedef struct raddle_blend_work {
    double tokens; /* through the GEMMs */
    double scores; /* query-key pairs of prefill attention */
    double reads;  /* tokens of K and V that decode attention reads */
} raddle_blend_work;

typedef struct raddle_blend_limits {
    int64_t pool_tokens; /* of K and V */
    int32_t step_tokens; /* through the GEMMs of a step */
} raddle_blend_limits;

raddle_status raddle_blend_cost_check(const raddle_blend_cost *cost);
double raddle_blend_compute_seconds(const raddle_blend_cost *cost, const raddle_blend_work *step);
double raddle_blend_read_seconds(const raddle_blend_cost *cost, const raddle_blend_work *step);
/* (1 - alpha) max(c, m) + alpha (c + m) + overhead: convex in the work, so that no order of the same
 * work takes less time than equal steps. */
double raddle_blend_step_seconds(const raddle_blend_cost *cost, const raddle_blend_work *step);

/* Of one request: tokens [cached, prompt) are computed, then output tokens are generated. */
raddle_blend_work raddle_blend_request_work(int64_t prompt, int64_t cached, int64_t output);

/* The least time in which any order does `work` in at least least_steps steps: the best number of
 * equal ones. What asks for steps: the longest output, tokens in a step, and memory: tokens that no
 * two requests share, times the steps that they stay, over the pool. After the fluid bound of
 * BlendServe (arXiv 2411.16102), which has no weights, no capacity and no tail. out_steps may be NULL.
 */
double raddle_blend_bound_seconds(const raddle_blend_cost *cost, const raddle_blend_work *work,
                                  double least_steps, double *out_steps);

/* ------------------------------------------------------------------ output lengths */

/* What is thought of a request's output, in tokens. */
typedef struct raddle_blend_length {
    float mean, square; /* of the length; of its square */
    int32_t room;       /* that the forecast gives it */
    bool is_seen;       /* known for certain */
} raddle_blend_length;

/* Picks requests to run first, so that their outputs are seen: of each group the share `rate` or
 * `quota` requests, whichever is more. out_requests: room for all. */
raddle_status raddle_blend_lengths_sample(const raddle_blend_store *store, double rate,
                                          int32_t quota, uint64_t seed, int32_t *out_requests,
                                          int64_t *out_count);
/* seen [num_requests]: lengths, or RADDLE_BLEND_UNKNOWN. The others follow from those of their group
 * and of requests that share a prefix. so_far [num_requests], or NULL: tokens that requests which have
 * not ended have given; a group's lengths then follow its survival curve, so that those that end early
 * do not make them short. */
raddle_status raddle_blend_lengths_guess(const raddle_blend_store *store,
                                         const raddle_blend_trie *trie, const int32_t *seen,
                                         const int32_t *so_far, raddle_blend_length *out_lengths);
raddle_blend_length raddle_blend_length_known(int32_t output);
/* lengths NULL: all are known. */
raddle_blend_length raddle_blend_length_of(const raddle_blend_store *store,
                                           const raddle_blend_length *lengths, int32_t request);
/* raddle_blend_request_work of what is thought. */
raddle_blend_work raddle_blend_expected_work(const raddle_blend_store *store,
                                             const raddle_blend_length *lengths, int32_t request,
                                             int64_t cached);

/* What all requests take when nothing is computed twice, and the steps that it takes at least. */
double raddle_blend_survey(const raddle_blend_store *store, const raddle_blend_trie *trie,
                           const raddle_blend_length *lengths, const raddle_blend_limits *limits,
                           raddle_blend_work *out_work);

/* ------------------------------------------------------------------ the peak that is to come */

/* Tokens that running requests will have for themselves, step by step until they end: each holds
 * base + step, until its expected last step. Buckets of steps, so that a change takes as long with ten
 * requests as with ten thousand; what is asked before the next change is looked up. */
enum { RADDLE_BLEND_BUCKET = 64 }; /* steps */

typedef struct raddle_blend_forecast {
    int64_t now;         /* the step at hand */
    int32_t num_buckets; /* a power of two; bucket b holds ends in [64 b, 64 b + 64), modulo that */
    int32_t last;        /* buckets from now's on that may hold something */
    int64_t *counts, *bases;
    bool is_fresh;           /* the next two are of the buckets as they are, from now's on */
    int64_t *later, *sooner; /* peaks behind a bucket; up to it, with one more request of base 0 */
} raddle_blend_forecast;

/* longest: the most steps that a request runs. */
raddle_status raddle_blend_forecast_init(raddle_blend_forecast *forecast, int64_t longest);
void raddle_blend_forecast_fini(raddle_blend_forecast *forecast);
/* Time passes; what was expected to end before, and did not, is moved to the bucket at hand. */
void raddle_blend_forecast_advance(raddle_blend_forecast *forecast, int64_t now);
/* Requests come and go: count of 1 or -1. end: the bucket's step that it was added with. */
void raddle_blend_forecast_add(raddle_blend_forecast *forecast, int64_t base, int64_t end,
                               int32_t count);
/* The most tokens at once from now on, with one more request that holds base + step until end. */
int64_t raddle_blend_forecast_peak(raddle_blend_forecast *forecast, int64_t base, int64_t end);

/* ------------------------------------------------------------------ policies */

enum { RADDLE_BLEND_MAX_STREAMS = 32, RADDLE_BLEND_LPM_WINDOW = 128 };

typedef enum raddle_blend_policy {
    RADDLE_BLEND_FCFS, /* as they came */
    RADDLE_BLEND_RANDOM,
    RADDLE_BLEND_LPM,     /* as they came, but of a window that with the longest prefix in memory */
    RADDLE_BLEND_DFS,     /* depth first through the tree: all sharing there is */
    RADDLE_BLEND_BALANCE, /* an even mix of densities, in no order of prefixes */
    RADDLE_BLEND_BLEND, /* BlendServe: from the densest and the least dense end at once, memory and
                             tokens shared out so that both together are as dense as the whole */
    RADDLE_BLEND_PACED, /* strata of like density side by side, each depth first; computing and
                            reading meted out so that both last to the end */
    RADDLE_BLEND_NUM_POLICIES
} raddle_blend_policy;

/* "fcfs", "random", ..; find: RADDLE_ERR_VALUE lists them. */
const char *raddle_blend_policy_name(raddle_blend_policy policy);
raddle_status raddle_blend_policy_find(const char *name, raddle_blend_policy *out_policy);

/* Where the next request comes from: the stream that is least far on, in what its requests cost. A
 * paced stream of long outputs keeps a lead, so that none of them is left over at the end. */
typedef struct raddle_blend_plan {
    int32_t num_streams;
    bool is_paced;
    bool is_dual;   /* one stream, taken from both ends */
    int32_t window; /* of a stream's next requests, of which the one with most in memory is taken */
    int32_t *order; /* [num_requests] stream after stream */
    int32_t stream_end[RADDLE_BLEND_MAX_STREAMS];    /* in order */
    double stream_seconds[RADDLE_BLEND_MAX_STREAMS]; /* computing and reading, one by one */
    double stream_output[RADDLE_BLEND_MAX_STREAMS];  /* tokens of a request, on average */
    double gain; /* paced: of the strata one after the other over all at once, in time; at most */
} raddle_blend_plan;

uint64_t raddle_blend_random(uint64_t *state);
/* lengths [num_requests]: what is thought of outputs; NULL: they are known. seed is for
 * RANDOM alone. */
raddle_status raddle_blend_plan_make(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                     const raddle_blend_cost *cost,
                                     const raddle_blend_limits *limits, raddle_blend_policy policy,
                                     const raddle_blend_length *lengths, uint64_t seed,
                                     raddle_blend_plan *out_plan);
void raddle_blend_plan_fini(raddle_blend_plan *plan);
/* Of a request, as the paper has it: seconds of computing over those of reading, where the last token
 * is read too, so that a prompt with one token is not without end. */
double raddle_blend_dual_density(const raddle_blend_store *store, const raddle_blend_cost *cost,
                                 const raddle_blend_length *lengths, int32_t request,
                                 int64_t cached);

/* What a scanner of `blend` sees at its end, and what it gets. */
typedef struct raddle_blend_end {
    double density;        /* raddle_blend_dual_density */
    double prompt, output; /* tokens to compute; to generate */
    double held;           /* tokens of the pool, when half of the output is there */
    double memory, budget; /* out: tokens of the pool; of prompts in a step */
} raddle_blend_end;

/* Shares the pool out between the two ends, so that together they are as dense as the whole, and the
 * tokens of a step by how fast requests take turns in each share (BlendServe, section 5.3). */
void raddle_blend_share_out(double density, double pool, raddle_blend_end ends[2]);

/* What each request adds when all come depth first, seconds added up over the tree's order: the prefix
 * that it shares with the one before it is computed already. */
typedef struct raddle_blend_sums {
    double *compute, *read; /* [num_requests + 1] */
    double tokens;          /* that are computed */
} raddle_blend_sums;

raddle_status raddle_blend_sums_init(raddle_blend_sums *sums, const raddle_blend_store *store,
                                     const raddle_blend_trie *trie, const raddle_blend_cost *cost,
                                     const raddle_blend_length *lengths);
void raddle_blend_sums_fini(raddle_blend_sums *sums);

/* One policy each; plan->order has room. */
raddle_status raddle_blend_plan_balance(const raddle_blend_store *store,
                                        const raddle_blend_cost *cost,
                                        const raddle_blend_length *lengths,
                                        raddle_blend_plan *plan);
raddle_status raddle_blend_plan_dual(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                     const raddle_blend_cost *cost,
                                     const raddle_blend_length *lengths, raddle_blend_plan *plan);
raddle_status raddle_blend_plan_strata(const raddle_blend_store *store,
                                       const raddle_blend_trie *trie, const raddle_blend_cost *cost,
                                       const raddle_blend_limits *limits,
                                       const raddle_blend_length *lengths, raddle_blend_plan *plan);
/* Seconds to compute and to read, as if nothing hid either; weights are read for all, and GEMMs run at
 * the last rate. out_read, the second of them, may be NULL. */
double raddle_blend_plain_seconds(const raddle_blend_cost *cost, const raddle_blend_work *work,
                                  double *out_read);

/* ------------------------------------------------------------------ several replicas */

enum { RADDLE_BLEND_MAX_REPLICAS = 1024 };

typedef struct raddle_blend_shares {
    /* The largest share of all computing or reading that a replica has, with what it computes again. */
    double busiest;
    double tokens, tokens_again; /* that one walk computes; that replicas compute besides */
    int32_t num_runs;            /* of neighbours in the tree that stay together */
} raddle_blend_shares;

/* out_replicas [num_requests]: 0 .. num_replicas - 1, or num_replicas: the share `tail` of the work, in
 * small runs, that belongs to whoever is done first. */
raddle_status raddle_blend_partition(const raddle_blend_store *store, const raddle_blend_trie *trie,
                                     const raddle_blend_cost *cost,
                                     const raddle_blend_length *lengths, int32_t num_replicas,
                                     double tail, int32_t *out_replicas,
                                     raddle_blend_shares *out_shares);

/* ------------------------------------------------------------------ the scheduler */

/* Says what each step does; when a request has given its last token is for the caller to say. */
typedef struct raddle_blend_scheduler raddle_blend_scheduler;

/* Tokens [begin, begin + count) of a request's prompt, to which belongs what it generated before it
 * stepped back. What lies before its first chunk was found in memory. */
typedef struct raddle_blend_chunk {
    int32_t request, begin, count;
    bool is_last; /* gives a token */
} raddle_blend_chunk;

typedef struct raddle_blend_step { /* borrowed until the next one */
    const int32_t *preempted; /* step back before it: what they generated will be computed again */
    const raddle_blend_chunk *chunks;
    int32_t num_preempted, num_chunks, num_decoding;
    raddle_blend_work work;
    int64_t prompt_tokens, hit_tokens; /* of prompts that end in it */
} raddle_blend_step;

typedef struct raddle_blend_counts {
    int64_t steps, preemptions;
    int64_t hit_tokens;               /* of prompts, that were not computed again */
    int64_t computed_tokens;          /* through the GEMMs */
    int64_t recomputed_tokens;        /* of them, after preemptions */
    int64_t held_tokens, peak_tokens; /* of K and V: in the last step; the most */
    int32_t running, decoding, done;  /* requests; running: in memory */
} raddle_blend_counts;

/* Everything but limits is borrowed for the scheduler's life. lengths [num_requests] is what is
 * thought of outputs; NULL: they are known. RADDLE_ERR_VALUE names a request that may not fit in the
 * pool. */
raddle_status
raddle_blend_scheduler_create(const raddle_blend_store *store, const raddle_blend_trie *trie,
                              const raddle_blend_cost *cost, const raddle_blend_limits *limits,
                              const raddle_blend_plan *plan, const raddle_blend_length *lengths,
                              raddle_blend_scheduler **out_scheduler);
void raddle_blend_scheduler_destroy(raddle_blend_scheduler *scheduler);
/* Between steps: memory has room for free_tokens (0 or more) beside what running requests hold, or for
 * what limits.pool_tokens leaves, if that is less; as it is until it is said again. A prompt that is
 * being computed keeps the room that it was admitted with. */
void raddle_blend_scheduler_set_free(raddle_blend_scheduler *scheduler, int64_t free_tokens);
/* What the next step does: decodes come first, chunks of prompts fill it, a request is admitted when
 * its peak fits, as far as output lengths are known. When the pool overflows, the newest steps back.
 * Without work left the step is empty. */
raddle_status raddle_blend_scheduler_begin(raddle_blend_scheduler *scheduler,
                                           raddle_blend_step *out_step);
/* The step is done. ended: requests that gave their last token in it. */
raddle_status raddle_blend_scheduler_end(raddle_blend_scheduler *scheduler, const int32_t *ended,
                                         int32_t num_ended);
/* Tokens that a request has given up to the last step that ended. */
int32_t raddle_blend_scheduler_generated(const raddle_blend_scheduler *scheduler, int32_t request);
const raddle_blend_counts *raddle_blend_scheduler_counts(const raddle_blend_scheduler *scheduler);

/* ------------------------------------------------------------------ what a run takes */

typedef struct raddle_blend_result {
    double seconds, bound_seconds; /* of the run; that no order beats */
    int64_t steps, preemptions;
    int64_t prompt_tokens, output_tokens; /* of all requests */
    int64_t hit_tokens;                   /* of prompts, that were not computed again */
    int64_t computed_tokens;              /* through the GEMMs */
    int64_t recomputed_tokens;            /* of them, after preemptions */
    int64_t peak_tokens;                  /* of K and V */
} raddle_blend_result;

/* What happened over a run, in stretches of equally many steps. */
enum { RADDLE_BLEND_MAX_MOMENTS = 512 };

typedef struct raddle_blend_moment {
    double seconds;                           /* that its steps took */
    double compute, read;                     /* seconds of either, had it been alone */
    double held;                              /* tokens in the pool, of all steps added up */
    int64_t steps, prompt_tokens, hit_tokens; /* of prompts that were computed to their ends */
} raddle_blend_moment;

typedef struct raddle_blend_timeline {
    int64_t steps_each; /* the last stretch may have fewer */
    int32_t count;
    raddle_blend_moment moments[RADDLE_BLEND_MAX_MOMENTS];
} raddle_blend_timeline;

/* The scheduler behind a virtual clock: lengths [num_requests] is what it thinks of outputs, NULL: the
 * truth. RADDLE_ERR_VALUE names a request whose true length is unknown, or that is too large for the
 * pool alone. out_timeline may be NULL. */
raddle_status
raddle_blend_simulate(const raddle_blend_store *store, const raddle_blend_trie *trie,
                      const raddle_blend_cost *cost, const raddle_blend_limits *limits,
                      const raddle_blend_plan *plan, const raddle_blend_length *lengths,
                      raddle_blend_result *out_result, raddle_blend_timeline *out_timeline);

#endif

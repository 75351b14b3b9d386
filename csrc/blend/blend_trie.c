/* blend_trie.c - the tree of shared prefixes, built request by request.
 *
 * A node's label is a run of blocks, named by its place among the store's ids: it is compared there,
 * block after block, and never copied. A hash table finds the child whose label begins with an id;
 * it holds nodes, of which there are two per request at most, and no single blocks. Where a request
 * leaves a label in the middle, the label is cut in two. At last the nodes are laid out in preorder.
 */
#include "blend/blend.h"

#include <stdbool.h>
#include <string.h>

#include "base/alloc.h"

enum { NONE = -1 };

/* While building. Children and requests are pushed in front, the last first. */
typedef struct draft {
    int64_t label;        /* in the store's blocks */
    int32_t label_blocks; /* 0: the root */
    int32_t parent;
    int32_t first_child, next, previous; /* previous of a first child: NONE */
    int32_t first_request;
} draft;

typedef struct builder {
    const raddle_blend_store *store;
    draft *drafts;
    int32_t num_drafts;
    int32_t *next_request; /* [num_requests] that end at the same node */
    int32_t *table;        /* drafts by (parent, first id of the label), open addressing */
    uint32_t mask;
} builder;

/* ------------------------------------------------------------------ children by id */

static uint64_t first_id(const builder *b, int32_t node) {
    return b->store->blocks[b->drafts[node].label];
}

static uint32_t slot_of(const builder *b, int32_t parent, uint64_t id) {
    uint64_t x = id ^ ((uint64_t)(uint32_t)parent * 0x9E3779B97F4A7C15u);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u; /* the finaliser of splitmix64 */
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (uint32_t)(x ^ (x >> 31)) & b->mask;
}

/* The slot of the child that begins with id, or the free one where it belongs. */
static uint32_t find_slot(const builder *b, int32_t parent, uint64_t id) {
    uint32_t slot = slot_of(b, parent, id);
    while (b->table[slot] != NONE &&
           (b->drafts[b->table[slot]].parent != parent || first_id(b, b->table[slot]) != id)) {
        slot = (slot + 1) & b->mask;
    }
    return slot;
}

/* ------------------------------------------------------------------ growing */

static int32_t add_draft(builder *b, int32_t parent, int64_t label, int32_t label_blocks) {
    const int32_t node = b->num_drafts++;
    b->drafts[node] = (draft){
        .label = label,
        .label_blocks = label_blocks,
        .parent = parent,
        .first_child = NONE,
        .next = NONE,
        .previous = NONE,
        .first_request = NONE,
    };
    return node;
}

static void push_child(builder *b, int32_t parent, int32_t node) {
    draft *own = &b->drafts[node];
    own->next = b->drafts[parent].first_child;
    own->previous = NONE;
    if (own->next != NONE) {
        b->drafts[own->next].previous = node;
    }
    b->drafts[parent].first_child = node;
}

static int32_t add_child(builder *b, int32_t parent, int64_t label, int32_t label_blocks) {
    const int32_t node = add_draft(b, parent, label, label_blocks);
    push_child(b, parent, node);
    b->table[find_slot(b, parent, first_id(b, node))] = node;
    return node;
}

/* Cuts a label behind its first `blocks`; returns the new upper node. The lower one keeps its number,
 * and so do the children that name it as their parent. */
static int32_t cut_label(builder *b, int32_t lower, int32_t blocks) {
    const int32_t parent = b->drafts[lower].parent;
    const uint32_t slot = find_slot(b, parent, first_id(b, lower));
    const int32_t upper = add_draft(b, parent, b->drafts[lower].label, blocks);
    draft *low = &b->drafts[lower], *up = &b->drafts[upper];
    up->next = low->next;
    up->previous = low->previous;
    if (up->next != NONE) {
        b->drafts[up->next].previous = upper;
    }
    *(up->previous == NONE ? &b->drafts[parent].first_child : &b->drafts[up->previous].next) =
        upper;
    b->table[slot] = upper;
    low->parent = upper;
    low->label += blocks;
    low->label_blocks -= blocks;
    push_child(b, upper, lower);
    b->table[find_slot(b, upper, first_id(b, lower))] = lower;
    return upper;
}

static void add_request(builder *b, int32_t number) {
    const raddle_blend_request *request = &b->store->requests[number];
    const uint64_t *ids = b->store->blocks + request->first_block;
    int32_t node = 0, at = 0;
    while (at < request->num_blocks) {
        const int32_t child = b->table[find_slot(b, node, ids[at])];
        if (child == NONE) {
            node = add_child(b, node, request->first_block + at, request->num_blocks - at);
            break;
        }
        const draft *edge = &b->drafts[child];
        const uint64_t *label = b->store->blocks + edge->label;
        const int32_t left = request->num_blocks - at;
        const int32_t most = left < edge->label_blocks ? left : edge->label_blocks;
        int32_t equal = 1;
        while (equal < most && label[equal] == ids[at + equal]) {
            equal++;
        }
        node = equal < edge->label_blocks ? cut_label(b, child, equal) : child;
        at += equal;
    }
    b->next_request[number] = b->drafts[node].first_request;
    b->drafts[node].first_request = number;
}

/* ------------------------------------------------------------------ preorder */

/* What was pushed in front comes out in order again. */
static void reverse_lists(builder *b) {
    for (int32_t i = 0; i < b->num_drafts; i++) {
        int32_t *first = &b->drafts[i].first_child, back = NONE;
        for (int32_t child = *first; child != NONE;) {
            const int32_t next = b->drafts[child].next;
            b->drafts[child].next = back;
            back = child;
            child = next;
        }
        *first = back;
        first = &b->drafts[i].first_request;
        back = NONE;
        for (int32_t request = *first; request != NONE;) {
            const int32_t next = b->next_request[request];
            b->next_request[request] = back;
            back = request;
            request = next;
        }
        *first = back;
    }
}

/* A node opens; its requests take their places. */
static void open_node(const builder *b, const draft *from, int32_t parent,
                      raddle_blend_trie *trie) {
    const int32_t number = trie->num_nodes++;
    trie->nodes[number] = (raddle_blend_node){
        .parent = parent,
        .depth = (parent == NONE ? 0 : trie->nodes[parent].depth) + from->label_blocks,
        .request_begin = trie->num_requests,
    };
    trie->distinct_blocks += from->label_blocks;
    for (int32_t request = from->first_request; request != NONE;
         request = b->next_request[request]) {
        trie->node_of[trie->num_requests] = number;
        trie->order[trie->num_requests++] = request;
    }
}

/* Without recursion: a chain of requests that each add a block is as deep as they are many. */
static void lay_out(builder *b, raddle_blend_trie *trie) {
    int32_t at = 0, number = 0; /* the draft at hand, and its number in preorder */
    open_node(b, &b->drafts[0], NONE, trie);
    for (;;) {
        draft *from = &b->drafts[at];
        if (from->first_child != NONE) {
            const int32_t child = from->first_child;
            from->first_child = b->drafts[child].next;
            open_node(b, &b->drafts[child], number, trie);
            number = trie->num_nodes - 1;
            at = child;
            continue;
        }
        trie->nodes[number].end = trie->num_nodes;
        trie->nodes[number].request_end = trie->num_requests;
        if (from->parent == NONE) {
            return;
        }
        at = from->parent;
        number = trie->nodes[number].parent;
    }
}

/* ------------------------------------------------------------------ memory */

static raddle_status take(void **out, size_t count, size_t item_bytes) {
    *out = raddle_alloc(count * item_bytes);
    return *out == NULL ? raddle_fail_memory(count * item_bytes) : RADDLE_OK;
}

static raddle_status open_builder(builder *b, const raddle_blend_store *store) {
    const size_t requests = (size_t)store->num_requests, most = 2 * requests + 1;
    size_t slots = 16;
    while (slots < 2 * most) {
        slots *= 2;
    }
    *b = (builder){.store = store, .mask = (uint32_t)(slots - 1)};
    RADDLE_TRY(take((void **)&b->drafts, most, sizeof(draft)));
    RADDLE_TRY(take((void **)&b->next_request, requests, sizeof(int32_t)));
    RADDLE_TRY(take((void **)&b->table, slots, sizeof(int32_t)));
    memset(b->table, 0xff, slots * sizeof(int32_t)); /* NONE */
    return RADDLE_OK;
}

static void close_builder(builder *b) {
    raddle_free(b->drafts);
    raddle_free(b->next_request);
    raddle_free(b->table);
}

static raddle_status open_trie(const builder *b, raddle_blend_trie *trie) {
    const size_t requests = (size_t)b->store->num_requests;
    RADDLE_TRY(take((void **)&trie->nodes, (size_t)b->num_drafts, sizeof(raddle_blend_node)));
    RADDLE_TRY(take((void **)&trie->order, requests, sizeof(int32_t)));
    return take((void **)&trie->node_of, requests, sizeof(int32_t));
}

int32_t raddle_blend_trie_shared_between(const raddle_blend_trie *trie, int32_t earlier,
                                         int32_t later) {
    int32_t node = trie->node_of[later];
    while (trie->nodes[node].request_begin > earlier) {
        node = trie->nodes[node].parent;
    }
    return trie->nodes[node].depth;
}

int32_t raddle_blend_trie_shared_before(const raddle_blend_trie *trie, int32_t k) {
    return k == 0 ? 0 : raddle_blend_trie_shared_between(trie, k - 1, k);
}

int32_t raddle_blend_trie_shared(const raddle_blend_trie *trie, int32_t k) {
    const raddle_blend_node *node = &trie->nodes[trie->node_of[k]];
    const bool is_alone = node->request_end - node->request_begin == 1;
    return is_alone && node->parent != NONE ? trie->nodes[node->parent].depth : node->depth;
}

void raddle_blend_trie_fini(raddle_blend_trie *trie) {
    raddle_free(trie->nodes);
    raddle_free(trie->order);
    raddle_free(trie->node_of);
    memset(trie, 0, sizeof *trie);
}

raddle_status raddle_blend_trie_build(const raddle_blend_store *store,
                                      raddle_blend_trie *out_trie) {
    builder b;
    raddle_blend_trie trie = {0};
    raddle_status status = open_builder(&b, store);
    if (status == RADDLE_OK) {
        add_draft(&b, NONE, 0, 0);
        for (int32_t i = 0; i < store->num_requests; i++) {
            add_request(&b, i);
        }
        status = open_trie(&b, &trie);
    }
    if (status == RADDLE_OK) {
        reverse_lists(&b);
        lay_out(&b, &trie);
    }
    close_builder(&b);
    if (status != RADDLE_OK) {
        raddle_blend_trie_fini(&trie);
        return status;
    }
    *out_trie = trie;
    return RADDLE_OK;
}

/* py_blend_load.c - arrays of requests become a store of them: one pass, any strides, int32 or int64.
 */
#include "python/py_blend.h"

#include <string.h>

#include "base/alloc.h"

enum {
    MOST_TOKENS = 1 << 20, /* that a request generates of which nobody knows: more than models do */
    MAX_SOURCES = 1 << 20, /* as a store has room for */
};

/* The longest known output of each source: what its requests may generate when nobody says. A
 * request's own would tell the planner what it has to guess. */
typedef struct source_limits {
    int32_t *longest;
    int64_t count;
} source_limits;

/* ------------------------------------------------------------------ checks */

static raddle_status check_ints(const raddle_tensor *tensor, int64_t count) {
    if (tensor == NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_device(tensor, (raddle_device){RADDLE_CPU, 0}));
    RADDLE_TRY(raddle_tensor_check_index_dtype(tensor));
    return raddle_tensor_check_shape(tensor, 1, (const int64_t[]){count});
}

static raddle_status check_weights(const raddle_tensor *tensor, int64_t count) {
    if (tensor == NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_device(tensor, (raddle_device){RADDLE_CPU, 0}));
    RADDLE_TRY(raddle_tensor_check_dtype(tensor, RADDLE_F32));
    return raddle_tensor_check_shape(tensor, 1, (const int64_t[]){count});
}

static raddle_status check_ids(const raddle_tensor *tensor) {
    if (tensor == NULL) {
        return RADDLE_OK;
    }
    RADDLE_TRY(raddle_tensor_check_device(tensor, (raddle_device){RADDLE_CPU, 0}));
    RADDLE_REQUIRE(tensor->dtype == RADDLE_I64 || tensor->dtype == RADDLE_U64, RADDLE_ERR_DTYPE,
                   "hash_ids: expected dtype uint64 or int64, got %s; convert it to uint64",
                   raddle_dtype_name(tensor->dtype));
    return raddle_tensor_check_shape(tensor, 1, (const int64_t[]){-1});
}

/* Which arrays go together; the number of requests. */
static raddle_status check_arrays(const raddle_py_blend_arrays *a, int64_t *out_count) {
    RADDLE_REQUIRE(a->hash_ids == NULL || a->tokens == NULL, RADDLE_ERR_VALUE,
                   "tokens: expected None beside hash_ids; give one of them");
    RADDLE_REQUIRE(a->indptr != NULL || (a->hash_ids == NULL && a->tokens == NULL),
                   RADDLE_ERR_VALUE,
                   "indptr: expected offsets [requests + 1] with hash_ids or tokens, got None");
    RADDLE_REQUIRE(a->indptr == NULL || a->hash_ids != NULL || a->tokens != NULL, RADDLE_ERR_VALUE,
                   "indptr: expected None without hash_ids or tokens; give one of them");
    RADDLE_REQUIRE(a->tokens == NULL || a->input_lengths == NULL, RADDLE_ERR_VALUE,
                   "input_lengths: expected None beside tokens, whose indptr has the lengths");
    RADDLE_REQUIRE(a->tokens != NULL || a->input_lengths != NULL, RADDLE_ERR_VALUE,
                   "input_lengths: expected an array of lengths, got None; give it or tokens");
    RADDLE_TRY(check_ints(a->input_lengths, -1));
    RADDLE_TRY(check_ints(a->indptr, -1));
    RADDLE_REQUIRE(a->indptr == NULL || a->indptr->shape[0] >= 1, RADDLE_ERR_SHAPE,
                   "indptr: expected at least one offset, got none; no requests have [0]");
    const int64_t count =
        a->input_lengths != NULL ? a->input_lengths->shape[0] : a->indptr->shape[0] - 1;
    RADDLE_TRY(check_ints(a->indptr, count + 1));
    RADDLE_TRY(check_ints(a->output_lengths, count));
    RADDLE_TRY(check_ints(a->max_tokens, count));
    RADDLE_TRY(check_ints(a->sources, count));
    RADDLE_TRY(check_weights(a->weights, count));
    RADDLE_TRY(check_ids(a->hash_ids));
    RADDLE_TRY(check_ints(a->tokens, -1));
    *out_count = count;
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ elements */

static raddle_status read_int32(const raddle_tensor *tensor, int64_t i, int32_t *out_value) {
    const int64_t value = raddle_tensor_index_at(tensor, i);
    RADDLE_REQUIRE(value >= INT32_MIN && value <= INT32_MAX, RADDLE_ERR_VALUE,
                   "%s: expected a number of at most 31 bits, got %lld at position %lld",
                   tensor->name, (long long)value, (long long)i);
    *out_value = (int32_t)value;
    return RADDLE_OK;
}

static raddle_status read_int32_or(const raddle_tensor *tensor, int64_t i, int32_t otherwise,
                                   int32_t *out_value) {
    *out_value = otherwise;
    return tensor == NULL ? RADDLE_OK : read_int32(tensor, i, out_value);
}

/* ids as they lie in memory, or a dense copy in *out_copy. */
static raddle_status dense_ids(const raddle_tensor *tensor, const uint64_t **out_ids,
                               void **out_copy) {
    const uint64_t *ids = tensor->data;
    const int64_t count = tensor->shape[0], stride = tensor->stride[0];
    *out_ids = ids;
    if (stride == 1 || count <= 1) {
        return RADDLE_OK;
    }
    uint64_t *copy = raddle_alloc((size_t)count * sizeof(uint64_t));
    if (copy == NULL) {
        return raddle_fail_memory((size_t)count * sizeof(uint64_t));
    }
    for (int64_t i = 0; i < count; i++) {
        copy[i] = ids[i * stride];
    }
    *out_ids = *out_copy = copy;
    return RADDLE_OK;
}

static raddle_status dense_tokens(const raddle_tensor *tensor, const int32_t **out_tokens,
                                  void **out_copy) {
    const int64_t count = tensor->shape[0];
    *out_tokens = tensor->data;
    if (tensor->dtype == RADDLE_I32 && (tensor->stride[0] == 1 || count <= 1)) {
        return RADDLE_OK;
    }
    int32_t *copy = raddle_alloc((size_t)count * sizeof(int32_t));
    if (copy == NULL) {
        return raddle_fail_memory((size_t)count * sizeof(int32_t));
    }
    *out_tokens = *out_copy = copy;
    for (int64_t i = 0; i < count; i++) {
        RADDLE_TRY(read_int32(tensor, i, &copy[i]));
    }
    return RADDLE_OK;
}

/* ------------------------------------------------------------------ all requests */

/* Offsets of request i; the first is where the one before it ended. */
static raddle_status read_range(const raddle_tensor *indptr, int64_t i, int64_t total,
                                int64_t begin, int64_t *out_end) {
    const int64_t end = raddle_tensor_index_at(indptr, i + 1);
    RADDLE_REQUIRE(end >= begin && end <= total, RADDLE_ERR_VALUE,
                   "indptr: expected ascending offsets of at most %lld, got %lld behind %lld at "
                   "position %lld",
                   (long long)total, (long long)end, (long long)begin, (long long)(i + 1));
    RADDLE_REQUIRE(end - begin <= INT32_MAX, RADDLE_ERR_VALUE,
                   "indptr: a request has %lld elements, more than 31 bits count (request %lld)",
                   (long long)(end - begin), (long long)i);
    *out_end = end;
    return RADDLE_OK;
}

/* One that cannot be is refused by the store, which names it. */
static int64_t source_at(const raddle_py_blend_arrays *a, int64_t i) {
    const int64_t source = a->sources != NULL ? raddle_tensor_index_at(a->sources, i) : 0;
    return source >= 0 && source < MAX_SOURCES ? source : 0;
}

static raddle_status find_limits(const raddle_py_blend_arrays *a, int64_t count,
                                 source_limits *limits) {
    if (a->max_tokens != NULL || a->output_lengths == NULL) {
        return RADDLE_OK;
    }
    int64_t num_sources = 1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t source = source_at(a, i);
        num_sources = source >= num_sources ? source + 1 : num_sources;
    }
    limits->longest = raddle_alloc_zero((size_t)num_sources * sizeof(int32_t));
    if (limits->longest == NULL) {
        return raddle_fail_memory((size_t)num_sources * sizeof(int32_t));
    }
    limits->count = num_sources;
    for (int64_t i = 0; i < count; i++) {
        const int64_t source = source_at(a, i);
        const int64_t output = raddle_tensor_index_at(a->output_lengths, i);
        if (source < num_sources && output > limits->longest[source] && output <= INT32_MAX) {
            limits->longest[source] = (int32_t)output;
        }
    }
    return RADDLE_OK;
}

static int32_t default_limit(const source_limits *limits, const raddle_blend_request *request) {
    const bool is_known =
        request->output_tokens >= 1 && request->group >= 0 && request->group < limits->count;
    const int32_t most = is_known ? limits->longest[request->group] : MOST_TOKENS;
    const int32_t room = INT32_MAX - (request->prompt_tokens > 0 ? request->prompt_tokens : 0);
    return most < room ? most : room;
}

static raddle_status read_request(const raddle_py_blend_arrays *a, int64_t i, int32_t own_elements,
                                  const source_limits *limits, raddle_blend_request *out_request) {
    raddle_blend_request request = {.weight = 1};
    if (a->tokens != NULL) {
        request.prompt_tokens = own_elements;
    } else {
        RADDLE_TRY(read_int32(a->input_lengths, i, &request.prompt_tokens));
        request.num_blocks = own_elements;
    }
    RADDLE_TRY(read_int32_or(a->output_lengths, i, RADDLE_BLEND_UNKNOWN, &request.output_tokens));
    RADDLE_TRY(read_int32_or(a->sources, i, 0, &request.group));
    RADDLE_TRY(
        read_int32_or(a->max_tokens, i, default_limit(limits, &request), &request.max_tokens));
    if (a->weights != NULL) {
        request.weight = ((const float *)a->weights->data)[i * a->weights->stride[0]];
    }
    *out_request = request;
    return RADDLE_OK;
}

static raddle_status append_all(const raddle_py_blend_arrays *a, int64_t count,
                                const source_limits *limits, const uint64_t *ids,
                                const int32_t *tokens, raddle_blend_store *store) {
    const raddle_tensor *elements = a->tokens != NULL ? a->tokens : a->hash_ids;
    const int64_t total = elements != NULL ? elements->shape[0] : 0;
    int64_t begin = 0, end = 0;
    if (elements != NULL) {
        begin = end = raddle_tensor_index_at(a->indptr, 0);
        RADDLE_REQUIRE(begin == 0, RADDLE_ERR_VALUE,
                       "indptr: expected 0 as its first offset, got %lld", (long long)begin);
    }
    for (int64_t i = 0; i < count; i++) {
        raddle_blend_request request;
        if (elements != NULL) {
            RADDLE_TRY(read_range(a->indptr, i, total, begin, &end));
        }
        RADDLE_TRY(read_request(a, i, (int32_t)(end - begin), limits, &request));
        RADDLE_TRY(tokens != NULL ? raddle_blend_store_add_tokens(store, &request, tokens + begin)
                                  : raddle_blend_store_add(store, &request, ids + begin));
        begin = end;
    }
    RADDLE_REQUIRE(end == total, RADDLE_ERR_VALUE,
                   "indptr: expected %lld, the elements of %s, as its last offset, got %lld",
                   (long long)total, elements != NULL ? elements->name : "hash_ids",
                   (long long)end);
    return RADDLE_OK;
}

raddle_status raddle_py_blend_load(const raddle_py_blend_arrays *arrays,
                                   raddle_blend_store *store) {
    /* Never read, but there, where no request has any. */
    static const uint64_t no_ids[1] = {0};
    static const int32_t no_tokens[1] = {0};
    int64_t count = 0;
    RADDLE_TRY(check_arrays(arrays, &count));
    const uint64_t *ids = no_ids;
    const int32_t *tokens = NULL;
    void *copy = NULL;
    source_limits limits = {0};
    raddle_status status = find_limits(arrays, count, &limits);
    if (status != RADDLE_OK) {
        return status;
    }
    if (arrays->hash_ids != NULL && arrays->hash_ids->shape[0] > 0) {
        status = dense_ids(arrays->hash_ids, &ids, &copy);
    } else if (arrays->tokens != NULL) {
        tokens = no_tokens;
        if (arrays->tokens->shape[0] > 0) {
            status = dense_tokens(arrays->tokens, &tokens, &copy);
        }
    }
    if (status == RADDLE_OK) {
        status = append_all(arrays, count, &limits, ids, tokens, store);
    }
    raddle_free(copy);
    raddle_free(limits.longest);
    return status;
}

raddle_status raddle_py_blend_load_seen(const raddle_tensor *lengths,
                                        const raddle_blend_store *store, int32_t *out_seen) {
    RADDLE_TRY(check_ints(lengths, store->num_requests));
    for (int64_t i = 0; i < store->num_requests; i++) {
        const int64_t length = raddle_tensor_index_at(lengths, i);
        const int32_t most = store->requests[i].max_tokens;
        RADDLE_REQUIRE(
            length == RADDLE_BLEND_UNKNOWN || (length >= 1 && length <= most), RADDLE_ERR_VALUE,
            "%s: expected 1 to max_tokens (%d), or %d where it was not seen; got %lld "
            "(request %lld)",
            lengths->name, (int)most, RADDLE_BLEND_UNKNOWN, (long long)length, (long long)i);
        out_seen[i] = (int32_t)length;
    }
    return RADDLE_OK;
}

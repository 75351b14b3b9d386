/* attention_prefill.cu - attention of many query rows over a paged or ragged cache; sm_80 and
 * later.
 *
 * What      out and lse of the schedule's segments: up to TILE_ROWS packed rows (query tokens x
 *           query heads of a group) of one K/V head against a K/V range.
 * Grid      one CTA per worker of the schedule; it walks its segments. Block: 4 warps, each with
 *           TILE_ROWS / 4 rows against all 64 tokens of a K/V tile.
 * Shared    where each thread looks (static) | attention_shared.h: Q | K | V | row addresses |
 *           valid bits | folded chunks. One buffer of K and one of V; rows are padded to an odd
 *           number of 16-byte chunks against bank conflicts.
 * Pipeline  cp.async, 16 bytes a thread, gathered row by row, so that any page size and stride is
 *           the same work:
 *           wait K(j) | load V(j) | S = Q K | wait V(j) | load K(j+1) | softmax, O += P V | ..
 *           Row addresses of tile j + 1 are noted while tile j is computed, from page ids that were
 *           loaded one tile earlier.
 * Rows      P stays in registers: the accumulators of S are the A operand of P V. The running state
 *           is per row in base 2; masks touch only tiles at a boundary.
 * Bound     flops. Causal 16384 tokens, 32/8 heads, head_dim 128: 2.2 TFLOP; mma.sync on an H100
 *           ends near 370 of its 990 TFLOP/s.
 */
#include "attention/attention_hooks.cuh"
#include "attention/attention_params.h"
#include "attention/attention_partial.cuh"
#include "attention/attention_shared.h"
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/softmax.cuh"
#include "common/types.cuh"

namespace {

using namespace raddle;

using kv_type = RADDLE_KV_TYPE; /* of q, k and v */
using out_type = RADDLE_OUT_TYPE;
constexpr int HEAD_DIM_QK = RADDLE_HEAD_DIM_QK;
constexpr int HEAD_DIM_VO = RADDLE_HEAD_DIM_VO;
constexpr int TILE_ROWS = RADDLE_TILE_ROWS;
constexpr int STAGES = RADDLE_STAGES; /* tiles of K and of V in shared memory */

constexpr int WARPS = RADDLE_PREFILL_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int TILE_KV = RADDLE_PREFILL_TILE_KV;
constexpr int ROW_TILES = TILE_ROWS / (16 * WARPS); /* mma tiles of 16 rows per warp */
constexpr int TOKEN_TILES = TILE_KV / 8;            /* mma tiles of 8 tokens */
constexpr int K_STEPS = (HEAD_DIM_QK + 15) / 16;
constexpr int DIM_TILES = 2 * ((HEAD_DIM_VO + 15) / 16); /* mma tiles of 8 dims, even */
constexpr int QK_ROW = raddle_prefill_row_bytes(HEAD_DIM_QK);
constexpr int VO_ROW = raddle_prefill_row_bytes(HEAD_DIM_VO);
constexpr int MERGE_IN_FLIGHT = 8;

static_assert(!PAIRS, "K goes from global to shared memory as it is");
static_assert(TILE_ROWS % (16 * WARPS) == 0, "a warp has whole mma tiles of rows");
static_assert(HEAD_DIM_QK % 8 == 0 && HEAD_DIM_VO % 8 == 0, "rows are copied in chunks of 8");
static_assert(STAGES == 1 || STAGES == 2, "the row addresses have two buffers");
static_assert(TILE_ROWS <= THREADS, "one thread per row of Q");
static_assert(TILE_KV == 64 && THREADS == 2 * TILE_KV, "one thread per row of K and of V");

/* What a row outside the range or the pool reads instead. */
__device__ uint4 zeros[32];

struct shared_map {
    char *q, *k, *v;     /* k, v: [STAGES] tiles */
    const char **q_rows; /* [TILE_ROWS]: addresses */
    const char **rows;   /* [2, K and V, TILE_KV]: the same of tile t in buffer t % 2 */
    uint32_t *valid;     /* [4, 2]: bit i: token i of tile t is there, in buffer t % 4 */
    float *fold_out;     /* [DIM_TILES * 4 * ROW_TILES, THREADS] */
    float *fold_state;   /* [ROW_TILES * 2 rows * 2, THREADS] */
};

__device__ __forceinline__ shared_map map_shared(char *base) {
    shared_map m;
    m.q = base;
    m.k = m.q + TILE_ROWS * QK_ROW;
    m.v = m.k + STAGES * TILE_KV * QK_ROW;
    m.q_rows = (const char **)(m.v + STAGES * TILE_KV * VO_ROW);
    m.rows = m.q_rows + TILE_ROWS;
    m.valid = (uint32_t *)(m.rows + 4 * TILE_KV);
    m.fold_out = (float *)(m.valid + 8);
    m.fold_state = m.fold_out + DIM_TILES * 4 * ROW_TILES * THREADS;
    return m;
}

/* ------------------------------------------------------------------ addresses */

/* A run of tokens of one segment that is summed up at once. */
struct piece {
    int32_t segment; /* -1: the worker's list is at its end */
    int32_t begin, end;
    int32_t full_begin, full_end; /* tiles inside see no mask */
    int32_t num_tiles;            /* at least 1: an empty piece has a tile without tokens */
};

/* Where each thread looks: threads 0..63 up K of the tile's tokens, 64..127 their V. Kept in shared
 * memory, since registers are needed for tiles; a thread reads only what it wrote. */
struct lookup {
    const char *base[THREADS];
    int64_t page_bytes[THREADS], token_bytes[THREADS];
    int32_t token[THREADS], end[THREADS];
    int32_t entry[THREADS], offset[THREADS]; /* in the page table; token in the page */
};

/* Page of this thread's token; loaded one tile ahead of its use. */
__device__ __forceinline__ int32_t fetch_page(const raddle_attention_params &p, int32_t token,
                                              int32_t end, int32_t entry) {
    if (p.page_size == 0) {
        return 0;
    }
    return (unsigned)token < (unsigned)end ? p.page_indices[entry] : -1;
}

/* Returns the page for the first note_rows. */
__device__ __forceinline__ int32_t start_lookup(const raddle_attention_params &p,
                                                const raddle_attention_request &request,
                                                int32_t head, int32_t begin, int32_t end,
                                                lookup &at) {
    const int thread = threadIdx.x;
    const bool is_v = thread >= TILE_KV;
    const int64_t head_stride = is_v ? p.v_stride_head : p.k_stride_head;
    const int64_t page_stride = is_v ? p.v_stride_page : p.k_stride_page;
    const int64_t token_stride = is_v ? p.v_stride_token : p.k_stride_token;
    const char *base =
        (const char *)(is_v ? p.v : p.k) + head * head_stride * (int64_t)sizeof(kv_type);
    const int32_t token = begin + thread % TILE_KV;
    int32_t entry = request.kv_begin, offset = token;
    if (p.page_size > 0) {
        const int32_t number = (int32_t)raddle_divide((uint32_t)token, p.page_divisor);
        entry += number;
        offset -= number * p.page_size;
    } else {
        base += request.kv_begin * token_stride * (int64_t)sizeof(kv_type);
        /* Rows past the end of K and V: as out of the pool. */
        end = (int32_t)min((int64_t)end, max(p.num_pages - request.kv_begin, (int64_t)0));
    }
    at.base[thread] = base;
    at.page_bytes[thread] = page_stride * (int64_t)sizeof(kv_type);
    at.token_bytes[thread] = token_stride * (int64_t)sizeof(kv_type);
    at.token[thread] = token;
    at.end[thread] = end;
    at.entry[thread] = entry;
    at.offset[thread] = offset;
    return fetch_page(p, token, end, entry);
}

/* Notes where the rows of tile `tile` lie, and turns to the one after it: returns its page. */
__device__ __forceinline__ int32_t note_rows(const raddle_attention_params &p, const shared_map &m,
                                             int tile, int32_t page, lookup &at) {
    const int thread = thread_here();
    int32_t token = at.token[thread], entry = at.entry[thread], offset = at.offset[thread];
    const int32_t end = at.end[thread];
    const bool in_pool = p.page_size == 0 || (page >= 0 && page < p.num_pages);
    const bool in_range = (unsigned)token < (unsigned)end; /* past 31 bits: not */
    if (!in_pool && in_range) {
        report_page(p, page, entry);
    }
    const bool there = in_range && in_pool;
    const char *row =
        at.base[thread] + page * at.page_bytes[thread] + offset * at.token_bytes[thread];
    m.rows[2 * TILE_KV * (tile % 2) + thread] = there ? row : (const char *)zeros;
    const uint32_t valid = __ballot_sync(ALL_LANES, there);
    if (thread % 32 == 0 && thread < TILE_KV) {
        m.valid[2 * (tile % 4) + thread / 32] = valid;
    }
    token += TILE_KV;
    offset += TILE_KV;
    if (p.page_size > 0 && offset >= p.page_size) {
        const int32_t pages = (int32_t)raddle_divide((uint32_t)offset, p.page_divisor);
        entry += pages;
        offset -= pages * p.page_size;
    }
    at.token[thread] = token;
    at.entry[thread] = entry;
    at.offset[thread] = offset;
    return fetch_page(p, token, end, entry);
}

/* ------------------------------------------------------------------ copies */

/* Copies 16-byte chunks [0, CHUNKS) of ROWS rows, which lie at from[row], into padded rows of shared
 * memory. */
template <int ROWS, int CHUNKS, int ROW_BYTES>
__device__ __forceinline__ void copy_rows(char *to, const char *const *from) {
    constexpr int COLUMNS = CHUNKS > 16 ? 32 : CHUNKS > 8 ? 16 : 8; /* threads per row */
    constexpr int STEP = THREADS / COLUMNS;
    const int thread = thread_here(), chunk = thread % COLUMNS, first = thread / COLUMNS;
    const uint32_t base = shared_address(to) + first * ROW_BYTES + 16 * chunk;
    if (COLUMNS == CHUNKS || chunk < CHUNKS) {
#pragma unroll
        for (int i = 0; i < ROWS / STEP; i++) {
            cp_async_16(base + i * STEP * ROW_BYTES, from[first + i * STEP] + 16 * chunk);
        }
    }
}

__device__ __forceinline__ void copy_k(const shared_map &m, int tile) {
    const char **rows = m.rows + 2 * TILE_KV * (tile % 2);
    copy_rows<TILE_KV, HEAD_DIM_QK / 8, QK_ROW>(m.k + tile % STAGES * TILE_KV * QK_ROW, rows);
}

__device__ __forceinline__ void copy_v(const shared_map &m, int tile) {
    const char **rows = m.rows + 2 * TILE_KV * (tile % 2) + TILE_KV;
    copy_rows<TILE_KV, HEAD_DIM_VO / 8, VO_ROW>(m.v + tile % STAGES * TILE_KV * VO_ROW, rows);
}

__device__ __forceinline__ void copy_q(const shared_map &m) {
    copy_rows<TILE_ROWS, HEAD_DIM_QK / 8, QK_ROW>(m.q, m.q_rows);
}

/* Chunks of 16 dims that a head_dim fills only half: zeros, once, that no copy overwrites. */
__device__ __forceinline__ void clear_padding(const shared_map &m) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    if (HEAD_DIM_QK % 16 != 0) {
        for (int row = threadIdx.x; row < TILE_ROWS + STAGES * TILE_KV; row += THREADS) {
            *(uint4 *)(m.q + row * QK_ROW + 2 * HEAD_DIM_QK) = zero; /* K lies behind Q */
        }
    }
    if (HEAD_DIM_VO % 16 != 0) {
        for (int row = threadIdx.x; row < STAGES * TILE_KV; row += THREADS) {
            *(uint4 *)(m.v + row * VO_ROW + 2 * HEAD_DIM_VO) = zero;
        }
    }
}

/* ------------------------------------------------------------------ compute */

/* A warp's rows: 16 r + g and 16 r + g + 8 of its block, r < ROW_TILES. */
struct accumulator {
    float out[ROW_TILES][DIM_TILES][4];
    float max[ROW_TILES][2];
    float sum[ROW_TILES][2]; /* this lane's share */
};

/* Row of the tile that a thread's first accumulators are of. */
__device__ __forceinline__ int32_t first_row(int32_t thread) {
    return thread / 32 * 16 * ROW_TILES + thread % 32 / 4;
}

typedef float scores[ROW_TILES][TOKEN_TILES][4];

__device__ __forceinline__ void clear(accumulator &acc) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int d = 0; d < DIM_TILES; d++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                acc.out[r][d][x] = 0.0f;
            }
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            acc.max[r][c] = NO_SOFTMAX ? 0.0f : LOGIT_FLOOR;
            acc.sum[r][c] = 0.0f;
        }
    }
}

__device__ __forceinline__ void compute_scores(const shared_map &m, int tile, scores &s) {
    /* The row and half of 16 dims that this lane names to ldmatrix: of Q rows first, of K halves.
     */
    const int thread = thread_here(), lane = thread % 32;
    const uint32_t q = shared_address(m.q) + (thread / 32 * 16 * ROW_TILES + lane % 16) * QK_ROW +
                       16 * (lane / 16);
    const uint32_t k = shared_address(m.k + tile % STAGES * TILE_KV * QK_ROW) +
                       (lane % 8 + 8 * (lane / 16)) * QK_ROW + 16 * (lane / 8 % 2);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            s[r][n][0] = s[r][n][1] = s[r][n][2] = s[r][n][3] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        uint32_t a[ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            ldmatrix_x4(a[r], q + 16 * r * QK_ROW + 32 * step);
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n += 2) {
            uint32_t b[4]; /* tokens 8 n .., 8 n + 8 ..: two halves of 16 dims each */
            ldmatrix_x4(b, k + 8 * n * QK_ROW + 32 * step);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                mma_m16n8k16<kv_type>(s[r][n], a[r][0], a[r][1], a[r][2], a[r][3], b[0], b[1]);
                mma_m16n8k16<kv_type>(s[r][n + 1], a[r][0], a[r][1], a[r][2], a[r][3], b[2], b[3]);
            }
        }
    }
}

/* Tokens that are not there, or that a row does not see. */
__device__ __forceinline__ void mask_scores(const raddle_attention_params &p, int32_t segment_index,
                                            int32_t base, uint64_t valid, scores &s) {
    const raddle_attention_segment &segment = p.segments[segment_index];
    const raddle_attention_request &request = p.requests[segment.request];
    const int32_t thread = thread_here(), j2 = 2 * (thread % 4), row0 = first_row(thread);
    const uint32_t valid_low = (uint32_t)(valid >> j2), valid_high = (uint32_t)(valid >> 32) >> j2;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const unsigned row = (unsigned)(segment.row_begin + row0 + 16 * r + 8 * c);
            const key_range keys = keys_of_token(p, request.qo_len, request.kv_len,
                                                 (int32_t)raddle_divide(row, p.group_divisor));
            const int32_t begin = keys.begin - base - j2, end = keys.end - base - j2;
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int32_t token = 8 * n + e; /* + base + j2 */
                    const uint32_t there = (n < 4 ? valid_low : valid_high) >> (token % 32) & 1;
                    const bool seen = there && token >= begin && token < end;
                    s[r][n][2 * c + e] = seen ? s[r][n][2 * c + e] : negative_infinity();
                }
            }
        }
    }
}

/* By what stored K of the head is to be multiplied with. */
__device__ __forceinline__ void scale_scores(float k_scale, scores &s) {
#pragma unroll
    for (int x = 0; x < ROW_TILES * TOKEN_TILES * 4; x++) {
        s[x / (TOKEN_TILES * 4)][x / 4 % TOKEN_TILES][x % 4] *= k_scale;
    }
}

/* The same where every logit is looked at: scores become logits in base 2, or weights. What a row
 * does not see is -inf, and no hook hears of it. */
__device__ __forceinline__ void finish_scores(const raddle_attention_params &p,
                                              int32_t segment_index, int32_t base, uint64_t valid,
                                              scores &s) {
    const raddle_attention_segment &segment = p.segments[segment_index];
    const int32_t thread = thread_here(), j2 = 2 * (thread % 4), row0 = first_row(thread);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int32_t number = segment.row_begin + row0 + 16 * r + 8 * c;
            const raddle_row row = row_of(p, segment, segment.head, number);
            const key_range keys = keys_of_token(p, row.qo_len, row.kv_len, row.qo_index);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int32_t token = base + 8 * n + j2 + e;
                    float x = s[r][n][2 * c + e] * p.sm_scale;
                    const bool seen = (valid >> (8 * n + j2 + e) & 1) && number < segment.row_end &&
                                      token >= keys.begin && token < keys.end &&
                                      finish_logit(p, row, token, x);
                    s[r][n][2 * c + e] = seen ? x : negative_infinity();
                }
            }
        }
    }
}

/* Without a softmax: weights as they are, the sum counts the keys. */
__device__ __forceinline__ void count_weights(scores &s, accumulator &acc) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const bool seen = s[r][n][x] != negative_infinity();
                acc.sum[r][x / 2] += seen ? 1.0f : 0.0f;
                s[r][n][x] = seen ? s[r][n][x] : 0.0f;
            }
        }
    }
}

__device__ __forceinline__ void update_softmax(float scale, scores &s, accumulator &acc) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float top = s[r][0][2 * c];
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
                top = fmaxf(top, fmaxf(s[r][n][2 * c], s[r][n][2 * c + 1]));
            }
            const float max = fmaxf(acc.max[r][c], reduce_max<1, 4>(top) * scale);
            const float factor = exp2_fast(acc.max[r][c] - max);
            acc.max[r][c] = max;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    s[r][n][2 * c + e] = exp2_fast(fmaf(s[r][n][2 * c + e], scale, -max));
                    sum += s[r][n][2 * c + e];
                }
            }
            acc.sum[r][c] = fmaf(acc.sum[r][c], factor, sum);
#pragma unroll
            for (int d = 0; d < DIM_TILES; d++) {
                acc.out[r][d][2 * c] *= factor;
                acc.out[r][d][2 * c + 1] *= factor;
            }
        }
    }
}

__device__ __forceinline__ void add_values(const shared_map &m, int tile, const scores &s,
                                           accumulator &acc) {
    const int lane = thread_here() % 32; /* names a token and half of 16 dims to ldmatrix */
    const uint32_t v = shared_address(m.v + tile % STAGES * TILE_KV * VO_ROW) + lane % 16 * VO_ROW +
                       16 * (lane / 16);
#pragma unroll
    for (int step = 0; step < TILE_KV / 16; step++) {
        uint32_t a[ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const float(&low)[4] = s[r][2 * step], (&high)[4] = s[r][2 * step + 1];
            a[r][0] = pack2<kv_type>(low[0], low[1]);
            a[r][1] = pack2<kv_type>(low[2], low[3]);
            a[r][2] = pack2<kv_type>(high[0], high[1]);
            a[r][3] = pack2<kv_type>(high[2], high[3]);
        }
#pragma unroll
        for (int d = 0; d < DIM_TILES; d += 2) {
            uint32_t b[4]; /* dims 8 d .., 8 d + 8 ..: two halves of 16 tokens each */
            ldmatrix_x4_trans(b, v + 16 * step * VO_ROW + 16 * d);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                mma_m16n8k16<kv_type>(acc.out[r][d], a[r][0], a[r][1], a[r][2], a[r][3], b[0],
                                      b[1]);
                mma_m16n8k16<kv_type>(acc.out[r][d + 1], a[r][0], a[r][1], a[r][2], a[r][3], b[2],
                                      b[3]);
            }
        }
    }
}

/* ------------------------------------------------------------------ results */

/* A piece is done: the states leave the kernel's form, sums are of the whole row. */
__device__ __forceinline__ softmax_state row_state(const accumulator &acc, int r, int c) {
    return closed_state(acc.max[r][c], reduce_sum<1, 4>(acc.sum[r][c]));
}

__device__ __forceinline__ void write_partial(const raddle_attention_params &p,
                                              const raddle_attention_segment &segment,
                                              const accumulator &acc) {
    const int32_t thread = thread_here(), j2 = 2 * (thread % 4), row0 = first_row(thread);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const softmax_state state = row_state(acc, r, c);
            const int32_t row = row0 + 16 * r + 8 * c; /* in the tile */
            if (segment.row_begin + row >= segment.row_end) {
                continue;
            }
            const int64_t at = partial_row(p, segment.slot, 1, 0, row);
#pragma unroll
            for (int d = 0; d < DIM_TILES; d++) {
                if (8 * d < HEAD_DIM_VO) {
                    *(float2 *)(p.partial_out + at * HEAD_DIM_VO + 8 * d + j2) =
                        make_float2(acc.out[r][d][2 * c], acc.out[r][d][2 * c + 1]);
                }
            }
            if (j2 == 0) {
                ((float2 *)p.partial_state)[at] = make_float2(state.max, state.sum);
            }
        }
    }
}

/* Folds a chunk into what the chunks before it left in shared memory, as merge_partials folds
 * partials: to the same bits. Every thread keeps its own outputs. The sum comes back in acc, with
 * the whole row's sum on every lane when last. */
__device__ __forceinline__ void fold_chunk(const shared_map &m, bool first, accumulator &acc) {
    const int32_t thread = thread_here();
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const softmax_state state = row_state(acc, r, c);
            float *kept_state = m.fold_state + (4 * r + 2 * c) * THREADS + thread;
            const softmax_state before =
                first ? empty_state() : softmax_state{kept_state[0], kept_state[THREADS]};
            softmax_state into = before;
#pragma unroll
            for (int d = 0; d < DIM_TILES; d++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float *kept =
                        m.fold_out + ((r * DIM_TILES + d) * 4 + 2 * c + e) * THREADS + thread;
                    float sum[1] = {first ? 0.0f : *kept};
                    const float part[1] = {acc.out[r][d][2 * c + e]};
                    into = before;
                    fold(into, sum, state, part);
                    *kept = sum[0];
                    acc.out[r][d][2 * c + e] = sum[0];
                }
            }
            kept_state[0] = into.max;
            kept_state[THREADS] = into.sum;
            acc.max[r][c] = into.max;
            acc.sum[r][c] = into.sum;
        }
    }
}

/* folded: sums are of the whole row already. */
__device__ __forceinline__ void write_results(const raddle_attention_params &p,
                                              const raddle_attention_segment &segment, bool folded,
                                              const accumulator &acc) {
    const int32_t thread = thread_here(), j2 = 2 * (thread % 4), row0 = first_row(thread);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const softmax_state whole = row_state(acc, r, c);
            softmax_state state = folded ? softmax_state{acc.max[r][c], acc.sum[r][c]} : whole;
            const int32_t row = segment.row_begin + row0 + 16 * r + 8 * c;
            if (row >= segment.row_end) {
                continue;
            }
            const raddle_row place = row_of(p, segment, segment.head, row);
            const float factor = finish_row(p, place, state);
            const bool empty = factor == 0.0f; /* sees nothing: exactly 0 */
            out_type *out = (out_type *)p.out + place.token * p.out_stride_token +
                            place.qo_head * p.out_stride_head + j2;
#pragma unroll
            for (int d = 0; d < DIM_TILES; d++) {
                if (8 * d < HEAD_DIM_VO) {
                    const float low = empty ? 0.0f : acc.out[r][d][2 * c] * factor;
                    const float high = empty ? 0.0f : acc.out[r][d][2 * c + 1] * factor;
                    store2<out_type>(out + 8 * d, finish_output(p, place, 8 * d + j2, low),
                                     finish_output(p, place, 8 * d + j2 + 1, high));
                }
            }
            if (j2 == 0) {
                write_lse(p, place, state);
            }
        }
    }
}

/* ------------------------------------------------------------------ pieces */

/* Notes down the piece that starts at token begin of a segment, where its Q rows lie, and those of
 * its first tile, which is number `tile` of all. Returns the page for the next note_rows. */
__device__ __forceinline__ int32_t open_piece(const raddle_attention_params &p, const shared_map &m,
                                              int32_t index, int32_t begin, int tile, piece &at,
                                              lookup &look) {
    const int32_t thread = thread_here();
    const raddle_attention_segment &segment = p.segments[index];
    const raddle_attention_request &request = p.requests[segment.request];
    const int32_t fixed_chunk = p.fixed_chunk;
    int32_t end = segment.kv_end;
    if (fixed_chunk > 0 && segment.slot < 0) {
        const unsigned chunk = (unsigned)fixed_chunk;
        end = (int32_t)min((unsigned)end, ((unsigned)begin / chunk + 1) * chunk);
    }
    if (thread == 0) {
        const unsigned first = (unsigned)segment.row_begin, last = (unsigned)segment.row_end - 1;
        at.segment = index;
        at.begin = begin;
        at.end = end;
        at.full_begin = keys_of_token(p, request.qo_len, request.kv_len,
                                      (int32_t)raddle_divide(last, p.group_divisor))
                            .begin;
        at.full_end = keys_of_token(p, request.qo_len, request.kv_len,
                                    (int32_t)raddle_divide(first, p.group_divisor))
                          .end;
        at.num_tiles = max((int32_t)(((unsigned)(end - begin) + TILE_KV - 1) / TILE_KV), 1);
    }
    if (thread < TILE_ROWS) {
        const int32_t row = segment.row_begin + thread;
        const raddle_row place = row_of(p, segment, segment.head, row);
        const kv_type *from =
            (const kv_type *)p.q + place.token * p.q_stride_token + place.qo_head * p.q_stride_head;
        m.q_rows[thread] = row < segment.row_end ? (const char *)from : (const char *)zeros;
    }
    const int32_t page = start_lookup(p, request, segment.head, begin, end, look);
    return note_rows(p, m, tile, page, look);
}

/* The same for what follows `done`: the next chunk of its segment, or the next segment. */
__device__ __forceinline__ int32_t open_next(const raddle_attention_params &p, const shared_map &m,
                                             const piece &done, int tile, piece &at, lookup &look) {
    const bool same_segment = done.end < p.segments[done.segment].kv_end;
    const int32_t index = done.segment + !same_segment;
    if (index >= p.worker_indptr[blockIdx.x + 1]) {
        if (thread_here() == 0) {
            at.segment = -1;
        }
        return -1;
    }
    const int32_t begin = same_segment ? done.end : p.segments[index].kv_begin;
    return open_piece(p, m, index, begin, tile, at, look);
}

/* A piece is summed up: to results, a partial and perhaps its merge, or one more chunk folded. */
__device__ __forceinline__ void finish_piece(const raddle_attention_params &p, const shared_map &m,
                                             const piece &done, int32_t *is_last,
                                             accumulator &acc) {
    const raddle_attention_segment &segment = p.segments[done.segment];
    if (segment.slot >= 0) {
        write_partial(p, segment, acc);
        const raddle_attention_merge &merge = p.merges[segment.merge];
        if (arrive_at_merge(p, segment.merge, merge.num_arrivals, is_last)) {
            merge_partials<out_type, HEAD_DIM_VO, THREADS, MERGE_IN_FLIGHT>(p, merge, 1);
        }
        return;
    }
    const bool first = done.begin == segment.kv_begin;
    const bool last = done.end == segment.kv_end;
    if (!(first && last)) {
        fold_chunk(m, first, acc);
    }
    if (last) {
        write_results(p, segment, !first, acc);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(THREADS, RADDLE_CTAS_PER_SM)
    attention_prefill(const __grid_constant__ kernel_params arguments) {
    const raddle_attention_params &p = arguments.base;
    extern __shared__ __align__(16) char shared[];
    __shared__ int32_t is_last;
    __shared__ lookup look;
    __shared__ piece pieces[2]; /* the one at hand and the next */
    const shared_map m = map_shared(shared);

    launch_dependents();
    clear_padding(m);
    wait_for_predecessors(); /* q, K and V may be theirs */
    const int32_t first_segment = p.worker_indptr[blockIdx.x];
    if (first_segment >= p.worker_indptr[blockIdx.x + 1] ||
        p.header->num_qo_tokens > p.num_qo_tokens) {
        return;
    }
    int32_t page =
        open_piece(p, m, first_segment, p.segments[first_segment].kv_begin, 0, pieces[0], look);
    __syncthreads(); /* the first piece and tile are noted -> every thread copies some rows */
    copy_q(m);
    copy_k(m, 0);
    if (STAGES == 2) {
        copy_v(m, 0);
    }
    cp_async_commit();

    int side = 0; /* of pieces */
    int tile = 0; /* counted through all pieces: names buffers */
#pragma unroll 1
    do {
        const piece &at = pieces[side];
        accumulator acc;
        clear(acc);
        if (STAGES == 2) {
            page = note_rows(p, m, tile + 1, page, look);
        }
        const int end_tile = tile + at.num_tiles;
#pragma unroll 1
        for (int32_t base = at.begin; tile < end_tile; tile++, base += TILE_KV) {
            const bool last = tile + 1 == end_tile;
            cp_async_wait<0>();
            __syncthreads(); /* K (and with two stages V) is here from all threads' copies, the tile
                                before is used up, the next tile's rows are noted -> scores may be
                                computed, the other stage (or V) overwritten */
            if (STAGES == 1) {
                copy_v(m, tile);
            } else if (!last) {
                copy_k(m, tile + 1);
                copy_v(m, tile + 1);
            }
            cp_async_commit();
            if (last) {
                page = open_next(p, m, at, tile + 1, pieces[side ^ 1], look);
            } else {
                page = note_rows(p, m, tile + STAGES, page, look);
            }
            scores s;
            compute_scores(m, tile, s);
            if (STAGES == 1 || last) {
                cp_async_wait<0>();
                __syncthreads(); /* K (and at the end Q) is used up, V is here, the next tile's rows
                                    are noted -> K and Q may be overwritten, values added */
                if (last && pieces[side ^ 1].segment >= 0) {
                    copy_q(m);
                }
                if (!last || pieces[side ^ 1].segment >= 0) {
                    copy_k(m, tile + 1);
                    if (STAGES == 2) {
                        copy_v(m, tile + 1);
                    }
                }
                cp_async_commit();
            }
            const uint32_t *there = m.valid + 2 * (tile % 4);
            const uint64_t valid = there[0] | (uint64_t)there[1] << 32;
            if (p.k_scales) {
                scale_scores(p.k_scales[p.segments[at.segment].head], s);
            }
            if constexpr (EACH_LOGIT) {
                finish_scores(p, at.segment, base, valid, s);
            } else if (valid != ~(uint64_t)0 || base < at.full_begin ||
                       base > at.full_end - TILE_KV) {
                mask_scores(p, at.segment, base, valid, s);
            }
            if constexpr (NO_SOFTMAX) {
                count_weights(s, acc);
            } else {
                update_softmax(EACH_LOGIT ? 1.0f : p.sm_scale_log2, s, acc);
            }
            add_values(m, tile, s, acc);
        }
        finish_piece(p, m, at, &is_last, acc);
        side ^= 1;
    } while (pieces[side].segment >= 0);
}

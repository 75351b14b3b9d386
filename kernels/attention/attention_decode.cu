/* attention_decode.cu - attention of few query rows per K/V head over a paged or ragged cache;
 * sm_80 and later.
 *
 * What      out and lse of the schedule's segments: up to 8 * ROW_TILES packed rows (query heads of
 *           a group x query tokens) against a K/V range, for HEADS neighbouring K/V heads.
 * Grid      one CTA per worker of the schedule; it walks its segments. Block: 8 warps, HEADS heads
 *           x WARPS_PER_HEAD; the warps of a head take tiles of 16 tokens in turn.
 * Idea      a decode step reads every K and V byte once, so nothing is staged: a warp loads a tile
 *           from global memory straight into mma fragments, S^T[16 tokens x 8 rows] = K Q^T and
 *           O^T[dims x 8 rows] = V^T P^T. Pages, strides and gathers only change an address: lane t
 *           looks up K of token t and lane 16 + t its V, the others read what they noted down.
 * Pipeline  STAGES 2:  load B | compute A | load A | compute B | ..
 *           STAGES 1:  scores | load next K | softmax, values | load next V | ..
 *           The first tile of the next piece is loaded before this piece is combined (PREFETCH).
 * Shared    notes of 8 warps (static) | attention_shared.h: outputs and states of 8 warps | q
 *           (Q_IN_SHARED) | folded outputs, two folded states.
 * Results   the warps of a head are combined once per piece, in warp order. A piece is a whole
 *           segment, or in fixed-chunk mode one chunk of an uncut item; chunks are folded as
 *           merge_partials folds partials, to the same bits.
 * Bound     bytes. 64 requests x 4096 tokens, 32/8 heads, head_dim 128, bf16, H100: 1.07 GB, 341 us
 *           at the 3150 GB/s that reads reach.
 */
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
constexpr int HEADS = RADDLE_HEADS_PER_ITEM;
constexpr int ROW_TILES = RADDLE_ROW_TILES; /* of 8 rows */
constexpr int STAGES = RADDLE_STAGES;
constexpr bool Q_IN_SHARED = RADDLE_Q_IN_SHARED;

constexpr int WARPS = RADDLE_DECODE_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int WARPS_PER_HEAD = WARPS / HEADS;
constexpr int TILE = RADDLE_DECODE_TILE_KV;
constexpr int STEP = TILE * WARPS_PER_HEAD; /* tokens between two tiles of a warp */
constexpr int K_CHUNKS =
    (HEAD_DIM_QK + 31) / 32; /* 16-byte chunks of a K row that one lane of a quad holds */
constexpr int V_CHUNKS = (HEAD_DIM_VO + 63) / 64; /* the same of a V row, one lane of eight */
constexpr bool K_WHOLE =
    HEAD_DIM_QK % 32 == 0; /* else the last chunks of some lanes lie past the row */
constexpr bool V_WHOLE = HEAD_DIM_VO % 64 == 0;
constexpr unsigned ALL_TOKENS = 0xffffu;
constexpr bool PREFETCH =
    !Q_IN_SHARED; /* the next piece's first tile: where registers are left for it */
constexpr int MERGE_IN_FLIGHT = RADDLE_CTAS_PER_SM == 1 ? 16 : 8;
constexpr int32_t RAGGED_PAGE = 0x7fffffff; /* ragged K/V: one page without an end */

static_assert(WARPS % HEADS == 0, "heads_per_item must divide the warps");
static_assert(HEAD_DIM_QK % 8 == 0 && HEAD_DIM_VO % 8 == 0,
              "rows are read in chunks of 8 elements");
static_assert(HEAD_DIM_QK <= 256 && HEAD_DIM_VO <= 256, "zeros below holds one row");
static_assert(STAGES == 1 || STAGES == 2, "one or two tiles in registers");

/* What a token outside the range or the pool reads instead. */
__device__ uint4 zeros[32];

struct tile {
    uint4 k[2][K_CHUNKS]; /* tokens g, g + 8: dims 32 i + 8 j .. */
    uint4 v[4][V_CHUNKS]; /* tokens 2j, 2j + 1, 2j + 8, 2j + 9: dims 64 i + 8 g .. */
    unsigned valid;       /* bit t: token t is there */
};

__device__ __forceinline__ uint32_t word(const uint4 &chunk, int i) {
    return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
}

/* ------------------------------------------------------------------ addresses */

/* A run of tokens of one segment that is combined at once. */
struct piece {
    int32_t segment;
    int32_t begin, end;
    int32_t full_begin, full_end; /* tiles inside see no mask */
    int32_t num_tiles;            /* of this warp's head; 0 when there is no such head */
};

/* What a warp notes down per piece and reads again per tile: registers are needed for tiles. */
struct warp_notes {
    const char *base[32]; /* per lane. Lanes 0..15: K of the head, lanes 16..31: V */
    int64_t page_bytes[32];
    int64_t token_bytes[32];
    const char *address[32];                        /* per lane: its token of the tile at hand */
    key_range keys[RADDLE_DECODE_ROWS * ROW_TILES]; /* that the rows see */
    piece at;
};

/* This lane's token of the warp's next tile. The page id is loaded one tile ahead of its use. */
struct lookup {
    int32_t token, end;
    int32_t entry;  /* in the page table */
    int32_t offset; /* token in the page */
    int32_t page;
};

__device__ __forceinline__ void fetch_page(const raddle_attention_params &p, lookup &at) {
    at.page = 0;
    if (p.page_size > 0) {
        at.page = (unsigned)at.token < (unsigned)at.end ? p.page_indices[at.entry] : -1;
    }
}

__device__ __forceinline__ void start_lookup(const raddle_attention_params &p,
                                             const raddle_attention_request &request, int32_t head,
                                             int32_t first, int32_t end, int lane,
                                             warp_notes &notes, lookup &at) {
    const bool is_v = lane >= TILE;
    const int64_t head_stride = is_v ? p.v_stride_head : p.k_stride_head;
    const int64_t page_stride = is_v ? p.v_stride_page : p.k_stride_page;
    const int64_t token_stride = is_v ? p.v_stride_token : p.k_stride_token;
    const char *base =
        (const char *)(is_v ? p.v : p.k) + head * head_stride * (int64_t)sizeof(kv_type);
    at.token = first + (lane & (TILE - 1));
    at.end = end;
    at.entry = request.kv_begin;
    at.offset = at.token;
    if (p.page_size > 0) {
        const int32_t number = (int32_t)((unsigned)at.token / (unsigned)p.page_size);
        at.entry += number;
        at.offset -= number * p.page_size;
    } else {
        base += request.kv_begin * token_stride * (int64_t)sizeof(kv_type);
        /* Rows past the end of K and V: as out of the pool. */
        at.end = (int32_t)min((int64_t)end, max(p.num_pages - request.kv_begin, (int64_t)0));
    }
    notes.base[lane] = base; /* read back by the same lane only */
    notes.page_bytes[lane] = page_stride * (int64_t)sizeof(kv_type);
    notes.token_bytes[lane] = token_stride * (int64_t)sizeof(kv_type);
    fetch_page(p, at);
}

/* Notes the address of this lane's token for the warp's tile at hand (zeros when it is not there),
 * returns which tokens are there, and turns to the warp's next tile. */
__device__ __forceinline__ unsigned next_tile(const raddle_attention_params &p, warp_notes &notes,
                                              int lane, lookup &at) {
    const bool in_pool = p.page_size == 0 || (at.page >= 0 && at.page < p.num_pages);
    const bool in_range = (unsigned)at.token < (unsigned)at.end; /* past 31 bits: not */
    if (!in_pool && in_range) {
        report_page(p, at.page, at.entry);
    }
    const bool there = in_range && in_pool;
    const char *row =
        notes.base[lane] + at.page * notes.page_bytes[lane] + at.offset * notes.token_bytes[lane];
    const unsigned valid = __ballot_sync(ALL_LANES, there) & ALL_TOKENS;
    __syncwarp(); /* the warp has read the addresses of the tile before -> they may be overwritten
                   */
    notes.address[lane] = there ? row : (const char *)zeros;
    __syncwarp(); /* all lanes' addresses are written -> every lane reads those of its rows */

    const int32_t page_size = p.page_size > 0 ? p.page_size : RAGGED_PAGE;
    at.token += STEP;
    at.offset += STEP;
    if (at.offset >= page_size) {
        const int32_t pages =
            page_size >= STEP ? 1 : (int32_t)((unsigned)at.offset / (unsigned)page_size);
        at.entry += pages;
        at.offset -= pages * page_size;
    }
    fetch_page(p, at);
    return valid;
}

/* ------------------------------------------------------------------ loads */

__device__ __forceinline__ void load_k(tile &t, const warp_notes &notes, int g, int j) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const char *row = notes.address[g + 8 * r] + 16 * j;
#pragma unroll
        for (int i = 0; i < K_CHUNKS; i++) {
            if (K_WHOLE || 32 * i + 8 * j < HEAD_DIM_QK) {
                t.k[r][i] = load_streaming(row + 64 * i);
            } else {
                t.k[r][i] = make_uint4(0, 0, 0, 0);
            }
        }
    }
}

__device__ __forceinline__ void load_v(tile &t, const warp_notes &notes, int g, int j) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
        const char *row = notes.address[TILE + 2 * j + (s & 1) + 8 * (s >> 1)] + 16 * g;
#pragma unroll
        for (int i = 0; i < V_CHUNKS; i++) {
            if (V_WHOLE || 64 * i + 8 * g < HEAD_DIM_VO) {
                t.v[s][i] = load_streaming(row + 128 * i);
            } else {
                t.v[s][i] = make_uint4(0, 0, 0, 0);
            }
        }
    }
}

/* Gives every register of a tile a value where none is loaded: one that is set on some paths only
 * would be kept alive through the whole kernel. */
__device__ __forceinline__ void clear(tile &t) {
    t.valid = 0;
#pragma unroll
    for (int i = 0; i < K_CHUNKS; i++) {
        t.k[0][i] = t.k[1][i] = make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < V_CHUNKS; i++) {
        t.v[0][i] = t.v[1][i] = t.v[2][i] = t.v[3][i] = make_uint4(0, 0, 0, 0);
    }
}

/* Q as the B operand: lane (g, j) holds row g of each row tile, dims 32 i + 8 j .. */
__device__ __forceinline__ void load_q(const raddle_attention_params &p,
                                       const raddle_attention_segment &segment,
                                       const raddle_attention_request &request, int32_t head, int g,
                                       int j, uint4 (&q)[ROW_TILES][K_CHUNKS]) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        const int32_t row = segment.row_begin + RADDLE_DECODE_ROWS * n + g;
        const bool there = row < segment.row_end && head < p.num_kv_heads;
        const row_place place = place_of_row(p, request.qo_begin, head, row);
        const kv_type *from =
            (const kv_type *)p.q + place.token * p.q_stride_token + place.head * p.q_stride_head;
#pragma unroll
        for (int i = 0; i < K_CHUNKS; i++) {
            q[n][i] = make_uint4(0, 0, 0, 0);
            if (there && (K_WHOLE || 32 * i + 8 * j < HEAD_DIM_QK)) {
                q[n][i] = *(const uint4 *)(from + 32 * i + 8 * j);
            }
        }
    }
}

/* ------------------------------------------------------------------ compute */

/* The running state of a warp: rows 2j and 2j + 1 of each row tile. sum is this lane's share
 * (tokens g and g + 8). */
struct accumulator {
    float out[ROW_TILES][4 * V_CHUNKS]
             [4]; /* dims 64 i + 8 g + 2 e, + 1 at [4 i + e]: (dim, row) as mma lays them */
    float max[ROW_TILES][2];
    float sum[ROW_TILES][2];
};

__device__ __forceinline__ void clear(accumulator &acc) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int m = 0; m < 4 * V_CHUNKS; m++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                acc.out[n][m][x] = 0.0f;
            }
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            acc.max[n][c] = LOGIT_FLOOR;
            acc.sum[n][c] = 0.0f;
        }
    }
}

/* s[n]: tokens g (0, 1) and g + 8 (2, 3) against rows 2j, 2j + 1. */
__device__ __forceinline__ void compute_scores(const tile &t, const uint4 (&q)[ROW_TILES][K_CHUNKS],
                                               const uint4 *shared_q, float (&s)[ROW_TILES][4]) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
        for (int i = 0; i < K_CHUNKS; i++) {
            const uint4 b = Q_IN_SHARED ? shared_q[32 * (n * K_CHUNKS + i)] : q[n][i];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                mma_m16n8k16<kv_type>(s[n], word(t.k[0][i], 2 * e), word(t.k[1][i], 2 * e),
                                      word(t.k[0][i], 2 * e + 1), word(t.k[1][i], 2 * e + 1),
                                      word(b, 2 * e), word(b, 2 * e + 1));
            }
        }
    }
}

/* Tokens that are not there, or that a row does not see. Only tiles at a boundary come here. */
__device__ __forceinline__ void mask_scores(const warp_notes &notes, int32_t base, unsigned valid,
                                            int g, int j, float (&s)[ROW_TILES][4]) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const key_range keys = notes.keys[RADDLE_DECODE_ROWS * n + 2 * j + c];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int32_t token = base + g + 8 * r;
                const bool seen =
                    (valid >> (g + 8 * r) & 1u) && token >= keys.begin && token < keys.end;
                s[n][2 * r + c] = seen ? s[n][2 * r + c] : negative_infinity();
            }
        }
    }
}

/* Turns scores into weights relative to the running maximum, which moves (and everything summed so
 * far with it) only when some row of the tile has a larger one. */
__device__ __forceinline__ void update_softmax(float scale, float (&s)[ROW_TILES][4],
                                               accumulator &acc) {
    float top[ROW_TILES][2];
    bool larger = false;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            top[n][c] = fmaxf(s[n][c], s[n][2 + c]) * scale;
            larger = larger || top[n][c] > acc.max[n][c];
        }
    }
    if (__any_sync(ALL_LANES, larger)) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float max = fmaxf(acc.max[n][c], reduce_max<4, 32>(top[n][c]));
                const float factor = exp2_fast(acc.max[n][c] - max);
                acc.max[n][c] = max;
                acc.sum[n][c] *= factor;
#pragma unroll
                for (int m = 0; m < 4 * V_CHUNKS; m++) {
                    acc.out[n][m][c] *= factor;
                    acc.out[n][m][2 + c] *= factor;
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            s[n][c] = exp2_fast(fmaf(s[n][c], scale, -acc.max[n][c]));
            s[n][2 + c] = exp2_fast(fmaf(s[n][2 + c], scale, -acc.max[n][c]));
            acc.sum[n][c] += s[n][c] + s[n][2 + c];
        }
    }
}

__device__ __forceinline__ void add_values(const tile &t, const float (&s)[ROW_TILES][4],
                                           accumulator &acc) {
    uint32_t b[ROW_TILES][2];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        b[n][0] = movmatrix_trans(pack2<kv_type>(s[n][0], s[n][1]));
        b[n][1] = movmatrix_trans(pack2<kv_type>(s[n][2], s[n][3]));
    }
#pragma unroll
    for (int i = 0; i < V_CHUNKS; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t x0 = word(t.v[0][i], e), x1 = word(t.v[1][i], e);
            const uint32_t x2 = word(t.v[2][i], e), x3 = word(t.v[3][i], e);
            const uint32_t a0 = __byte_perm(x0, x1, 0x5410), a1 = __byte_perm(x0, x1, 0x7632);
            const uint32_t a2 = __byte_perm(x2, x3, 0x5410), a3 = __byte_perm(x2, x3, 0x7632);
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                mma_m16n8k16<kv_type>(acc.out[n][4 * i + e], a0, a1, a2, a3, b[n][0], b[n][1]);
            }
        }
    }
}

/* ------------------------------------------------------------------ combine, fold, write */

struct shared_map {
    float *out;         /* [WARPS, tile_rows, HEAD_DIM_VO] */
    float2 *state;      /* [WARPS, tile_rows] */
    uint4 *q;           /* [WARPS, ROW_TILES * K_CHUNKS, 32] */
    float *fold_out;    /* [HEADS, tile_rows, HEAD_DIM_VO] */
    float2 *fold_state; /* [2, HEADS, tile_rows] */
};

__device__ __forceinline__ shared_map map_shared(char *base, int32_t tile_rows) {
    shared_map m;
    m.out = (float *)base;
    base += raddle_decode_out_bytes(tile_rows, HEAD_DIM_VO);
    m.state = (float2 *)base;
    base += raddle_decode_state_bytes(tile_rows);
    m.q = (uint4 *)base;
    base += Q_IN_SHARED ? raddle_decode_q_bytes(HEAD_DIM_QK, ROW_TILES) : 0;
    m.fold_out = (float *)base;
    base += HEADS * tile_rows * HEAD_DIM_VO * 4;
    m.fold_state = (float2 *)base;
    return m;
}

/* Leaves the warp's state in shared memory. */
__device__ __forceinline__ void write_warp(const shared_map &m, int32_t tile_rows, int32_t rows,
                                           int warp, int g, int j, accumulator &acc) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float sum = reduce_sum<4, 32>(acc.sum[n][c]);
            const int32_t row = RADDLE_DECODE_ROWS * n + 2 * j + c;
            if (row >= rows) {
                continue;
            }
            float *to = m.out + (warp * tile_rows + row) * HEAD_DIM_VO + 8 * g;
#pragma unroll
            for (int i = 0; i < V_CHUNKS; i++) {
                if (V_WHOLE || 64 * i + 8 * g < HEAD_DIM_VO) {
                    const float(*o)[4] = &acc.out[n][4 * i];
                    *(float4 *)(to + 64 * i) =
                        make_float4(o[0][c], o[0][2 + c], o[1][c], o[1][2 + c]);
                    *(float4 *)(to + 64 * i + 4) =
                        make_float4(o[2][c], o[2][2 + c], o[3][c], o[3][2 + c]);
                }
            }
            if (g == 0) {
                const softmax_state state = closed_state(acc.max[n][c], sum);
                m.state[warp * tile_rows + row] = make_float2(state.max, state.sum);
            }
        }
    }
}

/* Four neighbouring outputs of a row, added up over the warps of its head. */
__device__ __forceinline__ softmax_state combine_warps(const shared_map &m, int32_t tile_rows,
                                                       int32_t head, int32_t row, int32_t dim,
                                                       float (&acc)[4]) {
    softmax_state state = empty_state();
#pragma unroll
    for (int k = 0; k < WARPS_PER_HEAD; k++) {
        state.max = fmaxf(state.max, m.state[(head * WARPS_PER_HEAD + k) * tile_rows + row].x);
    }
    const float base = state.max == negative_infinity() ? 0.0f : state.max;
    acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS_PER_HEAD; k++) {
        const int32_t at = (head * WARPS_PER_HEAD + k) * tile_rows + row;
        const float2 part = m.state[at];
        const float4 out = *(const float4 *)(m.out + at * HEAD_DIM_VO + dim);
        const float factor = exp2_fast(part.x - base);
        state.sum = fmaf(part.y, factor, state.sum);
        acc[0] = fmaf(out.x, factor, acc[0]);
        acc[1] = fmaf(out.y, factor, acc[1]);
        acc[2] = fmaf(out.z, factor, acc[2]);
        acc[3] = fmaf(out.w, factor, acc[3]);
    }
    return state;
}

/* Folds a chunk into what the chunks before it left in shared memory, and leaves the sum there. A
 * thread meets the same outputs in every chunk; the states are read by several threads, so they
 * change sides. */
__device__ __forceinline__ void fold_chunk(const shared_map &m, int32_t tile_rows, int32_t head,
                                           int32_t row, int32_t dim, bool first, int side,
                                           softmax_state &state, float (&acc)[4]) {
    const int32_t at = head * tile_rows + row;
    float4 *kept = (float4 *)(m.fold_out + at * HEAD_DIM_VO + dim);
    softmax_state into = empty_state();
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!first) {
        const float2 before = m.fold_state[side * HEADS * tile_rows + at];
        const float4 out = *kept;
        into = softmax_state{before.x, before.y};
        sum[0] = out.x, sum[1] = out.y, sum[2] = out.z, sum[3] = out.w;
    }
    fold(into, sum, state, acc);
    *kept = make_float4(sum[0], sum[1], sum[2], sum[3]);
    if (dim == 0) {
        m.fold_state[(side ^ 1) * HEADS * tile_rows + at] = make_float2(into.max, into.sum);
    }
    state = into;
    acc[0] = sum[0], acc[1] = sum[1], acc[2] = sum[2], acc[3] = sum[3];
}

/* Four neighbouring outputs of the item, by their number. */
struct quad {
    int32_t head, row, dim;
};

__device__ __forceinline__ quad quad_at(int32_t i, int32_t rows) {
    constexpr int QUADS = HEAD_DIM_VO / 4;
    const unsigned row_of_item = (unsigned)i / QUADS;
    return quad{(int32_t)(row_of_item / (unsigned)rows), (int32_t)(row_of_item % (unsigned)rows),
                4 * (i % QUADS)};
}

__device__ __forceinline__ int32_t count_quads(const raddle_attention_params &p,
                                               const raddle_attention_segment &segment) {
    const int32_t heads = min(HEADS, p.num_kv_heads - segment.head);
    return heads * (segment.row_end - segment.row_begin) * (HEAD_DIM_VO / 4);
}

/* The warps' states are in shared memory: adds them up to a partial. */
__device__ __forceinline__ void finish_cut(const raddle_attention_params &p, const shared_map &m,
                                           int32_t segment_index) {
    const raddle_attention_segment &segment = p.segments[segment_index];
    const int32_t count = count_quads(p, segment);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < count; i += THREADS) {
        const quad at = quad_at(i, segment.row_end - segment.row_begin);
        float acc[4];
        const softmax_state state = combine_warps(m, p.tile_rows, at.head, at.row, at.dim, acc);
        const int64_t to = partial_row(p, segment.slot, HEADS, at.head, at.row);
        *(float4 *)(p.partial_out + to * HEAD_DIM_VO + at.dim) =
            make_float4(acc[0], acc[1], acc[2], acc[3]);
        if (at.dim == 0) {
            ((float2 *)p.partial_state)[to] = make_float2(state.max, state.sum);
        }
    }
}

/* The same: to results, or to one more chunk folded. */
__device__ __forceinline__ void finish_uncut(const raddle_attention_params &p, const shared_map &m,
                                             const piece &done, int &side) {
    const raddle_attention_segment &segment = p.segments[done.segment];
    const int32_t qo_begin = p.requests[segment.request].qo_begin;
    const int32_t count = count_quads(p, segment);
    const bool first = done.begin == segment.kv_begin;
    const bool last = done.end == segment.kv_end;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < count; i += THREADS) {
        const quad at = quad_at(i, segment.row_end - segment.row_begin);
        float acc[4];
        softmax_state state = combine_warps(m, p.tile_rows, at.head, at.row, at.dim, acc);
        if (!(first && last)) {
            fold_chunk(m, p.tile_rows, at.head, at.row, at.dim, first, side, state, acc);
        }
        if (last) {
            const row_place place =
                place_of_row(p, qo_begin, segment.head + at.head, segment.row_begin + at.row);
            write_result<out_type>(p, place, at.dim, acc, state);
        }
    }
    side ^= 1;
}

/* ------------------------------------------------------------------ pieces */

/* Notes down the piece that starts at token begin of a segment, and what this lane needs to read
 * it. */
__device__ __forceinline__ void open_piece(const raddle_attention_params &p, int32_t segment_index,
                                           int32_t begin, int head_of_item, int tile_of_warp,
                                           int lane, warp_notes &notes, lookup &look) {
    const raddle_attention_segment &segment = p.segments[segment_index];
    const raddle_attention_request request = p.requests[segment.request];
    const int32_t head = segment.head + head_of_item;
    const int32_t fixed_chunk = p.header->fixed_chunk;
    int32_t end = segment.kv_end;
    if (fixed_chunk > 0 && segment.slot < 0) {
        const unsigned chunk = (unsigned)fixed_chunk;
        end = (int32_t)min((unsigned)end, ((unsigned)begin / chunk + 1) * chunk);
    }
    const bool has_head = head < p.num_kv_heads;
    const unsigned group = (unsigned)p.group_size;
    __syncwarp(); /* the warp has read its notes on the piece before -> they may be overwritten */
    if (lane < RADDLE_DECODE_ROWS * ROW_TILES) {
        /* Rows past the tile see what its last row sees; nobody reads what they get. */
        const unsigned row = (unsigned)min(segment.row_begin + lane, segment.row_end - 1);
        notes.keys[lane] = keys_of_token(p, request.qo_len, request.kv_len, (int32_t)(row / group));
    }
    if (lane == 0) {
        const unsigned first = (unsigned)segment.row_begin, last = (unsigned)segment.row_end - 1;
        notes.at.segment = segment_index;
        notes.at.begin = begin;
        notes.at.end = end;
        notes.at.full_begin =
            keys_of_token(p, request.qo_len, request.kv_len, (int32_t)(last / group)).begin;
        notes.at.full_end =
            keys_of_token(p, request.qo_len, request.kv_len, (int32_t)(first / group)).end;
        notes.at.num_tiles = has_head ? (int32_t)(((unsigned)(end - begin) + TILE - 1) / TILE) : 0;
    }
    start_lookup(p, request, head, begin + TILE * tile_of_warp, has_head ? end : begin, lane, notes,
                 look);
    __syncwarp(); /* the piece and the keys of all rows are written -> every lane reads them */
}

} // namespace

extern "C" __global__ void __launch_bounds__(THREADS, RADDLE_CTAS_PER_SM)
    attention_decode(const __grid_constant__ raddle_attention_params p) {
    extern __shared__ __align__(16) char shared[];
    __shared__ int32_t is_last;
    __shared__ warp_notes all_notes[WARPS];
    const shared_map map = map_shared(shared, p.tile_rows);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, j = lane % 4;
    const int head_of_item = warp / WARPS_PER_HEAD, tile_of_warp = warp % WARPS_PER_HEAD;
    warp_notes &notes = all_notes[warp];
    uint4 *shared_q = map.q + warp * ROW_TILES * K_CHUNKS * 32 + lane;

    launch_dependents();
    const piece &at = notes.at;
    lookup look;
    const int32_t first_segment = p.worker_indptr[blockIdx.x];
    if (first_segment < p.worker_indptr[blockIdx.x + 1]) {
        open_piece(p, first_segment, p.segments[first_segment].kv_begin, head_of_item, tile_of_warp,
                   lane, notes, look);
    }
    wait_for_predecessors(); /* the schedule is older than they are; q, K and V may be theirs */
    if (first_segment >= p.worker_indptr[blockIdx.x + 1]) {
        return;
    }

    tile a;
    const auto load = [&](tile &t) {
        t.valid = next_tile(p, notes, lane, look);
        load_k(t, notes, g, j);
        load_v(t, notes, g, j);
    };
    uint4 q[ROW_TILES][K_CHUNKS];
    const auto begin_piece = [&]() {
        const raddle_attention_segment &segment = p.segments[at.segment];
        if (tile_of_warp < at.num_tiles) {
            load(a);
        } else {
            clear(a);
        }
        load_q(p, segment, p.requests[segment.request], segment.head + head_of_item, g, j, q);
        if (Q_IN_SHARED) {
#pragma unroll
            for (int x = 0; x < ROW_TILES * K_CHUNKS; x++) {
                shared_q[32 * x] =
                    q[x / K_CHUNKS][x % K_CHUNKS]; /* read back by the same lane only */
            }
        }
    };
    /* Weights of a tile's tokens from their scores. */
    const auto weigh = [&](float(&s)[ROW_TILES][4], unsigned valid, int32_t base,
                           accumulator &acc) {
        if (valid != ALL_TOKENS || base < at.full_begin || base > at.full_end - TILE) {
            mask_scores(notes, base, valid, g, j, s);
        }
        update_softmax(p.sm_scale_log2, s, acc);
    };
    const auto compute = [&](const tile &t, int32_t number, accumulator &acc) {
        float s[ROW_TILES][4];
        compute_scores(t, q, shared_q, s);
        weigh(s, t.valid, at.begin + TILE * number, acc);
        add_values(t, s, acc);
    };

    if (PREFETCH) {
        begin_piece();
    }
    int side = 0; /* of the folded states */
#pragma unroll 1
    for (;;) {
        if (!PREFETCH) {
            begin_piece();
        }
        accumulator acc;
        clear(acc);
        if constexpr (STAGES == 2) {
#pragma unroll 1
            for (int32_t t = tile_of_warp; t < at.num_tiles; t += 2 * WARPS_PER_HEAD) {
                tile b;
                const bool has_b = t + WARPS_PER_HEAD < at.num_tiles;
                if (has_b) {
                    load(b);
                } else {
                    clear(b);
                }
                compute(a, t, acc);
                if (has_b) {
                    if (t + 2 * WARPS_PER_HEAD < at.num_tiles) {
                        load(a);
                    }
                    compute(b, t + WARPS_PER_HEAD, acc);
                }
            }
        } else {
#pragma unroll 1
            for (int32_t t = tile_of_warp; t < at.num_tiles; t += WARPS_PER_HEAD) {
                const bool has_next = t + WARPS_PER_HEAD < at.num_tiles;
                const unsigned valid = a.valid;
                float s[ROW_TILES][4];
                compute_scores(a, q, shared_q, s);
                if (has_next) {
                    a.valid = next_tile(p, notes, lane, look);
                    load_k(a, notes, g, j);
                }
                weigh(s, valid, at.begin + TILE * t, acc);
                add_values(a, s, acc);
                if (has_next) {
                    load_v(a, notes, g, j);
                }
            }
        }

        /* What follows: the next chunk of the segment, or the next segment. */
        const piece done = at;
        const bool same_segment = done.end < p.segments[done.segment].kv_end;
        const int32_t next_segment = done.segment + !same_segment;
        const bool more = next_segment < p.worker_indptr[blockIdx.x + 1];
        if (more) {
            const int32_t begin = same_segment ? done.end : p.segments[next_segment].kv_begin;
            open_piece(p, next_segment, begin, head_of_item, tile_of_warp, lane, notes, look);
        }
        const raddle_attention_segment &segment = p.segments[done.segment];
        const bool is_cut = segment.slot >= 0;
        if (PREFETCH && more && !is_cut) {
            begin_piece();
        }
        __syncthreads(); /* every thread has read the warps' states of the piece before -> they may
                            be overwritten */
        write_warp(map, p.tile_rows, segment.row_end - segment.row_begin, warp, g, j, acc);
        __syncthreads(); /* the warps' states are written -> every thread combines them */
        if (is_cut) {
            finish_cut(p, map, done.segment);
            if (arrive_at_merge(p, segment.merge, &is_last)) {
                merge_partials<out_type, HEADS, HEAD_DIM_VO, THREADS, MERGE_IN_FLIGHT>(
                    p, segment.merge);
            }
            if (!more) {
                break;
            }
            if (PREFETCH) {
                begin_piece(); /* not before: a merge needs the registers */
            }
        } else {
            finish_uncut(p, map, done, side);
            if (!more) {
                break;
            }
        }
    }
}

/* attention_decode_tile.cuh - a warp's tile of 16 tokens in attention_decode: where its K and V lie,
 * how they reach registers, and how they meet q and the weights as mma fragments.
 *
 * Lane = 4 g + j. A chunk is 16 bytes, ELEMENTS of a stored row.
 * K     lane (g, j) holds chunks (k_chunk) of tokens g and g + 8. The order of a dot product is free
 *       as long as both sides agree, so that neighbouring words of a chunk are a k-step. Where pairs
 *       of elements are looked at together (rotary), it holds chunk and chunk + half a row instead.
 * V     lane (g, j) holds chunks 8 i + g of tokens 2j, 2j + 1, 2j + 8, 2j + 9; two dims of the four
 *       tokens are an A fragment.
 * Half  a tile is 16 tokens, or two times 16 where 8-bit rows leave registers for it.
 * 8 bit K and V become f16 in registers, exactly, and q with them: each of its rows is scaled by a
 *       power of two into f16's range, which the scores are multiplied back with.
 */
#ifndef RADDLE_ATTENTION_DECODE_TILE_CUH
#define RADDLE_ATTENTION_DECODE_TILE_CUH

#include "attention/attention_hooks.cuh"
#include "attention/attention_partial.cuh"
#include "attention/attention_shared.h"
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/softmax.cuh"
#include "common/types.cuh"

namespace raddle {

using q_type = RADDLE_Q_TYPE;
using kv_type = RADDLE_KV_TYPE;
using out_type = RADDLE_OUT_TYPE;
constexpr bool IS_FP8 = sizeof(kv_type) == 1;
template <bool fp8> struct operand { using type = kv_type; };
template <> struct operand<true> { using type = f16; };
using mma_type = operand<IS_FP8>::type;
constexpr bool SCALED_ROWS = IS_FP8 && !is_same<q_type, f16>::value;

constexpr int HEAD_DIM_QK = RADDLE_HEAD_DIM_QK;
constexpr int HEAD_DIM_VO = RADDLE_HEAD_DIM_VO;
constexpr int ROW_TILES = RADDLE_ROW_TILES; /* of 8 rows */
constexpr int STAGES = RADDLE_STAGES;
constexpr bool Q_IN_SHARED = RADDLE_Q_IN_SHARED;

constexpr int WARPS = RADDLE_DECODE_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int HALVES = RADDLE_HALVES; /* of a tile, 16 tokens each */
constexpr int TILE = 16 * HALVES;
constexpr unsigned ALL_TOKENS = HALVES == 1 ? 0xffffu : 0xffffffffu;
constexpr int32_t RAGGED_PAGE = 0x7fffffff; /* ragged K/V: one page without an end */

constexpr int ELEMENTS = 16 / sizeof(kv_type); /* of a chunk */
constexpr int WORDS = ELEMENTS / 2;            /* of a chunk as operand */
constexpr int TOGETHER = PAIRS ? 2 : 1;        /* K chunks that are looked at together */
constexpr int CHUNKS_QK = HEAD_DIM_QK / ELEMENTS / TOGETHER;
constexpr int K_CHUNKS = (CHUNKS_QK + 3) / 4 * TOGETHER; /* that one lane of a quad holds */
constexpr int V_CHUNKS = (HEAD_DIM_VO + 8 * ELEMENTS - 1) / (8 * ELEMENTS); /* one lane of eight */
constexpr bool K_WHOLE = CHUNKS_QK % 4 == 0; /* else the last of some lanes lie past the row */
constexpr bool V_WHOLE = HEAD_DIM_VO % (8 * ELEMENTS) == 0;
constexpr int DIM_TILES = V_CHUNKS * ELEMENTS / 2; /* mma tiles of 2 dims per lane */
constexpr int Q_QUADS = K_CHUNKS * WORDS / 4;

static_assert(HEAD_DIM_QK % (ELEMENTS * TOGETHER) == 0 && HEAD_DIM_VO % ELEMENTS == 0,
              "rows are read in whole chunks");
static_assert(HEAD_DIM_QK <= 256 && HEAD_DIM_VO <= 256, "zeros below holds one row");
static_assert(STAGES == 1 || STAGES == 2, "tiles in registers");

/* What a token outside the range or the pool reads instead. */
__device__ uint4 zeros[32];

struct tile {
    uint4 k[2 * HALVES][K_CHUNKS]; /* tokens g, g + 8, of the second half too */
    uint4 v[4 * HALVES][V_CHUNKS]; /* tokens 2j, 2j + 1, 2j + 8, 2j + 9, likewise */
    unsigned valid;                /* bit t: token t is there */
};

__device__ __forceinline__ uint32_t word(const uint4 &chunk, int i) {
    return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
}

/* Chunk of a row of q and K that slot i of lane j holds, and whether there is one. Two neighbours
 * where they come out even: a load then touches whole lines of eight rows (64 x 4096: 363.4 us, and
 * 364.8 with every fourth chunk). */
__device__ __forceinline__ int k_chunk(int i, int j) {
    return TOGETHER == 1 && CHUNKS_QK % 8 == 0 ? 8 * (i / 2) + 2 * j + i % 2
                                               : 4 * (i / TOGETHER) + j + i % TOGETHER * CHUNKS_QK;
}

__device__ __forceinline__ bool has_k_chunk(int i, int j) {
    return K_WHOLE || 4 * (i / TOGETHER) + j < CHUNKS_QK;
}

/* ------------------------------------------------------------------ who does what */

/* How the warps share an item, the same in a whole launch: heads_per_item, a power of two, is the
 * schedule's. The warps of a head take its tiles in turn and wait for nobody else. */
struct team {
    int heads;    /* of an item */
    int warps;    /* of this warp's head */
    int head;     /* of this warp, in the item */
    int position; /* of this warp among those of its head */
};

__device__ __forceinline__ team team_of(int32_t heads_per_item, int warp) {
    const int log_heads = 31 - __clz(heads_per_item);
    const int warps = WARPS >> log_heads;
    return team{heads_per_item, warps, warp * heads_per_item / WARPS, warp & (warps - 1)};
}

/* A barrier of the warps of a head. */
__device__ __forceinline__ void sync_team(const team &mine) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + mine.head), "r"(32 * mine.warps) : "memory");
}

/* ------------------------------------------------------------------ addresses */

/* A run of tokens of one segment that is combined at once. */
struct piece {
    raddle_attention_segment segment;
    int32_t index; /* of the segment */
    int32_t begin, end;
    int32_t full_begin, full_end; /* tiles inside see no mask */
    int32_t num_tiles;            /* 0 without a head */
    int32_t head;                 /* of this warp */
    bool has_head;                /* else there is no such head */
    float scale;                  /* of scores */
};

/* What a warp notes down per piece and reads again per tile: registers are needed for tiles. */
struct warp_notes {
    team mine;
    int32_t first_segment, end_segment; /* of this CTA's worker */
    int32_t end;                        /* of the tokens that are looked up */
    /* On their way: the records of the segments after this one, in turn, and the pages of the next
     * piece's first tile, per lane. */
    alignas(16) raddle_attention_segment records[2];
    int32_t next_page[32];
    /* Per lane. One half: lanes 0..15 look up K of a token each, lanes 16..31 its V. Two: every lane
     * K and V of its token. */
    const char *base[HALVES][32];
    int64_t page_bytes[HALVES][32];
    int64_t token_bytes[HALVES][32];
    const char *address[2 * TILE]; /* of the tile at hand: K of each token, then V */
    const q_type *q_rows[RADDLE_DECODE_ROWS * ROW_TILES]; /* NULL: no such row */
    key_range keys[RADDLE_DECODE_ROWS * ROW_TILES];       /* that the rows see */
    float row_scale[RADDLE_DECODE_ROWS * ROW_TILES];      /* of q, SCALED_ROWS */
    piece pieces[2]; /* the one at hand and the one before or after it, in turn */
};

/* This lane's token of the warp's next tile. The page id is loaded one tile ahead of its use. */
struct lookup {
    int32_t token;
    int32_t entry;  /* in the page table */
    int32_t offset; /* token in the page */
    int32_t page;
};

__device__ __forceinline__ void fetch_page(const raddle_attention_params &p, int32_t end,
                                           lookup &at) {
    at.page = 0;
    if (p.page_size > 0) {
        at.page = (unsigned)at.token < (unsigned)end ? p.page_indices[at.entry] : -1;
    }
}

/* This lane's token of the tile that starts at `first`: its entry in the page table and its place in
 * the page. */
__device__ __forceinline__ void find_entry(const raddle_attention_params &p,
                                           const raddle_attention_segment &segment, int32_t first,
                                           int lane, lookup &at) {
    at.token = first + (lane & (TILE - 1));
    at.entry = segment.kv_origin;
    at.offset = at.token;
    if (p.page_size > 0) {
        const int32_t number = (int32_t)raddle_divide((uint32_t)at.token, p.page_divisor);
        at.entry += number;
        at.offset -= number * p.page_size;
    }
}

/* What comes next starts on its way to the notes while something else is computed: a segment's
 * record two pieces ahead, and with it, one piece ahead, the pages of its first tile. */
__device__ __forceinline__ void request_record(const raddle_attention_segment *from, int lane,
                                               raddle_attention_segment &to) {
    constexpr int PARTS = sizeof(raddle_attention_segment) / 16;
    if (lane < PARTS) {
        cp_async_16(shared_address(&to) + 16 * lane, (const char *)from + 16 * lane);
    }
}

__device__ __forceinline__ void request_pages(const raddle_attention_params &p,
                                              const raddle_attention_segment &segment,
                                              int32_t first, int lane, warp_notes &notes) {
    if (p.page_size > 0) {
        lookup at;
        find_entry(p, segment, first, lane, at);
        if ((unsigned)at.token < (unsigned)segment.kv_end) {
            cp_async_4(shared_address(&notes.next_page[lane]), &p.page_indices[at.entry]);
        }
    }
}

/* What was requested is here, for all lanes. */
__device__ __forceinline__ void wait_for_requests() {
    cp_async_wait_all();
    __syncwarp();
}

/* The pages of the first tile are in the notes. */
__device__ __forceinline__ void start_lookup(const raddle_attention_params &p,
                                             const raddle_attention_segment &segment, int32_t head,
                                             int32_t first, int32_t end, int lane,
                                             warp_notes &notes, lookup &at) {
    const int64_t row = p.page_size > 0 ? 0 : segment.kv_origin; /* of ragged K and V */
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const bool is_v = HALVES == 1 ? lane >= TILE : h == 1;
        const int64_t head_stride = is_v ? p.v_stride_head : p.k_stride_head;
        const int64_t page_stride = is_v ? p.v_stride_page : p.k_stride_page;
        const int64_t token_stride = is_v ? p.v_stride_token : p.k_stride_token;
        notes.base[h][lane] = (const char *)(is_v ? p.v : p.k) +
                              (head * head_stride + row * token_stride) * (int64_t)sizeof(kv_type);
        notes.page_bytes[h][lane] = page_stride * (int64_t)sizeof(kv_type);
        notes.token_bytes[h][lane] = token_stride * (int64_t)sizeof(kv_type);
    }
    find_entry(p, segment, first, lane, at);
    at.page = 0;
    notes.end = end; /* the same by every lane, who reads it next after a barrier */
    if (p.page_size > 0) {
        at.page = (unsigned)at.token < (unsigned)end ? notes.next_page[lane] : -1;
    } else {
        /* Rows past the end of K and V: as out of the pool. */
        notes.end = (int32_t)min((int64_t)end, max(p.num_pages - segment.kv_origin, (int64_t)0));
    }
}

/* Notes the address of this lane's token for the warp's tile at hand (zeros when it is not there),
 * returns which tokens are there, and turns to the warp's next tile. */
__device__ __forceinline__ unsigned next_tile(const raddle_attention_params &p, warp_notes &notes,
                                              int lane, lookup &at) {
    const bool in_pool = p.page_size == 0 || (at.page >= 0 && at.page < p.num_pages);
    const bool in_range = (unsigned)at.token < (unsigned)notes.end; /* past 31 bits: not */
    if (!in_pool && in_range) {
        report_page(p, at.page, at.entry);
    }
    const bool there = in_range && in_pool;
    const unsigned valid = __ballot_sync(ALL_LANES, there) & ALL_TOKENS;
    __syncwarp(); /* the warp has read the addresses of the tile before -> they may be overwritten
                   */
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const char *row = notes.base[h][lane] + at.page * notes.page_bytes[h][lane] +
                          at.offset * notes.token_bytes[h][lane];
        notes.address[TILE * h + lane] = there ? row : (const char *)zeros;
    }
    __syncwarp(); /* all lanes' addresses are written -> every lane reads those of its rows */

    const int32_t page_size = p.page_size > 0 ? p.page_size : RAGGED_PAGE;
    const int32_t step = TILE * notes.mine.warps;
    at.token += step;
    at.offset += step;
    if (at.offset >= page_size) {
        const int32_t pages =
            page_size >= step ? 1 : (int32_t)raddle_divide((uint32_t)at.offset, p.page_divisor);
        at.entry += pages;
        at.offset -= pages * page_size;
    }
    fetch_page(p, notes.end, at);
    return valid;
}

/* ------------------------------------------------------------------ loads */

__device__ __forceinline__ void load_k(tile &t, const warp_notes &notes, int g, int j) {
#pragma unroll
    for (int r = 0; r < 2 * HALVES; r++) {
        const char *row = notes.address[g + 8 * r];
#pragma unroll
        for (int i = 0; i < K_CHUNKS; i++) {
            if (has_k_chunk(i, j)) {
                t.k[r][i] = load_streaming(row + 16 * k_chunk(i, j));
            } else {
                t.k[r][i] = make_uint4(0, 0, 0, 0);
            }
        }
    }
}

__device__ __forceinline__ void load_v(tile &t, const warp_notes &notes, int g, int j) {
#pragma unroll
    for (int s = 0; s < 4 * HALVES; s++) {
        const char *row = notes.address[TILE + 2 * j + (s & 1) + 8 * (s >> 1)] + 16 * g;
#pragma unroll
        for (int i = 0; i < V_CHUNKS; i++) {
            if (V_WHOLE || ELEMENTS * (8 * i + g) < HEAD_DIM_VO) {
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
    for (int x = 0; x < 2 * HALVES * K_CHUNKS; x++) {
        t.k[x / K_CHUNKS][x % K_CHUNKS] = make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int x = 0; x < 4 * HALVES * V_CHUNKS; x++) {
        t.v[x / V_CHUNKS][x % V_CHUNKS] = make_uint4(0, 0, 0, 0);
    }
}

/* Q as stored: lane (g, j) takes of row g of each row tile the chunks that it has of K. */
__device__ __forceinline__ void fetch_q(const warp_notes &notes, int g, int j,
                                        uint4 (&q)[ROW_TILES][Q_QUADS]) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        const q_type *row = notes.q_rows[RADDLE_DECODE_ROWS * n + g];
#pragma unroll
        for (int x = 0; x < Q_QUADS; x++) {
            const int i = x / (WORDS / 4), part = x % (WORDS / 4);
            q[n][x] = make_uint4(0, 0, 0, 0);
            if (row && has_k_chunk(i, j)) {
                q[n][x] = *(const uint4 *)(row + ELEMENTS * k_chunk(i, j) + 8 * part);
            }
        }
    }
}

/* 2^-e of the largest magnitude of a row, 2^e <= it: the row then lies below 2. A quad has the row. */
__device__ __forceinline__ float scale_of_row(const uint32_t (&words)[K_CHUNKS][WORDS]) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < K_CHUNKS; i++) {
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const float2 pair = unpack2<q_type>(words[i][w]);
            most = fmaxf(most, fmaxf(fabsf(pair.x), fabsf(pair.y)));
        }
    }
    const uint32_t exponent = __float_as_uint(reduce_max<1, 4>(most)) >> 23;
    return __uint_as_float((exponent == 0 || exponent >= 254 ? 127u : 254u - exponent) << 23);
}

/* From q as stored to the B operand: what the variant makes of it, in the operand's type. */
__device__ __forceinline__ void finish_q(const raddle_attention_params &p, const piece &at, int g,
                                         int j, warp_notes &notes, uint4 (&q)[ROW_TILES][Q_QUADS]) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        const int number = RADDLE_DECODE_ROWS * n + g;
        const bool there = notes.q_rows[number] != nullptr;
        uint32_t words[K_CHUNKS][WORDS];
#pragma unroll
        for (int x = 0; x < K_CHUNKS * WORDS; x++) {
            words[x / WORDS][x % WORDS] = word(q[n][x / 4], x % 4);
        }
        if constexpr (QUERY_PAIRS) {
            const raddle_row row = row_of(p, at.segment, at.head, at.segment.row_begin + number);
#pragma unroll
            for (int x = 0; x < K_CHUNKS / 2 * WORDS; x++) {
                const int i = x / WORDS * 2, w = x % WORDS;
                if (there && has_k_chunk(i, j)) {
                    const int32_t dim = ELEMENTS * k_chunk(i, j) + 2 * w;
                    const float2 low = unpack2<q_type>(words[i][w]);
                    const float2 high = unpack2<q_type>(words[i + 1][w]);
                    const raddle_pair a = finish_query(p, row, dim, raddle_pair{low.x, high.x});
                    const raddle_pair b = finish_query(p, row, dim + 1, raddle_pair{low.y, high.y});
                    words[i][w] = pack2<q_type>(a.low, b.low);
                    words[i + 1][w] = pack2<q_type>(a.high, b.high);
                }
            }
        }
        if constexpr (SCALED_ROWS) {
            const float scale = scale_of_row(words);
#pragma unroll
            for (int x = 0; x < K_CHUNKS * WORDS; x++) {
                const float2 pair = unpack2<q_type>(words[x / WORDS][x % WORDS]);
                words[x / WORDS][x % WORDS] = pack2<f16>(pair.x * scale, pair.y * scale);
            }
            if (j == 0) {
                notes.row_scale[number] =
                    __uint_as_float((254u << 23) - __float_as_uint(scale)); /* its inverse */
            }
        }
#pragma unroll
        for (int x = 0; x < Q_QUADS; x++) {
            const int i = 4 * x / WORDS, w = 4 * x % WORDS;
            q[n][x] = make_uint4(words[i][w], words[i][w + 1], words[i][w + 2], words[i][w + 3]);
        }
    }
    if (SCALED_ROWS) {
        __syncwarp(); /* the scales of all rows are written -> every lane reads those of its rows */
    }
}

/* ------------------------------------------------------------------ scores and values */

/* A chunk of K as operand. */
__device__ __forceinline__ void unpack_chunk(const uint4 &chunk, uint32_t (&words)[WORDS]) {
    if constexpr (IS_FP8) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unpack4_to_f16<kv_type>(word(chunk, i), words[2 * i], words[2 * i + 1]);
        }
    } else {
        words[0] = chunk.x, words[1] = chunk.y, words[2] = chunk.z, words[3] = chunk.w;
    }
}

/* The same key's chunks, half a row apart: what the variant makes of them. */
__device__ __forceinline__ void finish_chunks(const raddle_attention_params &p,
                                              const raddle_key &key, int32_t dim,
                                              uint32_t (&low)[WORDS], uint32_t (&high)[WORDS]) {
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        const float2 x = unpack2<mma_type>(low[w]), y = unpack2<mma_type>(high[w]);
        const raddle_pair first = finish_key(p, key, dim + 2 * w, raddle_pair{x.x, y.x});
        const raddle_pair second = finish_key(p, key, dim + 2 * w + 1, raddle_pair{x.y, y.y});
        low[w] = pack2<mma_type>(first.low, second.low);
        high[w] = pack2<mma_type>(first.high, second.high);
    }
}

/* Of a row tile and half of the tokens: tokens g (0, 1) and g + 8 (2, 3) against rows 2j, 2j + 1. */
typedef float scores[ROW_TILES][HALVES][4];

/* base: the tile's first token. */
__device__ __forceinline__ void compute_scores(const raddle_attention_params &p, const piece &at,
                                               const tile &t, int32_t base, int g, int j,
                                               const uint4 (&q)[ROW_TILES][Q_QUADS],
                                               const uint4 *shared_q, scores &s) {
#pragma unroll
    for (int x = 0; x < ROW_TILES * HALVES * 4; x++) {
        s[x / (HALVES * 4)][x / 4 % HALVES][x % 4] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < K_CHUNKS; i += TOGETHER) {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            uint32_t k[TOGETHER][2][WORDS];
#pragma unroll
            for (int r = 0; r < 2; r++) {
#pragma unroll
                for (int c = 0; c < TOGETHER; c++) {
                    unpack_chunk(t.k[2 * h + r][i + c], k[c][r]);
                }
                if constexpr (KEY_PAIRS) {
                    const int token = g + 8 * (2 * h + r);
                    const raddle_key key{at.segment.request, base + token, at.segment.kv_len,
                                         at.head};
                    if (has_k_chunk(i, j) && (t.valid >> token & 1u)) {
                        finish_chunks(p, key, ELEMENTS * k_chunk(i, j), k[0][r],
                                      k[TOGETHER - 1][r]);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
                for (int x = 0; x < TOGETHER * WORDS; x += 4) { /* a quad of q, two k-steps */
                    const int quad = (i * WORDS + x) / 4;
                    const uint4 b = Q_IN_SHARED ? shared_q[(n * Q_QUADS + quad) * 32] : q[n][quad];
                    const uint32_t(&w)[2][WORDS] = k[x / WORDS];
#pragma unroll
                    for (int e = 0; e < 4; e += 2) {
                        const int c = x % WORDS + e;
                        mma_m16n8k16<mma_type>(s[n][h], w[0][c], w[1][c], w[0][c + 1], w[1][c + 1],
                                               word(b, e), word(b, e + 1));
                    }
                }
            }
        }
    }
}

/* out[n][DIM_TILES]: dims 2 m, 2 m + 1 of the lane's chunks, as (dim, row) like mma lays them. */
__device__ __forceinline__ void add_values(const tile &t, const scores &s,
                                           float (&out)[ROW_TILES][DIM_TILES][4]) {
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        uint32_t b[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            b[n][0] = movmatrix_trans(pack2<mma_type>(s[n][h][0], s[n][h][1]));
            b[n][1] = movmatrix_trans(pack2<mma_type>(s[n][h][2], s[n][h][3]));
        }
        const uint4(*v)[V_CHUNKS] = &t.v[4 * h];
#pragma unroll
        for (int x = 0; x < 4 * V_CHUNKS; x++) {
            const int i = x / 4, e = x % 4;
            const uint32_t x0 = word(v[0][i], e), x1 = word(v[1][i], e);
            const uint32_t x2 = word(v[2][i], e), x3 = word(v[3][i], e);
            /* a[m]: dims 2 m and 2 m + 1 of the word; tokens 2j, 2j + 1, then 2j + 8, 2j + 9. */
            uint32_t a[ELEMENTS / 8][4];
            if constexpr (IS_FP8) {
                unpack4_to_f16<kv_type>(__byte_perm(x0, x1, 0x5140), a[0][0], a[0][1]);
                unpack4_to_f16<kv_type>(__byte_perm(x2, x3, 0x5140), a[0][2], a[0][3]);
                unpack4_to_f16<kv_type>(__byte_perm(x0, x1, 0x7362), a[1][0], a[1][1]);
                unpack4_to_f16<kv_type>(__byte_perm(x2, x3, 0x7362), a[1][2], a[1][3]);
            } else {
                a[0][0] = __byte_perm(x0, x1, 0x5410), a[0][1] = __byte_perm(x0, x1, 0x7632);
                a[0][2] = __byte_perm(x2, x3, 0x5410), a[0][3] = __byte_perm(x2, x3, 0x7632);
            }
#pragma unroll
            for (int m = 0; m < ELEMENTS / 8; m++) {
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++) {
                    mma_m16n8k16<mma_type>(out[n][x * (ELEMENTS / 8) + m], a[m][0], a[m][1],
                                           a[m][2], a[m][3], b[n][0], b[n][1]);
                }
            }
        }
    }
}

} // namespace raddle

#endif

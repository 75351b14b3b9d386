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
#include "attention/attention_decode_combine.cuh"
#include "attention/attention_decode_tile.cuh"
#include "attention/attention_params.h"

namespace {

using namespace raddle;

constexpr bool PREFETCH =
    !Q_IN_SHARED; /* the next piece's first tile: where registers are left for it */
constexpr int MERGE_IN_FLIGHT = RADDLE_CTAS_PER_SM == 1 ? 16 : 8;

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
        notes.at.head = head;
        notes.at.rows = segment.row_end - segment.row_begin;
        notes.at.scale = scale_of_head(p, min(head, p.num_kv_heads - 1));
        notes.at.num_tiles = has_head ? (int32_t)(((unsigned)(end - begin) + TILE - 1) / TILE) : 0;
    }
    start_lookup(p, request, head, begin + TILE * tile_of_warp, has_head ? end : begin, lane, notes,
                 look);
    __syncwarp(); /* the piece and the keys of all rows are written -> every lane reads them */
}

} // namespace

extern "C" __global__ void __launch_bounds__(THREADS, RADDLE_CTAS_PER_SM)
    attention_decode(const __grid_constant__ kernel_params arguments) {
    const raddle_attention_params &p = arguments.base;
    extern __shared__ __align__(16) char shared[];
    __shared__ int32_t is_last;
    __shared__ warp_notes all_notes[WARPS];
    const shared_map map = map_shared(shared, p.tile_rows);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, j = lane % 4;
    const int head_of_item = warp / WARPS_PER_HEAD, tile_of_warp = warp % WARPS_PER_HEAD;
    warp_notes &notes = all_notes[warp];
    uint4 *shared_q = map.q + warp * ROW_TILES * Q_QUADS * 32 + lane;

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

    tile a, more_tiles[STAGES > 2 ? STAGES - 1 : 1]; /* a, and those that follow it when they are
                                                        more than two */
    const auto load = [&](tile &t) {
        t.valid = next_tile(p, notes, lane, look);
        load_k(t, notes, g, j);
        load_v(t, notes, g, j);
    };
    uint4 q[ROW_TILES][Q_QUADS];
    const auto begin_piece = [&]() {
        const raddle_attention_segment &segment = p.segments[at.segment];
        if (tile_of_warp < at.num_tiles) {
            load(a);
        } else {
            clear(a);
        }
        if constexpr (STAGES > 2) {
#pragma unroll
            for (int x = 0; x < STAGES - 2; x++) {
                if (tile_of_warp + (x + 1) * WARPS_PER_HEAD < at.num_tiles) {
                    load(more_tiles[x]);
                } else {
                    clear(more_tiles[x]);
                }
            }
        }
        load_q(p, segment, segment.head + head_of_item, g, j, notes, q);
        if (Q_IN_SHARED) {
#pragma unroll
            for (int x = 0; x < ROW_TILES * Q_QUADS; x++) {
                shared_q[32 * x] =
                    q[x / Q_QUADS][x % Q_QUADS]; /* read back by the same lane only */
            }
        }
    };
    /* Weights of a tile's tokens from their scores. */
    const auto weigh = [&](float(&s)[ROW_TILES][4], unsigned valid, int32_t base,
                           accumulator &acc) {
        if constexpr (SCALED_ROWS) {
            scale_rows(notes, j, s);
        }
        if constexpr (EACH_LOGIT) {
            finish_scores(p, notes, base, valid, g, j, s);
        } else if (valid != ALL_TOKENS || base < at.full_begin || base > at.full_end - TILE) {
            mask_scores(notes, base, valid, g, j, s);
        }
        if constexpr (NO_SOFTMAX) {
            count_weights(s, acc);
        } else {
            update_softmax(EACH_LOGIT ? 1.0f : at.scale, s, acc);
        }
    };
    const auto compute = [&](const tile &t, int32_t number, accumulator &acc) {
        float s[ROW_TILES][4];
        const int32_t base = at.begin + TILE * number;
        compute_scores(p, notes, t, base, g, j, q, shared_q, s);
        weigh(s, t.valid, base, acc);
        add_values(t, s, acc.out);
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
        if constexpr (STAGES > 2) {
            constexpr int REST = STAGES - 1;
            const auto stage = [&](int x) -> tile & { return x == 0 ? a : more_tiles[x - 1]; };
#pragma unroll 1
            for (int32_t t = tile_of_warp; t < at.num_tiles; t += STAGES * WARPS_PER_HEAD) {
#pragma unroll
                for (int x = 0; x < STAGES; x++) {
                    const int32_t number = t + x * WARPS_PER_HEAD;
                    tile &ahead = stage((x + REST) % STAGES);
                    if (number + REST * WARPS_PER_HEAD < at.num_tiles) {
                        load(ahead);
                    } else {
                        clear(ahead);
                    }
                    if (number < at.num_tiles) {
                        compute(stage(x), number, acc);
                    }
                }
            }
        } else if constexpr (STAGES == 2) {
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
                compute_scores(p, notes, a, at.begin + TILE * t, g, j, q, shared_q, s);
                if (has_next) {
                    a.valid = next_tile(p, notes, lane, look);
                    load_k(a, notes, g, j);
                }
                weigh(s, valid, at.begin + TILE * t, acc);
                add_values(a, s, acc.out);
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

/* attention_decode.cu - attention of few query rows per K/V head over a paged or ragged cache;
 * sm_80 and later.
 *
 * What      out and lse of the schedule's segments: up to 8 * ROW_TILES packed rows (query heads of
 *           a group x query tokens) against a K/V range, for the schedule's heads_per_item
 *           neighbouring K/V heads.
 * Grid      one CTA per worker of the schedule; it walks its segments. Block: 8 warps, as many for
 *           each head; the warps of a head take tiles of 16 or 32 tokens in turn.
 * Idea      a decode step reads every K and V byte once, so nothing is staged: a warp loads a tile
 *           from global memory straight into mma fragments, S^T[16 tokens x 8 rows] = K Q^T and
 *           O^T[dims x 8 rows] = V^T P^T. Pages, strides and gathers only change an address: lane t
 *           looks up K of token t and lane 16 + t its V, the others read what they noted down.
 * Pipeline  STAGES 2:  load B | compute A | load A | compute B | ..
 *           STAGES 1:  scores | load V | softmax, values | ..; the next K behind V, the softmax or
 *           the values (NEXT_K). One scoreboard serves all loads from global memory: values wait for
 *           whatever was asked for before them.
 *           The first tile of the next piece is loaded before this piece is combined (PREFETCH).
 * Shared    notes of 8 warps (static) | attention_shared.h: outputs and states of 8 warps | q
 *           (Q_IN_SHARED) | folded outputs, two folded states.
 * Results   the warps of a head are combined once per piece, in warp order; those of other heads go
 *           on by themselves, so that eight heads, a warp each, never wait. A piece is a whole
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
    !Q_IN_SHARED && !PAIRS; /* the next piece's first tile: where registers are left for it */
/* STAGES 1: when the next K is loaded, by the registers that are left. */
enum { BEFORE_SOFTMAX, BEFORE_VALUES, AFTER_VALUES };
constexpr int NEXT_K = PAIRS || EACH_LOGIT ? AFTER_VALUES
                       : ROW_TILES == 4    ? BEFORE_VALUES
                                           : BEFORE_SOFTMAX;
/* Pairs of tiles that are followed by another are computed without asking: 64 x 4096 takes 242 us on
 * an H200, 245 without. It takes a quarter longer to compile, which variants do without. */
constexpr bool WHOLE_PAIRS =
    RADDLE_CTAS_PER_SM == 1 && ROW_TILES <= 2 && HEAD_DIM_QK >= 128 && !EACH_LOGIT && !PAIRS;
constexpr int MERGE_IN_FLIGHT = RADDLE_CTAS_PER_SM == 1 ? 16 : 8;

/* Notes down the piece that starts at token begin of a segment, and what this lane needs to read
 * it. Its first pages have been requested. */
__device__ __forceinline__ void open_piece(const raddle_attention_params &p,
                                           const raddle_attention_segment &segment, int32_t index,
                                           int32_t begin, int lane, warp_notes &notes, piece &at,
                                           lookup &look) {
    constexpr int WORDS_OF_SEGMENT = sizeof(raddle_attention_segment) / 4;
    wait_for_requests();
    if (lane < WORDS_OF_SEGMENT) {
        ((int32_t *)&at.segment)[lane] = ((const int32_t *)&segment)[lane];
    }
    const team &mine = notes.mine;
    const int32_t head = segment.head + mine.head;
    int32_t end = segment.kv_end;
    if (p.fixed_chunk > 0 && segment.slot < 0) {
        const unsigned chunk = (unsigned)p.fixed_chunk;
        end = (int32_t)min((unsigned)end, ((unsigned)begin / chunk + 1) * chunk);
    }
    const bool has_head = head < p.num_kv_heads;
    if (lane < RADDLE_DECODE_ROWS * ROW_TILES) {
        /* Rows past the tile see what its last row sees; nobody reads what they get. */
        const bool has_row = segment.row_begin + lane < segment.row_end;
        const raddle_row row =
            row_of(p, segment, head, has_row ? segment.row_begin + lane : segment.row_end - 1);
        notes.keys[lane] = keys_of_token(p, row.qo_len, row.kv_len, row.qo_index);
        notes.q_rows[lane] =
            has_row && has_head
                ? (const q_type *)p.q + row.token * p.q_stride_token + row.qo_head * p.q_stride_head
                : nullptr;
    }
    if (lane == 0) {
        const unsigned first = (unsigned)segment.row_begin, last = (unsigned)segment.row_end - 1;
        at.index = index;
        at.begin = begin;
        at.end = end;
        at.full_begin = keys_of_token(p, segment.qo_len, segment.kv_len,
                                      (int32_t)raddle_divide(last, p.group_divisor))
                            .begin;
        at.full_end = keys_of_token(p, segment.qo_len, segment.kv_len,
                                    (int32_t)raddle_divide(first, p.group_divisor))
                          .end;
        at.head = head;
        at.has_head = has_head;
        at.num_tiles = has_head ? (int32_t)(((unsigned)(end - begin) + TILE - 1) / TILE) : 0;
    }
    start_lookup(p, segment, head, begin + TILE * mine.position, has_head ? end : begin, lane,
                 notes, look);
    __syncwarp(); /* the piece and its rows are written -> every lane reads them; what was requested
                     has been read -> it may be overwritten */
}

} // namespace

extern "C" __global__ void __launch_bounds__(THREADS, RADDLE_CTAS_PER_SM)
    attention_decode(const __grid_constant__ kernel_params arguments) {
    const raddle_attention_params &p = arguments.base;
    extern __shared__ __align__(16) char shared[];
    __shared__ int32_t is_last;
    __shared__ warp_notes all_notes[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, j = lane % 4;
    warp_notes &notes = all_notes[warp];

    launch_dependents();
    /* What a CTA begins with is read at once. */
    const team &mine = notes.mine;
    const int32_t heads = p.header->heads_per_item, planned = p.header->num_qo_tokens;
    const int32_t first_segment = p.worker_indptr[blockIdx.x];
    const int32_t last_of_worker = p.worker_indptr[blockIdx.x + 1];
    request_record(&p.first_segments[blockIdx.x], lane, notes.records[0]);
    const int32_t end_segment = planned <= p.num_qo_tokens ? last_of_worker : 0;
    if (lane == 0) {
        notes.mine = team_of(heads, warp);
        notes.first_segment = first_segment;
        notes.end_segment = end_segment;
    }
    wait_for_requests(); /* the warp's place is noted, too -> every lane reads it */
    uint4 *shared_q = map_shared(shared, p.tile_rows).q + warp * ROW_TILES * Q_QUADS * 32 + lane;
    lookup look;
    piece *now = &notes.pieces[0]; /* the other holds what comes next */
    const auto other = [&]() -> piece & { return notes.pieces[now == &notes.pieces[0]]; };
    const auto record = [&](int32_t index) -> raddle_attention_segment & {
        return notes.records[(index - notes.first_segment) & 1];
    };
    /* What follows a piece: the next chunk of its segment, or the next segment, or nothing. */
    const auto ends_segment = [](const piece &at) { return at.end >= at.segment.kv_end; };
    const auto is_last_piece = [&](const piece &at) {
        return ends_segment(at) && at.index + 1 >= notes.end_segment;
    };
    const auto after = [&](const piece &at) -> const raddle_attention_segment & {
        return ends_segment(at) ? record(at.index + 1) : at.segment;
    };
    if (first_segment < end_segment) {
        const raddle_attention_segment &segment = record(first_segment);
        const int32_t begin = segment.kv_begin;
        request_pages(p, segment, begin + TILE * mine.position, lane, notes);
        if (first_segment + 1 < end_segment) {
            request_record(&p.segments[first_segment + 1], lane, record(first_segment + 1));
        }
        open_piece(p, segment, first_segment, begin, lane, notes, *now, look);
    }
    wait_for_predecessors(); /* the schedule is older than they are; q, K and V may be theirs */
    if (first_segment >= end_segment) {
        return;
    }

    tile a;
    const auto load = [&](tile &t) {
        t.valid = next_tile(p, notes, lane, look);
        load_k(t, notes, g, j);
        if (STAGES == 2) {
            load_v(t, notes, g, j);
        }
    };
    uint4 q[ROW_TILES][Q_QUADS];
    /* q first: it would wait behind the tiles. Then what comes after this piece is sent for. */
    const auto begin_piece = [&]() {
        piece &at = *now;
        if (lane == 0) { /* here, since a predecessor may have written the scales; before the tile,
                            whose loads it would wait for */
            at.scale = scale_of_head(p, min(at.head, p.num_kv_heads - 1));
        }
        fetch_q(notes, g, j, q);
        if (mine.position < at.num_tiles) {
            load(a);
        } else {
            clear(a);
        }
        __syncwarp(); /* the scale is written -> every lane reads it */
        if (!is_last_piece(at)) {
            const raddle_attention_segment &next = after(at);
            const int32_t begin = ends_segment(at) ? next.kv_begin : at.end;
            request_pages(p, next, begin + TILE * mine.position, lane, notes);
        }
        if (at.begin == at.segment.kv_begin && at.index + 2 < notes.end_segment) {
            request_record(&p.segments[at.index + 2], lane, record(at.index + 2));
        }
        if constexpr (QUERY_PAIRS || SCALED_ROWS) {
            finish_q(p, at, g, j, notes, q);
        }
        if (Q_IN_SHARED) {
#pragma unroll
            for (int x = 0; x < ROW_TILES * Q_QUADS; x++) {
                shared_q[32 * x] =
                    q[x / Q_QUADS][x % Q_QUADS]; /* read back by the same lane only */
            }
        }
    };
    /* Weights of a tile's tokens from their scores. */
    const auto weigh = [&](scores &s, unsigned valid, int32_t base, accumulator &acc) {
        const piece &at = *now;
        scale_scores(notes, at.scale, j, s);
        if constexpr (EACH_LOGIT) {
            finish_scores(p, notes, at, base, valid, g, j, s);
        } else if (valid != ALL_TOKENS || base < at.full_begin || base > at.full_end - TILE) {
            mask_scores(notes, base, valid, g, j, s);
        }
        if constexpr (NO_SOFTMAX) {
            count_weights(s, acc);
        } else {
            update_softmax(s, acc);
        }
    };
    const auto compute = [&](const tile &t, int32_t number, accumulator &acc) {
        scores s;
        const piece &at = *now;
        const int32_t base = at.begin + TILE * number;
        compute_scores(p, at, t, base, g, j, q, shared_q, s);
        weigh(s, t.valid, base, acc);
        add_values(t, s, acc.out);
    };

    if (PREFETCH) {
        begin_piece();
    }
#pragma unroll 1
    for (;;) {
        if (!PREFETCH) {
            begin_piece();
        }
        const piece &at = *now;
        accumulator acc;
        clear(acc);
        if constexpr (STAGES == 2) {
            int32_t t = mine.position;
            if constexpr (WHOLE_PAIRS) {
#pragma unroll 1
                for (; t + 2 * mine.warps < at.num_tiles; t += 2 * mine.warps) {
                    tile b;
                    load(b);
                    compute(a, t, acc);
                    load(a);
                    compute(b, t + mine.warps, acc);
                }
            }
#pragma unroll 1
            for (; t < at.num_tiles; t += 2 * mine.warps) {
                tile b;
                const bool has_b = t + mine.warps < at.num_tiles;
                if (has_b) {
                    load(b);
                } else {
                    clear(b);
                }
                compute(a, t, acc);
                if (has_b) {
                    if (t + 2 * mine.warps < at.num_tiles) {
                        load(a);
                    }
                    compute(b, t + mine.warps, acc);
                }
            }
        } else {
#pragma unroll 1
            for (int32_t t = mine.position; t < at.num_tiles; t += mine.warps) {
                const bool has_next = t + mine.warps < at.num_tiles;
                const unsigned valid = a.valid;
                const auto load_next = [&](int when) {
                    if (NEXT_K == when && has_next) {
                        load(a);
                    }
                };
                scores s;
                compute_scores(p, at, a, at.begin + TILE * t, g, j, q, shared_q, s);
                load_v(a, notes, g, j);
                load_next(BEFORE_SOFTMAX);
                weigh(s, valid, at.begin + TILE * t, acc);
                load_next(BEFORE_VALUES);
                add_values(a, s, acc.out);
                load_next(AFTER_VALUES);
            }
        }

        const shared_map map = map_shared(shared, p.tile_rows);
        const raddle_attention_segment &segment = at.segment;
        const bool is_cut = segment.slot >= 0, has_more = !is_last_piece(at);
        if (has_more) {
            const raddle_attention_segment &next = after(at);
            open_piece(p, next, at.index + ends_segment(at),
                       ends_segment(at) ? next.kv_begin : at.end, lane, notes, other(), look);
        }
        const piece &done = at;
        now = &other();
        if (PREFETCH && has_more && !is_cut) {
            begin_piece();
        }
        sync_team(mine); /* the team has read its states of the piece before -> they may be
                            overwritten */
        write_warp(map, p.tile_rows, segment.row_end - segment.row_begin, warp, g, j, acc);
        sync_team(mine); /* the team's states are written -> it combines them */
        if (is_cut) {
            const raddle_attention_merge merge = p.merges[segment.merge]; /* before it is needed */
            finish_cut(p, map, mine, done);
            if (arrive_at_merge(p, segment.merge, merge.num_arrivals, &is_last)) {
                merge_partials<out_type, HEAD_DIM_VO, THREADS, MERGE_IN_FLIGHT>(p, merge,
                                                                                mine.heads);
            }
            if (!has_more) {
                break;
            }
            if (PREFETCH) {
                begin_piece(); /* not before: a merge needs the registers */
            }
        } else {
            finish_uncut(p, map, mine, done);
            if (!has_more) {
                break;
            }
        }
    }
}

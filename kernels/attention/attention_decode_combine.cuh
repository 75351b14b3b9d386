/* attention_decode_combine.cuh - running states in attention_decode: a warp's softmax over its tiles,
 * the warps of a head added up in shared memory, chunks folded, results and partials written.
 */
#ifndef RADDLE_ATTENTION_DECODE_COMBINE_CUH
#define RADDLE_ATTENTION_DECODE_COMBINE_CUH

#include "attention/attention_decode_tile.cuh"

namespace raddle {

/* ------------------------------------------------------------------ softmax */

/* The running state of a warp: rows 2j and 2j + 1 of each row tile. sum is this lane's share
 * (tokens g and g + 8). */
struct accumulator {
    float out[ROW_TILES][DIM_TILES][4]; /* as add_values has it */
    float max[ROW_TILES][2];
    float sum[ROW_TILES][2];
};

__device__ __forceinline__ void clear(accumulator &acc) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int m = 0; m < DIM_TILES; m++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                acc.out[n][m][x] = 0.0f;
            }
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            acc.max[n][c] = NO_SOFTMAX ? 0.0f : LOGIT_FLOOR;
            acc.sum[n][c] = 0.0f;
        }
    }
}

/* From products of operands to logits in base 2: the scale, and back from the range of f16 that q was
 * brought into. Before anything is masked: a scale may be negative, or 0. */
__device__ __forceinline__ void scale_scores(const warp_notes &notes, float scale, int j,
                                             scores &s) {
#pragma unroll
    for (int x = 0; x < ROW_TILES * HALVES * 4; x++) {
        const int n = x / (HALVES * 4);
        float factor = scale;
        if constexpr (SCALED_ROWS) {
            factor *= notes.row_scale[RADDLE_DECODE_ROWS * n + 2 * j + x % 2];
        }
        s[n][x / 4 % HALVES][x % 4] *= factor;
    }
}

/* Tokens that are not there, or that a row does not see. Only tiles at a boundary come here. */
__device__ __forceinline__ void mask_scores(const warp_notes &notes, int32_t base, unsigned valid,
                                            int g, int j, scores &s) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const key_range keys = notes.keys[RADDLE_DECODE_ROWS * n + 2 * j + c];
#pragma unroll
            for (int r = 0; r < 2 * HALVES; r++) {
                const int32_t token = base + g + 8 * r;
                const bool seen =
                    (valid >> (g + 8 * r) & 1u) && token >= keys.begin && token < keys.end;
                float &x = s[n][r / 2][2 * (r % 2) + c];
                x = seen ? x : negative_infinity();
            }
        }
    }
}

/* The same where every logit is looked at, and may become a weight. What a row does not see is -inf,
 * and no hook hears of it. */
__device__ __forceinline__ void finish_scores(const raddle_attention_params &p,
                                              const warp_notes &notes, const piece &at,
                                              int32_t base, unsigned valid, int g, int j,
                                              scores &s) {
    const int32_t rows = at.segment.row_end - at.segment.row_begin;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int32_t number = RADDLE_DECODE_ROWS * n + 2 * j + c;
            const key_range keys = notes.keys[number];
            const raddle_row row = row_of(p, at.segment, at.head, at.segment.row_begin + number);
#pragma unroll
            for (int r = 0; r < 2 * HALVES; r++) {
                const int32_t token = base + g + 8 * r;
                float x = s[n][r / 2][2 * (r % 2) + c];
                const bool seen = (valid >> (g + 8 * r) & 1u) && number < rows &&
                                  token >= keys.begin && token < keys.end &&
                                  finish_logit(p, row, token, x);
                s[n][r / 2][2 * (r % 2) + c] = seen ? x : negative_infinity();
            }
        }
    }
}

/* Without a softmax: weights as they are, the sum counts the keys. */
__device__ __forceinline__ void count_weights(scores &s, accumulator &acc) {
#pragma unroll
    for (int i = 0; i < ROW_TILES * HALVES * 4; i++) {
        float &x = s[i / (HALVES * 4)][i / 4 % HALVES][i % 4];
        const bool seen = x != negative_infinity();
        acc.sum[i / (HALVES * 4)][i % 2] += seen ? 1.0f : 0.0f;
        x = seen ? x : 0.0f;
    }
}

/* Turns logits into weights relative to the running maximum, which moves (and everything summed so
 * far with it) only when some row of the tile has a larger one. */
__device__ __forceinline__ void update_softmax(scores &s, accumulator &acc) {
    float top[ROW_TILES][2];
    bool larger = false;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            top[n][c] = negative_infinity();
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                top[n][c] = fmaxf(top[n][c], fmaxf(s[n][h][c], s[n][h][2 + c]));
            }
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
                for (int m = 0; m < DIM_TILES; m++) {
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
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                s[n][h][c] = exp2_fast(s[n][h][c] - acc.max[n][c]);
                s[n][h][2 + c] = exp2_fast(s[n][h][2 + c] - acc.max[n][c]);
                acc.sum[n][c] += s[n][h][c] + s[n][h][2 + c];
            }
        }
    }
}

/* ------------------------------------------------------------------ combine, fold, write */

constexpr int OUT_ROW = raddle_decode_out_row(HEAD_DIM_VO);
constexpr int FOLD_ROW = HEAD_DIM_VO + 2 * 2;

struct shared_map {
    float *out;    /* [WARPS, tile_rows, OUT_ROW] */
    float2 *state; /* [WARPS, tile_rows] */
    uint4 *q;      /* [WARPS, ROW_TILES * Q_QUADS, 32] */
    float *fold;   /* [heads, tile_rows, FOLD_ROW]: outputs, then states of two sides */
};

__device__ __forceinline__ shared_map map_shared(char *base, int32_t tile_rows) {
    shared_map m;
    m.out = (float *)base;
    base += raddle_decode_out_bytes(tile_rows, HEAD_DIM_VO);
    m.state = (float2 *)base;
    base += raddle_decode_state_bytes(tile_rows);
    m.q = (uint4 *)base;
    base += Q_IN_SHARED ? raddle_decode_q_bytes(Q_QUADS, ROW_TILES) : 0;
    m.fold = (float *)base;
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
            float *to = m.out + (warp * tile_rows + row) * OUT_ROW + ELEMENTS * g;
#pragma unroll
            for (int i = 0; i < V_CHUNKS; i++) {
                if (V_WHOLE || ELEMENTS * (8 * i + g) < HEAD_DIM_VO) {
                    const float(*o)[4] = &acc.out[n][ELEMENTS / 2 * i];
#pragma unroll
                    for (int x = 0; x < ELEMENTS / 2; x += 2) {
                        *(float4 *)(to + 8 * ELEMENTS * i + 2 * x) =
                            make_float4(o[x][c], o[x][2 + c], o[x + 1][c], o[x + 1][2 + c]);
                    }
                }
            }
            if (g == 0) {
                const softmax_state state = closed_state(acc.max[n][c], sum);
                m.state[warp * tile_rows + row] = make_float2(state.max, state.sum);
            }
        }
    }
}

/* Four neighbouring outputs of a row, added up over the warps of the head. */
__device__ __forceinline__ softmax_state combine_warps(const shared_map &m, int32_t tile_rows,
                                                       const team &mine, int32_t row, int32_t dim,
                                                       float (&acc)[4]) {
    const int32_t first = mine.head * mine.warps * tile_rows + row;
    if (mine.warps == 1) {
        const float2 only = m.state[first];
        const float4 out = *(const float4 *)(m.out + first * OUT_ROW + dim);
        acc[0] = out.x, acc[1] = out.y, acc[2] = out.z, acc[3] = out.w;
        return softmax_state{only.x, only.y};
    }
    /* Of fewer warps the last is read again, with no weight: loads without branches overlap. */
    softmax_state state = empty_state();
    float2 parts[WARPS];
#pragma unroll
    for (int k = 0; k < WARPS; k++) {
        parts[k] = m.state[first + min(k, mine.warps - 1) * tile_rows];
        state.max = fmaxf(state.max, parts[k].x);
    }
    const float base = state.max == negative_infinity() ? 0.0f : state.max;
    acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS; k++) {
        const int32_t at = first + min(k, mine.warps - 1) * tile_rows;
        const float4 out = *(const float4 *)(m.out + at * OUT_ROW + dim);
        const float factor = k < mine.warps ? exp2_fast(parts[k].x - base) : 0.0f;
        state.sum = fmaf(parts[k].y, factor, state.sum);
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
__device__ __forceinline__ void fold_chunk(const shared_map &m, int32_t tile_rows, const team &mine,
                                           int32_t row, int32_t dim, bool first, int side,
                                           softmax_state &state, float (&acc)[4]) {
    float *fold_row = m.fold + (mine.head * tile_rows + row) * FOLD_ROW;
    float4 *kept = (float4 *)(fold_row + dim);
    float2 *states = (float2 *)(fold_row + HEAD_DIM_VO);
    softmax_state into = empty_state();
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!first) {
        const float2 before = states[side];
        const float4 out = *kept;
        into = softmax_state{before.x, before.y};
        sum[0] = out.x, sum[1] = out.y, sum[2] = out.z, sum[3] = out.w;
    }
    fold(into, sum, state, acc);
    *kept = make_float4(sum[0], sum[1], sum[2], sum[3]);
    if (dim == 0) {
        states[side ^ 1] = make_float2(into.max, into.sum);
    }
    state = into;
    acc[0] = sum[0], acc[1] = sum[1], acc[2] = sum[2], acc[3] = sum[3];
}

/* Quads of neighbouring outputs of a head that a team finishes: thread t those from t on. */
constexpr int QUADS_OF_ROW = HEAD_DIM_VO / 4;

__device__ __forceinline__ int32_t count_quads(const piece &done) {
    const int32_t rows = done.segment.row_end - done.segment.row_begin;
    return done.has_head ? rows * QUADS_OF_ROW : 0;
}

__device__ __forceinline__ int thread_of_team(const team &mine) {
    return 32 * mine.position + (int)(threadIdx.x % 32);
}

/* The warps' states are in shared memory: adds them up to a partial. */
__device__ __forceinline__ void finish_cut(const raddle_attention_params &p, const shared_map &m,
                                           const team &mine, const piece &done) {
    const int32_t count = count_quads(done);
#pragma unroll 1
    for (int32_t i = thread_of_team(mine); i < count; i += 32 * mine.warps) {
        const int32_t row = i / QUADS_OF_ROW, dim = 4 * (i % QUADS_OF_ROW);
        float acc[4];
        const softmax_state state = combine_warps(m, p.tile_rows, mine, row, dim, acc);
        const int64_t to = partial_row(p, done.segment.slot, mine.heads, mine.head, row);
        *(float4 *)(p.partial_out + to * HEAD_DIM_VO + dim) =
            make_float4(acc[0], acc[1], acc[2], acc[3]);
        if (dim == 0) {
            ((float2 *)p.partial_state)[to] = make_float2(state.max, state.sum);
        }
    }
}

/* The same: to results, or to one more chunk folded. */
__device__ __forceinline__ void finish_uncut(const raddle_attention_params &p, const shared_map &m,
                                             const team &mine, const piece &done) {
    const raddle_attention_segment &segment = done.segment;
    const int32_t count = count_quads(done);
    const bool first = done.begin == segment.kv_begin;
    const bool last = done.end == segment.kv_end;
#pragma unroll 1
    for (int32_t i = thread_of_team(mine); i < count; i += 32 * mine.warps) {
        const int32_t row = i / QUADS_OF_ROW, dim = 4 * (i % QUADS_OF_ROW);
        float acc[4];
        softmax_state state = combine_warps(m, p.tile_rows, mine, row, dim, acc);
        if (!(first && last)) {
            const int side = (unsigned)done.begin / (unsigned)p.fixed_chunk & 1;
            fold_chunk(m, p.tile_rows, mine, row, dim, first, side, state, acc);
        }
        if (last) {
            const raddle_row place = row_of(p, segment, done.head, segment.row_begin + row);
            write_result<out_type>(p, place, dim, acc, state);
        }
    }
}

} // namespace raddle

#endif

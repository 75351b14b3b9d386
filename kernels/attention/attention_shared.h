/* attention_shared.h - dynamic shared memory of the attention kernels, in bytes. C11 and NVRTC: the
 * launcher asks for exactly what the kernel carves. Every part is a multiple of 16 bytes.
 */
#ifndef RADDLE_ATTENTION_SHARED_H
#define RADDLE_ATTENTION_SHARED_H

#include "common/abi.h"

enum {
    RADDLE_DECODE_WARPS = 8,
    RADDLE_DECODE_TILE_KV = 16, /* tokens that a warp takes at a time, once or twice */
    RADDLE_DECODE_ROWS = 8,     /* rows of one mma tile */
    RADDLE_PREFILL_WARPS = 4,
    RADDLE_PREFILL_TILE_KV = 64,
};

RADDLE_INLINE int32_t raddle_round_up(int32_t x, int32_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

/* ---- attention_decode: warp outputs | warp states | q of each warp (when kept here) | fold
 * outputs | fold states */

/* Floats between two rows of a warp's outputs: padded against bank conflicts. */
RADDLE_INLINE int32_t raddle_decode_out_row(int32_t head_dim_vo) {
    return head_dim_vo + 4;
}

RADDLE_INLINE int32_t raddle_decode_out_bytes(int32_t tile_rows, int32_t head_dim_vo) {
    return RADDLE_DECODE_WARPS * tile_rows * raddle_decode_out_row(head_dim_vo) * 4;
}

RADDLE_INLINE int32_t raddle_decode_state_bytes(int32_t tile_rows) {
    return RADDLE_DECODE_WARPS * tile_rows * 8;
}

/* quads: of 16-byte words of q that a lane holds per row tile. */
RADDLE_INLINE int32_t raddle_decode_q_bytes(int32_t quads, int32_t row_tiles) {
    return RADDLE_DECODE_WARPS * row_tiles * quads * 512;
}

RADDLE_INLINE int32_t raddle_decode_shared_bytes(int32_t tile_rows, int32_t row_tiles,
                                                 int32_t q_quads, int32_t head_dim_vo,
                                                 int32_t heads_per_item, int32_t q_in_shared,
                                                 int32_t fixed_chunk) {
    return raddle_decode_out_bytes(tile_rows, head_dim_vo) + raddle_decode_state_bytes(tile_rows) +
           (q_in_shared ? raddle_decode_q_bytes(q_quads, row_tiles) : 0) +
           (fixed_chunk ? heads_per_item * tile_rows * (head_dim_vo * 4 + 2 * 8) : 0);
}

/* ---- attention_prefill: Q | K stages | V stages | row addresses of Q, of K and V | valid bits | fold outputs | fold states
 * Rows of Q, K and V are padded to an odd number of 16-byte chunks, so that eight rows that follow
 * each other lie in different banks. */

RADDLE_INLINE int32_t raddle_prefill_row_bytes(int32_t head_dim) {
    return (raddle_round_up(head_dim, 16) / 8 + 1) * 16;
}

/* stages: tiles of K and of V in memory. */
RADDLE_INLINE int32_t raddle_prefill_tiles_bytes(int32_t tile_rows, int32_t stages,
                                                 int32_t head_dim_qk, int32_t head_dim_vo) {
    return (tile_rows + stages * RADDLE_PREFILL_TILE_KV) * raddle_prefill_row_bytes(head_dim_qk) +
           stages * RADDLE_PREFILL_TILE_KV * raddle_prefill_row_bytes(head_dim_vo);
}

/* Addresses of Q's rows, two buffers of 64 addresses of K and of V, four of 64 bits. */
RADDLE_INLINE int32_t raddle_prefill_table_bytes(int32_t tile_rows) {
    return tile_rows * 8 + 2 * 2 * RADDLE_PREFILL_TILE_KV * 8 + 4 * 8;
}

RADDLE_INLINE int32_t raddle_prefill_shared_bytes(int32_t tile_rows, int32_t stages,
                                                  int32_t head_dim_qk, int32_t head_dim_vo,
                                                  int32_t fixed_chunk) {
    return raddle_prefill_tiles_bytes(tile_rows, stages, head_dim_qk, head_dim_vo) +
           raddle_prefill_table_bytes(tile_rows) +
           (fixed_chunk ? tile_rows * (raddle_round_up(head_dim_vo, 16) * 4 + 4 * 8) : 0);
}

#endif

// The producer's warps of the GEMM (gemm.cu): the schedule, loads by TMA, scales that TMA doesn't fetch.
#pragma once

#include "gemm_shared.cuh"

// One thread.
DEVICE void schedule_tiles(const Problem& p, uint32 shared) {
    Schedule schedule(p);
    TileRing tiles(shared + OFFSET_TILE_BARRIERS);
    Tile tile;
    while (schedule.next(tile)) send_tile(shared, tiles, tile);
    tile.is_end = 1;
    send_tile(shared, tiles, tile);
}

// One thread.
DEVICE void load_operands(const Problem& p, uint32 shared, const TensorMap& map_a, const TensorMap& map_b,
                          const TensorMap& map_scale_a, const TensorMap& map_scale_b) {
    StageRing stages(shared + OFFSET_STAGE_BARRIERS);
    TilesToLoad<true> tiles(p, shared);
    Tile tile;
    int resident = -1;  // RESIDENT_B: the first column of B that the stages hold
    while (tiles.next(tile)) {
        const int k_end = tile.k_begin + tile.k_length, k_stop = tile.k_begin + whole_rounds(blocks_of(tile)) * BLOCK_K;
        const int row_b = GROUPING == ROW_GROUPS ? tile.group * p.n + tile.col : tile.col;
        // With halves, A comes in two boxes, of which a tile without lower rows takes one.
        const bool is_half = HALVES && tile.row_end - tile.row <= TILE_M / 2;
        const int a_bytes = is_half ? A_BYTES / 2 : ONE_BOX_OF_ROWS ? min(p.m, TILE_M) * BLOCK_K : A_BYTES;
        const bool scales_a = SCALES != PER_TENSOR && !has_few_rows(p);
        const bool is_narrow_tile = SHARES_B && is_narrow(p, tile.col);  // B comes in two boxes then, of which it takes one
        const bool has_b = RESIDENT_B && tile.col == resident;
        if (RESIDENT_B && k_stop - tile.k_begin == STAGES * BLOCK_K) resident = tile.col;
        const int bytes = a_bytes + (has_b ? 0 : is_narrow_tile ? B_BYTES / 2 : B_BYTES) + SCALE_B_BYTES + (scales_a ? SCALE_A_BYTES : 0);
#pragma unroll 1
        for (int round = tile.k_begin; round < k_stop; round += ROUND * BLOCK_K, stages.advance(ROUND)) {
            const uint32 base = FLIGHT == 1 ? 0 : stages.slot(), phase = stages.phase();
#pragma unroll
            for (int i = 0; i < ROUND; ++i) {
                const int k = round + i * BLOCK_K;
                const uint32 s = base + i, full = shared + OFFSET_STAGE_BARRIERS + s * 8;
                wait_long(full + STAGES * 8, phase ^ 1);
                if (k >= k_end) {  // an idle stage
                    barrier_arrive(full);
                    continue;
                }
                // Rows and columns past the tensors' ends arrive as zeros. K starts at a whole group of scales: row k / 128.
                barrier_arrive_expect(full, bytes);
                if constexpr (CLUSTER == 1 || SHARES_B) {
                    load_tile(shared + s * A_BYTES, map_a, full, k, tile.row);
                    if (WAVES_M == 2 && !is_half)
                        load_tile(shared + s * A_BYTES + A_BYTES / 2, map_a, full, k, tile.row + TILE_M / 2);
                } else {  // each block of the cluster fetches one half of A for both
                    const int half = cluster_rank() * (TILE_M / 2);
                    if (!is_half || half == 0)
                        load_tile_to_both(shared + s * A_BYTES + half * BLOCK_K, map_a, full, k, tile.row + half);
                }
                if constexpr (SHARES_B) {
                    const int half = cluster_rank() * (TILE_N / 2);
                    if (!is_narrow_tile || half == 0)
                        load_tile_to_both(shared + OFFSET_B + s * B_BYTES + half * BLOCK_K, map_b, full, k, row_b + half);
                } else if (!has_b) {
                    load_tile(shared + OFFSET_B + s * B_BYTES, map_b, full, k, row_b);
                }
                if (scales_a)
#pragma unroll
                    for (int box = 0; box < SCALE_A_BOXES; ++box)
                        load_tile(shared + OFFSET_SCALE_A + s * SCALE_A_STRIDE + box * SCALE_A_BOX * 4, map_scale_a, full,
                                  (tile.row & ~3) + box * SCALE_A_BOX, k >> 7);
                if constexpr (SCALES == PER_ROW)
                    load_tile(shared + OFFSET_SCALE_B + s * SCALE_B_STRIDE, map_scale_b, full, tile.col, k >> 7);
            }
        }
    }
}

// One warp: a lane fetches the scales of one k-block for all waves, some rounds of k-blocks at a time, and hands them over
// when its stage is free. Lanes that wait together go on together, when the last of their stages is free. That keeps warpgroups
// with LEAD in step; elsewhere it would only let the ring run empty at each round's end, so lanes come one by one.
DEVICE void fetch_block_scales(const Arguments& args, uint32 shared) {
    constexpr int AT_ONCE = 32 / ROUND * ROUND, TOGETHER = FLIGHT == 1 && LEAD == 0 ? 1 : ROUND;
    const Problem& p = args.problem;
    const int lane = threadIdx.x % 32, last_row = ceil_div(p.n, 128) - 1;
    StageRing stages(shared + OFFSET_STAGE_BARRIERS);
    TilesToLoad<false> tiles(args.problem, shared);
    Tile tile;
    while (tiles.next(tile)) {
        const int blocks = blocks_of(tile), padded = whole_rounds(blocks);
        const float* scales = args.scale_b + (tile.k_begin >> 7) * args.scale_b_col;
        if constexpr (GROUPING == ROW_GROUPS) scales += tile.group * args.scale_b_group;
        for (int first = 0; first < padded; first += AT_ONCE) {
            float values[WAVES_N][BLOCKS_OF_WAVE];
#pragma unroll
            for (int w = 0; w < WAVES_N; ++w)
#pragma unroll
                for (int j = 0; j < BLOCKS_OF_WAVE; ++j) {
                    const int row = min((tile.col + w * WAVE_N) / 128 + j, last_row);
                    if (first + lane < blocks)
                        values[w][j] = __ldg(scales + row * args.scale_b_row + (first + lane) * args.scale_b_col);
                }
#pragma unroll 1
            for (int i = 0; i < min(AT_ONCE, padded - first); i += TOGETHER, stages.advance(TOGETHER)) {
                if (lane >= i && lane < i + TOGETHER) {
                    const uint32 s = stages.slot() + lane - i, full = shared + OFFSET_STAGE_BARRIERS + s * 8;
                    wait_long(full + STAGES * 8, stages.phase() ^ 1);
                    const uint32 slot = shared + OFFSET_SCALE_B + s * SCALE_B_STRIDE;
#pragma unroll
                    for (int w = 0; w < WAVES_N; ++w)
#pragma unroll
                        for (int segment = 0; segment < SEGMENTS; ++segment) {
                            const int block = ((tile.col + w * WAVE_N) % 128 + segment * SEGMENT) / 128;
                            float value = values[w][0];
#pragma unroll
                            for (int j = 1; j < BLOCKS_OF_WAVE; ++j) value = block == j ? values[w][j] : value;
                            store_shared(slot + (w * SEGMENT_SLOTS + segment) * 4, value);
                        }
                    barrier_arrive(full);
                }
                __syncwarp();
            }
        }
    }
}

// One warp, dense problems of few rows: lanes lie along rows (a power of two of them) and k-blocks, and each fetches the
// scales of LOADS k-blocks at a time.
DEVICE int few_rows_shift(const Problem& p) { return 32 - __clz(p.m - 1); }
DEVICE void fetch_few_row_scales(const Arguments& args, uint32 shared) {
    constexpr int LOADS = 8;
    const int lane = threadIdx.x % 32, shift = few_rows_shift(args.problem), at_once = 32 >> shift;
    const int row = lane & ((1 << shift) - 1), own = lane >> shift, step = min(at_once, ROUND);
    StageRing stages(shared + OFFSET_STAGE_BARRIERS);
    TilesToLoad<false> tiles(args.problem, shared);
    Tile tile;
    while (tiles.next(tile)) {
        const int blocks = blocks_of(tile), padded = whole_rounds(blocks);
        const float* source = args.scale_a + row + own * args.scale_a_col;
        for (int first = 0; first < padded; first += LOADS * at_once) {
            float values[LOADS];
#pragma unroll
            for (int j = 0; j < LOADS; ++j, source += at_once * args.scale_a_col)
                if (first + j * at_once + own < blocks && row < args.problem.m) values[j] = __ldg(source);
#pragma unroll
            for (int j = 0; j < LOADS; ++j)
#pragma unroll 1
                for (int i = 0; i < min(at_once, padded - first - j * at_once); i += step, stages.advance(step)) {
                    if (own >= i && own < i + step) {
                        const uint32 s = stages.slot() + own - i, full = shared + OFFSET_STAGE_BARRIERS + s * 8;
                        wait_long(full + STAGES * 8, stages.phase() ^ 1);
                        store_shared(shared + OFFSET_SCALE_A + s * SCALE_A_STRIDE + row * 4, values[j]);
                        barrier_arrive(full);
                    }
                    __syncwarp();
                }
        }
    }
}

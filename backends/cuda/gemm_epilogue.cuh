// How the output of the GEMM (gemm.cu) gets from registers to memory.
#pragma once

#include "gemm_shared.cuh"

// A warp writes its 16 x WAVE_N result in chunks of 16 x CHUNK through its own staging memory, without waiting for any
// other warp. Chunks of 128-byte rows are swizzled like TMA does it, others are dense.
constexpr int OUT_BYTES = OUTPUT == BF16 ? 2 : 4;
constexpr bool OUT_SWIZZLED = WAVE_N * OUT_BYTES % 128 == 0;
constexpr int CHUNK = OUT_SWIZZLED ? 128 / OUT_BYTES
                      : OUTPUT == BF16 ? WAVE_N / (WAVE_N > 128 ? 2 : 1)
                                       : greatest_common_divisor(WAVE_N, 16);
constexpr int CHUNK_BYTES = 16 * CHUNK * OUT_BYTES, CHUNKS = WAVE_N / CHUNK;
constexpr int FITTING = STAGING_BYTES / CHUNK_BYTES, BUFFERS = FITTING < WAVES * CHUNKS ? FITTING : WAVES * CHUNKS;
static_assert(HELD_STAGES > 0 || BUFFERS > 0);
static_assert(CHUNK == CHUNK_OF_HOST, "the host's output map has other boxes");

DEVICE uint32 staged(uint32 buffer, int row, int byte) {
    const int swizzled = OUT_SWIZZLED ? byte ^ ((row & 7) << 4) : byte;
    return buffer + row * (CHUNK * OUT_BYTES) + swizzled;
}

DEVICE void stage_chunk(uint32 buffer, const float (&acc)[PART], int chunk, int lane) {
    if constexpr (OUTPUT == BF16) {
        const int row = lane % 16, half = lane / 16;
#pragma unroll
        for (int i = 0; i < CHUNK / 8; i += 2) {
            const float* v = acc + 4 * (chunk * (CHUNK / 8) + i);
            if (i + 1 < CHUNK / 8)
                store_matrices4(staged(buffer, row, (i + half) * 16), pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                                pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
            else
                store_matrices2(staged(buffer, row, i * 16), pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
        }
    } else {
        const int row = lane / 4, byte = lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < CHUNK / 8; ++i) {
            const float* v = acc + 4 * (chunk * (CHUNK / 8) + i);
            // Not as pairs: wanting the accumulators in adjacent registers makes ptxas spill in the main loop.
            const uint32 upper = staged(buffer, row, i * 32 + byte), lower = staged(buffer, row + 8, i * 32 + byte);
            store_shared(upper, v[0]), store_shared(upper + 4, v[1]);
            store_shared(lower, v[2]), store_shared(lower + 4, v[3]);
        }
    }
}

// Writes any part of a chunk: where rows or columns end inside it, and outputs whose rows aren't aligned to 16 bytes.
DEVICE void copy_chunk(const Arguments& args, uint32 buffer, const Tile& tile, int row0, int col0, int lane) {
    constexpr int PIECES = CHUNK * OUT_BYTES / 16, PER_PIECE = 16 / OUT_BYTES;
#pragma unroll 1
    for (int i = lane; i < 16 * PIECES; i += 32) {
        const int row = i / PIECES, piece = i % PIECES, col = col0 + piece * PER_PIECE;
        if (row0 + row >= tile.row_end || col >= args.problem.n) continue;
        const int4 v = load_shared4(staged(buffer, row, piece * 16));
        const long long at = (GROUPING == REDUCTION_GROUPS ? tile.group * args.out_group : 0) + (row0 + row) * args.out_row + col;
        const int count = min(PER_PIECE, args.problem.n - col);
        if constexpr (OUTPUT == BF16) {
            uint16* out = static_cast<uint16*>(args.out) + at;
            if (args.out_aligned && count == PER_PIECE) {
                *reinterpret_cast<int4*>(out) = v;
            } else {
                const int words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int e = 0; e < PER_PIECE; ++e)
                    if (e < count) out[e] = static_cast<uint16>(static_cast<uint32>(words[e / 2]) >> (e % 2 * 16));
            }
        } else {
            float* out = static_cast<float*>(args.out) + at;
            const int words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < PER_PIECE; ++e)
                if (e < count) {
                    if constexpr (OUTPUT == FP32_ADD) add_global(out + e, __int_as_float(words[e]));
                    else out[e] = __int_as_float(words[e]);
                }
        }
    }
}

// TMA clips at the tensor's last row, not at a group's.
DEVICE bool is_stored_by_tma(const Arguments& args, const Tile& tile, int first_row, int rows) {
    return args.out_aligned && (first_row + rows <= tile.row_end || tile.row_end == args.problem.m);
}

DEVICE void store_chunk(const TensorMap& map_out, uint32 source, const Tile& tile, int col, int row) {
    if constexpr (OUTPUT == FP32_ADD) add_tile(map_out, source, col, row, tile.group);
    else store_tile(map_out, source, col, row, GROUPING == REDUCTION_GROUPS ? tile.group : 0);
}

// Writes the chunks of all waves from number `index` on; `row0` is the warp's first row of wave 0. A template recursion:
// were this a loop that the compiler chose not to unroll, `acc` would be indexed at run time and move to local memory.
// Each chunk is a group of stores, empty where TMA has nothing to write, so that chunks alternate between the buffers.
template <int index>
DEVICE void write_chunks(const Arguments& args, const TensorMap& map_out, uint32 staging, const Tile& tile,
                         const float (&acc)[WAVES][PART], int row0, int lane) {
    if constexpr (index < WAVES * CHUNKS) {
        constexpr int wave = index / CHUNKS, chunk = index % CHUNKS;
        const int row = row0 + wave_row(wave), col = tile.col + wave_col(wave) + chunk * CHUNK;
        if (row < tile.row_end && col < args.problem.n) {
            const uint32 buffer = staging + index % BUFFERS * CHUNK_BYTES;
            // A tile begins with the first buffer, whichever the one before it ended with.
            wait_stores_read<index == 0 && WAVES * CHUNKS % BUFFERS != 0 ? 0 : BUFFERS - 1>();
            __syncwarp();
            stage_chunk(buffer, acc[wave], chunk, lane);
            fence_async();
            __syncwarp();
            if (!is_stored_by_tma(args, tile, row, 16)) copy_chunk(args, buffer, tile, row, col, lane);
            else if (elect_one()) store_chunk(map_out, buffer, tile, col, row);
        }
        commit_stores();
        write_chunks<index + 1>(args, map_out, staging, tile, acc, row0, lane);
    }
}

// The same where there is memory for all chunks: they wait once, and are handed over together.
template <int index, bool is_staging>
DEVICE void write_all_chunks(const Arguments& args, const TensorMap& map_out, uint32 staging, const Tile& tile,
                             const float (&acc)[WAVES][PART], int row0, int lane) {
    if constexpr (index < WAVES * CHUNKS) {
        constexpr int wave = index / CHUNKS, chunk = index % CHUNKS;
        const int row = row0 + wave_row(wave), col = tile.col + wave_col(wave) + chunk * CHUNK;
        const uint32 buffer = staging + index * CHUNK_BYTES;
        if constexpr (is_staging) stage_chunk(buffer, acc[wave], chunk, lane);
        else if (row < tile.row_end && col < args.problem.n) {
            if (!is_stored_by_tma(args, tile, row, 16)) copy_chunk(args, buffer, tile, row, col, lane);
            else if (elect_one()) store_chunk(map_out, buffer, tile, col, row);
        }
        write_all_chunks<index + 1, is_staging>(args, map_out, staging, tile, acc, row0, lane);
    }
}

DEVICE void write_output(const Arguments& args, const TensorMap& map_out, uint32 staging, const Tile& tile,
                         const float (&acc)[WAVES][PART], int row0, int lane) {
    if constexpr (BUFFERS == WAVES * CHUNKS && CHUNKS > 1) {
        wait_stores_read<0>();
        __syncwarp();
        write_all_chunks<0, true>(args, map_out, staging, tile, acc, row0, lane);
        fence_async();
        __syncwarp();
        write_all_chunks<0, false>(args, map_out, staging, tile, acc, row0, lane);
        commit_stores();
    } else {
        write_chunks<0>(args, map_out, staging, tile, acc, row0, lane);
    }
}

// The output of large BF16 tiles goes through memory that their end leaves free: of the last stage, which consumers keep, the rows
// of A that a warpgroup has read itself; and for the other half of the columns, staging memory (first warpgroup) or where B was
// (second). So a warpgroup writes all it has at once and begins the next tile, whose first k-blocks lie in the other stages; the
// store warp hands the pieces to TMA and frees the stage when they are read.
constexpr int HALF_PIECE = 64 * 128, PIECE_BYTES = WARPGROUPS * HALF_PIECE;  // a wave of one warpgroup, or of both, a chunk wide
static_assert(HELD_STAGES == 0 || (HELD_STAGES == 1 && WARPGROUPS == 2 && WAVES_M == 2 && CHUNKS == 2 && CHUNK * OUT_BYTES == 128));
static_assert(HELD_STAGES == 0 || (2 * HALF_PIECE <= B_BYTES && 2 * HALF_PIECE <= CONSUMER_WARPS * STAGING_BYTES));
static_assert(OUTPUT_BARRIERS == (HELD_STAGES > 0 ? 3 : 0));

DEVICE uint32 piece(uint32 warpgroup, int chunk, int wave) {
    if (chunk == 0) return (STAGES - 1) * A_BYTES + wave * PIECE_BYTES + warpgroup * HALF_PIECE;
    return (warpgroup == 0 ? OFFSET_STAGING : OFFSET_B + (STAGES - 1) * B_BYTES) + wave * HALF_PIECE;
}

DEVICE uint32 staged_barrier(uint32 shared, uint32 warpgroup) { return shared + OFFSET_OUTPUT_BARRIERS + warpgroup * 8; }
DEVICE uint32 b_read_barrier(uint32 shared) { return shared + OFFSET_OUTPUT_BARRIERS + 2 * 8; }  // by the first warpgroup

// One consumer warp. `phase` is of the output's barriers.
DEVICE void stage_output(const Arguments& args, uint32 shared, const Tile& tile, const float (&acc)[WAVES][PART], uint32 warp, int lane,
                         uint32 phase) {
    const uint32 warpgroup = warp / 4, own_rows = warp % 4 * 16;
    warpgroup_sync(warpgroup);  // wgmma of all four warps have read A
    if (warpgroup == 0 && lane == 0) barrier_arrive(b_read_barrier(shared));
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (chunk == 1 && warpgroup == 1) barrier_wait(b_read_barrier(shared), phase);
#pragma unroll
        for (int w = 0; w < WAVES; ++w) stage_chunk(shared + piece(warpgroup, chunk, w) + own_rows * 128, acc[w], chunk, lane);
    }
    fence_async();
    __syncwarp();
#pragma unroll 1
    for (int w = 0; w < WAVES; ++w) {
        const int row = tile.row + wave_row(w) + warpgroup * 64;
        if (is_stored_by_tma(args, tile, row, 64)) continue;
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
            copy_chunk(args, shared + piece(warpgroup, chunk, w) + own_rows * 128, tile, row + own_rows, tile.col + chunk * CHUNK, lane);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(staged_barrier(shared, warpgroup));
}

// One thread of the store warp.
DEVICE void store_output(const Arguments& args, const TensorMap& map_out, uint32 shared) {
    TilesToLoad<true> tiles(args.problem, shared);
    Tile tile;
    for (uint32 phase = 0; tiles.next(tile); phase ^= 1) {
#pragma unroll 1
        for (uint32 warpgroup = 0; warpgroup < WARPGROUPS; ++warpgroup) {
            wait_long(staged_barrier(shared, warpgroup), phase);
#pragma unroll
            for (int w = 0; w < WAVES; ++w)
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                    const int row = tile.row + wave_row(w) + warpgroup * 64, col = tile.col + chunk * CHUNK;
                    if (row < tile.row_end && col < args.problem.n && is_stored_by_tma(args, tile, row, 64))
                        store_chunk(map_out, shared + piece(warpgroup, chunk, w), tile, col, row);
                }
            commit_stores();
        }
        wait_stores_read<0>();
        const uint32 empty = shared + OFFSET_STAGE_BARRIERS + (STAGES + STAGES - 1) * 8;  // as if all consumer warps had freed it
        if constexpr (CLUSTER == 1) barrier_arrive(empty, CONSUMER_WARPS);
        else
            for (int block = 0; block < CLUSTER; ++block) barrier_arrive_remote(empty, block, CONSUMER_WARPS);
    }
}

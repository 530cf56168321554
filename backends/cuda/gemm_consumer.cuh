// The consumer warpgroups of the GEMM (gemm.cu): multiply, promote, hand over to the epilogue.
#pragma once

#include "gemm_epilogue.cuh"
#include "gemm_shared.cuh"
#include "wgmma.cuh"

// Promotion ------------------------------------------------------------------------------------------------------

template <int count>  // of a narrow tile, fewer than PART
DEVICE void promote_blocks(float (&acc)[PART], const float (&part)[count], const float (&a)[2],
                           const float (&b)[SEGMENT_SLOTS]) {
#pragma unroll
    for (int segment = 0; segment < SEGMENTS * count / PART; ++segment) {
        const float s0 = a[0] * b[segment], s1 = a[1] * b[segment];
#pragma unroll
        for (int i = segment * (SEGMENT / 8); i < (segment + 1) * (SEGMENT / 8); ++i) {
            acc[4 * i] += s0 * part[4 * i];
            acc[4 * i + 1] += s0 * part[4 * i + 1];
            acc[4 * i + 2] += s1 * part[4 * i + 2];
            acc[4 * i + 3] += s1 * part[4 * i + 3];
        }
    }
}

DEVICE void promote_rows(float (&acc)[PART], const float (&part)[PART], const float (&a)[2],
                         const float2 (&b)[WAVE_N / 8]) {
#pragma unroll
    for (int i = 0; i < WAVE_N / 8; ++i) {
        acc[4 * i] += a[0] * b[i].x * part[4 * i];
        acc[4 * i + 1] += a[0] * b[i].y * part[4 * i + 1];
        acc[4 * i + 2] += a[1] * b[i].x * part[4 * i + 2];
        acc[4 * i + 3] += a[1] * b[i].y * part[4 * i + 3];
    }
}

// Main loop ------------------------------------------------------------------------------------------------------

// Kernels with 1x128 scales of B have no register for it.
constexpr bool KEEPS_REMOTE = CLUSTER > 1 && SCALES != PER_ROW;

// What one consumer warp needs to know about where its operands lie in stage 0, and its accumulators.
struct Consumer {
    uint64 a_descriptor, b_descriptor;
    uint32 a_address[4];  // of its lane's row for ldmatrix, one for each step of 32 along K
    uint32 scale_a, scale_b;
    uint32 barriers;  // of the stages
    uint32 free;  // KEEPS_REMOTE: the barrier of stage 0 that a lane arrives at when it is free, in the cluster's block of that lane
    int lane;
    bool leads;  // the first warpgroup
    float acc[WAVES][PART];
    uint32 a[4][4];  // A_IN_REGISTERS: this warpgroup's rows of A in the current k-block
};

// PTX wants the A fragment of wgmma as ldmatrix delivers it: lane l reads 16 bytes of row l % 16, bytes 0-15 of the step
// (lanes 0-15) or 16-31 (the others).
DEVICE void load_a(Consumer& c, uint32 s) {
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrices(c.a[k], c.a_address[k] + s * A_BYTES);
}

// In a cluster a stage is free when the consumers of both blocks are done with it, because both blocks write into it.
DEVICE void release_stage(const Consumer& c, uint32 s) {
    const uint32 empty = c.barriers + (STAGES + s) * 8;
    if constexpr (CLUSTER == 1) {
        if (c.lane == 0) barrier_arrive(empty);
    } else {
        if (c.lane >= CLUSTER) return;
        if constexpr (KEEPS_REMOTE) barrier_arrive_at(c.free + s * 8);
        else barrier_arrive_remote(empty, c.lane);
    }
}

DEVICE void load_block_scales(float (&scales)[SEGMENT_SLOTS], uint32 address) {
    if constexpr (SEGMENT_SLOTS == 1) {
        scales[0] = load_shared(address);
    } else if constexpr (SEGMENT_SLOTS == 2) {
        const float2 v = load_shared2(address);
        scales[0] = v.x, scales[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < SEGMENT_SLOTS; i += 4) {
            const int4 v = load_shared4(address + i * 4);
            scales[i] = __int_as_float(v.x), scales[i + 1] = __int_as_float(v.y);
            scales[i + 2] = __int_as_float(v.z), scales[i + 3] = __int_as_float(v.w);
        }
    }
}

// The registers that a wave's result goes to: `part`, or without promotion the accumulators themselves.
template <int count>
DEVICE float (&result_of(float (&part)[count], float (&acc)[PART]))[count] {
    if constexpr (PROMOTE) return part;
    else return acc;
}

// What lies `bytes` into stage `s`. Where the stage isn't known at compile time, summing up the lower half alone saves instructions.
template <int stage_bytes>
DEVICE uint64 descriptor_in_stage(uint64 descriptor, uint32 s, uint32 bytes) {
    if constexpr (UNROLL > 1) return descriptor + (s * stage_bytes + bytes) / 16;
    else return DESCRIPTOR >> 32 << 32 | (static_cast<uint32>(descriptor) + s * (stage_bytes / 16) + bytes / 16);
}

// One k-block out of stage `s`, the first `waves` waves of it, `columns` columns of each, and the fragment of A of the next one, if there is one, out
// of stage `next`. In the last round of a tile, the stages that take its output are not freed.
template <bool last_of_tile_possible, int waves, int columns>
DEVICE void multiply_block(Consumer& c, uint32 s, uint32 next, uint32 next_phase, bool has_next, bool is_last_round, bool accumulate) {
    float part[columns / 2];
    float2 b_columns[WAVE_N / 8];
    float a_scale[2];
#pragma unroll
    for (int w = 0; w < waves; ++w) {
        const int wm = WAVES_M == 1 ? 0 : w, wn = WAVES_N == 1 ? 0 : w;
        if (SCALES != PER_TENSOR && (w == 0 || WAVES_M > 1)) {
            const uint32 address = c.scale_a + s * SCALE_A_STRIDE + wave_row(wm) * 4;
            a_scale[0] = load_shared(address), a_scale[1] = load_shared(address + 8 * 4);
        }
        float b_scale[SEGMENT_SLOTS];
        if constexpr (SCALES == PER_BLOCK)
            load_block_scales(b_scale, c.scale_b + s * SCALE_B_STRIDE + wn * SEGMENT_SLOTS * 4);

        float(&result)[columns / 2] = result_of(part, c.acc[w]);
        pin(result);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint64 b_tile = descriptor_in_stage<B_BYTES>(c.b_descriptor, s, wave_col(wn) * BLOCK_K + k * 32);
            if constexpr (A_IN_REGISTERS)
                wgmma(result, c.a[k], b_tile, k > 0 || accumulate);
            else
                wgmma(result, descriptor_in_stage<A_BYTES>(c.a_descriptor, s, wave_row(wm) * BLOCK_K + k * 32), b_tile, k > 0 || accumulate);
        }
        wgmma_commit();
        if (SCALES == PER_ROW && (w == 0 || WAVES_N > 1))
#pragma unroll
            for (int i = 0; i < WAVE_N / 8; ++i)
                b_columns[i] = load_shared2(c.scale_b + s * SCALE_B_STRIDE + (wave_col(wn) + i * 8) * 4);
        pin(result);
        wgmma_wait<0>();

        if (w == waves - 1) {
            __syncwarp();
            if (s < STAGES - HELD_STAGES || !is_last_round) release_stage(c, s);  // nothing of it is read below
            // Before the promotion, so that the loads' latency hides behind it.
            if (!last_of_tile_possible || has_next) {
                barrier_wait(c.barriers + next * 8, next_phase);
                if constexpr (A_IN_REGISTERS) load_a(c, next);
            }
        }
        if constexpr (SCALES == PER_BLOCK) promote_blocks(c.acc[w], part, a_scale, b_scale);
        else if constexpr (SCALES == PER_ROW) promote_rows(c.acc[w], part, a_scale, b_columns);
        else if constexpr (PROMOTE)
#pragma unroll
            for (int i = 0; i < PART; ++i) c.acc[w][i] += part[i];
    }
}

// The second warpgroup begins a tile when the first one has done LEAD k-blocks of it; so the two end tiles at different
// times, and one multiplies while the other writes.
DEVICE void let_follow(const Consumer& c) {
    if (c.leads && c.lane == 0) barrier_arrive(c.barriers + OFFSET_LEAD_BARRIER - OFFSET_STAGE_BARRIERS);
}

// Of a tile's last round, after its last k-block.
DEVICE void skip_idle_stages(const Consumer& c, int blocks, uint32 phase) {
#pragma unroll 1
    for (uint32 s = blocks % STAGES; s < STAGES; ++s) {
        barrier_wait(c.barriers + s * 8, phase);
        __syncwarp();
        if (s < STAGES - HELD_STAGES) release_stage(c, s);
    }
}

// The k-blocks of one tile; `phase` is of the ring of stages, which the tile begins and ends at stage 0.
template <int waves, int columns = WAVE_N>
DEVICE void multiply_tile(Consumer& c, int blocks, uint32& phase) {
    // Beside a second loop, ptxas keeps what addresses follow from in uniform registers only if it is made so here.
    if (NARROW > 0 && columns == WAVE_N) c.a_descriptor = uniform_descriptor(c.a_descriptor), c.b_descriptor = uniform_descriptor(c.b_descriptor);
    if (blocks > 0) {
        barrier_wait(c.barriers, phase);
        if constexpr (A_IN_REGISTERS) load_a(c, 0);
    }
    int block = 0;
    for (; block + STAGES <= blocks; block += STAGES, phase ^= 1) {
        const bool is_last = block + STAGES == blocks;
#pragma unroll UNROLL
        for (int s = 0; s + 1 < STAGES; ++s) {
            multiply_block<false, waves, columns>(c, s, s + 1, phase, true, is_last, !PROMOTE && block + s > 0);
            if (LEAD > 0 && s == LEAD - 1 && block == 0) let_follow(c);
        }
        multiply_block<true, waves, columns>(c, STAGES - 1, 0, phase ^ 1, block + STAGES < blocks, is_last, !PROMOTE);
    }
    if (block < max(blocks, 1)) {
#pragma unroll 1
        for (int s = 0; block < blocks; ++s, ++block)
            multiply_block<true, waves, columns>(c, s, s + 1, phase, block + 1 < blocks, true, !PROMOTE && block > 0);
        skip_idle_stages(c, blocks, phase);
        if (LEAD > 0 && blocks < STAGES) let_follow(c);  // not before: the other one has begun the tile before this one
        phase ^= 1;
    }
}

// A wave whose product is under way.
struct InFlight {
    float part[PART];
    float a_scale[2], b_scale[SEGMENT_SLOTS];
    uint32 stage;
};

DEVICE void begin_wave(Consumer& c, InFlight& x, uint32 s, int w) {
    x.stage = s;
    const uint32 address = c.scale_a + s * SCALE_A_STRIDE + wave_row(w) * 4;
    x.a_scale[0] = load_shared(address), x.a_scale[1] = load_shared(address + 8 * 4);
    load_block_scales(x.b_scale, c.scale_b + s * SCALE_B_STRIDE);
    pin(x.part);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k)
        wgmma(x.part, c.a_descriptor + (s * A_BYTES + wave_row(w) * BLOCK_K + k * 32) / 16, c.b_descriptor + (s * B_BYTES + k * 32) / 16, k > 0);
    wgmma_commit();
}

// Its numbers are not wanted.
DEVICE void drop_begun(InFlight& x) {
    wgmma_wait<0>();
    pin(x.part);
}

// EARLY: a tile's first wave is begun before the tile before it is written, so that the tensor core has work meanwhile. The loop is
// turned by half a step for it: a wave is finished, then the next one is begun.
template <bool last_of_tile_possible, int waves>
DEVICE void finish_and_begin(Consumer& c, InFlight& x, uint32 s, uint32 next, uint32 next_phase, bool has_next, bool is_last_round) {
#pragma unroll
    for (int w = 0; w < waves; ++w) {
        wgmma_wait<0>();
        pin(x.part);
        if (w == waves - 1) {
            __syncwarp();
            if (s < STAGES - HELD_STAGES || !is_last_round) release_stage(c, s);
            if (!last_of_tile_possible || has_next) barrier_wait(c.barriers + next * 8, next_phase);
        }
        promote_blocks(c.acc[w], x.part, x.a_scale, x.b_scale);
        if (w < waves - 1) begin_wave(c, x, s, w + 1);
        else if (!last_of_tile_possible || has_next) begin_wave(c, x, next, 0);
    }
}

// All stages of a round but the last one. A recursion, because the compiler doesn't unroll it as a loop.
template <int s, int waves>
DEVICE void finish_and_begin_stages(Consumer& c, InFlight& x, uint32 phase, bool is_last_round) {
    if constexpr (s + 1 < STAGES) {
        finish_and_begin<false, waves>(c, x, s, s + 1, phase, true, is_last_round);
        finish_and_begin_stages<s + 1, waves>(c, x, phase, is_last_round);
    }
}

// As multiply_tile, for a tile whose first wave is under way.
template <int waves>
DEVICE void multiply_begun_tile(Consumer& c, InFlight& x, int blocks, uint32& phase) {
    if (NARROW > 0) c.a_descriptor = uniform_descriptor(c.a_descriptor), c.b_descriptor = uniform_descriptor(c.b_descriptor);
    int block = 0;
    for (; block + STAGES <= blocks; block += STAGES, phase ^= 1) {
        const bool is_last = block + STAGES == blocks;
        finish_and_begin_stages<0, waves>(c, x, phase, is_last);
        finish_and_begin<true, waves>(c, x, STAGES - 1, 0, phase ^ 1, block + STAGES < blocks, is_last);
    }
    if (block < max(blocks, 1)) {
        if (blocks == 0) drop_begun(x);
#pragma unroll 1
        for (int s = 0; block < blocks; ++s, ++block) finish_and_begin<true, waves>(c, x, s, s + 1, phase, block + 1 < blocks, true);
        skip_idle_stages(c, blocks, phase);
        phase ^= 1;
    }
}

// Small tiles: their one wave is too short to hide the time from a stage's arrival to its promotion; so the products of FLIGHT k-blocks
// are under way, each with registers of its own, and promoted in their order.
DEVICE void start_block(Consumer& c, InFlight& x, uint32 s, uint32 phase) {
    barrier_wait(c.barriers + s * 8, phase);
    begin_wave(c, x, s, 0);
}

// `pending` younger ones may still be under way.
template <int pending>
DEVICE void finish_block(Consumer& c, InFlight& x) {
    wgmma_wait<pending>();
    pin(x.part);
    __syncwarp();
    release_stage(c, x.stage);
    promote_blocks(c.acc[0], x.part, x.a_scale, x.b_scale);
}

template <int index>
DEVICE void finish_all(Consumer& c, InFlight (&x)[FLIGHT]) {
    if constexpr (index < FLIGHT) {
        finish_block<FLIGHT - 1 - index>(c, x[index]);
        finish_all<index + 1>(c, x);
    }
}

DEVICE void multiply_in_flight(Consumer& c, int blocks, StageRing& stages) {
    if constexpr (FLIGHT > 1) {
        InFlight x[FLIGHT];
        int block = 0;
#pragma unroll 1
        for (; block + FLIGHT <= blocks; block += FLIGHT) {
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i, stages.advance()) start_block(c, x[i], stages.slot(), stages.phase());
            finish_all<0>(c, x);
        }
#pragma unroll 1
        for (; block < whole_rounds(blocks); ++block, stages.advance()) {
            if (block < blocks) {
                start_block(c, x[0], stages.slot(), stages.phase());
                finish_block<0>(c, x[0]);
            } else {  // an idle stage
                stages.wait_full();
                __syncwarp();
                release_stage(c, stages.slot());
            }
        }
    }
}

DEVICE void clear(Consumer& c) {
#pragma unroll
    for (int w = 0; w < WAVES; ++w)
#pragma unroll
        for (int i = 0; i < PART; ++i) c.acc[w][i] = 0;
}

// Nothing that only the epilogue needs is held in registers during the main loop.
DEVICE void write_tile(const Arguments& args, uint32 shared, const TensorMap& map_out, const Tile& tile, const Consumer& c, uint32& tile_phase) {
    const uint32 thread = thread_index_again(), warp = uniform(thread / 32);
    if constexpr (HELD_STAGES > 0) {
        stage_output(args, shared, tile, c.acc, warp, thread % 32, tile_phase);
    } else {
        write_output(args, map_out, shared + OFFSET_STAGING + warp * STAGING_BYTES, tile, c.acc, tile.row + warp * 16, thread % 32);
    }
    __syncwarp();  // wgmma wants whole warps
    tile_phase ^= 1;
}

// The first rows' scales of A are where the tile's group begins in its box.
DEVICE void find_scales(Consumer& c, uint32 scale_a, const Tile& tile) {
    if constexpr (GROUPING == ROW_GROUPS) c.scale_a = scale_a + (tile.row & 3) * 4;
}

DEVICE void consume_tiles(Consumer& c, const Arguments& args, uint32 shared, const TensorMap& map_out) {
    TileRing tiles(shared + OFFSET_TILE_BARRIERS);
    StageRing stages(c.barriers);  // FLIGHT > 1
    uint32 phase = 0;              // of the ring of stages, else
    uint32 tile_phase = 0;  // of barriers that everybody passes once a tile
    const uint32 scale_a = c.scale_a;
    while (true) {
        tiles.wait_full();
        const Tile tile = read_tile(shared, tiles);
        if (tile.is_end) break;
        const int blocks = blocks_of(tile);
        find_scales(c, scale_a, tile);
        clear(c);
        if (LEAD > 0 && !c.leads) barrier_wait(shared + OFFSET_LEAD_BARRIER, tile_phase);

        if constexpr (FLIGHT > 1) multiply_in_flight(c, blocks, stages);
        else if (HALVES && tile.row_end - tile.row <= TILE_M / 2) multiply_tile<1>(c, blocks, phase);
        else if (NARROW > 0 && uniform(is_narrow(args.problem, tile.col))) multiply_tile<WAVES, NARROW == 0 ? WAVE_N : NARROW>(c, blocks, phase);
        else multiply_tile<WAVES>(c, blocks, phase);

        if constexpr (SCALES == PER_TENSOR) {
            const float scale = __ldg(args.scale_a) * __ldg(args.scale_b);
#pragma unroll
            for (int w = 0; w < WAVES; ++w)
#pragma unroll
                for (int i = 0; i < PART; ++i) c.acc[w][i] *= scale;
        }
        const Tile done = read_tile(shared, tiles);
        release_tile(tiles);
        write_tile(args, shared, map_out, done, c, tile_phase);
    }
}

// The next tile, begun. One without k-blocks too: of what lies in its idle stage, for nobody.
DEVICE bool begin_tile(Consumer& c, InFlight& x, uint32 scale_a, uint32 shared, const TileRing& tiles, uint32 phase) {
    tiles.wait_full();
    const Tile tile = read_tile(shared, tiles);
    if (tile.is_end) return false;
    find_scales(c, scale_a, tile);
    barrier_wait(c.barriers, phase);
    begin_wave(c, x, 0, 0);
    return true;
}

DEVICE void consume_tiles_early(Consumer& c, const Arguments& args, uint32 shared, const TensorMap& map_out) {
    TileRing tiles(shared + OFFSET_TILE_BARRIERS);
    InFlight x;
    uint32 phase = 0, tile_phase = 0;
    const uint32 scale_a = c.scale_a;
    bool has_tile = begin_tile(c, x, scale_a, shared, tiles, phase);
    while (has_tile) {
        const Tile tile = read_tile(shared, tiles);
        const int blocks = blocks_of(tile);
        clear(c);
        if (HALVES && tile.row_end - tile.row <= TILE_M / 2) {
            multiply_begun_tile<1>(c, x, blocks, phase);
        } else if (NARROW > 0 && uniform(is_narrow(args.problem, tile.col))) {  // begun too wide: once more
            drop_begun(x);
            multiply_tile<WAVES, NARROW == 0 ? WAVE_N : NARROW>(c, blocks, phase);
        } else {
            multiply_begun_tile<WAVES>(c, x, blocks, phase);
        }
        const Tile done = read_tile(shared, tiles);
        release_tile(tiles);
        has_tile = begin_tile(c, x, scale_a, shared, tiles, phase);
        write_tile(args, shared, map_out, done, c, tile_phase);
    }
}

DEVICE void consume(const Arguments& args, uint32 shared, const TensorMap& map_out) {
    const uint32 warp = uniform(threadIdx.x / 32), warpgroup = warp / 4;
    const int lane = threadIdx.x % 32, row0 = warpgroup * 64 + warp % 4 * 16;  // of this warp in the tile

    Consumer c;
    c.lane = lane;
    c.leads = warpgroup == 0;
    c.barriers = shared + OFFSET_STAGE_BARRIERS;
    if constexpr (KEEPS_REMOTE) c.free = remote_address(c.barriers + STAGES * 8, lane % CLUSTER);
    c.a_descriptor = operand_descriptor(uniform(shared + warpgroup * 64 * BLOCK_K));
    c.b_descriptor = operand_descriptor(uniform(shared + OFFSET_B));
    const int a_row = row0 + lane % 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) c.a_address[k] = shared + a_row * BLOCK_K + ((k * 2 + lane / 16 ^ (a_row & 7)) << 4);
    c.scale_a = shared + OFFSET_SCALE_A + (row0 + lane / 4) * 4;
    c.scale_b = shared + OFFSET_SCALE_B + (SCALES == PER_ROW ? lane % 4 * 8 : 0);
    if constexpr (EARLY) consume_tiles_early(c, args, shared, map_out);
    else consume_tiles(c, args, shared, map_out);
    wait_stores_read<0>();  // what was written is visible when the grid ends; shared memory must be there until it is read
}

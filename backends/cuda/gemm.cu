// Block-scaled FP8 GEMM for Hopper (sm_90a):   out[M, N] (+)= sum over k of scale * A[M, k] * B[N, k]
//
// Legend: M, N rows of A and B, K reduction (both operands K-major), E experts; a k-block is 128 of K, the length of a
//   scale group. One thread block makes one TILE_M x TILE_N tile of the output after another (persistent grid).
//   Warpgroups 0 .. WARPGROUPS-1 consume, the last one produces; FP32 accumulators stay in registers.
//
// One k-block travels like this:
//   producer thread --TMA--> stage of shared memory (A, B, 1x128 scales) --full[stage]-->
//   each consumer warpgroup: for each wave (a 64 x WAVE_N part of its share)
//       4 wgmma of k = 32 from zero -> `part` (14-bit tensor-core accumulator, so never longer than 128 of K)
//       promotion: acc += scale * part, in FP32   <- while the other warpgroup's wgmma keep the tensor core busy
//   --empty[stage]--> producer. Consumer warpgroups meet nowhere, so they drift apart and stay apart.
//
// Shared-memory bandwidth (128 B a clock) is what limits such a kernel, so each operand is read as seldom as possible:
//   waves along N (WAVES_N = 2): A goes through registers once (ldmatrix) and serves both waves;
//   waves along M (WAVES_M = 2): one column of B's 1x128 scales is read once and serves both waves.
// docs/hopper_gemm.md has the arithmetic and what was measured.
//
// The policies are constants of config.cuh, which the host generates for each kernel (config.py) together with
// wgmma.cuh, the one wgmma of shape 64 x WAVE_N x 32 that it uses.

#include "config.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

constexpr int BLOCK_K = 128;
constexpr int WAVES = WAVES_M * WAVES_N;
constexpr bool A_IN_REGISTERS = WAVES_M == 1;
constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
constexpr int THREADS = 128 * (WARPGROUPS + 1);
// setmaxnreg hands the producer's registers to the consumers: 65536 registers in all, a multiple of 8 for each thread.
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 24 : 40;
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 240 : 232;

static_assert(WAVES_M == 1 || WAVES_N == 1, "waves run along one axis");
static_assert(WAVE_N % 8 == 0 && WAVE_N <= 128, "two FP32 values for each output element must fit into registers");

// Shared memory: STAGES x A, x B, x scales of A, x scales of B, staging of the output, ring of tiles, barriers.
constexpr int A_BYTES = TILE_M * BLOCK_K, B_BYTES = TILE_N * BLOCK_K;
constexpr int SCALE_A_BYTES = SCALES == PER_TENSOR ? 0 : TILE_M * 4;
constexpr int SCALE_B_BYTES = SCALES == PER_ROW ? TILE_N * 4 : 0;
constexpr int SCALE_B_STRIDE = (SCALE_B_BYTES + 127) / 128 * 128;  // TMA writes to multiples of 128 bytes
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + SCALE_A_BYTES + SCALE_B_BYTES;
constexpr int OFFSET_B = STAGES * A_BYTES, OFFSET_SCALE_A = OFFSET_B + STAGES * B_BYTES;
constexpr int OFFSET_SCALE_B = OFFSET_SCALE_A + STAGES * SCALE_A_BYTES;
constexpr int OFFSET_STAGING = (OFFSET_SCALE_B + STAGES * SCALE_B_STRIDE + 1023) / 1024 * 1024;
constexpr int OFFSET_TILES = OFFSET_STAGING + CONSUMER_WARPS * STAGING_BYTES;
constexpr int TILE_SLOTS = 4;  // consumer warpgroups may be some tiles apart when K is short
constexpr int OFFSET_STAGE_BARRIERS = OFFSET_TILES + TILE_SLOTS * sizeof(Tile);
constexpr int OFFSET_TILE_BARRIERS = OFFSET_STAGE_BARRIERS + 2 * STAGES * 8;
constexpr int OFFSET_LANDED_BARRIERS = OFFSET_TILE_BARRIERS + 2 * TILE_SLOTS * 8;  // one a stage, for tails
constexpr int SHARED_BYTES = OFFSET_LANDED_BARRIERS + STAGES * 8;
constexpr int TAIL_WARPS = GROUPING == REDUCTION_GROUPS ? 3 : 0;
static_assert(SHARED_BYTES == SHARED_BYTES_OF_HOST, "config.py and the kernel disagree about shared memory");

struct Arguments {
    Problem problem;
    const float* scale_a;  // PER_TENSOR
    const float* scale_b;  // PER_TENSOR, PER_BLOCK
    long long scale_b_group, scale_b_row, scale_b_col;  // strides of PER_BLOCK scales along E, N / 128, K / 128
    void* out;
    long long out_group, out_row;  // strides in elements
    int out_aligned;               // TMA may write the output: address and strides are multiples of 16 bytes
};

template <int grouping>
struct ScheduleOf;
template <>
struct ScheduleOf<DENSE> {
    using type = DenseSchedule;
};
template <>
struct ScheduleOf<ROW_GROUPS> {
    using type = RowGroupSchedule;
};
template <>
struct ScheduleOf<REDUCTION_GROUPS> {
    using type = ReductionGroupSchedule<OUTPUT == FP32_ADD>;
};
using Schedule = ScheduleOf<GROUPING>::type;

// Producer -------------------------------------------------------------------------------------------------------

// The last k-block of an expert also reads the next expert's tokens, which tail_loop has to clear.
DEVICE bool is_tail(const Tile& tile, int block) {
    return GROUPING == REDUCTION_GROUPS && tile.k_length - block * BLOCK_K < BLOCK_K;
}

using StageRing = Ring<STAGES>;
using TileRing = Ring<TILE_SLOTS>;

DEVICE uint32 tile_slot(uint32 shared, const TileRing& tiles) { return shared + OFFSET_TILES + tiles.slot * sizeof(Tile); }

DEVICE void send_tile(uint32 shared, TileRing& tiles, const Tile& tile) {
    tiles.wait_empty();
    const int4* words = reinterpret_cast<const int4*>(&tile);
    store_shared4(tile_slot(shared, tiles), words[0]);
    store_shared4(tile_slot(shared, tiles) + 16, words[1]);
    barrier_arrive(tiles.full());
    tiles.advance();
}

// The slot stays taken until release_tile, so a tile may be read again.
DEVICE Tile read_tile(uint32 shared, const TileRing& tiles) {
    const int4 x = load_shared4(tile_slot(shared, tiles)), y = load_shared4(tile_slot(shared, tiles) + 16);
    return {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
}

DEVICE void release_tile(TileRing& tiles) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(tiles.empty());
    tiles.advance();
}

DEVICE void produce(const Problem& p, uint32 shared, const TensorMap& map_a, const TensorMap& map_b,
                    const TensorMap& map_scale_a, const TensorMap& map_scale_b) {
    Schedule schedule(p);
    StageRing stages(shared + OFFSET_STAGE_BARRIERS);
    TileRing tiles(shared + OFFSET_TILE_BARRIERS);
    Tile tile;
    while (schedule.next(tile)) {
        send_tile(shared, tiles, tile);
        const int blocks = ceil_div(tile.k_length, BLOCK_K);
        const int row_b = GROUPING == ROW_GROUPS ? tile.group * p.n + tile.col : tile.col;
#pragma unroll 1
        for (int block = 0; block < blocks; ++block, stages.advance()) {
            const uint32 s = stages.slot;
            const int k = tile.k_begin + block * BLOCK_K;
            stages.wait_empty();
            const uint32 arrived = is_tail(tile, block) ? shared + OFFSET_LANDED_BARRIERS + s * 8 : stages.full();
            barrier_arrive_expect(arrived, STAGE_BYTES);  // rows and columns past the tensors' ends arrive as zeros
            load_tile(shared + s * A_BYTES, map_a, arrived, k, tile.row);
            load_tile(shared + OFFSET_B + s * B_BYTES, map_b, arrived, k, row_b);
            if constexpr (SCALES != PER_TENSOR)
                load_tile(shared + OFFSET_SCALE_A + s * SCALE_A_BYTES, map_scale_a, arrived, tile.row,
                          tile.scale_row + block);
            if constexpr (SCALES == PER_ROW)
                load_tile(shared + OFFSET_SCALE_B + s * SCALE_B_STRIDE, map_scale_b, arrived, tile.col,
                          tile.scale_row + block);
        }
    }
    tile.is_end = 1;
    send_tile(shared, tiles, tile);
}

// Clears bytes [valid, 128) of every row of a swizzled operand tile; `worker` of `workers` threads.
DEVICE void clear_columns(uint32 tile, int rows, int valid, int worker, int workers) {
    for (int row = worker; row < rows; row += workers)
        for (int piece = valid / 16; piece < 8; ++piece) {
            const uint32 address = tile + row * BLOCK_K + ((piece ^ (row & 7)) << 4);
            int4 v = {0, 0, 0, 0};
            if (piece * 16 < valid) {
                v = load_shared4(address);
                int* words = &v.x;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int kept = min(max(valid - piece * 16 - i * 4, 0), 4);  // bytes
                    words[i] = kept == 4 ? words[i] : words[i] & ((1 << (8 * kept)) - 1);
                }
            }
            store_shared4(address, v);
        }
}

// Three warps of the producer's warpgroup: between TMA and the consumers of a tail k-block they zero the tokens of the
// next expert in both operands (in both, because zero times a NaN that lives there would be NaN).
DEVICE void clear_tails(uint32 shared) {
    constexpr int WORKERS = TAIL_WARPS * 32;
    const int worker = threadIdx.x - (CONSUMER_WARPS + 1) * 32;
    StageRing stages(shared + OFFSET_STAGE_BARRIERS);
    TileRing tiles(shared + OFFSET_TILE_BARRIERS);
    uint32 phases = 0;  // bit s: parity of stage s's next `landed`
    while (true) {
        tiles.wait_full();
        const Tile tile = read_tile(shared, tiles);
        release_tile(tiles);
        if (tile.is_end) return;
        const int blocks = ceil_div(tile.k_length, BLOCK_K);
        for (int block = 0; block < blocks; ++block, stages.advance()) {
            if (!is_tail(tile, block)) continue;
            const uint32 s = stages.slot;
            const int valid = tile.k_length - block * BLOCK_K;
            barrier_wait(shared + OFFSET_LANDED_BARRIERS + s * 8, phases >> s & 1);
            phases ^= 1u << s;
            clear_columns(shared + s * A_BYTES, TILE_M, valid, worker, WORKERS);
            clear_columns(shared + OFFSET_B + s * B_BYTES, TILE_N, valid, worker, WORKERS);
            fence_async();
            named_barrier(1, WORKERS);
            if (worker == 0) barrier_arrive(stages.full());
        }
    }
}

// Promotion ------------------------------------------------------------------------------------------------------

// One thread's part of a 64 x WAVE_N wgmma result: element 4i + 2h + c is row (lane / 4) + 8h, column 8i + 2 (lane % 4) + c
// of its warp's 16 rows.
constexpr int PART = WAVE_N / 2;

struct RowScales {
    float s[2];  // of the thread's two rows
};

// Scales of B for one wave of one k-block.
//   PER_BLOCK: one number, or two when the wave straddles a multiple of 128 in N: columns below `edge` use the first.
//   PER_ROW: one for each of the thread's columns.
constexpr bool STRADDLES = SCALES == PER_BLOCK && 128 % TILE_N != 0 && WAVE_N != 128;

DEVICE void promote_blocks(float (&acc)[PART], const float (&part)[PART], RowScales a, float b0, float b1, int edge) {
    const float low0 = a.s[0] * b0, low1 = a.s[1] * b0;
    const float high0 = STRADDLES ? a.s[0] * b1 : 0, high1 = STRADDLES ? a.s[1] * b1 : 0;
#pragma unroll
    for (int i = 0; i < WAVE_N / 8; ++i) {
        const bool low = !STRADDLES || i * 8 < edge;
        const float s0 = low ? low0 : high0, s1 = low ? low1 : high1;
        acc[4 * i] += s0 * part[4 * i];
        acc[4 * i + 1] += s0 * part[4 * i + 1];
        acc[4 * i + 2] += s1 * part[4 * i + 2];
        acc[4 * i + 3] += s1 * part[4 * i + 3];
    }
}

DEVICE void promote_rows(float (&acc)[PART], const float (&part)[PART], RowScales a, const float2 (&b)[WAVE_N / 8]) {
#pragma unroll
    for (int i = 0; i < WAVE_N / 8; ++i) {
        acc[4 * i] += a.s[0] * b[i].x * part[4 * i];
        acc[4 * i + 1] += a.s[0] * b[i].y * part[4 * i + 1];
        acc[4 * i + 2] += a.s[1] * b[i].x * part[4 * i + 2];
        acc[4 * i + 3] += a.s[1] * b[i].y * part[4 * i + 3];
    }
}

// Epilogue -------------------------------------------------------------------------------------------------------

// A warp writes its 16 x WAVE_N result in chunks of 16 x CHUNK through its own staging memory, without waiting for any
// other warp. Chunks of 128-byte rows are swizzled like TMA does it, others are dense.
constexpr int OUT_BYTES = OUTPUT == BF16 ? 2 : 4;
constexpr bool OUT_SWIZZLED = WAVE_N * OUT_BYTES % 128 == 0;
constexpr int CHUNK = OUT_SWIZZLED ? 128 / OUT_BYTES : OUTPUT == BF16 ? WAVE_N : WAVE_N % 16 == 0 ? 16 : 8;
constexpr int CHUNK_BYTES = 16 * CHUNK * OUT_BYTES, CHUNKS = WAVE_N / CHUNK;
constexpr int BUFFERS = 2 * CHUNK_BYTES <= STAGING_BYTES ? 2 : 1;
static_assert(BUFFERS * CHUNK_BYTES <= STAGING_BYTES);
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
            store_shared2(staged(buffer, row, i * 32 + byte), v[0], v[1]);
            store_shared2(staged(buffer, row + 8, i * 32 + byte), v[2], v[3]);
        }
    }
}

// Copies a staged chunk with ordinary stores: for rows that end inside the 16 of a warp, and outputs TMA can't address.
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

// Where wave w of a warpgroup lies in the tile.
DEVICE constexpr int wave_row(int w) { return WAVES_M == 1 ? 0 : w * WARPGROUPS * 64; }
DEVICE constexpr int wave_col(int w) { return WAVES_N == 1 ? 0 : w * WAVE_N; }

// Writes the chunks of all waves from number `index` on; `row0` is the warp's first row of wave 0. A template recursion:
// were this a loop that the compiler chose not to unroll, `acc` would be indexed at run time and move to local memory.
// `buffer_index` runs on over all chunks a warp has written, so that chunks alternate between its buffers.
template <int index>
DEVICE void write_chunks(const Arguments& args, const TensorMap& map_out, uint32 staging, const Tile& tile,
                         const float (&acc)[WAVES][PART], int row0, int lane, uint32& buffer_index) {
    if constexpr (index < WAVES * CHUNKS) {
        constexpr int wave = index / CHUNKS, chunk = index % CHUNKS;
        const int row = row0 + wave_row(wave), col = tile.col + wave_col(wave) + chunk * CHUNK;
        if (row < tile.row_end && col < args.problem.n) {
            const uint32 buffer = staging + (BUFFERS == 2 ? (buffer_index++ & 1) * CHUNK_BYTES : 0);
            wait_stores_read<BUFFERS - 1>();
            __syncwarp();
            stage_chunk(buffer, acc[wave], chunk, lane);
            fence_async();
            __syncwarp();
            // TMA clips at the tensor's last row, not at a group's.
            if (!args.out_aligned || (tile.row_end - row < 16 && tile.row_end != args.problem.m)) {
                copy_chunk(args, buffer, tile, row, col, lane);
            } else if (lane == 0) {
                if constexpr (OUTPUT == FP32_ADD) add_tile(map_out, buffer, col, row, tile.group);
                else store_tile(map_out, buffer, col, row, GROUPING == REDUCTION_GROUPS ? tile.group : 0);
                commit_stores();
            }
        }
        write_chunks<index + 1>(args, map_out, staging, tile, acc, row0, lane, buffer_index);
    }
}

// Consumer -------------------------------------------------------------------------------------------------------

DEVICE void consume(const Arguments& args, uint32 shared, const TensorMap& map_out) {
    const Problem& p = args.problem;
    const int lane = threadIdx.x % 32;
    const uint32 warp = uniform(threadIdx.x / 32), warpgroup = warp / 4;
    const int warp_row = warp % 4 * 16;
    const uint32 staging = shared + OFFSET_STAGING + warp * STAGING_BYTES;

    const uint64 a_descriptor = operand_descriptor(uniform(shared + warpgroup * 64 * BLOCK_K));
    const uint64 b_descriptor = operand_descriptor(uniform(shared + OFFSET_B));
    // ldmatrix, k = 0: lane l reads 16 bytes of row l % 16, K bytes 0-15 (lanes 0-15) or 16-31; swizzled.
    const int a_row = warpgroup * 64 + warp_row + lane % 16;
    const uint32 a_address = shared + a_row * BLOCK_K + ((lane / 16 ^ (a_row & 7)) << 4);
    const uint32 scale_a_address = shared + OFFSET_SCALE_A + (warpgroup * 64 + warp_row + lane / 4) * 4;
    const uint32 scale_b_address = shared + OFFSET_SCALE_B + lane % 4 * 8;

    StageRing stages(shared + OFFSET_STAGE_BARRIERS);
    TileRing tiles(shared + OFFSET_TILE_BARRIERS);
    uint32 buffer_index = 0;
    while (true) {
        tiles.wait_full();
        const Tile tile = read_tile(shared, tiles);
        if (tile.is_end) break;
        const int blocks = ceil_div(tile.k_length, BLOCK_K);
        float acc[WAVES][PART];
#pragma unroll
        for (int w = 0; w < WAVES; ++w)
#pragma unroll
            for (int i = 0; i < PART; ++i) acc[w][i] = 0;

        // PER_BLOCK: this k-block's scale of B for each wave, loaded one k-block ahead; a second one where it straddles.
        const float* b_pointer[WAVES_N][2];
        float b_next[WAVES_N][2];
        int edge[WAVES_N];
        if constexpr (SCALES == PER_BLOCK) {
#pragma unroll
            for (int w = 0; w < WAVES_N; ++w) {
                const int first = (tile.col + wave_col(w)) / 128, last = ceil_div(p.n, 128) - 1;
                edge[w] = (first + 1) * 128 - tile.col - wave_col(w);
                const long long group = GROUPING == ROW_GROUPS ? min(tile.group, p.groups - 1) : 0;
                const float* base = args.scale_b + group * args.scale_b_group + tile.scale_row * args.scale_b_col;
                b_pointer[w][0] = base + min(first, last) * args.scale_b_row;
                b_pointer[w][1] = base + min(first + 1, last) * args.scale_b_row;
#pragma unroll
                for (int j = 0; j <= STRADDLES; ++j) b_next[w][j] = blocks > 0 ? __ldg(b_pointer[w][j]) : 0;
            }
        }

#pragma unroll UNROLL
        for (int block = 0; block < blocks; ++block) {
            const uint32 s = stages.slot;
            float b_now[WAVES_N][2];
            if constexpr (SCALES == PER_BLOCK) {
                const long long ahead = min(block + 1, blocks - 1) * args.scale_b_col;
#pragma unroll
                for (int w = 0; w < WAVES_N; ++w)
#pragma unroll
                    for (int j = 0; j <= STRADDLES; ++j) {
                        b_now[w][j] = b_next[w][j];
                        b_next[w][j] = __ldg(b_pointer[w][j] + ahead);
                    }
            }
            stages.wait_full();

            uint32 a[4][4];
            if constexpr (A_IN_REGISTERS) {
#pragma unroll
                for (int k = 0; k < 4; ++k) load_matrices(a[k], (a_address + s * A_BYTES) ^ (k * 32));
            }
            float2 b_columns[WAVE_N / 8];
            RowScales a_scales = {1, 1};
            float part[PART];
#pragma unroll
            for (int w = 0; w < WAVES; ++w) {
                if (SCALES != PER_TENSOR && (w == 0 || WAVES_M > 1)) {
                    const uint32 address = scale_a_address + s * SCALE_A_BYTES + wave_row(w) * 4;
                    a_scales = {load_shared(address), load_shared(address + 8 * 4)};
                }
                float(&result)[PART] = PROMOTE ? part : acc[w];
                pin(result);
                wgmma_begin();
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const bool accumulate = k > 0 || (!PROMOTE && block > 0);
                    const uint64 b_tile = b_descriptor + (s * B_BYTES + wave_col(w) * BLOCK_K + k * 32) / 16;
                    if constexpr (A_IN_REGISTERS) {
                        wgmma(result, a[k], b_tile, accumulate);
                    } else {
                        const int a_offset = wave_row(w) * BLOCK_K + k * 32;
                        wgmma(result, a_descriptor + (s * A_BYTES + a_offset) / 16, b_tile, accumulate);
                    }
                }
                wgmma_commit();
                if (SCALES == PER_ROW && (w == 0 || WAVES_N > 1)) {
#pragma unroll
                    for (int i = 0; i < WAVE_N / 8; ++i)
                        b_columns[i] = load_shared2(scale_b_address + s * SCALE_B_STRIDE + (wave_col(w) + i * 8) * 4);
                }
                pin(result);
                wgmma_wait();
                if (w == WAVES - 1) {  // nothing of this stage is read below
                    __syncwarp();
                    if (lane == 0) barrier_arrive(stages.empty());
                }
                if constexpr (SCALES == PER_BLOCK) {
                    const int wn = WAVES_N == 1 ? 0 : w;
                    promote_blocks(acc[w], part, a_scales, b_now[wn][0], b_now[wn][STRADDLES], edge[wn]);
                } else if constexpr (SCALES == PER_ROW) {
                    promote_rows(acc[w], part, a_scales, b_columns);
                } else if constexpr (PROMOTE) {
#pragma unroll
                    for (int i = 0; i < PART; ++i) acc[w][i] += part[i];
                }
            }
            stages.advance();
        }

        if constexpr (SCALES == PER_TENSOR) {
            const float scale = __ldg(args.scale_a) * __ldg(args.scale_b);
#pragma unroll
            for (int w = 0; w < WAVES; ++w)
#pragma unroll
                for (int i = 0; i < PART; ++i) acc[w][i] *= scale;
        }
        const Tile done = read_tile(shared, tiles);  // again, rather than to hold it in registers all along
        release_tile(tiles);
        write_chunks<0>(args, map_out, staging, done, acc, done.row + warpgroup * 64 + warp_row, lane, buffer_index);
    }
    wait_stores();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fp8c_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
              const __grid_constant__ TensorMap map_scale_a, const __grid_constant__ TensorMap map_scale_b,
              const __grid_constant__ TensorMap map_out, const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) uint8 memory[];
    const uint32 shared = uniform(shared_address(memory));
    const uint32 warp = uniform(threadIdx.x / 32);

    if (threadIdx.x == 0) {
        StageRing::init(shared + OFFSET_STAGE_BARRIERS, CONSUMER_WARPS);
        TileRing::init(shared + OFFSET_TILE_BARRIERS, CONSUMER_WARPS + TAIL_WARPS);
        for (int s = 0; s < STAGES; ++s) barrier_init(shared + OFFSET_LANDED_BARRIERS + s * 8, 1);
        barrier_init_done();
        prefetch_map(map_a);
        prefetch_map(map_b);
        prefetch_map(map_out);
    }
    __syncthreads();
    launch_dependents();
    wait_for_previous_grid();

    if (warp >= CONSUMER_WARPS) {
        lower_register_limit<PRODUCER_REGISTERS>();
        if (warp == CONSUMER_WARPS) {
            if (threadIdx.x % 32 == 0) produce(args.problem, shared, map_a, map_b, map_scale_a, map_scale_b);
        } else if constexpr (TAIL_WARPS > 0) {
            clear_tails(shared);
        }
    } else {
        raise_register_limit<CONSUMER_REGISTERS>();
        consume(args, shared, map_out);
    }
}

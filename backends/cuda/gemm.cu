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
//   --empty[stage]--> producer.
// Consumer warpgroups share nothing but the stages. With LEAD the second one begins each tile some k-blocks after the first, so that
// one multiplies while the other writes its output; with HELD_STAGES the output leaves through the last stage, by a warp of its own.
//
// Shared-memory bandwidth (128 B a clock) is what limits such a kernel, so each operand is read as seldom as possible:
//   waves along N (WAVES_N > 1): A goes through registers once (ldmatrix) and serves all of them;
//   waves along M (WAVES_M = 2): one column of B's 1x128 scales is read once and serves both waves.
// docs/hopper_gemm.md has the arithmetic and what was measured.
//
// The policies are constants of config.cuh, which the host generates for each kernel (config.py) together with
// wgmma.cuh, the one wgmma of shape 64 x WAVE_N x 32 that it uses.

#include "config.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

__device__ constexpr int greatest_common_divisor(int a, int b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

constexpr int BLOCK_K = 128;
constexpr int WAVES = WAVES_M * WAVES_N;
constexpr bool A_IN_REGISTERS = WAVES_M == 1 && WAVE_N <= 128 && FLIGHT == 1;
constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
constexpr int THREADS = 128 * (WARPGROUPS + 1);
// setmaxnreg hands the producer's registers to the consumers: 65536 registers in all, a multiple of 8 for each thread.
// Warps of the producer's warpgroup: one loads by TMA, one walks the schedule, one fetches 128x128 scales, one stores the output
// of large tiles or fetches A's scales of few rows. Several jobs for several warps, because each has few registers.
constexpr int SCALE_WARPS = SCALES == PER_BLOCK ? 1 : 0;
constexpr int LOAD_WARP = CONSUMER_WARPS, SCHEDULE_WARP = LOAD_WARP + 1, FEW_ROWS_WARP = LOAD_WARP + 2, SCALE_WARP = LOAD_WARP + 3;
constexpr int STORE_WARP = FEW_ROWS_WARP;  // no kernel has both
constexpr int STORE_WARPS = HELD_STAGES > 0 ? 1 : 0;
// Kernels for few rows have a tile or two a block: waiting for the schedule warp would delay their first loads.
constexpr bool WALKS_SCHEDULE = FLIGHT > 1 && GROUPING == DENSE;
constexpr int TILE_READERS = CONSUMER_WARPS + STORE_WARPS + (WALKS_SCHEDULE ? 0 : 1 + SCALE_WARPS);
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 && SCALES == PER_ROW && WAVES > 1 ? 24 : 40;
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 && SCALES == PER_ROW && WAVES > 1 ? 240 : 232;

static_assert(WAVES_M == 1 || WAVES_N == 1, "waves run along one axis");
static_assert(!SHARES_B || (CLUSTER == 2 && TILE_N % 16 == 0), "each block fetches half of B, in groups of 8 rows");
static_assert(!SHARES_B || WAVES_M == 1, "halves of a cluster's tiles would need the same columns");
static_assert(LEAD == 0 || (WARPGROUPS == 2 && FLIGHT == 1 && LEAD < STAGES));
static_assert(FLIGHT == 1 || (WAVES == 1 && SCALES == PER_BLOCK && STAGES % FLIGHT == 0), "only a lone wave needs k-blocks in flight");
static_assert(WAVE_N % 8 == 0 && (WAVES + FLIGHT) * WAVE_N / 2 <= 192, "accumulators and what is in flight must fit into registers");

// PER_BLOCK: columns of a segment, the largest common part of wave and 128x128 block, have the same scale of B. Each stage
// holds one number a segment, so that a wave may straddle blocks in any way.
constexpr int SEGMENT = greatest_common_divisor(WAVE_N, 128), SEGMENTS = WAVE_N / SEGMENT;
constexpr int SEGMENT_SLOTS = SEGMENTS <= 2 ? SEGMENTS : (SEGMENTS + 3) / 4 * 4;  // read as vectors
constexpr int BLOCKS_OF_WAVE = (WAVE_N + 255 - SEGMENT) / 128;  // that a wave can touch

// Of a tile with no more than half of its rows only the first wave of a warpgroup is needed. With K groups the code for this
// would cost registers that the main loop needs.
constexpr bool HALVES = WAVES_M == 2 && GROUPING != REDUCTION_GROUPS;

// Shared memory: STAGES x A, x B, staging of the output, STAGES x scales of A, x scales of B, ring of tiles, barriers.
constexpr int A_BYTES = TILE_M * BLOCK_K, B_BYTES = TILE_N * BLOCK_K;
// The copy engine wants coordinates along rows of memory in multiples of 16 bytes. Rows of a group start anywhere, so
// their scales are fetched from up to three rows earlier, in boxes of at most 256.
constexpr int SCALE_A_BOXES = GROUPING == ROW_GROUPS && TILE_M == 256 ? 2 : 1;
constexpr int SCALE_A_BOX = GROUPING != ROW_GROUPS ? TILE_M : TILE_M == 256 ? 160 : TILE_M + 4;
constexpr int SCALE_A_BYTES = SCALES == PER_TENSOR ? 0 : SCALE_A_BOXES * SCALE_A_BOX * 4;
static_assert(SCALE_A_BOX == SCALE_A_BOX_OF_HOST, "the host's map of A's scales has other boxes");
constexpr int SCALE_A_STRIDE = (SCALE_A_BYTES + 127) / 128 * 128;
constexpr int SCALE_B_BYTES = SCALES == PER_ROW ? TILE_N * 4 : 0;
// TMA writes to multiples of 128 bytes.
constexpr int SCALE_B_STRIDE =
    SCALES == PER_BLOCK ? (WAVES_N * SEGMENT_SLOTS * 4 + 15) / 16 * 16 : (SCALE_B_BYTES + 127) / 128 * 128;
constexpr int OFFSET_B = STAGES * A_BYTES, OFFSET_STAGING = OFFSET_B + STAGES * B_BYTES;
constexpr int OFFSET_SCALE_A = OFFSET_STAGING + CONSUMER_WARPS * STAGING_BYTES;
constexpr int OFFSET_SCALE_B = OFFSET_SCALE_A + STAGES * SCALE_A_STRIDE;
constexpr int OFFSET_TILES = OFFSET_SCALE_B + STAGES * SCALE_B_STRIDE;
constexpr int TILE_SLOTS = 4;  // consumer warpgroups may be some tiles apart when K is short
constexpr int OFFSET_STAGE_BARRIERS = OFFSET_TILES + TILE_SLOTS * sizeof(Tile);
constexpr int OFFSET_TILE_BARRIERS = OFFSET_STAGE_BARRIERS + 2 * STAGES * 8;
constexpr int OFFSET_OUTPUT_BARRIERS = OFFSET_TILE_BARRIERS + 2 * TILE_SLOTS * 8;
constexpr int OFFSET_LEAD_BARRIER = OFFSET_OUTPUT_BARRIERS + OUTPUT_BARRIERS * 8;
constexpr int SHARED_BYTES = OFFSET_LEAD_BARRIER + (LEAD > 0 ? 8 : 0);
static_assert(SHARED_BYTES == SHARED_BYTES_OF_HOST, "config.py and the kernel disagree about shared memory");

struct Arguments {
    Problem problem;
    const float* scale_a;
    long long scale_a_col;  // stride along K / 128
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

// K groups begin at multiples of 128 of K, and what lies between a group's end and the next multiple is zero (`fp8c.ops`):
// nothing is masked.
DEVICE int blocks_of(const Tile& tile) { return ceil_div(tile.k_length, BLOCK_K); }

// Every tile takes whole rounds of stages, at least one, the last one with idle stages if need be: the consumers' loop over a
// round is unrolled. Where a round is the whole ring, the stage is known at compile time and the addresses in it are constants.
constexpr int ROUND = FLIGHT == 1 ? STAGES : FLIGHT;
DEVICE int whole_rounds(int blocks) { return ceil_div(max(blocks, 1), ROUND) * ROUND; }

// With few rows all thread blocks would ask for the same few sectors of A's scales, k-block by k-block; then a warp
// reads those of many k-blocks at a time instead of TMA.
constexpr int FEW_ROWS = FLIGHT > 1 && GROUPING == DENSE ? 16 : 0;
DEVICE bool has_few_rows(const Problem& p) { return FEW_ROWS > 0 && p.m <= FEW_ROWS; }

// Rows past the tensor's end cost requests to memory, all of them to one place; so the host's box of A has no more rows than
// the tensor. What lies in the tile's other rows of shared memory goes into rows of the result that nobody writes.
constexpr bool ONE_BOX_OF_ROWS = GROUPING == DENSE && CLUSTER == 1 && WAVES_M == 1;

using StageRing = Ring<STAGES>;
using TileRing = Ring<TILE_SLOTS>;

DEVICE uint32 tile_slot(uint32 shared, const TileRing& tiles) { return shared + OFFSET_TILES + tiles.slot() * sizeof(Tile); }

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
    return {x.x, x.y, x.z, x.w, y.x, y.y, y.z};
}

DEVICE void release_tile(TileRing& tiles) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(tiles.empty());
    tiles.advance();
}

// The tiles of a warp that loads, or of its one thread that does.
template <bool one_thread>
class TilesToLoad {
    Schedule schedule;  // WALKS_SCHEDULE
    TileRing ring;      // else
    uint32 shared;

  public:
    DEVICE TilesToLoad(const Problem& p, uint32 shared) : schedule(p), ring(shared + OFFSET_TILE_BARRIERS), shared(shared) {}
    DEVICE bool next(Tile& tile) {
        if constexpr (WALKS_SCHEDULE) return schedule.next(tile);
        ring.wait_full();
        tile = read_tile(shared, ring);
        if constexpr (one_thread) {
            barrier_arrive(ring.empty());
            ring.advance();
        } else {
            release_tile(ring);
        }
        return !tile.is_end;
    }
};

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
    if (STAGGER > 0) wait_clocks(STAGGER * first_index() / index_step());
    while (tiles.next(tile)) {
        const int k_end = tile.k_begin + tile.k_length, k_stop = tile.k_begin + whole_rounds(blocks_of(tile)) * BLOCK_K;
        const int row_b = GROUPING == ROW_GROUPS ? tile.group * p.n + tile.col : tile.col;
        // With halves, A comes in two boxes, of which a tile without lower rows takes one.
        const bool is_half = HALVES && tile.row_end - tile.row <= TILE_M / 2;
        const int a_bytes = is_half ? A_BYTES / 2 : ONE_BOX_OF_ROWS ? min(p.m, TILE_M) * BLOCK_K : A_BYTES;
        const bool scales_a = SCALES != PER_TENSOR && !has_few_rows(p);
        const int bytes = a_bytes + B_BYTES + SCALE_B_BYTES + (scales_a ? SCALE_A_BYTES : 0);
#pragma unroll 1
        for (int round = tile.k_begin; round < k_stop; round += ROUND * BLOCK_K, stages.advance(ROUND)) {
            const uint32 base = FLIGHT == 1 ? 0 : stages.slot(), phase = stages.phase();
#pragma unroll
            for (int i = 0; i < ROUND; ++i) {
                const int k = round + i * BLOCK_K;
                const uint32 s = base + i, full = shared + OFFSET_STAGE_BARRIERS + s * 8;
                barrier_wait(full + STAGES * 8, phase ^ 1);
                if (k >= k_end) {  // an idle stage
                    barrier_arrive(full);
                    continue;
                }
                // Rows and columns past the tensors' ends arrive as zeros. K starts at a whole group of scales: row k / 128.
                barrier_arrive_expect(full, bytes);
                if constexpr (CLUSTER == 1 || SHARES_B) {
                    load_tile<POLICY_A>(shared + s * A_BYTES, map_a, full, k, tile.row);
                    if (WAVES_M == 2 && !is_half)
                        load_tile<POLICY_A>(shared + s * A_BYTES + A_BYTES / 2, map_a, full, k, tile.row + TILE_M / 2);
                } else {  // each block of the cluster fetches one half of A for both
                    const int half = cluster_rank() * (TILE_M / 2);
                    if (!is_half || half == 0)
                        load_tile_to_both<POLICY_A>(shared + s * A_BYTES + half * BLOCK_K, map_a, full, k, tile.row + half);
                }
                if constexpr (SHARES_B) {
                    const int half = cluster_rank() * (TILE_N / 2);
                    load_tile_to_both<POLICY_B>(shared + OFFSET_B + s * B_BYTES + half * BLOCK_K, map_b, full, k, row_b + half);
                } else {
                    load_tile<POLICY_B>(shared + OFFSET_B + s * B_BYTES, map_b, full, k, row_b);
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
// when its stage is free; the stages of a round at once.
DEVICE void fetch_block_scales(const Arguments& args, uint32 shared) {
    constexpr int AT_ONCE = 32 / ROUND * ROUND;
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
            for (int i = 0; i < min(AT_ONCE, padded - first); i += ROUND, stages.advance(ROUND)) {
                if (lane >= i && lane < i + ROUND) {
                    const uint32 s = stages.slot() + lane - i, full = shared + OFFSET_STAGE_BARRIERS + s * 8;
                    barrier_wait(full + STAGES * 8, stages.phase() ^ 1);
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
                        barrier_wait(full + STAGES * 8, stages.phase() ^ 1);
                        store_shared(shared + OFFSET_SCALE_A + s * SCALE_A_STRIDE + row * 4, values[j]);
                        barrier_arrive(full);
                    }
                    __syncwarp();
                }
        }
    }
}

// Promotion ------------------------------------------------------------------------------------------------------

// One thread's part of a 64 x WAVE_N wgmma result: element 4i + 2h + c is row (lane / 4) + 8h, column 8i + 2 (lane % 4) + c
// of its warp's 16 rows.
constexpr int PART = WAVE_N / 2;

DEVICE void promote_blocks(float (&acc)[PART], const float (&part)[PART], const float (&a)[2],
                           const float (&b)[SEGMENT_SLOTS]) {
#pragma unroll
    for (int segment = 0; segment < SEGMENTS; ++segment) {
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

// Epilogue -------------------------------------------------------------------------------------------------------

// A warp writes its 16 x WAVE_N result in chunks of 16 x CHUNK through its own staging memory, without waiting for any
// other warp. Chunks whose rows have 128 or 64 bytes are swizzled like TMA does it, others are dense.
constexpr int OUT_BYTES = OUTPUT == BF16 ? 2 : 4;
constexpr int ROW_BYTES = CHUNK * OUT_BYTES, CHUNK_BYTES = 16 * ROW_BYTES, CHUNKS = WAVE_N / CHUNK;
static_assert(WAVE_N % CHUNK == 0 && (OUT_SWIZZLE == 0 || OUT_SWIZZLE == ROW_BYTES));
constexpr int FITTING = STAGING_BYTES / CHUNK_BYTES, BUFFERS = FITTING < WAVES * CHUNKS ? FITTING : WAVES * CHUNKS;
static_assert(HELD_STAGES > 0 || BUFFERS > 0);

DEVICE uint32 staged(uint32 buffer, int row, int byte) {
    const int swizzled = OUT_SWIZZLE > 0 ? byte ^ (row * ROW_BYTES / 128 % (ROW_BYTES / 16) * 16) : byte;
    return buffer + row * ROW_BYTES + swizzled;
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

// Where wave w of a warpgroup lies in the tile.
DEVICE constexpr int wave_row(int w) { return WAVES_M == 1 ? 0 : w * WARPGROUPS * 64; }
DEVICE constexpr int wave_col(int w) { return WAVES_N == 1 ? 0 : w * WAVE_N; }

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
            barrier_wait(staged_barrier(shared, warpgroup), phase);
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

// Consumer -------------------------------------------------------------------------------------------------------

// What one consumer warp needs to know about where its operands lie in stage 0, and its accumulators.
struct Consumer {
    uint64 a_descriptor, b_descriptor;
    uint32 a_address[4];  // of its lane's row for ldmatrix, one for each step of 32 along K
    uint32 scale_a, scale_b;
    uint32 barriers;  // of the stages
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
        if (c.lane < CLUSTER) barrier_arrive_remote(empty, c.lane);
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

// One k-block out of stage `s`, the first `waves` waves of it, and the fragment of A of the next one, if there is one, out
// of stage `next`. In the last round of a tile, the stages that take its output are not freed.
template <bool last_of_tile_possible, int waves>
DEVICE void multiply_block(Consumer& c, uint32 s, uint32 next, uint32 next_phase, bool has_next, bool is_last_round, bool accumulate) {
    float part[PART];
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

        float(&result)[PART] = PROMOTE ? part : c.acc[w];
        pin(result);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint64 b_tile = c.b_descriptor + (s * B_BYTES + wave_col(wn) * BLOCK_K + k * 32) / 16;
            if constexpr (A_IN_REGISTERS)
                wgmma(result, c.a[k], b_tile, k > 0 || accumulate);
            else
                wgmma(result, c.a_descriptor + (s * A_BYTES + wave_row(wm) * BLOCK_K + k * 32) / 16, b_tile, k > 0 || accumulate);
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

// The k-blocks of one tile; `phase` is of the ring of stages, which the tile begins and ends at stage 0.
template <int waves>
DEVICE void multiply_tile(Consumer& c, int blocks, uint32& phase) {
    if (blocks > 0) {
        barrier_wait(c.barriers, phase);
        if constexpr (A_IN_REGISTERS) load_a(c, 0);
    }
    int block = 0;
    for (; block + STAGES <= blocks; block += STAGES, phase ^= 1) {
        const bool is_last = block + STAGES == blocks;
#pragma unroll UNROLL
        for (int s = 0; s + 1 < STAGES; ++s) {
            multiply_block<false, waves>(c, s, s + 1, phase, true, is_last, !PROMOTE && block + s > 0);
            if (LEAD > 0 && s == LEAD - 1 && block == 0) let_follow(c);
        }
        multiply_block<true, waves>(c, STAGES - 1, 0, phase ^ 1, block + STAGES < blocks, is_last, !PROMOTE);
    }
    if (block < max(blocks, 1)) {
#pragma unroll 1
        for (int s = 0; block < blocks; ++s, ++block)
            multiply_block<true, waves>(c, s, s + 1, phase, block + 1 < blocks, true, !PROMOTE && block > 0);
#pragma unroll 1
        for (uint32 s = blocks % STAGES; s < STAGES; ++s) {  // idle stages
            barrier_wait(c.barriers + s * 8, phase);
            __syncwarp();
            if (s < STAGES - HELD_STAGES) release_stage(c, s);
        }
        if (LEAD > 0 && blocks < STAGES) let_follow(c);  // not before: the other one has begun the tile before this one
        phase ^= 1;
    }
}

// The same for small tiles, whose one wave is too short to hide the time from a stage's arrival to its promotion: the
// products of FLIGHT k-blocks are under way, each with registers of its own, and promoted in their order.
struct InFlight {
    float part[PART];
    float a_scale[2], b_scale[SEGMENT_SLOTS];
    uint32 stage;
};

DEVICE void start_block(Consumer& c, InFlight& x, uint32 s, uint32 phase) {
    barrier_wait(c.barriers + s * 8, phase);
    x.stage = s;
    const uint32 address = c.scale_a + s * SCALE_A_STRIDE;
    x.a_scale[0] = load_shared(address), x.a_scale[1] = load_shared(address + 8 * 4);
    load_block_scales(x.b_scale, c.scale_b + s * SCALE_B_STRIDE);
    pin(x.part);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k)
        wgmma(x.part, c.a_descriptor + (s * A_BYTES + k * 32) / 16, c.b_descriptor + (s * B_BYTES + k * 32) / 16, k > 0);
    wgmma_commit();
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

DEVICE void consume(const Arguments& args, uint32 shared, const TensorMap& map_out) {
    const uint32 warp = uniform(threadIdx.x / 32), warpgroup = warp / 4;
    const int lane = threadIdx.x % 32, row0 = warpgroup * 64 + warp % 4 * 16;  // of this warp in the tile

    Consumer c;
    c.lane = lane;
    c.leads = warpgroup == 0;
    c.barriers = shared + OFFSET_STAGE_BARRIERS;
    c.a_descriptor = operand_descriptor(uniform(shared + warpgroup * 64 * BLOCK_K));
    c.b_descriptor = operand_descriptor(uniform(shared + OFFSET_B));
    const int a_row = row0 + lane % 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) c.a_address[k] = shared + a_row * BLOCK_K + ((k * 2 + lane / 16 ^ (a_row & 7)) << 4);
    const uint32 scale_a = shared + OFFSET_SCALE_A + (row0 + lane / 4) * 4;
    c.scale_a = scale_a;
    c.scale_b = shared + OFFSET_SCALE_B + (SCALES == PER_ROW ? lane % 4 * 8 : 0);

    TileRing tiles(shared + OFFSET_TILE_BARRIERS);
    StageRing stages(c.barriers);  // FLIGHT > 1
    uint32 phase = 0;              // of the ring of stages, else
    uint32 tile_phase = 0;  // of barriers that everybody passes once a tile
    while (true) {
        tiles.wait_full();
        const Tile tile = read_tile(shared, tiles);
        if (tile.is_end) break;
        const int blocks = blocks_of(tile);
        if constexpr (GROUPING == ROW_GROUPS) c.scale_a = scale_a + (tile.row & 3) * 4;
#pragma unroll
        for (int w = 0; w < WAVES; ++w)
#pragma unroll
            for (int i = 0; i < PART; ++i) c.acc[w][i] = 0;
        if (LEAD > 0 && !c.leads) barrier_wait(shared + OFFSET_LEAD_BARRIER, tile_phase);

        if constexpr (FLIGHT > 1) multiply_in_flight(c, blocks, stages);
        else if (HALVES && tile.row_end - tile.row <= TILE_M / 2) multiply_tile<1>(c, blocks, phase);
        else multiply_tile<WAVES>(c, blocks, phase);

        if constexpr (SCALES == PER_TENSOR) {
            const float scale = __ldg(args.scale_a) * __ldg(args.scale_b);
#pragma unroll
            for (int w = 0; w < WAVES; ++w)
#pragma unroll
                for (int i = 0; i < PART; ++i) c.acc[w][i] *= scale;
        }
        {  // Nothing that only the epilogue needs is held in registers during the main loop.
            const Tile done = read_tile(shared, tiles);
            release_tile(tiles);
            const uint32 thread = thread_index_again(), warp_again = uniform(thread / 32);
            if constexpr (HELD_STAGES > 0) {
                stage_output(args, shared, done, c.acc, warp_again, thread % 32, tile_phase);
            } else {
                write_chunks<0>(args, map_out, shared + OFFSET_STAGING + warp_again * STAGING_BYTES, done, c.acc,
                                done.row + warp_again * 16, thread % 32);
            }
            __syncwarp();  // wgmma wants whole warps
            tile_phase ^= 1;
        }
    }
    wait_stores_read<0>();  // what was written is visible when the grid ends; shared memory must be there until it is read
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    fp8c_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
              const __grid_constant__ TensorMap map_scale_a, const __grid_constant__ TensorMap map_scale_b,
              const __grid_constant__ TensorMap map_out, const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) uint8 memory[];
    const uint32 shared = uniform(shared_address(memory));
    const uint32 warp = uniform(threadIdx.x / 32);

    if (threadIdx.x == 0) {
        const int few_rows = has_few_rows(args.problem);
        const int writers = 1 + SCALE_WARPS + (few_rows ? 1 << few_rows_shift(args.problem) : 0);
        StageRing::init(shared + OFFSET_STAGE_BARRIERS, writers, CONSUMER_WARPS * CLUSTER);
        TileRing::init(shared + OFFSET_TILE_BARRIERS, 1, TILE_READERS);
        for (int i = 0; i < OUTPUT_BARRIERS; ++i)
            barrier_init(shared + OFFSET_OUTPUT_BARRIERS + i * 8, 4);
        if (LEAD > 0) barrier_init(shared + OFFSET_LEAD_BARRIER, 4);
        barrier_init_done();
        prefetch_map(map_a);
        prefetch_map(map_b);
        prefetch_map(map_out);
    }
    CLUSTER == 1 ? __syncthreads() : cluster_sync();
    launch_dependents();
    wait_for_previous_grid();

    if (warp >= CONSUMER_WARPS) {
        lower_register_limit<PRODUCER_REGISTERS>();
        if (warp == LOAD_WARP) {
            if (elect_one()) load_operands(args.problem, shared, map_a, map_b, map_scale_a, map_scale_b);
        } else if (warp == SCHEDULE_WARP) {
            if (threadIdx.x % 32 == 0) schedule_tiles(args.problem, shared);
        } else if (SCALE_WARPS > 0 && warp == SCALE_WARP) {
            fetch_block_scales(args, shared);
        } else if (STORE_WARPS > 0 && warp == STORE_WARP) {
            if (elect_one()) store_output(args, map_out, shared);
        } else if (warp == FEW_ROWS_WARP && has_few_rows(args.problem)) {
            fetch_few_row_scales(args, shared);
        }
    } else {
        raise_register_limit<CONSUMER_REGISTERS>();
        consume(args, shared, map_out);
    }
    // The other block may still write to this one's shared memory and barriers.
    if constexpr (CLUSTER > 1) {
        __syncwarp();
        cluster_sync();
    }
}

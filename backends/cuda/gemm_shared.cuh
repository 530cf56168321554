// What the warps of a thread block of the GEMM (gemm.cu) agree on: who does what, where things lie in shared memory, how tiles go
// from the warp that walks the schedule to all others.
#pragma once

#include "config.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

__device__ constexpr int greatest_common_divisor(int a, int b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

constexpr int BLOCK_K = 128;
constexpr int WAVES = WAVES_M * WAVES_N;
constexpr bool A_IN_REGISTERS = WAVES_M == 1 && WAVE_N <= 128 && FLIGHT == 1;
constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
constexpr int THREADS = 128 * (WARPGROUPS + 1);
// Warps of the producer's warpgroup: one loads by TMA, one walks the schedule, one fetches 128x128 scales, one stores the output
// of large tiles or fetches A's scales of few rows. Several jobs for several warps, because each has few registers.
constexpr int SCALE_WARPS = SCALES == PER_BLOCK ? 1 : 0;
constexpr int LOAD_WARP = CONSUMER_WARPS, SCHEDULE_WARP = LOAD_WARP + 1, FEW_ROWS_WARP = LOAD_WARP + 2, SCALE_WARP = LOAD_WARP + 3;
constexpr int STORE_WARP = FEW_ROWS_WARP;  // no kernel has both
constexpr int STORE_WARPS = HELD_STAGES > 0 ? 1 : 0;
// Kernels for few rows have a tile or two a block: waiting for the schedule warp would delay their first loads.
constexpr bool WALKS_SCHEDULE = FLIGHT > 1 && GROUPING == DENSE;
constexpr int TILE_READERS = CONSUMER_WARPS + STORE_WARPS + (WALKS_SCHEDULE ? 0 : 1 + SCALE_WARPS);
// setmaxnreg hands the producer's registers to the consumers: 65536 registers in all, a multiple of 8 for each thread.
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 && SCALES == PER_ROW && WAVES > 1 ? 24 : 40;
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 && SCALES == PER_ROW && WAVES > 1 ? 240 : 232;

static_assert(WAVES_M == 1 || WAVES_N == 1, "waves run along one axis");
static_assert(!SHARES_B || (CLUSTER == 2 && TILE_N % 16 == 0), "each block fetches half of B, in groups of 8 rows");
static_assert(!SHARES_B || WAVES_M == 1, "halves of a cluster's tiles would need the same columns");
static_assert(NARROW == 0 || (WAVES == 1 && PROMOTE && FLIGHT == 1 && SCALES == PER_BLOCK && 2 * NARROW <= WAVE_N));
static_assert(!RESIDENT_B || (GROUPING == DENSE && SCALES == PER_BLOCK && CLUSTER == 1 && FLIGHT == 1 && WAVES_M == 1 && NARROW == 0));
static_assert(!EARLY || (SCALES == PER_BLOCK && FLIGHT == 1 && LEAD == 0 && WAVES_N == 1 && !A_IN_REGISTERS));
static_assert(LEAD == 0 || (WARPGROUPS == 2 && FLIGHT == 1 && LEAD < STAGES));
static_assert(FLIGHT == 1 || (WAVES == 1 && SCALES == PER_BLOCK && STAGES % FLIGHT == 0), "only a lone wave needs k-blocks in flight");
static_assert(WAVE_N % 8 == 0 && (WAVES + FLIGHT) * WAVE_N / 2 <= 192, "accumulators and what is in flight must fit into registers");

// One thread's part of a 64 x WAVE_N wgmma result: element 4i + 2h + c is row (lane / 4) + 8h, column 8i + 2 (lane % 4) + c
// of its warp's 16 rows.
constexpr int PART = WAVE_N / 2;

// Where wave w of a warpgroup lies in the tile.
DEVICE constexpr int wave_row(int w) { return WAVES_M == 1 ? 0 : w * WARPGROUPS * 64; }
DEVICE constexpr int wave_col(int w) { return WAVES_N == 1 ? 0 : w * WAVE_N; }

// PER_BLOCK: columns of a segment, the largest common part of wave and 128x128 block, have the same scale of B. Each stage
// holds one number a segment, so that a wave may straddle blocks in any way.
constexpr int SEGMENT = greatest_common_divisor(WAVE_N, 128), SEGMENTS = WAVE_N / SEGMENT;
constexpr int SEGMENT_SLOTS = SEGMENTS <= 2 ? SEGMENTS : (SEGMENTS + 3) / 4 * 4;  // read as vectors
static_assert(NARROW % SEGMENT == 0);
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

template <bool first, class A, class B>
struct Either {
    using type = A;
};
template <class A, class B>
struct Either<false, A, B> {
    using type = B;
};
template <int grouping>
struct ScheduleOf;
template <>
struct ScheduleOf<DENSE> {
    using type = Either<RESIDENT_B, DenseColumnSchedule, DenseSchedule>::type;
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

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
// With EARLY a warpgroup begins the first wave of a tile before it writes the tile before.
//
// Shared-memory bandwidth (128 B a clock) is what limits such a kernel, so each operand is read as seldom as possible:
//   waves along N (WAVES_N > 1): A goes through registers once (ldmatrix) and serves all of them;
//   waves along M (WAVES_M = 2): one column of B's 1x128 scales is read once and serves both waves.
// docs/hopper_gemm.md has the arithmetic and what was measured.
//
// The policies are constants of config.cuh, which the host generates for each kernel (config.py) together with
// wgmma.cuh, the one wgmma of shape 64 x WAVE_N x 32 that it uses.

#include "gemm_consumer.cuh"
#include "gemm_producer.cuh"
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

// RMSNorm and the quantize behind it from one read; fp8c/ops/norm.py says what is computed.
//
// Legend: R rows, C columns. A block takes a row, a thread CHUNKS runs of 8 columns of it, which stay in registers between the
//   sum of squares and the quantize. 16 lanes share a group of 128 columns; its scale is made by one lane or two. The weight is
//   read from the L1 cache, where the block before has left it. Blocks that take one row after another were slower: the SMs
//   don't get the same share of the memory's bandwidth, and the slowest had as many rows as the others.

#include "config.cuh"
#include "numerics.cuh"

struct Arguments {
    const uint16 *x, *weight;
    uint8* q;
    void* s;
    float* factor;  // [R]: the reciprocal root of the mean square
    int64 x_row, q_row, s_row, s_col;
    int R, C;
    float eps;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES_OF_HOST, "host and kernel disagree on the arguments");

constexpr int WORDS = CHUNKS <= 2 ? 1 : CHUNKS <= 4 ? 2 : CHUNKS <= 8 ? 4 : 8;  // each has the amax of two chunks
static_assert(CHUNKS <= 16, "16 lanes share the scales of 16 chunks at most");

DEVICE float add_squares(float sum, uint32 pair) {
    const float a = first_of(pair), b = second_of(pair);
    return __fmaf_rn(b, b, __fmaf_rn(a, a, sum));
}

DEVICE uint32 scaled(uint32 pair, float factor, uint32 weight) {
    return times(rounded(__fmul_rn(first_of(pair), factor), __fmul_rn(second_of(pair), factor)), weight);
}

// The lane of 16, but for bits that don't matter, that has made the scale of a chunk; HALF is the bit that picks it of a word.
constexpr int HALF = 8 / WORDS;
DEVICE constexpr int maker_of(int chunk) {
    int lane = chunk % 2 * HALF;
    for (int words = WORDS, word = chunk / 2, bit = 8; words > 1; words /= 2, bit /= 2) {
        if (word >= words / 2) {
            lane += bit;
            word -= words / 2;
        }
    }
    return lane;
}

DEVICE uint4 load(const uint16* p, int run) { return __ldg(reinterpret_cast<const uint4*>(p) + run); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_rms_norm(const __grid_constant__ Arguments a) {
    __shared__ float sums[THREADS / 32];  // of squares
    const int thread = threadIdx.x, lane = thread % 32, runs = a.C / 8;
    const int64 row = blockIdx.x;
    uint4 y[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const int run = i * THREADS + thread;
        y[i] = run < runs ? load(a.x + row * a.x_row, run) : uint4{};
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
        sum = add_squares(add_squares(add_squares(add_squares(sum, y[i].x), y[i].y), y[i].z), y[i].w);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (lane == 0) sums[thread / 32] = sum;
    __syncthreads();
    sum = sums[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; i++) sum += sums[i];
    const float factor = rsqrtf(__fadd_rn(__fdiv_rn(sum, static_cast<float>(a.C)), a.eps));
    if (thread == 0) a.factor[row] = factor;
    uint32 chunk_amax[2 * WORDS] = {};
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const int run = i * THREADS + thread;
        const uint4 weight = run < runs ? load(a.weight, run) : uint4{};
        y[i] = {scaled(y[i].x, factor, weight.x), scaled(y[i].y, factor, weight.y), scaled(y[i].z, factor, weight.z),
                scaled(y[i].w, factor, weight.w)};
        chunk_amax[i] = larger_of(y[i]);
    }
    uint32 amax[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) amax[i] = side_by_side(chunk_amax[2 * i], chunk_amax[2 * i + 1]);
    int word = 0, distance = 8;
#pragma unroll
    for (int words = WORDS; words > 1; words /= 2, distance /= 2) {
        const bool keeps_second = lane & distance;
#pragma unroll
        for (int i = 0; i < words / 2; i++) amax[i] = exchange_larger(amax[i], amax[i + words / 2], distance, keeps_second);
        word += keeps_second ? words / 2 : 0;
    }
#pragma unroll
    for (; distance > 0; distance /= 2) amax[0] = reduce_larger(amax[0], distance);
    const bool is_second = lane & HALF;
    const float scale = scale_of<ELEMENT, KIND>(is_second ? second_of(amax[0]) : first_of(amax[0]));
    const Reciprocal r = reciprocal<KIND>(scale);
    const int own = 2 * word + is_second, group = own * (THREADS / 16) + thread / 16;
    if (lane % HALF == 0 && own < CHUNKS && group < a.C / 128) store_scale<KIND>(a.s, row * a.s_row + group * a.s_col, scale);
    uint2* q = reinterpret_cast<uint2*>(a.q + row * a.q_row);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const int run = i * THREADS + thread;
        const uint2 codes = codes_of<ELEMENT, KIND>(y[i], reciprocal_of_lane<KIND>(r, maker_of(i)));
        if (run < runs) q[run] = codes;
    }
}

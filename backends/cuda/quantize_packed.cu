// BF16 to E5M6, twelve bits a number, in groups of 1x128 whose scales are powers of two: attention's output on its way to backward.
//
// Legend: R rows, C columns. Half a warp has 128 columns of ROWS rows, a lane 8 of them. Its codes are 12 bytes: they go through
//   shared memory, so that lanes store 16.

#include "config.cuh"
#include "numerics.cuh"

struct Arguments {
    const uint16* x;
    uint8* q;
    void* s;
    int64 x_row, q_row, s_row, s_col;
    int R, C;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES_OF_HOST, "host and kernel disagree on the arguments");
static_assert(KIND != FP32, "a quotient by a power of two is a BF16 number");

constexpr int ROWS = 4, GROUP_BYTES = 192, PIECES = GROUP_BYTES / 16;  // that lanes store

// Two BF16 numbers of at most 65024, or NaN, as codes, each in a half of the result.
DEVICE uint32 e5m6_codes(uint32 pair) {
    constexpr uint32 BIAS = 0x1c001c00u, LEAST = 0x39003900u, NANS = 0x07e007e0u;  // 112 << 6; 2^-13; above all numbers
    const uint32 magnitude = pair & 0x7fff7fffu;
    // One bit less in the significand, to even, and 112 less in the exponent; 0 below 2^-15.
    const uint32 normal = larger_bits((magnitude + (magnitude >> 1 & 0x00010001u)) >> 1 & 0x7fff7fffu, BIAS) - BIAS;
    // Multiples of 2^-20, the last bit of FP32 numbers from 8 on. Larger than `normal` where that is wrong, else equal, or 128 at most.
    const uint32 small = smaller_bits(magnitude, LEAST);
    const uint32 subnormal = __byte_perm(__float_as_uint(__fadd_rn(first_of(small), 8.0f)),
                                         __float_as_uint(__fadd_rn(second_of(small), 8.0f)), 0x5410);
    return smaller_bits(larger_bits(normal, subnormal), NANS) | (pair >> 4 & 0x08000800u);
}

// Twelve bits each, the first in the upper ones.
DEVICE uint32 side_by_side_codes(uint32 codes) { return (codes << 12 & 0xfff000u) | codes >> 16; }

// Eight numbers of a group as 12 bytes, the most significant bits first.
DEVICE void pack(uint4 x, uint32 reciprocal_twice, uint32 (&words)[3]) {
    const uint32 a = side_by_side_codes(e5m6_codes(times(x.x, reciprocal_twice)));
    const uint32 b = side_by_side_codes(e5m6_codes(times(x.y, reciprocal_twice)));
    const uint32 c = side_by_side_codes(e5m6_codes(times(x.z, reciprocal_twice)));
    const uint32 d = side_by_side_codes(e5m6_codes(times(x.w, reciprocal_twice)));
    words[0] = __byte_perm(a, b, 0x6012), words[1] = __byte_perm(b, c, 0x5601), words[2] = __byte_perm(c, d, 0x4560);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_quantize_packed(const __grid_constant__ Arguments a) {
    __shared__ uint4 staged[THREADS / 32][ROWS][2][PIECES];
    const int thread = threadIdx.x, lane = thread % 16, half = thread / 16 % 2;
    const int tiles = a.C / 128, part = blockIdx.x * (THREADS / 16) + thread / 16, row = part / tiles * ROWS, tile = part % tiles;
    uint4 x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        x[r] = row + r < a.R ? __ldg(reinterpret_cast<const uint4*>(a.x + (row + r) * a.x_row + tile * 128) + lane) : uint4{};
    // Each lane ends up with the maxima of two rows and makes the scale of one.
    const uint32 first = side_by_side(larger_of(x[0]), larger_of(x[1])), second = side_by_side(larger_of(x[2]), larger_of(x[3]));
    uint32 amax = exchange_larger(first, second, 8, lane & 8);
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) amax = reduce_larger(amax, distance);
    const float scale = scale_of<E5M6, KIND>(lane & 1 ? second_of(amax) : first_of(amax));
    const int own = row + lane / 8 * 2 + lane % 2;
    if (lane % 8 < 2 && own < a.R) store_scale<KIND>(a.s, own * a.s_row + tile * a.s_col, scale);
    const uint32 inverse = __float_as_uint(reciprocal<KIND>(scale).high), twice = __byte_perm(inverse, inverse, 0x3232);
    uint4(&pieces)[ROWS][2][PIECES] = staged[thread / 32];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        uint32 words[3];
        pack(x[r], __shfl_sync(ALL_LANES, twice, r / 2 * 8 + r % 2, 16), words);
#pragma unroll
        for (int i = 0; i < 3; i++) reinterpret_cast<uint32*>(pieces[r][half])[lane * 3 + i] = words[i];
    }
    __syncwarp();
    const int64 to = row * a.q_row + tile * GROUP_BYTES;
    const int64 of_halves[2] = {__shfl_sync(ALL_LANES, to, 0), __shfl_sync(ALL_LANES, to, 16)};
    const int rows[2] = {a.R - __shfl_sync(ALL_LANES, row, 0), a.R - __shfl_sync(ALL_LANES, row, 16)};
#pragma unroll
    for (int i = 0; i < ROWS * 2 * PIECES / 32; i++) {
        const int index = i * 32 + thread % 32, group = index / PIECES, r = group / 2;
        const bool is_second = group % 2;
        if (r < (is_second ? rows[1] : rows[0])) {
            uint8* q = a.q + (is_second ? of_halves[1] : of_halves[0]) + r * a.q_row;
            reinterpret_cast<uint4*>(q)[index % PIECES] = (&pieces[0][0][0])[index];
        }
    }
}

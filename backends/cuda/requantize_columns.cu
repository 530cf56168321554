// 128x1 groups of E4M3 data with 1x128 scales: see columns.cuh.
//
// Where old and new scales are powers of two and the tile's old ones are close together, it is computed in FP16, two
// numbers at a time, which is exact: E4M3 numbers are multiples of 2^-9 below 512, so times 2^-15 they are multiples of
// 2^-24, FP16's smallest number. Other tiles are computed in FP32.
#include "columns.cuh"
#include "halves.cuh"

static_assert(THREADS == 128);
constexpr bool IN_FP16 = KIND_IN != 0 && KIND != 0;
constexpr float SMALL = 0x1p-64f, LIFT = 0x1p64f;

// The word itself, which the compiler can't know: so what follows from it is computed again, and takes no registers before.
DEVICE uint32 again(const Columns& p, uint32 word) { return word ^ (static_cast<uint32>(p.rows) >> 31); }

// What divides any x: (lifted scale, its reciprocal); `is_small` where x has to be lifted as well.
template <int KIND>
DEVICE float2 wide_divisor_of(float scale, bool& is_small) {
    is_small = false;
    if (KIND != FP32) return make_float2(reciprocal<KIND>(scale).high, 0.0f);
    is_small = scale < SMALL;
    float lifted = is_small ? __fmul_rn(scale, LIFT) : scale;
    float inverse = reciprocal_approximate(lifted);
    inverse = __fmaf_rn(__fmaf_rn(-inverse, lifted, 1.0f), inverse, inverse);
    if ((bits_of(lifted) & 0x007fffffu) == 0x007fffffu) inverse = float_of(bits_of(inverse) + 1);
    return make_float2(lifted, inverse);
}
template <int KIND, bool LIFTS>
DEVICE float wide_quotient(float x, float2 divisor, float lift) {
    if (KIND != FP32) return __fmul_rn(x, divisor.x);
    if (LIFTS) x = __fmul_rn(x, lift);
    float q = __fmul_rn(x, divisor.y);
    // The signs keep a negative zero: see numerics.py.
    q = __fmaf_rn(__fmaf_rn(q, divisor.x, -x), -divisor.y, q);
    return __fmaf_rn(__fmaf_rn(q, divisor.x, -x), -divisor.y, q);
}

// The tile in FP16, relative to the largest scale, 2^(top - 127); false where a column's numbers are too small for that.
DEVICE bool requantized_in_fp16(const Columns& p, const Place& place, const uint4 (&x)[8], const float (&scales)[8],
                                uint32 top, uint32 (&amaxima)[THREADS / 32][128], uint16* factors, uint8* turned,
                                int patch_row, int patch_col) {
    int t = threadIdx.x, warp = t / 32, lane = t % 32;
    uint32 columns[8], shifts[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        // 2^(exponent - top), a multiple of 2^-15; 0 where there is no row.
        shifts[r] = twice_half(__fmul_rn(scales[r], float_of((254 - top) << 23)));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32 low, high;
            halves_of(word_of(x[r], j), low, high);
            low = times_halves(low, shifts[r]), high = times_halves(high, shifts[r]);
            columns[2 * j] = r == 0 ? low : larger_halves(columns[2 * j], low);
            columns[2 * j + 1] = r == 0 ? high : larger_halves(columns[2 * j + 1], high);
        }
    }
    // Lanes l, l ^ 8, l ^ 16, l ^ 24 have the same columns: each ends up with two words of four.
    bool upper = lane & 8, second = lane & 16;
#pragma unroll
    for (int j = 0; j < 8; ++j) columns[j] &= 0x7fff7fffu;
    uint32 part[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) part[j] = exchange_larger(columns[j], columns[4 + j], 8, upper);
#pragma unroll
    for (int j = 0; j < 2; ++j) part[j] = exchange_larger(part[j], part[2 + j], 16, second);
    *reinterpret_cast<uint2*>(&amaxima[warp][patch_col * 8 + (upper ? 4 : 0) + (second ? 2 : 0)]) =
        make_uint2(part[0], part[1]);
    __syncthreads();

    uint32 amax = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w)
        amax = max(amax, static_cast<uint32>(reinterpret_cast<const uint16*>(amaxima[w])[t]));
    float scale = 1.0f;
    int shift = 0;
    uint32 factor = 0x3c00u;
    if (amax > 0x7c00u) {
        scale = float_of(NAN_BITS);
        factor = 0x7fffu;
    } else if (amax != 0) {
        scale = scale_of<E4M3, KIND>(__fmul_rn(low_half(amax), float_of(top << 23)));
        shift = static_cast<int>(top) - static_cast<int>(bits_of(scale) >> 23);
        factor = static_cast<uint32>(shift + 15) << 10;
    }
    factors[t] = static_cast<uint16>(factor);
    if (__syncthreads_or(shift > LARGEST_SHIFT)) return false;
    store_column_scale(p, place, t, scale);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        uint32 shifted[8][2];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            halves_of(again(p, word_of(x[r], word)), shifted[r][0], shifted[r][1]);
            shifted[r][0] = times_halves(shifted[r][0], shifts[r]);
            shifted[r][1] = times_halves(shifted[r][1], shifts[r]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int column = patch_col * 16 + word * 4 + half * 2;
            uint32 pair = *reinterpret_cast<const uint32*>(&factors[column]);
            uint32 codes[4];  // rows 2i, 2i + 1 of both columns
#pragma unroll
            for (int i = 0; i < 4; ++i)
                codes[i] = codes_of_halves(times_halves(shifted[2 * i][half], pair),
                                           times_halves(shifted[2 * i + 1][half], pair));
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                uint32 order = side == 0 ? 0x6420 : 0x7531;
                *reinterpret_cast<uint2*>(turned + chunk_at<16>(column + side, patch_row / 2) + patch_row % 2 * 8) =
                    make_uint2(__byte_perm(codes[0], codes[1], order), __byte_perm(codes[2], codes[3], order));
            }
        }
    }
    __syncthreads();
    store_turned<16, THREADS>(p, place, turned);
    return true;
}

// The patch's codes in 4-byte words: as they were read, or read again. Tiles whose FP16 form did not fit are few, and
// keeping what they need would cost all the others registers.
template <bool REREADS>
struct Words {
    const uint4 (&x)[8];
    const uint8* data;
    uint32 stride;
    const int* sources;
    int rows;

    DEVICE uint32 at(int r, int word) const {
        if (!REREADS) return word_of(x[r], word);
        uint32 codes = 0;
        if (r < rows)
            codes = *reinterpret_cast<const uint32*>(data + bytes(stride, GATHERS != 0 ? sources[r] : r) + word * 4);
        return codes;
    }
};

template <bool REREADS>
DEVICE void amaxima_of(const Words<REREADS>& words, const float (&scales)[8], uint32* amaxima, int patch_col) {
#pragma unroll REREADS ? 1 : 4
    for (int word = 0; word < 4; ++word) {
        uint32 amax[4] = {0, 0, 0, 0};
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            float numbers[4];
            decode<E4M3>(words.at(r, word), numbers);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                amax[j] = max(amax[j], bits_of(__fmul_rn(numbers[j], scales[r])) & 0x7fffffffu);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            amax[j] = max(amax[j], __shfl_xor_sync(ALL_LANES, amax[j], 8));
            amax[j] = max(amax[j], __shfl_xor_sync(ALL_LANES, amax[j], 16));
        }
        if (threadIdx.x % 32 < 8)
            *reinterpret_cast<uint4*>(amaxima + patch_col * 16 + word * 4) =
                make_uint4(amax[0], amax[1], amax[2], amax[3]);
    }
}

template <bool REREADS, bool LIFTS>
DEVICE void turn(const Columns& p, const Words<REREADS>& words, const float (&scales)[8], const float2* divisors, const float* lifts_of,
                 uint8* turned, int patch_row, int patch_col) {
#pragma unroll REREADS ? 1 : 4
    for (int word = 0; word < 4; ++word) {
        float q[4][8];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            float numbers[4];
            decode<E4M3>(again(p, words.at(r, word)), numbers);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int column = patch_col * 16 + word * 4 + j;
                q[j][r] = wide_quotient<KIND, LIFTS>(__fmul_rn(numbers[j], scales[r]), divisors[column],
                                                     LIFTS ? lifts_of[column] : 1.0f);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int column = patch_col * 16 + word * 4 + j;
            uint2 codes = make_uint2(encode<E4M3>(q[j][0], q[j][1], q[j][2], q[j][3]),
                                     encode<E4M3>(q[j][4], q[j][5], q[j][6], q[j][7]));
            *reinterpret_cast<uint2*>(turned + chunk_at<16>(column, patch_row / 2) + patch_row % 2 * 8) = codes;
        }
    }
}

// The tile in FP32.
template <bool REREADS>
DEVICE void requantize_in_fp32(const Columns& p, const Place& place, const Words<REREADS>& words, const float (&scales)[8],
                               uint32 (&amaxima)[THREADS / 32][128], float2* divisors, float* lifts_of, uint8* turned,
                               int patch_row, int patch_col) {
    int t = threadIdx.x;
    amaxima_of(words, scales, amaxima[t / 32], patch_col);
    __syncthreads();
    uint32 amax = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) amax = max(amax, amaxima[w][t]);
    float scale = scale_of<E4M3, KIND>(float_of(amax));
    bool is_small;
    divisors[t] = wide_divisor_of<KIND>(scale, is_small);
    store_column_scale(p, place, t, scale);
    lifts_of[t] = is_small ? LIFT : 1.0f;
    if (__syncthreads_or(is_small))
        turn<REREADS, true>(p, words, scales, divisors, lifts_of, turned, patch_row, patch_col);
    else
        turn<REREADS, false>(p, words, scales, divisors, lifts_of, turned, patch_row, patch_col);
    __syncthreads();
    store_turned<16, THREADS>(p, place, turned);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    fp8c_requantize_columns(const __grid_constant__ Columns p) {
    __shared__ alignas(128) uint8 turned[GROUP * 128];
    __shared__ alignas(16) uint32 amaxima[THREADS / 32][128];
    __shared__ int sources[GROUP];
    __shared__ float scales_in[GROUP];
    __shared__ uint2 exponents[THREADS / 32];
    __shared__ alignas(16) float2 divisors[128];
    __shared__ float lifts_of[128];
    __shared__ alignas(16) uint16 factors[128];

    Place place = place_of(p);
    int t = threadIdx.x, warp = t / 32, lane = t % 32;
    int patch_col = lane % 8, patch_row = warp * 4 + lane / 8;

    // Thread t looks after row t, and later after column t.
    bool is_row = place.begin + t < place.end;
    int source = is_row ? source_of(p, place.begin + t) : 0;
    int first = place.begin + patch_row * 8;
    const uint8* data = p.data + place.tile * 128 + patch_col * 16;
    if (GATHERS != 0) {
        sources[t] = source;
        __syncthreads();
    } else {
        data += bytes(p.data_row, first);
    }
    float scale_in = 0.0f;
    if (is_row) scale_in = load_scale<KIND_IN>(p.scale_in + bytes(p.scale_in_row, source) + bytes(p.scale_in_col, place.tile), 0);
    uint4 x[8];
#pragma unroll
    for (int r = 0; r < 8; ++r)
        x[r] = load_global4(data + bytes(p.data_row, GATHERS != 0 ? sources[patch_row * 8 + r] : r), first + r < place.end);

    scales_in[t] = scale_in;
    bool is_exact = false;
    uint32 top = 0;
    if (IN_FP16) {
        uint32 exponent = bits_of(scale_in) >> 23;
        uint32 low = __reduce_min_sync(ALL_LANES, is_row ? exponent : 255);
        uint32 high = __reduce_max_sync(ALL_LANES, is_row ? exponent : 0);
        if (lane == 0) exponents[warp] = make_uint2(low, high);
    }
    __syncthreads();
    if (IN_FP16) {
        uint32 bottom = 255;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) bottom = min(bottom, exponents[w].x), top = max(top, exponents[w].y);
        is_exact = bottom >= LOWEST_EXPONENT && top <= HIGHEST_EXPONENT && top - bottom <= LARGEST_SHIFT;
    }
    float scales[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) scales[r] = scales_in[patch_row * 8 + r];

    // The same for all threads.
    if (IN_FP16 && is_exact && requantized_in_fp16(p, place, x, scales, top, amaxima, factors, turned, patch_row, patch_col))
        return;
    Words<IN_FP16> words{x, data, p.data_row, sources + patch_row * 8, place.end - first};
    requantize_in_fp32(p, place, words, scales, amaxima, divisors, lifts_of, turned, patch_row, patch_col);
}

// 128x1 groups of E4M3 data with 1x128 scales: see columns.cuh.
//
// A tile's codes are copied into shared memory as they are. Half a warp then takes 8 columns, a lane 8 rows of each: maxima are
// exchanged between lanes, and because a lane's rows follow each other, its codes are stored as they come, 128 bytes of a
// column by half a warp. So warps wait for each other once, and nothing is turned.
//
// Where old and new scales are powers of two and the tile's old ones are close together, it is computed in FP16, two
// numbers at a time, which is exact: E4M3 numbers are multiples of 2^-9 below 512, so times 2^-15 they are multiples of
// 2^-24, FP16's smallest number. Other tiles are computed in FP32.
#include "columns.cuh"
#include "halves.cuh"

static_assert(THREADS == 256);
constexpr bool IN_FP16 = KIND_IN != FP32 && KIND != FP32;
constexpr int ROWS = 8, COLUMNS = 8, PAIRS = COLUMNS / 2, WARPS = THREADS / 32;  // ROWS, COLUMNS of a lane

constexpr float SMALL = 0x1p-64f, LIFT = 0x1p64f;

// Tiles that a block makes one after another.
struct alignas(16) Run {
    int tile, end;
    int group, begin;  // along the rows of the output; its first row
    int rows;
};

struct Shared {
    uint4 tile[2][GROUP][8];  // of 16 codes; moved by the row's block of 8. The one at work and the next
    int sources[GROUP];  // of each row, where rows are gathered
    float scales_in[2][GROUP];  // at `slot_of_row`
    Run run;
    uint2 exponents[2][GROUP / 32];
    uint16 factors[WARPS][2][COLUMNS];
    float4 divisors[WARPS][2][4];  // of 4 columns
};

static_assert(sizeof(Shared) == SHARED_BYTES_OF_HOST, "columns.py knows the layout of shared memory");

// Lanes that read 4 numbers at the same time, of 8 different rows, read 128 bytes.
DEVICE int slot_of_row(int row) { return row % 8 / 4 * (GROUP / 2) + row / 8 * 4 + row % 4; }

struct Lane {
    int lane, warp, half, block, stage;  // `half`: of 16 columns; `block`: of 8 rows
};
// Lanes that read at the same time have both halves of 8 different 16 bytes.
DEVICE Lane lane_of(int stage) {
    const int lane = threadIdx.x % 32;
    return {lane, static_cast<int>(threadIdx.x / 32), lane / 8 % 2, lane % 8 + lane / 16 * 8, stage};
}
DEVICE uint2 codes_at(const Shared& shared, const Lane& at, int row) {
    return reinterpret_cast<const uint2*>(&shared.tile[at.stage][at.block * ROWS + row][at.warp ^ at.block % 8])[at.half];
}

DEVICE uint32 word_at(const Shared& shared, const Lane& at, int row, int word) {
    return reinterpret_cast<const uint32*>(&shared.tile[at.stage][at.block * ROWS + row][at.warp ^ at.block % 8])[at.half * 2 + word];
}

struct Output {
    uint8* out;
    uint32 stride;
    bool exists;
    DEVICE void store(int column, uint32 first, uint32 second) const {
        store_global2(out + offset(stride, column), make_uint2(first, second), exists);
    }
};

// The larger magnitude, NaN above all, with a sign that means nothing.
DEVICE uint32 larger_float(uint32 a, uint32 b) {
    float x;
    asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(x) : "f"(float_of(a)), "f"(float_of(b)));
    return bits_of(x);
}
DEVICE uint32 exchange_words(uint32 a, uint32 b, int distance, bool keeps_second) {
    const uint32 kept = keeps_second ? b : a, given = keeps_second ? a : b;
    return max(kept, __shfl_xor_sync(ALL_LANES, given, distance));
}

// The tile in FP16, relative to the largest scale, 2^(top - 127); false where a column's numbers are too small for that.
DEVICE bool requantized_in_fp16(const Columns& p, const Place& place, Shared& shared, const Lane& at, uint32 top, const Output& output) {
    uint32 x[ROWS][PAIRS], amax[PAIRS];
    const float unit = float_of((254 - top) << 23);
    const float4* scales = reinterpret_cast<const float4*>(shared.scales_in[at.stage]) + at.block;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float4 four = scales[r / 4 * (GROUP / 8)];
        const float scale = r % 4 == 0 ? four.x : r % 4 == 1 ? four.y : r % 4 == 2 ? four.z : four.w;
        const uint32 factor = twice_half(__fmul_rn(scale, unit));  // a multiple of 2^-15; 0 where there is no row
        const uint2 codes = codes_at(shared, at, r);
        halves_of(codes.x, x[r][0], x[r][1]);
        halves_of(codes.y, x[r][2], x[r][3]);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            x[r][i] = times_halves(x[r][i], factor);
            amax[i] = r == 0 ? x[r][i] : larger_halves(amax[i], x[r][i]);
        }
    }
    const bool bit16 = at.lane & 16, bit4 = at.lane & 4, bit2 = at.lane & 2;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) amax[i] &= 0x7fff7fffu;
    uint32 both = exchange_larger(exchange_larger(amax[0], amax[2], 16, bit16), exchange_larger(amax[1], amax[3], 16, bit16), 4, bit4);
    both = reduce_larger(reduce_larger(both, 2), 1);
    const int own = (bit16 ? 4 : 0) + (bit4 ? 2 : 0) + (bit2 ? 1 : 0);
    const uint32 own_amax = bit2 ? both >> 16 : both & 0xffffu;
    float scale = 1.0f;
    int shift = 0;
    uint32 factor = 0x3c00u;
    if (own_amax > 0x7c00u) {
        scale = float_of(NAN_BITS);
        factor = 0x7fffu;
    } else if (own_amax != 0) {
        scale = scale_of<E4M3, KIND>(__fmul_rn(low_half(own_amax), float_of(top << 23)));
        shift = static_cast<int>(top) - static_cast<int>(bits_of(scale) >> 23);
        factor = static_cast<uint32>(shift + 15) << 10;
    }
    if (__any_sync(ALL_LANES, shift > LARGEST_SHIFT)) return false;
    if (at.lane % 2 == 0) {
        shared.factors[at.warp][at.half][own] = static_cast<uint16>(factor);
        store_column_scale(p, place, at.warp * 16 + at.half * 8 + own, scale);
    }
    __syncwarp();
    const uint4 factors = *reinterpret_cast<const uint4*>(shared.factors[at.warp][at.half]);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const uint32 of = word_of(factors, i);
        uint32 codes[4];  // rows 2k, 2k + 1 of both columns
#pragma unroll
        for (int k = 0; k < 4; ++k) codes[k] = codes_of_halves(times_halves(x[2 * k][i], of), times_halves(x[2 * k + 1][i], of));
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const uint32 order = side == 0 ? 0x6420 : 0x7531;
            output.store(2 * i + side, __byte_perm(codes[0], codes[1], order), __byte_perm(codes[2], codes[3], order));
        }
    }
    return true;
}

// Scales that any x of 24 bits is divided by in two instructions (tests/backends/cuda/test_factors.py has the others' significands).
DEVICE bool is_ordinary(float scale) {
    return KIND != FP32 || (scale >= SMALL && scale <= LIFT && (bits_of(scale) & 0x000fffffu) != 0x000fffffu);
}
DEVICE float inverse_of(float scale) {
    float inverse = reciprocal_approximate(scale);
#pragma unroll
    for (int step = 0; step < 2; ++step) inverse = __fmaf_rn(__fmaf_rn(-inverse, scale, 1.0f), inverse, inverse);
    return inverse;
}
// What divides: (an FP32 number not above 1 / scale, the rest of it), which is not below 0, so that -0 stays -0; of scales that are not
// ordinary (lifted scale, its inverse, what x is lifted with).
DEVICE float4 divisor_of(float scale, bool ordinary) {
    if (KIND != FP32) return {reciprocal<KIND>(scale).high, 0.0f, 1.0f, 0.0f};
    const float lift = ordinary || !(scale < SMALL) ? 1.0f : LIFT, lifted = __fmul_rn(scale, lift);
    float inverse = inverse_of(lifted);
    if (!ordinary) {
        if ((bits_of(lifted) & 0x007fffffu) == 0x007fffffu) inverse = float_of(bits_of(inverse) + 1);
        return {lifted, inverse, lift, 0.0f};
    }
    if (__fmaf_rn(-inverse, scale, 1.0f) < 0.0f) inverse = float_of(bits_of(inverse) - 1);
    const float rest = __fmaf_rn(-inverse, scale, 1.0f);
    return {inverse, __fmul_rn(__fmaf_rn(rest, rest, rest), inverse), 1.0f, 0.0f};
}
template <bool ORDINARY>
DEVICE float wide_quotient(float x, const float4& divisor) {
    if (KIND != FP32) return __fmul_rn(x, divisor.x);
    if (ORDINARY) return __fmaf_rn(x, divisor.x, __fmul_rn(x, divisor.y));
    x = __fmul_rn(x, divisor.z);
    float q = __fmul_rn(x, divisor.y);
    // The signs keep a negative zero: see numerics.py.
    return __fmaf_rn(__fmaf_rn(q, divisor.x, -x), -divisor.y, q);
}

template <bool ORDINARY>
DEVICE void divide(const float (&x)[4][ROWS], const float4* divisors, int word, const Output& output) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float4 by = divisors[j];
        float q[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) q[r] = wide_quotient<ORDINARY>(x[j][r], by);
        output.store(word * 4 + j, encode<E4M3>(q[0], q[1], q[2], q[3]), encode<E4M3>(q[4], q[5], q[6], q[7]));
    }
}

// The tile in FP32, 4 columns of each half warp at a time.
DEVICE void requantize_in_fp32(const Columns& p, const Place& place, Shared& shared, const Lane& at, const Output& output) {
    const bool bit16 = at.lane & 16, bit4 = at.lane & 4;
    float4* divisors = shared.divisors[at.warp][at.half];
#pragma unroll 1
    for (int word = 0; word < 2; ++word) {
        float x[4][ROWS];
        uint32 amax[4] = {};
        const float4* scales = reinterpret_cast<const float4*>(shared.scales_in[at.stage]) + at.block;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float4 four = scales[r / 4 * (GROUP / 8)];
            const float scale = r % 4 == 0 ? four.x : r % 4 == 1 ? four.y : r % 4 == 2 ? four.z : four.w;
            float numbers[4];
            decode<E4M3>(word_at(shared, at, r, word), numbers);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                x[j][r] = __fmul_rn(numbers[j], scale);
                amax[j] = r == 0 ? bits_of(x[j][r]) : larger_float(amax[j], bits_of(x[j][r]));
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) amax[j] &= 0x7fffffffu;
#pragma unroll
        for (int j = 0; j < 2; ++j) amax[j] = exchange_words(amax[j], amax[2 + j], 16, bit16);
        uint32 most = exchange_words(amax[0], amax[1], 4, bit4);
        most = max(most, __shfl_xor_sync(ALL_LANES, most, 2));
        most = max(most, __shfl_xor_sync(ALL_LANES, most, 1));
        const int own = (bit16 ? 2 : 0) + (bit4 ? 1 : 0), first = at.warp * 16 + at.half * 8 + word * 4;
        const float scale = scale_of<E4M3, KIND>(float_of(most));
        const bool ordinary = KIND != FP32 || __all_sync(ALL_LANES, is_ordinary(scale));
        if (at.lane % 4 == 0) {
            store_column_scale(p, place, first + own, scale);
            divisors[own] = divisor_of(scale, ordinary);
        }
        __syncwarp();
        if (ordinary)
            divide<true>(x, divisors, word, output);
        else
            divide<false>(x, divisors, word, output);
        __syncwarp();
    }
}

DEVICE Run run_of(const Columns& p) {
    const int runs = (p.columns / 128 + p.slab - 1) / p.slab;
    const int slab = blockIdx.x / (p.groups * WIDE), within = blockIdx.x - slab * p.groups * WIDE;
    const int width = WIDE == 1 ? 1 : min(WIDE, runs - slab * WIDE), group = within / width, run = slab * WIDE + within - group * width;
    int begin = group * GROUP, end = min(begin + GROUP, p.rows);
    if (p.experts != 0) {
        const Rows rows = rows_of(p.ends, p.experts, group);
        begin = rows.begin, end = rows.end;
    }
    return {run * p.slab, min((run + 1) * p.slab, p.columns / 128), group, begin, end - begin};
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_requantize_columns(const __grid_constant__ Columns p) {
    start_early();
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Run run;
    if (GATHERS == 0) {
        run = run_of(p);
    } else {  // half of the warps look up where the block works, and where its rows come from
        if (threadIdx.x < GROUP) {
            run = run_of(p);
            const int row = threadIdx.x;
            shared.sources[row] = row < run.rows ? source_of(p, run.begin + row) : 0;
            if (row == 0) shared.run = run;
        }
        __syncthreads();
        run = shared.run;
    }
    if (run.rows <= 0) {
        clear_columns(p, run.group, run.tile, run.end);
        return;
    }
    const bool is_row = threadIdx.x < run.rows;
    float scale = 0.0f;
    auto from = [&](int row) {  // read again, so that it takes no registers
        return GATHERS == 0 ? min(run.begin + row, p.rows - 1) : *static_cast<volatile int*>(&shared.sources[row]);
    };
    auto fetch = [&](int tile, int stage) {
        const int thread = thread_index_again();
#pragma unroll
        for (int i = 0; i < GROUP; i += THREADS / 8) {
            const int row = thread / 8 + i, source = from(row);
            copy_async<16>(&shared.tile[stage][row][thread % 8 ^ thread / 64 ^ i / 8 % 8],
                           p.data + offset(p.data_row, source) + (tile * 128 + thread % 8 * 16), row < run.rows);
        }
        if (is_row) {
            scale = load_scale<KIND_IN>(p.scale_in + offset(p.scale_in_row, from(thread)) + offset(p.scale_in_col, tile), 0);
        }
    };
    Place place = {run.tile, run.group, run.begin, run.begin + run.rows};
    fetch(place.tile, 0);
    for (int stage = 0;; stage ^= 1) {
        const int thread = thread_index_again();
        if (thread < GROUP) {
            shared.scales_in[stage][slot_of_row(thread)] = scale;
            if constexpr (IN_FP16) {
                const uint32 exponent = bits_of(scale) >> 23;
                const uint32 low = __reduce_min_sync(ALL_LANES, is_row ? exponent : 255);
                const uint32 high = __reduce_max_sync(ALL_LANES, is_row ? exponent : 0);
                if (thread % 32 == 0) shared.exponents[stage][thread / 32] = make_uint2(low, high);
            }
        }
        wait_for_copies();
        __syncthreads();
        if (place.tile + 1 < run.end) fetch(place.tile + 1, stage ^ 1);

        const Lane at = lane_of(stage);
        // Blocks of experts are filled up with zeros.
        const Output output = {p.out + offset(GROUP, run.group) + at.block * ROWS + offset(p.out_col, place.tile * 128 + at.warp * 16 + at.half * 8),
                               p.out_col, p.experts != 0 || at.block * ROWS < run.rows};
        bool is_done = false;
        if constexpr (IN_FP16) {
            uint32 bottom = 255, top = 0;
#pragma unroll
            for (int w = 0; w < GROUP / 32; ++w)
                bottom = min(bottom, shared.exponents[stage][w].x), top = max(top, shared.exponents[stage][w].y);
            if (bottom >= LOWEST_EXPONENT && top <= HIGHEST_EXPONENT && top - bottom <= LARGEST_SHIFT)
                is_done = requantized_in_fp16(p, place, shared, at, top, output);
        }
        if (!is_done) requantize_in_fp32(p, place, shared, at, output);
        if (++place.tile == run.end) return;
    }
}

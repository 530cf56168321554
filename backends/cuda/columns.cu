// Quantizers that write 128x1 groups (transposed), on Hopper: from BF16, with or without 1x128 groups of the same tile
// (`quantize_columns`), and from E4M3 data with 1x128 scales (`requantize_columns`). Rows may be gathered and groups may
// restart at each expert. Bit for bit what `backends/triton/numerics.py` says; its docstring has the reasons.
//
// One block makes a tile of 128 rows by 128 columns. A thread keeps 8 rows of 8 or 16 columns in registers as they were
// read; each of the tile's scales is made by one thread and handed around in shared memory, where the result is also
// turned. Columns come in slabs, slab by slab over all rows: rows that are read several times are then found in the L2.
//
// Compiled with: ROWS_TOO (0, 1); GATHERS (0, or the bits of an index); KIND_IN, KIND_ROW, KIND, the kinds of the scales
// (0 FP32, 1 powers of two, 2 E8M0).
// Columns: a multiple of 128. Rows: a multiple of 16, or groups that restart.

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;

#define DEVICE __device__ __forceinline__

constexpr int GROUP = 128, PATCH_ROWS = 8;
constexpr uint32 INFINITY_BITS = 0x7f800000u, NAN_BITS = 0x7fc00000u, ONE_BITS = 0x3f800000u;
constexpr float SMALL = 0x1p-64f, LIFT = 0x1p64f, SMALLEST_SCALE = 0x1p-126f, LARGEST = 448.0f;

struct Columns {
    const uint8* data;      // BF16 [., columns], or E4M3 codes
    const uint8* scale_in;  // of E4M3 data
    const void* gathered;   // GATHERS: row t is row gathered[t] of the data
    const int* ends;        // [experts] cumulative, where groups restart
    uint8* out;             // 128x1, transposed
    uint8* scale;
    uint8* row_out;         // ROWS_TOO: 1x128
    uint8* row_scale;
    // Strides in bytes; what is multiplied with one has 32 bits as well.
    uint32 data_row, scale_in_row, scale_in_col, out_col, scale_row, row_out_row, row_scale_row, row_scale_col;
    int rows, columns, groups, experts, slab;
};

// Numbers ---------------------------------------------------------------------------------------------------------

DEVICE uint32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32 x) { return __uint_as_float(x); }
DEVICE uint32 max_u16x2(uint32 a, uint32 b) {
    uint32 d;
    asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// Four numbers as E4M3 codes, the first in the lowest byte.
DEVICE uint32 codes_of(float a, float b, float c, float d) {
    uint32 packed;
    asm("{\n\t.reg .b16 low, high;\n\tcvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\tmov.b32 %0, {low, high};\n\t}"
        : "=r"(packed) : "f"(a), "f"(b), "f"(c), "f"(d));
    return packed;
}
// Two FP16 pairs as E4M3 codes.
DEVICE uint32 codes_of_halves(uint32 a, uint32 b) {
    uint32 packed;
    asm("{\n\t.reg .b16 low, high;\n\tcvt.rn.satfinite.e4m3x2.f16x2 low, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f16x2 high, %2;\n\tmov.b32 %0, {low, high};\n\t}"
        : "=r"(packed) : "r"(a), "r"(b));
    return packed;
}
// Four codes as two FP16 pairs; exact.
DEVICE void halves_of(uint32 codes, uint32& low, uint32& high) {
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.rn.f16x2.e4m3x2 %0, l;\n\tcvt.rn.f16x2.e4m3x2 %1, h;\n\t}"
        : "=r"(low), "=r"(high) : "r"(codes));
}
DEVICE uint32 times_halves(uint32 a, uint32 b) {
    uint32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE float low_half(uint32 x) {
    float f;
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %1;\n\tcvt.f32.f16 %0, l;\n\t}" : "=f"(f) : "r"(x));
    return f;
}
DEVICE float high_half(uint32 x) {
    float f;
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %1;\n\tcvt.f32.f16 %0, h;\n\t}" : "=f"(f) : "r"(x));
    return f;
}

template <int kind>
DEVICE float scale_of(uint32 amax_bits) {
    float negated = -float_of(amax_bits);
    float q = __fmul_rn(negated, -1.0f / LARGEST);
    float scale = __fmaf_rn(__fmaf_rn(q, LARGEST, negated), -1.0f / LARGEST, q);
    uint32 bits = bits_of(fmaxf(scale, SMALLEST_SCALE));
    if (kind != 0) bits = (bits + 0x007fffffu) & 0x7f800000u;
    if (amax_bits == 0) bits = ONE_BITS;
    if (amax_bits >= INFINITY_BITS) bits = NAN_BITS;
    return float_of(bits);
}

// (lifted scale, its reciprocal) of a group; `is_small` where its numbers have to be lifted as well.
template <int kind>
DEVICE float2 divisor_of(float scale, bool& is_small) {
    uint32 bits = bits_of(scale);
    is_small = false;
    if (kind != 0) return make_float2(scale, bits >= INFINITY_BITS ? scale : float_of(0x7f000000u - bits));
    is_small = scale < SMALL;
    float lifted = is_small ? __fmul_rn(scale, LIFT) : scale;
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(lifted));
    inverse = __fmaf_rn(__fmaf_rn(-inverse, lifted, 1.0f), inverse, inverse);
    if ((bits_of(lifted) & 0x007fffffu) == 0x007fffffu) inverse = float_of(bits_of(inverse) + 1);
    return make_float2(lifted, inverse);
}

// RN(x / scale). lifts: some scale of the tile is small.
template <int kind, bool wide, bool lifts>
DEVICE float quotient(float x, float2 divisor, float lift) {
    if (lifts) x = __fmul_rn(x, lift);
    float q = __fmul_rn(x, divisor.y);
    if (kind != 0) return q;
    // The signs keep a negative zero: see numerics.py.
    q = __fmaf_rn(__fmaf_rn(q, divisor.x, -x), -divisor.y, q);
    if (wide) q = __fmaf_rn(__fmaf_rn(q, divisor.x, -x), -divisor.y, q);
    return q;
}

constexpr int SCALE_BYTES[3] = {4, 4, 1};

template <int kind>
DEVICE void store_scale(uint8* address, float scale) {
    if (kind == 2)
        *address = static_cast<uint8>(bits_of(scale) >> 23);
    else
        *reinterpret_cast<float*>(address) = scale;
}
template <int kind>
DEVICE float load_scale(const uint8* address) {
    if (kind != 2) return __ldg(reinterpret_cast<const float*>(address));
    uint32 exponent = __ldg(address);
    return float_of(exponent == 255 ? NAN_BITS : exponent == 0 ? 0x00400000u : exponent << 23);
}

// Memory ----------------------------------------------------------------------------------------------------------

#ifndef LOAD_HINT
#define LOAD_HINT "ld.global.nc.v4.u32"
#endif
#ifndef STORE_HINT
#define STORE_HINT "st.global.v4.u32"
#endif
#ifndef STORE2_HINT
#define STORE2_HINT "st.global.v2.u32"
#endif

// Stride times index, both 32 bits wide: one instruction with the addition.
DEVICE int64 bytes(uint32 stride, int index) { return static_cast<int64>(static_cast<unsigned long long>(stride) * static_cast<uint32>(index)); }

// Zeros where `is_there` is false.
DEVICE void load_global4(uint32 (&v)[4], const uint8* p, bool is_there) {
    v[0] = v[1] = v[2] = v[3] = 0;
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t@p " LOAD_HINT " {%0, %1, %2, %3}, [%4];\n\t}"
                 : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3]) : "l"(p), "r"(static_cast<uint32>(is_there)));
}
DEVICE void store_global4(uint8* p, uint4 v) {
    asm volatile(STORE_HINT " [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void store_global2(uint8* p, uint2 v, bool is_there) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %3, 0;\n\t@p " STORE2_HINT " [%0], {%1, %2};\n\t}"
                 ::"l"(p), "r"(v.x), "r"(v.y), "r"(static_cast<uint32>(is_there)) : "memory");
}

// Where a block works ---------------------------------------------------------------------------------------------

struct Place {
    int tile, group;       // along the columns, along the rows of the output
    int begin, end, last;  // rows that the group has; where the last expert ends
};

DEVICE Place place_of(const Columns& p) {
    int tiles = p.columns / 128, block = blockIdx.x;
    int slab = block / (p.groups * p.slab), within = block - slab * p.groups * p.slab;
    int width = min(p.slab, tiles - slab * p.slab);
    int group = within / width;
    Place place{slab * p.slab + within - group * width, group, 0, 0, p.rows};
    if (p.experts == 0) {
        place.begin = group * GROUP;
        place.end = min(place.begin + GROUP, p.rows);
        return place;
    }
    // Expert e has scale rows from start_e / 128 + e on: fp8c.ops.scale_shape.
    int owned = 0;
    for (int first = 0; first < p.experts; first += blockDim.x) {
        int e = first + threadIdx.x;
        bool is_before = e < p.experts && (e == 0 ? 0 : p.ends[e - 1]) / GROUP + e <= group;
        owned += __syncthreads_count(is_before);
    }
    int owner = owned - 1;
    int start = owner == 0 ? 0 : p.ends[owner - 1];
    place.begin = start + (group - (start / GROUP + owner)) * GROUP;
    place.end = min(place.begin + GROUP, p.ends[owner]);
    place.last = p.ends[p.experts - 1];
    return place;
}

DEVICE int source_of(const Columns& p, int row) {
    if (GATHERS == 0) return row;
    return GATHERS == 64 ? static_cast<int>(__ldg(static_cast<const int64*>(p.gathered) + row))
                         : __ldg(static_cast<const int*>(p.gathered) + row);
}

DEVICE uint8* scale_address(const Columns& p, const Place& place, int column) {
    return p.scale + bytes(p.scale_row, place.group) + bytes(SCALE_BYTES[KIND], place.tile * 128 + column);
}

// A tile of codes in shared memory, column by column; 16-byte chunks are permuted so that no bank is used twice.
// `spread`: columns of a thread.
template <int spread>
DEVICE int chunk_at(int column, int chunk) {
    return column * GROUP + ((chunk ^ (column / spread & 7)) << 4);
}

template <int spread, int threads>
DEVICE void store_turned(const Columns& p, const Place& place, const uint8* turned) {
    // Blocks of experts are filled up with zeros; else the rows end within a tile, at a chunk.
    int rows = p.experts != 0 ? GROUP : place.end - place.begin;
    int chunk = threadIdx.x % 8;
    if (chunk * 16 >= rows) return;
    int first = threadIdx.x / 8;
    uint8* out = p.out + bytes(GROUP, place.group) + chunk * 16 + bytes(p.out_col, place.tile * 128 + first);
#pragma unroll
    for (int step = 0; step < 128 * 8 / threads; ++step) {
        int column = first + step * (threads / 8);
        uint4 v = *reinterpret_cast<const uint4*>(turned + chunk_at<spread>(column, chunk));
        store_global4(out + bytes(p.out_col, step * (threads / 8)), v);
    }
}

// From BF16 -------------------------------------------------------------------------------------------------------

constexpr int THREADS = 256;

DEVICE float low_bf16(uint32 x) { return float_of(x << 16); }
DEVICE float high_bf16(uint32 x) { return float_of(x & 0xffff0000u); }

// Eight neighbours of a row, divided: their codes.
template <int kind, bool lifts>
DEVICE uint2 row_codes(const uint32 (&x)[4], float2 divisor, float lift) {
    float q[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        q[2 * j] = quotient<kind, false, lifts>(low_bf16(x[j]), divisor, lift);
        q[2 * j + 1] = quotient<kind, false, lifts>(high_bf16(x[j]), divisor, lift);
    }
    return make_uint2(codes_of(q[0], q[1], q[2], q[3]), codes_of(q[4], q[5], q[6], q[7]));
}

template <bool lifts>
DEVICE void write_rows(const Columns& p, const Place& place, const uint32 (&x)[8][4], const float2* divisors,
                       const float* lifts_of, int patch_row, int patch_col) {
    int first = place.begin + patch_row * 8;
    uint8* out = p.row_out + bytes(p.row_out_row, first) + place.tile * 128 + patch_col * 8;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        int row = patch_row * 8 + r;
        uint2 codes = row_codes<KIND_ROW, lifts>(x[r], divisors[row], lifts ? lifts_of[row] : 1.0f);
        store_global2(out + bytes(p.row_out_row, r), codes, first + r < place.end);
    }
}

template <bool lifts>
DEVICE void turn(const uint32 (&x)[8][4], const float2* divisors, const float* lifts_of, uint8* turned, int patch_row,
                 int patch_col) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        int column = patch_col * 8 + j;
        float2 divisor = divisors[column];
        float q[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            float value = j % 2 == 0 ? low_bf16(x[r][j / 2]) : high_bf16(x[r][j / 2]);
            q[r] = quotient<KIND, false, lifts>(value, divisor, lifts ? lifts_of[column] : 1.0f);
        }
        uint2 codes = make_uint2(codes_of(q[0], q[1], q[2], q[3]), codes_of(q[4], q[5], q[6], q[7]));
        *reinterpret_cast<uint2*>(turned + chunk_at<8>(column, patch_row / 2) + patch_row % 2 * 8) = codes;
    }
}

// 1x128 groups of rows that no expert owns, shared out among the groups; half a warp takes a row.
DEVICE void quantize_tail(const Columns& p, const Place& place) {
    int share = (p.rows - place.last + p.groups - 1) / p.groups;
    int begin = place.last + place.group * share, end = min(begin + share, p.rows);
    for (int first = begin; first < end; first += THREADS / 16) {
        int row = first + threadIdx.x / 16, column = place.tile * 128 + threadIdx.x % 16 * 8;
        bool is_row = row < end;
        uint32 x[4], amax = 0;
        load_global4(x, p.data + bytes(p.data_row, row) + column * 2, is_row);
        for (int j = 0; j < 4; ++j) amax = max_u16x2(amax, x[j] & 0x7fff7fffu);
        for (int step = 1; step < 16; step *= 2) amax = max_u16x2(amax, __shfl_xor_sync(~0u, amax, step));
        float scale = scale_of<KIND_ROW>(max(amax & 0xffffu, amax >> 16) << 16);
        bool is_small;
        float2 divisor = divisor_of<KIND_ROW>(scale, is_small);
        uint2 codes = row_codes<KIND_ROW, true>(x, divisor, is_small ? LIFT : 1.0f);
        store_global2(p.row_out + bytes(p.row_out_row, row) + column, codes, is_row);
        if (is_row && threadIdx.x % 16 == 0)
            store_scale<KIND_ROW>(
                p.row_scale + bytes(p.row_scale_row, row) + bytes(p.row_scale_col, place.tile), scale);
    }
}

#ifndef BLOCKS
#define BLOCKS 3
#endif
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) quantize_columns(const __grid_constant__ Columns p) {
    __shared__ alignas(128) uint8 turned[GROUP * 128];
    __shared__ alignas(16) uint16 column_amax[THREADS / 32][128];
    __shared__ uint16 row_amax[GROUP];
    __shared__ alignas(16) float2 divisors[256];  // of the columns, of the rows
    __shared__ float lifts_of[256];

    Place place = place_of(p);
    if (ROWS_TOO && p.experts != 0) quantize_tail(p, place);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int patch_col = lane % 16, patch_row = warp * 2 + lane / 16;

    uint32 x[8][4];
    int first = place.begin + patch_row * 8;
    const uint8* data = p.data + place.tile * 256 + patch_col * 16;
    if (GATHERS != 0) {
        __shared__ int sources[GROUP];
        if (threadIdx.x < GROUP && place.begin + threadIdx.x < place.end)
            sources[threadIdx.x] = source_of(p, place.begin + threadIdx.x);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 8; ++r)
            load_global4(x[r], data + bytes(p.data_row, sources[patch_row * 8 + r]), first + r < place.end);
    } else {
        data += bytes(p.data_row, first);
#pragma unroll
        for (int r = 0; r < 8; ++r) load_global4(x[r], data + bytes(p.data_row, r), first + r < place.end);
    }

    // Magnitudes of BF16 order like integers, two at a time; NaN is above infinity.
    uint32 columns[4] = {0, 0, 0, 0}, rows[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        rows[r] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32 magnitude = x[r][j] & 0x7fff7fffu;
            columns[j] = max_u16x2(columns[j], magnitude);
            rows[r] = max_u16x2(rows[r], magnitude);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) columns[j] = max_u16x2(columns[j], __shfl_xor_sync(~0u, columns[j], 16));
    if (lane < 16)
        *reinterpret_cast<uint4*>(&column_amax[warp][patch_col * 8]) =
            make_uint4(columns[0], columns[1], columns[2], columns[3]);
    if (ROWS_TOO) {
        uint32 pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)  // rows 2i and 2i + 1 in the halves of a word
            pairs[i] = max_u16x2(__byte_perm(rows[2 * i], rows[2 * i + 1], 0x5410),
                                 __byte_perm(rows[2 * i], rows[2 * i + 1], 0x7632));
        // Every step halves what a lane is responsible for.
        bool upper = lane & 8;
        uint32 a = upper ? pairs[2] : pairs[0], b = upper ? pairs[3] : pairs[1];
        a = max_u16x2(a, __shfl_xor_sync(~0u, upper ? pairs[0] : pairs[2], 8));
        b = max_u16x2(b, __shfl_xor_sync(~0u, upper ? pairs[1] : pairs[3], 8));
        bool second = lane & 4;
        uint32 c = max_u16x2(second ? b : a, __shfl_xor_sync(~0u, second ? a : b, 4));
        c = max_u16x2(c, __shfl_xor_sync(~0u, c, 2));
        c = max_u16x2(c, __shfl_xor_sync(~0u, c, 1));
        if (lane % 4 == 0) *reinterpret_cast<uint32*>(&row_amax[patch_row * 8 + (lane & 12) / 2]) = c;
    }
    __syncthreads();

    bool is_small = false;
    int t = threadIdx.x;
    if (t < 128) {
        uint32 amax = 0;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) amax = max(amax, static_cast<uint32>(column_amax[w][t]));
        float scale = scale_of<KIND>(amax << 16);
        divisors[t] = divisor_of<KIND>(scale, is_small);
        store_scale<KIND>(scale_address(p, place, t), scale);
    } else if (ROWS_TOO) {
        int row = t - 128;
        float scale = scale_of<KIND_ROW>(static_cast<uint32>(row_amax[row]) << 16);
        divisors[t] = divisor_of<KIND_ROW>(scale, is_small);
        uint8* address = p.row_scale + bytes(p.row_scale_row, place.begin + row) + bytes(p.row_scale_col, place.tile);
        if (place.begin + row < place.end) store_scale<KIND_ROW>(address, scale);
    }
    if (KIND == 0 || (ROWS_TOO && KIND_ROW == 0)) lifts_of[t] = is_small ? LIFT : 1.0f;
    if (__syncthreads_or(is_small)) {
        if (ROWS_TOO) write_rows<true>(p, place, x, divisors + 128, lifts_of + 128, patch_row, patch_col);
        turn<true>(x, divisors, lifts_of, turned, patch_row, patch_col);
    } else {
        if (ROWS_TOO) write_rows<false>(p, place, x, divisors + 128, lifts_of + 128, patch_row, patch_col);
        turn<false>(x, divisors, lifts_of, turned, patch_row, patch_col);
    }
    __syncthreads();
    store_turned<8, THREADS>(p, place, turned);
}

// From E4M3 -------------------------------------------------------------------------------------------------------

constexpr int FEW_THREADS = 128;
constexpr int LARGEST_SHIFT = 15;  // of FP16 numbers, by a power of two

// Scales that are powers of two between these, at most 2^15 apart, let the tile be computed in FP16, exactly: E4M3 is a
// multiple of 2^-9, so 2^-15 of it is one of 2^-24.
constexpr int LOWEST_EXPONENT = 127 - 60, HIGHEST_EXPONENT = 127 + 60;

// The j-th of sixteen codes.
DEVICE float number(const uint32 (&x)[4], int j) {
    uint32 low, high;
    halves_of(x[j / 4], low, high);
    uint32 pair = j % 4 < 2 ? low : high;
    return j % 2 == 0 ? low_half(pair) : high_half(pair);
}

template <bool lifts>
DEVICE void turn_slowly(const uint32 (&x)[8][4], const float (&scales)[8], const float2* divisors, const float* lifts_of,
                        uint8* turned, int patch_row, int patch_col) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        int column = patch_col * 16 + j;
        float2 divisor = divisors[column];
        float q[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            q[r] = quotient<KIND, KIND_IN == 0, lifts>(__fmul_rn(number(x[r], j), scales[r]), divisor,
                                                       lifts ? lifts_of[column] : 1.0f);
        }
        uint2 codes = make_uint2(codes_of(q[0], q[1], q[2], q[3]), codes_of(q[4], q[5], q[6], q[7]));
        *reinterpret_cast<uint2*>(turned + chunk_at<16>(column, patch_row / 2) + patch_row % 2 * 8) = codes;
    }
}

#ifndef FEW_BLOCKS
#define FEW_BLOCKS 5
#endif
extern "C" __global__ void __launch_bounds__(FEW_THREADS, FEW_BLOCKS)
    requantize_columns(const __grid_constant__ Columns p) {
    __shared__ alignas(128) uint8 turned[GROUP * 128];
    __shared__ alignas(16) uint32 amaxima[FEW_THREADS / 32][128];
    __shared__ int sources[GROUP];
    __shared__ float scales_in[GROUP];
    __shared__ uint2 exponents[FEW_THREADS / 32];
    __shared__ alignas(16) float2 divisors[128];
    __shared__ float lifts_of[128];
    __shared__ alignas(16) uint16 factors[128];

    Place place = place_of(p);
    int t = threadIdx.x, warp = t / 32, lane = t % 32;
    int patch_col = lane % 8, patch_row = warp * 4 + lane / 8;

    // Thread t looks after row t, and later after column t.
    bool is_row = place.begin + t < place.end;
    int source = is_row ? source_of(p, place.begin + t) : 0;
    float scale_in = 0.0f;
    if (is_row)
        scale_in = load_scale<KIND_IN>(p.scale_in + bytes(p.scale_in_row, source) + bytes(p.scale_in_col, place.tile));
    uint32 x[8][4];
    int first = place.begin + patch_row * 8;
    const uint8* data = p.data + place.tile * 128 + patch_col * 16;
    if (GATHERS != 0) {
        sources[t] = source;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 8; ++r)
            load_global4(x[r], data + bytes(p.data_row, sources[patch_row * 8 + r]), first + r < place.end);
    } else {
        data += bytes(p.data_row, first);
#pragma unroll
        for (int r = 0; r < 8; ++r) load_global4(x[r], data + bytes(p.data_row, r), first + r < place.end);
    }

    scales_in[t] = scale_in;
    bool is_exact = false;
    uint32 top = 0;
    if (KIND_IN != 0 && KIND != 0) {
        uint32 exponent = bits_of(scale_in) >> 23;
        uint32 low = __reduce_min_sync(~0u, is_row ? exponent : 255), high = __reduce_max_sync(~0u, is_row ? exponent : 0);
        if (lane == 0) exponents[warp] = make_uint2(low, high);
    }
    __syncthreads();
    if (KIND_IN != 0 && KIND != 0) {
        uint32 bottom = 255;
#pragma unroll
        for (int w = 0; w < FEW_THREADS / 32; ++w) bottom = min(bottom, exponents[w].x), top = max(top, exponents[w].y);
        is_exact = bottom >= LOWEST_EXPONENT && top <= HIGHEST_EXPONENT && top - bottom <= LARGEST_SHIFT;
    }
    float scales[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) scales[r] = scales_in[patch_row * 8 + r];

    if (is_exact) {  // the same for all threads
        uint32 shifted[8][8], columns[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            // 2^(exponent - top) twice in FP16; a multiple of 2^-15, which is subnormal there.
            uint32 exponent = bits_of(scales[r]) >> 23;
            int shift = static_cast<int>(exponent) - static_cast<int>(top);
            uint32 factor = exponent == 0 ? 0u : shift >= -14 ? static_cast<uint32>(shift + 15) << 10 : 0x200u;
            factor |= factor << 16;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                halves_of(x[r][j], shifted[r][2 * j], shifted[r][2 * j + 1]);
                shifted[r][2 * j] = times_halves(shifted[r][2 * j], factor);
                shifted[r][2 * j + 1] = times_halves(shifted[r][2 * j + 1], factor);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                uint32 magnitude = shifted[r][j] & 0x7fff7fffu;
                columns[j] = r == 0 ? magnitude : max_u16x2(columns[j], magnitude);
            }
        }
        // Lanes l, l ^ 8, l ^ 16, l ^ 24 have the same columns: each ends up with two words of four.
        bool upper = lane & 8;
        uint32 part[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            part[j] = max_u16x2(upper ? columns[4 + j] : columns[j],
                                __shfl_xor_sync(~0u, upper ? columns[j] : columns[4 + j], 8));
        bool second = lane & 16;
#pragma unroll
        for (int j = 0; j < 2; ++j)
            part[j] = max_u16x2(second ? part[2 + j] : part[j],
                                __shfl_xor_sync(~0u, second ? part[j] : part[2 + j], 16));
        // Words of column pairs: patch_col * 8 + upper * 4 + second * 2.
        *reinterpret_cast<uint2*>(&amaxima[warp][patch_col * 8 + (upper ? 4 : 0) + (second ? 2 : 0)]) =
            make_uint2(part[0], part[1]);
        __syncthreads();
        uint32 amax = 0;
#pragma unroll
        for (int w = 0; w < FEW_THREADS / 32; ++w)
            amax = max(amax, static_cast<uint32>(reinterpret_cast<const uint16*>(amaxima[w])[t]));
        float scale = 1.0f;
        int shift = 0;
        uint32 factor = 0x3c00u;
        if (amax > 0x7c00u) {
            scale = float_of(NAN_BITS);
            factor = 0x7fffu;
        } else if (amax != 0) {
            scale = scale_of<KIND>(bits_of(__fmul_rn(low_half(amax), float_of(top << 23))));
            shift = static_cast<int>(top) - static_cast<int>(bits_of(scale) >> 23);
            factor = static_cast<uint32>(shift + 15) << 10;
        }
        factors[t] = static_cast<uint16>(factor);
        if (!__syncthreads_or(shift > LARGEST_SHIFT)) {
            store_scale<KIND>(scale_address(p, place, t), scale);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                uint32 pair = *reinterpret_cast<const uint32*>(&factors[patch_col * 16 + 2 * j]);
                uint32 codes[4];  // rows 2i, 2i + 1 of both columns
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    codes[i] = codes_of_halves(times_halves(shifted[2 * i][j], pair),
                                               times_halves(shifted[2 * i + 1][j], pair));
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    uint32 order = side == 0 ? 0x6420 : 0x7531;
                    uint2 word = make_uint2(__byte_perm(codes[0], codes[1], order), __byte_perm(codes[2], codes[3], order));
                    int column = patch_col * 16 + 2 * j + side;
                    *reinterpret_cast<uint2*>(turned + chunk_at<16>(column, patch_row / 2) + patch_row % 2 * 8) = word;
                }
            }
            __syncthreads();
            store_turned<16, FEW_THREADS>(p, place, turned);
            return;
        }
    }

#pragma unroll
    for (int j = 0; j < 16; ++j) {
        uint32 amax = 0;
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            amax = max(amax, bits_of(__fmul_rn(number(x[r], j), scales[r])) & 0x7fffffffu);
        }
        amax = max(amax, __shfl_xor_sync(~0u, amax, 8));
        amax = max(amax, __shfl_xor_sync(~0u, amax, 16));
        if (lane < 8) amaxima[warp][patch_col * 16 + j] = amax;
    }
    __syncthreads();
    uint32 amax = 0;
#pragma unroll
    for (int w = 0; w < FEW_THREADS / 32; ++w) amax = max(amax, amaxima[w][t]);
    float scale = scale_of<KIND>(amax);
    bool is_small;
    divisors[t] = divisor_of<KIND>(scale, is_small);
    store_scale<KIND>(scale_address(p, place, t), scale);
    lifts_of[t] = is_small ? LIFT : 1.0f;
    if (__syncthreads_or(is_small))
        turn_slowly<true>(x, scales, divisors, lifts_of, turned, patch_row, patch_col);
    else
        turn_slowly<false>(x, scales, divisors, lifts_of, turned, patch_row, patch_col);
    __syncthreads();
    store_turned<16, FEW_THREADS>(p, place, turned);
}

// What the two kernels share that write 128x1 groups, transposed: `quantize_columns.cu` from BF16, `requantize_columns.cu`
// from E4M3 data with 1x128 scales. Rows may be gathered and groups may restart at each expert. Bit for bit what
// `backends/triton/numerics.py` says; its docstring has the reasons.
//
// One block makes a tile of 128 rows by 128 columns. A thread keeps 8 rows of 8 or 16 columns in registers as they were
// read; each of the tile's scales is made by one thread and handed around in shared memory, where the result is also
// turned. Columns come in slabs, slab by slab over all rows: rows that are read several times are then found in the L2.
//
// columns_config.cuh, from `columns.py`: ROWS_TOO (also 1x128 groups of the same tile), GATHERS (0, or the bits of an
// index), KIND_IN, KIND_ROW, KIND, the kinds of the scales (0 FP32, 1 powers of two, 2 E8M0); THREADS of a
// block; TILES that it makes one after the other, where `slab` is a multiple of them.
// Columns: a multiple of 128. Rows: a multiple of 16, or groups that restart.
#pragma once

#include "columns_config.cuh"

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
static_assert(sizeof(Columns) == BYTES_OF_COLUMNS, "the host passes the same structure");

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
// The value itself; but what is computed from it is computed again, not held in a register from before.
DEVICE uint32 again(uint32 x) {
    asm volatile("" : "+r"(x));
    return x;
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

// Within one unit in the last place.
DEVICE float approximate_reciprocal(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
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

// 1 / scale in two parts, for x of at most 11 significant bits.
template <int kind>
DEVICE float2 parts_of_reciprocal(float scale) {
    uint32 bits = bits_of(scale);
    if (kind != 0) return make_float2(bits >= INFINITY_BITS ? scale : float_of(0x7f000000u - bits), 0.0f);
    float high = float_of(bits_of(approximate_reciprocal(scale)) - 4);
    return make_float2(high, __fmul_rn(__fmaf_rn(-high, scale, 1.0f), high));
}
template <int kind>
DEVICE float quotient(float x, float2 reciprocal) {
    return kind != 0 ? __fmul_rn(x, reciprocal.x) : __fmaf_rn(x, reciprocal.x, __fmul_rn(x, reciprocal.y));
}

// What divides any x: (lifted scale, its reciprocal); `is_small` where x has to be lifted as well.
template <int kind>
DEVICE float2 wide_divisor_of(float scale, bool& is_small) {
    is_small = false;
    if (kind != 0) return parts_of_reciprocal<kind>(scale);
    is_small = scale < SMALL;
    float lifted = is_small ? __fmul_rn(scale, LIFT) : scale;
    float inverse = approximate_reciprocal(lifted);
    inverse = __fmaf_rn(__fmaf_rn(-inverse, lifted, 1.0f), inverse, inverse);
    if ((bits_of(lifted) & 0x007fffffu) == 0x007fffffu) inverse = float_of(bits_of(inverse) + 1);
    return make_float2(lifted, inverse);
}
template <int kind, bool lifts>
DEVICE float wide_quotient(float x, float2 divisor, float lift) {
    if (kind != 0) return __fmul_rn(x, divisor.x);
    if (lifts) x = __fmul_rn(x, lift);
    float q = __fmul_rn(x, divisor.y);
    // The signs keep a negative zero: see numerics.py.
    q = __fmaf_rn(__fmaf_rn(q, divisor.x, -x), -divisor.y, q);
    return __fmaf_rn(__fmaf_rn(q, divisor.x, -x), -divisor.y, q);
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

// Stride times index, both 32 bits wide: one instruction with the addition.
DEVICE int64 bytes(uint32 stride, int index) {
    return static_cast<int64>(static_cast<unsigned long long>(stride) * static_cast<uint32>(index));
}

// Zeros where `is_there` is false.
DEVICE void load_global4(uint32 (&v)[4], const uint8* p, bool is_there) {
    v[0] = v[1] = v[2] = v[3] = 0;
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3]) : "l"(p), "r"(static_cast<uint32>(is_there)));
}
DEVICE void copy_global4(uint4* shared, const uint8* p, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32>(__cvta_generic_to_shared(shared))), "l"(p), "r"(is_there ? 16 : 0) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` groups of copies are under way.
template <int pending>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
DEVICE void store_global4(uint8* p, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void store_global2(uint8* p, uint2 v, bool is_there) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %3, 0;\n\t@p st.global.v2.u32 [%0], {%1, %2};\n\t}"
                 ::"l"(p), "r"(v.x), "r"(v.y), "r"(static_cast<uint32>(is_there)) : "memory");
}

// Where a block works ---------------------------------------------------------------------------------------------

struct Place {
    int tile, tiles;       // along the columns: the first, and how many follow one another
    int group;             // along the rows of the output
    int begin, end;        // rows that the group has
};

DEVICE Place place_of(const Columns& p) {
    int tiles = p.columns / 128, block = blockIdx.x, slab_blocks = p.groups * (p.slab / TILES);
    int slab = block / slab_blocks, within = block - slab * slab_blocks;
    int end = min((slab + 1) * p.slab, tiles), blocks = (end - slab * p.slab + TILES - 1) / TILES;
    int group = within / blocks, tile = slab * p.slab + (within - group * blocks) * TILES;
    Place place{tile, min(TILES, end - tile), group, 0, 0};
    if (p.experts == 0) {
        place.begin = group * GROUP;
        place.end = min(place.begin + GROUP, p.rows);
        return place;
    }
    // Expert e has scale rows from start_e / 128 + e on: fp8c.ops.scale_shape. Every warp looks for itself.
    int lane = threadIdx.x % 32, before = 0, start = 0, stop = 0, index = 0;
    for (int first = 0; first < p.experts; first += 32) {
        int e = first + lane;
        int own_end = e < p.experts ? __ldg(p.ends + e) : 0;
        int own_start = __shfl_up_sync(~0u, own_end, 1);
        if (lane == 0) own_start = before;
        uint32 candidates = __ballot_sync(~0u, e < p.experts && own_start / GROUP + e <= group);
        if (candidates == 0) break;
        int last = 31 - __clz(candidates);
        start = __shfl_sync(~0u, own_start, last), stop = __shfl_sync(~0u, own_end, last), index = first + last;
        before = __shfl_sync(~0u, own_end, 31);
    }
    place.begin = start + (group - (start / GROUP + index)) * GROUP;
    place.end = min(place.begin + GROUP, stop);
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

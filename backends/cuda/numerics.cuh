// What the fused kernels compute with: scales, quotients and codes bit for bit as backends/triton/numerics.py has them, where
// the reasons are. Numbers of the model are BF16, two in a 32-bit register, the first in its lower half: `pair`.
#pragma once

#include "ptx.cuh"

using int64 = long long;

enum Element { E4M3, E5M2, E5M6 };
enum Kind { FP32, POW2, E8M0 };

constexpr uint32 ALL_LANES = 0xffffffffu, INFINITY_BITS = 0x7f800000u, NAN_BITS = 0x7fc00000u;

// Stride times index, both 32 bits wide: one instruction with the addition to a pointer.
DEVICE uint64 offset(uint32 stride, uint32 index) { return static_cast<uint64>(stride) * index; }

// Pairs -----------------------------------------------------------------------------------------------------------

DEVICE float first_of(uint32 pair) { return __uint_as_float(pair << 16); }
DEVICE float second_of(uint32 pair) { return __uint_as_float(pair & 0xffff0000u); }

DEVICE uint32 rounded(float first, float second) { return pack_bf16(first, second); }

// A number rounded to BF16, as FP32.
DEVICE float as_rounded(float x) { return __uint_as_float(pack_bf16(0.0f, x)); }

// Rounded once: what multiplying in FP32 and rounding gives, too.
DEVICE uint32 times(uint32 a, uint32 b) {
    uint32 pair;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

// The larger magnitudes, NaN above all, with signs that mean nothing: one instruction, where clearing signs first takes three.
DEVICE uint32 larger(uint32 a, uint32 b) {
    uint32 pair;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
DEVICE uint32 larger_of(uint4 eight) { return larger(larger(eight.x, eight.y), larger(eight.z, eight.w)); }

// The larger magnitude of each of two pairs, side by side, without signs: their bits are ordered like the numbers.
DEVICE uint32 side_by_side(uint32 a, uint32 b) {
    return larger(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632)) & 0x7fff7fffu;
}
DEVICE uint32 larger_bits(uint32 a, uint32 b) {
    uint32 pair;
    asm("max.u16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

DEVICE uint32 smaller_bits(uint32 a, uint32 b) {
    uint32 pair;
    asm("min.u16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

// One step of a reduction over lanes in which each lane keeps one of two words and gives the other away.
DEVICE uint32 exchange_larger(uint32 a, uint32 b, int distance, bool keeps_second) {
    const uint32 kept = keeps_second ? b : a, given = keeps_second ? a : b;
    return larger_bits(kept, __shfl_xor_sync(ALL_LANES, given, distance));
}
DEVICE uint32 reduce_larger(uint32 word, int distance) {
    return larger_bits(word, __shfl_xor_sync(ALL_LANES, word, distance));
}

// Functions -------------------------------------------------------------------------------------------------------

DEVICE float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / (1 + exp(-x)), as backends/triton/swiglu.py approximates it.
DEVICE float sigmoid(float x) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__fmul_rn(x, -1.4426950408889634f)));
    return reciprocal_approximate(__fadd_rn(e, 1.0f));
}

// Codes -----------------------------------------------------------------------------------------------------------

// Four codes to FP32, the lowest byte first.
template <int ELEMENT>
DEVICE void decode(uint32 codes, float* x) {
    uint32 low, high;
    if constexpr (ELEMENT == E4M3) {
        asm("{\n\t.reg .b16 x, y;\n\tmov.b32 {x, y}, %2;\n\tcvt.rn.f16x2.e4m3x2 %0, x;\n\tcvt.rn.f16x2.e4m3x2 %1, y;\n\t}"
            : "=r"(low), "=r"(high)
            : "r"(codes));
    } else {
        asm("{\n\t.reg .b16 x, y;\n\tmov.b32 {x, y}, %2;\n\tcvt.rn.f16x2.e5m2x2 %0, x;\n\tcvt.rn.f16x2.e5m2x2 %1, y;\n\t}"
            : "=r"(low), "=r"(high)
            : "r"(codes));
    }
    asm("{\n\t.reg .b16 x, y;\n\tmov.b32 {x, y}, %2;\n\tcvt.f32.f16 %0, x;\n\tcvt.f32.f16 %1, y;\n\t}"
        : "=f"(x[0]), "=f"(x[1])
        : "r"(low));
    asm("{\n\t.reg .b16 x, y;\n\tmov.b32 {x, y}, %2;\n\tcvt.f32.f16 %0, x;\n\tcvt.f32.f16 %1, y;\n\t}"
        : "=f"(x[2]), "=f"(x[3])
        : "r"(high));
}

// Four numbers to codes, saturating; the first becomes the lowest byte.
template <int ELEMENT>
DEVICE uint32 encode(float a, float b, float c, float d) {
    uint32 codes;
    if constexpr (ELEMENT == E4M3) {
        asm("{\n\t.reg .b16 x, y;\n\tcvt.rn.satfinite.e4m3x2.f32 x, %2, %1;\n\tcvt.rn.satfinite.e4m3x2.f32 y, %4, %3;\n\t"
            "mov.b32 %0, {x, y};\n\t}"
            : "=r"(codes)
            : "f"(a), "f"(b), "f"(c), "f"(d));
    } else {
        asm("{\n\t.reg .b16 x, y;\n\tcvt.rn.satfinite.e5m2x2.f32 x, %2, %1;\n\tcvt.rn.satfinite.e5m2x2.f32 y, %4, %3;\n\t"
            "mov.b32 %0, {x, y};\n\t}"
            : "=r"(codes)
            : "f"(a), "f"(b), "f"(c), "f"(d));
    }
    return codes;
}

// Scales ----------------------------------------------------------------------------------------------------------

template <int ELEMENT, int KIND>
DEVICE float scale_of(float amax) {
    constexpr float LARGEST = ELEMENT == E4M3 ? 448.0f : ELEMENT == E5M2 ? 57344.0f : 65024.0f;
    constexpr float NEGATED_INVERSE = static_cast<float>(-1.0 / LARGEST);
    const uint32 amax_bits = __float_as_uint(amax);
    const float q = __fmul_rn(-amax, NEGATED_INVERSE);
    const float quotient = __fmaf_rn(__fmaf_rn(q, LARGEST, -amax), NEGATED_INVERSE, q);
    uint32 bits = __float_as_uint(fmaxf(quotient, 0x1p-126f));
    if constexpr (KIND != FP32) bits = (bits + 0x007fffffu) & INFINITY_BITS;
    bits = amax_bits == 0 ? 0x3f800000u : bits;
    return __uint_as_float(amax_bits >= INFINITY_BITS ? NAN_BITS : bits);
}

template <int KIND>
DEVICE void store_scale(void* scales, uint64 index, float scale) {
    if constexpr (KIND == E8M0) {
        static_cast<uint8*>(scales)[index] = static_cast<uint8>(__float_as_uint(scale) >> 23);
    } else {
        static_cast<float*>(scales)[index] = scale;
    }
}
// Four at a time, where the index is a multiple of four.
template <int KIND>
DEVICE void store_scales(void* scales, uint64 index, float4 x) {
    if constexpr (KIND == E8M0) {
        const uint32 low = __float_as_uint(x.x) >> 23 | __float_as_uint(x.y) >> 23 << 8;
        *reinterpret_cast<uint32*>(static_cast<uint8*>(scales) + index) = low | __float_as_uint(x.z) >> 23 << 16 | __float_as_uint(x.w) >> 23 << 24;
    } else {
        *reinterpret_cast<float4*>(static_cast<float*>(scales) + index) = x;
    }
}
template <int KIND>
DEVICE float load_scale(const void* scales, uint64 index) {
    if constexpr (KIND == E8M0) {
        const uint32 exponent = static_cast<const uint8*>(scales)[index];
        return __uint_as_float(exponent == 0xff ? NAN_BITS : exponent == 0 ? 0x00400000u : exponent << 23);
    } else {
        return static_cast<const float*>(scales)[index];
    }
}

// 1 / scale: the sum of both where the kind is FP32, else `high` alone.
struct Reciprocal {
    float high, low;
};
template <int KIND>
DEVICE Reciprocal reciprocal(float scale) {
    if constexpr (KIND == FP32) {
        const float high = __uint_as_float(__float_as_uint(reciprocal_approximate(scale)) - 4);
        return {high, __fmul_rn(__fmaf_rn(-high, scale, 1.0f), high)};
    } else {
        const uint32 bits = __float_as_uint(scale);
        return {__uint_as_float(bits >= INFINITY_BITS ? bits : 0x7f000000u - bits), 0.0f};
    }
}
// Of the lane with this number among 16.
template <int KIND>
DEVICE Reciprocal reciprocal_of_lane(Reciprocal r, int lane) {
    return {__shfl_sync(ALL_LANES, r.high, lane, 16), KIND == FP32 ? __shfl_sync(ALL_LANES, r.low, lane, 16) : 0.0f};
}
template <int KIND>
DEVICE float quotient(float x, Reciprocal r) {
    if constexpr (KIND == FP32) return __fmaf_rn(x, r.high, __fmul_rn(x, r.low));
    return __fmul_rn(x, r.high);
}

// Two numbers of two groups. Where the reciprocals are powers of two, the quotients are BF16 numbers, or far too small for a
// code but zero: one instruction for both.
template <int KIND>
DEVICE void quotients(uint32 pair, Reciprocal a, Reciprocal b, float& first, float& second) {
    if constexpr (KIND == FP32) {
        first = quotient<KIND>(first_of(pair), a), second = quotient<KIND>(second_of(pair), b);
    } else {
        const uint32 both = times(pair, __byte_perm(__float_as_uint(a.high), __float_as_uint(b.high), 0x7632));
        first = first_of(both), second = second_of(both);
    }
}

// Eight numbers of one group to codes.
template <int ELEMENT, int KIND>
DEVICE uint2 codes_of(uint4 x, Reciprocal r) {
    float q[8];
    quotients<KIND>(x.x, r, r, q[0], q[1]);
    quotients<KIND>(x.y, r, r, q[2], q[3]);
    quotients<KIND>(x.z, r, r, q[4], q[5]);
    quotients<KIND>(x.w, r, r, q[6], q[7]);
    return {encode<ELEMENT>(q[0], q[1], q[2], q[3]), encode<ELEMENT>(q[4], q[5], q[6], q[7])};
}

// Copies that don't wait ------------------------------------------------------------------------------------------
// To shared memory. A thread waits for its own copies; what others copied it may read behind a barrier.

template <int BYTES>
DEVICE void copy_async(uint32 to, const void* from, bool exists) {  // zeros where it doesn't
    const int read = exists ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(read) : "memory");
    }
}
template <int BYTES>
DEVICE void copy_async(void* to, const void* from, bool exists) {
    copy_async<BYTES>(shared_address(to), from, exists);
}
// Arrives at a barrier of shared memory when this thread's copies so far are done; the barrier counts on it.
DEVICE void copies_arrive(uint32 barrier) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory"); }
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// From shared memory, whatever has been read before: so it takes no registers in between.
DEVICE uint4 read_again(const uint4& x) {
    uint4 y;
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                 : "r"(shared_address(&x)));
    return y;
}

// A store that depends on a predicate, not a branch: what is stored is computed beside what comes after it.
DEVICE void store_if(bool exists, void* to, uint2 x) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %0, 0;\n\t@p st.global.v2.u32 [%1], {%2, %3};\n\t}" ::"r"(static_cast<uint32>(exists)),
                 "l"(to), "r"(x.x), "r"(x.y));
}

// E4M3 numbers as FP16, two at a time.
#pragma once

#include "numerics.cuh"

constexpr int LARGEST_SHIFT = 15;

// Exponents of scales that are far enough from FP32's smallest and largest.
constexpr int LOWEST_EXPONENT = 127 - 60, HIGHEST_EXPONENT = 127 + 60;

DEVICE uint32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32 x) { return __uint_as_float(x); }

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
// The larger magnitudes, NaN above all, with signs that mean nothing.
DEVICE uint32 larger_halves(uint32 a, uint32 b) {
    uint32 d;
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// Two FP16 pairs as E4M3 codes.
DEVICE uint32 codes_of_halves(uint32 a, uint32 b) {
    uint32 packed;
    asm("{\n\t.reg .b16 low, high;\n\tcvt.rn.satfinite.e4m3x2.f16x2 low, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f16x2 high, %2;\n\tmov.b32 %0, {low, high};\n\t}"
        : "=r"(packed) : "r"(a), "r"(b));
    return packed;
}
DEVICE uint32 twice_half(float x) {
    uint32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(x));
    return pair;
}
DEVICE float low_half(uint32 x) {
    float f;
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %1;\n\tcvt.f32.f16 %0, l;\n\t}" : "=f"(f) : "r"(x));
    return f;
}

// Quotients of BF16 numbers by the scale of their group, in as few instructions as give the codes that division gives.
//
// E4M3 with FP32 scales: x / scale takes one multiplication, rounded toward zero, by a factor that depends on the significand
// of the group's maximum: a code can only differ where the quotient is next to a number half way between two codes, and
// then 2^k x is an odd multiple of the maximum. All pairs of significands were tried (tests/backends/cuda/test_factors.py).
// For three of the 128 no factor will do: they take the reciprocal as a sum of two, and so does the warp that meets one.
#pragma once

#include "numerics.cuh"

// For maxima from 1 to 2, by the 7 bits behind the first; negative: not alone.
__device__ const uint32 FACTORS[128] = {
    0x43dfffff, 0x43de437a, 0x43dc8dc9, 0x43dadec8, 0x43d9364e, 0x43d79436, 0x43d5f85c, 0x43d4629b,
    0x43d2d2d3, 0x43d148e1, 0x43cfc4a4, 0x43ce45fd, 0x43cccccd, 0x43cb58f7, 0x43c9ea5d, 0x43c880e6,
    0x43c71c72, 0x43c5bcea, 0x43c46232, 0x43c30c31, 0x43c1bad0, 0x43c06df5, 0x43bf258c, 0x43bde17c,
    0x43bca1b0, 0x43bb6611, 0x43ba2e8c, 0x43b8fb0c, 0x43b7cb7c, 0x43b69fcc, 0x43b577e7, 0x43b453ba,
    0x43b33334, 0x43b21643, 0x43b0fcd7, 0x43afe6df, 0x43aed44b, 0x43adc50b, 0x43acb910, 0x43abb04a,
    0x43aaaaab, 0x43a9a825, 0x43a8a8a9, 0x43a7ac2a, 0x43a6b29b, 0x43a5bbef, 0x43a4c818, 0x43a3d70b,
    0x43a2e8bb, 0x43a1fd1c, 0x43a11423, 0x43a02dc4, 0x439f49f5, 0x439e68aa, 0x439d89d9, 0x439cad77,
    0x439bd37b, 0x439afbda, 0x439a268a, 0x43995383, 0x439882ba, 0x4397b426, 0x4396e7c0, 0x43961d7d,
    0x43955556, 0x43948f41, 0x4393cb38, 0x43930931, 0x43924925, 0x43918b0c, 0x4390cedf, 0x43901496,
    0x438f5c29, 0x438ea593, 0x438df0cb, 0xc38d3dcb, 0x438c8c8d, 0x438bdd09, 0x438b2f3a, 0x438a8318,
    0x4389d89e, 0x43892fc6, 0x43888889, 0x4387e2e2, 0x43873ecb, 0x43869c3f, 0x4385fb38, 0x43855bb0,
    0xc384bda1, 0x43842109, 0x438385e0, 0x4382ec21, 0xc38253c8, 0x4381bcd1, 0x43812736, 0x438092f2,
    0x43800000, 0x437edcbb, 0x437dbc0a, 0x437c9de4, 0x437b823e, 0x437a6916, 0x4379525e, 0x43783e10,
    0x43772c24, 0x43761c92, 0x43750f52, 0x4374045b, 0x4372fbaa, 0x4371f533, 0x4370f0f1, 0x436feedd,
    0x436eeeef, 0x436df122, 0x436cf56b, 0x436bfbca, 0x436b0433, 0x436a0ea1, 0x43691b0f, 0x43682976,
    0x436739d0, 0x43664c14, 0x43656042, 0x43647650, 0x43638e39, 0x4362a7f8, 0x4361c388, 0x4360e0e2};

constexpr uint32 UNITS_BELOW = 8;  // by which a reciprocal's first part is below the factor, so that the second is positive

// What divides the numbers of a group: a factor (1 / scale where that is a power of two), and the second part of the reciprocal.
struct Divisor {
    float factor, low;
    bool takes_both;
};

template <int ELEMENT, int KIND>
DEVICE Divisor divisor_of(float amax, float scale) {
    if constexpr (KIND != FP32) return {reciprocal<KIND>(scale).high, 0.0f, false};
    const uint32 bits = __float_as_uint(amax);
    if (bits == 0) return {1.0f, 0.0f, false};
    uint32 factor;
    bool takes_both = true;
    if constexpr (ELEMENT == E4M3) {
        factor = __ldg(FACTORS + (bits >> 16 & 0x7f));
        takes_both = factor >> 31;
        factor = (factor & 0x7fffffffu) - (bits & INFINITY_BITS) + 0x3f800000u;
    } else {
        factor = __float_as_uint(reciprocal_approximate(scale));
    }
    if (__float_as_uint(scale) == 0x00800000u) factor = 0x7e800000u, takes_both = false;  // the smallest scale stands for any below
    if (bits >= INFINITY_BITS) factor = NAN_BITS, takes_both = false;
    const float high = __uint_as_float(factor - UNITS_BELOW);
    return {__uint_as_float(factor), __fmul_rn(__fmaf_rn(-high, scale, 1.0f), high), takes_both};
}

// Eight numbers of one group to codes. BOTH: some group of the warp takes both parts.
template <int ELEMENT, int KIND, bool BOTH>
DEVICE uint2 codes_by(uint4 x, float factor, float low) {
    if constexpr (KIND != FP32) return codes_of<ELEMENT, KIND>(x, {factor, low});
    if constexpr (BOTH) return codes_of<ELEMENT, KIND>(x, {__uint_as_float(__float_as_uint(factor) - UNITS_BELOW), low});
    return {encode<ELEMENT>(__fmul_rz(first_of(x.x), factor), __fmul_rz(second_of(x.x), factor), __fmul_rz(first_of(x.y), factor),
                            __fmul_rz(second_of(x.y), factor)),
            encode<ELEMENT>(__fmul_rz(first_of(x.z), factor), __fmul_rz(second_of(x.z), factor), __fmul_rz(first_of(x.w), factor),
                            __fmul_rz(second_of(x.w), factor))};
}

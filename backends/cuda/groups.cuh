// Groups of 128 rows that restart at each expert.
#pragma once

#include "numerics.cuh"

constexpr int GROUP = 128;

struct Rows {
    int begin, end;
};

// The rows of a group; none where no expert owns it. Expert e has scale rows from start_e / 128 + e on: fp8c.ops.scale_shape.
// Every warp looks for itself. `ends`: [experts] cumulative.
DEVICE Rows rows_of(const int* ends, int experts, int group) {
    const int lane = threadIdx.x % 32;
    int before = 0, start = 0, stop = 0, index = 0;
    for (int first = 0; first < experts; first += 32) {
        const int e = first + lane;
        const int own_end = e < experts ? __ldg(ends + e) : 0;
        int own_start = __shfl_up_sync(ALL_LANES, own_end, 1);
        if (lane == 0) own_start = before;
        const uint32 candidates = __ballot_sync(ALL_LANES, e < experts && own_start / GROUP + e <= group);
        if (candidates == 0) break;
        const int last = 31 - __clz(candidates);
        start = __shfl_sync(ALL_LANES, own_start, last), stop = __shfl_sync(ALL_LANES, own_end, last), index = first + last;
        before = __shfl_sync(ALL_LANES, own_end, 31);
    }
    const int begin = start + (group - (start / GROUP + index)) * GROUP;
    return {begin, min(begin + GROUP, stop)};
}

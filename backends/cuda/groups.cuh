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

struct Group {
    Rows rows;
    int index;
};

// The nth group when those that have rows come before those that have none. Every warp looks for itself.
DEVICE Group filled_first(const int* ends, int experts, int groups, int nth) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int empty = 0; empty < 2; empty++) {
#pragma unroll 1
        for (int first = 0; first < experts; first += 32) {
            const int e = first + lane;
            const bool exists = e < experts;
            const int start = exists && e > 0 ? __ldg(ends + e - 1) : 0, end = exists ? __ldg(ends + e) : 0;
            const int index = start / GROUP + e, next = e + 1 < experts ? end / GROUP + e + 1 : groups;
            const int filled = (end - start + GROUP - 1) / GROUP, own = !exists ? 0 : empty != 0 ? next - index - filled : filled;
            int sum = own;  // of the lanes up to this one
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(ALL_LANES, sum, step);
                if (lane >= step) sum += other;
            }
            const uint32 candidates = __ballot_sync(ALL_LANES, nth < sum);
            if (candidates != 0) {
                const int owner = __ffs(candidates) - 1, before = sum - own - (empty != 0 ? filled : 0);
                const int within = nth - __shfl_sync(ALL_LANES, before, owner);
                const int begin = __shfl_sync(ALL_LANES, start, owner) + within * GROUP, stop = __shfl_sync(ALL_LANES, end, owner);
                return {{begin, min(begin + GROUP, stop)}, __shfl_sync(ALL_LANES, index, owner) + within};
            }
            nth -= __shfl_sync(ALL_LANES, sum, 31);
        }
    }
    return {{0, 0}, 0};
}

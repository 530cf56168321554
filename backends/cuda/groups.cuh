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

// The group with this index among those with rows, or among those without (EMPTY). Where there are not so many, the index is less by
// their number. Every warp looks for itself.
struct Found {
    bool exists;
    int group;
    Rows rows;
};
template <bool EMPTY>
DEVICE Found find_group(const int* ends, int experts, int groups, int& index) {
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int first = 0; first < experts; first += 32) {
        const int e = first + lane, end = e < experts ? __ldg(ends + e) : 0;
        int begin = __shfl_up_sync(ALL_LANES, end, 1);
        if (lane == 0) begin = before;
        // An expert's groups with rows, behind them those up to the next expert's first one.
        const int own = begin / GROUP + e, empty = own + (end - begin + GROUP - 1) / GROUP;
        const int next = e + 1 < experts ? end / GROUP + e + 1 : groups;
        const int count = e >= experts ? 0 : EMPTY ? next - empty : empty - own;
        int sum = count;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int more = __shfl_up_sync(ALL_LANES, sum, step);
            if (lane >= step) sum += more;
        }
        const int total = __shfl_sync(ALL_LANES, sum, 31);
        if (index < total) {
            const int expert = __ffs(__ballot_sync(ALL_LANES, sum > index)) - 1;
            const int further = index - __shfl_sync(ALL_LANES, sum - count, expert);
            const int group = __shfl_sync(ALL_LANES, EMPTY ? empty : own, expert) + further;
            const int from = __shfl_sync(ALL_LANES, begin, expert) + further * GROUP, to = __shfl_sync(ALL_LANES, end, expert);
            return {true, group, EMPTY ? Rows{0, 0} : Rows{from, min(from + GROUP, to)}};
        }
        index -= total;
        before = __shfl_sync(ALL_LANES, end, 31);
    }
    return {false, 0, {0, 0}};
}

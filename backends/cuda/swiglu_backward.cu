// SwiGLU computed again from its cached inputs and differentiated: h along columns, the gradient of gate and up along rows and
// columns, the gradient of the router's weight. fp8c/ops/swiglu.py says what is computed.
//
// Legend: R rows, F features, E experts. A tile is 128 rows by 128 features: one group of each row and of each column. Blocks
//   stay and take one tile after another, in two rounds:
//     1. half a warp computes 8 features of all 128 rows, 4 at a time; a lane has 8 rows that follow each other. So the maxima
//        of columns are exchanged between lanes, and because rows of a column are stored next to each other, a lane's codes
//        are stored as they come. The gradients of gate and up go to shared memory too, where dh and the codes were. The next
//        tile's codes are fetched meanwhile
//     2. a warp has 16 rows, half a warp each second of them, a lane 8 columns; when they have been read, the same rows of the
//        next tile's dh are fetched to where they were, and arrive while rows are quantized
//   Between rounds warps wait for what they need, not for each other's last instruction. Each input is read once, so the bytes
//   moved are those that must be. The SMs don't get the same share of the memory's bandwidth: tiles are claimed.

#include "config.cuh"
#include "groups.cuh"
#include "numerics.cuh"

struct Arguments {
    const uint16* dh;
    const uint8* c;
    const void* cs;
    const float* weight;  // of each row, where WEIGHTED
    const int* ends;      // of each expert's rows, where EXPERTS: groups restart there
    uint8* d;
    void* ds;
    float* dweight;  // [F / 128, R], to be added up
    uint8* h;
    void* hs;
    uint8* dt;
    void* dts;
    // Strides have 32 bits, and what they are multiplied with, too.
    uint32 cs_row, cs_col, ds_row, ds_col, hs_row, dts_row;  // hs and dts have columns next to each other
    uint32 dh_row, c_row, d_row, h_col, dt_col;
    int R, F, E, groups;
    int* claimed;  // how many tiles have been claimed, but for each block's first two
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES_OF_HOST, "host and kernel disagree on the arguments");

enum Results { H, GATE, UP };

constexpr int ROWS = 8, COLUMNS = 4, PASSES = 2;  // of a thread
constexpr int SLICES = 16, SUMS = 137;  // of 8 columns; numbers of a slice, and some between

struct Tile {
    int begin, end;  // rows
    int group, tile;
};
DEVICE uint4 packed(const Tile& t) {
    return {static_cast<uint32>(t.begin), static_cast<uint32>(t.end), static_cast<uint32>(t.group), static_cast<uint32>(t.tile)};
}
DEVICE Tile unpacked(uint4 t) {
    return {static_cast<int>(t.x), static_cast<int>(t.y), static_cast<int>(t.z), static_cast<int>(t.w)};
}
DEVICE bool is_tile(const Tile& t) { return t.tile >= 0; }  // not past the last
DEVICE bool has_rows(const Tile& t) { return t.begin < t.end; }

struct Shared {
    uint4 dh[128][16];     // of 8 columns; the gradient of gate takes the place of what has been read
    uint4 codes[2][2][128][8];  // of gate, of up, of 16 columns; the gradient of up. Of the tile at work and the next, as `row_in`
    float sums[SLICES][SUMS];  // of terms of 8 columns; at row % 8 * 17 + row / 8, so that banks differ
    float4 row_in[2][8][16];  // scales of gate and up, the weight; of row % 8, row / 8
    Reciprocal of_row[128][2];
    union {
        Reciprocal of_col[2][3][COLUMNS];  // of the columns at work
        float scales[3][16];  // of a warp's columns
    } columns[THREADS / 32];
    uint4 tiles[4];  // each a `Tile`: at work, the next, the one after it. Here, they take no registers
    uint64 fetched, computed;  // a tile's inputs are there, and all have read the one before; round 1 is over
};
static_assert(sizeof(Shared) == SHARED_BYTES_OF_HOST, "config and kernel disagree on the layout of shared memory");

// Tiles in order, those of a group one after another; groups without rows, which take no time, come last. Groups past
// `a.groups` are rows of no expert: in no group of columns, but with groups of their own.
DEVICE Tile tile_of(const Arguments& a, int index) {
    const int nth = index / (a.F / 128), tile = index % (a.F / 128);
    if constexpr (!EXPERTS) return {nth * 128, min(nth * 128 + 128, a.R), nth, tile};
    if (nth >= a.groups) {
        const int begin = __ldg(a.ends + a.E - 1) + (nth - a.groups) * 128;
        return {begin, min(begin + 128, a.R), nth, tile};
    }
    const Group group = filled_first(a.ends, a.E, a.groups, nth);
    return {group.rows.begin, group.rows.end, group.index, tile};
}
DEVICE uint4 tile_or_none(const Arguments& a, int index, int count) {
    return packed(index < count ? tile_of(a, index) : Tile{0, 0, 0, -1});
}
DEVICE Tile tile_at(const Shared& shared, uint32 turn) { return unpacked(read_again(shared.tiles[turn % 4])); }

// In round 2 a warp has 16 rows, half a warp each second of them.
DEVICE uint32 first_row(uint32 thread) { return thread / 32 * 16 + thread / 16 % 2; }

// Rows that lanes read at once are 8 apart: their chunks of 16 bytes are moved so that no bank is met twice.
DEVICE uint32 moved(uint32 chunk, uint32 row) { return chunk ^ row / 8 % 8; }
// Where a chunk is that many rows further on, a power of two that `row` is below or a multiple of it: so `row` is looked at once.
template <int BYTES_OF_ROW>
DEVICE uint32 moved_on(uint32 at_row, int more) { return (at_row ^ more / 8 % 8 * 16) + more * BYTES_OF_ROW; }

// A warp fetches the rows that it has read itself.
DEVICE void fetch_gradient(Shared& shared, const Arguments& a, const Tile& tile) {
    const uint32 thread = thread_index_again(), chunk = thread % 16, first = first_row(thread);
    const uint16* dh = a.dh + offset(a.dh_row, tile.begin + first) + (tile.tile * 128 + chunk * 8);
    const uint32 to = shared_address(&shared.dh[first][moved(chunk, first)]);
    const int rows = tile.end - tile.begin - static_cast<int>(first);
#pragma unroll
    for (int i = 0; i < 16; i += 2) copy_async<16>(moved_on<256>(to, i), dh + offset(a.dh_row, i), i < rows);
}
DEVICE void fetch_codes(Shared& shared, const Arguments& a, const Tile& tile, uint32 stage) {
    const uint32 thread = thread_index_again(), chunk = thread % 8, first = thread / 8;
    const uint8 *gate = a.c + offset(a.c_row, tile.begin + first) + (tile.tile * 128 + chunk * 16), *up = gate + a.F;
    const uint32 to = shared_address(&shared.codes[stage][0][first][moved(chunk, first)]);
    const int rows = tile.end - tile.begin - static_cast<int>(first);
#pragma unroll
    for (int i = 0; i < 128; i += THREADS / 8) {
        copy_async<16>(moved_on<128>(to, i), gate + offset(a.c_row, i), i < rows);
        copy_async<16>(moved_on<128>(to, i) + 128 * 128, up + offset(a.c_row, i), i < rows);
    }
}
// And for what every feature of a row needs. Bytes of E8M0 must be made FP32, so they are waited for.
DEVICE void fetch_row_inputs(Shared& shared, const Arguments& a, const Tile& tile, uint32 stage) {
    const uint32 thread = thread_index_again();
    if (thread >= 128) return;
    const uint32 row = tile.begin + thread;
    const uint64 gate = offset(a.cs_row, row) + offset(a.cs_col, tile.tile), up = gate + offset(a.cs_col, a.F / 128);
    const bool exists = static_cast<int>(row) < tile.end;
    float4& in = shared.row_in[stage][thread % 8][thread / 8];
    if constexpr (KIND_C == E8M0) {
        in.x = exists ? load_scale<KIND_C>(a.cs, gate) : 0.0f;
        in.y = exists ? load_scale<KIND_C>(a.cs, up) : 0.0f;
    } else {
        copy_async<4>(shared_address(&in.x), static_cast<const float*>(a.cs) + gate, exists);
        copy_async<4>(shared_address(&in.y), static_cast<const float*>(a.cs) + up, exists);
    }
    if constexpr (WEIGHTED) copy_async<4>(shared_address(&in.z), a.weight + row, exists);
}
// Of a thread that has started its copies: when they are done, and for what it has stored and read itself. Here and below every thread
// arrives, which takes no longer than one of each warp behind a __syncwarp, and racecheck can follow it.
DEVICE void arrive_fetched(Shared& shared) {
    copies_arrive(shared_address(&shared.fetched));
    barrier_arrive(shared_address(&shared.fetched));
}

struct Gradients {
    uint32 h, gate, up;
};

// Two features of a row, each step rounded as the model's operators round. `terms` collects the gradient of the weight.
DEVICE Gradients differentiate(uint32 dh, float gate0, float gate1, float up0, float up1, const float4& in, float& terms) {
    const float g0 = as_rounded(__fmul_rn(gate0, in.x)), g1 = as_rounded(__fmul_rn(gate1, in.x));
    const uint32 up = rounded(__fmul_rn(up0, in.y), __fmul_rn(up1, in.y));
    const float s0 = sigmoid(g0), s1 = sigmoid(g1), silu0 = __fmul_rn(g0, s0), silu1 = __fmul_rn(g1, s1);
    const uint32 silu = rounded(silu0, silu1), product = times(silu, up);
    uint32 dproduct = dh, h = product;
    if constexpr (WEIGHTED) {
        const float p0 = first_of(product), p1 = second_of(product), d0 = first_of(dh), d1 = second_of(dh);
        terms = __fmaf_rn(d1, p1, __fmaf_rn(d0, p0, terms));
        h = rounded(__fmul_rn(p0, in.z), __fmul_rn(p1, in.z));
        dproduct = rounded(__fmul_rn(d0, in.z), __fmul_rn(d1, in.z));
    }
    const uint32 dsilu = times(dproduct, up);
    const float dg0 = __fmul_rn(first_of(dsilu), __fmaf_rn(silu0, __fadd_rn(1.0f, -s0), s0));
    const float dg1 = __fmul_rn(second_of(dsilu), __fmaf_rn(silu1, __fadd_rn(1.0f, -s1), s1));
    return {h, rounded(dg0, dg1), times(dproduct, silu)};
}

// Two columns of a result, 8 rows of each.
template <int ELEMENT_R, int KIND_R>
DEVICE void store_pair(const uint32 (&x)[ROWS][2], int word, const Reciprocal* of, uint8* to, uint32 col) {
    const float4 two = *reinterpret_cast<const float4*>(of + 2 * word);
    const Reciprocal first = {two.x, two.y}, second = {two.z, two.w};
    float q[2][ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) quotients<KIND_R>(x[r][word], first, second, q[0][r], q[1][r]);
#pragma unroll
    for (int k = 0; k < 2; k++)
        *reinterpret_cast<uint2*>(to + offset(col, 2 * word + k)) =
            uint2{encode<ELEMENT_R>(q[k][0], q[k][1], q[k][2], q[k][3]), encode<ELEMENT_R>(q[k][4], q[k][5], q[k][6], q[k][7])};
}

// Round 1: half a warp has 8 columns, 4 at a time; a lane has 8 rows of them.
DEVICE void compute(Shared& shared, const Arguments& a, uint32 turn) {
    const uint32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = lane / 8 % 2, block = lane % 8 + lane / 16 * 8;
    // Of the 24 columns of a pass a lane makes the scale of one.
    const bool bit16 = lane & 16, bit4 = lane & 4, bit2 = lane & 2, bit1 = lane & 1;
    const uint32 word = (bit16 ? 3 : 0) + (bit2 ? 2 : bit4 ? 1 : 0), result = word / 2, column = word % 2 * 2 + bit1;
    float scales[PASSES];
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        const uint32 part = pass ^ half;  // of the 8 columns
        uint2* dh = reinterpret_cast<uint2*>(&shared.dh[block * ROWS][moved(warp * 2 + half, block * ROWS)]) + part;
        uint32* gate = reinterpret_cast<uint32*>(&shared.codes[turn % 2][0][block * ROWS][moved(warp, block * ROWS)]) + half * 2 + part;
        uint32* up = gate + 128 * 8 * 4;
        uint32 x[3][ROWS][2], amax[3][2];
        // Of the next row, before this one's results are stored: the compiler can't know that they are elsewhere.
        uint2 next_two = dh[0];
        uint32 next_gate = gate[0], next_up = up[0];
        float4 next_in = shared.row_in[turn % 2][0][block];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint2 two = next_two;
            float g[4], u[4];
            decode<ELEMENT_C>(next_gate, g);
            decode<ELEMENT_C>(next_up, u);
            const float4 in = next_in;
            if (r + 1 < ROWS) {
                next_two = dh[r * 32 + 32], next_gate = gate[r * 32 + 32], next_up = up[r * 32 + 32];
                next_in = shared.row_in[turn % 2][r + 1][block];
            }
            float& sum = shared.sums[warp * 2 + half][r * 17 + block];
            float terms = WEIGHTED && pass > 0 ? sum : 0.0f;
            const Gradients p = differentiate(two.x, g[0], g[1], u[0], u[1], in, terms);
            const Gradients q = differentiate(two.y, g[2], g[3], u[2], u[3], in, terms);
            x[H][r][0] = p.h, x[H][r][1] = q.h, x[GATE][r][0] = p.gate, x[GATE][r][1] = q.gate, x[UP][r][0] = p.up, x[UP][r][1] = q.up;
            dh[r * 32] = {p.gate, q.gate};
            gate[r * 32] = p.up, up[r * 32] = q.up;
#pragma unroll
            for (int k = 0; k < 3; k++)
#pragma unroll
                for (int i = 0; i < 2; i++) amax[k][i] = r == 0 ? x[k][r][i] : larger(amax[k][i], x[k][r][i]);
            if constexpr (WEIGHTED) sum = terms;
        }
        if (pass == PASSES - 1) {
            barrier_arrive(shared_address(&shared.computed));
        }
        // Over the 16 lanes of a column. A lane ends up with the pair of columns that `word` says.
        uint32 three[3];
#pragma unroll
        for (int k = 0; k < 3; k++) {
            const int first = k, second = k + 3;
            three[k] = exchange_larger(amax[first / 2][first % 2] & 0x7fff7fffu, amax[second / 2][second % 2] & 0x7fff7fffu, 16, bit16);
        }
        const uint32 one = exchange_larger(three[0], three[1], 4, bit4), other = reduce_larger(three[2], 4);
        const uint32 pair = reduce_larger(exchange_larger(one, other, 2, bit2), 1);
        const float most = bit1 ? second_of(pair) : first_of(pair);
        float scale;
        Reciprocal own;
        if (ELEMENT_H == ELEMENT_T && KIND_H == KIND_T) {
            scale = scale_of<ELEMENT_T, KIND_T>(most), own = reciprocal<KIND_T>(scale);
        } else if (result == H) {
            scale = scale_of<ELEMENT_H, KIND_H>(most), own = reciprocal<KIND_H>(scale);
        } else {
            scale = scale_of<ELEMENT_T, KIND_T>(most), own = reciprocal<KIND_T>(scale);
        }
        const Tile tile = tile_at(shared, turn);
        const bool is_group = tile.group < a.groups;
        const uint32 first = tile.tile * 128 + warp * 16 + half * 8 + part * COLUMNS;
        scales[0] = scales[1], scales[1] = scale;
        shared.columns[warp].of_col[half][result][column] = own;
        __syncwarp();
        const uint32 row = tile.group * 128 + block * ROWS;
        if (is_group && (EXPERTS || static_cast<int>(row) < a.R)) {
            uint8 *h = a.h + offset(a.h_col, first) + row, *gate = a.dt + offset(a.dt_col, first) + row, *up = gate + offset(a.dt_col, a.F);
            const Reciprocal(&of)[3][COLUMNS] = shared.columns[warp].of_col[half];
#pragma unroll
            for (int i = 0; i < 2; i++) store_pair<ELEMENT_H, KIND_H>(x[H], i, of[H], h, a.h_col);
#pragma unroll
            for (int i = 0; i < 2; i++) store_pair<ELEMENT_T, KIND_T>(x[GATE], i, of[GATE], gate, a.dt_col);
#pragma unroll
            for (int i = 0; i < 2; i++) store_pair<ELEMENT_T, KIND_T>(x[UP], i, of[UP], up, a.dt_col);
        }
        __syncwarp();
    }
    // By 16 bytes, so that the L2 cache sees no halves of sectors.
    float* scales_of_half = &shared.columns[warp].scales[result][half * 8 + column];
    scales_of_half[half * COLUMNS] = scales[0], scales_of_half[(half ^ 1) * COLUMNS] = scales[1];
    __syncwarp();
    const Tile tile = tile_at(shared, turn);
    if (lane < 12 && tile.group < a.groups) {
        const uint32 first = tile.tile * 128 + warp * 16 + lane % 4 * 4;
        const float4 four = *reinterpret_cast<const float4*>(&shared.columns[warp].scales[lane / 4][lane % 4 * 4]);
        if (lane / 4 == H)
            store_scales<KIND_H>(a.hs, offset(a.hs_row, tile.group) + first, four);
        else
            store_scales<KIND_T>(a.dts, offset(a.dts_row, tile.group) + first + (lane / 4 == UP ? a.F : 0), four);
    }
    __syncwarp();
}

// A group without rows: zeros. A thread has 16 bytes of each 32nd column.
DEVICE void clear(Shared& shared, const Arguments& a, uint32 turn) {
    const Tile tile = tile_at(shared, turn);
    const uint32 thread = thread_index_again(), first = tile.tile * 128, row = tile.group * 128 + thread % 8 * 16;
#pragma unroll 1
    for (uint32 column = first + thread / 8; column < first + 128; column += THREADS / 8) {
        *reinterpret_cast<uint4*>(a.h + offset(a.h_col, column) + row) = {};
        *reinterpret_cast<uint4*>(a.dt + offset(a.dt_col, column) + row) = {};
        *reinterpret_cast<uint4*>(a.dt + offset(a.dt_col, column + a.F) + row) = {};
    }
    if (thread < 128) {
        const uint32 column = first + thread;
        store_scale<KIND_H>(a.hs, offset(a.hs_row, tile.group) + column, 1.0f);
        store_scale<KIND_T>(a.dts, offset(a.dts_row, tile.group) + column, 1.0f);
        store_scale<KIND_T>(a.dts, offset(a.dts_row, tile.group) + column + a.F, 1.0f);
    }
    barrier_arrive(shared_address(&shared.computed));
}

// Round 2: along rows. A warp has 16 rows, half a warp each second of them, a lane 8 columns.
struct RowGradients {
    uint4 gate[ROWS], up[ROWS];
};

DEVICE void read_rows(const Shared& shared, const Arguments& a, const Tile& at, uint32 turn, RowGradients& x) {
    const uint32 thread = thread_index_again(), first = first_row(thread), chunk = thread % 16;
    const uint32 gate = first * 256 + moved(chunk, first) * 16, up = first * 128 + moved(chunk / 2, first) * 16;
    const char *gates = reinterpret_cast<const char*>(shared.dh), *ups = reinterpret_cast<const char*>(shared.codes[turn % 2]);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const uint2* both = reinterpret_cast<const uint2*>(ups + moved_on<128>(up, 2 * i)) + chunk % 2;
        const uint2 b = both[0], c = both[128 * 128 / 8];
        x.gate[i] = *reinterpret_cast<const uint4*>(gates + moved_on<256>(gate, 2 * i)), x.up[i] = {b.x, c.x, b.y, c.y};
    }
    if constexpr (WEIGHTED) {
        const uint32 own = thread / 2;
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < SLICES / 2; i++) total += shared.sums[thread % 2 * (SLICES / 2) + i][own % 8 * 17 + own / 8];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        if (thread % 2 == 0 && static_cast<int>(at.begin + own) < at.end) a.dweight[offset(a.R, at.tile) + at.begin + own] = total;
    }
}
DEVICE void quantize_rows(Shared& shared, const Arguments& a, const Tile& at, const RowGradients& x) {
    const uint32 thread = thread_index_again(), lane = thread % 16, first = first_row(thread);
    const int rows = at.end - at.begin - static_cast<int>(first);
    uint32 both[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) both[i] = side_by_side(larger_of(x.gate[i]), larger_of(x.up[i]));
    const bool bit8 = lane & 8, bit4 = lane & 4, bit2 = lane & 2, is_up = lane & 1;
#pragma unroll
    for (int i = 0; i < 4; i++) both[i] = exchange_larger(both[i], both[i + 4], 8, bit8);
#pragma unroll
    for (int i = 0; i < 2; i++) both[i] = exchange_larger(both[i], both[i + 2], 4, bit4);
    const uint32 pair = reduce_larger(exchange_larger(both[0], both[1], 2, bit2), 1);
    const uint32 own = 2 * ((bit8 ? 4 : 0) + (bit4 ? 2 : 0) + (bit2 ? 1 : 0));
    const float scale = scale_of<ELEMENT, KIND>(is_up ? second_of(pair) : first_of(pair));
    shared.of_row[first + own][is_up] = reciprocal<KIND>(scale);
    if (static_cast<int>(own) < rows)
        store_scale<KIND>(a.ds, offset(a.ds_row, at.begin + first + own) + offset(a.ds_col, at.tile + (is_up ? a.F / 128 : 0)), scale);
    __syncwarp();
    uint8 *gate = a.d + offset(a.d_row, at.begin + first) + (at.tile * 128 + lane * 8), *up = gate + a.F;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float4 of = *reinterpret_cast<const float4*>(shared.of_row[first + 2 * i]);
        store_if(2 * i < rows, gate + offset(a.d_row, 2 * i), codes_of<ELEMENT, KIND>(x.gate[i], {of.x, of.y}));
        store_if(2 * i < rows, up + offset(a.d_row, 2 * i), codes_of<ELEMENT, KIND>(x.up[i], {of.z, of.w}));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_swiglu_backward(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int count = a.groups * (a.F / 128);
    if constexpr (EXPERTS) count += (a.R - __ldg(a.ends + a.E - 1) + 127) / 128 * (a.F / 128);
    if (static_cast<int>(blockIdx.x) >= count) return;
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&shared.fetched), 2 * THREADS);
        barrier_init(shared_address(&shared.computed), THREADS);
        barrier_init_done();
    }
    // The first two tiles of a block are not claimed.
    if (threadIdx.x < 64) {
        const uint4 tile = tile_or_none(a, blockIdx.x + threadIdx.x / 32 * gridDim.x, count);
        if (threadIdx.x % 32 == 0) shared.tiles[threadIdx.x / 32] = tile;
    }
    __syncthreads();
    // The turn before the first one fetches its inputs.
    for (int turn = -1;; turn++) {
        RowGradients x;
        const bool works = turn >= 0;
        if (works) {
            int claimed = 0;
            if (threadIdx.x == THREADS - 32) claimed = atomicAdd(a.claimed, 1) + 2 * gridDim.x;
            barrier_wait_asleep(shared_address(&shared.fetched), turn & 1);
            {
                const Tile next = tile_at(shared, turn + 1);
                if (is_tile(next)) {
                    fetch_codes(shared, a, next, (turn + 1) % 2);
                    fetch_row_inputs(shared, a, next, (turn + 1) % 2);
                }
            }
            if (!EXPERTS || has_rows(tile_at(shared, turn)))
                compute(shared, a, turn);
            else
                clear(shared, a, turn);
            if (threadIdx.x >= THREADS - 32) {
                const uint4 tile = tile_or_none(a, __shfl_sync(ALL_LANES, claimed, 0), count);
                if (threadIdx.x == THREADS - 1) shared.tiles[(turn + 2) % 4] = tile;
            }
            barrier_wait_asleep(shared_address(&shared.computed), turn & 1);
            read_rows(shared, a, tile_at(shared, turn), turn, x);
            __syncwarp();
        }
        const Tile next = tile_at(shared, turn + 1);
        if (is_tile(next)) {
            fetch_gradient(shared, a, next);
            if (!works) {
                fetch_codes(shared, a, next, 0);
                fetch_row_inputs(shared, a, next, 0);
            }
            arrive_fetched(shared);
        }
        if (works) {
            const Tile tile = tile_at(shared, turn);
            if (static_cast<int>(tile.begin + threadIdx.x / 32 * 16) < tile.end) quantize_rows(shared, a, tile, x);
            if (!is_tile(next)) return;
        }
    }
}

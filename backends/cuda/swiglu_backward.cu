// SwiGLU computed again from its cached inputs and differentiated: h along columns, the gradient of gate and up along rows and
// columns, the gradient of the router's weight. fp8c/ops/swiglu.py says what is computed.
//
// Legend: R rows, F features, E experts. A tile is 128 rows by 128 features: one group of each row and of each column. Blocks
//   stay and take one tile after another, in three rounds:
//     1. a thread computes 8 rows by 8 features: h and the two gradients go to shared memory, in BF16; magnitudes are reduced
//        over the lanes that share a row or a column
//     2. each of the 256 + 384 scales is made once, by one thread
//     3. quantized along columns, a thread with 16 rows of two columns, and along rows, 8 columns of a row: 8 lanes and 16
//        fill a line of 128 bytes. What has been read makes room for the next tile's inputs, which arrive meanwhile: dh where
//        h was, codes where the gate's gradient was
//   Each input is read once, so the bytes moved are those that must be.
//
// Instructions are what it waits for, about 60 for each gate and up: what looks roundabout saves some.

#include "config.cuh"
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
    int64 cs_row, cs_col, ds_row, ds_col, hs_row, hs_col, dts_row, dts_col;
    int dh_row, c_row, d_row, h_col, dt_col;
    int R, F, E, groups;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES_OF_HOST, "host and kernel disagree on the arguments");

enum Results { H, GATE, UP };

constexpr int ROWS = 8;  // of a thread

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

struct Shared {
    uint4 values[3][128][16];  // of 8 columns; `chunk_at` says where
    uint32 row_amax[128][2];  // GATE's below, UP's above, of 64 columns
    float row_sum[128][2];
    uint32 col_amax[4][3][64];  // two columns, of 32 rows
    float4 row_in[128];         // scales of gate and up, the weight
    Reciprocal of_row[3][128], of_col[3][128];
    uint4 tiles[2];  // each a `Tile`: the one at work and the next. Here, they take no registers
};
static_assert(sizeof(Shared) == SHARED_BYTES_OF_HOST, "config and kernel disagree on the layout of shared memory");

// Tiles in order, those of a group one after another. A group that no expert owns has no rows; the rule is
// fp8c.ops.scale_shape's. Groups past `a.groups` are rows of no expert: in no group of columns, but with groups of their own.
DEVICE Tile tile_of(const Arguments& a, int index) {
    const int group = index / (a.F / 128), tile = index % (a.F / 128);
    if constexpr (!EXPERTS) return {group * 128, min(group * 128 + 128, a.R), group, tile};
    if (group >= a.groups) {
        const int begin = __ldg(a.ends + a.E - 1) + (group - a.groups) * 128;
        return {begin, min(begin + 128, a.R), group, tile};
    }
    const int lane = threadIdx.x % 32;
    int owner = -1;
    for (int first = 0; first < a.E; first += 32) {
        const int e = first + lane;
        const int start = e > 0 && e < a.E ? __ldg(a.ends + e - 1) : 0;
        owner += __popc(__ballot_sync(ALL_LANES, e < a.E && start / 128 + e <= group));
    }
    const int start = owner > 0 ? __ldg(a.ends + owner - 1) : 0;
    const int begin = start + (group - start / 128 - owner) * 128;
    return {begin, min(begin + 128, __ldg(a.ends + owner)), group, tile};
}

// Where 8 columns of a row are in shared memory: moved by the row's block of 16, so that lanes that read the same columns of
// 8 blocks meet no bank twice.
DEVICE int chunk_at(int chunk, int row) { return chunk ^ row / 16 % 8; }

struct Gradients {
    uint32 h, gate, up;
};

// Two features of a row, each step rounded as the model's operators round. `terms` collects the gradient of the weight.
DEVICE Gradients differentiate(uint32 dh, float gate0, float gate1, float up0, float up1, const float4& in, float& terms) {
    const uint32 gate = rounded(__fmul_rn(gate0, in.x), __fmul_rn(gate1, in.x));
    const uint32 up = rounded(__fmul_rn(up0, in.y), __fmul_rn(up1, in.y));
    const float g0 = first_of(gate), g1 = second_of(gate), s0 = sigmoid(g0), s1 = sigmoid(g1);
    const uint32 silu = rounded(__fmul_rn(g0, s0), __fmul_rn(g1, s1)), product = times(silu, up);
    uint32 dproduct = dh, h = product;
    if constexpr (WEIGHTED) {
        const float p0 = first_of(product), p1 = second_of(product), d0 = first_of(dh), d1 = second_of(dh);
        terms = __fmaf_rn(d1, p1, __fmaf_rn(d0, p0, terms));
        h = rounded(__fmul_rn(p0, in.z), __fmul_rn(p1, in.z));
        dproduct = rounded(__fmul_rn(d0, in.z), __fmul_rn(d1, in.z));
    }
    const uint32 dsilu = times(dproduct, up);
    const float dg0 = __fmul_rn(__fmul_rn(first_of(dsilu), s0), __fmaf_rn(g0, __fadd_rn(1.0f, -s0), 1.0f));
    const float dg1 = __fmul_rn(__fmul_rn(second_of(dsilu), s1), __fmaf_rn(g1, __fadd_rn(1.0f, -s1), 1.0f));
    return {h, rounded(dg0, dg1), times(dproduct, silu)};
}

// Where a thread is: the first of its rows and columns in a tile. A warp has 32 rows by 64 columns.
struct Place {
    int row, column_block;
};
DEVICE Place place() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return {(warp / 2 * 4 + lane / 8) * ROWS, warp % 2 * 8 + lane % 8};
}

// Ask for this thread's part of dh, of the cached codes.
DEVICE void fetch_gradient(Shared& shared, const Arguments& a, const Tile& tile) {
    const Place at = place();
    const int first = tile.begin + at.row;
    const uint16* dh = a.dh + static_cast<int64>(first) * a.dh_row + tile.tile * 128 + at.column_block * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        copy_async<16>(&shared.values[H][at.row + i][chunk_at(at.column_block, at.row)], dh + i * a.dh_row, first + i < tile.end);
}
DEVICE void fetch_codes(Shared& shared, const Arguments& a, const Tile& tile) {
    const Place at = place();
    const int first = tile.begin + at.row;
    const uint8* c = a.c + static_cast<int64>(first) * a.c_row + tile.tile * 128 + at.column_block * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        uint4* to = &shared.values[GATE][at.row + i][chunk_at(at.column_block, at.row)];
        copy_async<8>(to, c + i * a.c_row, first + i < tile.end);
        copy_async<8>(reinterpret_cast<uint2*>(to) + 1, c + i * a.c_row + a.F, first + i < tile.end);
    }
}
// And for what every feature of a row needs. Bytes of E8M0 must be made FP32, so they are waited for.
DEVICE void fetch_row_inputs(Shared& shared, const Arguments& a, const Tile& tile) {
    if (threadIdx.x >= 128) return;
    const int64 row = tile.begin + static_cast<int>(threadIdx.x), gate = row * a.cs_row + tile.tile * a.cs_col;
    const int64 up = gate + a.F / 128 * a.cs_col;
    const bool exists = row < tile.end;
    float4& in = shared.row_in[threadIdx.x];
    if constexpr (KIND_C == E8M0) {
        in.x = exists ? load_scale<KIND_C>(a.cs, gate) : 0.0f;
        in.y = exists ? load_scale<KIND_C>(a.cs, up) : 0.0f;
    } else {
        copy_async<4>(&in.x, static_cast<const float*>(a.cs) + gate, exists);
        copy_async<4>(&in.y, static_cast<const float*>(a.cs) + up, exists);
    }
    if constexpr (WEIGHTED) copy_async<4>(&in.z, a.weight + row, exists);
}

// Round 1.
DEVICE void compute(Shared& shared) {
    const int thread = threadIdx.x, lane = thread % 32;
    const auto [row_in_tile, column_block] = place();
    const int chunk = chunk_at(column_block, row_in_tile);
    uint32 amax[12] = {};  // of columns
    constexpr int BATCH = 4;
#pragma unroll 1
    for (int first = 0; first < ROWS; first += BATCH) {
        uint32 both[BATCH];  // amax of rows
        float sum[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
                        const int row = row_in_tile + first + i;
            const uint4 dh = shared.values[H][row][chunk], codes = shared.values[GATE][row][chunk];
            const float4 in = shared.row_in[row];
            float gate[8], up[8];
            decode<ELEMENT_C>(codes.x, gate);
            decode<ELEMENT_C>(codes.y, gate + 4);
            decode<ELEMENT_C>(codes.z, up);
            decode<ELEMENT_C>(codes.w, up + 4);
            sum[i] = 0.0f;
            const Gradients p = differentiate(dh.x, gate[0], gate[1], up[0], up[1], in, sum[i]);
            const Gradients q = differentiate(dh.y, gate[2], gate[3], up[2], up[3], in, sum[i]);
            const Gradients r = differentiate(dh.z, gate[4], gate[5], up[4], up[5], in, sum[i]);
            const Gradients s = differentiate(dh.w, gate[6], gate[7], up[6], up[7], in, sum[i]);
            const uint4 results[3] = {{p.h, q.h, r.h, s.h}, {p.gate, q.gate, r.gate, s.gate}, {p.up, q.up, r.up, s.up}};
#pragma unroll
            for (int k = 0; k < 3; k++) {
                shared.values[k][row][chunk] = results[k];
                amax[4 * k] = larger(amax[4 * k], results[k].x);
                amax[4 * k + 1] = larger(amax[4 * k + 1], results[k].y);
                amax[4 * k + 2] = larger(amax[4 * k + 2], results[k].z);
                amax[4 * k + 3] = larger(amax[4 * k + 3], results[k].w);
            }
            both[i] = side_by_side(larger_of(results[GATE]), larger_of(results[UP]));
        }
        // Over the 8 lanes of a row. Each step halves the rows that a lane keeps.
        const bool bit4 = lane & 4, bit2 = lane & 2;
        const int own = row_in_tile + first + (bit4 ? 2 : 0) + (bit2 ? 1 : 0), half = thread / 32 % 2;
        const uint32 row_amax = reduce_larger(
            exchange_larger(exchange_larger(both[0], both[2], 4, bit4), exchange_larger(both[1], both[3], 4, bit4), 2, bit2), 1);
        if (lane % 2 == 0) shared.row_amax[own][half] = row_amax;
        if constexpr (WEIGHTED) {
            float total = exchange_sum(exchange_sum(sum[0], sum[2], 4, bit4), exchange_sum(sum[1], sum[3], 4, bit4), 2, bit2);
            total += __shfl_xor_sync(ALL_LANES, total, 1);
            if (lane % 2 == 0) shared.row_sum[own][half] = total;
        }
    }
    // Over the 4 lanes of a column.
    const bool bit16 = lane & 16, bit8 = lane & 8;
    uint32 six[6];
#pragma unroll
    for (int j = 0; j < 12; j++) amax[j] &= 0x7fff7fffu;
#pragma unroll
    for (int j = 0; j < 6; j++) six[j] = exchange_larger(amax[j], amax[j + 6], 16, bit16);
#pragma unroll
    for (int j = 0; j < 3; j++) {
        const int index = (bit16 ? 6 : 0) + (bit8 ? 3 : 0) + j;
        shared.col_amax[thread / 64][index / 4][again(column_block) * 4 + index % 4] = exchange_larger(six[j], six[j + 3], 8, bit8);
    }
}

// Round 2 for a result's scales along columns: two of them.
template <int ELEMENT_R, int KIND_R>
DEVICE void make_column_scales(Shared& shared, int result, int pair, void* scales, int64 at, int64 next) {
    const uint32(&amax)[4][3][64] = shared.col_amax;
    const uint32 both = larger_bits(larger_bits(amax[0][result][pair], amax[1][result][pair]),
                                    larger_bits(amax[2][result][pair], amax[3][result][pair]));
    const float first = scale_of<ELEMENT_R, KIND_R>(first_of(both)), second = scale_of<ELEMENT_R, KIND_R>(second_of(both));
    shared.of_col[result][2 * pair] = reciprocal<KIND_R>(first);
    shared.of_col[result][2 * pair + 1] = reciprocal<KIND_R>(second);
    store_scale<KIND_R>(scales, at, first);
    store_scale<KIND_R>(scales, at + next, second);
}

// Round 3 of one result along columns; `columns` is its first column of this tile. A warp has 16 columns, 8 at a time.
template <int ELEMENT_R, int KIND_R>
DEVICE void quantize_columns(const Shared& shared, int result, uint8* columns, int col, int stored) {
    const int lane = threadIdx.x % 32, block = lane / 4, pair = lane % 4;  // of 16 rows, of columns
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const int chunk = threadIdx.x / 32 * 2 + part;
        const float4 of = *reinterpret_cast<const float4*>(&shared.of_col[result][chunk * 8 + pair * 2]);
        const Reciprocal first = {of.x, of.y}, second = {of.z, of.w};
        const uint32* words = reinterpret_cast<const uint32*>(&shared.values[result][block * 16][chunk_at(chunk, block * 16)]) + pair;
        uint32 codes[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32 a = words[256 * i], b = words[256 * i + 64], c = words[256 * i + 128], d = words[256 * i + 192];
            codes[0][i] = encode<ELEMENT_R>(quotient<KIND_R>(first_of(a), first), quotient<KIND_R>(first_of(b), first),
                                            quotient<KIND_R>(first_of(c), first), quotient<KIND_R>(first_of(d), first));
            codes[1][i] = encode<ELEMENT_R>(quotient<KIND_R>(second_of(a), second), quotient<KIND_R>(second_of(b), second),
                                            quotient<KIND_R>(second_of(c), second), quotient<KIND_R>(second_of(d), second));
        }
        uint8* to = columns + (chunk * 8 + pair * 2) * static_cast<int64>(col) + block * 16;
        store_if(block * 16 < stored, to, uint4{codes[0][0], codes[0][1], codes[0][2], codes[0][3]});
        store_if(block * 16 < stored, to + col, uint4{codes[1][0], codes[1][1], codes[1][2], codes[1][3]});
    }
}

// Along rows; `d` is the first row of this tile. A warp has 16 rows, two at a time.
DEVICE void quantize_rows(const Shared& shared, int result, uint8* d, int d_row, int rows) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane / 16, chunk = lane % 16;
    d += static_cast<int64>(first) * d_row + chunk * 8;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
        const uint4 eight = shared.values[result][first + i][chunk_at(chunk, first)];
        store_if(first + i < rows, d + i * d_row, codes_of<ELEMENT, KIND>(eight, shared.of_row[result][first + i]));
    }
}

// Round 2.
DEVICE void make_scales(Shared& shared, const Arguments& a, const Tile& at) {
    const int thread = thread_index_again(), tiles = a.F / 128, own = thread / 2;
    const bool is_up = thread % 2;
    const uint32 both = larger_bits(shared.row_amax[own][0], shared.row_amax[own][1]);
    const float scale = scale_of<ELEMENT, KIND>(is_up ? second_of(both) : first_of(both));
    shared.of_row[is_up ? UP : GATE][own] = reciprocal<KIND>(scale);
    const int64 row = at.begin + own;
    if (row < at.end) {
        store_scale<KIND>(a.ds, row * a.ds_row + (at.tile + (is_up ? tiles : 0)) * a.ds_col, scale);
        if (WEIGHTED && is_up) a.dweight[static_cast<int64>(at.tile) * a.R + row] = shared.row_sum[own][0] + shared.row_sum[own][1];
    }
    if (at.group < a.groups && thread < 192) {
        const int result = thread / 64, pair = thread % 64, col = at.tile * 128 + pair * 2;
        if (result == H) {
            make_column_scales<ELEMENT_H, KIND_H>(shared, H, pair, a.hs, at.group * a.hs_row + col * a.hs_col, a.hs_col);
        } else {
            const int64 first = at.group * a.dts_row + (col + (result == UP ? a.F : 0)) * a.dts_col;
            make_column_scales<ELEMENT_T, KIND_T>(shared, result, pair, a.dts, first, a.dts_col);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_swiglu_backward(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int count = a.groups * (a.F / 128);
    if constexpr (EXPERTS) count += (a.R - __ldg(a.ends + a.E - 1) + 127) / 128 * (a.F / 128);
    int index = blockIdx.x;
    if (index >= count) return;
    {
        const Tile tile = tile_of(a, index);
        if (threadIdx.x == 0) shared.tiles[0] = packed(tile);
        fetch_gradient(shared, a, tile);
        fetch_codes(shared, a, tile);
        fetch_row_inputs(shared, a, tile);
    }
    for (int parity = 0;; parity ^= 1) {
        index += gridDim.x;
        wait_for_copies();
        __syncthreads();
        compute(shared);
        __syncthreads();
        if (threadIdx.x >= THREADS - 32 && index < count) {  // a warp that makes no columns' scales
            const Tile next = tile_of(a, index);
            if (threadIdx.x == THREADS - 1) shared.tiles[parity ^ 1] = packed(next);
        }
        make_scales(shared, a, unpacked(read_again(shared.tiles[parity])));
        __syncthreads();
        const Tile tile = unpacked(read_again(shared.tiles[parity]));
        const int rows = tile.end - tile.begin;
        const int64 col = tile.tile * 128, first = tile.group * 128;
        const int stored = tile.group >= a.groups ? 0 : EXPERTS ? 128 : a.R - static_cast<int>(first);
        uint8 *d = a.d + static_cast<int64>(tile.begin) * a.d_row + col, *dt = a.dt + col * a.dt_col + first;
        quantize_columns<ELEMENT_H, KIND_H>(shared, H, a.h + col * a.h_col + first, a.h_col, stored);
        quantize_columns<ELEMENT_T, KIND_T>(shared, GATE, dt, a.dt_col, stored);
        quantize_rows(shared, GATE, d, a.d_row, rows);
        __syncthreads();
        if (index < count) {
            const Tile next = unpacked(read_again(shared.tiles[parity ^ 1]));
            fetch_gradient(shared, a, next);
            fetch_codes(shared, a, next);
            fetch_row_inputs(shared, a, next);
        }
        quantize_columns<ELEMENT_T, KIND_T>(shared, UP, dt + static_cast<int64>(a.F) * a.dt_col, a.dt_col, stored);
        quantize_rows(shared, UP, d + a.F, a.d_row, rows);
        if (index >= count) return;
    }
}

// 128x1 groups of BF16, with or without 1x128 groups of the same tile: see columns.cuh.
//
// One block makes a tile. A thread keeps 8 rows of 8 columns in registers as they were read; each of the tile's scales is made
// by one thread and handed around in shared memory, where the result is also turned.
#include "columns.cuh"

static_assert(THREADS == 256);
// Columns from 64 on have the halves of each chunk in the other order, so that lanes 8 apart meet other banks. It takes one more
// register, which the rows don't leave.
constexpr bool SWAPS = !ROWS_TOO;

// Zeros where `is_there` is false.
DEVICE uint4 load_global4(const uint8* p, bool is_there) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"(static_cast<uint32>(is_there)));
    return v;
}
DEVICE void store_global4(uint8* p, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

DEVICE Place place_of(const Columns& p) {
    int tiles = p.columns / 128, block = blockIdx.x;
    int slab = block / (p.groups * p.slab), within = block - slab * p.groups * p.slab;
    int width = min(p.slab, tiles - slab * p.slab), group = within / width;
    Place place{slab * p.slab + within - group * width, group, 0, 0};
    if (p.experts == 0) {
        place.begin = group * GROUP;
        place.end = min(place.begin + GROUP, p.rows);
        return place;
    }
    const Rows rows = rows_of(p.ends, p.experts, group);
    place.begin = rows.begin, place.end = rows.end;
    return place;
}

// A tile of codes in shared memory, column by column; 16-byte chunks are permuted so that no bank is used twice.
DEVICE int chunk_at(int column, int chunk) { return column * GROUP + ((chunk ^ (column / 8 & 7)) << 4); }

DEVICE void store_turned(const Columns& p, const Place& place, const uint8* turned) {
    // Blocks of experts are filled up with zeros; else the rows end within a tile, at a chunk.
    int rows = p.experts != 0 ? GROUP : place.end - place.begin;
    int chunk = threadIdx.x % 8;
    if (chunk * 16 >= rows) return;
    constexpr int STEP = THREADS / 8;  // columns at a time
    int first = threadIdx.x / 8;
    uint8* out = p.out + offset(GROUP, place.group) + chunk * 16 + offset(p.out_col, place.tile * 128 + first);
#pragma unroll
    for (int step = 0; step < 128 / STEP; ++step) {
        uint4 v = *reinterpret_cast<const uint4*>(turned + chunk_at(first + step * STEP, chunk));
        if (SWAPS && step * STEP >= 64) v = make_uint4(v.z, v.w, v.x, v.y);  // as `turn` stored them
        store_global4(out + offset(p.out_col, step * STEP), v);
    }
}

// Magnitudes of pairs, of this lane and of the one with the same columns in the other half of the warp.
DEVICE uint32 halves_of_warp(uint32 pair) { return reduce_larger(pair & 0x7fff7fffu, 16); }

DEVICE void write_rows(const Columns& p, const Place& place, const uint4 (&x)[8], const Reciprocal* reciprocals,
                       int patch_row, int patch_col) {
    int first = place.begin + patch_row * 8;
    uint8* out = p.row_out + offset(p.row_out_row, first) + place.tile * 128 + patch_col * 8;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        uint2 codes = codes_of<E4M3, KIND_ROW>(x[r], reciprocals[patch_row * 8 + r]);
        store_global2(out + offset(p.row_out_row, r), codes, first + r < place.end);
    }
}

// Where the reciprocal of a column's scale is: moved where lanes read each eighth column and would meet the same banks.
DEVICE int slot_of(int column) { return SWAPS ? column % 8 * 16 + column / 8 : column; }

DEVICE void turn(const uint4 (&x)[8], const Reciprocal* reciprocals, uint8* turned, int patch_row, int patch_col) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        int column = patch_col * 8 + j;
        Reciprocal reciprocal = reciprocals[slot_of(column)];
        float q[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            uint32 pair = word_of(x[r], j / 2);
            q[r] = quotient<KIND>(j % 2 == 0 ? first_of(pair) : second_of(pair), reciprocal);
        }
        uint2 codes = make_uint2(encode<E4M3>(q[0], q[1], q[2], q[3]), encode<E4M3>(q[4], q[5], q[6], q[7]));
        *reinterpret_cast<uint2*>(turned + chunk_at(column, patch_row / 2) + (patch_row % 2 ^ (SWAPS ? column / 64 : 0)) * 8) = codes;
    }
}

DEVICE void store_row_scale(const Columns& p, const Place& place, int row, float scale) {
    store_scale<KIND_ROW>(p.row_scale + offset(p.row_scale_col, place.tile) + offset(p.row_scale_row, row), 0, scale);
}

// 1x128 groups of rows that no expert owns, shared out among the groups; half a warp takes a row.
DEVICE void quantize_tail(const Columns& p, const Place& place) {
    int last = __ldg(p.ends + p.experts - 1);
    int share = (p.rows - last + p.groups - 1) / p.groups;
    int begin = last + place.group * share, end = min(begin + share, p.rows);
    for (int first = begin; first < end; first += THREADS / 16) {
        int row = first + threadIdx.x / 16, column = place.tile * 128 + threadIdx.x % 16 * 8;
        bool is_row = row < end;
        uint4 x = load_global4(p.data + offset(p.data_row, row) + column * 2, is_row);
        uint32 amax = larger_of(x) & 0x7fff7fffu;
        for (int step = 1; step < 16; step *= 2) amax = reduce_larger(amax, step);
        float scale = scale_of<E4M3, KIND_ROW>(first_of(max(amax & 0xffffu, amax >> 16)));
        uint2 codes = codes_of<E4M3, KIND_ROW>(x, reciprocal<KIND_ROW>(scale));
        store_global2(p.row_out + offset(p.row_out_row, row) + column, codes, is_row);
        if (is_row && threadIdx.x % 16 == 0)
            store_row_scale(p, place, row, scale);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_quantize_columns(const __grid_constant__ Columns p) {
    start_early();
    __shared__ alignas(128) uint8 turned[GROUP * 128];
    __shared__ alignas(16) uint16 column_amax[THREADS / 32][128];
    __shared__ uint16 row_amax[GROUP];
    __shared__ alignas(16) Reciprocal reciprocals[256];  // of the columns' scales, of the rows'

    __shared__ Place kept;  // where registers are short, read again

    __shared__ int sources[GATHERS != 0 ? GROUP : 1];
    Place place;
    if (GATHERS == 0) {
        place = place_of(p);
    } else {  // half of the warps look up where the block works, and where its rows come from
        if (threadIdx.x < GROUP) {
            place = place_of(p);
            const int row = place.begin + threadIdx.x;
            sources[threadIdx.x] = row < place.end ? source_of(p, row) : -1;
            if (threadIdx.x == 0) kept = place;
        }
        __syncthreads();
        place = kept;
    }
    if (ROWS_TOO && p.experts != 0) quantize_tail(p, place);
    if (place.begin >= place.end) {
        clear_columns(p, place.group, place.tile, place.tile + 1);
        return;
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int patch_col = lane % 16, patch_row = warp * 2 + lane / 16;

    uint4 x[8];
    int first = place.begin + patch_row * 8;
    const uint8* data = p.data + place.tile * 256 + patch_col * 16;
    if (GATHERS != 0) {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            int source = sources[patch_row * 8 + r];
            x[r] = load_global4(data + offset(p.data_row, source), source >= 0);
        }
    } else {
        data += offset(p.data_row, first);
#pragma unroll
        for (int r = 0; r < 8; ++r) x[r] = load_global4(data + offset(p.data_row, r), first + r < place.end);
    }

    uint4 columns = x[0];
#pragma unroll
    for (int r = 1; r < 8; ++r)
        columns = make_uint4(larger(columns.x, x[r].x), larger(columns.y, x[r].y), larger(columns.z, x[r].z),
                             larger(columns.w, x[r].w));
    columns = make_uint4(halves_of_warp(columns.x), halves_of_warp(columns.y), halves_of_warp(columns.z),
                         halves_of_warp(columns.w));
    if (lane < 16) *reinterpret_cast<uint4*>(&column_amax[warp][patch_col * 8]) = columns;
    if (ROWS_TOO) {
        uint32 pairs[4];  // rows 2i and 2i + 1
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = side_by_side(larger_of(x[2 * i]), larger_of(x[2 * i + 1]));
        uint32 a = exchange_larger(pairs[0], pairs[2], 8, lane & 8), b = exchange_larger(pairs[1], pairs[3], 8, lane & 8);
        uint32 c = exchange_larger(a, b, 4, lane & 4);
        c = reduce_larger(reduce_larger(c, 2), 1);
        if (lane % 4 == 0) *reinterpret_cast<uint32*>(&row_amax[patch_row * 8 + (lane & 12) / 2]) = c;
    }
    __syncthreads();

    if (GATHERS != 0) place = kept;
    int t = threadIdx.x;
    if (t < 128) {
        uint32 amax = 0;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) amax = max(amax, static_cast<uint32>(column_amax[w][t]));
        float scale = scale_of<E4M3, KIND>(first_of(amax));
        reciprocals[slot_of(t)] = reciprocal<KIND>(scale);
        store_column_scale(p, place, t, scale);
    } else if (ROWS_TOO) {
        int row = t - 128;
        float scale = scale_of<E4M3, KIND_ROW>(first_of(row_amax[row]));
        reciprocals[t] = reciprocal<KIND_ROW>(scale);
        if (place.begin + row < place.end) store_row_scale(p, place, place.begin + row, scale);
    }
    __syncthreads();
    if (ROWS_TOO) write_rows(p, place, x, reciprocals + 128, patch_row, patch_col);
    turn(x, reciprocals, turned, patch_row, patch_col);
    __syncthreads();
    if (GATHERS != 0) place = kept;
    store_turned(p, place, turned);
}

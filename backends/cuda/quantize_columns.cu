// 128x1 groups of BF16, with or without 1x128 groups of the same tile: see columns.cuh.
#include "columns.cuh"

static_assert(THREADS == 256 && TILES == 1);

DEVICE float low_bf16(uint32 x) { return float_of(x << 16); }
DEVICE float high_bf16(uint32 x) { return float_of(x & 0xffff0000u); }

// Eight neighbours of a row, divided: their codes.
template <int kind>
DEVICE uint2 row_codes(const uint32 (&x)[4], float2 reciprocal) {
    float q[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        q[2 * j] = quotient<kind>(low_bf16(x[j]), reciprocal);
        q[2 * j + 1] = quotient<kind>(high_bf16(x[j]), reciprocal);
    }
    return make_uint2(codes_of(q[0], q[1], q[2], q[3]), codes_of(q[4], q[5], q[6], q[7]));
}

DEVICE void write_rows(const Columns& p, const Place& place, const uint32 (&x)[8][4], const float2* reciprocals,
                       int patch_row, int patch_col) {
    int first = place.begin + patch_row * 8;
    uint8* out = p.row_out + bytes(p.row_out_row, first) + place.tile * 128 + patch_col * 8;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        uint2 codes = row_codes<KIND_ROW>(x[r], reciprocals[patch_row * 8 + r]);
        store_global2(out + bytes(p.row_out_row, r), codes, first + r < place.end);
    }
}

DEVICE void turn(const uint32 (&x)[8][4], const float2* reciprocals, uint8* turned, int patch_row, int patch_col) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        int column = patch_col * 8 + j;
        float2 reciprocal = reciprocals[column];
        float q[8];
#pragma unroll
        for (int r = 0; r < 8; ++r)
            q[r] = quotient<KIND>(j % 2 == 0 ? low_bf16(x[r][j / 2]) : high_bf16(x[r][j / 2]), reciprocal);
        uint2 codes = make_uint2(codes_of(q[0], q[1], q[2], q[3]), codes_of(q[4], q[5], q[6], q[7]));
        *reinterpret_cast<uint2*>(turned + chunk_at<8>(column, patch_row / 2) + patch_row % 2 * 8) = codes;
    }
}

// 1x128 groups of rows that no expert owns, shared out among the groups; half a warp takes a row.
DEVICE void quantize_tail(const Columns& p, const Place& place) {
    int last = __ldg(p.ends + p.experts - 1);
    int share = (p.rows - last + p.groups - 1) / p.groups;
    int begin = last + place.group * share, end = min(begin + share, p.rows);
    for (int first = begin; first < end; first += THREADS / 16) {
        int row = first + threadIdx.x / 16, column = place.tile * 128 + threadIdx.x % 16 * 8;
        bool is_row = row < end;
        uint32 x[4], amax = 0;
        load_global4(x, p.data + bytes(p.data_row, row) + column * 2, is_row);
        for (int j = 0; j < 4; ++j) amax = max_u16x2(amax, x[j] & 0x7fff7fffu);
        for (int step = 1; step < 16; step *= 2) amax = max_u16x2(amax, __shfl_xor_sync(~0u, amax, step));
        float scale = scale_of<KIND_ROW>(max(amax & 0xffffu, amax >> 16) << 16);
        uint2 codes = row_codes<KIND_ROW>(x, parts_of_reciprocal<KIND_ROW>(scale));
        store_global2(p.row_out + bytes(p.row_out_row, row) + column, codes, is_row);
        if (is_row && threadIdx.x % 16 == 0)
            store_scale<KIND_ROW>(
                p.row_scale + bytes(p.row_scale_row, row) + bytes(p.row_scale_col, place.tile), scale);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) quantize_columns(const __grid_constant__ Columns p) {
    __shared__ alignas(128) uint8 turned[GROUP * 128];
    __shared__ alignas(16) uint16 column_amax[THREADS / 32][128];
    __shared__ uint16 row_amax[GROUP];
    __shared__ alignas(16) float2 reciprocals[256];  // of the columns' scales, of the rows'

    Place place = place_of(p);
    if (ROWS_TOO && p.experts != 0) quantize_tail(p, place);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int patch_col = lane % 16, patch_row = warp * 2 + lane / 16;

    uint32 x[8][4];
    int first = place.begin + patch_row * 8;
    const uint8* data = p.data + place.tile * 256 + patch_col * 16;
    if (GATHERS != 0) {
        __shared__ int sources[GROUP];
        if (threadIdx.x < GROUP && place.begin + threadIdx.x < place.end)
            sources[threadIdx.x] = source_of(p, place.begin + threadIdx.x);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 8; ++r)
            load_global4(x[r], data + bytes(p.data_row, sources[patch_row * 8 + r]), first + r < place.end);
    } else {
        data += bytes(p.data_row, first);
#pragma unroll
        for (int r = 0; r < 8; ++r) load_global4(x[r], data + bytes(p.data_row, r), first + r < place.end);
    }

    // Magnitudes of BF16 order like integers, two at a time; NaN is above infinity.
    uint32 columns[4] = {0, 0, 0, 0}, rows[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        rows[r] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32 magnitude = x[r][j] & 0x7fff7fffu;
            columns[j] = max_u16x2(columns[j], magnitude);
            rows[r] = max_u16x2(rows[r], magnitude);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) columns[j] = max_u16x2(columns[j], __shfl_xor_sync(~0u, columns[j], 16));
    if (lane < 16)
        *reinterpret_cast<uint4*>(&column_amax[warp][patch_col * 8]) =
            make_uint4(columns[0], columns[1], columns[2], columns[3]);
    if (ROWS_TOO) {
        uint32 pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)  // rows 2i and 2i + 1 in the halves of a word
            pairs[i] = max_u16x2(__byte_perm(rows[2 * i], rows[2 * i + 1], 0x5410),
                                 __byte_perm(rows[2 * i], rows[2 * i + 1], 0x7632));
        // Every step halves what a lane is responsible for.
        bool upper = lane & 8;
        uint32 a = upper ? pairs[2] : pairs[0], b = upper ? pairs[3] : pairs[1];
        a = max_u16x2(a, __shfl_xor_sync(~0u, upper ? pairs[0] : pairs[2], 8));
        b = max_u16x2(b, __shfl_xor_sync(~0u, upper ? pairs[1] : pairs[3], 8));
        bool second = lane & 4;
        uint32 c = max_u16x2(second ? b : a, __shfl_xor_sync(~0u, second ? a : b, 4));
        c = max_u16x2(c, __shfl_xor_sync(~0u, c, 2));
        c = max_u16x2(c, __shfl_xor_sync(~0u, c, 1));
        if (lane % 4 == 0) *reinterpret_cast<uint32*>(&row_amax[patch_row * 8 + (lane & 12) / 2]) = c;
    }
    __syncthreads();

    int t = threadIdx.x;
    if (t < 128) {
        uint32 amax = 0;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) amax = max(amax, static_cast<uint32>(column_amax[w][t]));
        float scale = scale_of<KIND>(amax << 16);
        reciprocals[t] = parts_of_reciprocal<KIND>(scale);
        store_scale<KIND>(scale_address(p, place, t), scale);
    } else if (ROWS_TOO) {
        int row = t - 128;
        float scale = scale_of<KIND_ROW>(static_cast<uint32>(row_amax[row]) << 16);
        reciprocals[t] = parts_of_reciprocal<KIND_ROW>(scale);
        uint8* address = p.row_scale + bytes(p.row_scale_row, place.begin + row) + bytes(p.row_scale_col, place.tile);
        if (place.begin + row < place.end) store_scale<KIND_ROW>(address, scale);
    }
    __syncthreads();
    if (ROWS_TOO) write_rows(p, place, x, reciprocals + 128, patch_row, patch_col);
    turn(x, reciprocals, turned, patch_row, patch_col);
    __syncthreads();
    store_turned<8, THREADS>(p, place, turned);
}

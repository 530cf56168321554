// What the two kernels share that write 128x1 groups, transposed: `quantize_columns.cu` from BF16, `requantize_columns.cu`
// from E4M3 data with 1x128 scales. Rows may be gathered and groups may restart at each expert. Bit for bit what
// `backends/triton/numerics.py` says; its docstring has the reasons.
//
// A tile is 128 rows by 128 columns. Columns come in slabs, slab by slab over all rows: rows that are read several times are
// then found in the L2.
//
// config.cuh, from `columns.py`: ROWS_TOO (also 1x128 groups of the same tile), GATHERS (0, or the bits of an
// index), KIND_IN, KIND_ROW, KIND, the kinds of the scales (numerics.cuh); THREADS of a block.
// Columns: a multiple of 128. Rows: a multiple of 16, or groups that restart.
#pragma once

#include "config.cuh"
#include "groups.cuh"

struct Columns {
    const uint8* data;      // BF16 [., columns], or E4M3 codes
    const uint8* scale_in;  // of E4M3 data
    const void* gathered;   // GATHERS: row t is row gathered[t] of the data
    const int* ends;        // [experts] cumulative, where groups restart
    uint8* out;             // 128x1, transposed
    uint8* scale;
    uint8* row_out;         // ROWS_TOO: 1x128
    uint8* row_scale;
    // Strides in bytes; what is multiplied with one has 32 bits as well.
    uint32 data_row, scale_in_row, scale_in_col, out_col, scale_row, row_out_row, row_scale_row, row_scale_col;
    int rows, columns, groups, experts, slab;
};
static_assert(sizeof(Columns) == ARGUMENT_BYTES_OF_HOST, "columns.py has the same structure");

// Memory ----------------------------------------------------------------------------------------------------------

DEVICE uint32 word_of(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

DEVICE void store_global2(uint8* p, uint2 v, bool is_there) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %3, 0;\n\t@p st.global.v2.u32 [%0], {%1, %2};\n\t}"
                 ::"l"(p), "r"(v.x), "r"(v.y), "r"(static_cast<uint32>(is_there)) : "memory");
}

// Ahead of all that touches global memory: the kernel before this one may still be at work, and the next one may start.
DEVICE void start_early() {
    wait_for_previous_grid();
    launch_dependents();
}

// Where a block works ---------------------------------------------------------------------------------------------

struct Place {
    int tile, group;  // along the columns; along the rows of the output
    int begin, end;  // rows that the group has
};

DEVICE int source_of(const Columns& p, int row) {
    if (GATHERS == 0) return row;
    return GATHERS == 64 ? static_cast<int>(__ldg(static_cast<const int64*>(p.gathered) + row))
                         : __ldg(static_cast<const int*>(p.gathered) + row);
}

DEVICE void store_column_scale(const Columns& p, const Place& place, int column, float scale) {
    store_scale<KIND>(p.scale + offset(p.scale_row, place.group), place.tile * 128 + column, scale);
}

// A group without rows: zeros.
DEVICE void clear_columns(const Columns& p, int group, int tile, int end) {
    for (int column = tile * 128 + threadIdx.x / 8; column < end * 128; column += THREADS / 8) {
        *reinterpret_cast<uint4*>(p.out + offset(GROUP, group) + threadIdx.x % 8 * 16 + offset(p.out_col, column)) = {};
        if (threadIdx.x % 8 == 0) store_scale<KIND>(p.scale + offset(p.scale_row, group), column, 1.0f);
    }
}

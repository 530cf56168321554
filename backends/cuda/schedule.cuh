// Which output tile comes next. One class per grouping; one thread walks the list and sends each tile to all
// others through a small ring in shared memory, so that consumers spend no registers on it.
//
// Legend: M rows of A, N rows of B, K reduction; a tile is TILE_M x TILE_N of the output; E groups (experts).
#pragma once

#include "config.cuh"
#include "ptx.cuh"

constexpr int TILE_M = 64 * WARPGROUPS * WAVES_M, TILE_N = WAVE_N * WAVES_N;

struct Problem {
    int m, n, k;             // of one group's output and reduction; M-grouped: m is all rows, K-grouped: k is all tokens
    int groups;              // E; 1 when dense
    const int* group_ends;   // [E] cumulative ends, int32, on the device; not read when dense
};

struct alignas(16) Tile {
    int group;        // expert, 0 when dense
    int row;          // first row of the tile in A (M-grouped: counted over all experts)
    int row_end;      // rows from here on belong to another tile or group
    int col;          // first row of the tile in B, within the group
    int k_begin;      // where the reduction starts along K, a multiple of 128 (K-grouped: the expert's first block)
    int k_length;     // 0: the tile is all zeros
    int is_end;       // no tile: the list is at its end
};

// Everybody but the consumers' main loop. Kernels for few rows have no time to wake up.
DEVICE void wait_long(uint32 barrier, uint32 parity) { FLIGHT == 1 ? barrier_wait_asleep(barrier, parity) : barrier_wait(barrier, parity); }

// A ring of slots in shared memory with a barrier for each direction; it serves operands and tiles alike.
template <int slots>
struct Ring {
    uint32 barriers;
    uint32 uses = 0;  // so far, by this warp

    DEVICE explicit Ring(uint32 barriers) : barriers(barriers) {}
    DEVICE uint32 slot() const { return uses % slots; }
    DEVICE uint32 full() const { return barriers + slot() * 8; }
    DEVICE uint32 empty() const { return barriers + (slots + slot()) * 8; }
    DEVICE uint32 phase() const { return uses / slots & 1; }
    DEVICE void wait_full() const { wait_long(full(), phase()); }
    DEVICE void wait_empty() const { wait_long(empty(), ~(uses / slots) & 1); }
    DEVICE void advance(int count = 1) { uses += count; }
    static DEVICE void init(uint32 barriers, uint32 writers, uint32 readers) {
        for (int i = 0; i < slots; ++i) {
            barrier_init(barriers + i * 8, writers);
            barrier_init(barriers + (slots + i) * 8, readers);
        }
    }
};

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The two blocks of a cluster take neighbouring tiles of a row (or, with SHARES_B, of a column), so that they share the rows of
// A (or of B). Schedules count such pairs; where the number of tiles is odd, one block of the last pair gets none of the output.
constexpr int PAIRED_ROWS = SHARES_B ? CLUSTER : 1, PAIRED_COLUMNS = SHARES_B ? 1 : CLUSTER;
DEVICE int first_index() { return blockIdx.x / CLUSTER; }
DEVICE int index_step() { return grid_blocks_again() / CLUSTER; }
DEVICE int row_groups(int m) { return ceil_div(m, TILE_M * PAIRED_ROWS); }
DEVICE int column_groups(int n) { return ceil_div(n, TILE_N * PAIRED_COLUMNS); }
DEVICE int first_row(int row_group) { return (row_group * PAIRED_ROWS + (PAIRED_ROWS > 1 ? cluster_rank() : 0)) * TILE_M; }
DEVICE int first_column(int column_group) {
    return (column_group * PAIRED_COLUMNS + (PAIRED_COLUMNS > 1 ? cluster_rank() : 0)) * TILE_N;
}

// Where the last tile of a row has no more than NARROW columns, it is a job of its own kind that takes a fraction of a tile's time,
// and such jobs are dealt out separately: to the last block first, so that who has a tile fewer begins, and each when the
// band that it belongs to is over, or the last band of columns has passed it, while its rows of A are in L2.
DEVICE bool has_narrow_tiles(int n) { return NARROW > 0 && n % TILE_N > 0 && n % TILE_N <= NARROW; }
DEVICE int first_narrow_index() { return index_step() - 1 - first_index(); }
DEVICE int whole_columns(int n) { return has_narrow_tiles(n) ? n / TILE_N : column_groups(n); }
DEVICE bool is_narrow(const Problem& p, int col) { return NARROW > 0 && p.n - col <= NARROW; }
DEVICE bool is_narrow_next(int narrow, int index, int row_tiles, int col_tiles) {
    if (narrow >= row_tiles) return false;
    const int first = (col_tiles - 1) / BAND * BAND;  // of the last band of columns
    return index >= (COLUMN_BANDS ? first * row_tiles + (narrow + 1) * (col_tiles - first) : min((narrow / BAND + 1) * BAND, row_tiles) * col_tiles);
}
static_assert(NARROW == 0 || (PAIRED_COLUMNS == 1 && WAVES_M == 1 && GROUPING != REDUCTION_GROUPS));

// Walk the grid of row_tiles x col_tiles in bands of BAND row tiles (or pairs), or column tiles: the tiles that run at one time then share few
// rows and columns, so most operand reads hit L2, and what a band keeps there is read from memory once.
DEVICE int2 banded(uint32 index, uint32 row_tiles, uint32 col_tiles) {
    const uint32 across = COLUMN_BANDS ? col_tiles : row_tiles, along = COLUMN_BANDS ? row_tiles : col_tiles;
    const uint32 band = index / (BAND * along), first = band * BAND, rest = index - first * along;
    const uint32 width = min(BAND, across - first);
    const int in_band = first + rest % width, at = rest / width;
    return COLUMN_BANDS ? int2{at, in_band} : int2{in_band, at};
}

// The last wave of tiles may leave most blocks idle. Where at most half of them have a tile in it, these tiles are cut into
// halves of TILE_M / 2 rows: for those a warpgroup makes one of its two waves.
class DenseSchedule {
    const Problem& p;
    int index, narrow;

  public:
    DEVICE explicit DenseSchedule(const Problem& problem)
        : p(problem), index(first_index()), narrow(has_narrow_tiles(p.n) ? first_narrow_index() : row_groups(p.m)) {}
    DEVICE bool next(Tile& tile) {
        const int row_tiles = row_groups(p.m), col_tiles = whole_columns(p.n);
        if (NARROW > 0 && is_narrow_next(narrow, index, row_tiles, col_tiles)) {
            const int row = first_row(narrow);
            tile = {0, row, min(row + TILE_M, p.m), col_tiles * TILE_N, 0, p.k, 0};
            narrow += index_step();
            return true;
        }
        const int tiles = row_tiles * col_tiles, last = tiles % index_step(), whole = tiles - last;
        const bool halve = WAVES_M == 2 && 2 * last <= index_step() && index >= whole;
        const int of_tile = halve ? whole + (index - whole) / 2 : index;
        if (of_tile >= tiles) return false;
        const int2 at = banded(of_tile, row_tiles, col_tiles);
        const int row = first_row(at.x), middle = min(row + TILE_M / 2, p.m), end = min(row + TILE_M, p.m);
        const bool is_second = halve && (index - whole) % 2 == 1;
        tile = {0, is_second ? middle : row, halve && !is_second ? middle : end, first_column(at.y), 0, p.k, 0};
        index += index_step();
        return true;
    }
};

// RESIDENT_B: one column of tiles after another, each from top to bottom, so that its columns of B are loaded once. As long as there is a
// column for every block they go down in step: what they write then lies side by side, and they share A's rows in L2. The tiles of the
// columns left over are dealt out evenly, in stretches.
class DenseColumnSchedule {
    const Problem& p;
    int done = 0;  // tiles of this block

  public:
    DEVICE explicit DenseColumnSchedule(const Problem& problem) : p(problem) {}
    DEVICE bool next(Tile& tile) {
        const int blocks = index_step(), block = first_index(), row_tiles = row_groups(p.m), col_tiles = column_groups(p.n);
        const int in_step = col_tiles / blocks * row_tiles;
        int row, col;
        if (done < in_step) {
            row = done % row_tiles, col = block + done / row_tiles * blocks;
        } else {
            const int left = col_tiles % blocks * row_tiles, each = left / blocks, more = left % blocks, at = done - in_step;
            if (at >= each + (block < more)) return false;
            const int index = block * each + min(block, more) + at;
            row = index % row_tiles, col = col_tiles / blocks * blocks + index / row_tiles;
        }
        tile = {0, row * TILE_M, min(row * TILE_M + TILE_M, p.m), col * TILE_N, 0, p.k, 0};
        ++done;
        return true;
    }
};

// Rows [ends[e-1], ends[e]) of A meet expert e's matrix B. Rows past the last end form one more group whose reduction
// is empty: their output is zero.
class RowGroupSchedule {
    const Problem& p;
    int index;       // of the next tile, counted from the current group's first
    int narrow = 0;  // of the next narrow one, as well
    int group = -1, begin = 0, end = 0;

  public:
    DEVICE explicit RowGroupSchedule(const Problem& problem) : p(problem), index(first_index()) {
        if (has_narrow_tiles(p.n)) narrow = first_narrow_index();
    }
    DEVICE bool next(Tile& tile) {
        const int col_tiles = whole_columns(p.n), narrow_columns = has_narrow_tiles(p.n) ? 1 : 0;
        int row_tiles = row_groups(end - begin);
#pragma unroll 1
        while (index >= row_tiles * col_tiles && narrow >= row_tiles * narrow_columns) {
            index -= row_tiles * col_tiles;
            narrow -= row_tiles * narrow_columns;
            if (++group > p.groups) return false;
            begin = end;
            end = group < p.groups ? min(max(__ldg(p.group_ends + group), begin), p.m) : p.m;
            row_tiles = row_groups(end - begin);
        }
        const int k = group < p.groups ? p.k : 0;
        if (narrow_columns > 0 && is_narrow_next(narrow, index, row_tiles, col_tiles)) {
            tile = {group, begin + first_row(narrow), end, col_tiles * TILE_N, 0, k, 0};
            narrow += index_step();
            return true;
        }
        const int2 at = banded(index, row_tiles, col_tiles);
        tile = {group, begin + first_row(at.x), end, first_column(at.y), 0, k, 0};
        index += index_step();
        return true;
    }
};

// Tokens [ends[e-1], ends[e]) are the reduction of expert e's own M x N output. They are stored in whole blocks of 128, and
// so are their scales: expert e's first block is ends[e-1] / 128 + e. `skip_empty`: an expert without tokens has no tiles.
template <bool skip_empty>
class ReductionGroupSchedule {
    const Problem& p;
    int index;  // of the next tile, counted from the current group's first
    int group = -1, begin = 0, end = 0;

  public:
    DEVICE explicit ReductionGroupSchedule(const Problem& problem) : p(problem), index(first_index()) {}
    DEVICE bool next(Tile& tile) {
        const int row_tiles = row_groups(again(p.m)), col_tiles = column_groups(again(p.n));
#pragma unroll 1
        while (group < 0 || (skip_empty && begin == end) || index >= row_tiles * col_tiles) {
            if (group >= 0 && !(skip_empty && begin == end)) index -= row_tiles * col_tiles;
            if (++group >= p.groups) return false;
            begin = end;
            end = min(max(__ldg(p.group_ends + group), begin), p.k);
        }
        const int2 at = banded(index, row_tiles, col_tiles);
        const int block = begin / 128 + group;  // the blocks of the experts before it: tokens are stored in whole blocks
        tile = {group, first_row(at.x), p.m, first_column(at.y), block * 128, end - begin, 0};
        index += index_step();
        return true;
    }
};

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
    int col_end;      // NARROW: columns from here on belong to another tile or lie past the end
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
// band that it belongs to is over, while its rows of A are in L2.
DEVICE bool has_narrow_tiles(int n) { return NARROW > 0 && n % TILE_N > 0 && n % TILE_N <= NARROW; }
DEVICE int first_narrow_index() { return index_step() - 1 - first_index(); }
DEVICE int whole_columns(int n) { return has_narrow_tiles(n) ? n / TILE_N : column_groups(n); }
DEVICE bool is_narrow(const Tile& tile) { return NARROW > 0 && tile.col_end - tile.col <= NARROW; }
DEVICE bool is_narrow_next(int narrow, int index, int row_tiles, int col_tiles) {
    if (COLUMN_BANDS) {
        const int before = (col_tiles - 1) / BAND * BAND;
        return narrow < row_tiles && index >= before * row_tiles + (narrow + 1) * (col_tiles - before);
    }
    return narrow < row_tiles && index >= min((narrow / BAND + 1) * BAND, row_tiles) * col_tiles;
}
static_assert(NARROW == 0 || (PAIRED_COLUMNS == 1 && WAVES_M == 1 && GROUPING != REDUCTION_GROUPS));

// Walk the grid of row_tiles x col_tiles in bands of BAND row tiles (or pairs): the tiles that run at one time then share few
// rows and columns, so most operand reads hit L2.
DEVICE int2 banded(uint32 index, uint32 row_tiles, uint32 col_tiles) {
    if (COLUMN_BANDS) {
        const uint32 band = index / (BAND * row_tiles);
        const uint32 width = min(BAND, col_tiles - band * BAND);
        const uint32 rest = index - band * BAND * row_tiles;
        return {static_cast<int>(rest / width), static_cast<int>(band * BAND + rest % width)};
    }
    const uint32 band = index / (BAND * col_tiles);
    const uint32 height = min(BAND, row_tiles - band * BAND);
    const uint32 rest = index - band * BAND * col_tiles;
    return {static_cast<int>(band * BAND + rest % height), static_cast<int>(rest / height)};
}

// The last wave of tiles may leave most blocks idle. Where at most half of them have a tile in it, these tiles are cut into
// halves of TILE_M / 2 rows: for those a warpgroup makes one of its two waves. With narrow tiles they are cut into pieces of NARROW
// columns, where two such pieces for each block are enough. Where they aren't cut, blocks that have no tile in the last wave take all narrow
// ones, as long as that is no more than two for each.
class DenseSchedule {
    const Problem& p;
    int index, narrow;

    static constexpr int PIECES = NARROW > 0 ? TILE_N / NARROW : 1;
    DEVICE int row_tiles() const { return row_groups(p.m); }
    DEVICE int col_tiles() const { return whole_columns(p.n); }
    DEVICE int in_last_wave() const { return row_tiles() * col_tiles() % index_step(); }
    DEVICE int narrow_columns() const { return has_narrow_tiles(p.n) ? row_tiles() : 0; }
    DEVICE bool cuts() const {
        const int last = in_last_wave();
        return NARROW > 0 && last > 0 && PIECES * last + narrow_columns() <= 2 * index_step();
    }
    DEVICE int narrow_step() const {  // blocks that narrow tiles are dealt out to
        const int idle = index_step() - in_last_wave();
        return !cuts() && narrow_columns() <= 2 * idle ? idle : index_step();
    }
    DEVICE bool next_narrow(Tile& tile) {
        const int columns = narrow_columns(), last = in_last_wave(), whole = row_tiles() * col_tiles() - (cuts() ? last : 0);
        const int count = columns + (cuts() ? PIECES * last : 0);
        if (narrow >= count || (index < whole && !is_narrow_next(min(narrow, columns), index, columns, col_tiles()))) return false;
        int row = first_row(narrow), col = col_tiles() * TILE_N;
        if (narrow >= columns) {
            const int piece = narrow - columns;
            const int2 at = banded(whole + piece / PIECES, row_tiles(), col_tiles());
            row = first_row(at.x), col = first_column(at.y) + piece % PIECES * NARROW;
        }
        tile = {0, row, min(row + TILE_M, p.m), col, 0, p.k, 0, min(col + NARROW, p.n)};
        narrow += narrow_step();
        return true;
    }

  public:
    DEVICE explicit DenseSchedule(const Problem& problem) : p(problem), index(first_index()), narrow(first_narrow_index()) {
        if (NARROW > 0 && narrow >= narrow_step()) narrow = row_tiles() * PIECES + index_step() * PIECES;  // none
    }
    DEVICE bool next(Tile& tile) {
        if (NARROW > 0 && next_narrow(tile)) return true;
        const int row_tiles = row_groups(p.m), col_tiles = whole_columns(p.n);
        const int tiles = row_tiles * col_tiles, last = tiles % index_step(), whole = tiles - last;
        const bool halve = WAVES_M == 2 && 2 * last <= index_step() && index >= whole;
        const int of_tile = halve ? whole + (index - whole) / 2 : index;
        if (of_tile >= (cuts() ? whole : tiles)) return false;
        const int2 at = banded(of_tile, row_tiles, col_tiles);
        const int row = first_row(at.x), middle = min(row + TILE_M / 2, p.m), end = min(row + TILE_M, p.m);
        const bool is_second = halve && (index - whole) % 2 == 1;
        tile = {0, is_second ? middle : row, halve && !is_second ? middle : end, first_column(at.y), 0, p.k, 0, p.n};
        index += index_step();
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
            tile = {group, begin + first_row(narrow), end, col_tiles * TILE_N, 0, k, 0, p.n};
            narrow += index_step();
            return true;
        }
        const int2 at = banded(index, row_tiles, col_tiles);
        tile = {group, begin + first_row(at.x), end, first_column(at.y), 0, k, 0, p.n};
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
        tile = {group, first_row(at.x), p.m, first_column(at.y), block * 128, end - begin, 0, p.n};
        index += index_step();
        return true;
    }
};

"""The tile schedules of schedule.cuh, compiled for the CPU: every tile of every group comes exactly once."""

import itertools
import random
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fp8c.backends.cuda import config as gemm_config
from fp8c.backends.cuda.config import GemmConfig, Grouping, Output, Scales, one_wide_wave

SOURCES = Path(gemm_config.__file__).parent

# What schedule.cuh needs of CUDA, for one block at a time.
HOST_PTX = """
#pragma once
#include <algorithm>
using uint32 = unsigned int; using uint64 = unsigned long long;
#define DEVICE inline
using std::max; using std::min;
inline uint32 min(int a, uint32 b) { return std::min<uint32>(a, b); }
struct Index { int x; };
inline Index blockIdx, gridDim;
inline int cluster_rank() { return blockIdx.x % CLUSTER; }
inline uint32 grid_blocks_again() { return gridDim.x; }
inline int again(int value) { return value; }
inline int __ldg(const int* p) { return *p; }
struct int2 { int x, y; };
inline void barrier_wait(uint32, uint32) {}
inline void barrier_wait_asleep(uint32, uint32) {}
inline void barrier_init(uint32, uint32) {}
"""

PROGRAM = """
#include "config.cuh"
#include "schedule.cuh"
#include <cstdio>
#include <cstdlib>
#include <vector>
// arguments: blocks m n k ends...; prints one line a tile: group row row_end col k_begin k_length block
int main(int count, char** arguments) {
    std::vector<int> x;
    for (int i = 1; i < count; ++i) x.push_back(std::atoi(arguments[i]));
    gridDim.x = x[0];
    const Problem p = {x[1], x[2], x[3], count - 5, x.data() + 4};
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        SCHEDULE schedule(p);
        Tile t;
        while (schedule.next(t))
            std::printf("%d %d %d %d %d %d %d\\n", t.group, t.row, t.row_end, t.col, t.k_begin, t.k_length, blockIdx.x);
    }
}
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compiled(folder: Path, config: GemmConfig, schedule: str) -> Path:
    for name, text in config.headers().items():
        (folder / name).write_text(text)
    (folder / "ptx.cuh").write_text('#include "config.cuh"\n' + HOST_PTX)
    (folder / "schedule.cuh").write_text((SOURCES / "schedule.cuh").read_text())
    (folder / "main.cpp").write_text(f"#define SCHEDULE {schedule}\n{PROGRAM}")
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "main.cpp", "-o", "main"], cwd=folder, check=True
    )
    return folder / "main"


def tiles_of(program: Path, *arguments: int) -> list[tuple[int, ...]]:
    return [tile for tile, _ in tiles_and_blocks(program, *arguments)]


def tiles_and_blocks(program: Path, *arguments: int) -> list[tuple[tuple[int, ...], int]]:
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True)
    lines = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    return [(line[:-1], line[-1]) for line in lines]


def config_of(grouping: Grouping, cluster: int, output: Output = Output.BF16) -> GemmConfig:
    return GemmConfig(
        Scales.PER_BLOCK, grouping, output, waves_m=2, waves_n=1, band=3, staging_bytes=2048, cluster=cluster
    )


def sharing_columns(grouping: Grouping) -> GemmConfig:
    """Clusters whose blocks lie below each other."""
    return replace(one_wide_wave(Scales.PER_BLOCK, grouping, Output.BF16, cluster=2), band=3)


def with_narrow_tiles(grouping: Grouping) -> GemmConfig:
    return replace(sharing_columns(grouping), narrow=64)


def in_column_bands(grouping: Grouping) -> GemmConfig:
    return replace(with_narrow_tiles(grouping), column_bands=True)


def with_resident_columns() -> GemmConfig:
    return replace(one_wide_wave(Scales.PER_BLOCK, Grouping.DENSE, Output.BF16), resident_b=True)


def columns(n: int, config: GemmConfig) -> list[int]:
    """First columns of all tiles; a cluster's second block may get one past the end."""
    return _starts(n, config.tile_n, 1 if config.shares_b else config.cluster)


def rows(m: int, config: GemmConfig) -> list[int]:
    """First rows of all tiles, as `columns`."""
    return _starts(m, config.tile_m, config.cluster if config.shares_b else 1)


def _starts(size: int, tile: int, together: int) -> list[int]:
    return list(range(0, -(-size // (tile * together)) * tile * together, tile))


@pytest.mark.parametrize("cluster", [1, 2])
def test_dense_tiles_come_once(tmp_path: Path, cluster: int) -> None:
    config = config_of(Grouping.DENSE, cluster)
    program = compiled(tmp_path, config, "DenseSchedule")
    for m, n, blocks in ((1, 1, 2), (4096, 2112, 132), (700, 130, 6), (256 * 7, 128 * 5, 8)):
        found = tiles_of(program, blocks, m, n, 512)
        rows = range(0, m, config.tile_m)
        tiles = [(row, col) for row in rows for col in columns(n, config)]
        in_last_wave = len(tiles) % blocks
        halves = 2 * in_last_wave if 2 * in_last_wave <= blocks else 0
        half = config.tile_m // 2
        cut = [t for t in found if t[2] != min(t[1] + config.tile_m, m) or t[1] % config.tile_m != 0]
        whole = [t for t in found if t not in cut]
        middles = {(t[1], t[3]): t for t in cut if t[1] % config.tile_m == 0}
        assert len(found) == len(tiles) + halves // 2
        assert {(t[1] // config.tile_m * config.tile_m, t[3]) for t in found} == set(tiles)
        assert all(t[2] == min(t[1] + half, m) for t in middles.values())
        for row, col in tiles:
            parts = sorted(t for t in found if t[3] == col and row <= t[1] < row + config.tile_m)
            starts = [row] if len(parts) == 1 else [row, min(row + half, m)]
            assert [t[1] for t in parts] == starts
        assert len(whole) >= len(tiles) - halves // 2


@pytest.mark.parametrize(
    "config",
    [
        sharing_columns(Grouping.DENSE),
        with_narrow_tiles(Grouping.DENSE),
        in_column_bands(Grouping.DENSE),
    ],
)
def test_dense_tiles_come_once_where_clusters_share_columns(tmp_path: Path, config: GemmConfig) -> None:
    program = compiled(tmp_path, config, "DenseSchedule")
    for m, n, blocks in ((1, 1, 2), (4096, 2112, 132), (4096, 4096, 132), (2900, 64, 6), (700, 448, 6), (896, 960, 8)):
        found = tiles_of(program, blocks, m, n, 512)
        expected = [(0, r, min(r + config.tile_m, m), c, 0, 512) for r in rows(m, config) for c in columns(n, config)]
        assert sorted(found) == sorted(expected)


def test_resident_columns_come_once_and_are_fetched_seldom(tmp_path: Path) -> None:
    config = with_resident_columns()
    program = compiled(tmp_path, config, "DenseColumnSchedule")
    for m, n, blocks in ((1, 1, 2), (4096, 32768, 132), (2900, 64, 6), (700, 448, 6), (896, 960, 8), (5000, 7168, 130)):
        found = tiles_and_blocks(program, blocks, m, n, 512)
        expected = [(0, r, min(r + config.tile_m, m), c, 0, 512) for r in rows(m, config) for c in columns(n, config)]
        assert sorted(tile for tile, _ in found) == sorted(expected)
        counts = Counter(block for _, block in found)
        assert max(counts.values()) <= min(counts[block] for block in range(blocks)) + 1
        fetched = [list(group) for _, group in itertools.groupby(found, lambda x: (x[1], x[0][3]))]
        assert len(fetched) <= len(columns(n, config)) + blocks  # a column more for each border between stretches
        assert all([t[1] for t, _ in column] == sorted(t[1] for t, _ in column) for column in fetched)


def test_resident_columns_go_down_in_step(tmp_path: Path) -> None:
    config = with_resident_columns()
    found = tiles_and_blocks(compiled(tmp_path, config, "DenseColumnSchedule"), 4, 1024, 9 * 192, 512)
    for block in range(4):
        own = [tile for tile, b in found if b == block]
        assert [(t[1], t[3]) for t in own[:16]] == [
            (row * 128, (block + 4 * turn) * 192) for turn in (0, 1) for row in range(8)
        ]


@pytest.mark.parametrize("cluster", [1, 2])
def test_every_row_is_in_one_tile_of_its_columns(tmp_path: Path, cluster: int) -> None:
    """Also where the last wave is cut into halves: FP32 outputs are added to."""
    config = config_of(Grouping.DENSE, cluster)
    program = compiled(tmp_path, config, "DenseSchedule")
    for m, n, blocks in ((2304, 2176, 132), (7168, 2048, 132), (1959, 2121, 132), (700, 130, 6), (1, 1, 2)):
        rows: dict[int, list[int]] = {}
        for _, row, row_end, col, _, _ in tiles_of(program, blocks, m, n, 512):
            rows.setdefault(col, []).extend(range(row, min(row + config.tile_m, row_end)))
        assert all(sorted(r) == list(range(m)) for r in rows.values())


@pytest.mark.parametrize(
    "config",
    [
        *(config_of(Grouping.ROW_GROUPS, cluster) for cluster in (1, 2)),
        sharing_columns(Grouping.ROW_GROUPS),
        with_narrow_tiles(Grouping.ROW_GROUPS),
        in_column_bands(Grouping.ROW_GROUPS),
    ],
)
def test_row_groups_cover_all_rows_and_zero_the_rest(tmp_path: Path, config: GemmConfig) -> None:
    program = compiled(tmp_path, config, "RowGroupSchedule")
    rng = random.Random(1)
    for _ in range(20):
        sizes = [rng.choice((0, 0, 1, 17, 255, 256, 257, 900)) for _ in range(rng.randint(1, 6))]
        past_end = rng.choice((0, 40))
        ends = list(itertools.accumulate(sizes))
        m, n, k = ends[-1] + past_end, rng.choice((40, 300, 420)), 640
        found = tiles_of(program, rng.choice((2, 6, 132)), m, n, k, *ends)
        expected = [
            (group, start + row, end, col, 0, k if group < len(sizes) else 0)
            for group, (start, end) in enumerate(zip([0, *ends], [*ends, m]))
            for row in rows(end - start, config)
            for col in columns(n, config)
        ]
        assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(("output", "skips_empty"), [(Output.BF16, False), (Output.FP32_ADD, True)])
def test_reduction_groups_restart_their_scales(tmp_path: Path, output: Output, skips_empty: bool) -> None:
    config = config_of(Grouping.REDUCTION_GROUPS, 2, output)
    program = compiled(tmp_path, config, f"ReductionGroupSchedule<{str(skips_empty).lower()}>")
    rng = random.Random(skips_empty)
    for _ in range(20):
        sizes = [rng.choice((0, 0, 1, 17, 127, 128, 129, 900)) for _ in range(rng.randint(1, 6))]
        ends = list(itertools.accumulate(sizes))
        m, n = 513, 300
        found = tiles_of(program, rng.choice((2, 6, 132)), m, n, 128 * (ends[-1] // 128 + len(sizes)), *ends)
        expected = [
            (group, row, m, col, 128 * (start // 128 + group), end - start)
            for group, (start, end) in enumerate(zip([0, *ends], ends))
            if not (skips_empty and start == end)
            for row in range(0, m, config.tile_m)
            for col in columns(n, config)
        ]
        assert sorted(found) == sorted(expected)


def test_narrow_tiles_are_shared_out_evenly(tmp_path: Path) -> None:
    """4096 columns are 21 tiles of 192 and 64 more; who has a whole tile fewer has the most narrow ones."""
    program = compiled(tmp_path, with_narrow_tiles(Grouping.ROW_GROUPS), "RowGroupSchedule")
    ends = [8192 * (expert + 1) for expert in range(4)]
    whole, narrow = Counter[int](), Counter[int]()
    for tile, block in tiles_and_blocks(program, 132, ends[-1], 4096, 7168, *ends):
        (narrow if tile[3] == 4032 else whole)[block] += 1
    assert sum(whole.values()) == 21 * 256 and sum(narrow.values()) == 256
    assert set(whole.values()) == {40, 41} and set(narrow.values()) == {1, 2}
    assert all(narrow[block] == 2 for block, count in whole.items() if count == 40)


def test_narrow_tiles_come_when_their_band_is_over(tmp_path: Path) -> None:
    """Their rows of A are then in L2."""
    config = with_narrow_tiles(Grouping.DENSE)
    program = compiled(tmp_path, config, "DenseSchedule")
    found = tiles_of(program, 2, 4096, 4096, 512)  # one cluster: the order is that of time
    band = config.band * config.tile_m * config.cluster
    order = [tile for tile in found if tile[1] % (2 * config.tile_m) == 0]
    for at, tile in enumerate(order):
        if tile[3] == 4032:
            assert all(before[1] // band <= tile[1] // band for before in order[:at])
            assert not any(after[1] // band == tile[1] // band and after[3] < 4032 for after in order[at:])


def test_bands_of_columns_take_their_columns_together(tmp_path: Path) -> None:
    """A band's columns for one row of tiles after the other, the narrow ones along with the last band."""
    config = in_column_bands(Grouping.DENSE)
    found = tiles_of(
        compiled(tmp_path, config, "DenseSchedule"), 2, 4096, 4096, 512
    )  # one cluster: the order is that of time
    order = [tile for tile in found if tile[1] % (2 * config.tile_m) == 0]
    width = config.band * config.tile_n
    whole = [tile for tile in order if tile[3] < 4032]
    assert whole == sorted(whole, key=lambda t: (t[3] // width, t[1], t[3]))
    for at, tile in enumerate(order):
        if tile[3] == 4032:
            assert {t[1] for t in order[at - config.band : at]} == {tile[1]}


def test_blocks_of_a_cluster_share_columns(tmp_path: Path) -> None:
    config = sharing_columns(Grouping.DENSE)
    program = compiled(tmp_path, config, "DenseSchedule")
    found = tiles_of(program, 2, 2000, 1000, 128)
    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    assert [(t[1] + config.tile_m, t[3]) for t in first] == [(t[1], t[3]) for t in second]


def test_blocks_of_a_cluster_share_rows(tmp_path: Path) -> None:
    config = config_of(Grouping.DENSE, 2)
    program = compiled(tmp_path, config, "DenseSchedule")
    found = tiles_of(program, 2, 2000, 1000, 128)
    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    assert [(t[1], t[3] + config.tile_n) for t in first] == [(t[1], t[3]) for t in second]

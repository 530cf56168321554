"""Which instance of the kernel serves a GEMM: a cost rule over the tile shapes. No torch here.

The rule counts tensor-core clocks of a k-block, the latency of a lone warpgroup, the epilogue, and how full the last wave
of tiles is. Its constants are fits to an H200 (docs/hopper_gemm.md); they rank shapes, they don't predict times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from fp8c.backends.cuda.config import BLOCK_K, GemmConfig, Grouping, Output, Scales, one_wide_wave, two_row_waves

_CLOCKS_PER_BLOCK_AT_LEAST = 330  # wait, wgmma, wait, promote, release: one after the other in one warpgroup
_EPILOGUE_BYTES_PER_CLOCK = 40  # of one multiprocessor
_TILE_CLOCKS = 700  # filling the pipeline, handing over the tile
_HALF_TILE = 0.7  # of a whole one's time: a lone wave hides less (wgrad 7168 x 2048 x 4096)
_L2_BYTES_PER_CLOCK = 50  # into one multiprocessor while all read
_LONG_K = 4096  # from here on the main loop counts more than a tile's end
_NARROW_COLUMNS = 64  # of a last tile of 128x192 that is multiplied as narrow as this
_NARROW_TILE = 0.43  # of a whole one's time
_PAIRS_FROM_K = 2048  # dense 256x128, whose output leaves through the last stage
_WIDE_FROM_K = 1536  # dense: below, a tile's end counts too much
_RESIDENT_K = range(257, 513)  # dense: four stages hold all of K; shorter, a GEMM is bound by its output
# Time of a 128x192 tile against three quarters of one of 256x128.
_WIDE_TILE = {Grouping.DENSE: 0.99, Grouping.ROW_GROUPS: 0.975}
_WIDE_SHORT_TILE = 0.97  # the same, dense, K below _LONG_K
_RESIDENT_TILE = 0.93  # the same where B stays in shared memory
_WIDE_BAND_TO_K = 8192  # 16 tiles of rows with all of K stay in L2
_KEPT_BYTES = 16 << 20  # that L2 keeps of one operand while the other passes
_COLUMN_BAND = 11  # tiles of 128x192, which six pairs of rows make a wave with
_SHORT_COLUMN_BAND = {Grouping.DENSE: 16, Grouping.ROW_GROUPS: 33}  # the same, K below _LONG_K
_SHORT_YIELD_EVERY = 8  # with them
_CLUSTER_FROM_WAVES = 2.0  # sharing rows of A pays when blocks stay busy for some tiles, and with two row waves

_WIDTHS = (16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_WIDE = (144, 160, 192)


@dataclass(frozen=True)
class Shape:
    """Sizes as the kernel sees them: rows of A, rows of B, reduction; `groups` experts share m (m-grouped) or k (k-grouped)."""

    m: int
    n: int
    k: int
    groups: int
    multiprocessors: int


@lru_cache(maxsize=4096)
def choose(
    shape: Shape,
    scales: Scales,
    grouping: Grouping,
    output: Output,
    promote: bool = True,
    a_type: str = "e4m3",
    b_type: str = "e4m3",
) -> GemmConfig:
    """The instance with the least estimated clocks."""
    configs = candidates(scales, grouping, output, promote, a_type, b_type)
    if shape.m <= 64:  # a second warpgroup would have no rows
        configs = (config for config in configs if config.tile_m == 64)
    elif shape.m <= 128:  # in flight, 128 x 32 and 128 x 48 took 1.2 to 1.3 times as long as 64 x 64
        configs = (c for c in configs if c.flight == 1 or c.warpgroups == 1 or c.tile_n >= 64)
    best = min(configs, key=lambda config: estimated_clocks(config, shape))
    return _arranged(best, shape)


def candidates(
    scales: Scales, grouping: Grouping, output: Output, promote: bool = True, a_type: str = "e4m3", b_type: str = "e4m3"
) -> Iterator[GemmConfig]:
    """All tile shapes, without clusters."""

    def columns(warpgroups: int, wave_n: int, waves_n: int = 1) -> GemmConfig:
        # In flight: what registers allow, and only where one scale of B serves a whole segment of columns.
        in_flight = {Scales.PER_BLOCK: 4 if wave_n <= 64 else 2}.get(scales, 1) if waves_n == 1 and wave_n <= 128 else 1
        return GemmConfig(
            scales,
            grouping,
            output,
            warpgroups=warpgroups,
            waves_n=waves_n,
            wave_n=wave_n,
            promote=promote,
            unroll=scales is not Scales.PER_ROW,
            flight=in_flight,
            staging_bytes=2048 if in_flight == 4 and output is Output.BF16 else 4096,
            a_type=a_type,
            b_type=b_type,
        )

    yield replace(two_row_waves(scales, grouping, output, promote=promote), a_type=a_type, b_type=b_type)
    if scales is not Scales.PER_ROW:  # there, B's scales would be read anew for each wave
        if output is Output.BF16:  # FP32 stores cost the registers that this one lacks
            yield columns(2, 128, waves_n=2)
        yield columns(2, 64, waves_n=3)
    if scales is Scales.PER_BLOCK:
        for wave_n in _WIDE:
            yield columns(2, wave_n)
    for wave_n in _WIDTHS:
        yield columns(2, wave_n)
        yield columns(1, wave_n)


def estimated_clocks(config: GemmConfig, shape: Shape) -> float:
    row_tiles, col_tiles, k = _tiles(config, shape)
    tiles = row_tiles * col_tiles
    waves = _waves(config, tiles, shape.multiprocessors)
    rounds = math.ceil(math.ceil(k / BLOCK_K) / config.stages)
    tensor = config.tile_m * config.tile_n / 32 / _utilisation(config)
    traffic = (config.tile_m + config.tile_n) * BLOCK_K / _L2_BYTES_PER_CLOCK * min(1.0, tiles / shape.multiprocessors)
    block = max(tensor, traffic, _CLOCKS_PER_BLOCK_AT_LEAST)
    if config.flight > 1:
        block = _small_block_clocks(config, shape, tiles)
        rounds = 0
    epilogue = config.tile_m * config.tile_n * config.output.element_bytes / _EPILOGUE_BYTES_PER_CLOCK
    idle_stages = max(0, rounds * config.stages - math.ceil(k / BLOCK_K))
    return waves * (math.ceil(k / BLOCK_K) * block + idle_stages * 40 + epilogue + _TILE_CLOCKS)


def _waves(config: GemmConfig, tiles: float, multiprocessors: int) -> float:
    """Waves of tiles. Of a dense GEMM, a last one that at most half of the blocks have a tile in is cut into halves."""
    whole, rest = divmod(tiles, multiprocessors)
    has_halves = config.waves_m == 2 and config.grouping is Grouping.DENSE and 2 * rest <= multiprocessors
    return whole + (math.ceil(rest / multiprocessors) * (_HALF_TILE if has_halves else 1.0))


def _small_block_clocks(config: GemmConfig, shape: Shape, tiles: float) -> float:
    """A k-block of a tile with several in flight, measured with M = 64: what its columns, its rows and L2 cost."""
    columns = (0.2 if config.warpgroups == 1 else 0.8) * config.tile_n
    segments = 6 * config.wave_n // math.gcd(config.wave_n, BLOCK_K)  # each has its scale of B to load and multiply
    latency = (210 if config.flight == 4 else 380) + columns + segments
    tensor = config.tile_m * config.tile_n / 32 / (0.6 if config.warpgroups == 1 else _utilisation(config))
    rows = min(shape.m, config.tile_m)
    traffic = (rows + config.tile_n) * BLOCK_K / _L2_BYTES_PER_CLOCK * min(1.0, tiles / shape.multiprocessors)
    return max(latency, tensor, traffic)


def _tiles(config: GemmConfig, shape: Shape) -> tuple[float, int, float]:
    """Expected tiles along rows (of all groups), along columns, and the reduction of one tile."""
    col_tiles = math.ceil(shape.n / config.tile_n)
    match config.grouping:
        case Grouping.DENSE:
            return math.ceil(shape.m / config.tile_m), col_tiles, shape.k
        case Grouping.ROW_GROUPS:  # on average half of 128 rows are lost; tiles of 256 rows may be halves
            wasted = 0.5 * shape.groups if config.waves_m == 1 else 0.25 * shape.groups
            return shape.m / config.tile_m + wasted, col_tiles, shape.k
        case Grouping.REDUCTION_GROUPS:
            return math.ceil(shape.m / config.tile_m) * shape.groups, col_tiles, shape.k / max(shape.groups, 1)


def _utilisation(config: GemmConfig) -> float:
    """Share of the tensor core's rate in the main loop, fitted."""
    if config.warpgroups == 1:
        return 0.35  # nobody multiplies while the one warpgroup promotes
    if config.waves_m == 2:
        share = 0.85
    else:  # three waves of 64 columns read A once, but wait for each other
        share = 0.73 if config.waves_n == 3 else 0.70 + 0.10 * min(config.tile_n, 192) / 192
    return share * ((0.75 if config.waves_m == 2 else 0.65) if config.scales is Scales.PER_ROW else 1.0)


def _arranged(config: GemmConfig, shape: Shape) -> GemmConfig:
    """Clusters, bands and what warpgroups do at a tile's end, for large tiles."""
    row_tiles, col_tiles, k = _tiles(config, shape)
    is_large = config.waves_m == 2 and row_tiles * col_tiles >= _CLUSTER_FROM_WAVES * shape.multiprocessors
    is_reduction = config.grouping is Grouping.REDUCTION_GROUPS
    is_forward = config.lead > 0 and not is_reduction
    if is_forward and is_large and (wide := _wide(config, shape)):
        return wide
    if config.wave_n == 192 and config.output is Output.BF16 and not is_reduction:  # few columns
        wide = one_wide_wave(config.scales, config.grouping, config.output)
        return replace(wide, promote=config.promote, a_type=config.a_type, b_type=config.b_type)
    has_pairs = is_large and col_tiles % 2 == 0 and shape.multiprocessors % 2 == 0
    if is_forward:
        if config.grouping is Grouping.DENSE and k >= _LONG_K:
            return replace(config, lead=0, held_stages=0, early=True, cluster=2 if has_pairs else 1)
        config = replace(config, band=16 if k <= _WIDE_BAND_TO_K else config.band)
    is_dense_by_blocks = config.scales is Scales.PER_BLOCK and config.grouping is Grouping.DENSE
    pairs_from = _PAIRS_FROM_K if config.grouping is Grouping.DENSE else _LONG_K
    is_alone = k < pairs_from if is_forward else is_dense_by_blocks
    if is_alone or not has_pairs:
        return config
    # An expert's gradient whose rows are no wider than a band is written row by row.
    return replace(config, cluster=2, column_bands=is_reduction and col_tiles <= 2 * config.band)


def _wide(config: GemmConfig, shape: Shape) -> GemmConfig | None:
    """Tiles of 128x192 where they serve better than these of 256x128."""
    is_dense = config.grouping is Grouping.DENSE
    if is_dense and config.promote and shape.k in _RESIDENT_K:
        return _resident(config, shape)
    if not config.promote or (is_dense and shape.k < _WIDE_FROM_K):
        return None
    # Pairs fetch less; but of a group of rows, the end of a pair may be empty.
    clusters = (2,) if shape.k >= _LONG_K else (2, 1)
    if shape.multiprocessors % 2:
        clusters = (1,)
    return next((wide for cluster in clusters if (wide := _wide_in(cluster, config, shape))), None)


def _resident(config: GemmConfig, shape: Shape) -> GemmConfig | None:
    """Tiles of 128x192 of one column after another, whose columns of B are fetched once."""
    wide = one_wide_wave(config.scales, config.grouping, config.output)
    wide = replace(wide, resident_b=True, a_type=config.a_type, b_type=config.b_type)
    row_tiles, col_tiles, _ = _tiles(config, shape)
    waves = math.ceil(math.ceil(shape.m / wide.tile_m) * math.ceil(shape.n / wide.tile_n) / shape.multiprocessors)
    return (
        wide if 0.75 * _RESIDENT_TILE * waves < _waves(config, row_tiles * col_tiles, shape.multiprocessors) else None
    )


def _wide_in(cluster: int, config: GemmConfig, shape: Shape) -> GemmConfig | None:
    is_long, is_dense = shape.k >= _LONG_K, config.grouping is Grouping.DENSE
    has_narrow = (is_long or not is_dense) and 0 < shape.n % 192 <= _NARROW_COLUMNS
    wide = replace(
        one_wide_wave(
            config.scales,
            config.grouping,
            config.output,
            cluster=cluster,
            narrow=_NARROW_COLUMNS if has_narrow else 0,
        ),
        a_type=config.a_type,
        b_type=config.b_type,
    )
    if wide.cluster > 1 and not is_long:
        band = _SHORT_COLUMN_BAND[config.grouping]
        wide = replace(wide, band=band, column_bands=True, yield_every=_SHORT_YIELD_EVERY)
    elif wide.cluster > 1 and wide.band * wide.cluster * wide.tile_m * shape.k > _KEPT_BYTES:
        wide = replace(wide, band=_COLUMN_BAND, column_bands=True)
    row_tiles, col_tiles, _ = _tiles(config, shape)
    if is_dense:
        clocks = _waves(config, row_tiles * col_tiles, shape.multiprocessors)
    else:  # groups of any size: the last wave is half full on average
        clocks = row_tiles * col_tiles / shape.multiprocessors + 0.5
    tile = _WIDE_TILE[config.grouping] if is_long or not is_dense else _WIDE_SHORT_TILE
    return wide if 0.75 * tile * _wide_waves(wide, shape) < clocks else None


def _wide_waves(config: GemmConfig, shape: Shape) -> float:
    """Waves of 128x192 tiles, their narrow ones dealt out as schedule.cuh does it."""
    blocks = shape.multiprocessors // config.cluster
    columns, rest = divmod(shape.n, config.tile_n)
    columns += rest > config.narrow
    narrow_columns = int(0 < rest <= config.narrow)
    rows_of_pair = config.tile_m * config.cluster
    if config.grouping is Grouping.ROW_GROUPS:
        rows = shape.m / rows_of_pair + 0.5 * shape.groups
        return rows * (columns + _NARROW_TILE * narrow_columns) / blocks + 0.5
    row_tiles = math.ceil(shape.m / rows_of_pair)
    each, more = divmod(row_tiles * columns, blocks)
    narrow_each, narrow_more = divmod(row_tiles * narrow_columns, blocks)
    # The first `more` blocks have a tile more, the last `narrow_more` a narrow one more.
    places = {0, max(more - 1, 0), min(more, blocks - 1), blocks - 1}
    return max(each + (b < more) + _NARROW_TILE * (narrow_each + (b >= blocks - narrow_more)) for b in places)

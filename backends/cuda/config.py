"""What distinguishes one instance of the GEMM kernel (gemm.cu) from another, and what follows from it. No torch here.

Legend: a tile is the part of the output one thread block makes at a time; a wave is the 64 x wave_n part of it that one
warpgroup makes with one chain of wgmma.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from fp8c.backends.cuda import build
from fp8c.backends.cuda.wgmma import wgmma_header

SHARED_LIMIT_BYTES = 232_448  # of one block on sm_90 (CUDA programming guide, compute capabilities)
BLOCK_K = 128  # length of a scale group along K
MAX_STAGES = 8  # the loop over a round of stages is unrolled
MAX_SMALL_STAGES = 20  # of small tiles, whose rounds are shorter
TILE_SLOTS = 4  # of the ring that carries tiles from the producer to the consumers


class Scales(enum.Enum):
    """Scales of B; A has 1x128 groups unless PER_TENSOR."""

    PER_BLOCK = "128x128"
    PER_ROW = "1x128"
    PER_TENSOR = "tensor"


# Measured with large tiles: 3 to 32 for PER_BLOCK, 2 to 16 for PER_ROW, which multiplies scales besides.
_YIELD_EVERY = {Scales.PER_BLOCK: 16, Scales.PER_ROW: 4, Scales.PER_TENSOR: 0}


class Grouping(enum.Enum):
    DENSE = "dense"
    ROW_GROUPS = "m-grouped"  # rows of A and of the output belong to experts
    REDUCTION_GROUPS = "k-grouped"  # stretches of K belong to experts, each with its own output


class Output(enum.Enum):
    BF16 = "bf16"
    FP32 = "fp32"
    FP32_ADD = "fp32-add"  # added to what is there

    @property
    def element_bytes(self) -> int:
        return 2 if self is Output.BF16 else 4


@dataclass(frozen=True)
class GemmConfig:
    """One instance of the kernel.

    `band`: row tiles (`column_bands`: column tiles) that form a band of the schedule; `cluster`: blocks that share rows of A (or of B);
    `unroll`: a round of stages is straight-line code; `flight`: k-blocks whose products are under way at a time.
    """

    sources: ClassVar[tuple[str, ...]] = build.SOURCES
    kernel: ClassVar[str] = "fp8c_gemm"

    scales: Scales
    grouping: Grouping
    output: Output
    warpgroups: int = 2
    waves_m: int = 1
    waves_n: int = 2
    wave_n: int = 128
    band: int = 16
    column_bands: bool = False
    cluster: int = 1
    shares_b: bool = False  # the blocks of a cluster lie below each other, not beside
    promote: bool = True
    unroll: bool = True
    narrow: int = 0  # columns of the wave that a last tile of no more columns takes
    flight: int = 1
    staging_bytes: int = 4096  # of one consumer warp: some chunks of the output, or one where a stage more counts more
    held_stages: int = 0  # 1: the last stage's memory takes the output of a tile at its end
    resident_b: bool = False  # K up to 128 * stages: B stays in its stages while a block goes down a column of tiles
    early: bool = False  # a tile's first wave is begun before the tile before it is written
    lead: int = 0  # k-blocks of a tile that the first warpgroup does before the second one begins it
    yield_every: int = 0  # of a promotion's multiplications; the other warpgroup may then go first
    a_type: str = "e4m3"
    b_type: str = "e4m3"

    @property
    def options(self) -> tuple[str, ...]:
        return build.OPTIONS

    @property
    def tile_m(self) -> int:
        return 64 * self.warpgroups * self.waves_m

    @property
    def tile_n(self) -> int:
        return self.wave_n * self.waves_n

    @property
    def a_box(self) -> int:
        """Rows of one box of A: half a tile where blocks share it, or where a tile may have an upper half only."""
        return self.tile_m // max(1 if self.shares_b else self.cluster, self.waves_m)

    @property
    def b_box(self) -> int:
        """Rows of one box of B: half a tile where blocks share it."""
        return self.tile_n // (self.cluster if self.shares_b else 1)

    def pairs(self, m: int, n: int) -> int:
        """Tiles of a dense m x n output, in pairs of a cluster's blocks where there are any."""
        rows, columns = (self.cluster, 1) if self.shares_b else (1, self.cluster)
        return -(-m // (self.tile_m * rows)) * -(-n // (self.tile_n * columns))

    @property
    def has_one_box_of_rows(self) -> bool:
        """Whether a tensor of fewer rows than a tile has a box of as many rows: `ONE_BOX_OF_ROWS` in gemm.cu."""
        return self.grouping is Grouping.DENSE and self.cluster == 1 and self.waves_m == 1

    @property
    def scale_a_box(self) -> int:
        """Rows of one box of A's scales. Rows of a group start up to three after a 16-byte boundary; a box has up to 256."""
        if self.grouping is not Grouping.ROW_GROUPS:
            return self.tile_m
        return 160 if self.tile_m == 256 else self.tile_m + 4  # 2 x 160, destinations 128-byte aligned

    @property
    def scale_a_bytes(self) -> int:
        if self.scales is Scales.PER_TENSOR:
            return 0
        boxes = 2 if self.grouping is Grouping.ROW_GROUPS and self.tile_m == 256 else 1
        return _round_up(boxes * self.scale_a_box * 4, 128)

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @cached_property
    def chunk(self) -> int:
        """Columns of the output that a warp writes at a time: 128 bytes when they divide the wave."""
        size = self.output.element_bytes
        if self.wave_n * size % 128 == 0:
            return 128 // size
        if self.output is Output.BF16:
            return self.wave_n // (2 if self.wave_n > 128 else 1)
        return math.gcd(self.wave_n, 16)

    @cached_property
    def stages(self) -> int:
        """As many as fit."""
        limit = MAX_SMALL_STAGES if self.flight > 1 else MAX_STAGES
        counts = range(self.flight, limit + 1, self.flight)
        return max(s for s in counts if self._shared_bytes(s) <= SHARED_LIMIT_BYTES)

    @property
    def shared_bytes(self) -> int:
        return self._shared_bytes(self.stages)

    def _shared_bytes(self, stages: int) -> int:
        segments = self.wave_n // math.gcd(self.wave_n, 128)
        slots = segments if segments <= 2 else _round_up(segments, 4)
        scale_b = {
            Scales.PER_ROW: _round_up(self.tile_n * 4, 128),
            Scales.PER_BLOCK: _round_up(self.waves_n * slots * 4, 16),
            Scales.PER_TENSOR: 0,
        }[self.scales]
        operands = stages * ((self.tile_m + self.tile_n) * BLOCK_K + self.scale_a_bytes + scale_b)  # multiples of 16
        tiles = TILE_SLOTS * (32 + 2 * 8)
        barriers = 2 * stages * 8 + self.output_barriers * 8 + (8 if self.lead else 0)
        return operands + 4 * self.warpgroups * self.staging_bytes + tiles + barriers

    @property
    def output_barriers(self) -> int:
        """Of a held stage: each warpgroup has written its part, the first one has read B."""
        return 3 if self.held_stages else 0

    @property
    def out_box_rows(self) -> int:
        """Rows of one store by TMA: a wave's, or a warp's part of it."""
        return 64 if self.held_stages else 16

    def headers(self) -> dict[str, str]:
        """The two generated headers that gemm.cu includes."""
        integers = {
            "WARPGROUPS": self.warpgroups,
            "WAVES_M": self.waves_m,
            "WAVES_N": self.waves_n,
            "WAVE_N": self.wave_n,
            "STAGES": self.stages,
            "NARROW": self.narrow,
            "CLUSTER": self.cluster,
            "FLIGHT": self.flight,
            "UNROLL": max(self.stages - 1, 1) if self.unroll else 1,
            "BAND": self.band,
            "STAGING_BYTES": self.staging_bytes,
            "HELD_STAGES": self.held_stages,
            "OUTPUT_BARRIERS": self.output_barriers,
            "LEAD": self.lead,
            "SHARED_BYTES_OF_HOST": self.shared_bytes,
            "CHUNK_OF_HOST": self.chunk,
            "SCALE_A_BOX_OF_HOST": self.scale_a_box,
        }
        lines = [
            "// Generated by config.py.",
            "#pragma once",
            *(f"enum {e.__name__} {{ {', '.join(m.name for m in e)} }};" for e in (Scales, Grouping, Output)),
            *(f"constexpr int {name} = {value};" for name, value in integers.items()),
            f"constexpr bool SHARES_B = {str(self.shares_b).lower()};",
            f"constexpr bool COLUMN_BANDS = {str(self.column_bands).lower()};",
            f"constexpr bool RESIDENT_B = {str(self.resident_b).lower()};",
            f"constexpr bool EARLY = {str(self.early).lower()};",
            f"constexpr bool PROMOTE = {str(self.promote).lower()};",
            f"constexpr Scales SCALES = Scales::{self.scales.name};",
            f"constexpr Grouping GROUPING = Grouping::{self.grouping.name};",
            f"constexpr Output OUTPUT = Output::{self.output.name};",
        ]
        return {
            "config.cuh": "\n".join(lines) + "\n",
            "wgmma.cuh": wgmma_header((self.wave_n, self.narrow), self.a_type, self.b_type),
        }


def two_row_waves(
    scales: Scales, grouping: Grouping, output: Output, cluster: int = 1, promote: bool = True
) -> GemmConfig:
    """256 x 128 tiles, each warpgroup two waves of 64 rows: the instance for large problems.

    With PER_ROW scales a round of stages isn't unrolled, because then it takes more registers than there are. Four stages
    leave too little memory for the output: a warp has one staging buffer. BF16 outputs of forward GEMMs also go
    through the last stage, and their warpgroups end a tile at different times.
    """
    # FP32 outputs fill more memory, others lack registers
    is_forward = scales is Scales.PER_BLOCK and output is Output.BF16
    return GemmConfig(
        scales,
        grouping,
        output,
        waves_m=2,
        waves_n=1,
        wave_n=128,
        band=8,
        cluster=cluster,
        promote=promote,
        unroll=scales is not Scales.PER_ROW,
        staging_bytes=2048,
        held_stages=int(is_forward),
        lead=int(is_forward),
        yield_every=_YIELD_EVERY[scales],
    )


def one_wide_wave(scales: Scales, grouping: Grouping, output: Output, cluster: int = 1, narrow: int = 0) -> GemmConfig:
    """128 x 192 tiles, each warpgroup one wave of 64 rows; BF16 outputs have memory for a whole tile, and a tile begins before the last one
    is written.

    A cluster's blocks share rows of B: with tiles wider than high that leaves the fewest bytes to fetch. Where the last
    tile of a row has no more than `narrow` columns, only as many are multiplied.
    """
    return GemmConfig(
        scales,
        grouping,
        output,
        waves_n=1,
        wave_n=192,
        band=12 if cluster > 1 else 16,
        cluster=cluster,
        shares_b=cluster > 1,
        narrow=narrow,
        staging_bytes=6144 if output is Output.BF16 else 4096,
        early=True,
        yield_every=_YIELD_EVERY[scales],
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple

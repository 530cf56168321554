"""The Hopper GEMMs without a GPU: the kernel cache and the tile rule."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fp8c.backends.cuda import build, tiles
from fp8c.backends.cuda.config import (
    BLOCK_K,
    GemmConfig,
    Grouping,
    Output,
    Scales,
    two_row_waves,
)
from fp8c.diagnostics import DiagnosticError

needs_compiler = pytest.mark.skipif(not build.has_compiler(), reason="neither NVRTC nor nvcc is installed")

FPROP = two_row_waves(Scales.PER_BLOCK, Grouping.DENSE, Output.BF16, cluster=2)
WGRAD = two_row_waves(Scales.PER_ROW, Grouping.REDUCTION_GROUPS, Output.FP32_ADD)
SHAPES = [
    (4096, 7168, 2048),
    (4096, 2112, 7168),
    (4096, 576, 7168),
    (1, 4096, 7168),
    (64, 2112, 7168),
    (128, 7168, 2048),
    (128, 4096, 7168),
]


@needs_compiler
def test_cache_builds_once_and_rebuilds_what_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[GemmConfig] = []

    def compile_cubin(config: GemmConfig) -> bytes:
        calls.append(config)
        return b"machine code"

    monkeypatch.setattr(build, "compile_cubin", compile_cubin)
    assert build.cubin(FPROP, tmp_path) == b"machine code"
    assert build.cubin(FPROP, tmp_path) == b"machine code"
    assert len(calls) == 1
    (path,) = tmp_path.glob("*.cubin")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert build.cubin(FPROP, tmp_path) == b"machine code"
    assert len(calls) == 2
    path.write_bytes(b"")
    assert build.cubin(FPROP, tmp_path) == b"machine code"
    assert len(calls) == 3
    assert not list(tmp_path.glob("*.part"))


@needs_compiler
def test_a_cache_that_cannot_be_used_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "compile_cubin", lambda config: b"machine code")
    (tmp_path / f"{build._key(FPROP)}.cubin").mkdir()  # can't be read as a file
    (tmp_path / "file").write_text("")  # can't hold a folder
    with caplog.at_level(logging.WARNING):
        assert build.cubin(FPROP, tmp_path) == b"machine code"
        assert build.cubin(FPROP, tmp_path / "file" / "kernels") == b"machine code"
        path = tmp_path / f"{build._key(WGRAD)}.cubin"
        path.write_bytes(b"damaged")
        assert build.cubin(WGRAD, tmp_path) == b"machine code"
    said = [record.getMessage() for record in caplog.records]
    assert any("R0438" in text and "can't be read, and is made again" in text for text in said)
    assert any("can't be written, so kernels are compiled in every process" in text for text in said)
    assert any(f"is damaged, and is made again: {path}" in text for text in said)
    assert build._read_checked(path) == b"machine code"


def test_what_a_build_brought_is_taken_whichever_compiler_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.install(build.source_key(FPROP), b"from the build", tmp_path)
    for compiler in (None, ("nvcc", "99")):
        monkeypatch.setattr(build, "_compiler", lambda found=compiler: found)
        assert build.cubin(FPROP, tmp_path) == b"from the build"
    assert build.source_key(FPROP) != build.source_key(WGRAD)


def test_a_machine_without_a_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8c.backends.cuda import launch

    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(launch.ctypes, "CDLL", load)
    launch._driver.cache_clear()
    with pytest.raises(DiagnosticError, match="E0432.*the CUDA driver can't be loaded: libcuda.so.1"):
        launch._driver()


def test_cache_key_changes_with_everything_that_changes_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {build._key(c) for c in (FPROP, WGRAD, replace(FPROP, cluster=1), replace(FPROP, b_type="e5m2"))}
    monkeypatch.setattr(build, "_compiler", lambda: ("nvrtc", "another version"))
    keys.add(build._key(FPROP))
    monkeypatch.setattr(build, "OPTIONS", (*build.OPTIONS, "-lineinfo"))
    keys.add(build._key(FPROP))
    assert len(keys) == 6


@needs_compiler
def test_two_processes_share_the_cache(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from fp8c.backends.cuda import build; from tests.backends.cuda.test_gemm_build import FPROP;"
        "print(len(build.cubin(FPROP, pathlib.Path(sys.argv[1]))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    sizes = {p.communicate()[0] for p in processes}
    assert len(sizes) == 1 and int(sizes.pop()) > 10_000
    assert len(list(tmp_path.glob("*.cubin"))) == 1


def test_without_compiler_or_cache_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_compiler", lambda: None)
    with pytest.raises(DiagnosticError, match="E0430.*\n.*pip install cuda-bindings"):
        build.cubin(FPROP, tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
def test_rule_keeps_the_last_wave_full_and_short_rows_narrow(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    config = tiles.choose(tiles.Shape(m, n, k, 1, 132), Scales.PER_BLOCK, Grouping.DENSE, Output.BF16)
    count = -(-m // config.tile_m) * -(-n // config.tile_n)
    waves = -(-count // 132)
    assert config.warpgroups == (1 if m <= 64 else config.warpgroups)
    if m <= 128:  # reading the weights is what takes time: all multiprocessors must read
        assert waves == 1 and count >= 60
    else:
        assert m * n / (waves * 132 * config.tile_m * config.tile_n) > 0.7


def test_rule_takes_clusters_only_for_even_columns() -> None:
    for m, n, k in SHAPES:
        config = tiles.choose(tiles.Shape(m, n, k, 1, 132), Scales.PER_BLOCK, Grouping.DENSE, Output.BF16)
        assert config.cluster == 1 or config.shares_b or -(-n // config.tile_n) % 2 == 0


@pytest.mark.parametrize(
    ("m", "n", "k", "groups", "tile", "cluster"),
    [
        (8192, 8192, 8192, 1, (128, 192), 2),
        (16384, 4096, 7168, 1, (128, 192), 2),
        (4096, 7168, 16384, 1, (256, 128), 2),
        (4096, 4096, 7168, 1, (256, 128), 2),
        (4096, 24576, 1536, 1, (128, 192), 2),
        (4096, 7168, 2048, 1, (256, 128), 2),
        (4096, 32768, 512, 1, (128, 192), 1),
        (4096, 32768, 256, 1, (256, 128), 1),
        (4096, 4096, 512, 1, (256, 128), 1),
        (4096, 2112, 7168, 1, (128, 192), 1),
        (32768, 4096, 7168, 4, (128, 192), 2),
        (32768, 7168, 2048, 8, (128, 192), 2),
        (32768, 4096, 7168, 64, (256, 128), 2),  # pairs of 128 rows would be half empty at each expert's end
    ],
)
def test_rule_takes_the_tiles_that_were_measured_fastest(
    m: int, n: int, k: int, groups: int, tile: tuple[int, int], cluster: int
) -> None:
    """docs/hopper_gemm.md; the last row is an estimate."""
    grouping = Grouping.DENSE if groups == 1 else Grouping.ROW_GROUPS
    config = tiles.choose(tiles.Shape(m, n, k, groups, 132), Scales.PER_BLOCK, grouping, Output.BF16)
    assert ((config.tile_m, config.tile_n), config.cluster) == (tile, cluster)
    assert config.early == (tile == (128, 192) or (groups == 1 and k >= 4096))


def test_rule_gives_128_rows_no_second_warpgroup_for_narrow_tiles() -> None:
    """128 x 48 took 14.4 us at 128 x 4096 x 7168, 64 x 64 takes 11.0 (docs/hopper_gemm.md)."""
    config = tiles.choose(tiles.Shape(128, 4096, 7168, 1, 132), Scales.PER_BLOCK, Grouping.DENSE, Output.BF16)
    assert (config.tile_m, config.tile_n, config.flight) == (64, 64, 4)


def test_rule_keeps_short_columns_in_shared_memory() -> None:
    for m, n, k, is_resident in ((4096, 32768, 512, True), (5000, 7168, 448, True), (4096, 32768, 640, False)):
        config = tiles.choose(tiles.Shape(m, n, k, 1, 132), Scales.PER_BLOCK, Grouping.DENSE, Output.BF16)
        assert config.resident_b == is_resident
        assert not is_resident or k <= config.stages * BLOCK_K


@pytest.mark.parametrize(
    ("m", "n", "k", "groups", "columns", "band"),
    [
        (16384, 4096, 7168, 1, True, 11),
        (8192, 8192, 8192, 1, True, 11),
        (16384, 7168, 4096, 1, False, 12),
        (4096, 24576, 1536, 1, True, 16),
        (32768, 7168, 2048, 4, True, 33),
    ],
)
def test_rule_bands_columns_where_that_was_faster(
    m: int, n: int, k: int, groups: int, columns: bool, band: int
) -> None:
    """docs/hopper_gemm.md."""
    grouping = Grouping.DENSE if groups == 1 else Grouping.ROW_GROUPS
    config = tiles.choose(tiles.Shape(m, n, k, groups, 132), Scales.PER_BLOCK, grouping, Output.BF16)
    assert (config.column_bands, config.band) == (columns, band)


@pytest.mark.parametrize(("m", "n", "columns"), [(7168, 2048, True), (4096, 7168, False)])
def test_rule_writes_an_experts_narrow_gradient_row_by_row(m: int, n: int, columns: bool) -> None:
    config = tiles.choose(tiles.Shape(m, n, 32768, 4, 132), Scales.PER_ROW, Grouping.REDUCTION_GROUPS, Output.FP32_ADD)
    assert (config.cluster, config.column_bands) == (2, columns)


def test_rule_serves_an_experts_gradient_by_blocks_in_bf16() -> None:
    config = tiles.choose(
        tiles.Shape(4096, 7168, 32768, 4, 132), Scales.PER_BLOCK, Grouping.REDUCTION_GROUPS, Output.BF16
    )
    assert (config.tile_m, config.tile_n, config.cluster, config.early) == (256, 128, 2, False)

"""Every instance of the GEMM kernel that the rule can choose, compiled: registers, spills, instructions, shared memory."""

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fp8c.backends.cuda import build, tiles
from fp8c.backends.cuda.config import (
    SHARED_LIMIT_BYTES,
    GemmConfig,
    Grouping,
    Output,
    Scales,
    one_wide_wave,
    two_row_waves,
)

NVCC, CUOBJDUMP = shutil.which("nvcc"), shutil.which("cuobjdump")


def policies() -> list[tuple[Scales, Grouping, Output]]:
    dense = [(s, Grouping.DENSE, o) for s in Scales for o in Output]
    rows = [(Scales.PER_BLOCK, Grouping.ROW_GROUPS, o) for o in (Output.BF16, Output.FP32)]
    return (
        dense + rows + [(s, Grouping.REDUCTION_GROUPS, o) for s in (Scales.PER_BLOCK, Scales.PER_ROW) for o in Output]
    )


def all_configs() -> list[GemmConfig]:
    """Every instance the rule can choose, with and without clusters where it makes them, but for the widths of bands."""
    configs: list[GemmConfig] = []
    for policy in policies():
        for config in tiles.candidates(*policy):
            configs.append(config)
            if config.waves_m == 2:
                configs.append(replace(config, cluster=2))
                if config.grouping is Grouping.REDUCTION_GROUPS:
                    configs.append(replace(config, cluster=2, column_bands=True))
    for grouping in (Grouping.DENSE, Grouping.ROW_GROUPS):
        alone = replace(two_row_waves(Scales.PER_BLOCK, grouping, Output.BF16), lead=0)
        early = replace(alone, held_stages=0, early=True)
        configs += [alone, early, replace(early, cluster=2), replace(early, cluster=2, column_bands=True)]
        for cluster, narrow in itertools.product((1, 2), (0, 64)):
            wide = one_wide_wave(Scales.PER_BLOCK, grouping, Output.BF16, cluster, narrow)
            configs += [wide] if cluster == 1 else [wide, replace(wide, column_bands=True)]
    wide = one_wide_wave(Scales.PER_BLOCK, Grouping.DENSE, Output.BF16)
    return [*configs, replace(wide, resident_b=True)]


def assembler_report(config: GemmConfig) -> tuple[str, str]:
    """(ptxas -v, SASS or "" without cuobjdump) of one instance."""
    sources = {name: (Path(build.__file__).parent / name).read_text() for name in build.SOURCES} | config.headers()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_text(text)
        target = ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas=-v"]
        command = ["nvcc", *build.OPTIONS, *target, "-o", "gemm.cubin", "gemm.cu"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, f"{config}\n{result.stderr}"
        sass = ""
        if CUOBJDUMP is not None:
            dump = [CUOBJDUMP, "-sass", "gemm.cubin"]
            sass = subprocess.run(dump, cwd=folder, capture_output=True, text=True, check=True).stdout
    return result.stderr, sass


def check_assembler_report(config: GemmConfig) -> None:
    report, sass = assembler_report(config)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, f"{config}\n{report}"
    registers = int(re.findall(r"Used (\d+) registers", report)[0])
    assert registers * config.threads <= 65536
    # wgmma serialised, setmaxnreg ignored; a wave that is begun early may be waited for once more, before the epilogue's first branch
    assert len(re.findall("C75", report)) == len(re.findall("C7517", report)) <= int(config.early), report
    if not sass:
        return
    shape = rf"QGMMA\.64x{config.wave_n}x32\.F32\.E4M3\.E4M3"
    per_block = 4 * config.waves_m * config.waves_n
    assert len(re.findall(shape, sass)) >= per_block, config
    assert not re.search(r"\b(LDL|STL)\b", sass), config
    assert "UTMALDG.2D" in sass and re.search(r"UTMASTG|UTMAREDG|STG\.E\.128|RED\S*\.ADD", sass), config
    assert "BRA.U.ANY" not in sass, config  # a loop over active lanes around TMA: one elected thread issues it
    if config.cluster == 2:
        assert "UTMALDG.2D.MULTICAST" in sass, config


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_every_instance_uses_the_tensor_core_and_spills_nothing() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check_assembler_report, all_configs()))


def test_every_instance_fits_into_shared_memory() -> None:
    for config in all_configs():
        assert config.shared_bytes <= SHARED_LIMIT_BYTES
        assert config.stages >= 3, config


def test_the_rule_chooses_no_other_instance() -> None:
    """`yield_every` changes the machine code after compilation."""

    def compiled(config: GemmConfig) -> GemmConfig:
        return replace(config, band=0, yield_every=0)

    known = {compiled(config) for config in all_configs()}
    sizes = (1, 64, 128, 300, 2112, 4096, 7168, 8192, 32768)
    for scales, grouping, output in policies():
        for m, n, k, multiprocessors in itertools.product(sizes, sizes, (128, 512, 1536, 4096, 7168), (132, 131)):
            for groups in (1,) if grouping is Grouping.DENSE else (4, 128):
                chosen = tiles.choose(tiles.Shape(m, n, k, groups, multiprocessors), scales, grouping, output)
                assert compiled(chosen) in known, (m, n, k, groups, chosen)

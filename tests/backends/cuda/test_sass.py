"""Hints in machine code: which multiplications yield, what is kept, and that nothing else changes. Instructions are made here."""

import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fp8c.backends.cuda import build
from fp8c.backends.cuda.config import Grouping, Output, Scales, two_row_waves
from fp8c.backends.cuda.sass import with_yields

NAME = ".text.kernel"


def multiplication(destination: int, a: int, b: int, c: int | None = None, stall: int = 1) -> tuple[int, int]:
    """FFMA, or without `c` FMUL, as ptxas writes it: it yields and reuses nothing."""
    lower = (0x7220 if c is None else 0x7223) | destination << 16 | a << 24 | b << 32
    return lower, (0x400000 if c is None else c) | stall << 41 | 0x7E << 46


NO_MULTIPLICATION = (0x7919, 1 << 41 | 0x7F << 45)


def elf(*instructions: tuple[int, int]) -> bytes:
    """An ELF file with one section of code."""
    code = b"".join(struct.pack("<QQ", *words) for words in instructions)
    names = b"\0" + NAME.encode() + b"\0.names\0"
    header = bytearray(64)
    struct.pack_into("<Q", header, 40, 64 + len(code) + len(names))
    struct.pack_into("<HHH", header, 58, 64, 3, 2)
    of_code = struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, len(code), 0, 0, 0, 0)
    of_names = struct.pack("<IIQQQQIIQQ", 2 + len(NAME), 3, 0, 0, 64 + len(code), len(names), 0, 0, 0, 0)
    return bytes(header) + code + names + bytes(64) + of_code + of_names


def hints(code: bytes) -> list[tuple[bool, int]]:
    """(whether it yields, sources to reuse) of each instruction."""
    (headers,) = struct.unpack_from("<Q", code, 40)
    offset, size = struct.unpack_from("<QQ", code, headers + 64 + 24)
    upper = [struct.unpack_from("<QQ", code, offset + at)[1] for at in range(0, size, 16)]
    return [(not word >> 45 & 1, word >> 58 & 15) for word in upper]


def test_every_third_yields_and_others_keep_what_the_next_one_reads() -> None:
    chain = [multiplication(100 + i, 10 + i, 50, 100 + i) for i in range(7)]
    kept, yields = (False, 0b010), (True, 0)
    last = (False, 0)
    assert hints(with_yields(elf(*chain), "kernel", 3)) == [kept, kept, yields, kept, kept, yields, last]


def test_what_is_overwritten_or_read_elsewhere_is_not_kept() -> None:
    code = elf(
        multiplication(50, 10, 50),  # overwrites the register that the next one reads
        multiplication(11, 10, 50),
        multiplication(12, 50, 10),  # the same registers in other places
        multiplication(13, 255, 10),  # the zero register
        multiplication(14, 255, 10, 14),
    )
    assert hints(with_yields(code, "kernel", 8)) == [
        (False, 0b001),
        (False, 0),
        (False, 0b010),
        (False, 0b010),
        (False, 0),
    ]


def test_long_stalls_and_other_instructions_stay_as_they_are_and_end_a_run() -> None:
    slow = multiplication(20, 1, 50, stall=9)
    code = elf(multiplication(21, 2, 50), slow, multiplication(22, 3, 50), NO_MULTIPLICATION, multiplication(23, 4, 50))
    assert hints(with_yields(code, "kernel", 2)) == [
        (False, 0b010),
        *hints(elf(slow)),
        (False, 0),
        (False, 0),
        (False, 0),
    ]
    assert with_yields(code, "kernel", 2)[64 + 16 : 64 + 32] == struct.pack("<QQ", *slow)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no section \.text\.other"):
        with_yields(elf(NO_MULTIPLICATION), "other", 2)


def test_instances_that_differ_in_it_have_files_of_their_own() -> None:
    config = two_row_waves(Scales.PER_BLOCK, Grouping.DENSE, Output.BF16)
    keys = {build.source_key(replace(config, yield_every=n)) for n in (0, 4, 8)}
    assert len(keys) == 3


@pytest.mark.skipif(not build.has_compiler(), reason="needs NVRTC or nvcc")
@pytest.mark.parametrize("scales", [Scales.PER_BLOCK, Scales.PER_ROW])
def test_instructions_of_a_gemm_differ_in_nothing_else(scales: Scales, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="its package has cuobjdump")
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    output = Output.BF16 if scales is Scales.PER_BLOCK else Output.FP32_ADD
    config = replace(two_row_waves(scales, Grouping.DENSE, output, cluster=2), yield_every=0)
    code = build.compile_cubin(config)

    def listing(code: bytes) -> list[str]:
        (tmp_path / "code.cubin").write_bytes(code)
        text = subprocess.run(
            [dump, "-sass", tmp_path / "code.cubin"], capture_output=True, text=True, check=True
        ).stdout
        return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", text)

    changed = with_yields(code, config.kernel, 8)
    before, after = listing(code), listing(changed)
    assert before != after
    assert [line.replace(".reuse", "") for line in before] == [line.replace(".reuse", "") for line in after]
    assert changed == with_yields(changed, config.kernel, 8)

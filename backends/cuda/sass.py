"""Control bits of machine code that ptxas sets and no option changes: when a warp lets another one go first.

Every instruction of sm_90 says how long the warp stalls after it, whether another warp should be issued next ("yield"), and
which operands stay in a small cache beside the register file, because the next instruction reads the same register in the
same place ("reuse"). They are hints: results do not depend on them. ptxas lets the multiplications of a promotion yield in turns
or hardly ever, depending on their order. Yielding after every few of them is better for both: the other warpgroup's wgmma is
issued soon, and a scale that many elements share is seldom read from the register file (docs/hopper_gemm.md, "Tried").

The encoding is not documented by NVIDIA; DeepGEMM's first versions (deep_gemm/jit/interleave_ffma.py) set the same bits.
Legend of an instruction's 128 bits: 0-11 operation, 12-15 predicate, 16-23 destination, 24-31, 32-39 and 64-71 sources; 105-108 stall,
109 stays (0: yields), 122-125 sources to reuse.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SIZE = 16
_FMUL, _FFMA = 0x7220, 0x7223  # of registers, not predicated
_STALL, _STAYS, _REUSE = 41, 45, 58  # bits of the upper half
_LONGEST_STALL = 2  # clocks; together with longer ones the bit that says "stays" means something else
_NO_REGISTER = 255  # reads zero


@dataclass(frozen=True)
class _Multiplication:
    destination: int
    sources: tuple[int, ...]
    stall: int

    @staticmethod
    def decoded(lower: int, upper: int) -> _Multiplication | None:
        if lower & 0xFFFF not in (_FMUL, _FFMA):
            return None
        sources = (lower >> 24 & 255, lower >> 32 & 255, upper & 255)
        used = sources if lower & 0xFFFF == _FFMA else sources[:2]
        return _Multiplication(lower >> 16 & 255, used, upper >> _STALL & 15)

    def reuse(self, following: _Multiplication) -> int:
        """A bit for each source that `following` reads in the same place, and that this one does not overwrite."""
        pairs = zip(self.sources, following.sources, strict=False)
        kept = (a == b and a not in (self.destination, _NO_REGISTER) for a, b in pairs)
        return sum(1 << i for i, is_kept in enumerate(kept) if is_kept)


def with_yields(cubin: bytes, kernel: str, every: int) -> bytes:
    """Of multiplications that follow one another, let each `every`-th yield, and the others stay and keep what the next one reads."""
    code = bytearray(cubin)
    begin, size = _section(cubin, f".text.{kernel}")
    words = [struct.unpack_from("<QQ", code, begin + at) for at in range(0, size, _SIZE)]
    found = [_Multiplication.decoded(*pair) for pair in words]
    run = 0
    for index, (this, following) in enumerate(zip(found, [*found[1:], None], strict=True)):
        if this is None or this.stall > _LONGEST_STALL:
            run = 0
            continue
        run += 1
        stays = run % every != 0
        reuse = this.reuse(following) if stays and following is not None else 0
        upper = words[index][1] & ~(1 << _STAYS | 15 << _REUSE) | stays << _STAYS | reuse << _REUSE
        struct.pack_into("<Q", code, begin + index * _SIZE + 8, upper)
        if following is None:
            run = 0
    return bytes(code)


def _section(elf: bytes, name: str) -> tuple[int, int]:
    """(offset, bytes) of a section of a 64-bit ELF file."""
    (headers,) = struct.unpack_from("<Q", elf, 40)
    count, names = struct.unpack_from("<HH", elf, 60)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, headers + 64 * i) for i in range(count)]
    texts = sections[names][4]
    for section in sections:
        start = texts + section[0]
        if elf[start : elf.index(b"\0", start)].decode() == name:
            return section[4], section[5]
    raise ValueError(f"no section {name}")

"""The FP8 accumulator of Hopper's tensor core, bit for bit, as a GEMM on the CPU.

The model (MMA-Sim, arXiv:2511.10909; DeepSeek-V3, section 3.5.2): one instruction adds 32 products to a running sum; all
33 terms are aligned to the largest exponent, cut toward zero to 13 fraction bits, added exactly, and the sum is cut to
13 fraction bits. It agrees with an H200 in every output of tests/data/h200_accumulator_vectors.npz (E4M3). E5M2
operands follow the same arithmetic; for them no recording of the chip is at hand.

Compiled from `accumulator.c` on first use with the system's C compiler ($CC, cc, gcc or clang) and kept in the user's
cache folder; without a compiler a vectorised PyTorch version of the same arithmetic runs, several times slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import pad

from fp8c.backends.reference.formats import decode_scale
from fp8c.backends.reference.quantize import dequantize_f32
from fp8c.cache import cache_folder
from fp8c.diagnostics import Diagnostic, Severity, fail, render
from fp8c.formats import MANTISSA_BITS, MIN_NORMAL_EXPONENT, WHOLE, Element, Format
from fp8c.ops import scale_shape

TERMS = 32  # products of one instruction
FRACTION_BITS = 13  # bits after the leading one that survive alignment, and that a sum keeps
ZERO_EXPONENT = -60  # below every product's exponent even when added to the other operand's largest
_COLUMNS = 32  # columns of the result that the C code computes side by side
_SOURCE = Path(__file__).with_name("accumulator.c")
_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi")


class Codes(NamedTuple):
    """FP8 values as significand * 2**(exponent - 3), not normalized: subnormals keep the smallest normal's exponent."""

    exponent: Tensor  # int16
    significand: Tensor  # int16, signed, at most 15


@cache
def _code_table(element: Element) -> Codes:
    mantissa_bits = MANTISSA_BITS[element]
    smallest = MIN_NORMAL_EXPONENT[element]
    code = torch.arange(256, dtype=torch.int16)
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = code & ((1 << mantissa_bits) - 1)
    significand = (mantissa + torch.where(exponent > 0, 1 << mantissa_bits, 0)) << (3 - mantissa_bits)
    exponent = torch.where(significand == 0, ZERO_EXPONENT, exponent.clamp_min(1) - 1 + smallest)
    return Codes(exponent.short(), torch.where(code > 127, -significand, significand).short())


def _codes(data: Tensor, element: Element) -> Codes:
    """Split the codes of an [R, K] operand, with K padded by zeros to whole instructions."""
    index = pad(data.view(torch.uint8).int(), (0, -data.shape[1] % TERMS))
    table = _code_table(element)
    return Codes(*(t.index_select(0, index.flatten()).view(index.shape) for t in table))


def promotion_interval(promote_every: int, a_fmt: Format, b_fmt: Format, k: int) -> int:
    """Elements of K between two promotions: as asked, and wherever a scale changes along K.

    Raises: E0423 when the interval is not a whole number of 32-element instructions.
    """
    assert a_fmt.group is not None and b_fmt.group is not None
    sizes = [promote_every, *(0 if f.group is None or f.group[1] == WHOLE else f.group[1] for f in (a_fmt, b_fmt))]
    interval = math.gcd(*sizes)  # gcd(0, n) is n: 0 asks for nothing
    if interval % TERMS:
        raise fail(
            "E0423",
            f"promotion every {promote_every} elements with groups '{a_fmt.text}' and '{b_fmt.text}' falls inside a tensor "
            f"core instruction of {TERMS} elements",
            help=f"promote every multiple of {TERMS} elements, such as 128",
        )
    return interval or max(k, 1)


def _scales_by_interval(scale: Tensor, shape: torch.Size, fmt: Format, interval: int) -> Tensor:
    """The scale of each row in each interval: f32 [R, ceil(K / interval)]."""
    assert fmt.group is not None
    rows, k = shape
    expected = scale_shape(shape, fmt)
    if list(scale.shape) != expected:
        raise fail("E0520", f"format '{fmt.text}' of {list(shape)} has scales {expected}, found {list(scale.shape)}")
    row_group, k_group = (n if g == WHOLE else g for g, n in zip(fmt.group, (max(rows, 1), max(k, 1))))
    row_index = torch.arange(rows) // row_group
    k_index = torch.arange(0, k, interval) // k_group
    return decode_scale(scale)[row_index[:, None], k_index]


def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, a_fmt: Format, b_fmt: Format, promote_every: int
) -> Tensor:
    """a @ b.T as Hopper's tensor core computes it, scales multiplied at each promotion: f32 [M, N].

    Shapes: a FP8 [M, K], b FP8 [N, K] in any strides; any K (the tail counts as zeros).
    Meaning: for each interval, sum = truncating accumulator; out = fma(sum, a_scale * b_scale, out), in FP32.
    """
    m, k = a.shape
    n = b.shape[0]
    if not (m and n and k):
        return a.new_zeros((m, n), dtype=torch.float32)
    interval = promotion_interval(promote_every, a_fmt, b_fmt, k)
    left, right = _codes(a, a_fmt.element), _codes(b, b_fmt.element)
    left_scale = _scales_by_interval(a_scale, a.shape, a_fmt, interval)
    right_scale = _scales_by_interval(b_scale, b.shape, b_fmt, interval)
    library = compiled_library()
    run = gemm_torch if library is None else library.gemm
    out = run(left, right, left_scale, right_scale, interval)
    # The table has no infinities and no NaN: rows and columns that hold one are computed in FP32, which has.
    special_rows, special_columns = (~t.float().isfinite().all(1) for t in (a, b))
    if special_rows.any() or special_columns.any():
        plain = dequantize_f32(a, a_scale, a_fmt) @ dequantize_f32(b, b_scale, b_fmt).T
        out = torch.where(special_rows[:, None] | special_columns, plain, out)
    return out


def gemm_torch(left: Codes, right: Codes, left_scale: Tensor, right_scale: Tensor, interval: int) -> Tensor:
    """The same arithmetic in PyTorch, for machines without a C compiler and as a cross-check of the C code.

    Shapes: left int16 [M, K], right int16 [N, K], K % 32 == 0; scales f32 [M, G] and [N, G] -> f32 [M, N].
    """
    m, k = left.exponent.shape
    n = right.exponent.shape[0]
    rows_at_once = max(1, (1 << 21) // (n * TERMS))
    out = torch.empty(m, n)
    for rows in torch.split(torch.arange(m), rows_at_once):
        promoted = torch.zeros(len(rows), n)
        for group, begin in enumerate(range(0, k, interval)):
            total = torch.zeros(len(rows), n)
            for chunk in range(begin, min(begin + interval, k), TERMS):
                terms = slice(chunk, chunk + TERMS)
                exponent = left.exponent[rows, None, terms].int() + right.exponent[None, :, terms]
                product = left.significand[rows, None, terms].int() * right.significand[None, :, terms]
                total = _accumulate(total, exponent, product)
            scale = left_scale[rows, group, None] * right_scale[None, :, group]
            promoted = _fma(total, scale, promoted)
        out[rows] = promoted
    return out


def _accumulate(total: Tensor, exponent: Tensor, product: Tensor) -> Tensor:
    """One instruction: total f32 [M, N] plus the 32 products of exponent, product int32 [M, N, 32]."""
    total_exponent = torch.where(total == 0, torch.iinfo(torch.int32).min, total.frexp().exponent - 1)
    top = torch.maximum(exponent.amax(-1), total_exponent)
    shift = (top[..., None] - exponent).clamp_max(31)
    cut = ((product.abs() << (FRACTION_BITS - 6)) >> shift) * product.sign()
    kept = torch.trunc(torch.ldexp(total.double(), FRACTION_BITS - top)).long()
    exact = (cut.sum(-1) + kept).float()
    bits = (exact.view(torch.int32) >> (23 - FRACTION_BITS)) << (23 - FRACTION_BITS)
    return torch.ldexp(bits.view(torch.float32), top - FRACTION_BITS)


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z of FP32 tensors with one rounding."""
    product, addend = x.double() * y.double(), z.double()  # the product is exact: 48 bits
    total = product + addend
    rest = (product - (total - addend)) + (addend - (total - (total - addend)))  # what the addition dropped (Knuth)
    # Rounded to odd, FP64 keeps enough of the dropped part for the rounding to FP32 to be right.
    is_even = (total.view(torch.int64) & 1) == 0
    toward_rest = torch.nextafter(total, rest.sign() * math.inf)
    return torch.where((rest != 0) & is_even, toward_rest, total).float()


class Library:
    """The compiled accumulator."""

    def __init__(self, path: Path) -> None:
        self._gemm = ctypes.CDLL(str(path)).fp8c_hopper_gemm
        self._gemm.restype = None
        self._gemm.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 5

    def gemm(self, left: Codes, right: Codes, left_scale: Tensor, right_scale: Tensor, interval: int) -> Tensor:
        """As `gemm_torch`; the rows are shared among as many threads as PyTorch uses."""
        m, k = left.exponent.shape
        n = right.exponent.shape[0]
        padding = (0, -n % _COLUMNS)  # the C code computes whole blocks of columns
        columns = [pad(t.T, padding).contiguous() for t in (*right, right_scale)]
        out = torch.empty(m, n + padding[1])
        left_scale = left_scale.contiguous()
        pointers = [t.data_ptr() for t in (*left, *columns[:2], left_scale, columns[2], out)]
        threads = max(1, min(torch.get_num_threads(), m))
        cuts = [m * i // threads for i in range(threads + 1)]

        def run(begin: int, end: int) -> None:
            self._gemm(*pointers, begin, end, out.shape[1], k, interval)

        if threads == 1:
            run(0, m)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run, cuts, cuts[1:]))
        return out[:, :n].contiguous()


@cache
def compiled_library() -> Library | None:
    """The compiled accumulator, or None, with one warning, where no C compiler works."""
    try:
        return Library(_build())
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        output = getattr(error, "stderr", None) or str(error)
        warning = Diagnostic(
            "W0422",
            "the accumulator of the tensor core could not be compiled, so a slower PyTorch version of it runs",
            severity=Severity.WARNING,
            notes=tuple(output.strip().splitlines()[:3]),
            help="install a C compiler, or name one in the environment variable CC",
        )
        warnings.warn(render(warning), RuntimeWarning, stacklevel=2)
        return None


def _compiler() -> list[str]:
    if named := os.environ.get("CC"):
        return shlex.split(named)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError("none of cc, gcc and clang was found")


def _build() -> Path:
    """Compile `accumulator.c` unless the cache holds it for this source, compiler and processor family."""
    compiler = _compiler()
    # Wide vectors are chosen when the code runs, so that the file also works on another machine with the same home.
    clones = ("-DFP8C_CLONES",) if platform.machine() == "x86_64" and platform.system() == "Linux" else ()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = hashlib.sha256(
        "\0".join([_SOURCE.read_text(), version, *compiler, *_FLAGS, platform.machine(), platform.system()]).encode()
    ).hexdigest()[:20]
    folder = cache_folder("accumulator")
    library = folder / f"{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if library.exists():
            return library
        built = Path(scratch) / library.name
        for extra in dict.fromkeys([clones, ()]):  # an old compiler may not know the processor levels
            command = [*compiler, *_FLAGS, *extra, "-o", str(built), str(_SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(built, library)
    return library

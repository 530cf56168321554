"""Tables of what the formats, the accumulators and retiling do to numbers, computed when asked for.

`python -m fp8c.tools.numerics_tables [formats] [quantization] [accumulator] [retile]` prints them as Markdown; docs/numerics.md
holds its output. Everything is computed with the reference backend from seeded random numbers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from fp8c.backends.reference import accumulator, tensor_core
from fp8c.backends.reference.gemm import Accumulator
from fp8c.backends.reference.quantize import dequantize_f32, requantize
from fp8c.formats import BITS, MANTISSA_BITS, MAX, MIN_NORMAL_EXPONENT, Format
from fp8c.ops import QUANTIZE, SCALED_MM

_SEED = 20241227


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "\n".join([self.title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def _normal(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(_SEED).standard_normal(shape)).float()


def _magnitudes(count: int, octaves: int) -> Tensor:
    """Powers of two from 1 to 2**octaves."""
    return torch.exp2(torch.from_numpy(np.random.default_rng(_SEED).integers(0, octaves + 1, count))).float()


def _quantized_values(x: Tensor, fmt: str) -> Tensor:
    q, s = QUANTIZE(x, fmt)
    return dequantize_f32(q, s, Format.parse(fmt), x.shape[1])


def formats() -> Table:
    """Range and spacing of the elements that carry scales."""
    rows = []
    for element in MAX:
        mantissa, exponent = MANTISSA_BITS[element], MIN_NORMAL_EXPONENT[element]
        rows.append(
            (
                element.name,
                str(BITS[element]),
                f"{MAX[element]:g}",
                f"2^{exponent}",
                f"2^{exponent - mantissa}",
                f"2^-{mantissa + 1}",
            )
        )
    columns = ("element", "bits", "largest", "smallest normal", "smallest subnormal", "largest relative rounding error")
    return Table("Elements", columns, tuple(rows))


def quantization() -> Table:
    """Relative error (Frobenius norm) of quantizing normal numbers, alone and with outlier tokens or channels."""
    x = _normal(512, 512)
    spread = _magnitudes(512, octaves=16)
    inputs = {"N(0, 1)": x, "tokens scaled by 1 to 2^16": x * spread[:, None], "channels likewise": x * spread}
    names = [
        *(f"e4m3[{group}] {scale}" for group in ("1x128", "128x1", "128x128", "tensor") for scale in ("fp32", "pow2")),
        "e5m2[1x128] fp32",
        "e5m6[1x128] pow2",
    ]
    rows = []
    for name in names:
        errors = [_mean_row_error(_quantized_values(v, name), v) for v in inputs.values()]
        rows.append((name, *(f"{100 * e:.2f} %" for e in errors)))
    return Table("Error of one quantization: mean over rows of the relative error", ("format", *inputs), tuple(rows))


def _mean_row_error(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).mean())


def accumulator_errors() -> Table:
    """FP8 operands multiplied by the Hopper accumulator, against FP64 on the same operands."""
    fmt, one = Format.parse("e4m3[tensor] fp32"), torch.ones(1, 1)
    rows = []
    for k in (128, 1024, 4096, 16384):
        cells = [str(k)]
        for kind in ("normal", "positive"):
            a, b = _normal(2, 64, k).unbind()
            a, b = (t if kind == "normal" else t.abs() for t in (a, b))
            a, b = (t.to(torch.float8_e4m3fn) for t in (a, b))
            exact = a.double() @ b.double().T
            for promote_every in (0, 128):
                error = tensor_core.gemm(a, one, b, one, fmt, fmt, promote_every) - exact
                if kind == "normal":
                    cells.append(f"{float(error.norm() / exact.norm()):.1e}")
                else:
                    cells.append(f"{100 * float((error / exact).mean()):.3f} %")
        rows.append(tuple(cells))
    columns = (
        "K",
        "N(0, 1): relative error, never promoted",
        "promoted every 128",
        "positive: mean bias, never promoted",
        "promoted every 128",
    )
    return Table("Hopper's accumulator against FP64", columns, tuple(rows))


def recipe_product_errors() -> Table:
    """The recipe's product (1x128 by 128x128) under both accumulators, against FP64 on the same FP8 operands."""
    a_fmt, b_fmt = "e4m3[1x128] fp32", "e4m3[128x128] fp32"
    rows = []
    for k in (512, 2048, 7168):
        x, w = _normal(2, 128, k).unbind()
        operands = (*QUANTIZE(x, a_fmt), *QUANTIZE(w, b_fmt))
        left, right = _quantized_values(x, a_fmt).double(), _quantized_values(w, b_fmt).double()
        exact, unquantized = left @ right.T, x.double() @ w.double().T
        cells = [str(k)]
        for name in get_args(Accumulator):
            with accumulator(name):
                out = SCALED_MM(*operands, a_fmt, b_fmt, 128, torch.float32)
            error = float((out - exact).norm() / exact.norm())
            # The order in which BLAS adds is the machine's business, so of its error only the power of ten is shown.
            cells.append(f"below 1e{math.ceil(math.log10(error)):03d}" if name == "fp32" else f"{error:.1e}")
        cells.append(f"{float((exact - unquantized).norm() / unquantized.norm()):.1e}")
        rows.append(tuple(cells))
    columns = (
        "K",
        "FP32 accumulator",
        "Hopper, promoted every 128",
        "for comparison: error of the quantization itself",
    )
    return Table("A product of the recipe, relative error", columns, tuple(rows))


def retile() -> Table:
    """What 1x128 -> 128x1 costs for tokens of equal and of different magnitude, against quantizing once."""
    dst = "e4m3[128x1] pow2"
    rows = []
    for octaves in (0, 4, 8, 16):
        x = _normal(256, 256) * _magnitudes(256, octaves)[:, None]
        cells = [f"1 to 2^{octaves}"]
        for src in ("e4m3[1x128] pow2", "e4m3[1x128] fp32", "e5m6[1x128] pow2"):
            q, s = QUANTIZE(x, src)
            retiled_q, retiled_s = requantize(q, s, src, dst, None, 256)
            after = dequantize_f32(retiled_q, retiled_s, Format.parse(dst))
            if src.startswith("e4m3"):
                changed = float((_quantized_values(x, src) != after).double().mean())
                cells.append(f"{100 * changed:.2f} %")
            cells.append(f"{100 * _mean_row_error(after, x):.2f} %")
        rows.append((*cells, f"{100 * _mean_row_error(_quantized_values(x, dst), x):.2f} %"))
    columns = (
        "magnitudes of tokens",
        "from E4M3 pow2: values changed",
        "row error",
        "from E4M3 fp32: values changed",
        "row error",
        "from E5M6 pow2: row error",
        "quantized once: row error",
    )
    return Table("Retiling 1x128 to E4M3 128x1 with power-of-two scales", columns, tuple(rows))


Maker = Callable[[], Table]
TABLES: dict[str, tuple[Maker, ...]] = {
    "formats": (formats,),
    "quantization": (quantization,),
    "accumulator": (accumulator_errors, recipe_product_errors),
    "retile": (retile,),
}


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        print(f"unknown table {unknown[0]!r}; expected {', '.join(TABLES)}", file=sys.stderr)
        return 2
    print("\n\n".join(make().markdown() for name in names or TABLES for make in TABLES[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

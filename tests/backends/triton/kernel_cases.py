"""Every Triton kernel against the oracle: in the interpreter (`python kernel_cases.py GROUP`) or on a GPU.

Each case is a function of a device; the operators' CPU implementation is the reference.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter  # type: ignore[import-not-found]  # noqa: F401  (first: it sets the environment)

import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401  (the oracle)
import fp8c.ops.combine  # noqa: F401
import fp8c.ops.decompositions  # noqa: F401  (what a kernel passes on)
import fp8c.ops.fused  # noqa: F401
from fp8c.backends.reference.formats import decode_e5m6, unpack_e5m6
from fp8c.backends.reference.rounding_check import disagreement, strides
from fp8c.backends.triton import gather_sum as combining
from fp8c.backends.triton import quantize as kernels
from fp8c.backends.triton import requantize as retiling
from fp8c.backends.triton import swiglu as activations

Case = Callable[[str], None]
ops = torch.ops.fp8c


def filled(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Rows of very different magnitude, with zeros of both signs, subnormals, a zero group, infinities and a NaN."""
    generator = torch.Generator().manual_seed(seed * 10007 + rows * 131 + cols)
    x = torch.randn(rows, cols, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (rows, 1), generator=generator)
    )
    x[torch.rand(rows, cols, generator=generator) < 0.05] = 0.0
    x[torch.rand(rows, cols, generator=generator) < 0.05] *= -0.0
    if rows > 5:
        x[1] = 0.0
        x[2] *= 1e-38 if dtype is not torch.float16 else 1e-4
        x[3] *= 1e-30 if dtype is not torch.float16 else 1e-3
        x[4, cols // 2] = torch.inf
        x[5, cols // 3] = torch.nan
    return x.to(dtype)


def near(rows: int, cols: int, octaves: int) -> Tensor:
    """Rows whose magnitudes are at most so many octaves from one another's, some columns of small numbers or of zeros."""
    generator = torch.Generator().manual_seed(octaves)
    shifts = torch.randint(-octaves // 2, octaves // 2 + 1, (rows, 1), generator=generator)
    x = torch.randn(rows, cols, generator=generator) * torch.exp2(shifts)
    x[:, 7] = 0.0
    x[:, 9] *= 2.0**-6
    x[:, cols - 3] *= 2.0**-12
    if octaves > 10:
        x[5, cols // 3] = torch.nan
    return x.bfloat16()


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], label: object) -> None:
    """Bits, shapes and strides agree."""
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == b.shape and a.dtype == b.dtype, (label, i, a.shape, b.shape)
        assert strides(a) == strides(b), (label, i, a.stride(), b.stride())
        left, right = (torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in (a, b))
        if a.dtype is torch.uint8:  # packed E5M6
            left, right = (decode_e5m6(unpack_e5m6(t, t.shape[-1] // 12 * 8)) for t in (left, right))
            wrong = (left.view(torch.int32) != right.view(torch.int32)) & ~(left.isnan() & right.isnan())
        elif a.dtype.is_floating_point:  # the sign of NaN is no part of the contract
            nan = left.float().isnan()
            assert torch.equal(nan, right.float().isnan()), (label, i, "NaN")
            left, right = (t.view(torch.uint8).view(*t.shape, t.element_size()) for t in (left, right))
            wrong = (left != right).any(-1) & ~nan
        else:
            wrong = left != right
        if wrong.any():
            where = wrong.nonzero()[:3].tolist()
            pairs = [(left[tuple(w)].tolist(), right[tuple(w)].tolist()) for w in where]
            raise AssertionError(
                f"{label}, result {i}: {int(wrong.sum())} of {wrong.numel()} differ, at {where}: (found, expected) {pairs}"
            )


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Where groups restart at the experts of 300 rows; 304 rows and a multiple of 128 columns are what CUDA kernels take on Hopper.
OFFSETS = (ends(300), ends(1, 130, 257, 299), ends(0, 0, 131, 131, 131, 290, 290), ends(0, 0), ends(5, 120))
SIZES = ((1, 1), (130, 200), (300, 128), (17, 576), (128, 256))
SCALES = ("fp32", "pow2", "e8m0")


def quantize_cases() -> Iterator[tuple[str, Case]]:
    def check(fmt: str, x: Tensor, offs: Tensor | None = None) -> Case:
        def case(device: str) -> None:
            expected = ops.quantize(x, fmt, offs)
            on_device = None if offs is None else offs.to(device)
            same(kernels.quantize(x.to(device), fmt, on_device), expected, (fmt, x.shape, x.dtype, offs))

        return case

    for element, group, scale in itertools.product(("e4m3", "e5m2", "e5m6"), ("1x128", "128x1", "128x128"), SCALES):
        fmt = f"{element}[{group}] {scale}"
        for rows, cols in SIZES if element == "e4m3" and scale == "fp32" else SIZES[1:2]:
            yield f"{fmt} {rows}x{cols}", check(fmt, filled(rows, cols))
    for fmt in ("e4m3[1x32] e8m0", "e4m3[1x64] fp32", "e5m6[1x32] pow2", "e4m3[32x1] e8m0", "e4m3[64x1] fp32"):
        yield fmt, check(fmt, filled(130, 200))
    for dtype, fmt in itertools.product((torch.float32, torch.float16), ("e4m3[1x128] fp32", "e4m3[128x1] fp32")):
        yield f"{fmt} of {dtype}", check(fmt, filled(130, 200, dtype))
    for offs in OFFSETS:
        yield f"offsets {offs.tolist()}", check("e4m3[128x1] fp32", filled(300, 200), offs)
    for offs, scale in itertools.product((None, *OFFSETS), ("fp32", "pow2")):
        x = filled(304 if offs is None else 300, 384)
        yield f"even, offsets {offs} {scale}", check(f"e4m3[128x1] {scale}", x, offs)
    yield "e8m0 offsets", check("e4m3[32x1] e8m0", filled(300, 72), OFFSETS[1])
    yield "stack of weights", check("e4m3[128x128] fp32", torch.stack([filled(130, 200, seed=i) for i in range(3)]))
    yield "stack of rows", check("e4m3[1x128] pow2", torch.stack([filled(20, 200, seed=i) for i in range(3)]))
    yield "columns of a wider tensor", check("e4m3[1x128] fp32", filled(40, 512)[:, 128:384])
    yield "transposed input", check("e4m3[1x128] fp32", filled(200, 40).t())
    yield "no rows", check("e4m3[128x1] fp32", filled(0, 128))
    yield "another group", check("e4m3[tensor] fp32", filled(40, 40))


def fused_cases() -> Iterator[tuple[str, Case]]:
    def both(fmt: str, fmt_t: str, x: Tensor, offs: Tensor | None = None) -> Case:
        def case(device: str) -> None:
            expected = ops.quantize_both(x, fmt, fmt_t, offs)
            on_device = None if offs is None else offs.to(device)
            same(kernels.quantize_both(x.to(device), fmt, fmt_t, on_device), expected, (fmt, fmt_t, x.shape, offs))

        return case

    def weight(fmt: str, w: Tensor) -> Case:
        def case(device: str) -> None:
            same(kernels.quantize_weight(w.to(device), fmt), ops.quantize_weight(w, fmt), (fmt, w.shape))
            same(kernels.quantize_transposed(w.to(device), fmt), ops.quantize_transposed(w, fmt), (fmt, w.shape))

        return case

    def gathered(fmt: str, x: Tensor, rows: Tensor, offs: Tensor | None) -> Case:
        def case(device: str) -> None:
            expected = ops.gather_quantize(x, rows, fmt, offs)
            on_device = [None if t is None else t.to(device) for t in (x, rows, offs)]
            same(kernels.gather_quantize(on_device[0], on_device[1], fmt, on_device[2]), expected, (fmt, rows, offs))

        return case

    rows_of_tokens = torch.randint(0, 130, (300,), generator=torch.Generator().manual_seed(4))
    for offs in (None, OFFSETS[1], OFFSETS[4]):
        yield "gather and quantize", gathered("e4m3[128x1] pow2", filled(130, 200), rows_of_tokens, offs)
        even = torch.cat((rows_of_tokens, rows_of_tokens[:4])) if offs is None else rows_of_tokens
        for scale, index in itertools.product(("fp32", "e8m0"), (even, even.int())):
            yield "gather and quantize, even", gathered(f"e4m3[128x1] {scale}", filled(130, 256), index, offs)
    act, act_t = "e4m3[1x128] fp32", "e4m3[128x1] fp32"
    for rows, cols in SIZES:
        yield f"both {rows}x{cols}", both(act, act_t, filled(rows, cols))
    yield "both pow2", both("e4m3[1x128] pow2", "e4m3[128x1] pow2", filled(130, 200))
    yield "both e5m6", both("e5m6[1x128] pow2", "e5m2[128x1] e8m0", filled(130, 200))
    yield "both wide", both(act, act_t, filled(130, 200, torch.float32))
    yield "both of two row formats", both("e5m6[1x128] pow2", "e4m3[1x128] pow2", filled(130, 200))
    for offs in OFFSETS:
        yield f"both, offsets {offs.tolist()}", both(act, act_t, filled(300, 200), offs)
        yield f"both even, offsets {offs.tolist()}", both(act, act_t, filled(300, 384), offs)
    for formats in ((act, act_t), ("e4m3[1x128] pow2", "e4m3[128x1] e8m0"), ("e4m3[1x128] e8m0", act_t)):
        yield f"both even {formats}", both(*formats, filled(304, 384))
    for scale in SCALES:
        yield f"weight {scale}", weight(f"e4m3[128x128] {scale}", filled(256, 384))
    yield "ragged weight", weight("e4m3[128x128] fp32", filled(130, 200))
    yield "stack of weights", weight("e4m3[128x128] fp32", torch.stack([filled(130, 256, seed=i) for i in range(3)]))


def requantize_cases() -> Iterator[tuple[str, Case]]:
    def to(value: object, device: str) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    def check(name: str, *args: object) -> Case:
        def case(device: str) -> None:
            expected = getattr(ops, name)(*args)
            found = getattr(retiling, name)(*(to(a, device) for a in args))
            pairs = (found, expected) if isinstance(expected, tuple) else ((found,), (expected,))
            same(pairs[0], pairs[1], (name, [a for a in args if not isinstance(a, Tensor)], args[:1]))

        return case

    act, act_t = "e4m3[1x128] fp32", "e4m3[128x1] fp32"
    for rows, cols in SIZES:
        pair = ops.quantize(filled(rows, cols), act)
        yield f"dequantize {rows}x{cols}", check("dequantize", *pair, act, torch.bfloat16)
        yield f"requantize {rows}x{cols}", check("requantize", *pair, act, act_t)
    for element, scale in itertools.product(("e4m3", "e5m2", "e5m6"), SCALES):
        fmt = f"{element}[1x128] {scale}"
        pair = ops.quantize(filled(130, 200), fmt)
        yield f"dequantize {fmt}", check("dequantize", *pair, fmt, torch.float32, None, 200)
        yield f"requantize {fmt}", check("requantize", *pair, fmt, f"e4m3[128x1] {scale}", OFFSETS[-1], 200)
        yield f"requantize {fmt} to rows", check("requantize", *pair, fmt, "e4m3[1x128] pow2", None, 200)
    stack = torch.stack([filled(20, 256, seed=i) for i in range(2)])
    yield "dequantize a stack", check("dequantize", *ops.quantize(stack, act), act, torch.bfloat16)
    source = torch.randint(0, 130, (300,), generator=torch.Generator().manual_seed(3))
    for fmt, index in itertools.product((act, "e5m6[1x128] pow2", "e4m3[1x128] e8m0"), (source, source.int())):
        pair = ops.quantize(filled(130, 200), fmt)
        yield f"gather {fmt}", check("gather_quantized", *pair, index, fmt)
    even = torch.cat((source, source[:4]))
    for (old, new), octaves in itertools.product(
        (("pow2", "pow2"), ("e8m0", "e8m0"), ("fp32", "fp32"), ("pow2", "fp32")), (1, 6, 20)
    ):
        src, dst = f"e4m3[1x128] {old}", f"e4m3[128x1] {new}"
        pair = ops.quantize(near(304, 256, octaves), src)
        for offs in (None, OFFSETS[1]):
            index = even if offs is None else source
            yield (
                f"requantize even {old} {new} {octaves}",
                check("requantize", *(t[: len(index)] for t in pair), src, dst, offs),
            )
            yield f"gather and requantize even {old} {new}", check("gather_requantized", *pair, index, src, dst, offs)
    for offs in (None, *OFFSETS):
        pair = ops.quantize(filled(130, 200), "e4m3[1x128] pow2")
        yield (
            "gather and requantize",
            check("gather_requantized", *pair, source, "e4m3[1x128] pow2", "e4m3[128x1] pow2", offs),
        )


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], formats: tuple[str, ...], label: object) -> None:
    """Pairs of values that went through exp agree within one rounding (`backends/reference/rounding_check.py`)."""
    for i, fmt in enumerate(formats):
        problem = disagreement(found[2 * i : 2 * i + 2], expected[2 * i : 2 * i + 2], fmt)  # type: ignore[arg-type]
        assert not problem, (label, fmt, problem)


def swiglu_cases() -> Iterator[tuple[str, Case]]:
    act, act_t, act2 = "e4m3[1x128] fp32", "e4m3[128x1] fp32", "e4m3[1x128] pow2"

    def tokens(rows: int, cols: int, seed: int) -> Tensor:
        return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def forward(rows: int, features: int, is_weighted: bool, cache: str | None) -> Case:
        x, weight = tokens(rows, 2 * features, 1), tokens(rows, 1, 2).float()[:, 0] if is_weighted else None

        def case(device: str) -> None:
            w = None if weight is None else weight.to(device)
            label = (rows, features, is_weighted, cache)
            if cache is None:
                gate, up = x.chunk(2, -1)
                found = activations.swiglu_quantize(*x.to(device).chunk(2, -1), w, act)
                close(found, ops.swiglu_quantize(gate, up, weight, act), (act,), label)
                return
            expected = ops.swiglu_quantize_cached(x, weight, act, cache)
            found = activations.swiglu_quantize_cached(x.to(device), w, act, cache)
            close(found, expected, (act,), label)
            same(found[2:], expected[2:], label)

        return case

    def backward(rows: int, features: int, is_weighted: bool, offs: Tensor | None) -> Case:
        dh, pair = tokens(rows, features, 3), ops.quantize(tokens(rows, 2 * features, 4), act)
        weight = tokens(rows, 1, 5).float()[:, 0] if is_weighted else None
        tail = (act, act_t, act2, "e4m3[128x1] pow2")

        def case(device: str) -> None:
            moved = [None if t is None else t.to(device) for t in (dh, *pair, weight, offs)]
            found = activations.swiglu_backward_quantize(*moved, *tail)
            expected = ops.swiglu_backward_quantize(dh, *pair, weight, offs, *tail)
            close(found[:6], expected[:6], tail[1:], (rows, features, is_weighted, offs))
            # Terms of 8 significant bits each, summed in FP32; a term may differ by one BF16 rounding of the product.
            bound = 2.0**-8 * (dh.float().abs() * 8).sum(1, keepdim=True) + 1e-5 if weight is not None else 0.0
            assert found[6].shape == expected[6].shape
            assert ((found[6].cpu() - expected[6]).abs() <= bound).all()

        return case

    yield "forward", forward(40, 128, False, None)
    yield "forward, ragged features", forward(17, 200, True, None)
    yield "forward, cached", forward(40, 256, False, act)
    yield "forward, weighted and cached", forward(40, 256, True, act2)
    yield "backward", backward(130, 128, False, None)
    yield "backward, weighted", backward(130, 256, True, None)
    for offs in (OFFSETS[1], OFFSETS[4]):
        yield "backward of experts", backward(300, 128, True, offs)


def combine_cases() -> Iterator[tuple[str, Case]]:
    def check(x: Tensor, rows: Tensor, k: int, added: Tensor | None) -> Case:
        def case(device: str) -> None:
            expected = ops.gather_sum(x, rows, k, added)
            on_device = [None if t is None else t.to(device) for t in (x, rows, added)]
            found = combining.gather_sum(on_device[0], on_device[1], k, on_device[2])  # type: ignore[arg-type]
            same((found,), (expected,), (x.shape, k, x.dtype, added is None))

        return case

    generator = torch.Generator().manual_seed(6)
    for (rows, cols), k, dtype in itertools.product(
        ((40, 200), (24, 1152)), (1, 2, 8), (torch.bfloat16, torch.float32)
    ):
        order = torch.randperm(rows, generator=generator)
        added = torch.randn(rows // k, cols, generator=generator).to(dtype)
        for other in (None, added):
            yield f"combine {rows}x{cols} by {k}", check(filled(rows, cols, dtype), order, k, other)
    yield "narrow numbers", check(filled(40, 128), torch.randint(0, 40, (30,), dtype=torch.int32), 3, None)
    yield "columns of a wider tensor", check(filled(40, 512)[:, 128:384], torch.randperm(40), 8, None)
    yield "no tokens", check(filled(40, 128), torch.empty(0, dtype=torch.int64), 8, None)


GROUPS: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    "quantize": quantize_cases,
    "fused": fused_cases,
    "requantize": requantize_cases,
    "swiglu": swiglu_cases,
    "combine": combine_cases,
}


def main(group: str) -> int:
    failed = 0
    for name, case in GROUPS[group]():
        try:
            case("cpu")
        except Exception as error:  # noqa: BLE001 - every case is tried
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    print(f"{group}: {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

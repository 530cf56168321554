"""The kernels of the output head and of RMSNorm + quantize: in the interpreter (`python joined_cases.py GROUP`) or on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter  # type: ignore[import-not-found]  # noqa: F401  (first: it sets the environment)

import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401  (the oracle)
import fp8c.ops.fused  # noqa: F401
from fp8c.backends.triton import head_loss as head
from fp8c.backends.triton import norm
from fp8c.ops import head_loss

Case = Callable[[str], None]
ops = torch.ops.fp8c
EPS = 1e-6


def norm_cases() -> Iterator[tuple[str, Case]]:
    def case(rows: int, cols: int, dtype: torch.dtype, fmt: str) -> Case:
        def run(device: str) -> None:
            generator = torch.Generator().manual_seed(rows + cols)
            size = torch.exp2(torch.randint(-8, 9, (rows, 1), generator=generator))
            x = (torch.randn(rows, cols + 64, generator=generator) * size).to(dtype)[:, :cols]  # part of wider rows
            weight = torch.randn(cols, generator=generator).to(dtype)
            if rows > 4:
                x[1] = 0.0
                x[3, 5] = torch.nan
            q, s, factor = norm.rms_norm_quantize(x.to(device), weight.to(device), EPS, fmt)
            found = factor.cpu()
            exact = torch.rsqrt(x.double().square().mean(1, keepdim=True) + EPS)
            # a sum of positive terms in FP32 in any order, a division, a square root of 2 ulp; NaN where x has one
            nan = exact.isnan()
            assert torch.equal(found.isnan(), nan)
            assert ((found.double() - exact).abs() <= (cols / 2 + 8) * 2.0**-24 * exact)[~nan].all()
            # all that follows is exact, given the factor
            y = weight * (x.float() * found).to(dtype)
            expected = ops.quantize(y, fmt)
            assert torch.equal(q.cpu().view(torch.uint8)[~nan[:, 0]], expected[0].view(torch.uint8)[~nan[:, 0]])
            assert torch.equal(s.cpu().float()[~nan[:, 0]], expected[1].float()[~nan[:, 0]])
            assert s.cpu().float()[nan[:, 0]].isnan().all()
            assert s.stride() == expected[1].stride()

        return run

    for fmt in ("e4m3[1x128] fp32", "e4m3[1x128] pow2", "e4m3[1x128] e8m0"):
        for rows, cols in ((5, 512), (3, 576), (9, 1536), (2, 7168), (1, 64)):
            yield f"{fmt} {rows} x {cols}", case(rows, cols, torch.bfloat16, fmt)
    yield "fp16", case(4, 256, torch.float16, "e5m2[1x128] fp32")


def drawn(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Small whole numbers: logits are exact in any order of their sum, on any device."""
    generator = torch.Generator().manual_seed(tokens)
    x, w = (torch.randint(-1, 2, (n, hidden), generator=generator).to(dtype) for n in (tokens, vocabulary))
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[1::4] = -100
    return x, w, target


def head_cases() -> Iterator[tuple[str, Case]]:
    def case(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, is_mean: bool) -> Case:
        def run(device: str) -> None:
            given = drawn(tokens, vocabulary, hidden, dtype)
            x, w, target = (t.to(device) for t in given)
            loss, dx, dw = head.linear_cross_entropy(x, w, target, -100, is_mean, True, True)
            logits = (given[0].double() @ given[1].double().t()).requires_grad_()
            expected = torch.nn.functional.cross_entropy(logits, given[2], reduction="mean" if is_mean else "sum")
            (dlogits,) = torch.autograd.grad(expected, logits)
            # exp, log and the sum over words in FP32; a step of the GPU's exp is two of FP32's
            softmax_error = (vocabulary + 64) * 2.0**-24
            assert abs(float(loss) - float(expected)) <= (tokens + vocabulary + 64) * 2.0**-24 * abs(float(expected))
            half = 2.0**-8 if dtype is not torch.float32 else 0.0
            scale = float(dlogits.abs().max())
            for found, wanted, terms, count in (
                (dx, dlogits @ given[1].double(), dlogits.abs() @ given[1].double().abs(), vocabulary),
                (dw, dlogits.t() @ given[0].double(), dlogits.t().abs() @ given[0].double().abs(), tokens),
            ):
                bound = (half + softmax_error + count * 2.0**-24) * terms + half * wanted.abs()
                bound = bound + (softmax_error + 2.0**-22) * scale * count + 2.0**-126
                assert ((found.cpu().double() - wanted).abs() <= bound).all()

        return run

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for i, shape in enumerate(((40, 300, 64), (130, 1000, 160), (9, 31, 16), (300, 64, 96))):
            yield f"{dtype} {shape}", case(*shape, dtype, is_mean=i != 1)

    def infinite(device: str) -> None:
        x, w, target = (t.to(device) for t in drawn(16, 32, 8, torch.bfloat16))
        target[:] = 3
        x[5, 0], w[:, 0] = torch.inf, 1.0
        x[6, 0] = torch.nan
        loss, dx, _ = head.linear_cross_entropy(x, w, target, -100, True, True, True)
        assert loss.isnan() and dx[5:7].isnan().all() and not dx[:5].isnan().any()

    yield "infinite logits", infinite

    def nothing(device: str) -> None:
        x, w, target = (t.to(device) for t in drawn(16, 32, 8, torch.bfloat16))
        loss, dx, dw = head.linear_cross_entropy(x, w, torch.full_like(target, -100), -100, True, True, True)
        assert loss.isnan() and not dx.any() and not dw.any()

    yield "nothing to count", nothing

    def same(device: str) -> None:
        """The kernels beside the plain softmax, over one product."""
        logits = torch.randn(333, 120, generator=torch.Generator().manual_seed(1)).mul(4).bfloat16().to(device)
        words = torch.randint(333, (120,), generator=torch.Generator().manual_seed(2)).to(device)
        counted, scale = (words % 5 != 0), torch.tensor(0.25, device=device)
        other = logits.clone()
        losses = head.to_gradient(logits, words, counted, scale)
        expected = head_loss.to_gradient_plain(other, words, counted, scale)
        torch.testing.assert_close(losses, expected, rtol=2.0**-20, atol=2.0**-20)
        torch.testing.assert_close(logits.float(), other.float(), rtol=2.0**-7, atol=2.0**-30)  # a step of BF16

    yield "kernels beside tensor operations", same


GROUPS: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {"norm": norm_cases, "head": head_cases}


def main(group: str) -> int:
    failed = 0
    for name, case in GROUPS[group]():
        try:
            case("cpu")
        except AssertionError as error:
            failed += 1
            print(f"{name}: {error!r}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""The fused output head against cross_entropy in FP64, whatever the shapes of its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8c.diagnostics import DiagnosticError
from fp8c.ops import head_loss
from fp8c.ops.head_loss import linear_cross_entropy

#: (T, V, H): T below, near and above H; V that SLICES divides and not; T that is no multiple of 8; blocks of tokens.
SHAPES = [(24, 320, 64), (64, 96, 64), (65, 97, 33), (120, 33, 64), (1, 5, 8), (300, 40, 64), (513, 7, 16)]


def drawn(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Small whole numbers: every logit is exact in every type and in any order of its sum."""
    generator = torch.Generator().manual_seed(tokens * 7 + vocabulary)
    x = torch.randint(-1, 2, (tokens, hidden), generator=generator).to(dtype)
    w = torch.randint(-1, 2, (vocabulary, hidden), generator=generator).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[1::5] = -100
    return x, w, target


def exact(x: Tensor, w: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, the gradient of the logits, dx and dw in FP64."""
    logits = (x.double() @ w.double().t()).requires_grad_()
    loss = F.cross_entropy(logits, target, reduction=reduction, ignore_index=-100)
    (dlogits,) = torch.autograd.grad(loss, logits)
    return loss.detach(), dlogits, dlogits @ w.double(), dlogits.t() @ x.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_gradients(shape: tuple[int, int, int], reduction: str, dtype: torch.dtype) -> None:
    """Each gradient of a logit is rounded once to the type, each sum of products once more; FP32 in between."""
    x, w, target = drawn(*shape, dtype)
    loss, dx, dw = linear_cross_entropy(x, w, target, -100, reduction == "mean", True, True)
    expected, dlogits, dx_64, dw_64 = exact(x, w, target, reduction)
    tokens, vocabulary, hidden = shape
    # exp, its sum over the words and the division, each in FP32
    softmax_error = (vocabulary + 16) * 2.0**-24
    assert abs(loss.double() - expected) <= (tokens + vocabulary + 16) * 2.0**-24 * expected.abs()
    half = 0.0 if dtype is torch.float32 else 2.0**-8  # of a step of BF16, relative to the value
    for found, wanted, terms, count in (
        (dx, dx_64, dlogits.abs() @ w.double().abs(), vocabulary),
        (dw, dw_64, dlogits.t().abs() @ x.double().abs(), tokens),
    ):
        # p - 1 at the target loses what p has rounded, which is at most its scale
        scale = float(dlogits.abs().max())
        bound = (half + softmax_error + count * 2.0**-24) * terms + half * wanted.abs() + softmax_error * scale * count
        assert found.shape == wanted.shape and ((found.double() - wanted).abs() <= bound + 2.0**-126).all()


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_it_is_what_separate_operators_compute(shape: tuple[int, int, int]) -> None:
    """Logits are exact here, and gradients are sums of so few bits that FP32 holds them in any order."""
    x, w, target = drawn(*shape, torch.bfloat16)
    logits = (x @ w.t()).float()
    count = (target >= 0).sum()
    counted = target >= 0
    p = torch.softmax(logits, 1)
    p[counted, target[counted]] -= 1.0
    dlogits = torch.where(counted[:, None], p / count, 0.0).bfloat16()
    _, dx, dw = linear_cross_entropy(x, w, target, -100, True, True, True)
    # one step of BF16: p * (1 / count) and p / count may round to neighbours
    torch.testing.assert_close(dx, dlogits @ w, rtol=2.0**-7, atol=2.0**-7 * float((dlogits.abs() @ w.abs()).max()))
    torch.testing.assert_close(
        dw, dlogits.t() @ x, rtol=2.0**-7, atol=2.0**-7 * float((dlogits.t().abs() @ x.abs()).max())
    )


def test_nothing_to_count() -> None:
    x, w, target = drawn(16, 32, 8, torch.bfloat16)
    target.fill_(-100)
    for is_mean in (True, False):
        loss, dx, dw = linear_cross_entropy(x, w, target, -100, is_mean, True, True)
        assert loss.isnan() if is_mean else loss == 0.0  # as F.cross_entropy
        assert not dx.any() and not dw.any()


def test_what_is_not_needed_is_not_made() -> None:
    x, w, target = drawn(40, 32, 8, torch.bfloat16)
    whole = linear_cross_entropy(x, w, target, -100, True, True, True)
    _, dx, dw = linear_cross_entropy(x, w, target, -100, True, True, False)
    assert torch.equal(dx, whole[1]) and dw.numel() == 0
    _, dx, dw = linear_cross_entropy(x, w, target, -100, True, False, True)
    assert torch.equal(dw, whole[2]) and dx.numel() == 0


def test_nan_stays_with_its_token() -> None:
    x, w, target = drawn(16, 32, 8, torch.bfloat16)
    target[:] = 3
    x[5, 0] = torch.nan
    loss, dx, dw = linear_cross_entropy(x, w, target, -100, True, True, True)
    assert loss.isnan() and dx[5].isnan().all() and not dx[:5].isnan().any() and dw.isnan().all()


@pytest.mark.parametrize("tokens,vocabulary,hidden", [(4096, 129280, 7168), (8192, 129280, 7168), (8192, 32768, 7168)])
def test_memory_of_logits_and_gradient_is_one(tokens: int, vocabulary: int, hidden: int) -> None:
    """DeepSeek-V3's head: one allocation, little larger than the larger of the two."""
    sizes: list[int] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.new_empty.default:
                sizes.append(out.numel())
            return out

    x, w = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta"), None
    w = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device="meta")
    target = torch.empty(tokens, dtype=torch.long, device="meta")
    with Counting():
        linear_cross_entropy(
            x, w, target, -100, True, True, True, lambda logits, *_: logits.new_empty(tokens, dtype=torch.float32)
        )
    larger = vocabulary * max(tokens, hidden)
    assert larger < max(sizes) <= larger * (1 + 1.1 / head_loss.SLICES)
    assert sum(sizes) < max(sizes) * 1.001


def test_blocks_cover_all_tokens() -> None:
    for tokens, hidden in ((1, 8), (8192, 7168), (16384, 2048), (100_000, 1024), (300, 64), (4097, 2048)):
        block = head_loss.block_tokens(tokens, hidden)
        assert 0 < block and (block >= tokens or block % 128 == 0)
        assert block <= max(head_loss.BLOCKS_FROM * hidden, 128) or block >= tokens


def test_operands_that_do_not_fit() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w, target = drawn(16, 32, 8, torch.bfloat16)
    wide = w.float()
    with FakeTensorMode() as mode, pytest.raises(DiagnosticError, match="linear_cross_entropy takes"):
        head_loss.LINEAR_CROSS_ENTROPY(
            mode.from_tensor(x), mode.from_tensor(wide), mode.from_tensor(target), -100, True, True, True
        )

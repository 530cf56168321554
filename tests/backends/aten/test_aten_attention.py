"""The fused attention kernels of CUDA against FP64, and the plain forms on a GPU against the CPU's reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fp8c.backends.reference  # noqa: F401  registers the CPU kernels
from fp8c import ops
from fp8c.backends.aten.attention import Kernel, choose
from fp8c.backends.reference.attention_check import evaluate_attention
from fp8c.backends.reference.check import check_gemm
from fp8c.ops import decompositions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is present"),
]

# heads, key heads, queries, keys, width, value width, mask
CASES = {
    "causal": (8, 8, 300, 300, 128, 128, "causal"),
    "grouped heads": (8, 2, 256, 256, 64, 64, "causal"),
    "without a mask": (4, 4, 100, 260, 128, 128, "none"),
    "more keys than queries": (4, 4, 100, 260, 128, 128, "causal"),
    "latent attention": (4, 4, 300, 300, 192, 128, "causal"),
    "bool mask": (4, 2, 77, 130, 64, 64, "bool"),
    "additive mask": (4, 4, 130, 77, 64, 64, "additive"),
    "queries that see nothing": (2, 2, 64, 64, 64, 64, "blind"),
    "width of no multiple of eight": (2, 2, 64, 64, 20, 12, "causal"),
}


def operands(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    heads, groups, queries, keys, width, value_width, kind = CASES[name]
    generator = torch.Generator().manual_seed(queries)

    def heads_last(count: int, positions: int, size: int) -> Tensor:
        return torch.randn(2, positions, count, size, generator=generator).bfloat16().cuda().transpose(1, 2)

    mask: Tensor | None = None
    if kind in ("bool", "blind"):
        mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.6
        mask[..., 0] = True
        if kind == "blind":
            mask[:, :, 3:6] = False
        mask = mask.cuda()
    elif kind == "additive":
        mask = torch.randn(1, heads, queries, keys, generator=generator).bfloat16().cuda()
    sizes = ((heads, queries, width), (groups, keys, width), (groups, keys, value_width), (heads, queries, value_width))
    q, k, v, dout = (heads_last(*size) for size in sizes)
    return q, k, v, dout, mask


@pytest.mark.parametrize("name", list(CASES))
def test_fused_attention_stays_within_its_bound(name: str) -> None:
    q, k, v, dout, mask = operands(name)
    is_causal = CASES[name][-1] == "causal"
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = ops.ATTENTION(*leaves, mask, is_causal, None, True)
    grads = torch.autograd.grad(out, leaves, dout)
    assert lse.shape == out.shape[:3] and lse.dtype is torch.float32
    for result in (out, *grads):
        assert result.transpose(1, 2).is_contiguous()
    evaluation = evaluate_attention(dout, q, k, v, mask, is_causal, None, rounds_probabilities=True)
    ratios = evaluation.worst_ratios(out, *grads)
    assert max(ratios) <= 1.0, (choose(q, k, v, mask, is_causal, True), ratios)


@pytest.mark.parametrize("name", ["causal", "latent attention", "bool mask"])
def test_backward_is_right_for_any_layout_of_out(name: str) -> None:
    """The compiled step rebuilds `out` from its compressed copy, contiguous; fused kernels read it as heads-last."""
    q, k, v, dout, mask = operands(name)
    is_causal = CASES[name][-1] == "causal"
    out, lse = ops.ATTENTION(q, k, v, mask, is_causal, None, True)
    tail = (lse, mask, is_causal, None, True)
    expected = ops.ATTENTION_BACKWARD(dout, q, k, v, out, *tail)
    found = ops.ATTENTION_BACKWARD(dout.contiguous(), q, k, v, out.contiguous(), *tail)
    for grad, reference in zip(found, expected):
        # The kernels may sum dq in another order from run to run: BF16 rounding of equal sums.
        assert float((grad - reference).float().norm()) <= 2.0**-7 * float(reference.float().norm())


def test_backward_is_right_beside_eager_attention() -> None:
    """PyTorch takes a cuDNN plan made for eager attention's layout of `out` for ours as well. Plans are kept for each
    thread, so both go through autograd.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 256, 128, generator=generator).bfloat16().cuda() for _ in range(2))  # stored heads first
    v = torch.randn(2, 256, 4, 128, generator=generator).bfloat16().cuda()[..., :64].transpose(1, 2)
    dout = torch.randn(2, 256, 4, 64, generator=generator).bfloat16().cuda().transpose(1, 2)

    def differentiated(attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ops.ATTENTION(q, k, v, None, True, None, True)[0]
        return out

    assert choose(q, k, v, None, True, True) is Kernel.CUDNN
    evaluation = evaluate_attention(dout, q, k, v, None, True, None, rounds_probabilities=True)
    for attention in (eager, ours, eager):
        ratios = evaluation.worst_ratios(*differentiated(attention))
        assert max(ratios) <= 1.0, (attention.__name__, ratios)


def test_the_common_cases_use_a_fused_kernel() -> None:
    for name in ("causal", "grouped heads", "without a mask", "latent attention", "bool mask"):
        q, k, v, _, mask = operands(name)
        assert choose(q, k, v, mask, CASES[name][-1] == "causal", True) is not Kernel.PLAIN, name


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="for compute capability 9.x"
)
def test_hopper_takes_cudnn_where_flash_attention_would_do() -> None:
    for name in ("causal", "grouped heads"):
        q, k, v, _, _ = operands(name)
        assert choose(q, k, v, None, True, True) is Kernel.CUDNN, name


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    def comparable(t: Tensor) -> Tensor:
        return t.cpu().contiguous().view(torch.uint8)

    return all(x.dtype == y.dtype and torch.equal(comparable(x), comparable(y)) for x, y in zip(a, b))


@pytest.mark.parametrize(
    "fmt", ["e4m3[1x128] fp32", "e4m3[128x1] pow2", "e4m3[128x128] fp32", "e4m3[tensor] e8m0", "e5m6[1x128] pow2"]
)
def test_plain_quantize_on_the_gpu_gives_the_reference_bits(fmt: str) -> None:
    x = torch.randn(300, 200) * torch.exp2(torch.randint(-40, 40, (300, 200)))
    found, expected = decompositions.quantize(x.cuda(), fmt), ops.QUANTIZE(x, fmt)
    assert same_bits(found, expected)
    back = decompositions.dequantize(*found, fmt, torch.bfloat16, None, 200)
    assert same_bits((back,), (ops.DEQUANTIZE(*expected, fmt, torch.bfloat16, None, 200),))


def test_plain_quantize_with_experts_on_the_gpu_gives_the_reference_bits() -> None:
    x, offs = torch.randn(300, 64), torch.tensor([0, 130, 130, 290], dtype=torch.int32)
    x[140, 3] = torch.nan
    found = decompositions.quantize(x.cuda(), "e4m3[128x1] fp32", offs.cuda())
    expected = ops.QUANTIZE(x, "e4m3[128x1] fp32", offs)
    for a, b in zip(found, expected):
        assert torch.equal(a.cpu().float().nan_to_num(-1.0), b.float().nan_to_num(-1.0))


def test_plain_gemms_on_the_gpu_stay_within_their_bound() -> None:
    """Power-of-two scales, for which operands in BF16 are exact; N and K are multiples of 8, so `_grouped_mm` runs."""
    row, column, block = (f"e4m3[{group}] pow2" for group in ("1x128", "128x1", "128x128"))
    offs = torch.tensor([0, 130, 290], dtype=torch.int32).cuda()
    x, dy, w = torch.randn(300, 256).cuda(), torch.randn(300, 128).cuda(), torch.randn(3, 128, 256).cuda()
    xq, wq = decompositions.quantize(x, row), decompositions.quantize(w, block)
    args = (*xq, *wq, offs, row, block, 128, torch.bfloat16)
    assert check_gemm("scaled_grouped_mm", args, decompositions.scaled_grouped_mm(*args)).is_within_bound
    dyq, xc = (decompositions.quantize(operand, column, offs) for operand in (dy, x))
    views = (dyq[0].t(), dyq[1].t(), xc[0].t(), xc[1].t())
    wgrad = (*views, offs, row, row, 128, torch.bfloat16)
    assert check_gemm("scaled_grouped_wgrad", wgrad, decompositions.scaled_grouped_wgrad(*wgrad)).is_within_bound

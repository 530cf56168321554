"""Attention and its gradients against FP64 autograd, within bounds derived from the arithmetic."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401  registers the CPU kernels
from fp8c import ops
from fp8c.backends.reference.attention_check import EXP_ROUNDINGS, evaluate_attention
from fp8c.ops import decompositions

U = 2.0**-24  # FP32's unit roundoff


@dataclass(frozen=True)
class Case:
    heads: int = 2
    groups: int = 2
    queries: int = 33
    keys: int = 33
    width: int = 16
    value_width: int = 16
    mask: str = "none"  # none, causal, bool, additive, keys (one bit for each key), blind (some queries see nothing)
    scale: float | None = None


CASES = {
    "plain": Case(),
    "causal": Case(mask="causal"),
    "more keys than queries": Case(queries=9, keys=40, mask="causal"),
    "more queries than keys": Case(queries=40, keys=9, mask="causal"),
    "grouped heads": Case(heads=6, groups=2, mask="causal"),
    "latent attention": Case(queries=40, keys=40, width=192, value_width=128, mask="causal"),
    "wide values": Case(width=8, value_width=24),
    "bool mask": Case(mask="bool"),
    "additive mask": Case(mask="additive", scale=0.7),
    "mask of keys": Case(mask="keys", heads=4, groups=2),
    "queries that see nothing": Case(mask="blind"),
    "longer than a block": Case(heads=1, groups=1, queries=700, keys=600, mask="causal"),
    "one query": Case(queries=1, keys=7),
}


def operands(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, dout and the mask, in the layout that models make: [B, S, H, D] seen as [B, H, S, D]."""
    generator = torch.Generator().manual_seed(case.queries)

    def heads_last(heads: int, positions: int, width: int) -> Tensor:
        return torch.randn(2, positions, heads, width, generator=generator).to(dtype).transpose(1, 2)

    q = heads_last(case.heads, case.queries, case.width)
    k = heads_last(case.groups, case.keys, case.width)
    v = heads_last(case.groups, case.keys, case.value_width)
    dout = heads_last(case.heads, case.queries, case.value_width)
    mask: Tensor | None = None
    if case.mask in ("bool", "blind"):
        mask = torch.rand(2, 1, case.queries, case.keys, generator=generator) < 0.6
        mask[..., 0] = True
        if case.mask == "blind":
            mask[:, :, 3:6] = False
    elif case.mask == "additive":
        mask = torch.randn(1, case.heads, case.queries, case.keys, generator=generator).to(dtype)
    elif case.mask == "keys":
        mask = torch.arange(case.keys) % 3 != 1
    return q, k, v, dout, mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["reference", "plain"])
@pytest.mark.parametrize("name", list(CASES))
def test_attention_and_its_gradients_stay_within_their_bounds(name: str, form: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    q, k, v, dout, mask = operands(case, dtype)
    evaluation = evaluate_attention(dout, q, k, v, mask, case.mask == "causal", case.scale)
    common = (mask, case.mask == "causal", case.scale, case.heads != case.groups)
    if form == "reference":
        out, lse = ops.ATTENTION(q, k, v, *common)
        grads = ops.ATTENTION_BACKWARD(dout, q, k, v, out, lse, *common)
    else:
        out, lse = decompositions.attention(q, k, v, *common)
        grads = decompositions.attention_backward(dout, q, k, v, out, lse, *common)
    assert lse.shape == out.shape[:3] and lse.dtype is torch.float32
    for found in (out, *grads):
        assert found.dtype is dtype and found.transpose(1, 2).is_contiguous()
    ratios = evaluation.worst_ratios(out, *grads)
    assert max(ratios) <= 1.0, dict(zip(("out", "dq", "dk", "dv"), ratios))
    if dtype is torch.bfloat16 and min(case.queries, case.keys) > 1:
        # The bound is no wide one: the last rounding alone nearly fills it.
        assert ratios[0] > 0.5


def test_the_bound_finds_wrong_results() -> None:
    case = CASES["grouped heads"]
    q, k, v, dout, _ = operands(case, torch.bfloat16)
    evaluation = evaluate_attention(dout, q, k, v, None, True, None)
    out, lse = ops.ATTENTION(q, k, v, None, True, None, True)
    assert evaluation.worst_ratios(out)[0] <= 1.0
    uncausal, _ = ops.ATTENTION(q, k, v, None, False, None, True)
    assert evaluation.worst_ratios(uncausal)[0] > 1.0
    grads = ops.ATTENTION_BACKWARD(dout, q, k, v, out, lse + 0.05, None, True, None, True)
    assert min(evaluation.worst_ratios(out, *grads)[1:]) > 1.0
    assert evaluation.worst_ratios(out.index_fill(2, torch.tensor([3]), torch.nan))[0] == math.inf


def test_queries_that_see_nothing_get_zero() -> None:
    case = CASES["queries that see nothing"]
    q, k, v, dout, mask = operands(case, torch.float32)
    for attention, backward in (
        (ops.ATTENTION, ops.ATTENTION_BACKWARD),
        (decompositions.attention, decompositions.attention_backward),
    ):
        out, lse = attention(q, k, v, mask, False, None, False)
        dq, _, _ = backward(dout, q, k, v, out, lse, mask, False, None, False)
        assert not out[:, :, 3:6].any() and not dq[:, :, 3:6].any()


@pytest.mark.parametrize("queries,keys", [(0, 3), (3, 0), (0, 0)])
def test_empty_sequences(queries: int, keys: int) -> None:
    q, k, v = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (queries, keys, keys))
    out, lse = ops.ATTENTION(q, k, v, None, False, None, False)
    assert out.shape == (2, 2, queries, 8) and lse.shape == (2, 2, queries) and not out.any()
    out.sum().backward()
    for t in (q, k, v):
        assert t.grad is not None and t.grad.shape == t.shape and not t.grad.any()


def test_natural_logarithm_of_the_softmax_sum_is_returned() -> None:
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    expected = (q.double() @ k.double().mT * 8**-0.5).logsumexp(-1)
    for attention in (ops.ATTENTION, decompositions.attention):
        _, lse = attention(q, k, v, None, False, None, False)
        score_error = (8 + 4) * U * 8**-0.5 * (q.double().abs() @ k.double().abs().mT).amax(-1)
        assert ((lse - expected).abs() <= score_error + (20 + EXP_ROUNDINGS) * U * (1 + expected.abs())).all()

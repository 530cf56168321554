"""Attention and its gradients against FP64 autograd, within bounds derived from the arithmetic."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401  registers the CPU kernels
from fp8c import decompositions, ops

U = 2.0**-24  # FP32's unit roundoff
EXP_ULP = 40  # roundings that one exponential may cost; the vectorized ones promise 20 units in the last place
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # of one rounding of the result


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


@dataclass(frozen=True)
class Exact:
    """FP64 results, and bounds for each of out, dq, dk, dv."""

    values: tuple[Tensor, ...]
    bounds: tuple[Tensor, ...]


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None, case: Case, dtype: torch.dtype
) -> Exact:
    """FP64 autograd for the values; for the bounds the chain of roundings, written with FP64 magnitudes.

    A score is a dot product of D terms: off by gamma(D + 4) * scale * sum |q||k| (masking adds one rounding of the sum).
    A probability is exp(score - lse): its argument is off by twice the largest error of a score in its row, and the
    exponential and the sum of the row cost EXP_ULP + Sk + 4 roundings; call the relative error eps.
    out = sum p v is off by (eps + gamma(Sk)) * sum p |v|. dv likewise, from sum p |dout|.
    ds = p * (dp - delta): dp is off by gamma(Dv) * sum |dout||v|; delta, computed from the stored out, by
    (roundoff of out + gamma(Dv)) * sum |dout||out| + sum |dout| * error of out. dq and dk sum ds over keys and queries.
    Every result is rounded once more to its dtype.
    """
    repeat = case.heads // case.groups
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    qd, kd, vd = leaves[0], *(t.repeat_interleave(repeat, 1) for t in leaves[1:])
    scale = case.width**-0.5 if case.scale is None else case.scale
    scores = qd @ kd.mT * scale
    visible = torch.ones(case.queries, case.keys, dtype=torch.bool)
    if case.mask == "causal":
        visible = visible.tril()
    elif mask is not None and mask.dtype is torch.bool:
        visible = mask
    elif mask is not None:
        scores = scores + mask.double()
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    sees_something = lse.isfinite()
    p = torch.exp(scores - lse.where(sees_something, 0.0)).where(sees_something, 0.0)
    out = p @ vd
    out.backward(dout.double())  # type: ignore[no-untyped-call]

    with torch.no_grad():
        grad, roundoff = dout.double(), ROUNDOFF[dtype]
        score_error = (case.width + 4) * U * scale * (qd.abs() @ kd.abs().mT)
        score_error += 2 * U * scores.where(scores.isfinite(), 0.0).abs()
        argument = 2 * score_error.amax(-1, keepdim=True) + 2 * U * lse.where(sees_something, 0.0).abs()
        eps = torch.expm1(argument) + (EXP_ULP + case.keys + 4) * U

        def final(bound: Tensor, value: Tensor) -> Tensor:
            # A sum over groups of query heads costs a few roundings of terms that the bound already holds.
            return bound * (1 + 2.0**-10) + roundoff * (value.abs() + bound) + 2.0**-126

        out_error = (eps + case.keys * U) * (p @ vd.abs())
        stored_out_error = final(out_error, out)
        dp = grad @ vd.mT
        delta = (grad * out).sum(-1, keepdim=True)
        dp_error = (case.value_width + 2) * U * (grad.abs() @ vd.abs().mT)
        delta_error = (grad.abs() * stored_out_error).sum(-1, keepdim=True)
        delta_error += (case.value_width + 2) * U * (grad.abs() * out.abs()).sum(-1, keepdim=True)
        ds_error = p * (1 + eps) * (eps * (dp - delta).abs() + dp_error + delta_error + 2 * U * (dp - delta).abs())
        ds = p * (dp - delta)
        dq_error = scale * (ds_error + (case.keys + 2) * U * ds.abs()) @ kd.abs()
        dk_error = scale * (ds_error + (case.queries + 2) * U * ds.abs()).mT @ qd.abs()
        dv_error = ((eps + (case.queries + 2) * U) * p).mT @ grad.abs()
        dk_error, dv_error = (t.unflatten(1, (case.groups, repeat)).sum(2) for t in (dk_error, dv_error))
        values = [out.detach()]
        for leaf in leaves:
            assert leaf.grad is not None
            values.append(leaf.grad)
        bounds = [final(b, x) for b, x in zip((out_error, dq_error, dk_error, dv_error), values)]
    return Exact(tuple(values), tuple(bounds))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["reference", "plain"])
@pytest.mark.parametrize("name", list(CASES))
def test_attention_and_its_gradients_stay_within_their_bounds(name: str, form: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    q, k, v, dout, mask = operands(case, dtype)
    exact = exact_attention(q, k, v, dout, mask, case, dtype)
    common = (mask, case.mask == "causal", case.scale, case.heads != case.groups)
    if form == "reference":
        out, lse = ops.ATTENTION(q, k, v, *common)
        grads = ops.ATTENTION_BACKWARD(dout, q, k, v, out, lse, *common)
    else:
        out, lse = decompositions.attention(q, k, v, *common)
        grads = decompositions.attention_backward(dout, q, k, v, out, lse, *common)
    assert lse.shape == out.shape[:3] and lse.dtype is torch.float32
    for what, found, value, bound in zip(("out", "dq", "dk", "dv"), (out, *grads), exact.values, exact.bounds):
        assert found.dtype is dtype and found.transpose(1, 2).is_contiguous()
        ratio = ((found.double() - value).abs() / bound).max().item()
        assert ratio <= 1.0, (what, ratio)


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
        assert ((lse - expected).abs() <= score_error + (20 + EXP_ULP) * U * (1 + expected.abs())).all()

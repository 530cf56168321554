"""The norms of fuse-casts: the same numbers from one operator, and nothing where the norm's value is read elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401
from fp8c import graph as g
from fp8c.ops import fused
from fp8c.tools import opt
from tests.passes.steps import Function, data, random
from tests.passes.test_fuse_casts import BEFORE, run


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """As transformers writes it."""
    wide = x.to(torch.float32)
    return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def two_readers(x: Tensor, gain: Tensor, w: Tensor, v: Tensor) -> Tensor:
    y = norm(x.view(2, -1, 256), gain)
    return torch.nn.functional.linear(y, w) + torch.nn.functional.linear(y, v)


def part_of_rows(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    return norm(x.split([128, 128], -1)[0], gain[:128]) @ w[:, :128].t()


def layer_norm(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, (256,), gain) @ w.t()


def read_elsewhere(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    y = norm(x, gain)
    return torch.cat((y @ w.t(), y), 1)


def captured(function: Callable[..., Tensor], dynamic: bool = False) -> opt.JointStep:
    more = {"v": random(128, 256)} if function is two_readers else {}
    module = Function(function, gain=random(256), w=random(128, 256), **more)
    return opt.capture_joint(module, data(256, 256), dynamic=dynamic)


def rewritten(step: opt.JointStep, **options: Any) -> tuple[opt.OptResult, int]:
    result = opt.run_passes(step, "deepseek_v3", [*BEFORE, "fuse-casts"], **{"target": "h200", **options})
    assert result.halves is not None
    return result, len(list(g.calls(result.halves.forward.graph, {fused.RMS_NORM_QUANTIZE})))


@pytest.mark.parametrize("function", [two_readers, part_of_rows])
def test_the_numbers_stay_the_same(function: Callable[..., Tensor]) -> None:
    """The plain form adds as PyTorch does, so it is bit for bit."""
    step = captured(function)
    result, count = rewritten(step)
    assert count == 1
    assert result.halves is not None
    assert not any("rsqrt" in str(n.target) for n in result.halves.forward.graph.nodes)
    plain = opt.run_passes(step, "deepseek_v3", BEFORE, target="h200")
    for before, after in zip(run(plain), run(result), strict=True):
        assert torch.equal(before, after)


def test_any_length() -> None:
    assert rewritten(captured(two_readers, dynamic=True))[1] == 1


@pytest.mark.parametrize("function", [read_elsewhere, layer_norm])
def test_others_stay(function: Callable[..., Tensor]) -> None:
    assert rewritten(captured(function))[1] == 0


def test_a_target_without_the_kernel_keeps_the_norm() -> None:
    assert rewritten(captured(two_readers), target="cpu")[1] == 0

"""What is rewritten for Inductor keeps every bit, and is left alone where something else depends on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fp8c import graph as g
from fp8c.backends import inductor_rewrites
from fp8c.graph import aten
from fp8c.ops.stored import STORED


def rewritten(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    """The functional graph of a call behind the rewrites, its result compared."""
    gm = make_fx(torch.func.functionalize(function), tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    inductor_rewrites.rewrite_for_inductor(gm)
    assert torch.equal(gm(*inputs), function(*inputs))
    return gm


def count(gm: fx.GraphModule, target: object) -> int:
    return len(list(g.calls(gm.graph, {target})))


def parts(u: Tensor, v: Tensor) -> Tensor:
    """As transformers puts DeepSeek-V3's keys together."""
    y = u.new_empty(*u.shape[:-1], u.shape[-1] + v.shape[-1])
    y[..., : u.shape[-1]] = u
    y[..., u.shape[-1] :] = v
    return y


def test_parts_are_joined() -> None:
    gm = rewritten(parts, torch.randn(2, 3, 8), torch.randn(2, 3, 4))
    assert count(gm, aten.cat.default) == 1 and count(gm, aten.slice_scatter.default) == 0


def test_parts_that_are_cast_or_broadcast_keep_their_values() -> None:
    for v in (torch.randn(2, 3, 4).double(), torch.randn(1, 4)):
        rewritten(parts, torch.randn(2, 3, 8), v)  # compares


def test_what_is_read_half_written_is_not_joined() -> None:
    def function(u: Tensor, v: Tensor) -> Tensor:
        y = u.new_zeros(3, 12)
        y[..., :8] = u
        half = y + 1
        y[..., 8:] = v
        return half + y

    gm = rewritten(function, torch.randn(3, 8), torch.randn(3, 4))
    assert count(gm, aten.cat.default) == 0


def test_parts_over_memory_that_held_something_are_not_joined() -> None:
    def function(u: Tensor, v: Tensor, y: Tensor) -> Tensor:
        z = y.clone()
        z[..., :4] = u
        z[..., 8:] = v
        return z

    gm = rewritten(function, torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 12))
    assert count(gm, aten.cat.default) == 0


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None].float() * torch.linspace(0, 1, x.shape[-1])
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return x * cos[None, None] + x.flip(-1) * sin[None, None]


def test_tables_that_heads_share_are_stored_once() -> None:
    gm = rewritten(rotated, torch.randn(2, 8, 16, 32).to(torch.bfloat16), torch.arange(16))
    kept = list(g.calls(gm.graph, {STORED}))
    assert [g.value(node).dtype for node in kept] == [torch.bfloat16] * 2  # behind the cast
    inductor_rewrites.rewrite_for_inductor(gm)
    assert count(gm, STORED) == 2


def test_a_cosine_of_the_data_is_not_stored() -> None:
    gm = rewritten(lambda x: x.cos() * x, torch.randn(8, 16))
    assert count(gm, STORED) == 0

"""What is rewritten for Inductor keeps every bit, and is left alone where something else depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.proxy_tensor import make_fx

from fp8c import graph as g
from fp8c.backends import inductor_rewrites, lowering
from fp8c.backends.inductor_concatenations import parts_of, source_of
from fp8c.graph import aten
from fp8c.ops.stored import STORED


class Done(Exception):
    """Code is generated; nothing need be compiled."""


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


def by_heads(x: Tensor, table: Tensor) -> Tensor:
    """Copied and turned features of [batch, seq, heads, 12], as DeepSeek-V3's attention reads them."""
    kept, turned = x.permute(0, 2, 1, 3).split([8, 4], -1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    joined = torch.cat([kept, torch.cat([a * table - b, b * table + a], -1)], -1)
    stored: Tensor = torch.ops.fp8c.stored(joined.permute(0, 2, 1, 3).contiguous())  # any operator that is opaque
    return stored


def test_a_concatenation_is_made_in_the_order_it_is_read_in() -> None:
    gm = rewritten(by_heads, torch.randn(2, 3, 5, 12), torch.randn(3, 2))
    (joined,) = g.calls(gm.graph, {aten.cat.default})
    assert g.value(joined).shape == (2, 3, 5, 12) and g.value(joined).is_contiguous()
    assert count(gm, aten.clone.default) == 0


def test_computed_parts_are_stored_before_they_are_put_in() -> None:
    gm = rewritten(by_heads, torch.randn(2, 3, 5, 12), torch.randn(3, 2))
    (joined,) = g.calls(gm.graph, {aten.cat.default})
    kept, *turned = (source_of(part) for part in parts_of(joined))
    assert [part.target for part in turned] == [STORED, STORED] and kept.target is not STORED


def test_a_part_for_all_heads_is_stored_once() -> None:
    def function(x: Tensor, shared: Tensor, table: Tensor) -> Tensor:
        turned = (shared * table).expand(-1, x.shape[1], -1, -1)
        joined = torch.cat([x, turned], -1)
        stored: Tensor = torch.ops.fp8c.stored(joined.permute(0, 2, 1, 3).contiguous())
        return stored

    gm = rewritten(function, torch.randn(2, 5, 3, 8), torch.randn(2, 1, 3, 4), torch.randn(3, 4))
    part, _ = g.calls(gm.graph, {STORED})
    assert g.value(part).shape == (2, 1, 3, 4)


def test_what_is_computed_with_is_left_to_inductor() -> None:
    """Joined in registers, a part need not exist."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, x * y], -1) + 1

    gm = rewritten(function, torch.randn(3, 8), torch.randn(3, 8))
    assert count(gm, STORED) == 0


def test_parts_that_are_all_computed_are_joined_in_one_kernel() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        stored: Tensor = torch.ops.fp8c.stored(torch.cat([x + y, x * y], -1))
        return stored

    assert count(rewritten(function, torch.randn(3, 8), torch.randn(3, 8)), STORED) == 1


def test_a_concatenation_that_others_read_too_keeps_its_order() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        joined = torch.cat([x, y], -1)
        return joined.permute(1, 0, 2).contiguous() + joined.sum()

    gm = rewritten(function, torch.randn(3, 5, 8), torch.randn(3, 5, 4))
    assert count(gm, aten.clone.default) == 1


def test_inductor_stores_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator itself copies what it is given."""
    monkeypatch.setattr(inductor_rewrites, "rewrite_for_inductor", lambda gm: None)

    def function(x: Tensor) -> tuple[Tensor]:
        return (torch.ops.fp8c.stored(x.cos()).expand(4, -1) * 2,)

    x = torch.randn(64)
    gm = make_fx(function, tracing_mode="fake")(x)
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    made: list[str] = []
    original = GraphLowering.codegen

    def codegen(self: GraphLowering) -> Any:
        made.append(str(original(self)[0].value))
        raise Done("Done")

    monkeypatch.setattr(GraphLowering, "codegen", codegen)
    with pytest.raises(Exception, match="Done"), tracing(TracingContext(values[0].fake_mode)):
        lowering.lower_inductor(gm, values, is_inference=True)
    assert "fp8c.stored" not in made[0] and "empty_strided_cpu((64, )" in made[0]

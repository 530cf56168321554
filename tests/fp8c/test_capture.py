"""What capture does to a forward graph before it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import fp8c.backends.reference  # noqa: F401  registers the CPU kernels
from fp8c import capture

BF16 = torch.bfloat16
HEADS, SHARED, ROWS, WIDTH = 4, 2, 8, 16


def captured(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Dynamo's graph of a call, behind capture's rewrites."""
    graphs: list[fx.GraphModule] = []

    def catch(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=catch, fullgraph=True)(*inputs)
    capture.prepare_forward(graphs[0])
    return graphs[0]


def inputs_of(gm: fx.GraphModule, **named: Tensor) -> list[Tensor]:
    """The arguments of the captured function in the order of the graph's inputs."""
    return [
        named[str(node.target).removeprefix("L_").removesuffix("_")] for node in gm.graph.find_nodes(op="placeholder")
    ]


def attention_of(gm: fx.GraphModule) -> fx.Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fp8c.attention.default)
    return node


def repeat_kv(x: Tensor, n: int) -> Tensor:
    """As in transformers."""
    batch, heads, rows, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, rows, width).reshape(batch, heads * n, rows, width)


def heads_last(heads: int) -> Tensor:
    return torch.randn(2, ROWS, heads, WIDTH).transpose(1, 2)


def with_expand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k, SHARED), repeat_kv(v, SHARED), attn_mask=mask)


def with_interleave(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = k.repeat_interleave(SHARED, dim=1), torch.repeat_interleave(v, SHARED, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("function", [with_expand, with_interleave])
def test_shared_heads_are_not_repeated(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    q, k, v = heads_last(HEADS), heads_last(HEADS // SHARED), heads_last(HEADS // SHARED)
    mask = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    gm = captured(function, q, k, v, mask)
    node = attention_of(gm)
    assert node.args[-1] is True and len(gm.graph.find_nodes(op="call_method", target="expand")) == 0
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    others = [t.clone().requires_grad_() for t in (q, k, v)]
    (found,) = gm(*inputs_of(gm, q=leaves[0], k=leaves[1], v=leaves[2], mask=mask))
    expected = function(*others, mask)
    # FP32 on both sides, summed in other orders: a few roundings of sums of at most 16 terms of unit size.
    torch.testing.assert_close(found, expected, rtol=2.0**-18, atol=2.0**-18)
    dout = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, leaves, dout), torch.autograd.grad(expected, others, dout)):
        torch.testing.assert_close(a, b, rtol=2.0**-16, atol=2.0**-16)


@pytest.mark.parametrize("function", [with_expand, with_interleave])
def test_autocast_casts_what_reaches_attention(function: Callable[..., Tensor]) -> None:
    """FP32 queries, keys and values in another layout than attention's, under autocast to BF16."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, HEADS, ROWS, WIDTH),
        heads_last(HEADS // SHARED),
        torch.randn(2, HEADS // SHARED, ROWS, WIDTH),
    )
    mask = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    with torch.autocast("cpu", BF16):
        gm = captured(function, q, k, v, mask)
        (found,) = gm(*inputs_of(gm, q=q, k=k, v=v, mask=mask))
        expected = function(q, k, v, mask)
    assert found.dtype is expected.dtype is BF16
    # Probabilities and results are rounded to BF16, in one of the two in another order.
    assert float((found - expected).float().norm()) <= 2.0**-7 * float(expected.float().norm())


def other_count(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Keys are shared and values are not."""
    return F.scaled_dot_product_attention(q, repeat_kv(k, SHARED), v, attn_mask=mask)


def other_axis(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Head h of the queries reads head h % 2, not h // 2."""
    k, v = (x[:, None, :, :, :].expand(2, SHARED, 2, ROWS, WIDTH).reshape(2, HEADS, ROWS, WIDTH) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("function", [other_count, other_axis])
def test_other_repeats_stay(function: Callable[..., Tensor]) -> None:
    values = HEADS if function is other_count else HEADS // SHARED
    mask = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    gm = captured(function, heads_last(HEADS), heads_last(HEADS // SHARED), heads_last(values), mask)
    assert attention_of(gm).args[-1] is False


def test_queries_put_together_heads_first_reach_attention_heads_last() -> None:
    """As DeepSeek-V3 joins the part of a query that rotates with the part that doesn't."""

    def function(a: Tensor, b: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(torch.cat((a, b), -1), k, v, is_causal=True)

    a, b = torch.randn(2, HEADS, ROWS, WIDTH), torch.randn(2, HEADS, ROWS, WIDTH)
    k, v = torch.randn(2, ROWS, HEADS, 2 * WIDTH).transpose(1, 2), heads_last(HEADS)
    gm = captured(function, a, b, k, v)
    seen: list[Tensor] = []

    class Watch(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is torch.ops.fp8c.attention.default:
                seen.extend(args[:3])
            return super().call_function(target, args, kwargs)

    (found,) = Watch(gm).run(*inputs_of(gm, a=a, b=b, k=k, v=v))
    assert all(t.transpose(1, 2).is_contiguous() for t in seen)
    assert len(gm.graph.find_nodes(op="call_method", target="contiguous")) == 1  # nothing is done to k
    torch.testing.assert_close(found, function(a, b, k, v), rtol=2.0**-18, atol=2.0**-18)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_moved_router_weight_multiplies_in_fp32(dtype: torch.dtype) -> None:
    """Qwen3's router weights are BF16: the product keeps its one rounding, the weights' gradient loses none per term."""

    def function(h: Tensor, w: Tensor, offs: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(h, w.transpose(1, 2), offs=offs) * weight.unsqueeze(-1)

    torch.manual_seed(0)
    h, w = torch.randn(32, 64).to(BF16), torch.randn(2, 32, 64).to(BF16)
    offs, weight = torch.tensor([16, 32], dtype=torch.int32), torch.rand(32).to(dtype)
    gm = captured(function, h, w, offs, weight)
    products: list[Tensor] = []

    class Watch(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            found = super().call_function(target, args, kwargs)
            if target in capture._MULTIPLY:
                products.append(found)
            return found

    Watch(gm).run(*inputs_of(gm, h=h, w=w, offs=offs, weight=weight))
    (product,) = products
    assert product.dtype is torch.float32
    assert torch.equal(product.to(BF16), (h.float() * weight.float()[:, None]).to(BF16))
    if dtype is BF16:
        assert torch.equal(product.to(BF16), h * weight[:, None])


def test_nodes_that_dynamo_calls_for_their_effect_are_not_called() -> None:
    """`_enter_autocast`, say: such a node has no value of its own, and what it does belongs to the step, not to its capture."""
    called: list[int] = []

    def enter() -> None:
        called.append(1)

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.randn(2, 4, 8, 16)
    graph.call_function(enter)
    out = graph.call_function(F.scaled_dot_product_attention, (x, x, x))
    out.meta["example_value"] = x.meta["example_value"]
    graph.output(out)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert capture.prepare_forward(gm) == ["1 attention calls kept as one operator"]
    assert called == []
    made = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output") and n.target != enter]
    assert made and all("example_value" in n.meta for n in made)

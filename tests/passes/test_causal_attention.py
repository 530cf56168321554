"""causal-attention: exact where it drops a mask, and silent nowhere; on hand-made attention and transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import fp8c.backends.reference  # noqa: F401  (the CPU's kernels)
from fp8c import driver, ops
from fp8c import graph as g
from fp8c.diagnostics import DiagnosticError
from fp8c.models import load_model
from fp8c.passes import check_optional
from fp8c.prepare import prepare
from fp8c.tools import opt
from tests.passes.steps import Function, data

HEADS = 2


def attention_of(mask: Any, length: int = 32, keys: int | None = None, dynamic: bool = False) -> opt.JointStep:
    """The joint graph of masked attention; `mask` is made from the query."""
    q = data(1, HEADS, length, 16)
    k, v = (data(1, HEADS, keys or length, 16) for _ in range(2))
    module = Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q)))
    return opt.capture_joint(module, q, k, v, dynamic=dynamic)


def triangle(q: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    return at[None, :] <= at[:, None]


def dropped(step: opt.JointStep) -> int:
    return opt.run_passes(step, passes=["causal-attention"]).changed[0][1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_forward_and_backward_lose_the_mask(dynamic: bool) -> None:
    assert dropped(attention_of(triangle, dynamic=dynamic)) == 2


def test_masks_of_other_shapes_stay() -> None:
    assert dropped(attention_of(lambda q: triangle(q) & (torch.arange(32) > q.shape[2] - 40))) == 2  # always holds
    assert dropped(attention_of(lambda q: triangle(q).t())) == 0
    assert dropped(attention_of(lambda q: triangle(q) & (torch.arange(32) > 3))) == 0
    padding = torch.ones(32, dtype=torch.bool)
    assert dropped(attention_of(lambda q: triangle(q) & padding)) == 0  # data, even though it is all true
    longer = attention_of(lambda q: torch.arange(48)[None, :] <= torch.arange(32)[:, None], keys=48)
    assert dropped(longer) == 0
    window = attention_of(lambda q: triangle(q) & (torch.arange(q.shape[2]) > torch.arange(q.shape[2])[:, None] - 64))
    assert dropped(window) == 2  # compiled for 32 tokens alone
    either = attention_of(
        lambda q: triangle(q) & (torch.arange(q.shape[2]) > torch.arange(q.shape[2])[:, None] - 64), dynamic=True
    )
    assert dropped(either) == 0  # the same, for any length


def test_a_second_run_changes_nothing() -> None:
    result = opt.run_passes(attention_of(triangle), passes=["causal-attention", "causal-attention"])
    assert [changed for _, changed in result.changed] == [2, 0]


def test_the_result_is_the_same() -> None:
    """The masked scores are minus infinity either way, so the reference gives the same bits."""
    step = attention_of(triangle)
    after = opt.run_passes(step, passes=["causal-attention"])
    inputs = [torch.randn(n.meta["val"].shape).bfloat16() for n in after.graph.find_nodes(op="placeholder")]

    def run(graph: fx.Graph) -> list[Tensor]:
        found = fx.Interpreter(fx.GraphModule(torch.nn.Module(), graph)).run(*inputs, enable_io_processing=False)
        return [t for t in found if t is not None]

    with torch.no_grad():
        pairs = list(zip(run(step.joint.graph), run(after.graph), strict=True))
    assert len(pairs) == 4 and all(torch.equal(a, b) for a, b in pairs)


# --- transformers' models ------------------------------------------------------------------------------------------

TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "num_key_value_heads": 1},
    "qwen3_moe": {**TINY, **EXPERTS, "num_key_value_heads": 1, "num_experts": 4, "head_dim": 32},
    "deepseek_v3": {
        **TINY,
        **EXPERTS,
        **{"num_key_value_heads": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
        **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    },
    "mistral": {**TINY, "num_key_value_heads": 1, "sliding_window": 16},
}


def planned(name: str, dynamic: bool = False, without: frozenset[str] = frozenset(), **batch: Tensor) -> driver.Session:
    loaded = load_model(f"hf:{name}", overrides=MODELS[name], weights="random", batch=2, seq=32)
    step = loaded.step()
    session = driver.new_session("bf16", "cpu", plan_only=True, without=without)
    prepare(step)
    torch._dynamo.reset()
    try:
        torch.compile(step, backend=driver.guarded(session), fullgraph=True, dynamic=dynamic)(
            {**loaded.example_inputs, **batch}
        )
    except Exception as error:
        if not any(isinstance(e, driver.PlanningDone) for e in driver.causes(error)):
            raise
    return session


def attentions(session: driver.Session) -> tuple[int, int]:
    """How many of the forward's attentions are causal, and how many have a mask."""
    nodes = list(g.calls(session.steps[-1].halves.forward.graph, {ops.ATTENTION}))
    return sum(n.args[4] is True for n in nodes), sum(n.args[3] is not None for n in nodes)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_masks_of_transformers_are_proven(name: str) -> None:
    session = planned(name)
    assert attentions(session) == (2, 0)
    assert [r.message for r in session.remarks if r.code == "R0840"] == [
        "2 attention masks are the causal triangle and were dropped"
    ]
    assert not any(
        "arange" in str(n.target) and n.meta["val"].dim() > 1 for n in session.steps[-1].halves.forward.graph.nodes
    )


def test_they_are_proven_for_every_length() -> None:
    assert attentions(planned("llama", dynamic=True)) == (2, 0)


def test_a_sliding_window_stays() -> None:
    session = planned("mistral")
    assert attentions(session) == (0, 2)
    assert [r.code for r in session.remarks if r.code in ("R0840", "R0841")] == ["R0841"]


def test_padding_stays() -> None:
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, -5:] = 0
    assert attentions(planned("llama", attention_mask=mask)) == (0, 2)


def test_packed_sequences_stay() -> None:
    packed = torch.cat([torch.arange(20), torch.arange(12)]).expand(2, -1)
    assert attentions(planned("llama", position_ids=packed)) == (0, 2)


def test_it_can_be_left_out() -> None:
    assert attentions(planned("llama", without=frozenset({"causal-attention"}))) == (0, 2)
    with pytest.raises(DiagnosticError, match="did you mean 'causal-attention'"):
        check_optional(["causal-atention"])
    with pytest.raises(DiagnosticError, match="can't be left out"):
        check_optional(["insert-quantize"])

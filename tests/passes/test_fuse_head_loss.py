"""fuse-head-loss: what it joins, what it leaves alone, and that the step computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import fp8c
import fp8c.backends.reference  # noqa: F401
from fp8c import driver, pipeline
from fp8c import graph as g
from fp8c.models import load_model
from fp8c.ops.head_loss import LINEAR_CROSS_ENTROPY
from fp8c.saved import saved_report
from fp8c.tools import opt
from tests.models.harness import count_executed
from tests.passes.steps import Function, data, random
from tests.passes.test_causal_attention import MODELS

PASSES = ["assign-roles", "fuse-head-loss"]
TOKENS, WORDS, WIDTH = 32, 96, 64
Loss = Callable[..., Tensor]


def captured(
    loss: Loss, *, dtype: torch.dtype = torch.bfloat16, dynamic: bool = False, **more: Tensor
) -> opt.JointStep:
    module = Function(loss, w=random(WORDS, WIDTH, dtype=dtype), **more)
    labels = torch.randint(WORDS, (TOKENS,))
    return opt.capture_joint(module, data(TOKENS, WIDTH, dtype=dtype), labels, dynamic=dynamic)


def fused(step: opt.JointStep, spec: str = "bf16") -> tuple[int, str]:
    """Rewrites, and the remark about the head."""
    result = opt.run_passes(step, spec, PASSES)
    remarks = [r.message for r in result.ctx.remarks if r.code in ("R0844", "R0845")]
    return result.changed[-1][1], remarks[0] if remarks else ""


def plain(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), y)


def as_transformers(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Batches of sequences, labels shifted by padding, the sum divided by a number of items."""
    logits = F.linear(x.view(2, -1, WIDTH), w).float()
    shifted = F.pad(y.view(2, -1), (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, WORDS), shifted.view(-1), ignore_index=-100, reduction="sum") / 31


def stored_kn(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.reshape(WIDTH, WORDS)).float(), y)


LOSSES: dict[str, Loss] = {"plain": plain, "as transformers": as_transformers, "stored [H, V]": stored_kn}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_step_computes_the_same(name: str, dtype: torch.dtype) -> None:
    """Logits are small whole numbers, exact in any order of their sum. In FP32 the rest may differ by orders of sums, in
    BF16 by a gradient of a logit on either side of a rounding, and by one more rounding behind the tangent."""
    torch.manual_seed(0)
    step = captured(LOSSES[name], dtype=dtype)
    result = opt.run_passes(step, "bf16", PASSES)
    assert result.changed[-1][1] == 1
    inputs = []
    for node in step.joint.graph.find_nodes(op="placeholder"):
        val = node.meta["val"]
        is_tangent = str(node.target).startswith("tangents")
        low, high = (0, WORDS) if val.dtype is torch.int64 else (-1, 2)
        inputs.append(torch.tensor(0.7) if is_tangent else torch.randint(low, high, tuple(val.shape)).to(val.dtype))
    before, after = (run(graph, inputs) for graph in (step.joint.graph, result.graph))
    assert len(before) == len(after) == 3
    one_step = 2.0**-7 if dtype is torch.bfloat16 else 64 * 2.0**-24
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        step_size = 16 * 2.0**-24 if i == 0 else one_step  # the loss itself is FP32 in both
        torch.testing.assert_close(a, b, rtol=2 * step_size, atol=step_size * float(a.abs().max()))


def run(graph: fx.Graph, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        found = fx.Interpreter(fx.GraphModule(torch.nn.Module(), graph)).run(*inputs, enable_io_processing=False)
    return [t for t in found if t is not None]


def test_any_length() -> None:
    assert fused(captured(plain, dynamic=True))[0] == 1


def test_frozen_weight_and_frozen_input() -> None:
    labels = torch.randint(WORDS, (TOKENS,))
    for is_frozen, x in ((True, data(TOKENS, WIDTH)), (False, random(TOKENS, WIDTH))):
        module = Function(plain, w=random(WORDS, WIDTH)).requires_grad_(not is_frozen)
        result = opt.run_passes(opt.capture_joint(module, x, labels), "bf16", PASSES)
        (node,) = g.calls(result.graph, {LINEAR_CROSS_ENTROPY})
        assert node.args[5:] == (is_frozen, not is_frozen)


def test_a_second_run_changes_nothing() -> None:
    result = opt.run_passes(captured(plain), "bf16", [*PASSES, "fuse-head-loss"])
    assert [changed for _, changed in result.changed[1:]] == [1, 0]


SMOOTHED = "something else reads the logarithms of its probabilities"
OTHERS: dict[str, tuple[Loss, str]] = {
    "label smoothing": (lambda x, y, w: F.cross_entropy(F.linear(x, w).float(), y, label_smoothing=0.1), SMOOTHED),
    "one value for each token": (
        lambda x, y, w: F.cross_entropy(F.linear(x, w).float(), y, reduction="none").square().sum(),
        "one value for each token",
    ),
    "loss in BF16": (lambda x, y, w: F.cross_entropy(F.linear(x, w), y), "not taken in FP32"),
    "part of the tokens": (lambda x, y, w: F.cross_entropy(F.linear(x, w)[1:].float(), y[1:]), "reads its logits"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_stay(name: str) -> None:
    loss, why = OTHERS[name]
    changed, remark = fused(captured(loss))
    assert changed == 0 and why in remark, remark


def test_logits_that_something_reads_stay() -> None:
    def z_loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        logits = F.linear(x, w).float()
        return F.cross_entropy(logits, y) + 1e-4 * logits.logsumexp(1).square().mean()

    assert fused(captured(z_loss))[0] == 0

    def returned(x: Tensor, y: Tensor, w: Tensor) -> Any:
        logits = F.linear(x, w)
        return F.cross_entropy(logits.float(), y), logits

    changed, remark = fused(captured(returned))
    assert changed == 0 and "outputs=('loss',)" in remark


def test_bias_and_weights_of_classes_stay() -> None:
    def biased(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b).float(), y)

    assert fused(captured(biased, b=random(WORDS))) == (0, "the output head is not joined with its loss: it has a bias")
    classes = torch.rand(WORDS)
    assert fused(captured(lambda x, y, w: F.cross_entropy(F.linear(x, w).float(), y, weight=classes)))[0] == 0


def test_a_head_in_fp8_stays() -> None:
    everything = """version 1;
    format act = e4m3 [1x128] scale fp32 online;
    format act_t = e4m3 [128x1] scale fp32 online;
    format weight = e4m3 [128x128] scale fp32 online;
    spec all {
      target sm90;
      rule everything for op(linear) {
        fprop { x = act; w = weight; accumulate = fp32; }
        dgrad { dy = act; w = weight; accumulate = fp32; }
        wgrad { x = act_t; dy = act_t; accumulate = fp32; }
      }
    }"""
    from fp8c.specs.load import loads

    step = opt.capture_joint(Function(plain, w=random(128, 128)), data(128, 128), torch.randint(128, (128,)))
    result = opt.run_passes(step, loads(everything), PASSES)
    assert result.changed[-1][1] == 0
    assert [r.message for r in result.ctx.remarks] == [
        "the output head is not joined with its loss: the spec puts it in FP8"
    ]


# --- transformers' models ------------------------------------------------------------------------------------------


def planned(name: str, **options: Any) -> pipeline.Rewritten:
    loaded = load_model(f"hf:{name}", overrides=MODELS[name] | {"vocab_size": 1024}, weights="random", batch=2, seq=32)
    session = driver.new_session("deepseek_v3" if name == "deepseek_v3" else "bf16", "cpu", partial=True, **options)
    return driver.capture_step(loaded.step(), loaded.example_inputs, session)


def test_backward_keeps_gradients_instead_of_logits() -> None:
    steps = [planned("llama", without=frozenset(names)) for names in ((), ("fuse-head-loss",))]
    after, before = (saved_report(s.halves, frozenset({("lm_head", 1024)})) for s in steps)
    assert before.logits_bytes == 64 * 1024 * 2  # T x V
    assert after.logits_bytes == (1024 * 64 + 64 * 64) * 2  # V x H, T x H
    assert after.total_bytes <= before.total_bytes
    assert pipeline.count_gemms(steps[0]) == pipeline.count_gemms(steps[1])


def test_the_shipped_recipe_keeps_the_head_and_joins_it() -> None:
    step = planned("deepseek_v3")
    assert [r.changed for r in step.records if r.name == "fuse-head-loss"] == [1]


def trained(outputs: tuple[str, ...], without: tuple[str, ...] = (), **options: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    loaded = load_model(
        "hf:llama", overrides=MODELS["llama"] | {"tie_word_embeddings": True}, weights="random", batch=2, seq=32
    )
    step = fp8c.compile(loaded.module, "bf16", outputs=outputs, without=without, **options)
    inputs = dict(loaded.example_inputs)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :9] = -100
    out = step(**inputs)
    out.loss.backward()
    assert (driver.session_of(step).steps[-1].records[0].name, out.logits is None) == ("assign-roles", bool(outputs))
    gradients = {n: p.main_grad if options.get("main_grad") else p.grad for n, p in step.named_parameters()}
    return out.loss.detach(), gradients


def test_a_tied_model_trains_the_same() -> None:
    """Embedding and head share a weight: its gradient is the sum of both, in BF16."""
    loss, gradients = trained(("loss",))
    for outputs, without, options in (
        ((), (), {}),
        (("loss",), ("fuse-head-loss",), {}),
        (("loss",), (), {"main_grad": True}),
    ):
        other, others = trained(outputs, without, **options)
        torch.testing.assert_close(loss, other, rtol=2.0**-20, atol=0.0)
        assert gradients.keys() == others.keys() and gradients
        for name, found in gradients.items():
            error = (found.float() - others[name].float()).norm() / others[name].float().norm()
            assert error < 2.0**-8, (name, float(error))  # a rounding to BF16, here and there


def test_evaluation_joins_them_too() -> None:
    loaded = load_model("hf:llama", overrides=MODELS["llama"], weights="random", batch=2, seq=32)
    step = fp8c.compile(loaded.module, "bf16", outputs=("loss",))
    with torch.no_grad():
        evaluated = step(**loaded.example_inputs).loss
        counts = count_executed(lambda: step(**loaded.example_inputs))
    assert counts["fp8c::linear_cross_entropy"] == 1
    assert torch.equal(evaluated, step(**loaded.example_inputs).loss.detach())


def test_outputs_must_exist() -> None:
    with pytest.raises(TypeError, match="outputs takes names"):
        fp8c.compile(torch.nn.Linear(2, 2), "bf16", outputs="loss")
    loaded = load_model("hf:llama", overrides=MODELS["llama"], weights="random", batch=2, seq=32)
    with pytest.raises(Exception, match="losss"):
        fp8c.compile(loaded.module, "bf16", outputs=("losss",))(**loaded.example_inputs)
    step = fp8c.compile(torch.nn.Linear(8, 8), "bf16", outputs=("loss",))
    with pytest.raises(Exception, match="named fields"):
        step(torch.randn(4, 8))


def test_a_head_with_two_losses_is_one_remark() -> None:
    """As with multi-token prediction, where the head predicts two tokens."""
    changed, remark = fused(captured(lambda x, y, w: plain(x, y, w) + 0.3 * plain(x * 2, y, w)))
    assert (changed, remark) == (2, "the output head is joined with 2 losses: no logits are kept")

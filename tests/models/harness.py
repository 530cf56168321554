"""Train one step of a model in BF16 and through fp8c, and check what has to hold for every model.

The loss bound: rounding to E4M3 (3 mantissa bits) moves a value by at most 2**-4 of itself, and a GEMM has two such
operands. Errors of different elements and of different GEMMs are independent and add in quadrature, so `depth` GEMMs in
series change the features in front of the loss by at most 2 * sqrt(depth) * 2**-4 of their own size, in the mean.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import fp8c
from fp8c import driver, pipeline, verifier
from fp8c import graph as g
from fp8c.roles import Op

Call = Callable[[nn.Module], Tensor]  # one step's loss


@dataclass
class Outcome:
    """One step in BF16 and one through fp8c, of two copies of the same model."""

    plain: nn.Module
    step: nn.Module
    loss_bf16: float
    loss_fp8: float
    grads_bf16: dict[str, Tensor]
    grads_fp8: dict[str, Tensor]
    session: driver.Session
    executed: Counter[str] = field(default_factory=Counter)

    @property
    def rewritten(self) -> pipeline.Rewritten:
        return self.session.steps[-1]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return pipeline.count_gemms(self.rewritten)

    def errors(self) -> dict[str, float]:
        """Relative L2 error of every parameter's gradient."""
        return {
            n: ((self.grads_fp8[n].double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()
            for n, ref in self.grads_bf16.items()
        }


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.detach().clone() for n, p in module.named_parameters() if p.grad is not None}


def train_both(model: nn.Module, call: Call, spec: Any = "deepseek_v3", **options: Any) -> Outcome:
    """One step of `model` in BF16 and one of its copy through fp8c, with the same random numbers."""
    plain, other = model, copy.deepcopy(model)
    torch.manual_seed(1)
    loss = call(plain)
    loss.backward()
    step = fp8c.compile(other, spec, "cpu", **options)
    torch.manual_seed(1)
    fp8_loss = call(step)
    fp8_loss.backward()
    grads = gradients(step)
    executed = count_executed(lambda: call(step).backward())
    return Outcome(
        plain, step, loss.item(), fp8_loss.item(), gradients(plain), grads, driver.session_of(step), executed
    )


def count_executed(run: Callable[[], Any]) -> Counter[str]:
    """How often each fp8c operator really runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return Counter({e.key: e.count for e in profile.key_averages() if e.key.startswith("fp8c::")})


def check(outcome: Outcome, *, depth: int = 8, recomputed: int = 0) -> None:
    """What holds for every model; `recomputed`: how many FP8 GEMMs may run twice."""
    check_counts(outcome, recomputed)
    assert set(outcome.grads_fp8) >= set(outcome.grads_bf16)
    for name in set(outcome.grads_fp8) - set(outcome.grads_bf16):
        # An expert of a loop that no token chose: the loop leaves None, a grouped GEMM gives zeros.
        assert ".experts." in name and not outcome.grads_fp8[name].any(), name
    bound = 2 * math.sqrt(depth) * 2**-4
    assert abs(outcome.loss_fp8 - outcome.loss_bf16) <= bound * abs(outcome.loss_bf16)
    for name, grad in outcome.grads_fp8.items():
        parameter = dict(outcome.plain.named_parameters())[name]
        assert grad.dtype == parameter.dtype and grad.shape == parameter.shape
        assert grad.isfinite().all(), name
    check_saved(outcome)


def check_counts(outcome: Outcome, recomputed: int = 0) -> None:
    """Every GEMM of the plan is in the lowered graph in the planned precision, and runs."""
    rewritten = outcome.rewritten
    expected = {which: {"total": 0, "fp8": 0, "kept": 0} for which in ("fprop", "dgrad", "wgrad")}
    for plan in rewritten.plan.uses.values():
        if plan.use.op not in (Op.LINEAR, Op.GROUPED_MM):
            continue
        missing = {"fprop": "", "dgrad": plan.use.no_dgrad, "wgrad": plan.use.no_wgrad}
        for which, reason in missing.items():
            if not reason:
                expected[which]["total"] += 1
                expected[which]["fp8" if plan.gemm(which).is_fp8 else "kept"] += 1
    assert outcome.counts == expected
    planned = sum(c["fp8"] for c in expected.values())
    again = 0
    for half in (rewritten.halves.forward, rewritten.halves.backward):
        again += sum(1 for n in half.graph.nodes if n.target in verifier.SCALED)
    again -= planned
    executed = sum(n for op, n in outcome.executed.items() if op.startswith("fp8c::scaled"))
    assert executed == planned + again, (executed, planned, again)


def check_saved(outcome: Outcome) -> None:
    """Where the plan caches x in a quantized format, no BF16 copy of x crosses to backward for wgrad's sake."""
    rewritten = outcome.rewritten
    crossing = {n.name for n in rewritten.halves.saved()}
    backward = rewritten.halves.backward.graph
    for node in backward.nodes:
        role = node.meta.get(g.ROLE)
        if node.target not in verifier.SCALED or role is None or role.gemm != "wgrad":
            continue
        if rewritten.plan.uses[role.use].cache("x") is None:
            continue
        for source in quantized_from(node):
            assert source.name not in crossing or g.value(source).dtype not in (torch.bfloat16, torch.float32), (
                f"wgrad of {role.use} quantizes %{source.name}, which is saved as {g.type_text(g.value(source))}"
            )


def quantized_from(gemm: Any) -> list[Any]:
    """Placeholders that the operands of a backward GEMM are quantized from directly, through views."""
    found = []
    for operand in (gemm.args[0], gemm.args[2]):
        assert isinstance(operand, fx.Node)
        node = g.strip(operand, g.VIEWS)
        while node.op == "call_function" and node.target not in (torch.ops.fp8c.quantize.default,):
            if not node.all_input_nodes:
                break
            node = node.all_input_nodes[0]
        if node.op == "call_function":
            value = node.args[0]
            assert isinstance(value, fx.Node)
            source = g.strip(value, g.VIEWS)
            if source.op == "placeholder" and not str(source.target).startswith(("tangents", "primals")):
                found.append(source)
    return found


def loss_of(outputs: Any) -> Tensor:
    """A loss any output has: the mean square."""
    return outputs.float().square().mean()

"""Precision that changes between calls, deterministic mode, and telemetry, on a small model with two kinds of GEMM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8c
from fp8c.diagnostics import DiagnosticError
from fp8c.driver import session_of
from fp8c.optim import Precision, Telemetry, deterministic
from fp8c.optim import precision as precision_module


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 256, bias=False)
        self.down = nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return (y - x).float().square().mean()


def compiled() -> nn.Module:
    torch.manual_seed(0)
    return fp8c.compile(Model().bfloat16(), target="cpu", lowering="reference")


def gradients(step: nn.Module, seed: int = 1) -> list[Tensor]:
    step.zero_grad()
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    step(x).backward()
    return [p.grad.clone() for p in step.parameters() if p.grad is not None]


def eager(seed: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    return gradients(Model().bfloat16(), seed)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_first_and_last_steps_run_in_bf16_and_each_variant_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    make = precision_module.variant_of

    def counted(step: nn.Module, session: object, options: object) -> object:
        made.append(session)
        return make(step, session, options)  # type: ignore[arg-type]

    monkeypatch.setattr(precision_module, "variant_of", counted)
    step = compiled()
    fp8, bf16 = gradients(step), eager()
    assert not same(fp8, bf16)
    precision = Precision(step, first=2, last=1, total=5)
    expected = {1: bf16, 2: bf16, 3: fp8, 4: fp8, 5: bf16}
    for number, gradient in expected.items():
        assert precision.at(number) == (gradient is fp8)
        found = gradients(step)
        if gradient is fp8:
            assert same(found, fp8)
        else:  # the same BF16 GEMMs; the backward may add their results in another order
            for x, y in zip(found, bf16):
                assert (x.float() - y.float()).norm() <= 2.0**-7 * y.float().norm()
    assert len(made) == 1 and len(precision.session.steps) == 1
    precision.at(3)
    gradients(step)
    precision.at(1)
    gradients(step)
    assert len(precision.session.steps) == 1, "going back costs no compilation"


def test_a_module_is_switched_at_run_time_and_back() -> None:
    step = compiled()
    fp8 = gradients(step)
    precision = Precision(step)
    precision.switch("up")
    mixed = gradients(step)
    plan = precision.session.steps[-1].plan
    formats: dict[str, Any] = {use.use.path: use.value("fprop.x") for use in plan.uses.values()}
    assert formats["down"].is_quantized
    assert formats["up"] is None or not formats["up"].is_quantized
    assert not same(mixed, fp8)
    precision.restore("up")
    assert same(gradients(step), fp8)
    state = precision.state_dict()
    precision.switch("**")
    precision.load_state_dict(state)
    assert same(gradients(step), fp8)


def test_a_switched_step_evaluates_in_its_modules_mode() -> None:
    class Doubled(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if self.training else 1)

    torch.manual_seed(0)
    step = fp8c.compile(Doubled().bfloat16(), target="cpu", lowering="reference")
    Precision(step).switch("up")
    x = torch.randn(8, 128).bfloat16()
    with torch.no_grad():
        trained = step(x)
        step.eval()
        assert torch.equal(step(x) * 2, trained)


def test_telemetry_and_switches_share_the_histories_of_delayed_scales() -> None:
    torch.manual_seed(0)
    step = fp8c.compile(Model().bfloat16(), "hybrid_delayed", "cpu")
    gradients(step)
    scales = session_of(step).scales
    lengths = [len(history) for history in scales.histories.values()]
    telemetry = Telemetry(step, every=1)
    with telemetry.at(1):
        gradients(step)
    rows = telemetry.take()  # a weight that backward quantizes again comes twice
    assert len({(row.path, row.operand) for row in rows}) == len(lengths)
    assert all(row.format.startswith(("e4m3", "e5m2")) for row in rows)
    assert [len(history) for history in scales.histories.values()] == [n + 1 for n in lengths]
    Precision(step).switch("up")
    gradients(step)
    assert {site: len(history) for site, history in scales.histories.items()} == {
        site: n + 1 + ("down" in site) for site, n in zip(scales.histories, lengths)
    }


def test_a_pattern_that_matches_nothing_and_a_bad_schedule_are_named() -> None:
    step = compiled()
    precision = Precision(step)
    precision.switch("layers.3.**")
    with pytest.raises(DiagnosticError, match="E1150.*layers.3"):
        gradients(step)
    with pytest.raises(DiagnosticError, match="E1150"):
        precision.switch("a..b{")
    with pytest.raises(DiagnosticError, match="E1150.*total"):
        Precision(step, last=3)
    with pytest.raises(DiagnosticError, match="E1151"):
        Telemetry(step, 0)


def test_deterministic_mode_gives_the_same_bits_and_ends() -> None:
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert same(gradients(compiled()), gradients(compiled()))
    assert not torch.are_deterministic_algorithms_enabled()


def test_telemetry_reads_every_quantized_tensor_of_the_chosen_steps() -> None:
    step = compiled()
    usual = gradients(step)
    telemetry = Telemetry(step, every=2)
    with telemetry.at(1) as observed:
        assert not observed
        gradients(step)
    assert telemetry.take() == []
    with telemetry.at(2) as observed:
        assert observed and same(gradients(step), usual), "the reference's bits, step by step"
    rows = telemetry.take()
    assert {row.path for row in rows} == {"up", "down"} and {row.phase for row in rows} == {"forward", "backward"}
    weights = {row.path: row for row in rows if row.format.startswith("e4m3[128x128]")}
    for name, module in (("up", step.up), ("down", step.down)):
        weight = module.weight.detach().float()  # type: ignore[union-attr, operator]
        assert weights[name].amax == float(weight.abs().max())
        data, _ = torch.ops.fp8c.quantize(weight, "e4m3[128x128] fp32")
        lost = ((data.float() == 0) & (weight != 0)).sum() / (weight != 0).sum()
        assert abs(weights[name].underflow - float(lost)) < 1e-6
        assert weights[name].saturated >= 2 / weight.numel(), "each of the two blocks has one largest value"
    assert telemetry.take() == []


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(128, 128, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return (y - x).float().square().mean()


def test_telemetry_sees_what_a_gpu_quantizes_inside_other_kernels() -> None:
    """SwiGLU's product, both directions of its gradients: their casts are fused there, and their rows were missing."""
    found = {}
    for target in ("cpu", "h200"):
        torch.manual_seed(0)
        step = fp8c.compile(GatedMLP().bfloat16(), target=target, lowering="reference")
        telemetry = Telemetry(step, every=1)
        with telemetry.at(1):
            gradients(step)
        found[target] = sorted((row.path, row.phase, row.format, row.amax) for row in telemetry.take())
    assert found["h200"] == found["cpu"] and len(found["cpu"]) > 8


def test_telemetry_shows_a_value_that_is_not_finite() -> None:
    step = compiled()
    telemetry = Telemetry(step, every=1)
    with torch.no_grad():
        step.up.weight[3, 3] = float("inf")  # type: ignore[union-attr, index, operator]
    with telemetry.at(1):
        gradients(step)
    assert any(row.is_overflow and row.path == "up" for row in telemetry.take())


def test_statistics_of_packed_twelve_bit_values() -> None:
    from fp8c.optim.telemetry import statistics_of

    x = torch.randn(8, 130).bfloat16()  # a last group that is short, a last packed unit that is not full
    x[0, :3] = 0.0
    x[1, 0], x[1, 1] = 1e4, 1e-8  # 2^40 apart: more than E5M6's subnormals reach
    data, scale = torch.ops.fp8c.quantize(x, "e5m6[1x128] pow2")
    amax, before, after, saturated = statistics_of(x, data, scale, "e5m6[1x128] pow2").tolist()
    assert amax == float(x.abs().max()) and before == x.numel() - 3 and after == before - 1
    assert saturated != saturated

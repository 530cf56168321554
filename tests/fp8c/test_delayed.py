"""Delayed scaling: the scale of a step comes from the steps before it, as Transformer Engine's DelayedScaling has it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8c.backends.reference  # noqa: F401  (the CPU's kernels)
from fp8c import driver
from fp8c.delayed import DelayedScales
from fp8c.diagnostics import DiagnosticError
from fp8c.models import load_model, load_namespace
from fp8c.ops import QUANTIZE, QUANTIZE_DELAYED
from fp8c.specs.load import loads

TINY = str(Path(__file__).parents[1] / "tools" / "models" / "tiny.py")
WHOLE = "e4m3[tensor] fp32"


def scales_of(magnitudes: list[float], history: int, algo: str, margin: int, element: str = "e4m3") -> list[float]:
    """The scale of every step for tensors of these largest magnitudes."""
    state, found = DelayedScales(), []
    with state.active():
        for magnitude in magnitudes:
            x = torch.tensor([[magnitude, -magnitude / 2]])
            _, scale = QUANTIZE_DELAYED(x, f"{element}[tensor] fp32", history, algo, margin, "site", False)
            assert scale.shape == (1, 1)
            found.append(scale.item())
    return found


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("algo", ["max", "most_recent"])
def test_scales_come_from_the_steps_before(algo: str, margin: int) -> None:
    magnitudes = [4.0, 64.0, 1.0, 2.0, 8.0, 0.5, 0.25]
    found = scales_of(magnitudes, 3, algo, margin)
    expected = [magnitudes[0] * 2.0**margin / 448]  # a first step has nothing but itself
    for step in range(1, len(magnitudes)):
        past = magnitudes[max(0, step - 3) : step]
        expected.append((max(past) if algo == "max" else past[-1]) * 2.0**margin / 448)
    assert found == pytest.approx(expected, rel=2**-23)


def test_a_step_of_zeros_keeps_the_scale() -> None:
    found = scales_of([4.0, 0.0, 0.0, 8.0, 1.0], 2, "max", 0)
    assert found == pytest.approx([4 / 448, 4 / 448, 4 / 448, 4 / 448, 8 / 448])


def test_values_beyond_the_history_are_clamped_and_nan_stays_nan() -> None:
    state = DelayedScales()

    def quantize(*values: float) -> tuple[torch.Tensor, float]:
        data, scale = QUANTIZE_DELAYED(torch.tensor([values]), WHOLE, 4, "max", 0, "s", False)
        return data.float(), scale.item()

    with state.active():
        quantize(1.0, 0.5)
        data, scale = quantize(10.0, 0.5)
        assert data.tolist() == [[448.0, 224.0]] and scale == pytest.approx(1 / 448)
        data, scale = quantize(float("nan"), 1.0)
        assert data.isnan().all() and scale != scale
        _, scale = quantize(1.0, 1.0)
        assert scale == pytest.approx(10 / 448), "what is not finite is not noted"


def test_outside_of_a_step_every_call_is_a_first_one() -> None:
    x = torch.randn(4, 8)
    for value in (x, 100 * x):
        delayed = QUANTIZE_DELAYED(value, WHOLE, 4, "max", 0, "s", False)
        online = QUANTIZE(value, WHOLE)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(delayed, online))


def test_one_scale_for_each_matrix_of_a_stack() -> None:
    state, x = DelayedScales(), torch.tensor([[[1.0, 2.0]], [[8.0, 4.0]]])
    with state.active():
        QUANTIZE_DELAYED(x, WHOLE, 4, "max", 0, "s", False)
        _, scale = QUANTIZE_DELAYED(x * 2, WHOLE, 4, "max", 0, "s", False)
    assert scale.flatten().tolist() == pytest.approx([2 / 448, 8 / 448])


def compiled() -> tuple[nn.Module, list[Any], DelayedScales]:
    torch._dynamo.reset()
    loaded = load_model(TINY, weights="random")
    step = driver.compile(loaded.step(), "hybrid_delayed", "cpu")
    batches = list(islice(load_namespace(TINY).batches(0), 4))
    return step, batches, driver.session_of(step).scales


def train(step: nn.Module, batches: list[Any]) -> list[float]:
    losses = []
    for batch in batches:
        loss = step(batch)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in step.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.05)
                parameter.grad = None
    return losses


def test_every_operand_has_a_history_and_evaluation_notes_nothing() -> None:
    step, batches, scales = compiled()
    train(step, batches[:3])
    x, w, dy = 2 * 2, 2 * 3, 2 * 3  # gate and up read one x
    assert len(scales.histories) == x + w + dy
    # Backward quantizes the weight again (it is cheaper than keeping it), and that is no step of its own.
    assert {len(h) for h in scales.histories.values()} == {3}
    for site, history in scales.histories.items():
        largest = 57344 if "wgrad" in site or "dgrad" in site else 448
        assert scales.last[site].item() == pytest.approx(history[1:].max().item() / largest, rel=2**-22), site
    step.eval()
    with torch.no_grad():
        step(batches[3])
    assert {len(h) for h in scales.histories.values()} == {3}


def test_histories_are_saved_and_continued() -> None:
    step, batches, scales = compiled()
    train(step, batches[:2])
    weights = {k: v.clone() for k, v in step.state_dict().items()}
    state = scales.state_dict()
    expected = train(step, batches[2:])

    again, _, fresh = compiled()
    again.load_state_dict(weights)
    fresh.load_state_dict(state)
    assert train(again, batches[2:]) == expected
    assert all(torch.equal(fresh.histories[site], history) for site, history in scales.histories.items())

    with pytest.raises(DiagnosticError, match="E0422"):
        fresh.load_state_dict({name: t for name, t in state.items() if not name.endswith("scale")})


def test_delayed_scales_need_one_scale_for_a_tensor() -> None:
    with pytest.raises(DiagnosticError, match="E0421"):
        loads("version 1; format a = e4m3 [1x128] scale fp32 delayed(history = 4); spec s { }")

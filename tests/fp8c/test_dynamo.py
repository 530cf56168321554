"""`torch.compile(..., backend="fp8c")`: parts of models, layers compiled one by one, options that are checked."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8c import dynamo, pipeline
from fp8c.diagnostics import DiagnosticError, ExitCode
from tests.models import hf
from tests.models.harness import count_executed, gradients, loss_of
from tests.models.test_handwritten import Block, FusedQkv, Lm, Mlp, features, ids, rms


class Called(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + x


def trained(model: nn.Module, call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = call(model)
    loss.backward()
    return loss.detach(), gradients(model)


def test_the_entry_point_leads_here() -> None:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends", name="fp8c")
    if not points:
        pytest.skip("fp8c is not installed, only on the path: no entry points")
    assert next(iter(points)).load() is dynamo.backend


def test_a_whole_model() -> None:
    model = Lm([Block(rms, FusedQkv, Mlp)])
    plain, grads = trained(model, lambda m: m(ids()))
    compiled = torch.compile(model, backend=dynamo.backend, options={"spec": "deepseek_v3", "target": "cpu"})
    loss, fp8_grads = trained(model, lambda m: compiled(ids()))
    assert set(grads) == set(fp8_grads)
    assert loss != plain and abs(loss - plain) <= 2 * 5**0.5 * 2**-4 * plain  # the bound of tests/models/harness.py
    executed = count_executed(lambda: compiled(ids()).backward())
    assert executed["fp8c::scaled_mm"] == 15  # five FP8 GEMMs, three each


def test_delayed_scales_of_modules_that_share_a_graph_are_refused() -> None:
    """Dynamo calls the first module's graph for the second, whose magnitudes are a thousand times as large."""
    options = {"spec": "hybrid_delayed", "target": "cpu"}
    models = [nn.Linear(128, 128, bias=False).bfloat16() for _ in range(2)]
    with torch.no_grad():
        models[1].weight.mul_(1000)
    first, second = (torch.compile(Called(m), backend=dynamo.backend, options=options) for m in models)
    x = features().requires_grad_()
    for _ in range(2):
        loss_of(first(x)).backward()
    with pytest.raises(DiagnosticError, match="E0852"):
        second(x)


def test_layers_compiled_one_by_one() -> None:
    """As under FSDP2: each layer is a graph of its own, of which many rules of the spec match nothing."""
    model = Lm([Block(rms, FusedQkv, Mlp), Block(rms, FusedQkv, Mlp)])
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=dynamo.backend)  # type: ignore[method-assign]
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss, grads = trained(model, lambda m: m(ids()))
    assert loss.isfinite() and set(grads) == set(plain)
    executed = count_executed(lambda: model(ids()).backward())
    assert executed["fp8c::scaled_mm"] == 2 * 15


def test_hf_layers_compiled_one_by_one() -> None:
    model: Any = hf.build("llama")
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=dynamo.backend)
    trained(model, hf.loss)
    executed = count_executed(lambda: hf.loss(model).backward())
    assert executed["fp8c::scaled_mm"] == 2 * 7 * 3


def test_a_graph_break_makes_two_graphs() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mlp(), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Breaks()
    compiled = torch.compile(model, backend=dynamo.backend, options={"target": "cpu"})
    session = dynamo.session_for({"target": "cpu"})
    before = len(session.steps)
    trained(model, lambda m: loss_of(compiled(features().requires_grad_())))
    made = session.steps[before:]
    assert [pipeline.count_gemms(step)["fprop"] for step in made] == [{"total": 3, "fp8": 3, "kept": 0}] * 2


def test_a_part_whose_gemms_need_no_gradient() -> None:
    """The norm of DoRA's weight is a graph of its own: a frozen product, scaled by what is trained (E0832)."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(128, 128, bias=False).bfloat16().requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(128, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(x).detach() * self.scale

    model = Scaled()
    compiled = torch.compile(model, backend=dynamo.backend, options={"spec": "bf16", "target": "cpu"})
    _, plain = trained(model, lambda m: loss_of(m(features())))
    _, grads = trained(model, lambda m: loss_of(compiled(features())))
    torch.testing.assert_close(grads["scale"], plain["scale"], rtol=2**-7, atol=0)


def test_without_gradients() -> None:
    model = Mlp()
    compiled = torch.compile(model, backend=dynamo.backend)
    with torch.no_grad():
        evaluated = compiled(features())
    assert torch.equal(evaluated, compiled(features()).detach())


def failure(**options: Any) -> DiagnosticError:
    compiled = torch.compile(Mlp(), backend=dynamo.backend, options=options)
    with pytest.raises(Exception, match="E0850|E06|E04") as caught:
        compiled(features())
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, DiagnosticError)
    return inner


@pytest.mark.parametrize(
    ("options", "message", "help"),
    [
        ({"spek": "bf16"}, "backend fp8c has no option 'spek'", "did you mean 'spec'?"),
        ({"zzz": 1}, "backend fp8c has no option 'zzz'", "it takes spec, target, lowering, without, tune"),
        ({"spec": 3}, "option 'spec' of backend fp8c is 3, expected str", ""),
        ({"lowering": "magic"}, "option 'lowering' of backend fp8c is 'magic', expected 'reference' or 'inductor'", ""),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, help: str) -> None:
    error = failure(**options)
    (diagnostic,) = error.diagnostics
    assert (diagnostic.code, diagnostic.message, diagnostic.help) == ("E0850", message, help)
    assert error.exit_code is ExitCode.USAGE


def test_an_unknown_spec_or_target_is_reported() -> None:
    assert failure(spec="deepseek_v4").diagnostics[0].code.startswith("E06")
    assert failure(target="h2000").diagnostics[0].code == "E0406"


def test_the_options_choose_the_spec() -> None:
    model = Mlp()
    compiled = torch.compile(model, backend=dynamo.backend, options={"spec": "bf16"})
    assert torch.equal(compiled(features()), model(features()))

"""`fp8c numerics`: what it measures is right, injected faults are found and named, the searched spec keeps its budget."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from fp8c import cli
from fp8c.backends.reference.quantize import dequantize, quantize
from fp8c.backends.target import load_target
from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.formats import Format
from fp8c.models import load_model
from fp8c.pipeline import Rewritten
from fp8c.prepare import prepare
from fp8c.specs.load import load, loads
from fp8c.tools.numerics.bisect import Trials, bisect, minimal_set
from fp8c.tools.numerics.faults import Fault, check_hits, parse_fault
from fp8c.tools.numerics.measure import Numerics, measure, round_mantissa
from fp8c.tools.numerics.page import layer_rows, page, svg, text
from fp8c.tools.numerics.search import search, write_spec
from fp8c.tools.numerics.step import CapturedStep, Part, Reading

TINY = str(Path(__file__).parents[1] / "models" / "tiny.py")
CPU = load_target("cpu")


@pytest.fixture(scope="module")
def step() -> CapturedStep:
    loaded = load_model(TINY, weights="random")
    prepare(loaded.module, loaded.example_inputs)
    return CapturedStep(loaded)


@pytest.fixture(scope="module")
def rewritten(step: CapturedStep) -> Rewritten:
    return step.rewrite(load("deepseek_v3"), CPU)


@pytest.fixture(scope="module")
def found(step: CapturedStep, rewritten: Rewritten) -> Numerics:
    return measure(step, rewritten, [step.loaded.example_inputs], model="tiny.py")


# --- what is measured -------------------------------------------------------------------------------------------------


def test_bf16_run_is_the_model_itself(step: CapturedStep) -> None:
    loaded = step.loaded
    run = step.run_bf16(step.inputs(loaded.example_inputs))
    loss = loaded.step()(loaded.example_inputs)
    loss.backward()
    assert run.loss == float(loss.detach())
    for name, parameter in loaded.module.named_parameters():
        assert parameter.grad is not None and torch.equal(run.gradients[name], parameter.grad), name
    loaded.module.zero_grad(set_to_none=True)


def test_every_operand_of_every_fp8_gemm_is_measured(found: Numerics) -> None:
    linears = [f"layers.{i}.{name}" for i in range(2) for name in ("gate", "up", "down")]
    operands = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.x", "wgrad.dy")
    assert {str(part) for part in found.operands} == {f"{use} {operand}" for use in linears for operand in operands}
    assert {use for use, _ in found.outputs} == {*linears, "head"}


def test_sqnr_is_that_of_quantizing_the_operand(step: CapturedStep, rewritten: Rewritten, found: Numerics) -> None:
    """The weight's SQNR can be computed beside the graph, from the parameter alone."""
    weight = dict(step.loaded.module.named_parameters())["layers.0.up.weight"].detach().float()
    fmt = "e4m3[128x128] fp32"
    restored = dequantize(*quantize(weight, fmt), fmt, torch.float32)
    expected = 10 * math.log10(float(weight.square().sum() / (restored - weight).square().sum()))
    for gemm in ("fprop", "dgrad"):
        assert found.operands[Part("layers.0.up", gemm, "w")].sqnr_db == pytest.approx(expected, abs=1e-3)


def test_a_shadow_is_the_value_before_quantization(step: CapturedStep, rewritten: Rewritten) -> None:
    """Where the data is dequantized, each value is within one rounding (two after a retile) of its shadow."""
    seen = 0

    def read(reading: Reading) -> None:
        nonlocal seen
        seen += 1
        unit = reading.roundings * 2.0**-4 * (1 + 2.0**-3)
        step_at_zero = reading.scale.float().max() * 2.0**-9 * reading.roundings
        assert ((reading.value - reading.shadow).abs() <= unit * reading.shadow.abs() + step_at_zero).all(), (
            reading.part
        )
        assert reading.roundings == (2 if reading.part.gemm == "wgrad" and reading.part.operand == "x" else 1)

    step.run(rewritten, step.inputs(step.loaded.example_inputs), read)
    assert seen == 36


def test_switching_everything_off_is_bf16(step: CapturedStep, rewritten: Rewritten, found: Numerics) -> None:
    """With the shadow of every operand, what remains is the FP32 product's rounding instead of BF16's."""
    trials = Trials(step, rewritten, [step.loaded.example_inputs], "gradient")
    assert trials.error() > 1e-2 > 2.0**-8 >= trials.error(found.operands)


def test_the_shipped_recipe_is_within_its_tolerance(found: Numerics) -> None:
    assert found.is_within and found.first_leaving() is None
    assert 0 < found.total_gradient.relative_error <= found.total_gradient.tolerance
    assert 0.99 < found.total_gradient.cosine < 1
    for stats in found.operands.values():
        assert stats.sqnr_db >= stats.tolerance_db and stats.saturated == 0 and sum(stats.scales.values()) > 0


def test_rounding_a_mantissa_is_the_elements_rounding() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).clamp(0.02, 400)
    assert torch.equal(round_mantissa(x, 3), x.to(torch.float8_e4m3fn).float())
    assert torch.equal(round_mantissa(x, 7), x.bfloat16().float())


def test_values_out_of_range_show_as_underflow_and_leave_the_tolerance(step: CapturedStep) -> None:
    """One scale for a tensor whose rows differ by 2**20: most of it vanishes."""
    loaded = step.loaded
    spec = loads(
        """version 1;
        format whole = e4m3 [tensor] scale fp32;
        spec coarse {
          rule gemms for op(linear) & !kind(lm_head) {
            fprop { x = whole; w = whole; } dgrad { dy = whole; w = whole; } wgrad { x = whole; dy = whole; }
          }
          rule rest for kind(lm_head) { precision = bf16; }
        }"""
    )
    weight = dict(loaded.module.named_parameters())["layers.1.down.weight"]
    with torch.no_grad():
        kept = weight.clone()
        weight[::2] *= 2.0**-20
    try:
        found = measure(step, step.rewrite(spec, CPU), [loaded.example_inputs])
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    stats = found.operands[Part("layers.1.down", "fprop", "w")]
    assert 0.45 < stats.underflow_share <= 0.5
    dy = found.operands[Part("layers.1.down", "dgrad", "dy")]
    assert dy.underflow_share < 0.01


# --- bisection --------------------------------------------------------------------------------------------------------


def test_ddmin_finds_minimal_sets() -> None:
    for wanted in ({3}, {0, 7}, {2, 3, 11}, set(range(12))):
        calls: list[tuple[int, ...]] = []

        def holds(chosen: tuple[int, ...], wanted: set[int] = wanted) -> bool:
            calls.append(chosen)
            return wanted <= set(chosen)

        assert set(minimal_set(tuple(range(12)), holds)) == wanted
        assert len(calls) <= 12**2 + 3 * 12
    assert minimal_set((1, 2), lambda chosen: True) == ()


ONE_OPERAND = [
    "scale:layers.0.up:wgrad.dy",
    "scale:layers.1.down:fprop.w",
    "scale:layers.0.gate:dgrad.w",
    "scale:layers.1.gate:wgrad.x",
    "axis:layers.1.up:fprop.x",
    "axis:layers.0.gate:wgrad.dy",
    "axis:layers.0.down:dgrad.dy",
]


@pytest.mark.parametrize("name", ONE_OPERAND)
def test_an_injected_fault_is_found_and_named(step: CapturedStep, rewritten: Rewritten, name: str) -> None:
    fault = parse_fault(name)
    batches = [step.loaded.example_inputs]
    measured = measure(step, rewritten, batches, fault)
    result = bisect(Trials(step, rewritten, batches, "worst", fault), measured)
    assert [f"{b.part.use}:{b.part.gemm}.{b.part.operand}" for b in result.blamed] == [name.partition(":")[2]]
    assert result.rules == ("gemm_fp8",)
    assert result.error > 1 >= result.error_without
    first = measured.first_leaving()
    assert first is not None and first[0] == str(result.blamed[0].part)


def test_a_layer_in_e5m2_is_found_and_named(step: CapturedStep, rewritten: Rewritten) -> None:
    fault = parse_fault("e5m2:layers.1")
    batches = [step.loaded.example_inputs]
    measured = measure(step, rewritten, batches, fault)
    result = bisect(Trials(step, rewritten, batches, "worst", fault), measured)
    assert result.blamed and all(b.part.use.startswith("layers.1.") for b in result.blamed)
    (suspect,) = result.suspects
    assert suspect.place == "layers.1" and suspect.of == 18 and len(suspect.parts) >= 12
    assert "of layers.1" in result.lines()[-1]


def test_a_given_limit_is_met_by_the_smallest_set(step: CapturedStep, rewritten: Rewritten, found: Numerics) -> None:
    """Without any defect, a tighter limit names what would have to be BF16; one operand fewer does not do."""
    trials = Trials(step, rewritten, [step.loaded.example_inputs], "gradient")
    limit = trials.error() * 0.8
    result = bisect(trials, found, limit)
    parts = [b.part for b in result.blamed]
    assert parts and trials.error(parts) <= limit
    for left_out in parts:
        assert trials.error(p for p in parts if p != left_out) > limit


def test_a_sound_spec_has_nothing_to_blame(step: CapturedStep, rewritten: Rewritten, found: Numerics) -> None:
    result = bisect(Trials(step, rewritten, [step.loaded.example_inputs], "worst"), found)
    assert result.is_within and not result.blamed and not result.suspects


def test_faults_that_say_or_change_nothing_are_rejected(found: Numerics) -> None:
    formats = {part: stats.format for part, stats in found.operands.items()}
    for wrong in ("nonsense", "scale", "scale:layers.0.up:fprop.dy", "half:layers.0.up"):
        with pytest.raises(DiagnosticError, match="E0845"):
            parse_fault(wrong)
    for nothing in (Fault("scale", "layers.7"), Fault("axis", "layers.0.up", "fprop", "w")):
        with pytest.raises(DiagnosticError, match="E0845"):
            check_hits(nothing, formats)


# --- search -----------------------------------------------------------------------------------------------------------


def test_a_searched_spec_loads_and_keeps_its_budget(
    step: CapturedStep, rewritten: Rewritten, found: Numerics, tmp_path: Path
) -> None:
    trials = Trials(step, rewritten, [step.loaded.example_inputs], "gradient")
    budget = trials.error() * 0.6
    out = tmp_path / "cheap.fp8"
    proposal = search(trials, found, load("deepseek_v3"), budget, "cheap", "deepseek_v3", out)
    spec = write_spec(proposal, out)
    assert cli.main(["spec", "check", str(out)]) == ExitCode.OK
    assert cli.main(["spec", "fmt", "--check", str(out)]) == ExitCode.OK
    again = measure(step, step.rewrite(spec, CPU), [step.loaded.example_inputs])
    assert again.total_gradient.relative_error == pytest.approx(proposal.error) and proposal.error <= budget
    assert proposal.base_time < proposal.time < 1
    with pytest.raises(DiagnosticError, match="E0846"):
        search(trials, found, load("deepseek_v3"), 1e-9, "cheap", "deepseek_v3", out)


def test_a_generous_budget_changes_nothing(step: CapturedStep, rewritten: Rewritten, found: Numerics) -> None:
    trials = Trials(step, rewritten, [step.loaded.example_inputs], "gradient")
    proposal = search(trials, found, load("deepseek_v3"), 1.0, "same", "deepseek_v3", None)
    assert not proposal.kept and proposal.time == proposal.base_time == pytest.approx(1 - 0.5 * 6 / 8)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_pictures_are_well_formed_and_load_nothing(found: Numerics) -> None:
    root = ElementTree.fromstring(svg(found))
    marks = [e for e in root.iter() if e.tag.endswith(("circle", "path"))]
    assert len(marks) >= 2 * len(layer_rows(found))
    whole = page(found)
    assert "://" not in whole.replace('xmlns="http://www.w3.org/2000/svg"', "") and "<script" not in whole
    assert whole.count("<tr") == len(found.operands) + 1


def test_names_of_the_model_are_escaped(found: Numerics) -> None:
    hostile = Numerics("</pre><script>x</script>", found.spec, found.target, 1, found.losses, found.operands)
    assert "<script" not in page(hostile)


def test_the_table_names_the_first_layer_that_leaves(step: CapturedStep, rewritten: Rewritten) -> None:
    fault = parse_fault("scale:layers.1.up:fprop.x")
    lines = text(measure(step, rewritten, [step.loaded.example_inputs], fault)).splitlines()
    assert "the tolerance is first left in layer 1, at layers.1.up fprop.x" in lines[-1]
    assert [line.split()[0] for line in lines if line.endswith("outside its tolerance")][-1] == "1"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["numerics", TINY, "-t", "cpu", "--batches", "2"]
    assert cli.main([*arguments, "--json", "-o", "out.json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "fp8c.numerics/1" and document["batches"] == 2 and len(document["losses"]) == 2
    assert json.loads(Path("out.json").read_text())["operands"] == document["operands"]
    row = document["operands"][0]
    assert (row["use"], row["layer"], row["role"]) == ("layers.0.gate", 0, "mlp_up")
    assert Format.parse(row["format"]) and row["rule"].startswith("gemm_fp8 (std:deepseek_v3:")
    code = cli.main([*arguments[:-2], "--bisect", "--inject", "scale:layers.0.up:fprop.x"])
    assert code == ExitCode.CHECK_FAILED
    assert "bisect: 1 operand of gemm_fp8" in capsys.readouterr().out
    assert cli.main(["numerics", TINY, "-s", "bf16", "-t", "cpu"]) == ExitCode.USAGE
    assert "E0847" in capsys.readouterr().err


# --- experts ----------------------------------------------------------------------------------------------------------


def test_experts_are_measured_with_the_routing_of_bf16() -> None:
    """Grouped GEMMs, groups that restart at each expert, a payload quantized before dispatch, a cut-short last group."""
    small = {
        "n_layers": 1,
        "n_dense_layers": 0,
        "n_experts": 4,
        "dim": 128,
        "expert_hidden_dim": 128,
        "mtp_loss_weight": 0.0,
    }
    example = str(Path(__file__).parents[3] / "examples" / "moe_transformer.py")
    loaded = load_model(example, weights="random", overrides=small, batch=1, seq=96)
    prepare(loaded.module, loaded.example_inputs)
    step = CapturedStep(loaded)
    rewritten = step.rewrite(load("deepseek_v3"), CPU)
    batches = [loaded.example_inputs]
    found = measure(step, rewritten, batches)
    experts = "layers.0.ffn.experts.up"
    assert {p.gemm for p in found.operands if p.use == experts} >= {"fprop", "dgrad", "wgrad"}
    for part, stats in found.operands.items():
        if ".experts." in part.use:
            assert stats.is_within, part
            assert stats.count > 0
            if part.use == experts and part.gemm != "cache":  # a value kept for backward is no GEMM's operand in BF16
                assert stats.bf16_db > 10, "tokens of the two runs are the same ones"
    fault = parse_fault(f"scale:{experts}:wgrad.dy")
    result = bisect(Trials(step, rewritten, batches, "worst", fault), measure(step, rewritten, batches, fault))
    assert str(result.blamed[0].part) == f"{experts} wgrad.dy"

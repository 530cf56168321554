"""Why a build decided as it did: by use, module, pattern, selector, node and section; and what is not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8c.build import read_build
from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.tools.explain import Explanation, explain, explanation_text, ranges


def ask(build: Path, what: str) -> list[Explanation]:
    return explain(read_build(build), what)


def answer(found: Explanation, field: str) -> str:
    return next(a.value for a in found.answers if a.field == field)


def test_a_use_names_its_rules_with_file_line_and_text(small_build: Path) -> None:
    [found] = ask(small_build, "model.layers.1.attn.q_proj")
    x = next(a for a in found.answers if a.field == "fprop.x")
    assert (x.value, x.because.rule, x.because.place) == ("e4m3[1x128] fp32", "gemm_fp8", "std:deepseek_v3:33")
    assert x.because.text.startswith("fprop { x = act;")
    assert x.because.because.startswith("3.3.1")


def test_what_was_overridden_is_told_with_its_rule(small_build: Path) -> None:
    [found] = ask(small_build, "model.layers.0.attn.o_proj")
    kept = next(a for a in found.answers if a.field == "cache.x")
    assert kept.value == "e5m6[1x128] pow2"
    assert [(v, b.rule) for v, b in kept.overrode] == [("e4m3[1x128] fp32", "gemm_fp8")]


def test_every_alternative_has_its_bytes(small_build: Path) -> None:
    [found] = ask(small_build, "model.layers.0.attn.o_proj")
    costs = {c.format: c.size_bytes for a in found.answers if a.field == "cache.x" for c in a.costs}
    elements = 256 * 512
    assert costs["bf16"] == 2 * elements
    assert costs["e5m6[1x128] pow2"] == elements * 12 // 8 + elements // 128 * 4
    assert costs["e4m3[1x128] fp32"] == elements + elements // 128 * 4
    chosen = [c.format for a in found.answers if a.field == "fprop.w" for c in a.costs if c.chosen]
    assert chosen == ["e4m3[128x128] fp32"]


def test_weights_of_all_experts_are_counted(small_build: Path) -> None:
    [found] = ask(small_build, "model.layers.0.mlp.experts.down")
    wide = next(c.size_bytes for a in found.answers if a.field == "fprop.w" for c in a.costs if c.format == "bf16")
    assert wide == 4 * 512 * 256 * 2


def test_a_module_stands_for_what_is_inside(small_build: Path) -> None:
    keys = {e.key for e in ask(small_build, "model.layers.2.mlp")}
    assert keys == {f"model.layers.2.mlp.{n}" for n in ("gate", "experts.up", "experts:swiglu", "experts.down")}


@pytest.mark.parametrize(
    "selector",
    [
        "kind(moe) & op(grouped_mm) & role(moe_up)",
        '"model.layers.*.mlp.experts.up"',
        "model.layers.*.mlp.experts.up",
        "@gemms & role(moe_up)",
    ],
)
def test_a_selector_tells_identical_layers_once(small_build: Path, selector: str) -> None:
    [found] = ask(small_build, selector)
    assert found.key == "model.layers.0.mlp.experts.up"
    assert found.layers == (0, 1, 2)
    assert "(the same in 3 layers: 0-2)" in explanation_text([found])


def test_a_node_of_a_graph_leads_to_its_use(small_build: Path) -> None:
    [found] = ask(small_build, "%scaled_mm_100000")
    assert found.key == "model.layers.0.attn.q_proj"
    assert found.nodes[0][0] == "forward" and found.nodes[0][1].startswith("%scaled_mm_100000 = fp8c.scaled_mm(")
    [captured] = ask(small_build, "mm")
    assert captured.key == "model.layers.0.attn.q_proj" and captured.nodes[0][0] == "captured"


def test_a_saved_node_says_why(small_build: Path) -> None:
    name = next(iter(read_build(small_build).json("graphs/notes.json")["saved"]))
    [found] = ask(small_build, name)
    assert "saved for backward: cache x" in explanation_text([found])


def test_a_node_of_no_use_shows_its_line(small_build: Path) -> None:
    [found] = ask(small_build, "mean")
    assert (found.op, found.answers) == ("node", ())


def test_sections_are_explained(small_build: Path) -> None:
    [found] = ask(small_build, "dispatch.payload")
    assert answer(found, "dispatch.payload") == "e4m3[1x128] pow2"
    assert len(ask(small_build, "optimizer")[0].answers) > 3


def test_a_pattern_of_modules_stands_for_what_is_inside(small_build: Path) -> None:
    inside = {key for e in ask(small_build, "model.layers.*.mlp") for key in e.keys or (e.key,)}
    assert inside == {key for e in ask(small_build, "model.layers.*.mlp.**") for key in e.keys or (e.key,)}


def test_all_is_a_selector(small_build: Path) -> None:
    keys = {key for e in ask(small_build, "all") for key in e.keys or (e.key,)}
    assert {"model.layers.1.attn.q_proj", "model.layers.0.mlp.experts:swiglu"} <= keys


@pytest.mark.parametrize(
    ("what", "help"),
    [
        ("model.layers.2.attn.qproj", "did you mean model.layers.2.attn.q_proj?"),
        ("experts.doun", "down"),
        ("zzz", "inspect --text"),
        ("model.layers.*.nothing", ""),
        ("role(mla_up_proj)", ""),
    ],
)
def test_what_is_not_there_is_an_error_with_a_suggestion(small_build: Path, what: str, help: str) -> None:
    with pytest.raises(DiagnosticError, match="E0615") as caught:
        ask(small_build, what)
    assert help in caught.value.diagnostics[0].help
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(("what", "code"), [("kind(mo)", "E0101"), ("role(", "E0101"), ("/(a+)+$/", "E0615")])
def test_a_wrong_selector_is_the_languages_error(small_build: Path, what: str, code: str) -> None:
    with pytest.raises(DiagnosticError, match=code) as caught:
        ask(small_build, what)
    assert caught.value.exit_code is ExitCode.USAGE


def test_an_answer_about_61_layers_takes_less_than_a_second(make_build: Callable[..., Path]) -> None:
    build = make_build(layers=61, extra=30)
    started = time.process_time()
    text = explanation_text(ask(build, "kind(moe) & op(grouped_mm)"))
    assert time.process_time() - started < 1.0
    assert "(the same in 61 layers: 0-60)" in text


def test_ranges() -> None:
    assert ranges([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8"

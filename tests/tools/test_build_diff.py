"""What two builds, or a build and a spec, do differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fp8c.build import read_build
from fp8c.diagnostics import DiagnosticError
from fp8c.specs.plan import plan_from_json
from fp8c.tools.build_diff import compare, comparison_text

Maker = Callable[..., Path]


def test_a_build_and_itself_do_not_differ(small_build: Path) -> None:
    found = compare(str(small_build), str(small_build))
    assert found.is_same
    assert comparison_text(found) == "no difference"


def test_a_lock_read_and_written_is_the_same(small_build: Path) -> None:
    lock = read_build(small_build).json("plan.lock.json")
    assert plan_from_json(lock).to_json() == lock


def test_two_specs_differ_in_decisions_casts_and_inputs(small_build: Path, make_build: Maker) -> None:
    found = compare(str(small_build), str(make_build(spec="bf16")))
    assert ("spec", "deepseek_v3", "bf16") in found.inputs
    fields = {d.field: d for d in found.decisions}
    assert fields["fprop.w"].old == "e4m3[128x128] fp32" and fields["fprop.w"].new == "bf16"
    casts = {c.name: (c.old, c.new) for c in found.casts}
    assert casts["forward quantize e4m3[128x128] fp32"] == (12, None)
    text = comparison_text(found)
    assert "decisions: " in text and "casts" in text and "model.layers.0" in text


def test_saved_bytes_and_messages_that_changed_are_named(small_build: Path, make_build: Maker) -> None:
    other = make_build(layers=2, remarks=("remark[R0002]: two",))
    found = compare(str(small_build), str(other))
    assert {(c.name, c.old, c.new) for c in found.saved} == {("layer 2", 1024, None), ("together", 3072, 2048)}
    assert (found.gone, found.added) == (("remark[R0001]: one",), ("remark[R0002]: two",))
    assert {c.name for c in found.gemms} >= {"fprop fp8", "wgrad total"}
    text = comparison_text(found)
    assert "no longer said\n  remark[R0001]: one" in text and "now said\n  remark[R0002]: two" in text


def test_a_spec_is_resolved_on_the_builds_uses(small_build: Path, tmp_path: Path) -> None:
    spec = tmp_path / "mine.fp8"
    spec.write_text(
        'version 1;\nuse "std:deepseek_v3" as ds;\nspec mine extends ds {\n'
        "  override rule wide for role(attn_out_proj) { cache x off; }\n}\n"
    )
    found = compare(str(small_build), str(spec))
    difference = next(d for d in found.decisions if d.field == "cache.x")
    assert {d.field for d in found.decisions} == {"cache.x", "retile.x"}
    assert (difference.field, difference.old, difference.new) == ("cache.x", "e5m6[1x128] pow2", "off")
    assert len(difference.uses) == 3 and "wide (mine.fp8:4)" == difference.reason
    assert "only a build of it can tell" in comparison_text(found)


def test_the_same_spec_decides_the_same(small_build: Path) -> None:
    assert compare(str(small_build), "deepseek_v3").is_same


def test_no_build_is_an_error(small_build: Path, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError, match="E0612"):
        compare(str(tmp_path), str(small_build))
    with pytest.raises(DiagnosticError, match="E0612"):
        compare(str(small_build), str(tmp_path))
    with pytest.raises(DiagnosticError, match="E0603"):
        compare(str(small_build), "no_such_spec")

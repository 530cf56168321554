"""Specs from other tools' settings: they check, resolve, and mean what the other tool means."""

from __future__ import annotations

import fnmatch
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8c import cli
from fp8c.backends.target import load_target
from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.roles import Op
from fp8c.specs import importers
from fp8c.specs.load import loads
from fp8c.specs.plan import PrecisionPlan
from fp8c.specs.resolve import resolve

sys.path.insert(0, str(Path(__file__).parent))
import role_records as models

DEEPSEEK, LLAMA = models.deepseek(), models.llama()


def plan_of(text: str, uses: Any = LLAMA, target: str = "cpu") -> PrecisionPlan:
    return resolve(loads(text), uses, load_target(target))


def fprop(plan: PrecisionPlan, path: str) -> str:
    chosen = plan.uses[f"{path}:linear"].gemm("fprop")
    return f"{chosen.a.text} x {chosen.b.text}"


@pytest.mark.parametrize("name", importers.TRANSFORMER_ENGINE)
@pytest.mark.parametrize("uses", [DEEPSEEK, LLAMA], ids=["deepseek", "llama"])
def test_recipes_of_transformer_engine(name: str, uses: Any) -> None:
    plan = plan_of(importers.import_spec(f"te:{name}", "a"), uses)
    assert not plan.diagnostics
    linears = [p for p in plan.uses.values() if p.use.op is Op.LINEAR and not p.use.kinds & {"lm_head", "router"}]
    assert linears and all(p.gemm(g).is_fp8 for p in linears for g in ("fprop", "dgrad", "wgrad"))


def test_block_scaling_of_transformer_engine_differs_from_the_paper_in_its_scales() -> None:
    plan = plan_of(importers.import_spec("te:Float8BlockScaling", "a"))
    assert fprop(plan, "model.layers.0.mlp.up_proj") == "e4m3[1x128] pow2 x e4m3[128x128] pow2"


def test_filter_of_torchtitan_is_a_substring_and_must_hit_something() -> None:
    plan = plan_of(importers.import_spec("torchao:rowwise", "a", skip=["layers.0.", "o_proj"]))
    assert fprop(plan, "model.layers.0.mlp.up_proj") == fprop(plan, "model.layers.2.self_attn.o_proj") == "bf16 x bf16"
    assert fprop(plan, "model.layers.1.mlp.up_proj") == "e4m3[row] pow2 x e4m3[row] pow2"
    with pytest.raises(DiagnosticError) as e:
        plan_of(importers.import_spec("torchao:rowwise", "a", skip=["output"]))
    assert {d.code for d in e.value.diagnostics} == {"E0302"}, "torchtitan#4008: the head was called otherwise"


V31 = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "modules_to_not_convert": ["lm_head", "model.layers.2"],
}


def _config(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"quantization_config": {**V31, **changes}}))
    return str(path)


def test_quantization_config_of_hugging_face(tmp_path: Path) -> None:
    plan = plan_of(importers.import_spec(_config(tmp_path), "a"))
    assert fprop(plan, "model.layers.1.mlp.up_proj") == "e4m3[1x128] e8m0 x e4m3[128x128] e8m0"
    assert fprop(plan, "model.layers.2.mlp.up_proj") == fprop(plan, "lm_head") == "bf16 x bf16"
    plan = plan_of(importers.import_spec(_config(tmp_path, scale_fmt=None, modules_to_not_convert=None), "a"))
    assert fprop(plan, "model.layers.2.mlp.up_proj") == "e4m3[1x128] fp32 x e4m3[128x128] fp32"


@pytest.mark.parametrize(
    "changes",
    [{"quant_method": "awq"}, {"weight_block_size": [64, 64]}, {"activation_scheme": "static"}, {"scale_fmt": "int"},
     {"modules_to_not_convert": [1]}],
)  # fmt: skip
def test_quantization_config_that_a_spec_cannot_say_is_an_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DiagnosticError) as e:
        importers.import_spec(_config(tmp_path, **changes), "a")
    assert [d.code for d in e.value.diagnostics] == ["E0605"]


MEGATRON = """
configs:
  keep: {transformer_engine_config_type: TEQuantizationParams, training_recipe: {}}
  block: {transformer_engine_config_type: TEQuantizationParams, training_recipe: {fp8_quantization_recipe: blockwise}}
  tensor: {training_recipe: {fp8_quantization_recipe: tensorwise}}
matchers:
  first: {config: keep, type: glob, pattern: "*layers.[01].*", enabled: true}
  off: {config: keep, type: glob, pattern: "*", enabled: false}
  down: {config: tensor, type: glob, pattern: "*down_proj", enabled: true}
  mlp: {config: block, type: glob, pattern: "*.mlp.*", enabled: true}
"""


def test_first_matcher_of_megatron_wins(tmp_path: Path) -> None:
    path = tmp_path / "precision.yaml"
    path.write_text(MEGATRON)
    plan = plan_of(importers.import_spec(str(path), "a"))
    assert fprop(plan, "model.layers.1.mlp.down_proj") == "bf16 x bf16"
    assert fprop(plan, "model.layers.2.mlp.down_proj") == "e4m3[tensor] fp32 x e4m3[tensor] fp32"
    assert fprop(plan, "model.layers.2.mlp.up_proj") == "e4m3[1x128] pow2 x e4m3[128x128] pow2"
    assert fprop(plan, "model.layers.2.self_attn.q_proj") == "bf16 x bf16", "no matcher: the command line's recipe"
    plan = plan_of(importers.import_spec(str(path), "a", default="mxfp8"))
    assert fprop(plan, "model.layers.2.self_attn.q_proj") == "e4m3[1x32] e8m0 x e4m3[1x32] e8m0"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fp8_quantization_recipe: blockwise", "fp4_quantization_recipe: nvfp4"),
        ("fp8_quantization_recipe: blockwise", "fp8_quantization_recipe: blockwize"),
        ("fp8_quantization_recipe: blockwise", "fp8_quantization_recipe: blockwise, fp8_format: hybrid"),
        ("config: block", "config: blok"),
        ("type: glob, pattern: \"*.mlp.*\"", "type: regex, pattern: x"),
        ("matchers:", "matches:"),
        ("configs:", "configs: ["),
    ],
)  # fmt: skip
def test_megatron_yaml_with_a_mistake_is_an_error(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "precision.yaml"
    assert old in MEGATRON
    path.write_text(MEGATRON.replace(old, new))
    with pytest.raises(DiagnosticError) as e:
        importers.import_spec(str(path), "a")
    assert [d.code for d in e.value.diagnostics] == ["E0605"] and e.value.exit_code is ExitCode.SPEC


@settings(max_examples=200, deadline=None)
@given(st.text("ab.*?[]!-", max_size=8), st.text("ab.-", max_size=6))
def test_globs_of_megatron_match_as_fnmatch_does(pattern: str, name: str) -> None:
    try:
        compiled = regex.compile(importers._fnmatch(pattern))
    except regex.error:
        return  # a character range that runs backwards: fnmatch drops it, the importer's check rejects the spec
    assert (compiled.fullmatch(name) is not None) == fnmatch.fnmatchcase(name, pattern)


@pytest.mark.parametrize("source", ["te:Foo", "torchao:", "what", "nowhere.json", "nowhere.yaml"])
def test_unknown_sources_are_explained(source: str) -> None:
    with pytest.raises(DiagnosticError) as e:
        importers.import_spec(source, "a")
    (found,) = e.value.diagnostics
    assert found.code == "E0605"


def test_command_writes_a_spec_that_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.fp8"
    assert cli.main(["spec", "import", "torchao:tensorwise", "--name", "mine", "-o", str(out)]) == ExitCode.OK
    assert cli.main(["spec", "check", str(out)]) == ExitCode.OK
    assert cli.main(["spec", "fmt", "--check", str(out)]) == ExitCode.OK
    assert cli.main(["spec", "import", "te:Foo"]) == ExitCode.SPEC

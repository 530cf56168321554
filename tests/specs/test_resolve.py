"""The resolver: the recipe comes out as the paper says, every value knows its rule, selectors hit what they name."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fp8c.backends.target import load_target
from fp8c.diagnostics import DiagnosticError, ExitCode, Severity
from fp8c.formats import Format
from fp8c.roles import Op, OpUse
from fp8c.specs.load import load, loads, shipped
from fp8c.specs.plan import PrecisionPlan, UsePlan
from fp8c.specs.resolve import resolve
from fp8c.specs.select import Selection, indices

sys.path.insert(0, str(Path(__file__).parent))
import role_records as models

DEEPSEEK = models.deepseek()
LLAMA = models.llama()
H200 = load_target("h200")
ACT, ACT2 = Format.parse("e4m3[1x128] fp32"), Format.parse("e4m3[1x128] pow2")
ACT_T, ACT2_T = ACT.transposed, ACT2.transposed
WEIGHT, BF16, FP32 = Format.parse("e4m3[128x128] fp32"), Format.parse("bf16"), Format.parse("fp32")


@pytest.fixture(scope="module")
def recipe() -> PrecisionPlan:
    return resolve(load("deepseek_v3"), DEEPSEEK, H200)


def plan_of(text: str, uses: list[OpUse] = LLAMA, target: str = "h200") -> PrecisionPlan:
    return resolve(loads(f"version 1; spec a {{ {text} }}"), uses, load_target(target))


def at(plan: PrecisionPlan, path: str, op: str = "linear", tail: str = "") -> UsePlan:
    return plan.uses[f"{path}:{op}{tail}"]


# -- the recipe (notes on its sources: docs of the shipped spec) --------------------------------------------------------


def test_every_linear_and_expert_has_three_fp8_gemms(recipe: PrecisionPlan) -> None:
    high = {"lm_head", "router", "embedding", "norm"}
    for plan in recipe.uses.values():
        if not plan.use.is_gemm or plan.use.kinds & high:
            continue
        for gemm in ("fprop", "dgrad", "wgrad"):
            assert plan.gemm(gemm).is_fp8 and plan.gemm(gemm).promote_every == 128, plan.use.key
        assert (plan.gemm("fprop").out, plan.gemm("dgrad").out, plan.gemm("wgrad").out) == (BF16, BF16, FP32)


def test_ordinary_linear(recipe: PrecisionPlan) -> None:
    plan = at(recipe, "model.layers.7.self_attn.q_a_proj")
    assert [(plan.gemm(g).a, plan.gemm(g).b) for g in ("fprop", "dgrad", "wgrad")] == [
        (ACT, WEIGHT),
        (ACT, WEIGHT),
        (ACT_T, ACT_T),
    ]
    assert plan.cache("x") == ACT and plan.value("retile.x") == ("128x1", False)


def test_linear_after_attention_keeps_e5m6_and_reads_e4m3(recipe: PrecisionPlan) -> None:
    plan = at(recipe, "model.layers.7.self_attn.o_proj")
    assert plan.gemm("fprop").a == ACT2 and plan.gemm("wgrad").a == ACT2_T
    assert plan.cache("x") == Format.parse("e5m6[1x128] pow2") and plan.value("retile.x") == ("128x1", True)
    assert plan.gemm("dgrad").a == ACT, "its gradient is an ordinary one"


def test_experts_read_payloads_as_they_arrive(recipe: PrecisionPlan) -> None:
    up = at(recipe, "model.layers.7.mlp.experts", "grouped_mm", "#moe_up")
    down = at(recipe, "model.layers.7.mlp.experts", "grouped_mm", "#moe_down")
    swiglu = at(recipe, "model.layers.7.mlp.experts", "swiglu")
    assert up.gemm("fprop").a == recipe.section("dispatch", "payload") == ACT2
    assert down.gemm("dgrad").a == recipe.section("combine_grad", "payload") == ACT2
    assert recipe.section("combine", "payload") == recipe.section("dispatch_grad", "payload") == BF16
    assert (swiglu.cache("gate"), swiglu.cache("up"), swiglu.recomputes()) == (ACT, ACT, True)
    assert down.value("cache.x") == "off" and down.cache("x") is None, "it is recomputed from SwiGLU's inputs"


def test_high_precision_parts_stay_in_bf16(recipe: PrecisionPlan) -> None:
    for path in ("lm_head", "model.layers.7.mlp.gate"):
        plan = at(recipe, path)
        assert not any(plan.gemm(g).is_fp8 for g in ("fprop", "dgrad", "wgrad"))
        assert plan.gemm("wgrad").out == FP32 and plan.value("cache.x") == "off"
    assert at(recipe, "model.layers.7.self_attn", "attention").value("precision") == BF16


def test_norms_and_mla_up_projections_are_recomputed(recipe: PrecisionPlan) -> None:
    recomputed = {p.use.path.rpartition(".")[2] for p in recipe.uses.values() if p.recomputes()}
    assert not at(recipe, "model.layers.0.mlp.act_fn", "swiglu").recomputes(), (
        "SwiGLU of dense layers is not in the text"
    )
    assert recomputed == {
        "input_layernorm", "q_a_layernorm", "kv_a_layernorm", "post_attention_layernorm", "norm",
        "q_b_proj", "kv_b_proj", "experts", "act_fn",
    }  # fmt: skip


def test_optimizer_and_schedule_sections(recipe: PrecisionPlan) -> None:
    assert [recipe.section("optimizer", k) for k in ("master", "grad", "exp_avg", "exp_avg_sq", "ema")] == [
        FP32, FP32, BF16, BF16, FP32,
    ]  # fmt: skip
    assert (recipe.section("schedule", "comm_sms"), recipe.section("pad", "tokens_to")) == (20, 128)


def test_every_decision_has_its_rule_place_and_what_it_overrode(recipe: PrecisionPlan) -> None:
    text = (Path(__file__).parents[2] / "specs" / "deepseek_v3.fp8").read_text().splitlines()
    for plan in recipe.uses.values():
        for name, decision in plan.fields.items():
            line = text[decision.reason.line - 1]
            assert name.rpartition(".")[2] in line or "precision" in line, (name, line)
            assert decision.reason.because
    decision = at(recipe, "model.layers.7.self_attn.o_proj").fields["cache.x"]
    assert (decision.reason.rule, decision.reason.file) == ("attn_out", "std:deepseek_v3")
    assert [(value, reason.rule) for value, reason in decision.overrode] == [(ACT, "gemm_fp8")]


def test_ue8m0_variant_has_no_fp32_scale_left() -> None:
    plan = resolve(load("deepseek_v3_ue8m0"), DEEPSEEK, H200)
    values = [d.value for p in plan.uses.values() for d in p.fields.values()]
    values += [d.value for section in plan.sections.values() for d in section.values()]
    scales = {v.scale.value for v in values if isinstance(v, Format) and v.scale is not None}
    assert scales == {"e8m0"}
    assert [layer.name for layer in load("deepseek_v3_ue8m0").layers] == ["deepseek_v3", "deepseek_v3_ue8m0"]


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("target", ["h200", "h100", "h800", "b200", "cpu"])
@pytest.mark.parametrize("uses", [DEEPSEEK, LLAMA], ids=["deepseek", "llama"])
def test_shipped_specs_fit_dense_and_moe_models(name: str, target: str, uses: list[OpUse]) -> None:
    spec, machine = load(name), load_target(target)
    wanted = [a.text for a in spec.target.architectures] if spec.target else []
    if machine.architecture not in (*wanted, "cpu") and wanted:
        with pytest.raises(DiagnosticError) as e:
            resolve(spec, uses, machine)
        assert [d.code for d in e.value.diagnostics] == ["E0407"]
        return
    plan = resolve(spec, uses, machine)
    assert set(plan.uses) == {u.key for u in uses}
    assert {d.code for d in plan.diagnostics} <= {"R0402"}, "a remark where a size does not fit, nothing else"


def test_lock_is_the_same_in_every_process(recipe: PrecisionPlan) -> None:
    import subprocess

    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import role_records as models;"
        "from fp8c.specs.load import load; from fp8c.specs.resolve import resolve;"
        "from fp8c.backends.target import load_target;"
        "print(resolve(load('deepseek_v3'), models.deepseek(), load_target('h200')).digest())"
    )
    root = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {recipe.digest()}


def test_large_model_is_resolved_within_the_budget() -> None:
    uses = models.deepseek(layers=80)
    assert len(uses) > 1500
    spec = load("deepseek_v3_ue8m0")
    fastest = min(_cpu_s(lambda: resolve(spec, uses, H200)) for _ in range(10))
    assert fastest < 0.1, f"{fastest * 1000:.0f} ms"


def _cpu_s(work: object) -> float:
    start = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - start


# -- selectors ---------------------------------------------------------------------------------------------------------


def matched(selector: str, uses: list[OpUse] = DEEPSEEK) -> list[str]:
    spec = loads(f"version 1; spec a {{ rule r for {selector} {{ recompute out; }} }}")
    selection = Selection(uses)
    return [uses[i].key for i in indices(selection.mask(spec.layers[0].rules[0].selector))]


def layers_of(selector: str) -> set[int | None]:
    keys = set(matched(selector))
    return {u.layer for u in DEEPSEEK if u.key in keys}


def test_layers_are_ranges_or_lists_and_count_from_the_end() -> None:
    assert layers_of("layers(3..5)") == {3, 4, 5}
    assert layers_of("layers(0, 2)") == {0, 2}, "a list is not a range"
    assert layers_of("layers(-1)") == {60}
    assert layers_of("layers(0, -1)") == {0, 60}
    assert layers_of("layers(-2..-1, 0..1)") == {59, 60, 0, 1}
    assert layers_of("layers(58..-1)") == {58, 59, 60}
    assert layers_of("layers(99)") == set()
    assert layers_of("!layers(0..60)") == {None}


def test_patterns_are_anchored_and_aligned_to_segments() -> None:
    assert matched('"model.layers.3.mlp.gate"') == ["model.layers.3.mlp.gate:linear"]
    assert matched('"model.layers.0.mlp.gate"') == [], "gate_proj is another name"
    assert matched('"layers.3.mlp.gate"') == []
    assert len(matched('"**.mlp.gate"')) == 58
    assert len(matched('"model.layers.*.mlp.{gate,up,down}_proj"')) == 9
    assert len(matched('"model.layers.[0..1].mlp.down_proj"')) == 2
    assert matched('"model.*"') == ["model.embed_tokens:embedding", "model.norm:norm"], "a star is one segment"
    assert set(matched('"model.**.o_proj"')) == set(matched('"**.o_proj"')) == set(matched(r"/.*\.o_proj/"))
    assert matched('"**.model.norm"') == ["model.norm:norm"], "two stars may be no segment at all"
    assert len(matched('"model.layers.1?.mlp"'.replace("?", "*"))) == 0
    assert len(matched('param("lm_head.weight")')) == 1


def test_operators_of_selectors() -> None:
    every = set(matched("all"))
    assert len(every) == len(DEEPSEEK)
    assert set(matched("!op(linear)")) == every - set(matched("op(linear)"))
    assert set(matched("op(linear) & layers(0) | kind(lm_head)")) == set(
        matched("(op(linear) & layers(0)) | kind(lm_head)")
    )
    assert set(matched("op(linear) & (layers(0) | kind(lm_head))")) < set(matched("op(linear)"))
    assert set(matched("op(linear, grouped_mm)")) == set(matched("op(linear) | op(grouped_mm)"))
    assert set(matched("!!op(linear)")) == set(matched("op(linear)"))


def test_shape_conditions() -> None:
    names = {k.rpartition(".")[2] for k in matched("shape(n % 128 != 0)")}
    assert names == {"kv_a_proj_with_mqa:linear"}
    assert set(matched("shape(k == 7168 and n == 256 or experts > 1)")) == set(matched("kind(router) | op(grouped_mm)"))


# -- rules -------------------------------------------------------------------------------------------------------------


def test_precision_takes_everything_of_a_use_with_it() -> None:
    spec = loads(
        'version 1; use "std:deepseek_v3" as ds; spec a extends ds {'
        " override rule back for layers(2) & op(linear) { precision = bf16; } }"
    )
    plan = resolve(spec, LLAMA, H200)
    fields = at(plan, "model.layers.2.self_attn.o_proj").fields
    assert {d.value for n, d in fields.items() if n.split(".")[-1] in ("x", "w", "dy") and "cache" not in n} == {BF16}
    assert fields["cache.x"].value == "off" and "retile.x" not in fields and "fprop.promote_every" not in fields
    assert fields["wgrad.out"].value == FP32, "where gradients are summed is no matter of operands"
    assert [r.rule for _, r in fields["cache.x"].overrode] == ["attn_out", "gemm_fp8"]


def test_overrides_apply_in_source_order() -> None:
    text = "rule a for op(linear, bmm) { precision = bf16; }"
    for first, second, kept in (("fp16", "fp32", "fp32"), ("fp32", "fp16", "fp16")):
        plan = plan_of(
            f"{text} override rule b for kind(lm_head) {{ precision = {first}; }}"
            f" override rule c for kind(lm_head) {{ precision = {second}; }}"
        )
        assert at(plan, "lm_head").value("precision") == Format.parse(kept)


def test_the_same_value_twice_is_fine_and_credited_to_one_rule() -> None:
    one = "rule one for op(linear, bmm) { precision = bf16; }"
    two = "rule two for kind(lm_head) { precision = bf16; }"
    for text in (one + two, two + one):
        reason = at(plan_of(text), "lm_head").reason("precision")
        assert reason is not None and reason.rule == "one"


def test_problems_are_reported_together() -> None:
    with pytest.raises(DiagnosticError) as e:
        plan_of(
            "target sm100; rule a for kind(router) { precision = bf16; } rule b for layers(9) { recompute out; }"
            " expect op(linear) matches == 1;"
        )
    assert sorted(d.code for d in e.value.diagnostics) == ["E0302", "E0302", "E0304", "E0407"]
    assert e.value.exit_code is ExitCode.SPEC


def test_wrong_target_alone_exits_with_the_targets_code() -> None:
    with pytest.raises(DiagnosticError) as e:
        plan_of("target sm100; rule a for op(linear, bmm) { precision = bf16; }")
    assert e.value.exit_code is ExitCode.TARGET
    assert plan_of("target sm100; rule a for op(linear, bmm) { precision = bf16; }", target="cpu").uses


def test_gemms_that_do_not_exist_need_no_decision() -> None:
    frozen = [replace(u, no_dgrad="no gradient", no_wgrad="frozen") if u.op is Op.LINEAR else u for u in LLAMA]
    plan = plan_of("rule a for op(linear, bmm) { fprop { x = bf16; w = bf16; } }", frozen)
    assert at(plan, "lm_head").gemm("fprop").a == BF16


# -- sizes -------------------------------------------------------------------------------------------------------------

PARTIAL = "{} rule rest for op(bmm?) | kind(lm_head) { precision = bf16; }"


def deepseek_with(text: str) -> PrecisionPlan:
    return resolve(loads(f'version 1; use "std:deepseek_v3" as ds; spec a extends ds {{ {text} }}'), DEEPSEEK, H200)


def test_partial_groups_are_padded_or_kept_never_silent() -> None:
    narrow = "model.layers.7.self_attn.kv_a_proj_with_mqa"
    padded = at(deepseek_with(""), narrow)
    assert all(padded.gemm(g).is_fp8 for g in ("fprop", "dgrad", "wgrad"))
    kept = deepseek_with("override pad { partial_group = keep; }")
    plan = at(kept, narrow)
    assert [plan.gemm(g).is_fp8 for g in ("fprop", "dgrad", "wgrad")] == [False, False, True]
    reason = plan.reason("fprop.x")
    assert reason is not None and reason.rule == "pad" and reason.file == "<spec>"
    assert {d.code for d in kept.diagnostics} == {"R0402"}
    assert {d.severity for d in kept.diagnostics} == {Severity.REMARK}


def test_tokens_that_padding_evens_out_are_no_problem() -> None:
    uses = [replace(u, m=4001 if u.is_gemm else None) for u in DEEPSEEK]
    spec = loads('version 1; use "std:deepseek_v3" as ds; spec a extends ds { override pad { partial_group = keep; } }')
    plan = at(resolve(spec, uses, H200), "model.layers.7.self_attn.o_proj")
    assert plan.gemm("wgrad").is_fp8


def test_requirement_of_a_target_is_checked_along_the_sum_of_each_gemm() -> None:
    text = (
        "target sm90 requires k % 128 == 0; pad { partial_group = pad; } rule rest for op(bmm) { precision = bf16; }"
        " rule all for op(linear) { precision = bf16; dgrad {"
        " dy = e4m3 [row] scale fp32; w = e4m3 [col] scale fp32; promote_every = 128; } }"
    )
    uses = [replace(u, n=120) if u.key == "lm_head:linear" else u for u in LLAMA]
    assert at(plan_of(text), "lm_head").gemm("dgrad").is_fp8
    with pytest.raises(DiagnosticError) as e:
        plan_of(text, uses)
    (found,) = e.value.diagnostics
    assert found.code == "E0402" and "dgrad of lm_head:linear" in found.message and e.value.exit_code is ExitCode.TARGET


# -- damage done elsewhere (each of these was silent in some tool) ------------------------------------------------------


def test_renaming_any_module_changes_nothing_or_is_an_error(recipe: PrecisionPlan) -> None:
    """The shipped recipe selects by structure, so names do not matter; a spec by names notices the change."""
    renamed = [replace(u, path=u.path.replace("mlp", "ffn")) for u in DEEPSEEK]
    plan = resolve(load("deepseek_v3"), renamed, H200)
    assert {k: dict(p.fields) for k, p in plan.uses.items()} == {k: dict(p.fields) for k, p in recipe.uses.items()}
    spec = loads('version 1; use "std:deepseek_v3" as ds; spec a extends ds {'
                 ' override rule r for "**.mlp.down_proj" { precision = bf16; } }')  # fmt: skip
    resolve(spec, DEEPSEEK, H200)
    with pytest.raises(DiagnosticError) as e:
        resolve(spec, renamed, H200)
    (found,) = e.value.diagnostics
    assert found.code == "E0302" and "`model.layers.0.ffn.down_proj`" in found.help


def test_exclusion_that_excludes_nothing_is_an_error() -> None:
    """A head called otherwise must not be trained in FP8 without a word (torchtitan#4008)."""
    text = (
        'rule all for op(linear, bmm) & !"output" { precision = bf16; } rule rest for "lm_head" { precision = bf16; }'
    )
    with pytest.raises(DiagnosticError) as e:
        plan_of(text)
    (found,) = e.value.diagnostics
    assert found.code == "E0302" and found.notes == (
        "an exclusion that matches nothing leaves in what it should keep out",
    )

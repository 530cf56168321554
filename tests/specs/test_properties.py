"""Properties of the language over generated specs: rules commute, printing is reading back, nothing crashes."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8c.backends.target import load_target
from fp8c.diagnostics import DiagnosticError, Span
from fp8c.formats import Format
from fp8c.roles import KINDS, ROLES, Op
from fp8c.specs import check, formatter, parser
from fp8c.specs import vocabulary as vocab
from fp8c.specs.load import STD, load, loads, shipped
from fp8c.specs.plan import PrecisionPlan
from fp8c.specs.resolve import resolve

sys.path.insert(0, str(Path(__file__).parent))
import role_records as models

MODEL = models.deepseek(layers=5, dense=2, hidden=512)
H200 = load_target("h200")
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# -- specs, built from the shapes of the syntax tree -------------------------------------------------------------------

names = st.sampled_from(["a", "b", "gemms", "fprop", "rule", "kind", "x_1"])
groups = st.sampled_from(["1x128", "128x1", "128x128", "row", "col", "tensor", "1x32"])
formats = st.one_of(
    st.sampled_from(["bf16", "fp16", "fp32"]),
    st.builds(
        "{} [{}] scale {}{}{}".format,
        st.sampled_from(["e4m3", "e5m2"]),
        groups,
        st.sampled_from(vocab.SCALES),
        st.sampled_from(["", " online"]),
        st.sampled_from(["", " rne", " stochastic"]),
    ),
    st.sampled_from(["e4m3 [tensor] scale fp32 delayed(history = 16, algo = max, margin = 0)"]),
)
maybe = st.sampled_from(["", "?"])


def _listed(word: str, values: Any) -> st.SearchStrategy[str]:
    one = st.builds("{}{}".format, st.sampled_from(sorted(values)), maybe)
    return st.lists(one, min_size=1, max_size=3).map(lambda vs: f"{word}({', '.join(vs)})")


atoms = st.one_of(
    _listed("op", {op.value for op in Op}),
    _listed("kind", KINDS),
    _listed("role", ROLES),
    st.sampled_from(
        [
            "all",
            "layers(0..1)",
            "layers(0, -1)",
            "layers(-2..-1?)",
            '"model.layers.*.mlp.**"',
            '"**.{q_a,o}_proj"',
            '"model.layers.[1..3].**"?',
            r"/model\.layers\.\d+\.mlp.*/",
            'param("**.weight")',
            "shape(k % 128 == 0 and n >= 512 or experts > 1)",
        ]
    ),
)
selectors = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds("!({})".format, inner),
        st.builds("({} & {})".format, inner, inner),
        st.builds("{} | {}".format, inner, inner).map(lambda s: f"({s})"),
    ),
    max_leaves=5,
)


def _gemm(gemm: str, first: str, second: str) -> st.SearchStrategy[str]:
    return st.builds(
        lambda a, b, every, out: f"{gemm} {{ {first} = {a}; {second} = {b}; promote_every = {every}; out = {out}; }}",
        formats,
        formats,
        st.sampled_from([0, 32, 128]),
        st.sampled_from(["bf16", "fp32"]),
    )


statements = st.one_of(
    st.sampled_from(["precision = bf16;", "precision = fp32;"]),
    _gemm("fprop", "x", "w"),
    _gemm("dgrad", "dy", "w"),
    _gemm("wgrad", "x", "dy"),
    st.builds("cache x as {};".format, formats),
    st.builds("cache x as e4m3 [1x128] scale pow2 retile [128x1]{};".format, st.sampled_from(["", " exact"])),
    st.just("cache x off;"),
    st.just("recompute out;"),
)


@st.composite
def rules(draw: st.DrawFn, name: str, modifiers: st.SearchStrategy[str]) -> str:
    body = draw(st.lists(statements, min_size=1, max_size=3, unique_by=lambda s: s.split()[0] + s.split()[1][:1]))
    return f'{draw(modifiers)}rule {name} for {draw(selectors)} {{ {" ".join(body)} because "{name}"; }}'


@st.composite
def rule_lists(draw: st.DrawFn) -> list[str]:
    modifiers = st.sampled_from(["", "optional ", "optional ", "optional final "])
    return [draw(rules(f"r{i}", modifiers)) for i in range(draw(st.integers(1, 5)))]


@st.composite
def specs(draw: st.DrawFn) -> str:
    modifiers = st.sampled_from(["", "optional ", "override ", "final override optional "])
    parts = [draw(rules(f"r{i}", modifiers)) for i in range(draw(st.integers(0, 3)))]
    parts += draw(
        st.lists(
            st.sampled_from(
                [
                    "target sm90, cpu requires k % 16 == 0 and n >= 1 or experts == 1;",
                    "dispatch { payload = e4m3 [1x128] scale pow2; }",
                    'override combine { payload = bf16; because "x"; }',
                    "optimizer { master = fp32; ema = off; }",
                    "schedule { comm_sms = 20; pipeline = dualpipe; }",
                    "expect op(linear) & !kind(router) matches >= 1;",
                    "## A doc comment.\n  pad { tokens_to = 128; partial_group = keep; }",
                ]
            ),
            unique=True,
            max_size=4,
        )
    )
    named = [f"format f{i} = {draw(formats)};" for i in range(draw(st.integers(0, 2)))]
    named += [f"set s{i} = {draw(selectors)};" for i in range(draw(st.integers(0, 2)))]
    return "version 1;\n" + "\n".join(named) + f"\nspec {draw(names)} {{\n  " + "\n  ".join(parts) + "\n}\n"


def without_places(node: Any) -> Any:
    """A syntax tree as plain values, spans left out."""
    if isinstance(node, Span):
        return None
    if isinstance(node, Format):
        return node.text
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        values = ((f.name, without_places(getattr(node, f.name))) for f in dataclasses.fields(node))
        return (type(node).__name__, tuple((name, value) for name, value in values if value is not None))
    if isinstance(node, tuple):
        return tuple(without_places(n) for n in node)
    return node


# -- properties --------------------------------------------------------------------------------------------------------


def outcome(spec_text: str) -> Any:
    """The decisions with the rules that made them, or the codes of what is wrong: all that must not depend on order."""
    try:
        plan = resolve(loads(spec_text), MODEL, H200)
    except DiagnosticError as e:
        return sorted({d.code for d in e.diagnostics})
    return decisions(plan)


def decisions(plan: PrecisionPlan) -> Any:
    lock = plan.to_json()
    for use in lock["uses"].values():
        for field in use["fields"].values():
            field["reason"].pop("line")
            for over in field["overrode"]:
                over["reason"].pop("line")
    return lock["uses"]


@SETTINGS
@given(rule_lists(), st.randoms(use_true_random=False))
def test_plain_rules_commute(texts: list[str], rng: random.Random) -> None:
    def spec(rules: list[str]) -> str:
        return "version 1;\nspec a {\n  defaults { undecided_gemm = bf16; }\n" + "\n".join(rules) + "\n}"

    shuffled = list(texts)
    rng.shuffle(shuffled)
    assert outcome(spec(texts)) == outcome(spec(shuffled))


@pytest.mark.parametrize("name", shipped())
def test_rules_of_shipped_specs_commute(name: str) -> None:
    spec = load(name)
    expected = decisions(resolve(spec, MODEL, load_target("cpu")))
    for seed in range(20):
        rng = random.Random(seed)
        layers = []
        for layer in spec.layers:
            plain = [r for r in layer.rules if not r.modifiers.override]
            rng.shuffle(plain)
            overrides = [r for r in layer.rules if r.modifiers.override]
            sections = list(layer.sections)
            rng.shuffle(sections)
            layers.append(dataclasses.replace(layer, rules=(*plain, *overrides), sections=tuple(sections)))
        shuffled = dataclasses.replace(spec, layers=tuple(layers))
        assert decisions(resolve(shuffled, MODEL, load_target("cpu"))) == expected


@SETTINGS
@given(specs())
def test_printing_is_reading_back(text: str) -> None:
    source = parser.source_of(text)
    printed = formatter.format_source(source)
    assert formatter.format_source(parser.source_of(printed)) == printed
    try:
        before = without_places(check.check(source))
    except DiagnosticError as e:
        pytest.fail(f"the generator wrote a wrong spec:\n{text}\n{e}")
    assert without_places(check.check(parser.source_of(printed))) == before


@SETTINGS
@given(specs())
def test_resolving_gives_a_plan_or_diagnostics(text: str) -> None:
    try:
        plan = resolve(loads(text), MODEL, H200)
    except DiagnosticError as e:
        assert all(d.message for d in e.diagnostics)
        return
    for use_plan in plan.uses.values():
        for gemm in ("fprop", "dgrad", "wgrad") if use_plan.use.is_gemm else ():
            chosen = use_plan.gemm(gemm)
            assert chosen.a.is_quantized == chosen.b.is_quantized
            assert chosen.is_fp8 or chosen.promote_every == 0


@SETTINGS
@given(st.lists(st.sampled_from("0123456789abcdef.*[]{},x-"), max_size=12).map("".join))
def test_any_pattern_is_compiled_or_explained(pattern: str) -> None:
    from fp8c.specs import globs

    try:
        alternatives = globs.expand(pattern)
    except globs.BadGlob as e:
        assert 0 <= e.offset <= len(pattern)
        return
    for alternative in alternatives:
        globs.compile_glob(alternative).matches("model.layers.3.mlp")


def _mutations(count: int, seed: int) -> None:
    """Cut, double, swap and misspell pieces of good specs, and throw text that was never a spec at the loader."""
    rng = random.Random(seed)
    folder = Path(__file__).parents[1] / "diagnostics"
    seeds = [p.read_text() for p in sorted(folder.glob("*.fp8"))] + [(STD / f"{n}.fp8").read_text() for n in shipped()]
    seeds = [s for s in seeds if len(s) < 2500]
    alphabet = "".join(sorted({c for s in seeds for c in s})) + "\0\ufeff\u2028é𝔘\r\t\\'`$~"
    rejected = 0
    for _ in range(count):
        text = rng.choice(seeds)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text) + 1)
            end = min(len(text), at + rng.choice([1, 1, 3, 12, 80]))
            match rng.randrange(6):
                case 0:
                    text = text[:at] + text[end:]
                case 1:
                    text = text[:end] + text[at:]
                case 2:
                    text = text[:at] + "".join(rng.choices(alphabet, k=rng.randint(1, 6))) + text[at:]
                case 3:
                    other = rng.choice(seeds)
                    cut = rng.randrange(len(other) + 1)
                    text = text[:at] + other[cut : cut + rng.randint(1, 60)] + text[end:]
                case 4:
                    text = text[:at] + rng.choice('(){}[];"/') * rng.choice([1, 2, 150]) + text[end:]
                case 5:
                    text = text[:at] + text[at:end][::-1] + text[end:]
        try:
            loads(text)
        except DiagnosticError as e:
            rejected += 1
            assert e.diagnostics and all(d.code and d.message for d in e.diagnostics)
    assert rejected > count // 3


def test_broken_text_gives_diagnostics_only() -> None:
    _mutations(400, seed=1)


@pytest.mark.slow
def test_broken_text_gives_diagnostics_only_at_length() -> None:
    _mutations(50_000, seed=2)

"""Nothing matches nothing in silence: rename anything in a model or misspell anything in a spec, and either that changes
no decision, or there is an error.

What a rule's alternatives match is counted here by brute force, on names and records alone, beside the resolver.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8c.backends.target import load_target
from fp8c.diagnostics import DiagnosticError, Severity
from fp8c.roles import KINDS, ROLES, Op, OpUse
from fp8c.specs import ast, globs
from fp8c.specs.load import loads, shipped, shipped_text
from fp8c.specs.resolve import resolve

sys.path.insert(0, str(Path(__file__).parent))
import role_records as models

CPU = load_target("cpu")
BY_NAME = """version 1;
format act = e4m3 [1x128] scale fp32;
format act_t = e4m3 [128x1] scale fp32;
format block = e4m3 [128x128] scale fp32;
set attention = "model.layers.*.self_attn.{q,k,v,o}_proj";
set mlp = param("model.layers.**.{gate,up,down}_proj.weight");
spec by_name {
  rule fp8 for @attention | @mlp {
    fprop { x = act; w = block; promote_every = 128; }
    dgrad { dy = act; w = block; promote_every = 128; }
    wgrad { x = act_t; dy = act_t; promote_every = 128; }
    cache x as act retile [128x1];
  }
  rule rotary for /model\\.rotary_.*/ { precision = bf16; }
  rule head for "lm_head" { precision = bf16; }
  override rule ends for (@attention | @mlp) & layers(0, -1) & !"**.o_proj" { precision = bf16; }
}
"""

Records = Sequence[OpUse]
OPS = frozenset(op.value for op in Op)


# --- an oracle --------------------------------------------------------------------------------------------------------


def alternatives(selector: ast.Selector) -> Iterator[tuple[str, bool, Any]]:
    """(what it is, whether it may match nothing, a test of one use) for every alternative anywhere in a selector."""
    match selector:
        case ast.Not(inner):
            yield from alternatives(inner)
        case ast.And(parts) | ast.Or(parts):
            for part in parts:
                yield from alternatives(part)
        case ast.Among(predicate, values):
            for v in values:
                of = {"op": lambda u: {u.op.value}, "kind": lambda u: u.kinds, "role": lambda u: u.roles}[predicate]
                yield v.text, v.maybe, lambda use, of=of, v=v: v.text in of(use)
        case ast.Layers(ranges):
            for r in ranges:
                yield f"{r.first}..{r.last}", r.maybe, lambda use, r=r: in_range(use, r)
        case ast.Glob(of_name, pattern):
            for one in globs.expand(pattern.text):
                test = re.compile(as_regex(one)).fullmatch
                name = "path" if of_name == "path" else "param"
                yield one, pattern.maybe, lambda use, t=test, n=name: bool(t(getattr(use, n) or ""))
        case ast.Regex(pattern):
            test = re.compile(pattern.text).fullmatch
            yield pattern.text, pattern.maybe, lambda use, t=test: bool(t(use.path))


def as_regex(glob: str) -> str:
    """`**` any segments, `*` within one; the patterns here have nothing else."""
    parts = {"**.": r"(?:[^.]+\.)*", ".**": r"(?:\.[^.]+)*", "**": r".*", "*": r"[^.]*"}
    return "".join(parts.get(p, re.escape(p)) for p in re.split(r"(\*\*\.|\.\*\*|\*\*|\*)", glob) if p)


def in_range(use: OpUse, r: ast.LayerRange) -> bool:
    if use.layer is None:
        return False
    first, last = (n + use.layer_count if n < 0 else n for n in (r.first, r.last))
    return first <= use.layer <= last


def silent_misses(text: str, uses: Records) -> list[str]:
    """Alternatives that match nothing although the spec resolves without a word."""
    try:
        spec = loads(text)
        plan = resolve(spec, uses, CPU)
    except DiagnosticError:
        return []
    if any(d.severity is Severity.WARNING for d in plan.diagnostics):
        return []
    return [
        f"{layer.name}.{rule.name}: {what}"
        for layer in spec.layers
        for rule in layer.rules
        if not rule.modifiers.optional
        for what, maybe, matches in alternatives(rule.selector)
        if not maybe and not any(matches(use) for use in uses)
    ]


def values(text: str, uses: Records) -> list[Any] | None:
    """What is decided for each use, in order; None when it is an error."""
    try:
        plan = resolve(loads(text), uses, CPU)
    except DiagnosticError:
        return None
    return [{name: d.value for name, d in plan.uses[use.key].fields.items()} for use in uses]


# --- mutations of the model -------------------------------------------------------------------------------------------


def renamed(uses: Records, segment: str) -> list[OpUse]:
    def new(text: str | None) -> Any:
        return text and ".".join(f"{s}_renamed" if s == segment else s for s in text.split("."))

    def key(use: OpUse) -> str:
        path, _, rest = use.key.partition(":")
        return f"{new(path)}:{rest}"

    return [replace(use, key=key(use), path=new(use.path), param=new(use.param)) for use in uses]


def without(uses: Records, word: str) -> list[OpUse]:
    return [replace(use, kinds=use.kinds - {word}, roles=use.roles - {word}) for use in uses]


LLAMA, DEEPSEEK = models.llama(layers=3, hidden=512), models.deepseek(layers=3, dense=1, hidden=512)
SEGMENTS = sorted(
    {s for use in LLAMA for s in (*use.path.split("."), *(use.param or "").split(".")) if s and not s.isdigit()}
)


@pytest.mark.parametrize("segment", SEGMENTS)
def test_renaming_a_module_changes_nothing_or_is_an_error(segment: str) -> None:
    assert values(BY_NAME, LLAMA) is not None
    changed = renamed(LLAMA, segment)
    assert silent_misses(BY_NAME, changed) == []
    after = values(BY_NAME, changed)
    assert after is None or after == values(BY_NAME, LLAMA)


def test_most_renamings_are_caught() -> None:
    caught = [s for s in SEGMENTS if values(BY_NAME, renamed(LLAMA, s)) is None]
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "model"} <= set(
        caught
    )


@pytest.mark.parametrize("name", shipped())
def test_specs_without_names_survive_every_renaming(name: str) -> None:
    """Shipped specs select by what things are: other names, same decisions."""
    text = shipped_text(name)
    before = values(text, DEEPSEEK)
    assert before is not None
    for segment in ("self_attn", "mlp", "layers", "lm_head", "gate", "embed_tokens"):
        assert values(text, renamed(DEEPSEEK, segment)) == before, segment


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("word", sorted(KINDS | ROLES))
def test_a_kind_or_role_that_is_not_found_is_no_silence(name: str, word: str) -> None:
    assert silent_misses(shipped_text(name), without(DEEPSEEK, word)) == []


# --- mutations of the spec --------------------------------------------------------------------------------------------


def misspelt(text: str) -> Iterator[str]:
    """Every word of every selector, with a letter more, and as other words of its kind."""
    for found in re.finditer(r"(?:for|set \w+ =) ([^;{]*?)(?= \{|;)", re.sub(r"(?m)#.*$", "", text)):
        start, end = found.span(1)
        for word in re.finditer(r"[A-Za-z_]\w*|\d+", found[1]):
            at, to = start + word.start(), start + word.end()
            siblings = [v for group in (KINDS, ROLES, OPS) if word[0] in group for v in sorted(group) if v != word[0]]
            others = {word[0] + "x", *siblings[:: max(1, len(siblings) // 2)]}
            for other in sorted(others - {word[0]}):
                yield text[:at] + other + text[to:]


@pytest.mark.parametrize("name", ["by_name", *shipped()])
def test_a_changed_word_of_a_selector_is_no_silence(name: str) -> None:
    text, uses = (BY_NAME, LLAMA) if name == "by_name" else (shipped_text(name), DEEPSEEK)
    text = re.sub(r"(?m)^\s*#.*$", "", text)
    count = 0
    for mutant in misspelt(text):
        count += 1
        assert silent_misses(mutant, uses) == [], mutant
    assert count >= 10


def test_the_oracle_sees_what_would_be_missed() -> None:
    """A selector that matches nothing, resolved without the check, is what the oracle finds."""
    spec = loads('version 1; spec s { rule r for op(linear) | "nowhere" { precision = bf16; } }')
    missed = [w for w, maybe, m in alternatives(spec.layers[0].rules[0].selector) if not any(m(u) for u in LLAMA)]
    assert missed == ["nowhere"]

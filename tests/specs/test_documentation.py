"""docs/spec_language.md: its examples hold, its messages are the real ones, its grammar is the language."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from fp8c.backends.target import load_target
from fp8c.diagnostics import DiagnosticError, render
from fp8c.roles import KINDS, ROLES, Op
from fp8c.specs import vocabulary as vocab
from fp8c.specs.load import STD, loads, shipped
from fp8c.specs.resolve import resolve

sys.path.insert(0, str(Path(__file__).parent))
import role_records as models
from test_properties import specs

PAGE = (Path(__file__).parents[2] / "docs" / "spec_language.md").read_text(encoding="utf-8")
BLOCKS = [(m[1], m[2]) for m in re.finditer(r"^```([^\n]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
EXAMPLES = [(i, info, text) for i, (info, text) in enumerate(BLOCKS) if info.startswith("fp8")]
MODELS = {"deepseek": models.deepseek(), "llama": models.llama()}


def parsers() -> tuple[object, str]:
    from lark import Lark

    (grammar,) = (text for info, text in BLOCKS if info == "lark")
    return Lark(grammar, parser="earley"), grammar


@pytest.mark.parametrize(("index", "info", "text"), EXAMPLES, ids=[str(i) for i, _, _ in EXAMPLES])
def test_example_does_what_the_page_says(index: int, info: str, text: str) -> None:
    model = re.search(r"model=(\w+)", info)
    name = re.search(r"^spec (\w+)", text, re.MULTILINE)
    file = f"{name[1]}.fp8" if name else "formats.fp8"
    text = text if name else text + "spec none { }\n"
    if "error" not in info:
        spec = loads(text, file)
        if model:
            resolve(spec, MODELS[model[1]], load_target("h200"))
        return
    assert model is not None
    with pytest.raises(DiagnosticError) as e:
        resolve(loads(text, file), MODELS[model[1]], load_target("h200"))
    kind, shown = BLOCKS[index + 1]
    assert kind == "text"
    assert "\n".join(render(d) for d in e.value.diagnostics) + "\n" == shown


def test_strict_grammar_reads_every_shipped_spec() -> None:
    parser, _ = parsers()
    for name in shipped():
        parser.parse((STD / f"{name}.fp8").read_text(encoding="utf-8"))  # type: ignore[attr-defined]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs())
def test_strict_grammar_reads_whatever_is_a_spec(text: str) -> None:
    loads_or_conflicts(text)
    PARSER.parse(text)  # type: ignore[attr-defined]


def loads_or_conflicts(text: str) -> None:
    try:
        loads(text)
    except DiagnosticError as e:
        assert {d.code for d in e.diagnostics} <= {"E0501", "E0506", "E0404"}, "a mistake of meaning, not of grammar"


PARSER, GRAMMAR = parsers()


@pytest.mark.parametrize(
    "text",
    [
        "spec a { }",
        "version 1; spec a { rule r for { precision = bf16; } }",
        "version 1; spec a { rule r for all { precision = bf16 } }",
        "version 1; format x = ;",
        "version 1; set a = op(); spec a { }",
        "version 1; spec a extends { }",
        "version 1; spec a { optional target sm90; }",
        "version 1; spec a { expect all matches 1; }",
        "version 1; spec a { rule r for all { cache x; } }",
        "version 1; set a = layers(1..); spec a { }",
    ],
)
def test_strict_grammar_and_checker_reject_alike(text: str) -> None:
    from lark.exceptions import UnexpectedInput

    with pytest.raises(UnexpectedInput):
        PARSER.parse(text)  # type: ignore[attr-defined]
    with pytest.raises(DiagnosticError):
        loads(text)


def test_every_word_of_the_language_is_on_the_page() -> None:
    words = {op.value for op in Op} | KINDS | ROLES | set(vocab.ELEMENTS) | set(vocab.SCALES) | set(vocab.SECTIONS)
    words |= {key for types in vocab.SECTIONS.values() for key in types} | set(vocab.PREDICATES) | set(vocab.MODIFIERS)
    words |= {c for types in vocab.SECTIONS.values() for t in types.values() for c in getattr(t, "choices", ())}
    words |= set(vocab.RULE_STATEMENTS) | set(vocab.GROUP_WORDS) | set(vocab.TOP_LEVEL)
    assert {w for w in words if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", PAGE)} == set()

"""`fp8c spec fmt`: one layout, comments kept, the same tokens, a second run changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8c.diagnostics import DiagnosticError
from fp8c.specs import formatter, parser
from fp8c.specs.load import STD, shipped


def fmt(text: str) -> str:
    return formatter.format_source(parser.source_of(text))


CASES = {
    "spaces": (
        "version   1 ;set a=op( linear,grouped_mm ? )&! @b|(kind (mlp))  ;",
        "version 1;\nset a = op(linear, grouped_mm?) & !@b | (kind(mlp));\n",
    ),
    "formats": (
        "format a=e4m3[1x128]scale pow2 delayed( history=16,algo=max );",
        "format a = e4m3 [1x128] scale pow2 delayed(history = 16, algo = max);\n",
    ),
    "ranges": ("set a=layers( 0 .. 2,-1 ) & shape(k%128==0);", "set a = layers(0..2, -1) & shape(k % 128 == 0);\n"),
    "brackets after a word": ("rule a for(b|c){precision=bf16;}", "rule a for (b | c) { precision = bf16; }\n"),
    "a block stays on its line": ("spec a { pad { tokens_to=1; } }", "spec a {\n  pad { tokens_to = 1; }\n}\n"),
    "a block stays open": ("pad {\ntokens_to=1; }", "pad {\n  tokens_to = 1;\n}\n"),
    "empty blocks": ("spec a {\n\n}\nspec b{}", "spec a {\n}\nspec b { }\n"),
    "comments": (
        "# top\n\n\n\nversion 1; #  tail\nspec a {  # head\n # in\n\n\n  ## doc\n  pad{ } # after\n\n}#end",
        "# top\n\nversion 1;  #  tail\nspec a {  # head\n  # in\n\n  ## doc\n  pad { }  # after\n}  #end\n",
    ),
    "comment inside a statement": ("set a = b # why\n| c;", "set a = b  # why\n    | c;\n"),
    "comment before the end": ("set a = b # why\n;", "set a = b  # why\n    ;\n"),
    "strings keep their text": ('rule a for "x.{a,b}" | /a b\\/c/ { }', 'rule a for "x.{a,b}" | /a b\\/c/ { }\n'),
    "nothing": ("", ""),
    "only a comment": ("  # hello  ", "# hello\n"),
}


@pytest.mark.parametrize("name", CASES)
def test_layout(name: str) -> None:
    before, after = CASES[name]
    assert fmt(before) == after
    assert fmt(after) == after


def test_long_selector_is_broken_before_its_branches() -> None:
    branches = " | ".join(f'"model.layers.{i}.mlp.down_proj | not here"' for i in range(5))
    lines = fmt(f"set a = {branches} & (op(linear) | op(bmm));").splitlines()
    assert len(lines) == 5 and all(line.startswith("    | ") for line in lines[1:])
    assert lines[-1].endswith("& (op(linear) | op(bmm));")
    assert fmt("\n".join(lines)).splitlines() == lines


def test_long_block_is_opened() -> None:
    text = "rule gemms for all { " + "precision = bf16; " * 8 + "}"
    assert fmt(text).splitlines() == ["rule gemms for all {", *["  precision = bf16;"] * 8, "}"]


@pytest.mark.parametrize("name", shipped())
def test_shipped_specs_are_formatted(name: str) -> None:
    text = (STD / f"{name}.fp8").read_text()
    assert fmt(text) == text


def test_words_need_not_be_right_but_brackets_must() -> None:
    assert fmt("fporp{x=1;}") == "fporp { x = 1; }\n"
    with pytest.raises(DiagnosticError):
        fmt("spec a {")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "diagnostics").glob("*.fp8")), ids=lambda p: p.stem
)
def test_any_parsable_file_keeps_its_tokens_and_settles(path: Path) -> None:
    source = parser.read(path, path.name)
    try:
        once = formatter.format_source(source)
    except DiagnosticError:
        return

    def words(s: parser.Source) -> list[tuple[str, str]]:
        return [(t.kind, t.text.rstrip()) for t in parser.tokens(s) if t.kind != "BLANK"]

    assert words(parser.source_of(once)) == words(source)
    assert fmt(once) == once

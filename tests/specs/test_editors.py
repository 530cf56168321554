"""The TextMate grammar knows every word of the language and covers the shipped specs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fp8c.specs import vocabulary as vocab
from fp8c.specs.load import STD, shipped

GRAMMAR = json.loads(
    (Path(__file__).parents[2] / "docs" / "editors" / "fp8.tmLanguage.json").read_text(encoding="utf-8")
)
PATTERNS = [(str(p.get("name", "named")), re.compile(p["match"])) for p in GRAMMAR["patterns"]]


def scope(text: str, word: str) -> str:
    """The scope that a word of a line gets: the pattern that matches first, the earlier one on a tie."""
    at = 0
    while at < len(text):
        found = [(m.start(), i, m) for i, (_, p) in enumerate(PATTERNS) if (m := p.search(text, at)) and m.end() > at]
        if not found:
            return ""
        start, index, match = min(found, key=lambda f: f[:2])
        if word in match[0] and start <= text.index(word) < match.end():
            return PATTERNS[index][0]
        at = match.end()
    return ""


def test_every_word_has_a_scope() -> None:
    lines = {
        **{w: f"{w} x" for w in (*vocab.TOP_LEVEL, "target", "rule", "expect", *vocab.MODIFIERS)},
        **{w: f"{w} {{" for w in vocab.SECTIONS},
        **{w: f"{w}(x)" for w in vocab.PREDICATES},
        **{w: f"x = {w};" for w in vocab.ELEMENTS},
        **{w: f"x [{w}]" for w in vocab.GROUP_WORDS},
        **{w: f" {w} " for w in (*vocab.RULE_STATEMENTS, *vocab.SCALES, *vocab.ROUNDINGS)},
    }
    assert [w for w, line in lines.items() if not scope(line, w)] == []


def test_words_in_comments_and_strings_are_not_words() -> None:
    assert scope('because "rule for all";', "for").startswith("string")
    assert scope("# rule for all", "for").startswith("comment.line")
    assert scope("## rule for all", "for").startswith("comment.block")
    assert scope("rule fprop for all {", "fprop") == "named"
    assert scope("fprop { x = act; }", "fprop") == "keyword.other.statement.fp8"


def test_shipped_specs_have_a_scope_on_almost_every_line() -> None:
    for name in shipped():
        for line in (STD / f"{name}.fp8").read_text().splitlines():
            if re.sub(r"[\s{};]", "", line):
                assert any(p.search(line) for _, p in PATTERNS), line

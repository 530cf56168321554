"""How a diagnostic is printed."""

from __future__ import annotations

import pytest

from fp8c.diagnostics import Diagnostic, Span, render


@pytest.mark.parametrize(
    "text, word, carets",
    [
        ('for "abc" | opp(linear)', "opp", "            ^^^"),
        ('for "日本" | opp(linear)', "opp", "             ^^^"),
        ('for "日本🎉" | x', "日本🎉", "     ^^^^^^"),
        ("because e\u0301 | opp", "opp", "            ^^^"),
        ("\tfor opp", "opp", "     ^^^"),
    ],
)
def test_a_caret_stands_under_its_word_whatever_is_before(text: str, word: str, carets: str) -> None:
    span = Span("a.fp8", 3, text.index(word) + 1, len(word), text)
    assert render(Diagnostic("E0101", "unknown", span)).splitlines()[-1] == f"   | {carets}"


def test_a_caret_does_not_run_past_its_line() -> None:
    last = render(Diagnostic("E0101", "open", Span("a.fp8", 1, 3, 9, "ab{")))
    assert last.splitlines()[-1] == "   |   ^"
    assert render(Diagnostic("E0101", "end", Span("a.fp8", 1, 4, 1, "ab{"))).splitlines()[-1] == "   |    ^"

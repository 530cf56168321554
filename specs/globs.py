"""Path patterns: `*` is one dotted segment, `**` any number of them, `{a,b}` a choice, `[3..60]` a range of numbers.

A pattern is anchored at both ends and aligned to segments, so `mlp.gate` never hits `mlp.gate_proj`. Inside a segment
`*` stands for any characters but a dot (`layer_*`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MAX_ALTERNATIVES = 256  # of one pattern, after its braces are written out
MAX_STARS = 8  # of one pattern: keeps matching cheap for any path
TIMEOUT_S = 0.05  # of one match

_TOKEN = re.compile(
    r"(?P<stars>\*+)|(?P<range>\[(?P<low>\d{1,6})\.\.(?P<high>\d{1,6})\])|(?P<text>[\w\-$]+)|(?P<dot>\.)"
)


class BadGlob(Exception):
    """`offset` counts characters from the start of the pattern."""

    def __init__(self, message: str, offset: int, help: str = "") -> None:
        super().__init__(message)
        self.offset, self.help = offset, help


class MatchTimeout(Exception):
    """A pattern took longer than `TIMEOUT_S` on one name."""


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern; `text` is what it was made from, with braces written out."""

    text: str
    compiled: Any

    def matches(self, name: str) -> bool:
        try:
            return self.compiled.fullmatch(name, timeout=TIMEOUT_S) is not None
        except TimeoutError:
            raise MatchTimeout(self.text) from None


def expand(pattern: str) -> list[str]:
    """Write out the braces: one pattern for each alternative. Raises BadGlob for anything that is no pattern."""
    if not pattern:
        raise BadGlob("it is empty", 0)
    alternatives = [""]
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "}":
            raise BadGlob("`}` without `{`", at)
        if char != "{":
            alternatives = [a + char for a in alternatives]
            at += 1
            continue
        close = pattern.find("}", at)
        inner = pattern.find("{", at + 1)
        if close < 0:
            raise BadGlob("`{` is not closed", at)
        if 0 <= inner < close:
            raise BadGlob("braces do not nest", inner)
        choices = pattern[at + 1 : close].split(",")
        if len(choices) * len(alternatives) > MAX_ALTERNATIVES:
            raise BadGlob(f"it has more than {MAX_ALTERNATIVES} alternatives", at)
        if "" in choices or len(set(choices)) != len(choices):
            raise BadGlob("an alternative is empty or written twice", at)
        alternatives = [a + c.strip() for a in alternatives for c in choices]
        at = close + 1
    for alternative in alternatives:
        _translate(alternative, pattern)
    return alternatives


def compile_glob(alternative: str) -> Pattern:
    """Compile one alternative as `expand` gave it."""
    import regex

    return Pattern(alternative, regex.compile(_translate(alternative, alternative)))


def compile_regex(pattern: str) -> Pattern:
    import regex

    return Pattern(f"/{pattern}/", regex.compile(pattern))


def regex_problem(pattern: str) -> str:
    """Why `pattern` is no regular expression, "" when it is one."""
    import regex

    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError) as e:
        return str(e) or type(e).__name__
    return ""


def _translate(text: str, whole: str) -> str:
    """A pattern without braces -> a regular expression."""
    segments: list[list[str]] = [[]]
    at = stars = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            help = "write a range of numbers as `[3..60]`" if text[at] in "[]" else ""
            raise BadGlob(f"unexpected `{text[at]}`", min(at, len(whole) - 1), help)
        if token["dot"]:
            segments.append([])
        elif token["stars"]:
            stars += 1
            if len(token["stars"]) > 2 or stars > MAX_STARS:
                raise BadGlob(f"more than {MAX_STARS} stars, or three in a row", min(at, len(whole) - 1))
            segments[-1].append(token["stars"])
        elif token["range"]:
            low, high = int(token["low"]), int(token["high"])
            if high < low or high - low >= 4096:
                raise BadGlob(f"the range {low}..{high} is empty or longer than 4096", min(at, len(whole) - 1))
            segments[-1].append("(?:" + "|".join(str(i) for i in range(low, high + 1)) + ")")
        else:
            segments[-1].append(re.escape(token["text"]))
        at = token.end()
    if any(not s for s in segments):
        raise BadGlob("an empty segment: a dot too many", len(whole) - 1)
    if any("**" in s and len(s) > 1 for s in segments):
        raise BadGlob("`**` is a segment of its own", whole.find("**"), "write `**.name`")
    # `a.**.b` must match `a.b` too, so a dot belongs to what it separates from `**`, not to both sides.
    out = ""
    needs_dot = False
    for index, segment in enumerate(segments):
        if segment == ["**"]:
            if index == len(segments) - 1:
                out += r"(?:\.[^.]+)*" if needs_dot else r"[^.]+(?:\.[^.]+)*"
            else:
                out += (r"\." if needs_dot else "") + r"(?:[^.]+\.)*"
                needs_dot = False
            continue
        body = "".join("[^.]*" if part == "*" else part for part in segment)
        out += (r"\." if needs_dot else "") + ("[^.]+" if segment == ["*"] else body)
        needs_dot = True
    return out

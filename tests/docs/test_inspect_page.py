"""docs/inspect.md: its pictures are there, and every command on it is one fp8c has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from fp8c.cli import app
from fp8c.passes import ALL_PASSES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("#")[0].strip() for line in PAGE.splitlines() if line.startswith("fp8c ")]


@pytest.mark.parametrize("picture", re.findall(r"\((images/[^)]*)\)", PAGE))
def test_pictures_are_there(picture: str) -> None:
    data = (ROOT / "docs" / picture).read_bytes()
    assert data[:4] == b"RIFF" and data[8:12] == b"WEBP"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_fp8cs(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    found = app.commands[verb]
    assert isinstance(found, click.Command)
    found.make_context(verb, arguments)  # raises for an option or a choice it does not have


def test_the_last_artifact_is_the_last_passs() -> None:
    assert f"`fp8c_{len(ALL_PASSES):02}_{ALL_PASSES[-1].name}_backward`" in PAGE


def test_the_page_shows_what_explain_prints(small_o_proj: str) -> None:
    block = next(b for b in PAGE.split("```")[1::2] if "rule attn_out" in b)
    shown = [line.strip() for line in block.splitlines() if "rule" in line or "retile" in line]
    printed = [line.strip() for line in small_o_proj.splitlines()]
    assert shown and all(line in printed for line in shown)


@pytest.fixture
def small_o_proj() -> str:
    """What `explain` prints of the decision the page shows."""
    from fp8c.backends.target import load_target
    from fp8c.roles import Op, OpUse
    from fp8c.specs.load import load
    from fp8c.specs.resolve import resolve
    from fp8c.tools.explain import Answer, Because, Explanation, explanation_text

    use = OpUse(
        "o", Op.LINEAR, "o", frozenset({"attention"}), frozenset({"attn_out_proj"}), m=128, n=128, k=128, param="w"
    )
    spec = load("deepseek_v3")
    decision = resolve(spec, [use], load_target("h200"), partial=True).uses["o"].fields["cache.x"]
    lines = dict(spec.texts)["std:deepseek_v3"].splitlines()

    def because(reason: object) -> Because:
        values = vars(reason)
        return Because(**values, text=lines[values["line"] - 1].strip())

    overrode = tuple((getattr(v, "text", str(v)), because(r)) for v, r in decision.overrode)
    value = getattr(decision.value, "text", str(decision.value))
    answer = Answer("cache.x", value, because(decision.reason), overrode)
    return explanation_text([Explanation("o", "linear", answers=(answer,))])

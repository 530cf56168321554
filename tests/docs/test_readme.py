"""README.md: every command in it is one that fp8c has, every link leads somewhere, every make target exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fp8c.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"(?:^|`|/bin/)(fp8c [a-z][^`\n]*)", README, re.M)))


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_their_options(command: str) -> None:
    words = shlex.split(re.sub(r"(\\?\|\w+)+", "", command))[1:]  # `spec check|fmt` stands for each
    found: click.Command = app
    context = click.Context(app)
    while isinstance(found, click.Group) and words:
        name = words.pop(0)
        inner = found.get_command(context, name)
        assert inner is not None, f"no command {name}"
        found = inner
    if found.context_settings.get("ignore_unknown_options"):  # `fp8c bench NAME`: the benchmark reads its own options
        known = set(re.findall(r"--[\w-]+", CliRunner().invoke(app, [found.name or "", words[0], "--help"]).output))
        assert all(w in known for w in words if w.startswith("-")), words
        return
    known = {o for p in found.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, word


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target

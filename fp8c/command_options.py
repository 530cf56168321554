"""What the verbs of the command line share: options, how results and diagnostics are printed, a request on a model."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fp8c.diagnostics import Diagnostic, render
from fp8c.files import check_writable

_COLOURS = {"error": "\033[1;31m", "warning": "\033[1;33m", "remark": "\033[1;36m"}


class OutputFile(click.Path):
    """A file to write when the work is done; that it can be written is found out before. Raises: DiagnosticError E0610."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        check_writable(path)
        return path


class Finite(click.FloatRange):
    """A number within bounds; a range of click's lets nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
spec_option = click.option(
    "--spec", "-s", default="deepseek_v3", show_default=True, metavar="NAME|FILE.fp8", help="Precision spec."
)
model_options = (
    click.option("--target", "-t", default=None, metavar="NAME", help="Machine; this one's GPU, or cpu, unless given."),
    click.option(
        "-a", "overrides", multiple=True, metavar="KEY=VALUE", help="Argument of the factory, or configuration field."
    ),
    click.option("--batch", type=click.IntRange(min=1), help="Sequences in the batch."),
    click.option("--seq", type=click.IntRange(min=1), help="Tokens in a sequence."),
    click.option("--weights", type=click.Choice(["auto", "random", "meta"]), default="auto", show_default=True),
)


def with_model_options(command: Any) -> Any:
    for option in reversed(model_options):
        command = option(command)
    return command


def print_diagnostics(diagnostics: Sequence[Diagnostic]) -> None:
    """Diagnostics to stderr, with colour only on a terminal and never under NO_COLOR."""
    has_colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    for diagnostic in diagnostics:
        text = render(diagnostic)
        if has_colour:
            word = diagnostic.severity.value
            text = re.sub(rf"({word}\[\w+\])", rf"{_COLOURS[word]}\1\033[0m", text, count=1)
        print(text, file=sys.stderr)


def print_json(schema: str, **fields: Any) -> None:
    print(json.dumps({"schema": schema, **fields}, indent=2, ensure_ascii=False))


def command_line() -> tuple[str, ...]:
    """What was typed, for a build's record of how it was made."""
    return ("fp8c", *(click.get_current_context().find_object(tuple) or ()))


def check_inputs_exist(spec: str, target: str | None) -> None:
    """Report a wrong spec or target before torch is imported, which takes seconds."""
    from fp8c.backends.target import load_target
    from fp8c.specs.load import load

    load(spec)
    if target is not None:
        load_target(target)


def model_request(
    model: str,
    spec: str,
    target: str | None,
    overrides: tuple[str, ...],
    batch: int | None,
    seq: int | None,
    weights: Any,
) -> Any:
    """What a verb is asked to do with a model; a wrong spec or target is reported before torch is imported."""
    check_inputs_exist(spec, target)
    from fp8c.models import parse_overrides
    from fp8c.tools.compile_command import Request

    return Request(
        model=model,
        spec=spec,
        target=target,
        out=None,
        overrides=parse_overrides(overrides),
        batch=batch,
        seq=seq,
        weights=weights,
        argv=command_line(),
    )

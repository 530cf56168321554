"""python -m fp8c.tools.uses_json MODEL [-a KEY=VALUE] [--batch N] [--seq N]: a model's operator uses as JSON.

A process of its own for tools that must not import torch or run a model's code themselves (`fp8c spec lsp`).
"""

from __future__ import annotations

import argparse
import json
import sys

from fp8c.diagnostics import DiagnosticError
from fp8c.models import parse_overrides
from fp8c.roles import OpUse
from fp8c.specs.editing import use_json
from fp8c.tools.compile_command import Request
from fp8c.tools.spec_command import find_uses


def uses_of(model: str, overrides: list[str], batch: int | None, seq: int | None) -> tuple[OpUse, ...]:
    request = Request(
        model=model, spec="bf16", target="cpu", overrides=parse_overrides(overrides), batch=batch, seq=seq
    )
    return find_uses(request)[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="uses_json")
    parser.add_argument("model")
    parser.add_argument("-a", dest="overrides", action="append", default=[])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int)
    given = parser.parse_args()
    try:
        uses = uses_of(given.model, given.overrides, given.batch, given.seq)
    except DiagnosticError as e:
        print(e, file=sys.stderr)
        return int(e.exit_code)
    print(json.dumps([use_json(use) for use in uses]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

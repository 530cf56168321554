"""The CUDA implementation of the scaled GEMMs: each call goes to the implementation that is chosen for it.

Importing this module registers it. Nothing is compiled, and no GPU is touched, before the first call. What the chosen
implementation can't take goes to the next one, and at last to the portable form, with remark R0430, once for each reason.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from fp8c.backends.gemms import candidates, choice, measured
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.diagnostics import Diagnostic, Severity, render

_LOG = logging.getLogger(__name__)


def serve(op: str, *arguments: Any) -> Any:
    """Run one of `candidates.OPERATORS`."""
    refused: list[tuple[str, str]] = []
    for name in order(op, arguments):
        try:
            result = candidates.call(name, op, arguments)
        except Unsupported as reason:
            refused.append((name, str(reason)))
            continue
        for other, text in refused:
            remark(f"fp8c::{op}", f"served by {name}, not {other}: {text}")
        return result
    raise AssertionError("the portable form takes every call")


def order(op: str, arguments: tuple[Any, ...]) -> Sequence[str]:
    """Implementations in the order to try them; the portable form is the last."""
    policy = choice.policy()
    first = policy.first
    if policy.measures:
        first = measured.fastest(op, arguments)
    return _order(first)


@cache
def _order(first: str) -> tuple[str, ...]:
    names = (first, *candidates.DEFAULT, candidates.PORTABLE) if first else (*candidates.DEFAULT, candidates.PORTABLE)
    return tuple(dict.fromkeys(names))


@cache
def remark(subject: str, text: str) -> None:
    _LOG.warning("%s", render(Diagnostic("R0430", f"{subject}: {text}", severity=Severity.REMARK)))


_LIBRARY = torch.library.Library("fp8c", "IMPL")  # type: ignore[no-untyped-call]
for _op in candidates.OPERATORS:
    _LIBRARY.impl(_op, functools.partial(serve, _op), "CUDA")  # type: ignore[no-untyped-call]

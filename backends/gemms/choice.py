"""Which implementation a GEMM is given to.

By default the order of `candidates.DEFAULT`, whatever the shapes: a run is then the same on every machine of its kind, and
needs no measurement. Asked to measure (`fp8c.compile(tune=True)`, or FP8C_GEMM=measure), the fastest that agrees with the
default one, measured once for each class of shapes and remembered on disk (`measured.py`). Implementations differ in the
last bits, so a measured choice is pinned by its table, and FP8C_GEMM pins one implementation by name.

A shape class has the axis that tokens run along rounded up to a power of two, and the other two exact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from fp8c.backends.gemms import candidates
from fp8c.diagnostics import ExitCode, fail
from fp8c.ops import quantized_format

ENVIRONMENT = "FP8C_GEMM"
_DEFAULT_WORD, _MEASURE_WORD = "default", "measure"


@dataclass(frozen=True)
class Policy:
    """`first`: the implementation to try before the default ones. `measures`: the fastest, by measurement."""

    first: str = ""
    measures: bool = False


DEFAULT = Policy()
MEASURE = Policy(measures=True)
_POLICY: ContextVar[Policy] = ContextVar("gemm_policy", default=DEFAULT)


@cache
def read_policy(text: str) -> Policy:
    """A policy by its word: `default`, `measure`, or an implementation. Raises: E0434."""
    match text:
        case "" | "default":
            return DEFAULT
        case "measure":
            return MEASURE
        case _ if text in candidates.NAMES:
            return Policy(text)
    raise fail(
        "E0434",
        f"{ENVIRONMENT}={text} names no implementation of the GEMMs",
        help=f"write {', '.join((_DEFAULT_WORD, _MEASURE_WORD))}, or one of {', '.join(candidates.NAMES)}",
        exit_code=ExitCode.USAGE,
    )


def policy() -> Policy:
    """The one in force in this thread. The environment stands above what a program asks for."""
    text = os.environ.get(ENVIRONMENT)
    return read_policy(text) if text else _POLICY.get()


@contextmanager
def using(chosen: Policy) -> Iterator[None]:
    token = _POLICY.set(chosen)
    try:
        yield
    finally:
        _POLICY.reset(token)


def under(chosen: Policy, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with this policy in force, in whichever thread it is called."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with using(chosen):
            return run(*args, **kwargs)

    if hasattr(run, "_boxed_call"):
        called._boxed_call = run._boxed_call  # type: ignore[attr-defined]
    return called


@dataclass(frozen=True)
class ShapeClass:
    """What the speed of a GEMM depends on, and its memory is kept by."""

    op: str
    m: int
    n: int
    k: int
    experts: int
    a_fmt: str
    b_fmt: str
    promote_every: int
    out: str

    @cached_property
    def key(self) -> str:
        formats = f"{self.a_fmt} by {self.b_fmt}, promoted every {self.promote_every}"
        return f"{self.op} {self.experts} x {self.m} x {self.n} x {self.k} {formats} to {self.out}"


def shape_class(op: str, arguments: tuple[Any, ...]) -> ShapeClass:
    """Class of a call of one of `candidates.OPERATORS`. Asked for in every call, so classes are made once."""
    adds = op.endswith("_add_")
    a, _, b, _, *rest = arguments[1:] if adds else arguments
    offs = rest.pop(0) if isinstance(rest[0], Tensor) else None
    a_fmt, b_fmt, promote_every = rest[:3]
    out = "f32, added" if adds else str(rest[3]).removeprefix("torch.")
    experts = 1 if offs is None else offs.shape[0]
    return _shape_class(op, a.shape[0], b.shape[-2], a.shape[1], experts, a_fmt, b_fmt, promote_every, out)


@lru_cache(maxsize=4096)
def _shape_class(
    op: str, m: int, n: int, k: int, experts: int, a_fmt: str, b_fmt: str, promote_every: int, out: str
) -> ShapeClass:
    # Weight gradients sum over tokens, and have groups of one row on both sides; the others have tokens as rows of a.
    if op != "scaled_grouped_mm" and (op != "scaled_mm" or _sums_tokens(a_fmt, b_fmt)):
        k = power_of_two(k)
    else:
        m = power_of_two(m)
    return ShapeClass(op, m, n, k, experts, a_fmt, b_fmt, promote_every, out)


@cache
def _sums_tokens(a_fmt: str, b_fmt: str) -> bool:
    left, right = quantized_format(a_fmt).group, quantized_format(b_fmt).group
    return left == right and left is not None and left[0] == 1


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def may_measure() -> bool:
    """Not while a CUDA graph is captured, and not where a program asks torch for the same results in every run."""
    is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not is_capturing and not torch.are_deterministic_algorithms_enabled()

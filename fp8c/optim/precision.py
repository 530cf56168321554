"""Precision that changes while a run goes on: BF16 for the first and last steps, or for modules where the loss spiked.

    precision = fp8c.optim.Precision(step, first=100, last=500, total=20_000)
    for number in range(1, 20_001):
        precision.at(number)                       # BF16 up to step 100 and from step 19,501 on
        step(**batch).loss.backward()
        ...
        if spiked:
            precision.switch("layers.3.**")        # these modules in BF16 from the next call on
    precision.restore()

Each combination is a compiled step of its own over the same parameters, compiled at its first call (or by `prepare`)
and kept: going back and forth afterwards costs nothing. Inductor's caches hold what the combinations have in common.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fp8c import driver
from fp8c.diagnostics import ExitCode, fail
from fp8c.specs.globs import BadGlob, Pattern, compile_glob, expand
from fp8c.specs.load import load
from fp8c.specs.plan import PrecisionPlan
from fp8c.specs.resolve import resolve

EVERYTHING = ("**",)


@dataclass
class SwitchedSession(driver.Session):
    """A session whose plan takes BF16 for the uses of some modules, and the spec's decisions for all others."""

    switched: tuple[str, ...] = ()

    def identity(self, names: Sequence[str]) -> dict[str, Any]:
        return {**super().identity(names), "switched": self.switched}

    def resolve(self, uses: Sequence[Any]) -> PrecisionPlan:
        """Raises: DiagnosticError E1150 for a pattern that matches no GEMM of the step."""
        plan = super().resolve(uses)
        plain = resolve(load("bf16"), uses, self.target, partial=True)
        patterns = {text: patterns_of(text) for text in self.switched}
        every = [pattern for alternatives in patterns.values() for pattern in alternatives]
        chosen = {key for key, use in plan.uses.items() if any(p.matches(use.use.path) for p in every)}
        if not self.partial:
            for text, alternatives in patterns.items():
                gemms = [use.use.path for use in plan.uses.values() if use.use.is_gemm]
                if not any(p.matches(path) for p in alternatives for path in gemms):
                    raise fail(
                        "E1150",
                        f"no GEMM of the step lies in a module '{text}'",
                        help=f"modules of the step: {', '.join(sorted(set(gemms))[:4])}, ...",
                        exit_code=ExitCode.USAGE,
                    )
        uses_now = {key: plain.uses[key] if key in chosen else use for key, use in plan.uses.items()}
        sections = plain.sections if self.switched == EVERYTHING else plan.sections
        return replace(plan, uses=uses_now, sections=sections)


def patterns_of(text: str) -> list[Pattern]:
    try:
        return [compile_glob(alternative) for alternative in expand(text)]
    except BadGlob as error:
        raise fail("E1150", f"'{text}' is no pattern: {error}", help=error.help, exit_code=ExitCode.USAGE) from error


class Precision:
    """Which precision a compiled step runs in.

    step:    what `fp8c.compile` returned; its call is what changes
    first, last, total: BF16 in steps 1..first and total - last + 1..total
    options: of torch.compile (fullgraph, dynamic), as `fp8c.compile` was given them
    """

    def __init__(
        self, step: nn.Module, *, first: int = 0, last: int = 0, total: int | None = None, **options: Any
    ) -> None:
        if first < 0 or last < 0 or (last and total is None):
            raise fail(
                "E1150",
                f"a schedule of precision got first = {first}, last = {last}, total = {total}",
                help="`last` needs `total`, the number of steps",
                exit_code=ExitCode.USAGE,
            )
        self.step, self.first, self.last, self.total = step, first, last, total
        self.options = {"fullgraph": True, **options}
        self.switched: tuple[str, ...] = ()
        self.number = 0
        self._session = driver.session_of(step)
        self._variants: dict[tuple[str, ...], Variant] = {
            (): Variant(step, self._session, step._compiled_call_impl)  # the spec as it is
        }
        self._current: tuple[str, ...] = ()

    def at(self, number: int) -> bool:
        """Set the precision of step `number` (counted from 1); whether it is the spec's rather than BF16."""
        self.number = number
        is_early = number <= self.first
        is_late = self.total is not None and number > self.total - self.last
        self._use(EVERYTHING if is_early or is_late else self.switched)
        return not (is_early or is_late)

    def switch(self, *paths: str) -> None:
        """Run the modules that the patterns match in BF16 from the next call on, besides those switched before."""
        for text in paths:
            patterns_of(text)
        self.switched = tuple(sorted({*self.switched, *paths}))
        self._use(self.switched)

    def restore(self, *paths: str) -> None:
        """Back to the spec: for these patterns, or for all."""
        self.switched = tuple(text for text in self.switched if paths and text not in paths)
        self._use(self.switched)

    def prepare(self, *paths: str) -> None:
        """Make a combination ready to be switched to; its graphs are compiled when it is first called."""
        self._variant(tuple(sorted(paths)))

    @property
    def session(self) -> driver.Session:
        """The session of the combination in use: its plan and remarks."""
        return self._variants[self._current].session

    def _use(self, key: tuple[str, ...]) -> None:
        variant = self._variant(key)
        self._current = key
        self.step._compiled_call_impl = variant.run

    def _variant(self, key: tuple[str, ...]) -> Variant:
        if key not in self._variants:
            self._variants[key] = variant_of(self.step, switched_session(self._session, key), self.options)
        return self._variants[key]

    def state_dict(self) -> dict[str, Any]:
        return {"switched": list(self.switched), "number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.switched = tuple(state["switched"])
        self.number = int(state["number"])
        self._use(self.switched)


@dataclass(frozen=True)
class Variant:
    """Another compiled call of a module. `module` keeps what the session refers to alive."""

    module: nn.Module
    session: driver.Session
    run: Any


def variant_of(step: nn.Module, session: driver.Session, options: Mapping[str, Any]) -> Variant:
    """A compiled call over the same parameters under another session, in the mode that the step is in (`eval`)."""
    module = driver.uncompiled(step)
    driver.attach(module, session, **options)
    call: Any = module._compiled_call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        module.training = step.training
        return call(*args, **kwargs)

    return Variant(module, session, run)


def settings_of(session: driver.Session) -> dict[str, Any]:
    """What another session over the same parameters starts from: histories of delayed scales are the step's, not a
    variant's."""
    fresh = session.fresh()
    fields = {name: getattr(fresh, name) for name in driver.Session.__dataclass_fields__}
    return fields | {"scales": session.scales}


def switched_session(session: driver.Session, switched: tuple[str, ...]) -> SwitchedSession:
    return SwitchedSession(**settings_of(session), switched=switched)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms: the same bits for the same step on the same machine and versions.

    Enter it before the first CUDA call: cuBLAS reads its setting when it starts. fp8c's own kernels sum in a fixed
    order.
    """
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

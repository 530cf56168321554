"""Nothing but diagnostics comes out of the language, whatever goes in. A longer run: `python -m fp8c.tools.fuzz_specs`."""

from __future__ import annotations

import pytest

from fp8c.tools.fuzz_specs import Result as FuzzResult
from fp8c.tools.fuzz_specs import Unexpected, check_one, fuzz, inputs


@pytest.mark.parametrize("part", range(10))
def test_fuzzing_50_000_inputs_finds_nothing(part: int) -> None:
    result = fuzz(5_000, seed=100 + part)
    assert result.inputs == 5_000 and result.loaded > 250 and len(result.codes) >= 8


def test_inputs_are_those_of_the_seed() -> None:
    assert list(inputs(50, 3)) == list(inputs(50, 3)) != list(inputs(50, 4))


def test_a_defect_is_reported_with_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8c.tools import fuzz_specs

    def broken(source: object, root: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(fuzz_specs, "load_source", broken)
    with pytest.raises(Unexpected, match="ZeroDivisionError: oops") as caught:
        fuzz(3, seed=1)
    assert caught.value.text == next(inputs(1, 1))


def test_a_rejection_needs_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8c.backends.target import load_target
    from fp8c.diagnostics import DiagnosticError
    from fp8c.tools import fuzz_specs

    def silent(source: object, root: object) -> None:
        raise DiagnosticError([])

    monkeypatch.setattr(fuzz_specs, "load_source", silent)
    with pytest.raises(Unexpected, match="without a reason"):
        check_one("version 1;", FuzzResult(), load_target("cpu"))

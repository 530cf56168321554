"""`fp8c bench`: which benchmark is asked for."""

from __future__ import annotations

import pytest

from fp8c.tools.bench.__main__ import BENCHMARKS, main


@pytest.mark.parametrize("arguments", [["nope"], []])
def test_a_wrong_name_is_told_with_the_right_ones(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "nope" in message if arguments else "required: NAME" in message
    assert not arguments or all(name in message for name in BENCHMARKS)


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert ", ".join(BENCHMARKS) in " ".join(capsys.readouterr().out.split())

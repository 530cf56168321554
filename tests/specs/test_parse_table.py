"""The parse table on disk: one spec reads alike without it, with it and with a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8c.diagnostics import DiagnosticError
from fp8c.specs import parser
from fp8c.specs.parser import Source

GOOD = "spec s { on linear { fwd.act: e4m3; } }"
BAD = "spec s { on linear { fwd.act e4m3 } }"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8C_CACHE_DIR", str(tmp_path))
    return tmp_path / "grammar"


def read(text: str) -> object:
    """What a new process would make of `text`."""
    parser._parser.cache_clear()
    try:
        return parser.parse(Source("s", "s.fp8", text))
    except DiagnosticError as error:
        return error.diagnostics
    finally:
        parser._parser.cache_clear()


@pytest.mark.parametrize("text", [GOOD, BAD, "", "spec {"])
def test_a_kept_table_changes_nothing(folder: Path, text: str) -> None:
    first = read(text)
    (table,) = folder.iterdir()
    assert read(text) == first
    table.write_bytes(table.read_bytes()[:-100])
    assert read(text) == first
    table.write_bytes(b"no table")
    assert read(text) == first


def test_a_folder_that_cannot_be_made_is_no_mistake(folder: Path) -> None:
    folder.write_text("a file stands where the folder should be")
    assert isinstance(read(GOOD), tuple)

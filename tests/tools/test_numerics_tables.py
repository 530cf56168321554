"""The tables in docs/numerics.md are what the command prints."""

from pathlib import Path

import pytest

from fp8c.tools import numerics_tables

DOCS = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
TABLES = [make for makers in numerics_tables.TABLES.values() for make in makers]


@pytest.mark.parametrize("make", TABLES, ids=lambda make: str(make.__name__))
def test_docs_hold_the_printed_table(make: numerics_tables.Maker) -> None:
    assert make().markdown() in DOCS


def test_unknown_table_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert numerics_tables.main(["colours"]) == 2
    assert "unknown table 'colours'; expected formats" in capsys.readouterr().err

"""`fp8c inspect --text`: which modules are listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8c.build import read_build
from fp8c.diagnostics import DiagnosticError
from fp8c.tools.viewer.text import inspect_text


def test_a_layer_behind_an_identical_one_is_shown_when_asked_for(small_build: Path) -> None:
    whole, asked = (inspect_text(read_build(small_build), only) for only in ("", "layers.1"))
    assert "identical" in whole and "identical" not in asked
    assert "q_proj" in asked.partition("GEMMs")[0]


def test_a_part_that_no_module_has_is_an_error(small_build: Path) -> None:
    with pytest.raises(DiagnosticError, match="E0615.*no module whose path contains 'layer.1'"):
        inspect_text(read_build(small_build), "layer.1")

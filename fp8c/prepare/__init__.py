"""What has to happen to a module before its step is captured: see `prepare`."""

from __future__ import annotations

from typing import Any

from torch import nn

from fp8c.diagnostics import Diagnostic
from fp8c.prepare.hf import prepare_hf


def prepare(module: nn.Module, example_inputs: Any = None) -> list[Diagnostic]:
    """Make a model capturable as one graph, in place, and say what was done.

    Parameters, state_dict and results stay the same; only the code that computes them changes.

    example_inputs: one batch (dict, tuple or single argument); with it every rewrite is checked against the original
    Returns: remarks, one per kind of change
    """
    return prepare_hf(module)

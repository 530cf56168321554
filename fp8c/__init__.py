"""fp8c: from an ordinary BF16 Mixture-of-Experts training step to an FP8 recipe, as a graph rewrite.

Importing `fp8c` does not import torch: the names below are loaded on first use, so `fp8c --help` and `fp8c spec check`
stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "compile": "fp8c.driver",
    "load": "fp8c.reload",
    "weights_changed": "fp8c.driver",
    "DiagnosticError": "fp8c.diagnostics",
}

if TYPE_CHECKING:
    from fp8c.diagnostics import DiagnosticError as DiagnosticError


#: Packages loaded on first use: `fp8c.optim.AdamW` needs no import of its own.
_PACKAGES = frozenset({"optim"})


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fp8c.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'fp8c' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_PACKAGES])

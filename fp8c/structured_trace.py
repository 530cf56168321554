"""PyTorch's own trace channel: what each pass did, as artifacts that `tlparse` lists under the compiled frame.

Torch writes them where `TORCH_TRACE` names a folder; without it nothing is printed and no graph text is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import fx
from torch._logging._internal import trace_structured

from fp8c import graph as g
from fp8c.pass_manager import PassRecord
from fp8c.passes import HALF_PASSES, JOINT_PASSES, ROLES
from fp8c.specs.plan import PrecisionPlan

_ON_HALVES = tuple(p.name for p in HALF_PASSES)
_ORDER = {name: i for i, name in enumerate((ROLES.name, *(p.name for p in JOINT_PASSES), *_ON_HALVES), 1)}


class TraceObserver:
    """Called as the pass manager's observers are; a pass on the halves comes twice: forward, then backward."""

    def __init__(self) -> None:
        self._halves_seen: set[tuple[str, str]] = set()

    def __call__(self, event: str, index: int, name: str, graph: fx.Graph) -> None:
        number = _ORDER.get(name, 0)
        half = ""
        if name in _ON_HALVES:
            half = "_backward" if (event, name) in self._halves_seen else "_forward"
            self._halves_seen.add((event, name))
        if event == "after":
            _artifact(f"fp8c_{number:02}_{name}{half}", graph)
        elif number == 1:
            _artifact("fp8c_00_captured", graph)


def _artifact(name: str, graph: fx.Graph) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: g.graph_text(graph, name),
    )


def trace_summary(plan: PrecisionPlan, records: list[PassRecord]) -> None:
    """The plan with every reason, and rewrites and seconds of each pass."""
    rows = [{"pass": r.name, "rewrites": r.changed, "pass_s": r.pass_s, "verify_s": r.verify_s} for r in records]
    _json_artifact("fp8c_passes", lambda: rows)
    _json_artifact("fp8c_plan", plan.to_json)


def _json_artifact(name: str, document: Callable[[], Any]) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: json.dumps(document(), indent=1),
    )

"""`graphs/notes.json` and `schedule.trace.json` of a build: what the graph texts leave out and a reader of them wants.

notes:  the model's source lines by the place the text gives, the roles of the captured graph's nodes (found after it was
        captured, so its text has none), and why each value that crosses to backward does
trace:  the schedule of a step with collectives as Chrome trace events, which Perfetto opens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fp8c import graph as g
from fp8c.pipeline import Rewritten
from fp8c.schedule import COMM, Schedule

SCHEMA = "fp8c.graph-notes/1"
NOTES_FILE = "graphs/notes.json"
TRACE_FILE = "schedule.trace.json"


def graph_notes(rewritten: Rewritten, with_roles: fx.Graph | None) -> dict[str, Any]:
    """The notes of one compile. `with_roles`: the captured graph after assign-roles, whose nodes keep their names."""
    halves = (rewritten.halves.forward.graph, rewritten.halves.backward.graph)
    sources: dict[str, list[tuple[str, str]]] = {}
    for graph in (rewritten.joint_before.graph, *halves):
        for node in graph.nodes:
            span = g.source_span(node) if node.op == "call_function" else None
            if span is None:
                continue
            lines = sources.setdefault(f"{span.file.rsplit('/', 1)[-1]}:{span.line}", [])
            if (span.file, span.text) not in lines:
                lines.append((span.file, span.text))
    roles = {n.name: str(n.meta[g.ROLE]) for n in with_roles.nodes if n.meta.get(g.ROLE)} if with_roles else {}
    saved = {}
    for name, value in sorted(rewritten.ctx.saved.items()):
        saved[name] = {"why": value.why, "reason": dict(vars(value.reason)) if value.reason else None}
    return {"schema": SCHEMA, "sources": dict(sorted(sources.items())), "roles": roles, "saved": saved}


def schedule_trace(schedules: Mapping[str, Schedule]) -> dict[str, Any]:
    """Chrome trace events of the halves' schedules: a process per half, a thread per stream, microseconds."""
    events: list[dict[str, Any]] = []
    for pid, (half, schedule) in enumerate(schedules.items()):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": half}})
        for tid, name in enumerate(("compute", "communication")):
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
        for slot in schedule.slots:
            tid = int(slot.task.resource == COMM)
            times = {"ts": round(slot.start_us, 3), "dur": round(slot.task.duration_us, 3)}
            events.append({"ph": "X", "pid": pid, "tid": tid, "name": slot.task.name, "cat": slot.task.kind, **times})
    figures = {
        half: {"makespan_us": s.makespan_us, "lower_bound_us": s.lower_bound_us, "method": s.method}
        for half, s in schedules.items()
    }
    return {"displayTimeUnit": "ms", "otherData": figures, "traceEvents": events}

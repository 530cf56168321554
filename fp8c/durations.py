"""A table of operator durations: what one layer of each kind costs, forward, input gradient and weight gradient.

The file is TOML (`examples/durations/`); a build writes the same table as `durations.json`. It is the one input of the
scheduler and the simulator that does not come from the target file, so it also says what it was measured on, and for
which model and deployment. No torch here.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from fp8c.diagnostics import DiagnosticError, ExitCode, Span, fail
from fp8c.files import reason
from fp8c.schedule import COMM, COMPUTE, Task, make_problem

SCHEMA = "fp8c.durations/1"
PREVIOUS = "previous layer"
PHASES = ("F", "B", "W")

T = TypeVar("T")


@dataclass(frozen=True)
class OpDuration:
    """One operator of one layer kind. `ms` on `measured.comm_sms` communication SMs; `fixed_ms` of it does not shrink
    when the operator is cut into chunks."""

    layer: str
    phase: str
    name: str
    on: str
    ms: float
    after: tuple[str, ...] = ()
    output: bool = False
    can_split: bool = False
    fixed_ms: float = 0.0
    kind: str = "compute"

    @property
    def key(self) -> str:
        return f"{self.phase}.{self.name}"


@dataclass(frozen=True)
class Measured:
    target: str
    comm_sms: int
    tokens: int
    expert_parallel: int = 1


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a MoE transformer, in elements; names as in DeepSeek-V3's configuration."""

    name: str
    hidden: int
    layers: int
    experts: int
    top_k: int
    expert_ffn: int
    vocabulary: int
    sequence: int
    dense_layers: int = 0
    mtp_layers: int = 0
    shared_experts: int = 0
    dense_ffn: int = 0
    heads: int = 0
    head_dim: int = 0
    rope_dim: int = 0
    q_lora: int = 0
    kv_lora: int = 0


@dataclass(frozen=True)
class Deployment:
    """How a model is spread over a cluster. `sequences_per_step` is the global batch."""

    pipeline_parallel: int
    expert_parallel: int
    sequences_per_step: int
    nodes_per_token: int = 0  # 0: no limit
    sequences_per_micro_batch: int = 1
    schedule: str = "dualpipe"


@dataclass(frozen=True)
class DurationTable:
    name: str
    measured: Measured
    ops: tuple[OpDuration, ...]
    model: ModelShape
    deployment: Deployment
    saved_bytes: tuple[tuple[str, int], ...] = ()  # per layer kind, what its forward leaves; () where not measured

    def layer(self, kind: str, phase: str) -> tuple[OpDuration, ...]:
        return tuple(op for op in self.ops if (op.layer, op.phase) == (kind, phase))

    def output(self, kind: str, phase: str) -> str:
        return next(op.name for op in self.layer(kind, phase) if op.output)

    def total_ms(self, kind: str, phase: str, on: str | None = None) -> float:
        return sum(op.ms for op in self.layer(kind, phase) if on in (None, op.on))

    def to_json(self) -> dict[str, Any]:
        """The same table as a document `load_durations` reads back."""
        ops = [{**asdict(op), "after": list(op.after)} for op in self.ops]
        parts = {key: asdict(getattr(self, key)) for key in ("measured", "model", "deployment")}
        return {"schema": SCHEMA, "name": self.name, **parts, "saved_bytes": dict(self.saved_bytes), "op": ops}


def load_durations(path: Path) -> DurationTable:
    """Read a table from a TOML or JSON file.

    Raises: E0910 unreadable file or wrong schema, E0911 a field missing, unknown or wrong, E0912 an
    operator the table needs is missing; E0901 to E0904 for what `after` says (exit code 2).
    """
    span = Span(str(path))
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        why = f"cannot read durations: {reason(error)}"
        raise fail("E0910", why, span=span, exit_code=ExitCode.USAGE) from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise fail(
            "E0910",
            f"expected a table of durations with schema {SCHEMA!r}, found {found!r}",
            span=span,
            help=f'put schema = "{SCHEMA}" on the first line',
            exit_code=ExitCode.USAGE,
        )
    return parse_durations(document, span)


def parse_durations(document: Mapping[str, Any], span: Span | None = None) -> DurationTable:
    rows = document.get("op")
    if not isinstance(rows, list) or not rows:
        raise fail("E0912", "the table has no operators", span=span, help="add [[op]] entries")
    ops = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and isinstance(row.get("after"), list):
            row = {**row, "after": tuple(row["after"])}
        ops.append(_record(OpDuration, row, f"op number {number}", span))
    table = DurationTable(
        str(document.get("name", "unnamed")),
        _record(Measured, document.get("measured"), "[measured]", span),
        tuple(ops),
        _record(ModelShape, document.get("model"), "[model]", span),
        _record(Deployment, document.get("deployment"), "[deployment]", span),
        _saved(document.get("saved_bytes", {}), span),
    )
    _check_table(table, span)
    return table


def _saved(value: Any, span: Span | None) -> tuple[tuple[str, int], ...]:
    is_right = isinstance(value, dict) and all(type(size) is int and size >= 0 for size in value.values())
    if not is_right:
        raise fail("E0911", f"saved_bytes is {value!r}, expected bytes per kind of layer", span=span)
    return tuple(sorted(value.items()))


#: Fields that count what there is at least one of; every other number may be 0.
_COUNTS = frozenset(
    {"tokens", "layers", "experts", "top_k", "sequence", "pipeline_parallel", "expert_parallel"}
    | {"sequences_per_step", "sequences_per_micro_batch"}
)
_NUMBERS = {"int": int, "float": (int, float), "str": str, "bool": bool, "tuple[str, ...]": tuple}


def _record(cls: type[T], value: Any, where: str, span: Span | None) -> T:
    if not isinstance(value, dict):
        raise fail("E0911", f"{where} is missing", span=span, exit_code=ExitCode.USAGE)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key, given in value.items():
        if key not in known:
            names = ", ".join(known)
            raise fail("E0911", f"{where} has no field {key!r}", span=span, help=f"its fields are {names}")
        expected = _NUMBERS[str(known[key].type)]
        if not isinstance(given, expected) or (isinstance(given, bool) and expected is not bool):  # type: ignore[arg-type]
            raise fail("E0911", f"{where}: {key} is {given!r}, expected {known[key].type}", span=span)
        least = int(key in _COUNTS)
        if isinstance(given, (int, float)) and not least <= given < float("inf"):
            raise fail("E0911", f"{where}: {key} is {given!r}, expected {least} or more", span=span)
    try:
        return cls(**value)
    except TypeError as error:
        missing = [name for name in known if repr(name) in str(error)]
        raise fail("E0911", f"{where} lacks {', '.join(missing)}", span=span, exit_code=ExitCode.USAGE) from error


def _check_table(table: DurationTable, span: Span | None) -> None:
    for op in table.ops:
        if op.phase not in PHASES:
            raise fail("E0911", f"{op.layer}.{op.key}: phase is {op.phase!r}, expected F, B or W", span=span)
        if op.on not in (COMPUTE, COMM):
            raise fail("E0911", f"{op.layer}.{op.key}: on is {op.on!r}, expected {COMPUTE} or {COMM}", span=span)
    shape = table.model
    if shape.dense_layers > shape.layers:
        raise fail("E0911", f"[model]: {shape.dense_layers} of {shape.layers} layers cannot be dense", span=span)
    kinds = sorted({op.layer for op in table.ops})
    needed = ["moe"] if table.model.dense_layers < table.model.layers else []
    if table.model.dense_layers:
        needed.append("dense")
    for kind in [*needed, *(k for k in kinds if k not in needed)]:
        for phase in PHASES:
            ops = table.layer(kind, phase)
            if not ops:
                raise fail(
                    "E0912",
                    f"the table has no operator for phase {phase} of {kind} layers",
                    span=span,
                    help=f"the model has {kind} layers: measure their phase {phase}, or take it from the cost model",
                )
            outputs = [op.name for op in ops if op.output]
            if phase != "W" and len(outputs) != 1:
                raise fail(
                    "E0912",
                    f"phase {phase} of {kind} layers has {len(outputs)} operators marked output, expected one",
                    span=span,
                    help="mark the operator whose result the next layer reads with output = true",
                )
        communicates = {op.kind for op in table.layer(kind, "F")}
        if kind == "moe" and table.deployment.expert_parallel > 1 and not {"dispatch", "combine"} <= communicates:
            missing = sorted({"dispatch", "combine"} - communicates)
            raise fail("E0912", f"the table misses {', '.join(missing)} in phase F of moe layers", span=span)
        try:
            make_problem(layer_tasks(table, kind, "", {p: "" for p in "FBW"}, PHASES))
        except DiagnosticError as error:
            raise DiagnosticError(error.diagnostics, ExitCode.USAGE) from error


def layer_tasks(
    table: DurationTable, kind: str, prefix: str, previous: Mapping[str, str], phases: tuple[str, ...]
) -> list[Task]:
    """Tasks of one layer, named `prefix` + phase + "." + operator. `previous[phase]` is the task whose result enters
    the layer in that phase, "" for none."""
    tasks = []
    for op in (op for phase in phases for op in table.layer(kind, phase)):
        after = []
        for name in op.after:
            if name == PREVIOUS:
                if previous.get(op.phase):
                    after.append(previous[op.phase])
            elif "." not in name:
                after.append(f"{prefix}{op.phase}.{name}")
            elif name.split(".", 1)[0] in phases:
                after.append(prefix + name)
        tasks.append(
            Task(
                f"{prefix}{op.key}",
                op.on,
                op.ms * 1000.0,
                tuple(after),
                kind=op.kind,
                is_splittable=op.can_split,
                fixed_us=op.fixed_ms * 1000.0,
            )
        )
    return tasks

"""`fp8c numerics`: load the model, take its batches, measure, bisect, search, and write what was asked for."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fp8c import driver
from fp8c.diagnostics import Diagnostic, ExitCode, fail
from fp8c.files import check_writable, write_file
from fp8c.models import LoadedModel, load_model, load_namespace
from fp8c.prepare import prepare
from fp8c.tools.compile_command import Request, check_batch
from fp8c.tools.numerics import page
from fp8c.tools.numerics.bisect import METRICS, Bisection, Metric, Trials, bisect
from fp8c.tools.numerics.faults import check_hits, parse_fault
from fp8c.tools.numerics.measure import SCHEMA, Numerics, measure
from fp8c.tools.numerics.search import Proposal, search, write_spec
from fp8c.tools.numerics.step import CapturedStep
from fp8c.tools.verify import require_weights


@dataclass(frozen=True)
class Settings:
    """What `fp8c numerics` was asked beside the model.

    metric, limit: of --bisect;  budget: of --search, in the metric's unit;  spec_out: where its spec goes
    """

    batches: int = 1
    bisect: bool = False
    search: bool = False
    metric: str = ""
    limit: float | None = None
    budget: float | None = None
    fault: str = ""
    out: Path | None = None
    spec_out: Path | None = None


@dataclass(frozen=True)
class Answer:
    """Everything that was found. `exit_code` is CHECK_FAILED when the step leaves its tolerance or the given limit."""

    found: Numerics
    bisection: Bisection | None = None
    proposal: Proposal | None = None
    remarks: tuple[Diagnostic, ...] = ()
    written: tuple[str, ...] = field(default=())

    @property
    def exit_code(self) -> ExitCode:
        if self.proposal is not None:
            return ExitCode.OK
        is_within = self.bisection.is_within and not self.bisection.suspects if self.bisection else self.found.is_within
        return ExitCode.OK if is_within else ExitCode.CHECK_FAILED

    def notes(self) -> list[str]:
        lines = self.bisection.lines() if self.bisection else []
        return lines + (self.proposal.lines() if self.proposal else [])

    def text(self) -> str:
        return "\n".join([page.text(self.found), *self.notes(), *(f"  written: {name}" for name in self.written)])

    def to_json(self) -> dict[str, Any]:
        document = page.to_json(self.found)
        document["bisect"] = self.bisection.to_json() if self.bisection else None
        document["search"] = self.proposal.to_json() if self.proposal else None
        return document


def run(request: Request, settings: Settings) -> Answer:
    """Measure a model under a spec, then bisect or search where asked.

    Raises: DiagnosticError for model, spec and target; E0840 for a model without weights, E0845 for a fault that fits
            nothing, E0846 for a budget that nothing reaches
    """
    metric = settings.metric or ("gradient" if settings.search else "worst")
    if metric not in METRICS:
        raise ValueError(metric)
    if settings.search:
        check_writable(settings.spec_out or Path("searched.fp8"))
    session = driver.new_session(request.spec, request.target)
    fault = parse_fault(settings.fault) if settings.fault else None
    loaded = load_model(
        request.model, weights=request.weights, overrides=request.overrides, batch=request.batch, seq=request.seq
    )
    require_weights(loaded)
    check_batch(loaded)
    batches = batches_of(loaded, request.model, settings.batches)
    loaded = dataclasses.replace(loaded, example_inputs=batches[0])
    remarks = prepare(loaded.module, loaded.example_inputs)
    step = CapturedStep(loaded)
    rewritten = step.rewrite(session.spec, session.target)
    found = measure(step, rewritten, batches, fault, model=request.model)
    if not found.operands:
        raise fail(
            "E0847",
            f"spec `{session.spec.name}` quantizes nothing of this model",
            help="there is nothing to compare with BF16",
            exit_code=ExitCode.USAGE,
        )
    if fault is not None:
        check_hits(fault, {part: stats.format for part, stats in found.operands.items()})
    bisection = proposal = None
    if settings.bisect or settings.search:
        trials = Trials(step, rewritten, batches, cast(Metric, metric), fault)
        if settings.bisect:
            bisection = bisect(trials, found, settings.limit)
        if settings.search:
            budget = trials.tolerance() / 2 if settings.budget is None else settings.budget
            out = settings.spec_out or Path("searched.fp8")
            proposal = search(trials, found, session.spec, budget, spec_name(out), request.spec, out)
            write_spec(proposal, out)
    answer = Answer(found, bisection, proposal, (*remarks, *rewritten.plan.diagnostics))
    return write(answer, settings.out, (str(settings.spec_out or "searched.fp8"),) if proposal else ())


def spec_name(out: Path) -> str:
    name = "".join(c if c.isalnum() else "_" for c in out.stem)
    return name if name.isidentifier() else f"spec_{name}"


def batches_of(loaded: LoadedModel, reference: str, count: int) -> Sequence[Any]:
    """The first batches of the model file's `batches(seed)`, or its one example batch.

    Raises: DiagnosticError E0804 when more batches are asked for than there are
    """
    made = None
    if not reference.startswith("hf:"):
        made = getattr(load_namespace(reference), "batches", None)
    if made is not None and count > 1:
        return list(itertools.islice(made(0), count))
    if count > 1:
        raise fail(
            "E0804",
            f"{reference} has no batches(), so there is one batch only",
            help="add `def batches(seed):`, an endless iterator of batches like example_inputs()",
            exit_code=ExitCode.MODEL,
        )
    return [loaded.example_inputs]


def write(answer: Answer, out: Path | None, written: tuple[str, ...]) -> Answer:
    """Write the page, the picture or the document, by the ending of `out`."""
    if out is not None:
        match out.suffix:
            case ".svg":
                content = page.svg(answer.found)
            case ".json":
                content = json.dumps({"schema": SCHEMA, **answer.to_json()}, indent=1) + "\n"
            case _:
                content = page.page(answer.found, answer.notes())
        write_file(out, content)
        written = (*written, str(out))
    return Answer(answer.found, answer.bisection, answer.proposal, answer.remarks, written)

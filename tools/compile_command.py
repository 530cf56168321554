"""`fp8c compile`: model and spec in, a build out, and the figures that say what was done.

`compile_model` does the work and returns a `CompileResult`; the CLI parses, calls it and prints.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fp8c import __version__, driver
from fp8c import graph as g
from fp8c.backends.costs import load_machine, machine_names
from fp8c.backends.prebuilt import INDEX, kernel_files
from fp8c.backends.target import record_json
from fp8c.build import check_output, graph_file, json_bytes, packed_json, spec_file, write_build
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity, diagnostic_json, fail
from fp8c.durations import DurationTable
from fp8c.fingerprint import data_types, decisions_digest, parameter_types, portable_hash
from fp8c.graph_durations import step_durations
from fp8c.models import LoadedModel, Weights, check_step, load_model
from fp8c.partition import Halves
from fp8c.pass_manager import PassRecord
from fp8c.passes import check_optional
from fp8c.pipeline import Rewritten, count_gemms
from fp8c.prepare import prepare
from fp8c.saved import SavedReport, SavedTensor, saved_report
from fp8c.specs.plan import PrecisionPlan, UsePlan
from fp8c.tools import report, verify
from fp8c.tools.graph_notes import NOTES_FILE, TRACE_FILE, graph_notes, schedule_trace
from fp8c.tools.ir_printing import Observer, Printing, write_reproducer
from fp8c.tools.progress import Progress

SCHEMA = "fp8c.compile/1"


@dataclass(frozen=True)
class Request:
    """What `fp8c compile` was asked for. `out` None: plan only, write no build."""

    model: str
    spec: str = "deepseek_v3"
    target: str | None = None
    out: Path | None = Path("build")
    overrides: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    seq: int | None = None
    weights: Weights = "auto"
    verify: bool = False
    baseline: bool = True
    mesh: tuple[tuple[str, int], ...] = ()
    without: tuple[str, ...] = ()
    force: bool = False
    kernels: bool = False
    printing: Printing = field(default_factory=Printing)
    argv: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompileResult:
    """What was done. `baseline` is BF16 under PyTorch's default min-cut; None when it was not asked for."""

    model: str
    spec: str
    target: str
    gemms: Mapping[str, Mapping[str, int]]
    saved: SavedReport
    baseline: SavedReport | None
    remarks: tuple[Diagnostic, ...]
    build: Path | None
    verified: verify.Verification | None
    tables: Mapping[str, Any]
    passes: tuple[PassRecord, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        failed = self.verified is not None and not self.verified.ok
        return ExitCode.CHECK_FAILED if failed else ExitCode.OK

    def to_json(self) -> dict[str, Any]:
        saved_bytes: dict[str, Any] = {
            "bf16": self.baseline.total_bytes if self.baseline else None,
            "fp8c": self.saved.total_bytes,
            "layers": self.tables["layers"],
        }
        if self.baseline:
            saved_bytes["ratio"] = self.saved.total_bytes / max(1, self.baseline.total_bytes)
        document: dict[str, Any] = {
            "model": self.model,
            "spec": self.spec,
            "target": self.target,
            "gemms": self.gemms,
            "saved_bytes": saved_bytes,
            "remarks": [diagnostic_json(r) for r in self.remarks],
            "build": str(self.build) if self.build else None,
        }
        if self.verified:
            document["verify"] = self.verified.to_json()
        return document


def compile_model(request: Request, progress: Progress | None = None) -> CompileResult:
    """Capture, rewrite, compare, verify, write the build.

    Raises: DiagnosticError for whatever spec, target, model or output path can't do; nothing is written then.
    """
    progress = progress or Progress()
    if request.out is not None:
        check_output(request.out, force=request.force)
    observer = Observer(request.printing.checked())
    without = check_optional(request.without)
    session = driver.new_session(request.spec, request.target, observers=(observer,), without=without)
    with progress.stage("loading the model"):
        loaded = load_model(
            request.model,
            weights=request.weights,
            overrides=request.overrides,
            batch=request.batch,
            seq=request.seq,
        )
        check_batch(loaded)
    if request.verify:
        verify.require_weights(loaded)
        with progress.stage("running the step in BF16"):
            eager = verify.run_eager(loaded)
    else:
        with progress.stage("running the model once"):
            check_step(loaded)
    parameters = parameter_types(loaded.module)  # as the user's model has them, before anything is prepared
    with progress.stage("preparing the model"):
        session.remarks += prepare(loaded.module, loaded.example_inputs, planned_mesh(request))
    session.want_baseline = request.baseline and not request.mesh  # a process of its own, without the mesh
    rewritten = capture(loaded, session, observer, request, progress)
    saved = saved_of(rewritten, rewritten.halves)
    baseline = None
    if session.baseline is not None:
        with progress.stage("BF16 baseline: PyTorch's default min-cut"):
            baseline = saved_of(rewritten, session.baseline.result())
    verified = None
    if request.verify:
        with progress.stage("verifying"):
            verified = verify.verify(loaded, eager, session, rewritten)
    remarks = tuple(
        dict.fromkeys(
            [
                *session.remarks,
                *rewritten.plan.diagnostics,
                *partial_group_remarks(rewritten.plan),
                *guessed_bytes_warnings(saved),
            ]
        )
    )
    tables = report.tables(rewritten, saved, baseline, remarks)
    result = CompileResult(
        model=request.model,
        spec=session.spec.name,
        target=session.target.name,
        gemms=count_gemms(rewritten),
        saved=saved,
        baseline=baseline,
        remarks=remarks,
        build=request.out,
        verified=verified,
        tables=tables,
        passes=tuple(rewritten.records),
    )
    if request.out is not None:
        with progress.stage("writing the build"):
            write(request, loaded, parameters, session, rewritten, observer, result, progress)
    return result


def parse_mesh(text: str | None) -> tuple[tuple[str, int], ...]:
    """`ep=64,pp=16` as pairs. Raises: DiagnosticError E0866, exit code USAGE."""
    if text is None:
        return ()
    pairs = [re.fullmatch(r"([a-z]\w*)=([1-9]\d{0,5})", part.strip()) for part in text.split(",")]
    names = [pair[1] for pair in pairs if pair]
    if None in pairs or len(set(names)) != len(names):
        raise fail(
            "E0866",
            f"'{text}' is no mesh",
            help="write names and sizes, each name once: --mesh ep=64,pp=16",
            exit_code=ExitCode.USAGE,
        )
    return tuple((pair[1], int(pair[2])) for pair in pairs if pair)


def planned_mesh(request: Request) -> DeviceMesh | None:
    """The mesh asked for, over a process group that exists in name only: this process is its first rank.

    Raises: DiagnosticError E0866 together with --verify, which would need the other ranks.
    """
    if not request.mesh:
        return None
    if request.verify:
        raise fail(
            "E0866",
            "--verify runs the step, and --mesh plans one rank of many",
            help="leave one of them out; `torchrun` runs a step on several ranks",
            exit_code=ExitCode.USAGE,
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    names, sizes = zip(*request.mesh)
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(sizes))
    mesh: DeviceMesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=tuple(names))
    return mesh


def check_batch(loaded: LoadedModel) -> None:
    """Raises: DiagnosticError E0816 for a batch with a tensor that holds nothing."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(loaded.example_inputs)
    for path, leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.numel() == 0:
            name = torch.utils._pytree.keystr(path)
            raise fail(
                "E0816",
                f"the batch is empty: example_inputs(){name} is {g.type_text(leaf)}",
                help="return at least one sequence of at least one token",
                exit_code=ExitCode.MODEL,
            )


def capture(
    loaded: LoadedModel, session: driver.Session, observer: Observer, request: Request, progress: Progress
) -> Rewritten:
    """The step's graphs. A pass that fails leaves a reproducer folder."""
    with contextlib.ExitStack() as stage:
        stage.enter_context(progress.stage("capturing the step"))

        def on_joint() -> None:
            stage.close()
            stage.enter_context(progress.stage("rewriting the step"))

        session.on_joint = on_joint
        try:
            return driver.capture_step(loaded.step(), loaded.example_inputs, session)
        except Exception as error:
            if observer.running is None:
                raise
            place = write_reproducer(
                observer.running,
                observer.ended,
                error=error,
                reference=request.model,
                spec_texts=session.spec.texts,
                command=request.argv,
            )
            raise with_note(error, f"reproducer in {place}/") from error


def with_note(error: Exception, note: str) -> Exception:
    """The error with a note a person will see."""
    if not isinstance(error, DiagnosticError):
        error.add_note(note)
        return error
    first, *rest = error.diagnostics
    noted = Diagnostic(
        first.code, first.message, first.span, first.severity, (*first.notes, note), first.help, first.related
    )
    return DiagnosticError([noted, *rest], error.exit_code)


# --- figures ----------------------------------------------------------------------------------------------------------


def saved_of(rewritten: Rewritten, saved: Halves | tuple[SavedTensor, ...]) -> SavedReport:
    uses = (u.use for u in rewritten.plan.uses.values())
    return saved_report(saved, frozenset((use.path, use.n) for use in uses if "lm_head" in use.kinds))


def durations_of(rewritten: Rewritten, session: driver.Session, model: str) -> DurationTable | None:
    """What `fp8c simulate` reads of a build; None for a target without a cost sheet, or a model without layers."""
    if session.target.name not in machine_names():
        return None
    uses = rewritten.ctx.uses.values()
    return step_durations(rewritten.halves, uses, load_machine(session.target.name), model)


def partial_group_remarks(plan: PrecisionPlan) -> list[Diagnostic]:
    """R0411: widths that are no multiple of their group, whose last group is a shorter one. Never without a word."""
    found = [(use, width) for use in plan.uses.values() if (width := partial_width(use)) is not None]
    if not found:
        return []
    use, (name, size, group) = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    message = f"{use.use.key} ({name} = {size}){more}: no multiple of {group}, so the last group is a shorter one"
    help = "`pad { partial_group = keep; }` in the spec leaves such GEMMs in BF16"
    return [Diagnostic("R0411", message, use.use.source, Severity.REMARK, help=help)]


def guessed_bytes_warnings(saved: SavedReport) -> list[Diagnostic]:
    """W0847: saved bytes that rest on sizes which nobody knows before the step, such as rows of each expert."""
    guesses = [t for t in saved.tensors if t.is_guess]
    if not guesses:
        return []
    first = guesses[0]
    message = (
        f"{len(guesses)} of {len(saved.tensors)} saved tensors have sizes that are known in the step alone "
        f"({first.path or first.name}: {first.dtype}); each such size counts as {g.UNKNOWN_SIZE:,}, "
        "so saved bytes and their ratio say little"
    )
    help = "the page on models lists the loops over experts that become grouped GEMMs, whose sizes are known"
    return [Diagnostic("W0847", message, severity=Severity.WARNING, help=help)]


def partial_width(plan: UsePlan) -> tuple[str, int, int] | None:
    """(axis, size, group) of the first weight axis that a quantized GEMM's groups do not divide."""
    use = plan.use
    if not use.is_gemm or not plan.gemm("fprop").is_fp8:
        return None
    formats = plan.gemm("fprop")
    assert formats.a.group is not None and formats.b.group is not None
    for name, size, group in (("k", use.k, formats.a.group[1]), ("n", use.n, formats.b.group[0])):
        if size is not None and group > 1 and size % group:
            return name, size, group
    return None


# --- the build --------------------------------------------------------------------------------------------------------


def write(
    request: Request,
    loaded: LoadedModel,
    parameters: Mapping[str, str],
    session: driver.Session,
    rewritten: Rewritten,
    observer: Observer,
    result: CompileResult,
    progress: Progress,
) -> None:
    assert request.out is not None
    lock = rewritten.plan.to_json()
    graphs = {
        "captured": rewritten.joint_before.graph,
        "joint": observer.joint or rewritten.joint_before.graph,
        "forward": rewritten.halves.forward.graph,
        "backward": rewritten.halves.backward.graph,
    }
    files = {"plan.lock.json": json_bytes(lock)}
    for name, graph in graphs.items():
        file, content = graph_file(name, g.graph_text(graph, name))
        files[file] = content
    files[NOTES_FILE] = packed_json(graph_notes(rewritten, observer.roles))
    if rewritten.ctx.schedules:
        files[TRACE_FILE] = packed_json(schedule_trace(rewritten.ctx.schedules))
    durations = durations_of(rewritten, session, request.model)
    if durations is not None:
        files["durations.json"] = json_bytes(durations.to_json())
    for file, text in session.spec.texts:
        files[spec_file(file)] = text.encode()
    if request.kernels:
        files |= kernel_files((rewritten.halves.forward, rewritten.halves.backward), session.target)
    manifest = {
        "versions": versions(),
        "model": model_reference(request, loaded),
        "spec": {
            "name": session.spec.name,
            "reference": request.spec,
            "sha256": session.spec.digest,
            "files": {name: spec_file(name) for name, _ in session.spec.texts},
        },
        "target": record_json(session.target),
        "without": sorted(session.without),
        "plan": rewritten.plan.digest(),
        "decisions": decisions_digest(lock),
        "graphs": {name: portable_hash(graph) for name, graph in graphs.items()},
        "parameters": parameters,
        "data": data_types(rewritten),
        "gemms": result.gemms,
    }
    shown = {
        **result.tables,
        **{key: manifest[key] for key in ("versions", "spec", "target", "plan")},
        "model": {"name": loaded.name, "reference": request.model},
        "verify": result.verified.to_json() if result.verified else None,
        "kernels": gemm_kernels(json.loads(files[INDEX])) if INDEX in files else None,
    }
    run = {
        "argv": list(request.argv),
        "passes": [{"name": r.name, "pass_s": r.pass_s, "verify_s": r.verify_s} for r in rewritten.records],
        "stages": [{"name": name, "seconds": seconds} for name, seconds in progress.stages],
    }
    files["report.json"] = json_bytes(shown)
    write_build(request.out, manifest, files, run, {"report.html": report.page(shown, run)}, force=request.force)


def gemm_kernels(index: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of `kernels/index.json`: which implementation serves each GEMM."""
    return {"architecture": index["architecture"], "gemms": index["gemms"]}


def versions() -> dict[str, str]:
    found = {"fp8c": __version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["transformers"] = importlib.metadata.version("transformers")
    return found


def model_reference(request: Request, loaded: LoadedModel) -> dict[str, Any]:
    """Everything that loads the same model again."""
    return {
        "reference": request.model,
        "name": loaded.name,
        "overrides": {k: request.overrides[k] for k in sorted(request.overrides)},
        "batch": request.batch,
        "seq": request.seq,
        "mesh": dict(request.mesh),
        "weights": loaded.weights,
        "has_loss_function": loaded.loss is not None,
    }


# --- what a person reads ----------------------------------------------------------------------------------------------


def result_text(result: CompileResult) -> str:
    """The tables for stdout."""
    rows: list[tuple[str, ...]] = [("GEMMs", "total", "FP8", "kept")]
    rows += [(which, *(f"{n[k]:,}" for k in ("total", "fp8", "kept"))) for which, n in result.gemms.items()]
    lines = [f"{result.model} under {result.spec} for {result.target}", "", *columns(rows), ""]
    if result.baseline:
        ratio = result.saved.total_bytes / max(1, result.baseline.total_bytes)
        lines += saved_lines(result.tables["layers"])
        lines += [f"saved for backward, without logits: {ratio:.3f}x of BF16 under PyTorch's default min-cut"]
    else:
        lines += [f"saved for backward, without logits: {mib(result.saved.total_bytes)}"]
    if result.verified:
        lines += ["", *result.verified.lines()]
    noted = [r for r in result.remarks if r.severity is not Severity.ERROR]
    if noted:
        lines += ["", *(f"{r.severity.value}[{r.code}]: {r.message}" for r in noted)]
    if result.build:
        lines += ["", f"report: {result.build / 'report.html'}"]
    return "\n".join(lines)


def times_text(result: CompileResult) -> str:
    """Rewrites and times of every pass."""
    rows = [("pass", "rewrites", "pass s", "verifier s")]
    rows += [(r.name, f"{r.changed:,}", f"{r.pass_s:.3f}", f"{r.verify_s:.3f}") for r in result.passes]
    return "\n".join(columns(rows))


def saved_lines(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Saved bytes per layer; neighbouring layers with equal bytes share a line."""
    groups: list[tuple[list[int | None], int, int]] = []
    for row in layers:
        pair = (row["bf16"], row["fp8c"])
        if groups and row["layer"] is not None and groups[-1][1:] == pair:
            groups[-1][0].append(row["layer"])
        else:
            groups.append(([row["layer"]], *pair))
    rows = [("saved bytes", "BF16", "fp8c", "ratio")]
    for names, theirs, ours in groups:
        first, last = names[0], names[-1]
        name = (
            "outside of layers"
            if first is None
            else f"layer {first}"
            if first == last
            else f"layers {first}-{last}, each"
        )
        rows.append((name, mib(theirs), mib(ours), f"{ours / theirs:.3f}x" if theirs else "-"))
    return columns(rows)


def mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.2f} MiB"


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Text columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]

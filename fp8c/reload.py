"""`fp8c.load`: the training step of a build, captured again and run only when it is what the build says."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from fp8c import driver
from fp8c import graph as g
from fp8c.backends import prebuilt
from fp8c.backends.target import load_target
from fp8c.build import Build, read_build
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity, Span, fail
from fp8c.distributed import agree_on, watch_gradients
from fp8c.fingerprint import data_types, decisions, parameter_types, portable_hash
from fp8c.models import LoadedModel, LossFunction, StepModule, load_model
from fp8c.pipeline import Rewritten
from fp8c.specs.load import Spec, shipped
from fp8c.specs.load import load as load_spec

#: Reasons shown before "and N more".
_SHOWN = 8


def load(
    build: str | Path,
    model: nn.Module | None = None,
    *,
    loss: LossFunction | None = None,
    target: str | None = None,
    lowering: str | None = None,
    mesh: DeviceMesh | None = None,
) -> LoadedStep:
    """The compiled training step of a build: `step(batch)` is the scalar loss, `step.module` the model.

    The model is the one the build names, with new random weights, or the one given, whose parameters are shared. It is
    captured again at the first call, and must come out as the build has it: same parameters, same decisions and, for a
    batch of the build's shape, the same graphs. Other lengths are compiled under the same decisions.

    loss:   of a given model that doesn't return its loss; the build's model file has its own
    target: another machine than the build's; its decisions must be the same
    mesh:   the ranks, for a build made with `--mesh`: of the same names and sizes, one process each. Such a build plans
            the first rank with rows spread evenly, so graphs are compared by their GEMMs, casts and transfers
    Raises: DiagnosticError E0612 (no build, or changed files), E0614 (the spec changed), E0613 (the model changed; from
            the first call where only the captured graph can tell), E0866 (another mesh than the build's), E0863 (ranks
            load different builds).
    """
    from fp8c.prepare import expert_mesh, prepare

    read = read_build(build)
    spec = same_spec(read)
    check_mesh(read, mesh)
    if mesh is not None:
        facts = {"build": str(read.manifest["graphs"]), "plan": read.manifest["plan"], "versions": torch.__version__}
        agree_on(facts, sorted(torch.distributed.get_process_group_ranks(expert_mesh(mesh).get_group())))
    loaded = named_model(read, model, loss)
    check_parameters(read, loaded)
    session = LoadedSession(
        spec,
        load_target(target or read.manifest["target"]["name"]),
        lowering=lowering,
        without=frozenset(read.manifest.get("without", ())),
        build=read,
    )
    session.remarks += prepare(loaded.module, loaded.example_inputs, mesh)
    if read.has(prebuilt.INDEX) and torch.cuda.is_available():
        session.remarks += prebuilt.install(read.read, session.target.architecture)
    step = LoadedStep(loaded.module, loaded.loss, source=loaded.source)
    if mesh is not None:
        watch_gradients(step, expert_mesh(mesh))
    step.compile(backend=driver.guarded(session), fullgraph=True)
    step.__dict__["fp8c_session"] = session
    step.example_inputs = loaded.example_inputs
    return step


class LoadedStep(StepModule):
    """The compiled step of a build. `example_inputs`: the build's own batch, None with a model of the caller's."""

    example_inputs: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            explained = driver.explain_failure(error)
            if explained is error:
                raise
            raise explained from None


@dataclass
class LoadedSession(driver.Session):
    """A session that compares what it rewrote with the build before anything runs."""

    build: Build | None = None

    def identity(self, names: Sequence[str]) -> dict[str, Any]:
        assert self.build is not None
        return {**super().identity(names), "build": self.build.manifest["graphs"], "plan": self.build.manifest["plan"]}

    def _partition(self, joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        halves = super()._partition(joint, inputs, **options)
        assert self.build is not None
        problems = differences(self.build, self.steps[-1])
        if problems:
            raise DiagnosticError(problems, ExitCode.MODEL)
        return halves


def check_mesh(build: Build, mesh: DeviceMesh | None) -> None:
    """Raises: DiagnosticError E0866 for a mesh that is not the build's, exit code USAGE."""
    planned: dict[str, int] = build.manifest["model"].get("mesh") or {}
    given = {} if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape))
    if planned == given:
        return
    text = ", ".join(f"{name}={size}" for name, size in planned.items())
    found = ", ".join(f"{name}={size}" for name, size in given.items()) or "no mesh"
    raise fail(
        "E0866",
        f"the build is for {f'one rank of a mesh {text}' if planned else 'one device'}, found {found}",
        help="start the ranks with torchrun and pass their mesh: fp8c.load(build, mesh=init_device_mesh(...))"
        if planned
        else "load it without mesh=, or build it with `fp8c compile --mesh`",
        exit_code=ExitCode.USAGE,
    )


# --- what may have changed --------------------------------------------------------------------------------------------


def same_spec(build: Build) -> Spec:
    """The build's spec, from where it came from, or the build's own copy where that is gone.

    Raises: DiagnosticError E0614 when it is no longer the spec of the build.
    """
    recorded = build.manifest["spec"]
    reference = str(recorded["reference"])
    if reference.removeprefix("std:") in shipped() or Path(reference).is_file():
        spec = load_spec(reference)
    else:
        spec = load_spec(build.path / "spec" / Path(reference).name)
    if spec.digest == recorded["sha256"]:
        return spec
    raise DiagnosticError(spec_changes(build, spec) or [_changed_spec(f"spec {spec.name} changed")], ExitCode.SPEC)


def spec_changes(build: Build, spec: Spec) -> list[Diagnostic]:
    """E0614 for each file that differs from the build's copy: the first line that does, and the rule it is in."""
    found = []
    now = dict(spec.texts)
    before = {name: build.read(file).decode() for name, file in build.manifest["spec"]["files"].items()}
    for file in sorted({*now, *before}):
        if file not in now or file not in before:
            found.append(_changed_spec(f"the spec {'no longer' if file in before else 'now'} uses {file}"))
        elif now[file] != before[file]:
            found.append(changed_line(file, before[file].splitlines(), now[file].splitlines()))
    return found


def changed_line(file: str, before: list[str], now: list[str]) -> Diagnostic:
    for tag, i, i_end, j, _ in difflib.SequenceMatcher(None, before, now, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        place = min(j, len(now) - 1)
        rule = next((m[1] for line in now[place::-1] if (m := re.search(r"\brule\s+(\w+)", line))), None)
        was = f"; it was `{before[i].strip()}`" if i < i_end else ""
        where = f"rule {rule}" if rule else "the spec"
        text = now[place] if now else ""
        return _changed_spec(f"{where} is not what the build was made with{was}", Span(file, place + 1, text=text))
    return _changed_spec(f"{file} changed")


def _changed_spec(message: str, span: Span | None = None) -> Diagnostic:
    return Diagnostic("E0614", message, span, Severity.ERROR, help="build again with `fp8c compile`")


def named_model(build: Build, model: nn.Module | None, loss: LossFunction | None) -> LoadedModel:
    """The model given, or the one the manifest names."""
    recorded: Mapping[str, Any] = build.manifest["model"]
    if model is None:
        return load_model(
            recorded["reference"],
            weights=recorded["weights"],
            overrides=recorded["overrides"],
            batch=recorded["batch"],
            seq=recorded["seq"],
        )
    if recorded["has_loss_function"] and loss is None:
        raise fail(
            "E0613",
            f"the build of {recorded['reference']} ends in a loss function, and the model was given without one",
            help="pass the function as loss=",
            exit_code=ExitCode.MODEL,
        )
    return LoadedModel(model, None, loss, recorded["name"], recorded["reference"])


def check_parameters(build: Build, loaded: LoadedModel) -> None:
    """Raises: DiagnosticError E0613 that names parameters and buffers that are not those of the build."""
    before: dict[str, str] = build.manifest["parameters"]
    now = parameter_types(loaded.module)
    lines = [
        f"{name} is {now[name]}, in the build {before[name]}"
        for name in now
        if before.get(name, now[name]) != now[name]
    ]
    lines += [f"{name} is not in the build" for name in now if name not in before]
    lines += [f"{name} of the build is gone" for name in before if name not in now]
    if lines:
        raise changed_model(f"{len(lines)} parameters or buffers differ", lines)


def changed_model(message: str, lines: list[str]) -> DiagnosticError:
    return DiagnosticError([changed_model_diagnostic(message, lines)], ExitCode.MODEL)


def changed_model_diagnostic(message: str, lines: list[str]) -> Diagnostic:
    notes = tuple(lines[:_SHOWN]) + ((f"and {len(lines) - _SHOWN} more",) if len(lines) > _SHOWN else ())
    return Diagnostic(
        "E0613",
        f"the model is not the one of the build: {message}",
        notes=notes,
        help="build again with `fp8c compile`",
    )


def differences(build: Build, rewritten: Rewritten) -> list[Diagnostic]:
    """E0613 for the first way in which the step differs from the build; graphs count for a batch of the same shape."""
    before = decisions(build.json("plan.lock.json"))
    now = decisions(rewritten.plan.to_json())
    is_of_a_mesh = bool(build.manifest["model"].get("mesh"))
    if is_of_a_mesh:  # the last ranks may own fewer experts than the first
        for use in (*before["uses"].values(), *now["uses"].values()):
            use["shape"].pop("experts", None)
    lines = decision_changes(before["uses"], now["uses"])
    lines += decision_changes({"": before["sections"]}, {"": now["sections"]})
    if lines:
        return [changed_model_diagnostic(f"{len(lines)} decisions differ", lines)]
    data = data_types(rewritten)
    if len(data) != len(build.manifest["data"]):
        return [
            changed_model_diagnostic(
                f"it reads {len(data)} tensors of data, in the build {len(build.manifest['data'])}", []
            )
        ]
    if data != build.manifest["data"]:
        return []
    graphs = {
        "captured": rewritten.joint_before.graph,
        "forward": rewritten.halves.forward.graph,
        "backward": rewritten.halves.backward.graph,
    }
    for name, graph in graphs.items():
        if is_of_a_mesh:
            lines = count_changes(operators(build.graph_text(name)), operators(g.graph_text(graph, name)))
            if lines:
                return [changed_model_diagnostic(f"the {name} graph differs", lines)]
            continue
        if portable_hash(graph) != build.manifest["graphs"][name]:
            if name != "captured" and build.manifest["versions"]["fp8c"] != driver_version():
                message = f"fp8c {driver_version()} rewrites it differently than {build.manifest['versions']['fp8c']}"
                return [changed_model_diagnostic(message, [])]
            first = first_difference(build.graph_text(name), g.graph_text(graph, name))
            return [changed_model_diagnostic(f"the {name} graph differs", first)]
    return []


#: Operators of which a mesh's rank has as many at run time as in its plan, where rows are numbers.
_COUNTED = re.compile(r"= ((?:fp8c|_c10d_functional)\.\w+|aten\.(?:mm|addmm|bmm|baddbmm|_grouped_mm|silu)\b)")


def operators(text: str) -> Counter[str]:
    """How many quantizations, GEMMs and transfers a graph's text has, by operator."""
    return Counter(_COUNTED.findall(text))


def count_changes(before: Counter[str], now: Counter[str]) -> list[str]:
    return [
        f"{now[name]} of {name}, in the build {before[name]}"
        for name in sorted({*before, *now})
        if now[name] != before[name]
    ]


def driver_version() -> str:
    from fp8c import __version__

    return __version__


def decision_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one line each: a use that is new or gone, a size, a decision with its rule."""
    lines = [f"{key} of the build is gone" for key in before if key not in now]
    lines += [f"{key} is not in the build" for key in now if key not in before]
    for key in (k for k in before if k in now):
        for place, was, found in leaves_that_differ(before[key], now[key]):
            lines.append(f"{' '.join(filter(None, (key, place)))} is {found}, in the build {was}")
    return lines


def leaves_that_differ(before: Any, now: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        if "value" in before and "value" in now and before["value"] != now["value"]:
            by = now.get("reason", {}).get("rule", "")
            return [(place, before["value"], f"{now['value']} (rule {by})" if by else now["value"])]
        found = []
        for key in sorted({*before, *now}):
            inner = f"{place}.{key}" if place and key != "value" else key
            if key == "fields":
                inner = place
            found += leaves_that_differ(before.get(key), now.get(key), inner)
        return found
    return [] if before == now else [(place, before, now)]


def first_difference(before: str, now: str) -> list[str]:
    """The first line of two graph texts that differs; comments (source places) do not count."""
    strip = re.compile(r"\s+# .*$|device=\w+(:\d+)?")
    for a, b in zip(before.splitlines(), now.splitlines()):
        if strip.sub("", a) != strip.sub("", b):
            return [f"build: {a.strip()}", f"now:   {b.strip()}"]
    return ["one of the two is longer"]

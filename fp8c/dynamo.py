"""`torch.compile(model, backend="fp8c", options={"spec": ...})`: the graph rewrite alone.

    step = torch.compile(model, backend="fp8c", options={"spec": "deepseek_v3", "target": "h200"})
    layer.forward = torch.compile(layer.forward, backend="fp8c")            layer by layer, as under FSDP2

Limits, against `fp8c.compile`: the model is not prepared. Dynamo hands over graphs, so what has to happen to the module
before capture can't: loop-written experts stay loops (graph breaks), Hugging Face's experts keep their own
implementation, there are no FP8 weights kept between steps and no FP32 gradient accumulators. A graph may be a part of a
model, so a rule that matches nothing in it is no error, nor is a count `expect`s. Diagnostics come wrapped in Dynamo's
BackendCompilerFailed; the text is the same.
"""

from __future__ import annotations

import difflib
import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fp8c.backends.lowering import LOWERINGS
from fp8c.delayed import DelayedScales
from fp8c.diagnostics import ExitCode, fail
from fp8c.driver import Session, new_session
from fp8c.passes import check_optional

#: What `options` may hold, with the types it takes.
OPTIONS: dict[str, tuple[type, ...]] = {
    "spec": (str,),
    "target": (str,),
    "lowering": (str,),
    "without": (str,),
    "tune": (bool,),
}
DEFAULT_SPEC = "deepseek_v3"

_DELAYED = torch.ops.fp8c.quantize_delayed.default
_sessions: dict[tuple[tuple[str, Any], ...], Session] = {}


def backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None, **others: Any
) -> Callable[..., Any]:
    """The entry point `torch_dynamo_backends: fp8c`.

    options: `spec` (a name or a file), `target` (a machine; the one at hand by default), `lowering` ("reference" or
             "inductor"), `without` (optional passes to leave out, separated by commas), `tune` (as `fp8c.compile`)
    Raises:  DiagnosticError E0850 (usage) for an option it does not know or of another type; those of the spec and target
    """
    session = replace(session_for(check_options({**(options or {}), **others})), scales=DelayedScales())
    rewritten = len(session.planned)
    run = session(gm, example_inputs)
    graphs = [step.halves.forward.graph for step in session.planned[rewritten:]]
    return of_one_model(run) if any(graph.find_nodes(op="call_function", target=_DELAYED) for graph in graphs) else run


def of_one_model(run: Callable[..., Any]) -> Callable[..., Any]:
    """A graph with delayed scales, for the parameters of its first call alone: Dynamo calls one graph for all modules that
    share their code (layers compiled one by one, say), and their magnitudes must not meet in one history.

    Raises: DiagnosticError E0852 when it is called with others
    """
    first: list[weakref.ref[nn.Parameter]] = []

    @functools.wraps(run)
    def called(*args: Any) -> Any:
        parameters = [a for a in args if isinstance(a, nn.Parameter)]
        if not first:
            first[:] = map(weakref.ref, parameters)
        if any(known() is not p for known, p in zip(first, parameters)):
            raise fail(
                "E0852",
                "several modules share one compiled graph, and with it one history of delayed scales",
                help="use fp8c.compile on the whole model, or a spec with online scales",
                exit_code=ExitCode.USAGE,
            )
        return run(*args)

    return called


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, or E0850 with the nearest name. Nothing is ignored: a misspelt spec would train another recipe."""
    for name, value in options.items():
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.5)
            raise fail(
                "E0850",
                f"backend fp8c has no option '{name}'",
                help=f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(OPTIONS)}",
                exit_code=ExitCode.USAGE,
            )
        if not isinstance(value, OPTIONS[name]):
            expected = " or ".join(t.__name__ for t in OPTIONS[name])
            raise fail(
                "E0850",
                f"option '{name}' of backend fp8c is {value!r}, expected {expected}",
                exit_code=ExitCode.USAGE,
            )
    if options.get("lowering", LOWERINGS[0]) not in LOWERINGS:
        raise fail(
            "E0850",
            f"option 'lowering' of backend fp8c is {options['lowering']!r}, expected {' or '.join(map(repr, LOWERINGS))}",
            exit_code=ExitCode.USAGE,
        )
    check_optional(_names(options.get("without", "")))
    return dict(options)


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def session_for(options: Mapping[str, Any]) -> Session:
    """One session per set of options: the spec is loaded once however many graphs come."""
    key = tuple(sorted(options.items()))
    if key not in _sessions:
        given = dict(options)
        given["without"] = _names(given.get("without", ""))
        _sessions[key] = new_session(given.pop("spec", DEFAULT_SPEC), given.pop("target", None), partial=True, **given)
    return _sessions[key]

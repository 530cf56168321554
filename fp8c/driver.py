"""The drivers: `fp8c.compile` at run time, `capture_step` ahead of time, over one backend (`session.py`) and one pipeline."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import external_utils
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from fp8c import capture, pipeline
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Span, fail
from fp8c.distributed import EXPERT_PARALLEL_STATE, agree_on, watch_gradients
from fp8c.main_grad import add_main_grads, zero_main_grads
from fp8c.passes import check_optional
from fp8c.session import PlanningDone as PlanningDone
from fp8c.session import Session as Session
from fp8c.session import new_session as new_session
from fp8c.session import step_facts as step_facts
from fp8c.specs.load import Spec
from fp8c.target_record import TargetRecord
from fp8c.user_code import is_model_file, short_path


def compile(
    model: nn.Module,
    spec: str | Path | Spec = "deepseek_v3",
    target: str | TargetRecord | None = None,
    *,
    fullgraph: bool = True,
    dynamic: bool | None = None,
    lowering: str | None = None,
    without: Iterable[str] = (),
    keep_weights: bool = True,
    release_weights: bool = False,
    main_grad: bool = False,
    outputs: Iterable[str] = (),
    tune: bool = False,
    mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Compile a model's training step to a precision spec; returns a drop-in module.

    The result shares every parameter, buffer and submodule with `model`, is of the same class, has the same
    `state_dict`, and is called the same way; `loss.backward()` fills the same parameters' gradients. Inside, the spec's
    GEMMs run in FP8. Lengths may change between calls as under torch.compile.

    fullgraph: fail on a graph break (the line is named), and on a loop over experts that can't become grouped GEMMs,
               instead of compiling the pieces
    lowering:  "reference" (operator by operator, exact) or "inductor"; by default Inductor on a GPU
    keep_weights: hold the FP8 weights between calls and quantize them again only when the optimizer has changed them
               (one byte for each weight and orientation), instead of quantizing them in every forward and backward
    release_weights: keep FP8 weights from forward to backward only, and free each when backward has read it: less memory,
               and nothing is lost where every optimizer step has one micro-batch; otherwise each quantizes anew
    main_grad: accumulate every parameter's gradient in FP32, in its attribute `main_grad`, which starts at zero; `grad`
               stays None. `zero_grad()` of the compiled module sets both back; optimizers of `fp8c.optim` read it
    outputs:   the fields of the model's output that the caller reads, ("loss",) say; the others come back as None and
               need not exist: a loss whose logits nobody reads is joined with the output head. By default all fields
    tune:      measure the implementations of each GEMM at its first call (fp8c's CUDA and Triton kernels, cuBLASLt, DeepGEMM)
               and take the fastest, remembered on disk (docs/kernels.md); by default fp8c's own, whose bits depend on
               nothing measured. FP8C_GEMM in the environment stands above it
    without:   exact passes that no spec asks for, to leave out, "causal-attention" say
    mesh:      with a dimension "ep": the routed experts are sharded over it, and tokens travel to them
               (docs/expert_parallel.md)
    dynamic:   as torch.compile's; True lets the ranks of a mesh have batches of different sizes
    Raises:    DiagnosticError for a spec, target or model that can't be compiled; those that need the captured graph
               come with the first call.
    """
    from fp8c.prepare import expert_mesh, prepare

    if isinstance(model, DistributedDataParallel):
        raise fail(
            "E0867",
            "fp8c.compile got a model wrapped in DistributedDataParallel",
            help="DistributedDataParallel(fp8c.compile(model, ...))",
            exit_code=ExitCode.USAGE,
        )
    session = new_session(spec, target, lowering=lowering, partial=not fullgraph, without=check_optional(without))
    session.keep_weights, session.release_weights = keep_weights, release_weights
    session.main_grad, session.tune, session.outputs = main_grad, tune, field_names(outputs)
    if mesh is not None:
        facts = {"spec": session.spec.digest, "target": session.target.name, "versions": torch.__version__}
        agree_on(facts, sorted(torch.distributed.get_process_group_ranks(expert_mesh(mesh).get_group())))
    session.remarks += prepare(model, mesh=mesh, may_break=not fullgraph)
    if main_grad:
        add_main_grads(model)
    step = copy.copy(model)  # shares parameters, buffers and submodules; only the compiled call is its own
    if mesh is not None:
        watch_gradients(step, expert_mesh(mesh))
    attach(step, session, fullgraph=fullgraph, dynamic=dynamic)
    return step


def attach(step: nn.Module, session: Session, **options: Any) -> None:
    """Give a module its compiled call. A deep copy of it is compiled as well, never a BF16 model in disguise.

    Loops over experts that were rewritten without a batch are compared with their originals on the first training call.
    """
    from fp8c.prepare import compare_rewrites, needs_comparison

    global _steps
    call = step._call_impl
    if torch._dynamo.trace_rules.check(type(step).forward):
        call = external_utils.wrap_inline(call)  # a module of torch's own: Dynamo skips its frames unless told not to
    traced = only_fields(call, session.outputs) if session.outputs else call
    compiled = torch.compile(traced, backend=guarded(session), **options)
    _steps += 1
    plain = uncompiled(step)  # what is compared must not be the compiled module
    to_compare = needs_comparison(plain)

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal to_compare
        refuse_lost_gradients(step)
        if to_compare and step.training and torch.is_grad_enabled():
            to_compare = False
            compared = compare_rewrites(plain, *args, **kwargs)
            session.remarks[:] = [remark for remark in session.remarks if remark.code != "R0820"] + compared
        try:
            with dynamo_settings():
                return compiled(*args, **kwargs)
        except Exception as error:  # Dynamo wraps whatever a backend raises
            explained = explain_failure(error)
            if explained is error:
                raise
            raise explained from error

    def deepcopy(memo: dict[int, Any]) -> nn.Module:
        other = copy.deepcopy(uncompiled(step), memo)
        if session.main_grad:
            add_main_grads(other)  # a copy of a parameter is without attributes and hooks
        attach(other, session.fresh(), **options)
        return other

    def reduce(protocol: Any) -> Any:  # pickled is the model; compile it again after loading
        return uncompiled(step).__reduce_ex__(protocol)

    session.model = weakref.ref(step)
    weakref.finalize(step, forget_model, session).atexit = False
    step._compiled_call_impl = run
    if session.main_grad:

        def zero_grad(set_to_none: bool = True) -> None:
            type(step).zero_grad(step, set_to_none)
            zero_main_grads(step.parameters())

        step.__dict__["zero_grad"] = zero_grad
    step.__dict__["fp8c_session"] = session
    step.__dict__["__deepcopy__"] = deepcopy
    step.__dict__["__reduce_ex__"] = reduce


def refuse_lost_gradients(step: nn.Module) -> None:
    """E0867 where DistributedDataParallel would sum gradients that never come to `grad`: each rank would train alone."""
    wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is None or wrapper.process_group.size() < 2 or not torch.is_grad_enabled():
        return
    lost = next((name for name, p in step.named_parameters() if getattr(p, "main_grad", None) is not None), None)
    if lost is not None:
        raise fail(
            "E0867",
            f"'{lost}' has a main_grad, whose sum over the ranks DistributedDataParallel does not make",
            help="leave DistributedDataParallel out and let fp8c.optim.AdamW(step, zero1=mesh) sum the gradients, or "
            "compile and build the optimizer without main_grad",
            exit_code=ExitCode.USAGE,
        )


def field_names(outputs: Iterable[str]) -> tuple[str, ...]:
    """Raises: TypeError for a single string, whose letters would be taken for names."""
    if isinstance(outputs, str):
        raise TypeError(f"outputs takes names, ({outputs!r},) say")
    return tuple(outputs)


def only_fields(call: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """A model's call that returns these fields of its output: an object of the same class (transformers' ModelOutput),
    the other fields None, or a dict with these keys alone. Under Dynamo, so what is left out is never computed for it.

    Raises: TypeError for an output without named fields, KeyError for a field it does not have
    """

    def selected(*args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        if not isinstance(found, Mapping):
            raise TypeError(f"outputs={names} needs a model that returns named fields, but it returned {type(found)}")
        fields = {name: found[name] for name in names}
        return fields if type(found) is dict else type(found)(**fields)

    return selected


def uncompiled(step: nn.Module) -> nn.Module:
    """The model behind a compiled module: the same parameters, buffers and submodules, PyTorch's own call."""
    own = ("_compiled_call_impl", "zero_grad", "fp8c_session", "__deepcopy__", "__reduce_ex__", *EXPERT_PARALLEL_STATE)
    cls = type(step)
    model: nn.Module = cls.__new__(cls)
    model.__dict__.update({key: item for key, item in step.__dict__.items() if key not in own})
    return model


def guarded(session: Session) -> Callable[..., Any]:
    """The session as a backend. Dynamo keeps every backend it has seen for as long as the process lives, so this one does not
    keep the session: the compiled module does, or who traces.
    """
    found = weakref.ref(session)

    def fp8c_session(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        alive = found()
        assert alive is not None, "a module was captured after its session was freed"
        return alive(gm, example_inputs)

    return fp8c_session


def forget_model(session: Session) -> None:
    """Let go of a model's memory when it is gone: PyTorch keeps compiled code, and with it the session, to the end."""
    session.weights.clear()
    session.examples = []


def weights_changed(step: nn.Module) -> None:
    """Say that parameters were written behind PyTorch's back (`p.data.copy_(...)`): their FP8 copies are made again."""
    session_of(step).weights.invalidate()


def session_of(step: nn.Module) -> Session:
    """The session behind a compiled module: plans, counts, remarks. Raises TypeError for any other module."""
    session = step.__dict__.get("fp8c_session")
    if not isinstance(session, Session):
        raise TypeError(f"{type(step).__name__} was not returned by fp8c.compile")
    return session


def capture_step(step: nn.Module, batch: Any, session: Session) -> pipeline.Rewritten:
    """Ahead of time: capture `step(batch)`, rewrite and partition it, and stop before lowering.

    A module and batch on the meta device are given fake tensors in place.
    Raises: DiagnosticError for a graph break or a model that raises.
    """
    trace_step(step, batch, session)
    if not session.steps:
        raise DiagnosticError(
            [
                Diagnostic(
                    "E0832",
                    "the step was captured without a backward: its loss needs no gradient",
                    help="make at least one parameter require gradients, and return a loss that depends on it",
                )
            ],
            ExitCode.MODEL,
        )
    return session.steps[-1]


def trace_step(step: nn.Module, batch: Any, session: Session) -> None:
    """Call `step(batch)` under the session's backend until it has planned; nothing is lowered.

    Raises: DiagnosticError for a graph break or a model that raises.
    """
    session.plan_only = True
    batch = capture.fake_on_cpu(step, batch)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=guarded(session), fullgraph=True, dynamic=False)
    try:
        with without_collection(), dynamo_settings():
            compiled(batch)
    except Exception as error:  # Dynamo wraps whatever a backend raises
        if not any(isinstance(e, PlanningDone) for e in causes(error)):
            raise explain_failure(error) from error


_steps = 0  # compiled so far in this process


def dynamo_settings() -> contextlib.AbstractContextManager[Any]:
    """Numbers read from tensors become sizes of the graph: how many rows each rank sends.

    Dynamo allows so many graphs of one piece of code, and models of one class are one: every compiled step gets that many.
    No graph holds a call of a logger. What transformers' models remark once (`logger.warning_once`) is left out of it from PyTorch 2.12 on; other
    logging of a model's own is its author's to decide on, and stays a graph break.
    """
    config: Any = torch._dynamo.config
    limits = ("recompile_limit", "accumulated_recompile_limit")
    changed: dict[str, Any] = {name: getattr(config, name) * _steps for name in limits} if _steps > 1 else {}
    if (
        torch.__version__ >= "2.12"
    ):  # 2.11 writes its settings as JSON, which functions are not, and says so at each graph
        once = (getattr(logging.Logger, name, None) for name in ("warning_once", "info_once"))
        ignored = {method for method in once if method is not None}
        changed["ignore_logging_functions"] = ignored | config.ignore_logging_functions
    patched: contextlib.AbstractContextManager[Any] = config.patch(capture_scalar_outputs=True, **changed)
    return patched


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No cyclic garbage collection: a large capture only allocates, and each full collection walks millions of objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def causes(error: BaseException | None) -> list[BaseException]:
    """The exception, its inner exception (Dynamo) and everything it was raised from."""
    found: list[BaseException] = []
    frontier = [error]
    while frontier:
        e = frontier.pop()
        if e is None or e in found:
            continue
        found.append(e)
        frontier += [getattr(e, "inner_exception", None), e.__cause__, e.__context__]
    return found


def explain_failure(error: Exception) -> Exception:
    """A DiagnosticError for what a model can break; the error itself when it is not one of those."""
    for e in causes(error):
        if isinstance(e, DiagnosticError):
            return e
    for e in causes(error):
        if isinstance(e, (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
            return DiagnosticError([graph_break(e)], ExitCode.MODEL)
    return error


#: What PyTorch says of a grouped GEMM in another type.
_NOT_BF16 = re.compile(r"Expected inputs of BF16 type but got mat_a\.dtype=torch\.(\w+)")


def graph_break(error: Exception) -> Diagnostic:
    """E0833: what Dynamo could not capture, at the model's line, with the usual fix; E0803: the model raised."""
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    stack = getattr(error, "real_stack", None) or []
    span = None
    for frame in reversed(list(stack)):
        if is_model_file(frame.filename):
            span = Span(short_path(frame.filename), frame.lineno or 0, text=(frame.line or "").strip())
            break
    raised = re.search(r"raised exception (.+)", text)
    if raised:
        # PyTorch 2.11 has ValueError([ConstantVariable(str: 'text')]).
        what = re.sub(r"ConstantVariable\(\w+: ('(?:[^'\\]|\\.)*'|\"[^\"]*\"|[^()]*)\)", r"\1", raised[1].strip())
        what = re.sub(r"^(\w+)\(\[(.*)\]\)$", r"\1(\2)", what)
        return Diagnostic("E0803", f"the model raised {what}", span)
    dtype = next((m[1] for m in (_NOT_BF16.search(str(e)) for e in causes(error)) if m), None)
    if dtype is not None:
        message = f"PyTorch captures the grouped GEMMs of experts in BF16 only, and here they read {dtype}"
        help = "make the model in BF16 (dtype=torch.bfloat16), or call the step under torch.autocast(device, torch.bfloat16)"
        return Diagnostic("E0833", message, span, help=help)
    if span is not None and span.text.startswith("for ") and "data-dependent" in first:
        return Diagnostic(
            "E0833",
            "graph break: how often this loop runs depends on data",
            span,
            help="a loop over experts becomes grouped GEMMs when it is written in a form of the page on models; "
            "fullgraph=False compiles the pieces around any other",
        )
    if "functorch" in first:
        first += ": torch.func and vmap cannot go through a compiled step"
    hint = next((line.split("Hint:", 1)[1].strip() for line in text.splitlines() if "Hint:" in line), "")
    return Diagnostic(
        "E0833",
        f"graph break: {first}",
        span,
        help=hint or "keep data-dependent Python control flow out of the step, or pass fullgraph=False",
    )

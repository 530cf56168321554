"""The drivers: `fp8c.compile` at run time, `plan_step` ahead of time, over one backend and one pipeline.

`Session` is the AOTAutograd backend of one compiled model: Dynamo's guards, recompiles and dynamic shapes stay as users
know them, and no global Inductor option is touched.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import hashlib
import json
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import external_utils
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.distributed.device_mesh import DeviceMesh

import fp8c.ops  # noqa: F401  (defines the operators)
from fp8c import capture, pipeline
from fp8c import graph as g
from fp8c.backends import lowering
from fp8c.backends.beside import compile_beside
from fp8c.backends.costs import load_machine, machine_names
from fp8c.backends.gemms import choice
from fp8c.backends.target import load_target
from fp8c.baseline import Baseline
from fp8c.delayed import DelayedScales
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity, Span
from fp8c.distributed import (
    EXPERT_PARALLEL_STATE,
    agree_on,
    explaining_lost_ranks,
    gradients_noted,
    watch_gradients,
)
from fp8c.graph import portable_hash
from fp8c.graph_costs import is_collective, members_of
from fp8c.kept_weights import Chain, WeightStore, reason_not_to_keep, run_with_kept, split_weights
from fp8c.main_grad import add_main_grads, is_sharded_expert, run_with_accumulators, split_gradients, zero_main_grads
from fp8c.passes import check_optional
from fp8c.specs.load import Spec, load
from fp8c.specs.plan import PrecisionPlan
from fp8c.specs.resolve import resolve
from fp8c.step_cache import Compiler, LoweredHalf, remembering
from fp8c.structured_trace import TraceObserver, trace_summary
from fp8c.target_record import TargetRecord
from fp8c.user_code import is_model_file, short_path

log = logging.getLogger("fp8c")


class PlanningDone(Exception):
    """Stops the capture once the step is planned: nothing is lowered ahead of time."""


@dataclass
class Session:
    """The backend of one compiled model.

    partial: the graphs may be parts of a model (graph breaks, layers compiled one by one), so a rule that matches
             nothing in one of them is no error
    without: optional passes left out
    tune: give each GEMM to the implementation that was measured to be the fastest
    keep_weights: quantize a weight once for each value it has, not in every forward and backward
    release_weights: backward gives the kept weights' memory back as it reads them
    main_grad: backward adds weight gradients to the parameters' FP32 `main_grad`
    outputs: fields of the model's output that the compiled call returns; all of them where empty
    model:   the compiled module, for these two
    scales:  histories of delayed scales; their `state_dict()` belongs into a checkpoint
    """

    spec: Spec
    target: TargetRecord
    lowering: str | None = None
    partial: bool = False
    plan_only: bool = False
    observers: tuple[pipeline.Observer, ...] = ()
    verify_each: bool = True
    without: frozenset[str] = frozenset()
    tune: bool = False
    keep_weights: bool = False
    release_weights: bool = False
    main_grad: bool = False
    outputs: tuple[str, ...] = ()
    remarks: list[Diagnostic] = field(default_factory=list)
    planned: list[pipeline.Rewritten] = field(default_factory=list)
    unplanned: list[Callable[[], None]] = field(default_factory=list)  # steps from the cache that nobody has asked for
    on_joint: Callable[[], None] | None = None  # called when the joint graph is captured, before it is rewritten
    want_baseline: bool = False
    examples: list[Any] = field(default_factory=list)  # what the inputs of the last captured graph were
    baseline: Baseline | None = None
    weights: WeightStore = field(default_factory=WeightStore)
    scales: DelayedScales = field(default_factory=DelayedScales)
    model: weakref.ref[nn.Module] | None = None

    def fresh(self) -> Session:
        """The same settings for another model: nothing captured yet."""
        own: dict[str, Any] = {"remarks": [], "planned": [], "unplanned": [], "model": None}
        return replace(self, **own, weights=WeightStore(), scales=DelayedScales())

    @property
    def steps(self) -> list[pipeline.Rewritten]:
        """What was rewritten, graph by graph. A step that came from the cache is planned when it is asked for."""
        while self.unplanned:
            self.unplanned.pop(0)()
        return self.planned

    def resolve(self, uses: Sequence[Any]) -> PrecisionPlan:
        plan = resolve(self.spec, uses, self.target, partial=self.partial)
        return plan

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Dynamo's backend: differentiate, rewrite, lower."""
        device = _device(example_inputs)
        how = self.lowering or lowering.choose_lowering(device)
        if not self.plan_only:
            lowering.start_compilers(device, how)
        names = capture.input_names(gm)
        self.examples = capture.input_examples(gm)
        if self.want_baseline:
            self.baseline = Baseline(gm, example_inputs)
        for done in capture.prepare_forward(gm):
            log.info("%s", done)
        lowering.register_kernels(device)
        how_beside = how if device == "cuda" else ""
        if not self._remembers(how):
            return self._differentiate(gm, example_inputs, names, how, how_beside)
        restored: list[LoweredHalf] = []

        def restore(half: LoweredHalf) -> None:
            self._bind(half)
            restored.append(half)

        planned = len(self.planned)
        with remembering(self.identity(names), gm, restore) as cacheable:
            step = self._differentiate(gm, example_inputs, names, how, how_beside, cacheable)
        if restored and len(self.planned) == planned:
            self._note(restored[0].remarks)
            if not restored[0].is_inference:
                values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
                self.unplanned.append(functools.partial(self._plan_again, gm, values, names))
        return step

    def _differentiate(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        names: tuple[str, ...],
        how: str,
        how_beside: str,
        cacheable: Callable[[Compiler], Compiler] = lambda compiler: compiler,
    ) -> Callable[..., Any]:
        backend = aot_autograd(
            fw_compiler=cacheable(functools.partial(self._lower_half, how=how)),
            bw_compiler=cacheable(functools.partial(self._lower_half, how=how, releases=self.release_weights)),
            inference_compiler=cacheable(functools.partial(self._infer, names=names, how=how)),
            partition_fn=functools.partial(self._partition, names=names, how=how_beside),
            decompositions={},
            keep_inference_input_mutations=True,
        )
        step: Callable[..., Any] = backend(gm, inputs)
        return step

    def _plan_again(self, gm: fx.GraphModule, values: Sequence[Any], names: tuple[str, ...]) -> None:
        """Rewrite a graph whose halves came from the cache, for somebody who wants to see what was done."""
        planner = replace(self.fresh(), plan_only=True, model=self.model)
        with tracing(TracingContext(detect_fake_mode(values))), contextlib.suppress(PlanningDone):
            planner._differentiate(gm, values, names, "reference", "")
        self.planned += planner.planned

    def _remembers(self, how: str) -> bool:
        """Whether compiled steps are kept for other processes: those that Inductor makes, and nobody watches being made."""
        return how == "inductor" and not (self.plan_only or self.observers or self.want_baseline or self.on_joint)

    def identity(self, names: Sequence[str]) -> dict[str, Any]:
        """What a step depends on besides its graph and the types of its inputs."""
        module = self.model() if self.model is not None else None
        parameters = [] if module is None else list(module.named_parameters())
        return {
            "inputs": names,
            "spec": self.spec.digest,
            "target": self.target.name,
            "without": sorted(self.without),
            "partial": self.partial,
            "keep_weights": self._keeps_weights(),
            "release_weights": self.release_weights,
            "main_grad": self.main_grad and [name for name, p in parameters if is_sharded_expert(p)],
        }

    def _note(self, remarks: Iterable[Diagnostic]) -> None:
        self.remarks += [r for r in remarks if r not in self.remarks]

    def _partition(
        self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, names: tuple[str, ...], how: str, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if self.on_joint is not None:
            self.on_joint()
        rewritten = pipeline.rewrite_and_partition(
            joint,
            names,
            num_fwd_outputs,
            self.resolve,
            target=self.target,
            machine=load_machine(self.target.name) if self.target.name in machine_names() else None,
            observers=(*self.observers, TraceObserver()),
            verify_each=self.verify_each,
            without=self.without,
        )
        trace_summary(rewritten.plan, rewritten.records)
        self.planned.append(rewritten)
        self._note(rewritten.ctx.remarks)
        if self.plan_only:
            raise PlanningDone
        if communicates(joint.graph):
            module = self.model() if self.model is not None else None
            agree_on(step_facts(rewritten, module is None or owns_evenly(module)), members_of(joint.graph))
        if how == "inductor":
            halves = (rewritten.halves.forward, rewritten.halves.backward)
            compile_beside([(split_gradients(h)[0] if self.main_grad else h).graph for h in halves], self.target)
        return rewritten.halves.forward, rewritten.halves.backward

    def _lower_half(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        how: str,
        releases: bool = False,
        is_inference: bool = False,
    ) -> LoweredHalf:
        """Lower a half. With `keep_weights` the quantized weights come in from outside, with `main_grad` the accumulators."""
        module = self.model() if self.model is not None else None
        names: dict[str, int] = {}
        if self.main_grad and module is not None and not is_inference:
            sharded = {g.canonical_path(n) for n, p in module.named_parameters() if is_sharded_expert(p)}
            gm, names = split_gradients(gm, sharded)
        inputs = [*inputs, *(n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")[len(inputs) :])]
        chains: list[Chain] = []
        if self._keeps_weights():
            gm, chains = split_weights(gm)
            inputs = [*inputs, *(n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")[len(inputs) :])]
        half = LoweredHalf(
            run=self._lower_with_scales(gm, inputs, how=how, is_inference=is_inference),
            chains=tuple(chains),
            releases=releases,
            accumulators=names,
            is_inference=is_inference,
            remarks=() if is_inference or not self.planned else tuple(self.planned[-1].ctx.remarks),
            communicates=communicates(gm.graph),
        )
        self._bind(half)
        return half

    def _bind(self, half: LoweredHalf) -> None:
        """Put a half behind what belongs to this session: its policy, its weights, its module's accumulators."""
        run = self._tuned(half.run)
        if half.communicates:
            run = explaining_lost_ranks(run)
        if half.chains:
            run = run_with_kept(run, half.chains, self.weights, half.releases)
        if half.accumulators:
            module = self.model() if self.model is not None else None
            assert module is not None
            run = run_with_accumulators(run, half.accumulators, module, gradients_noted(module))
        half.bound = run

    def _tuned(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Backward runs in a thread of autograd's, so the policy goes with the half, not with the caller."""
        return choice.under(choice.MEASURE, run) if self.tune else run

    def _lower_with_scales(
        self, gm: fx.GraphModule, inputs: Sequence[Any], *, how: str, is_inference: bool = False
    ) -> Callable[..., Any]:
        """Histories of delayed scales live outside of the graph, so a graph that reads them runs as it is written."""
        if not gm.graph.find_nodes(op="call_function", target=torch.ops.fp8c.quantize_delayed.default):
            return lowering.lower(gm, inputs, how, is_inference=is_inference)
        return self.scales.around(lowering.lower(gm, inputs, "reference"))

    def _keeps_weights(self) -> bool:
        module = self.model() if self.model is not None else None
        if not self.keep_weights or module is None:
            return False
        reason = reason_not_to_keep(module)
        if reason:
            remark = Diagnostic("R0842", f"weights are quantized in every step: {reason}", severity=Severity.REMARK)
            self.remarks += [] if remark in self.remarks else [remark]
        return not reason

    def _infer(self, gm: fx.GraphModule, inputs: Sequence[Any], *, names: tuple[str, ...], how: str) -> LoweredHalf:
        rewritten = pipeline.rewrite_inference(
            gm, names, self.resolve, target=self.target, observers=self.observers, without=self.without
        )
        return self._lower_half(rewritten, inputs, how=how, is_inference=True)


def step_facts(rewritten: pipeline.Rewritten, owns_evenly: bool) -> dict[str, str]:
    """What ranks that exchange something have to share; without sizes where some own fewer experts than others."""
    halves = rewritten.halves
    hashes = (portable_hash(half.graph, has_sizes=owns_evenly) for half in (halves.forward, halves.backward))
    plan = rewritten.plan.to_json()
    if not owns_evenly:
        for use in plan["uses"].values():
            use.pop("shape", None)
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    return {"graph": " ".join(hashes), "plan": digest}


def owns_evenly(module: nn.Module) -> bool:
    """Whether every rank has as many experts as the others, in every layer."""
    ranks = (part.__dict__.get("fp8c_ranks") for part in module.modules())
    return all(len(set(found.owned)) == 1 for found in ranks if found is not None)


def communicates(graph: fx.Graph) -> bool:
    return any(is_collective(node) for node in graph.nodes)


def _device(inputs: Sequence[Any]) -> str:
    return next((t.device.type for t in inputs if isinstance(t, torch.Tensor)), "cpu")


def default_target() -> str:
    """The machine at hand, or the CPU reference."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        for known in ("h200", "h800", "h100", "b200"):
            if known in name:
                return known
        major, _ = torch.cuda.get_device_capability()
        return {9: "h100", 10: "b200"}.get(major, "cpu")
    return "cpu"


def new_session(
    spec: str | Path | Spec = "deepseek_v3", target: str | TargetRecord | None = None, **options: Any
) -> Session:
    """Load spec and target once. Raises: DiagnosticError for either."""
    loaded = spec if isinstance(spec, Spec) else load(spec)
    record = target if isinstance(target, TargetRecord) else load_target(target or default_target())
    return Session(loaded, record, **options)


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

    fullgraph: fail on a graph break (the line is named) instead of compiling the pieces
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
    Raises:    DiagnosticError for a spec, target or model that can't be compiled; those that need the captured graph
               come with the first call.
    """
    from fp8c.prepare import expert_mesh, prepare

    session = new_session(spec, target, lowering=lowering, partial=not fullgraph, without=check_optional(without))
    session.keep_weights, session.release_weights = keep_weights, release_weights
    session.main_grad, session.tune, session.outputs = main_grad, tune, field_names(outputs)
    if mesh is not None:
        facts = {"spec": session.spec.digest, "target": session.target.name, "versions": torch.__version__}
        agree_on(facts, sorted(torch.distributed.get_process_group_ranks(expert_mesh(mesh).get_group())))
    session.remarks += prepare(model, mesh=mesh)
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

    call = step._call_impl
    if torch._dynamo.trace_rules.check(type(step).forward):
        call = external_utils.wrap_inline(call)  # a module of torch's own: Dynamo skips its frames unless told not to
    traced = only_fields(call, session.outputs) if session.outputs else call
    compiled = torch.compile(traced, backend=guarded(session), **options)
    plain = uncompiled(step)  # what is compared must not be the compiled module
    to_compare = needs_comparison(plain)

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal to_compare
        if to_compare and step.training and torch.is_grad_enabled():
            to_compare = False
            compared = compare_rewrites(plain, *args, **kwargs)
            session.remarks[:] = [remark for remark in session.remarks if remark.code != "R0820"] + compared
        try:
            with capturing_sizes():
                return compiled(*args, **kwargs)
        except Exception as error:  # Dynamo wraps whatever a backend raises
            explained = explain_failure(error)
            if explained is error:
                raise
            raise explained from error

    def deepcopy(memo: dict[int, Any]) -> nn.Module:
        other = copy.deepcopy(uncompiled(step), memo)
        attach(other, session.fresh(), **options)
        return other

    def reduce(protocol: Any) -> Any:  # pickled is the model; compile it again after loading
        return uncompiled(step).__reduce_ex__(protocol)

    session.model = weakref.ref(step)
    step._compiled_call_impl = run
    if session.main_grad:

        def zero_grad(set_to_none: bool = True) -> None:
            type(step).zero_grad(step, set_to_none)
            zero_main_grads(step)

        step.__dict__["zero_grad"] = zero_grad
    step.__dict__["fp8c_session"] = session
    step.__dict__["__deepcopy__"] = deepcopy
    step.__dict__["__reduce_ex__"] = reduce


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
    """The session as a backend whose diagnostics reach the caller as they are."""

    @functools.wraps(session.__call__)
    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return session(gm, example_inputs)

    return backend


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
        with without_collection(), capturing_sizes():
            compiled(batch)
    except Exception as error:  # Dynamo wraps whatever a backend raises
        if not any(isinstance(e, PlanningDone) for e in causes(error)):
            raise explain_failure(error) from error


def capturing_sizes() -> contextlib.AbstractContextManager[Any]:
    """Numbers read from tensors become sizes of the graph: how many rows each rank sends."""
    patched: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(capture_scalar_outputs=True)
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
        return Diagnostic("E0803", f"the model raised {raised[1].strip()}", span)
    hint = next((line.split("Hint:", 1)[1].strip() for line in text.splitlines() if "Hint:" in line), "")
    return Diagnostic(
        "E0833",
        f"graph break: {first}",
        span,
        help=hint or "keep data-dependent Python control flow out of the step, or pass fullgraph=False",
    )

"""A session: the AOTAutograd backend of one compiled model, from Dynamo's graph to halves that run.

Dynamo's guards, recompiles and dynamic shapes stay as users know them, and no global Inductor option is touched.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, detect_fake_mode, tracing

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
from fp8c.diagnostics import Diagnostic, Severity
from fp8c.distributed import agree_on, explaining_lost_ranks, gradients_noted
from fp8c.graph import portable_hash
from fp8c.graph_costs import is_collective, members_of
from fp8c.kept_weights import WeightStore, reason_not_to_keep, run_with_kept, split_weights
from fp8c.main_grad import is_sharded_expert, run_with_accumulators, split_gradients
from fp8c.specs.load import Spec, load
from fp8c.specs.plan import PrecisionPlan
from fp8c.specs.resolve import resolve
from fp8c.step_cache import Compiler, LoweredHalf, remembering
from fp8c.structured_trace import TraceObserver, trace_summary
from fp8c.target_record import TargetRecord

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
    examples: list[Any] = field(default_factory=list)  # inputs of the last captured graph, tensors by weak reference
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
            bw_compiler=cacheable(
                functools.partial(self._lower_half, how=how, releases=self.release_weights, is_backward=True)
            ),
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
        """Whether compiled steps are kept for other processes: those that Inductor makes, and nobody watches being made.

        A kind of session of its own has to say itself, in `identity`, what its steps depend on.
        """
        is_watched = self.plan_only or self.observers or self.want_baseline or self.on_joint
        return how == "inductor" and not is_watched and "identity" in vars(type(self))

    def identity(self, names: Sequence[str]) -> dict[str, Any]:
        """What a step depends on besides its graph and the types of its inputs; values for json."""
        module = self.model() if self.model is not None else None
        parameters = [] if module is None else list(module.named_parameters())
        return {
            "inputs": names,
            "spec": self.spec.digest,
            "target": {name: sorted(v) if isinstance(v, frozenset) else v for name, v in asdict(self.target).items()},
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
            partial=self.partial,
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
        # A copy: AOTAutograd pickles the backward half into its cache, and takes what is known of the nodes away for it.
        backward = rewritten.halves.backward
        return rewritten.halves.forward, fx.GraphModule(backward, g.copy_graph(backward.graph))

    def _lower_half(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        how: str,
        releases: bool = False,
        is_backward: bool = False,
        is_inference: bool = False,
    ) -> LoweredHalf:
        """Lower a half. With `keep_weights` the quantized weights come in from outside, with `main_grad` the accumulators."""
        module = self.model() if self.model is not None else None
        names: dict[str, int] = {}
        if self.main_grad and module is not None and not is_inference:
            sharded = {g.canonical_path(n) for n, p in module.named_parameters() if is_sharded_expert(p)}
            gm, names = split_gradients(gm, sharded)
        gm, chains = split_weights(gm) if self._keeps_weights() else (gm, [])
        inputs = [*inputs, *(n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")[len(inputs) :])]
        half = LoweredHalf(
            run=self._lower(gm, inputs, how=how, is_inference=is_inference),
            chains=tuple(chains),
            releases=releases,
            accumulators=names,
            is_backward=is_backward,
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
        if half.chains or (half.is_backward and self._keeps_weights()):
            run = run_with_kept(run, half.chains, self.weights, half.releases, is_backward=half.is_backward)
        if half.accumulators:
            module = self.model() if self.model is not None else None
            assert module is not None
            run = run_with_accumulators(run, half.accumulators, module, gradients_noted(module))
        half.bound = run

    def _tuned(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Backward runs in a thread of autograd's, so the policy goes with the half, not with the caller."""
        return choice.under(choice.MEASURE, run) if self.tune else run

    def _lower(
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

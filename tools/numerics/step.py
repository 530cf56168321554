"""One captured training step, run operator by operator on real batches: in BF16 as captured, and as a spec rewrites it.

Every quantized value carries its *shadow* through the rewritten graph: the value it was quantized from, moved the same
way (transposed, gathered, sent, kept for backward). Where a GEMM reads an operand, what it reads stands beside what it
was meant to read, whatever lies between. A `Reader` sees each such reading and may replace it.

Routing is replayed: experts are chosen as the BF16 run chose them, or the two runs would compare different tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch._functorch import partitioners

import fp8c.backends.reference  # noqa: F401  (registers the CPU kernels)
from fp8c import driver, pipeline
from fp8c import graph as g
from fp8c.backends.reference.quantize import dequantize_f32, expert_ranges
from fp8c.backends.target import load_target
from fp8c.diagnostics import ExitCode, fail
from fp8c.formats import Format
from fp8c.models import LoadedModel
from fp8c.ops import stored_rows
from fp8c.pass_manager import PassContext, PassManager
from fp8c.passes import ROLES
from fp8c.passes.assign_roles import GemmRole, activation_of
from fp8c.pipeline import Rewritten
from fp8c.roles import OPERANDS
from fp8c.specs.load import Spec, load
from fp8c.specs.resolve import resolve
from fp8c.target_record import TargetRecord
from fp8c.verifier import SCALED

ops = torch.ops.fp8c
aten = torch.ops.aten


class Part(NamedTuple):
    """One quantized value as one reader sees it: `layers.0.up`, `fprop`, `x`; a copy kept for backward has `cache`."""

    use: str
    gemm: str
    operand: str

    def __str__(self) -> str:
        return f"{self.use} {self.gemm}.{self.operand}"


@dataclass(frozen=True)
class Reading:
    """What a GEMM reads and what it was meant to read, both FP32 and in the operand's own layout.

    payload, scale: the data and scales as they arrive;  roundings: how often the value was quantized on its way
    offs: the experts' row ends where the scales restart at each of them, else None
    """

    part: Part
    format: Format
    value: Tensor
    shadow: Tensor
    payload: Tensor
    scale: Tensor
    roundings: int = 1
    offs: Tensor | None = None


class Reader(Protocol):
    def __call__(self, reading: Reading) -> Tensor | None:
        """The value to compute with instead, or None to leave the operator as it is."""
        ...


def read_as_is(reading: Reading) -> None:
    return None


@dataclass(frozen=True)
class Shadow:
    value: Tensor
    roundings: int


@dataclass(frozen=True)
class RunResult:
    """Loss, gradients by parameter, and the output of every GEMM by (use, gemm), in the order they ran."""

    loss: float
    gradients: dict[str, Tensor]
    outputs: dict[tuple[str, str], Tensor]
    operands: dict[Part, Tensor] = field(default_factory=dict)
    routing: dict[str, Tensor] = field(default_factory=dict)
    quantized: frozenset[tuple[str, str]] = frozenset()  # GEMMs that read quantized operands
    rerouted: float = 0.0  # share of the choices of experts that this run would have made otherwise


# --- capture ----------------------------------------------------------------------------------------------------------


class _Recorded(Exception):
    """Ends a call once its inputs are known."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values


@dataclass
class _Recorder(driver.Session):
    joint: fx.GraphModule | None = None
    names: tuple[str, ...] = ()
    num_fwd_outputs: int = 0

    def _partition(self, joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.joint = fx.GraphModule(joint, g.copy_graph(joint.graph))
        self.names, self.num_fwd_outputs = options["names"], options["num_fwd_outputs"]
        return partitioners.default_partition(joint, inputs, num_fwd_outputs=self.num_fwd_outputs)

    def _lower(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        def record(values: list[Any]) -> Any:
            raise _Recorded(list(values))

        record._boxed_call = True  # type: ignore[attr-defined]
        return record


class CapturedStep:
    """A step's joint graph with its real inputs; rewrites and runs it as often as wanted."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Capture the prepared model's step. Raises: DiagnosticError for a graph break, a model that raises, E0832."""
        self.loaded = loaded
        self._session = _Recorder(load("bf16"), load_target("cpu"))
        torch._dynamo.reset()
        self._compiled = torch.compile(
            loaded.step(), backend=driver.guarded(self._session), fullgraph=True, dynamic=False
        )
        self.inputs(loaded.example_inputs)
        assert self._session.joint is not None
        self.joint = self._session.joint
        self.num_fwd_outputs = self._session.num_fwd_outputs
        self._placeholders = [n for n in self.joint.graph.nodes if n.op == "placeholder"]
        self.roles, self.context = self._assign_roles()
        self.x_first = _x_first(self.roles)

    def inputs(self, batch: Any) -> list[Any]:
        """The graph's inputs for one batch: parameters, buffers and data, in order."""
        try:
            self._compiled(batch)
        except _Recorded as recorded:
            return recorded.values
        except Exception as error:
            explained = driver.explain_failure(error)
            raise explained if explained is error else explained from error
        raise fail(
            "E0832",
            "the step was captured without a backward: its loss needs no gradient",
            help="make at least one parameter require gradients",
            exit_code=ExitCode.MODEL,
        )

    def _assign_roles(self) -> tuple[fx.Graph, PassContext]:
        from fp8c import capture
        from fp8c.partition import trained_inputs

        context = PassContext(
            inputs=capture.joint_input_names(self.joint, self._session.names),
            trained=trained_inputs(self.joint, self.num_fwd_outputs),
            num_fwd_outputs=self.num_fwd_outputs,
        )
        graph = PassManager({}, False).run(self.joint.graph, [ROLES], context)
        return graph, context

    def rewrite(self, spec: Spec, target: TargetRecord) -> Rewritten:
        """The step under a spec. Raises: DiagnosticError for what spec or target can't do."""
        return pipeline.rewrite_and_partition(
            self.joint,
            self._session.names,
            self.num_fwd_outputs,
            lambda uses: resolve(spec, uses, target),
            target=target,
            without=frozenset({"fuse-head-loss"}),  # every GEMM's result is looked at, the head's too
        )

    def run_bf16(self, inputs: Sequence[Any]) -> RunResult:
        """The step as captured, with every GEMM's operands and the routing."""
        interpreter = _Bf16Interpreter(fx.GraphModule(self.joint, self.roles), self.x_first)
        with _undisturbed():
            results = interpreter.run(*self._with_tangents(inputs), enable_io_processing=False)
        loss, gradients = self._split(list(results))
        return RunResult(loss, gradients, interpreter.outputs, interpreter.operands, interpreter.routing)

    def run(
        self,
        rewritten: Rewritten,
        inputs: Sequence[Any],
        reader: Reader = read_as_is,
        routing: Mapping[str, Tensor] | None = None,
    ) -> RunResult:
        """The rewritten step, forward and backward half, under a reader and with the routing of another run."""
        state = _State(reader, dict(routing or {}), self.x_first, _cached_parts(rewritten))
        halves = rewritten.halves
        known = dict(zip((n.name for n in self._placeholders), self._with_tangents(inputs)))
        with _undisturbed():
            forward = _Interpreter(halves.forward, state)
            results = list(
                forward.run(*(known[name] for name in _inputs_of(halves.forward)), enable_io_processing=False)
            )
            outputs = g.output_node(halves.forward.graph).args[0]
            assert isinstance(outputs, (list, tuple))
            known |= {n.name: v for n, v in zip(outputs, results) if isinstance(n, fx.Node)}
            backward = _Interpreter(halves.backward, state)
            gradients = backward.run(*(known[name] for name in _inputs_of(halves.backward)), enable_io_processing=False)
        loss, by_name = self._split([*results[: self.num_fwd_outputs], *gradients])
        rerouted = state.rerouted / state.routed if state.routed else 0.0
        return RunResult(loss, by_name, state.outputs, quantized=frozenset(state.quantized), rerouted=rerouted)

    def _with_tangents(self, inputs: Sequence[Any]) -> list[Any]:
        tangents = [n for n in self._placeholders if str(n.target).startswith("tangents")]
        if len(tangents) != 1 or len(self._placeholders) != len(inputs) + 1:
            raise AssertionError(f"expected one tangent, found {len(tangents)}")
        val = g.value(tangents[0])
        return [*inputs, torch.ones(val.shape, dtype=val.dtype)]

    def _split(self, results: list[Any]) -> tuple[float, dict[str, Tensor]]:
        count = self.num_fwd_outputs
        scalars = [t for t in results[:count] if isinstance(t, Tensor) and t.numel() == 1 and t.is_floating_point()]
        gradients = {
            self.context.input_name(node): value
            for node, value in zip(self._placeholders, results[count:])
            if isinstance(value, Tensor) and self.context.is_parameter(node)
        }
        return float(scalars[-1]), gradients


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No autograd, and the same random numbers in every run."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _inputs_of(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.find_nodes(op="placeholder")]


def _x_first(graph: fx.Graph) -> dict[str, bool]:
    """For each use whether its wgrad has x on the left (dW = X^T dY), found as insert-quantize finds it."""
    gradients = g.gradients(graph)
    found = {}
    for node in g.calls(graph, g.GEMMS):
        role = node.meta.get(g.ROLE)
        if isinstance(role, GemmRole) and role.gemm == "wgrad":
            left = node.args[0]
            assert isinstance(left, fx.Node)
            found[role.use] = g.behind_transposes(left)[0] not in gradients
    return found


def _cached_parts(rewritten: Rewritten) -> dict[str, Part]:
    """Values that cross to backward compressed, by the name of their data: which use made them."""
    found = {}
    for node in rewritten.halves.saved():
        source = node.args[0] if node.op == "call_function" and node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source.target is ops.quantize.default:
            role = node.meta.get(g.ROLE)
            found[node.name] = Part(role.use if role is not None else node.name, "cache", "out")
    return found


# --- runs -------------------------------------------------------------------------------------------------------------


def _topk(routing: Mapping[str, Tensor], node: fx.Node, own: Any, args: Sequence[Any]) -> tuple[Any, int, int]:
    """(result, choices, choices that differ): the recorded choice with this run's own values at it."""
    recorded = routing.get(node.name)
    if recorded is None or recorded.shape != own[1].shape:
        return own, 0, 0
    dim = args[2] if len(args) > 2 else -1
    same = (
        (own[1].unsqueeze(-1) == recorded.unsqueeze(-2)).any(-1)
        if dim in (-1, own[1].dim() - 1)
        else own[1] == recorded
    )
    return (args[0].gather(dim, recorded), recorded), same.numel(), int((~same).sum())


class _Bf16Interpreter(fx.Interpreter):
    """Runs the joint graph and keeps each GEMM's operands, in the layout in which a scaled GEMM reads them."""

    def __init__(self, gm: fx.GraphModule, x_first: Mapping[str, bool]) -> None:
        super().__init__(gm)
        self.x_first = x_first
        self.operands: dict[Part, Tensor] = {}
        self.outputs: dict[tuple[str, str], Tensor] = {}
        self.routing: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.op != "call_function":
            return out
        if n.target is aten.topk.default:
            self.routing[n.name] = out[1]
        role = n.meta.get(g.ROLE)
        if n.target in g.GEMMS and isinstance(role, GemmRole) and role.gemm:
            names = operand_names(role.use, role.gemm, self.x_first)
            left = activation_of(n) if role.gemm != "wgrad" else n.args[0]
            right = n.args[2] if n.target is aten.addmm.default else n.args[1]
            assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
            self.operands[names[0]] = self.env[left]
            self.operands[names[1]] = self.env[right].mT
            self.outputs[role.use, role.gemm] = out
        return out


def operand_names(use: str, gemm: str, x_first: Mapping[str, bool]) -> tuple[Part, Part]:
    """What a GEMM's first and second operand are called."""
    first, second = OPERANDS[gemm]
    if gemm == "wgrad" and not x_first[use]:
        first, second = second, first
    return Part(use, gemm, first), Part(use, gemm, second)


@dataclass
class _State:
    reader: Reader
    routing: dict[str, Tensor]
    x_first: Mapping[str, bool]
    cached: Mapping[str, Part]
    shadows: dict[str, Shadow] = field(default_factory=dict)
    outputs: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    quantized: set[tuple[str, str]] = field(default_factory=set)
    routed: int = 0
    rerouted: int = 0


#: Operators that move the rows or axes of what they read: a shadow takes the same way.
_MOVES = g.TRANSPOSES | {
    aten.index.Tensor,
    aten.index_select.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}
_KEEPS = frozenset({aten.view.dtype, aten.alias.default, torch.ops._c10d_functional.wait_tensor.default})
_EXPONENT_SCALES = ("pow2", "e8m0")


class _Interpreter(fx.Interpreter):
    """Runs one half; names are shared with the other half, and so are shadows."""

    def __init__(self, gm: fx.GraphModule, state: _State) -> None:
        super().__init__(gm)
        self.state = state

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        if n.target in SCALED:
            return self.scaled(n)
        if n.target is ops.dequantize.default:
            return self.dequantize(n)
        out = super().run_node(n)
        self.follow(n)
        if n.target is aten.topk.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            out, routed, rerouted = _topk(self.state.routing, n, out, args)
            self.state.routed += routed
            self.state.rerouted += rerouted
        role = n.meta.get(g.ROLE)
        if n.target in g.GEMMS and role is not None and role.gemm:
            self.state.outputs.setdefault((role.use, role.gemm), out)
        return out

    def follow(self, n: fx.Node) -> None:
        """Give the node's result its shadow."""
        source = n.args[0] if n.args else None
        if not isinstance(source, fx.Node):
            return
        shadows = self.state.shadows
        if n.target in (ops.quantize.default, ops.quantize_delayed.default):
            shadows[n.name] = Shadow(self.env[source], 1)
        elif n.target is ops.requantize.default and source.name in shadows:
            before = shadows[source.name]
            shadows[n.name] = Shadow(before.value, before.roundings + _adds_rounding(str(n.args[2]), str(n.args[3])))
        elif source.name not in shadows:
            return
        elif n.target is operator.getitem:
            if n.args[1] == 0:
                shadows[n.name] = shadows[source.name]
        elif n.target in _KEEPS:
            shadows[n.name] = shadows[source.name]
        elif n.target in _MOVES:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            before = shadows[source.name]
            moved = n.target(before.value, *args[1:], **kwargs)
            shadows[n.name] = Shadow(moved, before.roundings)

    def dequantize(self, n: fx.Node) -> Any:
        """A copy kept for backward: a part of its own."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        out = n.target(*args, **kwargs)  # type: ignore[operator]
        source = n.args[0]
        assert isinstance(source, fx.Node)
        shadow = self.state.shadows.get(source.name)
        part = self.state.cached.get(source.name)
        if shadow is None or part is None or shadow.value.shape != out.shape:
            return out
        values = out.float(), shadow.value.float()
        reading = Reading(part, Format.parse(str(args[2])), *values, args[0], args[1], shadow.roundings)
        replaced = self.state.reader(reading)
        return out if replaced is None else replaced.to(out.dtype)

    def scaled(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        role = n.meta[g.ROLE]
        first = SCALED[n.target]  # type: ignore[index]
        offs = args[4] if first == 5 else None
        names = operand_names(role.use, role.gemm, self.state.x_first)
        operands: list[Tensor] = []
        is_replaced = False
        for i, part in enumerate(names):
            source = n.args[2 * i]
            assert isinstance(source, fx.Node)
            fmt = Format.parse(str(args[first + i]))
            shadow = self.state.shadows[source.name]
            payload, scale = args[2 * i], args[2 * i + 1]
            value = dequantize_f32(payload, scale, fmt)
            restarting = offs if n.target is ops.scaled_grouped_wgrad.default else None
            if restarting is not None:
                payload, value = _unpadded(payload, value, shadow.value.shape[-1], fmt, restarting)
            reading = Reading(part, fmt, value, shadow.value.float(), payload, scale, shadow.roundings, restarting)
            replaced = self.state.reader(reading)
            is_replaced |= replaced is not None
            operands.append(value if replaced is None else replaced)
        out = (
            product(operands[0], operands[1], offs, role.gemm == "wgrad").to(args[-1])
            if is_replaced
            else n.target(*args, **kwargs)  # type: ignore[operator]
        )
        self.state.outputs.setdefault((role.use, role.gemm), out)
        self.state.quantized.add((role.use, role.gemm))
        return out


def _adds_rounding(old: str, new: str) -> int:
    """Retiling between power-of-two scales keeps the mantissa; any other way rounds every value once more."""
    a, b = Format.parse(old), Format.parse(new)
    assert a.scale is not None and b.scale is not None
    return 0 if a.scale.value in _EXPONENT_SCALES and b.scale.value in _EXPONENT_SCALES else 1


def _unpadded(data: Tensor, value: Tensor, rows: int, fmt: Format, offs: Tensor) -> tuple[Tensor, Tensor]:
    """Operands of a grouped wgrad, [N, T] instead of in whole groups for each expert; 0 for rows of no expert."""
    assert fmt.group is not None
    is_owned = torch.arange(rows) < offs[-1]
    places = stored_rows(offs, rows, fmt.group[1])[is_owned]
    payload = torch.zeros((data.shape[0], rows), dtype=torch.uint8)
    payload[:, is_owned] = data.view(torch.uint8)[:, places]
    values = value.new_zeros((data.shape[0], rows))
    values[:, is_owned] = value[:, places]
    return payload.view(data.dtype), values


def product(a: Tensor, b: Tensor, offs: Tensor | None, is_wgrad: bool) -> Tensor:
    """a @ b.T in FP32, expert by expert where there are offsets; shapes as the scaled operators have them."""
    if offs is None:
        return a @ b.T
    if is_wgrad:
        out = a.new_zeros((offs.shape[0], a.shape[0], b.shape[0]))
        for expert, start, end in expert_ranges(offs, a.shape[1]):
            out[expert] = a[:, start:end] @ b[:, start:end].T
        return out
    out = a.new_zeros((a.shape[0], b.shape[1]))
    for expert, start, end in expert_ranges(offs, a.shape[0]):
        out[start:end] = a[start:end] @ b[expert].T
    return out

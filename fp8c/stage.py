"""A module's forward and backward as graphs that run by themselves, and the two of different micro-batches as one.

    stage = Stage.capture(step, (x,))
    outputs, kept = stage.forward(x0)
    outputs, kept, dx = stage.pair((x1,), kept, (dy0,))     # forward of micro-batch 1 beside backward of micro-batch 0
    dx = stage.backward(kept, dy1)

This is what a pipeline schedule with overlapped pairs (DualPipe) needs and autograd cannot do: run two micro-batches'
work in one order that a scheduler chose. Gradients of parameters are added to `.grad` as autograd would.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from fp8c import driver
from fp8c import graph as g
from fp8c.backends import lowering
from fp8c.contention import Interference
from fp8c.cost_model import Machine
from fp8c.diagnostics import ExitCode, fail
from fp8c.graph_costs import node_us
from fp8c.main_grad import local
from fp8c.passes.schedule_overlap import NodeCost, OverlapReport, agree, pair_graphs, schedule_graph
from fp8c.schedule_search import SearchLimits

#: How many times as long as measured transfers may take before a pair's order stops hiding them, where that is possible:
#: with routing that favours some ranks, the fullest of them is the one that everybody's transfers wait for.
ROOM = 1.2
#: No beam search, which takes ten seconds where transfers are about as long as compute: orders that leave room are as short.
PAIR_LIMITS = SearchLimits(beam_width=1)


class _Called(nn.Module):
    """`module(*batch)`: the capture takes one batch. Paths of the module stay (a prefix `module.` is dropped)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Any:
        return self.module(*batch)


@dataclass
class Stage:
    """Forward and backward graphs of one module for inputs of one shape.

    halves:    forward returns its outputs, then what backward needs; backward takes that and the outputs' gradients
    values:    for every input of the forward, the tensor of the model it is; None for data
    data:      for every input of the forward, which of the call's tensors it is; None for the model's
    outputs:   positions of the module's differentiable outputs among the forward's results
    kept:      for every input of the backward, its position among the forward's results; None for a gradient
    tangents:  for every input of the backward, which output's gradient it is; None for others
    """

    forward_graph: fx.GraphModule
    backward_graph: fx.GraphModule
    values: list[Any]
    data: list[int | None]
    outputs: list[int]
    kept: list[int | None]
    tangents: list[int | None]
    _pair: Pair | None = None
    _parameters: list[nn.Parameter | None] = field(default_factory=list)

    # --- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def capture(cls, step: nn.Module, inputs: Sequence[Tensor], session: driver.Session | None = None) -> Stage:
        """Capture `step(*inputs)` of a prepared model, or of one that `fp8c.compile` returned.

        Inputs that are floating-point get gradients. Raises: DiagnosticError E0870 for a module that writes to its
        inputs; whatever a capture raises.
        """
        if session is None:
            session = driver.session_of(step).fresh()
            step = driver.uncompiled(step)
        device = inputs[0].device.type
        lowering.register_kernels(device)
        given = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in inputs)
        rewritten = driver.capture_step(_Called(step), given, session)
        session.plan_only = False
        halves = rewritten.halves
        forward, backward = halves.forward, halves.backward
        examples = [e() if isinstance(e, weakref.ref) else e for e in session.examples]
        values, data = _inputs_of(forward.graph, examples, given)
        results = g.output_node(forward.graph).args[0]
        assert isinstance(results, (list, tuple))
        outputs = _outputs_of(rewritten.joint_before.graph, halves.num_fwd_outputs)
        names = [n.name if isinstance(n, fx.Node) else "" for n in results]
        kept: list[int | None] = []
        tangents: list[int | None] = []
        for node in backward.graph.find_nodes(op="placeholder"):
            is_tangent = str(node.target).startswith("tangents")
            tangents.append(_tangent_of(node, len([t for t in tangents if t is not None])) if is_tangent else None)
            kept.append(None if is_tangent else names.index(str(node.target)))
        # Dynamo also returns values that the module put into its buffers; those have no gradient.
        outputs = [at for at in outputs if at in tangents]
        tangents = [None if at is None else outputs.index(at) for at in tangents]
        parameters = [v if isinstance(v, nn.Parameter) and v.requires_grad else None for v in values]
        made = cls(forward, backward, values, data, outputs, kept, tangents, _parameters=parameters)
        made._given = given  # type: ignore[attr-defined]  # weak references of the capture lead to them
        return made

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> tuple[list[Tensor], list[Any]]:
        """The module's outputs (flattened), and what `backward` needs."""
        with torch.no_grad():
            return self._split(self.forward_graph(*self._forward_inputs(inputs)))

    def backward(self, kept: list[Any], *gradients: Tensor) -> list[Tensor | None]:
        """Add the parameters' gradients to `.grad`; return those of the inputs. `kept` is emptied."""
        with torch.no_grad():
            arguments = self._backward_inputs(kept, gradients)
            kept.clear()
            return self._finish(self.backward_graph(*arguments))

    def pair(
        self, inputs: Sequence[Tensor], kept: list[Any], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Any], list[Tensor | None]]:
        """`forward(*inputs)` of one micro-batch beside `backward(kept, *gradients)` of another, as scheduled."""
        if self._pair is None:
            self.schedule_pair(lambda node: 0.0)
        assert self._pair is not None
        return self._pair.run(inputs, kept, gradients)

    def _forward_inputs(self, inputs: Sequence[Tensor]) -> list[Any]:
        return [_local(value) if at is None else inputs[at].detach() for value, at in zip(self.values, self.data)]

    def _backward_inputs(self, kept: list[Any], gradients: Sequence[Tensor]) -> list[Any]:
        return [
            kept[position] if position is not None else gradients[tangent]  # type: ignore[index]
            for position, tangent in zip(self.kept, self.tangents)
        ]

    def _split(self, results: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        return [results[i] for i in self.outputs], list(results)

    def _finish(self, gradients: Sequence[Any]) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * (max((at for at in self.data if at is not None), default=-1) + 1)
        for parameter, at, gradient in zip(self._parameters, self.data, gradients):
            if at is not None:
                found[at] = gradient
            elif parameter is not None and gradient is not None:
                accumulate(parameter, gradient)
        return found

    # --- scheduling ---------------------------------------------------------------------------------------------------

    def schedule_pair(
        self, cost_us: NodeCost, interference: Interference = Interference(), room: float = ROOM
    ) -> OverlapReport:
        """Put forward and backward into one graph and order it; `cost_us` gives the microseconds of its nodes by
        themselves, `interference` what compute and transfers cost each other, `room` how much longer transfers may
        get (`schedule_graph`).

        All ranks have to use the same durations; their orders are compared (E0757).
        """
        self._pair = Pair(self, self, cost_us, interference, room)
        return self._pair.report

    @property
    def pair_graph(self) -> fx.GraphModule | None:
        return None if self._pair is None else self._pair.graph

    def schedule_pair_for(self, machine: Machine, comm_sms: int) -> OverlapReport:
        """`schedule_pair` with the cost model's durations."""
        cost_us = functools.partial(node_us, machine=machine, comm_sms=comm_sms)
        return self.schedule_pair(cost_us, machine.interference)


class Pair:
    """The forward of one stage beside the backward of the same or another, in the order found for `cost_us`."""

    def __init__(
        self,
        ahead: Stage,
        behind: Stage,
        cost_us: NodeCost,
        interference: Interference = Interference(),
        room: float = ROOM,
    ) -> None:
        self.ahead, self.behind = ahead, behind
        self.graph = pair_graphs(copy.copy(ahead.forward_graph), copy.copy(behind.backward_graph))
        self.report: OverlapReport = schedule_graph(
            self.graph.graph, cost_us, interference=interference, limits=PAIR_LIMITS, room=room
        )
        agree(self.graph.graph)
        self.graph.graph.lint()
        self.graph.recompile()

    def run(
        self, inputs: Sequence[Tensor], kept: list[Any], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Any], list[Tensor | None]]:
        """Outputs of the forward and what its backward needs; gradients of the backward's inputs. `kept` is emptied."""
        with torch.no_grad():
            arguments = [*self.ahead._forward_inputs(inputs), *self.behind._backward_inputs(kept, gradients)]
            kept.clear()
            outputs, found = self.graph(*arguments)
            del arguments
            return (*self.ahead._split(outputs), self.behind._finish(found))


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add a gradient, of the local shard where the parameter is a DTensor, to `.grad`, and call the hooks that autograd
    would call behind that: they move it to `main_grad`, and note that the ranks' gradients are to be summed."""
    if parameter.grad is not None:
        local(parameter.grad).add_(gradient)
    elif isinstance(parameter, DTensor):
        parameter.grad = DTensor.from_local(
            gradient,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    else:
        parameter.grad = gradient.to(parameter.dtype)
    for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
        hook(parameter)


def _local(value: Any) -> Any:
    return value.to_local().detach() if isinstance(value, DTensor) else value


def _dynamo_index(node: fx.Node, position: int) -> tuple[int, str]:
    """Which input of Dynamo's graph a placeholder is, or is a part of, and the part's name."""
    described: Any = node.meta.get("desc")
    part = ""
    while hasattr(described, "base"):
        part = str(getattr(described, "attr", ""))
        described = described.base
    return getattr(described, "idx", position), part


def _inputs_of(graph: fx.Graph, examples: Sequence[Any], given: Sequence[Tensor]) -> tuple[list[Any], list[int | None]]:
    values: list[Any] = []
    data: list[int | None] = []
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        index, part = _dynamo_index(node, position)
        example = examples[index]
        at = next((i for i, tensor in enumerate(given) if tensor is example), None)
        data.append(at)
        values.append(None if at is not None else example.device_mesh if part == "device_mesh" else example)
    return values, data


def _outputs_of(joint: fx.Graph, count: int) -> list[int]:
    """Positions of the module's outputs. Raises: E0870 when the capture returns changed inputs."""
    described = g.output_node(joint).meta.get("desc") or [None] * count
    described = pytree.tree_leaves(described, is_leaf=lambda d: d is None or not isinstance(d, (list, tuple)))[:count]
    if any("Mutation" in type(d).__name__ for d in described):
        raise fail(
            "E0870",
            "the module writes to an input or a buffer in a way the captured graph can't keep",
            help="write to buffers under torch.no_grad(), and to no input",
            exit_code=ExitCode.MODEL,
        )
    return [i for i, d in enumerate(described) if d is None or "PlainAOTOutput" in type(d).__name__]


def _tangent_of(node: fx.Node, position: int) -> int:
    output = getattr(node.meta.get("desc"), "output", None)
    return int(getattr(output, "idx", position))

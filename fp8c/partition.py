"""Partition: split the joint graph where choose-saved said, and nothing else.

The one place that touches torch's partitioner (private API): extraction of the two halves, their calling convention
with AOTAutograd, and the reordering that delays recomputation until backward needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch._functorch import partitioners

from fp8c import graph as g
from fp8c.pass_manager import PassContext


@dataclass
class Halves:
    """The forward and the backward graph. Forward returns its outputs, then the saved tensors, then saved sizes."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_fwd_outputs: int

    def saved(self) -> list[fx.Node]:
        """The forward's nodes that cross to backward, in order."""
        outputs = g.output_node(self.forward.graph).args[0]
        assert isinstance(outputs, (list, tuple))
        return [n for n in outputs[self.num_fwd_outputs :] if isinstance(n, fx.Node)]


def partition(joint: fx.GraphModule, ctx: PassContext) -> Halves:
    """Extract forward and backward. Everything backward needs beyond the saved values is computed again there."""
    gradients = g.gradients(joint.graph)
    saved, sizes = [], []
    for node in joint.graph.nodes:
        if node in gradients or node.op == "output":
            continue
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, torch.SymFloat)):
            if not g.is_backward(node):
                sizes.append(node)
        elif isinstance(val, torch.SymBool):
            continue  # a check of a size; forward has made it
        elif node.op == "placeholder" or node.name in ctx.saved:
            saved.append(node)
    forward, backward = partitioners._extract_fwd_bwd_modules(
        joint, saved, saved_sym_nodes=sizes, num_fwd_outputs=ctx.num_fwd_outputs
    )
    backward = partitioners.reordering_to_mimic_autograd_engine(backward)
    replay_scales(backward.graph)
    return Halves(forward, backward, ctx.num_fwd_outputs)


def replay_scales(backward: fx.Graph) -> None:
    """A delayed quantize of the forward that backward computes again takes the forward's scale, and notes nothing."""
    for node in g.calls(backward, {torch.ops.fp8c.quantize_delayed.default}):
        if not g.is_backward(node):
            node.args = (*node.args[:-1], True)


def default_min_cut(joint: fx.GraphModule, inputs: object, num_fwd_outputs: int) -> Halves:
    """PyTorch's default min-cut, the baseline that saved bytes are compared with."""
    forward, backward = partitioners.min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs)
    return Halves(forward, backward, num_fwd_outputs)


def trained_inputs(joint: fx.GraphModule, num_fwd_outputs: int) -> frozenset[str]:
    """Names of the placeholders whose gradient the joint graph returns."""
    outputs = g.output_node(joint.graph).args[0]
    assert isinstance(outputs, (list, tuple))
    primals = [n for n in joint.graph.nodes if n.op == "placeholder" and str(n.target).startswith("primals")]
    return frozenset(p.name for p, grad in zip(primals, outputs[num_fwd_outputs:]) if isinstance(grad, fx.Node))

"""What crosses from forward to backward, in bytes of unique storage and by layer."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fp8c import graph as g
from fp8c.graph import aten
from fp8c.ops import SCALED_GROUPED_MM, SCALED_MM
from fp8c.ops.head_loss import LINEAR_CROSS_ENTROPY
from fp8c.partition import Halves

#: Operators whose result shares the storage of their argument.
ALIASES = (g.VIEWS - {aten.clone.default, aten.contiguous.default}) | {operator.getitem, aten.view.dtype}
#: Operators that are one forward GEMM.
FORWARD_GEMMS = g.GEMMS | {SCALED_MM, SCALED_GROUPED_MM}
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default})


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose result owns the storage of this one."""
    while node.op == "call_function" and node.target in ALIASES and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if node.target is operator.getitem and source.target not in _SPLITS:
            break  # one of several results of an operator
        node = source
    return node


@dataclass(frozen=True)
class SavedTensor:
    """One saved storage. `gemm`: module of the one GEMM it comes from, None when there are several, or none.
    `is_logits`: the output head's own values (logits, or the gradients that `fuse-head-loss` keeps instead), which the
    comparison leaves out. `is_guess`: a size is known in the step alone."""

    name: str
    layer: int | None
    path: str
    dtype: str
    size_bytes: int
    last_dim: int | None = None
    gemm: str | None = None
    is_logits: bool = False
    is_guess: bool = False


@dataclass(frozen=True)
class SavedReport:
    tensors: tuple[SavedTensor, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        """Everything but logits; graph inputs (parameters, tokens) are no new memory and do not count."""
        return sum(t.size_bytes for t in self.tensors if not t.is_logits)

    @property
    def logits_bytes(self) -> int:
        return sum(t.size_bytes for t in self.tensors if t.is_logits)

    def layer_bytes(self) -> dict[int, int]:
        layers: dict[int, int] = {}
        for t in self.tensors:
            if t.layer is not None and not t.is_logits:
                layers[t.layer] = layers.get(t.layer, 0) + t.size_bytes
        return dict(sorted(layers.items()))


def saved_tensors(halves: Halves) -> tuple[SavedTensor, ...]:
    """Unique storages among the saved values; which of them are plain logits is not known yet."""
    seen: set[fx.Node] = set()
    sources = gemm_sources(halves.forward.graph)
    tensors = []
    for node in halves.saved():
        root = storage_root(node)
        val = root.meta.get("val")
        if root.op == "placeholder" or root in seen or not isinstance(val, torch.Tensor):
            continue
        seen.add(root)
        path = g.module_path(root)
        layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
        last = val.shape[-1] if val.dim() else None
        tensors.append(
            SavedTensor(
                node.name,
                int(layer[1]) if layer else None,
                path,
                g.type_text(val),
                g.size_bytes(val),
                last if isinstance(last, int) else None,
                sources.get(root),
                root.target is operator.getitem and root.args[0].target is LINEAR_CROSS_ENTROPY,  # type: ignore[union-attr]
                bool(free_unbacked_symbols(val)),
            )
        )
    return tuple(tensors)


def gemm_sources(graph: fx.Graph) -> dict[fx.Node, str | None]:
    """Module path of the GEMM that each value is, or is computed from; None where there are several."""
    found: dict[fx.Node, str | None] = {}
    for node in graph.nodes:
        if node.target in FORWARD_GEMMS:
            found[node] = g.module_path(node)
            continue
        behind = {found[n] for n in node.all_input_nodes if n in found}
        if behind:
            found[node] = behind.pop() if len(behind) == 1 else None
    return found


def saved_report(
    saved: Halves | tuple[SavedTensor, ...], heads: frozenset[tuple[str | None, int | None]]
) -> SavedReport:
    """The report of two halves, or of storages found before. `heads`: module and width of each output head.

    The width alone would not do: in a model of bytes, hidden states are as wide as its vocabulary.
    """
    tensors = saved_tensors(saved) if isinstance(saved, Halves) else saved
    return SavedReport(tuple(replace(t, is_logits=t.is_logits or (t.gemm, t.last_dim) in heads) for t in tensors))

"""A table of durations from a rewritten step: the two halves' nodes, costed, summed per layer kind, phase and part.

Layers and their parts come from role records: a child module of a layer that holds attention's GEMMs is its attention,
one that holds a feed-forward's or experts' is its `mlp`. What stands between belongs to what it feeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fp8c import graph as g
from fp8c.cost_model import Machine
from fp8c.durations import PREVIOUS, Deployment, DurationTable, Measured, ModelShape, OpDuration
from fp8c.graph_costs import node_us
from fp8c.partition import Halves
from fp8c.roles import Op, OpUse
from fp8c.saved import FORWARD_GEMMS
from fp8c.schedule import COMPUTE

ATTENTION, MLP, HEAD = "attention", "mlp", "head"
_MLP_KINDS = frozenset({"mlp", "moe", "shared_expert", "router"})
_OUTSIDE = -1  # the layer of embedding, head and loss


@dataclass(frozen=True)
class Place:
    """Where a node belongs: the decoder layer (`_OUTSIDE` for none) and its part."""

    layer: int
    part: str


def step_durations(
    halves: Halves, uses: Iterable[OpUse], machine: Machine, name: str, *, comm_sms: int = 20
) -> DurationTable | None:
    """The table of one captured step on one device, or None for a step without decoder layers.

    Compute is costed on the SMs that communication leaves; collectives of the graph are left out, because how experts
    are spread is chosen when the table is simulated (`fp8c.workload.with_transfers`).
    """
    listed = list(uses)
    places = _Places(listed)
    if not places.kinds:
        return None
    totals: dict[tuple[str, str, str], float] = {}
    found = {**_placed(halves.forward.graph, places)}
    for node, place in found.items():
        _add(totals, places, place, "F", node_us(node, machine, comm_sms))
    backward = _placed(halves.backward.graph, places)
    needed = _input_gradients(halves.backward.graph, backward)
    for node, place in backward.items():
        _add(totals, places, place, "B" if node in needed else "W", node_us(node, machine, comm_sms))
    counts = {kind: list(places.kinds.values()).count(kind) for kind in set(places.kinds.values())}
    ops: list[OpDuration] = []
    for kind in sorted(counts):
        ops += _rows(kind, {key[1:]: us / 1000.0 / counts[kind] for key, us in totals.items() if key[0] == kind})
    head = {phase: totals.get((HEAD, phase, HEAD), 0.0) / 1000.0 for phase in "FBW"}
    ops += _head_rows(head)
    shape = _shape(listed, places, halves, name)
    saved = _saved_bytes(halves, found, places, counts)
    tokens = shape.sequence
    return DurationTable(
        f"{name} on {machine.name}, from its graphs",
        Measured(machine.name, comm_sms, tokens),
        tuple(ops),
        shape,
        Deployment(pipeline_parallel=1, expert_parallel=1, sequences_per_step=1, schedule="1f1b"),
        tuple(sorted(saved.items())),
    )


class _Places:
    """Layer prefixes, kinds and the parts of their children, from the uses."""

    def __init__(self, uses: list[OpUse]) -> None:
        self.prefixes: dict[str, int] = {}
        self.parts: dict[str, str] = {}
        self.kinds: dict[int, str] = {}
        self.by_key: dict[str, Place] = {}
        for use in uses:
            if use.layer is None:
                self.by_key[use.key] = Place(_OUTSIDE, HEAD)
                continue
            names = use.path.split(".")
            if str(use.layer) not in names:
                continue
            at = names.index(str(use.layer)) + 1
            self.prefixes[".".join(names[:at])] = use.layer
            is_moe = use.op is Op.GROUPED_MM or "moe" in use.kinds
            if is_moe or use.layer not in self.kinds:
                self.kinds[use.layer] = "moe" if is_moe else "dense"
            part = ATTENTION if "attention" in use.kinds else MLP if use.kinds & _MLP_KINDS else ""
            if part and len(names) > at:
                self.parts.setdefault(names[at], part)
            if part:
                self.by_key[use.key] = Place(use.layer, part)

    def of_path(self, path: str) -> Place | None:
        names = path.split(".")
        for end in range(len(names), 0, -1):
            layer = self.prefixes.get(".".join(names[:end]))
            if layer is not None:
                child = names[end] if end < len(names) else ""
                return Place(layer, self.parts.get(child, ATTENTION))
        return Place(_OUTSIDE, HEAD) if path else None


def _placed(graph: fx.Graph, places: _Places) -> dict[fx.Node, Place]:
    """A place for every call: its role's, its module's, else that of what it feeds, else of what feeds it."""
    out: dict[fx.Node, Place] = {}
    calls = [n for n in graph.nodes if n.op == "call_function"]
    for node in calls:
        role = node.meta.get(g.ROLE)
        place = places.by_key.get(role.use) if role is not None else None
        place = place or places.of_path(g.module_path(node))
        if place is not None:
            out[node] = place
    for node in reversed(calls):
        if node not in out:
            fed = [out[user] for user in node.users if user in out]
            if fed:
                out[node] = fed[0]
    for node in calls:
        if node not in out:
            sources = [out[n] for n in node.all_input_nodes if n in out]
            out[node] = sources[0] if sources else Place(_OUTSIDE, HEAD)
    return out


def _input_gradients(graph: fx.Graph, places: Mapping[fx.Node, Place]) -> set[fx.Node]:
    """Nodes of a backward graph that the next (lower) layer waits for: those that reach a lower layer, or an input
    gradient or attention backward of their own. Everything else is weight work and may be put off."""
    lowest: dict[fx.Node, int] = {}
    out: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function":
            continue
        layer = places[node].layer
        role = node.meta.get(g.ROLE)
        is_chain = (
            role is not None and role.gemm == "dgrad"
        ) or node.target is torch.ops.fp8c.attention_backward.default
        reached = [lowest[user] for user in node.users if user in lowest]
        below = min(reached, default=layer if layer != _OUTSIDE else 10**9)
        if is_chain or below < layer or any(user in out and places[user].layer == layer for user in node.users):
            out.add(node)
        lowest[node] = min(below, layer if layer != _OUTSIDE else 10**9) if reached else layer
    return out


def _add(totals: dict[tuple[str, str, str], float], places: _Places, place: Place, phase: str, time_us: float) -> None:
    kind = places.kinds[place.layer] if place.layer != _OUTSIDE else HEAD
    part = place.part if place.layer != _OUTSIDE else HEAD
    key = (kind, phase, part)
    totals[key] = totals.get(key, 0.0) + time_us


def _rows(kind: str, ms: Mapping[tuple[str, str], float]) -> list[OpDuration]:
    rows = [
        ("F", ATTENTION, PREVIOUS, False),
        ("F", MLP, ATTENTION, True),
        ("B", MLP, PREVIOUS, False),
        ("B", ATTENTION, MLP, True),
        ("W", MLP, "B.mlp", False),
        ("W", ATTENTION, "B.attention", False),
    ]
    return [
        OpDuration(
            kind, phase, part, COMPUTE, ms.get((phase, part), 0.0), (after,), output, kind == "moe" and part == MLP
        )
        for phase, part, after, output in rows
    ]


def _head_rows(ms: Mapping[str, float]) -> list[OpDuration]:
    return [
        OpDuration(HEAD, "F", HEAD, COMPUTE, ms["F"], (PREVIOUS,), True),
        OpDuration(HEAD, "B", HEAD, COMPUTE, ms["B"], (PREVIOUS,), True),
        OpDuration(HEAD, "W", HEAD, COMPUTE, ms["W"], ("B.head",)),
    ]


def _shape(uses: list[OpUse], places: _Places, halves: Halves, name: str) -> ModelShape:
    """Sizes as far as GEMMs show them; tokens are those of the captured batch, as one sequence: the rows of attention's
    GEMMs, or of any layer's where none has attention."""
    grouped = [u for u in uses if u.op is Op.GROUPED_MM]
    heads = [u for u in uses if "lm_head" in u.kinds and u.n]
    tokens, tokens_of_any, rows = 0, 0, 0
    by_key = {u.key: u for u in uses}
    for node in halves.forward.graph.nodes:
        role = node.meta.get(g.ROLE)
        is_gemm = node.op == "call_function" and node.target in FORWARD_GEMMS
        use = by_key.get(role.use) if is_gemm and role is not None and role.gemm == "fprop" else None
        if use is None:
            continue
        size = g.size_hint(node.meta["val"].shape[0])
        if use.op is Op.GROUPED_MM:
            rows = max(rows, size)
        elif use.op is Op.LINEAR and use.layer is not None:
            tokens_of_any = max(tokens_of_any, size)
            tokens = max(tokens, size if "attention" in use.kinds else 0)
    tokens = tokens or tokens_of_any
    hidden = max((u.k or 0 for u in uses if "attn_in_proj" in u.roles or "mlp_up" in u.roles), default=0)
    hidden = max(hidden, max((u.k or 0 for u in heads), default=0))
    ffn = [u.k or 0 for u in grouped if "moe_down" in u.roles]
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=len(places.kinds),
        experts=max((u.experts for u in grouped), default=1),
        top_k=max(1, round(rows / tokens)) if tokens and rows else 1,
        expert_ffn=max(ffn, default=0),
        vocabulary=max((u.n or 0 for u in heads), default=0),
        sequence=max(1, tokens),
        dense_layers=sum(kind == "dense" for kind in places.kinds.values()),
        shared_experts=int(any("shared_expert" in u.kinds for u in uses)),
    )


def _saved_bytes(
    halves: Halves, placed: Mapping[fx.Node, Place], places: _Places, counts: Mapping[str, int]
) -> dict[str, int]:
    """Bytes that cross to backward per layer of each kind; parameters and inputs left out."""
    total = dict.fromkeys(counts, 0)
    for node in dict.fromkeys(halves.saved()):
        place = placed.get(node)
        if place is not None and place.layer != _OUTSIDE:
            total[places.kinds[place.layer]] += g.size_bytes(node.meta.get("val"))
    return {kind: size // counts[kind] for kind, size in total.items()}

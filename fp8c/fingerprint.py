"""What identifies a training step: the types of its parameters and data, its decisions, its graphs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fp8c import graph as g
from fp8c.pipeline import Rewritten


def parameter_types(module: nn.Module) -> dict[str, str]:
    """Type of every parameter and buffer by name; a frozen parameter says so."""
    found = {
        name: g.type_text(p) + ("" if p.requires_grad else " frozen")
        for name, p in module.named_parameters(remove_duplicate=False)
    }
    found |= {name: g.type_text(b) for name, b in module.named_buffers(remove_duplicate=False)}
    return dict(sorted(found.items()))


def data_types(rewritten: Rewritten) -> list[str]:
    """Types of the tensors the captured step reads besides its parameters and buffers: the batch."""
    placeholders = rewritten.joint_before.graph.find_nodes(op="placeholder")
    data = [n for n in placeholders if rewritten.ctx.inputs.get(n.name) == ""]
    return [g.type_text(n.meta["val"]) for n in data if isinstance(n.meta.get("val"), torch.Tensor)]


def decisions(lock: Mapping[str, Any]) -> dict[str, Any]:
    """The decisions of a plan's lock alone: neither source places nor the number of tokens count."""
    uses = {
        key: {
            **{k: v for k, v in use.items() if k not in ("source", "shape")},
            "shape": {k: v for k, v in use["shape"].items() if k != "m"},
        }
        for key, use in lock["uses"].items()
    }
    return {"uses": uses, "sections": lock["sections"]}


def decisions_digest(lock: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decisions(lock), sort_keys=True).encode()).hexdigest()


def portable_hash(graph: fx.Graph) -> str:
    """SHA-256 over operators, arguments and types, the same on every device: where tensors live does not count."""
    numbers: dict[fx.Node, int] = {}
    digest = hashlib.sha256()
    for i, node in enumerate(graph.nodes):
        numbers[node] = i
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory")}
        arguments = fx.map_arg((node.args, kwargs), lambda n: f"%{numbers[n]}")
        kept = pytree.tree_map(lambda a: "device" if isinstance(a, torch.device) else a, arguments)
        digest.update(f"{node.op}|{g.target_text(node.target)}|{kept}|{g.type_text(node.meta.get('val'))}\n".encode())
    return digest.hexdigest()

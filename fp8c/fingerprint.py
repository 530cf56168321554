"""What identifies a training step: the types of its parameters and data, its decisions, its graphs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fp8c import graph as g
from fp8c.graph import portable_hash as portable_hash
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

"""Trace a graph again, operator by operator, under a decomposition table; provenance and input names are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from fp8c import graph as g


def retrace(gm: fx.GraphModule, decompositions: Mapping[Any, Callable[..., Any]]) -> fx.GraphModule:
    """The same computation with `decompositions` applied; symbolic sizes stay those of the graph's own fake tensors."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = [n.meta["val"] for n in placeholders]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)

    def run(*arguments: Any) -> Any:
        return fx.Interpreter(gm).run(*arguments)

    with fx_traceback.preserve_node_meta(), mode or nullcontext(), torch.no_grad():
        traced = make_fx(run, decomposition_table=dict(decompositions), tracing_mode="real")(*values)
    for new, old in zip(traced.graph.find_nodes(op="placeholder"), placeholders):
        new._rename(old.name)  # or nearly so, where an operator took that name
        new.target = new.name  # else one input's name may be another's variable in the generated code
        for key, item in old.meta.items():
            new.meta.setdefault(key, item)
    new_output, old_output = g.output_node(traced.graph), g.output_node(gm.graph)
    for key, item in old_output.meta.items():
        new_output.meta.setdefault(key, item)
    if isinstance(old_output.args[0], tuple) and isinstance(new_output.args[0], list):
        new_output.args = (tuple(new_output.args[0]),)
    traced.recompile()
    return traced

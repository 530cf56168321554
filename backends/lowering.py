"""Lowering: from a forward or backward graph to something that runs.

`reference` runs the graph operator by operator, exactly as written. `inductor` decomposes it and hands it to
Inductor's inner compiler, which fuses what lies between the opaque fp8c operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._guards import detect_fake_mode

from fp8c import graph as g
from fp8c.backends.inductor_rewrites import rewrite_for_inductor
from fp8c.backends.lowering_sizes import mark_row_counts, padded_rows_are_strided
from fp8c.ops import embedding
from fp8c.ops.stored import STORED
from fp8c.retrace import retrace

Lowered = Callable[..., Any]
LOWERINGS = ("reference", "inductor")


def register_kernels(device: str) -> None:
    """Make the kernels for a device available: importing a backend registers them."""
    import fp8c.backends.reference  # noqa: F401  (the CPU's, and the oracle of all others)

    if device == "cuda":
        # Attention by PyTorch's fused kernels, GEMMs by what is chosen for each, quantizers in Triton, the portable form of
        # the rest.
        import fp8c.backends.aten  # noqa: F401
        import fp8c.backends.gemms.dispatch  # noqa: F401

        # Without triton, and on GPUs that can't convert to FP8, the portable form.
        is_too_old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
        if find_spec("triton") is not None and not is_too_old:
            import fp8c.backends.triton  # noqa: F401


def lower(gm: fx.GraphModule, inputs: Sequence[Any], how: str, *, is_inference: bool = False) -> Lowered:
    """Lower one half with `how` = "reference" or "inductor"."""
    match how:
        case "reference":
            return make_boxed_func(with_any_strides(gm))  # type: ignore[no-any-return]
        case "inductor":
            return lower_inductor(gm, inputs, is_inference=is_inference)
        case _:
            raise ValueError(f"unknown lowering {how!r}; expected 'reference' or 'inductor'")


def with_any_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """A half whose views copy where they have to. Some operators of PyTorch's lay their result out otherwise than their fake
    implementation said when the graph was captured (softplus_backward on the CPU): a view of it then fails. Values have one
    writer in a half, so a copy is as good.
    """
    graph = g.copy_graph(gm.graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    return fx.GraphModule(gm, graph)


def lower_inductor(gm: fx.GraphModule, inputs: Sequence[Any], *, is_inference: bool) -> Lowered:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    realize_stored()
    table = dict(select_decomp_table())
    backward = torch.ops.aten.embedding_dense_backward.default
    if backward in table:
        table[backward] = embedding.decomposition(table[backward])
    with padded_rows_are_strided(gm.graph):
        decomposed = retrace(gm, table)
        mark_row_counts(decomposed.graph)
        values = [n.meta["val"] for n in decomposed.graph.find_nodes(op="placeholder")]
        # What Inductor rewrites in a graph before it is split, it rewrites in a half as well; the gradient of a loss, say,
        # is compared with the labels where it is needed, not scattered into a matrix of zeros.
        with detect_fake_mode(values) or nullcontext():
            decomposed = joint_graph_passes(decomposed)
            rewrite_for_inductor(decomposed)
        return compile_fx_inner(decomposed, inputs, is_inference=is_inference)


@cache
def realize_stored() -> None:
    """Let Inductor store what `fp8c.stored` is given, where it would call the operator, which copies."""
    from torch._inductor.lowering import clone, register_lowering

    def stored(x: Any) -> Any:
        x.realize()
        return clone(x)

    register_lowering(STORED, type_promotion_kind=None)(stored)


def start_compilers(device: str, how: str) -> None:
    """Start the processes in which Inductor compiles Triton kernels: they take seconds, and until they are there it compiles
    one kernel after the other. torch.compile's own backend starts them at the same place; one that calls the inner compiler
    has to do so itself."""
    if device == "cuda" and how == "inductor":
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()


def choose_lowering(device: str) -> str:
    """Inductor on a GPU; on the CPU, where the reference is the point, the graph as it is."""
    return "inductor" if device == "cuda" and torch.cuda.is_available() else "reference"

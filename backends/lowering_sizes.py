"""What Inductor is told about sizes that are symbols: those that change from step to step, and those known in the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils import _pytree as pytree


def mark_row_counts(graph: fx.Graph) -> None:
    """Let Inductor take numbers that nobody knows before the step, such as rows from other ranks, for sizes.

    It sorts the strides of operands. Up to torch 2.12 it gives up where that compares `4 * ((rows + 3) // 4)` with 1,
    unless `rows` is said to be a size, which stands for two or more in such decisions.
    """
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            numbers = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
            for number in (n for n in numbers if isinstance(n, torch.SymInt)):
                environment = number.node.shape_env
                for symbol in free_unbacked_symbols(number):
                    if environment.bound_sympy(symbol).lower >= 0:
                        environment.size_like.add(symbol)


@contextmanager
def padded_rows_are_strided(graph: fx.Graph) -> Iterator[None]:
    """Meanwhile no matrix that an operator of fp8c reads or gives counts as contiguous where that depends on the length.

    Rows are padded to whole 16 bytes (`fp8c.ops`). Else Inductor asks whether that is contiguous at the first length, and a
    graph made for a multiple of 16 holds for multiples of 16 alone. What it makes of a no is right for every length: it goes
    by the strides, also where the padding is nothing.
    """
    known: dict[ShapeEnv, dict[sympy.Basic, sympy.Basic]] = {}
    for matrix in (value for value in operands_and_results(graph) if value.dim() == 2):
        for environment, fact in strided(matrix):
            known.setdefault(environment, {}).update(environment.get_implications(fact))
    for environment, facts in known.items():
        environment.axioms.update(facts)
        environment._version_counter += 1  # answers given before are forgotten
    try:
        yield
    finally:
        for environment, facts in known.items():
            for fact in facts:
                environment.axioms.pop(fact, None)
            environment._version_counter += 1


def operands_and_results(graph: fx.Graph) -> Iterator[Tensor]:
    """Example values of what operators of fp8c read and give."""
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace == "fp8c":
            values = pytree.tree_leaves([n.meta.get("val") for n in (node, *node.all_input_nodes)])
            yield from (value for value in values if isinstance(value, Tensor))


def strided(matrix: Tensor) -> Iterator[tuple[ShapeEnv, sympy.Basic]]:
    """What makes a matrix strided: several groups along each axis, and a stride that is not the other axis's size."""
    sizes, strides = matrix.shape, matrix.stride()
    pairs: list[tuple[int | torch.SymInt, int | torch.SymInt]] = [(size, 1) for size in sizes]
    pairs += [(strides[1 - axis], sizes[axis]) for axis in range(2) if strides[axis] == 1]
    for number, other in pairs:
        if not isinstance(number, torch.SymInt) or number.node.expr.is_Symbol:
            continue
        fact = sympy.Ne(number.node.expr, other.node.expr if isinstance(other, torch.SymInt) else other)
        if fact not in (sympy.true, sympy.false):
            yield number.node.shape_env, fact

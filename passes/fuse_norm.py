"""The part of fuse-casts that joins a quantize with the RMSNorm in front of it.

Before:  %f     = aten._to_copy(%x, float32)                          x: bf16[.., C]
         %r     = aten.rsqrt(aten.add(aten.mean(aten.pow(%f, 2), [-1], True), eps))
         %y     = aten.mul(%w, aten._to_copy(aten.mul(%f, %r), bfloat16))
         %q, %s = fp8c.quantize(aten.view(%y, [R, C]), 'e4m3[1x128] fp32')
After:   %q, %s, _ = fp8c.rms_norm_quantize(%x, %w, eps, 'e4m3[1x128] fp32')

Contract: the order of the FP32 sum is the operator's own, all else is exact. A normalised value that anything else reads
keeps the norm as it is: writing it would cost what reading it once less saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fp8c import graph as g
from fp8c.formats import Format
from fp8c.graph import aten
from fp8c.ops import fused
from fp8c.passes.fuse_swiglu import redirect

ops = torch.ops.fp8c


@dataclass(frozen=True)
class Norm:
    x: fx.Node
    weight: fx.Node
    eps: float
    inside: frozenset[fx.Node]  # what nothing else may read


def fuse_norms(graph: fx.Graph, fusions: frozenset[str]) -> int:
    """Quantizes along rows of what an RMSNorm gives."""
    if "rms_norm_quantize" not in fusions:
        return 0
    return sum(join(graph, node) for node in g.calls(graph, {ops.quantize.default}))


def join(graph: fx.Graph, quantize: fx.Node) -> int:
    if len(quantize.args) > 2 or Format.parse(str(quantize.args[1])).group != (1, 128):
        return 0
    found = norm_behind(quantize.args[0])
    if found is None or any(u is not quantize and u not in found.inside for n in found.inside for u in n.users):
        return 0
    with graph.inserting_before(quantize):
        new = g.emit(graph, fused.RMS_NORM_QUANTIZE, found.x, found.weight, found.eps, quantize.args[1], like=quantize)
    redirect(graph, new, quantize, {0: 0, 1: 1})
    return 1


def norm_behind(value: Any) -> Norm | None:
    """The RMSNorm that made this matrix."""
    if not isinstance(value, fx.Node) or g.value(value).dim() != 2:
        return None
    inside: list[fx.Node] = []
    product = walk(value, g.ROW_VIEWS, inside)
    if not g.is_call(product, {aten.mul.Tensor}) or str(g.last_dim(product)) != str(g.last_dim(value)):
        return None
    for weight, narrow in (product.args, product.args[::-1]):
        if not (isinstance(weight, fx.Node) and isinstance(narrow, fx.Node)):
            return None
        if g.value(weight).dim() == 1 and g.is_call(narrow, g.CASTS):
            found = factor_behind(narrow, [*inside, product, narrow])
            if found is None or g.value(weight).dtype is not g.value(found[0]).dtype:
                return None
            x, eps, every = found
            return Norm(x, weight, eps, frozenset(every))
    return None


def factor_behind(narrow: fx.Node, inside: list[fx.Node]) -> tuple[fx.Node, float, list[fx.Node]] | None:
    """(x, eps, nodes) of `(x * rsqrt(mean(x^2) + eps)).to(x.dtype)`, computed in FP32."""
    scaled: Any = narrow.args[0]
    if not g.is_call(scaled, {aten.mul.Tensor}):
        return None
    wide, factor = scaled.args
    if not (isinstance(wide, fx.Node) and isinstance(factor, fx.Node) and g.is_call(factor, {aten.rsqrt.default})):
        return None
    shifted: Any = factor.args[0]
    if not g.is_call(shifted, {aten.add.Tensor}) or not isinstance(shifted.args[1], float) or shifted.kwargs:
        return None
    mean: Any = shifted.args[0]
    if not g.is_call(mean, {aten.mean.dim}) or list(mean.args[1]) not in ([-1], [g.value(wide).dim() - 1]):
        return None
    square: Any = mean.args[0]
    if mean.args[2:] != (True,) or mean.kwargs or not g.is_call(square, {aten.pow.Tensor_Scalar}):
        return None
    x = wide.args[0] if g.is_call(wide, g.CASTS) else None
    if square.args != (wide, 2) or not isinstance(x, fx.Node) or g.value(wide).dtype is not torch.float32:
        return None
    if g.value(x).dtype is not g.value(narrow).dtype or g.value(x).dtype not in (torch.bfloat16, torch.float16):
        return None
    # The factor among them: where backward keeps the one that forward used, it must be the same one.
    return x, shifted.args[1], [*inside, scaled, factor, shifted, mean, square]


def walk(node: fx.Node, targets: frozenset[Any], passed: list[fx.Node]) -> fx.Node:
    """`g.strip` that notes what it passes."""
    while g.is_call(node, targets) and isinstance(node.args[0], fx.Node):
        passed.append(node)
        node = node.args[0]
    return node

"""Graph texts of a build as records: the canonical text (`fp8c.graph.graph_text`) read back, without torch.

%mm = aten.mm(%view, %t) : bf16[1024, 1536]   # fprop model.layers.0.self_attn.q_a_proj  modeling.py:440
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from fp8c.diagnostics import ExitCode, fail

GEMM_KINDS = ("fprop", "dgrad", "wgrad")

_LINE = re.compile(r"  %(?P<name>\S+) = (?P<op>[^(]+)\((?P<rest>.*)", re.DOTALL)
_REFERENCE = re.compile(r"%(\w+)")
_PLACE = re.compile(r":\d+$")
_TENSOR = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[^\]]*)\]")

#: Bytes of an element, by the dtype names of the canonical text.
ITEM_BYTES = {
    **{"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2},
    **{"e4m3": 1, "e5m2": 1, "e8m0": 1, "u8": 1, "i8": 1, "b8": 1},
}


@dataclass(frozen=True, slots=True)
class Node:
    """One line of a graph.

    op:     operator as the text has it (`aten.mm`); `input` for a graph input, whose `args` is its name, "" for data
    args:   argument text, node references included
    gemm:   fprop, dgrad or wgrad; "" for anything else
    where:  key of the operator use the node belongs to, or its module's path; "" when the text says neither
    place:  `file.py:line` of the model
    inputs: names of the nodes it reads, in order, repeats included
    """

    name: str
    op: str
    args: str
    type: str
    gemm: str
    where: str
    place: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A graph's nodes in order, and the names it returns."""

    name: str
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


def read_graph(text: str, name: str) -> Graph:
    """Read a graph text. Raises: DiagnosticError E0612 for a line that is none of a graph."""
    lines = text.splitlines()
    if not lines or not lines[0].startswith("graph "):
        raise _not_a_graph(name, 1)
    nodes: list[Node] = []
    outputs: tuple[str, ...] = ()
    for number, line in enumerate(lines[1:], 2):
        if line.startswith("  return "):
            outputs = tuple(_REFERENCE.findall(line))
            continue
        match = _LINE.match(line)
        if match is None:
            raise _not_a_graph(name, number)
        nodes.append(_node(match))
    return Graph(name, tuple(nodes), outputs)


def _not_a_graph(name: str, number: int) -> Exception:
    return fail(
        "E0612",
        f"line {number} of the {name} graph is no line of a graph",
        help="build it again with `fp8c compile`",
        exit_code=ExitCode.USAGE,
    )


def _node(match: re.Match[str]) -> Node:
    rest, _, notes = _split_last(match["rest"], "   # ")
    head, between, type_ = _split_last(rest, ") : ")
    args = head if between else rest.removesuffix(")")
    gemm = where = place = ""
    if notes:
        *before, last = notes.split("  ")
        place = last if _PLACE.search(last) else ""
        where = before[0] if before else "" if place else last
        first, _, key = where.partition(" ")
        if first in GEMM_KINDS and key:
            gemm, where = first, key
    op = match["op"]
    inputs = () if op == "input" else tuple(_REFERENCE.findall(args))
    return Node(match["name"], op, args, type_, gemm, where, place, inputs)


def _split_last(text: str, mark: str) -> tuple[str, str, str]:
    """Like `rpartition`, but the text comes first when the mark is not there."""
    before, found, behind = text.rpartition(mark)
    return (before, found, behind) if found else (behind, "", "")


# --- types ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def type_bytes(text: str) -> int:
    """Bytes of a value by its type text; several tensors are added, symbolic sizes count as 1."""
    return sum(count * ITEM_BYTES.get(dtype, 0) for dtype, count in _tensors(text))


@lru_cache(maxsize=None)
def main_dtype(text: str) -> str:
    """dtype of the first tensor of a type text, "" for none."""
    return next((dtype for dtype, _ in _tensors(text)), "")


def _tensors(text: str) -> Iterator[tuple[str, int]]:
    for match in _TENSOR.finditer(text):
        sizes = [s.strip() for s in match["sizes"].split(",") if s.strip()]
        yield match["dtype"], math.prod(int(s) if s.isdecimal() else 1 for s in sizes)


_FORMAT = re.compile(r"'((?:e4m3|e5m2|e5m6)\[[^']*)'")


@lru_cache(maxsize=None)
def formats_in(args: str) -> tuple[str, ...]:
    """Formats an operator names among its arguments, in order: `'e4m3[1x128] fp32'`."""
    return tuple(_FORMAT.findall(args))


# --- kinds of operators -----------------------------------------------------------------------------------------------

PLAIN_GEMMS = frozenset({"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._grouped_mm"})

#: Operators that move no data, or only name a part of it: the viewer draws edges through them.
PLUMBING = frozenset(
    {
        *("getitem", "aten.view", "aten._unsafe_view", "aten.reshape", "aten.alias", "aten.detach", "aten.t"),
        *("aten.transpose.int", "aten.permute", "aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes"),
        *("aten.select.int", "aten.expand", "aten.unsqueeze", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze"),
        *("aten.chunk", "aten.unbind.int", "aten.as_strided", "aten.view.dtype", "aten.sym_size.int"),
        *("aten.contiguous", "_c10d_functional.wait_tensor", "aten._assert_tensor_metadata"),
    }
)


def is_collective(op: str) -> bool:
    return op == "fp8c.exchange" or (op.startswith("_c10d_functional.") and op != "_c10d_functional.wait_tensor")


def is_fp8_gemm(op: str) -> bool:
    """`fp8c.scaled_mm`, `fp8c.scaled_grouped_wgrad`, and their like."""
    return op.startswith("fp8c.scaled_")


def is_gemm(op: str) -> bool:
    return is_fp8_gemm(op) or op in PLAIN_GEMMS


def is_cast(op: str) -> bool:
    """quantize, dequantize, requantize, and the fused operators that quantize more than one value or from another."""
    return op.startswith("fp8c.") and "quantize" in op


def family(op: str) -> str:
    """What kind of work an operator is, for tables of traffic."""
    if is_fp8_gemm(op):
        return "FP8 GEMMs"
    if op in PLAIN_GEMMS:
        return "other GEMMs"
    if "attention" in op:
        return "attention"
    if is_cast(op):
        return "FP8 casts"
    if is_collective(op):
        return "collectives"
    return "views" if op in PLUMBING else "everything else"


def precision(node: Node) -> str:
    """What the node computes in, as text: operand formats of a GEMM, the format of a cast, else the result's dtype."""
    formats = formats_in(node.args)
    if is_fp8_gemm(node.op) and len(formats) >= 2:
        return f"{formats[0]} × {formats[1]}"
    if is_cast(node.op) and formats:
        return formats[-1]
    return main_dtype(node.type)


def bytes_moved(node: Node, types: Mapping[str, str]) -> int:
    """Bytes the operator reads and writes when it runs on its own; 0 for views. `types`: type text by node name."""
    if node.op in PLUMBING or node.op in ("input", "attribute"):
        return 0
    return type_bytes(node.type) + sum(type_bytes(types.get(name, "")) for name in dict.fromkeys(node.inputs))

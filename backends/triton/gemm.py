"""The scaled GEMMs of `fp8c.ops` in Triton: the portable tensor-core form, for what no CUDA kernel serves.

Any sizes, strides and group splits; offsets stay on the device, so nothing waits for it. What only the plain form can do
(groups that no loop step divides, outputs of another dtype) raises `Unsupported`.

Legend as in `fp8c.ops`: M, T, N, K sizes, E experts, `offs` int32 [E] cumulative ends, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.backends.reference.gemm import check_experts, check_operands
from fp8c.backends.triton.gemm_kernel import DENSE, REDUCTION_GROUPS, ROW_GROUPS, gemm_kernel
from fp8c.backends.triton.quantize import KINDS
from fp8c.diagnostics import fail
from fp8c.formats import WHOLE, Element, Format
from fp8c.ops import check_sum, quantized_format
from fp8c.ops.operands import Operands, takes_operands

_TYPES = {Element.E4M3: "e4m3", Element.E5M2: "e5m2"}
_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
_STEPS = (32, 64, 128)  # of the reduction between promotions; 32 is the tensor core's instruction
_BAND = 8
_ALIGNMENT = 16  # bytes of a load, and so of addresses and row strides
_NATIVE_GROUP = (1, 32)  # with E8M0 scales, on compute capability 10.0


@dataclass(frozen=True)
class Tile:
    """BM x BN of the output for one program."""

    rows: int
    cols: int
    warps: int
    stages: int


NARROW = Tile(64, 64, 8, 2)  # operands that are read byte by byte: their addresses take registers
SMALL = Tile(64, 128, 4, 3)  # 64 rows are wgmma's least
LARGE = Tile(128, 128, 8, 3)  # 96 KiB of shared memory: what compute capability 8.9 has


@takes_operands
def scaled_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] @ b [N, K].T -> [M, N]; schema and meaning: `fp8c.ops`, `backends.reference.gemm`."""
    out = x.a.new_empty((x.a.shape[0], x.b.shape[0]), dtype=out_dtype)
    return multiply("scaled_mm", DENSE, x, out)


@takes_operands
def scaled_grouped_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """Rows of a [T, K] by their expert's b [E, N, K] -> [T, N]; rows past offs[-1] are 0."""
    check_experts("scaled_grouped_mm", x.ends, x.b.shape[0])
    out = x.a.new_empty((x.a.shape[0], x.b.shape[1]), dtype=out_dtype)
    return multiply("scaled_grouped_mm", ROW_GROUPS, x, out)


@takes_operands
def scaled_grouped_wgrad(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """Each expert's tokens of a [N, T'] and b [K, T'] -> [E, N, K]; experts lie in whole groups of tokens (`fp8c.ops`)."""
    out = x.a.new_empty((x.ends.shape[0], x.a.shape[0], x.b.shape[0]), dtype=out_dtype)
    return multiply("scaled_grouped_wgrad", REDUCTION_GROUPS, x, out)


@takes_operands
def scaled_mm_add_(acc: Tensor, x: Operands) -> None:
    """acc f32 [M, N] += a @ b.T. Each element is added to exactly once, so the result does not depend on timing."""
    check_sum("scaled_mm_add_", acc, (x.a.shape[0], x.b.shape[0]))
    multiply("scaled_mm_add_", DENSE, x, acc, add=True)


@takes_operands
def scaled_grouped_wgrad_add_(acc: Tensor, x: Operands) -> None:
    """acc f32 [E, N, K] += each expert's weight gradient, as `scaled_grouped_wgrad` computes it in FP32."""
    check_sum("scaled_grouped_wgrad_add_", acc, (x.ends.shape[0], x.a.shape[0], x.b.shape[0]))
    multiply("scaled_grouped_wgrad_add_", REDUCTION_GROUPS, x, acc, add=True)


@dataclass(frozen=True)
class _Loop:
    """What the formats ask of the kernel's loop: scale groups (0 for a whole axis), the step, who applies the scales."""

    left: Format
    right: Format
    step: int
    native: bool

    @property
    def groups(self) -> tuple[int, int, int, int]:
        assert self.left.group is not None and self.right.group is not None
        a_rows, a_cols, b_rows, b_cols = (0 if g == WHOLE else g for g in (*self.left.group, *self.right.group))
        return a_rows, a_cols, b_rows, b_cols


@cache
def _loop(name: str, a_fmt: str, b_fmt: str, promote_every: int, grouping: int, native_groups: bool) -> _Loop:
    left, right = quantized_format(a_fmt), quantized_format(b_fmt)
    assert left.group is not None and right.group is not None
    if left.element not in _TYPES or right.element not in _TYPES:
        raise Unsupported(f"no tensor core reads {left.element.value} by {right.element.value}")
    if grouping == ROW_GROUPS and left.group[0] != 1:
        raise fail("E0520", f"fp8c::{name}: groups of a must be one row high, found '{a_fmt}'")
    if grouping == REDUCTION_GROUPS and not (left.group[0] == 1 and left.group[1] == right.group[1] > 1):
        text = f"found '{left.text}' and '{right.text}'"
        raise fail("E0520", f"fp8c::{name}: groups must run along T and be the same, as 1x128, {text}")
    native = native_groups and left.group == right.group == _NATIVE_GROUP
    native = native and left.scale == right.scale and KINDS[left.scale] == 2  # type: ignore[index]
    widths = [g for g in (left.group[1], right.group[1], promote_every or WHOLE) if g != WHOLE]
    step = 128 if native else min([128, *widths])
    if not native and (step not in _STEPS or any(w % step for w in widths)):
        raise Unsupported(f"no loop promotes every {promote_every or 'group'} of groups {a_fmt} by {b_fmt}")
    return _Loop(left, right, step, native)


def multiply(name: str, grouping: int, x: Operands, out: Tensor, add: bool = False) -> Tensor:
    """Write the product into `out`, or add it. Raises: `Unsupported` before anything is written."""
    a, a_scale, b, b_scale = x[:4]
    offs = x.offs
    check_operands(name, a, b)
    loop = _loop(name, x.a_fmt, x.b_fmt, x.promote_every, grouping, _scales_natively(a.device))
    if out.dtype not in _OUTPUTS:
        raise Unsupported(f"no instance writes {out.dtype}")
    if out.numel() == 0:
        return out
    experts = 1 if offs is None else offs.shape[0]
    m, n, k = a.shape[0], b.shape[-2], a.shape[1]
    tile = SMALL if m <= SMALL.rows or (grouping == ROW_GROUPS and m <= SMALL.rows * experts) else LARGE
    if k % _ALIGNMENT or any(t.stride(-1) != 1 or t.stride(-2) % _ALIGNMENT for t in (a, b)):
        tile = NARROW
    tiles_n = triton.cdiv(n, tile.cols)
    match grouping:
        case 0:
            tiles = triton.cdiv(m, tile.rows)
        case 1:  # each expert's last tile may be cut, and so may that of the rows after them
            tiles = m // tile.rows + experts + 1
        case _:
            tiles = triton.cdiv(m, tile.rows) * experts
    if tiles * tiles_n >= 2**31:
        raise Unsupported(f"{tiles * tiles_n} tiles are more than one launch has")
    if offs is not None and (offs.dtype is not torch.int32 or not offs.is_contiguous()):
        offs = offs.to(torch.int32).contiguous()
    a_rows, a_cols, b_rows, b_cols = loop.groups
    a_scale, b_scale = (s.view(torch.uint8) if s.dtype is torch.float8_e8m0fnu else s for s in (a_scale, b_scale))
    assert loop.left.scale is not None and loop.right.scale is not None
    gemm_kernel[(tiles * tiles_n,)](
        a, a_scale, b, b_scale, out, a if offs is None else offs, m, n, k, experts,
        *a.stride(), *a_scale.stride(),
        b.stride(0) if grouping == ROW_GROUPS else 0, *b.stride()[-2:],
        b_scale.stride(0) if grouping == ROW_GROUPS else 0, *b_scale.stride()[-2:],
        out.stride(0) if grouping == REDUCTION_GROUPS else 0, out.stride(-2),
        GROUPING=grouping, E_PAD=triton.next_power_of_2(experts + 1), BM=tile.rows, BN=tile.cols, BK=loop.step,
        BAND=_BAND, A_ROWS=a_rows, A_COLS=a_cols, B_ROWS=b_rows, B_COLS=b_cols,
        A_KIND=KINDS[loop.left.scale], B_KIND=KINDS[loop.right.scale],
        A_TYPE=_TYPES[loop.left.element], B_TYPE=_TYPES[loop.right.element],
        EVEN_K=(k % loop.step == 0 if grouping != REDUCTION_GROUPS else a_cols % loop.step == 0),
        ADD=add, NATIVE=loop.native, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@cache
def _native_on(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index)[0] == 10


_COMPILED_FOR: ContextVar[str] = ContextVar("compiled_for", default="")


def _scales_natively(device: torch.device) -> bool:
    return _native_on(device.index) if device.type == "cuda" else _COMPILED_FOR.get() == "sm100"


@contextmanager
def compiled_for(architecture: str) -> Iterator[None]:
    """Inside, instances for this architecture are chosen for tensors that are on no GPU (`triton.ahead`)."""
    token = _COMPILED_FOR.set(architecture)
    try:
        yield
    finally:
        _COMPILED_FOR.reset(token)

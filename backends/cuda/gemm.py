"""The scaled GEMMs of `fp8c.ops` on Hopper, by gemm.cu.

What a kernel can't take raises `Unsupported`, and `backends.gemms` asks another implementation: another GPU, no compiler
and no cached kernel, formats without an instance. Payloads are read where they are; one that the copy engine can't address
(reduction not innermost, row stride no multiple of 16 bytes) is copied first, with a remark.

Legend as in `fp8c.ops`: M, T, N, K sizes, E experts, `offs` int32 [E] cumulative ends, on the device.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fp8c.backends.cuda import tiles
from fp8c.backends.cuda.config import BLOCK_K, GemmConfig, Grouping, Output, Scales
from fp8c.backends.cuda.launch import (
    TMA_ALIGNMENT_BYTES,
    Launch,
    current_stream,
    multiprocessors,
    prepare,
    reserved_multiprocessors,
)
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.diagnostics import Diagnostic, DiagnosticError, Severity, render
from fp8c.formats import WHOLE, Element, Format
from fp8c.ops import check_sum, quantized_format
from fp8c.ops.operands import Operands, takes_operands

_LOG = logging.getLogger(__name__)
_HOPPER = (9, 0)
_ROW, _BLOCK, _TENSOR = (1, BLOCK_K), (BLOCK_K, BLOCK_K), (WHOLE, WHOLE)
_SCALES = {(_ROW, _BLOCK): Scales.PER_BLOCK, (_ROW, _ROW): Scales.PER_ROW, (_TENSOR, _TENSOR): Scales.PER_TENSOR}
_TYPES = {Element.E4M3: "e4m3", Element.E5M2: "e5m2"}
#: Launches made ready, by everything they depend on: a step repeats its GEMMs at the same addresses.
_READY: dict[tuple[object, ...], Launch] = {}
_MOST_READY = 8192  # of about 3 KB
OUTPUTS = {torch.bfloat16: Output.BF16, torch.float32: Output.FP32}


@takes_operands
def scaled_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] @ b [N, K].T -> [M, N]; schema and meaning: `fp8c.ops`, `backends.reference.gemm`."""
    plan = _Plan.of(x, Grouping.DENSE)
    return multiply(plan, x, x.a.new_empty((x.a.shape[0], x.b.shape[0]), dtype=out_dtype))


@takes_operands
def scaled_grouped_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """Rows of a [T, K] by their expert's b [E, N, K] -> [T, N]; rows past offs[-1] are 0."""
    plan = _Plan.of(x, Grouping.ROW_GROUPS)
    return multiply(plan, x, x.a.new_empty((x.a.shape[0], x.b.shape[1]), dtype=out_dtype))


@takes_operands
def scaled_grouped_wgrad(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """Each expert's tokens of a [N, T'] and b [K, T'] -> [E, N, K]; experts lie in whole groups of tokens (`fp8c.ops`)."""
    plan = _Plan.of(x, Grouping.REDUCTION_GROUPS)
    return multiply(plan, x, x.a.new_empty((x.ends.shape[0], x.a.shape[0], x.b.shape[0]), dtype=out_dtype))


@dataclass(frozen=True, eq=False)
class _Plan:
    """What formats and device allow, before sizes are known. One object for each (`plan_of`), so it is a quick key."""

    scales: Scales
    grouping: Grouping
    promote: bool
    a_type: str
    b_type: str

    @staticmethod
    def of(x: Operands, grouping: Grouping) -> _Plan:
        plan = plan_of(x.a_fmt, x.b_fmt, x.promote_every, grouping)
        if _capability(x.a.device.index) != _HOPPER:
            raise Unsupported("the kernels are for compute capability 9.0")
        return plan

    def instance(self, a: Tensor, b: Tensor, output: Output, offs: Tensor | None, multiprocessors: int) -> GemmConfig:
        """The instance that serves operands of these sizes, whose data may be on no GPU."""
        groups = 1 if offs is None else offs.shape[0]
        shape = tiles.Shape(a.shape[0], b.shape[-2], a.shape[1], groups, multiprocessors)
        return tiles.choose(shape, self.scales, self.grouping, output, self.promote, self.a_type, self.b_type)


@cache
def plan_of(a_fmt: str, b_fmt: str, promote_every: int, grouping: Grouping) -> _Plan:
    left, right = quantized_format(a_fmt), quantized_format(b_fmt)
    assert left.group is not None and right.group is not None
    scales = _SCALES.get((left.group, right.group))
    if scales is None:
        raise Unsupported(f"no instance for groups {left.group_text} by {right.group_text}")
    # 0: promote only where a scale changes along K, which is every 128 unless the scales are per tensor.
    if promote_every not in (0, BLOCK_K):
        raise Unsupported(f"no instance promotes every {promote_every} of K")
    if grouping is Grouping.ROW_GROUPS and scales is Scales.PER_ROW:
        raise Unsupported("no instance for 1x128 scales of expert weights")
    if grouping is not Grouping.DENSE and scales is Scales.PER_TENSOR:
        raise Unsupported("no instance for grouped GEMMs with one scale a tensor")
    promote = promote_every != 0 or scales is not Scales.PER_TENSOR
    return _Plan(scales, grouping, promote, _type_of(left), _type_of(right))


def _type_of(fmt: Format) -> str:
    if fmt.element not in _TYPES:
        raise Unsupported(f"no tensor core reads {fmt.element.value}")
    return _TYPES[fmt.element]


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def multiply(plan: _Plan, x: Operands, out: Tensor) -> Tensor:
    """Write the product into `out`, whose dtype is checked here."""
    if out.dtype not in OUTPUTS:
        raise Unsupported(f"no instance writes {out.dtype}")
    run(plan, x, out, OUTPUTS[out.dtype])
    return out


@takes_operands
def scaled_mm_add_(acc: Tensor, x: Operands) -> None:
    """acc f32 [M, N] += a @ b.T. Each element is added to exactly once, so the result does not depend on timing."""
    check_sum("scaled_mm_add_", acc, (x.a.shape[0], x.b.shape[0]))
    run(_Plan.of(x, Grouping.DENSE), x, acc, Output.FP32_ADD)


@takes_operands
def scaled_grouped_wgrad_add_(acc: Tensor, x: Operands) -> None:
    """acc f32 [E, N, K] += each expert's weight gradient, as `scaled_grouped_wgrad` computes it in FP32."""
    check_sum("scaled_grouped_wgrad_add_", acc, (x.ends.shape[0], x.a.shape[0], x.b.shape[0]))
    run(_Plan.of(x, Grouping.REDUCTION_GROUPS), x, acc, Output.FP32_ADD)


def run(plan: _Plan, x: Operands, out: Tensor, output: Output) -> None:
    a, a_scale, b, b_scale = x[:4]
    offs = x.offs
    key = _call_key(plan, x, out, output)
    ready = _READY.get(key)
    if ready is not None:
        ready.start()
        return
    if out.numel() == 0:
        return
    if a.shape[-1] == 0:
        if output is not Output.FP32_ADD:
            out.zero_()
        return
    config = plan.instance(a, b, output, offs, multiprocessors(a.device.index))
    a, b = _addressable(a), _addressable(b)
    a_scale, b_scale = a_scale.float(), b_scale.float()  # E8M0 is read as the FP32 it stands for
    if plan.scales is not Scales.PER_TENSOR:
        a_scale = _rows_innermost(a_scale)
    if plan.scales is Scales.PER_ROW:
        b_scale = _rows_innermost(b_scale)
    if offs is not None and (offs.dtype is not torch.int32 or not offs.is_contiguous()):
        offs = offs.to(torch.int32).contiguous()
    try:
        ready = prepare(config, a, a_scale, b, b_scale, out, offs)
        ready.start()
    except DiagnosticError as error:
        if error.diagnostics[0].code == "E0430":
            raise Unsupported(error.diagnostics[0].message) from None
        raise
    if all(
        used is it for used, it in zip((a, a_scale, b, b_scale, offs), (*x[:4], x.offs))
    ):  # a copy is made anew in every call
        if len(_READY) >= _MOST_READY:
            _READY.clear()
        _READY[key] = ready


def _call_key(plan: _Plan, x: Operands, out: Tensor, output: Output) -> tuple[object, ...]:
    """All that a launch depends on. Every step computes it for every GEMM, so it is written out."""
    a, a_scale, b, b_scale = x[:4]
    offs, index = x.offs, a.device.index
    return (
        plan, output.value, index, current_stream(index), reserved_multiprocessors(),
        a.data_ptr(), a.shape, a.stride(), a_scale.data_ptr(), a_scale.shape, a_scale.stride(), a_scale.dtype,
        b.data_ptr(), b.shape, b.stride(), b_scale.data_ptr(), b_scale.shape, b_scale.stride(), b_scale.dtype,
        out.data_ptr(), out.shape, out.stride(),
        None if offs is None else (offs.data_ptr(), offs.shape, offs.stride(), offs.dtype),
    )  # fmt: skip


def _addressable(data: Tensor) -> Tensor:
    """The payload itself when TMA can address it, else a copy with padded rows."""
    strides = data.stride()
    rows_merge = data.dim() == 2 or strides[0] == data.shape[1] * strides[1] or data.shape[0] == 1
    is_strided = strides[-1] == 1 and strides[-2] % TMA_ALIGNMENT_BYTES == 0 and strides[-2] >= data.shape[-1]
    if is_strided and rows_merge and data.data_ptr() % TMA_ALIGNMENT_BYTES == 0:
        return data
    _remark("a GEMM operand", f"the copy engine can't address strides {strides}: copied")
    *leading, k = data.shape
    padded = data.new_empty((*leading, -(-k // TMA_ALIGNMENT_BYTES) * TMA_ALIGNMENT_BYTES))
    return padded[..., :k].copy_(data)


def _rows_innermost(scale: Tensor) -> Tensor:
    """1x128 scales [rows, K / 128] stored with rows innermost and padded to a multiple of 4."""
    is_laid_out = (scale.stride(0) == 1 or scale.shape[0] == 1) and scale.stride(1) % 4 == 0 and scale.stride(1) > 0
    if is_laid_out and scale.stride(1) >= scale.shape[0] and scale.data_ptr() % TMA_ALIGNMENT_BYTES == 0:
        return scale
    rows, cols = scale.shape
    stored = scale.new_empty((cols, -(-rows // 4) * 4))[:, :rows]
    return stored.copy_(scale.t()).t()


@cache
def _remark(subject: str, reason: str) -> None:
    _LOG.warning("%s", render(Diagnostic("R0430", f"{subject}: {reason}", severity=Severity.REMARK)))

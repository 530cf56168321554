"""SwiGLU joined with the quantizes around it: plain forms and fakes of the operators that `fused` registers.

The plain forms are the model's own operators in its own types (silu and each product rounded to the type of its
operands), so they agree with the unfused step bit for bit. A weight per row is the router's, moved in front of the
experts' down-projection (`fp8c/capture.py`).

Legend: R rows, F features of the SwiGLU; gate_up [R, 2F] holds the gate in its first F columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8c.ops import check_quantize_input, empty_quantized, quantized_format, restarts

SCHEMAS = {
    "swiglu_quantize": "(Tensor gate, Tensor up, Tensor? weight, str fmt) -> (Tensor, Tensor)",
    "swiglu_quantize_cached": (
        "(Tensor gate_up, Tensor? weight, str fmt, str cache) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "swiglu_backward_quantize": (
        "(Tensor dh, Tensor q, Tensor s, Tensor? weight, Tensor? offs, str cache, str fmt_h, str fmt_d, str fmt_dt) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


def swiglu_quantize(gate: Tensor, up: Tensor, weight: Tensor | None, fmt: str) -> tuple[Tensor, Tensor]:
    """quantize(silu(gate) * up [* weight], fmt).

    Shapes: gate, up f32|bf16|f16 [R, F], weight f32 [R] or None -> a pair [R, F].
    """
    return torch.ops.fp8c.quantize(_swiglu(gate, up, weight)[0], fmt)  # type: ignore[no-any-return]


def swiglu_quantize_cached(
    gate_up: Tensor, weight: Tensor | None, fmt: str, cache: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`swiglu_quantize` of the two halves, and gate_up itself in the format that backward reads.

    Shapes: gate_up [R, 2F], weight f32 [R] or None -> a pair [R, F] in `fmt`, a pair [R, 2F] in `cache`.
    """
    gate, up = gate_up.chunk(2, -1)
    return (*swiglu_quantize(gate, up, weight, fmt), *torch.ops.fp8c.quantize(gate_up, cache))


def swiglu_backward_quantize(
    dh: Tensor,
    q: Tensor,
    s: Tensor,
    weight: Tensor | None,
    offs: Tensor | None,
    cache: str,
    fmt_h: str,
    fmt_d: str,
    fmt_dt: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """SwiGLU computed again from its cached inputs and differentiated, with everything that backward quantizes of it.

    Shapes:  dh [R, F], the gradient of the (weighted) result; (q, s) a pair [R, 2F] in `cache`; weight f32 [R] or None;
             offs int32 [E] or None -> h in `fmt_h` (for wgrad of the down-projection), the gradient of gate_up in `fmt_d`
             (for dgrad) and in `fmt_dt` (for wgrad), and the gradient of weight f32 [R, 1] ([0, 1] without one).
    """
    gate, up = torch.ops.fp8c.dequantize(q, s, cache, dh.dtype).chunk(2, -1)
    h, silu, product = _swiglu(gate, up, weight)
    if weight is None:
        dproduct, dweight = dh, dh.new_empty((0, 1), dtype=torch.float32)
    else:
        dweight = (dh.float() * product).sum(1, keepdim=True)
        dproduct = (dh.float() * weight[:, None]).to(dh.dtype)
    dgate = torch.ops.aten.silu_backward(dproduct * up, gate)
    d = torch.cat((dgate, dproduct * silu), 1)
    results = [(h, fmt_h), (d, fmt_d), (d, fmt_dt)]
    pairs = [torch.ops.fp8c.quantize(x, f, restarts(quantized_format(f), offs)) for x, f in results]
    return (*pairs[0], *pairs[1], *pairs[2], dweight)


def _swiglu(gate: Tensor, up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The (weighted) result, silu(gate), and their product without the weight."""
    silu = torch.nn.functional.silu(gate)
    product = silu * up
    return product if weight is None else (product * weight[:, None]).to(gate.dtype), silu, product


# Fakes --------------------------------------------------------------------------------------------------------------


def fake_swiglu_quantize(gate: Tensor, up: Tensor, weight: Tensor | None, fmt: str) -> tuple[Tensor, Tensor]:
    check_quantize_input(gate)
    check_quantize_input(up)
    return empty_quantized(gate, gate.shape, quantized_format(fmt))


def fake_swiglu_quantize_cached(
    gate_up: Tensor, weight: Tensor | None, fmt: str, cache: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_quantize_input(gate_up)
    rows, cols = gate_up.shape
    first = empty_quantized(gate_up, (rows, cols // 2), quantized_format(fmt))
    return (*first, *empty_quantized(gate_up, (rows, cols), quantized_format(cache)))


def fake_swiglu_backward_quantize(
    dh: Tensor,
    q: Tensor,
    s: Tensor,
    weight: Tensor | None,
    offs: Tensor | None,
    cache: str,
    fmt_h: str,
    fmt_d: str,
    fmt_dt: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_quantize_input(dh)
    rows, cols = dh.shape
    pairs = [
        empty_quantized(dh, (rows, width), parsed, restarts(parsed, offs))
        for parsed, width in (
            (quantized_format(fmt_h), cols),
            *((quantized_format(f), 2 * cols) for f in (fmt_d, fmt_dt)),
        )
    ]
    return (*pairs[0], *pairs[1], *pairs[2], dh.new_empty((0 if weight is None else rows, 1), dtype=torch.float32))

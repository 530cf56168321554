"""The operators of fp8c: schema and fake implementation of each, and where their kernels come from.

A quantized value is a pair (data, scale): x ~= data.float() * scale, one scale for each group of the format. Kernels
live in `backends/`; importing one registers it (`backends.reference` for the CPU). A device without a kernel gets the
plain-tensor form registered with `register_portable` (`fp8c.ops.decompositions`), or error E0420.

Legend of shapes: T tokens, M rows of the output, N outputs, K reduction, E experts, g0 x g1 the group; `offs` is int32
[E], the cumulative end of each expert's rows, as `torch._grouped_mm` takes it.

Fakes work for symbolic and data-dependent sizes: they compute with sizes and never branch on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor

from fp8c.diagnostics import fail
from fp8c.formats import WHOLE, Element, Format, Rounding, ScaleKind
from fp8c.ops.operands import Operands, takes_operands

Size = int | SymInt

DATA_DTYPE = {Element.E4M3: torch.float8_e4m3fn, Element.E5M2: torch.float8_e5m2, Element.E5M6: torch.uint8}
SCALE_DTYPE = {
    ScaleKind.FP32: torch.float32,
    ScaleKind.POW2: torch.float32,
    ScaleKind.E8M0: torch.float8_e8m0fnu,
}
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

E5M6_CODES = 8  # E5M6 codes are packed eight at a time ...
E5M6_BYTES = 12  # ... into twelve bytes, the most significant bits first

_SCHEMAS = {
    "quantize": "(Tensor x, str fmt, Tensor? offs=None) -> (Tensor, Tensor)",
    "quantize_delayed": (
        "(Tensor x, str fmt, int history, str algo, int margin, str site, bool replay) -> (Tensor, Tensor)"
    ),
    "dequantize": ("(Tensor q, Tensor s, str fmt, ScalarType dtype, Tensor? offs=None, SymInt? cols=None) -> Tensor"),
    "requantize": ("(Tensor q, Tensor s, str src, str dst, Tensor? offs=None, SymInt? cols=None) -> (Tensor, Tensor)"),
    "scaled_mm": (
        "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, str a_fmt, str b_fmt, int promote_every, "
        "ScalarType out_dtype) -> Tensor"
    ),
    "scaled_grouped_mm": (
        "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offs, str a_fmt, str b_fmt, int promote_every, "
        "ScalarType out_dtype) -> Tensor"
    ),
    "scaled_grouped_wgrad": (
        "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offs, str a_fmt, str b_fmt, int promote_every, "
        "ScalarType out_dtype) -> Tensor"
    ),
    "scaled_mm_add_": (
        "(Tensor(a!) acc, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, str a_fmt, str b_fmt, int promote_every) "
        "-> ()"
    ),
    "scaled_grouped_wgrad_add_": (
        "(Tensor(a!) acc, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offs, str a_fmt, str b_fmt, "
        "int promote_every) -> ()"
    ),
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, bool enable_gqa) -> (Tensor, Tensor)"
    ),
    "attention_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, bool is_causal, "
        "float? scale, bool enable_gqa) -> (Tensor, Tensor, Tensor)"
    ),
}

_LIBRARY = torch.library.Library("fp8c", "DEF")  # type: ignore[no-untyped-call]
_PORTABLE: dict[str, Callable[..., Any]] = {}


def register_portable(name: str, implementation: Callable[..., Any]) -> None:
    """Use `implementation` for op `name` on every device that has no kernel of its own."""
    assert name in _SCHEMAS, name
    _PORTABLE[name] = implementation


def _portable_or_fail(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if name not in _PORTABLE:
            device = next((a.device.type for a in args if isinstance(a, Tensor)), "unknown")
            raise fail(
                "E0420",
                f"no kernel is registered for fp8c::{name} on device '{device}'",
                help="import fp8c.backends.reference (CPU) or fp8c.ops.decompositions (any device)",
            )
        return _PORTABLE[name](*args, **kwargs)

    return kernel


def portable(name: str) -> Callable[..., Any]:
    """The portable form of op `name`, for a kernel that can't take its operands. Calling it raises E0420 if there is none."""
    return _portable_or_fail(name)


# Kernels see the strides that the graph has: a GEMM operand may be a permuted view and must stay one.
KERNEL_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=KERNEL_TAGS)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _portable_or_fail(_name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


# Shapes -------------------------------------------------------------------------------------------------------------


def quantized_format(text: str) -> Format:
    """Read a format that `quantize` can produce.

    Raises: E0421 for a format without scales, with stochastic rounding or with delayed scales, which only
            `quantize_delayed` makes: what it gives has the same format without `delayed(...)`.
    """
    try:
        fmt = Format.parse(text)
    except ValueError as error:
        raise fail("E0421", str(error), help="write for example 'e4m3[1x128] fp32'") from None
    if not fmt.is_quantized:
        raise fail("E0421", f"format '{text}' has no scales, so there is nothing to quantize")
    if fmt.rounding is Rounding.STOCHASTIC:
        raise fail("E0421", f"format '{text}': no kernel rounds stochastically", help="drop 'stochastic'")
    if fmt.delayed is not None:
        raise fail("E0421", f"format '{text}': scales are computed from the tensor at hand", help="drop 'delayed(...)'")
    return fmt


def ceil_div(n: Size, d: int) -> Size:
    return (n + d - 1) // d


def groups_along(n: Size, group: int) -> Size:
    """How many groups an axis of length n has; `WHOLE` makes one."""
    return 1 if group == WHOLE else ceil_div(n, group)


def packed_cols(cols: Size) -> Size:
    """Bytes of one row of `cols` E5M6 codes."""
    return ceil_div(cols, E5M6_CODES) * E5M6_BYTES


def data_shape(shape: Sequence[Size], fmt: Format, experts: Size | None = None) -> list[Size]:
    """Shape of the data of a quantized tensor of this shape; [g0 * (R//g0 + E), C] when groups restart per expert.

    Then data row g0 * r + i belongs to scale row r (`scale_shape`): every expert starts a block of g0 rows, and the rows
    that no token fills hold 0. It is the data of the tensor whose experts are padded to whole groups, in place.
    """
    assert fmt.group is not None
    *leading, rows, cols = shape
    stored = rows if experts is None else fmt.group[0] * (rows // fmt.group[0] + experts)
    return [*leading, stored, packed_cols(cols) if fmt.element is Element.E5M6 else cols]


def scale_shape(shape: Sequence[Size], fmt: Format, experts: Size | None = None) -> list[Size]:
    """Shape of the scales: [..., ceil(R/g0), ceil(C/g1)], or [R//g0 + E, ceil(C/g1)] when groups restart per expert.

    With restarts, row t of expert e (rows start_e <= t < offs[e]) has scale row start_e//g0 + e + (t - start_e)//g0.
    Rows of different experts differ and all are below the bound: floor(a) + floor(b) <= floor(a + b) gives a largest row
    of at most t//g0 + e <= (R-1)//g0 + E-1 < R//g0 + E, and expert e+1 starts at (start_e + n)//g0 + e+1, above
    start_e//g0 + (n-1)//g0 + e. The rows that no expert owns hold 1.0.
    """
    assert fmt.group is not None
    *leading, rows, cols = shape
    g0, g1 = fmt.group
    scale_rows = groups_along(rows, g0) if experts is None else rows // g0 + experts
    return [*leading, scale_rows, groups_along(cols, g1)]


def experts_of(fmt: Format, offs: Tensor | None, ndim: int) -> Size | None:
    """Number of experts when the format's groups restart at each of them.

    Raises: E0521 when offs goes with a format or a tensor for which groups can't restart.
    """
    assert fmt.group is not None
    if offs is None:
        return None
    if fmt.group[0] <= 1 or ndim != 2 or offs.dim() != 1:
        raise fail(
            "E0521",
            f"offs was given with format '{fmt.text}' and a {ndim}-D tensor; only groups of several rows of a 2-D tensor "
            "restart at each expert",
            help="pass offs=None, or a format such as 'e4m3[128x1] fp32'",
        )
    return offs.shape[0]


def check_no_offsets(name: str, offs: Tensor | None) -> None:
    """Raises: E0521 for offsets where a pair is read: the blocks of experts are ordinary groups of the data as stored."""
    if offs is not None:
        raise fail(
            "E0521",
            f"fp8c::{name} takes no offs: experts' data is stored in whole groups, and is read like any other",
            help="pass offs=None; fp8c.ops.stored_rows tells where each row is",
        )


def stored_rows(offs: Tensor, rows: Size, group: int) -> Tensor:
    """Where each of `rows` rows is stored when groups of `group` rows restart at each expert: i64 [rows].

    It means nothing for rows past offs[-1], which aren't stored.
    """
    row = torch.arange(rows, device=offs.device)  # type: ignore[arg-type]  # takes a SymInt as well
    expert = torch.searchsorted(offs, row, right=True)
    start = torch.cat((offs.new_zeros(1), offs)).long()[expert]
    return (start // group + expert) * group + row - start


# Layout: what the GEMMs read without a copy. The copy engine needs the reduction innermost, row strides of 16 bytes.
DATA_ALIGNMENT = 16  # elements of one byte
SCALE_ALIGNMENT = 4  # elements of four bytes


def empty_quantized(
    like: Tensor, shape: Sequence[Size], fmt: Format, offs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Uninitialised (data, scale) of a tensor of `shape`, in the layout that every implementation returns.

    Matrices in groups of one column (128x1) are stored transposed: their permuted view is what wgrad reads. Scales of
    groups of one row or one column are stored with the other axis innermost: for 1x128 [T, G] in memory [G, T rounded up
    to 4]. Everything else is contiguous.
    """
    assert fmt.scale is not None and fmt.group is not None
    experts = experts_of(fmt, offs, len(shape))
    return (
        empty_data(like, data_shape(shape, fmt, experts), fmt),
        empty_scale(like, scale_shape(shape, fmt, experts), fmt),
    )


def empty_data(like: Tensor, shape: Sequence[Size], fmt: Format) -> Tensor:
    """Uninitialised data of `shape` (`data_shape`), laid out as `empty_quantized` says."""
    dtype = DATA_DTYPE[fmt.element]
    if not is_stored_transposed(fmt, len(shape)):
        return like.new_empty(list(shape), dtype=dtype)
    return like.new_empty_strided(list(shape), (1, round_up(shape[0], DATA_ALIGNMENT)), dtype=dtype)


def empty_scale(like: Tensor, shape: Sequence[Size], fmt: Format) -> Tensor:
    """Uninitialised scales of `shape` (`scale_shape`), laid out as `empty_quantized` says."""
    assert fmt.scale is not None and fmt.group is not None
    dtype = SCALE_DTYPE[fmt.scale]
    g0, g1 = fmt.group
    if len(shape) != 2 or WHOLE in fmt.group or (g0 != 1 and g1 != 1):
        return like.new_empty(list(shape), dtype=dtype)
    rows, cols = shape
    strides = (1, round_up(rows, SCALE_ALIGNMENT)) if g0 == 1 else (round_up(cols, SCALE_ALIGNMENT), 1)
    return like.new_empty_strided(list(shape), strides, dtype=dtype)


def is_stored_transposed(fmt: Format, ndim: int) -> bool:
    assert fmt.group is not None
    g0, g1 = fmt.group
    return ndim == 2 and g1 == 1 and g0 not in (1, WHOLE) and fmt.element is not Element.E5M6


def lay_out(data: Tensor, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """A pair of any strides, copied to the layout of `empty_quantized`."""
    return (
        empty_data(data, data.shape, fmt).copy_(data),
        empty_scale(scale, scale.shape, fmt).copy_(scale),
    )


def round_up(n: Size, multiple: int) -> Size:
    return ceil_div(n, multiple) * multiple


def _check_rank(name: str, tensor: Tensor, ranks: tuple[int, ...]) -> None:
    if tensor.dim() not in ranks:
        wanted = " or ".join(f"{r}-D" for r in ranks)
        raise fail("E0520", f"fp8c::{name}: expected a {wanted} tensor, found shape {list(tensor.shape)}")


def check_quantize_input(x: Tensor) -> None:
    """Raises: E0520 unless x is a 2-D or 3-D tensor of FP32, BF16 or FP16."""
    _check_rank("quantize", x, (2, 3))
    if x.dtype not in INPUT_DTYPES:
        raise fail("E0520", f"fp8c::quantize: expected float32, bfloat16 or float16, found {x.dtype}")


def original_shape(q: Tensor, fmt: Format, cols: Size | None) -> list[Size]:
    """Shape of the tensor that was quantized. Raises: E0520 when E5M6 data comes without its column count."""
    if fmt.element is not Element.E5M6:
        return list(q.shape)
    if cols is None:
        raise fail("E0520", "E5M6 data does not tell how many columns it packs", help="pass cols")
    return [*q.shape[:-1], cols]


# Fakes --------------------------------------------------------------------------------------------------------------


def _fake_quantize(x: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_quantize_input(x)
    return empty_quantized(x, x.shape, quantized_format(fmt), offs)


def _fake_quantize_delayed(
    x: Tensor, fmt: str, history: int, algo: str, margin: int, site: str, replay: bool
) -> tuple[Tensor, Tensor]:
    check_quantize_input(x)
    return empty_quantized(x, x.shape, check_delayed(fmt), None)


def check_delayed(text: str) -> Format:
    """Raises: E0421 unless the format has one scale for a tensor."""
    fmt = quantized_format(text)
    if fmt.group != (WHOLE, WHOLE) or fmt.element is Element.E5M6:
        raise fail("E0421", f"format '{text}': delayed scales are for operands with one scale for a tensor")
    return fmt


def _fake_dequantize(
    q: Tensor, s: Tensor, fmt: str, dtype: torch.dtype, offs: Tensor | None = None, cols: Size | None = None
) -> Tensor:
    parsed = quantized_format(fmt)
    _check_rank("dequantize", q, (2, 3))
    check_no_offsets("dequantize", offs)
    return q.new_empty(original_shape(q, parsed, cols), dtype=dtype)


def restarts(fmt: Format, offs: Tensor | None) -> Tensor | None:
    """`offs` when this format's groups are taller than one row, so that they restart at each expert; else None.

    `requantize` takes one `offs` for both of its formats: 1x128 groups never cross an expert and do without it.
    """
    assert fmt.group is not None
    return None if fmt.group[0] == 1 else offs


def _fake_requantize(
    q: Tensor, s: Tensor, src: str, dst: str, offs: Tensor | None = None, cols: Size | None = None
) -> tuple[Tensor, Tensor]:
    old, new = quantized_format(src), quantized_format(dst)
    _check_rank("requantize", q, (2, 3))
    check_no_offsets("requantize of groups of several rows", restarts(old, offs))
    return empty_quantized(q, original_shape(q, old, cols), new, restarts(new, offs))


@takes_operands
def _fake_scaled_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    for tensor in x[:4]:
        _check_rank("scaled_mm", tensor, (2,))
    return x.a.new_empty((x.a.shape[0], x.b.shape[0]), dtype=out_dtype)


@takes_operands
def _fake_scaled_grouped_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    for tensor, rank in ((x.a, 2), (x.a_scale, 2), (x.b, 3), (x.b_scale, 3), (x.ends, 1)):
        _check_rank("scaled_grouped_mm", tensor, (rank,))
    return x.a.new_empty((x.a.shape[0], x.b.shape[1]), dtype=out_dtype)


@takes_operands
def _fake_scaled_grouped_wgrad(x: Operands, out_dtype: torch.dtype) -> Tensor:
    for tensor, rank in ((x.a, 2), (x.a_scale, 2), (x.b, 2), (x.b_scale, 2), (x.ends, 1)):
        _check_rank("scaled_grouped_wgrad", tensor, (rank,))
    return x.a.new_empty((x.ends.shape[0], x.a.shape[0], x.b.shape[0]), dtype=out_dtype)


def _fake_scaled_mm_add_(acc: Tensor, *operands: Any) -> None:
    product = _fake_scaled_mm(*operands, torch.float32)
    check_accumulator("scaled_mm_add_", acc, product.dim())


def _fake_scaled_grouped_wgrad_add_(acc: Tensor, *operands: Any) -> None:
    product = _fake_scaled_grouped_wgrad(*operands, torch.float32)
    check_accumulator("scaled_grouped_wgrad_add_", acc, product.dim())


def check_accumulator(name: str, acc: Tensor, rank: int) -> None:
    """Raises: E0520 unless acc is FP32 with this many axes."""
    _check_rank(name, acc, (rank,))
    if acc.dtype is not torch.float32:
        raise fail("E0520", f"fp8c::{name}: expected a float32 accumulator, found {acc.dtype}")


def check_sum(name: str, acc: Tensor, shape: tuple[int, ...]) -> None:
    """Raises: E0520 unless acc is FP32 of this shape, its last axis dense."""
    check_accumulator(name, acc, len(shape))
    if acc.shape != shape or acc.stride(-1) != 1:
        found = f"{list(acc.shape)} with strides {list(acc.stride())}"
        raise fail("E0520", f"fp8c::{name}: expected an accumulator {list(shape)}, its last axis dense; found {found}")


def empty_heads_last(like: Tensor, shape: Sequence[Size]) -> Tensor:
    """An empty [batch, heads, seq, dim] stored as [batch, seq, heads, dim]: merging the heads is then a view."""
    batch, heads, seq, dim = shape
    return like.new_empty((batch, seq, heads, dim)).transpose(1, 2)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, mask, is_causal)
    batch, heads, seq, _ = q.shape
    out = empty_heads_last(q, (batch, heads, seq, v.shape[3]))
    return out, q.new_empty((batch, heads, seq), dtype=torch.float32)


def _fake_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention(q, k, v, mask, is_causal)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))  # laid out as their operands: fused kernels write them so
    return dq, dk, dv


def check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    """Raises: E0520 when ranks or dtypes don't fit, or when a mask comes together with is_causal."""
    for tensor in (q, k, v):
        _check_rank("attention", tensor, (4,))
    if not q.dtype == k.dtype == v.dtype:
        raise fail("E0520", f"fp8c::attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype")
    if mask is not None and is_causal:
        raise fail(
            "E0520",
            "fp8c::attention: a mask and is_causal exclude each other",
            help="pass the causal triangle inside the mask, or drop the mask",
        )
    if mask is not None and not (mask.dtype is torch.bool or mask.dtype.is_floating_point):
        raise fail("E0520", f"fp8c::attention: expected a bool or floating mask, found {mask.dtype}")


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _fake_quantize,
    "quantize_delayed": _fake_quantize_delayed,
    "dequantize": _fake_dequantize,
    "requantize": _fake_requantize,
    "scaled_mm": _fake_scaled_mm,
    "scaled_grouped_mm": _fake_scaled_grouped_mm,
    "scaled_grouped_wgrad": _fake_scaled_grouped_wgrad,
    "scaled_mm_add_": _fake_scaled_mm_add_,
    "scaled_grouped_wgrad_add_": _fake_scaled_grouped_wgrad_add_,
    "attention": _fake_attention,
    "attention_backward": _fake_attention_backward,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"fp8c::{_name}", _fake, lib=_LIBRARY)


# Attention's gradient -----------------------------------------------------------------------------------------------


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, is_causal, scale, enable_gqa = inputs
    out, lse = output
    if mask is not None and mask.requires_grad:
        raise fail(
            "E0522",
            "fp8c::attention has no gradient for its mask, and this mask requires one",
            help="detach the mask, or keep this attention out of the FP8 step",
        )
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, mask)
    ctx.is_causal, ctx.scale, ctx.enable_gqa = is_causal, scale, enable_gqa


def _attention_grad(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    q, k, v, out, lse, mask = ctx.saved_tensors
    grads = ATTENTION_BACKWARD(dout, q, k, v, out, lse, mask, ctx.is_causal, ctx.scale, ctx.enable_gqa)
    return (*grads, None, None, None, None)


torch.library.register_autograd("fp8c::attention", _attention_grad, setup_context=_attention_setup, lib=_LIBRARY)

# The overloads, for passes that build or match nodes.
QUANTIZE = torch.ops.fp8c.quantize.default
QUANTIZE_DELAYED = torch.ops.fp8c.quantize_delayed.default
DEQUANTIZE = torch.ops.fp8c.dequantize.default
REQUANTIZE = torch.ops.fp8c.requantize.default
SCALED_MM = torch.ops.fp8c.scaled_mm.default
SCALED_GROUPED_MM = torch.ops.fp8c.scaled_grouped_mm.default
SCALED_GROUPED_WGRAD = torch.ops.fp8c.scaled_grouped_wgrad.default
SCALED_MM_ADD_ = torch.ops.fp8c.scaled_mm_add_.default
SCALED_GROUPED_WGRAD_ADD_ = torch.ops.fp8c.scaled_grouped_wgrad_add_.default
ATTENTION = torch.ops.fp8c.attention.default
ATTENTION_BACKWARD = torch.ops.fp8c.attention_backward.default

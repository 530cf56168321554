"""quantize, dequantize and requantize against a NumPy oracle written group by group, on the cases that did damage."""

import itertools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401  registers the CPU kernels
from fp8c import ops
from fp8c.backends.reference.formats import decode
from fp8c.backends.reference.quantize import dequantize_f32
from fp8c.diagnostics import DiagnosticError
from fp8c.formats import MAX, Element, Format, ScaleKind
from fp8c.ops import decompositions

SCALE_KINDS = ("fp32", "pow2", "e8m0")
GROUPS = ("1x128", "128x1", "128x128", "1x32", "tensor", "row", "col")
SIZES = (0, 1, 127, 128, 129)
CAST = {
    Element.E4M3: ml_dtypes.float8_e4m3fn,
    Element.E5M2: ml_dtypes.float8_e5m2,
}


def filled(kind: str, rows: int, cols: int) -> Tensor:
    """A [rows, cols] FP32 tensor of one of the damage-doing kinds."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    x = torch.randn(rows, cols, generator=generator)
    middle = (slice(rows // 2, rows // 2 + 1), slice(cols // 2, cols // 2 + 1))
    match kind:
        case "zeros":
            return torch.zeros(rows, cols)
        case "one nonzero":
            out = torch.zeros(rows, cols)
            out[middle] = -3.0
            return out
        case "subnormal":
            return torch.ldexp(x.mul(16).round(), torch.tensor(-146))
        case "448 and its neighbours":
            choices = torch.tensor([448.0, 447.99997, 448.00003, -448.0, 57344.0, 65024.0])
            return choices[torch.randint(0, 6, (rows, cols), generator=generator)]
        case "inf":
            x[middle] = -torch.inf
            return x
        case "nan":
            x[middle] = torch.nan
            return x
        case "1e38":
            return x.sign() * 1e38 * (1 + x.abs() % 1)
        case "mixed":
            return x * torch.exp2(torch.randint(-40, 40, (rows, cols), generator=generator))
    raise AssertionError(kind)


KINDS = ("zeros", "one nonzero", "subnormal", "448 and its neighbours", "inf", "nan", "1e38", "mixed")


def oracle_group(x: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.float32]:
    """Dequantized payload (before scaling) and scale of one group, by the rules in the specification's docstring."""
    largest = np.float32(MAX[fmt.element])
    amax = np.float32(np.abs(x).max()) if x.size else np.float32(0)
    if not np.isfinite(amax):
        return np.full(x.shape, np.nan, np.float32), np.float32(np.nan)
    scale = max(amax / largest, np.float32(2.0**-126)) if amax else np.float32(1)
    if fmt.scale is not ScaleKind.FP32:
        fraction, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    quotient = np.clip(x / np.float32(scale), -largest, largest)
    if fmt.element is Element.E5M6:
        quantum = np.exp2(np.maximum(np.frexp(quotient.astype(np.float64))[1] - 1, -14) - 6)
        return (np.rint(quotient / quantum) * quantum).astype(np.float32), np.float32(scale)
    return quotient.astype(CAST[fmt.element]).astype(np.float32), np.float32(scale)


def oracle(x: Tensor, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = x.shape
    assert fmt.group is not None
    g0, g1 = (max(n, 1) if g == -1 else g for g, n in zip(fmt.group, (rows, cols)))
    shape = [1 if g == -1 else -(-n // g) for g, n in zip(fmt.group, (rows, cols))]
    payload, scale = np.zeros((rows, cols), np.float32), np.zeros(shape, np.float32)
    values = x.numpy()
    for i, j in itertools.product(*map(range, shape)):
        block = (slice(i * g0, (i + 1) * g0), slice(j * g1, (j + 1) * g1))
        payload[block], scale[i, j] = oracle_group(values[block], fmt)
    return payload, scale


def payload_of(q: Tensor, fmt: Format, cols: int) -> np.ndarray:
    return decode(q, fmt.element, cols).numpy()


def assert_same_bits(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], note: object) -> None:
    """Equal data and scales; the sign of NaN is free."""
    for x, y in zip(a, b):
        assert x.dtype == y.dtype and x.shape == y.shape, note
        x, y = (t.float() if t.dtype != torch.uint8 else t for t in (x, y))
        assert torch.equal(x.nan_to_num(nan=-1e30), y.nan_to_num(nan=-1e30)), note


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_edge_matrix_against_the_oracle(kind: str, group: str) -> None:
    shapes = [(129, 129), (1, 127), (0, 128)]
    # Every element and every scale kind meets every kind of input; the full product would say no more.
    pairs = [("e4m3", "fp32"), ("e5m2", "e8m0"), ("e5m6", "pow2")]
    for (element, scale_kind), (rows, cols) in itertools.product(pairs, shapes):
        fmt = Format.parse(f"{element}[{group}] {scale_kind}")
        x = filled(kind, rows, cols)
        q, s = torch.ops.fp8c.quantize(x, fmt.text)
        payload, scale = oracle(x, fmt)
        np.testing.assert_array_equal(s.float().numpy(), scale, err_msg=f"{fmt.text} {rows}x{cols}")
        np.testing.assert_array_equal(payload_of(q, fmt, cols), payload, err_msg=f"{fmt.text} {rows}x{cols}")
        assert_same_bits(decompositions.quantize(x, fmt.text), (q, s), (fmt.text, rows, cols))
        if x.isfinite().all():
            back = torch.ops.fp8c.dequantize(q, s, fmt.text, torch.float32, None, cols)
            plain = decompositions.dequantize(q, s, fmt.text, torch.float32, None, cols)
            assert back.isfinite().all() and torch.equal(back, plain)


@pytest.mark.parametrize("scale_kind", SCALE_KINDS)
@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e5m6"])
def test_every_size_and_group_against_the_plain_form(element: str, scale_kind: str) -> None:
    sizes = list(zip(SIZES, (129, 127, 128, 0, 1)))
    if (element, scale_kind) == ("e4m3", "fp32"):
        sizes = list(itertools.product(SIZES, SIZES))
    for group, (rows, cols) in itertools.product(GROUPS, sizes):
        fmt = f"{element}[{group}] {scale_kind}"
        x = filled("mixed", rows, cols)
        quantized = torch.ops.fp8c.quantize(x, fmt)
        assert_same_bits(decompositions.quantize(x, fmt), quantized, (fmt, rows, cols))
        assert list(quantized[1].shape) == ops.scale_shape((rows, cols), Format.parse(fmt))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([torch.ones(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x,
}


@pytest.mark.parametrize("layout", list(STRIDES))
@pytest.mark.parametrize("fmt", ["e4m3[1x128] fp32", "e4m3[128x128] pow2", "e5m6[128x1] e8m0"])
def test_strides_do_not_matter(layout: str, fmt: str) -> None:
    x = filled("mixed", 129, 200)
    view = x[:1].expand(129, 200) if layout == "expanded" else STRIDES[layout](x)
    expected = torch.ops.fp8c.quantize(view.clone(memory_format=torch.contiguous_format), fmt)
    quantized = torch.ops.fp8c.quantize(view, fmt)
    assert_same_bits(quantized, expected, layout)
    for source in (view, view[:128, :128]):  # the second without padding, which would hide the strides of the input
        layout_of_format = [t.stride() for t in ops.empty_quantized(source, source.shape, Format.parse(fmt))]
        assert [t.stride() for t in torch.ops.fp8c.quantize(source, fmt)] == layout_of_format
        assert [t.stride() for t in decompositions.quantize(source, fmt)] == layout_of_format


def test_the_layout_is_what_the_gemms_read_without_a_copy() -> None:
    """Reduction innermost, data rows of 16 bytes, 1x128 scales with rows innermost, four to a row."""
    x = torch.randn(131, 200)
    q, s = torch.ops.fp8c.quantize(x, "e4m3[1x128] fp32")
    assert q.stride() == (200, 1) and s.stride() == (1, 132)
    q, s = torch.ops.fp8c.quantize(x, "e4m3[128x1] fp32")
    assert q.t().stride() == (144, 1) and s.t().stride() == (1, 200)
    q, s = torch.ops.fp8c.quantize(x, "e4m3[128x128] fp32")
    assert q.is_contiguous() and s.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_quantized_as_their_fp32_values(dtype: torch.dtype) -> None:
    x = filled("mixed", 129, 200).to(dtype)
    x = x.where(x.isfinite(), 1.0)
    assert_same_bits(
        torch.ops.fp8c.quantize(x, "e4m3[1x128] fp32"), torch.ops.fp8c.quantize(x.float(), "e4m3[1x128] fp32"), dtype
    )


def test_stacked_weights_are_quantized_one_by_one() -> None:
    w = torch.randn(3, 129, 200)
    for fmt in ("e4m3[128x128] fp32", "e4m3[tensor] pow2", "e5m6[1x128] pow2"):
        q, s = torch.ops.fp8c.quantize(w, fmt)
        for expert in range(3):
            assert_same_bits((q[expert], s[expert]), torch.ops.fp8c.quantize(w[expert], fmt), fmt)
        assert_same_bits(decompositions.quantize(w, fmt), (q, s), fmt)


def test_bf16_subnormals_keep_the_relative_precision_of_e4m3() -> None:
    """The claim of the specification: the scale's floor at 2**-126 costs BF16 inputs nothing."""
    subnormals = torch.arange(1, 128, dtype=torch.int16).view(torch.bfloat16).float()[:, None]
    q, s = torch.ops.fp8c.quantize(subnormals, "e4m3[1x128] fp32")
    back = torch.ops.fp8c.dequantize(q, s, "e4m3[1x128] fp32", torch.float32)
    # One rounding of a number with 3 mantissa bits; below E4M3's normal range these multiples of 2**-7 are exact.
    assert ((back - subnormals).abs() <= 2.0**-4 * subnormals).all()
    assert (back > 0).all()


def test_error_of_one_quantization_is_that_of_the_format() -> None:
    x = filled("mixed", 256, 256)
    for fmt, mantissa_bits, smallest in (("e4m3", 3, 2.0**-9), ("e5m2", 2, 2.0**-16), ("e5m6", 6, 2.0**-20)):
        text = f"{fmt}[1x128] fp32"
        q, s = torch.ops.fp8c.quantize(x, text)
        back = dequantize_f32(q, s, Format.parse(text), 256).double()
        scale = s.double().repeat_interleave(128, dim=1)
        # Half a unit in the last place, or half the smallest subnormal, plus two FP32 roundings (quotient and product).
        bound = torch.maximum(2.0 ** -(mantissa_bits + 1) * x.double().abs(), smallest / 2 * scale)
        assert ((back - x).abs() <= bound * (1 + 2.0**-20) + 2.0**-22 * x.double().abs()).all()


# Offsets ------------------------------------------------------------------------------------------------------------

OFFSETS = {
    "one expert": [300],
    "aligned": [128, 256, 300],
    "ragged": [1, 130, 257, 299],
    "empty experts": [0, 0, 131, 131, 131, 290, 290],
    "all empty": [0, 0, 0],
    "padding rows": [5, 120],
}


@pytest.mark.parametrize("ends", OFFSETS.values(), ids=list(OFFSETS))
@pytest.mark.parametrize("fmt", ["e4m3[128x1] fp32", "e4m3[32x1] pow2", "e5m2[128x128] e8m0", "e5m6[128x1] pow2"])
def test_groups_restart_at_each_expert(ends: list[int], fmt: str) -> None:
    parsed = Format.parse(fmt)
    assert parsed.group is not None
    rows, cols, height = 300, 40, parsed.group[0]
    x = filled("mixed", rows, cols)
    offs = torch.tensor(ends, dtype=torch.int32)
    q, s = torch.ops.fp8c.quantize(x, fmt, offs)
    assert s.shape[0] == rows // height + len(ends) and q.shape[0] == height * s.shape[0]
    back = torch.ops.fp8c.dequantize(q, s, fmt, torch.float32, None, cols)
    where = ops.stored_rows(offs, rows, height)
    used: set[int] = set()
    for expert, (start, end) in enumerate(zip([0, *ends], ends)):
        alone = torch.ops.fp8c.quantize(x[start:end], fmt)
        first = start // height + expert
        scale_rows = range(first, first + -(-(end - start) // height))
        assert where[start:end].tolist() == list(range(first * height, first * height + end - start))
        assert not used & set(scale_rows)
        used |= set(scale_rows)
        assert_same_bits((q[where[start:end]], s[list(scale_rows)]), alone, expert)
        expected = torch.ops.fp8c.dequantize(*alone, fmt, torch.float32, None, cols)
        assert torch.equal(back[where[start:end]], expected)
    unused = sorted(set(range(s.shape[0])) - used)
    assert (s[unused].float() == 1.0).all()
    empty = torch.ones(q.shape[0], dtype=torch.bool)
    empty[where[: ends[-1]]] = False
    assert not q[empty].view(torch.uint8).any() and not back[empty].any()
    assert_same_bits(decompositions.quantize(x, fmt, offs), (q, s), fmt)
    assert torch.equal(decompositions.dequantize(q, s, fmt, torch.float32, None, cols), back)


def test_nan_of_one_expert_stays_with_it() -> None:
    x = torch.randn(300, 4)
    x[140, 2] = torch.nan
    offs = torch.tensor([130, 290], dtype=torch.int32)
    for quantize in (torch.ops.fp8c.quantize, decompositions.quantize):
        q, s = quantize(x, "e4m3[128x1] fp32", offs)
        back = torch.ops.fp8c.dequantize(q, s, "e4m3[128x1] fp32", torch.float32)
        bad = back[ops.stored_rows(offs, 290, 128)].isnan().nonzero()
        assert set(bad[:, 1].tolist()) == {2}
        assert bad[:, 0].min() == 130 and bad[:, 0].max() == 257


def test_offsets_are_refused_where_a_pair_is_read() -> None:
    offs = torch.tensor([130, 290], dtype=torch.int32)
    q, s = torch.ops.fp8c.quantize(torch.randn(300, 4), "e4m3[128x1] fp32", offs)
    for module in (torch.ops.fp8c, decompositions):
        with pytest.raises(DiagnosticError, match="E0521.*stored in whole groups"):
            module.dequantize(q, s, "e4m3[128x1] fp32", torch.float32, offs)
        with pytest.raises(DiagnosticError, match="E0521.*stored in whole groups"):
            module.requantize(q, s, "e4m3[128x1] fp32", "e4m3[1x128] fp32", offs)


# Requantize ---------------------------------------------------------------------------------------------------------


def shifted_payload_is_exact(q: Tensor, old_scale: Tensor, new_scale: Tensor) -> Tensor:
    """The condition of `requantize`: the lowest set bit of payload * old / new is at or above 2**-9 (E4M3)."""
    shifted = q.float().double() * (old_scale.double() / new_scale.double())
    return (shifted / 2.0**-9).frac() == 0


@pytest.mark.parametrize("spread", [0, 4, 30])
def test_retile_with_pow2_scales_is_exact_exactly_where_the_condition_holds(spread: int) -> None:
    generator = torch.Generator().manual_seed(spread)
    rows = torch.exp2(torch.randint(-spread, spread + 1, (256, 1), generator=generator))
    x = torch.randn(256, 256, generator=generator) * rows
    src, dst = "e4m3[1x128] pow2", "e4m3[128x1] pow2"
    q, s = torch.ops.fp8c.quantize(x, src)
    q2, s2 = torch.ops.fp8c.requantize(q, s, src, dst)
    before = torch.ops.fp8c.dequantize(q, s, src, torch.float32)
    after = torch.ops.fp8c.dequantize(q2, s2, dst, torch.float32)
    exact = shifted_payload_is_exact(q, s.repeat_interleave(128, dim=1), s2.repeat_interleave(128, dim=0))
    assert torch.equal(before == after, exact)
    assert exact.all() == (spread == 0)  # the inputs reach both sides of the condition
    assert_same_bits(decompositions.requantize(q, s, src, dst), (q2, s2), spread)


def test_retile_moves_only_the_exponent_of_normal_payloads() -> None:
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    q, s = torch.ops.fp8c.quantize(x, "e4m3[1x128] pow2")
    q2, s2 = torch.ops.fp8c.requantize(q, s, "e4m3[1x128] pow2", "e4m3[128x1] pow2")
    old, new = q.view(torch.uint8).int(), q2.view(torch.uint8).int()
    is_normal = ((old & 0x78) > 0) & ((q.float() * s / s2).abs() >= 2.0**-6)
    assert is_normal.float().mean() > 0.9
    assert torch.equal((old & 0x87)[is_normal], (new & 0x87)[is_normal])  # sign and mantissa


def test_requantize_from_the_cache_format_with_experts() -> None:
    x = torch.randn(300, 130)
    offs = torch.tensor([0, 130, 290], dtype=torch.int32)
    src, dst = "e5m6[1x128] pow2", "e4m3[128x1] pow2"
    q, s = torch.ops.fp8c.quantize(x, src)
    values = torch.ops.fp8c.dequantize(q, s, src, torch.float32, None, 130)
    expected = torch.ops.fp8c.quantize(values, dst, offs)
    assert_same_bits(torch.ops.fp8c.requantize(q, s, src, dst, offs, 130), expected, "reference")
    assert_same_bits(decompositions.requantize(q, s, src, dst, offs, 130), expected, "plain")


# Misuse -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(DiagnosticError, match="E0520.*expected float32, bfloat16 or float16"):
        torch.ops.fp8c.quantize(torch.ones(4, 4, dtype=dtype), "e4m3[1x128] fp32")


def test_vectors_are_refused() -> None:
    with pytest.raises(DiagnosticError, match=r"E0520.*2-D or 3-D tensor, found shape \[4\]"):
        torch.ops.fp8c.quantize(torch.ones(4), "e4m3[1x128] fp32")


@pytest.mark.parametrize("fmt", ["bf16", "e4m3[1x128] fp32 stochastic", "e4m3[tensor] fp32 delayed(4,max,0)", "e4m3"])
def test_formats_without_a_kernel_are_refused(fmt: str) -> None:
    with pytest.raises(DiagnosticError, match="E0421"):
        torch.ops.fp8c.quantize(torch.ones(4, 4), fmt)


def test_offsets_with_single_row_groups_are_refused() -> None:
    with pytest.raises(DiagnosticError, match="E0521"):
        torch.ops.fp8c.quantize(torch.ones(4, 4), "e4m3[1x128] fp32", torch.tensor([4], dtype=torch.int32))


@pytest.mark.parametrize("ends", [[3, 2], [2, 5], [-1, 4]])
def test_offsets_out_of_order_are_refused(ends: list[int]) -> None:
    with pytest.raises(DiagnosticError, match="E0520.*must not decrease"):
        torch.ops.fp8c.quantize(torch.ones(4, 4), "e4m3[128x1] fp32", torch.tensor(ends, dtype=torch.int32))


def test_scales_of_another_group_are_refused() -> None:
    q, s = torch.ops.fp8c.quantize(torch.randn(256, 256), "e4m3[1x128] fp32")
    with pytest.raises(DiagnosticError, match=r"E0520.*has scales \[2, 2\], found \[256, 2\]"):
        torch.ops.fp8c.dequantize(q, s, "e4m3[128x128] fp32", torch.float32)

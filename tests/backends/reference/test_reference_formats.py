"""Codecs against oracles that share no code with them: exact fractions, and ml_dtypes. Inputs are exhaustive."""

import bisect
import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from fp8c.backends.reference import formats
from fp8c.formats import MAX, Element, ScaleKind
from fp8c.ops import DATA_DTYPE, decompositions

ML_DTYPE = {Element.E4M3: ml_dtypes.float8_e4m3fn, Element.E5M2: ml_dtypes.float8_e5m2}
EXPONENT_BITS = {Element.E4M3: 4, Element.E5M2: 5, Element.E5M6: 5}
MANTISSA_BITS = {Element.E4M3: 3, Element.E5M2: 2, Element.E5M6: 6}
ELEMENTS = list(Element)[:3]


def positive_values(element: Element) -> list[Fraction]:
    """The finite values of the codes 0, 1, 2, ..., from the definition of the format; the index is the code."""
    e_bits, m_bits = EXPONENT_BITS[element], MANTISSA_BITS[element]
    bias = 2 ** (e_bits - 1) - 1
    values = []
    for code in range(1 << (e_bits + m_bits)):
        exponent, mantissa = code >> m_bits, code & ((1 << m_bits) - 1)
        significand = Fraction(mantissa, 1 << m_bits) + (exponent > 0)
        value = significand * Fraction(2) ** (max(exponent, 1) - bias)
        if value <= MAX[element]:
            values.append(value)
    return values


def nearest_code(x: float, values: list[Fraction]) -> int:
    """Code of the value nearest to |x|, ties to the even code, saturating."""
    exact = abs(Fraction(x))
    above = bisect.bisect_left(values, exact)
    if above == len(values):
        return above - 1
    if values[above] == exact or above == 0:
        return above
    below_is_nearer = (exact - values[above - 1]) - (values[above] - exact)
    if below_is_nearer == 0:
        return above if above % 2 == 0 else above - 1
    return above - 1 if below_is_nearer < 0 else above


def all_bf16() -> torch.Tensor:
    """Every BF16 number, as FP32; without NaN."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    assert values.signbit().sum() == 1 << 15
    return values[~values.isnan()]


def boundaries(element: Element) -> torch.Tensor:
    """Every value of the element, every midpoint of neighbours, and the FP32 numbers next to each of these."""
    values = positive_values(element)
    points = values + [(a + b) / 2 for a, b in itertools.pairwise(values)]
    exact = torch.tensor([float(p) for p in points])
    near = torch.cat([exact, exact.nextafter(torch.tensor(torch.inf)), exact.nextafter(torch.tensor(-torch.inf))])
    return torch.cat([near, -near])  # -0.0 and the numbers beside 0 included


def codes_of(x: torch.Tensor, element: Element) -> torch.Tensor:
    if element is Element.E5M6:
        return formats.encode_e5m6(x)
    return formats.encode(x, element).view(torch.uint8).int()


def assert_nearest(x: torch.Tensor, element: Element) -> None:
    values = positive_values(element)
    positive = x[~x.signbit()]
    codes = codes_of(positive, element)
    assert codes.tolist() == [nearest_code(min(v, 1e30), values) for v in positive.tolist()]
    sign_bit = 1 << (EXPONENT_BITS[element] + MANTISSA_BITS[element])
    assert torch.equal(codes_of(-positive, element), codes | sign_bit)


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_bf16_number_is_rounded_to_the_nearest_code(element: Element) -> None:
    assert_nearest(all_bf16(), element)


@pytest.mark.parametrize("element", ELEMENTS)
def test_fp32_numbers_around_every_rounding_boundary(element: Element) -> None:
    assert_nearest(boundaries(element), element)


@pytest.mark.parametrize("element", list(ML_DTYPE))
def test_encode_agrees_with_ml_dtypes(element: Element) -> None:
    x = all_bf16().clamp(-MAX[element], MAX[element])
    expected = x.numpy().astype(ML_DTYPE[element]).view(np.uint8)
    assert np.array_equal(codes_of(x, element).numpy(), expected)


@pytest.mark.parametrize("element", list(ML_DTYPE))
def test_decode_agrees_with_ml_dtypes_on_all_codes(element: Element) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.numpy().view(ML_DTYPE[element]).astype(np.float32)
    decoded = formats.decode(codes.view(DATA_DTYPE[element]), element).numpy()
    np.testing.assert_array_equal(decoded, expected)


def test_every_e5m6_code_survives_a_round_trip() -> None:
    codes = torch.arange(1 << 12, dtype=torch.int32)
    decoded = formats.decode_e5m6(codes)
    is_finite = decoded.isfinite()
    assert int(is_finite.sum()) == 2 * len(positive_values(Element.E5M6))
    assert torch.equal(formats.encode_e5m6(decoded[is_finite]), codes[is_finite])
    positive = decoded[: len(positive_values(Element.E5M6))].tolist()
    assert [Fraction(v) for v in positive] == positive_values(Element.E5M6)


@pytest.mark.parametrize("element", list(ML_DTYPE))
def test_every_fp8_code_survives_a_round_trip(element: Element) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = formats.decode(codes.view(DATA_DTYPE[element]), element)
    is_finite = decoded.isfinite()
    again = formats.encode(decoded[is_finite], element).view(torch.uint8)
    assert torch.equal(again, codes[is_finite])


@pytest.mark.parametrize("element", ELEMENTS)
def test_nan_stays_nan(element: Element) -> None:
    nan = torch.full((1, 8), torch.nan)
    for encode in (formats.encode, decompositions._encode):
        assert formats.decode(encode(nan, element), element, 8).isnan().all()


@pytest.mark.parametrize("element", ELEMENTS)
def test_plain_codec_gives_the_same_bits(element: Element) -> None:
    x = torch.cat([all_bf16(), boundaries(element)])[None]
    encoded = formats.encode(x, element)
    assert torch.equal(decompositions._encode(x, element).view(torch.uint8), encoded.view(torch.uint8))
    cols = x.shape[1]
    assert torch.equal(decompositions._decode(encoded, element, cols), formats.decode(encoded, element, cols))


def test_e5m6_is_packed_most_significant_bits_first() -> None:
    codes = torch.tensor([[0x123, 0x456, 0x789, 0xABC, 0xDEF, 0x012, 0x345, 0x678, 0x9AB]], dtype=torch.int32)
    packed = formats.pack_e5m6(codes)
    assert bytes(packed[0].tolist()).hex() == "123456789abcdef012345678" + "9ab" + "0" * 21
    assert torch.equal(formats.unpack_e5m6(packed, 9), codes)


@pytest.mark.parametrize("cols", [0, 1, 7, 8, 9, 127, 128])
def test_e5m6_packing_of_any_width(cols: int) -> None:
    codes = torch.randint(0, 1 << 12, (3, cols), dtype=torch.int32)
    packed = formats.pack_e5m6(codes)
    assert packed.shape == (3, -(-cols // 8) * 12)
    assert torch.equal(formats.unpack_e5m6(packed, cols), codes)
    assert torch.equal(decompositions._pack_e5m6(codes), packed)


def test_scales_round_up_to_the_next_power_of_two() -> None:
    powers = torch.ldexp(torch.ones(253), torch.arange(-126, 127))
    assert torch.equal(formats.round_up_to_pow2(powers), powers)
    assert torch.equal(formats.round_up_to_pow2(powers.nextafter(torch.tensor(torch.inf))), powers * 2)
    below = powers[1:].nextafter(torch.tensor(0.0))
    assert torch.equal(formats.round_up_to_pow2(below), powers[1:])
    assert formats.round_up_to_pow2(torch.tensor([torch.nan])).isnan().all()


def test_e8m0_scales_hold_the_exponent() -> None:
    powers = torch.ldexp(torch.ones(254), torch.arange(-126, 128))
    stored = formats.encode_scale(powers, ScaleKind.E8M0)
    assert stored.view(torch.uint8).tolist() == list(range(1, 255))
    assert torch.equal(formats.decode_scale(stored), powers)
    nan = formats.encode_scale(torch.tensor([torch.nan]), ScaleKind.E8M0)
    assert nan.view(torch.uint8).tolist() == [0xFF] and formats.decode_scale(nan).isnan().all()

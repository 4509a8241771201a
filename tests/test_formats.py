"""What the FP4 number functions promise: encodings, rounding, quantising and dequantising."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.formats import (
    decode_e2m1,
    decode_scale,
    dequantise,
    encode_e2m1,
    encode_scale,
    pack,
    quantise,
    unpack,
)
from fp4tune.probes.problem import MXFP4, NVFP4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FORMATS = pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_e2m1_code_has_the_value_of_the_format():
    codes = torch.arange(16, dtype=torch.uint8)
    assert decode_e2m1(codes).tolist() == E2M1 + [-v for v in E2M1]
    assert math.copysign(1, decode_e2m1(codes)[8]) == -1


def test_encoding_e2m1_undoes_decoding_every_code_with_its_sign():
    codes = torch.arange(16, dtype=torch.uint8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(encode_e2m1(decode_e2m1(codes, dtype)), codes)


@pytest.mark.parametrize("low", range(7))
def test_e2m1_rounds_to_nearest_and_ties_to_the_even_code_on_both_sides_of_zero(low):
    middle = (E2M1[low] + E2M1[low + 1]) / 2
    nearby = f64(math.nextafter(middle, 0), middle, math.nextafter(middle, 9))
    even = low if low % 2 == 0 else low + 1
    assert encode_e2m1(nearby).tolist() == [low, even, low + 1]
    assert encode_e2m1(-nearby).tolist() == [low + 8, even + 8, low + 9]


def test_e2m1_saturates_and_refuses_nan():
    assert encode_e2m1(f64(6.1, 1e300, math.inf, -7, -math.inf)).tolist() == [7, 7, 7, 15, 15]
    with pytest.raises(ValueError, match="NaN"):
        encode_e2m1(f64(1.0, math.nan))


@given(st.integers(0, 5), st.integers(0, 20), st.integers(0, 2**31))
def test_unpacking_undoes_packing_and_the_low_nibble_is_the_even_k(rows, half, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (rows, 2 * half), generator=generator, dtype=torch.uint8)
    packed = pack(codes)
    assert torch.equal(unpack(packed), codes)
    assert torch.equal(packed & 15, codes[:, 0::2])


def test_packing_an_odd_number_of_codes_is_refused():
    with pytest.raises(ValueError, match="two codes"):
        pack(torch.zeros(1, 3, dtype=torch.uint8))


def test_e4m3_bytes_have_the_values_torch_gives_them():
    raw = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    ours, theirs = decode_scale(raw, "e4m3"), raw.view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
    assert torch.isnan(ours).nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert torch.equal(ours.nan_to_num(0), theirs.nan_to_num(0))
    assert decode_scale(raw, NVFP4)[[1, 8, 0x7E]].tolist() == [2**-9, 2**-6, 448]


def test_e8m0_bytes_are_powers_of_two_and_a_nan():
    raw = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    ours = decode_scale(raw, MXFP4)
    assert ours[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert math.isnan(ours[255])


@pytest.mark.parametrize("encoding", ["e4m3", "e8m0"])
def test_encoding_scales_undoes_decoding_every_byte_but_the_second_nan(encoding):
    raw = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    expected = raw.clone()
    if encoding == "e4m3":
        expected[255] = 0x7F
    assert torch.equal(encode_scale(decode_scale(raw, encoding), encoding), expected)


def test_e4m3_rounds_every_midpoint_to_even_and_saturates():
    values = decode_scale(torch.arange(127, dtype=torch.uint8), "e4m3", torch.float64)
    for low in range(126):
        middle = float(values[low] + values[low + 1]) / 2
        near = f64(math.nextafter(middle, 0), middle, math.nextafter(middle, 1e9))
        even = low if low % 2 == 0 else low + 1
        assert encode_scale(near, "e4m3").tolist() == [low, even, low + 1]
    beyond = f64(448, 449, 464, 500, math.inf, -1e9, math.nan)
    assert encode_scale(beyond, "e4m3").tolist() == [126] * 5 + [254, 127]


def test_e8m0_rounds_down_clamps_and_refuses_negatives():
    values = f64(0, 1e-60, 2.0**-127, 0.99, 1, 1.99, 2, 2.0**127, 1e300, math.inf, math.nan)
    expected = [0, 0, 0, 126, 127, 127, 128, 254, 254, 254, 255]
    assert encode_scale(values, "e8m0").tolist() == expected
    with pytest.raises(ValueError, match="negative"):
        encode_scale(f64(-1.0), "e8m0")


def test_an_unknown_scale_encoding_is_named_in_the_error():
    with pytest.raises(ValueError, match="e5m2"):
        decode_scale(torch.zeros(1, dtype=torch.uint8), "e5m2")


@FORMATS
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(-30, 30), st.floats(0, 8))
def test_quantising_stays_within_half_a_step_of_the_block(fmt, seed, size, spread):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4 * fmt.block, generator=generator)
    x *= 2.0 ** (size + spread * torch.randn(6, 1, generator=generator)) * 2.0**-10
    t = quantise(x, fmt)
    got = dequantise(t, torch.float64)
    step = decode_scale(t.scales, fmt, torch.float64) * t.global_scale.double()
    step = step.repeat_interleave(fmt.block, dim=1)
    off = (got - x.double()).abs()
    # Steps between codes are at most 2; past 6 the value saturates, which only rounding the scale
    # down can cause: by 1/16 for e4m3 (more below its normal range), by less than 8/6 for e8m0.
    low = x.double().abs() <= 6 * step
    assert (off[low] <= 1.000001 * step[low]).all()
    assert (got[~low].abs() == 6 * step[~low])[step[~low] > 0].all()


def test_nvfp4_follows_the_448_times_6_convention():
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 20] = -13.0, 3.25
    t = quantise(x, NVFP4)
    gsf = torch.tensor(448.0 * 6.0) / 13.0
    assert t.global_scale == 1 / gsf
    assert t.scales.tolist() == [[0x7E, 0], [0, encode_scale(f64(112.0), "e4m3").item()]]
    assert dequantise(t)[0, 3] == pytest.approx(-13.0)


def test_a_given_global_scale_is_the_multiplier_that_is_stored():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    t = quantise(x, NVFP4, torch.tensor(0.5))
    assert t.global_scale == 0.5
    assert (dequantise(t) - x).abs().max() < 0.6
    with pytest.raises(ValueError, match="no global scale"):
        quantise(x, MXFP4, torch.tensor(1.0))


def test_mxfp4_rounds_as_the_ocp_specification_does():
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.9, 5.0, -0.25, 2.5])
    t = quantise(x, MXFP4)
    assert t.scales.tolist() == [[127]]  # floor(log2(7.9)) - 2 = 0
    assert dequantise(t)[0, :4].tolist() == [6.0, 4.0, -0.0, 2.0]  # saturated; three ties to even
    assert t.global_scale == 1


@FORMATS
def test_zero_blocks_and_zero_tensors_stay_zero_and_keep_their_signs(fmt):
    x = torch.zeros(2, 2 * fmt.block)
    x[:, 1] = -0.0
    for t in (quantise(x, fmt), quantise(torch.cat((x, torch.ones_like(x))), fmt)):
        assert (t.scales[:2] == 0).all()
        assert torch.isfinite(t.global_scale)
        values = dequantise(t)[:2]
        assert (values == 0).all()
        assert torch.signbit(values[:, 1]).all()
        assert not torch.signbit(values[:, 0]).any()


def test_blocks_too_small_for_their_scale_become_zero_and_tiny_tensors_survive():
    x = torch.ones(1, 32)
    x[0, 16:] = 1e-9
    assert (dequantise(quantise(x, NVFP4))[0, 16:] == 0).all()
    tiny = torch.full((1, 16), 1e-38)
    t = quantise(tiny, NVFP4)
    assert torch.isfinite(dequantise(t)).all()
    assert t.global_scale >= 2.0**-126


@FORMATS
def test_what_cannot_be_quantised_is_refused(fmt):
    for bad in (math.nan, math.inf):
        x = torch.ones(1, fmt.block)
        x[0, 2] = bad
        with pytest.raises(ValueError, match="finite"):
            quantise(x, fmt)
    with pytest.raises(ValueError, match="multiple"):
        quantise(torch.ones(1, fmt.block + 2), fmt)
    assert quantise(torch.ones(0, fmt.block), fmt).shape == (0, fmt.block)


@FORMATS
def test_without_the_global_scale_16_bit_dequantising_is_exact(fmt):
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    t = quantise(x, fmt)
    right = dequantise(t, torch.float64, with_global=False)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(dequantise(t, dtype, with_global=False).double(), right)
    whole = dequantise(t, torch.float64)
    assert torch.equal(whole, right * t.global_scale.double())

"""A quantiser is judged by its own scales: what formats leave free passes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import quantisers
from fp4tune.probes.formats import decode_scale, encode_e2m1, pack, quantise
from fp4tune.probes.layouts import swizzle
from fp4tune.probes.problem import FORMATS, Device

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Device("cpu")


class Ours:
    """What `formats` makes, in a layout, in fresh memory."""

    activation = "fp4"
    distributions: tuple[str, ...] = ()

    def __init__(self, format: str = "nvfp4", layout: str = "128x4"):
        self.name, self.format, self.layout = type(self).__name__.lower(), format, layout

    def unsupported(self, device):
        return None

    def made(self, x, gsf):
        return quantise(x, FORMATS[self.format], None if gsf is None else torch.ones(1) / gsf)

    def quantise(self, x, gsf):
        made = self.made(x, gsf)
        return made.codes, swizzle(made.scales, self.layout)


def kinds(quantiser, k=64, dtype="bf16"):
    found = quantisers.probe_quantiser(quantiser, dtype, k, 3, CPU)
    assert [result["data"] for result in found] == list(quantisers.DATA)
    assert not any("error" in result for result in found)
    return {bad["kind"] for result in found for bad in result["bad"]}


@pytest.mark.parametrize("layout", ["linear", "128x4", "8x4"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_ours_is_right_in_every_layout(format, layout, dtype):
    assert kinds(Ours(format, layout), 96, dtype) == set()


class NextScale(Ours):
    """Rounds scales up to the next code, and its codes to those scales."""

    def made(self, x, gsf):
        made = super().made(x, gsf)
        fmt = made.format
        scales = (made.scales + 1).clamp(max=126 if fmt.scale == "e4m3" else 254)
        step = decode_scale(scales, fmt) * made.global_scale
        blocks = x.float().view(*scales.shape, fmt.block) / step.unsqueeze(-1)
        return type(made)(fmt, pack(encode_e2m1(blocks).view(x.shape)), scales, made.global_scale)


class ApproximateReciprocal(Ours):
    """Multiplies by a reciprocal that is off in its last bits: ties go either way."""

    def made(self, x, gsf):
        made = super().made(x, gsf)
        step = decode_scale(made.scales, made.format) * made.global_scale
        inverse = torch.where(step > 0, 1 / step, 0.0) * (1 + 2.0**-21)
        blocks = x.float().view(*step.shape, -1) * inverse.unsqueeze(-1)
        codes = pack(encode_e2m1(blocks).view(x.shape))
        return type(made)(made.format, codes, made.scales, made.global_scale)


@pytest.mark.parametrize("free", [NextScale, ApproximateReciprocal])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_what_the_formats_leave_free_passes(free, format):
    assert kinds(free(format)) == set()


class WritesNothing(Ours):
    def quantise(self, x, gsf):
        codes, scales = super().quantise(x, gsf)
        return torch.empty_like(codes), torch.empty_like(scales)


class LeavesScales(Ours):
    def quantise(self, x, gsf):
        codes, scales = super().quantise(x, gsf)
        return codes, torch.empty_like(scales)


class LeavesPadding(Ours):
    def quantise(self, x, gsf):
        made = self.made(x, gsf)
        rows, columns = made.scales.shape
        whole = torch.empty(-(-rows // 128) * 128, -(-columns // 4) * 4, dtype=torch.uint8)
        whole[:rows, :columns] = made.scales
        return made.codes, swizzle(whole, "128x4")


class SwapsNibbles(Ours):
    def quantise(self, x, gsf):
        codes, scales = super().quantise(x, gsf)
        return (codes >> 4) | (codes << 4), scales


class WrongLayout(Ours):
    def quantise(self, x, gsf):
        made = self.made(x, gsf)
        return made.codes, swizzle(made.scales.flip(0), "128x4")


class TwoScalesOff(Ours):
    def made(self, x, gsf):
        made = super().made(x, gsf)
        up = (made.scales + 2).clamp(max=126)
        return type(made)(made.format, made.codes, up, made.global_scale)


class TruncatesCodes(Ours):
    def made(self, x, gsf):
        made = super().made(x, gsf)
        fmt = made.format
        step = decode_scale(made.scales, fmt) * made.global_scale
        blocks = x.float().view(*step.shape, fmt.block) / step.unsqueeze(-1)
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        codes = torch.bucketize(blocks.abs().nan_to_num(0), values, right=True) - 1
        codes = (codes + 8 * (blocks < 0)).to(torch.uint8)
        return type(made)(fmt, pack(codes.view(x.shape)), made.scales, made.global_scale)


@pytest.mark.parametrize(
    "rogue, kind",
    [
        (WritesNothing, "unwritten"),
        (LeavesScales, "unwritten"),
        (SwapsNibbles, "wrong"),
        (WrongLayout, "wrong"),
        (TwoScalesOff, "wrong"),
        (TruncatesCodes, "wrong"),
    ],
)
def test_what_is_not_free_is_found(rogue, kind):
    assert kind in kinds(rogue())


def test_padding_left_unwritten_is_said_and_no_fault_of_the_rows():
    results = quantisers.probe_quantiser(LeavesPadding(), "bf16", 48, 3, CPU)
    assert not any(result["bad"] for result in results)
    assert {p for result in results for p in result["proof"]["padding"]} >= {"unwritten"}
    results = quantisers.probe_quantiser(Ours(), "bf16", 48, 3, CPU)
    assert {p for result in results for p in result["proof"]["padding"]} == {"zero"}


class Raises(Ours):
    def quantise(self, x, gsf):
        if x.shape[0] > 100:
            raise RuntimeError("rows beyond 100 are not written yet\nat all")
        return super().quantise(x, gsf)


def test_what_it_raises_is_an_error_with_its_m():
    for result in quantisers.probe_quantiser(Raises(), "bf16", 64, 3, CPU):
        assert result["error"]["m"] == 128 and "not written yet" in result["error"]["message"]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(["nvfp4", "mxfp4"]),
    st.floats(-12, 12),
    st.integers(0, 2**31),
)
def test_ours_passes_at_any_magnitude(m, blocks, format, power, seed):
    x = torch.randn(m, 32 * blocks, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    gsf = (2688 / x.abs().amax()).reshape(1) if format == "nvfp4" else None
    judged = quantisers.judge(Ours(format), x.bfloat16(), gsf)
    assert judged.kind is None and judged.differs == 0


def test_flashinfer_needs_a_gpu_and_says_so():
    for name in quantisers.names():
        quantiser = quantisers.find(name)
        assert quantiser is not None and quantiser.name == name
        assert "GPU" in (quantiser.unsupported(CPU) or "")
    assert quantisers.find("no-such-quantiser") is None

"""What drawn operands promise: widths that are measured, independence of device, order and seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.data import FAMILIES, WIDTHS, draw, exact, families, window
from fp4tune.probes.data.generator import hash_elements, hash_rows, mix, normal, stream_key
from fp4tune.probes.formats import decode_scale, dequantise
from fp4tune.probes.problem import Fp4Tensor, Problem

KINDS = [("nvfp4", "bf16"), ("nvfp4", "fp4"), ("mxfp4", "bf16"), ("mxfp4", "fp4")]


def matrix(t: torch.Tensor | Fp4Tensor) -> torch.Tensor:
    """Values without the global scale, float64."""
    return dequantise(t, torch.float64, False) if isinstance(t, Fp4Tensor) else t.double()


def unit_of(values: torch.Tensor) -> float:
    """The largest power of two that every non-zero value is a multiple of, by bisection."""
    values = values[values != 0]
    low, high = -80, 80
    while low < high:
        middle = (low + high + 1) // 2
        scaled = values / 2.0**middle
        if torch.equal(scaled, scaled.round()):
            low = middle
        else:
            high = middle - 1
    return 2.0**low


def test_hashes_are_those_of_the_integer_definition():
    key = stream_key(7, "test")
    rows = hash_rows(5, key, "cpu", first=3)
    for i, got in enumerate(rows.tolist()):
        row = mix(mix((i + 3) ^ key) ^ mix(key ^ 0xA5C31E97))
        assert got & 0xFFFFFFFF == row
        cell = hash_elements(5, 9, key, "cpu", first=3)[i, 8].item()
        assert cell & 0xFFFFFFFF == mix(row ^ (8 * 0x9E3779B1 & 0xFFFFFFFF))


def test_a_window_of_rows_is_drawn_alike_and_streams_and_rows_are_independent():
    a, b = (normal(40, 4096, stream_key(3, name), "cpu").double() for name in ("a", "b"))
    part = normal(10, 4096, stream_key(3, "a"), "cpu", first=30)
    assert torch.equal(part.double(), a[30:])
    for x in (a, b):
        assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    both = torch.cat((a, b)) / 64
    gram = both @ both.T - torch.eye(80, dtype=torch.float64)
    gram.fill_diagonal_(0)
    assert gram.abs().max() < 6  # standard deviations


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("fmt", "activation"), KINDS)
@settings(deadline=None, max_examples=6)
@given(
    m=st.integers(1, 40),
    n=st.integers(16, 96),
    blocks=st.integers(2, 24),
    seed=st.integers(0, 2**40),
    dtype=st.sampled_from(["bf16", "fp16"]),
)
def test_an_exact_problem_fills_its_width_and_no_more(
    fmt, activation, width, m, n, blocks, seed, dtype
):
    problem = Problem(fmt, m, n, 32 * blocks, activation, dtype)
    operands = exact(problem, width, seed, "cpu")
    a, b = matrix(operands.a), matrix(operands.weight)
    assert a.shape == (m, problem.k) and b.shape == (n, problem.k)
    # The unit is measured from the values: it may be coarser than planned on small problems.
    sums = (a.abs() @ b.abs().T).max() / (unit_of(a) * unit_of(b))
    assert sums <= 2.0**width
    if m * n >= 256 and blocks >= 4:
        assert sums > 2.0 ** (width - 1)
    alpha = float(operands.weight.global_scale)
    if isinstance(operands.a, Fp4Tensor):
        alpha *= float(operands.a.global_scale)
    assert torch.frexp(torch.tensor(alpha, dtype=torch.float64))[0] == 0.5  # a power of two
    out = (a @ b.T) * alpha
    assert out.abs().max() <= 2.0**15
    assert torch.equal(out * 2.0**14, (out * 2.0**14).round())


@pytest.mark.parametrize("width", WIDTHS)
def test_wide_w4a16_activations_are_integers_that_fp8_cannot_hold(width):
    a = exact(Problem("nvfp4", 8, 128, 4096), width, 1, "cpu").a
    assert isinstance(a, torch.Tensor)
    integers = a.double() / unit_of(a.double())
    largest = integers.abs().max()
    assert largest <= 255
    if width >= 11:
        assert not torch.equal(a.to(torch.float8_e4m3fn).to(a.dtype), a)
    if width >= 18:
        assert largest == 255


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("fmt", "activation"), KINDS)
def test_block_scales_vary_at_every_width(fmt, activation, width):
    operands = exact(Problem(fmt, 4, 128, 2048, activation), width, 4, "cpu")
    assert operands.weight.scales.unique().numel() >= 3


def test_some_seeds_use_every_e4m3_mantissa():
    raw = [exact(Problem("nvfp4", 4, 64, 2048), 24, seed, "cpu").weight.scales for seed in range(4)]
    assert any(len((r & 7).unique()) == 8 for r in raw)
    assert any(len((r & 7).unique()) == 1 for r in raw)


def test_another_seed_is_another_problem_and_the_same_seed_the_same():
    problem = Problem("nvfp4", 4, 64, 256)
    first, again, other = (exact(problem, 18, seed, "cpu") for seed in (1, 1, 2))
    assert torch.equal(first.weight.codes, again.weight.codes)
    assert not torch.equal(first.weight.codes, other.weight.codes)


def test_no_rows_is_a_problem_too():
    for activation in ("bf16", "fp4"):
        empty = Problem("nvfp4", 0, 64, 256, activation)
        assert exact(empty, 24, 0, "cpu").a.shape[0] == 0
        for family in families(empty):
            assert draw(empty, family.name, 0, "cpu").a.shape[0] == 0


def test_a_window_is_the_same_rows():
    for activation in ("bf16", "fp4"):
        pool = exact(Problem("nvfp4", 30, 64, 256, activation), 14, 0, "cpu")
        part = window(pool, 7, 12)
        assert torch.equal(matrix(part.a), matrix(pool.a)[7:12])


def test_what_cannot_be_drawn_is_refused_in_words():
    problem = Problem("nvfp4", 4, 64, 256)
    with pytest.raises(ValueError, match="width 12"):
        exact(problem, 12, 0, "cpu")
    with pytest.raises(ValueError, match="one group"):
        exact(Problem("nvfp4", 4, 64, 256, groups=2), 24, 0, "cpu")
    with pytest.raises(ValueError, match="not one of"):
        draw(problem, "wishful", 0, "cpu")
    with pytest.raises(ValueError, match="does not exist in nvfp4"):
        draw(problem, "wide-scales", 0, "cpu")


def test_families_have_the_data_they_are_named_for():
    problem = Problem("nvfp4", 16, 256, 1024)

    def scales(name: str) -> torch.Tensor:
        weight = draw(problem, name, 0, "cpu").weight
        return decode_scale(weight.scales, weight.format)

    assert scales("min-normal-scales").min() == 2.0**-6
    assert scales("max-scales").max() == 448
    tiny = scales("subnormal-scales")
    assert tiny.min() == 2.0**-9 and (tiny < 2.0**-6).float().mean() > 0.5
    zero = draw(problem, "zero-blocks", 0, "cpu")
    values = dequantise(zero.weight)
    assert (values == 0).all(dim=1).any()
    assert (torch.signbit(values) & (values == 0)).any()
    assert isinstance(zero.a, torch.Tensor)
    assert (zero.a == 0).all(dim=1).any() and not (zero.a[0] == 0).all()
    for name, low, high in (("alpha-small", 0, 2.0**-39), ("alpha-large", 2.0**7, 2.0**8)):
        alpha = draw(problem, name, 0, "cpu").weight.global_scale
        assert low < float(alpha) < high
        assert int(alpha.view(torch.int32)) & 1, "all 24 significand bits are in use"
    wide = draw(Problem("mxfp4", 4, 2048, 256), "extreme-scales", 0, "cpu").weight.scales
    assert int(wide.max()) - int(wide.min()) > 150


def test_only_families_that_break_a_condition_have_one():
    for name, family in FAMILIES.items():
        assert name == family.name and family.doc
        if "nvfp4" not in family.formats or family.condition is None:
            continue
        if name == "overflow":  # the one whose condition is on the outputs
            continue
        weight = draw(Problem("nvfp4", 4, 64, 256), name, 0, "cpu").weight
        values = decode_scale(weight.scales, weight.format)
        assert values[values > 0].min() < 2.0**-6
    problem = Problem("nvfp4", 4, 64, 256)
    for family in families(problem):
        if family.condition is None:
            weight = draw(problem, family.name, 0, "cpu").weight
            values = decode_scale(weight.scales, weight.format)
            assert values[values > 0].min() >= 2.0**-6, family.name

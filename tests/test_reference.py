"""The reference passes every honest float32 accumulation and catches every kind of damage.

The kernels here are accumulators, simulated on the CPU: products of dequantised operands are exact
in float32, and what differs between kernels is the order and the rounding of their sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.check.reference import (
    Expectation,
    alpha_of,
    expect,
    grade,
    reference64,
    right,
    tile_error,
    tile_limit,
)
from fp4tune.probes.check.rounding import round_down, round_nearest, round_up
from fp4tune.probes.data import WIDTHS, Operands, draw, exact, families, window
from fp4tune.probes.formats import dequantise
from fp4tune.probes.problem import Fp4Tensor, Problem

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [("nvfp4", "bf16"), ("nvfp4", "fp4"), ("mxfp4", "bf16"), ("mxfp4", "fp4")]
DTYPES = ["bf16", "fp16"]
Sum = Callable[[torch.Tensor], torch.Tensor]


def sides(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """A (m, k) and B (n, k) in float64, without global scales."""
    a = operands.a
    left = dequantise(a, torch.float64, False) if isinstance(a, Fp4Tensor) else a.double()
    return left, dequantise(operands.weight, torch.float64, False)


def products(operands: Operands) -> torch.Tensor:
    """float32 (k, m, n): every a*b, exact."""
    a, b = sides(operands)
    exact_products = a.T.unsqueeze(2) * b.T.unsqueeze(1)
    found = exact_products.float()
    assert torch.equal(found.double(), exact_products)
    return found


def finish(total: torch.Tensor, operands: Operands, problem: Problem) -> torch.Tensor:
    """The epilogue of every kernel: times alpha in float32, rounded to the output dtype."""
    return (total.float() * torch.tensor(alpha_of(operands)).float()).to(problem.dtype)


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


def add_truncating(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y in float32, rounded towards zero, as tensor cores do."""
    wide = x.double() + y.double()
    near = wide.float()
    return torch.where(near.double().abs() > wide.abs(), torch.nextafter(near, 0 * near), near)


def add_bf16(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x + y).to(torch.bfloat16).float()


def in_order(p: torch.Tensor, plus: Callable = add) -> torch.Tensor:
    total = torch.zeros_like(p[0])
    for part in p:
        total = plus(total, part)
    return total


def pairwise(p: torch.Tensor, plus: Callable = add) -> torch.Tensor:
    while len(p) > 1:
        half = len(p) // 2
        p = torch.cat((plus(p[:half], p[half : 2 * half]), p[2 * half :]))
    return p[0]


def blocked(p: torch.Tensor, size: int, plus: Callable = add) -> torch.Tensor:
    """Blocks of `size` along k summed alone, then added in order with `plus`."""
    whole = p.reshape(-1, size, *p.shape[1:]).transpose(0, 1)
    return in_order(in_order(whole), plus)


def split_k(p: torch.Tensor, parts: int, plus: Callable = add) -> torch.Tensor:
    whole = p.reshape(parts, -1, *p.shape[1:]).transpose(0, 1)
    return in_order(in_order(whole, plus), plus)


def shuffled(p: torch.Tensor, seed: int) -> torch.Tensor:
    return p[torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))]


def fused(p: torch.Tensor) -> torch.Tensor:
    """One rounding for product and sum: the same as `add` where products are exact."""
    return in_order(p, lambda x, y: (x.double() + y.double()).float())


def dot_products(p: torch.Tensor) -> torch.Tensor:
    """What a tensor core does: 16 products summed exactly, truncated into the accumulator."""
    sums = p.reshape(-1, 16, *p.shape[1:]).double().sum(dim=1)
    return in_order(sums, add_truncating_wide)


def add_truncating_wide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wide = x.double() + y
    near = wide.float()
    cut = torch.where(near.double().abs() > wide.abs(), torch.nextafter(near, 0 * near), near)
    return cut.double()


FP32: dict[str, Sum] = {
    "in order": in_order,
    "backwards": lambda p: in_order(p.flip(0)),
    "shuffled": lambda p: in_order(shuffled(p, 1)),
    "shuffled, truncating": lambda p: in_order(shuffled(p, 2), add_truncating),
    "pairwise": pairwise,
    "pairwise, truncating": lambda p: pairwise(p, add_truncating),
    "blocks of 16": lambda p: blocked(p, 16),
    "blocks of 128, truncating": lambda p: blocked(p, 128, add_truncating),
    "split-K of 4": lambda p: split_k(p, 4),
    "split-K of 7, truncating": lambda p: (
        split_k(p[: len(p) // 7 * 7], 7, add_truncating)
        + in_order(p[len(p) // 7 * 7 :], add_truncating)
    ),
    "truncating": lambda p: in_order(p, add_truncating),
    "fused multiply-add": fused,
    "dot products of 16": dot_products,
}
BF16: dict[str, Sum] = {
    "every sum": lambda p: in_order(p, add_bf16),
    "blocks of 16": lambda p: blocked(p, 16, add_bf16),
    "blocks of 32": lambda p: blocked(p, 32, add_bf16),
    "blocks of 64": lambda p: blocked(p, 64, add_bf16),
    "blocks of 128": lambda p: blocked(p, 128, add_bf16),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "activation"), KINDS)
@pytest.mark.parametrize("k", [256, pytest.param(512, marks=pytest.mark.slow)])
def test_float32_in_any_order_is_exact_at_width_24(fmt, activation, dtype, k):
    problem = Problem(fmt, 4, 32, k, activation, dtype)
    for seed in range(3):
        operands = exact(problem, 24, seed, "cpu")
        expected, p = expect(operands, problem), products(operands)
        assert expected.exact and expected.lo is expected.hi
        for name, total in FP32.items():
            out = finish(total(p), operands, problem)
            assert right(out, expected).all(), (name, seed)
            assert torch.equal(out, expected.lo), (name, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "activation"), KINDS)
@pytest.mark.parametrize("k", [256, pytest.param(512, marks=pytest.mark.slow)])
def test_float32_in_any_order_is_within_the_bound_on_every_family(fmt, activation, dtype, k):
    problem = Problem(fmt, 4, 32, k, activation, dtype)
    for family in families(problem):
        operands = draw(problem, family.name, 2, "cpu")
        expected, p = expect(operands, problem), products(operands)
        for name, total in FP32.items():
            out = finish(total(p), operands, problem)
            infinite = int(out.isinf().sum())
            assert (infinite > 0) == (family.name == "overflow") and not out.isnan().any()
            assert right(out, expected).all(), (family.name, name)


@pytest.mark.parametrize(("fmt", "activation"), KINDS)
def test_partial_sums_in_bf16_are_graded_8_to_14_and_never_wrong(fmt, activation):
    problem = Problem(fmt, 3, 48, 1024, activation)
    for name, total in BF16.items():
        equal = {}
        for width in WIDTHS:
            operands = exact(problem, width, 1, "cpu")
            out = finish(total(products(operands)), operands, problem)
            equal[width] = bool(right(out, expect(operands, problem)).all())
        assert grade(equal) in (8, 11, 14), (name, equal)


@pytest.mark.parametrize(("fmt", "activation"), KINDS)
@pytest.mark.parametrize("k", [2048, 8192])
def test_partial_sums_in_bf16_per_128_stay_below_the_tile_limit_on_every_family(fmt, activation, k):
    problem = Problem(fmt, 4, 48, k, activation)
    for family in families(problem):
        operands = draw(problem, family.name, 0, "cpu")
        out = finish(blocked(products(operands), 128, add_bf16), operands, problem)
        error = tile_error(out, reference64(operands, problem)).max()
        assert error < tile_limit(k), family.name


def without_each_block(operands: Operands, problem: Problem, block: int = 16) -> torch.Tensor:
    """(k/block, m, n) outputs: each leaves out one block along k."""
    a, b = sides(operands)
    parts = torch.einsum(
        "mgk,ngk->gmn",
        a.reshape(len(a), -1, block),
        b.reshape(len(b), -1, block),
    )
    return round_nearest(((a @ b.T) - parts) * alpha_of(operands), problem.dtype)


@pytest.mark.parametrize(("fmt", "activation"), KINDS)
@pytest.mark.parametrize("k", [512, 16384])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_dropped_block_is_caught_in_every_row_alone_at_every_width(fmt, activation, width, k):
    problem = Problem(fmt, 6, 128, k, activation, "bf16")  # which hides more than fp16
    operands = exact(problem, width, k, "cpu")
    expected = expect(operands, problem)
    damaged = without_each_block(operands, problem)
    caught = (damaged != expected.lo).any(dim=2)
    assert caught.all(), f"{int((~caught).sum())} of {caught.numel()} launches of one row pass"


@pytest.mark.parametrize(("fmt", "activation"), KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_rows_and_single_elements_are_caught_at_every_width(fmt, activation, width):
    problem = Problem(fmt, 64, 256, 16384, activation, "bf16")
    operands = exact(problem, width, 3, "cpu")
    expected = expect(operands, problem)
    good = expected.lo
    assert right(good, expected).all()

    rows = right(torch.zeros_like(good), expected)
    assert not rows[:, :128].all(dim=1).any(), "a zeroed tile of one row passes"
    assert not rows[:, 128:].all(dim=1).any(), "a zeroed tile of one row passes"

    same = (good.unsqueeze(0) == good.unsqueeze(1)).all(dim=2)
    assert int(same.sum()) == problem.m, "two rows are equal: swapping them would pass"

    up, down = torch.full_like(good, math.inf), torch.full_like(good, -math.inf)
    assert not right(neighbour(good, up), expected).any(), "one ulp up passes"
    assert not right(neighbour(good, down), expected).any(), "one ulp down passes"
    assert not right(torch.full_like(good, math.nan), expected).any()


def neighbour(x: torch.Tensor, towards: torch.Tensor) -> torch.Tensor:
    """The next 16-bit float, by way of the float64 rounding functions."""
    nudge = torch.nextafter(x.double(), towards.double())
    return round_up(nudge, x.dtype) if towards.max() > 0 else round_down(nudge, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "activation"), KINDS)
@pytest.mark.parametrize("k", [2048, pytest.param(8192, marks=pytest.mark.slow)])
def test_zeros_and_nans_never_pass_on_any_family(fmt, activation, dtype, k):
    for m in (1, 16):
        problem = Problem(fmt, m, 128, k, activation, dtype)
        for family in families(problem):
            expected = expect(draw(problem, family.name, 0, "cpu"), problem)
            exact = family.name in ("activation-bits", "weight-bits")
            assert expected.exact == exact and (expected.ref is None) == exact
            if exact:
                assert not right(torch.zeros_like(expected.lo), expected).all()
                assert not right(torch.full_like(expected.lo, torch.nan), expected).any()
                continue
            assert expected.ref is not None
            zeros = torch.zeros_like(expected.lo)
            assert not right(zeros, expected).all(), family.name
            assert tile_error(zeros, expected.ref).max() == pytest.approx(1, rel=1e-3)
            broken = expected.hi.clone()
            assert right(broken, expected).all(), family.name
            broken[0, 3] = math.nan
            assert not right(broken, expected).all(), family.name
            assert tile_error(broken, expected.ref)[0, 0] == math.inf


@pytest.mark.parametrize(
    ("m", "k"),
    [(1, 4096), (128, 4096), pytest.param(128, 16384, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("fmt", "activation"), KINDS)
def test_a_dropped_block_exceeds_the_tile_limit(fmt, activation, m, k):
    problem = Problem(fmt, m, 192, k, activation)
    names = ["realistic"]
    names += ["zero-blocks"] if m > 1 else []  # one row may have nothing in a block to drop
    names += ["subnormal-scales", "max-scales"] if fmt == "nvfp4" else []
    for name in names:
        operands = draw(problem, name, 1, "cpu")
        ref = reference64(operands, problem)
        a, b = sides(operands)
        for block in (0, 100, 255):
            cut = slice(16 * block, 16 * block + 16)
            missing = (a[:, cut] @ b[:, cut].T) * alpha_of(operands)
            errors = tile_error((ref - missing).to(problem.dtype), ref)
            assert errors.shape == (-(-m // 128), 2)
            assert (errors > tile_limit(k)).all(), (name, block, errors)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    values=st.lists(
        st.one_of(st.floats(-1e6, 1e6), st.floats(-1e-4, 1e-4), st.floats(allow_nan=False)),
        min_size=1,
        max_size=30,
    ),
)
def test_directed_rounding_brackets_every_number_with_neighbours(dtype, values):
    x = torch.tensor(values, dtype=torch.float64)
    low, high = round_down(x, dtype), round_up(x, dtype)
    assert (low.double() <= x).all() and (high.double() >= x).all()
    held = low.double() == x
    assert torch.equal(held, high.double() == x)
    gap = ~held
    assert torch.equal(neighbour(low, torch.full_like(low, math.inf))[gap], high[gap])
    near = round_nearest(x, dtype)
    assert ((near == low) | (near == high)).all()


def test_a_global_scale_is_read_again_where_it_was_written():
    problem = Problem("nvfp4", 2, 16, 32, activation="fp4")
    operands = exact(problem, 24, 1, "cpu")
    before = alpha_of(operands)
    assert before == float(operands.weight.global_scale) * float(operands.a.global_scale)
    assert alpha_of(operands) == before
    operands.weight.global_scale.mul_(8)
    assert alpha_of(operands) == 8 * before
    with torch.inference_mode():
        own = replace(operands.weight, global_scale=operands.weight.global_scale.clone())
        operands = replace(operands, weight=own)
        assert alpha_of(operands) == 8 * before
        own.global_scale.mul_(2)
    assert alpha_of(operands) == 16 * before


def test_rounding_float64_once_differs_from_rounding_it_twice():
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert x.to(torch.bfloat16) == 1  # by way of float32, where the last bit is lost
    assert round_nearest(x, torch.bfloat16) == 1 + 2.0**-7
    tie = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8], dtype=torch.float64)
    assert round_nearest(tie, torch.bfloat16).tolist() == [1, 1 + 2.0**-6]
    big = torch.tensor([65519.9, 65520.0, -65520.0], dtype=torch.float64)
    assert round_nearest(big, torch.float16).tolist() == [65504, math.inf, -math.inf]


def test_every_value_within_the_tolerance_is_right_and_no_other():
    problem = Problem("nvfp4", 4, 16, 256)
    operands = draw(problem, "realistic", 0, "cpu")
    expected = expect(operands, problem)
    assert right(expected.lo, expected).all() and right(expected.hi, expected).all()
    nearest = round_nearest(reference64(operands, problem), problem.dtype)
    assert right(nearest, expected).all()
    top = torch.full_like(expected.hi, math.inf)
    assert not right(neighbour(expected.hi, top), expected).any()
    assert not right(neighbour(expected.lo, -top), expected).any()


def test_a_rounded_global_scale_can_be_judged_for_what_it_is():
    problem = Problem("nvfp4", 8, 64, 512)
    operands = draw(problem, "alpha-small", 0, "cpu")
    alpha = float(torch.tensor(alpha_of(operands)).to(torch.bfloat16))
    out = round_nearest(reference64(operands, problem, alpha=alpha), problem.dtype)
    assert not right(out, expect(operands, problem)).all()
    assert right(out, expect(operands, problem, alpha=alpha)).all()


def test_overflow_of_fp16_is_right_only_where_the_reference_overflows():
    problem = Problem("nvfp4", 8, 64, 512, "bf16", "fp16")
    operands = draw(problem, "realistic", 0, "cpu")
    alpha = alpha_of(operands) * 2.0**16
    expected = expect(operands, problem, alpha=alpha)
    ref = reference64(operands, problem, alpha=alpha)
    out = round_nearest(ref, problem.dtype)
    assert torch.isinf(out).any() and torch.isfinite(out).any()
    assert right(out, expected).all()
    far = ref.abs() < 60000
    assert not right(torch.full_like(out, math.inf), expected)[far].any()
    assert not right(out.clamp(-65504, 65504), expected)[ref.abs() > 70000].any()


def test_chunks_and_windows_do_not_change_what_is_expected():
    for family in ("exact", "outliers"):
        problem = Problem("nvfp4", 37, 64, 256, "fp4")
        operands = (
            exact(problem, 14, 0, "cpu") if family == "exact" else draw(problem, family, 0, "cpu")
        )
        whole = expect(operands, problem)
        chunked = expect(operands, problem, chunk_rows=8)
        part = expect(window(operands, 5, 21), problem.at(16))
        cut: Expectation = whole.window(5, 21)
        assert torch.equal(whole.lo, chunked.lo) and torch.equal(whole.hi, chunked.hi)
        assert torch.equal(cut.lo, part.lo) and torch.equal(cut.hi, part.hi)


def test_no_rows_are_expected_of_no_rows():
    problem = Problem("nvfp4", 0, 64, 256)
    expected = expect(exact(problem, 8, 0, "cpu"), problem)
    assert expected.lo.shape == (0, 64)
    assert tile_error(expected.lo, expected.lo.float()).shape == (0, 1)


def test_operands_of_another_problem_are_refused():
    problem = Problem("nvfp4", 4, 64, 256)
    with pytest.raises(ValueError, match="do not fit"):
        expect(exact(problem, 8, 0, "cpu"), Problem("nvfp4", 4, 64, 512))


def test_tile_error_on_zero_tiles_and_ragged_edges():
    ref = torch.zeros(130, 200, dtype=torch.float64)
    ref[:128, :128] = 2.0
    out = ref.to(torch.bfloat16)
    assert tile_error(out, ref).tolist() == [[0, 0], [0, 0]]
    out[129, 199] = 1e-30
    out[0, 0] = 0.0
    errors = tile_error(out, ref)
    assert errors[0, 0] == pytest.approx(1 / 128)
    assert errors[1, 1] == math.inf and errors[0, 1] == errors[1, 0] == 0
    out[5, 5] = math.inf
    assert tile_error(out, ref)[0, 0] == math.inf


def test_grading_takes_the_widest_without_a_gap_below():
    assert grade(dict.fromkeys(WIDTHS, True)) == 24
    assert grade({24: False, 18: False, 14: True, 11: True, 8: True}) == 14
    assert grade({24: True, 8: True}) == 24
    assert grade({24: True, 18: True, 14: True, 11: True, 8: False}) is None
    assert grade({24: False, 18: True, 14: False, 11: True, 8: True}) == 11
    for wrong in ({}, {10: True}):
        with pytest.raises(ValueError, match="widths"):
            grade(wrong)

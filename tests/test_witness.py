"""The witness: what a sum of random signs sees of an output, and what it does not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fp4tune.probes.formats import DTYPES, dequantise, quantise
from fp4tune.probes.layouts import swizzle
from fp4tune.probes.problem import FORMATS, Fp4Tensor
from fp4tune.witness import limits, rows, vectors
from fp4tune.witness.groups import WIDEST, groups_of

pytestmark = pytest.mark.usefixtures("one_thread", "seeded_signs")
N, K = 1152, 256
SEEDS = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(seed: int = 1, n: int = N, k: int = K, fmt: str = "nvfp4") -> Fp4Tensor:
    return quantise(torch.randn(n, k, generator=seeded(seed)), FORMATS[fmt])


def product(a: torch.Tensor | Fp4Tensor, w: Fp4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The right answer, rounded once."""
    left = dequantise(a, torch.float64) if isinstance(a, Fp4Tensor) else a.double()
    return (left @ dequantise(w, torch.float64).T).to(dtype)


class Layer:
    """A weight, what it is watched with, and right calls of it."""

    def __init__(self, seed: int = 1, n: int = N, k: int = K, fmt: str = "nvfp4") -> None:
        self.weight = weight(seed, n, k, fmt)
        self.sums = vectors.sums_of([self.weight], vectors.draw_signs(n, seeded(seed + 1)))

    def redrawn(self, seed: int) -> Layer:
        vectors.remake(self.sums, [self.weight], seeded(seed))
        return self

    def call(self, m: int, seed: int, dtype: str = "bf16", size: float = 1.0) -> rows.WatchedCall:
        a = torch.randn(m, self.weight.shape[1], generator=seeded(seed)).mul(size)
        a = a.to(DTYPES[dtype])
        return rows.WatchedCall(a, product(a, self.weight, DTYPES[dtype]))

    def check(self, call: rows.WatchedCall, measured: float | None = 0.0) -> rows.Seen:
        dtype = "bf16" if call.y.dtype == torch.bfloat16 else "fp16"
        found = limits.limit(dtype, self.sums.groups.width, self.sums.k, measured)
        return rows.check(call, self.sums, found)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


# -- groups and sums


@given(st.integers(1, 300_000))
def test_groups_cover_every_column_once_and_are_never_too_wide(n):
    groups = groups_of(n)
    columns = [range(n)[part] for part in groups]
    assert columns[0].start == 0 and columns[-1].stop == n
    assert all(a.stop == b.start for a, b in zip(columns, columns[1:], strict=False))
    assert all(1 <= len(part) <= WIDEST for part in columns)
    assert len(columns) == groups.count == -(-n // groups.width)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_sums_are_the_signed_columns_of_the_dequantised_weight(fmt):
    w = weight(3, 640, 128, fmt)
    signs = vectors.draw_signs(640, seeded(4))
    sums = vectors.sums_of([w], signs)
    values = dequantise(w, torch.float64, with_global=False)
    assert set(signs.unique().tolist()) == {-1, 1}
    for group, columns in enumerate(sums.groups):
        right = signs[:, columns].double() @ values[columns]
        assert torch.equal(sums.sums[0, group], right.float())


def test_a_sum_costs_seven_thousandths_of_the_weight_a_vector():
    w = Fp4Tensor(
        FORMATS["nvfp4"],
        torch.zeros(4096, 2048, dtype=torch.uint8),
        torch.zeros(4096, 256, dtype=torch.uint8),
        torch.ones(()),
    )
    sums = vectors.sums_of([w], vectors.draw_signs(4096))
    stored = w.codes.numel() + w.scales.numel()
    assert sums.sums.numel() * 4 / vectors.VECTORS / stored < 0.0072


def test_a_weight_that_is_not_finite_is_known_by_its_sums():
    w = weight()
    scales = w.scales.clone()
    scales[5, 2] = 0x7F
    assert not vectors.sums_of([replace(w, scales=scales)], vectors.draw_signs(N)).finite
    assert vectors.sums_of([w], vectors.draw_signs(N)).finite


def test_signs_are_drawn_anew_in_place(layer):
    mine = Layer(7)
    before, place = mine.sums.signs.clone(), mine.sums.sums.data_ptr()
    call = mine.call(4, 8)
    mine.redrawn(9)
    assert not torch.equal(before, mine.sums.signs) and mine.sums.sums.data_ptr() == place
    assert not mine.check(call).suspicious.any()


# -- what is right is not suspected


@settings(max_examples=40)
@given(
    SEEDS,
    st.sampled_from(["nvfp4", "mxfp4"]),
    st.sampled_from(["bf16", "fp16"]),
    st.booleans(),
    st.floats(-18, 12),
)
def test_a_rounded_product_is_never_a_suspicion(seed, fmt, dtype, fp4, power):
    w = weight(seed, 320, 128, fmt)
    x = torch.randn(6, 128, generator=seeded(seed + 1)) * 2.0**power
    if dtype == "fp16":
        assume(power < 6)
    a = quantise(x, FORMATS[fmt]) if fp4 else x.to(DTYPES[dtype])
    sums = vectors.sums_of([w], vectors.draw_signs(320, seeded(seed + 2)))
    call = rows.WatchedCall(a, product(a, w, DTYPES[dtype]))
    seen = rows.check(call, sums, limits.limit(dtype, sums.groups.width, 128, 0.0))
    assert not seen.suspicious.any() and not seen.skipped.any()


@settings(max_examples=20)
@given(SEEDS)
def test_products_that_are_all_subnormal_are_not_suspected(seed):
    layer = Layer(seed, 256, 64)
    call = layer.call(5, seed + 1, "fp16", 2.0**-20)
    assert (call.y.abs().double().max() < 2.0**-14) and not layer.check(call).suspicious.any()


@settings(max_examples=20)
@given(SEEDS, st.floats(0, 300))
def test_a_bias_is_taken_off(seed, size):
    layer = Layer(seed, 256, 64)
    call = layer.call(5, seed + 1)
    bias = (torch.randn(256, generator=seeded(seed)) * size).bfloat16()
    values = call.a.double() @ dequantise(layer.weight, torch.float64).T + bias.double()
    with_bias = replace(call, y=values.bfloat16(), bias=bias)
    assert not layer.check(with_bias).suspicious.any()
    if size > 50:
        assert layer.check(replace(with_bias, bias=None)).suspicious.any()


@settings(max_examples=20)
@given(SEEDS, st.sampled_from(["128x4", "8x4"]), st.sampled_from(["nvfp4", "mxfp4"]))
def test_swizzled_scales_of_an_activation_are_read_where_they_lie(seed, layout, fmt):
    w = weight(seed, 192, 192, fmt)
    a = quantise(torch.randn(7, 192, generator=seeded(seed)), FORMATS[fmt])
    sums = vectors.sums_of([w], vectors.draw_signs(192))
    call = rows.WatchedCall(a, product(a, w, torch.bfloat16))
    flat = replace(a, scales=swizzle(a.scales, layout))
    limit = limits.limit("bf16", 192, 192, 0.0)
    plain = rows.check(call, sums, limit)
    seen = rows.check(replace(call, a=flat, scale_layout=layout), sums, limit)
    assert torch.equal(plain.gap, seen.gap) and not seen.suspicious.any()


# -- what is wrong is


@settings(max_examples=25)
@given(SEEDS, st.sampled_from(["dropped", "stale", "exchanged", "doubled", "zero"]))
def test_wrong_tiles_rows_and_scales_are_always_seen(seed, what):
    layer = Layer(seed % 5, N, K)
    layer.redrawn(seed)
    call = layer.call(8, seed + 1)
    y = call.y.clone()
    if what == "dropped":
        y[:, 256:384] = 0
    elif what == "stale":
        y[:, 256:384] = layer.call(8, seed + 2).y[:, 256:384]
    elif what == "exchanged":
        y[[2, 5]] = y[[5, 2]]
    elif what == "doubled":
        y *= 2
    else:
        y[3] = 0
    assert layer.check(replace(call, y=y)).suspicious.any()


def test_a_tile_dropped_in_one_row_is_seen_in_99_of_100():
    layer, seen, tries = Layer(2, 4096, 128), 0, 40
    for seed in range(tries):
        call = layer.redrawn(seed).call(32, seed)
        y = call.y.clone()
        y[:, 128:256] = 0
        seen += int(layer.check(replace(call, y=y)).suspicious.any(dim=1).sum())
    assert seen / (tries * 32) >= 0.99


def test_a_massive_column_hides_its_own_group_only():
    layer = Layer(2, 2048, 128)
    call = layer.call(8, 3)
    y, a = call.y.clone(), call.a
    heavy = dequantise(layer.weight, torch.float64)
    heavy[5] *= 1e4
    sums = vectors.sums_of([heavy], layer.sums.signs)
    y = (a.double() @ heavy.T).bfloat16()
    y[:, 256:384] = 0  # beside the massive column
    y[:, 1280:1408] = 0  # in the other group
    seen = rows.check(rows.WatchedCall(a, y), sums, limits.limit("bf16", 1024, 128, 0.0))
    assert not seen.suspicious[:, 0].all() and seen.suspicious[:, 1].all()


def test_equal_and_opposite_errors_are_seen_once_signs_are_drawn_anew():
    layer = Layer(2, 256, 64)
    call = layer.call(1, 3)
    y = call.y.clone()
    y[0, 10] += 64
    y[0, 20] -= 64
    seen = [bool(layer.redrawn(s).check(replace(call, y=y)).suspicious.any()) for s in range(64)]
    # Invisible to two vectors that give both columns one sign: one time in four.
    assert 0.5 < sum(seen) / len(seen) < 0.95


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, N - 1))
def test_what_is_not_finite_counts_where_the_activation_is(seed, what, column):
    layer = Layer(1)
    call = layer.call(3, seed)
    y = call.y.clone()
    y[1, column] = what
    seen = layer.check(replace(call, y=y))
    assert seen.suspicious.nonzero().tolist() == [[1, column // layer.sums.groups.width]]


def test_rows_of_nan_are_skipped_and_counted_apart(layer):
    call = layer.call(4, 5)
    a, y = call.a.clone(), call.y.clone()
    a[1, 3], a[2, 9] = math.nan, math.inf
    y[1:3] = math.nan
    seen = layer.check(replace(call, a=a, y=y))
    assert seen.skipped.tolist() == [False, True, True, False]
    assert not seen.suspicious.any()


def test_what_is_near_overflow_is_not_judged():
    layer = Layer(1, 256, 64)
    call = layer.call(4, 5, "fp16", 2.0**14)
    assert torch.isinf(call.y).any()
    seen = layer.check(call)
    assert not seen.suspicious.any() and seen.beyond.any()


@pytest.mark.parametrize("size", [1.0, 2.0**5, 2.0**9])
def test_large_numbers_of_float16_are_judged_while_they_are_finite(size):
    layer = Layer(1, 1024, 64)
    call = layer.call(64, 5, "fp16", size)
    assert torch.isfinite(call.y).all()
    seen = layer.check(call)
    assert not seen.suspicious.any() and not seen.beyond.any()
    y = call.y.clone()
    y[:, 128:256] = 0
    seen = layer.check(replace(call, y=y))
    assert int(seen.suspicious.sum()) >= 60 and not seen.beyond.any()
    if size < 2.0**9:
        y[:, 128:256] = math.nan
        seen = layer.check(replace(call, y=y))
        # A row whose sum happens to be large may have overflowed: it is counted apart.
        assert (seen.suspicious | seen.beyond).all()
        assert seen.beyond.sum() <= (0 if size == 1.0 else 16)


# -- experts


def test_each_row_is_held_to_its_own_expert():
    w = [weight(seed, 192, 64) for seed in (1, 2, 3)]
    w[1] = replace(w[1], global_scale=w[1].global_scale * 4)
    sums = vectors.sums_of(w, vectors.draw_signs(192))
    a = torch.randn(7, 64, generator=seeded(4)).bfloat16()
    experts = torch.tensor([0, 1, 2, 2, -1, 1, 0], dtype=torch.int32)
    y = torch.zeros(7, 192, dtype=torch.bfloat16)
    for at, expert in enumerate(experts.tolist()):
        if expert >= 0:
            y[at] = product(a[at : at + 1], w[expert], torch.bfloat16)[0]
    limit = limits.limit("bf16", 192, 64, 0.0)
    seen = rows.check(rows.WatchedCall(a, y, experts=experts), sums, limit)
    assert not seen.suspicious.any() and seen.skipped.tolist() == [False] * 4 + [True] + [False] * 2
    moved = experts.clone()
    moved[1] = 2
    seen = rows.check(rows.WatchedCall(a, y, experts=moved), sums, limit)
    assert seen.suspicious.nonzero()[:, 0].tolist() == [1]


# -- limits


def test_the_limit_is_two_standard_deviations_of_y_at_n_4096():
    assert math.isclose(limits.T * limits.UNIT_ROUNDOFF["bf16"] * math.sqrt(4096), 2.0)
    assert limits.chance_of_a_false_alarm() < 3e-14


@given(st.floats(0, 0.9), st.integers(16, 30000))
def test_an_accumulation_is_allowed_four_times_and_never_more_than_a_right_tile(measured, k):
    found = limits.accumulation(measured, k)
    assert found <= limits.accumulation(None, k)
    assert found == min(4 * measured, limits.accumulation(None, k))


@settings(max_examples=30)
@given(SEEDS, st.sampled_from(["bf16", "fp16"]))
def test_random_errors_within_the_limit_for_rounding_pass_it_never(seed, dtype):
    """Hoeffding, with errors of full size in every element."""
    g = seeded(seed)
    y = torch.randn(64, 1024, generator=g, dtype=torch.float64)
    errors = y.abs() * limits.UNIT_ROUNDOFF[dtype] * torch.sign(torch.randn(64, 1024, generator=g))
    signs = torch.sign(torch.randn(1024, 2, generator=g, dtype=torch.float64))
    found = (errors.double() @ signs).abs().amax(dim=1)
    allowed = limits.limit(dtype, 1024, 64, 0.0).of_y * torch.linalg.vector_norm(y, dim=1)
    assert bool((found <= allowed).all())


def test_shapes_that_do_not_fit_are_refused(layer):
    call = layer.call(2, 3)
    with pytest.raises(ValueError, match="do not fit a weight"):
        layer.check(replace(call, y=call.y[:, :-1]))
    with pytest.raises(ValueError, match="no limit"):
        limits.limit("bf16", 0, 64)


# -- what the probe measures for it


def test_accumulation_is_what_is_left_beside_rounding():
    from fp4tune.probes.check.accumulation import accumulation

    ref = torch.randn(5, 2048, generator=seeded(1))
    right = ref.bfloat16()
    assert accumulation(right, ref) == 0.0
    assert accumulation(right[:0], ref[:0]) == 0.0
    off = right.clone()
    off[3, 1024:] *= 1.0625
    assert math.isclose(accumulation(off, ref), 0.0625, rel_tol=0.1)
    zero = torch.zeros(2, 64)
    assert accumulation(zero.bfloat16() + 1, zero) == 0.0


def test_a_short_accumulator_stays_below_four_times_what_is_measured_of_it():
    from fp4tune.probes.check.accumulation import accumulation

    layer = Layer(4, 1024, 512)
    values = dequantise(layer.weight, torch.float32)

    def short(a: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(a.shape[0], 1024, dtype=torch.bfloat16)
        for start in range(0, 512, 64):
            part = slice(start, start + 64)
            total = (total.float() + a[:, part].float() @ values[:, part].T).bfloat16()
        return total

    first = layer.call(64, 5)
    ref = (first.a.double() @ dequantise(layer.weight, torch.float64).T).float()
    measured = accumulation(short(first.a), ref)
    assert 1e-3 < measured < 1e-2
    for seed in range(6):
        call = layer.redrawn(seed).call(64, 10 + seed)
        assert not layer.check(replace(call, y=short(call.a)), measured).suspicious.any()


@given(st.integers(1, 5000), st.integers(64, 60_000), st.integers(1, 512))
def test_the_kernels_sums_are_as_shallow_as_the_limit_allows_for(m, n, blocks):
    from fp4tune.witness import launch
    from fp4tune.witness.watcher import LONGEST_ROW

    k, groups = 64 * blocks, groups_of(n)
    assert k <= LONGEST_ROW
    cut = launch.cut(m, groups.count, groups.width, k)
    assert limits.deep_enough(k, cut.block_k)
    assert cut.block_n >= groups.width and cut.rows * cut.block_k <= 8192

"""Rows are drawn anew in place: other problems, as exact as the first, that a seed gives again."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fp4tune.autotune.evidence.wording import shown
from fp4tune.autotune.regime import Wanted
from fp4tune.autotune.stages.prove import LESS, _lacking, _LongRun
from fp4tune.autotune.verdict.buckets import MRange
from fp4tune.probes.backends import tactics
from fp4tune.probes.check.reference import alpha_of, expect
from fp4tune.probes.check.sweep import Checker, slot
from fp4tune.probes.data import WIDTHS, largest_sum, steady
from fp4tune.probes.launch.case import case
from fp4tune.probes.launch.item import Item, LaunchAim
from fp4tune.probes.launch.outcome import Budget, repeat
from fp4tune.probes.launch.redraw import ProductAnswers, Redraw
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.regimes.plain import every_m
from fp4tune.probes.registry import load_one
from fp4tune.probes.worker.replay import recall
from fp4tune.probes.worker.session import CHAIN, OpenLayer, field_rows

CPU = torch.device("cpu")
BUDGET = Budget(1, 1, 0.0)
AMPLE = Budget(1, 1, 60.0)
PROBLEM = Problem("nvfp4", 64, 64, 128, "bf16", "bf16")


def bits(a) -> torch.Tensor:
    return a.codes if hasattr(a, "codes") else a.view(torch.int16)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["nvfp4", "mxfp4"]),
    st.sampled_from(["bf16", "fp4"]),
    st.sampled_from(WIDTHS),
    st.integers(0, 2**40),
    st.integers(1, 10**6),
)
def test_no_draw_leaves_the_width(format_, activation, width, seed, draw):
    problem = Problem(format_, 24, 64, 256, activation, "bf16")
    try:
        operands = steady(problem, width, seed, CPU)
    except ValueError:
        assume(False)  # then the strict cases are used, and their rows stay
    most = operands.rows.most(operands.weight)
    before = bits(operands.a).clone()
    assert largest_sum(operands.a, operands.weight) <= most
    operands.rows.fill(operands.a, draw)
    assert largest_sum(operands.a, operands.weight) <= most
    assert not torch.equal(before, bits(operands.a))


def test_a_draw_is_the_same_however_many_rows_there_are():
    small, large = (
        steady(Problem("nvfp4", m, 64, 128, "bf16", "bf16"), 24, 5, CPU) for m in (8, 40)
    )
    for operands in (small, large):
        operands.rows.fill(operands.a, 7)
    assert torch.equal(small.a, large.a[:8])
    assert torch.equal(small.weight.codes, large.weight.codes)


@pytest.mark.parametrize("activation", ["bf16", "fp4"])
def test_answers_are_those_of_the_reference(activation):
    backend = load_one("torch-dequant" if activation == "bf16" else "torch-dequant-w4a4")
    problem = Problem("nvfp4", 33, 96, 256, activation, "bf16")
    cases = [case(backend, problem, steady(problem, 24, seed, CPU)) for seed in (1, 2)]
    again = Redraw(
        cases, ProductAnswers(cases, 2 * 96 * 256)
    )  # the second is dequantised each time
    seen = []
    for _ in range(3):
        again()
        for each in cases:
            right = expect(each.operands, problem).lo
            assert torch.equal(each.expectation.lo, right)
            seen.append(right.clone())
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert again.missed == 0 and again.draws == 3


def test_an_answer_that_is_wrong_is_noticed():
    backend = load_one("torch-dequant")
    problem = Problem("nvfp4", 16, 64, 128, "bf16", "bf16")
    each = case(backend, problem, steady(problem, 24, 1, CPU))
    again = Redraw([each], answers := ProductAnswers([each], 1 << 30))
    answers._kept[0] *= 2
    again()
    assert again.missed > 0


def test_an_input_that_was_written_is_noticed_though_it_is_drawn_anew():
    backend = load_one("torch-dequant")
    problem = Problem("nvfp4", 16, 64, 128, "bf16", "bf16")
    each = case(backend, problem, steady(problem, 24, 1, CPU))
    again = Redraw([each], ProductAnswers([each], 1 << 30))
    again()
    assert each.unchanged.changed() == 0
    each.operands.a[3, 5] = 7.5
    again()
    assert each.unchanged.changed() == 1
    assert each.unchanged.changed() == 0


def test_the_draw_of_the_first_failure_is_told():
    right = torch.ones(2, 4, dtype=torch.bfloat16)
    place = slot(right, right)
    checker = Checker([place])
    for draw in range(4):
        if draw:
            checker.mark()
        for _ in range(3):
            place.out.copy_(right if draw < 2 else right + 1)
            checker.sweep()
    (report,) = checker.reports()
    assert (report.first, report.draw) == (7, 2)


def test_draws_are_spread_over_the_launches_and_take_a_quarter_of_the_time_at_most():
    class Draws:
        seconds = 0.0
        draws = 0

        def __call__(self):
            self.draws += 1

    for seconds, expected in ((0.0, 9), (3600.0, 0)):
        redraw = Draws()
        redraw.seconds = seconds
        count = [0]

        def once(count=count):
            count[0] += 1
            time.sleep(0.001)

        repeat(once, Budget(100, 100, 60.0, redraw=redraw, draws=10), CPU)
        assert count[0] == 100 and redraw.draws == expected


def test_what_a_draw_really_takes_is_what_they_are_spread_by():
    """A regime's own copies are made again with the rows, and can cost more than these."""

    class Slow:
        seconds = 0.0
        draws = 0

        def __call__(self):
            self.draws += 1
            time.sleep(0.02)

    redraw, beats = Slow(), []
    budget = Budget(60, 60, 60.0, lambda: beats.append(redraw.draws), redraw, 30)
    repeat(lambda: time.sleep(0.001), budget, CPU)
    assert 1 <= redraw.draws < 15, "29 if the first, which is not known beforehand, was forgotten"
    assert 1 in beats, "a draw is told of when it is done"


class FailsLater:
    """Right in the first draw; after that it uses the rows of the draw before."""

    name = "fails-later"
    activation = "bf16"
    layout = "plain"

    def __init__(self):
        self.right = load_one("torch-dequant")
        self.tactic = tactics(self.right, PROBLEM, Device("cpu"))[0]
        self.old = {}

    def unsupported(self, problem, device):
        return None

    def prepare(self, weight, problem):
        return self.right.prepare(weight, problem)

    def run(self, state, a, out, tactic):
        first = self.old.setdefault(a.data_ptr(), a.clone())
        self.right.run(state, first if a.shape == first.shape else a, out, self.tactic)


@pytest.fixture
def stale_layer():
    return OpenLayer(FailsLater(), Device("cpu"), PROBLEM, 3, 1 << 30, lambda text: None)


def test_what_goes_wrong_in_a_later_draw_is_found_and_made_again_from_its_seed(stale_layer):
    found = stale_layer.regime(
        "serial", [Item((4,), "")], BUDGET, LaunchAim(launches=400, problems=100, seconds=20.0)
    )
    (result,) = found["items"]
    bad = result["bad"][0]
    assert result["bad_launches"] and bad["draw"] >= 1
    cases, launches = recall(stale_layer, bad)
    mine = next(x for x in launches if x.item == 1)
    drawn = cases[mine.case]
    again = steady(drawn.problem, 24, bad["seed"], CPU)
    again.rows.fill(again.a, bad["draw"])
    window = slice(mine.offset, mine.offset + mine.m)
    assert torch.equal(drawn.operands.a[window], again.a[window])
    assert alpha_of(again) == alpha_of(drawn.operands)


AT_LENGTH = ("serial", "rewrite", "padding", "strided", "churn", "streams", "mlp-chain")
"""Regimes that are run at length, and on a CPU."""


@pytest.mark.parametrize("regime", AT_LENGTH)
@pytest.mark.parametrize("name", ["torch-dequant", "torch-dequant-w4a4"])
def test_what_is_right_passes_on_other_problems(regime, name):
    backend = load_one(name)
    problem = Problem("nvfp4", 40, 64, 128, backend.activation, "bf16")
    layer = OpenLayer(backend, Device("cpu"), problem, 3, 1 << 30, lambda text: None)
    tactic = tactics(backend, problem, Device("cpu"))[0]
    items = [Item((1,), tactic), Item((5, 8), tactic)]
    found = layer.regime(regime, items, BUDGET, LaunchAim(200, 60, 3.0))
    assert found["not_exercised"] is None
    for result in found["items"]:
        assert not result["bad"] and not result.get("changed_inputs")
        assert result["launches"] >= result["problems"] >= CHAIN["cpu"][0]


@pytest.mark.parametrize("name", ["torch-dequant", "torch-dequant-w4a4"])
def test_a_launch_of_all_rows_there_are_is_rewritten_with_the_other_sign(name):
    backend = load_one(name)
    problem = Problem("nvfp4", 8, 64, 128, backend.activation, "bf16")
    layer = OpenLayer(backend, Device("cpu"), problem, 3, 1 << 30, lambda text: None)
    items = [Item((8,), tactics(backend, problem, Device("cpu"))[0])]
    found = layer.regime("rewrite", items, BUDGET, LaunchAim(8_000, 60, 5.0))
    assert found["not_exercised"] is None and not found["items"][0]["bad"]
    assert found["items"][0]["problems"] > 2


@pytest.mark.parametrize("regime", ["serial", "padding", "strided"])
def test_what_goes_wrong_in_a_later_draw_is_found(stale_layer, regime):
    """In `rewrite` it would be found in the first, which has two data itself."""
    items = [Item((4,), "")]
    briefly = stale_layer.regime(regime, items, Budget(3, 3, 0.0))["items"][0]
    at_length = stale_layer.regime(regime, items, BUDGET, LaunchAim(3_000, 20, 20.0))["items"][0]
    assert not briefly["bad"] and at_length["bad"]


def test_every_m_is_launched(stale_layer):
    stale_layer.backend = load_one("torch-dequant")
    tactic = FailsLater().tactic
    items = [Item(tuple(range(1, 9)), tactic), Item(tuple(range(9, 17)), tactic)]
    found = stale_layer.regime("every-m", items, AMPLE)
    assert [result["problems"] for result in found["items"]] == [8, 8]
    assert [result["launches"] for result in found["items"]] == [24, 24]


class WrongAtThirteen(FailsLater):
    """Wrong at a single m, which is on no edge of a bucket."""

    def run(self, state, a, out, tactic):
        self.right.run(state, a, out, self.tactic)
        if a.shape[0] == 13:
            out[12] += 1


def test_a_fault_at_a_single_m_is_found(stale_layer):
    stale_layer.backend = WrongAtThirteen()
    found = stale_layer.regime("every-m", [Item(tuple(range(9, 17)), "")], AMPLE)
    assert {bad["m"] for bad in found["items"][0]["bad"]} == {13}


# -- who is launched at length

TWO = MRange(2, 2)
names = st.lists(st.sampled_from("abcdef"), max_size=6, unique=True)


def wanting(also=(), enough=2) -> Wanted:
    """What a probe wants of a layer, as far as it says who is launched at length."""
    aim = LaunchAim(30_000, 300, 1.0)
    return Wanted(aim, (), lambda where: True, frozenset(also), 0.0, 0.0, enough)


@given(names)
def test_where_all_are_to_be_proven_each_gets_all(order):
    wave = _lacking({TWO: order}, {}, wanting(enough=len(order) + 1))
    assert wave == {(name, TWO): 1 for name in order}
    assert not _lacking({TWO: order}, wave, wanting(enough=len(order) + 1))


@given(names, st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef")))
def test_the_first_that_is_right_gets_all_and_the_second_some(order, wrong, also):
    """Whoever turns out wrong on the way makes place, and nobody is launched twice for one aim."""
    done: dict = {}
    for _ in range(20):
        right = [n for n in order if n not in wrong or (n, TWO) not in done]
        wave = _lacking({TWO: right}, done, wanting(also))
        assert all(done.get(key, LESS + 1) > less for key, less in wave.items())
        if not wave:
            break
        done.update(wave)
    left = [n for n in order if n not in wrong]
    for place, name in enumerate(left):
        depth = done.get((name, TWO))
        assert depth == 1 if place == 0 else depth in ((1, LESS) if place == 1 else (None, 1, LESS))
        if name in also:
            assert depth is not None


# -- how long it may take


def long_run(seconds: float, ranges: int = 1) -> _LongRun:
    return _LongRun(None, "serial", (TWO,) * ranges, LaunchAim(30_000, 300, seconds))  # type: ignore[arg-type]


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8), st.floats(0.1, 500.0))
def test_time_that_is_short_is_shared_evenly_and_is_never_exceeded(wanted, left):
    runs = [long_run(seconds) for seconds in wanted]
    later, spent, shares = sum(wanted), 0.0, []
    for each in runs:
        later -= each.seconds
        got = each.share(later, left - spent)
        assert got <= each.seconds + 1e-9
        spent += got
        shares.append(got / each.seconds)
    assert spent <= left + 1e-6 or spent == pytest.approx(min(left, sum(wanted)))
    assert max(shares) == pytest.approx(min(shares), rel=1e-3)


def test_what_one_leaves_goes_to_those_after_it():
    assert long_run(10).share(10.0, 10.0) == 5
    assert long_run(10).share(0.0, 9.0) == 9


# -- every m, in a time


class Plans(FailsLater):
    """Takes the host long at the first call of each m."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()

    def run(self, state, a, out, tactic):
        if a.shape[0] not in self.known:
            self.known.add(a.shape[0])
            time.sleep(0.02)
        self.right.run(state, a, out, self.tactic)


def test_every_m_ends_with_its_time_and_counts_what_was_made(stale_layer):
    stale_layer._otherwise[""] = False  # as its grading would have said
    stale_layer.backend = Plans()
    found = stale_layer.regime("every-m", [Item(tuple(range(1, 41)), "")], Budget(1, 1, 0.03))
    (result,) = found["items"]
    assert 1 <= result["problems"] < 40 and not result["bad"]
    assert found["proof"][0]["sampled"] == result["problems"]


def test_a_slow_kernel_is_no_plan_and_a_plan_is_named(stale_layer, monkeypatch):
    monkeypatch.setattr(every_m, "SAMPLED", 35)
    items = [Item(tuple(range(1, 41)), "")]
    stale_layer._otherwise[""] = False  # as its grading would have said
    stale_layer.backend = Plans()
    planned = stale_layer.regime("every-m", items, AMPLE)["items"][0]
    assert planned["problems"] == 35 and planned["graded"][0]["kind"] == "plan per m"
    stale_layer.backend = Plans()
    monkeypatch.setattr(Plans, "run", slowly)
    slow = stale_layer.regime("every-m", items, AMPLE)["items"][0]
    assert slow["launches"] == 120 and "graded" not in slow


def slowly(self, state, a, out, tactic):
    time.sleep(0.02)
    self.right.run(state, a, out, self.tactic)


@pytest.mark.parametrize(
    "run, said", [(8, "every m from 9 to 16"), (5, "5 of the 8 m from 9 to 16"), (0, "")]
)
def test_the_sentence_says_which_m_were_run(run, said):
    chance = {"launches": 30_000, "problems": 300, "upper": 1e-4, "confidence": 0.95}
    bounds = {"graph": chance, "every-m": {**chance, "ms": run}}
    text = shown(bounds, 9, 16)
    assert (said and said in text) or (not run and "from 9" not in text)


# -- many weights of a large m


@given(st.integers(1, 70_000), st.integers(2, 16))
def test_every_weight_serves_the_smallest_m_and_one_in_four_each(rows, count):
    pools = field_rows(rows, count)
    assert len(pools) == count and pools[0] == rows and max(pools) == rows
    assert min(pools) >= min(rows, 512)
    assert sum(pools) <= 576 * count + 0.47 * rows * (count + 3)


def test_launches_are_of_weights_with_room():
    problem = Problem("nvfp4", 1200, 64, 128, "bf16", "bf16")
    backend = load_one("torch-dequant")
    layer = OpenLayer(backend, Device("cpu"), problem, 3, 1 << 30, lambda text: None)
    items = [Item((300, 1100), FailsLater().tactic)]
    cases = layer._field(24, False, False).cases
    launches = layer.launches(items, cases, "room", per_item=8)
    assert all(x.offset + x.m <= cases[x.case].problem.m for x in launches)
    assert {x.case for x in launches if x.m == 300} == {0, 1}
    assert {x.case for x in launches if x.m == 1100} == {0}
    found = layer.regime("streams", items, BUDGET, LaunchAim(40, 4, 10.0))
    assert not found["items"][0]["bad"] and found["items"][0]["launches"]


@pytest.mark.parametrize(("memory", "drawn"), [(1 << 30, 2), (2 << 20, 4)])
def test_fields_of_small_and_of_large_m_are_kept_as_far_as_they_fit(memory, drawn):
    """They are asked for by turns, regime after regime, and drawing them is what that costs."""
    said = []
    backend = load_one("torch-dequant")
    layer = OpenLayer(backend, Device("cpu"), PROBLEM, 3, memory, said.append)
    for _ in range(2):
        first, second = layer._field(24, True, False), layer._field(24, False, False)
        assert first.redraw and second.redraw
    assert sum(text.startswith("drawing field 1 of") for text in said) == drawn

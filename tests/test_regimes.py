"""Each regime runs every launch under its own conditions, says so, and sees what only they show."""

from __future__ import annotations

import sys
import threading
import time
from itertools import count
from math import inf

import pytest
import rogues
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.item import Item
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.regimes import REGIMES, Budget, NotApplicable
from fp4tune.probes.regimes.concurrent.lanes import ROUNDS, repeat_threads
from fp4tune.probes.worker.session import OpenLayer

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = Problem("nvfp4", 8, 320, 256)
ONCE = Budget(1, 1, 0.0)
OFTEN = Budget(3, 20, 0.1)
ON_CPU = ("serial", "streams")
STRESS = (
    "weights",
    "effects",
    "history",
    "returned",
    "own-quantiser",
    "addresses",
    "callers",
    "first-calls",
    "rewrite",
    "padding",
    "strided",
    "off-bucket",
    "churn",
    "mlp-chain",
)
"""On a CPU as well; tested in test_stress_regimes and test_mlp_chain."""


def cases(backend):
    return [case(backend, PROBLEM, exact(PROBLEM, 24, seed, "cpu")) for seed in (1, 2)]


def launches(*ms: int) -> list[Launch]:
    return [Launch(i % 2, 8 - m, m, "default", i) for i, m in enumerate(ms)]


def run(regime: str, backend, ms=(1, 2, 5, 8), budget=OFTEN):
    return REGIMES[regime](backend, cases(backend), launches(*ms), budget)


@pytest.mark.parametrize("regime", ON_CPU)
def test_a_good_backend_is_clean_and_the_regime_was_exercised(regime):
    outcome = run(regime, rogues.Good(), (0, 1, 2, 5, 8))
    assert outcome.not_exercised is None and not outcome.errors and not outcome.changed_inputs
    assert all(report.clean for _, report in outcome.reports)
    assert {launch.m for launch, _ in outcome.reports} == {0, 1, 2, 5, 8}
    assert outcome.repeats >= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "regime", [name for name in REGIMES if name not in (*ON_CPU, *STRESS, "shared-expert")]
)
def test_what_a_cpu_does_not_have_is_not_applicable(regime):
    with pytest.raises(NotApplicable, match="CPU"):
        run(regime, rogues.Good())


@pytest.mark.parametrize("regime", ON_CPU)
@pytest.mark.parametrize(
    "rogue", [rogues.SkipsTheTail, rogues.OneWrongElement, rogues.DropsABlock, rogues.IgnoresAlpha]
)
def test_a_wrong_answer_is_seen_in_every_launch(regime, rogue):
    outcome = run(regime, rogue(), budget=ONCE)
    assert not any(report.clean for _, report in outcome.reports)
    assert all(report.bad_launches == outcome.repeats for _, report in outcome.reports)


def test_a_race_between_threads_shows_in_lanes_only():
    clean = {
        regime: all(report.clean for _, report in run(regime, rogues.SharedScratch()).reports)
        for regime in ON_CPU
    }
    assert clean == {"serial": True, "streams": False}


def test_lanes_share_one_prepared_weight_and_run_in_threads_of_their_own():
    seen: set[tuple[int, int]] = set()

    class Watches(rogues.Good):
        def run(self, state, a, out, tactic):
            seen.add((threading.get_ident(), id(state)))
            super().run(state, a, out, tactic)

    run("streams", Watches(), budget=ONCE)
    threads, weights = ({x[i] for x in seen} for i in (0, 1))
    assert len(threads) >= 2 and threading.get_ident() not in threads
    assert len(weights) == 2 and len(seen) == len(threads) * len(weights)


KINDS = frozenset({"one m", "many m"})


@pytest.mark.parametrize(("overlaps_in", "rounds"), [(1, 1), (7, 7), (inf, ROUNDS)])
def test_threads_too_quick_to_overlap_are_sent_again_until_they_do(overlaps_in, rounds):
    numbers = count(1)
    _, missed, proof = repeat_threads(
        lambda: KINDS if next(numbers) >= overlaps_in else frozenset(),
        KINDS,
        ONCE,
        torch.device("cpu"),
    )
    assert proof["rounds"] == rounds and proof["overlapped"] == (rounds < ROUNDS)
    assert (missed is None) == (rounds < ROUNDS)


def test_every_lane_is_checked_by_itself():
    outcome = run("streams", rogues.Good(), (2, 4), ONCE)
    assert len(outcome.reports) % 2 == 0 and len(outcome.reports) > 2


@pytest.mark.parametrize("regime", ON_CPU)
def test_what_a_backend_raises_comes_out_and_ends_every_lane(regime):
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no plan for m=2"):
        run(regime, rogues.RaisesAtTwo())
    assert threading.active_count() == before


@pytest.mark.parametrize("regime", ON_CPU)
def test_a_changed_input_is_counted(regime):
    assert run(regime, rogues.ModifiesInput(), budget=ONCE).changed_inputs > 0


def test_a_write_past_the_end_is_seen_though_the_answer_is_right():
    outcome = run("serial", rogues.OutOfBounds(), budget=ONCE)
    for _, report in outcome.reports:
        assert not report.clean and report.wrong == 0 and report.guard == PROBLEM.n


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10), st.sampled_from([0.0, 0.02]))
def test_a_budget_is_kept(least, more, seconds):
    most = least + more
    outcome = run("serial", rogues.Good(), (1, 2), Budget(least, most, seconds))
    assert least <= outcome.repeats <= most
    if seconds == 0:
        assert outcome.repeats == least


def test_time_ends_the_repeats_of_a_slow_backend():
    class Slow(rogues.Good):
        def run(self, state, a, out, tactic):
            time.sleep(0.02)
            super().run(state, a, out, tactic)

    outcome = run("serial", Slow(), (1,), Budget(2, 10_000, 0.2))
    assert 2 <= outcome.repeats <= 40 and outcome.seconds < 5


# -- a layer's steps, as a worker runs them


def layer(backend) -> OpenLayer:
    return OpenLayer(backend, Device("cpu"), PROBLEM, 3, 1 << 28, lambda text: None)


def test_the_same_seed_gives_the_same_launches_and_another_one_others():
    items = [Item((1, 2, 5), "default")]
    found = []
    for seed in (1, 1, 2):
        opened = OpenLayer(rogues.Good(), Device("cpu"), PROBLEM, seed, 1 << 28, lambda text: None)
        found.append(opened.launches(items, opened.cases(24), "tag"))
    assert found[0] == found[1] != found[2]


def test_a_grade_is_a_width_and_not_a_fault():
    for backend, widths in ((rogues.Good(), {24}), (rogues.ShortSums(), {18, 14, 11, 8})):
        (graded,) = layer(backend).grade([Item((2, 8), "default")])
        assert graded["width"] in widths and not graded["bad"]


@pytest.mark.parametrize("rogue", [rogues.SkipsTheTail, rogues.DropsABlock, rogues.OneWrongElement])
def test_what_is_wrong_at_every_width_has_no_grade(rogue):
    (graded,) = layer(rogue()).grade([Item((2, 8), "default")])
    assert graded["width"] is None and graded["bad"]


def test_items_are_judged_apart():
    items = [Item((1,), "default"), Item((2,), "default"), Item((4,), "default")]
    odd, even, more = layer(rogues.OddUnwritten()).grade(items)
    assert odd["width"] is None and odd["bad"][0]["kind"] == "unwritten"
    assert (even["width"], more["width"]) == (24, 24)


def test_one_m_that_raises_does_not_hide_the_others():
    one, two, four = layer(rogues.RaisesAtTwo()).grade([Item((m,), "default") for m in (1, 2, 4)])
    assert "no plan" in two["error"]["message"] and two["width"] is None
    assert (one["width"], four["width"]) == (24, 24)


def test_memory_too_small_for_a_chain_splits_it_and_changes_no_result():
    small = OpenLayer(rogues.Good(), Device("cpu"), PROBLEM, 3, 1, lambda text: None)
    items = [Item((1, 2, 8), "default")]
    for opened in (small, layer(rogues.Good())):
        (graded,) = opened.grade(items)
        assert graded["width"] == 24 and graded["launches"] >= 3
        assert not opened.regime("serial", items, ONCE)["items"][0]["bad"]


def test_the_switch_interval_is_left_as_it_was():
    before = sys.getswitchinterval()
    run("streams", rogues.Good(), budget=ONCE)
    assert sys.getswitchinterval() == before

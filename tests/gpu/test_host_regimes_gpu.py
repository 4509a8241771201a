"""What launches share, and what a backend keeps, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fp4tune.probes import registry
from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.outcome import CYCLES, Budget
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.regimes.stamps import Holder, LaneStamps
from fp4tune.probes.zoo import callers, effects, history, splitk, weights
from fp4tune.probes.zoo.floor import Right

pytestmark = pytest.mark.gpu

PROBLEM = Problem("nvfp4", 192, 512, 1024)
BUDGET = Budget(3, 20, 0.1)
MINE = ("weights", "history", "effects", "callers", "first-calls", "addresses")
LANES = ("streams", "graph-streams", "threads")


def run(regime: str, backend: Any, ms=(0, 1, 16, 33), budget=BUDGET):
    device = torch.device("cuda", 0)
    drawn = [case(backend, PROBLEM, exact(PROBLEM, 24, seed, device)) for seed in (1, 2)]
    launches = [Launch(i % 2, 3, m, "default", i) for i, m in enumerate(ms)]
    return REGIMES[regime](backend, drawn, launches, budget)


def caught(outcome) -> bool:
    return bool(outcome.errors) or not all(report.clean for _, report in outcome.reports)


@pytest.mark.parametrize("regime", [*MINE, *LANES])
def test_the_right_one_passes_and_the_regime_was_exercised(regime):
    outcome = run(regime, Right("right"))
    assert outcome.not_exercised is None and not caught(outcome), outcome.errors


@pytest.mark.parametrize("regime", ["history", "first-calls"])
def test_what_takes_seconds_is_done_from_standard_on(regime):
    outcome = run(regime, registry.load_one("zoo-random-order"), budget=replace(BUDGET, long=True))
    assert outcome.not_exercised is None and not caught(outcome), outcome.errors
    if regime == "history":
        assert outcome.proof["pause_seconds"] > 2 and outcome.proof["calls"] > 1 << 16
    else:
        assert outcome.proof["own_processes"] == 1


@pytest.mark.parametrize("regime", LANES)
def test_lanes_of_one_m_overlap_and_meet_in_what_is_kept_by_m(regime):
    outcome = run(regime, splitk.WorkspaceByM("x"), (16,))
    assert caught(outcome) and outcome.not_exercised is None
    if regime != "threads":
        assert outcome.proof["one m"]["overlapped"]


def test_a_holder_is_resident_beside_what_is_launched_meanwhile():
    device = torch.device("cuda", 0)
    holder, stamps = Holder(device), LaneStamps(2, device)
    side = torch.cuda.Stream(device)
    for number in range(8):
        # Closed until all is queued: a holder ends before a slow host has enqueued what meets it.
        torch.cuda._sleep(CYCLES // 100)
        fork = torch.cuda.current_stream().record_event()
        side.wait_event(fork)
        with torch.cuda.stream(side):
            stamps.take(0, 0)
            holder.hold(number)
            stamps.take(0, 1)
        holder.let_begin()
        stamps.take(1, 0)
        stamps.take(1, 1)
        torch.cuda.current_stream().wait_stream(side)
        stamps.count()
    assert stamps.proof()["overlapped"] >= 4


@pytest.mark.parametrize(
    ("regime", "backend"),
    [
        ("weights", weights.AnswersByActivation("x")),
        ("weights", weights.DecodedInSlots("x", 16)),
        ("weights", weights.UpdatesElsewhere("x")),
        ("history", history.CounterWraps("x", 10)),
        ("effects", effects.LeavesItsStream("x")),
        ("effects", effects.SeedsTheGpu("x")),
        ("callers", callers.ReadyInOneThread("x")),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_each_regime_catches_its_own(regime, backend):
    assert caught(run(regime, backend, (1, 16)))


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("name", ["zoo-scratch-overrun", "zoo-scratch-underrun"])
def test_canaries_catch_sixteen_bytes_every_time(name, turn):
    outcome = run("scratch", registry.load_one(name), (1, 16))
    assert outcome.errors[0]["kind"] == "out of bounds", outcome.errors
    assert "the nearest 0 bytes" in outcome.errors[0]["message"]


def test_canaries_pass_what_ends_where_it_should():
    outcome = run("scratch", registry.load_one("zoo-scratch-filled"), (1, 16))
    assert not caught(outcome) and outcome.proof["blocks"], outcome.errors

"""A time budget goes to the fastest first, and what it leaves out is never called safe."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune import request as planning
from fp4tune.autotune.budget import (
    ENOUGH,
    OVER,
    SLOWER,
    TimeBudget,
    best_of_all,
    next_wave,
    order,
)
from fp4tune.autotune.evidence.wording import shown
from fp4tune.autotune.layer import ProbedLayer
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.plan import Plan
from fp4tune.autotune.probe import probe
from fp4tune.autotune.publication.publish import publish
from fp4tune.autotune.verdict.buckets import MRange
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache import reader
from fp4tune.cache.ledger import Ledger
from fp4tune.engines.names import named
from fp4tune.machine import devices
from fp4tune.machine.device import Device
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import REGIMES

HERE = Path(__file__).parent
BACKENDS = ("Good", "RoundsAlpha", "ShortSums")
LEVEL = replace(
    LEVELS["quick"], without=tuple(name for name in REGIMES if name not in ("serial", "streams"))
)
RANGES = tuple(MRange(m, m) for m in range(4))
names = st.lists(st.sampled_from("abcdef"), max_size=6, unique=True)


# -- who comes next


@given(st.fixed_dictionaries({m: names for m in RANGES}), st.sets(st.sampled_from("abcdef")))
def test_waves_end_with_two_proven_or_with_nobody_left(orders, good):
    """And nobody is tried who is slower than two that are proven."""
    tried: dict[MRange, list[str]] = {m: [] for m in RANGES}
    waves = 0
    while wave := next_wave(orders, tried, lambda name, m: name in good):
        waves += 1
        for name, ranges in wave.items():
            for m in ranges:
                assert name not in tried[m]
                tried[m].append(name)
    assert waves <= 6
    for m, names_ in orders.items():
        done = tried[m]
        assert sorted(done) == sorted(names_[: len(done)])
        proven = [name for name in done if name in good]
        assert len(proven) == ENOUGH or (len(proven) < ENOUGH and len(done) == len(names_))
        # The slowest one tried was needed.
        assert len([name for name in names_[: len(done) - 1] if name in good]) < ENOUGH


def test_the_order_is_that_of_time_then_of_names_and_untimed_ones_are_last():
    two = MRange(2, 2)
    times = {"c": {two: 1.0}, "a": {two: 2.0}, "b": {two: 1.0}, "0": {}}
    assert order(times, two) == ["b", "c", "a", "0"]
    assert order(times, MRange(0, 0)) == order(times, two)


# -- time


def test_an_allowance_is_counted_from_the_start_of_the_probe():
    begun = time.monotonic() - 5
    assert 4 < TimeBudget(10, begun).left < 6
    over = TimeBudget(3, begun)
    assert over.over and over.left == 0


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_budget_that_is_none_is_refused_in_one_sentence(seconds, tmp_path):
    call = ["probe", "--gpu", "none", "--budget", str(seconds), "--state", str(tmp_path)]
    done = CliRunner().invoke(cli.app, call)
    assert done.exit_code == 2 and "--budget" in done.output and "Traceback" not in done.output


def test_a_budget_that_is_over_before_anything_was_proven_says_so(tmp_path):
    call = ["probe", "--gpu", "none", "--shape", "64,64", "--max-m", "1", "--activation", "bf16"]
    call += ["--backend", "torch-dequant", "--budget", "0.001", "--state", str(tmp_path)]
    done = CliRunner().invoke(cli.app, call)
    assert done.exit_code == 2 and "0.001 s of --budget were over" in done.stderr
    assert "Traceback" not in done.stderr


# -- whole probes


def make_plan(budget: float, *shapes: str) -> Plan:
    layers = planning.layers((), None, shapes or ["64,128"], 1, "cpu")
    return Plan(
        target=devices.cpu(),
        backends=planning.backends([f"{HERE / 'rogues.py'}:{name}" for name in BACKENDS]),
        problems=planning.problems(layers, ["nvfp4"], ["bf16"], "bf16", 1),
        level=LEVEL,
        profile=PROFILES["strict"],
        seed=3,
        argv=("probe",),
        budget=budget,
    )


def run(plan: Plan, place: Path):
    with Ledger.open(place) as ledger:
        report = probe(plan, ledger, place, lambda who, text: None)
    publish([report], place)
    return report


@pytest.fixture(scope="module")
def ample(tmp_path_factory):
    """A budget that does not end: what it saves is all that is slower than two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        place = tmp_path_factory.mktemp("ample") / "state"
        yield run(make_plan(600.0), place), place


def test_two_are_proven_in_each_range_and_the_rest_is_not_tried(ample):
    report, _ = ample
    assert not report.left
    for m in (0, 1):
        mine = [c for c in report.candidates if c.bucket.m_hi == m]
        safe = [c for c in mine if c.verdict == "safe"]
        others = [c for c in mine if c.verdict != "safe"]
        assert len(mine) == len(BACKENDS) and len(safe) == ENOUGH
        assert {c.verdict for c in others} == {"inconclusive"}
        assert {c.reasons for c in others} == {(f"not tried: {SLOWER}",)}


def test_those_proven_are_the_fastest(ample):
    report, _ = ample
    mine = [c for c in report.candidates if c.bucket.m_hi == 1]
    slowest = max(c.median_us for c in mine if c.verdict == "safe")
    assert all(c.median_us >= slowest for c in mine if c.verdict != "safe")


def test_the_ledger_says_so_and_the_reader_answers_with_what_is_proven(ample):
    report, place = ample
    with Ledger.open(place, readonly=True) as ledger:
        rows = [row for row in ledger.evidence() if row.regime == "not tried"]
        assert {row.status for row in rows} == {"skipped"}
        assert len(rows) == 2 * (len(BACKENDS) - ENOUGH)
    answer = reader.open(place).choose(1, 64, 128)
    assert answer.status == "safe"
    assert answer.backend in {c.backend for c in report.candidates if c.verdict == "safe"}


def test_a_probe_without_a_budget_tries_what_was_left(ample, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, place = ample
    report = run(replace(make_plan(1.0), budget=None), place)
    assert not [(c.backend, c.bucket, c.reasons) for c in report.candidates if c.verdict != "safe"]


def test_what_the_budget_does_not_reach_is_named_and_takes_nothing_away(ample, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before, place = ample
    short = make_plan(0.01, "64,128", "128,64")
    report = run(replace(short, backends=short.backends[:1], again=True), place)
    assert [(row["n"], row["k"]) for row in report.left] == [(64, 128), (128, 64)]
    assert report.left[0]["m"] == [[0, 0], [1, 1]]
    assert not report.candidates and not report.choices
    assert json.loads(json.dumps(report.left)) == report.left
    answer = reader.open(place).choose(1, 64, 128)
    assert answer.status == "safe"
    assert answer.backend in {c.backend for c in before.candidates}


def test_the_reason_is_a_sentence_about_the_budget():
    assert "budget" in OVER and "proven" in SLOWER


@pytest.mark.slow
def test_on_a_cpu_a_level_is_a_time_and_what_it_reached_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = make_plan(600.0)
    brief = replace(one, backends=one.backends[:1], budget=None)
    timed = replace(brief, level=replace(LEVEL, on_cpu=8.0))
    report = run(timed, tmp_path)
    (choice,) = [c for c in report.choices if c.bucket.m_hi == 1]
    found = choice.bounds["streams"]
    with Ledger.open(tmp_path, readonly=True) as ledger:
        mine = [row for row in ledger.evidence() if row.regime == "streams"]
    briefly, at_length = [r for r in mine if r.bucket == choice.bucket and r.launches]
    assert found["launches"] >= briefly.launches + at_length.launches
    assert at_length.problems > 1
    assert choice.bounds["every-m"]["ms"] == 1
    assert f"{found['launches']:,} launches" in shown(choice.bounds, 1, 1)


def test_what_was_asked_for_is_not_exceeded_for_the_sake_of_a_level():
    level = replace(LEVEL, on_cpu=20.0)
    asked = replace(make_plan(5.0), level=level)
    assert asked.least_seconds == 0 and replace(asked, budget=None).least_seconds == 5
    assert replace(asked, budget=None, rate=1e-3).least_seconds == 0
    assert replace(asked, rate=1e-3, max_seconds=7.0).seconds_of_aim == 7


TWO = [MRange(1, 1), MRange(2, 2)]


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.floats(0.1, 1e4), min_size=0, max_size=2))
)
def test_the_best_of_all_has_every_range_and_nobody_is_less_slow(found):
    times = {name: dict(zip(TWO, mine, strict=False)) for name, mine in found.items()}
    best = best_of_all(times, TWO)
    whole = {name: mine for name, mine in times.items() if len(mine) == len(TWO)}
    assert (best is None) == (not whole)
    if best is not None:
        assert best in whole
        products = {name: mine[TWO[0]] * mine[TWO[1]] for name, mine in whole.items()}
        assert products[best] <= min(products.values()) * (1 + 1e-9)


def test_what_an_engine_cannot_run_proves_nothing_before_what_it_can():
    target = devices.Target(Device("cuda", 90, 0), "NVIDIA H200", "GPU-1")
    layer = ProbedLayer(
        target, Problem("nvfp4", 16, 128, 256), (MRange(1, 16),), LEVEL, 1, 1 << 20, 1 << 20
    )
    order = ["triton-w4a16", "marlin", "torch-dequant", "humming"]
    assert layer.named_first(order) == order
    for engine in ("sglang", "vllm"):
        told = replace(layer, engine=engine).named_first(order)
        can = [name for name in order if named(engine, name, "nvfp4", 90)]
        assert can and told[: len(can)] == can
        assert sorted(told) == sorted(order)

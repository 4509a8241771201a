"""A probe that was killed goes on after its last step, however often and wherever it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from levels import brief, launches_only, program
from test_known import BACKEND, SHAPES, make_plan, run

from fp4tune.autotune import steps
from fp4tune.autotune.evidence import earlier_failures
from fp4tune.autotune.plan import Plan
from fp4tune.autotune.probe import probe
from fp4tune.autotune.verdict.buckets import MRange
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey, FinishedStep
from fp4tune.words import CHANCE, EXACT


class Stopped(Exception):
    """Stands for whatever ends a probe before its time."""


def stopped_at(plan: Plan, place, call: int, says: str = "") -> bool:
    """Run `plan` until it says for the `call`-th time what it does with a layer, and that in these
    words; whether it came to its end before that."""
    calls = [0]

    def progress(who: str, text: str) -> None:
        if who.startswith("layer ") and says in text:
            calls[0] += 1
            if calls[0] == call:
                raise Stopped

    with Ledger.open(place) as ledger:
        try:
            probe(plan, ledger, place, progress)
        except Stopped:
            return False
    return True


def finished(place) -> Counter[tuple]:
    """Every step that is finished, by backend, shape and item, and how often it was made."""
    with Ledger.open(place, readonly=True) as ledger:
        assert not ledger.damage().sentences
        rows = [row for row in ledger.steps() if row.what != steps.BEGUN]
    return Counter(
        (row.backend, row.bucket.n, row.what, row.detail["launches"], *item)
        for row in rows
        for item in map(tuple, row.detail["items"])
    )


def evidence(place) -> Counter[tuple]:
    """Rows of evidence by what they are of, but for those of controls."""
    with Ledger.open(place, readonly=True) as ledger:
        rows = [row for row in ledger.evidence() if row.backend != "controls"]
    return Counter((row.where, row.regime, row.data) for row in rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("backends")
    named = []
    for name in ("right", "wrong"):
        file = place / f"{name}.py"
        file.write_text(textwrap.dedent(BACKEND.format(name=name, wrong=name == "wrong")))
        named.append(f"{file}:It")
    return named


@pytest.mark.slow
def test_a_probe_goes_on_after_its_last_step_wherever_it_is_stopped(files, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = make_plan(SHAPES[:1], files, level=launches_only())
    whole = run(plan, tmp_path / "whole")
    place = tmp_path / "stopped"
    before: Counter[tuple] = Counter()
    stops = 0
    for call in (2, 4, 3, 6):
        done = stopped_at(plan, place, call)
        now = finished(place)
        assert not done and before <= now, "what was finished is finished"
        stops += now > before
        assert set(now.values()) <= {1}, "nothing that is finished is done again"
        before = now
    assert stops >= 3
    report = run(plan, place)
    assert set(finished(place).values()) == {1}
    assert evidence(place) == evidence(tmp_path / "whole")
    assert finished(place) == finished(tmp_path / "whole")
    told = [
        sorted((c.backend, c.tactic, c.bucket.m_lo, c.verdict, c.launches > 0) for c in each)
        for each in (whole.candidates, report.candidates)
    ]
    assert told[0] == told[1]
    assert {f.backend for f in report.findings} == {"wrong"}
    (row,) = report.known
    assert {part["backend"] for part in row["resumed"]} == {"right", "wrong"}
    again = run(plan, place)  # what four runs made together is known like any other
    assert again.known[0]["measured"] == [] and finished(place) == before | finished(place)
    assert {(c.backend, c.verdict) for c in again.candidates} == {
        (c.backend, c.verdict) for c in report.candidates
    }


@pytest.mark.slow
def test_what_was_launched_at_length_is_not_launched_again(files, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    level = launches_only()
    plan = make_plan(SHAPES[:1], files[:1], level=level, rate=0.02, max_seconds=60.0)
    before: Counter[tuple] = Counter()
    for says in ("serial at length", "churn at length", "every m"):
        assert not stopped_at(plan, tmp_path, 1, says)
        now = finished(tmp_path)
        assert before < now and set(now.values()) == {1}
        before = now
    assert any(what.startswith("at length ") for _, _, what, *_ in before)
    report = run(plan, tmp_path)
    assert set(finished(tmp_path).values()) == {1}
    assert {c.verdict for c in report.candidates if c.bucket.m_hi} == {"safe"}


@pytest.mark.slow
def test_another_question_does_not_go_on(files, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = make_plan(SHAPES[:1], files[:1], level=brief())
    assert not stopped_at(plan, tmp_path, 3)
    with Ledger.open(tmp_path) as ledger:
        assert ledger.steps()
    other = make_plan(SHAPES[:1], files[:1], level=brief(), seed=6, seed_given=True)
    assert not stopped_at(other, tmp_path, 3)
    assert max(finished(tmp_path).values()) == 2


def test_a_failure_before_the_kill_counts_though_nothing_else_does(files, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = make_plan(SHAPES[:1], files[1:], level=brief())
    assert not stopped_at(plan, tmp_path, 2)
    other = make_plan(SHAPES[:1], files[1:], seed=6, seed_given=True)
    with Ledger.open(tmp_path) as ledger:
        prints = {row.backend: row.fingerprint for row in ledger.steps()}
        found = earlier_failures.earlier(other, ledger, prints, "new")
        assert {where.backend for where in found} == {"wrong"}
        assert not earlier_failures.earlier(make_plan(again=True), ledger, prints, "new")


# -- by rows alone

RANGES = (MRange(0, 0), MRange(1, 1))
NAMES = (steps.GRADED, steps.family("realistic"), steps.regime("streams"), steps.TACTICS)
BUCKET = BucketKey("nvfp4", "bf16", "bf16", 1, 0, 1, 128, 256)


def row(number: int, what: str, items, run: str = "r", **more) -> FinishedStep:
    detail = {"items": steps.listed(items), "dead": {}, "faulty": [], "exempt": [], "launches": 0}
    if what == steps.BEGUN:
        detail = {"at": 1.0 + number, "seed": number}
    return FinishedStep(run, "f" * 64, "x", BUCKET, what, {**detail, **more}, id=number)


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(RANGES)), max_size=12))
def test_nothing_that_is_finished_is_left(made):
    rows = [row(0, steps.BEGUN, ())]
    rows += [row(i, what, [(m, "t")], launches=i) for i, (what, m) in enumerate(made, 1)]
    found = steps.started(rows)
    if not made:
        assert found is None
        return
    graded = {(what, m, "t") for what, m in made if what != steps.TACTICS}
    assert found.done == graded and found.steps == len(made)
    last = [(what, m) for what, m in made if not what.startswith("regime ")]
    compared = bool(last) and last[-1][0] == steps.TACTICS
    assert (found.winner is not None) == (
        compared and (steps.GRADED, last[-1][1], "t") in found.done
    )


def test_what_two_runs_finished_is_one():
    rows = [
        row(0, steps.BEGUN, (), run="a"),
        row(1, steps.GRADED, [(RANGES[0], "t")], run="a", dead={"streams": "hang"}),
        row(2, steps.BEGUN, (), run="b"),
        row(3, steps.GRADED, [(RANGES[1], "t")], run="b", faulty=[[1, 1, "t"]]),
        row(4, steps.TACTICS, [(RANGES[1], "t")], run="b"),
        row(5, steps.TIMING, [(RANGES[1], "t")], run="b"),
    ]
    found = steps.started(rows)
    assert found.runs == ("a", "b") and found.at == 1.0 and found.seeds == {0, 2}
    assert found.dead == {"streams": "hang"} and found.faulty == {(RANGES[1], "t")}
    assert found.winner == {RANGES[1]: "t"} and found.timed is rows[-1]


# -- for real, by signal

PROBE = ("--gpu", "none", "--max-m", "1", "--level", "quick", "--profile", "strict")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_probe_killed_at_any_step_loses_none_and_makes_none_twice(files, tmp_path):
    place = tmp_path / "state"
    command = [sys.executable, "-c", program("hurried"), "probe", *PROBE, "--activation", "bf16"]
    command += ["--shape", "{},{}".format(*SHAPES[0])]
    for file in files:
        command += ["--backend", file]
    command += ["--state", str(place), "--json"]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }

    def count() -> int:
        try:
            with closing(sqlite3.connect(f"file:{place}/ledger.db?mode=ro", uri=True)) as conn:
                sql = "SELECT count(*) FROM step WHERE what != 'begun'"
                return conn.execute(sql).fetchone()[0]
        except sqlite3.Error:
            return 0

    rng = random.Random(3)
    before: Counter[tuple] = Counter()
    quiet = subprocess.DEVNULL
    for _ in range(6):
        wanted = count() + rng.randrange(1, 9)
        probing = subprocess.Popen(command, env=environ, stdout=quiet, stderr=quiet)
        while probing.poll() is None and count() < wanted:
            time.sleep(0.001)
        if probing.poll() is not None:
            break
        probing.send_signal(signal.SIGKILL)
        probing.wait()
        now = finished(place)
        assert before < now, "each run comes further, however soon it is killed"
        assert set(now.values()) == {1}
        before = now
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert set(finished(place).values()) == {1} and before <= finished(place)
    # What is graded is a row of `serial`, and the regime of that name another; what waits for
    # chance is launched briefly, as often as what is second, and as often as what is first.
    twice = {key: times for key, times in evidence(place).items() if times > 1}
    assert {(regime, data) for _, regime, data in twice} <= {
        (r, EXACT) for r in ("serial", *CHANCE)
    }
    assert set(twice.values()) <= {2, 3}
    verdicts = {(c["backend"], c["verdict"]) for c in report["candidates"] if c["bucket"]["m_hi"]}
    assert verdicts == {("right", "safe"), ("wrong", "unsafe")}

"""What is known is not measured again; what changed, or was left open, is."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from dataclasses import asdict, fields, replace
from threading import Lock
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from levels import brief, program

from fp4tune.autotune.agreement import Agreement
from fp4tune.autotune.budget import SLOWER
from fp4tune.autotune.evidence import earlier_failures as failures
from fp4tune.autotune.evidence.recorder import Recorder, Tally
from fp4tune.autotune.evidence.wording import known_sentence
from fp4tune.autotune.history import History, covers
from fp4tune.autotune.layer import Entrant, ProbedLayer
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.plan import Plan, Report
from fp4tune.autotune.probe import probe
from fp4tune.autotune.probed import Done, probed
from fp4tune.autotune.publication.publish import publish
from fp4tune.autotune.verdict.buckets import ranges
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache import quarantine, quarantine_store
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Audit, Environment, Under
from fp4tune.machine import devices
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.words import AUDIT, NOT_TRIED

QUICK = LEVELS["quick"]
SHAPES = ((128, 256), (192, 256))
PRINT = "a" * 64


def make_plan(shapes=SHAPES, backends=("x",), **other) -> Plan:
    values = {
        "target": devices.cpu(),
        "backends": tuple(backends),
        "problems": tuple(Problem("nvfp4", 1, n, k) for n, k in shapes),
        "level": QUICK,
        "profile": PROFILES["strict"],
        "seed": 5,
        "argv": ("probe",),
        **other,
    }
    return Plan(**values)


# -- what may be used again, by rows alone


class Store:
    """A ledger in which `names` were measured on the first shape, all regimes with `status`."""

    def __init__(self, place, names=("x",), plan=None, status="passed", doubts=(), dead=None):
        self.place = place
        self.plan = plan or make_plan()
        (self.problem, *_) = self.plan.problems
        m_ranges = ranges(self.problem.m)
        layer = ProbedLayer(
            self.plan.target, self.problem, tuple(m_ranges), self.plan.level, 1, 1, 1
        )
        entrants = []
        with Ledger.open(place) as ledger:
            self.run = ledger.start_run(
                seed=1, level="quick", profile="strict", device=self.plan.device
            )
            record = Recorder(ledger, self.run, 1)
            for name in names:
                ledger.add_environment(Environment(PRINT, name, "cpu", {}))
                record.knows(name, PRINT)
                entrant = Entrant(SimpleNamespace(name=name), {}, False, dict(dead or {}))
                for m in m_ranges:
                    entrant.tactics[m], entrant.winner[m] = ["default", "other"], "default"
                    for regime in (r for r in REGIMES if r not in self.plan.level.without):
                        mine = status if regime == "streams" else "passed"
                        where = layer.where(entrant, m, "default")
                        record.status(where, Under(regime), mine, {}, Tally(3, 2, 24))
                    record.timing(where, [1.0, 2.0, 3.0], None, {})
                entrants.append(entrant)
            row = probed(self.plan, layer, entrants, record, Done(time.time(), doubts))
            ledger.add_probed(row)
            ledger.finish_run(self.run)

    def known(self):
        """How each backend was measured, as the row that says so has it."""
        with Ledger.open(self.place) as ledger:
            (row,) = ledger.probed()
        return row.detail["entrants"]

    def recall(self, plan=None, names=("x",), prints=PRINT, begins=False, agreement=None):
        plan = plan or self.plan
        with Ledger.open(self.place) as ledger:
            memory = History(plan, ledger, self.place)
            named = {name: prints for name in names}
            found = memory.recall(
                {self.problem: list(names)}, named, {self.problem: begins}, agreement
            )
        return found[self.problem]


def test_what_was_measured_is_known_with_its_times_and_its_launches_once(tmp_path):
    found = Store(tmp_path).recall()
    assert set(found.entries) == {"x"} and found.times is not None
    assert len({row.id for row in found.evidence["x"]}) == len(found.evidence["x"]) > 0
    assert {row.median_us for row in found.timings} == {2.0}


@pytest.mark.parametrize(
    "other",
    [
        {"again": True},
        {"seed": 6, "seed_given": True},
        {"hang_seconds": 3.0},
        {"level": LEVELS["standard"]},
        {"level": replace(QUICK, without=())},
        {"target": replace(devices.cpu(), uuid="GPU-another")},
        {"problems": (Problem("nvfp4", 64, *SHAPES[0]),)},
        {"rate": 1e-6},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_question_is_measured(tmp_path, other):
    store = Store(tmp_path)
    store.problem = other.get("problems", (store.problem,))[0]
    assert not store.recall(replace(store.plan, **other)).entries


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 6},
        {"seed_given": True},
        {"profile": PROFILES["sglang"]},
        {"level": replace(QUICK, most=2, least=1, samples=2)},
        {"rate": 0.999},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_answers_the_question_too_is_used(tmp_path, other):
    store = Store(tmp_path)
    assert store.recall(replace(store.plan, **other)).times is not None


def test_another_environment_or_other_code_of_ours_is_measured(tmp_path, monkeypatch):
    store = Store(tmp_path)
    assert not store.recall(prints="b" * 64).entries
    monkeypatch.setattr("fp4tune.autotune.history.method_of", lambda name: "another")
    assert not store.recall().entries


@pytest.mark.parametrize("status", ["skipped", "not exercised"])
def test_what_was_left_open_is_tried_again(tmp_path, status):
    assert not Store(tmp_path, status=status).recall().entries


def test_what_a_budget_left_out_is_tried_where_there_is_none_or_the_faster_changed(tmp_path):
    store = Store(tmp_path, names=("x", "slow"))
    with Ledger.open(tmp_path) as ledger:
        rows = ledger.evidence(run=store.run, backend="slow")
        for row in [row for row in rows if row.regime == "serial"]:
            note = {"note": f"{NOT_TRIED}: {SLOWER}"}
            left = replace(row, regime=NOT_TRIED, status="skipped", detail=note, id=None, at=None)
            ledger.add_evidence(left)
    hurried = replace(store.plan, budget=60.0)
    assert set(store.recall(names=("x", "slow")).entries) == {"x"}
    assert store.recall(hurried, names=("x", "slow")).times is not None
    beside = store.recall(hurried, names=("x", "slow", "new"))
    assert set(beside.entries) == {"x"} and beside.times is None


def test_what_failed_is_known_and_so_is_what_took_its_worker_down(tmp_path):
    failed = Store(tmp_path / "a", status="failed").recall()
    assert "failed" in {row.status for row in failed.evidence["x"]}
    died = Store(tmp_path / "b", status="skipped", dead={"streams": "hang"})
    assert died.recall().entries["x"]["dead"] == {"streams": "hang"}


def test_what_was_measured_while_controls_were_in_doubt_is_measured_again(tmp_path):
    assert not Store(tmp_path, doubts=["streams"]).recall().entries


def test_a_chain_that_was_left_to_another_layer_is_run_where_that_is_not_probed(tmp_path):
    level = replace(QUICK, without=tuple(r for r in QUICK.without if r != "mlp-chain"))
    store = Store(tmp_path, plan=make_plan(level=level))
    with Ledger.open(tmp_path) as ledger:
        (row,) = ledger.probed()
        detail = json.loads(json.dumps(dict(row.detail)))
        detail["entrants"]["x"]["begins_mlp"] = False
        ledger.add_probed(replace(row, detail=detail, id=None, at=None))
    assert store.recall(begins=False).times is not None
    assert store.recall(begins=True).times.id == row.id


def test_times_hold_only_where_all_who_take_part_were_timed_together(tmp_path):
    store = Store(tmp_path, names=("x", "y"))
    assert store.recall(names=("x",)).times is not None
    both = store.recall(names=("x", "y", "z"))
    assert set(both.entries) == {"x", "y"} and both.times is None and not both.timings
    Store(tmp_path, names=("z",))
    each = store.recall(names=("x", "y", "z"))
    assert set(each.entries) == {"x", "y", "z"} and each.times is None


def test_the_last_measurement_counts(tmp_path):
    Store(tmp_path, status="failed")
    both = Store(tmp_path, names=("x", "y"))
    assert {row.run for row in both.recall().evidence["x"]} == {both.run}
    alone = Store(tmp_path, status="failed")
    found = both.recall(names=("x", "y"))
    runs = {name: {row.run for row in found.evidence[name]} for name in ("x", "y")}
    assert runs == {"x": {alone.run}, "y": {both.run}} and found.times is None


def earlier_failures(place, plan, print_=PRINT, run="new"):
    with Ledger.open(place) as ledger:
        return failures.earlier(plan, ledger, {"x": print_}, run)


def test_a_failure_outlives_our_own_code_unless_that_is_revoked(tmp_path, monkeypatch):
    store = Store(tmp_path, status="failed")
    other = make_plan(seed=6, seed_given=True)
    found = earlier_failures(tmp_path, other)
    for module in ("history", "probed"):
        monkeypatch.setattr(f"fp4tune.autotune.{module}.method_of", lambda name: "another")
    assert found and earlier_failures(tmp_path, other) == found
    used = store.known()["x"]["method"]
    monkeypatch.setattr(failures, "REVOKED", {used: "its reference was wrong"})
    assert not earlier_failures(tmp_path, other)


def test_a_failure_counts_until_all_is_measured_again(tmp_path):
    first = Store(tmp_path, status="failed")
    other = make_plan(seed=6, seed_given=True)
    found = earlier_failures(tmp_path, other)
    assert {(key.backend, key.tactic) for key in found} == {("x", "default")}
    assert {row.regime for rows in found.values() for row in rows} == {"streams"}
    assert failures.reasons([r for rows in found.values() for r in rows]) == (
        f"failed in run {first.run}",
    )
    assert not earlier_failures(tmp_path, other, "b" * 64)  # another environment
    assert not earlier_failures(tmp_path, make_plan(target=replace(devices.cpu(), name="other")))
    Store(tmp_path, plan=other)  # clean, by chance
    assert earlier_failures(tmp_path, other) == found
    assert not earlier_failures(tmp_path, make_plan(again=True))
    Store(tmp_path, plan=make_plan(again=True))
    assert not earlier_failures(tmp_path, other)


def test_a_failure_seen_while_a_control_was_in_doubt_does_not_count(tmp_path):
    Store(tmp_path, status="failed", doubts=["streams"])
    assert not earlier_failures(tmp_path, make_plan(seed=6, seed_given=True))


def test_a_fault_reported_since_has_it_measured_again_and_one_before_does_not(tmp_path):
    store = Store(tmp_path)
    spool = quarantine_store.place(tmp_path)
    entry = quarantine.make(
        "x", quarantine.Reach(1, *SHAPES[0], "layer"), reason="NaN", by="report"
    )
    quarantine_store.write(entry, spool)
    assert not store.recall().entries
    assert Store(tmp_path).recall().entries  # measured after it


def test_a_tactic_that_the_other_gpus_do_not_use_is_measured_again(tmp_path):
    store = Store(tmp_path)
    agreement = Agreement(Lock())
    theirs = {m: "other" for m in ranges(store.problem.m)}
    scope = (store.plan.target.name, store.problem, "x")
    agreement.settle(scope, theirs, {m: ["other"] for m in theirs})
    assert store.recall(agreement=Agreement(Lock())).entries
    assert not store.recall(agreement=agreement).entries


@given(st.data())
def test_a_level_covers_another_only_if_it_is_nowhere_less(data):
    regimes = st.lists(st.sampled_from(sorted(REGIMES)), unique=True).map(tuple)

    def level():
        numbers = {
            f.name: data.draw(st.integers(1, 3))
            for f in fields(QUICK)
            if isinstance(getattr(QUICK, f.name), (int, float))
        }
        return replace(QUICK, without=data.draw(regimes), **numbers)

    had, wanted = level(), level()
    stored = json.loads(json.dumps(asdict(had)))
    less = set(had.without) - set(wanted.without) or any(
        getattr(had, f.name) < getattr(wanted, f.name)
        for f in fields(QUICK)
        if isinstance(getattr(QUICK, f.name), (int, float))
    )
    assert covers(stored, wanted) == (not less)
    assert covers(json.loads(json.dumps(asdict(wanted))), wanted)


def test_what_an_audit_said_comes_back_once_and_only_if_it_says_so_again(tmp_path):
    store = Store(tmp_path)
    flagged = Audit("c", "mod.so", "/mod.so", 90, "flagged", "sass", "yes", evidence=("no wait",))
    counts = []
    for _ in range(2):
        with Ledger.open(tmp_path) as ledger:
            record = Recorder(ledger, store.run, 1)
            record.knows("x", PRINT)
            rows = ledger.evidence(run=store.run)
            record.recall(rows, ledger.findings(run=store.run), ())
            assert not record.findings
            assert all(f.regime != AUDIT for f in record.exact)
            record.audited("x", flagged)
            assert {f.kind for f in record.findings} == {"flagged"}
            counts.append((len(ledger.findings()), len(ledger.evidence())))
    assert counts[0] == counts[1]


# -- for real, in worker processes

BACKEND = """
from fp4tune.probes.zoo.floor import Right

class It(Right):
    def __init__(self):
        super().__init__({name!r})

    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        if {wrong} and a.shape[0]:
            out[0, 3] += 1000
"""


def run(plan: Plan, place) -> Report:
    with Ledger.open(place) as ledger:
        report = probe(plan, ledger, place, lambda who, text: None)
    publish([report], place)
    return report


def rows_of(place, run: str) -> set[tuple[str, int]]:
    """(backend, n) of the evidence that a run itself wrote, its controls' among it."""
    with Ledger.open(place, readonly=True) as ledger:
        return {(row.backend, row.bucket.n) for row in ledger.evidence(run=run)}


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """The same probe twice, and once more when one of its backends is another."""
    place = tmp_path_factory.mktemp("known")
    files = {name: place / f"{name}.py" for name in ("right", "wrong")}
    for name, file in files.items():
        file.write_text(textwrap.dedent(BACKEND.format(name=name, wrong=name == "wrong")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        plan = make_plan(SHAPES, [f"{file}:It" for file in files.values()], level=brief())
        reports = [run(plan, place / "state"), run(replace(plan, seed=6), place / "state")]
        files["wrong"].write_text(files["wrong"].read_text() + "\n# another build\n")
        reports.append(run(replace(plan, seed=7), place / "state"))
    return place / "state", reports


def told(report: Report) -> list[dict]:
    rows = [asdict(row) for row in (*report.choices, *report.candidates, *report.layers)]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def test_the_second_probe_measures_nothing_and_says_the_same(probes):
    place, (one, two, _) = probes
    assert rows_of(place, one.run) >= {(b, n) for b in ("right", "wrong") for n, _ in SHAPES}
    assert rows_of(place, two.run) == set()
    assert told(two) == told(one) and two.generation == one.generation
    assert [row["times"] for row in two.known] == [one.run, one.run]
    assert {b["run"] for row in two.known for b in row["known"]} == {one.run}
    said = known_sentence(two.known)
    assert said.startswith(f"2 of 2 layers known from run {one.run} (2") and "measured 0" in said
    assert not known_sentence(one.known)


def test_findings_and_times_survive(probes):
    _, (one, two, _) = probes
    assert one.findings and {f.backend for f in one.findings} == {"wrong"}
    assert sorted(f.id for f in two.findings) == sorted(f.id for f in one.findings)
    assert sorted(t.median_us for t in two.timings) == sorted(t.median_us for t in one.timings)
    assert {c.verdict for c in two.candidates if c.backend == "wrong" and c.bucket.m_hi} == {
        "unsafe"
    }


def test_a_backend_that_changed_is_measured_again_and_all_are_timed_beside_it(probes):
    place, (one, two, third) = probes
    assert {name for name, _ in rows_of(place, third.run)} == {"wrong", "controls"}
    with Ledger.open(place, readonly=True) as ledger:
        timed = {row.backend for row in ledger.timings(run=third.run)}
    assert timed == {"right"}  # the other never came so far
    assert [row["measured"] for row in third.known] == [["wrong"], ["wrong"]]
    prints = [{c.fingerprint for c in r.candidates if c.backend == "wrong"} for r in (one, third)]
    assert prints[0] != prints[1]
    said = known_sentence(third.known)
    assert said.startswith("0 of 2 layers known") and "timed only" in said


def test_launches_are_counted_once(probes):
    _, (one, two, third) = probes

    def bounds(report):
        return {(c.backend, c.bucket): c.bounds for c in report.candidates if c.backend == "right"}

    assert bounds(one) == bounds(two) == bounds(third)


@pytest.mark.slow
def test_a_killed_probe_is_taken_up_after_its_last_layer(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(BACKEND.format(name="mine", wrong=False)))
    place = tmp_path / "state"
    command = [sys.executable, "-c", program("hurried"), "probe", "--gpu", "none", "--max-m", "1"]
    command += ["--level", "quick", "--profile", "strict", "--activation", "bf16"]
    for n, k in SHAPES:
        command += ["--shape", f"{n},{k}"]
    command += ["--backend", f"{file}:It", "--state", str(place), "--json"]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    killed = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finished_layers() -> int:
        try:
            with closing(sqlite3.connect(f"file:{place}/ledger.db?mode=ro", uri=True)) as conn:
                return conn.execute("SELECT count(*) FROM probed").fetchone()[0]
        except sqlite3.Error:
            return 0

    while killed.poll() is None and not finished_layers():
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = finished_layers()
    assert left == 1
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    with Ledger.open(place, readonly=True) as ledger:
        first, second = ledger.runs()
    assert (first.status, second.status) == ("interrupted", "finished")
    assert {(row["n"], row["times"]) for row in report["known"]} == {
        (SHAPES[0][0], first.id),
        (SHAPES[1][0], None),
    }
    assert {n for name, n in rows_of(place, second.id) if name == "mine"} == {SHAPES[1][0]}
    assert {c["status"] for c in report["choices"]} == {"safe"}
    assert f"1 of 2 layers known from run {first.id}" in done.stderr

"""An all-reduce behind each GEMM: what a rank adds is what the backend has written by then."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from levels import launches_only

from fp4tune.autotune.agreement import Partner, paired
from fp4tune.autotune.evidence.recorder import Recorder
from fp4tune.autotune.layer import Entrant, ProbedLayer
from fp4tune.autotune.plan import Plan
from fp4tune.autotune.runner import Patience, Runner
from fp4tune.autotune.several_gpus import probe_all
from fp4tune.autotune.stages.collective import OTHERS, collective
from fp4tune.autotune.verdict.buckets import MRange
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey, Environment, Under, Where
from fp4tune.machine import devices
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.regimes.host.collective import ALONE
from fp4tune.probes.worker.supervisor import WorkerFailed
from fp4tune.words import COLLECTIVE

ROGUES = Path(__file__).parent / "rogues.py"
MS = (1, 5, 17)


def together(place: Path, backend: str) -> list:
    """What came of each of two ranks: its part, or how its worker failed."""

    def one(rank: int):
        target, patience = devices.cpu(), Patience(60.0)
        runner = Runner(f"{ROGUES}:{backend}", target, patience, None, lambda who, text: None)
        problem = asdict(Problem("nvfp4", 40, 64, 128, "bf16", "bf16"))
        try:
            return runner.ask(
                "collective", problem=problem, width=24, seed=7, ms=MS, tactics=("",) * len(MS),
                rank=rank, meet=str(place / "meet"),
            )  # fmt: skip
        except WorkerFailed as failure:
            return failure
        finally:
            runner.close()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, (0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["Good", "LooksBack"])
def test_what_is_right_adds_up(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for found in together(tmp_path, backend):
        assert found["bad"] == [] and found["forms"] == ["behind", "beside"]
        assert found["launches"] == 2 * 3 * 4 * len(MS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["FinishesLater", "WritesInAThread"])
def test_what_is_written_late_is_in_the_sum(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for rank, found in enumerate(together(tmp_path, backend)):
        assert found["bad"] and {bad["kind"] for bad in found["bad"]} == {"wrong"}
        assert {bad["m"] for bad in found["bad"]} <= set(MS)
        assert found["bad"][0]["message"].startswith(f"rank {rank},")


@pytest.mark.slow
def test_a_rank_that_leaves_is_told_and_not_the_one_that_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kinds = [failure.kind for failure in together(tmp_path, "LeavesAtRankOne")]
    assert kinds[1] == "crash" and kinds[0] in ("internal", "hang")


# -- two probes that meet


def both(one, two):
    """What two sides return that do this at once, given their partner."""
    pair = paired({"gpu-0": "H", "gpu-1": "H"})
    with ThreadPoolExecutor(2) as pool:
        sides = [pool.submit(do, pair[label]) for do, label in ((one, "gpu-0"), (two, "gpu-1"))]
        return [side.result(60) for side in sides]


def test_gpus_of_one_model_are_paired_and_one_that_is_left_over_is_not():
    found = paired({"gpu-0": "H", "gpu-1": "B", "gpu-2": "H", "gpu-3": "H"})
    assert {label: partner.rank for label, partner in found.items()} == {"gpu-0": 0, "gpu-2": 1}


def test_each_side_gets_what_the_other_gave_at_the_same_point():
    def side(partner: Partner):
        return [(partner.swap((partner.rank, i), lambda: None), partner.place()) for i in range(5)]

    first, second = both(side, side)
    assert [said for said, _ in first] == [(1, i) for i in range(5)]
    assert [said for said, _ in second] == [(0, i) for i in range(5)]
    places = [place for _, place in first]
    assert places == [place for _, place in second] and len(set(places)) == 5


def test_one_that_has_left_is_not_waited_for_and_a_wait_can_be_ended():
    left, never = both(lambda partner: partner.leave(), lambda p: p.swap("x", lambda: None))
    assert (left, never) == (None, None)
    (partner, _) = paired({"a": "H", "b": "H"}).values()

    def enough() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        partner.swap("x", enough)


# -- the stage, with workers that are scripted

PROBLEM = Problem("nvfp4", 2, 64, 128, "bf16", "bf16")
RANGES = (MRange(1, 1), MRange(2, 2))
GOOD = {"launches": 12, "forms": [], "bad": []}


def wrong(m: int) -> dict:
    return {**GOOD, "bad": [{"kind": "wrong", "m": m, "tactic": "t", "message": "a sum"}]}


class Scripted:
    """A backend's worker that answers what it is told to, or fails so."""

    def __init__(self, name, answer):
        self.name, self.answer = name, answer
        self.patience = Patience(1.0)
        self.asked = []

    def ask(self, do, silence, **asked):
        self.asked.append(asked)
        if isinstance(self.answer, WorkerFailed):
            raise self.answer
        return self.answer


def told(answers: dict, partner: Partner | None, place: Path):
    """The statuses and notes of each backend after the stage, with these answers; the first is the
    fastest, and `torch-dequant` the floor."""
    layer = ProbedLayer(devices.cpu(), PROBLEM, RANGES, launches_only(), 1, 1 << 20, 1 << 20)
    entrants = []
    for number, (name, answer) in enumerate(answers.items(), 1):
        entrants.append(
            Entrant(
                Scripted(name, answer), {m: ["t"] for m in RANGES}, False, {},
                width={(m, "t"): 24 for m in RANGES}, winner=dict.fromkeys(RANGES, "t"),
                median_us=dict.fromkeys(RANGES, float(number)),
            )
        )  # fmt: skip
    with Ledger.open(place) as ledger:
        run = ledger.start_run(seed=1, level="quick", profile="strict", device={}, argv=())
        record = Recorder(ledger, run, 1)
        for name in answers:
            ledger.add_environment(Environment(name.ljust(64), name, "cpu", {}))
            record.knows(name, name.ljust(64))

        def right(where):
            return all(f.status != "failed" for f in record.facts(where))

        collective([(layer, entrants)], right, record, lambda text: None, partner)
        return {
            entrant.name: [
                (fact.status, fact.detail.get("note", ""))
                for m in RANGES
                for fact in record.facts(layer.where(entrant, m, "t"))
            ]
            for entrant in entrants
        }


def pair_told(tmp_path, one: dict, two: dict):
    return both(
        lambda partner: told(one, partner, tmp_path / "a"),
        lambda partner: told(two, partner, tmp_path / "b"),
    )


def test_the_fastest_and_the_floor_are_tried_and_no_other(tmp_path):
    answers = {"fast": GOOD, "slow": GOOD, "torch-dequant": GOOD}
    for found in pair_told(tmp_path, answers, answers):
        assert found["fast"] == found["torch-dequant"] == [("passed", ""), ("passed", "")]
        assert found["slow"] == []


def test_one_whose_sums_are_wrong_makes_way_for_the_next_on_both(tmp_path):
    answers = {"fast": wrong(2), "slow": GOOD, "torch-dequant": GOOD}
    for found in pair_told(tmp_path, answers, answers):
        assert [status for status, _ in found["fast"]] == ["passed", "failed"]
        assert found["slow"] == [("passed", "")], "in the range where the first was wrong"


def test_who_waits_for_one_that_died_is_not_blamed(tmp_path):
    dead = {"fast": WorkerFailed("crash", "ended by SIGSEGV", "x"), "torch-dequant": GOOD}
    waits = {"fast": WorkerFailed("hang", "silent", "x"), "torch-dequant": GOOD}
    first, second = pair_told(tmp_path, dead, waits)
    assert [status for status, _ in first["fast"]] == ["failed", "failed"]
    assert second["fast"] == [("skipped", OTHERS)] * 2


def test_both_that_hang_are_blamed(tmp_path):
    hang = {"fast": WorkerFailed("hang", "silent", "x"), "torch-dequant": GOOD}
    for found in pair_told(tmp_path, hang, hang):
        assert [status for status, _ in found["fast"]] == ["failed", "failed"]


@pytest.mark.parametrize("floor", [wrong(1), WorkerFailed("hang", "silent", "x")])
def test_where_the_floor_fails_nothing_is_said_of_anyone(tmp_path, floor):
    answers = {"fast": wrong(1), "torch-dequant": floor}
    for found in pair_told(tmp_path, answers, {**answers, "torch-dequant": GOOD}):
        told_of = {status for rows in found.values() for status, _ in rows}
        assert told_of == {"skipped"}


def test_one_gpu_has_nothing_to_add_up(tmp_path):
    found = told({"fast": GOOD, "torch-dequant": GOOD}, None, tmp_path)
    assert found["fast"] == [("not applicable", ALONE)] * 2


# -- for real: two twins of a CPU


class Twin(devices.Target):
    """A CPU that passes for one of several."""

    @property
    def label(self) -> str:
        return f"cpu-{self.uuid}"


@pytest.mark.slow
def test_two_probes_add_up_what_they_choose(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cpu = devices.cpu()
    level = replace(launches_only(), without=tuple(n for n in REGIMES if n != "serial"))
    plans = [
        Plan(
            Twin(cpu.device, cpu.name, uuid), ("torch-dequant", f"{ROGUES}:FinishesLater"),
            (PROBLEM,), level, PROFILES["strict"], seed=number,
        )
        for number, uuid in enumerate("ab")
    ]  # fmt: skip
    quiet = {plan.target.label: lambda who, text: None for plan in plans}
    with Ledger.open(tmp_path) as ledger:
        reports, failed = probe_all(plans, ledger, tmp_path, quiet)
        assert not failed and len(reports) == 2 and threading.active_count() < 20
        rows = [row for row in ledger.evidence() if row.regime == COLLECTIVE]
    assert {row.status for row in rows if row.backend == "torch-dequant"} == {"passed"}
    assert {row.run for row in rows} == {report.run for report in reports}


def test_a_pass_has_launches(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        run = ledger.start_run(seed=1, level="quick", profile="strict", device={}, argv=())
        record = Recorder(ledger, run, 1)
        ledger.add_environment(Environment("f" * 64, "x", "cpu", {}))
        record.knows("x", "f" * 64)
        where = Where("x", "t", BucketKey("nvfp4", "bf16", "bf16", 1, 1, 1, 64, 128))
        nothing = {"launches": 0, "problems": 0, "bad": []}
        assert record.result(where, Under("every-m"), nothing, 24) == "skipped"
        assert record.result(where, Under("serial"), {**nothing, "launches": 3}, 24) == "passed"

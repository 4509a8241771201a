"""A probe of good and bad backends: each in a process of its own, each judged for what it does."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import rogues
from levels import brief
from stores import gone, spawn
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune import request as planning
from fp4tune.autotune.asking import survey
from fp4tune.autotune.plan import Plan, Report
from fp4tune.autotune.probe import probe
from fp4tune.autotune.publication.publish import publish
from fp4tune.autotune.stages.survey import enrol
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache import reader
from fp4tune.cache.ledger import Ledger
from fp4tune.machine import devices

HERE = Path(__file__).parent
N, K = 320, 256
"""n has a last tile that is not whole."""

RIGHT = ("Good", "BadManners", "RoundsAlpha", "ShortSums", "DropsSubnormals")
WRONG = {
    "SkipsTheTail": ("unwritten", "serial"),
    "OneWrongElement": ("wrong", "serial"),
    "DropsABlock": ("wrong", "serial"),
    "IgnoresAlpha": ("wrong", "serial"),
    "OddUnwritten": ("unwritten", "serial"),
    "OutOfBounds": ("out of bounds", "serial"),
    "ModifiesInput": ("input modified", "serial"),
    "CachedByPointer": ("unwritten", "serial"),
    "SharedScratch": ("wrong", "streams"),
    "RaisesAtTwo": ("error", "serial"),
    "RaisesInPrepare": ("error", "serial"),
}
"""The kind of finding each must get, and the regime it must be found in."""
PARTLY_RIGHT = {"OddUnwritten": {2}, "RaisesAtTwo": {1}}
"""The m from 1 up where a wrong one is right."""
DYING = {
    "Segfaults": ("crash", "serial"),
    "Daemon": ("crash", "serial"),
    "HoldsTheGil": ("hang", "serial"),
    "Deadlocks": ("hang", "streams"),
}


def spec(name: str, path: Path = HERE / "rogues.py") -> str:
    return f"{path}:{name}"


def name_of(name: str) -> str:
    return getattr(rogues, name)().name


def make_plan(backends, max_m: int, **other) -> Plan:
    layers = planning.layers((), None, [f"{N},{K}"], 1, "cpu")
    return Plan(
        target=devices.cpu(),
        backends=planning.backends(backends),
        problems=planning.problems(layers, ["nvfp4"], ["bf16"], "bf16", max_m),
        level=brief(),
        profile=PROFILES["strict"],
        seed=5,
        argv=("probe",),
        **other,
    )


def run(plan: Plan, place: Path, progress=lambda who, text: None) -> Report:
    with Ledger.open(place) as ledger:
        report = probe(plan, ledger, place, progress)
    publish([report], place)
    return report


def verdicts(report: Report, name: str) -> dict[int, str]:
    """m_hi -> verdict of one backend."""
    backend = name_of(name)
    return {c.bucket.m_hi: c.verdict for c in report.candidates if c.backend == backend}


def findings(report: Report, name: str) -> set[tuple[str, str]]:
    backend = name_of(name)
    return {(f.kind, f.regime) for f in report.findings if f.backend == backend}


def children(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


@pytest.fixture(scope="module")
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


class Probed:
    """A finished probe: its report, its state directory and what was seen while it ran."""

    def __init__(self, report: Report, place: Path, children: list[int], during: list[int]):
        self.report = report
        self.place = place
        self.children = children
        self.during = during


@pytest.fixture(scope="module")
def answering(tmp_path_factory, one_thread) -> Probed:
    """Every backend that keeps its process alive, and one that cannot be imported, together."""
    place = tmp_path_factory.mktemp("answering")
    one_thread.setenv(rogues.CHILDREN, str(place / "children"))
    broken = place / "broken.py"
    broken.write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    during: list[int] = []

    def watch(who: str, text: str) -> None:
        """Another process reads the ledger in the middle of the probe."""
        if len(during) == 3 or not text.startswith(("timing", "streams")):
            return
        code = """
            import sys
            from fp4tune.cache.ledger import Ledger
            with Ledger.open(sys.argv[1], readonly=True) as ledger:
                assert [run.status for run in ledger.runs()] == ["running"]
                print(len(ledger.evidence()))
        """
        other = spawn(code, place / "state", stdout=subprocess.PIPE, text=True)
        during.append(int(other.communicate(timeout=30)[0]))

    wanted = [spec(name) for name in (*RIGHT, *WRONG, "RaisesWhenAsked")]
    report = run(make_plan([*wanted, spec("thing", broken)], 2), place / "state", watch)
    return Probed(report, place / "state", children(place / "children"), during)


@pytest.fixture(scope="module")
def dying(tmp_path_factory, one_thread) -> Probed:
    """Backends that crash or hang, after a good one and before another."""
    place = tmp_path_factory.mktemp("dying")
    one_thread.setenv(rogues.CHILDREN, str(place / "children"))
    plan = make_plan([spec(name) for name in ("Good", *DYING, "ShortSums")], 1, hang_seconds=3.0)
    return Probed(run(plan, place / "state"), place / "state", children(place / "children"), [])


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, one_thread) -> Probed:
    """A right backend and one that crashes in another interpreter, as an engine's would be.

    It is isolated, so that it finds neither fp4tune nor this folder by itself, and started from
    elsewhere.
    """
    place = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        plan = make_plan([spec("Good"), spec("Segfaults")], 1, python=interpreter(place, "-I"))
        return Probed(run(plan, place / "state"), place / "state", [], [])


def interpreter(place: Path, *options: str) -> str:
    """A program that is this Python with options; ``-I`` takes PYTHONPATH and the folder away."""
    program = place / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {" ".join(options)} "$@"\n')
    program.chmod(0o755)
    return str(program)


# -- verdicts


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_backend_is_safe_at_every_m(answering, name):
    assert verdicts(answering.report, name) == {0: "safe", 1: "safe", 2: "safe"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_is_unsafe_where_it_is_wrong(answering, name):
    found = verdicts(answering.report, name)
    right = PARTLY_RIGHT.get(name, set())
    assert {m: found[m] for m in (1, 2)} == {m: "safe" if m in right else "unsafe" for m in (1, 2)}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_is_found_out_for_what_it_does(answering, name):
    kind, regime = WRONG[name]
    assert (kind, regime) in findings(answering.report, name)


def test_a_race_between_threads_is_found_in_no_other_regime(answering):
    assert {regime for _, regime in findings(answering.report, "SharedScratch")} == {"streams"}


def test_a_finding_names_what_is_needed_to_see_it_again(answering):
    for finding in answering.report.findings:
        if finding.kind not in ("wrong", "unwritten"):
            continue
        assert finding.problem["n"] == N and finding.problem["k"] == K
        assert finding.bucket.m_lo <= finding.problem["m"] <= finding.bucket.m_hi
        assert finding.seed > 0 and finding.detail["tiles"]
        assert {"row", "col", "found", "expected"} <= set(finding.detail["worst"])


def test_missing_columns_are_told_by_their_tile(answering):
    tail = next(f for f in answering.report.findings if f.backend == name_of("SkipsTheTail"))
    assert {col for _, col, _ in tail.detail["tiles"]} == {2}


def test_what_a_backend_raises_is_one_line_of_its_finding(answering):
    for name, words in (("RaisesAtTwo", "no plan for m=2"), ("RaisesInPrepare", "not written yet")):
        mine = [f for f in answering.report.findings if f.backend == name_of(name)]
        assert mine and all(words in f.detail["message"] for f in mine)
        assert all("\n" not in f.detail["message"] for f in mine)


def test_a_shorter_accumulator_is_a_grade_and_no_fault(answering):
    mine = [c for c in answering.report.candidates if c.backend == name_of("ShortSums")]
    assert all(c.width is not None and c.width < 24 for c in mine if c.bucket.m_hi)
    assert not findings(answering.report, "ShortSums")


def test_a_rounded_global_scale_is_noted_in_the_evidence(answering):
    with Ledger.open(answering.place, readonly=True) as ledger:
        rows = ledger.evidence(backend=name_of("RoundsAlpha"))
        assert {row.detail.get("alpha") for row in rows} == {None, "bf16"}
        assert not any(row.detail.get("alpha") for row in ledger.evidence(backend="good"))


def test_dropped_subnormal_scales_are_safe_under_the_condition_that_there_are_none(answering):
    mine = [c for c in answering.report.candidates if c.backend == name_of("DropsSubnormals")]
    # What these plans leave out is a condition of everyone.
    ids = [[x["id"] for x in c.conditions] for c in mine if c.bucket.m_hi]
    conditions = {tuple(i for i in each if i != "regimes-left-out") for each in ids}
    assert conditions == {("block-scale-min",)}
    others = [c for c in answering.report.candidates if c.backend == name_of("Good")]
    assert {x["id"] for c in others for x in c.conditions} <= {"regimes-left-out"}


def test_what_cannot_be_loaded_or_asked_is_broken_and_says_why(answering):
    broken = {Path(spec).name: why for spec, why in answering.report.broken.items()}
    assert "libcuda.so.1" in broken["broken.py:thing"]
    assert "sm_999" in broken["rogues.py:RaisesWhenAsked"]


def test_what_fails_before_any_layer_takes_part_no_longer_and_the_others_do(tmp_path, one_thread):
    names = ["Good", "HasNoTactics", "HasNoFiles", "DiesOfItsTactics"]
    report = run(make_plan([spec(name) for name in names], 1), tmp_path)
    broken = {name: report.broken.get(name_of(name), "") for name in names}
    assert "list of kernels is missing" in broken["HasNoTactics"]
    assert "its cache is gone" in broken["HasNoFiles"]
    assert "crash while saying its tactics: ended by SIGSEGV" in broken["DiesOfItsTactics"]
    assert {c.backend for c in report.choices} == {"good"} and not report.findings


def test_only_safe_backends_are_chosen_and_the_reader_agrees(answering):
    judged = {(c.backend, c.tactic, c.bucket): c.verdict for c in answering.report.candidates}
    chosen = answering.report.choices
    assert [c.bucket.m_hi for c in chosen] == [0, 1, 2]
    opened = reader.open(answering.place)
    for choice in chosen:
        assert judged[choice.backend, choice.tactic, choice.bucket] == "safe"
        answer = opened.choose(choice.bucket.m_hi, N, K)
        assert (answer.status, answer.backend) == ("safe", choice.backend)


def test_evidence_is_committed_while_the_probe_runs(answering):
    seen = answering.during
    assert seen[0] > 0 and seen == sorted(seen)
    with Ledger.open(answering.place, readonly=True) as ledger:
        assert len(ledger.evidence()) > seen[-1]


def test_a_child_that_ignores_sigterm_ends_with_its_worker(answering):
    assert answering.children and gone(answering.children)


# -- processes that die


@pytest.mark.parametrize("name", DYING)
def test_a_death_is_narrowed_down_to_its_m_and_regime(dying, name):
    kind, regime = DYING[name]
    assert findings(dying.report, name) == {(kind, regime)}
    # Where several m share the launches that hang, none of them is proven.
    at_zero = "safe" if regime == "serial" else "unsafe"
    assert verdicts(dying.report, name) == {0: at_zero, 1: "unsafe"}


def test_how_it_died_is_said(dying):
    said = {f.backend: f.detail["message"] for f in dying.report.findings}
    assert "SIGSEGV" in said[name_of("Segfaults")]
    assert "code 3" in said[name_of("Daemon")]
    assert "3 s" in said[name_of("Deadlocks")] and "3 s" in said[name_of("HoldsTheGil")]


@pytest.mark.parametrize("name", ["Good", "ShortSums"])
def test_the_others_are_probed_to_the_end(dying, name):
    assert verdicts(dying.report, name) == {0: "safe", 1: "safe"}
    assert [c.status for c in dying.report.choices] == ["safe", "safe"]


@pytest.mark.slow
def test_another_interpreter_is_probed_as_this_one_is(elsewhere):
    assert verdicts(elsewhere.report, "Good") == {0: "safe", 1: "safe"}
    assert verdicts(elsewhere.report, "Segfaults") == {0: "safe", 1: "unsafe"}
    assert findings(elsewhere.report, "Segfaults") == {DYING["Segfaults"]}
    assert [c.status for c in elsewhere.report.choices] == ["safe", "safe"]


@pytest.mark.slow
def test_evidence_names_the_interpreter_it_was_taken_in(elsewhere):
    with Ledger.open(elsewhere.place, readonly=True) as ledger:
        (good,) = (e for e in ledger.environments() if e.backend == "good")
    assert good.facts["distributions"]["python"] == platform.python_version()
    assert good.facts["distributions"]["torch"] == metadata.version("torch")


def test_a_child_in_a_session_of_its_own_ends_after_a_crash(dying):
    assert dying.children and gone(dying.children)


def test_backends_that_end_the_process_while_they_load_are_told_apart(tmp_path, one_thread):
    exits, segfaults = tmp_path / "exits.py", tmp_path / "segfaults.py"
    exits.write_text("raise SystemExit(4)\n")
    segfaults.write_text("import ctypes\nctypes.string_at(0)\n")
    wanted = [spec("Good"), spec("thing", exits), spec("thing", segfaults)]
    plan = make_plan(wanted, 1)
    answers = survey(plan.target, wanted, plan.problems)
    good, exited, crashed = (answers[name] for name in wanted)
    assert good["reasons"] == [None] and good["name"] == "good"
    assert "SystemExit" in exited["error"]
    assert "SIGSEGV" in crashed["error"]


def test_two_backends_of_one_name_are_not_taken_for_one(monkeypatch):
    wanted = [spec("Good"), spec("Other")]
    plan = replace(make_plan([wanted[0]], 1), backends=tuple(wanted))
    layer = {"name": "good", "activation": "bf16", "layout": "plain", "reference_line": False}

    def survey(target, backends, problems, python, hang_seconds):
        return {name: {**layer, "reasons": [None] * len(problems)} for name in backends}

    monkeypatch.setattr("fp4tune.autotune.stages.survey.survey", survey)
    found = enrol(plan, lambda who, text: None)
    assert [runner.spec for runner in found.runners] == wanted[:1]
    assert list(found.broken) == wanted[1:] and "and so is" in found.broken[wanted[1]]


@pytest.mark.slow
def test_a_backend_asked_for_that_does_not_load_is_no_success(tmp_path):
    call = ["probe", "--gpu", "none", "--shape", "64,128", "--max-m", "1", "--level", "quick"]
    call += ["--activation", "bf16", "--backend", spec("Good"), "--backend", spec("NoSuchThing")]
    done = CliRunner().invoke(cli.app, [*call, "--state", str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert "did not load" in done.output and "SAFE" in done.output


# -- another interpreter, and the end of the probe itself


def test_an_interpreter_without_torch_is_said_in_one_sentence(tmp_path, one_thread):
    plan = make_plan([spec("Good")], 1, python=interpreter(tmp_path, "-I", "-S"))
    report = run(plan, tmp_path / "state")
    (why,) = report.broken.values()
    assert "torch" in why and "\n" not in why
    assert not report.choices


@pytest.mark.slow
def test_a_killed_probe_loses_nothing_and_the_next_one_finishes(tmp_path):
    script = HERE.parent / "benchmarks" / "kill_probe.py"
    paths = os.pathsep.join([p for p in sys.path if p])
    command = [sys.executable, str(script), "--times", "2", "--seconds", "8", "--seed", "129"]
    command += ["--backend", "torch-dequant", "--out", str(tmp_path / "result.json")]
    environ = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] == 2 and result["rows_lost"] == 0 and not result["faults"]
    assert result["last_probe"]["exit_code"] == 0

"""What is taken back answers nothing any more, is measured anew, and leaves its reason behind."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace

import pytest
from levels import brief
from test_known import BACKEND, PRINT, SHAPES, Store, earlier_failures, make_plan, run

from commands import call
from fp4tune.autotune.publication import forget, published
from fp4tune.cache import reader
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Finding, Forgotten
from fp4tune.errors import Refused

OTHER = make_plan(seed=6, seed_given=True)


def taken(place, **named) -> forget.TakenBack:
    return forget.forget(place, Forgotten("the machine had no memory left", **named))


def wrong(place, store: Store) -> Finding:
    """A finding of every row that failed; the last of them."""
    with Ledger.open(place) as ledger:
        for row in ledger.evidence(status="failed"):
            found = Finding(
                row.run, row.fingerprint, row.backend, row.tactic, row.bucket, {}, "odd",
                row.regime, row.data, 1,
            )  # fmt: skip
            ledger.add_finding(found)
        return ledger.findings()[-1]


@pytest.mark.parametrize("named", ["run", "backend", "layer"])
def test_what_is_taken_back_is_not_used_and_does_not_count(tmp_path, named):
    store = Store(tmp_path, names=("x", "y"), status="failed")
    assert store.recall().entries and earlier_failures(tmp_path, OTHER)
    n, k = SHAPES[0]
    what = {"run": {"run": store.run}, "backend": {"backend": "x"}, "layer": {"n": n, "k": k}}
    done = taken(tmp_path, **what[named])
    assert done.covered["evidence"] and done.covered["probed"] == 1 and done.generation is None
    assert not store.recall().entries and not earlier_failures(tmp_path, OTHER)
    left = store.recall(names=("y",)).entries
    assert bool(left) == (named == "backend")
    with Ledger.open(tmp_path) as ledger:
        (row,) = ledger.forgotten()
        assert row.reason == "the machine had no memory left" and row == done.row
        assert not ledger.damage().sentences, "nothing was removed"
    again = Store(tmp_path, names=("x", "y"))
    assert {r.run for r in store.recall().evidence["x"]} == {again.run}
    with pytest.raises(Refused, match="there is nothing of"):
        taken(tmp_path, run=store.run, backend="z")


def test_a_finding_takes_its_evidence_along_where_no_other_speaks_of_it(tmp_path):
    store = Store(tmp_path, status="failed")
    finding = wrong(tmp_path, store)
    twin = replace(finding, kind="odder", id=None, at=None)
    with Ledger.open(tmp_path) as ledger:
        ledger.add_finding(twin)
        before = len(ledger.evidence())
    failed = earlier_failures(tmp_path, OTHER)
    assert taken(tmp_path, finding=finding.id).covered["evidence"] == 0
    assert earlier_failures(tmp_path, OTHER) == failed and store.recall().entries
    done = taken(tmp_path, finding=finding.id + 1)
    assert done.covered["evidence"] == 1 and done.covered["probed"] == 1
    with Ledger.open(tmp_path) as ledger:
        assert len(ledger.evidence()) == before - 1
    left = earlier_failures(tmp_path, OTHER)
    assert left.keys() < failed.keys(), "the other failures count on"
    assert not store.recall().entries, "what it was about is measured anew"


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({}, "say what to take back"),
        ({"run": "nobody's"}, "there is nothing of run nobody's"),
        ({"finding": 99}, "there is no finding 99"),
        ({"finding": 1, "backend": "x"}, "nothing beside it"),
        ({"backend": "x", "reason": "  "}, "say why"),
        ({"backend": "x", "reason": "y" * 5000}, "has 5000 characters"),
    ],
)
def test_what_cannot_be_taken_back_is_refused_and_nothing_is_changed(tmp_path, named, sentence):
    store = Store(tmp_path, status="failed")
    wrong(tmp_path, store)
    wanted = Forgotten(named.get("reason", "why not"))
    with pytest.raises(Refused, match=sentence):
        forget.forget(tmp_path, replace(wanted, **named))
    with Ledger.open(tmp_path) as ledger:
        assert not ledger.forgotten()


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    place = tmp_path_factory.mktemp("forget")
    files = {name: place / f"{name}.py" for name in ("right", "wrong")}
    for name, file in files.items():
        file.write_text(textwrap.dedent(BACKEND.format(name=name, wrong=name == "wrong")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        specs = [f"{file}:It" for file in files.values()]
        plan = make_plan(SHAPES, specs, level=brief())
        yield place / "state", plan, run(plan, place / "state")


@pytest.mark.slow
def test_what_was_published_of_it_is_withdrawn_and_measured_anew(probed):
    """The floor was condemned for nothing, and that was published: there is a way back."""
    place, plan, report = probed
    (n, k), (other, _) = SHAPES
    assert reader.open(place).choose(1, n, k).status == "safe"
    layer = ("--layer", f"{n},{k}", "--reason", "a machine without memory", "--state", place)
    answer = call("forget", *layer, "--json")
    assert answer.exit_code == 0, answer.output
    said = json.loads(answer.stdout)
    assert said["generation"] == report.generation + 1
    assert said["forgotten"][0]["covered"]["verdict"]
    assert reader.open(place).choose(1, n, k).status == "unproven"
    assert reader.open(place).choose(1, other, k).status == "safe"
    second = call("forget", *layer)
    assert second.exit_code == 2 and "there is nothing of layer" in second.stderr
    assert "a machine without memory" in call("forget", "--list", "--state", place).stdout
    assert "a machine without memory" in call("show", "--state", place).stdout
    again = run(plan, place)
    assert [row["measured"] for row in again.known] == [["right", "wrong"], []]
    assert reader.open(place).choose(1, n, k).status == "safe"


def test_a_finding_that_is_taken_back_has_its_step_made_again(probed):
    place, plan, _ = probed
    with Ledger.open(place, readonly=True) as ledger:
        before = {step.id for step in ledger.steps()}
        number = max(finding.id for finding in ledger.findings() if finding.backend == "wrong")
    answer = call("forget", "--finding", number, "--reason", "a cosmic ray", "--state", place)
    assert answer.exit_code == 0 and "withdrawn" in answer.stdout, answer.output
    report = run(plan, place)
    assert any("wrong" in row["measured"] for row in report.known)
    with Ledger.open(place, readonly=True) as ledger:
        made = [step for step in ledger.steps() if step.id not in before]
        assert {step.backend for step in made if step.what != "timing"} == {"wrong"}
        assert any(step.what == "graded" for step in made)
    verdicts = {c.backend: c.verdict for c in report.candidates if c.bucket.m_hi}
    assert verdicts == {"right": "safe", "wrong": "unsafe"}, "it fails again"


def test_a_run_that_another_came_after_is_taken_back_without_a_word_to_engines(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    assert taken(tmp_path, run=first.run).generation is None
    assert {r.run for r in first.recall().evidence["x"]} == {second.run}
    assert PRINT in {e.fingerprint for e in environments(tmp_path)}
    assert published.usable(tmp_path).generation == 0


def environments(place):
    with Ledger.open(place, readonly=True) as ledger:
        return ledger.environments()

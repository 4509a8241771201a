"""`explain` says what is stored: candidates, times, verdicts, the default, and what it costs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune.publication import publish, published
from fp4tune.cache import reader
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey, Candidate, Environment, Finding
from fp4tune.errors import Refused
from fp4tune.probes.problem import Problem
from fp4tune.report import explanation
from fp4tune.report.terminal.explain import explained_lines

BUCKET = BucketKey("nvfp4", "bf16", "bf16", 1, 9, 16, 4096, 4096)
ENVIRONMENT = Environment("e" * 64, "any", "sm90", {"distributions": {}, "code": "ab"})
CONDITION = {"id": "one-stream-per-layer", "text": "a layer's weight is never used on two streams"}


def candidate(backend, us, verdict="safe", spread=0.1, **other) -> Candidate:
    return Candidate(
        "sm90", "H200", "sglang", BUCKET, backend, "default", backend, verdict,
        median_us=us, lo_us=us - spread, hi_us=us + spread, launches=30, problems=20,
        fingerprint=ENVIRONMENT.fingerprint, **other,
    )  # fmt: skip


FLOOR = candidate("torch-dequant", 100.0)
HUMMING = candidate("humming", 8.0, "unsafe", reasons=("streams: failed",))
CUTLASS = candidate(
    "flashinfer-cutlass",
    10.0,
    conditions=(CONDITION,),
    bounds={
        "every-m": {
            "launches": 30, "problems": 20, "failures": 0, "upper": 0.139, "confidence": 0.95,
            "ms": 8,
        },
        "graph": {
            "launches": 99, "problems": 90, "failures": 0, "upper": 0.0327, "confidence": 0.95,
        },
    },
)  # fmt: skip
MARLIN = candidate("marlin", 16.0)


@pytest.fixture
def put(tmp_path):
    def put(*candidates, meta=None):
        empty = published.usable(tmp_path)
        empty = replace(empty, meta=meta or {})
        publish.republish(tmp_path, empty, candidates, [ENVIRONMENT])
        return tmp_path

    return put


def problem(m, n=4096):
    return Problem("nvfp4", m, n, 4096, "bf16", "bf16")


def told(place, m=16, **other):
    document = explanation.explain(place, problem(m), **other)
    assert json.loads(json.dumps(document)) == document
    return document, "\n".join(explained_lines(document))


def test_all_candidates_with_times_intervals_verdicts_and_conditions(put):
    document, text = told(put(FLOOR, HUMMING, CUTLASS, MARLIN))
    names = [each["backend"] for each in document["candidates"]]
    assert names == ["flashinfer-cutlass", "marlin", "torch-dequant", "humming"]
    assert "timed at m=9, 12 and 16" in text
    assert "10.0 us (9.9 to 10.1), the choice" in text
    assert "1.60 times the choice" in text
    assert "because streams: failed" in text
    assert f"if {CONDITION['text']}" in text
    assert (
        "99 launches over 90 problems and every m from 9 to 16 in graph: "
        "a fault in more than 1 of 30 would have shown (95 %)"
    ) in text
    assert "the fastest that is safe" in document["why"]


def test_what_the_default_would_have_been_and_what_is_saved(put):
    document, text = told(put(FLOOR, CUTLASS, MARLIN))
    assert document["default"]["backend"] == "marlin"
    assert document["default"]["saves_us"] == pytest.approx(6)
    assert "The choice saves 6.0 us a call, 38 %." in text
    assert document["price"]["gain_over_floor"] == pytest.approx(10)


def test_a_faster_default_that_is_unsafe_is_the_price_of_a_safe_one(put):
    wrong = replace(MARLIN, median_us=5.0, lo_us=4.9, hi_us=5.1, verdict="unsafe")
    document, text = told(put(FLOOR, CUTLASS, wrong))
    assert document["default"]["saves_us"] == pytest.approx(-5)
    assert "the price of one that is safe" in text
    assert document["price"]["faster_unproven"] == "marlin"
    assert document["price"]["costs_us"] == pytest.approx(5)


def test_of_those_not_told_apart_the_default_is_taken(put):
    near = replace(MARLIN, median_us=10.5, lo_us=9.0, hi_us=12.0)
    _, text = told(put(FLOOR, CUTLASS, near))
    assert "marlin is also what the engine would take by itself" in text


def test_a_default_that_was_not_measured_says_why(put):
    _, text = told(put(FLOOR, CUTLASS, meta={"unsupported": {"marlin": "needs nvcc"}}))
    assert "would take marlin, which was not measured here: needs nvcc." in text


def test_a_reference_line_is_neither_the_fastest_nor_a_price(put):
    line = candidate("resident", 1.0, "inconclusive", reasons=("a reference line, never chosen",))
    document, _ = told(put(FLOOR, CUTLASS, line))
    assert document["price"]["faster_unproven"] is None


def test_equal_ones_are_named(put):
    near = candidate("flashinfer-cudnn", 10.1)
    document, _ = told(put(FLOOR, CUTLASS, near))
    assert document["choice"]["backend"] == "flashinfer-cudnn"
    assert "as flashinfer-cutlass, which counts as equal" in document["why"]


def test_a_quarantined_choice_names_its_successor_and_the_fault(put):
    place = put(FLOOR, CUTLASS, MARLIN)
    reader.report_fault("flashinfer-cutlass", 16, 4096, 4096, reason="NaN", state_dir=place)
    try:
        document, _ = told(place)
        assert document["choice"]["backend"] == "marlin"
        assert "quarantined: NaN" in document["why"]
    finally:
        reader._own = ()


def test_findings_come_from_the_ledger_with_their_numbers(put):
    place = put(FLOOR, HUMMING, CUTLASS)
    with Ledger.open(place) as ledger:
        run = ledger.start_run(seed=1, level="quick", profile="sglang", device={}, argv=[])
        ledger.add_environment(ENVIRONMENT)
        ledger.add_finding(
            Finding(
                run, ENVIRONMENT.fingerprint, "humming", "default", BUCKET,
                {"m": 16, "n": 4096, "k": 4096}, "hang", "streams", "exact", 5,
                detail={"message": "silent for 6 s"},
            )
        )  # fmt: skip
    document, text = told(place)
    (found,) = document["candidates"][-1]["findings"]
    assert found["kind"] == "hang"
    assert f"finding #{found['id']}: hang, streams: m=16 n=4096 k=4096: silent for 6 s" in text


def test_without_a_ledger_there_are_no_findings_and_no_error(put, tmp_path_factory):
    place = put(FLOOR, CUTLASS)
    alone = tmp_path_factory.mktemp("alone")
    (alone / "choices.db").write_bytes((place / "choices.db").read_bytes())
    document, _ = told(alone)
    assert all(each["findings"] == [] for each in document["candidates"])


def test_nothing_safe_is_said_and_exits_1(put):
    place = put(replace(FLOOR, verdict="unsafe"), HUMMING)
    document, text = told(place)
    assert "No choice holds" in text and document["price"]["costs_us"] is None
    done = CliRunner().invoke(cli.app, ["explain", "16", "4096", "4096", "--state", str(place)])
    assert done.exit_code == 1


@pytest.mark.parametrize(("m", "n"), [(17, 4096), (16, 128)])
def test_what_was_not_measured_is_refused_in_one_sentence(put, m, n):
    place = put(FLOOR)
    with pytest.raises(Refused, match="nothing was measured"):
        explanation.explain(place, problem(m, n))
    done = CliRunner().invoke(cli.app, ["explain", str(m), str(n), "4096", "--state", str(place)])
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_json_is_the_document(put):
    place = put(FLOOR, CUTLASS)
    args = ["explain", "16", "4096", "4096", "--state", str(place), "--json"]
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0
    assert json.loads(done.stdout) == told(place)[0]


def test_the_page_has_every_key(put):
    page = (Path(__file__).parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
    section = page.split("## fp4tune explain\n")[1].split("\n## ")[0].split("| JSON key |")[1]
    said = {key for row in section.splitlines()[2:] for key in re.findall(r"`(\w+)`", row[:60])}
    assert said >= set(told(put(FLOOR))[0])


def test_what_the_engine_cannot_name_is_shown_with_that_reason_and_not_chosen(put):
    triton = candidate("triton-w4a16", 5.0)
    document, text = told(put(FLOOR, CUTLASS, triton))
    assert document["choice"]["backend"] == "flashinfer-cutlass"
    assert "triton-w4a16 (triton-w4a16): safe, 5.0 us (4.9 to 5.1), 0.50 times the choice" in text
    assert "sglang has no name for it" in text
    assert "which is safe, and sglang has no name for it: leaving it out costs 5.0 us" in text

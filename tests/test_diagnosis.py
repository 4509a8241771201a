"""A failure in words: each pattern of real faults is told by what it looks like."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.check import tilemap
from fp4tune.probes.check.diagnosis import Failure, diagnose
from fp4tune.probes.data import FAMILIES
from fp4tune.probes.regimes import REGIMES

CALM = frozenset({"serial"})
M, N, K = 512, 640, 1024
ALL = [(r, c) for r in range(4) for c in range(5)]


def seen(tiles=ALL, **other) -> Failure:
    values = {"kind": "wrong", "regime": "serial", "data": "exact", "wrong": 10, **other}
    m = values.pop("m", M)
    return Failure(m=m, n=N, k=K, tiles=tilemap.tiles_of(m, N, tiles), **values)


ROWS = {
    "right": False,
    "bad": 2 * N,
    "bad_rows": 2,
    "whole_rows": 2,
    "rows": [0, 1],
    "cols": [0, N - 1],
}
SOME = {"right": False, "bad": 40, "bad_rows": 9, "whole_rows": 0, "rows": [0, 9], "cols": [0, 9]}

CASES = {
    "unwritten blocks under overlap": (
        seen(
            [(1, c) for c in range(5)],
            kind="unwritten",
            unwritten=10,
            regime="pdl-raw",
            passed=CALM,
        ),
        [
            "blocks of 128 rows (128 to 255)",
            "only when the previous kernel overlaps",
            "missing grid-dependency wait",
        ],
    ),
    "stale tiles under overlap": (
        seen([(1, 1), (1, 2)], regime="pdl-war", passed=CALM),
        ["contiguous blocks aligned to 128 rows", "missing grid-dependency wait"],
    ),
    "last partial tile": (
        seen([(r, 4) for r in range(4)], kind="unwritten", unwritten=10),
        ["the last tile column (from 512)", "tail that is skipped"],
    ),
    "last partial tile row": (
        seen([(3, c) for c in range(5)], kind="unwritten", unwritten=10, m=500),
        ["the last partial tile row (from 384)", "tail that is skipped"],
    ),
    "k tail": (seen(alone={**SOME, "k_stops_at": 896}), ["ends at 896 of 1024", "k tail"]),
    "rows swapped": (
        seen([(0, c) for c in range(5)], alone={**ROWS, "rows_from": [[0, 1], [1, 0]]}),
        ["2 whole rows from 0 to 1", "row 0 that of row 1", "rows exchanged"],
    ),
    "power of two": (seen(alone={**SOME, "ratio": 4.0, "alpha": 0.3}), ["off by 2^2"]),
    "alpha left out": (
        seen(alone={**SOME, "ratio": 8.0, "alpha": 0.125}),
        ["global scale left out"],
    ),
    "alpha twice": (
        seen(alone={**SOME, "ratio": 0.125, "alpha": 0.125}),
        ["global scale applied twice"],
    ),
    "scale as another type": (seen(alone={**SOME, "ratio": 1e-40}), ["read as another type"]),
    "subnormal scales": (seen(data="subnormal-scales"), ["below the smallest normal e4m3"]),
    "zeros": (seen(alone={**SOME, "zeros": 1.0}), ["zeros where values belong", "cleared first"]),
    "NaN at zero blocks": (
        seen(kind="not finite", not_finite=10, data="zero-blocks"),
        ["zero-blocks data", "division"],
    ),
    "overflow": (seen(kind="not finite", not_finite=1), ["overflow"]),
    "lost precision": (seen(alone={**SOME, "relative": 0.02}), ["close and not exact"]),
    "a layout": (
        seen(worst={"found": "-5.0", "expected": [3.0, 3.0]}),
        ["without relation", "layout"],
    ),
    "shared workspace": (
        seen(regime="streams", passed=CALM),
        ["only with several calls under way at once", "workspace or buffer"],
    ),
    "graph branches": (
        seen(regime="graph-streams", passed=CALM),
        ["several branches of a CUDA graph"],
    ),
    "fixed at capture": (
        seen(regime="graph", passed=CALM),
        ["only in a CUDA graph", "fixed at capture"],
    ),
    "wrong stream": (seen(regime="side-stream", passed=CALM), ["another stream than the current"]),
    "hang in streams": (seen([], kind="hang", regime="streams"), ["lock, counter or barrier"]),
    "hang": (seen([], kind="hang"), ["endless loop"]),
    "crash": (seen([], kind="crash"), ["outside allocated memory"]),
    "guard zone": (seen([], kind="out of bounds", guard=640), ["without a mask"]),
    "input modified": (seen([], kind="input modified"), ["work in place"]),
    "leak": (seen([], kind="leak"), ["grows from call to call"]),
    "certain m": (seen(right_at=(1, 4)), [f"at m={M} (right at m=1, 4)"]),
    "error at one m": (seen([], kind="error", right_at=(1,)), ["missing plan"]),
    "rare": (
        seen(
            [(0, 0)],
            kind="unwritten",
            unwritten=10,
            retest={"kind": "intermittent", "launches": 32, "failures": 1},
        ),
        ["one 128x128 tile", "1 of 32 launches", "dependent on timing"],
    ),
    "cached by pointer": (
        seen(kind="unwritten", unwritten=M * N, wrong=M * N, alone={**SOME, "bad": M * N}),
        ["the whole output", "takes an older call for this one"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_failure_class_has_its_words(case):
    evidence, words = CASES[case]
    said = diagnose(evidence)
    assert all(word in said for word in words), said


def test_what_fails_serially_too_is_not_put_down_to_the_regime():
    calm = diagnose(seen(regime="streams", alone={"right": True}))
    assert "only with several calls" in calm
    not_calm = seen(regime="streams", alone={"right": True}, failed=frozenset({"serial"}))
    assert "only" not in diagnose(not_calm)


tiles = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=20)
counts = st.integers(0, 5)


@settings(deadline=None)
@given(
    tiles,
    st.sampled_from(["wrong", "unwritten", "not finite", "hang", "leak", "a kind of later"]),
    st.sampled_from([*REGIMES, "pdl-raw", "a-regime-of-later"]),
    st.sampled_from(["exact", *FAMILIES]),
    counts,
    counts,
    st.sampled_from([frozenset(), CALM]),
    st.sampled_from([{}, {"right": True}, SOME, ROWS, {**SOME, "ratio": -3.0}]),
)
def test_there_is_one_sentence_for_whatever_was_seen(
    bad, kind, regime, data, wrong, unwritten, passed, alone
):
    evidence = seen(
        bad,
        kind=kind,
        regime=regime,
        data=data,
        wrong=wrong,
        unwritten=unwritten,
        passed=passed,
        alone=alone,
    )
    said = diagnose(evidence)
    assert said and "\n" not in said and said == diagnose(evidence)


def test_a_failure_without_a_place_begins_with_its_cause():
    said = diagnose(Failure(kind="wrong", regime="quantiser", data="realistic", m=M, n=N, k=K))
    assert said and not said.startswith((":", " ", ","))

"""docs/witness.md, the chance it states, and the example that is caught."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.autotune.evidence.wording import witnessed
from fp4tune.cache.rows import BucketKey, Finding
from fp4tune.engines import watching
from fp4tune.probes.formats import dequantise, quantise
from fp4tune.probes.problem import NVFP4
from fp4tune.witness import counts, edges, limits, plan, process, rows, vectors
from fp4tune.witness.foresee import foresee, in_a_row

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "witness.md").read_text()
BUCKET = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 64, 1024, 256)


@pytest.mark.slow
def test_the_example_is_caught_as_its_page_says():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "examples" / "served.py")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = re.search(r"\$ python docs/examples/served.py\n(.*?)```", PAGE, re.S)
    assert said and done.stdout == said[1]


def test_the_variables_are_those_of_the_program():
    known = {process.WATCH, process.REACT, process.COPIES, counts.VARIABLE}
    assert set(re.findall(r"^\| `(FP4TUNE_\w+)` \|", PAGE, re.M)) == known
    assert (watching.SHARE, watching.REACT) == (process.WATCH, process.REACT)
    for word in (*plan.SHARES, *plan.ON_FAULT):
        assert f"`{word}`" in PAGE
    assert f"one call of {plan.ONE_OF}" in PAGE


def test_the_numbers_of_the_formula_are_those_of_the_limit():
    found = limits.limit("bf16", 1024, 1024, 1e-4)
    assert f"{found.of_y * 32:.2f} for bf16" in PAGE
    assert f"{limits.limit('bf16', 1024, 1024).of_y * 32:.2f} where accumulation was not" in PAGE
    own = limits.limit("bf16", 1024, 1024, 0.0)
    assert math.isclose(own.of_y - 8 * 2.0**-8, 2.0**-14.4, rel_tol=0.05)
    assert math.isclose(own.of_sum, 2.0**-16.7, rel_tol=0.05)
    assert limits.T == 8 and "t = 8 makes that 2.5e-14" in PAGE


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("columns", "size"), [(128, 1.0), (128, 0.2), (16, 1.0), (16, 0.5)])
def test_the_chance_in_the_formula_is_what_is_counted(columns, size):
    n, k, m = 1024, 128, 64
    w = quantise(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), NVFP4)
    values = dequantise(w, torch.float64)
    limit = limits.limit("bf16", 1024, k, 0.0)
    seen, turns = 0, 12
    for seed in range(turns):
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(m, k, generator=g).bfloat16()
        exact = a.double() @ values.T
        off = torch.randn(m, columns, generator=g, dtype=torch.float64) * size
        exact[:, :columns] += off * exact.std(dim=1, keepdim=True)
        sums = vectors.sums_of([w], vectors.draw_signs(n, g))
        found = rows.check(rows.WatchedCall(a, exact.bfloat16()), sums, limit)
        seen += int(found.suspicious.any(dim=1).sum())
    chance = in_a_row(columns, size, 1024, limit)
    spread = 4 * math.sqrt(chance * (1 - chance) / (m * turns)) + 0.03
    assert abs(seen / (m * turns) - chance) < spread


@given(st.floats(1, 1024), st.floats(1e-4, 8), st.floats(1e-4, 8))
def test_larger_errors_are_seen_more_surely(columns, one, other):
    limit = limits.limit("bf16", 1024, 1024, 0.0)
    small, large = sorted((one, other))
    low, high = (in_a_row(columns, size, 1024, limit) for size in (small, large))
    assert 0 <= low <= high + 1e-12 <= 1 + 1e-9


# -- what the witness would have seen of a finding


def finding(kind: str, m: int = 64, **detail) -> Finding:
    shape = {"format": "nvfp4", "activation": "bf16", "out_dtype": "bf16", "groups": 1}
    problem = {**shape, "m": m, "n": 1024, "k": 256}
    return Finding(
        "r", "f", "mine", "default", BUCKET, problem, kind, "serial", "exact", 1, detail=detail
    )


@pytest.mark.parametrize(
    ("kind", "detail", "said"),
    [
        ("unwritten", {"wrong": 64 * 128, "tiles": [[0, 0, 8192]]}, "every launch"),
        ("not finite", {"wrong": 1}, "every launch that gives it"),
        ("hang", {}, "nothing: the witness looks"),
        ("wrong", {"wrong": 1, "tiles": [[0, 0, 1]], "alone": {"bad_rows": 1, "bad": 1,
         "relative": 0.1}}, "none of the launches"),
        ("wrong", {"wrong": 16, "tiles": [[0, 0, 16]], "alone": {"bad_rows": 1, "bad": 16,
         "zeros": 1.0}}, "% of launches"),
        ("wrong", {}, "it cannot be told"),
    ],
)  # fmt: skip
def test_a_finding_says_what_the_witness_would_have_seen(kind, detail, said):
    assert said in witnessed(finding(kind, **detail))


@given(
    st.sampled_from(["wrong", "unwritten", "not finite", "error"]),
    st.dictionaries(
        st.sampled_from(["wrong", "tiles", "worst", "alone"]),
        st.one_of(
            st.integers(-5, 1 << 40), st.text(max_size=5), st.none(), st.lists(st.integers(0, 9)),
            st.dictionaries(st.sampled_from(["bad", "zeros", "relative"]), st.floats()),
        ),
    ),
)  # fmt: skip
def test_whatever_is_stored_in_a_finding_it_is_a_sentence_or_nothing(kind, detail):
    assert isinstance(witnessed(finding(kind, **detail)), str)


def test_what_is_foreseen_agrees_with_what_is_seen():
    """A dropped tile in one row: 99 of 100."""
    facts = {"bad_rows": 1, "bad": 128, "zeros": 1.0}
    detail = {"wrong": 128, "tiles": [[0, 3, 128]], "alone": facts}
    found = foresee("wrong", detail, (1, 4096, 4096), "bf16")
    assert found.chance is not None and found.chance >= 0.99


# -- edges


def test_edges_that_a_graph_lost_are_named_and_a_gemms_own_is_not_among_them():
    bare = [("quantise", "gemm", True), ("gemm", "norm", True), ("norm", "gemm", True)]
    watched = [("quantise", "gemm", True), ("gemm", "witness", False), ("witness", "norm", False),
               ("norm", "gemm", True)]  # fmt: skip
    assert edges.lost(bare, watched) == [("gemm", "norm", 1)]
    assert edges.touched(bare, watched, ["gemm"]) == []
    assert edges.touched(bare, watched[1:], ["gemm"]) == ["gemm"]
    assert edges.lost(bare, bare) == []

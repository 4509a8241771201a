"""Failure rates are bounded as Clopper and Pearson have it, and never more tightly."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verdicts import decide

from fp4tune.autotune.verdict import bounds, statistics
from fp4tune.autotune.verdict.bounds import Aim, Bound
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.autotune.verdict.rules import INCONCLUSIVE, SAFE
from fp4tune.autotune.verdict.statistics import failure_bound
from fp4tune.cache.rows import BucketKey, Evidence
from fp4tune.words import EXACT

confidences = st.floats(0.5, 0.999)


def at_most(failures: int, trials: int, rate: float) -> float:
    """The probability of so many failures or fewer."""
    return sum(comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(failures + 1))


@settings(deadline=None)
@given(st.integers(1, 10_000_000), confidences)
def test_without_a_failure_it_is_the_closed_form(trials, confidence):
    assert statistics.upper(0, trials, confidence) == pytest.approx(
        1 - (1 - confidence) ** (1 / trials), rel=1e-6
    )
    assert statistics.upper(0, trials, 0.95) == pytest.approx(failure_bound(trials), rel=1e-6)


@settings(deadline=None)
@given(st.integers(1, 200), st.data(), confidences)
def test_a_larger_rate_would_have_shown_more_failures(trials, data, confidence):
    failures = data.draw(st.integers(0, trials - 1))
    rate = statistics.upper(failures, trials, confidence)
    assert at_most(failures, trials, rate) == pytest.approx(1 - confidence, rel=1e-6)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 300), confidences)
def test_it_grows_with_failures_and_shrinks_with_trials(failures, more, confidence):
    trials = failures + more
    rate = statistics.upper(failures, trials, confidence)
    assert rate < statistics.upper(failures + 1, trials, confidence) or failures + 1 > trials
    assert statistics.upper(failures, trials + 1, confidence) < rate


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.001, 0.999), confidences)
def test_it_covers_the_true_rate_as_often_as_it_says(trials, rate, confidence):
    """Summed over all that can happen, and not sampled."""
    covered = sum(
        comb(trials, k) * rate**k * (1 - rate) ** (trials - k)
        for k in range(trials + 1)
        if statistics.upper(k, trials, confidence) >= rate
    )
    assert covered >= confidence - 1e-9


@pytest.mark.parametrize(
    "failures, trials, low, high",
    [(2, 20, 0.012349, 0.316983), (0, 10, 0.0, 0.308497), (10, 10, 0.691503, 1.0)],
)
def test_known_intervals(failures, trials, low, high):
    found = statistics.interval(failures, trials)
    assert found == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


@settings(deadline=None)
@given(st.floats(1e-6, 0.5), confidences)
def test_needed_is_the_fewest_trials_that_reach_a_rate(rate, confidence):
    trials = statistics.needed(rate, confidence)
    assert statistics.upper(0, trials, confidence) <= rate
    assert trials == 1 or statistics.upper(0, trials - 1, confidence) > rate * (1 - 1e-9)


def test_one_in_ten_thousand_takes_thirty_thousand_launches_of_three_hundred_problems():
    assert (Aim(1e-4).launches, Aim(1e-4).problems) == (29956, 300)


@pytest.mark.parametrize(
    "call",
    [
        lambda: statistics.upper(3, 2),
        lambda: statistics.upper(-1, 2),
        lambda: statistics.upper(0, 2, 1.0),
        lambda: Aim(0.0),
        lambda: Aim(1.5),
        lambda: Aim(0.1, 0.0),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match="cannot be|between 0 and 1"):
        call()


# -- pooling


def row(m: int = 1, regime: str = "serial", status: str = "passed", **other) -> Evidence:
    bucket = BucketKey("nvfp4", "bf16", "bf16", 1, m, m, 64, 64)
    values = {"launches": 40, "problems": 10, "data": EXACT, "tactic": "t", **other}
    return Evidence(
        "run", "print", "backend", bucket=bucket, regime=regime, status=status, **values
    )


KERNEL = ("backend", "t", "nvfp4", "bf16", "bf16")


def test_buckets_of_one_kernel_are_pooled_and_regimes_never():
    found = bounds.pool([row(1), row(2), row(4, regime="streams")])
    assert set(found) == {KERNEL}
    assert {r: (b.launches, b.problems) for r, b in found[KERNEL].items()} == {
        "serial": (80, 20),
        "streams": (40, 10),
    }
    assert found[KERNEL]["serial"].upper == statistics.upper(0, 80)


def test_many_launches_of_few_problems_do_not_reach_an_aim():
    few = bounds.pool([row(launches=1_000_000, problems=3)])[KERNEL]["serial"]
    assert few.upper == statistics.upper(0, 1_000_000)
    assert "of 3 different problems only" in str(bounds.short_of_aim("serial", few, Aim(1e-4)))
    many = bounds.pool([row(launches=1_000_000, problems=300)])[KERNEL]["serial"]
    assert bounds.short_of_aim("serial", many, Aim(1e-4)) is None


def test_only_exact_problems_that_passed_or_failed_count():
    rows = [row(data="realistic"), row(status="skipped"), row(status="not exercised")]
    assert bounds.pool(rows) == {}


def test_another_tactic_or_other_machine_code_is_another_kernel():
    assert len(bounds.pool([row(), row(tactic="u")])) == 2
    rows = [row(1, detail={"code": "aa"}), row(1), row(2, detail={"code": "bb"})]
    assert {k[-1]: b["serial"].problems for k, b in bounds.pool(rows).items()} == {
        "aa": 20,
        "bb": 10,
    }


@pytest.mark.parametrize("detail, failures", [({}, 1), ({"bad_launches": 4}, 4)])
def test_failures_are_failing_launches(detail, failures):
    (found,) = bounds.pool([row(), row(2, status="failed", detail=detail)]).values()
    assert found["serial"].failures == failures
    assert found["serial"].upper == statistics.upper(failures, 80)


def test_a_crash_without_a_count_is_one_failing_launch():
    (found,) = bounds.pool([row(status="failed", launches=0, problems=0)]).values()
    assert (found["serial"].failures, found["serial"].upper) == (1, 1.0)


@settings(deadline=None)
@given(st.integers(1, 10_000_000), st.integers(0, 3))
def test_what_is_stored_is_never_smaller_than_what_was_found(problems, failures):
    rate = statistics.upper(min(failures, problems), problems)
    stored = Bound("serial", problems, problems, failures, rate, 0.95).json()["upper"]
    assert rate <= stored <= min(1.0, rate * (1 + 1e-4))


# -- verdicts and budgets


def facts(launches: int) -> list[Evidence]:
    return [
        row(regime=r, launches=launches, problems=launches // 100, width=24)
        for r in PROFILES["strict"].required
    ]


def judged(launches: int, aim: Aim | None):
    rows = facts(launches)
    aims = {"streams": aim, "graph": aim} if aim else {}
    return decide(rows, PROFILES["strict"], bounds.pool(rows)[KERNEL], aims)


def test_a_verdict_says_which_regime_did_not_reach_the_rate():
    verdict = judged(1000, Aim(1e-4))
    assert verdict.status == INCONCLUSIVE
    assert "streams: failure rate bounded by 0.003 only, 0.0001 was asked for" in verdict.reasons
    assert not any(reason.startswith("padding") for reason in verdict.reasons)


def test_a_verdict_that_reached_the_rate_is_safe():
    assert judged(30_000, Aim(1e-4)).status == SAFE
    assert judged(1, None).status == SAFE

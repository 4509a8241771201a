"""A verdict follows from the evidence and the profile, and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from verdicts import decide

from fp4tune.autotune.verdict.profiles import LEFT_OUT, ONE_STREAM, PROFILES, WITHOUT_FORM
from fp4tune.autotune.verdict.rules import INCONCLUSIVE, SAFE, UNSAFE
from fp4tune.autotune.verdict.statistics import failure_bound, median, median_interval
from fp4tune.probes.data import FAMILIES
from fp4tune.words import EXACT, NO_FORM


@dataclass(frozen=True, slots=True)
class Fact:
    regime: str
    data: str
    status: str
    launches: int = 10
    width: int | None = 24
    problems: int = 1
    detail: dict[str, str] = field(default_factory=dict)


STRICT, ENGINE = PROFILES["strict"], PROFILES["sglang"]
STATUSES = ("passed", "failed", "not exercised", "not applicable", "skipped")
REGIMES = STRICT.required
CONDITIONAL = [f for f in FAMILIES.values() if f.condition]

profiles = st.sampled_from(list(PROFILES.values()))
facts = st.lists(
    st.one_of(
        st.builds(
            Fact,
            st.sampled_from([*REGIMES, "timing"]),
            st.just(EXACT),
            st.sampled_from(STATUSES),
            st.integers(1, 1000),
            st.sampled_from([None, 24, 8]),
        ),
        st.builds(
            Fact, st.just("serial"), st.sampled_from(list(FAMILIES)), st.sampled_from(STATUSES)
        ),
    ),
    max_size=12,
)


def proven(profile, **statuses: str) -> list[Fact]:
    """Every required regime passed on exact data and every family, but for those named."""
    named = {key.replace("_", "-"): status for key, status in statuses.items()}
    exact = [Fact(r, EXACT, named.pop(r, "passed")) for r in profile.required]
    families = [Fact("serial", f, named.pop(f, "passed")) for f in FAMILIES]
    return exact + families + [Fact(regime, EXACT, status) for regime, status in named.items()]


@given(facts, profiles, st.randoms())
def test_the_order_of_evidence_does_not_matter(evidence, profile, random):
    shuffled = list(evidence)
    random.shuffle(shuffled)
    one, other = decide(evidence, profile), decide(shuffled, profile)
    assert (one.status, one.width, one.launches) == (other.status, other.width, other.launches)
    assert set(one.conditions) == set(other.conditions)
    assert set(one.reasons) == set(other.reasons)


@given(profiles, st.data())
def test_safe_means_that_every_required_regime_passed(profile, data):
    """Whole evidence with a few rows changed, dropped or added."""
    rows = proven(profile)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(rows) - 1))
        rows[at] = replace(rows[at], status=data.draw(st.sampled_from(STATUSES)))
    for _ in range(data.draw(st.integers(0, 2))):
        rows.pop(data.draw(st.integers(0, len(rows) - 1)))
    judgement = decide(rows, profile)
    if judgement.status == SAFE:
        for regime in profile.required:
            seen = {f.status for f in rows if (f.regime, f.data) == (regime, EXACT)}
            # A regime that the device does not have cannot be run and is said to be so.
            assert seen in ({"passed"}, {"not applicable"})
        assert not any(f.status == "failed" and f.data == EXACT for f in rows) or set(
            judgement.conditions
        )


@given(facts, profiles, st.data())
def test_a_failed_required_regime_is_never_safe(evidence, profile, data):
    regime = data.draw(st.sampled_from(profile.required))
    assert decide([*evidence, Fact(regime, EXACT, "failed")], profile).status == UNSAFE


@given(facts, profiles)
def test_what_is_not_safe_has_a_reason_and_what_is_safe_has_none(evidence, profile):
    judgement = decide(evidence, profile)
    assert bool(judgement.reasons) == (judgement.status != SAFE)


@given(facts, profiles, st.sampled_from(STATUSES))
def test_more_failures_never_make_it_safe(evidence, profile, status):
    before = decide(evidence, profile).status
    worse = [replace(f, status="failed") if f.status == status else f for f in evidence]
    after = decide(worse, profile).status
    assert not (before == UNSAFE and after != UNSAFE and status != "passed")
    assert not (before != SAFE and after == SAFE)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_evidence_that_is_whole_is_safe_without_conditions(profile):
    judgement = decide(proven(profile), profile)
    assert (judgement.status, judgement.conditions, judgement.width) == (SAFE, (), 24)
    assert judgement.launches == 10


def test_nothing_is_not_safe():
    assert decide([], STRICT).status == INCONCLUSIVE


@pytest.mark.parametrize("regime", STRICT.required)
@pytest.mark.parametrize("status", ["skipped", "not exercised"])
def test_a_required_regime_without_a_result_leaves_it_open(regime, status):
    evidence = [replace(f, status=status) if f.regime == regime else f for f in proven(STRICT)]
    assert decide(evidence, STRICT).status == INCONCLUSIVE
    without = [f for f in proven(STRICT) if f.regime != regime]
    assert decide(without, STRICT).status == INCONCLUSIVE


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_regime_left_out_on_purpose_is_a_condition_and_never_excuses_a_result(profile):
    left = ("padding", "churn")
    without = [f for f in proven(profile) if f.regime not in left]
    judgement = decide(without, profile, left_out=left)
    assert (judgement.status, judgement.conditions) == (SAFE, (LEFT_OUT,))
    assert decide(proven(profile), profile, left_out=left).conditions == ()
    failed = proven(profile, padding="failed")
    assert decide(failed, profile, left_out=left).status == UNSAFE
    assert decide(proven(profile, churn="skipped"), profile, left_out=left).status == INCONCLUSIVE


def test_a_regime_the_device_does_not_have_is_no_obstacle():
    assert decide(proven(STRICT, graph="not applicable"), STRICT).status == SAFE


def test_a_regime_that_an_engine_never_uses_may_fail_under_a_condition():
    evidence = proven(STRICT, streams="failed")
    assert decide(evidence, STRICT).status == UNSAFE
    judgement = decide(evidence, ENGINE)
    assert (judgement.status, judgement.conditions) == (SAFE, (ONE_STREAM,))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_failure_in_a_regime_no_profile_speaks_of_is_unsafe(profile):
    assert decide(proven(profile, timing="failed"), profile).status == UNSAFE


@pytest.mark.parametrize("family", [f.name for f in FAMILIES.values() if not f.condition])
def test_data_that_no_condition_excuses_is_unsafe_when_it_fails(family):
    evidence = [replace(f, status="failed") if f.data == family else f for f in proven(ENGINE)]
    assert decide(evidence, ENGINE).status == UNSAFE


@pytest.mark.parametrize("family", CONDITIONAL, ids=lambda f: f.name)
def test_data_outside_a_condition_may_fail_where_its_edge_passed(family):
    evidence = [replace(f, status="failed") if f.data == family.name else f for f in proven(STRICT)]
    judgement = decide(evidence, STRICT)
    assert (judgement.status, judgement.conditions) == (SAFE, (family.condition,))


@pytest.mark.parametrize("family", CONDITIONAL, ids=lambda f: f.name)
@pytest.mark.parametrize("status", [None, "failed", "skipped", "not applicable"])
def test_an_unbounded_condition_is_never_safe(family, status):
    evidence = [replace(f, status="failed") if f.data == family.name else f for f in proven(STRICT)]
    evidence = [f for f in evidence if f.data != family.bounded_by]
    if status:
        evidence.append(Fact("serial", family.bounded_by, status))
    assert decide(evidence, STRICT).status == UNSAFE


def test_data_that_ran_without_a_result_leaves_it_open():
    evidence = [*proven(STRICT), Fact("serial", "realistic", "skipped")]
    assert decide(evidence, STRICT).status == INCONCLUSIVE


def test_launches_are_the_fewest_of_any_regime_and_never_a_sum_over_them():
    evidence = [replace(f, launches=5 if f.regime == "graph" else 90) for f in proven(STRICT)]
    assert decide(evidence, STRICT).launches == 5


def test_what_was_never_graded_is_open():
    evidence = [replace(f, width=None) for f in proven(STRICT)]
    assert decide(evidence, STRICT).status == INCONCLUSIVE


# -- statistics

samples = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40)


@given(samples, st.randoms())
def test_an_interval_holds_the_median_and_lies_within_the_samples(values, random):
    low, high = median_interval(values)
    assert min(values) <= low <= median(values) <= high <= max(values)
    shuffled = list(values)
    random.shuffle(shuffled)
    assert median_interval(shuffled) == (low, high)


@given(st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_an_interval_covers_the_median_as_often_as_it_says(size, confidence):
    """The chance that fewer than `rank` of the samples lie below the median is binomial."""
    low, high = median_interval(range(size), confidence)
    assert low + high == size - 1

    def coverage(rank: int) -> float:
        return 1 - 2 * sum(comb(size, j) for j in range(rank + 1)) * 0.5**size

    if coverage(0) >= confidence:
        assert coverage(int(low)) >= confidence
        narrower = int(low) + 1
        assert narrower > (size - 1) // 2 or coverage(narrower) < confidence + 1e-12
    else:
        assert low == 0


@given(st.integers(1, 10**7), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_bound_is_the_rate_at_which_so_many_successes_are_just_plausible(launches, confidence):
    bound = failure_bound(launches, confidence)
    assert 0 < bound < 1
    assert (1 - bound) ** launches == pytest.approx(1 - confidence, rel=1e-6)
    assert failure_bound(launches + 1, confidence) < bound


def test_no_launches_bound_nothing():
    assert failure_bound(0) == 1.0
    assert failure_bound(3000) == pytest.approx(3 / 3000, rel=0.01)


def test_a_regime_without_a_form_for_experts_is_a_condition_and_no_pass():
    rows = [fact for fact in proven(STRICT) if fact.regime != "churn"]
    left = Fact("churn", EXACT, "not applicable", 0, detail={"note": NO_FORM})
    found = decide([*rows, left], STRICT)
    assert (found.status, found.conditions) == (SAFE, (WITHOUT_FORM,))
    other = replace(left, detail={"note": "a CPU has no streams"})
    assert decide([*rows, other], STRICT).conditions == ()
    assert decide([*rows, left, Fact("churn", EXACT, "failed")], STRICT).status == UNSAFE

"""The choice is the fastest safe candidate, the same on every rank and node."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.autotune.choice.rank import FLOORS, WORTH, by_bucket, choices
from fp4tune.autotune.publication.publish import unnamed
from fp4tune.cache.measured import NOISE
from fp4tune.cache.rows import VERDICTS, BucketKey, Candidate

FLOOR = "torch-dequant"
NAMES = ("alpha", "beta", "gamma", FLOOR)
ZERO = BucketKey("nvfp4", "bf16", "bf16", 1, 0, 0, 256, 512)
ONE = replace(ZERO, m_lo=1, m_hi=1)
FEW = replace(ZERO, m_lo=2, m_hi=4)


def candidate(backend, verdict="safe", median_us=10.0, bucket=ONE) -> Candidate:
    print_ = backend[0] * 64
    return Candidate(
        "sm90", "H200", "strict", bucket, backend, "default", backend, verdict,
        median_us=median_us, launches=7, fingerprint=print_,
    )  # fmt: skip


groups = st.lists(
    st.builds(
        candidate,
        st.sampled_from(NAMES),
        st.sampled_from(VERDICTS),
        st.one_of(st.none(), st.floats(1, 100)),
    ),
    min_size=1,
    max_size=len(NAMES),
    unique_by=lambda c: c.backend,
)


def only(candidates, default=None):
    (chosen,), placed = choices(candidates, default)
    return chosen, placed


@given(groups)
def test_only_what_is_safe_and_timed_is_chosen(group):
    chosen, _ = only(group)
    able = [c for c in group if c.verdict == "safe" and c.median_us is not None]
    if not able:
        assert chosen.status == "none"
        return
    assert chosen.backend in {c.backend for c in able}
    assert chosen.status == ("floor" if chosen.backend in FLOORS else "safe")
    assert chosen.median_us <= min(c.median_us for c in able) * (1 + NOISE)


@given(groups, st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_candidates(group, random):
    shuffled = list(group)
    random.shuffle(shuffled)
    one, placed = only(group)
    other, placed_other = only(shuffled)
    assert one.status == other.status
    if one.status != "none":
        assert one == other
    assert {c.backend: c.rank for c in placed} == {c.backend: c.rank for c in placed_other}


@given(groups)
def test_ranks_count_those_that_may_be_chosen_from_the_best(group):
    chosen, placed = only(group)
    ranked = sorted((c for c in placed if c.rank is not None), key=lambda c: c.rank)
    assert [c.rank for c in ranked] == list(range(len(ranked)))
    assert all(c.verdict == "safe" and c.median_us is not None for c in ranked)
    if ranked:
        assert ranked[0].backend == chosen.backend
    assert [replace(c, rank=None) for c in placed] == group


@given(st.permutations(NAMES[:3]))
def test_within_the_noise_a_fixed_order_decides(names):
    times = dict(zip(NAMES[:3], (10.05, 10.0, 10.09), strict=True))
    chosen, _ = only([candidate(name, median_us=times[name]) for name in names])
    assert chosen.backend == "alpha"


def test_beyond_the_noise_the_faster_one_wins():
    pair = [candidate("alpha", median_us=10.3), candidate("beta", median_us=10.0)]
    assert only(pair)[0].backend == "beta"


@pytest.mark.parametrize("verdict", ["unsafe", "unsupported", "inconclusive"])
def test_the_fastest_is_passed_over_when_it_is_not_safe(verdict):
    group = [candidate("alpha", verdict, 1.0), candidate("beta"), candidate(FLOOR, median_us=50.0)]
    chosen, placed = only(group)
    assert (chosen.backend, chosen.status) == ("beta", "safe")
    assert {c.backend: c.rank for c in placed} == {"alpha": None, "beta": 0, FLOOR: 1}


def test_the_floor_is_left_where_nothing_else_is_safe():
    chosen, _ = only([candidate("alpha", "unsafe", 1.0), candidate(FLOOR, median_us=50.0)])
    assert (chosen.backend, chosen.status) == (FLOOR, "floor")


def test_with_nothing_safe_there_is_no_choice_and_no_condition():
    unsafe = replace(candidate("alpha", "unsafe"), conditions=({"id": "x", "text": "y"},))
    chosen, placed = only([unsafe])
    assert chosen.status == "none" and chosen.conditions == ()
    assert all(c.rank is None for c in placed)


def test_an_empty_batch_follows_the_smallest_real_one():
    def group(bucket, alpha, beta):
        return [
            candidate("alpha", median_us=alpha, bucket=bucket),
            candidate("beta", median_us=beta, bucket=bucket),
        ]

    rows = group(ZERO, None, None) + group(FEW, 1.0, 9.0) + group(ONE, 9.0, 1.0)
    chosen, _ = choices(rows, None)
    assert {c.bucket.m_hi: c.backend for c in chosen} == {0: "beta", 1: "beta", 4: "alpha"}


def test_an_empty_batch_takes_nothing_that_is_unsafe_for_it():
    rows = [
        candidate("alpha", "unsafe", None, ZERO),
        candidate("beta", "safe", None, ZERO),
        candidate("alpha", median_us=1.0),
        candidate("beta", median_us=9.0),
    ]
    chosen, _ = choices(rows, None)
    assert {c.bucket.m_hi: c.backend for c in chosen} == {0: "beta", 1: "alpha"}


def test_the_engine_s_own_default_is_recorded_beside_the_choice():
    chosen, _ = only([candidate("beta")], default="marlin")
    assert chosen.default_backend == "marlin"


def test_candidates_are_grouped_by_bucket():
    rows = [candidate("alpha"), candidate("alpha", bucket=FEW), candidate("beta")]
    groups = by_bucket(rows)
    assert {b.m_hi: [c.backend for c in g] for b, g in groups.items()} == {
        1: ["alpha", "beta"],
        4: ["alpha"],
    }


# -- the promise of the noise band


times_ = st.lists(st.floats(10, 11), min_size=1, max_size=3)


@given(times_, st.lists(st.floats(-0.005, 0.005), min_size=6, max_size=6))
def test_what_two_nodes_choose_differs_by_no_more_than_the_band_and_their_noise(true, errors):
    """Each node measures every time with an error of its own."""
    nodes = [
        [candidate(n, median_us=t * (1 + e)) for n, t, e in zip(NAMES, true, mine, strict=False)]
        for mine in (errors[:3], errors[3:])
    ]
    first, second = (true[NAMES.index(only(node)[0].backend)] for node in nodes)
    worst = (1 + NOISE) * (1 + 0.005) / (1 - 0.005)
    assert max(first, second) <= min(true) * worst * (1 + 1e-9)
    assert max(first, second) / min(first, second) <= worst * (1 + 1e-9) < 1.0203


@given(st.permutations(NAMES[:3]), st.lists(st.floats(0, NOISE / 2.1), min_size=3, max_size=3))
def test_noise_inside_the_band_changes_nothing_among_equals(names, errors):
    """As long as all stay within it, whatever is measured."""
    group = [candidate(n, median_us=10 * (1 + e)) for n, e in zip(names, errors, strict=True)]
    assert only(group)[0].backend == "alpha"


def test_of_equals_the_engine_s_default_is_taken():
    group = [candidate("alpha"), candidate("beta"), candidate("gamma", median_us=10.05)]
    assert only(group, default="gamma")[0].backend == "gamma"
    assert only(group, default="somebody-else")[0].backend == "alpha"


# -- a choice that stands


def stood(backend, median_us, status="safe"):
    chosen, _ = only([candidate(backend, median_us=median_us)])
    return replace(chosen, status=status)


@pytest.mark.parametrize(("new_us", "taken"), [(9.8, "beta"), (9.71, "beta"), (9.69, "alpha")])
def test_a_standing_choice_is_replaced_only_by_what_is_3_percent_faster(new_us, taken):
    group = [candidate("alpha", median_us=new_us), candidate("beta", median_us=10.0)]
    (chosen,), placed = choices(group, None, [stood("beta", 10.0)])
    assert chosen.backend == taken
    assert {c.backend: c.rank for c in placed}[taken] == 0
    assert sorted(c.rank for c in placed) == [0, 1]


@pytest.mark.parametrize("now", ["unsafe", "inconclusive"])
def test_a_standing_choice_that_is_no_longer_safe_stands_no_more(now):
    group = [candidate("alpha", median_us=12.0), candidate("beta", now, 10.0)]
    (chosen,), _ = choices(group, None, [stood("beta", 10.0)])
    assert chosen.backend == "alpha"


def test_a_floor_taken_for_want_of_better_does_not_stand():
    group = [candidate("alpha", median_us=9.9), candidate(FLOOR, median_us=10.0)]
    (chosen,), _ = choices(group, None, [stood(FLOOR, 10.0, "floor")])
    assert chosen.backend == "alpha"


@given(groups, st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from(VERDICTS))
def test_never_slower_than_a_safe_default_and_never_far_from_the_fastest(
    group, default, standing, was
):
    before = [stood(standing, 10.0)] if was == "safe" else []
    (chosen,), _ = choices(group, default, before)
    able = {c.backend: c.median_us for c in group if c.verdict == "safe" and c.median_us}
    if not able:
        return
    mine = able[chosen.backend]
    assert mine * (1 - WORTH) < min(able.values()) * (1 + 1e-9) or mine <= min(able.values()) * (
        1 + NOISE
    )
    if default in able:
        assert mine <= able[default] * (1 + NOISE) * (1 + 1e-9)


# -- what is not told apart, and what an engine cannot name


def timed(backend, us, half, **other) -> Candidate:
    return replace(candidate(backend, median_us=us, **other), lo_us=us - half, hi_us=us + half)


@given(st.permutations(("alpha", "beta", "gamma")), st.floats(0.5, 3.0))
def test_times_that_are_not_told_apart_are_equal_whichever_came_out_ahead(names, noise):
    """As nodes with the same three backends would see them on a noisy machine."""
    group = [timed(name, 10.0 + i * noise / 3, noise) for i, name in enumerate(names)]
    assert only(group)[0].backend == "alpha"


def test_times_that_are_told_apart_are_not_equal():
    assert only([timed("alpha", 12.0, 0.5), timed("beta", 10.0, 0.5)])[0].backend == "beta"


def test_what_looks_slower_than_the_default_does_not_come_before_it():
    group = [timed("alpha", 12.0, 3.0), timed("beta", 10.0, 0.1), timed("gamma", 10.5, 0.1)]
    assert only(group, "gamma")[0].backend == "beta"


def test_a_standing_choice_stays_until_another_is_told_apart():
    stands = [stood("beta", 10.0)]
    near = [timed("alpha", 9.0, 1.0), timed("beta", 10.0, 1.0)]
    far = [timed("alpha", 9.0, 0.1), timed("beta", 10.0, 0.1)]
    assert [choices(group, None, stands)[0][0].backend for group in (near, far)] == [
        "beta",
        "alpha",
    ]


def test_what_an_engine_cannot_name_is_listed_and_not_chosen():
    group = [candidate("alpha", median_us=1.0), candidate("beta"), candidate(FLOOR, median_us=50.0)]
    (chosen,), placed = choices(group, None, (), lambda c: c.backend != "beta")
    assert chosen.backend == "beta"
    assert {c.backend: c.rank for c in placed} == {"alpha": None, "beta": 0, FLOOR: 1}


@pytest.mark.parametrize(
    ("profile", "backend", "sm", "barred"),
    [
        ("strict", "triton-w4a16", 90, False),
        ("sglang", "triton-w4a16", 90, True),
        ("sglang", "marlin", 90, False),
        ("sglang", "humming", 90, True),
        ("vllm", "humming", 90, False),
        ("vllm", "flashinfer-cute-dsl", 120, True),
    ],
)
def test_only_an_engines_profile_asks_for_names(profile, backend, sm, barred):
    assert unnamed(profile, sm, candidate(backend)) == barred


def test_a_floor_that_an_engine_cannot_name_comes_last_however_fast():
    group = [candidate("beta", median_us=10.0), candidate(FLOOR, median_us=1.0)]
    (chosen,), placed = choices(group, None, (), lambda c: c.backend == FLOOR)
    assert chosen.backend == "beta" and {c.backend: c.rank for c in placed} == {"beta": 0, FLOOR: 1}
    alone = [candidate("beta", "unsafe"), candidate(FLOOR, median_us=1.0)]
    (chosen,), _ = choices(alone, None, (), lambda c: c.backend == FLOOR)
    assert (chosen.backend, chosen.status) == (FLOOR, "floor")

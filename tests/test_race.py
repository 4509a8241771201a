"""The race keeps the fastest, drops what is slower in few samples, and always says the same."""

from __future__ import annotations

import random
from math import exp
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.autotune import clock_stability
from fp4tune.autotune.race import AT_ONCE, DOUBT, LEAST, PRECISE, QUICK, SETTLED, Race, run_races
from fp4tune.autotune.verdict.buckets import MRange
from fp4tune.autotune.verdict.statistics import mean_interval, median, t_quantile
from fp4tune.cache.measured import NOISE

NAMES = tuple("abcdef")
seeds = st.integers(0, 2**32)
fields = st.lists(st.floats(1, 3), min_size=1, max_size=6)
"""True times of a bucket's candidates."""


class Device:
    """Samples with noise of each, and a clock that wanders and jumps, common to all of a round."""

    def __init__(self, times, noise: float, seed: int, drift: float = 0.0) -> None:
        self.times = dict(zip(NAMES, times, strict=False))
        self.noise, self.drift = noise, drift
        self.random = random.Random(seed)
        self.clock = 1.0
        self.taken = 0

    def round(self, names) -> dict[str, float]:
        self.clock *= exp(self.drift * self.random.gauss(0, 1))
        self.taken += len(names)
        return {
            n: self.times[n] * self.clock * exp(self.random.gauss(0, self.noise)) for n in names
        }


def run(times, noise=0.004, seed=1, drift=0.0, rounds=9, **other) -> tuple[Race, Device]:
    device = Device(times, noise, seed, drift)
    race = Race(NAMES[: len(times)], rounds, **other)
    while not race.over:
        race.add(device.round(race.alive))
    return race, device


# -- Student's t


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 8, 2.3060), (0.995, 4, 4.6041)],
)
def test_quantiles_are_those_of_the_tables(probability, freedom, value):
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=1e-4)


def test_with_many_values_it_is_the_normal_distribution():
    assert t_quantile(0.975, 10**6) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-4)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng = random.Random(4)
    hits = 0
    for _ in range(2000):
        low, high = mean_interval([rng.gauss(0, 1) for _ in range(4)], 0.9)
        hits += low <= 0 <= high
    assert 0.88 < hits / 2000 < 0.92


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert mean_interval([1.0], 0.95) == (float("-inf"), float("inf"))
    with pytest.raises(ValueError, match="no mean"):
        mean_interval([], 0.95)
    with pytest.raises(ValueError, match="confidence"):
        mean_interval([1.0, 2.0], 1.0)


# -- elimination


@given(fields, seeds, st.floats(0, 0.02), st.floats(0, 0.1))
def test_without_noise_of_its_own_the_fastest_is_always_kept(times, seed, noise, drift):
    """A drift that is common to all of a round is no reason to drop anybody."""
    race, _ = run(times, 0.0, seed, drift)
    best = min(times)
    assert any(times[NAMES.index(name)] == best for name in race.alive)
    assert all(times[NAMES.index(name)] <= best * (1 + NOISE) * (1 + 1e-9) for name in race.alive)


@pytest.mark.slow
def test_the_fastest_is_dropped_no_more_often_than_stated():
    """Where it is hardest: many that are as fast, much noise, few rounds; and all out by chance."""
    lost = 0
    for seed in range(400):
        race, _ = run([1.0] * 6, noise=0.05, seed=seed, drift=0.05, band=0.0)
        lost += "a" not in race.alive
    assert lost / 400 <= DOUBT


def test_the_band_makes_that_rarer_still():
    lost = sum("a" not in run([1.0, 1.02, 1.03], 0.02, s, 0.05)[0].alive for s in range(300))
    assert lost / 300 <= DOUBT / 2


@settings(max_examples=30)
@given(seeds)
def test_what_is_much_slower_costs_few_samples(seed):
    race, device = run([1.0, 1.2, 2.0, 4.0], noise=0.003, seed=seed, drift=0.01)
    assert race.alive == ["a"]
    assert len(race.samples["c"]) == len(race.samples["d"]) == QUICK
    assert len(race.samples["b"]) <= LEAST + 1
    assert device.taken < 9 * 4 / 2


def test_those_who_stay_have_an_interval_and_equals_end_it_early():
    race, _ = run([1.0, 1.001, 1.002], noise=0.001, rounds=15)
    assert sorted(race.alive) == ["a", "b", "c"]
    assert all(len(samples) == SETTLED for samples in race.samples.values())
    assert race.margin is not None and race.margin <= PRECISE and not race.open_question


def test_at_the_cap_what_is_not_told_apart_is_an_open_question():
    race, _ = run([1.0, 1.01], noise=0.1, rounds=5)
    assert all(len(samples) == 5 for samples in race.samples.values())
    assert race.open_question and race.margin is not None and race.margin > NOISE
    assert "with --level soak" in clock_stability.undecided(5, race.margin)


@given(fields, seeds)
def test_the_same_samples_give_the_same_outcome_in_any_order_of_names(times, seed):
    one, _ = run(times, 0.01, seed)
    other, _ = run(times, 0.01, seed)
    assert (one.alive, one.samples, one.margin) == (other.alive, other.samples, other.margin)
    turned = Race(NAMES[: len(times)][::-1], 9)
    for i in range(max(map(len, one.samples.values()))):
        turned.add({n: s[i] if i < len(s) else 1e9 for n, s in one.samples.items()})
    assert sorted(turned.alive) == sorted(one.alive)


def test_a_line_is_measured_to_the_end_and_drops_nobody():
    race, _ = run([1.0, 50.0, 51.0], lines=frozenset({"a"}))
    assert race.alive == ["a", "b"] or race.alive == ["a", "b", "c"]
    assert race.leader == "b"
    assert len(race.samples["a"]) == len(race.samples["b"]) >= SETTLED


def test_one_whose_worker_is_lost_leaves_the_others_in():
    race = Race(("a", "b"), 9)
    race.add({"a": 1.0, "b": 2.0})
    race.drop("a")
    assert race.alive == ["b"] and race.leader == "b" and "a" not in race.samples
    race.drop("b")
    assert race.over and race.leader is None
    assert Race((), 9).over


def test_who_left_early_is_levelled_by_the_drift_since():
    race = Race(("a", "b"), 9)
    for turn in range(9):
        warm = 1.0 if turn < QUICK else 1.1
        race.add({name: t * warm for name, t in (("a", 10.0), ("b", 30.0)) if name in race.alive})
        if race.over:
            break
    assert race.samples["b"] == [30.0, 30.0]
    assert race.levelled("b") == pytest.approx([33.0, 33.0])
    assert race.levelled("a") == race.samples["a"]


# -- the winner among tactics


@given(fields, seeds)
def test_the_first_tactic_within_the_band_is_taken(times, seed):
    race, _ = run(times, 0.002, seed, band=NOISE / 2)
    names = NAMES[: len(times)]
    taken = race.winner
    found = {name: median(race.samples[name]) for name in race.alive}
    assert found[taken] <= min(found.values()) * (1 + NOISE / 2)
    earlier = [n for n in names[: names.index(taken)] if n in found]
    assert all(found[n] > min(found.values()) * (1 + NOISE / 2) for n in earlier)


# -- who is sampled when


def race_all(count: int, times=(1.0, 1.01, 3.0)) -> tuple[dict, list]:
    """Races of `count` ranges between three workers, one of them slow; and what was asked."""
    ranges = [MRange(m, m) for m in range(1, count + 1)]
    races = {m: Race(NAMES[: len(times)], 9) for m in ranges}
    places = {(m, name): (name, i) for i, m in enumerate(ranges) for name in NAMES[: len(times)]}
    devices = {
        name: Device((t,), 0.003, i) for i, (name, t) in enumerate(zip(NAMES, times, strict=False))
    }
    asked: list[tuple[str, list[int]]] = []

    def ask(name: str, indices: list[int]):
        asked.append((name, list(indices)))
        return [devices[name].round("a")["a"] for _ in indices]

    run_races(races, places, ask)
    return races, asked


def test_candidates_take_turns_and_no_message_is_for_one_sample_where_more_are_wanted():
    races, asked = race_all(AT_ONCE)
    assert [name for name, _ in asked[:3]] == ["a", "b", "c"]
    assert [name for name, _ in asked[3:6]] == ["c", "b", "a"]
    assert asked[0][1] == [0, 1, 2, 3] and asked[3][1] == [3, 2, 1, 0]
    assert all(race.alive and "c" not in race.alive for race in races.values())
    assert len([name for name, _ in asked if name == "c"]) == QUICK


def test_many_ranges_are_sampled_a_few_at_a_time():
    _, asked = race_all(2 * AT_ONCE + 1)
    assert max(len(indices) for _, indices in asked) == AT_ONCE
    assert [name for name, _ in asked[:6]] == ["a", "b", "c"] * 2


def test_a_lost_worker_is_asked_no_more_and_the_others_finish():
    ranges = [MRange(m, m) for m in range(1, 7)]
    races = {m: Race(("a", "b"), 9) for m in ranges}
    places = {(m, name): (name, i) for i, m in enumerate(ranges) for name in "ab"}
    calls: list[str] = []

    def ask(name: str, indices: list[int]):
        calls.append(name)
        return None if name == "b" and len(calls) > 3 else [1.0] * len(indices)

    run_races(races, places, ask)
    assert all(race.alive == ["a"] and len(race.samples["a"]) == SETTLED for race in races.values())
    assert calls.count("b") == 2


# -- an unsteady device says so


BUSY = {"sm_mhz": 1980, "slowed": []}


@pytest.mark.parametrize("seen", [[], [{}], [BUSY, BUSY], [BUSY, {"sm_mhz": 1965, "slowed": []}]])
def test_a_steady_device_says_nothing(seen):
    assert clock_stability.unsteady(seen) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"sm_mhz": 1500, "slowed": []}, "changed its clock (SM clock 1500 to 1980 MHz)"),
        ({"sm_mhz": 1980, "slowed": ["SwPowerCap"]}, "held its clock back (SwPowerCap, SM clock"),
        ({"sm_mhz": None, "slowed": ["HwThermalSlowdown"]}, "HwThermalSlowdown"),
    ],
)
def test_an_unsteady_one_says_what_it_did_and_the_remedy(other, words):
    said = clock_stability.unsteady([BUSY, other])
    assert said is not None and words in said and "nvidia-smi -lgc" in said and "\n" not in said


def test_a_device_is_looked_at_now_and_then_and_at_the_end():
    asked: list[int] = []

    def ask() -> dict:
        asked.append(1)
        return {**BUSY, "look": len(asked)}

    watch = clock_stability.Watch(ask)
    for _ in range(50):
        watch.look()
    watch.look(now=True)
    assert len(asked) == 2
    assert watch.device["before"]["look"] == 1 and watch.device["after"]["look"] == 2
    assert clock_stability.Watch(dict).device == {}

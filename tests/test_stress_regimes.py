"""What a calm launch hides: each regime shows its own mechanism, and no regime blames the good."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rogues
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import layouts
from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.item import Item
from fp4tune.probes.problem import NVFP4, Device, Problem
from fp4tune.probes.regimes import REGIMES, Budget, NotApplicable
from fp4tune.probes.regimes.concurrent import lanes
from fp4tune.probes.regimes.concurrent._neighbour import GO, PAUSE
from fp4tune.probes.regimes.concurrent.neighbours import Neighbour
from fp4tune.probes.regimes.leaks import CallSeries, grows, leaks
from fp4tune.probes.regimes.plain.huge import past
from fp4tune.probes.worker.session import OpenLayer
from fp4tune.probes.zoo import good

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = Problem("nvfp4", 40, 192, 256)
W4A4 = Problem("nvfp4", 40, 192, 256, "fp4")
BUDGET = Budget(2, 4, 0.02)
ON_CPU = ("rewrite", "padding", "strided", "off-bucket", "churn")
EVERY = (*ON_CPU, "serial")


def run(regime: str, backend: Any, ms=(1, 2, 7, 32), problem: Problem = PROBLEM, budget=BUDGET):
    drawn = [case(backend, problem, exact(problem, 24, seed, "cpu")) for seed in (1, 2)]
    launches = [Launch(i % 2, 5, m, "default", i) for i, m in enumerate(ms)]
    return REGIMES[regime](backend, drawn, launches, budget)


def caught(outcome) -> bool:
    return bool(outcome.errors) or not all(report.clean for _, report in outcome.reports)


def seen_by(backend: type, **how: Any) -> set[str]:
    return {regime for regime in EVERY if caught(run(regime, backend(), **how))}


# -- the good


class Quantised(rogues.Good):
    """W4A4: takes the activation in the 128x4 layout and reads real rows and columns only."""

    activation = "fp4"

    def prepare_activation(self, a):
        return a.codes, layouts.swizzle_128x4(a.scales), a.global_scale, a.scales.shape

    def run(self, state, a, out, tactic):
        codes, swizzled, global_scale, shape = a
        scales = layouts.unswizzle_128x4(swizzled, *shape)
        tensor = type(state.tensor)(NVFP4, codes, scales, global_scale)
        self.floor.run(state, tensor, out, "fp32")

    def unsupported(self, problem, device):
        return None


@pytest.mark.parametrize("regime", ON_CPU)
@pytest.mark.parametrize(
    "make",
    [rogues.Good, rogues.RoundsAlpha, lambda: good.OwnBuffer("own"), lambda: good.InFp64("slow")],
)
def test_the_good_pass_and_the_regime_was_exercised(regime, make):
    outcome = run(regime, make(), (0, 1, 2, 7, 32))
    assert not caught(outcome) and not outcome.changed_inputs and not outcome.exempt
    assert outcome.not_exercised is None and not outcome.graded
    assert {launch.item for launch, _ in outcome.reports} == {0, 1, 2, 3, 4}
    assert outcome.repeats >= 2 and outcome.proof


@pytest.mark.parametrize("regime", ON_CPU)
def test_fp4_activations_pass_too(regime):
    outcome = run(regime, Quantised(), (0, 1, 2, 7, 32), W4A4)
    assert not caught(outcome) and not outcome.errors and outcome.not_exercised is None


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.sampled_from(ON_CPU))
def test_any_m_up_to_the_whole_pool(ms, regime):
    drawn = [case(rogues.Good(), PROBLEM, exact(PROBLEM, 24, 3, "cpu"))]
    launches = [Launch(0, PROBLEM.m - m, m, "default", i) for i, m in enumerate(ms)]
    outcome = REGIMES[regime](rogues.Good(), drawn, launches, Budget(1, 1, 0.0))
    assert not caught(outcome) and outcome.not_exercised is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("regime", ["regrow", "threads", "neighbours", "huge"])
def test_what_a_cpu_does_not_have(regime):
    with pytest.raises(NotApplicable, match="CPU"):
        run(regime, rogues.Good())


# -- what each shows


class StaleActivation(rogues.Good):
    """Keeps a converted copy of the activation by its address."""

    def __init__(self):
        super().__init__()
        self.copies: dict[tuple, torch.Tensor] = {}

    def run(self, state, a, out, tactic):
        key = (a.data_ptr(), tuple(a.shape), id(state))
        a = self.copies.setdefault(key, a.clone())
        super().run(state, a, out, tactic)


def test_a_copy_kept_by_address_shows_where_the_data_change():
    assert "rewrite" in seen_by(StaleActivation)
    assert not caught(run("serial", StaleActivation()))


class StaleScales(Quantised):
    """Keeps decoded block scales of the activation by their address."""

    kept: dict[int, torch.Tensor]

    def run(self, state, a, out, tactic):
        if not hasattr(self, "kept"):
            self.kept = {}
        codes, swizzled, global_scale, shape = a
        kept = self.kept.setdefault(swizzled.data_ptr(), swizzled.clone())
        super().run(state, (codes, kept, global_scale, shape), out, tactic)


def test_stale_scales_of_an_fp4_activation_show():
    assert caught(run("rewrite", StaleScales(), problem=W4A4))
    assert not caught(run("serial", StaleScales(), problem=W4A4))


class AmaxOfAllRows(rogues.Good):
    """Scales by the largest magnitude of all rows, and back."""

    def run(self, state, a, out, tactic):
        if a.shape[0]:
            power = torch.exp2(a.abs().amax().float().clamp(min=1).log2().ceil())
            a = ((a.float() / power).to(a.dtype).float() * power).to(a.dtype)
        super().run(state, a, out, tactic)


class ReadsWholeTiles(rogues.Good):
    """Looks at the activation in tiles of 16 rows, and at what lies behind the last of them."""

    def run(self, state, a, out, tactic):
        rows = -(-a.shape[0] // 16) * 16
        held = a.untyped_storage().nbytes() // 2 - a.storage_offset()
        if a.shape[0] and a.is_contiguous() and held >= rows * a.shape[1]:
            tiles = a.as_strided((rows, a.shape[1]), (a.shape[1], 1))
            a = a + 0 * tiles.float().sum().to(a.dtype)
        super().run(state, a, out, tactic)


class SumsPaddedScales(Quantised):
    """Multiplies by a sum over all scales, padding included, divided by itself."""

    def run(self, state, a, out, tactic):
        from fp4tune.probes.formats import decode_scale

        codes, swizzled, global_scale, shape = a
        total = decode_scale(swizzled, "e4m3").sum()
        one = torch.where(total == 0, 1.0, total / total)
        super().run(state, (codes, swizzled, global_scale * one, shape), out, tactic)


@pytest.mark.parametrize(
    "rogue, problem",
    [(AmaxOfAllRows, PROBLEM), (ReadsWholeTiles, PROBLEM), (SumsPaddedScales, W4A4)],
)
def test_what_reads_padding_shows_where_the_padding_is_poison(rogue, problem):
    outcome = run("padding", rogue(), problem=problem)
    assert caught(outcome)
    assert not caught(run("serial", rogue(), problem=problem))
    if problem is W4A4:
        assert outcome.proof["scale_padding_bytes"] > 0


class SplitK(rogues.Good):
    """Adds parts up in a workspace that it takes for zeroed."""

    def run(self, state, a, out, tactic):
        workspace = torch.empty(*out.shape, dtype=torch.float32)
        workspace += self.product(state, a, out.shape[1]).float() - workspace.nan_to_num()
        workspace += workspace.isnan() * 0
        out.copy_(workspace)


class PadsWithWhatIsThere(rogues.Good):
    """Leaves what pads its copy of the weight unwritten, and lets it reach the result."""

    def prepare(self, weight, problem):
        rows = -(-problem.n // 128) * 128
        padded = torch.empty(rows, problem.k, dtype=torch.bfloat16)
        padded[: problem.n] = 0
        return super().prepare(weight, problem), padded

    def run(self, state, a, out, tactic):
        weight, padded = state
        super().run(weight, a, out, tactic)
        out += (0 * padded.float().sum()).nan_to_num(posinf=0, neginf=0, nan=1)


@pytest.mark.parametrize("rogue", [SplitK, PadsWithWhatIsThere])
def test_memory_taken_for_zeroed_shows_where_it_is_poison(rogue):
    assert caught(run("churn", rogue()))


class PlanByInput(rogues.Good):
    """Remembers where the output of an activation was, and writes there again."""

    def __init__(self):
        super().__init__()
        self.places: dict[int, torch.Tensor] = {}

    def run(self, state, a, out, tactic):
        key = hash((id(state), a.shape[0], float(a.float().sum())))
        super().run(state, a, self.places.setdefault(key, out), tactic)


def test_an_output_that_moved_shows():
    assert caught(run("churn", PlanByInput()))
    assert not caught(run("serial", PlanByInput()))


class IgnoresStrides(rogues.Good):
    def run(self, state, a, out, tactic):
        m, k = a.shape
        if m:
            a = a.as_strided((m, k), (k, 1))
        super().run(state, a, out, tactic)


class WantsContiguous(rogues.Good):
    def run(self, state, a, out, tactic):
        if not a.is_contiguous() or a.data_ptr() % 32:
            raise ValueError("the activation must be contiguous and aligned")
        super().run(state, a, out, tactic)


def test_strides_ignored_are_a_failure_and_strides_refused_are_not():
    assert seen_by(IgnoresStrides) == {"strided"}
    outcome = run("strided", WantsContiguous(), (2, 8))
    assert not caught(outcome)
    assert set(outcome.exempt) <= {0, 1} and "contiguous" in outcome.proof["reason"]


# -- many different m


class Leaks(rogues.Good):
    """Keeps something of every call, or of every new m."""

    def __init__(self, size: int, each_m: bool = False):
        super().__init__()
        self.size, self.each_m = size, each_m
        self.kept: dict[Any, torch.Tensor] = {}

    def run(self, state, a, out, tactic):
        key = a.shape[0] if self.each_m else len(self.kept)
        if key not in self.kept:
            self.kept[key] = torch.empty(self.size, dtype=torch.uint8)
        super().run(state, a, out, tactic)


def many(backend, ms=((1, 40),), budget=BUDGET):
    drawn = [case(backend, PROBLEM, exact(PROBLEM, 24, seed, "cpu")) for seed in (1, 2)]
    items = enumerate(ms)
    launches = [Launch(i % 2, 0, m, "default", i) for i, pair in items for m in pair]
    return REGIMES["off-bucket"](backend, drawn, launches, budget)


@pytest.mark.parametrize("size, each_m", [(1 << 20, True), (1 << 20, False), (8192, False)])
def test_a_leak_is_found(size, each_m):
    outcome = many(Leaks(size, each_m))
    assert {error["kind"] for error in outcome.errors.values()} == {"host leak"}
    assert "KiB" in outcome.errors[0]["message"]


class KeepsMaps(rogues.Good):
    def __init__(self):
        super().__init__()
        self.kept: list[mmap.mmap] = []

    def run(self, state, a, out, tactic):
        self.kept.append(mmap.mmap(-1, 1 << 16))
        super().run(state, a, out, tactic)


def test_address_space_that_stays_of_each_call_is_a_leak():
    backend = KeepsMaps()
    outcome = many(backend)
    for each in backend.kept:
        each.close()
    assert outcome.errors[0]["kind"] == "host leak" and "mapped" in outcome.errors[0]["message"]


def test_a_cache_that_fills_up_is_no_leak():
    outcome = many(Leaks(4096, each_m=True))
    assert not outcome.errors and outcome.proof["new_m"] >= 30


class KeepsHandles(rogues.Good):
    """Opens a file, or starts a thread, in every call, `most` at most; `close` ends them all."""

    def __init__(self, what, most):
        super().__init__()
        self.what, self.most = what, most
        self.kept: list[Any] = []
        self.over = threading.Event()

    def run(self, state, a, out, tactic):
        if len(self.kept) < self.most:
            if self.what == "threads":
                self.kept.append(threading.Thread(target=self.over.wait, daemon=True))
                self.kept[-1].start()
            else:
                self.kept.append(os.open(os.devnull, os.O_RDONLY))
        super().run(state, a, out, tactic)

    def close(self):
        self.over.set()
        for each in self.kept:
            each.join() if self.what == "threads" else os.close(each)


@pytest.mark.parametrize("what", ["open files", "threads"])
def test_files_and_threads_that_stay_of_each_call_are_a_leak(what):
    backend = KeepsHandles(what, 5000)
    try:
        outcome = many(backend)
    finally:
        backend.close()
    assert outcome.errors[0]["kind"] == "host leak"
    assert what in outcome.errors[0]["message"] or "KiB" in outcome.errors[0]["message"]


@pytest.mark.parametrize("what", ["open files", "threads"])
def test_a_pool_of_them_is_none(what):
    backend = KeepsHandles(what, 100)
    try:
        assert not many(backend).errors
    finally:
        backend.close()


class PlansForEachM(rogues.Good):
    def __init__(self):
        super().__init__()
        self.known: set[int] = set()

    def run(self, state, a, out, tactic):
        if a.shape[0] not in self.known:
            self.known.add(a.shape[0])
            time.sleep(0.012)
        super().run(state, a, out, tactic)


def test_a_plan_for_each_m_is_told_and_is_no_fault():
    outcome = many(PlansForEachM())
    assert not caught(outcome)
    assert [found["kind"] for found in outcome.graded] == ["plan per m"]


def test_every_m_of_a_range_has_a_chance_once_and_stays_in_its_item():
    outcome = many(rogues.Good(), ((0, 0), (1, 1), (2, 8), (9, 40)))
    assert not caught(outcome)
    ranges = {0: (0, 0), 1: (1, 1), 2: (2, 8), 3: (9, 40)}
    ms = [launch.m for launch, _ in outcome.reports]
    assert len(set(ms)) > 30 and {0, 1, 40} <= set(ms)
    for launch, _ in outcome.reports:
        low, high = ranges[launch.item]
        assert low <= launch.m <= high


class WrongAtOneM(rogues.Good):
    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        if a.shape[0] == 23:
            out[5] += 1


def test_an_m_between_those_asked_for_is_run():
    outcome = many(WrongAtOneM(), ((1, 40),))
    bad = {launch.m for launch, report in outcome.reports if not report.clean}
    assert bad <= {23}
    assert bad or 23 not in {launch.m for launch, _ in outcome.reports}


@pytest.mark.parametrize(("others", "said"), [(0, "device leak"), (30 << 20, None)])
def test_what_others_take_of_a_device_is_no_leak_of_ours(others, said):
    """A process that starts takes its memory in small pieces, too."""
    grown = [piece << 21 for piece in range(41)]
    calls = CallSeries([1] * 40, [1e-3] * 40, {"device": grown}, {"device": grown[-1]}, {}, others)
    flat = CallSeries([1] * 40, [1e-3] * 40, {"device": [0] * 41}, {"device": 0}, {})
    assert leaks(calls, [flat], 40)[0].get("kind") == said
    assert leaks(flat, [calls, calls], 40)[0].get("kind") == said


@given(st.lists(st.integers(0, 100), min_size=9, max_size=60))
def test_growth_must_be_steady(series):
    assert grows(sorted(set(range(len(series))))) and not grows([7] * 20)
    if grows(series):
        assert series[-1] > series[0]
    assert not grows(sorted(series, reverse=True))


# -- past 2^31 elements, in small


def beyond(backend, elements=1 << 14, room=1 << 40, problem=PROBLEM):
    drawn = [case(backend, problem, exact(problem, 24, 1, "cpu"))]
    launches = [Launch(0, 0, m, "default", i) for i, m in enumerate((1, 8))]
    return past(backend, drawn, launches, elements, room)


class WrapsAround(rogues.Good):
    """Computes offsets into the output with an index that is too short."""

    def run(self, state, a, out, tactic):
        m, n = out.shape
        whole = min(m, (1 << 14) // n)
        super().run(state, a[:whole], out[:whole], tactic)
        super().run(state, a[whole:], out[: m - whole], tactic)


class Few(rogues.Good):
    def run(self, state, a, out, tactic):
        if a.shape[0] > 100:
            raise ValueError("at most 100 rows")
        super().run(state, a, out, tactic)


@pytest.mark.parametrize("problem", [PROBLEM, W4A4])
def test_what_is_right_past_the_limit_passes(problem):
    backend = rogues.Good() if problem is PROBLEM else Quantised()
    outcome = beyond(backend, problem=problem)
    assert not caught(outcome) and list(outcome.exempt) == [0]
    ((launch, report),) = outcome.reports
    assert launch.m * problem.k > 1 << 14 and report.clean


def test_an_index_that_wraps_is_wrong_where_it_wraps():
    ((launch, report),) = beyond(WrapsAround(), 1 << 16).reports
    assert report.unwritten and report.wrong > report.unwritten
    assert report.witness and report.tiles and report.bad_launches == 1
    assert sum(count for *_, count in report.tiles) == report.wrong


def test_rows_refused_and_memory_that_is_short_are_not_faults():
    outcome = beyond(Few(), 1 << 16)
    assert not caught(outcome) and "at most 100 rows" in outcome.exempt[1]
    with pytest.raises(NotApplicable, match="GiB are free"):
        beyond(rogues.Good(), room=1 << 30)


# -- a neighbour


@pytest.mark.slow
def test_a_neighbour_works_when_told_and_ends_with_whoever_started_it():
    one = Neighbour("cpu")
    try:
        assert one.wait_past(-1, 60, lambda: None), one.last_words()
        assert not one.wait_past(0, 0.2, lambda: None)
        one.tell(GO)
        assert one.wait_past(one.rounds, 10, lambda: None)
        one.tell(PAUSE)
        assert one.alive
    finally:
        one.end()
    assert not one.alive
    code = (
        "import os\n"
        "from fp4tune.probes.regimes.concurrent.neighbours import Neighbour\n"
        "print(Neighbour('cpu').pid, flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and lives(int(done.stdout)):
        time.sleep(0.05)
    assert not lives(int(done.stdout))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


# -- through a layer


def test_results_carry_grades_and_what_is_exempt():
    layer = OpenLayer(WantsContiguous(), Device("cpu"), PROBLEM, 3, 1 << 28, lambda text: None)
    items = [Item((2, 9), "default"), Item((10, 30), "default")]
    found = layer.regime("strided", items, BUDGET)
    assert all(not part["bad"] for part in found["items"])
    layer = OpenLayer(PlansForEachM(), Device("cpu"), PROBLEM, 3, 1 << 28, lambda text: None)
    found = layer.regime("off-bucket", items, BUDGET)
    for part in found["items"]:
        assert [each["kind"] for each in part["graded"]] == ["plan per m"] and not part["bad"]


# -- lanes


TALL = Problem("nvfp4", 1100, 32, 64)
"""With pools for m that take long on a GPU."""
MANY_M = st.lists(st.integers(0, 4096), min_size=1, max_size=12)


def of_rows(fresh: bool) -> list[Any]:
    return [SimpleNamespace(operands=SimpleNamespace(rows=object() if fresh else None))]


@given(st.lists(st.tuples(st.integers(0, 3), MANY_M), max_size=4), st.booleans())
def test_no_item_loses_all_launches_and_none_that_are_short(wanted, routed):
    pairs = dict.fromkeys((item, m) for item, ms in wanted for m in ms)
    launches = [Launch(0, 0, m, f"tactic {item}", item) for item, m in pairs]
    kept = lanes.thinned(launches, of_rows(False), routed)
    assert kept == [x for x in launches if x in set(kept)], "in order"
    assert {x for x in launches if x.m <= lanes.LARGE_M} <= set(kept)
    large = [x for x in launches if x.m > lanes.LARGE_M]
    if len(large) <= lanes.FEW_LARGE and not routed:
        assert kept == launches
        return
    for item in {x.item for x in large}:
        had = sorted(x.m for x in large if x.item == item)
        has = sorted(x.m for x in kept if x.item == item and x.m > lanes.LARGE_M)
        assert has == had[: len(has)] and len(has) >= 1, "the smallest"
        assert (len(has) - 1) * lanes.LANES < len(had) <= len(has) * lanes.LANES


@given(MANY_M, st.booleans())
def test_launches_that_are_counted_are_all_made(ms, routed):
    launches = [Launch(0, 0, m, "default", 0) for m in dict.fromkeys(ms)]
    assert lanes.thinned(launches, of_rows(True), routed) == launches
    windows = [*launches, *(replace(x, offset=64) for x in launches)]
    assert lanes.thinned(windows, of_rows(False), routed) == windows


def test_lanes_make_few_of_the_long_calls_and_each_item_s():
    drawn = [case(rogues.Good(), TALL, exact(TALL, 24, seed, "cpu")) for seed in (1, 2)]
    wanted = [(0, 1), (0, 7), (1, 1025), (1, 1026), (1, 1050), (2, 1024), (2, 1090), (2, 1100)]
    launches = [Launch(i % 2, 0, m, "default", item) for i, (item, m) in enumerate(wanted)]
    outcome = REGIMES["streams"](rogues.Good(), drawn, launches, Budget(1, 1, 0.0))
    assert not caught(outcome) and outcome.not_exercised is None
    seen = {(x.item, x.m) for x, _ in outcome.reports}
    assert seen == {(0, 1), (0, 7), (1, 1025), (2, 1024), (2, 1090)}
    few = [x for x in launches if x.m not in (1050, 1026)][:4]
    outcome = REGIMES["streams"](rogues.Good(), drawn, few, Budget(1, 1, 0.0))
    assert {x.m for x, _ in outcome.reports} == {x.m for x in few}

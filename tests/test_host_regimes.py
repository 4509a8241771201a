"""What a backend may not make of its host: other weights, earlier calls, callers, and the process.

That each regime catches its mutants and passes what is right is in test_zoo and test_controls; here
is what else they promise.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.backends._returned import Returning, returned
from fp4tune.probes.check.sweep import Checker
from fp4tune.probes.data import exact
from fp4tune.probes.data.activations import ACTIVATIONS
from fp4tune.probes.formats import dequantise, quantise
from fp4tune.probes.launch import process
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.outcome import Budget, NotApplicable
from fp4tune.probes.launch.variants import variant
from fp4tune.probes.problem import MXFP4, NVFP4, Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.regimes.host import first_calls, scratch
from fp4tune.probes.regimes.host import weights as crowding
from fp4tune.probes.regimes.memory.addresses import ALIGNMENTS, aligned, allowed, output_at
from fp4tune.probes.regimes.plain.own_quantiser import judge
from fp4tune.probes.zoo import history, quantiser, weights
from fp4tune.probes.zoo import returned as returning
from fp4tune.probes.zoo.floor import Right

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROBLEM = Problem("nvfp4", 24, 96, 128)
W4A4 = Problem("nvfp4", 24, 96, 128, "fp4")
SHORT = Budget(1, 2, 0.01)


def run(regime: str, backend: Any, ms=(0, 1, 2, 7), problem: Problem = PROBLEM, budget=SHORT):
    drawn = [case(backend, problem, exact(problem, 24, seed, "cpu")) for seed in (1, 2)]
    launches = [Launch(i % 2, 3, m, "default", i) for i, m in enumerate(ms)]
    return REGIMES[regime](backend, drawn, launches, budget)


def caught(outcome) -> bool:
    return bool(outcome.errors) or not all(report.clean for _, report in outcome.reports)


# -- which weight


@given(st.integers(0, 2**31), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_a_variants_answer_is_its_weights_own(index, offset):
    drawn = case(Right("right"), PROBLEM, exact(PROBLEM, 24, 3, "cpu"))
    made = variant(drawn, index)
    place = made.slot(offset, 4)
    state = Right("right").prepare(made.weight, PROBLEM)
    Right("right").run(state, drawn.rows(offset, 4), place.out, "default")
    checker = Checker([place])
    checker.sweep()
    assert checker.reports()[0].clean


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A crowd has its time however busy this machine is."""
    monkeypatch.setattr(crowding, "_SMALL_SECONDS", 60.0)


def test_the_crowd_is_larger_than_any_table():
    proof = run("weights", Right("right"), (1, 2)).proof
    assert proof["small_alive"] > 1024 and proof["alive"] >= 9 and proof["in_turn"]


@pytest.mark.parametrize("slots", [9, 31, 127, 600])
def test_a_table_of_any_number_of_slots_is_caught(slots):
    outcome = run("weights", weights.DecodedInSlots("x", slots), (1,))
    assert caught(outcome) and outcome.not_exercised is None


def test_updates_are_asked_for_where_there_are_any():
    assert "updated" not in run("weights", Right("right"), (1,)).proof
    outcome = run("weights", weights.DecodedPerWeight("x"), (1,))
    assert outcome.proof["updated"] and not caught(outcome)


def shared(backend: Any, count: int, tactics: str) -> tuple[list[Any], list[Launch]]:
    """So many cases of one weight, and a launch of each tactic, on one after the other."""
    one = case(backend, PROBLEM, exact(PROBLEM, 24, 1, "cpu"))
    made = [replace(one) for _ in range(count)]
    return made, [Launch(i % count, 3, i + 1, x, i) for i, x in enumerate(tactics)]


@dataclass
class Known:
    """What was prepared, as what can be known to be gone."""

    own: Any


class Prepares(Right):
    """Counts what it prepares, and how much of that was alive when the next was asked for."""

    def __init__(self) -> None:
        super().__init__("counts")
        self.count = 0
        self.states: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.alive: list[int] = []

    def prepare(self, weight, problem):
        self.count += 1
        self.alive.append(len(self.states))
        state = Known(super().prepare(weight, problem))
        self.states[self.count] = state
        return state

    def run(self, state, a, out, tactic):
        super().run(state.own, a, out, tactic)


def test_a_weight_is_loaded_once_for_all_tactics_when_the_last_is_gone():
    backend = Prepares()
    cases, launches = shared(backend, 3, "abcde")
    backend.alive.clear()
    found = crowding._loaded(backend, cases, launches, SHORT)
    assert backend.alive == [1] * crowding._LOADS, "the case's own only"
    assert found.proof["loaded"] == crowding._LOADS and found.repeats == 2 and not caught(found)
    seen = Counter(launch.tactic for launch, _ in found.reports)
    assert seen == dict.fromkeys("abcde", crowding._LOADS)


def test_a_weight_is_prepared_once_for_all_cases_that_have_it():
    backend = Prepares()
    cases, launches = shared(backend, 3, "abc")
    found = crowding._in_turn(backend, cases, launches, SHORT)
    assert backend.count == 2 and not caught(found)
    assert {launch.item for launch, _ in found.reports} == {0, 1, 2}


class StaleInOne(weights.DecodedByAddress):
    """Takes what it decoded at an address for what is there, in one tactic only."""

    def run(self, state, a, out, tactic):
        if tactic == "bad":
            super().run(state, a, out, tactic)
        else:
            Right.run(self, state[0], a, out, tactic)


def test_the_tactic_that_is_stale_is_named_among_others():
    cases, _ = shared(StaleInOne("x"), 2, "a")
    tactics = ("one", "bad", "other")
    launches = [Launch(i % 2, 3, 2, tactic, i) for i, tactic in enumerate(tactics)]
    found = crowding._loaded(StaleInOne("x"), cases, launches, SHORT)
    assert {x.tactic for x, report in found.reports if not report.clean} == {"bad"}


@pytest.mark.parametrize("make", [weights.DecodedPerWeight, weights.UpdatesTheScale])
def test_an_update_is_seen_by_every_tactic(make):
    backend = make("x")
    cases, launches = shared(backend, 2, "abc")
    found = crowding._updated(backend, cases, launches, SHORT)
    assert found.proof == {"updated": crowding._LOADS - 1}
    wrong = {x.tactic for x, report in found.reports if not report.clean}
    assert wrong == (set() if make is weights.DecodedPerWeight else set("abc"))
    assert len(found.reports) == 3 * (crowding._LOADS - 1)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abcd"))), st.integers(0, 3))
def test_every_tactic_has_its_first_launch_with_the_weight_that_it_is_on(wanted, index):
    held = [SimpleNamespace(operands=SimpleNamespace(weight=object())) for _ in range(2)]
    cases: list[Any] = [held[i % 2] for i in range(6)]
    launches = [Launch(at, 0, 1, tactic, i) for i, (at, tactic) in enumerate(wanted)]
    groups = crowding._by_weight(cases, launches)
    first = {x.tactic: x for x in reversed(launches)}
    assert sorted(x.item for mine in groups for x in mine) == sorted(x.item for x in first.values())
    assert all(len({x.case % 2 for x in mine}) == 1 for mine in groups) and len(groups) <= 2
    for mine in groups:
        assert sorted(crowding._turned(mine, index), key=hash) == sorted(mine, key=hash)


@given(st.integers(0, 1 << 40), st.integers(0, 20), st.integers(0, 1 << 36))
def test_a_crowd_ends_early_only_where_one_more_has_no_room(used, alive, room):
    crammed = crowding._is_crammed(used, alive, room)
    measured = alive - crowding._ONCE
    between = crowding._LEAST_LARGE <= alive < crowding._LEAST
    assert crammed == (between and (alive + 1) * Fraction(used, measured or 1) > room)
    assert crammed <= crowding._is_crammed(used + 1, alive, room)


@pytest.mark.parametrize("make", [weights.DecodedPerWeight, weights.HoldsCopies])
def test_few_large_weights_are_alive_where_more_have_no_room(monkeypatch, make):
    monkeypatch.setattr(crowding, "_room", lambda device: 1)
    assert run("weights", make("x"), (1,)).proof["alive"] == crowding._LEAST, "they are small"
    monkeypatch.setattr(crowding, "_LARGE_BYTES", 0)
    found = run("weights", make("x"), (1, 2))
    assert found.proof["alive"] == crowding._LEAST_LARGE
    kinds = {error["kind"] for error in found.errors.values()}
    assert kinds == ({"memory held"} if make is weights.HoldsCopies else set())
    assert all(report.clean for _, report in found.reports)


# -- history


def test_the_call_that_came_out_wrong_is_named():
    outcome = run("history", history.CounterWraps("x", 9), (1,))
    assert "call 512 " in outcome.errors[0]["message"] and outcome.proof["calls"] >= 2048
    assert outcome.proof["pause_seconds"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [history.ForgetsAfterAPause, history.AnswersLateAfterAPause])
def test_what_a_pause_makes_of_it_is_seen(make):
    outcome = run("history", make("x"), (1,), budget=Budget(1, 2, 0.2, long=True))
    assert outcome.proof["pause_seconds"] > 1 and "1 of " in outcome.errors[0]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: history.CounterWraps("x", 15),
                                  lambda: history.SwapsBuffers("x", 10_000)])  # fmt: skip
def test_what_happens_once_in_ten_thousand_calls_is_seen(make):
    outcome = run("history", make(), (1,), budget=Budget(1, 2, 10.0, long=True))
    assert outcome.proof["calls"] > 1 << 17 and caught(outcome)


# -- the process


def test_a_snapshot_tells_what_changed_and_can_be_put_back():
    before = process.snapshot(CPU)
    assert process.differences(before, process.snapshot(CPU)) == {}
    assert len(before) > 30 and process.DECIDES - {"current stream"} >= {"default dtype"}
    random.random()
    torch.set_default_dtype(torch.float64)
    os.environ["FP4TUNE_TEST_SETTING"] = "1"
    changed = process.differences(before, process.snapshot(CPU))
    assert set(changed) == {"random state of Python", "default dtype", "environment"}
    assert "float64" in changed["default dtype"]
    assert changed["environment"] == "FP4TUNE_TEST_SETTING"
    process.restore(CPU, before, changed.keys())
    assert process.differences(before, process.snapshot(CPU)) == {}


class Touches(Right):
    """Right, and does something to its process in each call."""

    def __init__(self, what) -> None:
        super().__init__("touches")
        self.what = what

    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        self.what()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (lambda: torch.rand(1), "random state of torch"),
        (lambda: torch.set_num_threads(torch.get_num_threads() % 2 + 1), "threads of torch"),
        (lambda: signal.signal(signal.SIGUSR1, lambda *_: None), "signal handlers"),
        (lambda: os.umask((os.umask(0) + 1) % 64), "file mode mask"),
    ],
)
def test_a_side_effect_is_a_fault_where_it_decides_and_told_elsewhere(what, name):
    before = signal.getsignal(signal.SIGUSR1), os.umask(0o22), torch.get_num_threads()
    try:
        outcome = run("effects", Touches(what), (1, 2))
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        os.umask(before[1])
        torch.set_num_threads(before[2])
    grave = name in process.DECIDES
    found = outcome.errors[0] if grave else outcome.graded[0]
    assert found["kind"] == ("side effect" if grave else "setting changed")
    assert name in found["message"] and bool(outcome.errors) == grave
    assert all(report.clean for _, report in outcome.reports)


@pytest.mark.parametrize("seed", [random.seed, torch.manual_seed, numpy.random.seed])
def test_a_state_that_each_call_sets_alike_is_found_though_it_was_set_before(seed):
    seed(7)  # as a call before did, since when nobody drew a number
    (error,) = run("effects", Touches(lambda: seed(7)), (1,)).errors.values()
    assert error["kind"] == "side effect" and "random state" in error["message"]


def test_what_an_import_changes_is_told(tmp_path):
    file = tmp_path / "plugin.py"
    file.write_text(
        "import random\nfrom fp4tune.probes.zoo.floor import Right\n"
        "random.seed(4)\nMINE = Right('mine')\n"
    )
    outcome = run("effects", registry.load_one(f"{file}:MINE"), (1,))
    assert "its import changes it" in outcome.errors[0]["message"]


# -- callers


def test_every_call_comes_from_a_thread_of_its_own():
    seen: list[int] = []
    inside = threading.Lock()

    class Watches(Right):
        def run(self, state, a, out, tactic):
            seen.append(threading.get_ident())
            assert inside.acquire(blocking=False), "two callers at once"
            super().run(state, a, out, tactic)
            inside.release()

    outcome = run("callers", Watches("x"), (1, 2))
    assert outcome.not_exercised is None and outcome.proof["numbers_that_came_again"]
    assert seen and threading.get_ident() not in seen


def test_first_calls_overlap_and_each_round_has_new_weights():
    states: list[Any] = []

    class Watches(Right):
        def prepare(self, weight, problem):
            states.append(weight.codes.data_ptr())
            return super().prepare(weight, problem)

    outcome = run("first-calls", Watches("x"), (1, 2))
    assert outcome.proof["overlapped"] and len(set(states)) == len(states)
    assert outcome.proof["own_processes"] == 0


@given(st.lists(st.tuples(st.integers(0, 1 << 33), st.integers(0, 1 << 33)), min_size=1))
def test_prepared_weights_stay_as_long_as_they_have_room(sizes):
    def of(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta")

    cases: list[Any] = [
        SimpleNamespace(state={"w": of(state)}, operands=SimpleNamespace(weight=of(weight)))
        for weight, state in sizes
    ]
    kept = first_calls._rounds_kept(cases)
    each = sum(max(pair) for pair in sizes)
    room = first_calls._KEPT_BYTES
    assert 1 <= kept <= first_calls._KEPT and (kept == 1 or kept * each <= room)
    assert kept == first_calls._KEPT or (kept + 1) * each > room
    assert first_calls._rounds_kept(cases * 2) == kept, "what is shared is prepared once"


# -- memory


@given(
    st.sampled_from(ALIGNMENTS),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([torch.bfloat16, torch.float16, torch.uint8]),
)
@settings(max_examples=40, deadline=None)
def test_what_is_placed_has_that_alignment_and_no_more(alignment, m, n, dtype):
    rows = torch.arange(m * n).view(m, n).to(dtype)
    view = aligned(rows, alignment)
    assert view.data_ptr() % (2 * alignment) == alignment and torch.equal(view, rows)
    if dtype != torch.uint8:
        place = output_at(rows, rows, alignment)
        assert place.out.data_ptr() % (2 * alignment) == alignment
        place.out.copy_(rows)
        place.guarded[-1] = 0
        checker = Checker([place])
        assert checker.reports()[0].guard == 1


def test_a_gpu_is_given_what_slices_of_rows_can_have():
    gpu = torch.device("cuda")
    assert allowed(2 * 4096, gpu) == (256,) and allowed(2 * 24, gpu)[0] == 16
    assert allowed(2 * 321, gpu)[0] == 2 and allowed(2 * 4096, CPU) == ALIGNMENTS


def test_an_output_that_is_returned_is_held_to_its_shape():
    like = torch.empty(2, 3)

    class Odd:
        def matmul(self, state, a, tactic):
            return state

    for wrong in (torch.empty(3, 2), torch.empty(2, 3, dtype=torch.float64), "none"):
        with pytest.raises(TypeError, match="matmul returned"):
            returned(Odd(), wrong, None, like, "default")
    assert returned(Odd(), like, None, like, "default") is like


def test_a_backend_that_returns_is_a_whole_one(tmp_path):
    file = tmp_path / "plugin.py"
    file.write_text(
        "from fp4tune.probes.zoo.returned import ReturnsItsOutput\n"
        "def mine():\n    return ReturnsItsOutput('mine')\n"
    )
    backend = registry.load_one(f"{file}:mine")
    assert isinstance(backend, Returning) and backend.name == "mine"
    for regime in ("serial", "returned", "padding"):
        assert not caught(run(regime, backend))
    with pytest.raises(NotApplicable):
        run("returned", Right("right"))


def test_results_that_are_held_change_in_a_ring():
    for size, bad in ((1, True), (8, True), (4096, False)):
        backend = Returning(returning.RingOfOutputs("x", size))
        assert caught(run("returned", backend, (2,))) == bad


# -- quantisers


@given(st.sampled_from([NVFP4, MXFP4]), st.sampled_from(list(ACTIVATIONS)), st.integers(0, 2**30))
@settings(max_examples=25, deadline=None)
def test_what_our_quantiser_makes_is_right_and_no_other_code_is(fmt, kind, key):
    x = ACTIVATIONS[kind](5, 128, key, CPU).bfloat16()
    scale = torch.tensor(2.0**-8 if fmt.has_global else 1.0)
    ours = quantise(x, fmt, scale if fmt.has_global else None)
    read = dequantise(ours, torch.float64).bfloat16()
    assert not judge(x, read, scale, fmt).any()
    other = read.clone()
    other[2, 17] = read[2, 17] * 1.7 + 3 * float(scale)
    assert judge(x, other, scale, fmt).nonzero().tolist() == [[2, 17 // fmt.block]]


@pytest.mark.parametrize("problem", [W4A4, Problem("nvfp4", 24, 48, 128, "fp4", "fp16")])
def test_own_quantisers_are_judged_by_value(problem):
    assert not caught(run("own-quantiser", quantiser.OwnQuantiser("x"), (1, 7), problem))
    outcome = run("own-quantiser", quantiser.CutsCodes("x"), (1, 7), problem)
    assert "own quantiser" in outcome.errors[0]["message"] and set(outcome.errors) == {0, 1}
    with pytest.raises(NotApplicable):
        run("own-quantiser", Right("right"))


# -- canaries


def test_the_allocator_compiles_and_says_what_it_saw(tmp_path):
    if scratch.compiler() is None:
        pytest.skip("no C compiler")
    library = ctypes.CDLL(str(scratch.build(tmp_path)))
    assert scratch.read(library) == scratch.Damage(0, 0, 0, -1, -1, 0)


def test_the_allocator_says_when_there_was_no_memory(tmp_path):
    """Torch takes a null pointer from such an allocator, and a kernel fails at it later."""
    if scratch.compiler() is None:
        pytest.skip("no C compiler")
    if torch.cuda.is_available():
        pytest.skip("the driver here has memory to give: how it has none is not to be had")
    library = ctypes.CDLL(str(scratch.build(tmp_path)))
    assert not library.canaries_malloc(ctypes.c_ssize_t(64), 0, None)
    assert scratch.read(library).refused == 1


def test_scratch_needs_a_gpu():
    with pytest.raises(NotApplicable, match="CPU"):
        run("scratch", Right("right"))


@given(st.lists(st.tuples(st.integers(1, 512), st.sampled_from("abc")), min_size=1, max_size=40))
def test_what_is_called_under_canaries_begins_with_the_edges_and_leaves_nothing_out(pairs):
    order = scratch.in_order([m for m, _ in pairs], [tactic for _, tactic in pairs])
    called = [(m, tactic) for tactic, ms in order for m in ms]
    assert sorted(called) == sorted(set(pairs))
    names = {tactic for _, tactic in pairs}
    first = order[: len(names)]
    assert {tactic for tactic, _ in first} == names
    for tactic, ms in first:
        mine = [m for m, t in pairs if t == tactic]
        assert set(ms) == {min(mine), max(mine)}


# -- what is done once a process


@pytest.mark.slow
def test_many_calls_and_a_pause_are_made_once_a_process_and_for_all_tactics_in_one_budget():
    backend = Right("right")
    drawn = [case(backend, PROBLEM, exact(PROBLEM, 24, seed, "cpu")) for seed in (1, 2)]
    budget = Budget(1, 2, 0.2, long=True)
    launches = [Launch(0, 0, 1 + i, "abc"[i % 3], i) for i in range(9)]
    first = REGIMES["history"](backend, drawn, launches, budget)
    again = REGIMES["history"](backend, drawn, launches, budget)
    assert first.proof["calls"] > 3 * 2048 and first.proof["pause_seconds"]
    assert again.proof == {"calls": 9 * 2 * 65, "pause_seconds": 0.0}
    assert len(again.reports) == 9 and not caught(again)

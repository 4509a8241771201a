"""What a layer says of a backend that only fails under the conditions of a regime."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from fp4tune.probes import zoo
from fp4tune.probes.backends.torch.dequant import torch_dequant
from fp4tune.probes.check.reference import spread
from fp4tune.probes.check.tiles import tile_error, tile_limit
from fp4tune.probes.launch.case import bind
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.worker.session import OpenLayer, next_width


class Crowded:
    """Right alone; raises where another call is inside it."""

    name, activation, layout = "crowded", "bf16", "plain"

    def __init__(self) -> None:
        self._right = torch_dequant()
        self._inside = threading.Lock()

    def unsupported(self, problem, device):
        return None

    def prepare(self, weight, problem):
        return self._right.prepare(weight, problem)

    def run(self, state, a, out, tactic):
        if not self._inside.acquire(blocking=False):
            raise RuntimeError("somebody else is here")
        try:
            time.sleep(0.002)
            self._right.run(state, a, out, "fp32")
        finally:
            self._inside.release()


class Shy(Crowded):
    """Raises in a crowd of several launches, never where each launch is tried alone."""

    def __init__(self) -> None:
        super().__init__()
        self._before = 0

    def run(self, state, a, out, tactic):
        # Lanes are threads here; whatever is launched alone is launched by the main one.
        crowd = threading.current_thread() is not threading.main_thread()
        self._before += crowd
        if crowd and self._before == 3:
            raise RuntimeError("once, in the middle of a chain")
        self._right.run(state, a, out, "fp32")


def streams(backend) -> list[dict]:
    layer = OpenLayer(
        backend, Device("cpu"), Problem("nvfp4", 32, 64, 64), 1, 1 << 28, lambda _: None
    )
    items = [Item((1, 2), "default"), Item((3, 4), "default")]
    return layer.regime("streams", items, Budget(2, 2, 0.0))["items"]


def test_what_raises_beside_another_call_is_an_error_of_the_regime():
    assert all("somebody else" in result["error"]["message"] for result in streams(Crowded()))


def test_what_raises_together_and_never_alone_is_not_forgotten():
    assert all("in the middle" in result["error"]["message"] for result in streams(Shy()))


@pytest.mark.parametrize("width", [24, 18, 14, 11, 8, 0])
def test_the_width_is_found_in_few_tries(width):
    best, missed, tried = None, set(), []
    next_: int | None = 24
    while next_ is not None:
        tried.append(next_)
        if next_ <= width:
            best = next_
        else:
            missed.add(next_)
        next_ = next_width(best, missed)
    assert (best or 0) == width
    assert len(tried) <= 4 and len(set(tried)) == len(tried)


@pytest.mark.parametrize("ms", [((0,), (1,), (2, 5)), ((2, 5), (1,), (0,))])
@pytest.mark.parametrize("graded", [True, False])
def test_rounding_that_is_not_to_nearest_is_known_whichever_m_comes_first(ms, graded):
    """A second worker of a backend runs regimes without having graded it."""
    device, problem = Device("cpu"), Problem("nvfp4", 8, 64, 64)
    layer = OpenLayer(zoo.named("zoo-output-cut"), device, problem, 1, 1 << 28, lambda _: None)
    items = [Item(each, "default") for each in ms]
    if graded:
        layer.grade(items)
    result = layer.regime("streams", items, Budget(1, 1, 0.0))
    assert not any(item["bad"] for item in result["items"])
    exact = OpenLayer(zoo.named("zoo-random-order"), device, problem, 1, 1 << 28, lambda _: None)
    assert not exact._judged_by_neighbours(items[0]) and not exact._otherwise.get("default")


class ByTactic(Crowded):
    """The first word of a tactic says how it is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self._cut, self._short = zoo.named("zoo-output-cut"), zoo.named("zoo-bf16-sums")

    def prepare(self, weight, problem):
        return {
            "right": self._right.prepare(weight, problem),
            "cut": self._cut.prepare(weight, problem),
            "short": self._short.prepare(weight, problem),
        }

    def run(self, state, a, out, tactic):
        how = tactic.split()[0]
        if how == "raises" and len(a):
            raise RuntimeError("no plan")
        if how in ("cut", "short"):
            {"cut": self._cut, "short": self._short}[how].run(state[how], a, out, "default")
            return
        self._right.run(state["right"], a, out, "fp32")
        if how == "double":
            out.mul_(2)
        elif how == "nan":
            out[-1, -1] = float("nan")


def by_tactic(memory: int = 1 << 28) -> OpenLayer:
    problem = Problem("nvfp4", 16, 192, 512)
    return OpenLayer(ByTactic(), Device("cpu"), problem, 1, memory, lambda _: None)


TACTICS = ("right", "cut", "short", "cut again", "double", "nan")


@pytest.mark.parametrize("more", [(), ("raises",)], ids=["", "one raises"])
@pytest.mark.parametrize("memory", [1 << 28, 1 << 10])
def test_rounding_is_told_of_many_items_at_once_as_of_each_alone(more, memory):
    layer = by_tactic(memory)
    items = [Item(ms, tactic) for tactic in (*more, *TACTICS) for ms in ((0,), (3, 8), (1, 16))]
    together = layer._rounds_otherwise(items, layer._loose())
    assert together == [layer._rounds_otherwise([item], layer._loose())[0] for item in items]
    told = {item.tactic for item, found in zip(items, together, strict=True) if found}
    assert told == {"cut", "cut again"}


def test_an_item_is_graded_beside_others_as_it_is_alone():
    items = [Item((3, 8), tactic) for tactic in (*TACTICS, "raises")]
    beside = by_tactic().grade(items)
    grades = [(result["width"], result.get("rounding")) for result in beside]
    alone = [by_tactic().grade([item])[0] for item in items]
    assert grades == [(result["width"], result.get("rounding")) for result in alone]
    cut = 24, "not to nearest"
    assert grades[:2] == [(24, None), cut] and grades[3:] == [cut, *[(None, None)] * 3]
    assert "tile_error" not in beside[1] and beside[4]["tile_error"] > 0.5


def plain_error(layer, cases, launch):
    """The worst tile of a launch, by its definition."""
    if not launch.m:
        return 0.0
    call = bind(layer.backend, cases, launch)
    call.enqueue()
    right = cases[launch.case].expectation.window(launch.offset, launch.offset + launch.m)
    ref = right.lo.float() if right.ref is None else right.ref
    error = tile_error(call.slot.out, ref)
    if not bool((error <= tile_limit(512)).all()):
        operands = cases[launch.case].operands
        operands = replace(operands, a=cases[launch.case].rows(launch.offset, launch.m))
        error = tile_error(call.slot.out, ref, spread(operands, layer.problem))
    return float("inf") if bool(error.isnan().any()) else float(error.max())


@pytest.mark.parametrize("memory", [1 << 28, 1 << 10])
@pytest.mark.parametrize("tactic", TACTICS)
def test_what_is_far_off_is_the_worst_of_all_launches(tactic, memory):
    layer = by_tactic(memory)
    cases = layer.cases(24)
    launches = layer.launches([Item((0, 1, 5, 16), tactic)], cases, "far", 8)
    errors = [plain_error(layer, cases, launch) for launch in launches]
    assert [layer._tile_error(cases, launch) for launch in launches] == errors
    worst = max(errors)
    far = layer._far(cases, launches)
    assert far == (worst if not worst <= tile_limit(512) else None)
    assert (far is not None) == (tactic in ("double", "nan"))
    assert layer._far(cases, []) is None

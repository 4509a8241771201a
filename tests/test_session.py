"""What a layer says of a backend that only fails under the conditions of a regime."""

from __future__ import annotations

import threading
import time

import pytest

from fp4tune.probes import zoo
from fp4tune.probes.backends.torch.dequant import torch_dequant
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

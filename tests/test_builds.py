"""Compilers are waited for, told of, and given up where a time budget ends."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from math import inf
from threading import Event
from types import SimpleNamespace

import pytest

from fp4tune.autotune.runner import Patience, Stopped
from fp4tune.autotune.stages import build as building
from fp4tune.probes.problem import Problem
from fp4tune.probes.worker.supervisor import WorkerFailed

LAYER = Problem("nvfp4", 4, 64, 64)


class Compiling:
    """What `build` uses of a runner: it compiles for `seconds`, or until it is `closed`."""

    target = SimpleNamespace(device=SimpleNamespace(arch="cpu"))
    patience = Patience(start=1, run=1, build=60)

    def __init__(self, name: str, seconds: float, failure: WorkerFailed | None = None) -> None:
        self.name, self.seconds, self.failure = name, seconds, failure
        self.closed = Event()

    def build(self, problems: list[Problem], workers: int, until: float = inf) -> float:
        assert problems and workers
        left = until - time.monotonic()
        if self.closed.wait(min(self.seconds, left)):
            raise Stopped
        if left < self.seconds:
            raise WorkerFailed("late", "killed", "compiling", gone=True)
        if self.failure:
            raise self.failure
        return self.seconds

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def compile_all(tmp_path):
    def run(runners, **more):
        said = []
        with ThreadPoolExecutor(8) as pool:
            wanted = {runner: [LAYER] for runner in runners}
            built = building.build(pool, wanted, tmp_path, lambda *each: said.append(each), **more)
        return built, said

    return run


def test_what_is_not_compiled_in_time_is_given_up_and_the_others_go_on(compile_all):
    quick, slow = Compiling("quick", 0.0), Compiling("slow", 60)
    built, _ = compile_all([slow, quick], until=time.monotonic() + 0.3)
    assert built.runners == [quick]
    doing, failure = built.failed["slow"]
    assert (doing, failure.kind) == ("building", "late")


def test_whose_turn_does_not_come_in_time_is_late_too(compile_all, monkeypatch):
    """Where memory has room for one compiler at a time."""
    monkeypatch.setattr(building, "free_memory", lambda: 1)
    built, _ = compile_all(
        [Compiling("a", 60), Compiling("b", 60), Compiling("c", 60)], until=time.monotonic() + 0.3
    )
    assert not built.runners and {f.kind for _, f in built.failed.values()} == {"late"}


def test_without_a_budget_every_one_is_waited_for_in_the_order_that_was_asked(compile_all):
    broken = Compiling("broken", 0.0, WorkerFailed("error", "no", "compiling"))
    runners = [Compiling("slower", 0.2), broken, Compiling("quick", 0.0)]
    built, said = compile_all(runners)
    assert [each.name for each in built.runners] == ["slower", "quick"]
    assert [who for who, _ in said] == ["quick", "slower"]
    assert built.failed["broken"][1].kind == "error"


def test_what_is_still_compiled_is_said_now_and_then(compile_all, monkeypatch):
    monkeypatch.setattr(building, "SAID", 0.05)
    _, said = compile_all([Compiling("b", 0.3), Compiling("a", 0.3), Compiling("c", 0.0)])
    assert any(who == "build" and text.endswith("compiling a, b") for who, text in said)


def test_a_probe_that_ends_is_no_backend_s_failure(compile_all):
    mine = Compiling("mine", 60)
    mine.close()
    with pytest.raises(Stopped):
        compile_all([mine], until=time.monotonic() + 60)

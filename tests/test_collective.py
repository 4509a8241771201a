"""An all-reduce behind each GEMM: what a rank adds is what the backend has written by then."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes.host.collective import ALONE, run_ranks
from fp4tune.probes.regimes.host.own_process import Question

ROGUES = Path(__file__).parent / "rogues.py"
MS = (1, 5, 17)


def together(backend: str, devices: tuple[str, ...] = ("cpu", "cpu"), seconds: float = 240.0):
    problem = Problem("nvfp4", 40, 64, 128, "bf16", "bf16")
    spec = backend if backend.startswith("torch") else f"{ROGUES}:{backend}"
    question = Question("", spec, problem, 24, 7, MS, ("",) * len(MS), "cpu")
    return run_ranks(question, devices, lambda: None, seconds)


def test_one_device_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="two GPUs of one host") as refused:
        together("Good", ("cpu",))
    assert str(refused.value) == ALONE


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["Good", "LooksBack"])
def test_what_is_right_adds_up(backend, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = together(backend)
    assert found["bad"] == [] and found["forms"] == ["behind", "beside"]
    assert found["launches"] == 2 * 3 * 4 * len(MS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["FinishesLater", "WritesInAThread"])
def test_what_is_written_late_is_in_the_sum(backend, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = together(backend)
    assert len(found["bad"]) == 2  # on both ranks
    assert {bad.split(",")[0] for bad in found["bad"]} == {"rank 0", "rank 1"}


@pytest.mark.slow
def test_a_rank_that_leaves_is_told_and_not_the_one_that_waits_for_it(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = together("LeavesTheOther", seconds=60.0)
    assert found["error"]["kind"] in ("crash", "error")

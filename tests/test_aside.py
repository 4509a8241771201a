"""Regimes that a shared lock can hang have a worker of their own: a hang costs only itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fp4tune.autotune import request as planning
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.plan import Plan
from fp4tune.autotune.probe import probe
from fp4tune.autotune.runner import Runner
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache.ledger import Ledger
from fp4tune.machine import devices
from fp4tune.probes.regimes import REGIMES

RUN = ("serial", "rewrite", "streams", "first-calls")
LEVEL = replace(
    LEVELS["quick"], launches=0, without=tuple(name for name in REGIMES if name not in RUN)
)
BACKEND = f"{Path(__file__).parent / 'rogues.py'}:Deadlocks"


@pytest.mark.slow
def test_a_hang_of_calls_at_once_takes_nothing_else_down(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    workers: list[Runner] = []
    second = Runner.second

    def seen(self):
        found = second(self)
        workers[:] = [self, found]
        return found

    monkeypatch.setattr(Runner, "second", seen)
    # As on a GPU: there backends, and the two workers of each, run side by side.
    monkeypatch.setattr(Plan, "on_cpu", property(lambda plan: False))
    layers = planning.layers((), None, ["64,128"], 1, "cpu")
    plan = Plan(
        target=devices.cpu(),
        backends=planning.backends([BACKEND]),
        problems=planning.problems(layers, ["nvfp4"], ["bf16"], "bf16", 1),
        level=LEVEL,
        profile=PROFILES["strict"],
        seed=3,
        hang_seconds=20.0,
    )
    with Ledger.open(tmp_path) as ledger:
        report = probe(plan, ledger, tmp_path, lambda who, text: None)
        rows = {row.regime: row.status for row in ledger.evidence() if row.bucket.m_hi == 1
                and row.backend != "controls"}  # fmt: skip
    first, other = workers
    assert (first.deaths, other.deaths) == (0, 1)
    assert rows["streams"] == "failed" and rows["rewrite"] == "passed"
    assert rows["first-calls"] == "skipped"  # what took it down would again
    assert {(f.kind, f.regime) for f in report.findings} == {("hang", "streams")}
    assert first._closed and other._closed

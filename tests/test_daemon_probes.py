"""When the daemon begins a probe, ends it, and tries it again."""

from __future__ import annotations

import time
from collections import deque

import pytest
from daemons import asked, cpu, until

from fp4tune.cache import gpulock
from fp4tune.daemon import work
from fp4tune.daemon.config import DaemonConfig, ProbeLimits, ProbeOptions
from fp4tune.daemon.probes import FINISHED, KILLED, SLOW, YIELDED, Attempt, Probes


def test_a_probe_that_takes_too_long_is_ended_and_tried_much_later(tmp_path):
    config = DaemonConfig(
        state=str(tmp_path), gpus=("cpu",), limits=ProbeLimits(layer_seconds=0.05)
    )
    device, probes = cpu(), Probes()
    units = work.units([asked(128)], ProbeOptions(level="quick"), [])
    probes.offer(config, device, units, "s", time.monotonic())
    assert set(probes.running) == {"cpu"}
    until(lambda: probes.look(config, [device], time.monotonic()) or not probes.running)
    assert probes.outcomes == {("cpu", SLOW): 1} and probes.finished
    probes.offer(config, device, units, "s", time.monotonic())
    assert not probes.running and "again later" in probes.waiting["cpu"]
    probes.offer(config, device, units, "another situation", time.monotonic())
    assert probes.running
    probes.stop("the test ends")
    until(lambda: probes.look(config, [device], time.monotonic()) or not probes.running)


def test_an_engine_keeps_probes_from_beginning(tmp_path):
    config = DaemonConfig(state=str(tmp_path), gpus=("cpu",))
    device, probes = cpu(), Probes()
    held = gpulock.share(tmp_path, ["cpu"])
    units = work.units([asked(128)], ProbeOptions(), [])
    probes.offer(config, device, units, "s", 1000.0)
    assert not probes.running and "holds its lock" in probes.waiting["cpu"]
    held.close()
    probes.offer(config, device, units, "s", 1001.0)
    assert not probes.running and "a moment ago" in probes.waiting["cpu"]


def test_a_day_has_only_so_much_time_for_probes(tmp_path):
    config = DaemonConfig(state=str(tmp_path), gpus=("cpu",), limits=ProbeLimits(day_seconds=5.0))
    device, probes = cpu(), Probes()
    probes._spent["cpu"] = deque([(1000.0, 6.0)])
    units = work.units([asked(128)], ProbeOptions(), [])
    probes.offer(config, device, units, "s", 2000.0)
    assert not probes.running and "spent" in probes.waiting["cpu"]
    assert probes._spent_today(device, 1000.0 + 86401.0) == 0.0


@pytest.mark.parametrize(("outcome", "again"), [(FINISHED, False), (KILLED, True), (YIELDED, True)])
def test_what_came_to_its_end_is_not_repeated(outcome, again):
    probes, device = Probes(), cpu()
    (unit,) = work.units([asked(128)], ProbeOptions(), [])
    probes._remember(("cpu", unit, "s"), outcome, 1000.0)
    assert probes._due(device, unit, "s", 1e9) is again
    assert probes._due(device, unit, "other", 1000.0)


def test_failures_wait_longer_each_time_and_never_for_ever():
    probes = Probes()
    (unit,) = work.units([asked(128)], ProbeOptions(), [])
    key = ("cpu", unit, "s")
    waits = []
    for _ in range(40):
        probes._remember(key, KILLED, 0.0)
        waits.append(probes._attempts[key].after)
    assert waits == sorted(waits) and waits[0] == 5.0 and waits[-1] == 86400.0
    assert isinstance(probes._attempts[key], Attempt)

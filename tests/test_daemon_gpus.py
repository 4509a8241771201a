"""What the daemon makes of what it sees of a GPU: free, in use, or at fault."""

from __future__ import annotations

import os

import pytest
from daemons import cpu

from fp4tune.daemon.config import DaemonConfig, WatchOptions
from fp4tune.daemon.gpus import WatchedDevice
from fp4tune.machine import driver


def gpu() -> WatchedDevice:
    return WatchedDevice("GPU-aaaa", "Model A", "sm90", "gpu-0")


def look(**other) -> dict:
    return {
        "processes": [], "utilisation": 0, "memory_used": 0, "ecc": 0, "events": [],
        "facts": {"kind": "cuda", "nvml": "ok", "driver": "1"}, **other,
    }  # fmt: skip


def test_a_gpu_is_free_when_nobody_uses_it_and_has_not_lately(tmp_path):
    config, device = DaemonConfig(state=str(tmp_path)), gpu()
    assert device.free(config, tmp_path, 0.0) == (False, "nothing is known of it yet")
    device._busy_at = None
    device._take(look(), config)
    assert device.free(config, tmp_path, 1.0) == (True, "")
    device._take(look(processes=[4711]), config)
    assert device.free(config, tmp_path, 2.0) == (False, "process 4711 computes on it")
    device._take(look(utilisation=40), config)
    assert device.free(config, tmp_path, 3.0) == (False, "it is 40 % busy")
    device._take(look(), config)
    assert "a moment ago" in device.free(config, tmp_path, 4.0)[1]
    assert device.free(config, tmp_path, 33.1) == (True, "")


def test_strangers_are_processes_that_are_not_the_probes():
    device = gpu()
    device.look = {"processes": [os.getpid(), 1, 2**22 + 1]}
    assert device.strangers(lambda: [os.getpid()]) == [1], "an unseen one is told by the lock"


def test_faults_of_the_gpu_mark_it_and_faults_of_programs_do_not(tmp_path):
    config, device = DaemonConfig(state=str(tmp_path)), gpu()
    device._take(look(events=[{"kind": "xid", "data": 31}]), config)
    assert device.marks == {} and device.events == {"xid": 1}
    device._take(look(events=[{"kind": "xid", "data": 79}]), config)
    assert "XID 79" in device.marks["xid"]
    assert device.free(config, tmp_path, 1.0)[1].startswith("XID 79")
    device._take({"error": "GPU is lost"}, config)
    assert "GPU is lost" in device.marks["silent"]
    device._take(look(), config)
    assert device.marks == {} and device.events["reset"] == 1, "it answers again: it was reset"


def test_uncorrected_errors_mark_a_gpu_until_it_is_reset(tmp_path):
    config, device = DaemonConfig(state=str(tmp_path)), gpu()
    device._take(look(ecc=3), config)
    assert "3 uncorrected" in device.marks["ecc"]
    before = device.changed
    device._take(look(ecc=0), config)
    assert device.marks == {} and device.changed > before


@pytest.mark.parametrize(
    "after", [{"events": [{"kind": "mig", "data": 0}]}, {"facts": {"driver": "2", "nvml": "ok"}}]
)
def test_a_change_of_mig_or_driver_has_the_evidence_compared(tmp_path, after):
    config, device = DaemonConfig(state=str(tmp_path)), gpu()
    device._take(look(), config)
    before = device.changed
    device._take(look(**after), config)
    assert device.changed > before


def test_a_driver_that_does_not_answer_marks_its_gpu_alone(tmp_path, monkeypatch):
    """The process that asks here never says a word, as one that hangs in the driver."""
    (tmp_path / "silent.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(driver, "_PROGRAM", str(tmp_path / "silent.py"))
    config = DaemonConfig(state=str(tmp_path), watch=WatchOptions(wedged_seconds=5.0))
    one, other = gpu(), cpu()
    for now in (100.0, 101.0, 107.0):
        one.watch(config, now, False)
        other.watch(config, now, False)
    assert "has not answered" in one.marks["wedged"] and other.marks == {}
    assert not one.free(config, tmp_path, 107.0)[0] and other.free(config, tmp_path, 107.0)[0]
    silent = one._sentinel
    one.close()
    assert not silent.alive

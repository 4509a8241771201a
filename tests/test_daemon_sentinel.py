"""The sentinel against a driver library of our own: what it says, hears, and how it may hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_nvml
import psutil
import pytest
from test_daemon_evidence import put

from fp4tune.cache import gpulock
from fp4tune.daemon import gpus
from fp4tune.daemon.config import DaemonConfig, WatchOptions
from fp4tune.daemon.sentinel import Sentinel, listing

# Two GPUs; files in the working directory say what happens: `event` (type and data, taken once),
# `hang`, and `lost`.
MORE = """
#include <stdio.h>
#include <unistd.h>
int nvmlDeviceGetHandleByUUID(const char *s, void **d) {
  if (!strcmp(s, "GPU-aaaa")) { *d = (void *)1; OK; }
  if (!strcmp(s, "GPU-bbbb")) { *d = (void *)2; OK; }
  return 2; }
int nvmlDeviceGetMemoryInfo(void *d, unsigned long long *m) {
  if (d == (void *)1 && !access("hang", F_OK)) pause();
  if (d == (void *)1 && !access("lost", F_OK)) return 15;
  m[0] = 1000; m[1] = 900; m[2] = 100; OK; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *n, void *p) {
  if (d == (void *)2) { *n = 0; OK; }
  if (*n < 1) { *n = 1; return 7; }
  *n = 1; memset(p, 0, 24); *(unsigned *)p = 4711; OK; }
int nvmlDeviceGetUtilizationRates(void *d, unsigned *u) { u[0] = 37; u[1] = 5; OK; }
int nvmlDeviceGetTotalEccErrors(void *d, int t, int c, unsigned long long *n) { *n = 2; OK; }
int nvmlDeviceGetSupportedEventTypes(void *d, unsigned long long *t) { *t = 0xf; OK; }
int nvmlEventSetCreate(void **s) { *s = (void *)1; OK; }
int nvmlDeviceRegisterEvents(void *d, unsigned long long t, void *s) { OK; }
struct event { void *d; unsigned long long type, data; unsigned g, c; };
int nvmlEventSetWait_v2(void *s, struct event *e, unsigned ms) {
  FILE *f = fopen("event", "r");
  if (!f) return 10;
  memset(e, 0, sizeof *e);
  fscanf(f, "%llu %llu", &e->type, &e->data);
  fclose(f); unlink("event"); OK; }
"""


@pytest.fixture
def driver(tmp_path, monkeypatch) -> Path:
    fake_nvml.build(tmp_path, fake_nvml.SOURCE + MORE)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sentinel(driver) -> Iterator[Sentinel]:
    found = Sentinel("GPU-aaaa", time.monotonic())
    found.interval = 0.05
    yield found
    found.stop()


def said(sentinel: Sentinel) -> dict:
    """What it says next."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = sentinel.listen(time.monotonic())
        if found:
            return found[0]
        time.sleep(0.01)
    raise AssertionError("it says nothing")


def test_it_says_what_the_gpu_is_and_who_computes_on_it(sentinel):
    document = said(sentinel)
    assert document["processes"] == [4711] and document["utilisation"] == 37
    assert document["memory_used"] == 100 and document["ecc"] == 2
    assert document["facts"]["driver"] == "580.1" and document["facts"]["nvml"] == "ok"


def test_events_are_told_once_with_their_kind(sentinel, driver):
    assert said(sentinel)["events"] == []
    (driver / "new").write_text("8 79")
    os.rename(driver / "new", driver / "event")
    while not (document := said(sentinel))["events"]:
        pass
    assert document["events"] == [{"kind": "xid", "data": 79}]
    assert said(sentinel)["events"] == []


def test_a_lost_gpu_is_told_and_asked_for_again_by_another_process(sentinel, driver):
    (driver / "lost").touch()
    while "error" not in (document := said(sentinel)):
        pass
    assert "NVMLError_GpuIsLost" in document["error"]
    assert not sentinel.alive, "the next one loads the library anew"


ASKING = """
import sys, time
from fp4tune.daemon.sentinel import Sentinel
one = Sentinel("GPU-aaaa", time.monotonic())
while not one.listen(time.monotonic()):
    time.sleep(0.01)
print(one._conversation.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_the_daemon(driver):
    daemon = subprocess.Popen(
        [sys.executable, "-c", ASKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert daemon.stdout is not None
    asks = psutil.Process(int(daemon.stdout.readline()))
    daemon.kill()
    daemon.wait()
    psutil.wait_procs([asks], timeout=60)
    assert not asks.is_running()


def test_gpus_are_listed_and_chosen_by_index_or_uuid(driver):
    found = listing()
    assert [g["uuid"] for g in found["gpus"]] == ["GPU-aaaa", "GPU-bbbb"]
    for names, uuids in ((("all",), 2), (("1",), 1), (("GPU-aaaa", "cpu"), 2), (("none",), 0)):
        devices, missing = gpus.chosen(DaemonConfig(gpus=names), found)
        assert (len(devices), missing) == (uuids, [])
    _, missing = gpus.chosen(DaemonConfig(gpus=("7",)), found)
    assert missing == ["there is no GPU 7: others are here"]


def test_one_gpu_whose_driver_hangs_leaves_the_other_alone(driver):
    (driver / "hang").touch()
    config = DaemonConfig(state=str(driver), watch=WatchOptions(wedged_seconds=0.5))
    one, two = gpus.chosen(config, listing())[0]
    deadline = time.monotonic() + 60
    while not (one.marks and two.look) and time.monotonic() < deadline:
        for device in (one, two):
            device.watch(config, time.monotonic(), True)
        time.sleep(0.05)
    assert "has not answered" in one.marks["wedged"]
    assert two.look["processes"] == []
    (driver / "hang").unlink()
    one.close()
    two.close()


CUDA = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
HOLDING = """
import sys
from fp4tune.engines import plugin
plugin.hold_gpus()
print("running", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("visible", "order", "held"),
    [
        (None, None, {"GPU-aaaa", "GPU-bbbb"}),
        ("1", "PCI_BUS_ID", {"GPU-bbbb"}),
        ("1", None, {"GPU-aaaa", "GPU-bbbb"}),  # two models: CUDA alone knows which is its second
        ("GPU-a,9,1", None, {"GPU-aaaa"}),
        ("", None, set()),
    ],
)
def test_an_engine_holds_the_gpus_it_may_use(driver, own_state, visible, order, held):
    put(own_state, driver / "site", ("fast", "1.0"))
    env = {k: v for k, v in os.environ.items() if k not in CUDA}
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        if value is not None:
            env[name] = value
    engine = subprocess.Popen(
        [sys.executable, "-c", HOLDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    )
    assert engine.stdout is not None and engine.stdout.readline() == b"running\n"
    busy = {uuid for uuid in ("GPU-aaaa", "GPU-bbbb") if gpulock.in_use(own_state, uuid)}
    engine.communicate(timeout=60)
    assert busy == held
    assert not any(gpulock.in_use(own_state, uuid) for uuid in held)

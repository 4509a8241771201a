"""The daemon beside real work on one GPU: it waits, yields within a second, resumes, costs nothing.

* A load (bf16 matrix products in another process) runs: the daemon must wait. Its throughput with
  and without the idle daemon beside it, in pairs of windows that follow each other; without means
  that the daemon and its sentinel are stopped (SIGSTOP), in turn first and second of a pair.
* The load ends: the daemon begins to probe. An engine takes the shared lock while it computes:
  how long until it has the lock, and until the probe has left the GPU. It lets go: the daemon
  resumes. Also an engine that takes no lock, and only begins to compute.

    python benchmarks/daemon_gpu.py --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import mmap
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from _machine import machine

from fp4tune.cache import gpulock

LOAD = """
import mmap, struct, sys, time
import torch
with open(sys.argv[1], "r+b") as file:
    shared = mmap.mmap(file.fileno(), 0)
a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
b = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
out = torch.empty_like(a)
count = 0
while True:
    for _ in range(64):
        torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    count += 64
    shared[:16] = struct.pack("=qd", count, time.monotonic())
"""
SHARE = """
import sys, time
from fp4tune.cache import gpulock
began = time.monotonic()
held = gpulock.share(sys.argv[1], [sys.argv[2]], wait=30)
print(time.monotonic() - began, held.problems, flush=True)
sys.stdin.read()
"""


class Load:
    """The matrix products: (how many, when the last of them ended)."""

    def __init__(self, place: Path) -> None:
        path = place / "load"
        path.write_bytes(b"\0" * 4096)
        self._file = open(path, "r+b")  # noqa: SIM115 - as long as this process
        self._shared = mmap.mmap(self._file.fileno(), 0)
        self.process = subprocess.Popen([sys.executable, "-c", LOAD, str(path)])
        while self.seen()[0] < 2000:
            if self.process.poll() is not None:
                raise SystemExit("the load ended by itself")
            time.sleep(0.05)

    def seen(self) -> tuple[int, float]:
        count, at = struct.unpack("=qd", self._shared[:16])
        return count, at

    def rate(self, seconds: float) -> float:
        """Products a second over that long, from one end of a batch to another."""
        time.sleep(0.05)  # past the moment of the switch
        count, at = self.seen()
        time.sleep(seconds)
        later, end = self.seen()
        return (later - count) / (end - at)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Daemon:
    """``fp4tune daemon``, heard over the socket that systemd would listen on."""

    def __init__(self, place: Path, config: Path) -> None:
        self.status = ""
        self.heard: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(place / "notify"))
        self.log = open(place / "log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fp4tune.cli", "daemon", "--config", str(config)],
            env={**os.environ, "NOTIFY_SOCKET": str(place / "notify")},
            stdout=self.log,
            stderr=self.log,
        )

    def listen(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(max(left, 0.001))
            try:
                for line in self._socket.recv(65536).decode().splitlines():
                    if line.startswith("STATUS="):
                        self.status = line.removeprefix("STATUS=")
                        self.heard.append((time.monotonic(), self.status))
            except TimeoutError:
                return

    def until(self, word: str, seconds: float) -> float | None:
        """Seconds until its status says `word`; None if it never does."""
        began = time.monotonic()
        while word not in self.status:
            if time.monotonic() - began > seconds or self.process.poll() is not None:
                return None
            self.listen(0.05)
        return time.monotonic() - began

    def family(self) -> list[int]:
        """The daemon and the processes it has beside it."""
        beside = psutil.Process(self.process.pid).children()
        return [self.process.pid, *(process.pid for process in beside)]

    def signal(self, number: int) -> None:
        for pid in self.family():
            os.kill(pid, number)


def paired(load: Load, daemon: Daemon, pairs: int, seconds: float) -> dict[str, Any]:
    """Throughput with and without the daemon, window by window."""
    rows = []
    for pair in range(pairs):
        rates = {}
        for beside in (True, False) if pair % 2 else (False, True):
            daemon.signal(signal.SIGCONT if beside else signal.SIGSTOP)
            rates[beside] = load.rate(seconds)
        rows.append((rates[True], rates[False]))
    daemon.signal(signal.SIGCONT)
    logs = [math.log(one / other) for one, other in rows]
    draw = random.Random(7)
    means = sorted(statistics.fmean(draw.choices(logs, k=len(logs))) for _ in range(10_000))
    return {
        "pairs": len(rows),
        "window_s": seconds,
        "products_per_s_with_daemon": [round(one, 1) for one, _ in rows],
        "products_per_s_without": [round(other, 1) for _, other in rows],
        "ratio": round(math.exp(statistics.fmean(logs)), 5),
        "interval_95": [round(math.exp(means[249]), 5), round(math.exp(means[9749]), 5)],
        "interval_is": "of the geometric mean of the ratios, by bootstrap over pairs",
    }


def on_gpu(nvml: Any, handle: Any) -> list[int]:
    return [int(p.pid) for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]


def until_empty(nvml: Any, handle: Any, but: int, seconds: float) -> float | None:
    """Seconds until at most `but` processes compute on the GPU."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if len(on_gpu(nvml, handle)) <= but:
            return time.monotonic() - began
        time.sleep(0.005)
    return None


def probing(daemon: Daemon, nvml: Any, handle: Any, seconds: float) -> float | None:
    """Seconds until a probe computes on the GPU; None if none does."""
    began = time.monotonic()
    if daemon.until("probing", seconds) is None:
        return None
    while not on_gpu(nvml, handle):
        daemon.listen(0.05)
        if time.monotonic() - began > seconds:
            return None
    daemon.listen(1.0)  # until it does more than make a context
    return time.monotonic() - began


def taken(place: Path, uuid: str, daemon: Daemon, nvml: Any, handle: Any) -> dict[str, Any]:
    """An engine takes the shared lock while a probe computes, holds it for a while, and goes."""
    waited = probing(daemon, nvml, handle, 60)
    if waited is None:
        return {"skipped": f"no probe began: {daemon.status}"}
    family = [pid for pid in children_of(daemon)]
    engine = subprocess.Popen(
        [sys.executable, "-c", SHARE, str(place / "state"), uuid],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    began = time.monotonic()
    assert engine.stdout is not None and engine.stdin is not None
    said = engine.stdout.readline().split(maxsplit=1)
    gone = until_empty(nvml, handle, 0, 20)
    total = time.monotonic() - began
    ended = [pid for pid in family if not psutil.pid_exists(pid)]
    daemon.until("waits", 10)
    waits = daemon.status
    daemon.listen(2.0)
    stayed = not on_gpu(nvml, handle)
    engine.stdin.close()
    engine.wait()
    released = time.monotonic()
    resumed = daemon.until("probing", 30)
    return {
        "probe_computed_after_s": round(waited, 2),
        "engine_had_the_lock_after_s": round(float(said[0]), 3),
        "engine_said": said[1].strip(),
        "gpu_was_empty_after_s": gone and round(total, 3),
        "with_the_start_of_the_engine's_python": True,
        "processes_of_the_probe_that_ended": f"{len(ended)} of {len(family)}",
        "status_meanwhile": waits,
        "no_probe_while_it_held_on": stayed,
        "resumed_after_s": resumed and round(time.monotonic() - released, 2),
    }


def children_of(daemon: Daemon) -> list[int]:
    """The processes of its probe."""
    found = []
    for process in psutil.Process(daemon.process.pid).children():
        with contextlib.suppress(psutil.Error):
            if "fp4tune.daemon.beside" in process.cmdline():
                found += [process.pid, *(one.pid for one in process.children(recursive=True))]
    return found


def without_lock(place: Path, daemon: Daemon, nvml: Any, handle: Any) -> dict[str, Any]:
    """An engine that knows of no lock begins to compute while a probe does."""
    if probing(daemon, nvml, handle, 60) is None:
        return {"skipped": f"no probe began: {daemon.status}"}
    family = children_of(daemon)
    before = set(on_gpu(nvml, handle))
    path = place / "load2"
    path.write_bytes(b"\0" * 4096)
    engine = subprocess.Popen([sys.executable, "-c", LOAD, str(path)])
    while not set(on_gpu(nvml, handle)) - before and engine.poll() is None:
        time.sleep(0.005)
    seen = time.monotonic()
    while any(psutil.pid_exists(pid) for pid in family):
        if time.monotonic() - seen > 10:
            break
        time.sleep(0.005)
    took = time.monotonic() - seen
    ended = not any(psutil.pid_exists(pid) for pid in family)
    visible = psutil.pid_exists(next(iter(before), 0))
    daemon.listen(0.5)
    engine.kill()
    engine.wait()
    return {
        "probe_gone_after_s": round(took, 3) if ended else None,
        "counted_from": "the moment NVML shows the engine's process",
        "nvml_process_numbers_are_those_of_this_container": visible,
        "status_meanwhile": daemon.status,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--window", type=float, default=1.9)
    parser.add_argument("--seconds", type=float, default=150.0, help="begin nothing new after")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    import pynvml as nvml

    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    uuid = nvml.nvmlDeviceGetUUID(handle)
    place = Path(tempfile.mkdtemp(prefix="fp4tune-gpu-"))
    config = place / "daemon.toml"
    config.write_text(
        f'state = "{place / "state"}"\ngpus = ["{uuid}"]\n[probe]\nshapes = ["4096,4096"]\n'
        'level = "quick"\nactivations = ["bf16"]\nbackends = ["torch-dequant", "triton-w4a16"]\n'
        '[idle]\nquiet_seconds = 1.5\n[http]\nlisten = "none"\n'
    )
    result: dict[str, Any] = {
        "about": machine(),
        "gpu": nvml.nvmlDeviceGetName(handle),
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "load": "bf16 products of 4096 x 4096 x 4096, 64 a batch",
    }

    def save(**more: Any) -> None:
        result.update(more)
        result["seconds"] = round(time.monotonic() - began, 1)
        (options.out / "daemon_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(more), flush=True)

    def time_left() -> float:
        return options.seconds - (time.monotonic() - began)

    load = Load(place)
    save(before_any_daemon=[round(load.rate(options.window), 1) for _ in range(2)])
    daemon = Daemon(place, config)
    try:
        save(waits_after_s=daemon.until("waits", 40), status=daemon.status)
        daemon.listen(2.0)
        save(throughput=paired(load, daemon, options.pairs, options.window))
        daemon.listen(0.5)
        save(probes_began_beside_the_load=[s for _, s in daemon.heard if "probing" in s])
        load.stop()
        stopped = time.monotonic()
        save(
            began_after_the_load_s=daemon.until("probing", 30) and time.monotonic() - stopped,
            state_lock=gpulock.path("STATE", uuid),
        )
        turns: list[dict[str, Any]] = []
        while len(turns) < 3 and time_left() > 45:
            turns.append(taken(place, uuid, daemon, nvml, handle))
            save(engine_takes_the_lock=turns)
        if time_left() > 25:
            save(engine_without_the_lock=without_lock(place, daemon, nvml, handle))
        asked = time.monotonic()
        daemon.process.terminate()
        code = daemon.process.wait(20)
        save(sigterm={"exit_code": code, "seconds": round(time.monotonic() - asked, 2)})
        save(processes_left_behind=len(children_of(daemon)))
    finally:
        load.stop()
        daemon.process.kill()
        daemon.log.close()
        said = (place / "log").read_text().replace(str(place), "NODE")
        save(log=said.splitlines()[-40:])


if __name__ == "__main__":
    main()

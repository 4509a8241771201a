"""The node's devices as the daemon knows them: what they are, whether free, what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from ..cache import gpulock
from ..machine.hardware import hardware
from .config import DaemonConfig
from .sentinel import FAST, SLOW, Sentinel

_RESTART = 5.0
_SETTLING = 5.0
"""Seconds in which a GPU may still look busy from a probe of our own that ended."""

FREE, BUSY, PROBING, MARKED, UNKNOWN = "free", "busy", "probing", "marked", "unknown"
STATES = (FREE, BUSY, PROBING, MARKED, UNKNOWN)


class WatchedDevice:
    """One GPU, or the CPU. `marks` are faults that keep it from being probed, name to sentence."""

    def __init__(self, uuid: str, name: str, arch: str, label: str) -> None:
        self.uuid = uuid
        self.name = name
        self.arch = arch
        self.label = label
        self.facts: dict[str, Any] = {}
        self.look: dict[str, Any] = {}
        self.marks: dict[str, str] = {}
        self.events: Counter[str] = Counter()
        self.passed: tuple[str, ...] = ()
        """Sentences about who holds its lock, computes nothing, and was passed over."""
        self.changed = 0
        """Counts events after which the environment must be compared again."""
        self._sentinel: Sentinel | None = None
        self._busy_at: float | None = None
        self._ecc: int | None = None
        self._probed_until: float | None = None
        if self.is_cpu:
            self.facts = hardware(None)

    @property
    def is_cpu(self) -> bool:
        return self.uuid == gpulock.CPU

    def watch(self, config: DaemonConfig, now: float, probing: bool) -> None:
        """Take in what the sentinel saw, and start it where it is not running. Never waits."""
        if self.is_cpu:
            return
        if self._sentinel is None:
            self._sentinel = Sentinel(self.uuid, now)
        sentinel = self._sentinel
        sentinel.interval = FAST if probing else SLOW
        for document in sentinel.listen(now):
            self._take(document, config)
        if now - sentinel.heard > config.watch.wedged_seconds:
            self.marks["wedged"] = f"its driver has not answered for {now - sentinel.heard:.0f} s"
            if now - sentinel.began > 10 * config.watch.wedged_seconds:
                sentinel.stop()
        elif sentinel.spoke:
            self.marks.pop("wedged", None)
        if not sentinel.alive and now - sentinel.began > _RESTART:
            sentinel.stop()
            self._sentinel = Sentinel(self.uuid, now, sentinel.heard)

    def _take(self, document: Mapping[str, Any], config: DaemonConfig) -> None:
        if "error" in document:
            self.marks["silent"] = f"NVML says: {document['error']}"
            return
        if self.marks.pop("silent", None) or self.marks.get("lost"):
            # It was gone and answers again: reset, or its driver was replaced.
            self.events["reset"] += 1
            self.changed += 1
            for mark in ("lost", "xid", "ecc"):
                self.marks.pop(mark, None)
            self._ecc = None
        self.look = dict(document)
        if document["facts"] != self.facts:
            self.changed += bool(self.facts)
            self.facts = document["facts"]
        for event in document["events"]:
            self._happened(event["kind"], event["data"], config)
        ecc = document["ecc"]
        if ecc is not None:
            if self._ecc is not None and ecc < self._ecc:
                self.marks.pop("ecc", None)
                self.marks.pop("xid", None)
                self.changed += 1
            elif ecc > (self._ecc or 0):
                self.marks["ecc"] = f"{ecc} uncorrected memory errors; reset the GPU"
            self._ecc = ecc

    def _happened(self, kind: str, data: int, config: DaemonConfig) -> None:
        self.events[kind] += 1
        if kind == "xid" and data not in config.watch.ignore_xids:
            self.marks["xid"] = f"XID {data}; see the driver's log, and reset the GPU"
        elif kind == "unavailable":
            self.marks["lost"] = "the driver says that it is unavailable"
        if kind in ("mig", "recovery", "unavailable"):
            self.changed += 1

    def free(self, config: DaemonConfig, state_dir: Path, now: float) -> tuple[bool, str]:
        """Whether it may be probed now, and why not. It must have been quiet for a while."""
        why = self._occupied(config, state_dir)
        if why and not self._settling(now):
            self._busy_at = now
        if why:
            return False, why
        if self.marks:
            return False, next(iter(self.marks.values()))
        if self._busy_at is not None and now < self._busy_at + config.idle.quiet_seconds:
            return False, "it was in use a moment ago"
        return True, ""

    def probed(self, now: float) -> None:
        """A probe of our own has just ended by itself: what is still seen of it is nobody's use."""
        self._probed_until = now

    def _settling(self, now: float) -> bool:
        return self._probed_until is not None and now < self._probed_until + _SETTLING

    def _occupied(self, config: DaemonConfig, state_dir: Path) -> str:
        holds = gpulock.look(state_dir, self.uuid)
        self.passed = holds.passed
        if holds.counts:
            return "an engine, or another probe, holds its lock"
        if self.is_cpu:
            return ""
        if not self.look:
            return "nothing is known of it yet"
        if self.look["processes"]:
            return f"process {self.look['processes'][0]} computes on it"
        used = self.look["utilisation"]
        if used is not None and used > config.idle.utilisation_percent:
            return f"it is {used} % busy"
        return ""

    def strangers(self, own: Callable[[], list[int]]) -> list[int]:
        """Processes computing on it that are not of the probe whose processes `own` lists.

        A process that cannot be seen from here (another container's) is told by the lock alone.
        """
        known = self.look.get("processes") or []
        if not known:
            return []
        mine = set(own())
        return [pid for pid in known if pid not in mine and psutil.pid_exists(pid)]

    def close(self) -> None:
        if self._sentinel is not None:
            self._sentinel.stop()


def chosen(config: DaemonConfig, found: Mapping[str, Any]) -> tuple[list[WatchedDevice], list[str]]:
    """The devices that the configuration names among those `found`, and what it names in vain."""
    gpus = [
        WatchedDevice(g["uuid"], g["name"], g["arch"], f"gpu-{index}")
        for index, g in enumerate(found["gpus"])
    ]
    devices: list[WatchedDevice] = []
    missing = []
    for name in config.gpus:
        if name == "all":
            devices += gpus
        elif name == "cpu":
            cpu = WatchedDevice(gpulock.CPU, "", "cpu", "cpu")
            cpu.name = str(cpu.facts["cpu"])
            devices.append(cpu)
        elif name != "none":
            mine = [g for g in gpus if name in (g.uuid, g.label.removeprefix("gpu-"))]
            devices += mine
            if not mine:
                missing.append(f"there is no GPU {name}: {found['reason'] or 'others are here'}")
    return list({d.uuid: d for d in devices}.values()), missing

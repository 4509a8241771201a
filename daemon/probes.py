"""Probes as children: started when a device is free, ended when an engine comes or at a limit."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..cache import gpulock
from .child import Child
from .config import DaemonConfig
from .gpus import WatchedDevice
from .work import Unit

DAY = 86400.0
_KILL_SECONDS = 5.0
_GIB = 1 << 30

FINISHED, YIELDED, FAILED, KILLED, SLOW, BIG = (
    "finished", "yielded", "failed", "killed", "over time", "over memory",
)  # fmt: skip
OUTCOMES = (FINISHED, YIELDED, FAILED, KILLED, SLOW, BIG)
_FIRST_WAIT = {FAILED: 60.0, KILLED: 5.0, SLOW: 600.0, BIG: 600.0}
_LONGEST_WAIT = 86400.0


@dataclass(slots=True)
class Running:
    unit: Unit
    situation: str
    child: Child
    memory_before: int
    looked: float = 0.0


@dataclass(slots=True)
class Attempt:
    """How often a unit was tried in vain, and when it may be tried again."""

    times: int
    after: float


@dataclass(slots=True)
class Probes:
    """All probes of the daemon. `waiting`: UUID to why nothing is probed there now."""

    running: dict[str, Running] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    last: dict[str, dict[str, object]] = field(default_factory=dict)
    finished: bool = False
    """Set when a probe ended, for the state to be looked at."""
    _attempts: dict[tuple[str, Unit, str], Attempt] = field(default_factory=dict)
    _spent: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)
    _stuck: list[tuple[WatchedDevice, Child, float]] = field(default_factory=list)

    def offer(
        self,
        config: DaemonConfig,
        device: WatchedDevice,
        units: Sequence[Unit],
        situation: str,
        now: float,
    ) -> None:
        """Start one of `units` on `device` if it is free."""
        self.pending[device.uuid] = len(units)
        for key in [k for k in self._attempts if k[0] == device.uuid and k[1] not in units]:
            del self._attempts[key]  # it came to what it should be
        if device.uuid in self.running:
            return
        due = [u for u in units if self._due(device, u, situation, now)]
        if not due:
            self.waiting[device.uuid] = "" if not units else f"{len(units)} to probe again later"
            return
        free, why = device.free(config, config.state_dir, now)
        if free and 0 < config.limits.day_seconds <= self._spent_today(device, now):
            free, why = False, "today's time for probes is spent"
        if not free:
            self.waiting[device.uuid] = f"{len(due)} to probe, waits: {why}"
            return
        self.waiting[device.uuid] = ""
        unit = due[0]
        environ = config.environ
        if not device.is_cpu:
            environ["CUDA_VISIBLE_DEVICES"] = device.uuid
        place = ["--gpu", "none" if device.is_cpu else "0", "--state", os.fspath(config.state_dir)]
        arguments = [*unit.arguments(config.probe), *place]
        child = Child("cli", arguments, environ, config.limits.nice)
        used = int(device.look.get("memory_used") or 0)
        self.running[device.uuid] = Running(unit, situation, child, used, now)

    def _due(self, device: WatchedDevice, unit: Unit, situation: str, now: float) -> bool:
        attempt = self._attempts.get((device.uuid, unit, situation))
        return attempt is None or now >= attempt.after

    def _spent_today(self, device: WatchedDevice, now: float) -> float:
        spent = self._spent.setdefault(device.uuid, deque())
        while spent and spent[0][0] < now - DAY:
            spent.popleft()
        return sum(seconds for _, seconds in spent)

    def look(self, config: DaemonConfig, devices: Sequence[WatchedDevice], now: float) -> None:
        """See how each is doing; end those that must end."""
        known = {d.uuid: d for d in devices}
        for uuid, run in list(self.running.items()):
            device = known.get(uuid)
            code = run.child.poll()
            if code is not None:
                self._ended(config, uuid, device, run, code, now)
            elif device is None:
                run.child.end(KILLED)
            elif run.child.ended is not None:
                self._unkillable(uuid, device, run, now)
            else:
                self._limits(config, device, run, now)
        for entry in list(self._stuck):
            device, child, _ = entry
            if not child.family():
                self._stuck.remove(entry)
                child.close()
                device.marks.pop("stuck", None)

    def _limits(
        self, config: DaemonConfig, device: WatchedDevice, run: Running, now: float
    ) -> None:
        child, limits = run.child, config.limits
        if device.strangers(child.family):
            child.end(YIELDED)
        elif device.marks:
            child.end(KILLED)
        elif child.seconds > limits.layer_seconds:
            child.end(SLOW)
        elif now - run.looked >= 1.0:
            run.looked = now
            used = int(device.look.get("memory_used") or 0) - run.memory_before
            caps = ((limits.host_gib, child.rss()), (limits.gpu_gib, used))
            if any(cap is not None and taken > cap * _GIB for cap, taken in caps):
                child.end(BIG)

    def _unkillable(self, uuid: str, device: WatchedDevice, run: Running, now: float) -> None:
        run.child.end(run.child.ended or KILLED)
        if now - run.looked > _KILL_SECONDS + 1.0:
            left = run.child.family()
            device.marks["stuck"] = (
                f"process {left[0] if left else '?'} of a probe cannot be killed"
            )
            self._stuck.append((device, run.child, now))
            del self.running[uuid]
            self.outcomes[uuid, KILLED] += 1

    def _ended(
        self,
        config: DaemonConfig,
        uuid: str,
        device: WatchedDevice | None,
        run: Running,
        code: int,
        now: float,
    ) -> None:
        del self.running[uuid]
        child = run.child
        child.end(child.ended or "")  # what it may have left behind
        outcome = child.ended or (
            FINISHED if code in (0, 1)
            else KILLED if code < 0
            else YIELDED if gpulock.in_use(config.state_dir, uuid)
            else FAILED
        )  # fmt: skip
        self.waiting[uuid] = "looks at what was published"
        if outcome != YIELDED:  # an engine is starting: leave it the processor
            self.finished = True
        if device is not None and outcome in (FINISHED, FAILED):
            device.probed(now)
        self.outcomes[uuid, outcome] += 1
        self.seconds[uuid] += child.seconds  # type: ignore[assignment]
        self._spent.setdefault(uuid, deque(maxlen=100_000)).append((now, child.seconds))
        self.last[uuid] = {
            "layer": str(run.unit),
            "outcome": outcome,
            "seconds": round(child.seconds, 1),
            "at": time.time(),
            "said": "" if outcome == FINISHED else child.said(),
        }
        self._remember((uuid, run.unit, run.situation), outcome, now)
        left = child.family()
        if left and device is not None:
            _mark(device, left)
            self._stuck.append((device, child, now))
        else:
            child.close()

    def _remember(self, key: tuple[str, Unit, str], outcome: str, now: float) -> None:
        if outcome == YIELDED:
            return  # it is taken up again when the device has been quiet
        if len(self._attempts) > 10_000:
            self._attempts.clear()
        attempt = self._attempts.setdefault(key, Attempt(0, 0.0))
        # Probed to its end, and still not as it should be: only another situation changes that.
        wait = _FIRST_WAIT.get(outcome, float("inf")) * 2.0 ** min(attempt.times, 20)
        attempt.after = now + (wait if outcome == FINISHED else min(wait, _LONGEST_WAIT))
        attempt.times += 1

    def forget(self) -> None:
        """Try everything again that was tried in vain."""
        self._attempts.clear()

    def stop(self, why: str) -> None:
        for run in self.running.values():
            run.child.end(why)


def _mark(device: WatchedDevice, left: Sequence[int]) -> None:
    which = f"process {left[0]}" if left else "a process"
    device.marks["stuck"] = f"{which} of a probe cannot be killed"

"""The daemon's loop: look, bring in line, probe what is free, yield, and say how things stand.

It never waits for a device or for a child: those are asked by other processes, and looked at.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..autotune.publication import published
from ..autotune.publication.environment import withdrawn
from ..cache import dropbox, fingerprint, gpulock, publish, state
from ..cache.errors import Busy, StateError
from ..errors import printable
from ..machine import driver
from ..probes.models.shapes import AskedLayer
from ..witness import counts
from . import gpus, sentinel, work
from .board import Board, DeviceReport, NodeReport
from .canary import Canaries
from .child import Child
from .config import DaemonConfig, RoutedLayer
from .gpus import WatchedDevice
from .place import StatePlace
from .probes import KILLED, Probes

MEND_SECONDS = 900.0
"""The longest that bringing the state in line may take."""
_AGAIN = 5.0
"""Seconds until that is tried again after it failed."""
_LIST_AGAIN = 60.0
LOOK_AT_ALL = 3600.0
"""Seconds until the whole ledger is looked at again, though nothing seems to have changed it."""
_SAID = 4
"""Lines of the log about what was reported, at one look."""
log = logging.getLogger("fp4tune.daemon")


@dataclass(slots=True)
class Service:
    """Everything between two looks. `tick` is to be called every `pause` seconds."""

    config: DaemonConfig
    board: Board = field(default_factory=Board)
    devices: list[WatchedDevice] = field(default_factory=list)
    stands: published.Publication | None = None
    stale: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    revalidated: bool = False
    """Whether the state has been brought in line at least once."""
    problem: str = ""
    """Why it could not be, the last time; empty where it could."""
    mended: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """What of the ledger is not as it was stored."""
    again: set[tuple[int, int]] = field(default_factory=set)
    """Layers, as (n, k), that are to be measured anew for that."""
    missing: list[str] = field(default_factory=list)
    absent: str = ""
    """Why the state directory cannot be used now; empty where it can."""
    unreported: str = ""
    """Why what others report cannot be taken up; empty where it can."""
    probes: Probes = field(default_factory=Probes)
    canaries: Canaries = field(default_factory=Canaries)
    _place: StatePlace | None = None
    _reports: dropbox.Collector | None = None
    _mending: Child | None = None
    _went: str = ""
    """Why the state directory could not be used when bringing it in line was ended for that."""
    _signature: tuple[str, object] = ("", None)
    _wanted: tuple[str, object] = ("", None)
    _mend_after: float = 0.0
    _seen: object = None
    _listed: float = 0.0
    _look_after: float = 0.0

    def start(self) -> None:
        """Take the state directory, find the devices, and load what is published.

        Raises StateError, Refused, and DriverSilent where GPUs are wanted and the driver hangs.
        """
        self._place = StatePlace(self.config.state_dir)
        self._place.take()
        try:
            if self._find_devices():
                raise driver.DriverSilent(driver.limit())
            gpulock.prepare(self.config.state_dir, [d.uuid for d in self.devices])
        except BaseException:
            self._place.release()
            raise
        self._prepare()
        self._load()
        self._say()

    def _find_devices(self) -> bool:
        """Look for the devices that are wanted; whether the driver did not answer."""
        wanted = [g for g in self.config.gpus if g not in ("none", "cpu")]
        found = sentinel.listing() if wanted else {"gpus": [], "reason": None, "silent": False}
        devices, self.missing = gpus.chosen(self.config, found)
        if wanted and found["reason"]:
            self.missing.append(str(found["reason"]))
        self._listed = time.monotonic()
        known = {d.uuid: d for d in self.devices}
        if found["reason"] and len(devices) < len(known):
            # A driver that does not answer now; its GPUs are marked, and not forgotten.
            return bool(found["silent"])
        self.devices = [known.pop(d.uuid, d) for d in devices]
        for gone in known.values():
            gone.close()
        return bool(found["silent"])

    @property
    def pause(self) -> float:
        """Seconds until the next look: a probe must yield within a second."""
        return 0.2 if self.probes.running or self.canaries.running else 0.5

    def tick(self) -> None:
        """One look at everything. Never raises: a full disk must not end what serves choices."""
        try:
            self._tick(time.monotonic())
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
            self._signature = ("", None)  # look at everything again
        self._say()

    def _tick(self, now: float) -> None:
        if self.missing and now - self._listed > _LIST_AGAIN and not self.probes.running:
            self._find_devices()
        here = self._has_place()
        for device in self.devices:
            device.watch(self.config, now, device.uuid in self.probes.running)
        self.probes.look(self.config, self.devices, now)
        self.canaries.look(self.config, now)
        if not here:
            return
        self._collect()
        if now >= self._look_after or self.probes.finished or self._mending:
            self._look_after = now + self.config.watch.seconds
            self._load()
            self._mend(now)
        if self.revalidated and self._mending is None:
            self._begin(now)

    def _has_place(self) -> bool:
        """Whether the state directory can be used. What ran in one that went is ended; one that is
        another, or back, is begun with as at the start."""
        if self._place is None:
            return True
        before = self.absent
        self.absent, another = self._place.look()
        if self.absent and not before:
            self.probes.stop(KILLED)
            self.canaries.stop(self.absent)
            if self._mending is not None:
                self._mending.end(self.absent)
                self._went = self.absent
        if another:
            self.stands, self.stale, self.revalidated, self._seen = None, {}, False, None
            self._signature, self._mend_after, self._look_after = ("", None), 0.0, 0.0
            self.mended = [*self.mended, f"{self.config.state_dir} is back, or another"][-20:]
            with contextlib.suppress(StateError):
                gpulock.prepare(self.config.state_dir, [d.uuid for d in self.devices])
            self._prepare()
        return not self.absent

    # -- quarantines that others report

    def _prepare(self) -> None:
        """Make the store and the drop boxes ready; what was found of an earlier fp4tune's is taken
        over."""
        self._reports = dropbox.Collector(self.config.state_dir)
        try:
            self.mended = [*self.mended, *dropbox.prepare(self.config.state_dir)][-20:]
        except StateError as error:
            self.unreported = str(error)
        # What watches leaves counts there; whoever makes the box first may empty it.
        if folder := counts.folder_of(self.config.state_dir):
            with contextlib.suppress(OSError):
                counts.make_box(folder)

    def _collect(self) -> None:
        """Take up what was reported since."""
        if self._reports is None:
            return
        try:
            said = self._reports.step(self.board.backends)
        except Busy:
            return  # a command takes them up, just now
        except StateError as error:
            self.unreported = f"what is reported cannot be taken up: {error}"
            return
        self.unreported = ""
        for sentence in said[:_SAID]:
            log.info("fp4tune daemon: %s", printable(sentence))
        if said[_SAID:]:
            log.info("fp4tune daemon: and %d more like these", len(said) - _SAID)

    def _load(self) -> None:
        """Load choices.db if it is another; what was loaded stays if that fails."""
        path = os.fspath(self.config.state_dir / state.CHOICES)
        stamp = state.file_stamp(path)
        if stamp is not None and stamp == self._seen:
            return
        try:
            self._seen = None
            if publish.restore(self.config.state_dir) is not None:
                self.mended = [*self.mended, f"{path} was gone or damaged, and was put back"][-20:]
                stamp = state.file_stamp(path)
            self.stands = published.load(self.config.state_dir)
            self._seen = stamp
        except StateError:
            pass  # nothing is there to load; what can be done about it, `mend` does
        except Exception as error:  # whatever is in the file, the daemon goes on
            self.problem = f"{path}: {error}"

    # -- bringing the state in line

    def _situation(self) -> tuple[str, object]:
        """Changes when the published evidence may hold no more, or the state needs mending: what
        evidence rests on, and the ledger's file. What our probes write there says nothing."""
        stands = self.stands.environments if self.stands else ()
        files = sorted({stamp.path for e in stands for stamp in e.stamps})
        stamp = state.file_stamp(os.fspath(self.config.state_dir / state.LEDGER))
        before = self._signature[1]
        probing = bool(self.probes.running and before and stamp)
        ledger = before if probing else stamp
        seen: list[Any] = [
            [[path, state.file_stamp(path)] for path in files],
            [[d.uuid, d.changed, not d.marks, sorted(d.facts.items())] for d in self.devices],
            fingerprint.variables(self.config.environ),
            self._seen is not None,
            int(time.monotonic() / LOOK_AT_ALL),
        ]
        return json.dumps(seen, default=str), ledger

    def _mend(self, now: float) -> None:
        if self._mending is not None:
            self._mended(now)
            return
        if self.probes.finished:
            # Its evidence may have been refused by a damaged ledger; its choices want comparing.
            self.probes.finished = False
            self._signature = ("", None)
        if now < self._mend_after or not all(d.facts or d.marks for d in self.devices):
            return  # a GPU that has not answered yet would look as if it were not here
        wanted = self._situation()
        if wanted == self._signature:
            return
        self._wanted = wanted
        document = {"state": os.fspath(self.config.state_dir), "machine": self._machine()}
        self._mending = Child(
            "daemon.mend", [], self.config.environ, say=json.dumps(document).encode()
        )

    def _machine(self) -> dict[str, Mapping[str, Any]]:
        """The facts of each model here. A marked GPU is left out: what it says of itself may be
        wrong, and evidence of its like on other GPUs holds without it."""
        good = [
            d for d in self.devices if d.facts and not d.marks and d.facts.get("nvml", "ok") == "ok"
        ]
        return {("cpu" if d.is_cpu else d.name): d.facts for d in reversed(good)}

    def _mended(self, now: float) -> None:
        child = self._mending
        assert child is not None
        code = child.poll()
        if code is None:
            if child.seconds > MEND_SECONDS:
                child.end("it took too long")
            return
        try:
            answer = json.loads(child.output())
        except ValueError:
            answer = {"error": child.ended or child.said() or f"ended with code {code}"}
        child.close()
        self._mending = None
        self._look_after = 0.0
        self.mended = [*self.mended, *answer.get("mended", [])][-20:]
        if child.ended is not None and child.ended == self._went:
            return  # with the directory, which is back: it is begun anew
        if "error" in answer:
            self.problem = str(answer["error"])
            self._mend_after = now + _AGAIN
            return
        self.problem = ""
        self.revalidated = True
        self.damaged = list(answer.get("damaged", ()))
        self.again = {(n, k) for n, k in answer.get("again", ())}
        self.stale = {(gpu, backend): tuple(why) for gpu, backend, why in answer["stale"]}
        self.board.count("published" if answer["published"] else "compared")
        self._load()
        # A new generation changes stamps that were looked at, and nothing else need have changed.
        seen, ledger = self._situation()  # the ledger may have been made, or moved aside, meanwhile
        self._signature = (seen if answer["published"] else self._wanted[0], ledger)

    # -- probing

    def _begin(self, now: float) -> None:
        """Start what can be started: at most one child on a device."""
        layers, experts = self._named()
        published = self.stands.candidates if self.stands else ()
        for device in self.devices:
            mine = [
                c
                for c in published
                if c.arch == device.arch and (device.is_cpu or c.gpu == device.name)
            ]
            pending = work.units(layers, self.config.probe, mine, self.again, experts)
            stale = sorted([k[1], *v] for k, v in self.stale.items() if k[0] == device.name)
            situation = json.dumps([stale, self.damaged])
            self.probes.offer(self.config, device, pending, situation, now)
            self.canaries.offer(
                self.config, device, [c for c in mine if not withdrawn(c)], now,
                device.uuid in self.probes.running,
            )  # fmt: skip

    def _named(self) -> tuple[Sequence[AskedLayer], Sequence[RoutedLayer]]:
        try:
            return self.config.layers(), self.config.experts()
        except (ValueError, OSError) as error:  # a model's config.json that went since
            self.problem = str(error)
            return [], []

    # -- saying

    def _say(self) -> None:
        self.board.update(
            NodeReport(
                state_dir=os.fspath(self.config.state_dir),
                absent=self.absent,
                problem=self.problem or self.unreported,
                stands=self.stands,
                here=self._seen is not None,
                revalidated=self.revalidated,
                stale=self.stale,
                mended=self.mended,
                damaged=self.damaged,
                missing=self.missing,
                devices=[self._report(device) for device in self.devices],
                counts={
                    "outcomes": dict(self.probes.outcomes),
                    "seconds": dict(self.probes.seconds),
                    "canaries": dict(self.canaries.outcomes),
                },
            )
        )

    def _report(self, device: WatchedDevice) -> DeviceReport:
        waiting = self.probes.waiting.get(device.uuid, "")
        if device.uuid in self.probes.running:
            state_ = gpus.PROBING
        elif device.marks:
            state_ = gpus.MARKED
        elif not device.is_cpu and not device.look:
            state_ = gpus.UNKNOWN
        else:
            state_ = gpus.BUSY if "waits" in waiting else gpus.FREE
        return DeviceReport(
            device,
            state_,
            self.said(device),
            self.probes.pending.get(device.uuid, 0),
            self.probes.last.get(device.uuid),
            self.canaries.last.get(device.uuid),
        )

    @property
    def status(self) -> str:
        """One line for systemd."""
        number = self.stands.generation if self.stands else 0
        parts = [f"generation {number}" if number else "nothing published yet"]
        if self.absent:
            parts.insert(0, self.absent)
        if self.stale:
            parts.append(f"{len(self.stale)} stale")
        if self.damaged:
            parts.append(f"{len(self.damaged)} damaged in the ledger")
        for device in self.devices:
            parts.append(f"{device.label}: {self.said(device)}")
        return "; ".join(parts)

    def said(self, device: WatchedDevice) -> str:
        """What a device is doing, in words."""
        run = self.probes.running.get(device.uuid)
        if run is not None:
            return f"probing {run.unit}"
        if device.marks:
            return next(iter(device.marks.values()))
        waiting = self.probes.waiting.get(device.uuid)
        return waiting or "nothing to do"

    def reload(self, config: DaemonConfig) -> None:
        """Go on with another configuration; what listens stays until the next start."""
        self.config = config
        self.probes.forget()
        self._find_devices()
        gpulock.prepare(config.state_dir, [d.uuid for d in self.devices])
        self._seen, self._signature, self._mend_after = None, ("", None), 0.0

    def stop(self) -> None:
        """End every child, at once."""
        self.probes.stop("the daemon ends")
        self.canaries.stop("the daemon ends")
        if self._mending is not None:
            self._mending.end("the daemon ends")
        for device in self.devices:
            device.close()
        if self._place is not None:
            self._place.release()

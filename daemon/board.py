"""What the loop knows, as documents that any number of clients may read without asking the loop."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

from .. import __version__
from ..autotune.publication import published
from ..autotune.publication.environment import withdrawn
from ..cache import codec, facts, quarantine_store, state
from ..cache.errors import StateError
from ..cache.ledger import Ledger
from ..words import STATUS_WORDS
from .gpus import WatchedDevice
from .witnessed import WitnessBoard

BEAT_SECONDS = 20.0
"""A loop that was silent for longer than this is not healthy."""
STATUS_SECONDS = 5.0
"""Between two looks at what readers are answered here, where nothing is known to have changed."""
MOST_FINDINGS = 500
_FINDINGS_EVERY = 2.0
_SHOWN = (
    "id", "run", "backend", "tactic", "kind", "regime", "data", "format", "activation",
    "out_dtype", "m_lo", "m_hi", "n", "k", "fingerprint", "at",
)  # fmt: skip
"""What is told of a finding."""


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device at one look: its `state` (of `gpus.STATES`) and, in words, what it is `doing`."""

    device: WatchedDevice
    state: str
    doing: str
    pending: int
    last_probe: Mapping[str, Any] | None
    last_canary: Mapping[str, Any] | None

    def json(self) -> dict[str, Any]:
        d = self.device
        return {
            "device": d.label,
            "uuid": d.uuid,
            "name": d.name,
            "arch": d.arch,
            "state": self.state,
            "doing": self.doing,
            "marks": dict(d.marks),
            "events": dict(d.events),
            "passed_over": list(d.passed),
            "pending": self.pending,
            "last_probe": self.last_probe,
            "last_canary": self.last_canary,
        }


@dataclass(frozen=True, slots=True)
class NodeReport:
    """The node at one look of the loop. `absent` is why the state directory cannot be used, empty
    where it can; `problem` why the state could not be brought in line; `stale` maps (GPU, backend)
    to what changed; `here` says whether choices.db is there as it was loaded; `damaged` what of
    the ledger is not as it was stored."""

    state_dir: str
    absent: str
    problem: str
    stands: published.Publication | None
    here: bool
    revalidated: bool
    stale: Mapping[tuple[str, str], Sequence[str]]
    mended: Sequence[str]
    damaged: Sequence[str]
    missing: Sequence[str]
    devices: Sequence[DeviceReport]
    counts: Mapping[str, Any]
    """Counters for the metrics: outcomes, seconds, canaries."""

    @property
    def generation(self) -> int:
        return self.stands.generation if self.stands else 0

    def ready(self) -> tuple[bool, str]:
        """Whether engines may rely on what is published here, and why not."""
        if self.absent:
            return False, self.absent
        if self.stands is None or not self.stands.choices:
            return False, "nothing is published yet"
        if not self.here:
            return False, "choices.db is gone or damaged, and not put back yet"
        if not self.revalidated:
            return False, "what is published has not been compared with this node yet"
        devices = [report.device for report in self.devices]
        good = [device for device in devices if not device.marks]
        if devices and not good:
            return False, "every device is marked: " + "; ".join(
                f"{device.label}: {next(iter(device.marks.values()))}" for device in devices
            )
        covered = {(choice.arch, choice.gpu) for choice in self.stands.choices}
        for device in good:
            mine = (gpu for arch, gpu in covered if arch == device.arch)
            if not any(device.is_cpu or gpu == device.name for gpu in mine):
                return False, f"nothing is published for {device.label} ({device.name})"
        return True, "choices are published and were compared with this node"


class Board:
    """Each attribute is replaced as a whole; readers take what is there."""

    def __init__(self) -> None:
        self.beat = time.monotonic()
        self.ready = False
        self.why = "it has not looked yet"
        self.health: dict[str, Any] = {}
        self.choices = b'{"generation": 0, "choices": []}'
        self.numbers: dict[str, Any] = {}
        self.state_dir = ""
        self.backends: frozenset[str] = frozenset()
        self.events: Counter[str] = Counter()
        self.witness = b'{"reporters": [], "events": [], "ignored": []}'
        """What processes that watch have told, as a document."""
        self.status: dict[str, Any] = _status_of_facts(None)
        self._looked = -STATUS_SECONDS
        self._key: object = None
        self._key_shown: object = None
        self._findings = NewestFindings()
        self._witness = WitnessBoard()

    def count(self, event: str) -> None:
        self.events[event] += 1

    def findings(self) -> bytes:
        """The newest findings, as JSON; from the ledger, at most every other second."""
        return self._findings.get(self.state_dir)

    @property
    def recent_findings(self) -> bytes | None:
        """`findings` where they need not be read; None where that may take a while."""
        return self._findings.recent

    def update(self, report: NodeReport) -> None:
        """Take over what is known now; called by the loop alone."""
        self.beat = time.monotonic()
        self.state_dir = report.state_dir
        stands = report.stands
        store = quarantine_store.place(self.state_dir)
        content = (stands.generation, stands.meta.get("digest")) if stands else None
        key = (content, quarantine_store.stamp(store), tuple(sorted(report.stale.items())))
        if key != self._key or self.beat - self._looked >= STATUS_SECONDS:
            self._looked = self.beat
            self.status = _status_of_facts(facts.gather(self.state_dir))
        if (key, self.status) != self._key_shown:
            self._key_shown = (key, self.status)
            self._rebuild(report, store)
        self._key = key
        self._witness.look(self.state_dir)
        self.witness = json.dumps(self._witness.document()).encode()
        devices = [device.json() for device in report.devices]
        self.ready, self.why = report.ready()
        self.health = {
            **self.status,
            "fp4tune": __version__,
            "ready": self.ready,
            "why": self.why,
            "generation": report.generation,
            "stale": [
                {"gpu": gpu, "backend": backend, "changes": list(why)}
                for (gpu, backend), why in sorted(report.stale.items())
            ],
            "problem": report.absent or report.problem,
            "mended": list(report.mended),
            "damaged": list(report.damaged),
            "missing": list(report.missing),
            "devices": devices,
        }
        self.numbers = {
            **self.numbers,
            **report.counts,
            "generation": report.generation,
            "published": float(stands.meta.get("published") or 0.0) if stands else 0.0,
            "stale": Counter(gpu for gpu, _ in report.stale),
            "devices": devices,
            "events": dict(self.events),
            "problem": bool(report.absent or report.problem),
            "witness": self._witness.metrics(self.backends, {d["name"] for d in devices}),
            "damaged": len(report.damaged),
        }

    def _rebuild(self, report: NodeReport, store: str) -> None:
        stands = report.stands
        entries, ignored = quarantine_store.read(store)
        choices = stands.choices if stands else ()
        candidates = stands.candidates if stands else ()
        known = {(c.gpu, c.profile, c.bucket, c.backend, c.tactic): c for c in candidates}
        rows = []
        statuses: Counter[tuple[str, str, str, str]] = Counter()
        for choice in choices:
            row = asdict(choice)
            mine = known.get(
                (choice.gpu, choice.profile, choice.bucket, choice.backend, choice.tactic)
            )
            row["stale"] = mine.reasons[0] if mine is not None and withdrawn(mine) else None
            rows.append(row)
            statuses[choice.arch, choice.gpu, choice.profile, choice.status] += 1
        document = {
            **self.status,
            "generation": stands.generation if stands else 0,
            "meta": stands.meta if stands else {},
            "choices": rows,
            "withdrawn": [
                {"gpu": gpu, "backend": backend, "reason": reason}
                for gpu, backend, reason in sorted(
                    {(c.gpu, c.backend, c.reasons[0]) for c in candidates if withdrawn(c)}
                )
            ],
            "quarantines": [entry.json() for entry in entries],
        }
        self.choices = json.dumps(document).encode()
        self.backends = frozenset(c.backend for c in candidates)
        self.numbers = {
            **self.numbers,
            "choices": statuses,
            "quarantines": len(entries),
            "ignored": len(ignored),
        }

    @property
    def healthy(self) -> bool:
        return time.monotonic() - self.beat < BEAT_SECONDS


def _status_of_facts(found: dict[str, Any] | None) -> dict[str, Any]:
    """What every document begins with: the status of `facts`, since when, why and what to do."""
    if found is None:
        return {"status": "UNPROVEN", "since": None, "reason": "it has not looked yet", "do": ""}
    word = STATUS_WORDS[found["status"]]
    return {"status": word, **{name: found[name] for name in ("since", "reason", "do")}}


class NewestFindings:
    """The newest findings, kept as bytes while the ledger does not change."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._body = b'{"findings": [], "problem": ""}'
        self._stamp: object = None
        self._looked = -1e9

    @property
    def recent(self) -> bytes | None:
        fresh = time.monotonic() - self._looked < _FINDINGS_EVERY and not self._lock.locked()
        return self._body if fresh else None

    def get(self, state_dir: str) -> bytes:
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= _FINDINGS_EVERY:
                self._looked = now
                path = os.path.join(state_dir, state.LEDGER)
                stamp = (state.file_stamp(path), state.file_stamp(path + "-wal"))
                if stamp != self._stamp:
                    self._body, self._stamp = self._read(state_dir), stamp
            return self._body

    def _read(self, place: str) -> bytes:
        """What is there now; after a failure the last findings, with the problem."""
        try:
            with Ledger.open(place, readonly=True) as ledger:
                found = ledger.findings(newest=MOST_FINDINGS)
            rows = [{name: codec.columns(row)[name] for name in _SHOWN} for row in reversed(found)]
        except (StateError, OSError) as error:
            kept = json.loads(self._body)
            return json.dumps({**kept, "problem": str(error)}).encode()
        return json.dumps({"findings": rows, "problem": ""}).encode()

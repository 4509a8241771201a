"""What the loop knows, as documents that any number of clients may read without asking the loop."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections import Counter
from dataclasses import asdict
from threading import Lock
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..autotune.publication.environment import withdrawn
from ..cache import opening, quarantine, state
from ..cache.errors import StateError

if TYPE_CHECKING:
    from .service import Service

BEAT_SECONDS = 20.0
"""A loop that was silent for longer than this is not healthy."""
MOST_FINDINGS = 500
_FINDINGS_EVERY = 2.0


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
        self._key: object = None
        self._findings = Findings()

    def count(self, event: str) -> None:
        self.events[event] += 1

    def findings(self) -> bytes:
        """The newest findings, as JSON; from the ledger, at most every other second."""
        return self._findings.get(self.state_dir)

    @property
    def recent_findings(self) -> bytes | None:
        """`findings` where they need not be read; None where that may take a while."""
        return self._findings.recent

    def update(self, service: Service) -> None:
        """Take over what `service` knows now; called by the loop alone."""
        self.beat = time.monotonic()
        self.state_dir = os.fspath(service.config.state_dir)
        stands = service.stands
        spools = quarantine.spools(self.state_dir)
        content = (stands.generation, stands.meta.get("digest")) if stands else None
        key = (content, quarantine.stamp(spools), tuple(sorted(service.stale.items())))
        if key != self._key:
            self._key = key
            self._rebuild(service, spools)
        devices = [
            {
                "device": d.label,
                "uuid": d.uuid,
                "name": d.name,
                "arch": d.arch,
                "state": _state(service, d),
                "doing": service.said(d),
                "marks": dict(d.marks),
                "events": dict(d.events),
                "pending": service.probes.pending.get(d.uuid, 0),
                "last_probe": service.probes.last.get(d.uuid),
                "last_canary": service.canaries.last.get(d.uuid),
            }
            for d in service.devices
        ]
        generation = stands.generation if stands else 0
        self.ready, self.why = _ready(service)
        self.health = {
            "fp4tune": __version__,
            "ready": self.ready,
            "why": self.why,
            "generation": generation,
            "stale": [
                {"gpu": gpu, "backend": backend, "changes": list(why)}
                for (gpu, backend), why in sorted(service.stale.items())
            ],
            "problem": service.problem,
            "mended": list(service.mended),
            "missing": list(service.missing),
            "devices": devices,
        }
        self.numbers = {
            **self.numbers,
            "generation": generation,
            "published": float(stands.meta.get("published") or 0.0) if stands else 0.0,
            "stale": Counter(gpu for gpu, _ in service.stale),
            "devices": devices,
            "outcomes": dict(service.probes.outcomes),
            "seconds": dict(service.probes.seconds),
            "canaries": dict(service.canaries.outcomes),
            "events": dict(self.events),
            "problem": bool(service.problem),
        }

    def _rebuild(self, service: Service, spools: list[str]) -> None:
        stands = service.stands
        entries, ignored = quarantine.read(spools)
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


def _state(service: Service, device: Any) -> str:
    if device.uuid in service.probes.running:
        return "probing"
    if device.marks:
        return "marked"
    if not device.is_cpu and not device.look:
        return "unknown"
    return "busy" if "waits" in service.probes.waiting.get(device.uuid, "") else "free"


def _ready(service: Service) -> tuple[bool, str]:
    """Whether engines may rely on what is published here, and why not."""
    if service.stands is None or not service.stands.choices:
        return False, "nothing is published yet"
    if not service.settled:
        return False, "what is published has not been compared with this node yet"
    here = [d for d in service.devices if not d.marks]
    if service.devices and not here:
        return False, "every device is marked: " + "; ".join(
            f"{d.label}: {next(iter(d.marks.values()))}" for d in service.devices
        )
    covered = {(c.arch, c.gpu) for c in service.stands.choices}
    for device in here:
        if not any(a == device.arch and (device.is_cpu or g == device.name) for a, g in covered):
            return False, f"nothing is published for {device.label} ({device.name})"
    return True, "choices are published and were compared with this node"


class Findings:
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
                    self._body, self._stamp = self._read(path), stamp
            return self._body

    def _read(self, path: str) -> bytes:
        """What is there now; after a failure the last findings, with the problem."""
        try:
            conn = opening.to_read(path)
            try:
                cursor = conn.execute(
                    "SELECT id, run, backend, tactic, kind, regime, data, format, activation, "
                    "out_dtype, m_lo, m_hi, n, k, fingerprint, at FROM finding "
                    "ORDER BY id DESC LIMIT ?",
                    (MOST_FINDINGS,),
                )
                names = [column[0] for column in cursor.description]
                rows = [dict(zip(names, row, strict=True)) for row in cursor]
            finally:
                conn.close()
        except (StateError, sqlite3.Error, OSError) as error:
            kept = json.loads(self._body)
            return json.dumps({**kept, "problem": str(error)}).encode()
        return json.dumps({"findings": rows, "problem": ""}).encode()

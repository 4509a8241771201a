"""One published choice tried beside a serving engine, every so often; off unless asked for.

It takes memory and time from the engine, so it is few launches of one choice at a time, in turn.
A choice that fails is quarantined at once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..cache.rows import Candidate
from .child import Child
from .config import DaemonConfig
from .gpus import WatchedDevice


@dataclass(slots=True)
class Canaries:
    running: dict[str, tuple[Child, Candidate]] = field(default_factory=dict)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    _next: dict[str, int] = field(default_factory=dict)
    _after: dict[str, float] = field(default_factory=dict)

    def offer(
        self,
        config: DaemonConfig,
        device: WatchedDevice,
        candidates: Sequence[Candidate],
        now: float,
        probing: bool,
    ) -> None:
        """Start one where it is due: the next choice of those that are best in their bucket."""
        every = config.canary.every_seconds
        if every <= 0 or probing or device.marks or device.uuid in self.running:
            return
        after = self._after.setdefault(device.uuid, now + every)
        chosen = [c for c in candidates if c.rank == 0 and c.bucket.m_hi > 0]
        if now < after or not chosen:
            return
        self._after[device.uuid] = now + every
        turn = self._next.get(device.uuid, 0)
        self._next[device.uuid] = turn + 1
        candidate = chosen[turn % len(chosen)]
        environ = config.environ
        if not device.is_cpu:
            environ["CUDA_VISIBLE_DEVICES"] = device.uuid
        document = {
            "state": os.fspath(config.state_dir),
            "cpu": device.is_cpu,
            "candidate": asdict(candidate),
            "backends": config.probe.backends,
            "python": config.probe.python,
            "launches": config.canary.launches,
            "turn": turn,
        }
        child = Child(
            "daemon.canary_run", [], environ, config.limits.nice, json.dumps(document).encode()
        )
        self.running[device.uuid] = (child, candidate)

    def look(self, config: DaemonConfig, now: float) -> None:
        for uuid, (child, candidate) in list(self.running.items()):
            if child.poll() is None:
                if child.seconds > config.canary.seconds:
                    child.end("over time")
                continue
            child.end(child.ended or "")
            try:
                answer = json.loads(child.output())
            except ValueError:
                answer = {"outcome": "not assessed", "note": child.ended or child.said()}
            answer["backend"] = candidate.backend
            self.outcomes[uuid, str(answer["outcome"])] += 1
            self.last[uuid] = answer
            child.close()
            del self.running[uuid]

    def stop(self, why: str) -> None:
        for child, _ in self.running.values():
            child.end(why)

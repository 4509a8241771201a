"""The board as Prometheus metrics, through prometheus_client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Lock

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ..errors import printable
from ..words import STATUS_WORDS
from .board import Board
from .gpus import STATES
from .probes import OUTCOMES
from .witnessed import Numbers

FRESH = 0.5
"""Seconds that a text of metrics is as good as new."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """Collects from a board; nothing is counted twice, since the board holds the counts."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._lock = Lock()
        self._text = b""
        self._made = -FRESH

    def text(self) -> bytes:
        """All metrics; made at most once in `FRESH` seconds, however often they are asked for."""
        with self._lock:
            now = time.monotonic()
            if now - self._made >= FRESH:
                # Labels may be called anything; line ends in them are escaped by now.
                text = generate_latest(self._registry).decode()
                self._text = printable(text, len(text), keep="\n").encode()
                self._made = now
            return self._text

    def collect(self) -> Iterator[Metric]:
        board = self._board
        n = board.numbers
        for name, help_, value in (
            ("ready", "1 where choices are published and hold on this node", board.ready),
            ("healthy", "1 where the daemon's loop is alive", board.healthy),
            ("problem", "1 where the state could not be brought in line", n.get("problem", False)),
            ("damaged", "Runs and rows that are not as they were stored", n.get("damaged", 0)),
            ("generation", "The published generation, 0 without one", n.get("generation", 0)),
            ("published_timestamp_seconds", "When it was published", n.get("published", 0.0)),
            ("quarantines", "Quarantined backends and tactics", n.get("quarantines", 0)),
        ):
            yield GaugeMetricFamily(f"fp4tune_{name}", help_, value=float(value))
        word = GaugeMetricFamily(
            "fp4tune_status", "1 for what this node is, as facts decides it", labels=["status"]
        )
        for each in dict.fromkeys(STATUS_WORDS.values()):
            word.add_metric([each], float(board.status["status"] == each))
        yield word
        yield from _witnessed(n.get("witness", {}))
        choices = GaugeMetricFamily(
            "fp4tune_choices", "Published choices", labels=["arch", "gpu", "profile", "status"]
        )
        for labels, count in sorted(n.get("choices", {}).items()):
            choices.add_metric([printable(label, 200) for label in labels], count)
        yield choices
        stale = GaugeMetricFamily(
            "fp4tune_stale_backends", "Backends whose evidence is stale", labels=["gpu"]
        )
        states = GaugeMetricFamily(
            "fp4tune_gpu_state",
            "1 for the state each device is in",
            labels=["device", "uuid", "state"],
        )
        pending = GaugeMetricFamily(
            "fp4tune_pending_layers", "Layers to be probed", labels=["device", "uuid"]
        )
        events = CounterMetricFamily(
            "fp4tune_gpu_events", "Events the driver told of", labels=["device", "uuid", "kind"]
        )
        probes = CounterMetricFamily(
            "fp4tune_probes", "Probes by how they ended", labels=["device", "uuid", "outcome"]
        )
        seconds = CounterMetricFamily(
            "fp4tune_probe_seconds", "Time spent probing", labels=["device", "uuid"]
        )
        canaries = CounterMetricFamily(
            "fp4tune_canaries", "Canaries by how they ended", labels=["device", "uuid", "outcome"]
        )
        for gpu in sorted({d["name"] for d in n.get("devices", ())}):
            stale.add_metric([gpu], n["stale"].get(gpu, 0))
        for d in n.get("devices", ()):
            who = [d["device"], d["uuid"]]
            for state in STATES:
                states.add_metric([*who, state], float(d["state"] == state))
            pending.add_metric(who, d["pending"])
            seconds.add_metric(who, n["seconds"].get(d["uuid"], 0.0))
            for kind, count in sorted(d["events"].items()):
                events.add_metric([*who, kind], count)
            for outcome in OUTCOMES:
                probes.add_metric([*who, outcome], n["outcomes"].get((d["uuid"], outcome), 0))
            for (uuid, outcome), count in sorted(n["canaries"].items()):
                if uuid == d["uuid"]:
                    canaries.add_metric([*who, outcome], count)
        yield from (stale, states, pending, events, probes, seconds, canaries)
        settled = CounterMetricFamily(
            "fp4tune_comparisons",
            "Times the published evidence was compared with this node, by what came of it",
            labels=["result"],
        )
        for result in ("compared", "published"):
            settled.add_metric([result], n.get("events", {}).get(result, 0))
        yield settled


_WITNESSED = {
    "rows": "Rows of an engine's GEMMs that the witness judged",
    "skipped": "Rows that it left, their own activation not finite or elsewhere",
    "suspicions": "Groups of rows that were suspicious",
    "faults": "Suspicions that were confirmed",
    "suspected": "Suspicions that could not be judged",
    "cleared": "Suspicions that were right after all",
    "beyond": "Groups of rows too near overflow to be judged",
}


def _witnessed(numbers: Numbers) -> Iterator[Metric]:
    """What processes that watch have told, by GPU model and backend."""
    for name, text in _WITNESSED.items():
        family = CounterMetricFamily(f"fp4tune_witness_{name}", text, labels=["gpu", "backend"])
        for (gpu, backend), counts in sorted(numbers.items()):
            family.add_metric([printable(gpu, 200), printable(backend, 200)], counts[name])
        yield family

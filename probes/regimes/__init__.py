"""Launch conditions. Each regime runs launches its own way, checked, and proves it was exercised.

A regime is a function ``(backend, cases, launches, budget) -> Outcome``. On a GPU lanes are
streams, on a CPU they are threads; a regime a device does not have is `not applicable`.
"""

from __future__ import annotations

from ..outcome import Budget, NotApplicable, Outcome, Regime
from .calm import graph, serial, side_stream
from .lanes import LANES, graph_streams, streams

__all__ = ["ALONE", "LANES", "REGIMES", "Budget", "NotApplicable", "Outcome"]

# Those that a shared lock can hang come last: a worker that dies there has shown the rest.
REGIMES: dict[str, Regime] = {
    "serial": serial,
    "graph": graph,
    "side-stream": side_stream,
    "streams": streams,
    "graph-streams": graph_streams,
}

ALONE = frozenset({"pdl-raw", "pdl-war", "pdl-waw"})
"""Those that depend on how launches fall in time: no other process may use the device meanwhile."""

"""Launch conditions. Each regime runs launches its own way, checked, and proves it was exercised.

A regime is a function ``(backend, cases, launches, budget) -> Outcome``. On a GPU lanes are
streams, on a CPU they are threads; a regime a device does not have is `not applicable`.
"""

from __future__ import annotations

from collections.abc import Callable

from ...words import CERTAIN, CHANCE, EVERY_M
from ..backends import Backend
from ..launch.outcome import Budget, NotApplicable, Outcome, Regime
from ..problem import Device
from .concurrent.callers import callers
from .concurrent.lanes import LANES, graph_streams, streams
from .concurrent.neighbours import neighbours, settled, start_neighbour
from .concurrent.shared_expert import NAME as SHARED_EXPERT
from .concurrent.shared_expert import NOT_DENSE, shared_expert
from .concurrent.threads import threads
from .host.effects import effects
from .host.first_calls import first_calls
from .host.history import history
from .host.scratch import scratch, start_scratch
from .host.weights import weights
from .memory.addresses import addresses
from .memory.memory import churn, regrow
from .memory.returned import returned_outputs
from .memory.rewrite import rewrite
from .mlp.mlp import mlp_chain
from .pdl.pdl import pdl_raw, pdl_war, pdl_waw
from .plain.calm import graph, serial, side_stream
from .plain.every_m import every_m
from .plain.huge import huge
from .plain.off_bucket import off_bucket
from .plain.own_quantiser import own_quantiser_values
from .plain.padding import padding
from .plain.strided import strided

__all__ = [
    "ALONE",
    "ASIDE",
    "CALLS",
    "CERTAIN",
    "CHANCE",
    "COPIES",
    "COSTLY",
    "EVERY_M",
    "HARDER",
    "LANES",
    "NOT_DENSE",
    "REGIMES",
    "SAME_START",
    "SHARED_EXPERT",
    "STARTS",
    "WHOLE",
    "Budget",
    "NotApplicable",
    "Outcome",
    "settled",
]

# Those that a shared lock can hang come last: a worker that dies there has shown the rest.
REGIMES: dict[str, Regime] = {
    "serial": serial,
    "graph": graph,
    "side-stream": side_stream,
    "pdl-raw": pdl_raw,
    "pdl-war": pdl_war,
    "pdl-waw": pdl_waw,
    "mlp-chain": mlp_chain,
    "rewrite": rewrite,
    "padding": padding,
    "strided": strided,
    "off-bucket": off_bucket,
    "returned": returned_outputs,
    "own-quantiser": own_quantiser_values,
    "addresses": addresses,
    "weights": weights,
    "effects": effects,
    "callers": callers,
    "scratch": scratch,
    "history": history,
    "churn": churn,
    "regrow": regrow,
    "neighbours": neighbours,
    "huge": huge,
    "streams": streams,
    SHARED_EXPERT: shared_expert,
    "first-calls": first_calls,
    "threads": threads,
    "graph-streams": graph_streams,
}

WHOLE: dict[str, Regime] = {**REGIMES, EVERY_M: every_m}

STARTS: dict[str, Callable[[Backend, Device], None]] = {
    "neighbours": lambda backend, device: start_neighbour(device),
    "scratch": start_scratch,
}
"""What a regime needs that takes seconds to start: returns at once."""

COPIES = {
    "streams": 3 * LANES,
    "graph-streams": 3 * LANES,
    SHARED_EXPERT: LANES,
    "threads": 3 * LANES,
    "first-calls": LANES,
    "addresses": 8,
    "returned": 4,
    "rewrite": 2,
    "padding": 10,
    "strided": 2,
    "churn": 2,
    "pdl-raw": 3,
    "pdl-war": 2,
    "pdl-waw": 2,
    "mlp-chain": 4,
}
"""How many times the memory of a plain chain a regime takes, where more than once."""

ALONE = frozenset({"pdl-raw", "pdl-war", "pdl-waw", "mlp-chain", "off-bucket", "huge"})
"""Those that depend on how launches fall in time, or read how much of the device's memory is in
use: no other process of ours may use the device meanwhile."""

ASIDE = frozenset({"scratch", "streams", SHARED_EXPERT, "first-calls", "threads", "graph-streams"})
"""Those that a shared lock can hang, or that wait for a process of their own: a second worker of
the backend runs them beside the rest, so that a hang costs only itself."""

COSTLY = frozenset({"pdl-raw", "pdl-war", "pdl-waw", "mlp-chain"})
"""Those where a launch costs several, with delays on top: m ranges are run at their edges only,
unless a failure rate is to be bounded."""

CALLS = {"churn": 2, "mlp-chain": 2, "rewrite": 2, "padding": 3}
"""Checked calls that a regime makes of each launch at least, where more than one."""
HARDER = {
    "threads": "streams",
    "graph-streams": "streams",
    "first-calls": "streams",
    SHARED_EXPERT: "streams",
}
"""Regimes that only add to another: what took a worker down in that one would in this one, too."""

SAME_START = {"pdl-war": "pdl-raw", "pdl-waw": "pdl-raw"}
"""Who is exempt from one of these, since its first kernel is launched without PDL, is exempt from
the other."""

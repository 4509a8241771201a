"""The controls of a run: does each regime, here and now, flag what is wrong and pass what is right?

One worker runs them all, on one small layer, before any layer under test. What came out is evidence
of a backend named ``controls``, which is no candidate; where it is not as it should be, the regime
is in doubt and so is every verdict that rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...cache.ledger import Ledger
from ...cache.rows import Evidence
from ...probes.grouped.units import WIDTH
from ...probes.grouped.zoo import controls as grouped
from ...probes.grouped.zoo.controls import ExpertsControl
from ...probes.problem import Problem
from ...probes.seeds import derive
from ...probes.worker.supervisor import WorkerFailed
from ...probes.zoo.controls import CONTROLS, GOOD, MS, NAME, PROBLEM, Control
from ...words import EXACT
from ..environment import environment_of
from ..keys import layer_key
from ..runner import Runner
from ..verdict.rules import Doubt

BUDGET = {"least": 3, "most": 20, "seconds": 0.05}
TRIES = 3
"""A bad control that was missed is tried again: some faults need two calls to collide."""
_MEMORY = 1 << 28
_FAULTS = ("host leak", "device leak", "memory held", "side effect", "wrong")
"""Errors that are what a regime says of a backend, and not an exception that one raised."""


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """The controls of a kind of layers: the backend's name, the layer they run on, the m of every
    chain, the bad ones by regime, and the width of its data in bits."""

    name: str
    problem: Problem
    ms: tuple[int, ...]
    bad: Mapping[str, Control | ExpertsControl]
    width: int


DENSE = Kind(NAME, PROBLEM, MS, CONTROLS, 24)
ROUTED = Kind(grouped.NAME, grouped.PROBLEM, grouped.MS, grouped.CONTROLS, WIDTH)
KINDS = {DENSE: False, ROUTED: True}
"""By kind: whether it is of routed experts."""


def control(
    runner: Runner,
    regimes: Sequence[str],
    seed: int,
    kind: Kind,
    ledger: Ledger,
    run: str,
) -> dict[str, Doubt]:
    """Run the controls of these regimes in `runner`, and close it; the regimes in doubt. What was
    seen goes into `ledger`, as evidence of the run called `run`."""
    tell = runner.progress
    tell(kind.name, "does each regime flag what is wrong, and only that?")
    try:
        runner.start()
        runner.build([kind.problem.at(m) for m in kind.ms], 1)
        runner.open(kind.problem, derive(seed, kind.name), _MEMORY)
        environment = environment_of(runner)
    except WorkerFailed as failure:
        doubt = Doubt(f"the controls did not start: {failure.kind} ({failure})")
        return {name: doubt for name in regimes if name in kind.bad}
    ledger.add_environment(environment)
    doubts: dict[str, Doubt] = {}

    def record(regime: str, tactic: str, part: Mapping[str, Any], expected: bool) -> str:
        """Store what came of one control; what the regime flagged it for."""
        seen = _flagged(part)
        as_expected = bool(seen) == expected
        detail = {"seen": seen, "as_expected": as_expected}
        ledger.add_evidence(
            Evidence(
                run=run,
                fingerprint=environment.fingerprint,
                backend=kind.name,
                tactic=tactic,
                bucket=layer_key(kind.problem).bucket(min(kind.ms), max(kind.ms)),
                regime=regime,
                data=EXACT,
                status="failed" if seen else "not exercised" if part["not_exercised"] else "passed",
                launches=part["launches"],
                problems=part["problems"],
                width=kind.width,
                seconds=part["seconds"],
                detail=detail,
            )
        )
        return seen

    for regime in (name for name in regimes if name in kind.bad):
        bad_control = kind.bad[regime]
        try:
            if seen := record(regime, GOOD, _once(runner, regime, GOOD, kind), False):
                doubts[regime] = Doubt(f"a right kernel was flagged ({seen})", spoils=True)
                continue
            for _ in range(TRIES):
                bad = _once(runner, regime, bad_control.tactic, kind)
                if _flagged(bad):
                    break
            if not record(regime, bad_control.tactic, bad, True):
                why = bad.get("not_exercised") or _stopped_by_an_error(bad)
                text = f"a kernel that {bad_control.about} was not flagged"
                doubts[regime] = Doubt(f"{text}: {why}" if why else text)
        except WorkerFailed as failure:
            if failure.kind == "not applicable":
                continue
            doubts[regime] = Doubt(f"the controls did not finish: {failure.kind} ({failure})")
    runner.close()
    for regime, doubt in doubts.items():
        tell(kind.name, f"{regime} is in doubt: {doubt.reason}")
    return doubts


def _once(runner: Runner, regime: str, tactic: str, kind: Kind) -> dict[str, Any]:
    items = [{"ms": list(kind.ms), "tactic": tactic, "width": kind.width}]
    result = runner.ask("regime", name=regime, items=items, budget=BUDGET)
    (part,) = result["items"]
    return {**part, **{k: result[k] for k in ("seconds", "not_exercised")}}


def _flagged(part: Mapping[str, Any]) -> str:
    """What the regime found wrong, in a word; nothing where it found nothing."""
    if part["bad"]:
        return str(part["bad"][0]["kind"])
    if part.get("changed_inputs"):
        return "input modified"
    kind = str(part.get("error", {}).get("kind", ""))
    return kind if kind in _FAULTS else ""


def _stopped_by_an_error(part: Mapping[str, Any]) -> str:
    return str(part.get("error", {}).get("message", ""))

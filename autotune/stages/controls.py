"""The controls of a run: does each regime, here and now, flag what is wrong and pass what is right?

One worker runs them all, on one small layer, before any layer under test. What came out is evidence
of a backend named ``controls``, which is no candidate; where it is not as it should be, the regime
is in doubt and so is every verdict that rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...cache.ledger import Ledger
from ...cache.rows import BucketKey, Evidence
from ...probes.regimes import REGIMES
from ...probes.seeds import derive
from ...probes.worker.supervisor import WorkerFailed
from ...probes.zoo.controls import CONTROLS, GOOD, MS, NAME, PROBLEM
from ..plan import Plan
from ..runner import Progress, Runner
from ..verdict.rules import EXACT, Doubt
from .build import environment_of

BUDGET = {"least": 3, "most": 20, "seconds": 0.05}
TRIES = 3
"""A bad control that was missed is tried again: some faults need two calls to collide."""
_MEMORY = 1 << 28
_FAULTS = ("host leak", "device leak")
"""Errors that are what a regime says of a backend, and not an exception that one raised."""


def runner_of(plan: Plan, progress: Progress) -> Runner:
    """The worker that runs them, not started."""
    # A hang is looked for among backends; this one has none, and may have to compile.
    usual = replace(plan, hang_seconds=None).patience
    return Runner(NAME, plan.target, usual, plan.python, progress)


def of_probe(
    plan: Plan, runner: Runner, ledger: Ledger, run_id: str, progress: Progress
) -> dict[str, Doubt]:
    """Run the controls of every regime that this probe runs; the regimes that are in doubt."""
    progress("controls", "does each regime flag what is wrong, and only that?")
    regimes = [name for name in REGIMES if name not in plan.level.without]
    try:
        start(runner, derive(plan.seed, NAME))
        environment = environment_of(runner, plan.target)
    except WorkerFailed as failure:
        doubt = Doubt(f"the controls did not start: {failure.kind} ({failure})")
        return {name: doubt for name in regimes if name in CONTROLS}
    ledger.add_environment(environment)
    found = run(runner, regimes, ledger, run_id, environment.fingerprint)
    runner.close()
    for regime, doubt in found.items():
        progress("controls", f"{regime} is in doubt: {doubt.reason}")
    return found


def start(runner: Runner, seed: int) -> None:
    """Bring the worker to where the controls can run. Raises WorkerFailed."""
    runner.start()
    runner.build([PROBLEM.at(m) for m in MS], 1)
    runner.open(PROBLEM, seed, _MEMORY)


def run(
    runner: Runner, regimes: Sequence[str], ledger: Ledger, run_id: str, fingerprint: str
) -> dict[str, Doubt]:
    """Every control of `regimes`, with what was seen as evidence; the regimes that are in doubt."""
    doubts: dict[str, Doubt] = {}
    for regime in regimes:
        if regime not in CONTROLS:
            continue
        control = CONTROLS[regime]
        try:
            right = _once(runner, regime, GOOD)
            seen = _flagged(right)
            _record(ledger, run_id, fingerprint, regime, GOOD, right, seen, not seen)
            if seen:
                doubts[regime] = Doubt(f"a right kernel was flagged ({seen})", spoils=True)
                continue
            for _ in range(TRIES):
                bad = _once(runner, regime, control.tactic)
                seen = _flagged(bad)
                if seen:
                    break
            _record(ledger, run_id, fingerprint, regime, control.tactic, bad, seen, bool(seen))
            if not seen:
                why = bad.get("not_exercised") or _raised(bad)
                text = f"a kernel that {control.about} was not flagged"
                doubts[regime] = Doubt(f"{text}: {why}" if why else text)
        except WorkerFailed as failure:
            if failure.kind == "not applicable":
                continue
            doubts[regime] = Doubt(f"the controls did not finish: {failure.kind} ({failure})")
    return doubts


def _once(runner: Runner, regime: str, tactic: str) -> dict[str, Any]:
    items = [{"ms": list(MS), "tactic": tactic, "width": 24}]
    result = runner.ask("regime", runner.patience.regime, name=regime, items=items, budget=BUDGET)
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


def _raised(part: Mapping[str, Any]) -> str:
    return str(part.get("error", {}).get("message", ""))


def _record(
    ledger: Ledger,
    run_id: str,
    fingerprint: str,
    regime: str,
    tactic: str,
    part: Mapping[str, Any],
    seen: str,
    as_expected: bool,
) -> None:
    p = PROBLEM
    ledger.add_evidence(
        Evidence(
            run=run_id,
            fingerprint=fingerprint,
            backend=NAME,
            tactic=tactic,
            bucket=BucketKey(
                p.format, p.activation, p.out_dtype, p.groups, min(MS), max(MS), p.n, p.k
            ),
            regime=regime,
            data=EXACT,
            status="failed" if seen else "not exercised" if part["not_exercised"] else "passed",
            launches=part["launches"],
            problems=part["problems"],
            width=24,
            seconds=part["seconds"],
            detail={"seen": seen, "as_expected": as_expected},
        )
    )

"""What earlier runs brought to an end, and which of it need not be measured again.

The last thing a probe writes of a layer is a row ``probed``: who took part, and how it was
measured. What such a row speaks of is complete. Of a layer that has none, since the probe was
killed before its end, the steps that are finished (`steps`) are used again. A backend's evidence on
a layer is used again where it was taken on the same device, in the same environment
(`cache.fingerprint`), by the same code of fp4tune (`method`), at this level or a higher one, and
left nothing open. Times are compared within one run only: they are used where every backend that
takes part now took part then, and is known.

A run that is damaged (`cache.seal`) is set aside: nothing of it is used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..cache import quarantine_store
from ..cache.ledger import Ledger
from ..cache.rows import (
    BucketKey,
    Evidence,
    Finding,
    FinishedStep,
    LayerKey,
    Probed,
    Timing,
    Where,
    without_forgotten,
)
from ..probes.problem import Problem
from ..words import AUDIT, NOT_TRIED
from .agreement import Agreement
from .budget import SLOWER
from .evidence.method import method_of
from .keys import bucket_key, layer_key
from .levels import Level
from .plan import Plan
from .steps import BEGUN, TIMING, Started, started
from .verdict.bounds import Bound, Kernel, codes, kernel, pool
from .verdict.buckets import MRange, ranges
from .verdict.rules import INCONCLUSIVE, judge

Entry = Mapping[str, Any]
"""How a backend was measured on a layer, as `stages.recall` makes it."""
_SETTLED, _LEFT, _OPEN = "settled", "left out by a time budget", "open"
_ASIDE = ("name", "rate")
"""Of a level, what says nothing about how thorough its evidence is; rates are judged by bounds."""


@dataclass(slots=True)
class Recalled:
    """What is known of a layer. `entries` are by backend, `started` those in which steps of it are
    finished. Where `times` is None the layer is to be measured; those that take part must be timed
    side by side, known or not, unless `timed` says in which run they were."""

    entries: dict[str, Entry] = field(default_factory=dict)
    started: dict[str, Started] = field(default_factory=dict)
    times: Probed | None = None
    timed: str | None = None
    evidence: dict[str, list[Evidence]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def forget(self, name: str) -> None:
        """This backend must be measured, so that all must be timed."""
        del self.entries[name], self.evidence[name]
        self.times = None

    def runs(self, name: str) -> Sequence[str]:
        """The runs that hold the evidence of a backend."""
        if name in self.entries:
            return [str(run) for run in self.entries[name]["runs"]]
        return self.started[name].runs if name in self.started else ()


def times_run(row: Probed) -> str:
    """The run that holds the times of a layer that is done."""
    return str(row.detail.get("timed") or row.run)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Compiled kernels as far as evidence knows them, and what it bounds of each."""

    digests: Mapping[Where, str]
    pooled: Mapping[Kernel, Mapping[str, Bound]]

    def bounds(self, where: Where) -> Mapping[str, Bound]:
        """By regime, of the kernel that serves a tactic in a bucket."""
        return self.pooled.get(kernel(where, self.digests), {})


class History:
    """The rows ``probed`` of one device, as one probe may use them."""

    def __init__(self, plan: Plan, ledger: Ledger, state_dir: Path) -> None:
        self._plan = plan
        self._ledger = ledger
        self._quarantines, _ = quarantine_store.read(quarantine_store.place(state_dir))
        self._rows: dict[LayerKey, list[Probed]] = {}
        self._steps: dict[tuple[LayerKey, str], list[FinishedStep]] = {}
        self._evidence = lru_cache(maxsize=None)(self._read_evidence)
        self.damaged: dict[str, str] = {}
        """Runs that would have been used, and what is wrong with them."""
        if plan.again:
            return
        ended: set[tuple[LayerKey, str, str]] = set()
        taken_back = ledger.forgotten()
        for row in (without_forgotten(row, taken_back) for row in reversed(ledger.probed())):
            layer = row.bucket.layer
            ended.update((layer, n, r) for n, how in _entrants(row).items() for r in how["runs"])
            if row.device == plan.device:
                self._rows.setdefault(layer, []).append(row)
        for step in ledger.steps():
            layer = step.bucket.layer
            if (layer, step.backend, step.run) not in ended:
                self._steps.setdefault((layer, step.backend), []).append(step)

    def of(self, problem: Problem, backend: str | None = None) -> bool:
        """Whether anything may be known of a layer, or of a backend there."""
        rows = self._rows.get(layer_key(problem), ())
        return any(backend is None or backend in _entrants(row) for row in rows)

    def recall(
        self,
        taking: Mapping[Problem, Sequence[str]],
        fingerprints: Mapping[str, str],
        begins: Mapping[Problem, bool],
        agreement: Agreement | None = None,
    ) -> dict[Problem, Recalled]:
        """What need not be measured again. `taking` are the backends that take part, `fingerprints`
        theirs, `begins` whether ``mlp-chain`` is run with that layer as its first."""
        found = {p: self._entries(p, names, fingerprints, begins[p]) for p, names in taking.items()}
        for problem, layer in found.items():
            for name, known in layer.entries.items():
                layer.evidence[name] = self._rows_of(problem, name, known)
        exact = [row for each in found.values() for rows in each.evidence.values() for row in rows]
        kernels = Kernels(codes(exact), pool(exact, self._plan.confidence))
        for problem, layer in found.items():
            left = set()
            for name, known in list(layer.entries.items()):
                state = self._state(problem, name, known, layer.evidence[name], kernels)
                if state == _OPEN or not _agreed(agreement, self._plan, problem, name, known):
                    layer.forget(name)
                elif state == _LEFT:
                    left.add(name)
            # Whether they are still beaten is known only where nothing is measured beside them.
            for name in left & layer.entries.keys() if layer.times is None else ():
                layer.forget(name)
            for name in taking[problem]:
                if name not in layer.entries:
                    self._go_on(problem, name, fingerprints[name], begins[problem], layer)
                    self._agree(agreement, problem, name, layer)
            layer.timed = self._timed(taking[problem], fingerprints, layer)
            self._rest(problem, layer)
        return found

    def quantised(
        self, where: BucketKey, name: str, print_: str
    ) -> tuple[list[Finding], list[Timing]] | None:
        """What was found of an activation quantiser, and its times, the last ones last; None where
        it must be probed."""
        for row in self._rows.get(where.layer, ()):
            known = _entrants(row).get(name)
            if known is not None and self._fits(name, known, print_):
                (run,) = known["runs"]
                here = {r.id for r in self._ledger.runs() if r.device == self._plan.device}
                times = self._ledger.timings(backend=name, fingerprints=[print_])
                alike = [t for t in times if t.bucket.layer == where.layer]
                mine = [t for t in alike if t.run in here and self._whole(t.run)]
                return self._ledger.findings(run=run, backend=name, bucket=where), mine
        return None

    def _entries(
        self, problem: Problem, names: Sequence[str], prints: Mapping[str, str], begins: bool
    ) -> Recalled:
        rows = self._rows.get(layer_key(problem), ())
        found = Recalled()
        for row in rows:
            able = {
                name: known
                for name, known in _entrants(row).items()
                if name in names and self._usable(problem, name, known, prints[name], begins)
            }
            enough = row.detail["samples"] >= self._plan.level.samples
            enough = enough and self._whole(times_run(row))
            # Of each backend the last measurement counts, whoever it was timed beside.
            if names and enough and len(able) == len(names) and not found.entries:
                return Recalled(able, times=row)
            for name, known in able.items():
                found.entries.setdefault(name, known)
        return found

    def _usable(self, problem: Problem, name: str, known: Entry, print_: str, begins: bool) -> bool:
        if not (self._fits(name, known, print_) and self._same(problem, known, begins)):
            return False
        return not self._reported(problem, name, known, print_)

    def _same(self, problem: Problem, known: Entry, begins: bool) -> bool:
        """Whether the layer was measured in all the ranges and the chain that are asked for."""
        without = self._plan.level.without
        there = {MRange(lo, hi) for lo, hi, _ in known["tactics"]}
        chained = known["begins_mlp"] or not begins or "mlp-chain" in without
        return bool(chained and there.issuperset(ranges(problem.m)))

    def _reported(self, problem: Problem, name: str, known: Entry, print_: str) -> bool:
        """Whether a fault was reported since of the tactics that were taken."""
        at_all = bucket_key(problem)
        for m, tactic in winner_of(known).items():
            place = asdict(at_all) | {"m_lo": m.lo, "m_hi": m.hi}
            mine = {**place, "backend": name, "tactic": tactic, "fingerprint": print_}
            if any(q.at > known["at"] and q.covers(mine) for q in self._quarantines):
                return True
        return False

    def _whole(self, run: str) -> bool:
        """Whether a run is as it was stored; one that is not is remembered."""
        why = self._ledger.damaged(run)
        if why:
            self.damaged[run] = why
        return not why

    def _go_on(
        self, problem: Problem, name: str, print_: str, begins: bool, layer: Recalled
    ) -> None:
        """What of a layer this backend finished in runs that were ended before its end."""
        rows = self._steps.get((layer_key(problem), name), ())
        usable = {
            row.run
            for row in rows
            if row.what == BEGUN
            and row.detail["device"] == self._plan.device
            and self._fits(name, row.detail, print_)
            and self._same(problem, row.detail, begins)
        }
        found = started([row for row in rows if row.run in usable])
        if found is None:
            return
        winner = [[m.lo, m.hi, tactic] for m, tactic in (found.winner or {}).items()]
        if self._reported(problem, name, {"at": found.at, "winner": winner}, print_):
            return
        layer.started[name] = found
        wanted = {bucket_key(problem, m) for m in ranges(problem.m)}
        every = (row for run in found.runs for row in self._evidence(run, name, print_))
        # What a time budget left out is tried now.
        layer.evidence[name] = [r for r in every if r.bucket in wanted and r.regime != NOT_TRIED]

    def _agree(
        self, agreement: Agreement | None, problem: Problem, name: str, layer: Recalled
    ) -> None:
        """Have tactics compared again that are not those of the other GPUs of this probe."""
        found = layer.started.get(name)
        if agreement is None or found is None or found.winner is None:
            return
        scope = (self._plan.target.name, problem, name)
        if agreement.settle(scope, found.winner, tactics_of(found.how)) != found.winner:
            found.winner = found.timed = None

    def _timed(
        self, names: Sequence[str], prints: Mapping[str, str], layer: Recalled
    ) -> str | None:
        """The run in which all who are to be timed were, where its times hold."""
        if layer.times or not layer.started.keys() | layer.entries.keys() >= set(names):
            return None
        racing = {name for name, known in layer.entries.items() if winner_of(known)}
        for name, found in layer.started.items():
            if found.winner is None and found.opened:
                return None
            racing |= {name} if found.winner else set()
        runs = {found.timed.run for found in layer.started.values() if found.timed}
        if len(runs) != 1:
            return None
        (run,) = runs
        rows = [row for rows in self._steps.values() for row in rows if row.run == run]
        bucket = {f.timed.bucket for f in layer.started.values() if f.timed}
        mine = [row for row in rows if row.what == TIMING and row.bucket in bucket]
        holds = (
            {row.backend for row in mine} == racing
            and all(row.fingerprint == prints[row.backend] for row in mine)
            and all(row.detail["samples"] >= self._plan.level.samples for row in mine)
        )
        return run if holds else None

    def _fits(self, name: str, known: Entry, print_: str) -> bool:
        plan = self._plan
        return (
            known["fingerprint"] == print_
            and known.get("method") == method_of(name)
            and covers(known["level"], plan.level)
            and known["hang_seconds"] == plan.hang_seconds
            and all(self._whole(run) for run in known["runs"])
            and (not plan.seed_given or known["seed"] == plan.seed)
            and not set(known["doubts"]) - set(plan.level.without)
        )

    def _rows_of(self, problem: Problem, name: str, known: Entry) -> list[Evidence]:
        wanted = {bucket_key(problem, m) for m in ranges(problem.m)}
        rows = (r for run in known["runs"] for r in self._evidence(run, name, known["fingerprint"]))
        return [row for row in rows if row.bucket in wanted]

    def _read_evidence(self, run: str, name: str, print_: str) -> list[Evidence]:
        return self._ledger.evidence(run=run, backend=name, fingerprints=[print_])

    def _state(
        self,
        problem: Problem,
        name: str,
        known: Entry,
        rows: Sequence[Evidence],
        kernels: Kernels,
    ) -> str:
        """Whether this evidence comes to a verdict: what it leaves open is tried again.

        Except for one that took its worker down, which is left at what that leaves open, and for
        those that were left out since two faster ones are proven.
        """
        state = _SETTLED
        if known["reference_line"] or known["dead"]:
            return _SETTLED if rows else _OPEN
        for m in ranges(problem.m):
            where = bucket_key(problem, m)
            tactic = winner_of(known).get(m) or tactics_of(known)[m][0]
            facts = [
                r for r in rows if (r.tactic, r.bucket) == (tactic, where) and r.regime != AUDIT
            ]
            bounds = kernels.bounds(Where(name, tactic, where))
            if judge(facts, self._plan.rules, bounds).status != INCONCLUSIVE:
                continue
            notes = [str(r.detail.get("note")) for r in facts if r.regime == NOT_TRIED]
            everyone = self._plan.budget is None and self._plan.target.device.kind == "cpu"
            if everyone or not notes or not all(SLOWER in n for n in notes):
                return _OPEN
            state = _LEFT
        return state

    def _rest(self, problem: Problem, layer: Recalled) -> None:
        """The findings of what is known, and its times where they hold."""
        wanted = {bucket_key(problem, m) for m in ranges(problem.m)}
        how = {**layer.entries, **{name: each.how for name, each in layer.started.items()}}
        timed = times_run(layer.times) if layer.times else layer.timed
        for name, known in how.items():
            prints = [known["fingerprint"]]
            for run in layer.runs(name):
                mine = self._ledger.findings(run=run, backend=name, fingerprints=prints)
                layer.findings += [row for row in mine if row.bucket in wanted]
            if timed:
                times = self._ledger.timings(run=timed, backend=name, fingerprints=prints)
                layer.timings += [row for row in times if row.bucket in wanted]


def _entrants(row: Probed) -> Mapping[str, Entry]:
    """By backend, how those that took part were measured."""
    found: Mapping[str, Entry] = row.detail["entrants"]
    return found


def covers(had: Mapping[str, Any], wanted: Level) -> bool:
    """Whether evidence of a level, stored as a dictionary, is as thorough as `wanted` asks for."""
    for each in fields(Level):
        if each.name in _ASIDE:
            continue
        there, here = had.get(each.name), getattr(wanted, each.name)
        if isinstance(here, tuple):
            if there is None or not set(there) <= set(here):
                return False
        elif there is None or there < here:
            return False
    return True


def _agreed(
    agreement: Agreement | None, plan: Plan, problem: Problem, name: str, known: Entry
) -> bool:
    """Whether the tactics that are known are those of the other GPUs of this probe."""
    if agreement is None or known["reference_line"]:
        return True
    own = {m: tactic for m, tactic in winner_of(known).items() if m in ranges(problem.m)}
    scope = (plan.target.name, problem, name)
    return agreement.settle(scope, own, tactics_of(known)) == own


def winner_of(known: Entry) -> dict[MRange, str]:
    """The tactic that was taken in each range; none where the backend never came so far."""
    return {MRange(lo, hi): tactic for lo, hi, tactic in known["winner"]}


def tactics_of(known: Entry) -> dict[MRange, list[str]]:
    """The tactics that were tried in each range."""
    return {MRange(lo, hi): list(names) for lo, hi, names in known["tactics"]}

"""What this prober catches here: mutants of the zoo through an ordinary probe, and what came out.

The probe is the one users run, on a small problem with fixed data; its ledger is temporary and
nothing is published.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..cache.ledger import Ledger
from ..cache.rows import Evidence
from ..errors import NOT_ASSESSED, SAFE, UNSAFE
from ..machine.devices import Target
from ..machine.hardware import hardware
from ..probes import zoo
from ..probes.problem import Device, Problem
from ..probes.zoo import Mutant
from .levels import LEVELS
from .plan import Plan, Report
from .probe import probe
from .runner import Progress
from .verdict.profiles import PROFILES
from .verdict.rules import Doubts

OK, MISSED, FALSE_ALARM, UNDECIDED = "ok", "MISSED", "FALSE ALARM", "UNDECIDED"

N, K = 320, 272
"""The last tile is partial along n and along k."""
MAX_M = 2
MANY_M = 40
"""The largest m for mutants that show over many different m only."""
AT_ONCE, MOST_AT_ONCE = 8, 24
"""Mutants in one probe, and those on a GPU that has room for them: each has processes of its own,
and its share of the memory."""
_GPU_BYTES = 4 << 30
"""A GPU's memory for each, of which torch's context takes half a gigabyte a process."""
SEED = 20
"""The same data everywhere, so that what two nodes show can be compared."""
HANG_SECONDS = {"cpu": 4.0, "cuda": 10.0}
"""Silence that counts as a hang among mutants that end their process; others get the usual time.
A GPU's kernels may have to be compiled meanwhile."""
LEVEL = replace(
    LEVELS["standard"],
    ragged=2,
    least=3,
    most=20,
    long=False,
    samples=3,
    launches=0,
)
"""Level ``standard`` in its regimes, and less of each: most mutants are caught at once or never."""
BY_LEVEL = {
    "quick": LEVEL,
    "standard": replace(LEVEL, long=True, launches=LEVELS["standard"].launches, on_cpu=60.0),
    "soak": replace(LEVELS["soak"], seconds=10.0, launches=0),
}
"""What a mutant is probed at, by the least level that catches it: from ``standard`` on a fault is
looked for at length."""

Watching = Callable[[Plan], AbstractContextManager[Progress]]


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one mutant.

    `finding` is the first one of what was expected, else the first; `caught` has every regime and
    kind of data that failed, with the launch of the first failure where that is known, and the
    seconds that the regime took; `launches` counts all that were checked, over every regime.
    """

    mutant: str
    failure: str
    mechanism: str
    expected: str
    verdict: str
    finding: dict[str, str] | None
    launches: int
    result: str
    caught: tuple[dict[str, Any], ...] = ()

    def json(self) -> dict[str, Any]:
        return asdict(self)


def choose(device: Device, wanted: Sequence[str]) -> tuple[Mutant, ...]:
    """The mutants to run on such a device: those wanted, or all but those that need a soak.

    A mutant of something that the device lacks (PDL before SM90) is left out, too. Raises
    ValueError, one sentence, for a name that no mutant has here.
    """
    here = {mutant.name: mutant for mutant in zoo.mutants(device.kind)}
    for name in wanted:
        if name not in here:
            close = difflib.get_close_matches(name, here, n=1, cutoff=0.0)
            raise ValueError(f"there is no mutant {name!r} for {device.kind}; nearest: {close[0]}")
    if wanted:
        return tuple(here[name] for name in dict.fromkeys(wanted))
    return tuple(
        m for m in here.values() if m.level_on(device.kind) != "soak" and not lacking(m, device)
    )


def lacking(mutant: Mutant, device: Device) -> str | None:
    """Why a mutant cannot run on this device; None if it can."""
    problem = Problem("nvfp4", MAX_M, N, K, mutant.activation)
    return zoo.named(mutant.name).unsupported(problem, device)


def plan(target: Target, mutants: Sequence[Mutant]) -> Plan:
    """The probe of these mutants, which are of one kind (see `_groups`)."""
    first = mutants[0]
    # A hang costs its whole patience, once for every part of the m ranges it is tried in.
    m = 1 if first.ends else MANY_M if first.many else MAX_M
    return Plan(
        target=target,
        backends=tuple(mutant.name for mutant in mutants),
        problems=(Problem("nvfp4", m, N, K, first.activation),),
        level=BY_LEVEL[first.level_on(target.device.kind)],
        profile=PROFILES["strict"],
        seed=SEED,
        hang_seconds=HANG_SECONDS[target.device.kind] if first.ends else None,
        argv=("selftest",),
        enough=len(mutants) + 1,  # all are launched as the first is, however many are right
    )


def at_once(target: Target) -> int:
    """How many mutants one probe runs here: as many as a GPU's memory and the cores have room for.
    On a CPU they wait for each other."""
    if target.device.kind == "cpu":
        return AT_ONCE
    memory = hardware(target.uuid).get("memory_bytes") or 0
    room = min(memory // _GPU_BYTES, 3 * len(os.sched_getaffinity(0)) // 2)
    return max(AT_ONCE, min(MOST_AT_ONCE, room))


def _groups(mutants: Sequence[Mutant], most: int, kind: str) -> Iterator[list[Mutant]]:
    """Mutants that one probe of such a device can run together, at most so many at a time."""
    kinds: dict[tuple[Any, ...], list[Mutant]] = {}
    for mutant in mutants:
        alike = (mutant.ends, mutant.many, mutant.activation, mutant.level_on(kind))
        kinds.setdefault(alike, []).append(mutant)
    for mine in kinds.values():
        for start in range(0, len(mine), most):
            yield mine[start : start + most]


def selftest(target: Target, mutants: Sequence[Mutant], watching: Watching) -> Iterator[Row]:
    """Probe `mutants` on `target`: a row each, as they are known.

    `watching` shows a probe's progress. Raises what a probe raises.
    """
    doubts: dict[tuple[str, ...], Doubts] = {}
    for mine in _groups(mutants, at_once(target), target.device.kind):
        wanted = plan(target, mine)
        # The controls are the same ones, minutes later.
        wanted = replace(wanted, doubts=doubts.get(wanted.level.without))
        with (
            TemporaryDirectory(prefix="fp4tune-selftest-") as place,
            Ledger.open(place) as ledger,
            watching(wanted) as progress,
        ):
            report = probe(wanted, ledger, Path(place), progress)
            doubts[wanted.level.without] = report.doubts
            unsafe = {v.backend for v in ledger.verdicts(run=report.run) if v.status == "unsafe"}
            rows = [
                _selftest_row(m, report, ledger.evidence(backend=m.name), m.name in unsafe)
                for m in mine
            ]
        yield from rows


def _selftest_row(
    mutant: Mutant, report: Report, evidence: Sequence[Evidence], unsafe: bool
) -> Row:
    """What was made of one mutant; `unsafe` says whether any of its tactics came out as that.

    A candidate is a backend's best tactic, and one that is blamed is not: another may be right.
    """
    candidates = [c for c in report.candidates if c.backend == mutant.name]
    verdicts = {c.verdict for c in candidates} | ({"unsafe"} if unsafe else set())
    conditions = {str(each["id"]) for c in candidates for each in c.conditions}
    mine = [f for f in report.findings if f.backend == mutant.name]
    found = [{"kind": f.kind, "regime": f.regime, "data": f.data} for f in mine]
    expected = [f for f in found if {f["regime"], f["data"]} & set(mutant.caught_by)]
    caught: dict[tuple[str, str], dict[str, Any]] = {}
    for f in mine:
        place = caught.setdefault(
            (f.regime, f.data),
            {"regime": f.regime, "data": f.data, "kind": f.kind, "launch": None, "seconds": None},
        )
        if f.launch is not None:
            place["launch"] = min(f.launch, place["launch"] or f.launch)
    for row in evidence:
        if (row.regime, row.data) in caught and row.status == "failed":
            seconds = caught[row.regime, row.data]["seconds"] or 0.0
            caught[row.regime, row.data]["seconds"] = round(seconds + row.seconds, 3)
    why = report.broken.get(mutant.name) or report.unsupported.get(mutant.name)
    return Row(
        mutant=mutant.name,
        failure=mutant.failure,
        mechanism=mutant.mechanism,
        expected=mutant.expected,
        verdict=_verdict_in_words(verdicts, conditions) if verdicts else f"not run: {why}",
        finding=next(iter([*expected, *found]), None),
        launches=sum(row.launches for row in evidence),
        result=judge(mutant, verdicts, conditions, bool(found), bool(expected)),
        caught=tuple(caught.values()),
    )


def judge(
    mutant: Mutant, verdicts: set[str], conditions: set[str], found: bool, expected: bool
) -> str:
    """Whether a mutant was taken for what it is.

    `verdicts` are those of its buckets, `conditions` the ids of what they depend on; `found` says
    whether there was any finding, `expected` whether one came from where the mutant says.
    """
    wanted = {mutant.condition} if mutant.condition else set()
    if not verdicts:
        return UNDECIDED
    if not (mutant.passes or mutant.condition):
        return OK if "unsafe" in verdicts and expected else MISSED
    if "unsafe" in verdicts or conditions - wanted or (mutant.passes and found):
        return FALSE_ALARM
    if verdicts != {"safe"}:
        return UNDECIDED
    return OK if mutant.passes or (conditions == wanted and expected) else MISSED


def _verdict_in_words(verdicts: set[str], conditions: set[str]) -> str:
    for verdict in ("unsafe", "inconclusive"):
        if verdict in verdicts:
            return verdict
    return "safe" + (f" under {', '.join(sorted(conditions))}" if conditions else "")


def exit_code(rows: Iterable[Row]) -> int:
    """0 if all is as expected, 1 if one was missed or falsely flagged, 2 if any is undecided."""
    results = {row.result for row in rows}
    if results & {MISSED, FALSE_ALARM}:
        return UNSAFE
    return SAFE if results == {OK} else NOT_ASSESSED


def document(target: Target, rows: Iterable[Row]) -> dict[str, Any]:
    """One device's rows as plain data."""
    return {
        "device": target.name,
        "arch": target.device.arch,
        "seed": SEED,
        "mutants": [row.json() for row in rows],
    }

"""What this prober catches here: mutants of the zoo through an ordinary probe, and what came out.

The probe is the one users run, on a small problem with fixed data; its ledger is temporary and
nothing is published.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..cache.ledger import Ledger
from ..errors import NOT_ASSESSED, SAFE, UNSAFE
from ..probes import zoo
from ..probes.devices import Target
from ..probes.problem import Problem
from ..probes.zoo import Mutant
from .levels import LEVELS
from .probe import Plan, Report, probe
from .profiles import PROFILES
from .runner import Progress
from .tables import console

OK, MISSED, FALSE_ALARM, UNDECIDED = "ok", "MISSED", "FALSE ALARM", "UNDECIDED"

N, K = 320, 272
"""The last tile is partial along n and along k."""
MAX_M = 2
SEED = 20
"""The same data everywhere, so that what two nodes show can be compared."""
HANG_SECONDS = 4.0
"""Silence that counts as a hang among mutants that end their process; others get the usual time."""

Watching = Callable[[Plan], AbstractContextManager[Progress]]


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one mutant.

    `finding` is the first one of what was expected, else the first; `launches` counts all that
    were checked, over every regime.
    """

    mutant: str
    failure: str
    mechanism: str
    expected: str
    verdict: str
    finding: dict[str, str] | None
    launches: int
    result: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def choose(device_kind: str, wanted: Sequence[str]) -> tuple[Mutant, ...]:
    """The mutants to run on such a device: those wanted, or all.

    Raises ValueError, one sentence, for a name that no mutant has here.
    """
    here = {mutant.name: mutant for mutant in zoo.mutants(device_kind)}
    for name in wanted:
        if name not in here:
            close = difflib.get_close_matches(name, here, n=1, cutoff=0.0)
            raise ValueError(f"there is no mutant {name!r} for {device_kind}; nearest: {close[0]}")
    return tuple(here[name] for name in dict.fromkeys(wanted or here))


def plan(target: Target, mutants: Iterable[Mutant], ends: bool) -> Plan:
    """The probe of those mutants; for those that end their process with little patience."""
    return Plan(
        target=target,
        backends=tuple(mutant.name for mutant in mutants),
        # A hang costs its whole patience, once for every part of the m ranges it is tried in.
        problems=(Problem("nvfp4", 1 if ends else MAX_M, N, K),),
        level=LEVELS["quick"],
        profile=PROFILES["strict"],
        seed=SEED,
        hang_seconds=HANG_SECONDS if ends else None,
        argv=("selftest",),
    )


def selftest(target: Target, mutants: Sequence[Mutant], watching: Watching) -> list[Row]:
    """Probe `mutants` on `target`: one row each, in their order.

    `watching` shows a probe's progress. Raises what a probe raises.
    """
    rows: dict[str, Row] = {}
    for ends in (False, True):
        mine = [mutant for mutant in mutants if mutant.ends == ends]
        if not mine:
            continue
        wanted = plan(target, mine, ends)
        with (
            TemporaryDirectory(prefix="fp4tune-selftest-") as place,
            Ledger.open(place) as ledger,
            watching(wanted) as progress,
        ):
            report = probe(wanted, ledger, Path(place), progress)
            for mutant in mine:
                evidence = ledger.evidence(backend=mutant.name)
                rows[mutant.name] = _row(mutant, report, sum(e.launches for e in evidence))
    return [rows[mutant.name] for mutant in mutants]


def _row(mutant: Mutant, report: Report, launches: int) -> Row:
    candidates = [c for c in report.candidates if c.backend == mutant.name]
    verdicts = {c.verdict for c in candidates}
    conditions = {str(each["id"]) for c in candidates for each in c.conditions}
    found = [
        {"kind": f.kind, "regime": f.regime, "data": f.data}
        for f in report.findings
        if f.backend == mutant.name
    ]
    expected = [f for f in found if {f["regime"], f["data"]} & set(mutant.caught_by)]
    why = report.broken.get(mutant.name) or report.unsupported.get(mutant.name)
    return Row(
        mutant=mutant.name,
        failure=mutant.failure,
        mechanism=mutant.mechanism,
        expected=mutant.expected,
        verdict=_worst(verdicts, conditions) if verdicts else f"not run: {why}",
        finding=next(iter([*expected, *found]), None),
        launches=launches,
        result=judge(mutant, verdicts, conditions, bool(found), bool(expected)),
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


def _worst(verdicts: set[str], conditions: set[str]) -> str:
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


def print_rows(target: Target, rows: Sequence[Row]) -> None:
    """A table of all rows, and how many came out as expected."""
    out = console()
    out.print(f"\n[bold]{escape(target.name)}[/] ({target.device.arch})")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("mutant", "expected", "verdict", "found", "launches", "result"):
        table.add_column(heading, justify="right" if heading == "launches" else "left")
    for row in rows:
        found = ", ".join(row.finding.values()) if row.finding else ""
        result = row.result if row.result == OK else f"[red]{row.result}[/]"
        cells = (row.mutant, row.expected, row.verdict, found, str(row.launches))
        table.add_row(*map(escape, cells), result)
    out.print(table)
    good = sum(row.result == OK for row in rows)
    out.print(f"{good} of {len(rows)} as expected")

"""What ``fp4tune audit`` shows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from ...errors import NOT_ASSESSED, SAFE, UNSAFE, Refused, printable
from ...machine.devices import gpus
from .disassemble import Progress
from .judge import CLEAN, FLAGGED, Report


def arch(asked: int | None) -> int | None:
    """The SM to audit for: what was asked, else the one kind of GPU that is here, else all.

    Raises Refused for what is no SM.
    """
    if asked is not None:
        if not 50 <= asked < 200:
            raise Refused(f"--arch {asked} is not an SM such as 90, 100 or 120")
        return asked
    here = {target.device.sm for target in gpus()[0]}
    return here.pop() if len(here) == 1 else None


def exit_code(reports: Sequence[Report]) -> int:
    """1 if any module is flagged, 0 if all are clean, 2 otherwise: nothing, or not all, judged."""
    verdicts = {report.verdict for report in reports}
    if FLAGGED in verdicts:
        return UNSAFE
    return SAFE if verdicts == {CLEAN} else NOT_ASSESSED


def lines(reports: Sequence[Report]) -> Iterator[str]:
    """One block per module: the verdict, the evidence line by line, the remedy."""
    for report in reports:
        module = report.module
        where = f" for SM{report.sm}" if report.sm else ""
        what = f"{module.name} ({module.kind}{where})"
        yield f"{report.verdict}  {what}  {module.path or 'not built'}"
        yield from (f"    {line}" for line in report.evidence)
        if report.remedy:
            yield f"    remedy: {report.remedy}"
    counts = Counter(report.verdict for report in reports)
    if not reports:
        yield "nothing to audit: no FP4 GEMM module is built here, and FlashInfer is not installed"
    else:
        yield ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))


def progress() -> Progress | None:
    """Shows on a terminal how much machine code has been read; None where nobody looks."""
    if not sys.stderr.isatty():
        return None

    def show(name: str, done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        said = f"{printable(name)}: {done >> 10} of {total >> 10} KiB of machine code"
        sys.stderr.write(f"\r{said}{end}")
        sys.stderr.flush()

    return show
